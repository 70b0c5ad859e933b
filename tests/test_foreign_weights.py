"""Weights that others made, in forms that are not a plain state dict: read, or refused with a line that helps."""

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.utils import prune  # noqa: F401 (which torch.nn.utils does not import itself)
from torchvision import models

import utils
from model import build_model, known_model
from pretrained import timm_models
from pretrained.computed import with_computed
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
    """Runs a line by sh in an empty folder, where `python` prints its arguments; returns them, and what was made."""
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


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged of the weights, line by line."""
    monkeypatch.setattr(utils.log, "disabled", False)
    caplog.set_level("INFO", logger=utils.log.name)
    return caplog


# ------------------------------------------------------------------------------- lines to be typed
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_line_to_type_names_the_file_and_runs_nothing_of_its_name(shell, name):
    assert shell(typed("python", "main.py", "--labels", Path(name))) == (["main.py", "--labels", name], [])


def test_a_line_to_type_is_one_line_whatever_a_file_is_called():
    assert "\n" not in typed("python", "a\nb\x1b[2J.pt", os.fsdecode(b"\xff.pt")).replace("\\n", "")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_the_line_offered_for_a_refused_checkpoint_runs_nothing_of_its_name(shell, tmp_path, monkeypatch, name):
    model = nn.Sequential(nn.Linear(2, 3))
    torch.save({"net": model}, tmp_path / name)
    line = tiny.refused(load_file, tmp_path / name).splitlines()[-1]
    (option, code), made = shell(line)
    assert option == "-c" and made == []
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert torch.equal(load_file(tmp_path / "weights.pt")["0.weight"], model[0].weight)


def test_advice_of_a_run_in_a_hostile_folder_runs_nothing_of_its_name(shell, data, tmp_path, run, monkeypatch):
    monkeypatch.setattr("reports.draw.draw_run", lambda *_: 1 / 0)
    folder = tmp_path / "$(touch pwned) x"
    status, _, errors = run(tiny.words(data, folder, "--epochs=1"))
    words, made = shell(errors.strip().rpartition("mended: ")[2])
    assert status == 1 and made == []
    assert words == ["main.py", "report", "--checkpoint_dir", str(folder), "--checkpoint_name", "run"]


# ------------------------------------------------------------------------------------- TorchScript
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_torchscript_archive_runs_nothing(tmp_path):
    """torch.jit.load would run __setstate__, which may write any file."""

    class Hostile(nn.Module):
        def __init__(self, target: str):
            super().__init__()
            self.target = target
            self.weight = torch.zeros(2)

        @torch.jit.export
        def __getstate__(self):
            return (self.weight, self.target, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
            self.weight = state[0]
            self.target = state[1]
            self.training = state[2]
            torch.save(state[0], state[1])

    target = tmp_path / "written"
    torch.jit.script(Hostile(str(target))).save(tmp_path / "hostile.pt")
    torch.jit.load(tmp_path / "hostile.pt")
    assert target.exists()
    target.unlink()
    assert "is a TorchScript archive" in tiny.refused(load_file, tmp_path / "hostile.pt")
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["scripted", "traced"])
@pytest.mark.parametrize("name", ["a b.pt", "$(touch pwned).pt"])
def test_a_torchscript_archive_is_refused_with_the_line_that_saves_its_weights(
    shell, tmp_path, monkeypatch, form, name
):
    model = classifier()
    archive = (
        torch.jit.script(model) if form == "scripted" else torch.jit.trace(model.eval(), torch.zeros(1, 3, 36, 36))
    )
    archive.save(tmp_path / name)
    (option, code), made = shell(tiny.refused(load_file, tmp_path / name).splitlines()[-1])
    assert option == "-c" and made == []
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert_same(built(tmp_path / "weights.pt"), model.state_dict())


# ---------------------------------------------------------------------------- weights in several files
def saved_in_shards(folder: Path, state: dict, save, suffix: str) -> Path:
    """Writes a state dict as two shards with the index that Transformers writes; returns the index."""
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
    tiny.register_classifier()
    model = build_model("tiny_classifier", len(classes or "abc"), pretrained_path=file, classes=classes)
    return model.state_dict()


def assert_same(found: dict, state: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ["model.bin.index.json", "renamed.json"])
def test_an_index_of_shards_gives_the_weights_of_all(tmp_path, name):
    state = classifier().state_dict()
    index = saved_in_shards(tmp_path, state, torch.save, "bin")
    assert_same(built(index.rename(tmp_path / name)), state)


def test_an_index_of_safetensors_gives_the_weights_of_all(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = classifier().state_dict()
    assert_same(built(saved_in_shards(tmp_path, state, save_file, "safetensors")), state)


def test_one_shard_is_called_a_shard_and_its_index_is_named(tmp_path):
    index = saved_in_shards(tmp_path, classifier().state_dict(), torch.save, "bin")
    shard = tmp_path / "model-00002-of-00002.bin"
    assert f"is shard 2 of 2 of a network's weights: name their index, {index}" in tiny.refused(load_file, shard)
    index.unlink()
    assert "put all shards and their index" in tiny.refused(load_file, shard)
    shard.rename(tmp_path / "model-00001-of-00001.bin")
    assert load_file(tmp_path / "model-00001-of-00001.bin")


def test_a_folder_of_shards_names_the_index_first(tmp_path):
    saved_in_shards(tmp_path, classifier().state_dict(), torch.save, "bin")
    assert "Name a file in it: model.bin.index.json, " in tiny.refused(load_file, tmp_path)


def test_an_index_without_its_shards_or_with_files_elsewhere_is_refused(tmp_path):
    index = saved_in_shards(tmp_path, classifier().state_dict(), torch.save, "bin")
    (tmp_path / "model-00001-of-00002.bin").unlink()
    assert "of which 1 are not beside it, such as model-00001-of-00002.bin" in tiny.refused(load_file, index)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../secret.bin"}}))
    assert "a file in another folder: ../secret.bin" in tiny.refused(load_file, index)


def test_a_distributed_checkpoint_is_answered_with_the_line_that_joins_it(shell, tmp_path):
    state = classifier().state_dict()
    folder = tmp_path / "a $(touch pwned) b"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a single process, as is meant
        torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    for named in (folder, *folder.iterdir()):
        message = tiny.refused(load_file, named)
        assert "distributed checkpoint" in message
        (option, module, *words), made = shell(message.splitlines()[-1])
        assert (option, module) == ("-m", "torch.distributed.checkpoint.format_utils") and made == []
    assert words == ["dcp_to_torch", str(folder), "weights.pt"]
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt"), state)


def test_parts_that_deepspeed_writes_are_refused_and_whole_weights_are_read(tmp_path):
    state = classifier().state_dict()
    content = {"module": state, "ds_version": "0.15", "ds_config": {"zero_optimization": {"stage": 1}}}
    whole = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(content, whole)
    assert_same(built(whole), state)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        assert "zero_to_fp32.py" in tiny.refused(load_file, tmp_path / name)
    torch.save(content, tmp_path / "mp_rank_01_model_states.pt")
    assert "one process's part of a network" in tiny.refused(load_file, whole)
    (tmp_path / "zero_to_fp32.py").touch()
    assert "python zero_to_fp32.py" in tiny.refused(load_file, tmp_path)


# ------------------------------------------------------------------------------- computed weights
def reparametrized(kind: str) -> tuple[dict, dict]:
    """What such a network saves, and what its layers compute with."""
    model = classifier()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        if kind == "prune":
            nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
        elif kind == "prune bias":
            nn.utils.prune.random_unstructured(model.fc, "bias", 1)
        elif kind == "parametrizations.weight_norm":
            nn.utils.parametrizations.weight_norm(layer)
        elif kind == "weight_norm of all":
            nn.utils.parametrizations.weight_norm(layer, dim=None)
        elif kind == "weight_norm":
            nn.utils.weight_norm(layer)
        elif kind == "parametrizations.spectral_norm":
            nn.utils.parametrizations.spectral_norm(layer)
        elif kind == "spectral_norm":
            nn.utils.spectral_norm(layer)
        elif kind == "orthogonal" and isinstance(layer, nn.Linear):
            nn.utils.parametrizations.orthogonal(layer)
    model.eval()(torch.zeros(1, 3, 36, 36))  # hooks compute at each pass
    state = model.state_dict()
    plain = classifier().state_dict()
    for name in plain:
        module, _, parameter = name.rpartition(".")
        plain[name] = getattr(model.get_submodule(module), parameter).detach().clone()
    return state, plain


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "prune",
        "prune bias",
        "weight_norm",
        "weight_norm of all",
        "parametrizations.weight_norm",
        "spectral_norm",
        "parametrizations.spectral_norm",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_weights_that_are_kept_in_parts_are_computed_and_said_to_be(tmp_path, said, kind, prefix):
    state, plain = reparametrized(kind)
    assert state.keys() != plain.keys()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt"), plain, 1e-6)
    assert ("pruned weights" if "prune" in kind else kind.split(".")[-1].split()[0]) in said.messages[-1]
    assert "tensors computed" in said.messages[-1]


def test_a_parametrization_that_is_not_known_is_named(tmp_path):
    torch.save(reparametrized("orthogonal")[0], tmp_path / "weights.pt")
    message = tiny.refused(built, tmp_path / "weights.pt")
    assert "remove_parametrizations" in message and "fc.parametrizations.weight" in message


def test_weights_whose_names_end_alike_are_left_alone():
    state = {"a_orig": torch.ones(2), "b_g": torch.ones(3, 2), "b_v": torch.ones(3, 2), "c_mask": torch.ones(1)}
    assert with_computed(state) == (state, "")


# ------------------------------------------------------------------------------------ other classes
@pytest.mark.parametrize("key", ["classes", "class_names", "class_to_idx"])
def test_a_head_for_other_classes_is_new_and_said_to_be(tmp_path, said, key):
    state = classifier().state_dict()
    names = {name: place for place, name in enumerate("xyz")} if key == "class_to_idx" else list("xyz")
    torch.save({"model": state, key: names}, tmp_path / "weights.pt")
    found = built(tmp_path / "weights.pt", ["a", "b", "c"])
    assert "its head is for other classes (x, y, z): the model starts with a new head" in said.messages[-1]
    assert not torch.equal(found["fc.weight"], state["fc.weight"])
    assert torch.equal(found["features.0.weight"], state["features.0.weight"])


@pytest.mark.parametrize("key", ["classes", "class_to_idx"])
def test_the_rows_of_a_head_follow_the_classes(tmp_path, said, key):
    state = classifier().state_dict()
    names = {"c": 0, "a": 1, "b": 2} if key == "class_to_idx" else ["c", "a", "b"]
    torch.save({"model": state, key: names}, tmp_path / "weights.pt")
    found = built(tmp_path / "weights.pt", ["a", "b", "c"])
    assert "rows are moved: the classes have another order" in said.messages[-1]
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(found[name], state[name][[1, 2, 0]])


def test_a_head_of_the_same_classes_is_kept_and_one_of_unnamed_classes_is_said_to_be(tmp_path, said):
    state = classifier().state_dict()
    torch.save({"model": state, "classes": ["a", "b", "c"]}, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt", ["a", "b", "c"]), state)
    assert said.messages[-1].endswith("(entry model)")
    torch.save(state, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt", ["x", "y", "z"]), state)
    assert "its head is kept, whose classes it does not name" in said.messages[-1]


def test_a_run_starts_with_a_new_head_from_a_run_on_other_classes(data, tmp_path, run):
    """Three classes were learned; the same pictures under other names are three others."""
    assert tiny.train(data, tmp_path, "--epochs=1") == 0
    start = f"--pretrained_path={tmp_path / 'run' / 'best_model.pt'}"
    other = tmp_path / "other"
    for folder in ("seg_train/seg_train", "seg_test/seg_test"):
        for place, name in enumerate(tiny.CLASSES):
            shutil.copytree(data / folder / name, other / folder / f"kind_{place}")
    for folder, expected in ((other, "its head is for other classes (coast, field, town)"), (data, "weights: ")):
        words = tiny.words(folder, tmp_path, "--model=tiny_classifier", start, "--epochs=1", name=folder.name)
        status, out, _ = run([word for word in words if word != "--quiet"])
        assert status == 0 and expected in out
        assert ("new head" in out) == (folder == other)


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
@pytest.mark.parametrize("classifier", [None, "gone", ("fc", "gone"), "features.0"])
def test_a_network_of_timm_that_has_no_head_for_the_classes_is_refused(classifier):
    model = tiny.Classifier(7)
    model.pretrained_cfg = {"classifier": "fc"}
    timm_models._refuse_without_head(model, "timm:tiny", 7)
    model.pretrained_cfg = {"classifier": classifier}
    message = tiny.refused(timm_models._refuse_without_head, model, "timm:tiny", 7)
    assert message == "--model timm:tiny is no classifier: Classifier has no head for 7 classes."


NO_CLASSIFIERS = (
    "quantized_resnet18",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "fasterrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "ssd300_vgg16",
    "raft_small",
    "r3d_18",
    "mvit_v1_b",
    "swin3d_t",
)


@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_a_model_of_torchvision_that_is_no_classifier_is_refused(name):
    assert name in models.list_models() or name == "quantized_resnet18"
    assert f"--model {name} is not a torchvision classifier. Did you mean" in tiny.refused(known_model, name)
