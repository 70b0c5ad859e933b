"""Resize, normalise and augment on the device, as functions of images and of random numbers that the caller draws.

Knows nothing of files, order, seeds or models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from choices import AUGMENTATIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALLEST_CROP = 0.25  # share of an image's area


@dataclass
class Preprocess:
    """Make a model's input on the device: resized to `image_size` square, normalised, float32.

    `mean` and `std` are those of each channel, of values from 0 to 1; `interpolation` is bilinear or bicubic.
    """

    device: torch.device
    image_size: int
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    interpolation: str = "bilinear"
    channels_last: bool = True

    def __post_init__(self) -> None:
        deviation = torch.tensor(self.std, dtype=torch.float32)
        mean = torch.tensor(self.mean, dtype=torch.float32)
        # Repeat them for a whole row of pixels: a last dimension of three would not be vectorised.
        self._factor = (1 / (255 * deviation)).repeat(self.image_size).to(self.device)
        self._offset = (-mean / deviation).repeat(self.image_size).to(self.device)

    def __call__(self, images: torch.Tensor, shapes: np.ndarray | None = None) -> torch.Tensor:
        """Turn uint8 (count, height, width, 3) into float32 (count, 3, size, size); `shapes` are those of `unified`."""
        images = images.permute(0, 3, 1, 2)
        return self.normalized(self.resized(images) if shapes is None else self.unified(images, shapes))

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """Resize (count, 3, height, width) to (count, 3, size, size), values 0 to 255, antialiased as Pillow does."""
        if images.shape[-2:] == (self.image_size, self.image_size):
            return images
        return self._resize(images, (self.image_size, self.image_size))

    def unified(self, images: torch.Tensor, shapes: np.ndarray, side: int | None = None) -> torch.Tensor:
        """Resize images of several sizes to (count, 3, side, side), each as `resized` does; default: the model's side.

        Each of the images (count, 3, height, width) lies in the upper left corner, with its height and width in
        `shapes` (count, 2).
        """
        resize = self if side is None else replace(self, image_size=side)
        kinds = np.unique(shapes, axis=0)
        if len(kinds) == 1:
            height, width = kinds[0].tolist()
            return resize.resized(images[:, :, :height, :width])
        dtype = torch.uint8 if self.device.type == "cpu" else torch.float32
        whole = torch.empty((len(images), 3, resize.image_size, resize.image_size), dtype=dtype, device=images.device)
        for shape in kinds:
            places = torch.from_numpy(np.flatnonzero((shapes == shape).all(1))).to(images.device)
            height, width = shape.tolist()
            whole[places] = resize.resized(images[places, :, :height, :width]).to(dtype)
        return whole

    def shrunk(self, images: torch.Tensor) -> torch.Tensor:
        """Shrink (count, 3, height, width) to at most 1.5 times the size, antialiased: enough for random crops."""
        height, width = images.shape[-2:]
        most = self.image_size * 3 // 2
        if max(height, width) <= most:
            return images
        return self._resize(images, (min(height, most), min(width, most)))

    def _resize(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if self.device.type == "cpu":  # the fixed-point filter of Pillow exists for uint8 on the CPU alone
            return F.interpolate(images, size, mode=self.interpolation, antialias=True)
        return resize(images.float(), size, self.interpolation)

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Turn (count, 3, size, size) of values 0 to 255 into the model's input, float32."""
        rows = images.permute(0, 2, 3, 1).flatten(2)
        rows = torch.addcmul(self._offset, rows.float(), self._factor)
        pixels = rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
        return pixels if self.channels_last else pixels.contiguous()


