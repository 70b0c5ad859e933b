"""Rules about how AMP's recipe is written: autocast, scaler, clipping, optimizer, reads by the host, 16-bit weights."""

from __future__ import annotations

import torch

from ampscope.execution import Event
from ampscope.findings import Finding
from ampscope.observed import line_of_type
from ampscope.places import Place
from ampscope.subject import Subject
from ampscope.tensors import dtype_name
from ampscope.trace import Trace
from ampscope.training_rules import training_findings

OTHER_TYPES = {torch.float16: "half-weights", torch.bfloat16: "bfloat16-weights", torch.float64: "float64"}
READS = ("item", "tolist", "cpu", "numpy")


def level_of(place: Place | None) -> str:
    return "note" if place is not None and not place.own else "finding"


def recipe_findings(subject: Subject, trace: Trace) -> list[Finding]:
    """What the step does as it was written: the events of one run of it, in order."""
    events = trace.execution.events if trace.error is None else trace.first_events
    return [
        *_reads(trace),
        *_weights(subject),
        *_regions(events),
        *_scaler(events, ended=not subject.goes_on and (trace.error is None or trace.first_ended)),
        *_order(events),
        *training_findings(subject, trace),
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
    """Trained weights that are not float32."""
    trained = [(name, parameter) for name, parameter in subject.named_parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for _, parameter in trained)
    found = []
    for dtype, rule in OTHER_TYPES.items():
        some = [(name, parameter) for name, parameter in trained if parameter.dtype is dtype]
        if not some:
            continue
        first, parameter = some[0]
        count = sum(parameter.numel() for _, parameter in some)
        message = f"{count:,} of {total:,} trained weights are {dtype_name(dtype)}, the first of them {first}."
        cures = ["leave the weights float32; autocast makes 16-bit copies of them"]
        if rule == "float64":
            cures = ["float32: numpy makes float64 unless told otherwise; model.float() casts all weights"]
        place = line_of_type(subject, parameter)
        found.append(Finding(rule, message, cures, place, module=first.rpartition(".")[0]))
    return found


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


def _broken(rule: str, event: Event, message: str, *cures: str) -> Finding:
    return Finding(rule, message, [*cures], event.place, level=level_of(event.place))


def _scaler(events: list[Event], *, ended: bool) -> list[Finding]:
    """The calls of each scaler; `ended` is True if nothing is missing after the last of them."""
    for number, event in enumerate(events):
        event.number = number
    found = [finding for event in events for finding in _on_scaled_gradients(event)]
    on = [event for event in events if event.details.get("enabled") and event.kind.startswith("scaler.")]
    for scaler in dict.fromkeys(event.details["scaler"] for event in on):
        others = [event for event in events if event.kind == "step"]
        own = [event for event in on if event.details["scaler"] == scaler]
        found += _one_scaler(sorted([*own, *others], key=lambda event: event.number))
        steps = [event for event in own if event.kind == "scaler.step"]
        # A scaler that was called wrongly refuses the step, so that update() was not reached.
        if ended and steps and not found and not any(event.kind == "scaler.update" for event in own):
            message = (
                "No scaler.update() follows: after an overflow the scale stays, and every later update is skipped."
            )
            cure = "scaler.update() once at the end of each update"
            found.append(_broken("scaler-not-updated", steps[-1], message, cure))
    return found


def _one_scaler(events: list[Event]) -> list[Finding]:
    """The order of one scaler's calls, and of steps without a scaler."""
    found = []
    scaled = False  # since the last update
    around = False  # an optimizer stepped without the scaler since then
    updated: Event | None = None  # the last update since which nothing was scaled
    scaled_at: Event | None = None
    done: dict[tuple[str, int], Event] = {}  # by call and optimizer, since the last update
    for event in events:
        optimizer = event.details.get("optimizer", 0)
        if event.kind == "step":
            around = True
        elif event.kind == "scaler.scale":
            scaled, updated, scaled_at = True, None, event
        elif event.kind == "scaler.update":
            if scaled and not done and not around:
                message = "The scale is updated before any optimizer has stepped."
                found.append(_broken("update-too-early", event, message, "scaler.update() once, after the last step"))
            else:
                updated = event
            scaled, around, done = False, False, {}
        else:
            found += _on_gradients_of(event, updated, scaled_at, done)
            done[event.kind, optimizer] = event
    return found


def _on_gradients_of(
    event: Event, updated: Event | None, scaled_at: Event | None, done: dict[tuple[str, int], Event]
) -> list[Finding]:
    """What is wrong with a call of unscale_ or step for one optimizer."""
    optimizer = event.details["optimizer"]
    if event.details["another"]:
        message = "These gradients carry the scale of another GradScaler than the one that divides by its own here."
        return [_broken("loss-not-scaled", event, message, "one scaler for all losses and optimizers")]
    if event.details["never_scaled"] is not None:
        message = "The scaler divides these gradients by the scale, but their loss was never multiplied by it."
        place = event.details["never_scaled"]
        return [_broken("loss-not-scaled", place, message, "scaler.scale(loss).backward()")]
    earlier = done.get(("scaler.step", optimizer)) or done.get((event.kind, optimizer))
    if earlier is not None:
        return [_again(event, earlier, scaled_at)]
    if event.kind == "scaler.step" and updated is not None and ("scaler.unscale_", optimizer) not in done:
        message = "The scale is updated, and forgotten, while gradients still carry it: a step follows."
        return [_broken("update-too-early", updated, message, "scaler.update() once, after the last step")]
    return []


def _again(event: Event, earlier: Event, scaled_at: Event | None) -> Finding:
    """A second unscale_ or step for one optimizer: of one update, or of the next one if update() is missing."""
    if scaled_at is not None and scaled_at.number > earlier.number and earlier.kind == "scaler.step":
        message = "No scaler.update() follows: after an overflow the scale stays, and every later update is skipped."
        return _broken("scaler-not-updated", earlier, message, "scaler.update() once at the end of each update")
    if event.kind == "scaler.step":
        message = "scaler.step is called twice for one optimizer, with no update between."
        return _broken("unscaled-twice", event, message, "scaler.step(optimizer) once an update")
    message = "The gradients of this optimizer were divided by the loss scale already."
    cures = ["scaler.unscale_(optimizer) once an update, after the last backward and before step"]
    return _broken("unscaled-twice", event, message, *cures)


def _on_scaled_gradients(event: Event) -> list[Finding]:
    """What one call does wrong to gradients, or to a loss, that carry the loss scale."""
    details = event.details
    if event.kind == "clip":
        message = "Clipping compares gradients that are multiplied by the loss scale with a limit that is not."
        return [_broken("clip-before-unscale", event, message, "scaler.unscale_(optimizer) once before clipping")]
    if event.kind == "edit":
        message = "Gradients are changed in place while they are still multiplied by the loss scale."
        return [_broken("scaled-gradients", event, message, "scaler.unscale_(optimizer) once before this line")]
    if event.kind == "penalty":
        message = "autograd.grad of a scaled loss gives scaled gradients, and these are computed with as they are."
        cures = ["divide them by scaler.get_scale() first, and compute the penalty under autocast"]
        return [_broken("scaled-gradients", event, message, *cures)]
    if event.kind == "step" and details.get("scaled"):
        message = "The loss was scaled, but the optimizer steps without the scaler."
        return [_broken("step-around-scaler", event, message, "scaler.step(optimizer) instead of optimizer.step()")]
    if event.kind == "backward" and details.get("onto_unscaled"):
        message = "Scaled gradients are added to gradients that unscale_ has divided by the scale already."
        return [_broken("backward-after-unscale", event, message, "scaler.unscale_(optimizer) after the last backward")]
    if event.kind == "scaler.scale" and details.get("again"):
        message = "The loss is made of one that was multiplied by the scale already."
        return [_broken("scaled-twice", event, message, "scaler.scale(loss) once, in the call of backward")]
    return []


def _order(events: list[Event]) -> list[Finding]:
    """Gradients that are never cleared, or too early, and schedules that step before their optimizer."""
    found = _without_gradients(events)
    scheduled: dict[int, Event] = {}
    backward: Event | None = None
    for event in events:
        optimizer = event.details.get("optimizer", 0)
        if event.kind == "backward":
            backward = backward or event
        elif event.kind == "schedule":
            scheduled.setdefault(optimizer, event)
        elif event.kind in ("step", "scaler.step"):
            if event.details.get("again") and backward is not None:
                message = "backward adds to the gradients of the update before, which nobody has cleared."
                cures = ["optimizer.zero_grad() once an update"]
                place = backward.details.get("users") or backward.place
                found.append(Finding("gradients-kept", message, cures, place, level=level_of(place)))
            if optimizer in scheduled:
                message = "The schedule steps before its optimizer, so that the first learning rate is passed over."
                cures = ["scheduler.step() after optimizer.step()"]
                found.append(_broken("schedule-first", scheduled[optimizer], message, *cures))
            scheduled.pop(optimizer, None)
    return found


def _without_gradients(events: list[Event]) -> list[Finding]:
    """Steps of an update in which no optimizer has a gradient."""
    steps = [event for event in events if event.kind in ("step", "scaler.step") and "missing" in event.details]
    backward = [event for event in events if event.kind == "backward"]
    if not steps or not backward or not all(event.details["missing"] for event in steps):
        return []
    between = events[events.index(backward[-1]) : events.index(steps[0])]
    cleared = [event for event in between if event.kind == "zero_grad"]
    if cleared:
        message = "The gradients are cleared between backward and the optimizer's step, so that nothing is trained."
        return [_broken("trains-nothing", cleared[0], message, "zero_grad before backward, or after the step")]
    if any(event.details["missing"] == "zero" for event in steps):  # they may be too small for their type
        return []
    message = "The optimizer steps, but no gradient of this backward pass reached its parameters."
    cures = ["let the loss depend on them, without detach, item or no_grad", "hand these parameters to the optimizer"]
    return [_broken("trains-nothing", backward[-1], message, *cures)]


def _precision(events: list[Event], trace: Trace, subject: Subject) -> list[Finding]:
    """What autocast and scaler are together, as written."""
    regions = [event for event in events if event.kind == "autocast" and event.details["enabled"]]
    scales = [event for event in events if event.kind == "scaler.scale" and event.details["enabled"]]
    if not regions:
        return []
    region = regions[0]
    dtypes = {event.details["dtype"] for event in regions}
    found = []
    for at, (op, dtype) in trace.narrow.items():
        if at in trace.went_back:
            message = f"{op} computes in {dtype} here, outside autocast, which would compute it in float32."
            cures = ["let the autocast block hold the loss, too", "outputs.float() before the loss"]
            found.append(Finding("narrow-loss", message, cures, at, op=op, level=level_of(at)))
    if scales and dtypes == {torch.bfloat16}:
        cures = ["leave the scaler out, or GradScaler(enabled=False)"]
        message = "bfloat16 has float32's range: the scaler only costs time and skips updates."
        place = scales[0].place
        found.append(Finding("scaler-with-bfloat16", message, cures, place, level=level_of(place)))
    backward = [event for event in events if event.kind == "backward"]
    stepped = any(event.kind == "scaler.step" and event.details["enabled"] for event in events)  # loss-not-scaled
    if torch.float16 in dtypes and backward and not scales and not stepped:
        cures = [
            "torch.amp.GradScaler: scale(loss).backward(), step(optimizer), update()",
            "torch.autocast(device, torch.bfloat16): without a dtype it takes float16 on GPUs",
        ]
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
