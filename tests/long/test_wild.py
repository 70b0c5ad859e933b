"""The program where it is used: behind pipes, under schedulers, in containers, with odd environments and little of all.

Real processes, pipes, signals, limits and mounts: forks, and a fresh `python main.py` where the start itself is tried.
A test that needs root, or a program that is not installed, is skipped without it.
Run it alone: pytest tests/long/test_wild.py
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import images.asked
import main
import train as training
import utils
from runs.checkpoint import load_checkpoint
from system import progress

linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")


def loud(data, runs, *more, **options) -> list[str]:
    return [word for word in tiny.words(data, runs, *more, **options) if word != "--quiet"]


def fresh(data, runs, *more, **options) -> list[str]:
    """Return the same for `python main.py`, which does not know the zoo's classifier."""
    return loud(data, runs, "--model=squeezenet1_1", *more, **options)


def launch(words, shell: str = '"$@"', *, python=(), without=(), **variables: str) -> subprocess.Popen:
    """Start `python main.py` from a shell with the command `shell`, in a changed environment."""
    environment = {name: value for name, value in tiny.environment().items() if name not in without} | variables
    command = ["bash", "-c", shell, "bash", sys.executable, *python, str(tiny.ROOT / "main.py"), *words]
    return subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, errors="backslashreplace", env=environment, start_new_session=True
    )


def ended(process, seconds: float = 180) -> tuple[int, str, str]:
    status, out, err = tiny.finish(process, seconds)
    assert "Traceback" not in out + err and "Exception ignored" not in err, err
    return status, out, err


def has_result(runs, name="run") -> bool:
    return (runs / name / "result.json").exists()


# ----------------------------------------------------------------------------------- output
def test_lines_come_when_they_happen(data, tmp_path):
    """Off a terminal, too, each epoch is said while the next one runs, and how long the rest will take."""
    with tiny.start(loud(data, tmp_path, "--epochs=10000")) as process:
        line = next(line for line in process.stdout if line.startswith("epoch"))
        assert process.poll() is None and line.rstrip().endswith(" left")


def test_a_comparison_speaks_in_order_also_of_the_run_that_failed(data, tmp_path):
    words = fresh(data, tmp_path, "--precisions=fp32,tf32", "--epochs=1", "--learning_rate=1e-3", name="both")
    status, out, err = ended(tiny.start(["compare", *words[1:]]))
    assert status == 1 and "not all runs finished" in err and "tf32" in err and "FP32" in out
    assert "TF32: failed: --tf32 is a mode of NVIDIA's Tensor Cores" in " ".join(out.split())
    said = [line for line in out.splitlines() if line.startswith(("run ", "epoch ", "Test acc"))]
    assert [line[:5] for line in said] == ["run 1", "epoch", "Test ", "run 2"]
    assert (tmp_path / "both" / "comparison.json").exists() and has_result(tmp_path / "both", "fp32")


def test_a_reader_that_goes_away_ends_no_training(data, tmp_path):
    process = tiny.start(loud(data, tmp_path))
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert ended(process)[::2] == (0, "") and has_result(tmp_path)


def test_a_full_disk_behind_the_output_ends_no_training(data, tmp_path):
    with open("/dev/full", "w") as full:
        status, _, err = ended(tiny.start(loud(data, tmp_path, "--epochs=1"), stdout=full))
    assert status == 1 and "error: the output is not complete: No space left on device." in err and has_result(tmp_path)


# ---------------------------------------------------------------------------------- signals
NUMBERS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
]


