"""The streams of this process: every line leaves when it is written, and no reader that goes away ends the work.

Imports nothing but the standard library. Knows nothing of what is printed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any


class _Stream(io.RawIOBase):
    """A file descriptor that takes every byte, even if nobody reads them any more or its disk is full.

    A pipe whose reader went away must not end a training; what else cannot be written is kept in `lost`.
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
            except BlockingIOError:  # whoever shares the pipe made it non-blocking
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
    """Makes sys.stdout and sys.stderr write each line at once and outlive their readers.

    Returns a function that says, at the end, why the output is incomplete; None if it is not. A stream that was closed
    before the start becomes the null device, so that no file of the program's own takes its number.
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
            errors="backslashreplace",  # names of files may hold what the terminal cannot show
            line_buffering=True,
        )
        setattr(sys, name, text)

    def lost() -> OSError | None:
        sys.stdout.flush()
        return raw[0].lost

    return lost


def duration(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"
