"""No figure, no class and no accuracy from logits that are not finite."""

import math
import shutil
from argparse import Namespace

import pytest
import tiny
import torch
from PIL import Image
from tiny import strict
from torch import nn

import main
from command_line.groups import Prediction, take
from commands.predict import predict_files
from dataset import Batches
from distributed import Ranks
from evaluate import evaluate
from features.frozen import frozen_outputs
from features.means import MeanOfViews
from metrics import UpdateRecord
from precision import Precision
from runs.checkpoint import load_checkpoint
from runs.evaluation import NotFinite
from transforms import Preprocess
from utils import RunError

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "")
FP16 = ["--amp", "--amp_dtype=float16"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, folder, "--epochs=1") == 0
    return folder / "run"


def overflowing(model):
    """Weights that are finite in float32, and whose logits are not finite in float16."""
    model["fc.bias"].copy_(torch.tensor([7e4, 1.0, -7e4]))
    model["fc.weight"][0] = 1e5


def one_logit(model):
    """Let only the logit of a class without images overflow, to -inf: the loss stays finite."""
    model["fc.bias"].copy_(torch.tensor([0.0, 0.0, -7e4]))


def beyond_float32(model):
    model["fc.weight"].fill_(3e38)
    model["features.4.weight"].fill_(1e3)


def spoiled(run, folder, spoil):
    """Return a copy of a run after `spoil` changed its best_model.pt in place."""
    copy = folder / "spoiled"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("lock"))
    content = torch.load(copy / "best_model.pt", weights_only=True)
    spoil(content["model"])
    torch.save(content, copy / "best_model.pt")
    return copy


def call(command, run, *more):
    words = [f"--checkpoint_dir={run.parent}", f"--checkpoint_name={run.name}", "--device=cpu", *map(str, more)]
    return main.main([command, *words])


# ------------------------------------------------------------------------------------ figures
@pytest.mark.parametrize(
    ("spoil", "words"), [(overflowing, [*FP16, "--tta=flip"]), (one_logit, FP16), (beyond_float32, [])]
)
def test_evaluate_states_no_accuracy_of_logits_that_are_not_finite(spoil, words, run, tmp_path, capsys):
    copy = spoiled(run, tmp_path, spoil)
    files = [tmp_path / "predictions.csv", tmp_path / "result.json", tmp_path / "out"]
    wanted = [f"--{name}={file}" for name, file in zip(("csv", "json", "out"), files, strict=True)]
    assert call("evaluate", copy, *words, *wanted) == 1
    said = capsys.readouterr()
    assert "not finite in" in said.err and "accuracy" not in said.out
    assert not any(file.exists() for file in files)
    assert ("bfloat16" in said.err) == bool(words)


def test_training_states_no_test_accuracy_and_goes_on_in_bfloat16(data, tmp_path, monkeypatch, capsys):
    def loaded(file):
        content = load_checkpoint(file)
        overflowing(content["model"])
        return content

    monkeypatch.setattr("commands.train.load_checkpoint", loaded)
    words = ["--epochs=1", "--amp"]
    assert tiny.train(data, tmp_path, *words, "--amp_dtype=float16") == 1
    run = tmp_path / "run"
    reason = strict(run / "failure.json")["reason"]
    assert "logits of 6 of 6 images are not finite in AMP float16" in reason
    assert not (run / "result.json").exists() and not (run / "predictions.csv").exists()
    assert "--resume --amp_dtype bfloat16" in capsys.readouterr().err
    assert tiny.train(data, tmp_path, *words, "--amp_dtype=bfloat16", "--resume") == 0
    assert strict(run / "result.json")["precision"] == "amp-bf16"
    assert not (run / "failure.json").exists()


def test_parity_marks_a_precision_without_accuracy(run, tmp_path, capsys):
    copy = spoiled(run, tmp_path, overflowing)
    assert call("evaluate", copy, "--precisions=fp32,amp-fp16") == 0
    rows = strict(copy / "parity.json")
    bad = rows["amp-fp16"]
    assert rows["fp32"]["accuracy"] > 0 and rows["fp32"]["not_finite"] == 0
    assert bad["accuracy"] is bad["loss"] is bad["largest_logit_difference"] is None and bad["not_finite"] == 6
    out = capsys.readouterr().out
    assert "nan" not in out and "amp-fp16: the logits of 6 images are not finite" in out
    assert call("evaluate", copy, "--precisions=amp-fp16,fp32") == 0  # the reference is the one that overflows
    assert strict(copy / "parity.json")["fp32"]["accuracy"] == rows["fp32"]["accuracy"]


