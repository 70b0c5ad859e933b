"""--float32_layers: a layer that loses precision in 16 bits is kept in float32, in training and after it."""

import json
import shutil

import pytest
import tiny
import torch
from tiny import assert_equal, outcome
from torch import nn
from torchvision.models import _api as torchvision_registry

import main


class Offset(nn.Module):
    """Adds a hundred in a product and takes it away again: bfloat16 keeps nothing of small inputs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = torch.eye(inputs.shape[1], device=inputs.device)
        return nn.functional.linear(inputs, weight, weight.new_full((len(weight),), 100.0)) - 100.0


class Planted(tiny.Classifier):
    def __init__(self, **options: int):
        super().__init__(**options)
        self.offset = Offset()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.offset(self.features(images).flatten(1)))


def planted(*, weights: None = None, **options: int) -> Planted:
    return Planted(**options)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two trainings with AMP, one of which keeps the layer in float32."""
    planted.__module__ = "torchvision.models.tiny"
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torchvision_registry.BUILTIN_MODELS, "planted", planted)
        tiny.leave_out_pictures()
        assert tiny.train(data, folder, "--model=planted", "--amp", name="low") == 0
        assert tiny.train(data, folder, "--model=planted", "--amp", "--float32_layers=off*", name="kept") == 0
        yield folder


def evaluated(data, tmp_path, checkpoint, *more) -> dict:
    """Return the result of `evaluate` for a checkpoint outside its run's folder."""
    words = [f"--checkpoint={checkpoint}", f"--data_dir={data}", "--device=cpu", "--num_workers=1", "--amp"]
    assert main.main(["evaluate", *words, "--quiet", f"--json={tmp_path / 'found.json'}", *more]) == 0
    return json.loads((tmp_path / "found.json").read_text())


def test_the_option_changes_the_result_and_no_name_of_a_weight(runs):
    low, kept = (torch.load(runs / name / "best_model.pt", weights_only=True) for name in ("low", "kept"))
    assert list(low["model"]) == list(kept["model"])
    assert (low["float32_layers"], kept["float32_layers"]) == (None, "off*")
    assert tiny.config(runs / "kept")["options"]["float32_layers"] == "off*"
    one, other = (tiny.metrics(runs / name)[-1]["val_loss"] for name in ("low", "kept"))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_checkpoint_is_tested_as_it_was_trained_unless_asked_otherwise(suffix, runs, data, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
        words = [f"--checkpoint_dir={runs}", "--checkpoint_name=kept", "--safetensors", "--quiet"]
        assert main.main(["export", *words]) == 0
    copied = shutil.copy(runs / "kept" / f"best_model.{suffix}", tmp_path)
    trained = json.loads((runs / "kept/result.json").read_text())["test_loss"]
    assert evaluated(data, tmp_path, copied)["test_loss"] == trained
    assert abs(evaluated(data, tmp_path, copied, "--float32_layers=")["test_loss"] - trained) > 1e-3


def test_an_export_says_in_what_the_file_computes(runs, monkeypatch, capsys):
    monkeypatch.setattr("commands.export.export_onnx", lambda *_, **__: "written")
    for more, computed in (([], "all layers in float32"), (["--float16"], "the whole network in float16")):
        assert main.main(["export", f"--checkpoint_dir={runs}", "--checkpoint_name=kept", *more]) == 0
        assert f"--float32_layers off* was for training: the file computes {computed}" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_same_layers(runs, data, tmp_path):
    words = ("--model=planted", "--amp", "--float32_layers=off*")
    with pytest.MonkeyPatch.context() as patch:
        tiny.stop_after(patch, 2)
        assert tiny.train(data, tmp_path, *words, name="kept") == 130
    assert tiny.train(data, tmp_path, *words, "--resume", name="kept") == 0
    assert_equal(outcome(tmp_path / "kept"), outcome(runs / "kept"))


def test_a_pattern_that_matches_nothing_is_refused_with_some_names(data, tmp_path, capsys):
    assert tiny.train(data, tmp_path, "--amp", "--float32_layers=fc,head.*") == 2
    assert (
        "--float32_layers: no module is called 'head.*'" in (said := capsys.readouterr().err) and "features.0" in said
    )


def test_a_model_with_layers_in_float32_can_be_exported():
    from features.float32_layers import keep_layers_float32

    model = tiny.Classifier(num_classes=3).eval()
    images = torch.rand(2, 3, 9, 9)
    expected = model(images)
    exported = torch.export.export(keep_layers_float32(model, "features.0,fc"), (images,)).module()
    assert torch.equal(exported(images), expected)
