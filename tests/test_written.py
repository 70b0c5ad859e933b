"""Files that others read: strict JSON, CSV whatever the names, results of very many classes, lists of files.

Run it alone: pytest tests/test_written.py
"""

import ast
import csv
import io
import json
import math
import os
import signal

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_finite import call, spoiled, strict
from torch import nn

import main
from dataset import Batches
from evaluate import Evaluation, evaluate
from images.split import read_split
from precision import Precision
from reports import audit, pictures, results, tables
from runs.result import cells_of, check_result, confusion_cells, confusion_entry, read_result
from runs.writing import class_columns, classes_of
from system.files import as_cell, from_cell, json_text, read_json
from transforms import Preprocess
from utils import UserError

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU, "")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, folder, "--model=tiny_classifier", "--epochs=1") == 0
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
    hashed = ("opening.py", "stores.py")  # their JSON is no file, but what a checksum is taken of
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


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_result_that_holds_nan_is_refused_by_its_name(value, run, tmp_path, capsys):
    copy = spoiled(run, tmp_path, lambda model: None)
    result = json.loads((copy / "result.json").read_text())
    text = json.dumps(result | {"test_loss": 12345.0}).replace("12345.0", value)
    (copy / "result.json").write_text(text)
    assert main.main(["compare", "--runs", str(run), str(copy), f"--checkpoint_dir={tmp_path / 'c'}"]) == 2
    said = capsys.readouterr().err
    assert f"{copy / 'result.json'} is damaged" in said and f"holds {value}" in said and "not finite" in said


