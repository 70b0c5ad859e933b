"""This process: errors a user reads, device, seed, stop signal, files and what it says.

What every other file needs and none of them owns; torch is imported only where it is used, so that
`--help` and data preparation stay instant. Knows nothing of models, data or training.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import getpass
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

STARTED = time.monotonic()  # of this process
OUT_OF_TIME = 124  # the exit status of timeout(1), too
# What terminals and schedulers send when a program is to end soon. Windows has SIGBREAK and few of the others.
STOP_SIGNALS = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
)


class UserError(Exception):
    """The user's input is wrong (options, data, weights, checkpoint): exit status 2."""


class RunError(Exception):
    """The run itself failed (non-finite loss, full disk, out of memory): exit status 1."""


class Interrupted(Exception):
    """Work was left half done because a signal asked to stop; what it made so far is of no use."""


class Stopped(BaseException):
    """The run was stopped after saving: by a signal, exit status 128 + `signal_number`, or by --max_time, 124.

    Like KeyboardInterrupt no Exception: what deals with bad images and the like must not swallow it.
    """

    def __init__(self, signal_number: int | None, message: str):
        super().__init__(message)
        self.exit_status = OUT_OF_TIME if signal_number is None else 128 + signal_number


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while a large library is imported, nor later in what it left: a sixth of its time.

    PyTorch, torchvision and matplotlib leave 370,000 objects that stay, and each full search reads them all.
    """
    collects = gc.isenabled()
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules + 100:  # not where all is there already, in which garbage may be
            gc.freeze()
        if collects:
            gc.enable()


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


def return_freed_memory() -> None:
    """Hand what was freed and kept by glibc back to the kernel, so that it counts as free; see malloc_trim(3)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def name_this_user() -> None:
    """Give a name to a user id without a passwd entry, as containers have it: torch.compile names its cache after it.

    Some versions of PyTorch end with a KeyError (https://github.com/pytorch/pytorch/issues/140765).
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown"


def own_command() -> list[str]:
    """Return the command that starts this program in a fresh process, without its options."""
    return [sys.executable, str(Path(__file__).resolve().parent / "main.py")]


def choose_device(name: str, local_rank: int = 0, *, use: bool = True) -> torch.device:
    """The torch device for `name` (`auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`, ...).

    Without `use` a process that only starts others takes no memory on a GPU. Raises UserError if this machine or
    this build of PyTorch has no such device.
    """
    import torch

    asked = name
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
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} is not available here: {reason}\n{_other_device(asked, local_rank)}"
        ) from None
    if use and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _other_device(asked: str, local_rank: int) -> str:
    """What to do if the device that was asked for cannot be used by the process of this number on its machine."""
    import torch

    count = torch.cuda.device_count()
    if asked in ("auto", "cuda") and 0 < count <= local_rank:
        return f"Start no more processes on a machine than it has GPUs: torchrun --nproc_per_node {count}."
    return "Use --device cpu." if asked == "auto" else "Use --device auto or --device cpu."


def seed_everything(*numbers: int) -> None:
    """Seeds torch's default generators on every device with a number derived from `numbers`.

    Called before each update with (seed, epoch, update, rank), so that dropout needs no saved state. Nothing else
    may draw from these generators until the update ends.
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the CPU's, CUDA's, cuBLAS's or cuDNN's memory ran out."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def on_stop(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Makes `handler` hear every signal that means "stop soon"; returns the earlier handlers.

    SIGHUP stays ignored if it is: nohup ignores it, so that a run outlives its terminal.
    """
    numbers = [number for number in STOP_SIGNALS if not _is_nohup(number)]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers}


def _is_nohup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class StopSignal:
    """Turns the first signal to stop, or the end of the time, into a flag that the loop reads.

    A second signal ends the process at once. `seconds` is how long this process may take in all.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.number: int | None = None
        self._seconds = seconds
        self._asked = 0.0
        self._longest = 0.0  # time between two questions

    def __enter__(self) -> StopSignal:
        self._previous = on_stop(self._handle)
        self._asked = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop now: after a signal, or if the time would run out before one could ask again and save."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        return self.number is not None or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        if self._seconds is None:
            return False
        needed = 2 * self._longest + min(30.0, 0.05 * self._seconds)
        return self._asked - STARTED + needed >= self._seconds

    def stopped(self, message: str) -> Stopped:
        """The end of the run, with why in front; another process of the job may have had the signal."""
        if self.number is None and self.out_of_time:
            return Stopped(None, f"--max_time is up: {message}")
        return Stopped(self.number or signal.SIGTERM, message)

    def _handle(self, number: int, _frame: object) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        if is_first_rank():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: finishing this update, then saving. Once more ends at once.\n".encode())


def amount(count: int, one: str, more: str) -> str:
    """A count with the words that fit it: "1 image is", "1,200 images are"."""
    return f"{count:,} {one if count == 1 else more}"


def printable(text: object) -> str:
    """`text` on one line whatever a file name holds: control characters and stray bytes are escaped."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def typed(*arguments: object) -> str:
    """Return a command line for a person to type: each argument quoted for the shell, whatever a file name holds."""
    words = [str(argument) for argument in arguments]
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


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
    return (os.environ.get("WORLD_SIZE") or "1") == "1" or (os.environ.get("RANK") or "0") == "0"


def shows_bars() -> bool:
    """Whether this process draws bars: not with --quiet, off a terminal, or on a rank but the first."""
    seen = _in_notebook() or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
    return seen and is_first_rank() and log.getEffectiveLevel() < logging.WARNING


def _in_notebook() -> bool:
    """Whether this runs inside a notebook's kernel, whose pages a bar of text would fill."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A bar on stderr, without colours; a line now and then if nobody sees bars, and nothing with --quiet.

    tqdm itself knows a notebook, where the bar is a widget.
    """
    from system.progress import Lines, by_steady_clock

    if shows_bars():
        from tqdm.auto import tqdm

        return by_steady_clock(tqdm(iterable, dynamic_ncols=True, leave=False, file=sys.stderr, **options))
    silent = not is_first_rank() or log.getEffectiveLevel() >= logging.WARNING
    return Lines(iterable, say=log.info, disable=silent, **options)
