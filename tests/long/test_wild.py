"""The program where it is used: behind pipes, under schedulers, in containers, with odd environments and little of all.

Real processes, pipes, signals, limits and mounts. A test that needs root, or a program that is not installed, is
skipped without it. Run it alone: pytest tests/long/test_wild.py
"""

import dataclasses
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
import torch
from PIL import Image

import main
import train as training
import utils
from runs.checkpoint import load_checkpoint
from system import progress

linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")


def launch(words, shell: str = '"$@"', *, python=(), without=(), **variables: str) -> subprocess.Popen:
    """Starts the program from a shell that does `shell` with it, in a changed environment."""
    environment = {name: value for name, value in tiny.environment().items() if name not in without} | variables
    command = ["bash", "-c", shell, "bash", sys.executable, *python, str(tiny.ROOT / "main.py"), *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        env=environment,
        start_new_session=True,
        preexec_fn=heed_hangups,
    )


def heed_hangups() -> None:
    """The tests may themselves run under nohup, which their processes would inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def loud(data, runs, *more, **options) -> list[str]:
    return [word for word in tiny.words(data, runs, *more, **options) if word != "--quiet"]


def ended(process, seconds: float = 180) -> tuple[int, str, str]:
    status, out, err = tiny.finish(process, seconds)
    assert "Traceback" not in out + err and "Exception ignored" not in err, err
    return status, out, err


def has_result(runs, name="run") -> bool:
    return (runs / name / "result.json").exists()


# ----------------------------------------------------------------------------------- output
def test_lines_come_when_they_happen(data, tmp_path):
    """Off a terminal, too, each epoch is said while the next one runs, and how long the rest will take."""
    process = launch(loud(data, tmp_path, "--epochs=10000"))
    line = next(line for line in process.stdout if line.startswith("epoch"))
    assert process.poll() is None and line.rstrip().endswith(" left")
    process.terminate()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def test_a_comparison_speaks_in_order(data, tmp_path):
    words = loud(data, tmp_path, "--precisions=fp32,amp-bf16", "--epochs=1", "--learning_rate=1e-3", name="both")
    status, out, err = ended(launch(["compare", *words[1:]]))
    assert status == 0, err
    said = [line for line in out.splitlines() if line.startswith(("run ", "epoch ", "Test acc"))]
    assert [line[:5] for line in said] == ["run 1", "epoch", "Test ", "run 2", "epoch", "Test "]


@pytest.mark.parametrize(
    "shell, status, named",
    [
        ('"$@" | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}', 0, ""),
        ('"$@" 2>&1 > /dev/full', 1, "error: the output is not complete: No space left on device."),
        ('"$@" <&- >&- 2>&-', 0, ""),
    ],
    ids=["reader goes away", "full disk", "closed"],
)
def test_no_reader_ends_no_training(shell, status, named, data, tmp_path):
    found, out, err = ended(launch(loud(data, tmp_path, "--epochs=1"), shell))
    assert (found, named in out + err) == (status, True) and has_result(tmp_path), out + err


# ---------------------------------------------------------------------------------- signals
NUMBERS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_signal_that_means_stop_saves(number, data, tmp_path):
    more = ["--cache=none", "--num_workers=1"] if number == signal.SIGUSR1 else []
    process = launch(loud(data, tmp_path, "--epochs=10000", *more), 'exec "$@"')
    tiny.wait_for((tmp_path / "run" / "last.pt").exists, process)
    os.killpg(process.pid, number)  # as schedulers send it: to the loading workers, too
    status, _, err = ended(process)
    assert status == 128 + number and "Go on with the same command and --resume" in err
    load_checkpoint(tmp_path / "run" / "last.pt")


def test_nohup_still_ignores_hangups(data, tmp_path):
    process = launch(loud(data, tmp_path, "--epochs=10000"), "trap '' HUP; exec \"$@\"")
    tiny.wait_for((tmp_path / "run" / "last.pt").exists, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert ended(process)[0] == 143


def test_a_signal_before_the_training(data, tmp_path):
    """While images are decoded, say: nothing to save, but no default that kills without a word."""
    process = launch(loud(data, tmp_path / "x"), 'exec "$@"')
    line = process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    status, _, err = ended(process)
    assert status == 128 + signal.SIGUSR1 and "--resume" in err, line


def test_max_time_stops_and_saves(data, tmp_path):
    """However short it is, what was begun is saved."""
    status, _, err = ended(launch(loud(data, tmp_path, "--epochs=10000", "--max_time=1s")))
    assert status == 124 and "--max_time is up: stopped in epoch 1 after update 1" in err and "--resume" in err
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
    words = [str(word) for word in tiny.words(data, tmp_path, "--epochs=6", "--checkpoint_every=1u")]
    assert tiny.train(data, tmp_path, "--epochs=6", name="undisturbed") == 0
    environment = tiny.environment(
        PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", SLURM_JOB_ID="7", PYTHONPATH=str(tiny.ROOT)
    )
    starts = 0
    while not has_result(tmp_path):
        starts += 1
        assert starts < 6
        job = subprocess.Popen(
            ["bash", str(tiny.ROOT / "docs" / "slurm.sh"), *words[1:]], cwd=tiny.ROOT, env=environment, stderr=-1
        )
        if starts <= 2:
            file = tmp_path / "run" / "last.pt"
            before = file.stat().st_mtime_ns if file.exists() else 0
            until = time.monotonic() + 60
            while time.monotonic() < until and (not file.exists() or file.stat().st_mtime_ns == before):
                time.sleep(0.01)
            job.send_signal(signal.SIGUSR1)  # --signal=B:USR1@120
        job.communicate(timeout=120)
    assert starts > 1 and (tmp_path / "requeued").read_text() == "requeue 7\n" * (starts - 1)
    tiny.assert_equal(tiny.outcome(tmp_path / "undisturbed"), tiny.outcome(tmp_path / "run"))


# ------------------------------------------------------------------------ what the machine gives
def large_images(folder: Path) -> Path:
    numbers = np.random.default_rng(0)
    for part, count in (("train", 36), ("test", 6)):
        for position in range(count):
            place = folder / part / "abc"[position % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 256, (128, 128, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{position}.jpg")
    return folder


def can_mount() -> bool:
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


@linux
@pytest.mark.parametrize(
    "limit",
    ["unshare -m bash -c 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec \"$@\"' bash", "ulimit -n 40;"],
    ids=["shared memory", "open files"],
)
def test_little_shared_memory_and_few_files_slow_streaming_alone(limit, tmp_path):
    if "mount" in limit and not can_mount():
        pytest.skip("this process may not mount")
    folder = large_images(tmp_path / "data")
    words = loud(folder, tmp_path, "--cache=none", "--num_workers=2", "--epochs=1", "--image_size=128")
    status, out, err = ended(launch(words, f'{limit} "$@"'))
    assert status == 0, err
    assert ("come through pipes" in " ".join(out.split())) == ("mount" in limit), out


@linux
def test_no_shared_memory_at_all(tmp_path):
    if not can_mount():
        pytest.skip("this process may not mount")
    folder = large_images(tmp_path / "data")
    words = loud(folder, tmp_path, "--cache=none", "--num_workers=2", "--epochs=1", "--image_size=128")
    mount = "mount -t tmpfs -o ro,size=1m tmpfs /dev/shm"
    status, out, err = ended(launch(words, f'unshare -m bash -c \'{mount}; exec "$@"\' bash "$@"'))
    assert status == 0 and "no worker processes" in out, out + err


# ------------------------------------------------------------------------- odd environments
EMPTY = dict.fromkeys(
    (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "COLUMNS",
        "XDG_CACHE_HOME",
        "TMPDIR",
        "MPLBACKEND",
        "LANG",
        "OMP_NUM_THREADS",
    ),
    "",
)


@pytest.mark.parametrize(
    "options",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "python": ["-O"], "RANK": "3"},
        {"LC_ALL": "C", "python": ["-W", "error"], "TERM": "dumb", "COLUMNS": "40", "shell": 'umask 077; "$@"'},
        {"without": ["HOME", "LANG"], "PYTHONWARNINGS": "error", "TMPDIR": "/proc"},
        EMPTY,
    ],
    ids=["a notebook's", "C, warnings", "no home", "empty"],
)
def test_odd_environments_make_no_difference(options, data, tmp_path):
    options = {"shell": '"$@"'} | options
    status, out, err = ended(launch(loud(data, tmp_path, "--epochs=1"), options.pop("shell"), **options))
    assert (status, err) == (0, "") and "epoch   1/1" in out
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "learning_curve.png").exists()


@pytest.fixture
def open_folder():
    """A folder that every user may enter: pytest closes its own, and those above, whenever another pytest starts."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@linux
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_home_that_one_may_not_enter(cache, open_folder):
    """With data that one may not write either: the cache is a temporary one, and nothing is called damaged."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root to become another user")
    data = tiny.draw(open_folder / "data")
    home = open_folder / "home"
    home.mkdir(mode=0o700)
    runs = open_folder / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    words = loud(data, runs, "--epochs=1", f"--cache={cache}", "--num_workers=0")
    become = "setpriv --reuid=4711 --regid=4711 --clear-groups"  # no passwd entry either
    code = f"import os, numpy, torch; open({str(tiny.ROOT / 'main.py')!r}); os.listdir({str(runs)!r})"
    if subprocess.run([*become.split(), sys.executable, "-c", code], capture_output=True).returncode:
        pytest.skip("another user cannot read this checkout, these packages or the temporary folder")
    status, out, err = ended(launch(words, f'{become} "$@"', HOME=str(home)))
    assert status == 0 and "damaged" not in out + err, out + err
    assert cache == "none" or "decoded into" in out


def test_files_from_the_future(data, tmp_path):
    for path in (*tiny.images(data), data):
        os.utime(path, (2**32, 2**32))
    assert tiny.train(data, tmp_path) == 0


def test_a_clock_that_is_set_back(data, tmp_path, monkeypatch):
    """An hour back in the middle of the training, and the files' times with it."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    update_weights = training.update_weights
    day = time.time
    back = []

    def slowly(*positional, **options):
        time.sleep(0.15)
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
    assert all(0.45 < line["seconds"] < 60 and 0 <= line["data_wait_share"] <= 1 for line in lines)
    elapsed = [0.0, *(line["elapsed"] for line in lines)]
    assert all(0.45 < later - earlier < 60 for earlier, later in itertools.pairwise(elapsed))
    assert 1.3 < json.loads((tmp_path / "run" / "result.json").read_text())["total_seconds"] < 180
    assert main.main([*words, "--resume"]) == 0  # the cache of images is still theirs


