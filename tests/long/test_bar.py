"""What a real terminal of 80 columns shows while a training runs."""

import contextlib
import re
import subprocess
import sys

import pytest
import tiny
from tiny import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_fits_80_columns(tmp_path):
    """What is left of the run, loss and accuracy stand in it whole."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    data = tiny.draw(tmp_path / "data")
    options = ("--model=squeezenet1_1", "--epochs=3", "--batch_size=2", "--log_interval=1", "--image_size=48")
    words = [word for word in tiny.words(data, tmp_path, *options) if word != "--quiet"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in tiny.environment().items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm", "TQDM_MININTERVAL": "0"}  # a fast machine would draw each bar only once, empty
    process = subprocess.Popen(
        [sys.executable, "main.py", *words], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while some := os.read(ours, 4096):
            shown += some
    os.close(ours)
    assert process.wait(60) == 0, shown
    bars = [line.rstrip() for line in re.split("[\r\n]", shown.decode()) if "run=" in line]
    assert bars and max(map(len, bars)) <= 80
    assert all(re.search(r"run=\S.* left, loss=[\d.]+, acc=[\d.]+%$", line) for line in bars), bars
