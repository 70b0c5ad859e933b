"""A run is the same run, bit for bit, wherever it is stopped and however its images come.

Drawn options and every source of images: tests/long/test_any_run.py.
"""

import itertools

import numpy as np
import pytest
import tiny
import torch
from trainings import BF16, FP16, FP32, finish, trainer

from choices import AUGMENTATIONS
from images.cache import Opening
from images.stores import open_store
from images.subsets import Subset
from runs.checkpoint import load_checkpoint, snapshot
from transforms import each, random_transform
from utils import Stopped, fold

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


def begun(folder, store, precision=FP32, *, optimizer="ADAM", decay_type="cosine_warmup", freeze_epochs=0, **options):
    """Two epochs of three updates, each in two micro-batches, the last of each ragged; dropout, BatchNorm, an EMA."""
    torch.manual_seed(0)
    own = {"optimizer": optimizer, "decay_type": decay_type, "freeze_epochs": freeze_epochs, "heads": ("fc",)}
    own |= {"images": subset(store, range(11)), "validation": subset(store, [11, 12, 13]), "side": 12, "ema": 0.9}
    fed = {"batch_size": 4, "accumulate": 2} | options
    return trainer(folder, tiny.Classifier(3), precision, batch_options=fed, **own)


def outcome(made):
    best = torch.load(made.run.file("best_model.pt"), weights_only=True)
    return dict(tiny.leaves({"last.pt": snapshot(made.state()), "best_model.pt": best}))


def straight(folder, store, **options):
    return outcome(finish(begun(folder, store, **options)))


def stopped_everywhere(folder, store, **options):
    """Return the outcome of the same run, stopped by a signal after each of its updates, then resumed."""
    for update in itertools.count():
        made = begun(folder, store, **options)
        if update:
            made.load_state(load_checkpoint(made.run.file("last.pt")))
        if update == 6:
            return outcome(finish(made))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            tiny.stop_after(patch, 1)
            finish(made)
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
    options = mixed | {"precision": precision, "freeze_epochs": freeze, "optimizer": "SGD", "decay_type": "step_warmup"}
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
    made = begun(tmp_path / "run", stores[source], augment=augment)
    tiny.stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        finish(made)
    states = made.network.model.states
    for update in range(2):
        seeded, dropped, again, _ = states[4 * update : 4 * update + 4]
        assert torch.equal(seeded, torch.Generator().manual_seed(fold(3, 0, update, 0)).get_state())
        assert not torch.equal(seeded, dropped)
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
