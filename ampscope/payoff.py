"""Decide if AMP pays for this step on this device: measured time and memory, and the most that casting could gain."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ampscope import roofline
from ampscope.execution import Execution
from ampscope.precisions import Precision
from ampscope.subject import Subject
from ampscope.tensors import dtype_name
from ampscope.timing import amdahl, timed, timed_once
from ampscope.trace import Trace
from ampscope.tracing import eager

WARM = 2  # rounds before the first that counts, unless an update is long
LEAST = 2
ROUNDS = 7
BUDGET = 6.0  # seconds for all precisions together, after which no round begins
ENOUGH = 1.05  # a smaller gain is not mentioned
SMALL = 256
SIDE = 1024  # size of the square product that measures how much faster 16 bits multiply
LARGEST = 256.0  # MB of the copy that measures the bandwidth: no cache holds more
ATTEMPTS = 3  # measurements of the device's rates, while a step seems to exceed them


def measure_speed(
    subject: Subject,
    precisions: list[Precision],
    prepare: Callable[[Precision], Precision],
    *,
    ambient: bool,
    warm: int = WARM,
) -> dict[str, dict[str, Any]]:
    """Return the seconds of an update by precision, measured in turns, so that other load affects all of them.

    `prepare` activates a precision: on CUDA float32's mode is a global switch. The first `warm` rounds do not count.
    """
    executions = {precision.name: Execution(subject, precision, ambient=ambient) for precision in precisions}
    seconds: dict[str, list[float]] = {name: [] for name in executions}
    started = time.perf_counter()
    for turn in range(warm + ROUNDS):
        for precision in precisions:
            prepare(precision)
            execution = executions[precision.name]
            taken = timed_once(partial(execution.run, update=True), subject.device)
            execution.events.clear()
            execution.roots.clear()
            if turn >= warm:
                seconds[precision.name].append(taken)
        if turn + 1 >= warm + LEAST and time.perf_counter() - started > BUDGET:
            break
    for execution in executions.values():
        execution.put_back()
    return {
        name: {"seconds": statistics.median(some), "shortest": min(some), "longest": max(some), "rounds": len(some)}
        for name, some in seconds.items()
    }


def slower_in_float16(device: torch.device) -> float:
    """Return how many times as long as in float32 a matrix product takes in float16."""
    return roofline.matrix_rate(device, torch.float32, size=SMALL) / roofline.matrix_rate(
        device, torch.float16, size=SMALL
    )


def cast_cost(trace: Trace, records: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return the cost of a step's casts, timed again by themselves.

    It is their number by phase, the bytes read and written, and seconds (a median of 3).
    """
    phases: Counter = Counter()
    size = 0
    casts = []
    for row in records:
        if row["cast"] and row["cast"][1] is not None and row["inputs"]:
            old, new = (getattr(torch, name) for name in (row["inputs"][0], row["output"]))
            source = torch.empty_strided(*row["cast"], dtype=old, device=device).fill_(1)
            casts += row["calls"] * [(source, new)]
            phases[row["phase"]] += row["calls"]
            size += row["calls"] * source.numel() * (old.itemsize + new.itemsize)
    seconds = statistics.median(timed(lambda: [source.to(new) for source, new in casts], device)) if casts else 0.0
    return {"casts": dict(phases), "bytes": size, "seconds": seconds}