def test_predictions_that_hold_nan_are_refused_by_their_reason(run, tmp_path):
    lines = (run / "predictions.csv").read_text().splitlines()
    (tmp_path / "predictions.csv").write_text("\n".join([lines[0], "a.png,buildings,buildings,nan,nan,0.5,0.5"]))
    with pytest.raises(UserError, match="not finite"):
        results.read_predictions(tmp_path / "predictions.csv")
    assert read_json(run / "result.json")["test_loss"] > 0 and tables.summary(read_json(run / "result.json"))


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
    """A run on classes and files with the names of formulas and of columns, and its data."""
    folder = tmp_path_factory.mktemp("odd")
    numbers = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("=1+1", "-3", "@SUM(1)", "path", "label", "confidence"):
            place = folder / "data" / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{'=HYPERLINK(0)' * (number == 0)}{number}.png")
    words = ["--model=tiny_classifier", "--epochs=1", "--image_size=16"]
    assert tiny.train(folder / "data", folder, *words) == 0
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
    monkeypatch.setattr(audit, "write_page", lambda *_: None)
    monkeypatch.setattr(audit, "labelled_sheet", lambda *_, **__: None)
    folders = [tmp_path / name for name in ("one", "two")]
    for place, folder in enumerate(folders):
        folder.mkdir()
        lines = ["path,label,predicted,confidence,'-3,'@SUM(1)", f"{place}.png,'-3,'-3,0.9,0.9,0.1"]
        (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(
        audit, "read_run", lambda run: {"directory": run, "result": {"test_acc": 50.0}, "config": {"dataset": {}}}
    )
    audit.report_audit(folders, tmp_path, tmp_path, [])
    assert rows_of(tmp_path / "doubtful.csv")[1] == ["'=x.png", "'-3", "'@SUM(1)", *row[3:]]


# ------------------------------------------------------------------------------- many classes
def random_evaluation(count=200, classes=40, seed=0):
    """Some classes have no image, some are never predicted."""
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(0, classes - 5, count)
    predicted = np.where(numbers.random(count) < 0.5, labels, numbers.integers(3, classes, count))
    return Evaluation(labels, predicted, classes, 1.0, numbers.random(count))


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_classes_are_those_of_scikit_learn(seed):
    from sklearn import metrics

    found = random_evaluation(seed=seed)
    names = [str(number) for number in range(40)]
    table = metrics.precision_recall_fscore_support(found.labels, found.predicted, labels=range(40), zero_division=0)
    rows = np.array([list(row.values()) for row in found.per_class(names).values()])
    np.testing.assert_allclose(rows.T, np.array(table), atol=5e-7)
    tested = table[3] > 0
    assert list(found.macro().values()) == pytest.approx([column[tested].mean() for column in table[:3]])
    matrix = metrics.confusion_matrix(found.labels, found.predicted, labels=range(40))
    assert confusion_entry(found.cells(), 40) == {"confusion": matrix.tolist()}
    np.testing.assert_array_equal(cells_of(matrix, 40), found.cells())


def test_a_confusion_matrix_of_many_classes_is_its_cells_that_are_not_zero():
    found = random_evaluation(classes=3000)
    entry = confusion_entry(found.cells(), 3000)
    assert list(entry) == ["confusion_cells"] and len(entry["confusion_cells"]) <= 200
    np.testing.assert_array_equal(confusion_cells(entry), found.cells())


@pytest.mark.parametrize("cells", [[], [[0, 3, 1]], [[-1, 0, 1]], [[0, 1]], [["a", 0, 1]], None, 5, [[0, 0, 0]]])
def test_damaged_cells_are_refused_by_the_name_of_their_file(cells, run, tmp_path):
    content = strict(run / "result.json")
    del content["confusion"]
    (tmp_path / "result.json").write_text(json.dumps(content | {"confusion_cells": cells}))
    with pytest.raises(UserError, match="result.json is damaged"):
        read_result(tmp_path / "result.json")


def test_an_evaluation_holds_nothing_that_grows_with_the_square_of_the_classes(monkeypatch):
    largest = []
    zeros = torch.zeros

    def watched(*size, **options):
        made = zeros(*size, **options)
        largest.append(made.numel())
        return made

    class First(nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 5000).float()

    monkeypatch.setattr("evaluate.torch.zeros", watched)
    found = evaluate(First(), Batches(tiny.subset(12, classes=2), Preprocess(CPU, 9), 5, 5000), FP32)
    assert max(largest) <= 12 and found.accuracy == 50 and found.macro()["recall"] == 0.5


def test_the_picture_of_many_classes_shows_the_most_frequent_confusions(tmp_path, drawn, monkeypatch):
    from matplotlib.axes import Axes

    names = []
    monkeypatch.setattr(Axes, "set_yticks", lambda self, ticks, labels, **_: names.append(labels))
    labels = np.repeat(np.arange(3000), 2)
    predicted = labels.copy()
    predicted[:400:2] += 1  # 200 confusions of one image
    cells = Evaluation(labels, predicted, 3000, 0.0).cells()
    cells = np.append(cells, [[2998, 5, 7], [2999, 4, 9]], 0)
    pictures.confusion_matrix(cells, [f"c{number}" for number in range(3000)], tmp_path / "a.png", title="t")
    assert names[1][:4] == ["c2999 as c4", "c2998 as c5", "c0 as c1", "c1 as c2"] and len(names[1]) == 25
    assert (tmp_path / "a.png").exists()


@pytest.fixture
def few(monkeypatch):
    """Three classes are very many."""
    monkeypatch.setattr("runs.result.MATRIX", 2)
    for module in ("train", "evaluate", "predict", "audit"):
        monkeypatch.setattr(f"commands.{module}.PROBABILITIES", 2)


def test_a_run_on_very_many_classes_is_tested_compared_and_used(few, data, tmp_path):
    words = ["--model=tiny_classifier", "--epochs=1"]
    assert tiny.train(data, tmp_path, *words) == 0
    run = tmp_path / "run"
    result = strict(run / "result.json")
    table = results.read_predictions(run / "predictions.csv")
    assert "confusion" not in result and sum(images for *_, images in result["confusion_cells"]) == 6
    assert rows_of(run / "predictions.csv")[0] == ["path", "label", "predicted", "confidence"]
    assert table["classes"] == [] and len(table["paths"]) == 6 and table["probabilities"].shape == (6, 0)
    right = sum(one == other for one, other in zip(table["labels"], table["predicted"], strict=True))
    assert result["test_acc"] == pytest.approx(100 * right / 6)
    run_again = [f"--csv={tmp_path / 'p.csv'}", f"--out={tmp_path / 'out'}"]
    assert call("evaluate", run, *run_again) == 0
    assert (tmp_path / "p.csv").read_text() == (run / "predictions.csv").read_text()
    assert main.main(["compare", "--runs", str(run), str(tmp_path / "out"), f"--checkpoint_dir={tmp_path / 'c'}"]) == 0
    files = {"csv": tmp_path / "q.csv", "json": tmp_path / "q.json"}
    wanted = [f"--{name}={file}" for name, file in files.items()]
    assert call("predict", run, data / "seg_test", "--top_k=2", *wanted) == 0
    assert rows_of(files["csv"])[0] == ["path", "folder", "predicted", "confidence"]
    rows = strict(files["json"])
    assert [len(row["top"]) for row in rows] == [2] * 6 and "probabilities" not in rows[0]
    confidence = {row[0].rpartition("/")[2]: float(row[3]) for row in rows_of(files["csv"])[1:]}
    for path, value in zip(table["paths"], table["confidence"], strict=True):
        assert confidence[path.rpartition("/")[2]] == pytest.approx(value, abs=1e-5)
    assert main.main(["report", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]) == 0


def test_an_audit_of_very_many_classes_is_refused_before_it_trains(few, data, tmp_path, capsys):
    assert main.main(["audit", f"--data_dir={data}", f"--checkpoint_dir={tmp_path}", "--device=cpu"]) == 2
    assert "at most 2; there are 3" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- lists of files
@pytest.mark.parametrize("stream", ["none", "closed"])
def test_predict_from_a_closed_standard_input_is_one_sentence(stream, run, monkeypatch, capsys):
    given = io.TextIOWrapper(io.BytesIO())
    given.close()
    monkeypatch.setattr("sys.stdin", None if stream == "none" else given)
    assert call("predict", run, "-") == 2
    assert "standard input, which is closed" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_files_may_be_in_any_encoding(encoding, run, data, tmp_path, monkeypatch, capsys):
    listed = "\n".join(map(str, tiny.images(data, "seg_test"))).encode(encoding)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(listed)), "ascii"))
    assert call("predict", run, "-") == 0
    (tmp_path / "list.txt").write_bytes(listed)
    assert call("predict", run, f"@{tmp_path / 'list.txt'}") == 0
    assert capsys.readouterr().out.count("6 images: ") == 2


def test_a_list_without_a_file_is_not_called_unreadable(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    (tmp_path / "list.txt").touch()
    for name in ("-", f"@{tmp_path / 'list.txt'}"):
        assert call("predict", run, name) == 2
        assert "no image was named" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
