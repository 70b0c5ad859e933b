"""Image folders to batches on the device: listing, stratified split, batches, augmentation.

Resize, flip and normalise run batch-wise on the device, and all randomness depends on (seed, epoch,
position) alone, so that runs repeat, resume and spread over ranks. Knows nothing of models or precision.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from distributed import Ranks
from images.folders import Listing, find_image_set
from images.stores import ImageStore, open_store
from utils import UserError, fold, log, printable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Piece = tuple[torch.Tensor, torch.Tensor, int, bool]  # images, labels, weight, whether it is its update's last


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

    classes: list[str]
    train: Subset | None
    validation: Subset | None
    test: Subset
    fingerprint: str
    unreadable: list[str]


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
    subsets = {}
    bad = {}
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
    train = subsets.get("train")
    validation = subsets.get("validation")
    if train and not validation:
        kept, held_out = split_train(train.labels, seed=seed)
        everything = train.positions
        train = Subset(train.store, train.listing, everything[kept])
        validation = Subset(train.store, train.listing, everything[held_out])
    return DataSet(
        image_set.classes, train, validation, subsets["test"], digest.hexdigest()[:16], [str(path) for path in bad]
    )


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
class Pixels:
    """Makes a model's input on the device: resized to `image_size` square, normalised, float32.

    `normalize` is "imagenet" (mean and deviation of ImageNet) or "none" (values 0 to 1).
    """

    device: torch.device
    image_size: int
    normalize: str = "imagenet"
    channels_last: bool = True

    def __post_init__(self) -> None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if self.normalize == "imagenet" else ((0,) * 3, (1,) * 3)
        mean = torch.tensor(mean)
        std = torch.tensor(std)
        self._factor, self._offset = (  # of a whole row of pixels: a last dimension of three would not be vectorised
            row.repeat(self.image_size).to(self.device) for row in (1 / (255 * std), -mean / std)
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (count, height, width, 3) to float32 (count, 3, size, size)."""
        return self.normalized(self.resized(images.permute(0, 3, 1, 2)))

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """(count, 3, height, width) to (count, 3, size, size), values 0 to 255, antialiased as Pillow does."""
        if images.shape[-2:] == (self.image_size, self.image_size):
            return images
        if self.device.type != "cpu":  # Pillow's fixed-point filter exists for uint8 on the CPU alone
            images = images.float()
        return F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """(count, 3, size, size) of values 0 to 255 to the model's input, float32."""
        rows = images.permute(0, 2, 3, 1).flatten(2)
        rows = torch.addcmul(self._offset, rows.float(), self._factor)
        pixels = rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
        return pixels if self.channels_last else pixels.contiguous()