def resize(images: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Return float images (count, 3, height, width), values 0 to 255, in `size`, antialiased as Pillow does.

    Pillow resizes the rows, then the columns, and each time rounds and clamps: a bicubic filter overshoots at edges
    (up to 279 for 255). With both steps done alike, values differ from Pillow's fixed-point filter by at most 1.
    """
    for shape in ((images.shape[-2], size[1]), size):
        images = F.interpolate(images, shape, mode=interpolation, antialias=True).round().clamp(0, 255)
    return images


def squared(images: torch.Tensor, resize: str) -> torch.Tensor:
    """Return images (count, 3, height, width) square: the middle (`crop`), with black borders (`pad`), or as they are.

    Decoding does the same (images/decode.py); this is for graphs that take images of any size.
    """
    if resize == "squash":
        return images
    height, width = images.shape[-2:]
    if resize == "crop":
        side = torch.sym_min(height, width)
        left, top = -((width - side) // 2), -((height - side) // 2)
    else:
        side = torch.sym_max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
    borders = (left, side - width - left, top, side - height - top)  # less than 0: cut off
    return F.pad(images, borders)  # type: ignore[arg-type] # symbols in a graph


def random_flip(images: torch.Tensor, draws: torch.Tensor, dimension: int = 3) -> torch.Tensor:
    """Mirror the images (count, 3, height, width) whose random number (count,) in [0, 1) is below one half."""
    return torch.where(draws[:, None, None, None] < 0.5, images.flip(dimension), images)


def quarter_turns(images: torch.Tensor, quarters: torch.Tensor) -> torch.Tensor:
    """Turn each of the square images (count, 3, side, side) by its number of `quarters` (count,), 0 to 3."""
    turned = images
    for number in (1, 2, 3):
        turned = torch.where(quarters[:, None, None, None] == number, images.rot90(number, (2, 3)), turned)
    return turned


def random_resized_crop(images: torch.Tensor, draws: torch.Tensor, side: int, smallest: float) -> torch.Tensor:
    """Crop a random part of each image at an aspect ratio of 3/4 to 4/3, flipped half the time: (count, 3, side, side).

    The part is `smallest` to all of the image's area. `draws` (count, 5) are uniform in [0, 1): flip, area, aspect
    ratio, horizontal and vertical position. Values stay 0 to 255, float32. After Szegedy et al. 2015, with a larger
    smallest area.
    """
    area = smallest + (1 - smallest) * draws[:, 1]
    aspect = torch.exp((draws[:, 2] * 2 - 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    left = (draws[:, 3] * 2 - 1) * (1 - width)
    top = (draws[:, 4] * 2 - 1) * (1 - height)
    zero = torch.zeros_like(left)
    sign = torch.where(draws[:, 0] < 0.5, -1.0, 1.0)
    theta = torch.stack([sign * width, zero, left, zero, height, top], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
    pixels = images.float().contiguous(memory_format=torch.channels_last)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


@functools.cache
def random_transform(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return torchvision's transform that `choices.AUGMENTATIONS` calls `name`; it draws its own random numbers."""
    from torchvision.transforms import v2  # an import that takes a while, and that few trainings need

    augmentation = AUGMENTATIONS[name]
    return getattr(v2, augmentation.class_name)(**augmentation.arguments)


def each(transform: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Apply a random transform to images (count, 3, height, width), each with its own seed; keep the images' layout.

    The transform draws from the default generators. These are put back as they were, because dropout draws from them,
    too. Their states are in the host's memory, so nothing waits for the device.
    """
    distorted = torch.empty_like(images)
    generators = default_generators(images.device)
    states = [generator.get_state() for generator in generators]
    for place, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        for generator in generators:
            generator.manual_seed(seed)
        distorted[place] = transform(image)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return distorted


def default_generators(device: torch.device) -> list[torch.Generator]:
    """Return the default generators of the CPU and of `device`."""
    found = [torch.default_generator]
    if device.type in ("cuda", "xpu"):
        found.append(torch.get_device_module(device).default_generators[device.index])
    elif device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    return found


def growing_sizes(start: int, full: int, epochs: int) -> list[int]:
    """Return the side of the training images in each epoch: even steps from `start` to `full` in the last tenth.

    There are at most four sizes, between the ends in multiples of 32 pixels, because each is compiled, or its kernels
    searched, once. A few epochs of full size at the end adapt the weights to it (Touvron et al. 2019).
    """
    if not start:
        return [full] * epochs
    steps = min(3, max(1, math.ceil((full - start) / 32)))
    growing = epochs - max(1, round(epochs / 10))
    grown = [start + (full - start) * (epoch * steps // growing) // steps for epoch in range(growing)]
    return [max(start, size // 32 * 32) for size in grown] + [full] * (epochs - growing)


def smallest_crop(side: int, full: int) -> float:
    """Return the smallest share of an image that a crop of `side` pixels shows while images grow to `full` pixels.

    A quarter at full size, at most a half below it: small images are augmented less (Tan and Le 2021), because the
    network that learns from them still underfits.
    """
    return min(0.5, SMALLEST_CROP * full / side)


def mix(
    images: torch.Tensor, labels: torch.Tensor, random: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image but the first with the previous one, and their labels alike.

    images (count, 3, side, side), labels (count, classes) as probabilities; return count - 1 of each. MixUp (Zhang
    et al. 2018) or CutMix (Yun et al. 2019), with a share from Beta(a, a); 0 turns one of the two off.
    """
    alphas = {"mixup": mixup, "cutmix": cutmix}
    kind = random.choice([name for name, alpha in alphas.items() if alpha])
    share = random.beta(alphas[kind], alphas[kind])
    mixed = images[1:].clone(memory_format=torch.preserve_format)
    if kind == "mixup":
        mixed.lerp_(images[:-1], 1 - share)
    else:
        side = images.shape[-1]
        middle = random.integers(0, side, 2)
        half = int((1 - share) ** 0.5 * side / 2)
        top, left = (middle - half).clip(0)
        low, right = (middle + half).clip(max=side)
        mixed[..., top:low, left:right] = images[:-1, :, top:low, left:right]
        share = 1 - (low - top) * (right - left) / side**2
    return mixed, labels[1:].lerp(labels[:-1], 1 - share)
