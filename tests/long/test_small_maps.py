"""Convolutions of small maps as matrix products: for which layers, on which processors, in which types."""

import copy

import pytest
import torch
from torch import nn

from features.cpu_layers import SmallMapConv2d, multiply_small_maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_for_each_pixel_follow_autocast(dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 32, 3, padding=1)
    ours = copy.deepcopy(plain)
    ours.__class__ = SmallMapConv2d
    ours.apart = 4
    images = torch.randn(3, 64, 2, 2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(images)
        found = ours.train()(images)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=0.02, atol=0.1)  # sums of 16-bit products


def test_larger_maps_are_left_to_the_convolution_and_impossible_ones_refused_by_it():
    ours = nn.Conv2d(2, 2, 3)
    ours.__class__ = SmallMapConv2d
    images = torch.randn(1, 2, 7, 7)  # of which 5x5 come out
    assert torch.equal(ours.train()(images), nn.functional.conv2d(images, ours.weight, ours.bias))
    assert ours(images[0]).shape == (2, 5, 5)
    with pytest.raises(RuntimeError, match="Kernel size"):
        ours(images[..., :2])


def test_only_convolutions_with_many_weights_and_no_other_trait_are_multiplied():
    many = {"in_channels": 512, "out_channels": 512, "kernel_size": 3}
    others = [
        {"kernel_size": 1},
        {"in_channels": 108},
        {"dilation": 2},
        {"groups": 2, "in_channels": 1024},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ]
    with torch.device("meta"):
        layers = [nn.Conv2d(**many | other) for other in ({}, *others)]
    found = multiply_small_maps(nn.Sequential(*layers), amp=False)
    assert [type(layer) is SmallMapConv2d for layer in found] == [True, *[False] * len(others)]


@pytest.mark.parametrize(
    "amp, instructions, channels, pixels, apart",
    [
        (False, {"avx2"}, 256, 4, 4),
        (False, {"avx2"}, 512, 4, 4),
        (False, {"avx512_bf16", "amx_bf16"}, 256, 4, 4),
        (False, {"avx512_bf16", "amx_bf16"}, 512, 16, 4),
        (True, {"avx512_bf16", "amx_bf16"}, 256, 16, 1),
        (True, {"avx512_bf16", "amx_bf16"}, 512, 64, 1),
        (True, {"avx512_bf16"}, 256, 4, 4),
        (True, {"avx512_bf16"}, 512, 4, 4),
        (True, {"avx2"}, 512, 0, 0),
    ],
)
def test_the_processor_decides_which_maps_are_multiplied_and_how(
    monkeypatch, amp, instructions, channels, pixels, apart
):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: instructions)
    with torch.device("meta"):
        ours = multiply_small_maps(nn.Conv2d(channels, channels, 3, padding=1), amp=amp).train()
        monkeypatch.setattr(nn.functional, "linear", lambda rows, *_: multiplied.append(len(rows)) or rows)
        for side in (1, 2, 3, 4, 5, 8, 9):
            multiplied = []
            ours(torch.empty(2, channels, side, side))
            one_by_one = side**2 <= apart
            expected = [2] * side**2 if one_by_one else [2 * side**2]
            assert multiplied == (expected if side**2 <= pixels else [])
    kept = copy.deepcopy(ours)
    assert (kept.pixels, kept.apart) == (pixels, apart)  # of one pixel, both forms are one product


def test_without_padding_to_leave_out_all_pixels_are_one_product(monkeypatch):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: {"avx2"})
    with torch.device("meta"):
        layers = [nn.Conv2d(512, 2048, 1), nn.Conv2d(512, 512, 3), nn.Conv2d(512, 512, 3, padding=3)]
        found = multiply_small_maps(nn.Sequential(*layers), amp=False)
    assert [layer.apart for layer in found] == [0, 0, 0]  # of the last one, some pixels would see nothing else
