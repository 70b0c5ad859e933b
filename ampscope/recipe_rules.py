"""Rules about how AMP's recipe is written: autocast, scaler, clipping, optimizer, reads by the host, 16-bit weights."""

from __future__ import annotations

import inspect
from collections import Counter

import torch

from ampscope.execution import Event
from ampscope.findings import Finding
from ampscope.places import Place, kind_of_file, line_with, users_sources
from ampscope.subject import Subject
from ampscope.tracing import AMP_TYPES, Trace

READS = ("item", "tolist", "cpu", "numpy")
NARROWING = {  # the likeliest first; a line of autocast's is none
    torch.float16: (r"\.half\(|\.to\(.*(float16|half)", r"^(?!.*autocast).*torch\.(float16|half)\b"),
    torch.bfloat16: (r"\.bfloat16\(|\.to\(.*bfloat16", r"^(?!.*autocast).*torch\.bfloat16\b"),
}


def level_of(place: Place | None) -> str:
    return "note" if place is not None and not place.own else "finding"


def recipe_findings(subject: Subject, trace: Trace) -> list[Finding]:
    """What the step does as it was written: the events of one run of it, in order."""
    events = trace.execution.events if trace.error is None else trace.first_events
    return [
        *_reads(trace),
        *_weights(subject),
        *_regions(events),
        *_scaler(events),
        *_precision(events, trace, subject),
        *[
            Finding(
                "zero-grad-in-place",
                "Gradients of the step before are kept and filled with zeros.",
                ["zero_grad(set_to_none=True), which is the default"],
                place,
                level=level_of(place),
            )
            for place in trace.zeroed
        ],
    ]


def _reads(trace: Trace) -> list[Finding]:
    found = []
    for (place, what), count in trace.synchronisations.items():
        if what not in READS:
            continue
        times = "once" if count == 1 else f"{count} times"
        if what == "numpy":
            cures = ["the same in torch operators, or a custom operator of torch.library with an autocast rule"]
            found.append(Finding("numpy", f"numpy is called {times} in a step.", cures, place, level=level_of(place)))
        else:
            cures = ["keep the value a tensor on the device, and read it every hundred steps or at the epoch's end"]
            message = f"The value is read {times} in a step ({what}); on a GPU each read waits for all work before it."
            found.append(Finding("host-sync", message, cures, place, op=what, level=level_of(place)))
    return found


def _weights(subject: Subject) -> list[Finding]:
    counts: Counter = Counter()
    first: dict[torch.dtype, str] = {}
    total = 0
    for name, parameter in subject.named_parameters():
        if parameter.requires_grad:
            total += parameter.numel()
            counts[parameter.dtype] += parameter.numel()
            first.setdefault(parameter.dtype, name)
    found = []
    for dtype in AMP_TYPES:
        if counts[dtype]:
            rule = "half-weights" if dtype is torch.float16 else "bfloat16-weights"
            found.append(
                Finding(
                    rule,
                    f"{counts[dtype]:,} of {total:,} trained weights are {str(dtype).removeprefix('torch.')}, "
                    f"the first of them {first[dtype]}.",
                    ["leave the weights float32; autocast makes 16-bit copies of them"],
                    narrowing_line(subject, dtype),
                    module=first[dtype].rpartition(".")[0],
                )
            )
    wide = [name for name, parameter in subject.named_parameters() if parameter.dtype is torch.float64]
    if wide:
        found.append(
            Finding(
                "float64",
                f"{len(wide)} parameters are float64, the first of them {wide[0]}.",
                ["model.float()"],
                module=wide[0].rpartition(".")[0],
            )
        )
    return found


def narrowing_line(subject: Subject, dtype: torch.dtype) -> Place | None:
    """The line of the user's that makes something 16 bits: in the models' classes, else where make() is written."""
    sources = [*_sources([type(module) for _, module in subject.named_modules()]), *users_sources()]
    for pattern in NARROWING[dtype]:
        place = line_with(pattern, sources)
        if place is not None:
            return place
    return None


def _sources(classes: list[type]) -> list[tuple[str, int, list[str]]]:
    """(file, first line, lines) of the classes that are the user's own."""
    found = {}
    for kind in classes:
        try:
            file = inspect.getfile(kind)
            if kind not in found and kind_of_file(file) == "user":
                lines, start = inspect.getsourcelines(kind)
                found[kind] = (file, start, lines)
        except (TypeError, OSError):
            continue
    return [*found.values()]


