"""The loop on networks small enough to check: one update against torch.optim, the scaler's rules, the schedule.

Images are made here; nothing is read from disk. Run it alone: pytest tests/test_train.py
"""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from tiny import computed_metrics, metrics, network, subset
from torch import nn
from trainings import BF16, CPU, FP16, FP32, batches, difference, finish, piece, trained, trainer, update

from commands.train import watch_layers
from dataset import Batches
from distributed import Ranks
from evaluate import evaluate
from model import StepModel, update_ema
from optimizer import hold_from_fault_on, make_optimizer, make_scheduler
from runs.checkpoint import Progress, load_checkpoint
from train import Trainer
from transforms import Preprocess
from utils import RunError, Stopped

pytestmark = pytest.mark.filterwarnings("error")


# ------------------------------------------------------------------------------- one update
@pytest.mark.parametrize("name", ["ADAM", "ADAMW", "SGD"])
def test_fp32_update_is_a_plain_torch_optim_step_bit_for_bit(name):
    ours = network()
    plain = network()
    optimizer = make_optimizer(ours.parameters(), name, learning_rate=1e-2, weight_decay=1e-4, fused=True)
    rule = {"ADAM": torch.optim.Adam, "ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    extra = {"momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.999), "eps": 1e-8}
    reference = rule(plain.parameters(), lr=1e-2, weight_decay=1e-4, fused=True, **extra)
    for step in range(5):
        images, labels, *_ = piece(8, seed=step)
        found = update(ours, optimizer, [piece(8, seed=step)], 8)
        reference.zero_grad()
        loss = nn.functional.cross_entropy(plain(images), labels, reduction="sum")
        (loss / 8).backward()
        norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        reference.step()
        assert found[0] == loss and found[2] == norm and found[4] == 1
    assert difference(ours, plain) == 0
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_an_infinity_in_fp16_skips_the_update_and_halves_the_scale(fused):
    model = network(spoil=[2])
    optimizer = make_optimizer(model.parameters(), "ADAM", learning_rate=1e-2, weight_decay=1e-4, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    update(model, optimizer, [piece()], 6, FP16, scaler)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    later = model.body.weight.register_hook(lambda gradient: gradient * math.inf)  # backward meets the head's first
    found = update(model, optimizer, [piece(seed=1)], 6, FP16, scaler)
    later.remove()
    names = [name for name, _ in model.named_parameters()]
    assert names[int(found[3])] == "head.weight" and not math.isfinite(found[2]) and found[4] == 256
    assert scaler.get_scale() == 128
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for index, moments in optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, state[index][name]), name
    update(model, optimizer, [piece(seed=2)], 6, FP16, scaler)
    assert scaler.get_scale() == 128 and any(not torch.equal(t, weights[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("sizes", [(5, 5, 2), (1, 11)])
@pytest.mark.parametrize("precision", [FP32, FP16], ids=["fp32", "fp16"])
def test_pieces_of_any_size_make_the_update_of_the_whole_batch(sizes, precision):
    images, labels, *_ = piece(12)
    cuts = list(np.cumsum((0, *sizes)))
    parts = [(images[a:b], labels[a:b], 1, b == 12) for a, b in zip(cuts, cuts[1:], strict=False)]
    results = []
    for pieces in ([piece(12)], parts):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        found = update(model, optimizer, pieces, 12, precision)
        results.append((model, found))
    tolerance = 1e-6 if precision is FP32 else 2e-3
    assert difference(results[0][0], results[1][0]) < tolerance
    assert difference(results[0][0], network()) > 10 * tolerance
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)


def test_a_piece_of_weight_zero_changes_nothing():
    models = [network(), network()]
    for model, extra in zip(models, ([], [piece(1, seed=9, weight=0)]), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        found = update(model, optimizer, [piece(6, last=not extra), *extra], 6)
        assert found[1] <= 6
    assert difference(*models) == 0


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_clipping_sees_true_gradients(precision):
    """With the scale 2**16 still on them, gradients clipped to 0.1 would come out 65536 times too small."""
    moved = []
    for one in (FP32, precision):
        model = network()
        before = network()
        found = update(model, torch.optim.SGD(model.parameters(), lr=1.0), [piece(12)], 12, one, clip=0.1)
        assert found[2] > 0.2  # the norm that is reported is the one before clipping
        moved.append([a.detach() - b.detach() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
        assert float(nn.utils.get_total_norm(moved[-1])) == pytest.approx(0.1, rel=1e-4)
    for exact, ours in zip(*moved, strict=True):
        torch.testing.assert_close(ours, exact, atol=5e-3, rtol=0.05)


def test_the_weights_stay_float32_and_autocast_reaches_the_forward_pass():
    seen = []
    model = network()
    model.body.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in (FP32, BF16, FP16):
        update(model, torch.optim.SGD(model.parameters(), lr=0.1), [piece()], 6, precision)
    assert seen == [torch.float32, torch.bfloat16, torch.float16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------- schedule
def rates(decay_type, epochs, per_epoch, warmup=None, done=0, skip_first=False):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = make_scheduler(
        optimizer, decay_type, epochs=epochs, updates_per_epoch=per_epoch, warmup_epochs=warmup, done=done
    )
    found = []
    for number in range(done, epochs * per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        if number or not skip_first:
            optimizer.step()
        scheduler.step()
    return found


def closed_form(total, warmup):
    return [
        0.3
        * ((t + 1) / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup + 1) / (total - warmup + 1))))
        for t in range(total)
    ]


@pytest.mark.parametrize(
    "epochs, per_epoch, warmup, expected",
    [
        (120, 44, None, 528),
        (10, 7, None, 7),
        (10, 7, 2, 14),
        (4, 5, 0.5, 2),
        (4, 5, 1.3, 6),
        (3, 5, 0, 1),
        (1, 1, None, 1),
        (1, 9, None, 1),
        (1, 9, 1, 9),
        (2, 3, 2, 6),
    ],
)
def test_cosine_with_warmup_is_the_closed_form(epochs, per_epoch, warmup, expected):
    found = rates("cosine_warmup", epochs, per_epoch, warmup)
    assert found == pytest.approx(closed_form(epochs * per_epoch, expected), rel=1e-12, abs=0)
    assert min(found) > 0 and found.count(max(found)) == 1


@pytest.mark.parametrize("decay_type", ["cosine_warmup", "linear_warmup", "step", "step_warmup"])
def test_a_schedule_stands_where_it_stood_after_a_resume_and_after_a_skipped_update(decay_type):
    """And a first update that was skipped makes PyTorch warn of nothing."""
    whole = rates(decay_type, 6, 4, 1)
    assert rates(decay_type, 6, 4, 1, skip_first=True) == whole
    for done in (1, 3, 4, 5, 17):
        assert rates(decay_type, 6, 4, 1, done) == whole[done:]


def test_linear_decay_goes_in_even_steps_from_its_peak_to_just_above_zero():
    found = rates("linear_warmup", 10, 7)
    warmup = 7  # an epoch, a tenth
    assert found[:warmup] == pytest.approx([0.3 * (t + 1) / warmup for t in range(warmup)], rel=1e-12)
    assert found[warmup:] == pytest.approx([0.3 * (64 - step) / 64 for step in range(1, 64)], rel=1e-12)


def test_a_schedule_made_again_on_the_same_optimizer_starts_from_its_peak():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    for _ in range(2):
        scheduler = make_scheduler(optimizer, "cosine_warmup", epochs=5, updates_per_epoch=4)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.15)
        for _ in range(13):
            scheduler.step()


def test_step_is_torchs_multi_step_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60, 90], 0.1)
    expected = []
    for _ in range(100):
        expected += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        reference.step()
    assert rates("step", 100, 3) == pytest.approx(expected, rel=1e-12)


def test_step_warmup_counts_its_milestones_from_the_end_of_warmup():
    found = rates("step_warmup", 100, 3)
    warmup = 15  # five epochs
    assert found[:warmup] == pytest.approx([0.3 * (t + 1) / warmup for t in range(warmup)], rel=1e-12)
    assert found[warmup:] == pytest.approx(rates("step", 95, 3), rel=1e-12)


# ---------------------------------------------------------------------------------- trainer
@pytest.mark.parametrize("precision", [FP32, FP16], ids=lambda p: p.name)
def test_each_update_runs_at_the_rate_of_the_schedule(tmp_path, precision):
    used = []
    made = trainer(tmp_path, network(spoil=[3]) if precision is FP16 else None, precision, rate=0.3, epochs=4)
    made.recipe.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    finish(made)
    assert used == pytest.approx(closed_form(12, 1), rel=1e-12)


@pytest.mark.parametrize("fused, decay_type", [(True, "cosine_warmup"), (False, "step")])
def test_skips_are_counted_named_and_shift_nothing(tmp_path, fused, decay_type):
    found = trained(tmp_path, network(spoil=[1, 5]), FP16, fused=fused, decay_type=decay_type)
    plain = trained(tmp_path / "plain", network(), FP16, fused=fused, decay_type=decay_type)
    first, second = metrics(tmp_path)
    assert [first["skipped_updates"], second["skipped_updates"]] == [1, 1]
    assert first["skips"] == [{"update": 1, "parameter": "head.weight", "scale": 65536.0}]
    assert second["skips"] == [{"update": 5, "parameter": "head.weight", "scale": 32768.0}]
    assert second["loss_scale"] == 16384 and math.isfinite(first["train_loss"])
    ours, theirs = (run.recipe.optimizer.param_groups[0]["lr"] for run in (found, plain))
    assert ours == theirs


def test_fp32_stops_at_a_loss_that_is_not_finite_and_names_the_place(tmp_path):
    with pytest.raises(RunError, match=r"epoch 2, update 2 of 3 .*\n?.*") as failure:
        trained(tmp_path, network(spoil=[5]), FP32, epochs=3)
    assert "best_model.pt of epoch 1" in str(failure.value) and str(tmp_path) in str(failure.value)
    kept = load_checkpoint(tmp_path / "last.pt")
    assert kept["progress"]["epoch"] == 1 and all(t.isfinite().all() for t in kept["model"].values())
    assert len(metrics(tmp_path)) == 1


def test_without_a_scaler_the_weights_stay_from_the_first_fault_on():
    model = network()
    optimizer = make_optimizer(model.parameters(), "ADAM", learning_rate=0.1, weight_decay=0.0, fused=True)
    for norm, moves in ((1.0, True), (math.nan, False), (1.0, False)):
        before = model.body.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm)
        hold_from_fault_on(optimizer, torch.tensor(norm), FP32.grad_scaler())
        optimizer.step()
        assert torch.equal(before, model.body.weight) is not moves


