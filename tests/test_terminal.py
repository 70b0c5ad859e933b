"""Bars, durations and broken lines; streams of real processes: tests/long/test_streams.py."""

import io
import sys
import time

import pytest

import utils
from system import progress, terminal


def test_links_are_for_terminals_that_show_them(monkeypatch, tmp_path):
    for name in ("VTE_VERSION", "KITTY_WINDOW_ID", "WT_SESSION", "KONSOLE_VERSION", "DOMTERM", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "a page.html"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.linked("here", file) == "here"
    monkeypatch.setenv("TERM_PROGRAM", "vscode")
    assert terminal.linked("here", file) == f"\x1b]8;;{file.as_uri()}\x1b\\here\x1b]8;;\x1b\\"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert terminal.linked("here", file) == "here"


def test_one_bar_over_all_runs(capsys):
    block = progress.Block(4)
    lines = []
    block._bar.refresh = lambda *_, **__: lines.append(str(block._bar))
    for number, name, first in ((1, "fp32", 1), (2, "amp-bf16", 2)):  # the second goes on after its first epoch
        block.begin(f"run {number} of 2: {name}")
        for record in (f"epoch {first}/3", f"epoch {first + 1}/3"):
            block.follow([f"{progress.RECORD}30/40 {record}\n", "warning: a word\n"])
        block.end(2)
    assert lines[0].startswith("run 1 of 2: fp32, starting   0%|")
    assert [line.partition("|")[0] for line in lines if "amp-bf16, epoch" in line] == [
        "run 2 of 2: amp-bf16, epoch 2/3  69%",
        "run 2 of 2: amp-bf16, epoch 3/3  94%",
    ]
    assert lines[-1].endswith(" left for all") and block._bar.n == 4
    block.close()
    assert capsys.readouterr().out == "warning: a word\n", "once for all runs"


def test_what_another_process_draws_is_a_record(monkeypatch, capsys):
    monkeypatch.setenv("AMP_TRAIN_DRAWS", "1")
    with utils.progress_bar(total=40, desc="epoch 1/3", unit="image") as bar:
        bar.update(40)
        bar.refresh()
    assert capsys.readouterr().out.split("\n")[-2] == f"{progress.RECORD}40/40 epoch 1/3"


def test_within_a_comparison_lines_have_no_estimate_of_their_own(monkeypatch):
    monkeypatch.setenv("AMP_TRAIN_ESTIMATES", "1")
    with progress.Lines(total=400, say=print) as bar:
        time.sleep(0.01)
        bar.update(100)
        assert "images/s" not in bar._line() and "it" in bar._line() and "left" not in bar._line()


def test_short_work_says_nothing():
    said = []
    for _ in progress.Lines(range(1000), say=said.append):
        pass
    assert said == []


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (5460, "1 h 31 min"), (180000, "50 h 00 min")],
)
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words


def test_bars_are_for_terminals_and_the_first_rank(monkeypatch):
    """And not for --quiet; they have no colours, whatever NO_COLOR says."""
    from system.progress import Lines
    from utils import progress_bar

    utils.start_logging(quiet=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress_bar(total=1) as lines:
        assert isinstance(lines, Lines) and not lines.disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(total=1)
    assert not bar.disable and bar.colour is None and not isinstance(bar, Lines)
    bar.close()
    monkeypatch.setenv("TERM", "dumb")
    with progress_bar(total=1) as lines:
        assert isinstance(lines, Lines)
    monkeypatch.setenv("TERM", "xterm")
    utils.start_logging(quiet=True)
    assert progress_bar(total=1).disable
    utils.start_logging(quiet=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert progress_bar(total=1).disable


def test_long_lines_are_broken_between_words_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        isatty = staticmethod(lambda: True)

    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/without/any/space/in/it/that/is/longer/than/forty/columns.pt"
    text = f"a short  line\nwords, many of them, and then the file {path} cannot be read"
    lines = utils.wrapped(text, Terminal()).split("\n")
    assert lines[0] == "a short  line" and f"  {path}" in lines
    assert all(len(line) <= 40 for line in lines if path not in line)
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert utils.wrapped(text, io.StringIO()) == text
