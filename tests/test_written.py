"""Files that others read: strict JSON, CSV whatever the names, results of very many classes, lists of files."""

import ast
import csv
import io
import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_finite import call, spoiled
from tiny import strict
from torch import nn

import main
from choices import METRICS
from dataset import Batches
from evaluate import evaluate
from images.split import read_split
from metrics import require_figure
from precision import Precision
from reports import audit, results
from runs.evaluation import Evaluation
from runs.result import cells_of, check_result, confusion_cells, confusion_entry, read_result
from runs.scores import areas, fitted_temperature, probabilities
from runs.writing import class_columns, classes_of
from system.files import as_cell, from_cell, json_text
from transforms import Preprocess
from utils import UserError

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, folder, "--epochs=1") == 0
    return folder / "run"


# --------------------------------------------------------------------------------------- JSON
def test_json_is_strict_whatever_is_written(tmp_path):
    content = {"a": [math.nan, (math.inf, 1)], "b": {"c": -math.inf, "d": np.float64("nan"), "e": "NaN"}, "f": 0.5}
    assert json.loads(json_text(content, indent=1), parse_constant=pytest.fail) == {
        "a": [None, [None, 1]],
        "b": {"c": None, "d": None, "e": "NaN"},
        "f": 0.5,
    }


def test_all_json_goes_through_the_strict_writer():
    hashed = ("cache.py", "opening.py", "stores.py")  # their JSON is no file, but what a checksum is taken of
    loose = {}
    for file in tiny.ROOT.rglob("*.py"):
        if {"tests", "notebooks", "benchmarks"} & set(file.parts) or file.name in hashed:
            continue
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "dump" in text else ():
            name = isinstance(node, ast.Call) and ast.unparse(node.func)
            written = name in ("json.dump", "json.dumps", "dumps", "dump")
            if written and not any(word.arg == "allow_nan" for word in node.keywords):
                loose.setdefault(str(file.relative_to(tiny.ROOT)), []).append(node.lineno)
    assert loose == {}


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_files_that_hold_nan_are_refused_by_their_name_and_reason(value, run, tmp_path, capsys):
    copy = spoiled(run, tmp_path, lambda model: None)
    result = json.loads((copy / "result.json").read_text())
    text = json.dumps(result | {"test_loss": 12345.0}).replace("12345.0", value)
    (copy / "result.json").write_text(text)
    assert main.main(["compare", "--runs", str(run), str(copy), f"--checkpoint_dir={tmp_path / 'c'}"]) == 2
    said = capsys.readouterr().err
    assert f"{copy / 'result.json'} is damaged" in said and f"holds {value}" in said and "not finite" in said
    header = (run / "predictions.csv").read_text().splitlines()[0]
    (copy / "predictions.csv").write_text(f"{header}\na.png,coast,coast,{value},{value},0.5,0.5\n")
    assert "not finite" in tiny.refused(results.read_predictions, copy / "predictions.csv")


