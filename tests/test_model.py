"""Models by name, their new heads and the weights they start from; every family takes a training step.

No network: ImageNet files are made here and found where torch.hub looks. Run it alone: pytest tests/test_model.py
"""

import copy
import urllib.error
from collections import OrderedDict

import pytest
import torch
from tiny import refused
from torch import nn
from torchvision import models

from features.cpu_layers import SmallMapConv2d, multiply_small_maps
from model import build_model
from precision import DepthwiseConv2d, keep_depthwise_float32
from pretrained.torchvision_models import names

WITHOUT_COUNTERS = {"resnet18", "densenet121"}  # published before BatchNorm counted its batches


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Puts a 1000-class file of a model where torch.hub caches it; returns its state dict."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def place(name, content=None, **options):
        torch.manual_seed(1)
        state = models.get_model(name, num_classes=1000, **options).state_dict()
        if name in WITHOUT_COUNTERS:  # nor do such files hold the versions of their layers
            state = OrderedDict(item for item in state.items() if not item[0].endswith("num_batches_tracked"))
        file = tmp_path / "checkpoints" / models.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[-1]
        torch.save(state, file) if content is None else file.write_bytes(content)
        return state

    return place


# ---------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["ResNet18", "resnet18", "RESNET18"])
def test_names_of_any_case_are_torchvisions(name):
    model = build_model(name, 6, pretrained=False)
    assert model.state_dict().keys() == models.resnet18(num_classes=6).state_dict().keys()
    assert model(torch.zeros(2, 3, 33, 33)).shape == (2, 6)


def test_an_unknown_name_is_answered_with_likely_ones():
    message = refused(build_model, "ResNet19", 6, pretrained=False)
    assert "--model ResNet19" in message and "resnet18" in message
    assert "resnet18" in refused(build_model, "fasterrcnn", 6, pretrained=False)


def test_only_classifiers_are_offered():
    known = names()
    assert {"resnet18", "resnet50", "vit_b_16", "inception_v3"} <= set(known)
    assert not [name for name in known if "rcnn" in name or "deeplab" in name or name.startswith("raft")]


# ------------------------------------------------------------------------------------- families


def test_a_depthwise_convolution_trains_in_float32_and_infers_in_16_bits():
    torch.manual_seed(0)
    images = torch.randn(2, 8, 9, 9).bfloat16()
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    ours = keep_depthwise_float32(copy.deepcopy(plain))
    expected = plain(images.float())
    expected.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.train()(images)
        inferred = ours.eval()(images)
        assert torch.equal(inferred, plain(images))
    assert found.dtype == inferred.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    found.float().square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=0.02, atol=0.02)
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_only_depthwise_convolutions_are_kept_in_float32():
    layers = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4)]
    kept = keep_depthwise_float32(nn.Sequential(*layers))
    assert [isinstance(layer, DepthwiseConv2d) for layer in kept] == [False, False, False, True]


SMALL_MAPS = [
    ({"kernel_size": 3, "padding": 1}, (2, 2)),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, (7, 8)),
    ({"kernel_size": 1, "stride": 2, "bias": True}, (7, 4)),
    ({"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 3)}, (5, 9)),
    ({"kernel_size": (5, 4), "padding": (2, 3), "stride": (2, 1), "bias": True}, (5, 1)),
]


@pytest.mark.parametrize("apart", [0, 16])
@pytest.mark.parametrize("options, size", SMALL_MAPS)
def test_a_convolution_of_small_maps_is_the_same_as_matrix_products(monkeypatch, options, size, apart):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, **{"bias": False} | options, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    ours.__class__ = SmallMapConv2d
    ours.pixels = 16
    ours.apart = apart
    assert list(ours.state_dict()) == list(plain.state_dict())
    images = torch.randn(3, 6, *size, dtype=torch.float64)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    assert torch.equal(ours.eval()(images), expected)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", None)  # the product needs none
    found = ours.train()(inputs[1])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


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


# -------------------------------------------------------------------------------- ImageNet weights


@pytest.mark.parametrize("shown", [True, False])
def test_the_download_has_a_bar_where_other_bars_are_shown(monkeypatch, shown):
    def get_state_dict(_weights, *, progress, **_options):
        asked.append(progress)
        return models.squeezenet1_1().state_dict()

    asked = []
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get_state_dict)
    monkeypatch.setattr("pretrained.torchvision_models.shows_bars", lambda: shown)
    build_model("squeezenet1_1", 6)
    assert any(asked) == shown


def test_offline_the_ways_out_are_named(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    message = refused(build_model, "resnet18", 6)
    for way in ("Name or service not known", "https://", str(tmp_path), "--pretrained_path", "--pretrained 0"):
        assert way in message
    assert list(tmp_path.rglob("*.pth*")) == []


@pytest.mark.parametrize("content", [b"", b"not a file of weights", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_imagenet_file_is_one_message(imagenet, content):
    imagenet("squeezenet1_1", content)
    message = refused(build_model, "squeezenet1_1", 6)
    assert "delete a damaged file" in message and "--pretrained 0" in message
