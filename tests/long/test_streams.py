"""Streams of real processes: pipes, full and closed files; and what is said while time passes."""

import os
import subprocess
import sys
import time

import pytest
import tiny
from tiny import ROOT

from system import progress

SPEAKER = """
import os, sys, time
from system import terminal
lost = terminal.open_streams()
for number in range(int(sys.argv[1])):
    print("line", number, "\\u2026 \\udcff")
    print("error", number, file=sys.stderr)
    time.sleep(float(sys.argv[2]))
reason = lost()
with open(sys.argv[3], "w") as file:
    file.write(f"{reason and reason.errno} {sorted(map(int, os.listdir('/dev/fd')))[:3]}")
"""


def speaker(number: int, pause: float, note, *, shell: str = '"$@"', **options) -> subprocess.Popen:
    words = [sys.executable, "-c", SPEAKER, str(number), str(pause), str(note)]
    return subprocess.Popen(["bash", "-c", shell, "bash", *words], cwd=ROOT, text=True, stdout=-1, stderr=-1, **options)


def test_each_line_leaves_when_it_is_written(tmp_path):
    process = speaker(3, 0.5, tmp_path / "note")
    times = []
    for line in process.stdout:
        times.append(time.monotonic())
        assert line.startswith("line")
    assert times[2] - times[0] > 0.7
    assert process.wait(10) == 0


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    process = speaker(1, 0, tmp_path / "note", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, _ = process.communicate(timeout=20)
    assert "\\udcff" in out and process.returncode == 0


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path):
    """As Node and some terminals leave it: a write that does not fit is refused, not waited for."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    words = [sys.executable, "-c", SPEAKER, "10000", "0", str(tmp_path / "note")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    time.sleep(1)
    with open(reading, encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) == 10000 and process.wait(10) == 0


def test_progress_is_said_although_nothing_moves(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 1.2)
    said = []
    with progress.Lines(total=400, desc="decoding", unit="image", initial=100, say=said.append):
        time.sleep(1.5)
    assert said and said[0] == "decoding 25 %"


def test_progress_of_unknown_length_and_of_bytes(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 1.01)
    said = []
    with progress.Lines(desc="unpacking", unit="B", unit_scale=True, say=said.append) as bar:
        for _ in range(5):
            time.sleep(0.3)
            bar.update(10**6)
    assert "unpacking" in said[0] and "MB/s" in said[0]


def test_progress_in_lines(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 1.1)
    said = []
    with progress.Lines(total=400, desc="epoch 3/9", unit="image", say=said.append) as bar:
        for _ in range(12):
            time.sleep(0.1)
            bar.update(30)
            bar.set_postfix({"loss": "1.5"}, refresh=False)
    assert 1 <= len(said) <= 2, said
    assert said[0].startswith("epoch 3/9 ") and "% , " not in said[0]
    assert all(word in said[0] for word in (" %, ", "images/s", " s left", "loss=1.5")), said


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert tiny.train(data, runs, "--cache=none", "--num_workers=2", "--epochs=1") == 0
    return tiny.outcome(runs / "run")


@pytest.mark.parametrize("closed", [[0], [2], [0, 1, 2]])
def test_closed_streams_change_no_file(data, tmp_path, closed, undisturbed):
    """As cron and daemons start programs: no file of the run, and no pipe of a worker, may get a stream's number."""
    words = tiny.words(data, tmp_path, "--cache=none", "--num_workers=2", "--epochs=1")
    status, out, err = tiny.finish(tiny.start(words, closed=closed), 60)
    assert status == 0, out + err
    tiny.assert_equal(tiny.outcome(tmp_path / "run"), undisturbed)
    assert (tmp_path / "run" / "lock").read_text().startswith("process ")
