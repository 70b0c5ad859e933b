"""The numbers of a training: what a skipped update leaves, which epoch is best, how batches are cut, what is stated."""

import copy
import itertools
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import tiny
import torch
import trainings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import BF16, CPU, FP16, FP32, finish

import commands.train
from dataset import Batches
from distributed import Ranks
from metrics import UnusedParameters, best_epochs
from model import update_ema
from optimizer import make_optimizer, make_scheduler
from runs.checkpoint import Progress, load_checkpoint
from runs.evaluation import Evaluation
from transforms import Preprocess
from utils import RunError, Stopped


def update(model, optimizer, pieces, *, precision=FP16, **options):
    """One update by the recipe, on pieces of six images each."""
    fed = [(images, torch.arange(6) % 3, 1, images is pieces[-1]) for images in pieces]
    return trainings.update(model, optimizer, fed, 6 * len(pieces), precision, **options)


def images(seed=0, factor=1.0):
    return factor * torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def classifier():
    """Return a network with two layers of BatchNorm, and its optimizer."""
    torch.manual_seed(0)
    model = tiny.Classifier(3)
    return model, make_optimizer(model.parameters(), "ADAM", learning_rate=1e-2, weight_decay=0.0, fused=True)


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------- buffers of a skipped update
OVERFLOW = 1e6  # beyond 65,504 after the first convolution


@pytest.mark.parametrize("pieces", [[OVERFLOW, 1.0], [1.0, OVERFLOW]])
def test_a_skipped_update_leaves_running_statistics_and_counts_as_they_were(pieces):
    model, optimizer = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    update(model, optimizer, [images(1)], scaler=scaler)
    before = buffers_of(model)
    weights = copy.deepcopy(list(model.parameters()))
    row = update(model, optimizer, [images(2, factor) for factor in pieces], scaler=scaler)
    assert not row[2].isfinite() and scaler.get_scale() == 8
    assert same(before, buffers_of(model))
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    update(model, optimizer, [images(3)], scaler=scaler)
    after = buffers_of(model)
    assert not same(before, after) and all(buffer.isfinite().all() for buffer in after.values())
    assert after["features.1.num_batches_tracked"] == 2


def test_an_overflow_of_the_backward_pass_alone_leaves_them_as_they_were_too():
    model, optimizer = classifier()
    before = buffers_of(model)
    row = update(model, optimizer, [images()], scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    assert row[0].isfinite() and not row[2].isfinite()
    assert same(before, buffers_of(model))


@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=lambda precision: precision.name)
def test_an_update_that_is_not_skipped_writes_what_the_forward_pass_writes(precision):
    model, optimizer = classifier()
    plain = copy.deepcopy(model)
    with precision.autocast():
        plain(images())
    update(
        model,
        optimizer,
        [images()],
        precision=precision,
        scaler=torch.amp.GradScaler("cpu", 16.0, enabled=precision is FP16),
    )
    assert same(buffers_of(plain), buffers_of(model))


