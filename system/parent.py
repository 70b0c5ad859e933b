"""Let a child process of this program end with it, even if this program is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "AMP_TRAIN_PARENT"  # environment variable with the process id of the parent
PR_SET_PDEATHSIG = 1


def environment_of_child() -> dict[str, str]:
    """Return an environment that lets `end_with_parent` tie a child process to this one."""
    return {**os.environ, PARENT: str(os.getpid())}


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
