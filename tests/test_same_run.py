"""A run is the same run, bit for bit, wherever it is stopped and however its images come.

Drawn options and every source of images: tests/long/test_any_run.py.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import tiny
import torch

from choices import AUGMENTATIONS
from dataset import Batches
from images.cache import Opening
from images.stores import open_store
from images.subsets import Subset
from model import Network
from optimizer import SmoothedCrossEntropy, make_optimizer, make_scheduler
from precision import Precision
from runs.checkpoint import load_checkpoint, snapshot
from runs.folder import RunDirectory
from train import Plan, Recipe, Trainer
from transforms import Preprocess, each, random_transform
from utils import Stopped, fold

CPU = torch.device("cpu")
FP32, BF16, FP16 = (Precision(name, CPU, "a test") for name in ("fp32", "amp-bf16", "amp-fp16"))
RANDOM = [name for name, augmentation in AUGMENTATIONS.items() if augmentation.class_name]
DRAWING = ",".join(RANDOM)  # every augmentation that draws its random numbers itself
SOURCES = {"cached": {"cache": "memory"}, "streamed": {"cache": "none", "workers": 0}}
SOURCES["streamed by a worker"] = {"cache": "none", "workers": 1}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Fourteen small pictures, opened in each way."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(14)]
    for number, path in enumerate(paths):
        tiny.noise(number, (12, 12)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return {name: open_store(paths, folder, limit=12, opening=Opening(**how)) for name, how in SOURCES.items()}


def subset(store, places):
    listing = [(None, place % 3) for place in range(14)]
    return Subset(store, listing, np.array(places))


def trainer(folder, store, *, precision=FP32, optimizer="ADAM", decay="cosine_warmup", freeze=0, **options):
    """Two epochs of three updates, each in two micro-batches, the last of each ragged; dropout, BatchNorm, an EMA."""
    torch.manual_seed(0)
    model = tiny.Classifier(3)
    kept = {"heads": ("fc",), "ema": 0.9, "freeze_epochs": freeze}
    fed = Batches(subset(store, range(11)), Preprocess(CPU, 12), 4, 3, seed=5, epochs=2, **{"accumulate": 2} | options)
    rule = make_optimizer(model.parameters(), optimizer, learning_rate=1e-2, weight_decay=1e-4, fused=True)
    schedule = partial(make_scheduler, rule, decay, epochs=2, updates_per_epoch=fed.updates_per_epoch)
    network = Network(model, sizes=fed.full_sizes, evaluation_size=3, ranks=fed.ranks, **kept)
    validation = Batches(subset(store, [11, 12, 13]), Preprocess(CPU, 12), 3, 3)
    record = tiny.identity(image_size=12)
    recipe = Recipe(rule, schedule, precision, SmoothedCrossEntropy())
    made = Trainer(network, recipe, Plan(2, seed=5), fed, validation, RunDirectory(folder), record)
    made.run.open()
    return made


def outcome(made):
    best = torch.load(made.run.file("best_model.pt"), weights_only=True)
    return dict(tiny.leaves({"last.pt": snapshot(made.state()), "best_model.pt": best}))


def straight(folder, store, **options):
    made = trainer(folder, store, **options)
    made.train()
    made.run.close()
    return outcome(made)


def stopped_everywhere(folder, store, **options):
    """Return the outcome of the same run, stopped by a signal after each of its updates, then resumed."""
    for update in itertools.count():
        made = trainer(folder, store, **options)
        if update:
            made.load_state(load_checkpoint(made.run.file("last.pt")))
        with pytest.MonkeyPatch.context() as patch:
            tiny.stop_after(patch, 1)
            if update == 6:
                made.train()
            else:
                with pytest.raises(Stopped):
                    made.train()
        made.run.close()
        if update == 6:
            return outcome(made)
    raise AssertionError


@pytest.fixture(scope="module")
def undisturbed(stores, tmp_path_factory):
    """Return the outcomes of undisturbed runs with cached images, by their augmentation."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {augment: straight(folder / augment, stores["cached"], augment=augment) for augment in ("flip", DRAWING)}


@pytest.mark.parametrize("source", ["cached", "streamed by a worker"])
def test_a_run_stopped_after_any_update_is_the_same_run(source, stores, undisturbed, tmp_path):
    tiny.assert_equal(undisturbed[DRAWING], stopped_everywhere(tmp_path / "run", stores[source], augment=DRAWING))


@pytest.mark.parametrize("source, augment", [("streamed", "flip"), ("streamed by a worker", DRAWING)])
def test_streamed_images_make_the_run_of_cached_ones(source, augment, stores, undisturbed, tmp_path):
    tiny.assert_equal(undisturbed[augment], straight(tmp_path / "run", stores[source], augment=augment))


@pytest.mark.parametrize("precision, freeze", [(BF16, 0), (FP16, 1)], ids=["bf16", "fp16, frozen"])
def test_a_run_of_other_options_is_the_same_stopped_anywhere(precision, freeze, stores, tmp_path):
    mixed = {"mixup": 0.4, "cutmix": 1.0, "sampler": "balanced", "start_size": 11, "augment": "crop,jitter"}
    options = mixed | {"precision": precision, "freeze": freeze, "optimizer": "SGD", "decay": "step_warmup"}
    one = straight(tmp_path / "a", stores["cached"], **options)
    tiny.assert_equal(one, stopped_everywhere(tmp_path / "b", stores["streamed"], **options))


class Listening(tiny.Classifier):
    """Notes the default generator's state when a forward pass begins and when it has ended."""

    def __init__(self):
        super().__init__(3)
        self.states = []

    def forward(self, images):
        self.states.append(torch.get_rng_state())
        logits = super().forward(images)
        self.states.append(torch.get_rng_state())
        return logits


@pytest.mark.parametrize("source, augment", [("cached", "crop,erasing"), *((source, DRAWING) for source in SOURCES)])
def test_nothing_draws_between_the_seeding_and_dropout(source, augment, stores, tmp_path, monkeypatch):
    """Nor between the micro-batches of an update: its dropout follows from (seed, epoch, update, rank) alone."""
    monkeypatch.setattr(tiny, "Classifier", lambda classes: Listening())
    made = trainer(tmp_path / "run", stores[source], augment=augment)
    tiny.stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        made.train()
    made.run.close()
    states = made.network.model.states
    for update in range(2):
        begun, dropped, again, _ = states[4 * update : 4 * update + 4]
        assert torch.equal(begun, torch.Generator().manual_seed(fold(5, 0, update, 0)).get_state())
        assert not torch.equal(begun, dropped)
        assert torch.equal(dropped, again)


@pytest.mark.parametrize("name", RANDOM)
def test_an_augmentation_leaves_the_default_generator_as_it_was(name):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    images = images / 255 if name in ("jitter", "erasing") else images
    before = torch.get_rng_state()
    distorted = each(random_transform(name), images, [11, 12, 11])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12)
    assert torch.equal(distorted[1], random_transform(name)(images[1]))
