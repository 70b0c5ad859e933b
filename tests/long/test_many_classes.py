"""A run on more classes than a matrix, a table or a picture can hold, by every command."""

import numpy as np
import pytest
import tiny
from test_finite import call, strict
from test_written import rows_of

import main
from reports import pictures, results
from runs.evaluation import Evaluation


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
    monkeypatch.setattr("train.PROBABILITIES", 2)
    for module in ("train", "evaluate", "answers", "audit"):
        monkeypatch.setattr(f"commands.{module}.PROBABILITIES", 2)


def test_a_run_on_very_many_classes_is_tested_compared_and_used(few, data, tmp_path):
    assert tiny.train(data, tmp_path, "--epochs=1") == 0
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
