"""Weights that other programs wrote: torchvision's reference code, the 2020 tutorial, a GPU; heads of other widths."""

import argparse
import pathlib
import re
from collections import OrderedDict

import pytest
import torch
from test_weights import NAME, assert_loaded, network
from tiny import refused
from torch import nn
from torchvision import models

from model import build_model


def test_entries_of_another_program_are_matched_by_order_and_shape(tmp_path, said):
    """The 2020 tutorial's ResNet18 keeps torchvision's layers in a Sequential: features.4.0.bn1 is layer1.0.bn1."""
    original = network("resnet18")
    parts = list(original.children())
    tutorial = nn.Module()
    tutorial.features = nn.Sequential(*parts[:-2])
    tutorial.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), parts[-1])
    state = tutorial.state_dict()
    own_names = OrderedDict((re.sub(r"\.bn(\d)", r".norm\1", name), tensor) for name, tensor in state.items())
    for names in (state, own_names):  # from ImageNet weights, and from scratch
        torch.save(names, tmp_path / "best_model.pt")
        assert_loaded(tmp_path / "best_model.pt", original.state_dict(), name="resnet18")
        assert "order" in said.messages[-1]


def test_another_order_is_no_match(tmp_path):
    state = network().state_dict()
    names = list(state)
    swapped = {f"layer{names.index(name)}.weight": state[name] for name in [*names[2:4], *names[:2], *names[4:]]}
    torch.save(swapped, tmp_path / "weights.pt")
    assert "do not fit" in refused(build_model, NAME, 6, pretrained_path=tmp_path / "weights.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_saved_from_a_gpu_are_read_without_one(tmp_path, monkeypatch, zipped):
    state = network().state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert b"cuda:1" in (tmp_path / "weights.pt").read_bytes()
    assert_loaded(tmp_path / "weights.pt", state)


def test_checkpoints_of_torchvisions_reference_code(tmp_path):
    """references/classification/train.py saves these, its options as an argparse.Namespace among them."""
    model = network()
    average = torch.optim.swa_utils.AveragedModel(network(seed=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    args = argparse.Namespace(model=NAME, lr=0.1, output_dir=pathlib.Path("out"), auto_augment=None, resume="")
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(),
        "epoch": 3,
        "args": args,
        "scaler": {},
    }
    torch.save(content, tmp_path / "model_3.pth")
    assert_loaded(tmp_path / "model_3.pth", model.state_dict())
    torch.save({**content, "model_ema": average.state_dict()}, tmp_path / "checkpoint.pth")
    assert_loaded(tmp_path / "checkpoint.pth", average.module.state_dict())


def test_a_new_head_is_no_wider_than_pytorchs(tmp_path):
    """An EfficientNet draws its head for 1,000 classes, of which much would remain beside good features."""
    torch.save(models.efficientnet_b0().state_dict(), tmp_path / "b0.pt")
    new = build_model("efficientnet_b0", 6, pretrained_path=tmp_path / "b0.pt").classifier[1].weight
    assert new.abs().max() <= 1280**-0.5
    drawn = build_model("efficientnet_b0", 6, pretrained=False).classifier[1].weight
    assert drawn.abs().max() > 0.3  # ±1/sqrt(6): from scratch it is the author's
    kept = build_model("efficientnet_b0", 1000, pretrained_path=tmp_path / "b0.pt").classifier[1].weight
    assert torch.equal(kept, torch.load(tmp_path / "b0.pt", weights_only=True)["classifier.1.weight"])


# ------------------------------------------------------------------ transformers, teachers, one channel
@pytest.mark.parametrize("name, layer", [("resnet18", "basic"), ("resnet50", "bottleneck")])
@pytest.mark.parametrize("library", ["", "timm:"])
def test_a_resnet_of_transformers_gives_its_outputs(name, layer, library, tmp_path):
    transformers = pytest.importorskip("transformers")
    if library:
        pytest.importorskip("timm")
    depths = {"resnet18": [2, 2, 2, 2], "resnet50": [3, 4, 6, 3]}[name]
    widths = [64, 128, 256, 512] if layer == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(depths=depths, hidden_sizes=widths, layer_type=layer, num_labels=6)
    theirs = transformers.ResNetForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_model(library + name, 6, pretrained_path=tmp_path / "model.safetensors").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_taken_before_the_student(tmp_path):
    student = models.resnet18(num_classes=6)
    teacher = models.resnet18(num_classes=6)
    content = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.state_dict().items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in teacher.state_dict().items()},
    }
    torch.save(content, tmp_path / "dino.pth")
    found = build_model("resnet18", 6, pretrained_path=tmp_path / "dino.pth")
    assert torch.equal(found.conv1.weight, teacher.conv1.weight)


def test_a_first_layer_for_grey_images_gives_the_same_outputs_for_them(tmp_path, said):
    theirs = models.resnet18(num_classes=6).eval()
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save(theirs.state_dict(), tmp_path / "grey.pt")
    ours = build_model("resnet18", 6, pretrained_path=tmp_path / "grey.pt").eval()
    grey = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(grey.expand(-1, 3, -1, -1)), theirs(grey), rtol=1e-4, atol=1e-4)
    assert "is for one channel: it is repeated over red, green and blue" in said.text
