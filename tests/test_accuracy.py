"""What serves accuracy: presets, parameter groups, growing sizes, augmentations, frozen outputs, mirror images."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_option import parse, refused
from tiny import subset
from torch import nn
from torch.nn import functional as F
from torchvision import models

import assemble
import train as training
from command_line import presets
from dataset import Batches
from distributed import Ranks
from features.activation_maps import activation_maps
from features.frozen import keep_outputs
from model import head_names
from optimizer import block_depths, make_optimizer, make_scheduler, parameter_groups
from precision import Precision
from train import Trainer
from transforms import Preprocess, growing_sizes

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "")


# ------------------------------------------------------------------------------------ presets
def test_a_preset_lies_between_the_defaults_and_what_is_typed():
    found = parse("--preset=finetune", "--epochs=3")
    assert (
        presets.PRESETS["finetune"].items() <= (vars(found) | {"epochs": presets.PRESETS["finetune"]["epochs"]}).items()
    )
    assert (found.epochs, found.preset) == (3, "finetune")
    assert vars(parse("--preset=tutorial")) == vars(parse())


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_what_its_options_say_when_typed(name):
    typed = [f"--{key}={value}" for key, value in presets.PRESETS[name].items() if not isinstance(value, bool)]
    expected = vars(parse(f"--preset={name}"))
    switches = ["--no-decay_norms"] if presets.PRESETS[name].get("decay_norms") is False else []
    assert vars(parse(*typed, *switches)) | {"preset": name} == expected
    assert parse("compare", f"--preset={name}").learning_rate == expected["learning_rate"]


def test_the_demo_wins_over_a_preset_and_a_typed_preset_over_a_config(tmp_path):
    found = parse("--preset=scratch", "--demo", "--image_size=48")
    assert (found.image_size, found.start_size) == (48, 0)  # 48 pixels do not grow to 48
    found = parse("--preset=scratch", "--demo")
    assert (found.image_size, found.start_size) == (
        presets.DEMO["image_size"],
        presets.PRESETS["scratch"]["start_size"],
    )
    assert parse("--preset=scratch", "--epochs=1").start_size == 0
    assert parse("--preset=scratch", "--start_size=0").start_size == 0
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"options": {"epochs": 7, "learning_rate": 0.5, "preset": "tutorial"}}))
    assert parse(f"--config={file}").epochs == 7
    found = parse(f"--config={file}", "--preset=finetune")
    assert found.epochs == presets.PRESETS["finetune"]["epochs"]


def test_what_does_not_fit_together_is_said():
    assert "--start_size 64 must be smaller than --image_size 64" in refused("--start_size=64", "--image_size=64")
    assert "two --epochs" in refused("--start_size=64", "--epochs=1")
    assert "rotate" in refused("--augment=crop,rotate")
    assert "none" in refused("--augment=none,crop")
    assert "exclude" in refused("--augment=flip,upright")


def test_augmentations_have_one_spelling():
    assert parse("--augment=jitter, crop").augment == "crop,jitter"
    assert parse("--augment=flip,crop").augment == "crop"  # what a run before there were lists recorded
    assert parse("--augment=upright").augment == "none"
    assert parse("--augment=flip,turns,vertical").augment == "vertical,turns"


# --------------------------------------------------------------------------- parameter groups
def groups(model, **options):
    options = {"learning_rate": 1e-2, "weight_decay": 0.1} | options
    return parameter_groups(model, head_names(model), **options)


def test_norms_and_biases_are_not_decayed_and_the_head_learns_at_the_full_rate_all_along():
    model = tiny.Classifier(3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (whole,) = groups(model)
    assert [names[id(parameter)] for parameter in whole["params"]] == list(names.values())
    found = groups(model, decay_norms=False, backbone_lr=0.1)
    assert sum(len(group["params"]) for group in found) == len(names)
    for group in found:
        for name in [names[id(parameter)] for parameter in group["params"]]:
            assert group["lr"] == pytest.approx(1e-2 if name.startswith("fc.") else 1e-3)
            is_product = name in ("features.0.weight", "features.3.weight", "fc.weight")
            assert group["weight_decay"] == (0.1 if is_product else 0.0)
    optimizer = make_optimizer(found, "ADAMW", learning_rate=1e-2, weight_decay=0.1, fused=True)
    scheduler = make_scheduler(optimizer, "cosine_warmup", epochs=4, updates_per_epoch=5)
    for _ in range(20):
        head, *_, body = (group["lr"] for group in optimizer.param_groups)
        assert body == pytest.approx(head / 10, rel=1e-12) and head > 0
        optimizer.step()
        scheduler.step()


def test_each_block_learns_more_slowly_than_the_next():
    model = models.VisionTransformer(32, 16, 3, 2, 24, 48, num_classes=5)
    rates = {id(p): group["lr"] for group in groups(model, layer_decay=0.5) for p in group["params"]}
    of = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["heads.head.weight"] == of["encoder.ln.weight"] == 1e-2
    steps = [f"encoder.layers.encoder_layer_{place}.mlp.0.weight" for place in (2, 1, 0)] + ["conv_proj.weight"]
    assert [of[name] for name in steps] == pytest.approx([5e-3, 2.5e-3, 1.25e-3, 6.25e-4])
    with torch.device("meta"):
        depths = block_depths(models.swin_t())  # blocks of several stages
    assert (depths["features.0.0.weight"], depths["features.7.1.mlp.0.weight"]) == (0, 12)
    assert set(depths.values()) == set(range(14))


@pytest.mark.parametrize(
    "words",
    [
        ("--backbone_lr=0.1", "--no-decay_norms", "--optimizer=ADAMW", "--augment=crop,augmix,jitter,erasing")
        + ("--amp", "--start_size=20", "--epochs=3", "--ema=0.9"),
        ("--preset=probe", "--epochs=4"),
    ],
    ids=["groups and growing images", "kept outputs"],
)
def test_a_run_that_serves_accuracy_resumes_bit_for_bit(data, tmp_path, words):
    assert tiny.train(data, tmp_path, *words, name="straight") == 0
    with pytest.MonkeyPatch.context() as patch:
        tiny.stop_after(patch, 4)
        assert tiny.train(data, tmp_path, *words, name="stopped") == 130
    assert tiny.train(data, tmp_path, *words, "--resume", name="stopped") == 0
    tiny.assert_equal(tiny.outcome(tmp_path / "straight"), tiny.outcome(tmp_path / "stopped"))


# ------------------------------------------------------------------------------ growing sizes
def test_sizes_grow_to_the_full_size_of_the_last_tenth():
    assert growing_sizes(64, 128, 24) == [64] * 11 + [96] * 11 + [128] * 2
    assert growing_sizes(48, 96, 18) == [48] * 8 + [64] * 8 + [96] * 2
    assert growing_sizes(48, 128, 36) == [48] * 11 + [64] * 11 + [96] * 10 + [128] * 4
    assert growing_sizes(0, 128, 2) == [128, 128]
    for start, full, epochs in ((16, 33, 2), (128, 256, 7), (224, 225, 30), (100, 260, 5)):
        sizes = growing_sizes(start, full, epochs)
        assert (len(sizes), sizes[0], sizes[-1]) == (epochs, start, full) and sizes == sorted(sizes)
        assert len(set(sizes)) <= 4


def test_each_epoch_has_its_size_and_validation_the_full_one(data, tmp_path, monkeypatch):
    seen = []
    forward = tiny.Classifier.forward

    def watched(self, images):
        if not images.is_meta:  # there the sizes are tried before training
            seen.append((self.training, images.shape[-1]))
        return forward(self, images)

    monkeypatch.setattr(tiny.Classifier, "forward", watched)
    words = ("--start_size=20", "--image_size=84", "--epochs=3", "--augment=crop")
    assert tiny.train(data, tmp_path, *words) == 0
    assert list(dict.fromkeys(side for training, side in seen if training)) == [20, 32, 84]
    assert {side for training, side in seen if not training} == {84}
    lines = tiny.metrics(tmp_path / "run")
    assert [line["image_size"] for line in lines] == [20, 32, 84]


@pytest.mark.parametrize(
    ("more", "epochs"),
    [
        ((), 3),  # the best is the first
        (("--start_size=20",), 6 + 3),  # six epochs of small images, the first of large ones, and two without a gain
        (("--freeze_epochs=4",), 4 + 2),
        (("--freeze_epochs=all",), 3),
    ],
)
def test_patience_begins_when_images_are_of_full_size_and_layers_thawed(data, tmp_path, monkeypatch, more, epochs):
    """No epoch is better than the first of its size: each validation finds the same."""
    found = []
    evaluate = training.evaluate

    def once(*arguments, **options):
        found.append(evaluate(*arguments, **options))
        return found[0]

    monkeypatch.setattr(training, "evaluate", once)
    monkeypatch.setattr(
        "dataset.growing_sizes", lambda start, full, epochs: [start or full] * 6 + [full] * (epochs - 6)
    )
    assert tiny.train(data, tmp_path, "--patience=2", "--epochs=12", "--best_by=accuracy", *more) == 0
    assert len(tiny.metrics(tmp_path / "run")) == epochs


# ------------------------------------------------------------------------------ augmentations
KINDS = [
    "vertical",
    "turns",
    "vertical,turns",
    "randaugment",
    "augmix",
    "jitter",
    "erasing",
    "crop,augmix,jitter,erasing",
    "upright,crop",
    "trivial,erasing",
]


def fed(augment, **options):
    images = subset(22, side=24)
    return Batches(images, Preprocess(CPU, 16), 8, 3, seed=5, augment=augment, **options)


def first_epoch(batches, epoch=1):
    return torch.cat([images for update in batches.epoch(epoch) for images, *_ in update])


def test_each_kind_does_something_of_its_own():
    found = {kind: first_epoch(fed(kind)) for kind in ["flip", "none", "crop", "trivial", *KINDS]}
    names = list(found)
    assert not [(a, b) for a in names for b in names if a < b and torch.equal(found[a], found[b])]


def test_upright_images_are_not_mirrored():
    """An image whose left half is black keeps it dark."""
    images = subset(64, side=24)
    images.store.array[:, :, :12] = 0
    batches = Batches(images, Preprocess(CPU, 16), 64, 3, seed=5, augment="upright,jitter")
    pixels = first_epoch(batches)
    assert (pixels[..., :8].mean((1, 2, 3)) < pixels[..., 8:].mean((1, 2, 3))).all()


def test_images_are_mirrored_from_top_to_bottom_and_turned_by_quarters_alike_in_all_ranks():
    """Only the upper left quarter of an image is bright: where it goes tells what was done."""
    images = subset(200, side=24)
    images.store.array[:] = 0
    images.store.array[:, :12, :12] = 255
    for augment, ways in (("upright,vertical", [0, 2]), ("vertical", [0, 1, 2, 3]), ("upright,turns", [0, 1, 2, 3])):
        options = {"seed": 5, "augment": augment}
        pixels = first_epoch(Batches(images, Preprocess(CPU, 24), 200, 3, **options))
        corners = F.avg_pool2d(pixels.mean(1, keepdim=True), 12).flatten(1)
        counts = np.bincount(corners.argmax(1), minlength=4)
        assert set(np.flatnonzero(counts)) == set(ways) and counts[ways].min() > 150 / len(ways) - 15
        batches = [Batches(images, Preprocess(CPU, 24), 200, 3, ranks=Ranks(n, n, 2), **options) for n in range(2)]
        assert torch.equal(torch.cat([first_epoch(part) for part in batches]), pixels)
        assert not torch.equal(first_epoch(batches[0], epoch=2), pixels[:100])


# ------------------------------------------------------------------------------ frozen outputs


def test_the_frozen_network_sees_each_image_twice_before_the_first_epoch_and_no_more(data, tmp_path, monkeypatch):
    seen = []
    at_epochs = []
    forward = tiny.Classifier.forward
    train_epoch = Trainer._train_epoch

    def watched(self, images):
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(tiny.Classifier, "forward", watched)
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self: at_epochs.append(sum(seen)) or train_epoch(self))
    monkeypatch.setattr("commands.train.explain_mistakes", lambda *_: {})
    assert tiny.train(data, tmp_path, "--freeze_epochs=all", "--epochs=4") == 0
    # 19 training images and their mirror images, 5 to validate, and two trials of a single image; then 6 to test
    assert 0 <= at_epochs[0] - 2 * 19 - 5 <= 6 and at_epochs == at_epochs[:1] * 4
    assert sum(seen) <= at_epochs[0] + 2 * 6
    monkeypatch.setattr("features.frozen.progress_bar", None)
    assert tiny.train(data, tmp_path, "--freeze_epochs=all", "--epochs=4", "--resume") == 0  # only tested again


def test_where_outputs_cannot_be_kept_the_log_says_why(caplog):
    caplog.set_level("INFO")
    followed = nn.Sequential(nn.Conv2d(3, 3, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # as in SqueezeNet
    for model, heads, options, reason in (
        (tiny.Classifier(3), ("fc",), {"augment": "crop"}, "--augment flip"),
        (tiny.Classifier(3), ("fc",), {"mixup": 0.2}, "--augment flip"),
        (tiny.Classifier(3), ("fc",), {"start_size": 12, "epochs": 2}, "--start_size"),
        (
            tiny.Classifier(3),
            ("fc", "features.3"),
            {},
            "every epoch computes the whole network: Classifier has 2 heads",
        ),
        (followed, ("0",), {}, "more follows its last layer"),
    ):
        caplog.clear()
        batches = fed(**{"augment": "flip"} | options)
        assert keep_outputs(model, heads, batches, fed("flip"), FP32) is None and reason in caplog.text
    assert keep_outputs(tiny.Classifier(3), ("fc",), fed("flip"), fed("flip"), FP32)


# --------------------------------------------------------------------------------- mirror images
def test_mirror_images_are_averaged_unless_the_test_is_told_otherwise(data, tmp_path, run):
    assert tiny.train(data, tmp_path, "--tta=flip", "--epochs=1") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["tta"] == "flip"
    place = [f"--data_dir={data}", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    for words, mirrored in (((), True), (("--tta=none",), False)):
        status, out, _ = run(["evaluate", *place, *words])
        assert status == 0 and ("mirror" in out) == mirrored


# ------------------------------------------------------------------- what the network sees, and where
def test_a_batch_is_drawn_as_the_network_sees_it():
    batches = fed("crop", start_size=0)
    pixels, labels = batches.first_images(5)
    assert (pixels.shape, pixels.dtype, len(labels)) == ((5, 16, 16, 3), np.uint8, 5)
    seen = next(next(batches.epoch(0)))[0][:5]
    again = batches.preprocess.normalized(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert (again - seen).abs().max() < 0.02  # half a step of 255, over ImageNet's deviation
    pixels, labels = fed("flip", mixup=0.5, accumulate=2).first_images(50)
    assert labels.shape == (8, 3) and torch.allclose(labels.sum(1), torch.ones(8))


class Bright(nn.Module):
    """Its logit of class 1 is the brightness of the image's lower right quarter, behind layers that keep places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        nn.init.ones_(self.layer.weight)

    def forward(self, images):
        found = self.relu(self.layer(images))
        return torch.stack([-found.mean((1, 2, 3)), found.mean((1, 2, 3))], 1)