# ------------------------------------------------------------------------------ paths, configs
def test_home_and_variables_in_every_path(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(data))
    odd = "odd $name, ünï"
    words = tiny.words("$DATA", "~/runs", "--epochs=1", name=odd)
    assert main.main(words) == 0
    run = tmp_path / "runs" / odd
    assert (run / "result.json").exists()
    config = tiny.config(run)
    config["options"] |= {"data_dir": "${DATA}", "epochs": 1}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert main.main(["--config=~/mine.json", "--checkpoint_dir=~/runs", "--checkpoint_name=again"]) == 0
    assert (tmp_path / "runs" / "again" / "result.json").exists()
    named = ["--checkpoint_dir=~/runs", "--checkpoint_name=again"]
    assert main.main(["predict", *named, "$DATA/seg_test", "--csv=~/p.csv", "--contact_sheet=$HOME/s.png"]) == 0
    assert (tmp_path / "p.csv").exists() and (tmp_path / "s.png").exists()


def test_a_path_that_exists_under_just_this_name_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("x", "elsewhere")
    tiny.draw(tmp_path / "$x")
    assert main.main(["prepare", "--check", "--data_dir=$x"]) == 0


@pytest.mark.parametrize("option", ["--data_dir=", "--checkpoint_dir= ", "--config="])
def test_an_empty_path_is_a_mistake(option, capsys):
    assert main.main(["train", option]) == 2
    assert "is empty" in capsys.readouterr().err


