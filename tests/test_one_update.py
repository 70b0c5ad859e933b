"""One update, whatever the options: what is trained moves, what is frozen does not, and no cut of a batch counts."""

import copy
import random

import pytest
import tiny
import torch
from test_heads import in_heads, register_two_heads

from assemble import make_trainer, set_up
from command_line.groups import grouped
from command_line.parsing import parse
from dataset import Batches
from distributed import Ranks
from images.asked import data_to_train_on
from model import StepModel
from optimizer import SmoothedCrossEntropy, make_optimizer
from precision import Precision
from runs.folder import RunDirectory
from train import update_weights
from transforms import Preprocess

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "a test")
OPTIONS = {
    "model": ("tiny_classifier", "tiny_two_heads"),
    "optimizer": ("SGD", "ADAM", "ADAMW"),
    "freeze_epochs": (0, 1, "all"),
    "epochs": (1, 2),
    "amp": (None, "float16", "bfloat16"),
    "accumulate": (1, 3),
    "batch_size": (6, 100),
    "weight_decay": (0, 0.1),
    "decay_norms": (True, False),
    "backbone_lr": (1, 0.1, 0),
    "decay_type": ("step", "cosine_warmup", "linear_warmup"),
    "clip_grad_norm": (None, 0.1),
    "label_smoothing": (0, 0.1),
    "class_weights": ("none", "balanced"),
    "mixup": (0, 0.2),
    "cutmix": (0, 0.2),
    "augment": ("none", "flip", "crop,erasing"),
    "ema": (0, 0.9),
}
CUTS = {
    "count": range(1, 14),
    "batch_size": range(1, 14),
    "accumulate": range(1, 6),
    "mixes": ({}, {"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}),
    "smoothing": (0.0, 0.1),
    "weights": (None, torch.tensor([0.1, 2.0, 7.0])),
}


def drawn(seed: int, values: dict) -> dict:
    """One value of each, by chance."""
    numbers = random.Random(seed)
    return {name: numbers.choice(choices) for name, choices in values.items()}


def words_of(options: dict) -> list[str]:
    words = []
    for name, value in options.items():
        if name == "amp":
            words += ["--amp", f"--amp_dtype={value}"] if value else []
        elif name == "decay_norms":
            words += [] if value else ["--no-decay_norms"]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def one_update(forward: StepModel, batches: Batches, criterion, optimizer, precision=FP32, clip=None) -> None:
    scaler = precision.grad_scaler()
    if scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})  # at which no update is skipped
    update_weights(
        forward,
        next(iter(batches.epoch(0, 0))),
        batches.images_in(0),
        optimizer=optimizer,
        scaler=scaler,
        precision=precision,
        criterion=criterion,
        clip_grad_norm=clip,
    )


@pytest.fixture(scope="module")
def opened(data, tmp_path_factory):
    """Return the data set, opened once, and a folder for runs."""
    tiny.register_classifier()
    register_two_heads()
    folder = tmp_path_factory.mktemp("runs")
    setup = set_up(grouped(parse(tiny.words(data, folder, "--model=tiny_classifier"))), Ranks())
    return data_to_train_on(setup.asked, setup.ranks, setup.preprocess), folder


@pytest.mark.parametrize("seed", range(40))
def test_every_parameter_moves_in_one_update_or_is_frozen(data, opened, seed):
    images, folder = opened
    options = drawn(seed, OPTIONS)
    words = tiny.words(data, folder, *words_of(options), "--warmup_epochs=0", "--learning_rate=0.5")
    trainer = make_trainer(set_up(grouped(parse(words)), Ranks()), images, RunDirectory(folder / "run"))
    network = trainer.network
    network.begin_epoch(0)
    before = copy.deepcopy(dict(network.model.named_parameters()))
    one_update(
        network.forward,
        trainer.batches,
        trainer.recipe.criterion,
        trainer.recipe.optimizer,
        precision=trainer.recipe.precision,
        clip=options["clip_grad_norm"],
    )
    heads = in_heads(network.model)
    trained = heads if options["freeze_epochs"] else before.keys()
    moving = heads if options["freeze_epochs"] or options["backbone_lr"] == 0 else before.keys()
    after = dict(network.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == moving
    assert set(network.trained_names()) == trained


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_of_a_batch_gives_the_mean_gradient_of_its_images(seed):
    """Of a network without BatchNorm, against one image after another."""
    cut = drawn(seed, CUTS)
    criterion = SmoothedCrossEntropy(cut["smoothing"], cut["weights"])
    options = {"seed": seed, "augment": "flip", **cut["mixes"]}
    images = tiny.subset(cut["count"])
    accumulate = min(cut["accumulate"], cut["batch_size"])
    pieces = Batches(images, Preprocess(CPU, 9), cut["batch_size"], 3, accumulate=accumulate, **options)
    whole = Batches(images, Preprocess(CPU, 9), cut["batch_size"], 3, **options)

    model = tiny.network()
    start = copy.deepcopy(dict(model.named_parameters()))
    plain = make_optimizer(model.parameters(), "SGD", learning_rate=1.0, weight_decay=0, fused=True)
    one_update(StepModel(model, set(), False), pieces, criterion, plain)

    reference = tiny.network()
    for batch, labels, *_ in next(iter(whole.epoch(0, 0))):
        for image, label in zip(batch.split(1), labels.split(1), strict=True):
            (criterion(reference(image), label) / whole.images_in(0)).backward()
    for name, parameter in model.named_parameters():
        gradient = reference.get_parameter(name).grad
        torch.testing.assert_close(start[name] - parameter, gradient, rtol=1e-4, atol=2e-6)