class Operators(TorchDispatchMode):
    """Counts the operators that are called, and those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.called.append(str(operator))
        return operator(*args, **(kwargs or {}))

    @property
    def waits(self):
        return [name for name in self.called if "_local_scalar_dense" in name or "nonzero" in name]


def test_an_update_waits_for_nothing_and_keeps_its_buffers_only_with_a_scaler():
    """With clipping, an average, a schedule and the search for unused parameters."""
    counts = {}
    for precision, clip in itertools.product((FP32, BF16, FP16), (None, 1.0)):
        model, optimizer = classifier()
        average = copy.deepcopy(model)
        schedule = make_scheduler(optimizer, "cosine_warmup", epochs=2, updates_per_epoch=5)
        UnusedParameters(optimizer, model).due = True
        with Operators() as seen:
            update(model, optimizer, [images(), images(1)], precision=precision, clip=clip)
            schedule.step()
            update_ema(average, model, 0.9, 3)
        assert seen.waits == []
        counts[precision.name] = sum("aten.cat" in name or "aten.where" in name for name in seen.called)
    assert counts == {"fp32": 0, "amp-bf16": 0, "amp-fp16": 6}  # two types: before, after, the choice
    with Operators() as seen:
        float(model.fc.weight.detach().sum())
    assert len(seen.waits) == 1


class Bright(tiny.Classifier):
    """Sees one batch of a training a million times too bright: the forward pass of float16 overflows there."""

    def __init__(self, when):
        super().__init__(3)
        self.when = when
        self.seen = 0

    def forward(self, pixels):
        self.seen += self.training
        bright = self.training and self.seen == self.when
        return super().forward(pixels * OVERFLOW if bright else pixels)


def trainer(folder, model, precision=FP32, **options):
    """One whose loss scale is low enough for BatchNorm."""
    made = trainings.trainer(folder, model, precision, side=12, **options)
    made.scaler = made.meter.scaler = torch.amp.GradScaler("cpu", 16.0, enabled=precision is FP16)
    return made


def trained(*positional, **options):
    return finish(trainer(*positional, **options))


def test_a_run_outlives_a_batch_that_overflowed(tmp_path):
    torch.manual_seed(0)
    made = trained(tmp_path, Bright(2), precision=FP16, ema=0.9)
    history = made.progress.history
    assert [line["skipped_updates"] for line in history] == [1, 0]
    assert all(math.isfinite(line["val_loss"]) for line in history)
    last = load_checkpoint(tmp_path / "last.pt")
    for weights in (last["model"], last["ema"]):
        assert all(value.isfinite().all() for value in weights.values())
    assert last["model"]["features.1.num_batches_tracked"] == 5  # six updates, one of them skipped


def test_a_validation_that_statistics_spoil_is_told_so_and_no_precision_is_advised(tmp_path):
    model = Bright(0)
    model.features[1].running_var.fill_(math.nan)
    with pytest.raises(RunError) as error:
        trained(tmp_path / "run", model, precision=FP16)
    said = str(error.value)
    assert "features.1.running_var" in said and "--overwrite" in said and "bfloat16" not in said
    assert not hasattr(error.value, "record") and not (tmp_path / "run" / "best_model.pt").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """last.pt of a finished run with an average of its weights."""
    return trained(tmp_path_factory.mktemp("finished"), Bright(0), ema=0.9, epochs=1).run.file("last.pt")


@pytest.mark.parametrize("part", ["model", "ema"])
@pytest.mark.parametrize(
    ("name", "said"), [("features.1.running_mean", "no precision"), ("fc.weight", "diverged"), (None, "damaged")]
)
def test_a_checkpoint_that_is_not_finite_or_damaged_says_what_to_do(part, name, said, finished, tmp_path):
    content = torch.load(finished, weights_only=True)
    if name:
        content[part][name].view(-1)[0] = math.inf
    else:
        content["ema"] = [] if part == "model" else {"fc.weight": 1.0}
    torch.save(content, tmp_path / "last.pt")
    (tmp_path / "best_model.pt").touch()
    found = tiny.refused(load_checkpoint, tmp_path / "last.pt")
    assert said in found and (name or "") in found
    if said == "no precision":
        assert f"--pretrained_path {tmp_path / 'best_model.pt'}" in found


# --------------------------------------------------------------------------------- the best epoch
def history(*epochs, **more):
    """Lines of metrics from pairs of accuracy and loss."""
    return [
        {"epoch": number, "val_acc": accuracy, "val_balanced_acc": accuracy, "val_macro_f1": accuracy, "val_loss": loss}
        | {name: values[number - 1] for name, values in more.items()}
        for number, (accuracy, loss) in enumerate(epochs, 1)
    ]


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(26.0, 2.0), (26.0, 1.5)], [2]),
        ([(26.0, 1.5), (26.0, 2.0)], [1]),
        ([(26.0, 1.5), (30.0, 2.0), (26.0, 1.0)], [2]),
        ([(26.0, 1.5), (26.0, 1.5), (20.0, 1.0)], [1, 2]),
        ([(26.0, math.nan), (26.0, 9.0)], [2]),
        ([(20.0, 1.0), (90.0, math.nan)], [1]),
        ([(math.nan, 1.0), (1.0, 2.0)], [2]),
        ([(26.0, math.nan)], []),
        ([], []),
    ],
)
def test_of_equal_figures_the_lower_loss_is_the_best(epochs, best):
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert best_epochs(history(*epochs), name) == best


def test_by_loss_the_lowest_is_the_best_whatever_the_accuracy():
    assert best_epochs(history((10.0, 1.0), (90.0, 1.5), (20.0, 1.0)), "loss") == [1, 3]


def test_larger_images_begin_anew_with_the_same_rule():
    lines = history((90.0, 0.1), (30.0, 2.0), (30.0, 1.9), image_size=[24, 32, 32])
    assert best_epochs(lines, "accuracy") == [3] and best_epochs(lines[:2], "accuracy") == [2]


def scripted(made, epochs):
    """Lets each validation find an accuracy of so many percent and a loss, by epoch."""

    def validate():
        accuracy, loss = epochs[made.progress.epoch]
        predicted = (np.arange(100) >= accuracy).astype(int)
        return Evaluation(np.zeros(100, int), predicted, 2, 100 * loss)

    made._validate = validate
    return made


PLATEAU = [(50, 2.0), (50, 1.0), (50, 1.0), (50, 1.5), (40, 0.1), (50, 1.1), (45, 0.0)]


@pytest.mark.parametrize("stop", [None, 3])
def test_patience_counts_from_the_first_of_equal_epochs_also_after_a_resume(stop, tmp_path):
    made = scripted(trainer(tmp_path, tiny.Classifier(3), epochs=7, patience=4), PLATEAU)
    if stop:
        made.on_epoch = lambda line: line["epoch"] == stop and setattr(made.stop, "number", 15)
        with pytest.raises(Stopped):
            finish(made)
        made = scripted(trainer(tmp_path, tiny.Classifier(3), epochs=7, patience=4), PLATEAU)
        made.load_state(load_checkpoint(tmp_path / "last.pt"))
    finish(made)
    assert (made.progress.epoch, made.progress.best_epoch) == (6, 3)
    assert load_checkpoint(tmp_path / "best_model.pt")["epoch"] == 3


# ------------------------------------------------------------------------------------ micro-batches
def cut(count, batch_size, accumulate=1, ranks=1):
    """How many images each micro-batch of an epoch holds: by update, then by rank."""
    feeds = [
        Batches(
            tiny.subset(count), Preprocess(CPU, 9), batch_size, 3, accumulate=accumulate, ranks=Ranks(rank, rank, ranks)
        )
        for rank in range(ranks)
    ]
    updates = range(feeds[0].updates_per_epoch)
    return [[[len(piece) for piece in fed._pieces(update, fed.ranks.rank)] for fed in feeds] for update in updates]


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulate", "last"),
    [
        (41, 32, 8, [4, 5]),  # nine images left over: not 2, 1, 1, 1, 1, 1, 1, 1
        (42, 32, 8, [4, 4, 2]),
        (40, 32, 8, [4, 4]),
        (33, 32, 8, [4] * 7 + [5]),  # a single image joins the update before
        (35, 32, 8, [3]),
        (7, 32, 8, [4, 3]),  # fewer images than a batch
        (64, 32, 8, [4] * 8),
        (21, 5, 3, [2, 2, 2]),
        (17, 10, 3, [4, 3]),
        (5, 3, 3, [1, 1]),  # single images were asked for
        (9, 8, 1, [9]),
        (12, 8, 1, [4]),
        (1, 4, 1, [1]),
    ],
)
def test_micro_batches_of_a_ragged_batch_keep_their_size(count, batch_size, accumulate, last):
    assert cut(count, batch_size, accumulate)[-1] == [last]
    fed = Batches(tiny.subset(count), Preprocess(CPU, 9), batch_size, 3, accumulate=accumulate)
    assert fed.images_in(fed.updates_per_epoch - 1) == sum(last)


def test_every_image_is_in_one_micro_batch_and_the_smallest_is_known():
    for count, batch_size, accumulate, ranks in itertools.product((5, 13, 16, 17), (4, 7, 8), (1, 3), (1, 2, 3)):
        if batch_size < ranks * accumulate:
            continue
        pieces = cut(count, batch_size, accumulate, ranks)
        assert sum(size for update in pieces for rank in update for size in rank) == count
        full = -(-batch_size // ranks // accumulate) + 1
        assert all(size <= full + 1 for update in pieces for rank in update for size in rank)
        options = {"accumulate": accumulate, "ranks": Ranks(0, 0, ranks)}
        fed = Batches(tiny.subset(count), Preprocess(CPU, 9), batch_size, 3, **options)
        assert fed.smallest_micro_batch == max(1, min(size for update in pieces for rank in update for size in rank))


def test_an_epoch_yields_these_micro_batches():
    for mixup in (0.0, 0.4):
        fed = Batches(tiny.subset(41), Preprocess(CPU, 9), 32, 3, accumulate=8, mixup=mixup)
        sizes = [[len(images) for images, *_ in update] for update in fed.epoch(0)]
        assert sizes == [[4] * 8, [4, 5]]
        lasts = [[last for *_, last in update] for update in fed.epoch(0)]
        assert lasts == [[False] * 7 + [True], [False, True]]


def tiny_deep(*, weights=None, **options):
    """Return a classifier whose last BatchNorm gets one pixel of an image of 16 px, too few for a single image."""
    model = tiny.Classifier(**options)
    model.features[0].stride = model.features[3].stride = (4, 4)
    return model


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--batch_size=6", "--accumulate=4"], 2),  # 19 images: full batches are cut 2, 2, 1, 1, the last 2, 2, 3
        (["--batch_size=16", "--accumulate=4"], 0),  # the three left over stay together
    ],
)
def test_a_micro_batch_of_a_single_image_is_refused_in_words(words, status, data, tmp_path, capsys, monkeypatch):
    tiny_deep.__module__ = "torchvision.models.tiny"
    monkeypatch.setitem(tiny.torchvision_registry.BUILTIN_MODELS, "tiny_deep", tiny_deep)
    words = ["--model=tiny_deep", "--image_size=16", "--epochs=1", *words]
    assert tiny.train(data, tmp_path, *words) == status
    said = capsys.readouterr().err
    assert ("micro-batch of 1 such image" in said and "--accumulate" in said) == (status == 2)


# -------------------------------------------------------------------------------------- peak memory
def stated_peak(sizes, trained, *, search=0.0):
    """Return a run's peak if an epoch takes size² x trained layers, and `search` more in its warm-up."""
    at = Progress()
    for epoch, kind in enumerate(zip(sizes, trained, strict=True)):
        warming = epoch == 0 or kind != (sizes[epoch - 1], trained[epoch - 1])
        at.note_peak(*kind, kind[0] ** 2 * kind[1] + search * warming, warming=warming)
    return at.peak_memory_mb