# ------------------------------------------------------------------------- what evaluate writes
def test_the_table_of_precisions_is_written_where_it_was_asked_for(run, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert call("evaluate", run, "--precisions=fp32,amp-bf16", f"--json={file}") == 0
    assert list(strict(file)) == ["fp32", "amp-bf16"] and strict(file) == strict(run / "parity.json")
    for name in ("csv", "out"):
        assert call("evaluate", run, "--precisions=fp32,amp-bf16", f"--{name}={tmp_path / name}") == 2
        said = capsys.readouterr().err
        assert f"--{name} holds the test in one precision" in said and not (tmp_path / name).exists()


def test_a_precision_that_is_not_there_is_refused_before_the_first_test(run, capsys, monkeypatch):
    monkeypatch.setattr("commands.evaluate.evaluate", lambda *_, **__: pytest.fail("the test had begun"))
    assert call("evaluate", run, "--precisions=fp32,tf32") == 2
    assert "Tensor Cores" in capsys.readouterr().err


def test_a_checkpoint_that_was_never_validated_gives_a_whole_result(run, tmp_path, capsys):
    content = torch.load(run / "last.pt", weights_only=True)
    content["progress"] |= {"epoch": 0, "history": []}
    torch.save(content, tmp_path / "last.pt")
    out = tmp_path / "out"
    assert call("evaluate", run, f"--checkpoint={tmp_path / 'last.pt'}", f"--out={out}") == 0
    assert "not validated" in capsys.readouterr().out
    result = strict(out / "result.json")
    assert result["best_val_acc"] is None
    results.read_run(out)
    with pytest.raises(TypeError):  # a training has one
        check_result(result | {"train_seconds": 1.0})
    check_result(result | {"train_seconds": 1.0, "best_val_acc": 50.0})


# ---------------------------------------------------------------------------------------- CSV
FORMULAS = ["=1+1", "+2", "-3", "@SUM(1)", "\tx", "\rx", "'=x", "''-"]
PLAIN = ["sea", "a=b", "'quoted'", "", "1-2", "x+y"]
FIXED = ["path", "folder", "label", "predicted", "confidence", "probability", "Label", "class:label", "class:"]


@pytest.mark.parametrize("name", [*FORMULAS, *PLAIN, *FIXED])
def test_a_name_is_read_as_it_was_written(name):
    assert from_cell(as_cell(name)) == name
    assert as_cell(name) == name or name in FORMULAS
    assert classes_of(class_columns([name, "other"])) == [name, "other"]


def rows_of(file):
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Return a run on classes and files with names of formulas and of columns, and its data."""
    folder = tmp_path_factory.mktemp("odd")
    numbers = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("=1+1", "-3", "@SUM(1)", "path", "label", "confidence"):
            place = folder / "data" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{'=HYPERLINK(0)' * (number == 0)}{number}.png")
    assert tiny.train(folder / "data", folder, "--epochs=1", "--image_size=16") == 0
    return folder


def assert_harmless(rows, numbers_from):
    for row in rows:
        names = row[:numbers_from] if row is not rows[0] else row
        assert not [cell for cell in names if cell[:1] in tuple("=+-@\t\r")]
        assert row is rows[0] or all(0 <= float(cell) <= 1 for cell in row[numbers_from:])
    assert len(set(rows[0])) == len(rows[0])


def test_no_csv_for_people_holds_a_formula_or_two_columns_of_one_name(odd, capsys):
    run = odd / "run"
    test = odd / "data" / "test"
    assert_harmless(rows_of(run / "predictions.csv"), 3)
    found = results.read_predictions(run / "predictions.csv")
    assert found["classes"] == strict(run / "result.json")["classes"] == sorted(path.name for path in test.iterdir())
    assert "test/=1+1/=HYPERLINK(0)0.png" in found["paths"] and set(found["labels"]) == set(found["classes"])
    wrong = sum(one != other for one, other in zip(found["labels"], found["predicted"], strict=True))
    assert strict(run / "result.json")["test_acc"] == pytest.approx(100 * (1 - wrong / 12))
    assert call("predict", run, test, f"--csv={odd / 'p.csv'}") == 0
    table = rows_of(odd / "p.csv")
    assert_harmless(table, 3)
    assert table[0] == ["path", "folder", "predicted", "confidence", *rows_of(run / "predictions.csv")[0][4:]]
    assert {row[1] for row in table[1:]} == {"'=1+1", "'-3", "'@SUM(1)", "path", "label", "confidence"}
    assert_harmless(rows_of(run / "split.csv"), 3)
    split = read_split(run / "split.csv")
    assert split["test/=1+1/=HYPERLINK(0)0.png"] == ("=1+1", "test") and len(split) == 36


def test_predictions_serve_as_a_table_of_labels(odd, tmp_path, capsys):
    """The cells of names were written with an apostrophe; the columns of classes are no column of paths or labels."""
    words = [f"--data_dir={odd / 'data'}", f"--labels={odd / 'run' / 'predictions.csv'}"]
    assert call("evaluate", odd / "run", *words) == 0
    first = strict(odd / "run" / "result.json")
    assert f"{first['test_acc']:.2f} %" in capsys.readouterr().out


def test_doubtful_labels_are_no_formulas_and_their_negative_margins_are_numbers(tmp_path, monkeypatch):
    row = ["=x.png", "-3", "@SUM(1)", "0.100000", "0.900000", "-0.800000"]
    monkeypatch.setattr(audit, "doubtful_rows", lambda *_: [row])
    for name in ("write_page", "labelled_sheet"):
        monkeypatch.setattr(audit, name, lambda *_, **__: None)
    run = {"directory": tmp_path, "result": {"test_acc": 50.0}, "config": {"dataset": {}}}
    monkeypatch.setattr(audit, "read_run", lambda _: run)
    lines = ["path,label,predicted,confidence,'-3,'@SUM(1)", "0.png,'-3,'-3,0.9,0.9,0.1"]
    (tmp_path / "predictions.csv").write_text("\n".join(lines) + "\n")
    audit.report_audit([tmp_path] * 2, tmp_path, tmp_path, [])
    assert rows_of(tmp_path / "doubtful.csv")[1] == ["'=x.png", "'-3", "'@SUM(1)", *row[3:]]


# ------------------------------------------------------------------------------- many classes
def random_evaluation(count=200, classes=40):
    """Return an evaluation with some classes without images, and some without predictions."""
    numbers = np.random.default_rng(0)
    labels = numbers.integers(0, classes - 5, count)
    predicted = np.where(numbers.random(count) < 0.5, labels, numbers.integers(3, classes, count))
    return Evaluation(labels, predicted, classes, 1.0, numbers.random(count))


def test_figures_of_classes_are_those_of_scikit_learn():
    from sklearn import metrics

    found = random_evaluation()
    names = [str(number) for number in range(40)]
    table = metrics.precision_recall_fscore_support(found.labels, found.predicted, labels=range(40), zero_division=0)
    rows = np.array([list(row.values()) for row in found.per_class(names).values()])
    np.testing.assert_allclose(rows.T[:4], np.array(table), atol=5e-7)
    tested = table[3] > 0
    assert list(found.macro().values())[:3] == pytest.approx([column[tested].mean() for column in table[:3]])
    matrix = metrics.confusion_matrix(found.labels, found.predicted, labels=range(40))
    assert confusion_entry(found.cells(), 40) == {"confusion": matrix.tolist()}
    np.testing.assert_array_equal(cells_of(matrix, 40), found.cells())


def test_figures_from_probabilities_are_those_of_scikit_learn():
    from sklearn import metrics

    found = random_evaluation(classes=12)
    logits = np.random.default_rng(1).integers(0, 3, (200, 12)).astype(np.float32)  # many are equal
    logits[np.arange(200), found.predicted] += 2
    found = replace(found, logits=logits)
    table = found.by_class()
    for label in range(12):
        is_class = found.labels == label
        shares = found.probabilities[:, label]
        if label >= 7:  # without images
            assert all(np.isnan(table[name][label]) for name in ("specificity", "roc_auc", "average_precision"))
            continue
        recall_of_the_others = metrics.recall_score(~is_class, found.predicted != label)
        assert table["specificity"][label] == pytest.approx(recall_of_the_others)
        assert table["roc_auc"][label] == pytest.approx(metrics.roc_auc_score(is_class, shares))
        assert table["average_precision"][label] == pytest.approx(metrics.average_precision_score(is_class, shares))
    assert found.macro()["roc_auc"] == pytest.approx(table["roc_auc"][:7].mean())
    untied = replace(found, logits=logits + np.linspace(0, 0.5, 12, dtype=np.float32))
    top = metrics.top_k_accuracy_score(found.labels, untied.logits, k=5, labels=range(12))
    assert untied.top(5) == pytest.approx(100 * top)


def test_probabilities_that_are_not_finite_give_no_figure():
    labels = np.array([0, 1, 0, 1] * 3)
    logits = np.zeros((12, 7), np.float32)
    logits[3] = np.nan
    found = Evaluation(labels, np.where(np.isnan(logits[:, 0]), -1, labels), 7, np.nan, logits=logits)
    for name in ("roc_auc", "average_precision", "top5"):
        assert np.isnan(METRICS[name].compute(found)), name
        with pytest.raises(UserError, match=f"--best_by {name} needs"):
            require_figure(name, labels, 3000)
    assert np.isnan(areas(np.array([0.1, np.nan, 0.9]), np.array([True, False, True]))).all()
    require_figure("roc_auc", labels, 7)
    with pytest.raises(UserError, match="--best_by specificity needs images of two classes"):
        require_figure("specificity", np.zeros(5, int), 7)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_with_the_lowest_cross_entropy(factor):
    numbers = np.random.default_rng(4)
    logits = 2 * numbers.normal(size=(400, 5))
    labels = (logits + numbers.gumbel(size=logits.shape)).argmax(1)  # drawn from the softmax of these logits

    def loss(temperature):
        return -np.log(probabilities(factor * logits, temperature)[np.arange(400), labels]).mean()

    found = fitted_temperature(factor * logits, labels)
    assert found == pytest.approx(factor, rel=0.15)
    assert loss(found) < min(loss(0.99 * found), loss(1.01 * found))
    assert fitted_temperature(logits, logits.argmax(1)) == pytest.approx(0.25, abs=1e-3)  # no error: the lower bound
    assert fitted_temperature(logits, logits.argmin(1)) == pytest.approx(10, abs=0.1)


def test_figures_of_a_million_classes_need_no_matrix_of_them():
    class First(nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 10**6)
            logits[:, 0] = 1
            return logits

    found = evaluate(First(), Batches(tiny.subset(6, classes=2), Preprocess(CPU, 9), 3, 10**6), FP32)
    assert found.accuracy == 50 and found.macro()["recall"] == 0.5
    entry = confusion_entry(found.cells(), 10**6)
    assert entry == {"confusion_cells": [[0, 0, 3], [1, 0, 3]]}
    np.testing.assert_array_equal(confusion_cells(entry), found.cells())


@pytest.mark.parametrize("cells", [[], [[0, 3, 1]], [[-1, 0, 1]], [[0, 1]], [["a", 0, 1]], None, 5, [[0, 0, 0]]])
def test_damaged_cells_are_refused_by_the_name_of_their_file(cells, run, tmp_path):
    content = strict(run / "result.json")
    del content["confusion"]
    (tmp_path / "result.json").write_text(json.dumps(content | {"confusion_cells": cells}))
    with pytest.raises(UserError, match="result.json is damaged"):
        read_result(tmp_path / "result.json")


# ------------------------------------------------------------------------------- lists of files
def test_predict_from_a_list_that_names_nothing_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    (tmp_path / "list.txt").touch()
    for given, name, said in (
        (None, "-", "standard input, which is closed"),
        (closed, "-", "standard input, which is closed"),
        (io.StringIO("\n\n"), "-", "no image was named"),
        (None, f"@{tmp_path / 'list.txt'}", "no image was named"),
    ):
        monkeypatch.setattr("sys.stdin", given)
        assert call("predict", run, name) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_files_may_be_in_any_encoding(encoding, run, data, tmp_path, monkeypatch, capsys):
    listed = "\n".join(map(str, tiny.images(data, "seg_test"))).encode(encoding)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(listed)), "ascii"))
    assert call("predict", run, "-") == 0
    (tmp_path / "list.txt").write_bytes(listed)
    assert call("predict", run, f"@{tmp_path / 'list.txt'}") == 0
    assert capsys.readouterr().out.count("6 images: ") == 2


def test_predict_refuses_as_many_images_as_the_result_says(run, data, tmp_path, capsys):
    result = strict(run / "result.json")
    found = torch.load(run / "best_model.pt", weights_only=True)
    assert result["temperature"] == found["temperature"] and 0.25 <= result["temperature"] <= 10
    for entry in result["refusals"][:2]:
        words = [data / "seg_test", f"--min_confidence={entry['min_confidence']}", f"--json={tmp_path / 'p.json'}"]
        assert call("predict", run, *words) == 0
        rows = strict(tmp_path / "p.json")
        assert sum(row["refused"] for row in rows) == entry["refused"]
        wrong = [row for row in rows if row["refused"] and row["folder"].split("/")[-1] != row["top"][0]["class"]]
        assert len(wrong) == entry["rightly"]
        assert not entry["refused"] or f"{entry['refused']} as none of these" in capsys.readouterr().out


def test_several_checkpoints_answer_with_the_mean_of_their_probabilities(run, data, tmp_path, capsys):
    content = torch.load(run / "best_model.pt", weights_only=True)
    content["model"]["fc.bias"] += torch.tensor([1.0, 0.0, -2.0])
    torch.save(content, tmp_path / "other.pt")
    files = [run / "best_model.pt", tmp_path / "other.pt"]
    answers = []
    for chosen in (files[:1], files[1:], files):
        words = ["--checkpoint", *chosen, data / "seg_test", f"--json={tmp_path / 'p.json'}"]
        assert call("predict", run, *words) == 0
        answers.append(np.array([list(row["probabilities"].values()) for row in strict(tmp_path / "p.json")]))
    np.testing.assert_allclose(answers[2], (answers[0] + answers[1]) / 2, atol=2e-6)
    assert call("evaluate", run, "--checkpoint", *files, f"--json={tmp_path / 'r.json'}") == 0
    result = strict(tmp_path / "r.json")
    labels = [tiny.CLASSES.index(path.parent.name) for path in tiny.images(data, "seg_test")]
    assert result["test_acc"] == pytest.approx(100 * np.mean(answers[2].argmax(1) == labels)) and result["models"] == 2
    torch.save(content | {"classes": ["a", "b", "c"]}, tmp_path / "other.pt")
    capsys.readouterr()
    assert call("evaluate", run, "--checkpoint", *files) == 2
    assert "other.pt has other classes than" in capsys.readouterr().err


def test_embeddings_are_what_the_head_makes_its_answers_of(run, data, tmp_path, capsys):
    head = torch.load(run / "best_model.pt", weights_only=True)["model"]
    for tta in ("none", "flip"):
        files = {kind: tmp_path / f"e.{kind}" for kind in ("npz", "csv")}
        for file in files.values():
            words = [data / "seg_test", f"--embed={file}", f"--tta={tta}", f"--json={tmp_path / 'p.json'}"]
            assert call("predict", run, *words) == 0
        found = np.load(files["npz"])
        logits = found["embeddings"] @ head["fc.weight"].numpy().T + head["fc.bias"].numpy()
        answers = strict(tmp_path / "p.json")
        wanted = [[*answer["probabilities"].values()] for answer in answers]
        np.testing.assert_allclose(probabilities(logits), wanted, atol=2e-6)
        assert found["paths"].tolist() == [answer["path"] for answer in answers]
        assert found["predicted"].tolist() == [answer["top"][0]["class"] for answer in answers]
        header, *rows = csv.reader(files["csv"].read_text().splitlines())
        assert header[:4] == ["path", "predicted", "confidence", "e0"]
        np.testing.assert_allclose(np.array([row[3:] for row in rows], float), found["embeddings"], rtol=1e-5)
    assert call("predict", run, data / "seg_test", "--embed=e.txt") == 2
    assert "must end with .npz or .csv" in capsys.readouterr().err


def test_each_line_on_stdin_is_answered_before_the_next_one_is_read(run, data, tmp_path, monkeypatch, capsys):
    pictures = tiny.images(data, "seg_test")[:3]
    answers = []

    class Lines:
        closed = False

        def __iter__(self):
            for name in (pictures[0], tmp_path / "absent.png", *pictures[1:]):
                yield f"{name}\n"
                answers.append(capsys.readouterr().out)

    monkeypatch.setattr("sys.stdin", Lines())
    assert call("predict", run, "-") == 1
    wanted = [f"{pictures[0]}  ", f"{tmp_path / 'absent.png'}  cannot be read: the file does not", f"{pictures[1]}  "]
    assert [answer.startswith(start) for answer, start in zip(answers, wanted, strict=False)] == [True] * 3
    assert [answer.count("\n") for answer in answers] == [1] * 4
    assert capsys.readouterr().out.startswith("3 images: ")


@pytest.mark.parametrize(("command", "number"), [("predict", signal.SIGTERM), ("evaluate", signal.SIGINT)])
def test_what_is_stopped_ends_in_a_sentence_that_offers_no_resume(command, number, run, data, monkeypatch, capsys):
    def stop(*_, **__):
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("commands.predict._classify" if command == "predict" else "commands.evaluate.evaluate", stop)
    inputs = [data / "seg_test"] if command == "predict" else []
    try:
        assert call(command, run, *inputs) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "resume" not in said and ("stopped" in said or "interrupted" in said)