def test_a_map_is_bright_where_the_class_comes_from():
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, 8:, 8:] = 1
    images[1, :, :8, :8] = 1
    maps = activation_maps(Bright().eval(), images, torch.tensor([1, 1]))
    assert torch.equal(maps > 0.5, images[:, 0] > 0)
    against = activation_maps(Bright().eval(), images, torch.tensor([0, 0]))
    assert against.max() == 0  # what speaks against a class is cut off


def test_maps_of_a_transformer_are_as_large_as_its_images():
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # it begins at zero, where no place speaks for any class
    maps = activation_maps(model.eval(), torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))
    assert maps.shape == (2, 32, 32) and maps.isfinite().all()
    assert maps.min() >= 0 and 0.5 < maps.max() <= 1


# ------------------------------------------------------------------------- --batch_size auto
def test_auto_asks_for_what_would_be_without_it():
    assert parse("--batch_size=auto").batch_size == "auto:256"
    assert parse("--batch_size=auto", "--demo").batch_size == "auto:64"
    assert parse("--batch_size=auto", "--preset=scratch").batch_size == "auto:64"
    assert parse("--batch_size=auto:512").batch_size == "auto:512"
    assert "leave one of the two out" in refused("--batch_size=auto", "--accumulate=2")
    assert "argument --batch_size" in refused("--batch_size=automatic")


