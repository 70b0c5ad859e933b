"""Let a child process of this program end with it, even if this program is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "AMP_TRAIN_PARENT"  # environment variable with the process id of the parent
ESTIMATES = "AMP_TRAIN_ESTIMATES"  # set if the parent estimates the time of all its children
DRAWS = "AMP_TRAIN_DRAWS"  # set if the parent also draws the progress of this process
PR_SET_PDEATHSIG = 1


def environment_of_child(*, draws: bool = False) -> dict[str, str]:
    """Return an environment that lets `end_with_parent` tie a child process to this one, which estimates or draws."""
    return {**os.environ, PARENT: str(os.getpid()), ESTIMATES: "1", DRAWS: "1" if draws else ""}


def estimates() -> bool:
    """Return True if the process that started this one says how long it takes."""
    return bool(os.environ.get(ESTIMATES))


def draws() -> bool:
    """Return True if the process that started this one draws its progress."""
    return bool(os.environ.get(DRAWS))


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM, on which a training saves and ends, when the process that started this one ends.

    Do nothing in a process that the user started, and on other systems.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        os.kill(int(parent), 0)  # only checks that the process exists
    except ProcessLookupError:  # the parent ended before prctl was called
        os.kill(os.getpid(), signal.SIGTERM)
