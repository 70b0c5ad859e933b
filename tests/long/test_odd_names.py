"""Brackets, percent signs, braces, stars and dollars in the names of folders, classes, files and runs: no difference.

Run: pytest tests/long/test_odd_names.py
"""

import csv
import json
import warnings

import tiny

import main

PLAIN = {"data": "data", "runs": "runs", "run": "run", "classes": ["a1", "b1", "c1", "d1"], "file": "x{}.png"}
ODD = {
    "data": "[v2] 100% {x} * $a$",
    "runs": "runs [1]* {r}% ?",
    "run": "[r] 1% {z} * $q$ %s",
    "classes": ["$10", "$5", "%d {b}", "[a]* $x_0^$"],
    "file": "[{}] $x_$ {{y}} %s*.png",
}


def go_through(tmp_path, capsys, names):
    """Every command on images under such names: what it computed, without the names."""
    root = tmp_path / names["data"]
    runs = tmp_path / names["runs"]
    for part, count in (("train", 8), ("test", 3)):
        for label, name in enumerate(names["classes"]):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                path = root / part / name / names["file"].format(number)
                tiny.noise(100 * label + number + 50 * (part == "test"), (20, 18)).save(path)
    where = [f"--checkpoint_dir={runs}", f"--checkpoint_name={names['run']}"]
    words = ["--model=tiny_classifier", "--pretrained=0", "--image_size=16", "--batch_size=8", "--device=cpu"]
    data = f"--data_dir={root}"
    trained = [*where, *words, data, "--epochs=2", "--num_workers=0"]
    out = tmp_path / f"out {names['run']}"
    table = tmp_path / f"p{names['run']}.csv"
    for command in (
        ["train", *trained],
        ["train", *trained, "--resume"],
        ["evaluate", *where, data, f"--out={out}", "--device=cpu"],
        [
            "predict",
            root / "test",
            *where,
            "--device=cpu",
            f"--csv={table}",
            f"--explain={tmp_path / names['run']}.png",
        ],
        ["report", *where],
        ["compare", "--runs", runs / names["run"], runs / names["run"]],
        ["prepare", "--check", data],
    ):
        status = main.main([str(word) for word in command])
        said = capsys.readouterr()
        assert status == 0, (command, said.err)
    assert "unreadable files: 0" in said.out and (tmp_path / f"{names['run']}.png").exists()
    assert main.main(["prepare", "--clean", data]) == 0 and "2 caches removed" in capsys.readouterr().out
    result = json.loads((runs / names["run"] / "result.json").read_text())
    with open(table, newline="", encoding="utf-8") as lines:
        shares = [list(row.values())[-4:] for row in csv.DictReader(lines)]
    metrics = tiny.computed_metrics(runs / names["run"])
    return metrics, result["test_acc"], result["test_loss"], sorted(shares)


def test_odd_names_change_nothing(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as Matplotlib's, of a text that it cannot draw
        plain = go_through(tmp_path / "plain", capsys, PLAIN)
        with tiny.drawing():
            assert go_through(tmp_path / "odd", capsys, ODD) == plain
    drawn = {path.name for path in (tmp_path / "odd").rglob("*")}
    assert {"mistakes.png", "confusion_matrix.png", "learning_curve.png", "report.html"} <= drawn
