"""The processes of one torchrun job: how they meet, part, and speak with one voice when something fails.

A restarted process must not meet what is left of its predecessors: torchrun keeps their addresses in the store
that all attempts share. Knows nothing of what the processes compute; a job of one process needs none of this.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from utils import Ranks, wrapped

if TYPE_CHECKING:
    from torch.distributed import Store

LOST_RANK = (
    "another process of this job has ended, so this one cannot go on; what was saved before is intact.\nGo on with "
    "the same command and --resume; with torchrun --max-restarts N and --resume auto a job does so by itself."
)
_meeting = ""  # names the attempt that this process has joined


def join(ranks: Ranks) -> None:
    """Joins torchrun's process group where there is one: NCCL between CUDA devices, gloo between CPUs."""
    if ranks.size == 1:
        return
    import torch
    import torch.distributed as dist

    global _meeting
    store, *_ = next(dist.rendezvous("env://"))
    _meeting = meet(store, ranks)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(_meeting, store), rank=ranks.rank, world_size=ranks.size)


def meet(store: Store, ranks: Ranks, *, patience: timedelta = timedelta(seconds=1)) -> str:
    """A name that the living processes of this attempt share, and no earlier attempt.

    Every process signs in; the first one names the list of those it found, and asks again where one of them does
    not answer, because it belonged to an earlier attempt (https://github.com/pytorch/pytorch/issues/135712).
    """
    import torch.distributed as dist

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
        try:
            if ranks.is_first:
                store.wait([f"{name}/present/{rank}" for rank in range(ranks.size)], patience)
                store.set(f"{name}/begun", "")
            store.wait([f"{name}/begun"], patience)
            return name
        except dist.DistStoreError:
            continue


def leave(ranks: Ranks) -> None:
    """Leaves the process group: after a failure was reported, so that the others report no lost connection first."""
    if ranks.size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def say_once(message: str) -> None:
    """Prints to stderr; in a job of several only the first process to fail does, so that its reason stands alone."""
    if Ranks.from_environment().size == 1 or _is_first_to_fail():
        print(wrapped(message, sys.stderr), file=sys.stderr, flush=True)


def _is_first_to_fail() -> bool:
    """Counts failures in the store through which the processes have met."""
    import torch.distributed as dist

    try:
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"{_meeting}/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, LookupError, ValueError):  # the machine of the store is gone
        return True


def is_lost_connection(error: Exception) -> bool:
    """Whether `error` says that another process of the job is gone, rather than that the program is wrong."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))
