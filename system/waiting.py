"""Measure how long this process waited for busy processors: on a busy machine times are not comparable.

For each thread, Linux counts the time when it could run and no processor was free (sched-stats.txt of the kernel's
documentation, and proc_pid_stat(5)). Imports no torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

from system.machine import cores, cpu_quota

BUSY = 0.1  # above this share, a run's times are not comparable


@dataclass(frozen=True)
class _Counts:
    """Seconds since the start: of the clock, of each thread's waiting, of processor time of the process and of its
    loading workers, and of time that the host kept from a virtual machine that could run (per processor)."""

    clock: float
    waited: dict[str, float]
    own: float
    workers: float
    stolen: float


class Waiting:
    """The share of the time since its creation that this process lost to other processes."""

    def __init__(self, root: Path = Path("/")):
        self._root = root
        self._before = _counts(root)

    def share(self) -> float | None:
        """Return the share lost so far (0 to 1); None if the system does not report it.

        The thread that waited longest counts, because the others wait for it at the end of each parallel loop. A wait
        is not attributed to other processes if the process's own loading workers can have caused it, or if the process
        had all the processor time that it may have (more threads than cores, a container's quota).
        """
        before = self._before
        now = _counts(self._root)
        seconds = now.clock - before.clock
        if not now.waited or seconds <= 0:
            return None
        waited = max(total - before.waited.get(thread, 0.0) for thread, total in now.waited.items())
        workers = max(0.0, now.workers - before.workers)
        left_over = _processors(self._root) * seconds - (now.own - before.own) - workers
        lost = max(0.0, min(waited - workers, left_over)) + now.stolen - before.stolen
        return min(1.0, lost / seconds)


def _counts(root: Path) -> _Counts:
    threads = (root / "proc/self/task").glob("*/schedstat")
    children = os.times()
    live = [_processor_seconds(root / f"proc/{child.pid}/stat") for child in multiprocessing.active_children()]
    return _Counts(
        clock=time.perf_counter(),
        waited={file.parent.name: found for file in threads if (found := _waited(file)) is not None},
        own=time.process_time(),
        workers=children.children_user + children.children_system + sum(live),
        stolen=_stolen(root / "proc/stat"),
    )


def _processors(root: Path) -> float:
    """Return how many processors this process may use; the processes of a torchrun job share a machine's."""
    quota = cpu_quota(root)
    mine = cores(root) if quota is None else min(cores(root), quota)
    return mine / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _waited(file: Path) -> float | None:
    """Return the seconds in which a thread could run and did not; None if it ended or the kernel does not count."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(file.read_text().split()[1]) / 1e9
    return None


def _processor_seconds(file: Path) -> float:
    """Return the processor time of another process; 0 if it ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = file.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _stolen(file: Path) -> float:
    """Return the seconds per processor that the host kept from a virtual machine; 0 if it does not report them."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        total = file.read_text().split("\n", 1)[0].split()
        return int(total[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    return 0.0
