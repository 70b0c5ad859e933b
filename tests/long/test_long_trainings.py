"""Trainings that take long in the smoke tests: maps of mistakes, compiled sizes, kept outputs of every kind."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image


def test_each_size_is_compiled_once(data, tmp_path, monkeypatch):
    """Three sizes of images, two counts in a micro-batch, one in evaluation; frozen layers in the first."""
    compiled = []

    def backend(graph, inputs):
        (images,) = [tensor for tensor in inputs if tensor.dim() == 4 and tensor.shape[2] > 3]
        compiled.append((len(images), images.shape[-1]))
        return graph.forward

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: torch_compile(model, dynamic=False, backend=backend))
    torch._dynamo.reset()
    words = ["--model=tiny_classifier", "--start_size=20", "--image_size=84", "--epochs=6", "--freeze_epochs=1"]
    words += ["--batch_size=5", "--accumulate=2"]
    assert tiny.train(data, tmp_path, *words, name="eager") == 0
    assert tiny.train(data, tmp_path, *words, "--compile", name="compiled") == 0
    torch._dynamo.reset()
    evaluated = (3, 84)
    assert sorted(compiled) == sorted([(2, 20), (3, 20), evaluated] * 2 + [(2, 32), (3, 32), (2, 84), (3, 84)])
    found = [json.loads((tmp_path / name / "result.json").read_text())["test_loss"] for name in ("eager", "compiled")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.fixture
def start(tmp_path):
    """Weights to begin from, whose batch statistics are no longer the initial ones."""
    torch.manual_seed(3)
    model = tiny.Classifier(3)
    for _ in range(5):
        model(torch.randn(8, 3, 36, 36))
    file = tmp_path / "start.pt"
    torch.save(model.state_dict(), file)
    return file


@pytest.mark.parametrize("more", [(), ("--amp", "--ema=0.9"), ("--augment=none", "--accumulate=2")])
def test_kept_outputs_train_the_head_as_the_whole_network_does(data, tmp_path, start, monkeypatch, more):
    words = (f"--pretrained_path={start}", "--freeze_epochs=all", "--epochs=3", *more)
    assert tiny.train(data, tmp_path, *words, name="kept") == 0
    monkeypatch.setattr("assemble.keep_outputs", lambda *_: None)
    assert tiny.train(data, tmp_path, *words, name="whole") == 0
    kept, whole = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("kept", "whole"))
    for name, value in whole["model"].items():
        torch.testing.assert_close(kept["model"][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(kept["model"]["fc.weight"], torch.load(start)["fc.weight"])
    assert [name for name, value in torch.load(start).items() if not torch.equal(value, kept["model"][name])] == [
        "fc.weight",
        "fc.bias",
    ]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("kept", "whole")]
    assert results[0]["confusion"] == results[1]["confusion"]


@pytest.mark.filterwarnings("error:The given NumPy array")
@pytest.mark.usefixtures("drawn")
def test_a_run_has_the_picture_of_a_batch_and_maps_of_its_mistakes(scenes_folder, tmp_path, run):
    words = tiny.words(scenes_folder, tmp_path, "--model=resnet18", "--tta=flip", "--cutmix=1", "--epochs=1")
    assert run(words)[0] == 0
    folder = tmp_path / "run"
    with Image.open(folder / "batch.png") as image:
        assert image.width > 300
    maps = json.loads((folder / "explanations.json").read_text())
    rows = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()[1:]]
    wrong = [row for row in rows if row[1] != row[2]]
    assert set(maps) == {row[0] for row in wrong}
    for values in maps.values():
        array = np.array(values)
        assert array.shape == (32, 32) and array.min() >= 0 and 200 <= array.max() <= 255
    page = (folder / "report.html").read_text()
    assert "as the network sees them" in page and "where the network saw it" in page
    place = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run", f"--explain={tmp_path / 'why.png'}"]
    some = sorted(scenes_folder.glob("seg_test/seg_test/*/*"))[:3]
    status, out, errors = run(["predict", *some, *place])
    assert status == 0, errors
    with Image.open(tmp_path / "why.png") as image:
        assert image.width > 300
