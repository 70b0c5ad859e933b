"""Image folders to batches on the device: listing, stratified split, batches, augmentation.

Resize, flip and normalise run batch-wise on the device, and all randomness depends on (seed, epoch,
position) alone, so that runs repeat, resume and spread over ranks. Knows nothing of models or precision.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from distributed import Ranks
from images.folders import Listing, find_image_set
from images.stores import ImageStore, open_store
from transforms import RANDOM, Preprocess, each, growing_sizes, mix, random_flip, random_resized_crop
from utils import UserError, fold, log, printable

MicroBatch = tuple[torch.Tensor, torch.Tensor, int, bool]  # images, labels, weight, whether it is its update's last


def split_train(labels: np.ndarray, *, fraction: float = 0.2, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified positions (train, validation) of `labels`, by scikit-learn, each in ascending order."""
    from sklearn.model_selection import train_test_split

    try:
        train, validation = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed % 2**32
        )
    except ValueError as error:
        raise UserError(f"cannot split {fraction:.0%} of the training images off for validation: {error}") from None
    return np.sort(train), np.sort(validation)


@dataclass
class Subset:
    """Some images of a store: listing positions and their labels, in evaluation order."""

    store: ImageStore
    listing: Listing
    positions: np.ndarray
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.array([self.listing[position][1] for position in self.positions], np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def keep(self, count: int) -> None:
        """Cuts the subset to at most `count` images, spread evenly over it."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        self.positions = self.positions[chosen]
        self.labels = self.labels[chosen]

    @property
    def paths(self) -> list[Path]:
        return [self.listing[position][0] for position in self.positions]


@dataclass
class DataSet:
    """Train, validation and test images, ready to be batched; `fingerprint` identifies their pixels."""

    root: Path
    classes: list[str]
    subsets: dict[str, Subset]  # train, validation and test, or test alone
    fingerprint: str
    unreadable: list[str]

    @property
    def train(self) -> Subset:
        return self.subsets["train"]

    @property
    def validation(self) -> Subset:
        return self.subsets["validation"]

    @property
    def test(self) -> Subset:
        return self.subsets["test"]

    def names(self, subset: Subset) -> list[str]:
        """The files of a subset, relative to the data folder, with slashes on every system."""
        return [Path(os.path.relpath(path, self.root)).as_posix() for path in subset.paths]


def open_data_set(
    data_dir: str | Path,
    *,
    image_size: int,
    seed: int,
    cache: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    keep_larger: bool = False,
    pin: bool = False,
    test_only: bool = False,
) -> DataSet:
    """Finds, splits and decodes the images below `data_dir`.

    `keep_larger` keeps up to 1.5 times `image_size` pixels for random crops to choose from; `pin` prepares
    batches in page-locked memory for a CUDA device. Raises UserError for anything wrong with the data.
    """
    image_set = find_image_set(data_dir)
    names = ["test"] if test_only else [n for n in ("train", "test", "validation") if getattr(image_set, n)]
    subsets: dict[str, Subset] = {}
    bad: dict[Path, str] = {}
    digest = hashlib.sha256(json.dumps(image_set.classes).encode())
    for name in names:
        listing = getattr(image_set, name)
        paths = [path for path, _ in listing]
        limit = image_size * 3 // 2 if keep_larger and name == "train" else image_size
        store = open_store(paths, image_set.root, limit=limit, cache=cache, workers=workers, pin=pin)
        bad |= {listing[position][0]: reason for position, reason in store.unreadable.items()}
        readable = np.setdiff1d(np.arange(len(listing)), list(store.unreadable))
        subsets[name] = Subset(store, listing, readable)
        digest.update(json.dumps([name, [os.path.relpath(path, image_set.root) for path, _ in listing]]).encode())
        digest.update(store.crc32.tobytes())
    _report_unreadable(bad, skip_unreadable)
    for name, subset in subsets.items():
        empty = sorted(set(range(len(image_set.classes))) - set(subset.labels.tolist()))
        if empty:
            raise UserError(f"no readable {name} image is left in {printable(image_set.classes[empty[0]])}.")
    if "train" in subsets and "validation" not in subsets:
        everything = subsets["train"]
        kept, held_out = split_train(everything.labels, seed=seed)
        for name, places in (("train", kept), ("validation", held_out)):
            subsets[name] = Subset(everything.store, everything.listing, everything.positions[places])
    return DataSet(image_set.root, image_set.classes, subsets, digest.hexdigest()[:16], [str(path) for path in bad])


def _report_unreadable(bad: dict[Path, str], skip: bool) -> None:
    if not bad:
        return
    lines = [f"  {printable(path)}: {printable(reason)}" for path, reason in list(bad.items())[:10]]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    head = f"{len(bad)} image{'s' * (len(bad) > 1)} cannot be read"
    if not skip:
        lines.append("Repair or remove them, or go on without them: --skip_unreadable.")
        raise UserError("\n".join([f"{head}:", *lines]))
    log.warning("\n".join([f"{head} and {'are' if len(bad) > 1 else 'is'} left out:", *lines]))


@dataclass
class Batches:
    """Feeds one subset to a device: float32 images (count, 3, size, size) from `preprocess`, and labels."""

    subset: Subset
    preprocess: Preprocess
    batch_size: int
    class_count: int
    seed: int = 0
    accumulate: int = 1
    augment: str = "flip"  # none, or some of transforms.AUGMENTATIONS, separated by commas
    mixup: float = 0.0  # Beta(a, a) of the mixing weight; 0: off
    cutmix: float = 0.0
    start_size: int = 0  # side of the first epoch's images, which grow to full size; 0: all are of that
    epochs: int = 1
    ranks: Ranks = Ranks()

    def __post_init__(self) -> None:
        self.device = self.preprocess.device
        self._steps = set(self.augment.split(","))
        self.sizes = growing_sizes(self.start_size, self.preprocess.image_size, self.epochs)  # of each epoch
        self._input = {size: replace(self.preprocess, image_size=size) for size in set(self.sizes)}
        self.seconds_waited = 0.0  # in which the step had to wait for its batch
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.subset) // self.batch_size)

    def images_in(self, update: int) -> int:
        """How many images the update at this position of an epoch holds, on all ranks together."""
        return min(self.batch_size, len(self.subset) - update * self.batch_size)

    def size_in(self, epoch: int) -> int:
        """The side of an epoch's images in pixels."""
        return self.sizes[min(epoch, len(self.sizes) - 1)]

    def grows_in(self, epoch: int) -> bool:
        """Whether an epoch's images are larger than those of the epoch before, and no larger ones follow at once."""
        return epoch > 0 and self.size_in(epoch - 1) < self.size_in(epoch) == self.size_in(epoch + 1)

    @property
    def full_sizes(self) -> set[int]:
        """How many images this rank's micro-batches of a full batch hold; those of a ragged last batch hold fewer."""
        mine = np.array_split(np.arange(self.batch_size), self.ranks.size)[self.ranks.rank]
        return {len(part) for part in np.array_split(mine, self.accumulate)}

    def epoch(self, epoch: int, first_update: int = 0, end: int | None = None) -> Iterator[Iterator[MicroBatch]]:
        """The updates of one epoch from `first_update` on, up to `end`, each an iterator of micro-batches.

        Order and augmentation depend on (seed, epoch, position) only. A rank whose share of a ragged last
        batch is empty gets one image with weight 0, because every rank must take part in every update.
        """
        generator = torch.Generator().manual_seed(fold(self.seed, epoch))
        order = torch.randperm(len(self.subset), generator=generator).numpy()
        draws = torch.rand(len(self.subset), 5, generator=generator)  # by position in the epoch
        updates = []
        for update in range(first_update, self.updates_per_epoch if end is None else end):
            whole = np.arange(update * self.batch_size, min((update + 1) * self.batch_size, len(order)))
            mine = np.array_split(whole, self.ranks.size)[self.ranks.rank]
            parts = [part for part in np.array_split(mine, self.accumulate) if len(part)] or [whole[:1]]
            weight = int(len(mine) > 0)
            if self._mixes:  # each image is mixed with the one before it in the update, whoever else holds that
                parts = [np.append(whole[part[0] - whole[0] - 1], part) for part in parts]
            updates.append([(part, update, weight, part is parts[-1]) for part in parts])
        loaded = self._on_device([order[places] for micro_batches in updates for places, *_ in micro_batches])
        for micro_batches in updates:
            yield (self._timed(loaded, draws, epoch, *micro_batch) for micro_batch in micro_batches)

    def evaluation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """This rank's stride of the subset as (images, labels, positions in the subset), never padded."""
        batches = self._evaluation_places()
        for (images, labels), batch in zip(self._on_device(batches), batches, strict=True):
            yield self.preprocess(images), labels, batch

    def _evaluation_places(self) -> list[np.ndarray]:
        mine = np.arange(self.ranks.rank, len(self.subset), self.ranks.size)
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def first_images(self, most: int) -> tuple[np.ndarray, torch.Tensor]:
        """Up to `most` images of the first update as the network sees them, and their labels.

        uint8 (count, side, side, 3) and class indices (count,), or probabilities (count, classes) after MixUp.
        """
        mean, std = self.preprocess.mean_and_deviation
        shown = []
        targets = []
        for images, labels, *_ in next(self.epoch(0, 0, 1)):
            pixels = images.float().cpu().permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
            shown.append((255 * pixels).round().clamp(0, 255).byte())
            targets.append(labels.cpu())
            if sum(map(len, shown)) >= most:
                break
        return torch.cat(shown)[:most].numpy(), torch.cat(targets)[:most]

    def _on_device(self, batches: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """uint8 images and labels of each batch, copied one batch ahead on a stream of their own on CUDA."""
        ahead: deque = deque()
        for images, batch in zip(
            self.subset.store.batches([self.subset.positions[batch] for batch in batches]), batches, strict=True
        ):
            labels = torch.from_numpy(self.subset.labels[batch])
            if self._copy_stream is None:
                yield images.to(self.device), labels.to(self.device)
                continue
            with torch.cuda.stream(self._copy_stream):
                labels = labels.pin_memory()
                pair = tuple(tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
                ahead.append((pair, self._copy_stream.record_event()))
            if len(ahead) > 1:
                yield self._arrived(*ahead.popleft())
        while ahead:
            yield self._arrived(*ahead.popleft())

    @staticmethod
    def _arrived(
        pair: tuple[torch.Tensor, torch.Tensor], copied: torch.cuda.Event
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in pair:
            tensor.record_stream(stream)
        return pair

    def _timed(
        self,
        loaded: Iterator[tuple[torch.Tensor, torch.Tensor]],
        draws: torch.Tensor,
        epoch: int,
        places: np.ndarray,
        update: int,
        weight: int,
        last: bool,
    ) -> MicroBatch:
        started = time.perf_counter()
        images, labels = next(loaded)
        preprocess = self._input[self.size_in(epoch)]
        images = self._augmented(images.permute(0, 3, 1, 2), draws[places], epoch, places, preprocess)
        images = preprocess.normalized(images)
        if "erasing" in self._steps:
            images = each(RANDOM["erasing"], images, self._seeds(epoch, places, "erasing"))
        if self._mixes:  # drawn once for all micro-batches of an update
            random = np.random.default_rng(fold(self.seed, epoch, update))
            labels = F.one_hot(labels, self.class_count).float()
            images, labels = mix(images, labels, random, mixup=self.mixup, cutmix=self.cutmix)
        self.seconds_waited += time.perf_counter() - started
        return images, labels, weight, last

    def _augmented(
        self, images: torch.Tensor, draws: torch.Tensor, epoch: int, places: np.ndarray, preprocess: Preprocess
    ) -> torch.Tensor:
        """Distorts, flips and crops each image by its own row of `draws` or its own seed; resizes; values 0 to 255."""
        cuda = self.device.type == "cuda"  # on MPS such a copy may read what has been freed by then
        draws = (draws.pin_memory() if cuda else draws).to(self.device, non_blocking=cuda)
        for name in ("trivial", "randaugment", "augmix"):
            if name in self._steps:
                images = each(RANDOM[name], images, self._seeds(epoch, places, name))
        if "upright" in self._steps:
            draws[:, 0] = 1.0
        if "crop" in self._steps:
            images = random_resized_crop(preprocess.shrunk(images), draws, preprocess.image_size)
        else:
            images = preprocess.resized(images if self.augment == "none" else random_flip(images, draws[:, 0]))
        if "jitter" in self._steps:
            images = 255 * each(RANDOM["jitter"], images / 255, self._seeds(epoch, places, "jitter"))
        return images

    def _seeds(self, epoch: int, places: np.ndarray, name: str) -> list[int]:
        """A seed for each image and kind of augmentation."""
        more = [] if name == "trivial" else [zlib.crc32(name.encode())]
        return [fold(self.seed, epoch, place, *more) for place in places.tolist()]

    @property
    def _mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)
