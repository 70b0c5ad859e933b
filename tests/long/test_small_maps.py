"""Convolutions of small maps as matrix products: for which layers, on which processors, in which types."""

import copy

import pytest
import torch
from torch import nn

from features.cpu_layers import SmallMapConv2d, adapt_to_cpu, multiply_small_maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_follow_autocast(dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 32, 3, padding=1)
    ours = copy.deepcopy(plain)
    ours.__class__ = SmallMapConv2d
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
    images = torch.randn(1, 2, 11, 11)  # 9x9 come out
    assert torch.equal(ours.train()(images), nn.functional.conv2d(images, ours.weight, ours.bias))
    assert ours(images[0]).shape == (2, 9, 9)
    with pytest.raises(RuntimeError, match="Kernel size"):
        ours(images[..., :2])


def test_only_convolutions_with_many_weights_and_no_other_trait_are_multiplied(monkeypatch):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: {"amx_bf16"})
    many = {"in_channels": 512, "out_channels": 512, "kernel_size": 3}
    others = [
        {"kernel_size": 1},
        {"in_channels": 216},
        {"dilation": 2},
        {"groups": 2, "in_channels": 1024},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ]
    with torch.device("meta"):
        layers = [nn.Conv2d(**many | other) for other in ({}, *others)]
    found = multiply_small_maps(nn.Sequential(*layers))
    assert [type(layer) is SmallMapConv2d for layer in found] == [True, *[False] * len(others)]


@pytest.mark.parametrize(
    "amp, instructions, channels, pixels",
    [
        (True, {"avx512_bf16", "amx_bf16"}, 512, 64),
        (True, {"avx512_bf16", "amx_bf16"}, 256, 0),  # 0.6 million weights
        (True, {"avx512_bf16"}, 512, 0),
        (False, {"avx512_bf16", "amx_bf16"}, 512, 0),
    ],
)
def test_small_maps_are_multiplied_in_16_bits_with_amx(monkeypatch, amp, instructions, channels, pixels):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: instructions)
    with torch.device("meta"):
        ours = adapt_to_cpu(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), amp=amp).train()
        monkeypatch.setattr(nn.functional, "linear", lambda rows, *_: multiplied.append(len(rows)) or rows)
        for side in (1, 2, 5, 8, 9):
            multiplied = []
            ours(torch.empty(2, channels, side, side))
            assert multiplied == ([2 * side**2] if side**2 <= pixels else [])
