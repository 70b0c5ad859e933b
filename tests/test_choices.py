"""One more metric, optimizer, schedule, augmentation and log: an entry in a table, and everything else follows.

Each is added as CONTRIBUTING.md says, then a run is made with it from the command line.
"""

import json

import numpy as np
import pytest
import tiny
import torch

from choices import (
    AUGMENTATIONS,
    METRICS,
    NORMALIZED,
    OPTIMIZERS,
    SCHEDULES,
    Augmentation,
    Metric,
    OptimizerRule,
    Schedule,
)
from reports import tables
from runs.logs import LOGS


class Diary:
    """A log that keeps what it is told."""

    def open(self, folder, options, resumed):
        self.told = []
        Diary.latest = self

    def scalars(self, values, epoch):
        self.told.append((epoch, values))

    def picture(self, file, epoch):
        pass

    def close(self, ending):
        self.ending = ending


def best_recall(found):
    return 100 * float(np.max(found.by_class()["recall"]))


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(
        METRICS, "best_recall", Metric(best_recall, "best_recall", title="Best class", remark="its recall")
    )
    monkeypatch.setitem(OPTIMIZERS, "RMSPROP", OptimizerRule("RMSprop", {"momentum": 0.9}))
    monkeypatch.setitem(SCHEDULES, "root_warmup", Schedule(lambda step, *_: (step + 2) ** -0.5))
    monkeypatch.setitem(AUGMENTATIONS, "solarize", Augmentation(NORMALIZED, "RandomInvert", {"p": 0.5}))
    monkeypatch.setitem(LOGS, "json", Diary)


OPTIONS = (
    "--best_by=best_recall",
    "--optimizer=rmsprop",
    "--decay_type=root_warmup",
    "--augment=solarize",
    "--log=json",
)


def test_each_is_one_entry_from_the_option_to_the_tables(added, data, tmp_path, monkeypatch):
    used = []
    step = torch.optim.RMSprop.step
    monkeypatch.setattr(
        torch.optim.RMSprop, "step", lambda self, *rest: used.append(self.defaults["momentum"]) or step(self, *rest)
    )
    assert tiny.train(data, tmp_path, *OPTIONS, "--epochs=4", "--amp", "--amp_dtype=float16") == 0
    run = tmp_path / "run"
    assert set(used) == {0.9}
    lines = tiny.metrics(run)
    result = json.loads((run / "result.json").read_text())
    best = max(lines, key=lambda line: (line["val_best_recall"], -line["val_loss"]))
    assert result["best_epoch"] == best["epoch"]
    recalls = [row["recall"] for row in result["per_class"].values()]
    assert result["test_best_recall"] == pytest.approx(100 * max(recalls), abs=1e-3)
    assert f"Best class     {result['test_best_recall']:.2f} % (its recall)" in tables.summary(result)
    assert "val_best_recall" in (run / "metrics.csv").read_text().splitlines()[0]
    assert [epoch for epoch, _ in Diary.latest.told] == [1, 2, 3, 4, 4] and Diary.latest.ending == "finished"
    assert Diary.latest.told[0][1]["val_best_recall"] == lines[0]["val_best_recall"]
    peak = 1e-2  # after one update of warmup
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [peak / (3 * epoch + 3) ** 0.5 for epoch in range(4)]
    )


def test_a_resumed_run_is_the_straight_one_with_all_that_was_added(added, data, tmp_path, monkeypatch):
    own = ("--optimizer=RMSPROP", "--best_by=best_recall", "--decay_type=root_warmup", "--augment=solarize")
    assert tiny.train(data, tmp_path / "straight", *own) == 0
    with monkeypatch.context() as patch:
        tiny.stop_after(patch, 4)
        assert tiny.train(data, tmp_path / "resumed", *own) == 130
    assert tiny.train(data, tmp_path / "resumed", *own, "--resume") == 0
    tiny.assert_equal(tiny.outcome(tmp_path / "straight" / "run"), tiny.outcome(tmp_path / "resumed" / "run"))


def test_the_added_augmentation_changes_the_images(added, data, tmp_path):
    def first_batch(name):
        assert tiny.train(data, tmp_path, f"--augment={name}", "--epochs=1", name=name) == 0
        return tiny.metrics(tmp_path / name)[0]["train_loss"]

    assert first_batch("solarize") != first_batch("flip")


def test_help_names_every_entry(added, capsys):
    with pytest.raises(SystemExit):
        tiny.main.main(["train", "--help", "all"])
    text = "".join(capsys.readouterr().out.split())  # lines may break within a list
    for table in (METRICS, OPTIMIZERS, SCHEDULES):
        assert "{" + ",".join(table) + "}" in text