def _regions(events: list[Event]) -> list[Finding]:
    found = []
    for event in events:
        if not event.autocast:
            continue
        if event.kind == "backward":
            cures = ["let the autocast block end before backward: each operator's backward takes its forward's type"]
            message = "backward is called inside the autocast block."
            found.append(Finding("backward-in-autocast", message, cures, event.place, level=level_of(event.place)))
        elif event.kind in ("step", "scaler.step"):
            cures = ["let autocast wrap forward and loss only"]
            message = "The optimizer steps inside the autocast block."
            found.append(Finding("step-in-autocast", message, cures, event.place, level=level_of(event.place)))
    return found


def _scaler(events: list[Event]) -> list[Finding]:
    """The order of the scaler's calls."""
    found = []
    scaled = False
    unscaled = False
    ever_scaled = False
    backward = None
    for event in events:
        if event.kind == "scaler.scale" and event.details["enabled"]:
            scaled, ever_scaled, unscaled = True, True, False
        elif event.kind == "backward":
            backward = event
        elif event.kind == "scaler.unscale_":
            unscaled = True
        elif event.kind == "scaler.update":
            scaled = False
        elif event.kind == "clip" and scaled and not unscaled:
            cures = ["scaler.unscale_(optimizer) once before clipping"]
            message = "Clipping compares gradients that are multiplied by the loss scale with a limit that is not."
            found.append(Finding("clip-before-unscale", message, cures, event.place, level=level_of(event.place)))
        elif event.kind == "step" and scaled and not unscaled:
            cures = ["scaler.step(optimizer) instead of optimizer.step()"]
            message = "The loss was scaled, but the optimizer steps without the scaler."
            found.append(Finding("step-around-scaler", message, cures, event.place, level=level_of(event.place)))
        elif event.kind == "scaler.step" and event.details["enabled"] and not ever_scaled:
            cures = ["scaler.scale(loss).backward()"]
            message = "scaler.step divides by the scale, but the loss was never multiplied by it."
            place = (backward or event).place
            found.append(Finding("loss-not-scaled", message, cures, place, level=level_of(place)))
    steps = [event for event in events if event.kind == "scaler.step" and event.details["enabled"]]
    # A scaler that never scaled refuses the step, so that update() was not reached.
    if steps and ever_scaled and not any(event.kind == "scaler.update" for event in events):
        message = "No scaler.update() follows: after an overflow the scale stays, and every later update is skipped."
        cures = ["scaler.update() once at the end of each update"]
        found.append(Finding("scaler-not-updated", message, cures, steps[-1].place, level=level_of(steps[-1].place)))
    return found


def _precision(events: list[Event], trace: Trace, subject: Subject) -> list[Finding]:
    """What autocast and scaler are together, as written."""
    regions = [event for event in events if event.kind == "autocast" and event.details["enabled"]]
    scales = [event for event in events if event.kind == "scaler.scale" and event.details["enabled"]]
    if not regions:
        return []
    region = regions[0]
    dtypes = {event.details["dtype"] for event in regions}
    found = []
    if scales and dtypes == {torch.bfloat16}:
        cures = ["leave the scaler out, or GradScaler(enabled=False)"]
        message = "bfloat16 has float32's range: the scaler only costs time and skips updates."
        place = scales[0].place
        found.append(Finding("scaler-with-bfloat16", message, cures, place, level=level_of(place)))
    backward = [event for event in events if event.kind == "backward"]
    stepped = any(event.kind == "scaler.step" and event.details["enabled"] for event in events)  # loss-not-scaled
    if torch.float16 in dtypes and backward and not scales and not stepped:
        cures = ["torch.amp.GradScaler: scale(loss).backward(), step(optimizer), update()", "bfloat16"]
        message = "autocast runs in float16, but the loss is not scaled."
        place = backward[0].place
        found.append(Finding("no-scaler", message, cures, place, level=level_of(place)))
    outputs = {key[4] for key in trace.rows}
    if not outputs & {"float16", "bfloat16"} and trace.error is None:
        other = region.details["device"] != subject.device.type
        reason = (
            f"autocast is on for {region.details['device']}, but the tensors are on {subject.device.type}."
            if other
            else "autocast is on, but no operator of its lists runs inside it."
        )
        cures = [f'torch.autocast("{subject.device.type}")'] if other else ["wrap the forward pass and the loss"]
        found.append(Finding("autocast-no-effect", reason, cures, region.place, level=level_of(region.place)))
    return found