@pytest.fixture
def handlers():
    """Restore the handlers of all signals."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_signal_that_means_stop_asks_to_stop(number, handlers):
    with utils.StopSignal() as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked() and stop.stopped("").exit_status == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", NUMBERS[:2])
def test_a_signal_before_the_training_ends_it_in_words(number, handlers, data, tmp_path, monkeypatch, capsys):
    """While images are decoded, say: nothing to save, but no default that kills without a word."""
    monkeypatch.setattr(images.asked, "data_to_train_on", lambda *_, **__: signal.raise_signal(number))
    assert main.main(tiny.words(data, tmp_path)) == 128 + number
    assert "--resume" in capsys.readouterr().err


def test_nohup_still_ignores_hangups_and_hears_the_others(data, tmp_path):
    process = tiny.start(loud(data, tmp_path, "--epochs=10000"), ignored=[signal.SIGHUP])
    tiny.wait_for((tmp_path / "run" / "last.pt").exists, process)
    process.send_signal(signal.SIGHUP)
    seen = len(tiny.metrics(tmp_path / "run"))
    tiny.wait_for(lambda: len(tiny.metrics(tmp_path / "run")) > seen + 2, process)
    process.send_signal(signal.SIGUSR2)
    status, _, err = ended(process)
    assert status == 128 + signal.SIGUSR2 and "Go on with the same command and --resume" in err
    load_checkpoint(tmp_path / "run" / "last.pt")


def test_max_time_stops_and_saves(data, tmp_path, monkeypatch, capsys):
    """However short it is, what was begun is saved."""
    monkeypatch.setattr(utils, "STARTED", time.monotonic() - 2)
    assert tiny.train(data, tmp_path, "--epochs=10000", "--max_time=1s") == 124
    err = capsys.readouterr().err
    assert "--max_time is up: stopped in epoch 1 after update 1" in err and "--resume" in err
    load_checkpoint(tmp_path / "run" / "last.pt")


def test_max_time_leaves_time_to_save(monkeypatch):
    """Five percent of it, and twice the longest update: the clock is fabricated."""
    now = [utils.STARTED]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    with utils.StopSignal(100.0) as stop:
        while not stop.asked():
            now[0] += 4
    assert now[0] - utils.STARTED == pytest.approx(88)  # 12 left: 2 x 4 and 5
    assert stop.stopped("").exit_status == 124


def test_slurms_script_comes_to_the_same_end(data, tmp_path):
    """docs/slurm.sh under a stand-in for Slurm, which signals it, and starts it again when it is requeued."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    more = ["--model=squeezenet1_1", "--epochs=6", "--checkpoint_every=1u"]
    assert tiny.train(data, tmp_path, *more, name="undisturbed") == 0
    command = ["bash", str(tiny.ROOT / "docs" / "slurm.sh"), *tiny.words(data, tmp_path, *more)[1:]]
    environment = tiny.environment(PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", SLURM_JOB_ID="7")
    starts = 0
    while not has_result(tmp_path):
        starts += 1
        assert starts < 6
        job = subprocess.Popen(command, cwd=tiny.ROOT, env=environment, stderr=-1, text=True)
        if starts == 1:
            tiny.wait_for((tmp_path / "run" / "last.pt").exists, job)
            job.send_signal(signal.SIGUSR1)  # --signal=B:USR1@120
        tiny.finish(job)
    assert starts > 1 and (tmp_path / "requeued").read_text() == "requeue 7\n" * (starts - 1)
    tiny.assert_equal(tiny.outcome(tmp_path / "undisturbed"), tiny.outcome(tmp_path / "run"))


# ------------------------------------------------------------------------- odd environments
EMPTY = "WORLD_SIZE RANK LOCAL_RANK COLUMNS XDG_CACHE_HOME TMPDIR MPLBACKEND LANG OMP_NUM_THREADS"


@pytest.mark.parametrize(
    "options",
    [
        {
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "RANK": "3",
            "PYTHONWARNINGS": "error",
            "TMPDIR": "/proc",
            "COLUMNS": "40",
            "without": ["HOME", "LANG"],
            "python": ["-O"],
        },
        {
            **dict.fromkeys(EMPTY.split(), ""),
            "LC_ALL": "C",
            "TERM": "dumb",
            "python": ["-W", "error"],
            "shell": 'umask 077; "$@"',
        },
    ],
    ids=["no home, a notebook's", "empty, C, warnings"],
)
def test_odd_environments_make_no_difference(options, data, tmp_path):
    status, out, err = ended(launch(fresh(data, tmp_path, "--epochs=1"), **options))
    assert (status, err) == (0, "") and "epoch   1/1" in out
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "learning_curve.png").exists()