SAVED = {
    "a mark in front": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "returns": lambda text: text.replace("\n", "\r\n").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Windows-1252": lambda text: text.encode("cp1252"),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_config_saved_by_any_editor(how, data, tmp_path, capsys):
    folder = tmp_path / "Bilder für später"
    shutil.copytree(data, folder)
    text = json.dumps({"options": {"data_dir": str(folder), "epochs": 1}}, indent=1, ensure_ascii=False)
    (tmp_path / "config.json").write_bytes(SAVED[how](text))
    words = [word for word in loud(data, tmp_path) if not word.startswith(("--data_dir", "--epochs"))]
    assert main.main([*words, f"--config={tmp_path / 'config.json'}"]) == 0
    assert ("read as Windows-1252" in capsys.readouterr().out) == (how == "Windows-1252")
    assert tiny.config(tmp_path / "run")["options"]["data_dir"] == str(folder)


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"options": {\n  "epochs": 3,\n}}', "line 3"),
        ('{"options": {\n  “epochs”: 3}}', "line 2"),
        ('{"options": {"data_dir": "C:\\data"}}', "line 1"),
    ],
    ids=["a comma too many", "curly quotes", "backslashes"],
)
def test_a_config_with_a_slip_names_its_line(text, named, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main.main(["train", f"--config={tmp_path / 'config.json'}"]) == 2
    said = capsys.readouterr().err
    assert named in said and "straight double quotes" in said


# ----------------------------------------------------------------- a validation that overflows
def overflowing(monkeypatch, epoch: int, precision: str = "amp-fp16") -> None:
    """Validations from the given epoch on give no finite loss in one precision."""
    original = training.Trainer._validate

    def validate(self):
        found = original(self)
        if self.progress.epoch + 1 >= epoch and self.precision.name == precision:
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
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training.Trainer, "_validate", fail)
    assert tiny.train(data, tmp_path) == 1
    state = load_checkpoint(tmp_path / "run" / "last.pt")["progress"]
    assert (state["epoch"], state["update"]) == (0, 3)