def test_what_warming_up_took_counts_only_where_no_epoch_was_steady():
    assert stated_peak([32] * 3, [1] * 3, search=500.0) == 32**2
    assert stated_peak([16, 32, 32], [1, 1, 1], search=5000.0) == 32**2  # the small images', too
    assert stated_peak([32, 32, 32], [1, 1, 9], search=500.0) == 32**2 * 9 + 500
    assert stated_peak([32], [1], search=500.0) == 32**2 + 500


def test_a_run_of_growing_images_states_the_peak_of_the_largest(tmp_path, monkeypatch):
    made = trainer(tmp_path, tiny.Classifier(3), epochs=3)
    made.batches.sizes = [8, 8, 12]
    made.batches._input = {size: Preprocess(CPU, size) for size in (8, 12)}
    taken = [size**2 for size in made.batches.sizes]
    monkeypatch.setattr("metrics.peak_memory", lambda device: {"peak_memory_mb": taken[made.progress.epoch]})
    finish(made)
    assert made.progress.peak_memory_mb == 12**2
    again = trainer(tmp_path / "again", tiny.Classifier(3), epochs=3)
    again.load_state(load_checkpoint(tmp_path / "last.pt"))
    again.run.close()
    assert again.progress.peak_memory_mb == 12**2


# -------------------------------------------------------------------- parameters without a gradient
class Unused(tiny.Classifier):
    """Holds layers that its forward pass does not use, before, between and after those that it uses."""

    def __init__(self, unused=("a_norm", "features_extra", "z_head")):
        super().__init__(3)
        used = dict(self.named_children())
        for name in used:
            delattr(self, name)
        for name in sorted([*used, *unused]):
            self.add_module(name, used.get(name) or nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["features.4.bias", "fc.weight"])
