"""The processes of one torchrun job: how they meet, part, and speak with one voice when something fails.

A restarted process must not meet what is left of its predecessors: torchrun keeps their addresses in the store that
all attempts share. Knows nothing of what the processes compute; a job of one process needs none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import os
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from distributed import Ranks
from system.machine import computing_cores
from utils import RunError, UserError, printable, wrapped

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(minutes=5)  # with processes that start later

GRACE = 20.0  # seconds; torchrun kills 30 seconds after its signal


_meeting = ""  # names the attempt that this process has joined


def join(ranks: Ranks, *, patience: timedelta | None = None) -> None:
    """Joins torchrun's process group if there is one: NCCL between CUDA devices, gloo between CPUs.

    Raises UserError if the environment is half of a torchrun job's, RunError if the processes cannot meet. Signals
    are heard meanwhile.
    """
    if ranks.size == 1:
        return
    place = _meeting_place(ranks)
    try:
        _hearing_signals(lambda: _join(ranks, patience or PATIENCE), ranks, place)
    except Exception as error:
        reason = in_words(error, meeting=True)
        if reason is None or isinstance(error, (UserError, RunError)):
            raise
        raise RunError(reason) from None


def _meeting_place(ranks: Ranks) -> str:
    """HOST:PORT at which the processes meet. Raises UserError if the environment does not say all of it."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"WORLD_SIZE={ranks.size} says that this is one of {ranks.size} processes, but {', '.join(missing)} {verb} "
            "not set.\nStart it with torchrun, or for one process alone: unset WORLD_SIZE."
        )
    port = os.environ["MASTER_PORT"]
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={printable(port)} is no port: it must be a number from 1 to 65535.")
    return f"{printable(os.environ['MASTER_ADDR'])}:{port}"


def _join(ranks: Ranks, patience: timedelta) -> None:
    import torch
    import torch.distributed as dist

    global _meeting
    store, *_ = next(dist.rendezvous("env://", timeout=patience))
    _meeting = meet(store, ranks)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(_meeting, store), rank=ranks.rank, world_size=ranks.size)


def _hearing_signals(work: Callable[[], Any], ranks: Ranks, place: str) -> Any:
    """Runs `work` in a thread: signal handlers run in the main one, and not while that waits in C++."""
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    started = time.monotonic()
    said = False
    while not result.done():
        wait([result], timeout=0.2)
        if not said and ranks.local_rank == 0 and time.monotonic() - started > 10:
            said = True
            print(f"waiting for other processes at {place} ...", file=sys.stderr, flush=True)
    return result.result()


def meet(store: Store, ranks: Ranks, *, patience: timedelta = timedelta(seconds=1)) -> str:
    """A name that the living processes of this attempt share, and no earlier attempt.

    Every process signs in; the first one names the list of those it found, and asks again if one of them does
    not answer, because it belonged to an earlier attempt (https://github.com/pytorch/pytorch/issues/135712).
    """
    signature = uuid.uuid4().hex
    store.set(f"amp-train/signed/{ranks.rank}", signature)
    while True:
        if ranks.is_first:
            store.set(
                "amp-train/list", ",".join(store.get(f"amp-train/signed/{rank}").decode() for rank in range(ranks.size))
            )
        present = store.get("amp-train/list").decode()
        name = "amp-train/" + hashlib.sha256(present.encode()).hexdigest()[:16]
        if signature not in present.split(","):  # the list of an earlier attempt
            time.sleep(0.05)
            continue
        store.set(f"{name}/present/{ranks.rank}", "")
        if ranks.is_first:
            if not _appear(store, [f"{name}/present/{rank}" for rank in range(ranks.size)], patience):
                continue
            store.set(f"{name}/begun", "")
        if _appear(store, [f"{name}/begun"], patience):
            return name


