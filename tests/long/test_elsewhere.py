"""A run goes anywhere: onto machines without its device, into other programs, and on from any of its checkpoints."""

import itertools
import json
import re
import shutil

import pytest
import tiny
import torch
from torchvision import models

import main
from command_line import parsing
from commands.export import write_safetensors
from model import build_model
from pretrained.files import load_file
from runs.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes whose test images are copies of the validation images."""
    folder = tmp_path_factory.mktemp("data")
    drawn = tiny.draw(folder / "drawn", train=24, test=9)
    (folder / "train").parent.mkdir(exist_ok=True)
    shutil.move(drawn / "seg_train" / "seg_train", folder / "train")
    shutil.move(drawn / "seg_test" / "seg_test", folder / "val")
    shutil.copytree(folder / "val", folder / "test")
    shutil.rmtree(drawn)
    return folder


def call(capsys, *words):
    """Run a command line; return its exit status and all output."""
    capsys.readouterr()
    status = main.main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def same_loss(run):
    """Whether the test, on copies of the validation images, gave the best epoch's validation loss to the last bit."""
    result = json.loads((run / "result.json").read_text())
    lines = tiny.metrics(run)
    return result["test_loss"] == lines[result["best_epoch"] - 1]["val_loss"]


# ------------------------------------------------------------ the tested network is the trained one
HEADS = {  # one network for each kind of head
    "squeezenet1_1": 33,  # a convolution
    "mobilenet_v3_small": 33,  # the last of several layers
    "timm:test_resnet": 32,  # a layer
    "timm:test_vit": 64,  # a layer, in a network for one size of images
}


@pytest.mark.parametrize("name, side", HEADS.items(), ids=list(HEADS))
def test_the_tested_network_is_the_trained_one(data, tmp_path, name, side):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert tiny.train(data, tmp_path, f"--model={name}", f"--image_size={side}", "--epochs=1", "--batch_size=12") == 0
    assert same_loss(tmp_path / "run")


@pytest.fixture(scope="module")
def googlenet(data, tmp_path_factory):
    """Write an ImageNet file of GoogLeNet into torch.hub's folder; return it and a run's folder that began with it."""
    folder = tmp_path_factory.mktemp("googlenet")
    file = folder / "checkpoints" / models.GoogLeNet_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    file.parent.mkdir()
    torch.manual_seed(1)
    torch.save(models.googlenet(num_classes=1000, init_weights=False).state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(folder))
        words = ["--model=googlenet", "--image_size=33", "--pretrained=1", "--epochs=1", "--batch_size=12"]
        assert tiny.train(data, folder, *words) == 0
    return file, folder / "run"


def test_what_a_constructor_decides_is_kept(googlenet, tmp_path):
    """`transform_input`, which ImageNet weights turn on and no state dict holds."""
    file, run = googlenet
    best = run / "best_model.pt"
    assert load_file(best)["model_options"]["transform_input"] is True
    assert same_loss(run)
    for source in (file, best):  # the published file by hand, and a run's own
        assert build_model("googlenet", 3, pretrained_path=source).transform_input is True
    other = tmp_path / "other.pt"
    torch.save(load_file(file), other)
    assert build_model("googlenet", 3, pretrained_path=other).transform_input is False
    assert build_model("googlenet", 3, pretrained=False).transform_input is False
    pytest.importorskip("safetensors")
    safe = tmp_path / "best.safetensors"
    write_safetensors(load_file(best), safe)
    assert build_model("googlenet", 3, pretrained_path=safe).transform_input is True


