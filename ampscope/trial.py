"""Time a program in processes of its own: as written, and with autocast and scaler switched off.

A process runs the program until enough updates have been timed; its output is not shown.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ampscope.files import json_text
from ampscope.memory import resident_peak
from ampscope.running import Ended, Program
from ampscope.updates import Updates

WARM = 3  # updates that are not timed: allocators fill, kernels are chosen, models are compiled
MOST = 40  # updates that are timed
BUDGET = 10.0  # seconds of timed updates, of which there are at least LEAST
LEAST = 5
PATIENCE = 120.0  # seconds that a program may take until its first updates, beyond what it took while it was traced
ENOUGH = 1.05  # a smaller gain is not mentioned
PACKAGE = str(Path(__file__).parent.parent)
START = "import sys; sys.path.insert(0, sys.argv[1]); from ampscope.trial import main; main(sys.argv[2:])"


class Timer:
    """Record the time of each update after the first ones, and end the program after enough of them."""

    def __init__(self) -> None:
        self.updates = Updates(self._at_end, modules=False)  # hooks would change what torch.compile makes

    def _at_end(self, updates: Updates) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if updates.count <= WARM:
            updates.seconds.clear()
            updates.loading.clear()
        enough = len(updates.seconds) >= LEAST and sum(updates.seconds) > BUDGET
        if len(updates.seconds) >= MOST or enough:
            raise Ended

    def record(self) -> dict[str, Any]:
        seconds = self.updates.seconds
        if not seconds:
            return {"updates": self.updates.count}
        low, middle, high = quartiles(seconds)
        return {
            "updates": self.updates.count,
            "seconds": middle,
            "lower": low,
            "upper": high,
            "rounds": len(seconds),
            "loading": statistics.median(self.updates.loading),
            "peak": _peak(),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _peak() -> int | None:
    """Return the peak of CUDA's allocator, or, without CUDA, the peak memory of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resident_peak()


def switch_off() -> None:
    """Disable every autocast region and GradScaler in this process."""
    enter = torch.autocast.__enter__
    init = torch.amp.GradScaler.__init__

    def entered(region: Any) -> Any:
        region._enabled = False
        return enter(region)

    def made(scaler: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        init(scaler, device, enabled=False)

    setattr(torch.autocast, "__enter__", entered)  # noqa: B010
    setattr(torch.amp.GradScaler, "__init__", made)  # noqa: B010


def main(words: list[str]) -> None:
    """Run a program. `words` are OUTPUT, "on" or "off", "script" or "module", then the program and its arguments."""
    sys.path.remove(PACKAGE)
    output, amp, kind, name, *arguments = words
    if amp == "off":
        switch_off()
    timer = Timer()
    with timer.updates:
        outcome = Program(name, arguments, kind == "module").run()
    found = timer.record()
    if outcome.error is not None:
        text = " ".join(str(outcome.error).split())[:200]
        found["error"] = f"{type(outcome.error).__name__}: {text}"
    Path(output).write_text(json_text(found))


def measure(program: Program, *, amp: bool, limit: float) -> dict[str, Any]:
    """Run the program in a process; return the content of `Timer.record`, or {"error": a reason}."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "trial.json"
        words = [str(output), "on" if amp else "off", "module" if program.module else "script"]
        command = [sys.executable, "-c", START, PACKAGE, *words, program.name, *program.arguments]
        quiet = subprocess.DEVNULL
        try:
            subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"it took more than {limit:.0f} s"}
        if not output.is_file():
            return {"error": "it ended its process before it could be timed"}
        return json.loads(output.read_text())


def will_it_pay(program: Program, *, amp: bool, started: float) -> dict[str, Any]:
    """Return times and memory of both ways to run the program, and the conclusions in sentences.

    `started` is when the traced run began (time.perf_counter).
    """
    if not amp:
        words = ["Nothing to compare: no autocast region was on and no GradScaler at work."]
        return {"speed": {}, "words": words}
    taken = time.perf_counter() - started
    print(
        f"ampscope: starts the program twice more to time it, {taken + BUDGET:.0f} s each.", file=sys.stderr, flush=True
    )
    limit = PATIENCE + 2 * taken
    found = {
        "autocast off": measure(program, amp=False, limit=limit),
        "as written": measure(program, amp=True, limit=limit),
    }
    speed = {name: row for name, row in found.items() if "seconds" in row}
    words = []
    for name, row in found.items():
        if "seconds" not in row:
            why = row.get("error") or f"it made {row['updates']} updates, and the first {WARM} are not timed"
            words.append(f"{name}: not measured, because {why}.")
    if len(speed) == 2:
        words += in_words(speed["autocast off"], speed["as written"])
    return {"speed": speed, "words": words}


def in_words(off: dict[str, Any], on: dict[str, Any]) -> list[str]:
    """Return sentences on the gain, the memory, the loading of batches, and how certain they are."""
    gain = off["seconds"] / on["seconds"]
    overlap = min(off["upper"], on["upper"]) >= max(off["lower"], on["lower"])
    if overlap or 1 / ENOUGH < round(gain, 2) < ENOUGH:
        words = [f"AMP makes no sure difference to the time: {gain:.2f} times the speed of autocast off."]
    elif gain > 1:
        words = [f"As written, an update is {gain:.2f} times as fast as with autocast off: AMP pays."]
    else:
        words = [f"AMP costs time here: {gain:.2f} times the speed of autocast off."]
    if on["peak"] and off["peak"]:
        words.append(f"The peak is {on['peak'] / off['peak']:.0%} of that with autocast off.")
    share = on["loading"] / on["seconds"]
    if share > 0.1:
        words.append(f"{share:.0%} of an update is waiting for its batch, which no precision makes faster.")
    return words
