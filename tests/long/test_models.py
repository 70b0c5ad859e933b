"""Real architectures: every family trains a new head, ImageNet files fill all but it, layers for CPUs train in them."""

from collections import OrderedDict

import pytest
import tiny
import torch
from tiny import refused
from torch import nn
from torchvision import models

from features.cpu_layers import SmallMapConv2d
from model import build_model, check_input_size, head_names
from precision import DepthwiseConv2d

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
    torch.manual_seed(0)
    model = build_model(name, 6, pretrained=False).train()
    check_input_size(model, side, 2)
    logits = model(torch.randn(2, 3, side, side))
    assert torch.is_tensor(logits) and logits.shape == (2, 6)
    logits.square().sum().backward()
    without = [parameter for parameter, tensor in model.named_parameters() if tensor.grad is None]
    assert without == []
    head = model.get_submodule(head_names(model)[0])
    assert head.weight.shape[0] == 6 and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, side, piece", [("vit_b_16", 33, 2), ("inception_v3", 33, 2), ("alexnet", 33, 2), ("resnet18", 32, 1)]
)
def test_a_size_that_a_model_cannot_train_on_is_refused_before_training(name, side, piece):
    with torch.device("meta"):
        model = models.get_model(
            name, num_classes=6, **({"aux_logits": False, "init_weights": False} if name == "inception_v3" else {})
        )
    message = refused(check_input_size, model, side, piece)
    assert f"--image_size {side}" in message and "--batch_size" in message
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


def test_products_for_each_pixel_compile_without_a_break():
    ours = nn.Conv2d(4, 4, 3, padding=1)
    ours.__class__ = SmallMapConv2d
    ours.apart = 4
    images = torch.randn(3, 4, 2, 2)
    compiled = torch.compile(ours.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), ours(images))


@pytest.mark.parametrize(
    "instructions, more, expected",
    [
        ({"avx2"}, (), {(512, 4 * 512), (512, 4 * 256)}),  # of 2x2 pixels what is seen
        ({"avx512_bf16", "amx_bf16"}, ("--amp",), {(512, 9 * 512), (512, 9 * 256), (256, 9 * 256)}),  # and of 3x3 all
    ],
    ids=["apart", "amx"],
)
def test_a_training_on_a_cpu_multiplies_small_maps_of_many_weights(tmp_path, monkeypatch, instructions, more, expected):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: instructions)
    data = tiny.draw(tmp_path / "data")
    product = nn.functional.linear
    shapes = set()

    def watched(rows, weight, bias=None):
        shapes.add(tuple(weight.shape))
        return product(rows, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    assert tiny.train(data, tmp_path, "--model=resnet18", *more) == 0
    assert shapes == {(3, 512)} | expected  # the head comes first


@pytest.mark.parametrize(
    "name, options",
    [("resnet18", {}), ("squeezenet1_1", {}), ("mobilenet_v3_small", {}), ("googlenet", {"init_weights": False})],
)
def test_imagenet_weights_fill_all_but_the_head(imagenet, monkeypatch, name, options):
    state = imagenet(name, **options)
    model = build_model(name, 6)
    head = head_names(model)[0]
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] == head:
            assert tensor.shape[0] == 6
        else:
            assert torch.equal(tensor, state.get(key, torch.tensor(0))), key
    assert model(torch.zeros(2, 3, 33, 33)).shape == (2, 6)


def test_a_file_in_the_published_form_has_the_published_size(imagenet, tmp_path):
    """torchvision publishes 44.661 MiB: 102 entries. With batch counters the same file has 44.666."""
    state = imagenet("resnet18")
    assert len(state) == 102
    weights = models.ResNet18_Weights.DEFAULT
    size = next(tmp_path.rglob("resnet18*.pth")).stat().st_size / 2**20
    assert abs(size - weights.meta["_file_size"]) < 0.0025


def test_a_thousand_classes_keep_the_imagenet_head(imagenet):
    state = imagenet("squeezenet1_1")
    found = build_model("squeezenet1_1", 1000).state_dict()
    assert torch.equal(found["classifier.1.weight"], state["classifier.1.weight"])