# ------------------------------------------------------------------------------------ other machines
@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Return a finished run with EMA weights."""
    runs = tmp_path_factory.mktemp("runs")
    more = ["--safetensors"] if tiny.has("safetensors") else []
    assert tiny.train(data, runs, "--ema=0.5", *more) == 0
    return runs / "run"


ELSEWHERE = {
    "cuda:1": {"device": "cuda:1"},
    "tf32": {"device": "cuda", "tf32": True},
    "float16": {"device": "cuda:1", "amp": True, "amp_dtype": "float16"},
    "16 workers": {"num_workers": 16},
}


@pytest.mark.parametrize(
    "command, name",
    [*itertools.product(["evaluate", "predict"], ELSEWHERE), ("inspect", "float16"), ("export", "float16")],
)
def test_what_was_recorded_is_advice(finished, data, tmp_path, capsys, command, name):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["options"] |= ELSEWHERE[name]
    config["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(config))
    words = [command, f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    if command == "export":
        pytest.importorskip("onnxscript")
    elif command != "predict":
        words.append(f"--data_dir={data}")
    more = {"predict": [data / "test"], "inspect": [f"--out={tmp_path / 'seen'}", "--precisions=fp32"]}
    status, said = call(capsys, *words, *more.get(command, []))
    assert status == 0, said
    assert command == "inspect" or ("note: " in said) == (command != "export" and name != "16 workers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("typed", ["--device=cuda:1", "--tf32"])
def test_what_is_typed_is_an_order(finished, data, capsys, typed):
    words = ["evaluate", f"--data_dir={data}", f"--checkpoint_dir={finished.parent}", "--checkpoint_name=run", typed]
    status, said = call(capsys, *words)
    assert status == 2 and typed.partition("=")[0] in said


# --------------------------------------------------------------------------------- every checkpoint
def test_last_pt_is_used_with_its_averaged_weights(finished, data, tmp_path, capsys):
    last = finished / "last.pt"
    content = load_file(last)
    averaged = tmp_path / "averaged.pt"
    torch.save({**content, "model": content["ema"], "ema": None}, averaged)
    tables = []
    for file in (last, averaged):
        status, said = call(
            capsys, "predict", data / "test", f"--checkpoint={file}", "--device=cpu", f"--csv={tmp_path / 'x.csv'}"
        )
        assert status == 0 and ("EMA" in said) == (file is last)
        tables.append((tmp_path / "x.csv").read_text())
    assert tables[0] == tables[1]
    assert not all(torch.equal(tensor, content["ema"][name]) for name, tensor in content["model"].items())
    status, said = call(capsys, "evaluate", f"--data_dir={data}", f"--checkpoint={last}", "--device=cpu")
    assert status == 0 and "Epoch" in said and "Best epoch" not in said


def test_a_run_goes_on_without_the_weights_that_it_began_with(data, tmp_path, capsys):
    start = tmp_path / "start.pt"
    torch.manual_seed(5)
    torch.save(tiny.Classifier(3).state_dict(), start)
    words = [f"--pretrained_path={start}"]
    assert tiny.train(data, tmp_path, *words, name="straight") == 0
    assert tiny.train(data, tmp_path, *words, "--epochs=2", name="stopped") == 0
    start.unlink()
    (tmp_path / "stopped" / "result.json").unlink()
    assert tiny.train(data, tmp_path, *words, "--resume", name="stopped") == 0, capsys.readouterr().err
    assert tiny.outcome(tmp_path / "stopped") == tiny.outcome(tmp_path / "straight")


def test_a_finished_run_that_is_to_be_longer_is_answered_with_the_command(data, tmp_path, capsys):
    assert tiny.train(data, tmp_path, "--epochs=1") == 0
    assert tiny.train(data, tmp_path, "--epochs=3", "--resume") == 2
    line = capsys.readouterr().err.splitlines()[-1].split()
    assert line[:2] == ["python", "main.py"]
    status, said = call(capsys, *line[2:])
    assert status == 0, said
    options = tiny.config(tmp_path / "run_longer")["options"]
    assert options["epochs"] == 2 and options["model"] == "tiny_classifier"


# ------------------------------------------------------------------------------------- other programs
def test_best_model_loads_as_the_page_says(finished):
    page = (tiny.ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```py\n(import torch, torchvision\n.*?)```", page, re.DOTALL)
    names = {}
    exec(program.replace("checkpoint/baseline", str(finished)), names)
    weights = load_file(finished / "best_model.pt")["model"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in names["model"].state_dict().items())


def test_safetensors_hold_the_weights_and_how_to_use_them(finished, tmp_path, capsys):
    safe_open = pytest.importorskip("safetensors").safe_open
    best = load_file(finished / "best_model.pt")
    written = tmp_path / "again.safetensors"
    status, said = call(
        capsys, "export", f"--checkpoint={finished / 'best_model.pt'}", "--safetensors", f"--out={written}"
    )
    assert status == 0, said
    for file in (finished / "best_model.safetensors", written):
        with safe_open(file, "pt") as content:
            facts = content.metadata()
            assert all(torch.equal(content.get_tensor(name), tensor) for name, tensor in best["model"].items())
        assert json.loads(facts["classes"]) == best["classes"] and facts["image_size"] == "36"
        assert json.loads(facts["mean"]) == list(best["mean"]) and facts["interpolation"] == "bilinear"


@pytest.fixture
def alone(finished, tmp_path):
    """Return the safetensors file of the finished run, far from its folder."""
    pytest.importorskip("safetensors")
    (tmp_path / "far").mkdir()
    return shutil.copy(finished / "best_model.safetensors", tmp_path / "far" / "weights.safetensors")


@pytest.mark.parametrize("command", ["predict", "evaluate", "inspect", "export"])
def test_every_command_takes_safetensors_as_it_takes_a_checkpoint(finished, alone, data, tmp_path, capsys, command):
    def answers(checkpoint, name):
        file = tmp_path / name
        more = {
            "predict": [data / "test", f"--csv={file}", "--device=cpu"],
            "evaluate": [f"--data_dir={data}", f"--json={file}", "--device=cpu"],
            "inspect": [f"--data_dir={data}", f"--out={file}", "--device=cpu", "--batch_size=8"],
            "export": ["--safetensors", f"--out={file}"],
        }
        status, said = call(capsys, command, f"--checkpoint={checkpoint}", *more[command])
        assert status == 0, said
        if command == "predict":
            return file.read_bytes()
        if command == "export":
            return dict(tiny.leaves(load_file(file)))
        content = json.loads((file if command == "evaluate" else file / "inspect.json").read_text())
        return dict(tiny.leaves(content if command == "evaluate" else content["underflow"]["activations"]))

    assert answers(alone, "one") == answers(finished / "best_model.pt", "other")


def test_safetensors_keep_the_windows_of_deep_pictures(finished, tmp_path):
    pytest.importorskip("safetensors")
    windows = {"I;16": [100.0, 4000.0]}
    file = tmp_path / "deep.safetensors"
    write_safetensors(load_file(finished / "best_model.pt") | {"windows": windows}, file)
    assert load_checkpoint(file)["windows"] == windows


def test_safetensors_that_say_too_little_are_refused(finished, alone, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    torch_files = pytest.importorskip("safetensors.torch")
    with safetensors.safe_open(alone, "pt") as content:
        facts = content.metadata()
    weights = torch_files.load_file(alone)
    for changed, named in (
        ({"windows": None}, "does not say windows: use the best_model.pt"),
        ({"classes": "["}, "damaged"),
        ({"classes": "[" * 100_000}, "damaged"),
        ({"windows": '{"I": 5}'}, "not a checkpoint of this program"),
        ({"val_acc": '"x"'}, "not a checkpoint of this program"),
        ({"image_size": "-1"}, "not a checkpoint of this program"),
        ({"model_options": None}, "not a checkpoint of this program"),
    ):
        told = {name: value for name, value in (facts | changed).items() if value is not None}
        torch_files.save_file(weights, tmp_path / "changed.safetensors", told)
        status, said = call(capsys, "predict", tmp_path, f"--checkpoint={tmp_path / 'changed.safetensors'}")
        assert status == 2 and named in said, said


def test_without_the_package_safetensors_are_refused_before_training(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert tiny.train(data, tmp_path, "--safetensors") == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.pt").exists()


def test_names_of_weights_are_checked(data, tmp_path, capsys):
    name = "--model=shufflenet_v2_x0_5"
    assert tiny.train(data, tmp_path, name, "--pretrained=1", "--weights=IMAGENET1K_V9") == 2
    assert "IMAGENET1K_V1" in capsys.readouterr().err
    assert tiny.train(data, tmp_path, name, "--weights=IMAGENET1K_V1") == 2  # with --pretrained 0
    assert "--weights" in capsys.readouterr().err


def test_a_recorded_option_is_known_as_such(finished):
    words = ["evaluate", f"--checkpoint_dir={finished.parent}", "--checkpoint_name=run", "--batch_size=4"]
    options = parsing.parse(words)
    assert "image_size" in options.recorded and "batch_size" not in options.recorded
    assert options.recorded_on == "cpu"
