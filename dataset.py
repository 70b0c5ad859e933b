"""Batches of a data set on the device: order, sampling, ranks, copies, augmentation.

Resizing, flips and normalisation run on whole batches on the device. All random numbers depend on (seed, epoch,
position) alone, so that runs can be repeated, resumed and divided among ranks. Knows nothing of models or precision.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from choices import AUGMENTATIONS, BEFORE_RESIZING, NORMALIZED, RESIZED
from distributed import Ranks
from images.subsets import Subset
from system.machine import images_at_once
from transforms import (
    Preprocess,
    each,
    growing_sizes,
    mix,
    quarter_turns,
    random_flip,
    random_resized_crop,
    random_transform,
    smallest_crop,
)
from utils import fold

# uint8 images (count, height, width, 3) and labels on the device, and shapes as in images.stores.Batch; with `frozen`
# outputs of frozen layers (count, views, features) instead of images, and no shapes
Loaded = tuple[torch.Tensor, torch.Tensor, np.ndarray | None]
MicroBatch = tuple[torch.Tensor, torch.Tensor, int, bool]  # images, labels, weight, True for the last of its update


@dataclass
class Batches:
    """Feed one subset to a device: float32 images (count, 3, size, size) from `preprocess`, and labels."""

    subset: Subset
    preprocess: Preprocess
    batch_size: int
    class_count: int
    seed: int = 0
    accumulate: int = 1
    sampler: str = "shuffle"  # shuffle: each image once an epoch; balanced: each class equally often
    augment: str = "flip"  # none, or some of choices.AUGMENTATIONS, separated by commas
    mixup: float = 0.0  # Beta(a, a) of the mixing weight; 0: off
    cutmix: float = 0.0
    start_size: int = 0  # side of the first epoch's images, which grow to full size; 0: all have full size
    epochs: int = 1
    ranks: Ranks = Ranks()
    frozen: Callable[[], torch.Tensor] | None = None  # outputs (images, views, features) to feed instead of images

    def __post_init__(self) -> None:
        self.device = self.preprocess.device
        self._steps = set(self.augment.split(","))
        self.sizes = growing_sizes(self.start_size, self.preprocess.image_size, self.epochs)  # of each epoch
        self._input = {size: replace(self.preprocess, image_size=size) for size in set(self.sizes)}
        self.seconds_waited = 0.0  # that updates had to wait for their micro-batches
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def updates_per_epoch(self) -> int:
        """Return the number of updates in an epoch.

        A last batch of one image joins the one before it, because it would have no batch statistics.
        """
        count = len(self.subset)
        if 1 < self.batch_size < count and count % self.batch_size == 1:
            return count // self.batch_size
        return math.ceil(count / self.batch_size)

    def images_in(self, update: int) -> int:
        """Return the number of images in an update of an epoch, on all ranks together."""
        return len(self._places(update))

    def _places(self, update: int) -> range:
        """Return the places in an epoch's order that an update takes."""
        last = update == self.updates_per_epoch - 1
        return range(update * self.batch_size, len(self.subset) if last else (update + 1) * self.batch_size)

    def size_in(self, epoch: int) -> int:
        """Return the side of an epoch's images in pixels."""
        return self.sizes[min(epoch, len(self.sizes) - 1)]

    def grows_in(self, epoch: int) -> bool:
        """Return True if an epoch's images are larger than those of the epoch before."""
        return epoch > 0 and self.size_in(epoch - 1) < self.size_in(epoch)

    def _full(self, rank: int) -> list[int]:
        """Return the number of images in each micro-batch of a full batch on a rank."""
        share = np.array_split(np.arange(self.batch_size), self.ranks.size)[rank]
        return [len(piece) for piece in np.array_split(share, self.accumulate)]

    @property
    def full_sizes(self) -> set[int]:
        """Return the numbers of images in this rank's micro-batches of a full batch."""
        return set(self._full(self.ranks.rank))

    @property
    def smallest_micro_batch(self) -> int:
        """Return the smallest number of images in a micro-batch of any update on any rank; at least one."""
        updates = {0, self.updates_per_epoch - 1}  # all between are full, as the first is
        pieces = [self._pieces(update, rank) for update in updates for rank in range(self.ranks.size)]
        return min(max(1, len(piece)) for some in pieces for piece in some)

    def _pieces(self, update: int, rank: int) -> list[np.ndarray]:
        """Return the places of each micro-batch of a rank. A rank without a share has one micro-batch without places.

        A full batch is divided into `accumulate` micro-batches. Those of a ragged batch keep that size, because
        BatchNorm's statistics depend on it; a single remaining image joins the micro-batch before it.
        """
        mine = np.array_split(np.array(self._places(update)), self.ranks.size)[rank]
        sizes = self._full(rank)
        if self.images_in(update) == self.batch_size:
            return np.split(mine, np.cumsum(sizes)[:-1])
        size = max(sizes)
        end = len(mine) - 1 if size > 1 else len(mine)
        return np.split(mine, range(size, end, size))

    def epoch(self, epoch: int, first_update: int = 0, end: int | None = None) -> Iterator[Iterator[MicroBatch]]:
        """Yield the updates of one epoch from `first_update` on, up to `end`, each an iterator of micro-batches.

        Order and augmentation depend on (seed, epoch, position) only. A rank whose share of a ragged last batch is
        empty gets one image with weight 0, because every rank must take part in every update. All iterators share one
        loader: use up the micro-batches of an update before you take the next update.
        """
        generator = torch.Generator().manual_seed(fold(self.seed, epoch))
        order = self._order(generator)
        random = torch.rand(len(self.subset), 5, generator=generator)  # by place in the epoch
        updates = []
        for update in range(first_update, self.updates_per_epoch if end is None else end):
            whole = np.array(self._places(update))
            parts = self._pieces(update, self.ranks.rank)
            weight = int(len(parts[0]) > 0)
            parts = parts if weight else [whole[:1]]
            if self._mixes:
                # Each image is mixed with the previous one of the update, which may belong to another rank. The first
                # one is mixed with the last: its index is -1.
                parts = [np.append(whole[part[0] - whole[0] - 1], part) for part in parts]
            updates.append([(part, update, weight, part is parts[-1]) for part in parts])
        loaded = self._on_device([order[places] for micro_batches in updates for places, *_ in micro_batches])
        for micro_batches in updates:
            yield (self._next(loaded, random, epoch, *micro_batch) for micro_batch in micro_batches)

    def _next(
        self,
        loaded: Iterator[Loaded],
        random: torch.Tensor,
        epoch: int,
        places: np.ndarray,
        update: int,
        weight: int,
        last: bool,
    ) -> MicroBatch:
        """Return the next micro-batch, and count the seconds that the update waited for it."""
        started = time.perf_counter()
        images, labels = self._micro_batch(next(loaded), random[places], epoch, places, update)
        self.seconds_waited += time.perf_counter() - started
        return images, labels, weight, last

    def _order(self, generator: torch.Generator) -> np.ndarray:
        """Return a position in the subset for each place of an epoch."""
        order = torch.randperm(len(self.subset), generator=generator).numpy()
        return order if self.sampler == "shuffle" else balanced(order, self.subset.labels, self.class_count)

    def prepare(self) -> float | None:
        """Compute the outputs of frozen layers; return the seconds that it took, or None if images are fed."""
        if self.frozen is None:
            return None
        started = time.perf_counter()
        self.frozen()
        return time.perf_counter() - started

    def evaluation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """Yield this rank's stride of the subset as (images, labels, positions in the subset), never padded."""
        batches = self._evaluation_places()
        for (images, labels, shapes), batch in zip(self._on_device(batches), batches, strict=True):
            yield images[:, 0] if self.frozen else self.preprocess(images, shapes), labels, batch

    def _evaluation_places(self) -> list[np.ndarray]:
        mine = np.arange(self.ranks.rank, len(self.subset), self.ranks.size)
        size = self.evaluation_size
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    @property
    def evaluation_size(self) -> int:
        """Return the number of images that `evaluation` yields at a time: no more than a micro-batch in training."""
        return images_at_once(math.ceil(self.batch_size / self.accumulate), self.device)

    def first_images(self, most: int) -> tuple[np.ndarray, torch.Tensor]:
        """Return up to `most` images of the first update as the model gets them, and their labels.

        uint8 (count, side, side, 3) and class indices (count,), or probabilities (count, classes) after MixUp.
        """
        mean, std = (self.preprocess.mean, self.preprocess.std)
        shown = []
        targets = []
        for images, labels, *_ in next(replace(self, frozen=None).epoch(0, 0, 1)):
            pixels = images.float().cpu().permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
            shown.append((255 * pixels).round().clamp(0, 255).byte())
            targets.append(labels.cpu())
            if sum(map(len, shown)) >= most:
                break
        return torch.cat(shown)[:most].numpy(), torch.cat(targets)[:most]

    def _on_device(self, batches: list[np.ndarray]) -> Iterator[Loaded]:
        """Yield images, labels and shapes of each batch. CUDA copies them one batch ahead, on a stream of its own."""
        if self.frozen:
            for batch in batches:
                labels = torch.from_numpy(self.subset.labels[batch])
                yield self.frozen()[torch.from_numpy(batch)].to(self.device), labels.to(self.device), None
            return
        ahead: deque = deque()
        for (images, shapes), batch in zip(
            self.subset.store.batches([self.subset.positions[batch] for batch in batches]), batches, strict=True
        ):
            labels = torch.from_numpy(self.subset.labels[batch])
            if self._copy_stream is None:
                yield images.to(self.device), labels.to(self.device), shapes
                continue
            with torch.cuda.stream(self._copy_stream):
                labels = labels.pin_memory()
                pair = tuple(tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
                ahead.append((pair, self._copy_stream.record_event(), shapes))
            if len(ahead) > 1:
                yield self._arrived(*ahead.popleft())
        while ahead:
            yield self._arrived(*ahead.popleft())

    @staticmethod
    def _arrived(
        pair: tuple[torch.Tensor, torch.Tensor], copied: torch.cuda.Event, shapes: np.ndarray | None
    ) -> Loaded:
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in pair:
            tensor.record_stream(stream)
        return *pair, shapes

    def _micro_batch(
        self, loaded: Loaded, random: torch.Tensor, epoch: int, places: np.ndarray, update: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels as the model gets them: resized, augmented, normalised, mixed."""
        images, labels, shapes = loaded
        if self.frozen:  # half of the images are fed as their second view, the mirror image, if there is one
            view = (random[:, 0] < 0.5).long().clamp(max=images.shape[1] - 1).to(self.device)
            return images[torch.arange(len(images), device=self.device), view], labels
        preprocess = self._input[self.size_in(epoch)]
        images = images.permute(0, 3, 1, 2)
        if shapes is not None:
            images = preprocess.unified(images, shapes, self._room(images, preprocess.image_size))
        images = self._augmented(images, random, epoch, places, preprocess)
        images = preprocess.normalized(images)
        for name in self._random_steps(NORMALIZED):
            images = each(random_transform(name), images, self._seeds(epoch, places, name))
        if self._mixes:  # with the same random numbers in all micro-batches of an update
            generator = np.random.default_rng(fold(self.seed, epoch, update))
            labels = F.one_hot(labels, self.class_count).float()
            images, labels = mix(images, labels, generator, mixup=self.mixup, cutmix=self.cutmix)
        return images, labels

    def _room(self, images: torch.Tensor, side: int) -> int:
        """Return the side to resize images of several sizes to: random crops get up to 1.5 times the final side."""
        return min(side * 3 // 2, max(images.shape[-2:])) if "crop" in self._steps else side

    def _augmented(
        self, images: torch.Tensor, draws: torch.Tensor, epoch: int, places: np.ndarray, preprocess: Preprocess
    ) -> torch.Tensor:
        """Distort, flip, crop and resize each image by its own row of `draws` or its own seed; values stay 0 to 255."""
        draws = self._sent(draws)
        for name in self._random_steps(BEFORE_RESIZING):
            images = images if images.dtype == torch.uint8 else images.round().byte()
            images = each(random_transform(name), images, self._seeds(epoch, places, name))
        if "upright" in self._steps:
            draws[:, 0] = 1.0
        if "crop" in self._steps:
            smallest = smallest_crop(preprocess.image_size, self.preprocess.image_size)
            images = random_resized_crop(preprocess.shrunk(images), draws, preprocess.image_size, smallest)
        else:
            images = preprocess.resized(images if self.augment == "none" else random_flip(images, draws[:, 0]))
        for name in self._random_steps(RESIZED):
            images = 255 * each(random_transform(name), images / 255, self._seeds(epoch, places, name))
        if "vertical" in self._steps:
            images = random_flip(images, self._sent(torch.tensor(self._seeds(epoch, places, "vertical")) % 2), 2)
        if "turns" in self._steps:
            images = quarter_turns(images, self._sent(torch.tensor(self._seeds(epoch, places, "turns")) % 4))
        return images

    def _sent(self, numbers: torch.Tensor) -> torch.Tensor:
        """Copy numbers to the device without waiting for it."""
        cuda = self.device.type == "cuda"  # on MPS such a copy may read memory that was freed meanwhile
        return (numbers.pin_memory() if cuda else numbers).to(self.device, non_blocking=cuda)

    def _random_steps(self, stage: str) -> list[str]:
        """Return the names in `augment` of torchvision's random transforms that act at this stage."""
        return [name for name, kind in AUGMENTATIONS.items() if name in self._steps and kind.stage == stage]

    def _seeds(self, epoch: int, places: np.ndarray, name: str) -> list[int]:
        """Return a seed for each image and kind of augmentation."""
        more = [] if name == "trivial" else [zlib.crc32(name.encode())]
        return [fold(self.seed, epoch, place, *more) for place in places.tolist()]

    @property
    def _mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)


def balanced(order: np.ndarray, labels: np.ndarray, class_count: int) -> np.ndarray:
    """Return as many positions as `order` has, each class equally often, the images of a class in turn.

    `order` is a random permutation of all positions, `labels` are their classes; no other random numbers are drawn. The
    classes differ by one image if they cannot have equally many.
    """
    places = order[np.argsort(labels[order], kind="stable")]  # one class after the other
    counts = np.bincount(labels, minlength=class_count)
    there = np.flatnonzero(counts)
    begins = np.cumsum(counts) - counts
    turn, place = np.divmod(np.arange(len(order)), len(there))
    label = there[place]
    chosen = places[begins[label] + turn % counts[label]]
    return chosen[order]