def test_a_diverging_scale_warns_once_below_one_and_ends_the_run(tmp_path, caplog):
    with pytest.raises(RunError, match="every update overflows"):
        trained(tmp_path, network(spoil=range(1, 1000)), FP16, epochs=20)
    warned = [text for text in caplog.messages if "loss scale fell" in text]
    assert len(warned) == 1 and "head.weight" in warned[0]


def seen_batches(folder, precision, **options):
    model = network()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()) if module.training else None)
    trained(folder, model, precision, **options)
    return seen


def test_every_precision_sees_the_same_batches(tmp_path):
    ours = {p.name: seen_batches(tmp_path / p.name, p) for p in (FP32, BF16, FP16)}
    assert [len(images) for images in ours["fp32"]] == [8, 8, 6] * 2
    for name in ("amp-bf16", "amp-fp16"):
        assert all(torch.equal(a, b) for a, b in zip(ours["fp32"], ours[name], strict=True))
    assert not torch.equal(ours["fp32"][0], ours["fp32"][3])


@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=lambda p: p.name)
def test_a_run_repeats_bit_for_bit_and_learns(tmp_path, precision):
    one, other = (trained(tmp_path / name, precision=precision, epochs=12, rate=0.05) for name in "ab")
    assert difference(one.network.model, other.network.model) == 0
    kept = [computed_metrics(tmp_path / name) for name in "ab"]
    assert kept[0] == kept[1]
    assert kept[0][-1]["train_loss"] < 0.7 * kept[0][0]["train_loss"] and one.progress.best_val_acc > 60


