"""Why an update of a watched program went wrong: its inputs, and the operator at which it stopped being finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ampscope.finite import Lineage, Origin
from ampscope.memory import of_this_process
from ampscope.places import Place
from ampscope.precisions import Precision
from ampscope.repeating import REGIONS, finite
from ampscope.script_trace import Live, ScriptExecution, ScriptFunctions, ScriptOperators
from ampscope.tensors import address, tensors_in
from ampscope.trace import Trace
from ampscope.updates import ScriptSubject


def norm_of(parameters: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the norm of all dense gradients together; None if there are none."""
    gradients = [part.grad for part in parameters if part.grad is not None and not part.grad.is_sparse]
    if not gradients:
        return None
    with torch.no_grad():
        return torch.nn.utils.get_total_norm(gradients)


def memory() -> int | None:
    """Return the most that CUDA's allocator gave out, elsewhere the memory that this process has now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return of_this_process("VmRSS")


def wrong_inputs(batch: Any, calls: list[tuple]) -> str | None:
    """Name the tensor of the batch, or of what went into the models, that is not finite; count such values."""
    for what, tensors in [("the batch", tensors_in(batch)), *(("the input", tensors_in(call[1:3])) for call in calls)]:
        for index, tensor in enumerate(tensors):
            if not tensor.is_floating_point() or finite(tensor):
                continue
            count = int((~torch.isfinite(tensor)).sum())
            if count != int((tensor == -torch.inf).sum()):  # a mask of -inf is meant
                return f"{what} holds {count:,} values of {tensor.numel():,} that are not finite (its tensor {index})"
    return None


@contextlib.contextmanager
def kept(subject: ScriptSubject) -> Iterator[None]:
    """Put buffers and random numbers back as they were."""
    buffers = [buffer for model in subject.models.values() for buffer in model.buffers()]
    values = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = [subject.device] if subject.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def first_bad(
    subject: ScriptSubject, module: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None
) -> Origin | None:
    """Call a model once more under a trace."""
    execution = ScriptExecution(subject)
    trace = Trace(execution, Lineage())
    live = Live()
    functions = ScriptFunctions(trace, live)
    operators = ScriptOperators(trace, functions, subject, live)
    try:
        precision = Precision(REGIONS.get(dtype, "fp32"), subject.device)
        with torch.no_grad(), precision.autocast(), execution._patches(), functions, operators:
            outputs = module(*args, **kwargs)
    finally:
        for hook in operators.hooks:
            hook.remove()
    bad = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point() and not finite(tensor)]
    found = [trace.lineage.origins[address(tensor)] for tensor in bad if address(tensor) in trace.lineage.origins]
    return next((origin for origin in found if not origin.intended), None)


def in_words(event: dict[str, Any], backward: Place | None) -> str:
    """Say one event in a few sentences."""
    scale = event["scale"]
    what = "was not finite" if scale is None else f"was skipped at loss scale {scale:,.10g}"
    text = f"update {event['update']:,} {what}: "
    if event["weights"]:
        return text + f"the weights were not finite before it, the first of them {event['weights'][0]}."
    origin = event["origin"]
    if event["loss_finite"]:
        text += f"the loss was finite; {event['parameter']} had the first bad gradient on the way back, "
        text += f"of {event['bad']} among {event['of']}."
        if event["bad"] == event["of"] > 1:
            text += " None is good, so it began in the loss or in the last layer."
        if scale is not None and scale > 1:
            text += " The scaler halves its scale and goes on."
    elif origin is not None:
        where = f" at {origin['where']}" if origin["where"] else ""
        text += f"the first {origin['kind']} came out of {origin['op']} in {origin['module'] or 'the model'}{where}"
        text += f", in {origin['output']}."
    else:
        where = f" ({backward})" if backward is not None else ""
        text += f"the loss was not finite, but what the models put out was: look at the loss{where}."
    if event["batch"]:
        text += f" {event['batch'][:1].upper()}{event['batch'][1:]}."
    return text
