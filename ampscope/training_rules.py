"""Rules about what a step trains: a loss with a graph, a gradient for every parameter, layers in training mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ampscope.findings import Finding
from ampscope.observed import line_of_evaluation
from ampscope.places import Place, class_sources, kind_of_file, line_with
from ampscope.subject import Subject, core, losses_in
from ampscope.trace import Trace

SHOWN = 4  # names in a sentence


def training_findings(subject: Subject, trace: Trace) -> list[Finding]:
    """What the step as it is written leaves untrained."""
    if trace.error is not None:
        return []
    return [*_loss(subject, trace), *_without_gradient(subject, trace), *_in_evaluation(subject, trace)]


def _loss(subject: Subject, trace: Trace) -> list[Finding]:
    events = {event.kind for event in trace.execution.events}
    if events & {"backward", "grad", "step", "scaler.step"}:
        return []
    result = trace.execution.result
    losses = losses_in(result)
    function = subject.step or subject.loss
    if any(loss.requires_grad for loss in losses.values()):
        many = [loss.numel() for loss in losses.values() if loss.numel() > 1]
        if not many or function is None:
            return []
        message = f"The loss has {many[0]:,} values, and backward takes one. Here their sum is taken."
        cures = ["its mean, or the loss function's own reduction"]
        return [Finding("vector-loss", message, cures, _last_line(function))]
    frozen = not any(parameter.requires_grad for parameter in subject.parameters())
    cures = ["return the loss as it comes out of the loss function, without detach, item or no_grad"]
    if frozen:
        return [Finding("trains-nothing", _why_nothing(subject, result, losses), ["model.requires_grad_(True)"])]
    return [Finding("trains-nothing", _why_nothing(subject, result, losses), cures, _last_line(function))]


def _why_nothing(subject: Subject, result: Any, losses: dict[str, torch.Tensor]) -> str:
    parameters = subject.parameters()
    if not any(parameter.requires_grad for parameter in parameters):
        return f"All {len(parameters)} parameters are frozen: requires_grad is False."
    if result is None:
        return "The step returns nothing and calls no backward."
    if not losses:
        return f"The step returns a value of type {type(result).__name__}, which has no loss with a graph."
    loss = next(iter(losses.values()))
    if not loss.is_floating_point():
        return f"The loss is {str(loss.dtype).removeprefix('torch.')}, which has no gradient."
    return "The loss does not depend on a trained parameter: detach, argmax or no_grad cuts it off."


def _last_line(function: Any) -> Place | None:
    """The last line of a function of the user's."""
    code = getattr(function, "__code__", None)
    if code is None or kind_of_file(code.co_filename) != "user":
        return None
    last = max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
    return Place(code.co_filename, last, code.co_name, "user")


def _without_gradient(subject: Subject, trace: Trace) -> list[Finding]:
    """Trained parameters that no gradient reached; of several models, one that takes no part is left out."""
    if not trace.with_gradient:
        return []
    found = []
    stepped = {id(part) for optimizer in subject.optimizers.values() for part in _parameters_of(optimizer)}
    for prefix, model in subject.owners().items():
        names = [
            name
            for name, parameter in core(model).named_parameters()
            if parameter.requires_grad and parameter.is_leaf and (not stepped or id(parameter) in stepped)
        ]
        reached = {name for name in names if ".".join(part for part in (prefix, name) if part) in trace.with_gradient}
        missing = [name for name in names if name not in reached]
        if not missing or not reached:
            continue
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        message = f"{len(missing)} of {len(names)} trained parameters got none: {', '.join(missing[:SHOWN])}{more}."
        cures = ["let the loss depend on them, or set requires_grad to False, or leave them out of the optimizer"]
        place, level = _owner(core(model), missing[0])
        module = missing[0].rpartition(".")[0]
        found.append(Finding("no-gradient", message, cures, place, module, level=level))
    return found


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [part for group in optimizer.param_groups for part in group["params"]]


def _owner(model: nn.Module, name: str) -> tuple[Place | None, str]:
    """Where a parameter is cut off or made, and whether a library's class or the user's own holds it."""
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        kind = type(model.get_submodule(".".join(path[:depth])))
        sources = class_sources(kind)
        owner = kind_of_file(sources[0][0]) if sources else ""
        if owner == "library":
            return None, "note"
        if owner == "user":
            attribute = path[depth] if depth < len(path) else name.rpartition(".")[2]
            cut = line_with(r"\.detach\(|no_grad\(|\.data\b", sources)
            return cut or line_with(rf"self\.{attribute}\b", sources), "finding"
    return None, "finding"


def _in_evaluation(subject: Subject, trace: Trace) -> list[Finding]:
    if not trace.evaluated:
        return []
    kinds = sorted({*trace.evaluated.values()})
    names = [name or "the model" for name in trace.evaluated]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    message = f"{' and '.join(kinds)} ran in evaluation mode: {', '.join(names[:SHOWN])}{more}."
    first = next(iter(trace.evaluated))
    place = line_of_evaluation(subject, first)
    return [Finding("evaluation-mode", message, ["model.train() before the step"], place, first)]