# ---------------------------------------------------------------------------- results first
def test_pictures_that_fail_cost_no_results(data, tmp_path, monkeypatch, capsys):
    from reports import pictures

    def fail(*_, **__):
        raise RuntimeError("no fonts here")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "learning_curve", fail)
        assert tiny.train(data, tmp_path) == 1
    said = capsys.readouterr()
    assert "the pictures could not be drawn (RuntimeError: no fonts here)" in said.err and "Test accuracy" in said.out
    run = tmp_path / "run"
    assert has_result(tmp_path) and (run / "predictions.csv").exists() and not (run / "failure.json").exists()
    command = said.err.partition("python main.py ")[2].split()
    assert main.main(command) == 0
    assert (run / "learning_curve.png").exists() and (run / "report.html").exists()
    shutil.rmtree(data / "seg_test")  # from the run's files alone
    (run / "report.html").unlink()
    try:
        assert main.main(command) == 0 and (run / "report.html").exists()
    finally:
        tiny.draw(data)


def test_a_first_picture_that_fails_stops_no_training(data, tmp_path, monkeypatch, caplog):
    from reports import pictures

    def fail(*_, **__):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(pictures, "batch", fail)
    assert tiny.train(data, tmp_path) == 0
    assert "no batch.png: RuntimeError: no fonts here" in caplog.text and has_result(tmp_path)


@pytest.mark.parametrize("module", ["commands.train", "commands.evaluate", "commands.predict"])
def test_no_start_waits_for_pictures_or_statistics(module):
    code = f"import sys, {module}; print({{'matplotlib', 'scipy', 'sklearn'}} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_report_of_what_is_no_run(tmp_path, capsys):
    assert main.main(["report", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=x"]) == 2
    assert "No run there is finished" in capsys.readouterr().err


# ------------------------------------------------------------------------------ exit statuses
@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, runs) == 0
    return runs


def test_predict_says_that_some_files_could_not_be_read(finished, data, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    words = [f"--checkpoint_dir={finished}", "--checkpoint_name=run", f"--csv={tmp_path / 'p.csv'}"]
    assert main.main(["predict", *words, str(data / "seg_test"), str(tmp_path / "bad.png")]) == 1
    said = capsys.readouterr()
    assert "1 of 7 files could not be read" in said.err and "6 images" in said.out
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_predict_leaves_what_it_has(number, finished, data, tmp_path, monkeypatch, capsys):
    from commands import predict

    calls = []
    original = predict.probabilities

    def stop_at_the_third(logits):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(logits)

    monkeypatch.setattr(predict, "probabilities", stop_at_the_third)
    words = [f"--checkpoint_dir={finished}", "--checkpoint_name=run", "--batch_size=2", f"--json={tmp_path / 'p.json'}"]
    assert main.main(["predict", *words, str(data / "seg_train")]) == 128 + number
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped after 4 predictions, which are in {tmp_path / 'p.json'}" in said
    assert len(json.loads((tmp_path / "p.json").read_text())) == 4


def test_check_says_that_some_images_cannot_be_read(tmp_path, capsys):
    own = tiny.draw(tmp_path / "data")
    tiny.images(own)[0].write_bytes(b"\x89PNG")
    assert main.main(["prepare", "--check", f"--data_dir={own}"]) == 1
    said = capsys.readouterr()
    assert "1 image cannot be read" in said.err and "unreadable files: 1" in said.out


def test_a_comparison_of_which_one_run_failed(data, tmp_path):
    words = tiny.words(data, tmp_path, "--precisions=fp32,tf32", "--epochs=1", "--learning_rate=1e-3", name="both")
    status, out, err = ended(launch(["compare", *words[1:]]))
    assert status == 1 and "not all runs finished" in err and "tf32" in err and "FP32" in out
    assert (tmp_path / "both" / "comparison.json").exists() and has_result(tmp_path / "both", "fp32")