def test_watching_layers_writes_what_they_compute_and_changes_nothing(tmp_path):
    largest = []
    model = network()
    model.body.register_forward_hook(
        lambda body, given, out: largest.append(out.abs().max().item()) if body.training else None
    )
    made = trainer(tmp_path / "watched", model, FP16)
    watch_layers(made, every=2)
    made.run.file("layers.jsonl").write_text('{"update": 1}\n{"update": 4}\n')  # of updates that are made again
    made.train()
    made.run.close()
    lines = [json.loads(line) for line in made.run.file("layers.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 4, 6]
    assert [line["layers"]["body"]["output"] for line in lines[1:]] == largest[1::2]
    assert {"output", "gradient", "zeros"} == set(lines[1]["layers"]["head"]) and lines[1]["loss_scale"] == 2.0**16
    assert lines[1]["layers"]["head"]["gradient"] > 100  # with the loss scale
    plain = trained(tmp_path / "plain", network(), FP16)
    assert difference(model, plain.network.model) == 0
    assert not model.body._backward_hooks and len(model.body._forward_hooks) == 1


def test_memory_of_warming_up_counts_only_where_there_is_no_other(tmp_path, monkeypatch):
    readings = iter((90.0, 900.0, 500.0, 800.0, 120.0))  # before the first update, and in each epoch
    monkeypatch.setattr("metrics.reset_peak_memory", lambda device: True)
    monkeypatch.setattr("metrics.peak_memory", lambda device: {"peak_memory_mb": next(readings)})
    run = trained(tmp_path, epochs=4, freeze_epochs=2, heads=("head",))
    assert run.progress.peak_memory_mb == 500 and run.progress.training_memory_mb == 500 - 90


def test_training_memory_is_unknown_if_the_system_begins_no_new_peak_and_in_runs_of_earlier_versions(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metrics.reset_peak_memory", lambda device: False)
        run = trained(tmp_path, epochs=1)
    assert run.progress.peak_memory_mb > 0 and run.progress.training_memory_mb is None
    stored = {name: value for name, value in vars(run.progress).items() if name != "training_peaks"}
    assert Progress.restored(stored).training_memory_mb is None


def test_saving_is_no_training_time(tmp_path, monkeypatch):
    original = Trainer._save

    def slowly(self):
        time.sleep(0.2)
        original(self)

    monkeypatch.setattr(Trainer, "_save", slowly)
    trained(tmp_path, epochs=1, save_every_updates=1)
    (line,) = metrics(tmp_path)
    assert line["elapsed"] - line["seconds"] > 0.4


def test_two_ranks_fill_their_own_rows_of_the_logits(monkeypatch):
    monkeypatch.setattr(Ranks, "sum", lambda *_: None)
    model = network().eval()
    images = subset(11)
    whole, *parts = (
        evaluate(model, Batches(images, Preprocess(CPU, 9), 4, 3, ranks=ranks), FP32, keep_logits=True).logits
        for ranks in (Ranks(), Ranks(0, 0, 2), Ranks(1, 1, 2))
    )
    assert np.allclose(whole, sum(parts), atol=1e-6) and not parts[0][1::2].any() and not parts[1][::2].any()


def test_accumulation_gives_the_run_of_whole_batches(tmp_path):
    whole = trained(tmp_path / "whole", optimizer="SGD", batch_options={"batch_size": 7})
    cut = trained(tmp_path / "cut", optimizer="SGD", batch_options={"batch_size": 7, "accumulate": 3})
    assert difference(whole.network.model, cut.network.model) < 1e-6 < difference(whole.network.model, network())
    one = metrics(tmp_path / "whole")[-1]
    other = metrics(tmp_path / "cut")[-1]
    for name in ("train_loss", "train_acc", "val_loss", "val_acc", "learning_rate"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_metrics_are_what_a_loop_by_hand_finds(tmp_path):
    """At rate ~0 the weights stand still, so the epoch's loss and accuracy are those of the first network."""
    trained(tmp_path, rate=1e-12, epochs=1)
    model = network()
    fed = batches(seed=3)
    with torch.no_grad():
        seen = [(model(images), labels) for pieces in fed.epoch(0) for images, labels, *_ in pieces]
    logits, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    line = metrics(tmp_path)[0]
    assert line["train_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert line["train_acc"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))


def test_label_smoothing_changes_the_training_loss_alone(tmp_path):
    plain = trained(tmp_path / "plain", rate=1e-12, epochs=1)
    smooth = trained(tmp_path / "smooth", rate=1e-12, epochs=1, label_smoothing=0.5)
    one, other = (metrics(run.run.path)[0] for run in (plain, smooth))
    assert one["train_loss"] != other["train_loss"] and one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-6)


def test_ema_is_validated_and_kept_and_its_weights_lag(tmp_path):
    model = network()
    expected = model.head.weight.detach().clone()
    trail = []
    made = trainer(tmp_path, model, ema=0.15, epochs=1)
    made.recipe.optimizer.register_step_post_hook(lambda *_: trail.append(model.head.weight.detach().clone()))
    finish(made)
    # The average by hand; the schedule's own empty step comes before the three updates.
    for weights, decay in zip(trail[-3:], (1 / 10, 0.15, 0.15), strict=True):
        expected = decay * expected + (1 - decay) * weights
    best = load_checkpoint(tmp_path / "best_model.pt")
    last = load_checkpoint(tmp_path / "last.pt")
    assert best["model"].keys() == last["model"].keys()
    torch.testing.assert_close(made.network.average.head.weight, expected)
    assert torch.equal(best["model"]["head.weight"], made.network.average.head.weight)
    assert torch.equal(last["model"]["head.weight"], model.head.weight) and difference(made.network.average, model) > 0


def test_ema_follows_buffers_and_counts():
    model = nn.BatchNorm1d(2)
    average = nn.BatchNorm1d(2)
    model(torch.randn(8, 2))
    update_ema(average, model, 0.9, 10**6)
    torch.testing.assert_close(average.running_mean, 0.1 * model.running_mean)
    assert average.num_batches_tracked == model.num_batches_tracked == 1


def test_compiled_sizes_are_those_of_full_batches(monkeypatch):
    """A ragged batch that comes first, as after a resume, does not take the compiled graph's place."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda images: calls.append(len(images)) or model(images))
    forward = StepModel(network(), batches(batch_size=10, accumulate=3).full_sizes, True)
    for count in (2, 4, 3, 4, 1):
        assert forward(torch.zeros(count, 3, 9, 9)).shape == (count, 3)
    assert calls == [4, 3, 4]


def test_freeze_epochs_train_the_head_alone_at_first(tmp_path):
    kept = []
    model = network()
    made = trainer(
        tmp_path,
        model,
        heads=("head",),
        freeze_epochs=1,
        on_epoch=lambda line: kept.append(copy.deepcopy(model.state_dict())),
    )
    finish(made)
    before = network().state_dict()
    assert torch.equal(kept[0]["body.weight"], before["body.weight"])
    assert not torch.equal(kept[0]["head.weight"], before["head.weight"])
    assert not torch.equal(kept[1]["body.weight"], kept[0]["body.weight"])


def test_the_best_epoch_is_kept_not_the_last_but_of_the_largest_images(tmp_path):
    """What a network learned from smaller images may look as good on a few validation images by chance."""
    found = iter([50.0, 90.0, 70.0, 60.0])
    made = trainer(tmp_path, epochs=4, batch_options={"start_size": 5})
    made.batches.sizes = [5, 5, 9, 9]
    validate = made._validate

    def scripted():
        real = validate()
        predicted = (np.arange(100) >= next(found)).astype(int)
        return type(real)(np.zeros(100, int), predicted, 2, real.loss_sum)

    made._validate = scripted
    finish(made)
    best = load_checkpoint(tmp_path / "best_model.pt")
    assert (best["epoch"], best["val_acc"]) == (3, 70.0) and made.progress.best_epoch == 3


def test_a_stop_signal_saves_and_says_where(tmp_path):
    made = trainer(tmp_path, epochs=50)
    made.on_epoch = lambda line: setattr(made.stop, "number", 15)
    with pytest.raises(Stopped, match="epoch 2 after update 1 of 3") as stopped:
        finish(made)
    assert stopped.value.exit_status == 143
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["update"] == 1


def test_what_is_left_of_a_run_grows_with_the_size_of_its_images(tmp_path):
    made = trainer(tmp_path, epochs=4)
    made.run.close()
    made.batches.sizes = [10, 10, 40, 40]
    at = made.progress
    at.history = [{"elapsed": 8.0}, {"elapsed": 16.0}]  # an epoch of 10 x 10 pixels took 8 seconds
    at.epoch = 2
    assert made.seconds_left() == pytest.approx(2 * 4**1.5 * 8)
    at.history.append({"elapsed": 80.0})
    at.epoch = 3
    at.update = 1
    assert made.seconds_left() == pytest.approx(64 * (1 - 1 / made.batches.updates_per_epoch))
    at.history = []
    at.epoch = 0
    made.epoch_begun = time.perf_counter() - 5
    assert made.seconds_left() == pytest.approx(5 * (made.batches.updates_per_epoch * 18 - 1), rel=0.05)


def test_what_is_prepared_once_is_not_left_for_every_epoch(tmp_path, monkeypatch):
    made = trainer(tmp_path, epochs=4)
    order = []
    monkeypatch.setattr(made.batches, "prepare", lambda: order.append("prepared") or time.sleep(0.3))
    left = []
    made.on_epoch = lambda line: order.append("epoch") or left.append(made.seconds_left() / line["seconds"])
    finish(made)
    assert order == ["prepared", *["epoch"] * 4]
    assert made.prepared >= 0.3 and made.progress.history[0]["elapsed"] > made.prepared
    assert left[0] == pytest.approx(
        3 * (made.progress.history[0]["elapsed"] - made.prepared) / made.progress.history[0]["seconds"]
    )
