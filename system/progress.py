"""Report progress if no bar is visible: log files, pipes, schedulers. tqdm counts; a thread prints."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from system.parent import estimates
from system.terminal import duration

EVERY = 30.0  # seconds between two lines
FORMAT = "{desc} {percentage:3.0f}%|{bar}| {unit}"  # of the bar over all runs
RECORD = "\x1e"  # begins a line that another process draws


def by_steady_clock(bar: tqdm) -> tqdm:
    """Let a bar measure time with a monotonic clock: tqdm uses the time of day, which may be set."""
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = bar._time()
    return bar


def work(size: int) -> float:
    """Return the time for an image with this side, in a unit of its own.

    It grows more slowly than the area, because small feature maps use the processor less efficiently (a ResNet-18 from
    48 to 128 px: exponents 1.2 and 1.8 on two CPUs).
    """
    return float(size**1.5)


def seconds_left(sizes: Sequence[int], ends: Sequence[float], *, epoch_share: float, epoch_seconds: float) -> float:
    """Return the seconds that the rest of a run takes at the speed of its last three epochs, or of its first updates.

    `sizes` are the image sizes of the epochs, `ends` the seconds at the start of the first epoch and at the end of each
    finished one. The current epoch has taken `epoch_seconds` for `epoch_share` of its updates.
    """
    works = [work(size) for size in sizes]
    epoch = len(ends) - 1
    if epoch > 0:
        recent = ends[-4:]
        seconds = recent[-1] - recent[0]
        done = sum(works[epoch + 1 - len(recent) : epoch])
    else:
        seconds = epoch_seconds
        done = works[0] * epoch_share
    left = sum(works[epoch:]) - epoch_share * sum(works[epoch : epoch + 1])
    return seconds * max(0.0, left) / done


class Lines(tqdm):
    """Print a line every `EVERY` seconds instead of drawing a bar, also while nothing moves."""

    monitor_interval = 0  # tqdm's own thread prints only if updates come

    def __init__(self, iterable: Any = None, *, say: Callable[[str], None], **options: Any):
        options |= {"mininterval": 1, "file": io.StringIO(), "leave": False}
        self._closed = threading.Event()
        super().__init__(iterable, **options)
        by_steady_clock(self)
        if not self.disable:
            with contextlib.suppress(RuntimeError):  # without a thread, nothing is printed between updates
                threading.Thread(target=self._speak, args=(say,), daemon=True).start()

    def _speak(self, say: Callable[[str], None]) -> None:
        while not self._closed.wait(EVERY):
            say(self._line())

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw nothing; tqdm has updated its rate before this call."""
        return True

    def _line(self) -> str:
        facts = self.format_dict
        done, total, rate = facts["n"], facts["total"], facts["rate"]
        if rate is None and facts["elapsed"]:
            rate = (done - facts["initial"]) / facts["elapsed"]
        share = f"{100 * done / total:.0f} %" if total else f"{done:,}"
        unit = facts["unit"].strip()
        parts = [f"{facts['prefix'].rstrip(': ')} {share}".strip()]
        if rate:
            amount = tqdm.format_sizeof(rate, divisor=1000) if facts["unit_scale"] else f"{rate:,.1f} "
            parts.append(f"{amount}{unit if unit == 'B' else f'{unit}s'}/s")
        if rate and total and not estimates():
            parts.append(f"{duration((total - done) / rate)} left")
        return ", ".join([*parts, *filter(None, [facts["postfix"]])])

    def close(self) -> None:
        self._closed.set()
        super().close()


class Records(tqdm):
    """Print the state of a bar for the process that draws it (`Block`), at most twice a second."""

    monitor_interval = 0

    def __init__(self, iterable: Any = None, **options: Any):
        super().__init__(iterable, **options | {"mininterval": 0.5, "file": io.StringIO(), "leave": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print the amount done, the whole amount and what is done."""
        if not self.disable:
            print(f"{RECORD}{self.n}/{self.total or 0} {self.desc.rstrip(': ')}", flush=True)
        return True


class Block:
    """Draw one bar over the epochs of several runs, with one estimate for all of them."""

    def __init__(self, epochs: int):
        bar = tqdm(total=epochs, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format=FORMAT)
        self._bar = by_steady_clock(bar)
        self._title = ""
        self._before = 0.0  # epochs of the runs before this one
        self._first = 0  # number of the epoch that this run began with
        self._printed: set[str] = set()
        self._since: float | None = None  # when the first epoch began

    def begin(self, title: str) -> None:
        """Go on with another run."""
        self._title = title
        self._first = 0
        self._draw("starting")

    def follow(self, lines: Iterable[str]) -> None:
        """Read the output of a run to its end."""
        for line in lines:
            self.read(line)

    def read(self, line: str) -> None:
        """Draw what a record of the run says; print another line above the bar, once for all runs."""
        record = re.fullmatch(f"{RECORD}([^/]+)/(\\S+) (.*)\n?", line)
        if not record:
            if line not in self._printed:
                tqdm.write(line.rstrip("\n"), file=sys.stdout)
            self._printed.add(line)
            return
        done, total, what = float(record[1]), float(record[2]), record[3]
        epoch = re.match(r"epoch (\d+)/", what)
        if epoch and total:
            self._since = self._since or time.monotonic()
            self._first = self._first or int(epoch[1])
            self._bar.n = min(self._bar.total, self._before + int(epoch[1]) - self._first + done / total)
        self._draw(what)

    def end(self, epochs: int) -> None:
        """Count all epochs of a run, which may have stopped before the last one."""
        self._before += epochs
        self._bar.n = self._before

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _draw(self, what: str) -> None:
        bar = self._bar
        seconds = time.monotonic() - self._since if self._since else 0.0
        left = f"{duration(seconds / bar.n * (bar.total - bar.n))} left for all" if bar.n > 0.05 else ""
        bar.unit = left  # the format has no other place without a comma
        bar.set_description_str(f"{self._title}, {what}", refresh=True)