class Brightness(nn.Module):
    """Three logits of an image: its mean, 0 and -mean; `bad` for bright images."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        logits = torch.stack([mean, torch.zeros_like(mean), -mean], 1)
        return torch.where(mean[:, None] > 0, torch.tensor([0.0, 0.0, self.bad]), logits)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_predict_gives_no_class_to_logits_that_are_not_finite(bad, tmp_path, capsys):
    for place, grey in enumerate((10, 250, 20, 240, 30)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{place}.png")
    files = {"csv": str(tmp_path / "p.csv"), "json": str(tmp_path / "p.json")}
    own = take(Prediction, Namespace(inputs=[str(tmp_path)], **files))
    with pytest.raises(RunError, match="2 of 5 files have no prediction: their logits are not finite"):
        predict_files(
            Brightness(bad),
            ["a", "b", "c"],
            own,
            preprocess=Preprocess(CPU, 8),
            precision=FP32,
            batch_size=2,
            workers=1,
        )
    rows = strict(tmp_path / "p.json")
    assert [row["path"][-5:] for row in rows] == ["0.png", "2.png", "4.png"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4
    out = capsys.readouterr().out
    assert "3 images: 3 as c" in out and "nan" not in out


def test_predict_of_nothing_but_overflows_says_why_and_not_unreadable(run, data, tmp_path, capsys):
    copy = spoiled(run, tmp_path, overflowing)
    files = [tmp_path / "sheet.png", tmp_path / "maps.png"]
    wanted = [f"--contact_sheet={files[0]}", f"--explain={files[1]}", f"--json={tmp_path / 'p.json'}"]
    assert call("predict", copy, *tiny.images(data, "seg_test"), *FP16, *wanted) == 1
    assert "use --amp_dtype bfloat16" in capsys.readouterr().err
    assert strict(tmp_path / "p.json") == [] and not any(file.exists() for file in files)


class Constant(nn.Module):
    """The same three logits for every image."""

    def __init__(self, logits, dtype=torch.float32):
        super().__init__()
        self.logits = torch.tensor([logits], dtype=dtype)

    def forward(self, images):
        return self.logits.expand(len(images), 3)


def test_an_evaluation_of_some_bad_logits_or_of_a_loss_that_overflows_has_no_figure():
    batches = Batches(tiny.subset(12), Preprocess(CPU, 9), 5, 3)
    bright = sum(images.mean((1, 2, 3)).gt(0).sum() for images, *_ in batches.evaluation())
    for bad in (math.nan, math.inf, -math.inf):
        found = evaluate(Brightness(bad), batches, FP32, keep_logits=True)
        assert 0 < found.unpredicted == bright < 12 and not found.is_finite
        with pytest.raises(NotFinite, match=f"{bright} of 12 images are not finite in FP32"):
            found.require_finite(FP32)
    with pytest.raises(NotFinite, match="the loss is not finite"):
        evaluate(Constant([3e38, -3e38, 0.0]), batches, FP32).require_finite(FP32)
    for tta in ("flip", "eight"):
        averaged = MeanOfViews(Constant([40000.0] * 3, torch.float16), tta)  # their sum is beyond float16
        assert averaged(torch.zeros(1, 3, 4, 4)).tolist() == [[40000] * 3]


def test_training_accuracy_counts_no_logits_that_are_not_finite():
    record = UpdateRecord()
    logits = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [1.0, 0, 0], [1.0, -math.inf, 0]])
    record.add(torch.zeros(()), logits, torch.zeros(4, dtype=torch.long), 1)
    assert record.correct == 1


# -------------------------------------------------------------------------------------- ranks
class WithoutOthers(Ranks):
    """A rank of several whose sums nobody else adds to."""

    def sum(self, *tensors):
        assert all(torch.is_tensor(tensor) for tensor in tensors)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rank_without_an_image_takes_part(mirrored):
    """A preset probe under torchrun with fewer validation images than processes died on those without."""
    batches = Batches(tiny.subset(2), Preprocess(CPU, 9), 5, 3, ranks=WithoutOthers(2, 2, 3))
    model = tiny.Classifier(3)
    outputs = frozen_outputs(model, "fc", batches, FP32, mirrored)
    assert outputs.shape == (2, 1 + mirrored, 16) and not outputs.any() and model.training
    assert not evaluate(model.eval(), batches, FP32).confidence.any()
