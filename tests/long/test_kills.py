"""kill -9 at random moments of every phase: nothing is lost, and the end equals the undisturbed one.

Each attempt is a fork of this process, so that hundreds take minutes: FAULT_KILLS=200 pytest tests/long/test_kills.py
"""

import collections
import contextlib
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

import pytest
import tiny
from tiny import assert_equal, outcome

import main
from commands import compare
from reports import pictures
from system.files import lock

PATIENCE = 30.0  # seconds
KILLS = int(os.environ.get("FAULT_KILLS", "14"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def patched(name: str):
    """Return the owner and the name of a function given as module:path."""
    module, _, path = name.partition(":")
    owner = __import__(module, fromlist=["x"])
    *between, last = path.split(".")
    for part in between:
        owner = getattr(owner, part)
    return owner, last


def killed(work, phase: str, calls: int, delay: float) -> bool:
    """Run `work` in a fork that is killed `delay` seconds after the n-th call of the phase's function.

    False if the work was done before. A fork that hangs fails the test, with where each of its threads stood.
    """
    trace = tempfile.TemporaryFile()  # noqa: SIM115 (both processes have it)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.register(signal.SIGQUIT, trace, all_threads=True)
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
    until = time.monotonic() + PATIENCE
    done = 0
    while not done and time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not done:
        os.kill(pid, signal.SIGQUIT)
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with trace:
        trace.seek(0)
        assert done, f"{phase}: neither killed nor done after {PATIENCE:.0f} s\n{trace.read().decode()}"
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (phase, os.WEXITSTATUS(status))
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGALRM, (phase, os.WTERMSIG(status))
    return os.WIFSIGNALED(status)


TRAINING = {  # phase: its function, the most calls to it, seconds that it takes
    "decoding": ("images.cache:_decode_all", 2, 0.05),
    "epoch": ("train:update_weights", 9, 0.1),
    "save": ("runs.folder:write_checkpoints", 4, 0.05),
    "validation": ("train:Trainer._validate", 3, 0.1),
    "test": ("commands.train:finish", 1, 0.2),
    "pictures": ("reports.pictures:learning_curve", 1, 0.8),
}


def test_training_killed_in_every_phase(tmp_path):
    data = tiny.draw(tmp_path / "data")
    options = ["--epochs=3", "--checkpoint_every=1u"]
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
        with tiny.drawing() if phase == "pictures" else contextlib.nullcontext():
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
    """Install a kagglehub that unpacks an archive into its own cache until it is killed."""

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


def test_preparing_killed_while_it_marks_its_work_as_whole(tmp_path):
    """The mark was opened, but nothing is written in it yet."""
    archive = archived(tiny.draw(tmp_path / "source", train=60, test=12), tmp_path / "a.zip")
    partial = tmp_path / "data" / ".partial"
    shutil.copytree(tmp_path / "source", partial)
    (partial / ".complete").touch()
    assert main.main(["prepare", f"--archive={archive}", f"--data_dir={tmp_path / 'data'}"]) == 0
    assert not partial.exists()
    for name in ("seg_train", "seg_test"):
        found, drawn = (sorted((tmp_path / folder / name).rglob("*.png")) for folder in ("data", "source"))
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path in drawn] and found


# --------------------------------------------------------------------- commands that start trainings
COMMANDS = {"compare": ["--precisions=fp32,amp-bf16"], "audit": ["--folds=2"]}
BETWEEN = {
    "planning": ("commands.compare:_state", 2, 0.02),
    "between two runs": ("commands.compare:_train", 2, 0.02),
    "run": ("train:update_weights", 14, 0.1),
    "table": ("system.files:atomic_write", 3, 0.01),
}


@contextlib.contextmanager
def trainings_in_this_process():
    """Run the trainings that a command starts in this process."""

    def process(words, _):
        return main.main(["train", *words])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_process", process)
        patch.setattr(pictures, "labelled_sheet", lambda *_, **__: None)
        yield


def several(command: str, data: Path, runs: Path) -> int:
    with trainings_in_this_process():
        return main.main([command, *tiny.words(data, runs, *COMMANDS[command], name="all")[1:]])


def of_all(folder: Path) -> dict:
    """Return the outcome of each run below a folder."""
    return {
        f"{result.parent.name}{path}": value
        for result in sorted(folder.glob("*/result.json"))
        for path, value in outcome(result.parent).items()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_several_runs_killed_at_any_moment(command, tmp_path):
    data = tiny.draw(tmp_path / "data")
    assert several(command, data, tmp_path / "whole") == 0
    whole = of_all(tmp_path / "whole" / "all")
    chance = random.Random(13)
    count = collections.Counter()
    for attempt in range(max(len(BETWEEN), KILLS // 2)):
        phase = list(BETWEEN)[attempt % len(BETWEEN)]
        function, calls, seconds = BETWEEN[phase]
        if len(of_all(tmp_path / "killed" / "all")) == len(whole):
            shutil.rmtree(tmp_path / "killed")
        moment = chance.randint(1, calls), chance.uniform(0.0005, seconds)
        count[phase] += killed(lambda: several(command, data, tmp_path / "killed"), function, *moment)
    assert several(command, data, tmp_path / "killed") == 0
    print(f"{count.total()} kills: {dict(count)}")
    assert count.total() >= 3
    assert_equal(whole, of_all(tmp_path / "killed" / "all"))


def in_use(run: Path) -> bool:
    """Whether a process holds the lock of a run."""
    with open(run / "lock") as file:
        return not lock(file)


def test_a_training_ends_with_the_comparison_that_started_it(tmp_path, monkeypatch):
    data = tiny.draw(tmp_path / "data")
    options = ["--model=squeezenet1_1", "--epochs=30", "--checkpoint_every=1u"]  # known to a process of its own, too
    words = ["compare", *tiny.words(data, tmp_path, *options, "--precisions=fp32", name="all")[1:]]
    run = tmp_path / "all" / "fp32"
    parent = os.fork()
    if parent == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main.main(words))
    until = time.monotonic() + 60
    while not (run / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 20
    while in_use(run) and time.monotonic() < until:
        time.sleep(0.05)
    assert not in_use(run) and not (run / "result.json").exists()
    metrics = run / "metrics.jsonl"  # none is there before the first epoch ends
    assert not metrics.exists() or len(metrics.read_text().splitlines()) < 30
    assert tiny.train(data, tmp_path, *options, name="alone") == 0
    with trainings_in_this_process():
        assert main.main(words) == 0
    assert_equal(outcome(tmp_path / "alone"), outcome(run))
