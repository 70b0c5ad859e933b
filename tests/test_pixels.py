"""One picture gives the same pixels on every device, in `predict` and in the exported program.

The CUDA device is faked: `Preprocess` takes the way that it takes there, and a CPU computes it.

Run it alone: pytest tests/test_pixels.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from commands.export import FromPixels
from dataset import Batches
from transforms import Preprocess

CPU = torch.device("cpu")
SIDE = 32
LEVELS = 2  # of 255: what devices may differ by, as docs/faults.md says


class OnCuda(Preprocess):
    """Computes as on a CUDA device, on a CPU."""

    def __post_init__(self):
        self.device = CPU
        super().__post_init__()
        self.device = SimpleNamespace(type="cuda")


def edges(height, width, count=2, seed=0):
    """Black and white blocks, at whose edges a bicubic filter overshoots; uint8 (count, height, width, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 2, (count, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return 255 * blocks.repeat(4, 1).repeat(4, 2)[:, :height, :width]


def first(images):
    """As (count, 3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def checkpoint(interpolation):
    reading = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": interpolation}
    return {"image_size": SIDE, **reading}


def assert_close(one, other):
    difference = (one.float() - other.float()).abs()
    assert difference.max() <= LEVELS and difference.mean() < 0.2


SHAPES = [(20, 17), (17, 20), (31, 33), (32, 20), (20, 32), (90, 40), (40, 90), (1, 1), (2, 60), (33, 1)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_a_cpu_on_cuda_and_in_the_exported_program(interpolation):
    ours = Preprocess(CPU, SIDE, interpolation=interpolation)
    cuda = OnCuda(CPU, SIDE, interpolation=interpolation)
    program = FromPixels(nn.Flatten(), checkpoint(interpolation))
    program.with_parts = True
    for seed, (height, width) in enumerate(SHAPES):
        images = edges(height, width, seed=seed)
        wanted = ours.resized(first(images))
        assert wanted.dtype == torch.uint8
        assert_close(cuda.resized(first(images)), wanted)
        assert_close(program(torch.from_numpy(images))[2], wanted)
        assert_close(cuda.shrunk(first(images)), ours.shrunk(first(images)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_of_several_sizes_are_those_of_a_cpu_on_cuda(interpolation):
    shapes = np.array(SHAPES)
    boxed = np.zeros((len(shapes), *shapes.max(0), 3), np.uint8)
    for place, (height, width) in enumerate(shapes):
        boxed[place, :height, :width] = edges(height, width, 1, place)[0]
    made = [
        kind(CPU, SIDE, interpolation=interpolation).unified(first(boxed), shapes, side)
        for kind in (Preprocess, OnCuda)
        for side in (None, 48)
    ]
    for wanted, found in ((made[0], made[2]), (made[1], made[3])):
        assert found.min() >= 0 and found.max() <= 255 and torch.equal(found, found.round())
        assert_close(found, wanted)


def test_bright_stays_bright_where_an_augmentation_of_bytes_follows(monkeypatch):
    """256 as a byte is 0: bicubic models on a GPU learned from pictures with black holes."""
    shapes = np.array([(20, 17), (30, 31), (17, 20), (20, 17)])
    boxed = np.zeros((4, 30, 31, 3), np.uint8)
    for place, (height, width) in enumerate(shapes):
        boxed[place, :height, :width] = edges(height, width, 1, place)[0]
    monkeypatch.setattr("dataset.random_transform", {"trivial": lambda image: image}.get)
    subset = tiny.subset(4)
    shown = []
    for kind in (Preprocess, OnCuda):
        batches = Batches(subset, Preprocess(CPU, SIDE, interpolation="bicubic"), 4, 3, augment="trivial,upright")
        batches._input = {SIDE: kind(CPU, SIDE, (0, 0, 0), (1 / 255,) * 3, "bicubic")}
        loaded = (torch.from_numpy(boxed), torch.zeros(4, dtype=torch.long), shapes)
        shown.append(batches._micro_batch(loaded, torch.rand(4, 5), 0, np.arange(4), 0)[0])
    assert_close(*shown)
