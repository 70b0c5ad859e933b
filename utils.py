"""Manage this process: errors for users, device, seed, stop signal, and output.

Every other file needs these functions and none owns them. torch is imported only inside functions, so that `--help` and
data preparation start at once. Knows nothing of models, data or training.
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
OUT_OF_TIME = 124  # also the exit status of timeout(1)
# Signals from terminals and schedulers that ask a program to end soon. Windows has SIGBREAK and few of the others.
STOP_SIGNALS = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
)


class UserError(Exception):
    """An error in the user's input (options, data, weights, checkpoint): exit status 2."""


class RunError(Exception):
    """A failure of the run itself (non-finite loss, full disk, out of memory): exit status 1."""


class Interrupted(Exception):
    """Work that a stop signal left half done; its result so far is unusable."""


class Stopped(BaseException):
    """A run that was stopped after saving: by a signal, exit status 128 + `signal_number`, or by --max_time, 124.

    It is not an Exception, like KeyboardInterrupt, so that code that handles bad images and the like does not catch it.
    """

    def __init__(self, signal_number: int | None, message: str):
        super().__init__(message)
        self.exit_status = OUT_OF_TIME if signal_number is None else 128 + signal_number


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Stop garbage collection during a large import, and exclude its objects later; this saves a sixth of the time.

    PyTorch, torchvision and matplotlib leave 370,000 objects that stay, and each full search reads them all.
    """
    collects = gc.isenabled()
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules + 100:  # otherwise nothing large was imported, and the objects may be garbage
            gc.freeze()
        if collects:
            gc.enable()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel; call before torch allocates.

    Activations are freed and allocated again in every update; without this each allocation costs page faults. See
    mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold = -1
        m_mmap_max = -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Return freed memory that glibc keeps to the kernel, so that it counts as free; see malloc_trim(3)."""
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
    """Return the torch device for `name` (`auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`, ...).

    With `use=False`, a process that only starts others takes no memory on a GPU. Raise UserError if this machine or
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
            torch.empty(1, device=device).item()  # raises for the device "meta"
        else:
            torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        if "device string" in reason:  # no name of a device: PyTorch lists twenty that nobody has
            raise UserError(f"--device {name} is no device: choose auto, cuda, cuda:1, mps or cpu.") from None
        raise UserError(
            f"--device {name} is not available here: {reason}\n{_other_device(asked, local_rank)}"
        ) from None
    if use and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _other_device(asked: str, local_rank: int) -> str:
    """Return advice if the process with this local rank cannot use the device that was requested."""
    import torch

    count = torch.cuda.device_count()
    if asked in ("auto", "cuda") and 0 < count <= local_rank:
        return f"Start no more processes on a machine than it has GPUs: torchrun --nproc_per_node {count}."
    return "Use --device cpu." if asked == "auto" else "Use --device auto or --device cpu."


def seed_everything(*numbers: int) -> None:
    """Seed torch's default generators on every device with a number derived from `numbers`.

    It is called before each update with (seed, epoch, update, rank), so that dropout needs no saved state. Nothing else
    may use these generators until the update ends.
    """
    import torch

    torch.manual_seed(fold(*numbers))


def fold(*numbers: int) -> int:
    """Return one 63-bit seed for several integers, the same on every machine (splitmix64 steps)."""
    mask = 2**64 - 1
    state = 0
    for number in numbers:
        state = (state ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the CPU, CUDA, cuBLAS or cuDNN ran out of memory."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def on_stop(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Install `handler` for every signal that means "stop soon"; return the earlier handlers.

    SIGHUP stays ignored if it is: nohup ignores it, so that a run outlives its terminal.
    """
    numbers = [number for number in STOP_SIGNALS if not _is_nohup(number)]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers}


def _is_nohup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class StopSignal:
    """Turn the first stop signal, or the end of the time limit, into a flag that the loop reads.

    A second signal ends the process at once. `seconds` limits the time of this process.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.number: int | None = None
        self._seconds = seconds
        self._asked = 0.0
        self._longest = 0.0  # time between two calls of `asked`

    def __enter__(self) -> StopSignal:
        self._previous = on_stop(self._handle)
        self._asked = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Return True after a stop signal, or if the time would run out before the next call and a save."""
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
        """Return the error that ends the run, with its reason first; another process may have had the signal."""
        if self.number is None and self.out_of_time:
            return Stopped(None, f"--max_time is up: {message}")
        return Stopped(self.number or signal.SIGTERM, message)

    def _handle(self, number: int, _frame: object) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        if is_first_rank():
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{name}: finishing this update, then saving. Once more ends at once.\n".encode())


def amount(count: int, one: str, more: str) -> str:
    """Return a count with the singular or the plural: "1 image is", "1,200 images are"."""
    return f"{count:,} {one if count == 1 else more}"


def printable(text: object) -> str:
    """Return `text` on one line, with control characters and stray bytes (in file names) escaped."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut after 200 letters; its type if it has no message."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def with_type(error: BaseException) -> str:
    """Return an error's type and message on one line, cut after 300 letters."""
    return printable(f"{type(error).__name__}: {error}")[:300]


def typed(*arguments: object) -> str:
    """Return a command line to copy, with each argument quoted for the shell, whatever a file name contains."""
    words = [str(argument) for argument in arguments]
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


def wrapped(text: str, stream: IO) -> str:
    """Return `text` with lines broken between words if the stream is a terminal that is narrower."""
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
    """Print to stdout, above any bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(wrapped(mark + record.getMessage(), sys.stdout), file=sys.stdout)


def open_page(file: Path) -> None:
    """Open a page in the browser; without one, say so."""
    import webbrowser

    if not webbrowser.open(file.resolve().as_uri()):
        log.warning(f"no browser could be started: open {printable(file)} yourself")


def start_logging(*, quiet: bool) -> None:
    """Install the program's log handler: with `quiet` it prints only warnings; ranks after the first print nothing."""
    if not any(isinstance(handler, _AboveBars) for handler in log.handlers):
        log.addHandler(_AboveBars())
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.disabled = not is_first_rank()


def is_first_rank() -> bool:
    """Return True in the one process of a job that prints and writes."""
    return (os.environ.get("WORLD_SIZE") or "1") == "1" or (os.environ.get("RANK") or "0") == "0"


def shows_bars() -> bool:
    """Return True if this process draws bars: not with --quiet, without a terminal, or on ranks after the first."""
    seen = _in_notebook() or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
    return seen and is_first_rank() and log.getEffectiveLevel() < logging.WARNING


def _in_notebook() -> bool:
    """Return True inside a notebook's kernel, where a text bar would fill the page."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


def progress_bar(iterable: Any = None, **options: Any) -> tqdm:
    """Return a bar on stderr without colours; occasional lines if no bar is visible, and nothing with --quiet.

    In a notebook tqdm draws a widget instead. If a comparison draws the bar, return records for it.
    """
    from system import parent
    from system.progress import Lines, Records, by_steady_clock

    if parent.draws():
        return Records(iterable, disable=not is_first_rank(), **options)
    if shows_bars():
        from tqdm.auto import tqdm

        return by_steady_clock(tqdm(iterable, dynamic_ncols=True, leave=False, file=sys.stderr, **options))
    silent = not is_first_rank() or log.getEffectiveLevel() >= logging.WARNING
    return Lines(iterable, say=log.info, disable=silent, **options)