def test_the_alarm_names_the_layer_where_others_get_no_gradient(name, tmp_path):
    torch.manual_seed(0)
    model = Unused()
    passes = itertools.count(1)
    model.get_parameter(name).register_hook(lambda gradient: gradient * (math.inf if next(passes) == 2 else 1))
    made = trained(tmp_path, model, precision=FP16, epochs=1)
    (skip,) = made.progress.history[0]["skips"]
    assert (skip["update"], skip["parameter"]) == (2, name)


def test_parameters_without_a_gradient_are_named_once(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trained(tmp_path, Unused(), epochs=3)
    (said,) = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert said.startswith("6 trained parameters get no gradient") and "a_norm.weight" in said and "1 more" in said


def test_frozen_parameters_are_named_when_they_are_to_be_trained(tmp_path, caplog):
    made = trainer(tmp_path, Unused(["a_norm"]), epochs=3)
    made.network.heads = ("fc",)
    made.network.freeze_epochs = 1
    with caplog.at_level("WARNING"):
        finish(made)
    said = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert len(said) == 1 and "2 trained parameters" in said[0]


def test_a_network_that_uses_all_its_parameters_is_not_warned_of(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trained(tmp_path, tiny.Classifier(3), epochs=1, precision=FP16)
    assert "no gradient" not in caplog.text


# ---------------------------------------------------------------------------------------- times
def test_the_total_time_ends_with_the_last_epoch(data, tmp_path, monkeypatch):
    """Neither loading the best weights nor the test counts, nor a test that was stopped and is done again."""
    evaluate = commands.train.evaluate
    stopping = [True]

    def slow(*arguments, **options):
        time.sleep(0.2)
        if stopping:
            stopping.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(commands.train, "evaluate", slow)
    assert tiny.train(data, tmp_path) == 143
    assert tiny.train(data, tmp_path, "--resume") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["total_seconds"] == tiny.metrics(tmp_path / "run")[-1]["elapsed"]
    assert result["total_seconds"] >= result["train_seconds"]
