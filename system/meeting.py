"""Join and leave the process group of a torchrun job, and let one process report a failure.

Knows nothing of the work of the processes; a job of one process needs none of this.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, NoReturn

from distributed import Ranks
from system.machine import computing_cores
from utils import RunError, UserError, first_line, printable, wrapped

PATIENCE = timedelta(minutes=5)  # for processes that start later


def join(ranks: Ranks) -> None:
    """Join torchrun's process group if there is one: NCCL between CUDA devices, gloo between CPUs.

    Raise UserError if only a part of torchrun's environment is set, RunError if the processes cannot connect. Each
    restart by torchrun has its own part of the store, so that a process does not read keys of an earlier attempt.
    """
    if ranks.size == 1:
        return
    place = _meeting_place(ranks)

    def meet() -> None:
        import torch
        import torch.distributed as dist

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        own = dist.PrefixStore(f"amp-train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size)

    meeting = _in_thread(meet)
    wait([meeting], timeout=10)
    if not meeting.done() and ranks.local_rank == 0:
        print(f"waiting for other processes at {place} ...", file=sys.stderr, flush=True)
    error = meeting.exception()
    if error is not None:
        raise RunError(
            f"this process could not meet the others at {place} ({_reason(error)}).\nCheck that all of them were "
            "started, that host and port are those of the first machine, and that no firewall stands between."
        ) from None


def _meeting_place(ranks: Ranks) -> str:
    """Return HOST:PORT for the rendezvous. Raise UserError if a part of it is missing."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={ranks.size} is set, but not {', '.join(missing)}.\nStart the job with torchrun, or one "
            "process alone: unset WORLD_SIZE."
        )
    port = os.environ["MASTER_PORT"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={printable(port)} is not a port: it must be a number from 1 to 65535.")
    return f"{printable(os.environ['MASTER_ADDR'])}:{port}"


def leave(ranks: Ranks) -> None:
    """Leave the process group, after a failure was reported, so that other ranks do not report a lost connection."""
    if ranks.size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process; one of several skips Python's own shutdown after the exit handlers.

    Otherwise a thread of gloo, or one that Ctrl-C interrupted while it waited in C++ for other processes, would return
    into a Python that is shutting down and abort the process (SIGABRT, exit status 134 instead of 130).
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        gc.freeze()  # otherwise Python searches all objects of PyTorch once more, which takes a second
        sys.exit(status)
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads that write
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:  # also if a signal interrupts it, or standard output has no reader
        os._exit(status)


def share_cores(ranks: Ranks) -> None:
    """Let a CPU job compute with this process's share of the available cores.

    torchrun sets OMP_NUM_THREADS to 1 for several processes, which would leave cores idle. Any other value was set by
    the user and is kept.
    """
    import torch

    asked = os.environ.get("OMP_NUM_THREADS")
    if not asked or (asked == "1" and ranks.size > 1):
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, computing_cores() // beside))


def say_once(message: str, ranks: Ranks) -> None:
    """Print to stderr; of several processes only the first one to fail prints, so that only its reason is shown."""

    def count() -> int:
        import torch.distributed as dist

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"amp-train/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1)

    if ranks.size > 1:
        failures = _in_thread(count)  # another program at this port may never answer
        wait([failures], timeout=6)
        if failures.done() and not failures.exception() and failures.result() > 1:
            return
    print(wrapped(message, sys.stderr), file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str | None:
    """Return the meaning of an error of torch.distributed for the run; None for an error of another layer."""
    import torch.distributed as dist

    text = str(error).lower()
    if not isinstance(error, dist.DistError) and "gloo" not in text and "nccl" not in text:
        return None
    return (
        f"this process lost the others of its job ({_reason(error)}): what was saved before is intact.\nGo on with "
        "the same command and --resume; with torchrun --max-restarts N and --resume auto a job does so by itself."
    )


def _reason(error: BaseException) -> str:
    return re.sub(r"^\[[^]]*\] ", "", first_line(error))  # without gloo's file and line


def _in_thread(work: Callable[[], Any]) -> Future:
    """Start `work` in a thread, because the main thread handles no signals while it waits in C++."""
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result
