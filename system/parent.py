"""A process that this program starts for its own work ends with it, also if it is killed and can hand on no signal.

Imports nothing but the standard library. Knows nothing of the work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

PARENT = "AMP_TRAIN_PARENT"  # the variable that tells a process whose child it is
PAUSE = 0.5  # seconds between two looks


def environment_of_child() -> dict[str, str]:
    """The environment in which `end_with_parent` watches this process."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Sends this process a SIGTERM, on which a training saves and ends, once the process that started it is gone.

    Does nothing in a process that the user started, and on Windows, where a process cannot see its parent end.
    """
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal() and os.name != "nt":
        with contextlib.suppress(RuntimeError):  # of a process that may start no thread
            threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    nearest = os.getppid()  # another one if a wrapper of the interpreter stands between, or if the parent is gone
    while os.getppid() == nearest and (nearest == parent or _is_there(parent)):
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
