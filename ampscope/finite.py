"""Find the operator that made the first value that is not finite: follow each infinity and NaN through the step.

Infinities made on purpose (a mask of -inf before a softmax) are not faults: only values that reach the loss or a
gradient are reported, with the operator that made them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from ampscope.places import Place
from ampscope.subject import Subject
from ampscope.tensors import address, dtype_name, tensors_in

# Operators that write a value that they are given, infinity included.
CREATE = (
    "full",
    "fill",
    "masked_fill",
    "scalar_tensor",
    "new_full",
    "full_like",
    "where",
    "zeros",
    "ones",
    "lift",
    "clone",
    "detach",
    "copy",
    "triu",
    "tril",
    "constant_pad",
)
PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "convolution", "linear")
UNINITIALISED = ("empty", "new_empty", "resize_", "set_")
ROUND = ("_to_copy", "to", "copy_")
DANGEROUS = {  # the failure of each operator at the edge of its domain, and the cure
    "log": "takes the logarithm of zero or of a negative number: add an eps, or use log_softmax or logsigmoid",
    "sqrt": "takes the root of zero, whose gradient is infinite, or of a negative number: add an eps inside the root",
    "rsqrt": "takes 1/sqrt of zero: add an eps inside the root",
    "div": "divides by zero: add an eps to the denominator",
    "reciprocal": "divides by zero: add an eps to the denominator",
    "exp": "is the exponential of a large number: subtract the maximum first, or clamp",
    "pow": "raises to a power that the type cannot hold, or zero to a negative one: clamp, or add an eps",
    "norm": "has the norm of zeros, whose gradient is not defined: add an eps",
    "softmax": "has a row that is masked completely: let each row see at least one position",
    "binary_cross_entropy": "takes the logarithm of 0 or 1: use binary_cross_entropy_with_logits",
    "acos": "has its argument outside of its domain: clamp it",
    "asin": "has its argument outside of its domain: clamp it",
    "atan2": "has both arguments zero: add an eps",
}


@dataclass
class Origin:
    """The operator that made the first value that is not finite. `inputs` are dtype, shape and finite range of each."""

    kind: str  # "inf" or "NaN"
    phase: str
    module: str
    op: str
    output: str
    inputs: list[dict[str, Any]]
    place: Place | None
    intended: bool = False
    reached: str = ""
    count: int = 0  # of the values before the step that are not finite
    values: int = 0

    def record(self) -> dict[str, Any]:
        """Return the origin as plain values for JSON."""
        record = asdict(self)
        record["place"] = None if self.place is None else {"file": self.place.file, "line": self.place.line}
        return record


class Lineage:
    """Follow values that are not finite by the memory of their tensors."""

    def __init__(self) -> None:
        self.origins: dict[int, Origin] = {}
        self.first: Origin | None = None
        self.reached: list[Origin] = []
        self.vanished: Origin | None = None  # an overflow of float16 that a later operator made finite again

    def expect(self, subject: Subject, batch: str = "the batch") -> None:
        """Record values that are not finite before the step: in the batch, called `batch`, and in the weights."""
        some = [(f"{batch}{path}", tensor) for path, tensor in _by_path(subject.batch)]
        some += [(name, parameter) for name, parameter in subject.named_parameters()]
        for name, tensor in some:
            kind = _fault(tensor)
            if kind:
                origin = Origin(kind, "before", name, "", dtype_name(tensor.dtype), [], None, intended=kind == "inf")
                origin.count = int((~torch.isfinite(tensor)).sum())
                origin.values = tensor.numel()
                self.origins[address(tensor)] = origin

    def observe(self, op: str, given: list[torch.Tensor], made: list[torch.Tensor], **where: Any) -> None:
        """Record the outputs of an operator; `where` is phase, module and place."""
        for tensor in made:
            memory = address(tensor)
            if memory < 1 or not tensor.is_floating_point():
                continue
            kind = None if op.startswith(UNINITIALISED) else _fault(tensor)
            if kind:
                self.origins[memory] = self._origin(kind, op, given, tensor, where)
                continue
            if self.vanished is None and where["phase"] != "backward":
                self.vanished = self._vanishes(op, given)
            if op.startswith(UNINITIALISED):
                continue
            if tensor.nbytes >= tensor.untyped_storage().nbytes():
                self.origins.pop(memory, None)

    def _origin(self, kind: str, op: str, given: list, made: torch.Tensor, where: dict[str, Any]) -> Origin:
        known = [self.origins[address(tensor)] for tensor in given if address(tensor) in self.origins]
        faults = [origin for origin in known if not origin.intended]
        if faults:
            return faults[0]
        intended = kind == "inf" and (bool(known) or op.startswith(CREATE)) and op not in ROUND
        if known and kind == "inf":  # a mask passes through sums and products
            return known[0]
        if known and known[0].phase == "before" and op.startswith(PRODUCTS):  # no mask goes into a product
            return replace(known[0], intended=False)
        finite = all(_fault(tensor) is None for tensor in given if tensor.is_floating_point() and tensor is not made)
        if op in ROUND and not finite:
            intended = kind == "inf"
        inputs = [ranged(tensor) for tensor in given if tensor.is_floating_point()]
        output = dtype_name(made.dtype)
        return Origin(kind, where["phase"], where["module"], op, output, inputs, where["place"], intended)

    def _vanishes(self, op: str, given: list[torch.Tensor]) -> Origin | None:
        """Return the overflow that this operator turns into a finite value, such as 1/inf into 0."""
        if not op.startswith(("rsqrt", "reciprocal", "div", "pow", "exp", "clamp", "tanh", "sigmoid")):
            return None
        for tensor in given:
            origin = self.origins.get(address(tensor))
            overflowed = (
                origin is not None and not origin.intended and origin.kind == "inf" and origin.phase != "before"
            )
            if origin is not None and overflowed and origin.output == "float16" and not origin.op.startswith("log"):
                origin.reached = op
                return origin
        return None

    def arrived(self, what: str, tensor: torch.Tensor) -> None:
        """Record a tensor that must be finite: the loss, or the gradient of a parameter."""
        origin = self.origins.get(address(tensor))
        if origin is not None and _fault(tensor) is not None:
            origin.reached = origin.reached or what
            self.reached.append(origin)

    def finish(self, roots: list[torch.Tensor]) -> None:
        """Return the first origin: of a value that reached the loss, otherwise of one that reached a gradient first."""
        with torch.no_grad():
            gradients = list(self.reached)
            self.reached.clear()
            for root in roots:
                self.arrived("the loss", root)
        self.first = next(iter([*self.reached, *gradients]), None)
        self.origins.clear()


def _by_path(batch: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a batch, each with the way to it, such as ['image'] or [0]."""
    if isinstance(batch, torch.Tensor):
        return [("", batch)]
    leaves, _ = tree_flatten_with_path(batch)
    found = [(keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    return found or [("", tensor) for tensor in tensors_in(batch)]


def _fault(tensor: torch.Tensor) -> str | None:
    """Return "NaN", "inf" or None."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return None
    if tensor.element_size() < 2:
        tensor = tensor.float()
    # A sum is finite if all values are, unless it overflows: one pass, and a second one only if it is not finite.
    if torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
        return None
    if torch.isnan(tensor).any():
        return "NaN"
    return "inf" if torch.isinf(tensor).any() else None


def ranged(tensor: torch.Tensor) -> dict[str, Any]:
    """Return dtype, shape, and the range of the finite values; None if there are none."""
    values = tensor.detach()
    values = values[torch.isfinite(values)] if values.element_size() > 1 else values.float()
    low, high = (value.item() for value in values.float().aminmax()) if values.numel() else (None, None)
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "min": low, "max": high}


def _divides_by_zero(origin: Origin) -> bool:
    """Return whether an operator that needs an eps met a zero."""
    if not origin.op.startswith(("div", "rsqrt", "reciprocal", "log", "sqrt")) or not origin.inputs:
        return False
    low, high = origin.inputs[-1]["min"], origin.inputs[-1]["max"]
    return low is not None and low <= 0 <= high


def is_dangerous(origin: Origin) -> bool:
    """Return True if an operator has an edge of its domain, or is a cast: its cure is another than the data's."""
    return origin.op in ROUND or any(op in origin.op for op in DANGEROUS)


def cures(origin: Origin, *, overflow: bool | None) -> list[str]:
    """Return the cures, the best first.

    `overflow`: True if the same step is finite in float32, so that the range is to blame; None if nobody tried.
    """
    found = [text for op, text in DANGEROUS.items() if op in origin.op and not overflow]
    if origin.phase == "before":
        return ["look at where these values were made"]
    if any(0 in entry["shape"] for entry in origin.inputs):
        return ["it has no values to work on: leave an empty selection out"]
    if origin.op in ROUND and origin.output == "float16" and not overflow:
        return ["float16 ends at 65,504: leave this cast to it out, or cast to bfloat16"]
    if overflow and origin.output == "float16" and _divides_by_zero(origin):
        found.append("float16 makes an eps below 6e-8 zero: use a larger one, such as 1e-4, or float32 for this line")
    if overflow and origin.phase != "backward":
        module = origin.module or "the lines around it"
        found.append(f"run {module} with autocast off (torch.autocast(device, enabled=False), inputs as .float())")
        found.append("bfloat16, which has float32's range")
    elif overflow:
        found.append("a lower loss scale (GradScaler finds it), or bfloat16, which needs none")
    if origin.phase == "backward" and overflow is False:
        found.append("add an eps in the forward operator: its slope there is not finite in float32 either")
    too = ": float32 has this fault, too" if overflow is False else ", and if float32 has this fault, too"
    return found or [f"check the data and the learning rate{too}"]
