"""Labels that were swapped are found by an audit whose models learn."""

import csv
import json

import tiny


def test_audit_finds_labels_that_were_swapped(tmp_path, run, monkeypatch):
    monkeypatch.setattr("commands.compare.subprocess", tiny.Subprocess)
    root = tiny.draw(tmp_path / "data", train=90, test=6)
    train = root / "seg_train" / "seg_train"
    for place, path in enumerate(sorted((train / "coast").iterdir())[:3]):
        path.rename(train / "town" / f"swapped{place}.png")
    words = tiny.words(root, tmp_path / "runs", "--epochs=30", "--folds=2", name="look")
    status, _, err = run(["audit", *words[1:]])
    assert status == 0, err
    folder = tmp_path / "runs" / "look"
    assert json.loads((folder / "audit.json").read_text())["accuracy"] > 80
    with open(folder / "doubtful.csv", newline="") as file:
        first = [row["path"].rpartition("/")[2] for row in csv.DictReader(file)][:8]
    assert len({"swapped0.png", "swapped1.png", "swapped2.png"} & set(first)) >= 2
