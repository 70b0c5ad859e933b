"""Export: the printed program gives what `predict` gives, whatever the image; families and batch sizes."""

import json
import re
import textwrap

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main
from commands import export
from commands.export import FromPixels, export_onnx
from model import build_model
from utils import RunError

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

FAMILIES = {"shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "timm:test_vit": 160}


def checkpoint(name, side, interpolation="bilinear"):
    return {
        "model_name": name,
        "classes": list("abcdef"),
        "image_size": side,
        "normalize": "imagenet",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": interpolation,
    }


@pytest.mark.parametrize("name, side", FAMILIES.items(), ids=list(FAMILIES))
def test_families_and_batch_sizes(tmp_path, name, side):
    import onnxruntime

    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model(name, 6, pretrained=False, image_size=side).eval()
    said = export_onnx(model, checkpoint(name, side), tmp_path / "model.onnx")
    assert "agree" in said
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    network = FromPixels(model, checkpoint(name, side))
    for count in (1, 2, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        assert np.abs(session.run(None, {"images": images})[0] - expected).max() < 1e-4


def test_what_cannot_be_exported_is_one_sentence_with_the_models_name(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, images):
            raise ValueError("not for graphs")

    with pytest.raises(RunError) as error:
        export_onnx(Odd(), checkpoint("resnet18", 32), tmp_path / "model.onnx")
    assert "resnet18 cannot be exported" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def pictures(folder):
    """One picture of each kind that is easily read in another way."""
    numbers = np.random.default_rng(3)
    colours = Image.fromarray(numbers.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = colours.quantize(16)
    palette.info["transparency"] = 3
    alpha = colours.copy()
    alpha.putalpha(Image.fromarray(numbers.integers(0, 256, (50, 70), dtype=np.uint8)))
    colours.save(folder / "plain.png")
    colours.save(folder / "turned.jpg", exif=turned)
    Image.fromarray(numbers.integers(0, 65536, (50, 70), dtype=np.uint16)).save(folder / "deep.png")
    palette.save(folder / "palette.png", transparency=3)
    alpha.save(folder / "alpha.png")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    colours.convert("L").save(folder / "grey.png")


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_printed_program_gives_what_predict_gives(resize, tmp_path, capsys):
    data = tiny.draw(tmp_path / "data")
    assert tiny.train(data, tmp_path, "--model=squeezenet1_1", "--pretrained=0", f"--resize={resize}") == 0
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures(folder)
    run = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    assert main.main(["predict", str(folder), *run, "--device=cpu", f"--json={tmp_path / 'answers.json'}"]) == 0
    capsys.readouterr()
    assert main.main(["export", *run]) == 0
    program = textwrap.dedent(capsys.readouterr().out.partition("\n\n")[2])
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == 7
    for answer in answers:
        printed = []
        names = {"print": printed.append}
        exec(program.replace("x.jpg", answer["path"]), names)
        wanted = answer["probabilities"]
        assert names["classes"] == [*wanted]
        assert np.abs(names["probabilities"] - [*wanted.values()]).max() < 1e-4, answer["path"]
        best = answer["top"][0]
        name, _, share = printed[0].rpartition(": ")
        assert wanted[name] == pytest.approx(best["probability"], abs=1e-4) and len(printed) == 3
        assert float(share.removesuffix("%")) == pytest.approx(100 * best["probability"], abs=0.1)


@pytest.mark.parametrize("views", ["flip", "eight"])
def test_views_are_part_of_what_is_exported(views, tmp_path):
    import onnxruntime

    data = tiny.draw(tmp_path / "data")
    assert tiny.train(data, tmp_path, "--model=tiny_classifier", f"--tta={views}") == 0
    run = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    shares = {}
    for tta in (views, "none"):
        file = tmp_path / f"{tta}.json"
        words = [str(data / "seg_test"), *run, "--device=cpu", f"--json={file}", f"--tta={tta}"]
        assert main.main(["predict", *words]) == 0
        answers = json.loads(file.read_text())
        shares[tta] = np.array([list(answer["probabilities"].values()) for answer in answers])
    assert main.main(["export", *run]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["tta"] == views and facts["image_size"] == "36" and json.loads(facts["classes"]) == [*tiny.CLASSES]
    images = np.stack([np.asarray(Image.open(answer["path"]).convert("RGB")) for answer in answers])
    (found,) = session.run(None, {"images": images})
    assert np.abs(found - shares[views]).max() < 1e-5 < np.abs(found - shares["none"]).max()


def test_a_network_in_float16_takes_and_gives_what_one_in_float32_does(tmp_path):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model = tiny.Classifier(6).eval()
    images = [np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8) for seed in range(6)]
    asked = checkpoint("tiny_classifier", 36)
    said = export_onnx(model, asked, tmp_path / "half.onnx", images, float16=True)
    export_onnx(model, asked, tmp_path / "model.onnx", images)
    assert re.search(r"6 test images of the run, \d of which get another class", said), said
    kept = onnx.load(tmp_path / "half.onnx").graph.initializer
    weights = {each.name: each.data_type for each in kept if "features" in each.name or "fc" in each.name}
    assert weights and set(weights.values()) == {onnx.TensorProto.FLOAT16}
    found = [
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"images": np.stack(images)})[0]
        for name in ("half.onnx", "model.onnx")
    ]
    assert [answer.dtype for answer in found] == [np.float32] * 2
    assert 0 < np.abs(found[0] - found[1]).max() < 0.01
    with torch.no_grad():
        model.fc.bias[0] = 1e5  # beyond float16
    with pytest.raises(RunError, match="the logits of ONNX Runtime and PyTorch differ"):
        export_onnx(model, asked, tmp_path / "wrong.onnx", images, float16=True)
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_changed_graph_is_refused_although_the_model_is_sure_of_itself(tmp_path, monkeypatch):
    """Softmax gives 1.000 for one class on any picture, before and after the change."""
    from onnx import numpy_helper

    converted = export._converted

    def changed(network):
        proto = converted(network)
        one = next(each for each in proto.graph.initializer if each.name.endswith("fc.bias"))
        one.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(one), one.name))
        return proto

    model = tiny.Classifier(6).eval()
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, 40, 0, 0, 0, 0]))
    export_onnx(model, checkpoint("tiny_classifier", 36, "bicubic"), tmp_path / "model.onnx")
    monkeypatch.setattr(export, "_converted", changed)
    with pytest.raises(RunError, match="the logits of ONNX Runtime and PyTorch differ"):
        export_onnx(model, checkpoint("tiny_classifier", 36, "bicubic"), tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()