def _appear(store: Store, keys: list[str], patience: timedelta) -> bool:
    """Whether all `keys` are in the store within `patience`.

    Asks again and again: `store.wait` with a short timeout has ended a process from inside C++ (SIGABRT).
    """
    end = time.monotonic() + patience.total_seconds()
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def leave(ranks: Ranks) -> None:
    """Leaves the process group: after a failure was reported, so that the others report no lost connection first."""
    if ranks.size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """Ends this process; where there are several, after its handlers of exit, but without what Python does then.

    gloo's threads outlive the group. One that drops a tensor, or returns from C++, while Python shuts down aborts the
    process: "terminate called without an active exception" (SIGABRT), for which torchrun ends the whole job.
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        gc.freeze()  # Python would look through all that PyTorch imported once more: a second
        sys.exit(status)
    try:
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads that write
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
    finally:  # also if a signal interrupts it
        os._exit(status)


def share_cores(ranks: Ranks) -> None:
    """Lets a CPU job compute with this process's part of the cores that it may use.

    torchrun sets OMP_NUM_THREADS to 1 for several processes, to which a machine's cores would be lost. Any other
    value is the user's, and stays.
    """
    import torch

    asked = os.environ.get("OMP_NUM_THREADS")
    if asked and not (asked == "1" and ranks.size > 1):
        return
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = int(beside) if beside.isdigit() and int(beside) else 1
    torch.set_num_threads(max(1, computing_cores() // here))


def watch_signals(numbers: Collection[int], heard: threading.Event, *, grace: float = GRACE) -> None:
    """Ends this process if a signal of `numbers` is not `heard` by its handler within `grace` seconds.

    Handlers run between two steps of the main thread, and waiting for other processes is one step, however long they
    are silent. A second signal ends the process at once. Call it in the main thread.
    """
    reading, writing = socket.socketpair()
    for end in (reading, writing):
        end.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=((reading, writing), numbers, heard, grace), daemon=True).start()


def _watch(
    ends: tuple[socket.socket, socket.socket], numbers: Collection[int], heard: threading.Event, grace: float
) -> None:
    came: list[int] = []
    while True:
        ready, _, _ = select.select(ends[:1], [], [], grace if came else None)
        if ready:
            came += [number for number in ends[0].recv(64) if number in numbers]
        if len(came) > 1:
            time.sleep(1)  # the handler may do it itself
        elif not came or ready or heard.is_set():
            continue
        with contextlib.suppress(OSError):
            text = "ended while waiting for other processes of this job; what was saved before can go on with --resume"
            os.write(2, f"\n{signal.Signals(came[-1]).name}: {text}\n".encode())
        os._exit(128 + came[-1])


def say_once(message: str, ranks: Ranks) -> None:
    """Prints to stderr; in a job of several only the first process to fail does, so that its reason stands alone."""
    if ranks.size == 1 or _is_first_to_fail():
        print(wrapped(message, sys.stderr), file=sys.stderr, flush=True)


def _is_first_to_fail() -> bool:
    """Counts failures in the store through which the processes have met; True if that does not answer."""
    answer: Future = Future()

    def ask() -> None:
        import torch.distributed as dist

        try:
            host = os.environ["MASTER_ADDR"]
            port = int(os.environ["MASTER_PORT"])
            patience = timedelta(seconds=5 if _meeting else 1)
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
            failures = store.add(f"{_meeting}/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1)
            answer.set_result(failures == 1)
        except Exception:  # the machine of the store is gone
            answer.set_result(True)

    threading.Thread(target=ask, daemon=True).start()  # another program at that port may be silent for ever
    wait([answer], timeout=6)
    return answer.result() if answer.done() else True


_LOST = "what was saved before is intact: go on with the same command and --resume."

# What gloo, NCCL and the store say when something is wrong; the first kind with a sign that occurs counts.
_SIGNS = {
    "port": ("eaddrinuse", "address already in use", "failed to listen"),
    "interface": ("unable to find address for", "no socket interface", "find network interface", "no interface found"),
    "gpu": ("duplicate gpu",),
    "meeting": (
        "trying to connect",
        "failed to connect",
        "waiting for clients",
        "ping failed",
        "cannot be retrieved",
        "name or service not known",
        "name resolution",
    ),
    "time": ("timed out", "timeout"),
    "step": ("op.preamble", "mismatch", "invalid usage"),
    "lost": (
        "connection closed",
        "connection reset",
        "connection refused",
        "broken pipe",
        "read error",
        "write error",
        "remote error",
        "remote process",
        "remote worker",
        "sendbytes",
        "recvbytes",
        "failed to recv",
        "failed to send",
        "socket error",
    ),
}

_MEANING = {
    "port": "the port of {place} is taken: another job runs there, or is still ending.\n"
    "Choose another with torchrun --master_port, or use torchrun --standalone on one machine.",
    "interface": "this machine lacks a network interface ({reason}).\n"
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name it; `ip address` lists those that are there.",
    "gpu": "two processes of this job use one GPU: start no more processes on a machine than it has GPUs\n"
    "(torchrun --nproc_per_node), and leave out --device.",
    "meeting": "this process could not meet the others at {place} ({reason}).\n"
    "Check that all of them were started, that host and port are those of the first machine, and that no firewall "
    "stands between.",
    "time": f"another process of this job did not answer in time ({{reason}}): {_LOST}\n"
    "It may hang, wait for a disk, or have lost its network.",
    "step": f"the processes of this job are out of step ({{reason}}): {_LOST}\n"
    "Start all of them with the same options, data and versions.",
    "lost": f"another process of this job has ended, so this one cannot go on; {_LOST}\n"
    "With torchrun --max-restarts N and --resume auto a job does so by itself.",
    "": f"the processes of this job can no longer speak to one another ({{reason}}): {_LOST}\n"
    "NCCL_DEBUG=INFO makes NCCL say more.",
}


def in_words(error: BaseException, *, meeting: bool = False) -> str | None:
    """What an error of torch.distributed means and what to check; None if it is another layer's.

    While the processes are `meeting`, those that do not answer may not be there at all.
    """
    import torch.distributed as dist

    text = str(error)
    low = text.lower()
    if not isinstance(error, dist.DistError) and "gloo" not in low and "nccl" not in low:
        return None
    kind = next((kind for kind, signs in _SIGNS.items() if any(sign in low for sign in signs)), "")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    meaning = _MEANING["meeting" if meeting and kind in ("time", "") else kind]
    return meaning.format(place=printable(place), reason=_shortened(text))


def _shortened(text: str) -> str:
    """The first line of an error without the file and line in front of it, nor what follows its first sentence."""
    line = next((line for line in text.splitlines() if line.strip()), "no reason given")
    line = line.partition("] ")[2] if line.startswith("[") else line
    return printable(line.partition(". This is")[0].rstrip(". ")[:200])