@dataclass
class Batches:
    """Feeds one subset to a device: float32 images (count, 3, size, size) from `pixels`, and labels."""

    subset: Subset
    pixels: Pixels
    batch_size: int
    class_count: int
    seed: int = 0
    accumulate: int = 1
    augment: str = "flip"  # flip | crop | trivial | none
    mixup: float = 0.0  # Beta(a, a) of the mixing weight; 0: off
    cutmix: float = 0.0
    ranks: Ranks = Ranks()

    def __post_init__(self) -> None:
        self.device = self.pixels.device
        self.seconds_waited = 0.0  # in which the step had to wait for its batch
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.subset) // self.batch_size)

    @property
    def full_sizes(self) -> set[int]:
        """How many images this rank's pieces of a full batch hold; those of a ragged last batch hold fewer."""
        mine = np.array_split(np.arange(self.batch_size), self.ranks.size)[self.ranks.rank]
        return {len(part) for part in np.array_split(mine, self.accumulate)}

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Iterator[Piece]]:
        """The updates of one epoch from `first_update` on, each an iterator of pieces.

        Order and augmentation depend on (seed, epoch, position) only. A rank whose share of a ragged last
        batch is empty gets one image with weight 0, because every rank must take part in every update.
        """
        generator = torch.Generator().manual_seed(fold(self.seed, epoch))
        order = torch.randperm(len(self.subset), generator=generator).numpy()
        draws = torch.rand(len(self.subset), 5, generator=generator)  # by position in the epoch
        pieces = []
        for update in range(first_update, self.updates_per_epoch):
            whole = np.arange(update * self.batch_size, min((update + 1) * self.batch_size, len(order)))
            mine = np.array_split(whole, self.ranks.size)[self.ranks.rank]
            parts = [part for part in np.array_split(mine, self.accumulate) if len(part)] or [whole[:1]]
            weight = int(len(mine) > 0)
            if self._mixes:  # each image is mixed with the one before it in the update, whoever else holds that
                parts = [np.append(whole[part[0] - whole[0] - 1], part) for part in parts]
            pieces.append([(part, update, weight, part is parts[-1]) for part in parts])
        flat = [piece for update in pieces for piece in update]
        loaded = self._on_device([order[places] for places, *_ in flat])
        for update in pieces:
            yield (self._timed_piece(loaded, draws, epoch, *piece) for piece in update)

    def evaluation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """This rank's stride of the subset as (images, labels, positions in the subset), never padded."""
        mine = np.arange(self.ranks.rank, len(self.subset), self.ranks.size)
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        for (images, labels), batch in zip(self._on_device(batches), batches, strict=True):
            yield self.pixels(images), labels, batch

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
    def _arrived(pair: tuple[torch.Tensor, torch.Tensor], copied: torch.cuda.Event):
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in pair:
            tensor.record_stream(stream)
        return pair

    def _timed_piece(self, loaded, draws, epoch, places, update, weight, last):
        started = time.perf_counter()
        images, labels = next(loaded)
        images = self._augmented(images.permute(0, 3, 1, 2), draws[places], (epoch, update), places)
        images = self.pixels.normalized(images)
        if self._mixes:
            images, labels = self._mixed(images, labels, (epoch, update))
        self.seconds_waited += time.perf_counter() - started
        return images, labels, weight, last

    def _augmented(self, images, draws, moment, places) -> torch.Tensor:
        """Flips, and crops or distorts, each image by its own row of `draws`; resizes; values 0 to 255."""
        cuda = self.device.type == "cuda"  # on MPS such a copy may read what has been freed by then
        draws = (draws.pin_memory() if cuda else draws).to(self.device, non_blocking=cuda)
        if self.augment == "trivial":
            images = self._trivial(images, moment, places)
        if self.augment == "crop":
            return self._cropped(images, draws)
        if self.augment != "none":
            images = torch.where(draws[:, :1, None, None] < 0.5, images.flip(3), images)
        return self.pixels.resized(images)

    def _cropped(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Random resized crop: 25 to 100 % of the area, aspect ratio 3/4 to 4/3, flipped half the time."""
        area = 0.25 + 0.75 * draws[:, 1]
        aspect = torch.exp((draws[:, 2] * 2 - 1) * np.log(4 / 3))
        width = (area * aspect).sqrt().clamp(max=1)
        height = (area / aspect).sqrt().clamp(max=1)
        left = (draws[:, 3] * 2 - 1) * (1 - width)
        top = (draws[:, 4] * 2 - 1) * (1 - height)
        zero = torch.zeros_like(left)
        sign = torch.where(draws[:, 0] < 0.5, -1.0, 1.0)
        theta = torch.stack([sign * width, zero, left, zero, height, top], 1).view(-1, 2, 3)
        side = self.pixels.image_size
        grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)

    def _trivial(self, images: torch.Tensor, moment: tuple[int, int], places: np.ndarray) -> torch.Tensor:
        """TrivialAugmentWide (Müller and Hutter 2021), seeded image by image by its place in the epoch."""
        from torchvision.transforms.v2 import TrivialAugmentWide

        transform = TrivialAugmentWide()
        distorted = []
        for image, place in zip(images, places.tolist(), strict=True):
            torch.default_generator.manual_seed(fold(self.seed, moment[0], place))
            distorted.append(transform(image))
        return torch.stack(distorted)

    @property
    def _mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def _mixed(self, images, labels, moment) -> tuple[torch.Tensor, torch.Tensor]:
        """Each image but the first mixed with the one before it; labels become probabilities (count, classes).

        MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019), drawn once for all pieces of an update.
        """
        random = np.random.default_rng(fold(self.seed, *moment))
        kinds = {"mixup": self.mixup, "cutmix": self.cutmix}
        kind = random.choice([name for name, alpha in kinds.items() if alpha])
        share = random.beta(kinds[kind], kinds[kind])
        labels = F.one_hot(labels, self.class_count).float()
        mixed = images[1:].clone(memory_format=torch.preserve_format)
        if kind == "mixup":
            mixed.lerp_(images[:-1], 1 - share)
        else:
            side = images.shape[-1]
            middle = random.integers(0, side, 2)
            half = int((1 - share) ** 0.5 * side / 2)
            (top, left) = (middle - half).clip(0)
            (low, right) = (middle + half).clip(max=side)
            mixed[..., top:low, left:right] = images[:-1, :, top:low, left:right]
            share = 1 - (low - top) * (right - left) / side**2
        return mixed, labels[1:].lerp(labels[:-1], 1 - share)