@pytest.fixture
def foreign():
    """Return a data set, a home and a folder for runs; another user may write only into the last.

    All may enter the folder that holds them: pytest closes its own, and those above, whenever another pytest starts.
    """
    if sys.platform != "linux" or os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root to become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    data = tiny.draw(folder / "data")
    home = folder / "home"
    home.mkdir(mode=0o700)
    runs = folder / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    needed = [sys.executable, tiny.ROOT / "main.py", np.__file__, training.torch.__file__, data]
    tests = [word for file in needed for word in ("-a", "-r", str(file))][1:]
    if subprocess.run([*BECOME, "test", *tests], capture_output=True).returncode:
        pytest.skip("another user cannot read this checkout, these packages or the temporary folder")
    yield data, runs, home
    shutil.rmtree(folder)


BECOME = ("setpriv", "--reuid=4711", "--regid=4711", "--clear-groups")  # no passwd entry either


def test_a_home_that_one_may_not_enter(foreign):
    """With data that one may not write either: images are kept in memory, and nothing is called damaged."""
    data, runs, home = foreign
    words = fresh(data, runs, "--epochs=1", "--cache=auto", "--num_workers=0")
    status, out, err = ended(launch(words, f'{" ".join(BECOME)} "$@"', HOME=str(home)))
    assert status == 0 and "damaged" not in out + err, out + err
    assert "decoded into" in out


@contextlib.contextmanager
def another_user():
    os.setresuid(4711, 4711, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_streamed_images_are_whole_for_a_user_without_a_home(foreign, monkeypatch, capsys):
    data, runs, home = foreign
    monkeypatch.setenv("HOME", str(home))
    with another_user():
        assert tiny.train(data, runs, "--cache=none", "--num_workers=0") == 0
    said = capsys.readouterr()
    assert "damaged" not in said.out + said.err and has_result(runs)


def test_files_from_the_future(data, tmp_path):
    for path in (*tiny.images(data), data):
        os.utime(path, (2**32, 2**32))
    assert tiny.train(data, tmp_path) == 0


def test_a_clock_that_is_set_back(data, tmp_path, monkeypatch):
    """An hour back in the middle of the training, and the files' times with it."""
    monkeypatch.setattr(progress, "EVERY", 0.02)
    update_weights = training.update_weights
    day = time.time
    back = []

    def slowly(*positional, **options):
        time.sleep(0.05)
        if len(back) == 4:
            for path in [data, tmp_path, *data.rglob("*"), *(tmp_path / "run").iterdir()]:
                state = path.stat()
                os.utime(path, (state.st_atime - 3600, state.st_mtime - 3600))
        back.append(3600 if len(back) >= 4 else 0)
        return update_weights(*positional, **options)

    monkeypatch.setattr(training, "update_weights", slowly)
    for owner, name in ((time, "time"), (sys.modules["tqdm.std"], "time")):
        monkeypatch.setattr(owner, name, lambda: day() - (back or [0])[-1])
    said = []
    monkeypatch.setattr(utils.log, "info", lambda text, *_: said.append(text))
    words = loud(data, tmp_path, "--epochs=3", "--log_interval=1")
    assert main.main(words) == 0
    rates = [line for line in said if "images/s" in line]
    assert len(rates) > 9 and not [line for line in said if re.search(r" -\d", line)]
    left = [int(found) for line in said for found in re.findall(r"(\d+) s left", line)]
    assert left and max(left) < 60
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.15 < line["seconds"] < 60 and 0 <= line["data_wait_share"] <= 1 for line in lines)
    elapsed = [0.0, *(line["elapsed"] for line in lines)]
    assert all(0.15 < later - earlier < 60 for earlier, later in itertools.pairwise(elapsed))
    assert 0.4 < json.loads((tmp_path / "run" / "result.json").read_text())["total_seconds"] < 180
    assert main.main([*words, "--resume"]) == 0  # the cache of images is still theirs