def test_auto_is_recorded_and_a_resume_repeats_it(data, tmp_path, monkeypatch, run):
    """Its trial before the first epoch changes nothing: the run equals one whose micro-batches were typed."""
    auto = ("--batch_size=auto:8", "--epochs=3")
    fits = assemble.micro_batch_that_fits
    monkeypatch.setattr(assemble, "micro_batch_that_fits", lambda *more, **options: min(3, fits(*more, **options)))
    with pytest.MonkeyPatch.context() as patch:
        tiny.stop_after(patch, 4)
        assert tiny.train(data, tmp_path, *auto) == 130
    stored = tiny.config(tmp_path / "run")["options"]
    assert (stored["batch_size"], stored["accumulate"]) == (8, 3)
    monkeypatch.setattr(assemble, "micro_batch_that_fits", lambda *_, **__: 1 / 0)
    status, _, errors = run(tiny.words(data, tmp_path, "--batch_size=auto:9", "--epochs=3", "--resume"))
    assert status == 2 and "--batch_size: begun with 8, now 9" in errors
    assert tiny.train(data, tmp_path, *auto, "--resume") == 0
    assert tiny.train(data, tmp_path, "--accumulate=3", "--epochs=3", name="typed") == 0
    tiny.assert_equal(tiny.outcome(tmp_path / "run"), tiny.outcome(tmp_path / "typed"))
