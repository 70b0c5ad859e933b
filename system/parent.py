"""Let a process that this program starts for its own work end with it, also if it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "AMP_TRAIN_PARENT"  # the variable that tells a process who started it
PR_SET_PDEATHSIG = 1


def environment_of_child() -> dict[str, str]:
    """Return an environment in which `end_with_parent` ties a process to this one."""
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
        os.kill(int(parent), 0)  # sends nothing
    except ProcessLookupError:  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)
