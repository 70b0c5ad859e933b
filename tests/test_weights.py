"""Files of weights that others wrote: every form is read, or refused with what would work; nothing runs code.

The files are written by the programs that users have them from: PyTorch, timm, Lightning, safetensors.
"""

import argparse
import pathlib
import pickle
import re
import shlex
from collections import OrderedDict

import numpy as np
import pytest
import torch
from tiny import refused
from torch import nn
from torchvision import models

import utils
from model import build_model
from pretrained.files import load_file
from pretrained.fitting import read_weights
from runs.checkpoint import load_checkpoint

NAME = "squeezenet1_1"
HEAD = ("classifier.1.weight", "classifier.1.bias")


def network(name=NAME, classes=6, seed=2):
    torch.manual_seed(seed)
    return models.get_model(name, num_classes=classes)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged of the weights, line by line."""
    monkeypatch.setattr(utils.log, "disabled", False)
    caplog.set_level("INFO", logger=utils.log.name)
    return caplog


def assert_loaded(file, state, *, name=NAME, tolerance=0.0):
    found = build_model(name, 6, pretrained_path=file).state_dict()
    for entry, tensor in found.items():
        if not entry.endswith("num_batches_tracked"):
            assert torch.allclose(tensor, state[entry].float(), rtol=0, atol=tolerance), entry


# ------------------------------------------------------------------------------- where and by what names
WRAPPED = {
    "bare": lambda state: state,
    **{
        key: lambda state, key=key: {key: state, "epoch": 3}
        for key in ("model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema", "net", "weights")
    },
    **{
        prefix: lambda state, prefix=prefix: prefixed(state, prefix)
        for prefix in ("module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model.backbone.net.")
    },
    "nested": lambda state: {"checkpoint": {"model": prefixed(state, "module.")}, "best": 0.9},
    "DataParallel inside": lambda state: {
        name.replace("features.", "features.module."): tensor for name, tensor in state.items()
    },
    "a loss beside it": lambda state: {"criterion.weight": torch.ones(6), **state},
    "a teacher beside it": lambda state: {"teacher.fc.weight": torch.ones(6, 2), **prefixed(state, "student.")},
    "a profiler's counters": lambda state: {**state, "features.total_ops": torch.zeros(1)},
    "an epoch among the entries": lambda state: {**state, "epoch": 3},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_state_dict_is_found_wherever_it_stands(tmp_path, wrap):
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "weights.pt")
    assert_loaded(tmp_path / "weights.pt", state)


def test_averaged_weights_are_preferred_and_named(tmp_path, said):
    average = network(seed=3).state_dict()
    for content in ({"model": network().state_dict(), "model_ema": average}, {"ema": average, "state_dict": average}):
        torch.save(content, tmp_path / "weights.pt")
        assert_loaded(tmp_path / "weights.pt", average)
        assert "EMA" in said.messages[-1]


def test_a_run_with_its_average_switched_off_gives_its_model(tmp_path):
    state = network().state_dict()
    torch.save({"model": state, "ema": None}, tmp_path / "last.pt")
    assert_loaded(tmp_path / "last.pt", state)


@pytest.mark.parametrize(
    "head, kept",
    [
        (lambda state: {}, False),  # a feature extractor's
        (lambda state: {HEAD[0]: torch.ones(9, 512, 1, 1), HEAD[1]: torch.ones(9)}, False),
        (lambda state: {"classifier.1.1.weight": state[HEAD[0]], "classifier.1.1.bias": state[HEAD[1]]}, True),
    ],
    ids=["none", "of nine classes", "in a Sequential"],
)
def test_a_head_that_does_not_fit_is_new_and_said_to_be(tmp_path, said, head, kept):
    state = network().state_dict()
    features = {name: tensor for name, tensor in state.items() if name not in HEAD}
    torch.save({**features, **head(state)}, tmp_path / "weights.pt")
    found = build_model(NAME, 6, pretrained_path=tmp_path / "weights.pt").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in features.items())
    assert torch.equal(found[HEAD[0]], state[HEAD[0]]) == kept
    assert ("starts with a new one" in said.messages[0]) == (not kept)


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


# ------------------------------------------------------------------------------------- forms of files
def test_files_of_every_format_are_read(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "new.pth")
    torch.save({"state_dict": state}, tmp_path / "before_1.6.pth", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        assert_loaded(file, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path, dtype):
    state = network().state_dict()
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "weights.pt")
    assert_loaded(tmp_path / "weights.pt", state, tolerance=0.01)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_saved_from_a_gpu_are_read_without_one(tmp_path, monkeypatch, zipped):
    state = network().state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save(state, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert b"cuda:1" in (tmp_path / "weights.pt").read_bytes()
    assert_loaded(tmp_path / "weights.pt", state)


# ---------------------------------------------------------------------------------- of other programs
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


def test_numbers_of_numpy_and_versions_beside_the_weights_are_read(tmp_path):
    state = network().state_dict()
    extra = {"best": np.float64(0.9), "seen": np.int64(3), "curve": np.arange(3.0), "torch": torch.__version__}
    torch.save({"state_dict": state, **extra}, tmp_path / "weights.pt")
    assert_loaded(tmp_path / "weights.pt", state)


# ------------------------------------------------------------------------------------------ refusals
class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "0 bytes"),
        (b"words of a text", "damaged"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (pickle.dumps({"a": Hostile()}, protocol=2), "refused"),
        (None, "does not exist"),
    ],
    ids=["empty", "words", "html", "lfs", "keras", "hostile", "absent"],
)
def test_a_bad_file_is_one_message(tmp_path, capsys, content, named):
    file = tmp_path / "weights.pt"
    if content is not None:
        file.write_bytes(content)
    assert named in refused(load_file, file)
    assert "run" not in capsys.readouterr().out


def test_a_folder_is_answered_with_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in refused(load_file, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"net": model, "epoch": 3}], ids=["bare", "net"])
def test_a_pickled_network_is_refused_with_the_line_that_saves_its_weights(tmp_path, monkeypatch, wrap, zipped):
    model = network()
    torch.save(wrap(model), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    message = refused(load_file, tmp_path / "whole.pt")
    assert "torchvision.models.squeezenet.SqueezeNet" in message
    python, option, code = shlex.split(message.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_loaded(tmp_path / "weights.pt", model.state_dict())


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    assert "no state dict" in refused(read_weights, tmp_path / "weights.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = network("resnet18").state_dict()
    del state["layer1.0.conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "weights.pt")
    message = refused(build_model, "resnet18", 6, pretrained_path=tmp_path / "weights.pt")
    for line in (
        "conv1.weight: shape (64, 3, 3, 3), needs (64, 3, 7, 7)",
        "layer1.0.conv1.weight: missing",
        "extra.weight: unknown",
        "--model",
    ):
        assert line in message


@pytest.mark.parametrize("asked, saved", [("resnet18", "resnet34"), ("mobilenet_v3_small", "mobilenet_v3_large")])
def test_the_model_that_weights_would_fit_is_named(tmp_path, asked, saved):
    torch.save(network(saved).state_dict(), tmp_path / "weights.pt")
    message = refused(build_model, asked, 6, pretrained_path=tmp_path / "weights.pt")
    assert f"--model {saved}" in message and len(message.splitlines()) <= 14


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = network().state_dict()
    state["features.0.bias"][3] = float("nan")
    torch.save(state, tmp_path / "weights.pt")
    assert "features.0.bias" in refused(build_model, NAME, 6, pretrained_path=tmp_path / "weights.pt")


def test_a_new_head_is_no_wider_than_pytorchs(tmp_path):
    """An EfficientNet draws its head for 1,000 classes, of which much would remain beside good features."""
    torch.save(models.efficientnet_b0().state_dict(), tmp_path / "b0.pt")
    new = build_model("efficientnet_b0", 6, pretrained_path=tmp_path / "b0.pt").classifier[1].weight
    assert new.abs().max() <= 1280**-0.5
    drawn = build_model("efficientnet_b0", 6, pretrained=False).classifier[1].weight
    assert drawn.abs().max() > 0.3  # ±1/sqrt(6): from scratch it is the author's
    kept = build_model("efficientnet_b0", 1000, pretrained_path=tmp_path / "b0.pt").classifier[1].weight
    assert torch.equal(kept, torch.load(tmp_path / "b0.pt", weights_only=True)["classifier.1.weight"])


def test_a_checkpoint_of_an_earlier_version_gives_its_weights_alone(tmp_path):
    """Its format says so; what it does not record is not guessed."""
    model = network()
    torch.save({"format": 1, "classes": list("abcdef"), "model": model.state_dict()}, tmp_path / "old.pt")
    message = refused(load_checkpoint, tmp_path / "old.pt")
    assert "earlier version" in message and f"--pretrained_path {tmp_path / 'old.pt'}" in message
    assert_loaded(tmp_path / "old.pt", model.state_dict())
