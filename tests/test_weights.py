"""Files of weights that others wrote: every form is read, or refused with what would work; nothing runs code.

The files are written by the programs that users have them from: PyTorch, timm, Lightning, safetensors.
"""

import pickle
import shlex

import numpy as np
import pytest
import tiny
import torch
from tiny import refused
from torchvision import models

from model import build_model
from pretrained.files import load_file
from pretrained.fitting import read_weights
from runs.checkpoint import load_checkpoint

NAME = "tiny_classifier"
HEAD = ("fc.weight", "fc.bias")


def network(name=NAME, classes=6, seed=2):
    torch.manual_seed(seed)
    return tiny.Classifier(classes) if name == NAME else models.get_model(name, num_classes=classes)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_loaded(file, state, *, name=NAME, tolerance=0.0):
    found = build_model(name, 6, pretrained_path=file).state_dict()
    for entry, tensor in found.items():
        if not entry.endswith("num_batches_tracked"):
            assert torch.allclose(tensor, state[entry].float(), rtol=0, atol=tolerance), entry


# ------------------------------------------------------------------------------- where and by what names
KEYS = ("model", "state_dict", "model_state_dict", "state_dict_ema", "model_ema", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model.backbone.net.")
WRAPPED = {
    "bare": lambda state: state,
    **{key: lambda state, key=key: {key: state, "epoch": 3} for key in KEYS},
    **{prefix: lambda state, prefix=prefix: prefixed(state, prefix) for prefix in PREFIXES},
    "nested": lambda state: {"checkpoint": {"model": prefixed(state, "module.")}, "best": 0.9},
    "DataParallel inside": lambda state: {
        name.replace("features.", "features.module."): tensor for name, tensor in state.items()
    },
    "a loss beside it": lambda state: {"criterion.weight": torch.ones(6), **state},
    "a teacher beside it": lambda state: {"teacher.fc.weight": torch.ones(6, 2), **prefixed(state, "student.")},
    "a profiler's counters": lambda state: {**state, "features.total_ops": torch.zeros(1)},
    "an epoch among the entries": lambda state: {**state, "epoch": 3},
    "an average switched off": lambda state: {"model": state, "ema": None},
    "numbers and versions beside it": lambda state: {
        "state_dict": state,
        "best": np.float64(0.9),
        "seen": np.int64(3),
        "curve": np.arange(3.0),
        "torch": torch.__version__,
    },
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


@pytest.mark.parametrize(
    "head, kept",
    [
        (lambda state: {}, False),  # a feature extractor's
        (lambda state: {HEAD[0]: torch.ones(9, 16), HEAD[1]: torch.ones(9)}, False),
        (lambda state: {"fc.1.weight": state[HEAD[0]], "fc.1.bias": state[HEAD[1]]}, True),
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


# ------------------------------------------------------------------------------------- forms of files
def test_weights_of_other_precisions_become_float32(tmp_path):
    """In files of each format that PyTorch wrote."""
    state = network().state_dict()
    for dtype, zipped in ((torch.float16, True), (torch.bfloat16, True), (torch.float64, False)):
        content = {name: tensor.to(dtype) for name, tensor in state.items()}
        torch.save({"state_dict": content}, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
        assert_loaded(tmp_path / "weights.pt", state, tolerance=0.01)


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
    assert "tiny.Classifier" in message
    python, option, code = shlex.split(message.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_loaded(tmp_path / "weights.pt", model.state_dict())


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    for content in ({}, {"epoch": 3}, [1], torch.zeros(2)):
        torch.save(content, tmp_path / "weights.pt")
        assert "no state dict" in refused(read_weights, tmp_path / "weights.pt")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = network().state_dict()
    del state["features.3.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["features.0.weight"] = torch.zeros(8, 3, 5, 5)
    torch.save(state, tmp_path / "weights.pt")
    message = refused(build_model, NAME, 6, pretrained_path=tmp_path / "weights.pt")
    wrong = "features.0.weight: shape (8, 3, 5, 5), needs (8, 3, 3, 3)"
    for line in (wrong, "features.3.weight: missing", "extra.weight: unknown", "--model"):
        assert line in message


def test_the_model_that_weights_would_fit_is_named(tmp_path):
    torch.save(network("resnet34").state_dict(), tmp_path / "weights.pt")
    message = refused(build_model, "resnet18", 6, pretrained_path=tmp_path / "weights.pt")
    assert "--model resnet34" in message and len(message.splitlines()) <= 14


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = network().state_dict()
    state["features.1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "weights.pt")
    assert "features.1.bias" in refused(build_model, NAME, 6, pretrained_path=tmp_path / "weights.pt")


def test_a_checkpoint_of_an_earlier_version_gives_its_weights_alone(tmp_path):
    """Its format says so; what it does not record is not guessed."""
    model = network()
    torch.save({"format": 1, "classes": list("abcdef"), "model": model.state_dict()}, tmp_path / "old.pt")
    message = refused(load_checkpoint, tmp_path / "old.pt")
    assert "earlier version" in message and f"--pretrained_path {tmp_path / 'old.pt'}" in message
    assert_loaded(tmp_path / "old.pt", model.state_dict())
