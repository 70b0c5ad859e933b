"""Writes what test_written_before.py resumes: runs of one version, stopped in mid-epoch, and what came of them.

Run it in a checkout of that version, for each folder that is to stand beside this file:

    PYTHONPATH=.:TESTS python TESTS/written_before/make.py NAME-OF-THE-FOLDER

TESTS is the folder `tests` of a checkout of today.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch

try:
    from system.machine import device_name
except ImportError:  # version 0.1.0
    from utils import device_name

HERE = Path(__file__).resolve().parent
KEPT = ("config.json", "last.pt", "best_model.pt", "metrics.jsonl")
DATA = Path("data")  # below the current folder, so that no other path is recorded
RUNS = Path("runs")
SETTINGS = {
    "fp32": ["--ema=0.9"],
    "amp-fp16": ["--amp", "--amp_dtype=float16", "--optimizer=SGD", "--mixup=0.4", "--accumulate=2", "--augment=crop"],
    "amp-bf16": ["--amp", "--decay_type=step_warmup", "--warmup_epochs=1", "--freeze_epochs=1", "--clip_grad_norm=1"],
}
UPDATE = 5  # of six, where the runs are stopped: the second of the second epoch


def machine() -> dict[str, str]:
    """What decides how a CPU rounds: only where all of it is the same must results be the same bit for bit."""
    return {
        "torch": torch.__version__,
        "processor": device_name(torch.device("cpu")),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def words(*more: str) -> list[str]:
    return ["--model=tiny_classifier", "--image_size=36", "--learning_rate=1e-2", *more]


def stop_in_mid_epoch(training, patch) -> None:
    """Lets this process get a signal during that update."""
    original = training.update_weights
    calls = []

    def update_weights(*positional, **options):
        calls.append(1)
        if len(calls) == UPDATE:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*positional, **options)

    patch.setattr(training, "update_weights", update_weights)


def make(version: str) -> None:
    training = importlib.import_module("train")
    tiny.register_classifier()
    tiny.draw(DATA)
    target = HERE / version
    target.mkdir()
    (target / "machine.json").write_text(json.dumps(machine(), indent=1))
    for name, options in SETTINGS.items():
        kept = target / name
        kept.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            assert tiny.train(DATA, RUNS, *words(*options), name=f"{name}-whole") == 0
            stop_in_mid_epoch(training, patch)
            assert tiny.train(DATA, RUNS, *words(*options), name=name) == 143
        shutil.copy(RUNS / f"{name}-whole" / "last.pt", kept / "end.pt")
        for file in KEPT:
            shutil.copy(RUNS / name / file, kept / file)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as inside, contextlib.chdir(inside):
        make(sys.argv[1])
