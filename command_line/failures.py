"""Explain a failure: its exit status, the reason and the remedy. Imports no torch.

Knows every command by its name alone, and the values of its options.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from system import meeting
from system.machine import NO_THREAD
from utils import RunError, Stopped, UserError, is_out_of_memory, printable

Values = Mapping[str, Any]


def explain(error: BaseException, command: str, options: Values) -> tuple[int, str]:
    """Return the exit status and the reason of a failure; no reason if it can only be a defect of this program.

    `options` are the values of the command's options, as far as they are known.
    """
    text = str(error)
    if isinstance(error, Stopped):
        return error.exit_status, text or f"stopped by {signal.Signals(error.exit_status - 128).name}{_kept(command)}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted{_kept(command)}"
    if isinstance(error, (UserError, RunError)):
        return 2 if isinstance(error, UserError) else 1, text
    if "DataLoader timed out" in text:
        return 1, (
            "no batch came from the loading workers in a quarter of an hour: does the disk that holds the images still "
            f"answer? --num_workers 0 does without the workers{_kept(command)}."
        )
    if "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):  # also in the middle of a message
        reason = text.splitlines()[0] if text else "it gave no reason"
        fewer = (
            "--num_workers 0, which loads without workers" if options.get("num_workers") == 1 else "fewer --num_workers"
        )
        ran_out = f"Usually the machine ran out of memory: use {fewer}{_kept(command)}."
        return 1, f"a data loading worker died: {reason}\n{ran_out}"
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return 1, "too many open files: raise the limit (ulimit -n 1024), or use fewer --num_workers."
    if NO_THREAD in text or getattr(error, "errno", None) == errno.EAGAIN:
        return 1, (
            "no more threads or processes can be started: raise the limit (ulimit -u, or a container's limit of pids), "
            "or use fewer --num_workers."
        )
    if isinstance(error, OSError):
        return 1, f"{printable(error.filename)}: {error.strerror}" if error.filename else error.strerror or text
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return 1, _memory_advice(command, options)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"--compile does not work here: {' '.join(text.split())[:200]}\nLeave out {_compiling(options)}."
    return 1, _of_other_processes(error)


def _of_other_processes(error: BaseException) -> str:
    """Return the meaning of an error for the processes of a job; "" if there is one process, or no such meaning."""
    return (meeting.in_words(error) or "") if (os.environ.get("WORLD_SIZE") or "1") != "1" else ""


def _kept(command: str) -> str:
    """Return the end of a sentence: how to go on from the last checkpoint."""
    if command == "train":
        return "; what was saved before can go on with --resume"
    if command in ("compare", "audit"):
        return "; the same command, without --overwrite, goes on from what was saved"
    return ""


def _compiling(options: Values) -> str:
    """Return the options that compile and were given."""
    return " and ".join(f"--{name}" for name in ("compile", "cuda_graphs") if options.get(name))


def _memory_advice(command: str, options: Values) -> str:
    """Return where memory ran out, and an option that can help there."""
    get: Callable[[str], Any] = options.get
    batch = get("batch_size")
    accumulate = get("accumulate") or 1
    if command != "train":
        at = f" at --batch_size {batch}" if batch else ""
        below = f", below {min(batch, 32)}" if command in ("evaluate", "predict") else ""  # of a CPU's 32
        way = "use another --device, or close other programs" if batch == 1 else f"use a smaller --batch_size{below}"
        return f"out of memory{at}: {way}."
    if isinstance(batch, str):
        return f"out of memory at --batch_size {batch}: name --batch_size and an --accumulate larger than it chose."
    whole = get("cuda_graphs") or get("sync_batchnorm")  # which take no micro-batches
    if batch >= 2 * accumulate and not whole:
        way = f"--accumulate {accumulate * 2} computes it in smaller micro-batches"
    else:
        way = "use a smaller --batch_size" if whole and batch > 1 else "use a smaller --image_size"
    less = "" if get("amp") else f"; --amp needs less, too{', in place of --tf32' if get('tf32') else ''}"
    return f"out of memory at --batch_size {batch} --accumulate {accumulate}: {way}{less}."
