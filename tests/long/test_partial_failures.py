"""A part that fails costs no other: a validation, a picture, a file to predict, one image of many.

In this process. Run it alone: pytest tests/long/test_partial_failures.py
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import tiny
import torch

import main
import train as training
from runs.checkpoint import load_checkpoint


# ----------------------------------------------------------------- a validation that overflows
def overflowing(monkeypatch, epoch: int, precision: str = "amp-fp16") -> None:
    """Make validations from the given epoch on return a loss that is not finite in one precision."""
    original = training.Trainer._validate

    def validate(self):
        found = original(self)
        if self.progress.epoch + 1 >= epoch and self.recipe.precision.name == precision:
            return dataclasses.replace(found, loss_sum=float("inf"))
        return found

    monkeypatch.setattr(training.Trainer, "_validate", validate)


def test_a_validation_that_overflows_costs_no_training(data, tmp_path, monkeypatch, capsys):
    half = ["--amp", "--amp_dtype=float16", "--epochs=3"]
    overflowing(monkeypatch, 2)
    assert tiny.train(data, tmp_path, *half) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in ("epoch 2", "--resume --amp_dtype bfloat16", "--precisions fp32,amp-fp16"))
    state = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert (state["epoch"], state["update"]) == (1, 3)

    updates = []
    original = training.update_weights
    monkeypatch.setattr(training, "update_weights", lambda *a, **b: updates.append(1) or original(*a, **b))
    assert tiny.train(data, tmp_path, *half, "--resume") == 1  # at once, and with the same words
    assert updates == [] and "--amp_dtype bfloat16" in capsys.readouterr().err

    last = tmp_path / "run" / "last.pt"
    where = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run", f"--checkpoint={last}"]
    assert main.main(["evaluate", *where, "--precisions=fp32,amp-bf16", "--device=cpu"]) == 0

    assert tiny.train(data, tmp_path, *half, "--amp_dtype=bfloat16", "--resume") == 0
    assert len(updates) == 3
    config = tiny.config(tmp_path / "run")
    assert (config["precision"], config["begun_in"]) == ("amp-bf16", "amp-fp16")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["precision"] == "amp-bf16"
    assert not (tmp_path / "run" / "failure.json").exists()


def test_another_precision_is_for_overflows_alone(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.Trainer, "_must_stop", lambda self: self.updates_done == 4)
    assert tiny.train(data, tmp_path, "--amp") == 143
    monkeypatch.undo()
    assert tiny.train(data, tmp_path, "--resume") == 2
    assert "--amp: begun with True, now False" in capsys.readouterr().err


def test_an_error_in_the_validation_costs_no_training(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.Trainer, "_validate", tiny.raising(torch.OutOfMemoryError("CUDA out of memory.")))
    assert tiny.train(data, tmp_path) == 1
    state = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert (state["epoch"], state["update"]) == (0, 3)


# ---------------------------------------------------------------------------- results first
def test_pictures_that_fail_cost_no_results(tmp_path, monkeypatch, capsys):
    from reports import pictures

    data = tiny.draw(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "learning_curve", tiny.raising(RuntimeError("no fonts here")))
        assert tiny.train(data, tmp_path) == 1
    said = capsys.readouterr()
    assert "the pictures could not be drawn (RuntimeError: no fonts here)" in said.err and "Test accuracy" in said.out
    run = tmp_path / "run"
    assert (run / "result.json").exists() and (run / "predictions.csv").exists() and not (run / "failure.json").exists()
    command = said.err.partition("python main.py ")[2].split()
    with tiny.drawing():
        assert main.main(command) == 0
    assert (run / "learning_curve.png").exists() and (run / "report.html").exists()
    shutil.rmtree(data / "seg_test")  # from the run's files alone
    (run / "report.html").unlink()
    with tiny.drawing():
        assert main.main(command) == 0 and (run / "report.html").exists()


def test_a_first_picture_that_fails_stops_no_training(data, tmp_path, monkeypatch, caplog):
    from reports import pictures

    monkeypatch.setattr(pictures, "batch", tiny.raising(RuntimeError("no fonts here")))
    assert tiny.train(data, tmp_path) == 0
    assert "no batch.png: RuntimeError: no fonts here" in caplog.text and (tmp_path / "run" / "result.json").exists()


def test_no_start_waits_for_pictures_or_statistics():
    code = """
import importlib, sys
for name in ("assemble", "commands.compare", "commands.train", "commands.evaluate", "commands.predict"):
    importlib.import_module(name)
    assert not {"torchvision", "matplotlib", "scipy", "sklearn"} & sys.modules.keys(), name
"""
    subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, env=tiny.environment(), check=True)


def test_no_end_waits_for_a_last_search_for_garbage():
    code = """
import atexit, gc
from system import meeting
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 1000))
meeting.end(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (3, "frozen True\n")


def test_report_of_what_is_no_run(tmp_path, capsys):
    assert main.main(["report", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=x"]) == 2
    assert f"No run with a result.json is in {tmp_path}" in capsys.readouterr().err


# ------------------------------------------------------------------------------ exit statuses


def test_check_says_that_some_images_cannot_be_read(tmp_path, capsys):
    own = tiny.draw(tmp_path / "data")
    tiny.images(own)[0].write_bytes(b"\x89PNG")
    assert main.main(["prepare", "--check", f"--data_dir={own}"]) == 1
    said = capsys.readouterr()
    assert "1 image cannot be read" in said.err and "unreadable files: 1" in said.out
