"""kill -9 at random moments of every phase: nothing is lost, and the end equals the undisturbed one.

Each attempt is a fork of this process, so that hundreds take minutes: FAULT_KILLS=200 pytest tests/test_kills.py
"""

import collections
import os
import random
import shutil
import signal
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import tiny
from tiny import assert_equal, outcome

import main

PATIENCE = 30.0  # seconds
KILLS = int(os.environ.get("FAULT_KILLS", "14"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def patched(name: str):
    """The owner and the name of a function given as module:path."""
    module, _, path = name.partition(":")
    owner = __import__(module, fromlist=["x"])
    *between, last = path.split(".")
    for part in between:
        owner = getattr(owner, part)
    return owner, last


def killed(work, phase: str, calls: int, delay: float) -> bool:
    """Runs `work` in a fork that is killed `delay` seconds after the phase's function was called the n-th time.

    False if the work was done before.
    """
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        owner, name = patched(phase)
        original = getattr(owner, name)
        seen = []

        def then_killed(*arguments, **options):
            seen.append(1)
            if len(seen) == calls:
                signal.setitimer(signal.ITIMER_REAL, delay)
            return original(*arguments, **options)

        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process at once, in the middle of C code, too
        setattr(owner, name, then_killed)
        try:
            os._exit(work())
        finally:
            os._exit(99)
    # A fork of a process with threads may wait for ever for a lock that one of them held: it is killed, too.
    until = time.monotonic() + PATIENCE
    done = 0
    while not done and time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not done:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (phase, os.WEXITSTATUS(status))
    return os.WIFSIGNALED(status)


TRAINING = {  # phase: its function, the most calls to it, seconds that it takes
    "decoding": ("images.cache:_decode_all", 2, 0.05),
    "epoch": ("train:update_weights", 9, 0.1),
    "save": ("runs.folder:write_checkpoints", 4, 0.05),
    "validation": ("train:Trainer._validate", 3, 0.1),
    "test": ("main:finish", 1, 0.2),
    "pictures": ("reports.pictures:learning_curve", 1, 0.8),
}


def test_training_killed_in_every_phase(tmp_path):
    data = tiny.draw(tmp_path / "data")
    options = ["--epochs=3", "--checkpoint_every=1u"]
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_out_pictures(patch)
        assert tiny.train(data, tmp_path / "a", *options) == 0
    run = tmp_path / "b" / "run"
    chance = random.Random(7)
    count = collections.Counter()
    misses = 0
    while count.total() < KILLS // 2 and misses < KILLS:
        phase = list(TRAINING)[count.total() % len(TRAINING)]
        function, calls, seconds = TRAINING[phase]
        if (run / "result.json").exists() and phase != "pictures":
            shutil.rmtree(run)
        if phase == "decoding":
            shutil.rmtree(data / ".cache", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            if phase != "pictures":  # which take most of the time of a tiny run
                tiny.leave_out_pictures(patch)
            hit = killed(
                lambda: tiny.train(data, tmp_path / "b", *options, "--resume=auto"),
                function,
                chance.randint(1, calls),
                chance.uniform(0.0005, seconds),
            )
        count[phase] += hit
        misses += not hit
    assert tiny.train(data, tmp_path / "b", *options, "--resume=auto") == 0
    print(f"{count.total()} kills: {dict(count)}")
    assert count.total() >= min(KILLS // 2, 3)
    assert_equal(outcome(tmp_path / "a" / "run"), outcome(run))
    assert not list(run.glob(".*.tmp")) and not list((data / ".cache").glob(".*.tmp"))


def archived(source: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(source.rglob("*.png")):
            archive.write(path, path.relative_to(source))
    return file


def fake_kagglehub(archive: Path, cache: Path) -> None:
    """A kagglehub that unpacks an archive into its own cache, as far as it comes."""

    def dataset_download(_name):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(cache)
        return str(cache)

    sys.modules["kagglehub"] = types.SimpleNamespace(dataset_download=dataset_download)


PREPARING = {
    "archive": ("shutil:copyfileobj", 60, 0.02),
    "archive, moving": ("images.placing:finish_interrupted", 2, 0.004),
    "download": ("zipfile:ZipFile.open", 60, 0.01),
    "drawing": ("images.demo:draw_scene", 20, 0.2),
}


@pytest.mark.parametrize("phase", PREPARING)
def test_preparing_killed_at_any_moment(phase, tmp_path, monkeypatch):
    archive = archived(tiny.draw(tmp_path / "source", train=60, test=12), tmp_path / "a.zip")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    fake_kagglehub(archive, tmp_path / "kagglehub")
    source = {"archive": [f"--archive={archive}"], "download": ["--download"]}.get(
        phase.partition(",")[0], ["--demo", "--train_images=60", "--test_images=12"]
    )
    function, calls, seconds = PREPARING[phase]
    chance = random.Random(11)

    def prepare(folder: Path) -> int:
        return main.main(["prepare", *source, f"--data_dir={folder}"])

    def contents(folder: Path) -> dict:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert prepare(tmp_path / "whole") == 0
    kills = 0
    for _ in range(max(2, KILLS // 10)):
        if (tmp_path / "data" / "seg_train").exists():
            shutil.rmtree(tmp_path / "data")
        work = lambda: prepare(tmp_path / "data")  # noqa: E731
        kills += killed(work, function, chance.randint(1, calls), chance.uniform(0.0001, seconds))
        assert not (tmp_path / "data" / "seg_train").exists() or (tmp_path / "data" / "seg_test").exists()
    if not (tmp_path / "data" / "seg_train").exists():
        assert prepare(tmp_path / "data") == 0
    print(f"{kills} kills while {phase}")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
