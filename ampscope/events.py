"""Find the cause of a failed update in a watched training by repeating its calls, and describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ampscope.finite import Origin, cures, is_dangerous
from ampscope.gradients import Gradients
from ampscope.repeating import Call, Calls, finite, first_origin, wrong_inputs

SHOWN = 4  # looks, or names, in a message


def finding(
    repeated: Calls,
    calls: list[Call],
    gradients: Gradients,
    names: list[str],
    measured: torch.Tensor | None,
    *,
    good: bool | None,
    batch: Any = None,
) -> dict[str, Any]:
    """Return what went wrong in an update, while the models have the weights that it began with.

    `measured` are the gradients called `names`; `good` says if the loss was finite, None if nobody looked. `batch` is
    what the loop loaded, if that was seen.
    """
    models = repeated.models
    values = measured.tolist() if measured is not None else [float("nan") for _ in names]
    bad = [name for name, value in zip(names, values, strict=True) if not value < float("inf")]
    weights = [name for name, part in _parameters(models).items() if not finite(part)]
    first = gradients.first(bad) if bad and measured is not None else None
    first = weights[0] if weights else first
    forward = backward = None
    reason = None if calls else "no call of the model was seen"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        reason = "one rank alone must not begin a collective operation"
    if not weights and reason is None:
        if good is not True:
            forward, reason = repeated.origin(calls, backward=False)
        if forward is None and reason is None and good is not False:
            backward, reason = repeated.origin(calls, backward=True)
    came_back = [gradient for call in calls for gradient in call.gradients.values()]
    return {
        "parameter": first,
        "bad": len(bad),
        "of": len(names),
        "forward": _described(models, forward),
        "backward": _described(models, backward),
        "loss": good,
        "from_loss": reason is None and (good is False or not all(map(finite, came_back))),
        "not_repeated": reason,
        "weights": weights[:SHOWN],
        "batch": wrong_inputs(calls, batch),
        "before": gradients.before(first) if first else [],
        "buffers": [],
    }


def second_look(models: Mapping[str, nn.Module], call: Call, *, good: bool) -> dict[str, Any]:
    """Return where a call of a model made its first value that is not finite; `good` says if its loss was finite.

    Keys: phase, module, kind, op, output, inputs, place, where, value; `overflow` is True if the same call is finite
    without autocast; `cures`, the best first, if the operator has any; and `text`, a clause. Without an origin there
    are `cures` and `text` alone.
    """
    batch = wrong_inputs([call])
    if batch is not None:
        return {"text": batch, "cures": ["look at where these values were made"]}
    origin, failed = first_origin(models, [call], backward=good)
    if origin is None:
        if failed is not None:
            return {"text": f"it could not be repeated ({failed})", "cures": []}
        lost = not all(map(finite, call.gradients.values()))
        text = "what the model put out was finite, and the loss was not" if not good or lost else ""
        return {"text": text, "cures": []}
    plain = call.dtype is not None and first_origin(models, [replace(call, dtype=None)], backward=good) == (None, None)
    found = _described(models, origin) or {}
    start = "the loss was finite, the way back was not" if good else "the forward pass was not finite"
    text = f"{start} from {_origin_in_words(found)}"
    advice = cures(origin, overflow=plain) if plain or origin.phase == "backward" or is_dangerous(origin) else []
    return {"phase": "backward" if good else "forward", **found, "overflow": plain, "cures": advice, "text": text}


def _parameters(models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return all parameters, including those that are not trained."""
    return {
        ".".join(word for word in (prefix, name) if word): parameter
        for prefix, part in models.items()
        for name, parameter in part.named_parameters()
    }


def _described(models: Mapping[str, nn.Module], origin: Origin | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    prefix = next((name for name in models if name and f"{origin.module}.".startswith(f"{name}.")), "")
    module = models[prefix].get_submodule(origin.module[len(prefix) :].lstrip(".")) if prefix in models else None
    record = origin.record()
    kept = {key: record[key] for key in ("module", "op", "output", "inputs", "place")}
    where = str(origin.place) if origin.place is not None else None
    return {**kept, "kind": type(module).__name__, "value": origin.kind, "where": where}


def in_words(event: dict[str, Any], *, skipped: bool) -> str:
    """Describe one event in one to four sentences."""
    what = f"skipped at loss scale {event['scale']:,.10g}" if skipped else "not finite"
    text = f"update {event['update']:,} was {what}: "
    if event["weights"]:
        text += f"weights were not finite before it, the first of them {event['weights'][0]}"
        return f"{text}: look at the step of update {event['update'] - 1:,}." if event["update"] > 1 else f"{text}."
    if event["batch"]:
        text += f"{event['batch']}; "
    if event["forward"] is not None:
        text += f"the forward pass was not finite from {_origin_in_words(event['forward'])}. "
    elif event["backward"] is not None:
        text += f"the loss was finite, the way back was not from {_origin_in_words(event['backward'])}. "
    elif event["not_repeated"] and not event["after_backward"]:
        text += f"its calls could not be repeated ({event['not_repeated']}). "
    elif event["from_loss"]:
        line = f" ({event['line']})" if event["line"] else ""
        text += f"what the model put out was finite, and what came back from the loss{line} was not. "
    if event["after_backward"]:
        text += f"{event['parameter']} had a bad gradient, which the backward pass had left finite. "
    elif event["forward"] is None and event["parameter"] is not None:
        text += (
            f"{event['parameter']} had the first bad gradient on the way back, of {event['bad']} among {event['of']}. "
        )
    before = event["before"][-SHOWN:]
    if before:
        moved = ", ".join(f"{entry['largest']:.3g} ({entry['update']:,})" for entry in before)
        text += f"The largest gradient there in the updates before: {moved}."
    return text.rstrip(" ;")


def _origin_in_words(origin: dict[str, Any]) -> str:
    text = f"{origin['module'] or 'the model'} ({origin['kind']}) on"
    text += f", {origin['op']} at {origin['where']}" if origin["where"] else f", {origin['op']}"
    ranges = [f"{entry['min']:.3g} to {entry['max']:.3g}" for entry in origin["inputs"] if entry["min"] is not None]
    text += f", whose inputs range from {', '.join(ranges)}" if ranges else ""
    return f"{text}; it gave {origin['value']} in {origin['output']}"
