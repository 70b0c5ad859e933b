"""Weights that others made, in forms that are not a plain state dict: read, or refused with a line that helps."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.nn.utils import prune  # noqa: F401 (which torch.nn.utils does not import itself)
from torchvision import models

import utils
from model import build_model, known_model
from pretrained import timm_models
from pretrained.files import load_file
from utils import typed

HOSTILE_NAMES = (
    "$(touch pwned).pt",
    "`touch pwned`.pt",
    "'; touch pwned; '.pt",
    'a"b$(touch pwned)".pt',
    "a b & touch pwned.pt",
    "%PATH% !x *.pt",
)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a line with sh in an empty folder; return the arguments that `python` got, and the files made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    folder = tmp_path / "typed"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(line: str) -> tuple[list[str], list[Path]]:
        out = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return out.stdout.split("\0")[:-1], list(folder.iterdir())

    return run


# ------------------------------------------------------------------------------- lines to be typed
def test_a_line_to_type_names_the_file_and_runs_nothing_of_its_name(shell):
    for name in HOSTILE_NAMES:
        assert shell(typed("python", "main.py", "--labels", Path(name))) == (["main.py", "--labels", name], [])
    assert "\n" not in typed("python", "a\nb\x1b[2J.pt", os.fsdecode(b"\xff.pt")).replace("\\n", "")


@pytest.mark.parametrize("name", HOSTILE_NAMES[2:4])
def test_the_line_offered_for_a_refused_checkpoint_runs_nothing_of_its_name(shell, tmp_path, monkeypatch, name):
    model = nn.Sequential(nn.Linear(2, 3))
    torch.save({"net": model}, tmp_path / name)
    run_offered_line(shell, tmp_path, name, monkeypatch)
    assert torch.equal(load_file(tmp_path / "weights.pt")["0.weight"], model[0].weight)


def run_offered_line(shell, folder, name, monkeypatch):
    (option, code), made = shell(tiny.refused(load_file, folder / name).splitlines()[-1])
    assert option == "-c" and made == []
    monkeypatch.chdir(folder)
    exec(code, {})


def test_advice_of_a_run_in_a_hostile_folder_runs_nothing_of_its_name(shell, data, tmp_path, run, monkeypatch):
    monkeypatch.setattr("reports.draw.draw_run", lambda *_: 1 / 0)
    folder = tmp_path / "$(touch pwned) x"
    status, _, errors = run(tiny.words(data, folder, "--epochs=1"))
    words, made = shell(errors.strip().rpartition("fixed: ")[2])
    assert status == 1 and made == []
    assert words == ["main.py", "report", "--checkpoint_dir", str(folder), "--checkpoint_name", "run"]


# ---------------------------------------------------------------------------- weights in several files
def saved_in_shards(folder: Path, state: dict, save, suffix: str) -> Path:
    """Write a state dict as two shards with the index that Transformers writes; return the index."""
    names = sorted(state)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        shard = f"model-{number:05}-of-00002.{suffix}"
        save({name: state[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def classifier(seed: int = 2, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.Classifier(classes)


def built(file: Path, classes: list[str] | None = None) -> dict:
    model = build_model("tiny_classifier", len(classes or "abc"), pretrained_path=file, classes=classes)
    return model.state_dict()


def assert_same(found: dict, state: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=tolerance, msg=name)


def test_an_index_of_shards_gives_the_weights_of_all(tmp_path):
    state = classifier().state_dict()
    index = saved_in_shards(tmp_path, state, torch.save, "bin")
    assert "Name a file in it: model.bin.index.json, " in tiny.refused(load_file, tmp_path)
    assert_same(built(index), state)
    assert_same(built(index.rename(tmp_path / "renamed.json")), state)
    if tiny.has("safetensors"):
        from safetensors.torch import save_file

        assert_same(built(saved_in_shards(tmp_path, state, save_file, "safetensors")), state)


def test_a_shard_without_its_index_and_an_index_without_its_shards_are_refused(tmp_path):
    index = saved_in_shards(tmp_path, classifier().state_dict(), torch.save, "bin")
    shard = tmp_path / "model-00002-of-00002.bin"
    assert f"is shard 2 of 2 of a network's weights: name their index, {index}" in tiny.refused(load_file, shard)
    (tmp_path / "model-00001-of-00002.bin").unlink()
    assert "but 1 of them are not beside it, such as model-00001-of-00002.bin" in tiny.refused(load_file, index)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../secret.bin"}}))
    assert "a file in another folder: ../secret.bin" in tiny.refused(load_file, index)
    index.unlink()
    assert "put all shards and their index" in tiny.refused(load_file, shard)
    assert load_file(shard.rename(tmp_path / "model-00001-of-00001.bin"))


# ------------------------------------------------------------------------------------ other classes


@pytest.mark.parametrize(
    ("key", "named", "rows", "message"),
    [
        ("classes", ["x", "y", "z"], None, "its head is for other classes (x, y, z): the model starts with a new head"),
        ("class_names", ["x", "y", "z"], None, "its head is for other classes (x, y, z)"),
        ("class_to_idx", {"z": 2, "x": 0, "y": 1}, None, "its head is for other classes (x, y, z)"),
        ("classes", ["c", "a", "b"], [1, 2, 0], "rows are moved: the classes have another order"),
        ("class_to_idx", {"c": 0, "a": 1, "b": 2}, [1, 2, 0], "rows are moved: the classes have another order"),
        ("names", {1: "a", 2: "b", 0: "c"}, [1, 2, 0], "rows are moved: the classes have another order"),
        ("id2label", {"2": "z", "0": "x", "1": "y"}, None, "its head is for other classes (x, y, z)"),
        ("classes", ["a", "b", "c"], [0, 1, 2], "(entry model)"),
        ("nothing", None, [0, 1, 2], "its head is kept, although the file does not name its classes"),
    ],
)
def test_the_rows_of_a_head_follow_the_classes_that_its_file_names(tmp_path, said, key, named, rows, message):
    state = classifier().state_dict()
    torch.save({"model": state, key: named}, tmp_path / "weights.pt")
    found = built(tmp_path / "weights.pt", ["a", "b", "c"])
    assert message in said.messages[-1]
    for name, tensor in found.items():
        same = torch.equal(tensor, state[name][rows] if rows and name.startswith("fc.") else state[name])
        assert same == (rows is not None or not name.startswith("fc.")), name


def test_the_weights_of_a_run_on_other_classes_have_a_new_head(data, tmp_path, said):
    assert tiny.train(data, tmp_path, "--epochs=1") == 0
    said.set_level("INFO", logger=utils.log.name)  # which --quiet raised
    built(tmp_path / "run" / "best_model.pt", ["kind_0", "kind_1", "kind_2"])
    assert "its head is for other classes (coast, field, town)" in said.messages[-1]
    built(tmp_path / "run" / "best_model.pt", list(tiny.CLASSES))
    assert "weights: " in said.messages[-1] and "new head" not in said.messages[-1]


def test_the_published_head_is_new_for_a_thousand_classes_of_ones_own(monkeypatch, said):
    """ImageNet's head is kept for its own classes, by WordNet's numbers or by its words."""
    torch.manual_seed(0)
    original = models.squeezenet1_1()
    monkeypatch.setattr("pretrained.torchvision_models._imagenet_model", lambda *_: original)
    words = list(models.ResNet18_Weights.DEFAULT.meta["categories"])
    numbers = [f"n{number:08}" for number in range(1000)]
    for classes, kept in ((words, True), (numbers, True), ([f"plate {n}" for n in range(1000)], False), (None, True)):
        said.clear()
        model = build_model("squeezenet1_1", 1000, classes=classes)
        assert torch.equal(model.classifier[1].weight, original.classifier[1].weight) == kept
        assert ("1,000 other classes" in said.text) == (not kept)
        assert torch.equal(model.features[0].weight, original.features[0].weight)


# --------------------------------------------------------------------------------- no classifiers
def test_a_network_that_is_no_classifier_is_refused():
    model = tiny.Classifier(7)
    model.pretrained_cfg = {"classifier": "fc"}
    timm_models._refuse_without_head(model, "timm:tiny", 7)
    for head in (None, "gone", ("fc", "gone"), "features.0"):
        model.pretrained_cfg = {"classifier": head}
        message = tiny.refused(timm_models._refuse_without_head, model, "timm:tiny", 7)
        assert message == "--model timm:tiny is not a classifier: Classifier has no head for 7 classes."
    for name in ("quantized_resnet18", "fcn_resnet50", "fasterrcnn_resnet50_fpn", "raft_small", "r3d_18", "swin3d_t"):
        assert f"--model {name} is not a torchvision classifier. Did you mean" in tiny.refused(known_model, name)
