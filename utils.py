"""This process: errors a user reads, device, seed, ranks, memory, stop signal, files and terminal.

What every other file needs and none of them owns; torch is imported only where it is used, so that
`--help` and data preparation stay instant. Knows nothing of models, data or training.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import json
import logging
import os
import platform
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from machine import GPUS

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # of a disk, of a quota (Windows has none)


class UserError(Exception):
    """The user's input is wrong (options, data, weights, checkpoint): exit status 2."""


class RunError(Exception):
    """The run itself failed (non-finite loss, full disk, out of memory): exit status 1."""


class Interrupted(Exception):
    """Work was left half done because a signal asked to stop; what it made so far is of no use."""


class Stopped(Exception):
    """The run was stopped by a signal after saving: exit status 128 + `signal_number`."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of handing it back to the kernel; call before torch allocates.

    Activations are freed and taken again in every update; without this each one costs page faults. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold = -1
        m_mmap_max = -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def own_command() -> list[str]:
    """The words that start this program in a fresh process, without its options.

    With `-P` the process of an installed program finds the package, and no file of the user's current folder.
    """
    if __package__:
        return [sys.executable, "-P", "-m", __package__]
    return [sys.executable, str(Path(__file__).resolve().parent / "main.py")]


def choose_device(name: str, local_rank: int = 0, *, use: bool = True) -> torch.device:
    """The torch device for `name` (`auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`, ...).

    Without `use` a process that only starts others takes no memory on a GPU. Raises UserError if this machine or
    this build of PyTorch has no such device.
    """
    import torch

    if name == "auto":
        found = {
            "cuda": torch.cuda.is_available(),
            "xpu": torch.xpu.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
        }
        name = next(name for name, there in found.items() if there)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        if use or device.type != "cuda":
            torch.empty(1, device=device).item()  # which the device "meta" cannot do
        else:
            torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"{str(error).splitlines()[0]}\nUse --device auto or --device cpu."
        raise UserError(f"--device {name} is not available here: {reason}") from None
    if use and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """The marketing name of the device, for tables and records."""
    if device.type in GPUS:
        import torch

        return getattr(torch, device.type).get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {cores()} core{'s' * (cores() > 1)}"
    return platform.processor() or platform.machine()


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(*numbers: int) -> None:
    """Seeds torch's default generators on every device with a number derived from `numbers`.

    Called before each update with (seed, epoch, update, rank), so that dropout needs no saved state.
    """
    import torch

    torch.manual_seed(fold(*numbers))


def fold(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, the same on every machine (splitmix64 steps)."""
    mask = 2**64 - 1
    state = 0
    for number in numbers:
        state = (state ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: the allocator's on CUDA and XPU, the process's on Linux (where the kernel allows it)."""
    if device.type in GPUS:
        import torch

        getattr(torch, device.type).reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory since the last reset, in MB of 2**20 bytes, under the names that `result.json` uses."""
    if device.type in GPUS:
        import torch

        gpu = getattr(torch, device.type)
        return {
            "peak_memory_mb": round(gpu.max_memory_allocated(device) / 2**20, 1),
            "reserved_memory_mb": round(gpu.max_memory_reserved(device) / 2**20, 1),
            "memory_kind": f"{device.type.upper()} allocated",
        }
    resident = round(_resident_peak() / 2**20, 1)
    return {"peak_memory_mb": resident, "reserved_memory_mb": None, "memory_kind": "process resident peak"}


def _resident_peak() -> int:
    """The process's resident peak in bytes, mapped cache files included."""
    peak = linux_memory("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def linux_memory(file: str, name: str) -> int | None:
    """Bytes that a line `name` of /proc/meminfo or /proc/self/status says; None if there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the CPU's, CUDA's, cuBLAS's or cuDNN's memory ran out."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads; a second one ends at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        if is_first_rank():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: finishing this update, then saving. Once more ends at once.\n".encode())


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` and puts it in place of `path` when the block succeeds.

    A reader sees the old file or the new one, never a part, whatever stops the writer.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    with contextlib.suppress(OSError, AttributeError):  # the rename itself reaches the disk
        directory = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)


def write_text(file: Path, text: str) -> None:
    """Replaces a text file whole. Raises UserError if it cannot stand there, RunError if the disk fails."""
    try:
        with atomic_write(file) as handle:
            handle.write(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        misplaced = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
        raise (UserError if misplaced else RunError)(
            f"{printable(file)} cannot be written ({error.strerror})."
        ) from None


def refuse_missing_folders(*files: str | None) -> None:
    """Raises UserError if a file that is to be written has no folder: before the work, not after it."""
    for file in files:
        if file and not Path(file).parent.is_dir():
            raise UserError(f"{printable(file)} cannot be written: there is no such folder.")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns whatever is wrong with a file into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({error.strerror or error}).") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise UserError(f"{printable(file)} is damaged ({type(error).__name__}: {error}).") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing or damaged."""
    with reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("no JSON object")
        return content


def remove(*paths: Path) -> None:
    """Deletes what is there and can be deleted, such as what `atomic_write` left when its process was killed."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def lock(file: IO | int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed or this process ends, however it ends; False where another holds it.

    Windows and some network file systems know no such locks: there it is as if nobody held it.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def printable(text: object) -> str:
    """`text` on one line whatever a file name holds: control characters and stray bytes are escaped."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def wrapped(text: str, stream: IO) -> str:
    """`text` with its lines broken between words where they end up on a terminal that is narrower."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        if len(line) > width
        else line
        for line in text.split("\n")
    )


log = logging.getLogger("amp-train")


class _AboveBars(logging.Handler):
    """Prints to stdout, above any bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(wrapped(mark + record.getMessage(), sys.stdout), file=sys.stdout)


def start_logging(*, quiet: bool) -> None:
    """The program's one handler: with `quiet` it shows warnings alone, on every rank but the first nothing."""
    if not any(isinstance(handler, _AboveBars) for handler in log.handlers):
        log.addHandler(_AboveBars())
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.disabled = not is_first_rank()


def is_first_rank() -> bool:
    """Whether this is the one process of a job that prints and writes."""
    return int(os.environ.get("RANK") or 0) == 0


def shows_bars() -> bool:
    """Whether this process draws bars: not with --quiet, off a terminal, or on a rank but the first."""
    return sys.stderr.isatty() and is_first_rank() and log.getEffectiveLevel() < logging.WARNING


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr, without colours, where `shows_bars`."""
    from tqdm import tqdm

    return tqdm(iterable, dynamic_ncols=True, leave=False, file=sys.stderr, disable=not shows_bars(), **options)
