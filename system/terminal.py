"""Write each line to stdout and stderr at once, and continue if the reader goes away.

Imports only the standard library. Knows nothing of the content.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Stream(io.RawIOBase):
    """Write to a file descriptor; accept all bytes even if nobody reads them any more or its disk is full.

    A pipe without a reader must not end a training; any other error is kept in `lost`.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.lost: OSError | None = None
        self._dead = False

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        while rest.nbytes and not self._dead:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that shares the pipe made it non-blocking
                select.select([], [self._descriptor], [], 1)
            except OSError as error:
                self._dead = True
                gone = (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.EIO)  # EIO: a terminal that was closed
                self.lost = None if error.errno in gone else error
        return memoryview(content).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def open_streams() -> Callable[[], OSError | None]:
    """Make sys.stdout and sys.stderr write each line at once and outlive their readers.

    Return a function that returns, at the end, the error that made the output incomplete, or None. A stream that was
    closed before the start becomes the null device, so that no file of the program gets its descriptor.
    """
    raw = []
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if name == "stdin":
            continue
        former = getattr(sys, name)
        stream = _Stream(descriptor)
        raw.append(stream)
        text = io.TextIOWrapper(
            io.BufferedWriter(stream),
            encoding=getattr(former, "encoding", None) or "utf-8",
            errors="backslashreplace",  # file names may contain letters that the terminal cannot show
            line_buffering=True,
        )
        setattr(sys, name, text)

    def lost() -> OSError | None:
        sys.stdout.flush()
        return raw[0].lost

    return lost


def shows_links() -> bool:
    """Return True if standard output is a terminal that is known to show links (OSC 8)."""
    known = {"TERM_PROGRAM": ("iTerm.app", "WezTerm", "vscode", "ghostty", "Hyper"), "TERM": ("xterm-kitty", "foot")}
    named = any(os.environ.get(name) in values for name, values in known.items())
    own = ("VTE_VERSION", "KITTY_WINDOW_ID", "WT_SESSION", "KONSOLE_VERSION", "DOMTERM")
    return sys.stdout.isatty() and (named or any(os.environ.get(name) for name in own))


def linked(text: str, file: Path) -> str:
    """Return a text as a link to a file if the terminal shows links."""
    return f"\x1b]8;;{file.resolve().as_uri()}\x1b\\{text}\x1b]8;;\x1b\\" if shows_links() else text


def duration(seconds: float) -> str:
    """Return seconds in readable units: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"
