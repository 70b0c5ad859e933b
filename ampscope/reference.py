"""The run that 16-bit runs are compared with: in float64 if the step is small and can run so, otherwise in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ampscope.errors import InspectError
from ampscope.layer_runs import Seen, run_once
from ampscope.precisions import Precision
from ampscope.subject import Subject, core

LARGEST = 2**27  # values of weights and outputs together: 1 GiB in float64


def reference(subject: Subject, base: Precision, *, ambient: bool) -> tuple[Seen, str]:
    """Return what each module computes, and "float64" or "float32".

    Float64 takes weights and outputs of at most `LARGEST` values, a step that draws no random numbers (in another type
    they would be others), names no float32 in its code, and a device that has float64.
    """
    found = run_once(subject, base, ambient=ambient)
    true = found.seen
    outputs = [tensor for tensors in true.outputs.values() for tensor in tensors]
    size = sum(tensor.numel() for tensor in (*subject.parameters(), *outputs))
    if size > LARGEST or found.drew or subject.device.type == "mps":
        return true, "float32"
    try:
        with _doubled(subject):
            exact = run_once(subject, base, ambient=ambient).seen
    except InspectError:  # such as a product of float32 and float64
        return true, "float32"
    return (exact, "float64") if exact.order == true.order else (true, "float32")


@contextmanager
def _doubled(subject: Subject) -> Iterator[None]:
    """Let the models and the batch hold float64; afterwards they hold the same tensors as before."""
    owners = [module for model in subject.models.values() for module in core(model).modules()]
    parameters = [(parameter, parameter.data, parameter.grad) for parameter in subject.parameters()]
    buffers = [
        (module, name, buffer)
        for module in owners
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    batch, call = subject.batch, subject._call
    try:
        for parameter, data, _ in parameters:
            parameter.grad = None
            parameter.data = _double(data)
        for module, name, buffer in buffers:
            module._buffers[name] = _double(buffer)
        subject.batch, subject._call = tree_map(_double, batch), None  # the call holds the batch
        yield
    finally:
        subject.batch, subject._call = batch, call
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, data, gradient in parameters:
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
