"""doctor --ladder: the gain of each step since the 2020 loop on this machine, and why the gain ends.

Each rung is the update of one training, timed in a process of its own beside the rung that it builds on and the first
one; the bound is a roofline of this machine's measured rates. Knows nothing of accuracy: no run is trained.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from ampscope.roofline import Operator, beyond, roofline
from measuring.advice import why_it_ends
from measuring.probe import (
    PATIENCE,
    PRODUCT_SIZE,
    ROUNDS,
    Probe,
    batch_that_fits,
    update_seconds,
    updates_of_a_round,
    what_may_help,
)
from measuring.rungs import FIRST, Rung, RungBench, rungs_for, step_up
from precision import sensible_precisions
from system.machine import cpu_instructions, device_name
from utils import RunError, log

LOSS = 0.97  # a rung slower than this against the one before is left out of those that follow
COMPILING_SECONDS = 900  # for torch.compile, before the rung is given up


def climb(
    device: torch.device, *, model_name: str = "ResNet18", image_size: int = 256, batch_size: int = 256
) -> dict[str, Any]:
    """Measure every rung that `device` supports; return plain values for reports.ladder and for JSON.

    Batches too large for the device's memory or too slow for a CPU are made smaller, with a remark. Raise RunError if
    not even the first rung runs.
    """
    batch = batch_that_fits(device, image_size, batch_size)
    remark = f"{batch} images in an update, not {batch_size}: more would not fit, or keep a CPU no busier."
    remark = remark if batch < batch_size else ""
    request = {"device": str(device), "model_name": model_name, "image_size": image_size, "batch_size": batch}
    flags = cpu_instructions() if device.type == "cpu" else set()
    ladder = _Ladder(device, request)
    try:
        for rung in rungs_for(device, sensible_precisions(device), flags):
            ladder.climb(rung)
    finally:
        ladder.close()
    found = {
        "machine": {"name": device_name(device), "device": str(device), "torch": str(torch.__version__)},
        "setting": {**request, "rounds": ROUNDS, "remark": remark},
        "memory_kind": ladder.memory_kind,
        "rungs": ladder.rungs,
    }
    return {**found, **bounds(ladder.rungs, ladder.evidence, batch)}


class _Ladder:
    """The rungs measured so far, and the processes that are still needed: the first rung's and the best one's.

    On a GPU, whose memory may hold only one process, the rungs come one after another.
    """

    def __init__(self, device: torch.device, request: dict[str, Any]):
        self.device = device
        self.request = request
        self.turns = device.type != "cuda"
        self.rungs: list[dict[str, Any]] = []
        self.evidence: list[dict[str, Any] | None] = []
        self.memory_kind = ""
        self._settings: dict[str, Any] = {}
        self._first: Probe | None = None
        self._best: Probe | None = None
        self._seconds: dict[str, float] = {}  # of an update, for the first and the best rung on a GPU

    def climb(self, rung: Rung) -> None:
        """Measure one rung against the best so far and the first."""
        if rung.skipped:
            self._skip(rung.name, rung.skipped)
            return
        settings = step_up(self._settings, rung)
        log.info(f"measuring: {rung.name}")
        probe = Probe(RungBench, keep_memory=settings["keep_memory"], settings=settings, **self.request)
        try:
            measured = self._measure(probe, compiled=settings["compile_mode"] is not None)
            evidence = probe.ask("evidence", size=PRODUCT_SIZE["cpu" if self.device.type == "cpu" else "gpu"])
        except RunError as error:
            probe.close()
            if rung is FIRST:
                raise RunError(f"{error}{what_may_help(str(error))}") from None
            self._skip(rung.name, str(error))
            return
        kept = measured["speedup_before"] is None or measured["speedup_before"] >= LOSS
        self.rungs.append({"name": rung.name, "settings": settings, "kept": kept, "skipped": "", **measured})
        self.evidence.append(evidence)
        self._keep(probe, settings, measured, kept)

    def _measure(self, probe: Probe, *, compiled: bool) -> dict[str, Any]:
        """Return the rounds of a new rung, and those of the first and the best if they take turns with it."""
        warm = probe.ask("warm_up", patience=COMPILING_SECONDS if compiled else PATIENCE)
        pairs = (("first", self._first), ("best", self._best))
        others = {name: other for name, other in pairs if other is not None}  # empty on a GPU
        slowest = max([warm["seconds"], *self._seconds.values()])
        updates = updates_of_a_round(slowest)
        rounds = []
        against: dict[str, list[dict[str, Any]]] = {name: [] for name in others}
        for _ in range(ROUNDS):
            rounds.append(probe.ask("round", updates=updates))
            for name, other in others.items():
                same = name == "best" and others.get("first") is other
                against[name].append(against["first"][-1] if same else other.ask("round", updates=updates))
        mine = update_seconds(rounds)
        memory = probe.ask("memory")
        self.memory_kind = memory["memory_kind"]
        batch = self.request["batch_size"]
        seconds = statistics.median(mine)
        return {
            "images_per_second": batch / seconds,
            "seconds_per_update": seconds,
            "spread": (max(mine) - min(mine)) / seconds,
            "speedup_before": self._ratio("best", mine, against),
            "speedup_first": self._ratio("first", mine, against) or 1.0,
            "training_mb": memory["peak_memory_mb"] - memory["before_mb"],
        }

    def _ratio(self, name: str, mine: list[float], against: dict[str, list[dict[str, Any]]]) -> float | None:
        """Return the speed-up against another rung: the median over neighbouring rounds, or of medians on a GPU."""
        if name in against:
            theirs = update_seconds(against[name])
            return statistics.median(other / own for other, own in zip(theirs, mine, strict=True))
        return self._seconds[name] / statistics.median(mine) if name in self._seconds else None

    def _keep(self, probe: Probe, settings: dict[str, Any], measured: dict[str, Any], kept: bool) -> None:
        """End the processes that are not needed any more."""
        self._seconds.setdefault("first", measured["seconds_per_update"])
        if kept:
            self._settings = settings
            self._seconds["best"] = measured["seconds_per_update"]
        if not self.turns or not kept:
            probe.close()
            return
        if self._best is not None and self._best is not self._first:
            self._best.close()
        self._best = probe
        self._first = self._first or probe

    def _skip(self, name: str, reason: str) -> None:
        self.rungs.append({"name": name, "kept": False, "skipped": reason.rstrip(".")})
        self.evidence.append(None)

    def close(self) -> None:
        for probe in (self._first, self._best):
            if probe:
                probe.close()


def bounds(rungs: list[dict[str, Any]], evidence: list[dict[str, Any] | None], batch_size: int) -> dict[str, Any]:
    """Add its bound to each rung; return the rates, the roofline of the last eager rung, and why the gain ends.

    Rates are the best that any rung's process measured for the same kind of product. A compiled rung is compared with
    the bound of the eager one before it; it may exceed this bound, because it fuses operators.
    """
    present = [found for found in evidence if found]
    bandwidth = max(found["bandwidth"] for found in present)
    best: dict[tuple[str, str], float] = {}
    for rung, found in zip(rungs, evidence, strict=True):
        for name, rate in (found or {"rates": {}})["rates"].items():
            key = (_mode(rung), name)
            best[key] = max(best.get(key, 0.0), rate)
    operators: list[Operator] = []
    lines = []
    for rung, found in zip(rungs, evidence, strict=True):
        if found is None:
            continue
        operators = found["operators"] or operators
        rates = {name: rate for (mode, name), rate in best.items() if mode == _mode(rung)}
        line = roofline(operators, rates=rates, bandwidth=bandwidth, measured=found["measured"])
        rung["bound_images_per_second"] = batch_size / line["bound_seconds"]
        rung["share_of_bound"] = rung["images_per_second"] / rung["bound_images_per_second"]
        if rung["kept"]:
            lines.append((rung, line, bool(found["operators"])))
    bottom, first, _ = lines[0]
    last, eager = next((rung, line) for rung, line, counted in reversed(lines) if counted)
    top = max((rung for rung, *_ in lines), key=lambda rung: rung["speedup_first"])
    shares = {"first_share": bottom["share_of_bound"], "share": top["share_of_bound"]}
    why = why_it_ends(first, eager, speedup=top["speedup_first"], **shares)
    names = {f"{name} ({mode})" if mode else name: rate for (mode, name), rate in sorted(best.items())}
    reached = [rung["share_of_bound"] for rung in rungs if not rung["skipped"]]
    known = [group for group in eager["groups"].values() if group["measured_seconds"]]
    reached += [group["bound_seconds"] / group["measured_seconds"] for group in known]
    return {
        "bandwidth": bandwidth,
        "rates": names,
        "roofline": eager,
        "roofline_of": last["name"],
        "remarks": beyond(reached),
        "why": why,
    }


def _mode(rung: dict[str, Any]) -> str:
    """Describe how a rung multiplies float32 numbers: unchanged, rounded to TF32 or to bfloat16."""
    if rung["skipped"]:
        return ""
    return {"tf32": "TF32"}.get(
        rung["settings"]["precision"], {"bfloat16": "bfloat16"}.get(rung["settings"]["products"], "")
    )
