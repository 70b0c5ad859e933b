"""Calls as they are written in the program, above autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ampscope.places import Place, place_of_caller
from ampscope.tensors import address
from ampscope.trace import Trace

AMP_TYPES = (torch.float16, torch.bfloat16)
CASTS = {
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.type_as,
}
TO_PYTHON = {torch.Tensor.numpy: "numpy", torch.Tensor.__array__: "numpy", torch.Tensor.tolist: "tolist"}


class Functions(TorchFunctionMode):
    """See calls as they are written: which function, on which line, with autocast on or off."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.stack: list[tuple[str, bool, Place | None]] = []
        self.quiet: list[bool] = []  # of each call: what it reads or makes stays on the host
        self.host: set[int] = set()  # memory that would be the host's if the model were on a GPU
        self.written: dict[int, tuple[Place, torch.Tensor]] = {}  # tensors that the user's own casts made float32

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        execution = self.trace.execution
        if function is torch.Tensor.backward:  # run with this mode on: a checkpoint computes again in there
            with self:
                return _backward(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__", "backward"):
            return function(*args, **kwargs)
        enabled = torch.is_autocast_enabled(execution.device)
        if function in TO_PYTHON and address(args[0]) not in self.host:
            self._reads(TO_PYTHON[function])
        self.stack.append((name, enabled, place_of_caller()))
        self.quiet.append(_on_host(name, args, kwargs))
        try:
            result = function(*args, **kwargs)
        finally:
            self.quiet.pop()
            place = self.stack.pop()[2]
        if name == "scaled_dot_product_attention" and place is not None:
            self.trace.unfused[place] = _unfused(*args, **kwargs)
        if name == "binary_cross_entropy" and enabled and place is not None:
            self.trace.unsafe.setdefault(place, name)
        if name in ("to", "cuda") and isinstance(result, torch.Tensor) and _names_device(name, args, kwargs):
            self.host.discard(address(result))
        if function in CASTS and enabled and isinstance(args[0], torch.Tensor) and place is not None:
            self._cast(args[0], result, place)
        return result

    def _reads(self, what: str) -> None:
        place = place_of_caller()
        if place is not None and not place.via:
            self.trace.synchronisations[place, what] += 1

    def _cast(self, given: torch.Tensor, made: Any, place: Place) -> None:
        if isinstance(made, torch.Tensor) and given.dtype in AMP_TYPES and made.dtype in (torch.float32, torch.float64):
            self.written[address(made)] = (place, made)

    @property
    def current(self) -> tuple[str, bool | None, Place | None]:
        return self.stack[-1] if self.stack else ("", None, None)


def _unfused(
    query: torch.Tensor, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **_more: Any
) -> list[str]:
    """Return what keeps a call of PyTorch's attention from its fused kernel on a CPU."""
    found = []
    if dropout_p > 0:
        found.append("dropout")
    if isinstance(attn_mask, torch.Tensor) and attn_mask.requires_grad:
        found.append("a mask that is trained")
    if query.dim() != 4:
        found.append(f"inputs of {query.dim()} dimensions instead of 4")
    return found


def _on_host(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if a call makes a tensor without naming a device, or reads values in its CPU's kernel alone."""
    if name == "one_hot":
        return (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) >= 0
    return "device" not in kwargs and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))


def _names_device(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    named = any(isinstance(value, (str, torch.device, torch.Tensor)) for value in args[1:])
    return name == "cuda" or "device" in kwargs or named


def _backward(
    tensor: torch.Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
