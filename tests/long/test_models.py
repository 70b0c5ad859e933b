"""Real architectures: every family trains a new head, sizes that none can take are refused, layers for CPUs train."""

import pytest
import tiny
import torch
from tiny import refused
from torch import nn
from torchvision import models

from features.cpu_layers import DepthwiseConv2d, SmallMapConv2d
from model import build_model, check_input_size, head_names

FAMILIES = [
    ("alexnet", 64),
    ("squeezenet1_1", 33),
    ("mobilenet_v3_small", 33),
    ("shufflenet_v2_x0_5", 33),
    ("mnasnet0_5", 33),
    ("densenet121", 33),
    ("efficientnet_b0", 33),
    ("regnet_y_400mf", 33),
    ("googlenet", 33),
    ("inception_v3", 75),
    ("convnext_tiny", 33),
    ("swin_t", 33),
    ("resnet18", 33),
]


@pytest.mark.parametrize("name, side", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_family_trains_a_head_of_its_own(name, side):
    """Shapes and gradients on the meta device, which computes nothing."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute their widths with tensors
        model = build_model(name, 6, pretrained=False)
    model.to("meta").train()
    check_input_size(model, side, 2)
    logits = model(torch.randn(2, 3, side, side, device="meta"))
    assert torch.is_tensor(logits) and logits.shape == (2, 6)
    logits.square().sum().backward()
    without = [parameter for parameter, tensor in model.named_parameters() if tensor.grad is None]
    assert without == []
    assert model.get_submodule(head_names(model)[0]).weight.shape[0] == 6


@pytest.mark.parametrize(
    "name, side, piece, way",
    [
        ("vit_b_16", 33, 2, "another --image_size (224 suits it)"),
        ("inception_v3", 33, 2, "another --image_size (224 suits it)"),
        ("alexnet", 33, 2, "another --image_size (224 suits it)"),
        ("resnet18", 32, 1, "a --batch_size"),
    ],
)
def test_a_size_that_a_model_cannot_train_on_is_refused_before_training(name, side, piece, way):
    with torch.device("meta"):
        model = models.get_model(
            name, num_classes=6, **({"aux_logits": False, "init_weights": False} if name == "inception_v3" else {})
        )
    message = refused(check_input_size, model, side, piece)
    assert f"--image_size {side}" in message and way in message
    check_input_size(model, 224, 2)
    message = refused(check_input_size, model, 224, piece, side)
    assert f"--start_size {side}" in message and "--start_size 0" in message and "--image_size 224" not in message


@pytest.mark.parametrize("more, kept", [((), False), (("--amp",), True)])
def test_amp_on_a_cpu_keeps_depthwise_convolutions_in_float32(tmp_path, monkeypatch, more, kept):
    data = tiny.draw(tmp_path / "data")
    seen = set()
    forward = DepthwiseConv2d.forward

    def watched(self, images):
        seen.add(self.training)
        return forward(self, images)

    monkeypatch.setattr(DepthwiseConv2d, "forward", watched)
    assert tiny.train(data, tmp_path, "--model=shufflenet_v2_x0_5", *more) == 0
    assert seen == ({True, False} if kept else set())


def test_products_compile_without_a_break():
    ours = nn.Conv2d(4, 4, 3, padding=1)
    ours.__class__ = SmallMapConv2d
    images = torch.randn(3, 4, 2, 2)
    compiled = torch.compile(ours.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), ours(images))


def test_a_training_on_a_cpu_multiplies_small_maps_of_many_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: {"avx512_bf16", "amx_bf16"})
    data = tiny.draw(tmp_path / "data")
    product = nn.functional.linear
    shapes = set()

    def watched(rows, weight, bias=None):
        shapes.add(tuple(weight.shape))
        return product(rows, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    assert tiny.train(data, tmp_path, "--model=resnet18", "--amp") == 0
    assert shapes == {(3, 512), (512, 9 * 512), (512, 9 * 256)}  # the head, and the last stage