def bounds(
    subject: Subject, precisions: list[Precision], speed: dict[str, dict[str, Any]], *, ambient: bool
) -> dict[str, Any] | None:
    """Return the least time of an update on this device by its operators' work and traffic, and the share reached.

    Keys: rates (FLOP/s of a square product by type), bandwidth (bytes per second), precisions (bound_seconds and share
    of the measured update), words. Return None if the operators cannot be counted.
    """
    device = subject.device
    dtypes = list(dict.fromkeys([torch.float32, *(precision.dtype for precision in precisions)]))
    operators = {}
    for precision in precisions:
        execution = Execution(subject, precision, ambient=ambient)
        try:
            with eager():
                operators[precision.name] = roofline.count_step(partial(execution.run, update=True), device)
        except RuntimeError:  # two ways of counting differ in an operator's FLOPs
            return None
        finally:
            execution.put_back()
    megabytes = min(max(1.0, roofline.typical_megabytes(next(iter(operators.values())))), LARGEST)
    rates = dict.fromkeys(map(dtype_name, dtypes), 0.0)
    bandwidth = 0.0
    found: dict[str, dict[str, float]] = {}
    for _ in range(ATTEMPTS):  # use the best: other load can only lower a rate
        for dtype in dtypes:
            name = dtype_name(dtype)
            rates[name] = max(rates[name], roofline.matrix_rate(device, dtype, size=SIDE))
        bandwidth = max(bandwidth, roofline.copy_bandwidth(device, megabytes=megabytes))
        for name, counted in operators.items():
            bound = roofline.roofline(counted, rates=rates, bandwidth=bandwidth)["bound_seconds"]
            found[name] = {"bound_seconds": bound, "share": bound / speed[name]["shortest"]}
        if all(row["share"] <= 1 for row in found.values()):
            break
    shares = ", ".join(f"{row['share']:.0%} in {name}" for name, row in found.items())
    words = f"Of the roofline's rate (products as fast as a large one, traffic as fast as a copy) it reaches {shares}."
    words = " ".join([words, *roofline.beyond(row["share"] for row in found.values())])
    return {"rates": rates, "bandwidth": bandwidth, "precisions": found, "words": words}


def products_ceiling(trace: Trace, update_seconds: float, gain: float | None) -> dict[str, float | None]:
    """Return the products' share of a float32 update, and the speed-up if only they become faster.

    `ceiling`: products cost nothing. `expected`: they become `gain` times faster.
    """
    products = sum(product.seconds for product in trace.products if product.dtype == "float32")
    every = sum(trace.seconds.values())
    # The trace times each operator alone; the rest of an update is Python and the optimizer.
    share = products / max(every, update_seconds, 1e-12)
    return {
        "product_share": share,
        "product_gain": gain,
        "ceiling": None if share >= 1 else amdahl(share, math.inf),
        "expected": None if gain is None else amdahl(share, gain),
    }


def recommend(speed: dict[str, dict], memory: list[dict], failed: dict[str, str]) -> dict[str, Any]:
    """Return the recommended precision, and the reasons in whole sentences."""
    base, *others = [name for name in speed if name not in failed]
    peaks = {row["precision"]: row["peak"] for row in memory}
    gains = {name: speed[base]["shortest"] / speed[name]["shortest"] for name in others}
    savings = {name: peaks[base] / peaks[name] if peaks.get(base) and peaks.get(name) else None for name in others}
    words = [f"{name} does not run: {reason}" for name, reason in failed.items()]
    if not others:
        return {"precision": base, "speedup": gains, "memory_saving": savings, "words": words}
    best = max(others, key=gains.__getitem__)
    noise = max(entry["longest"] / entry["shortest"] for entry in speed.values())
    gained = round(gains[best], 2)  # rounded as it is printed
    if gained >= ENOUGH:
        choice = best
        words.append(f"{best} is {gains[best]:.2f} times as fast as {base}: use it.")
    elif max(saving or 0.0 for saving in savings.values()) >= ENOUGH:
        choice = max(others, key=lambda name: savings[name] or 0.0)
        words.append(
            f"AMP saves memory only: {choice} needs {1 / (savings[choice] or 1.0):.0%} of the peak and runs at "
            f"{gains[choice]:.2f} times the speed of {base}. Use it if memory is short."
        )
    else:
        choice = base
        little = ", a gain below 5 %" if gained > 1 else ""
        words.append(f"AMP does not pay here: {best} runs at {gains[best]:.2f} times the speed of {base}{little}.")
    if noise > 1.5:
        words.append(f"The machine was not quiet: one update took up to {noise:.1f} times as long as another.")
    return {"precision": choice, "speedup": gains, "memory_saving": savings, "words": words}
