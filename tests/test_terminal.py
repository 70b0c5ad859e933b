"""Progress in lines, bars, durations and broken lines; streams of real processes: tests/long/test_streams.py."""

import io
import sys
import time

import pytest

import utils
from system import progress, terminal


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
