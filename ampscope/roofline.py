"""Compute the roofline of a training step: its least time on this machine, by group of operators, and the limit.

Each operator needs at least its floating-point operations divided by the rate of a large matrix product, and at least
the bytes that it reads and writes divided by the rate of a copy; the longer of the two is its bound. The model is that
of Williams, Waterman and Patterson, "Roofline", CACM 2009. A library: it knows only the given step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ampscope.tensors import dtype_name
from ampscope.timing import timed_once

# Groups of operators by their names; the first pattern that matches counts. Products are those with FLOPs.
GROUPS = {
    "convolutions": r"conv",
    "matrix products": r"::(add|b|badd)?mm(\.|$)|::mv|::linear|::matmul|scaled_dot_product|attention",
    "optimizer": r"_fused_|_foreach_|Optimizer|linalg_vector_norm|_amp_|addcdiv|sqrt|lerp",
    "normalization": r"norm",
    "pooling": r"pool",
    "activations and sums": r"relu|threshold|hard|silu|sigmoid|gelu|tanh|clamp|softmax|dropout|::add_?(\.|$)|::mul_?"
    r"(\.|$)|::cat(\.|$)|::mean(\.|$)",
    "casts and copies": r"_to_copy|::copy_|::to(\.|$)|clone|contiguous|fill_|zero_",
}
OTHER = "other"
# Operators that only create a view, or allocate memory without writing it.
_FREE = re.compile(r"::(empty|new_empty|detach|alias|lift_fresh|resize_|set_|record_stream|_local_scalar_dense)")


def group_of(operator: str) -> str:
    """Return the group of an operator's name (`aten::convolution_backward`, `aten.convolution_backward.default`)."""
    name = re.sub(r"^(\w+)\.", r"\1::", operator)
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), OTHER)


@dataclass(frozen=True)
class Operator:
    """One call of one operator: floating-point operations, bytes read and written, and the type of its factors."""

    name: str
    group: str
    flops: int
    bytes: int
    dtype: str


class OperatorCounter(TorchDispatchMode):
    """Record every operator that runs on `device` inside the block, forward and backward, below autocast.

    Bytes count each input and output tensor once: the least traffic if nothing stays in a cache. Views cost nothing,
    and neither do copies to and from other devices, which overlap with the computation.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = str(function)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        outputs = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        tensors = [*inputs, *outputs]
        if not tensors or any(tensor.device.type != self.device.type for tensor in tensors if tensor.dim()):
            return result
        count = flop_registry.get(function._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        free = _FREE.search(re.sub(r"^(\w+)\.", r"\1::", name)) or function.is_view
        moved = 0 if free else sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
        if moved or flops:
            dtype = next((one.dtype for one in inputs if one.is_floating_point()), tensors[0].dtype)
            self.operators.append(Operator(name, group_of(name), flops, moved, dtype_name(dtype)))
        return result


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements; those of a broadcast one are in memory once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def count_step(step: Callable[[], Any], device: torch.device) -> list[Operator]:
    """Return the operators of one call of `step`.

    Raise RuntimeError if torch's own FlopCounterMode counts other FLOPs: then the bound would be wrong.
    """
    with FlopCounterMode(display=False) as flops, OperatorCounter(device) as counter:
        step()
    total = sum(operator.flops for operator in counter.operators)
    if total != flops.get_total_flops():
        raise RuntimeError(f"{total} FLOPs were counted by operator, {flops.get_total_flops()} by FlopCounterMode")
    return counter.operators


# ------------------------------------------------------------------------------------- the machine
def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int = 6) -> float:
    """Return the FLOP/s of a square matrix product of this dtype, in the current float32 mode.

    It is that of the shortest of some runs: other load can only make one longer.
    """
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(_seconds(lambda: left @ right, device, repeats))


def copy_bandwidth(device: torch.device, *, megabytes: float = 256, repeats: int = 6) -> float:
    """Return the bytes per second, read and written together, of copies of this many MB of float32 numbers."""
    source = torch.zeros(max(1, int(megabytes * 2**20 / 4)), device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / min(_seconds(lambda: target.copy_(source), device, repeats))


def typical_megabytes(operators: Iterable[Operator]) -> float:
    """Return half of the bytes of the operator that moves the median byte: such a copy uses the caches as much."""
    moved = sorted(operator.bytes for operator in operators)
    half = sum(moved) / 2
    for size in moved:
        half -= size
        if half <= 0:
            return size / 2 / 2**20
    return 0.0


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of some calls, after one for warm-up; time several together if one is too short."""
    calls = 1

    def several() -> None:
        for _ in range(calls):
            function()

    while timed_once(several, device) <= 0.005 and calls < 512:
        calls *= 4
    return [timed_once(several, device) / calls for _ in range(repeats)]


# ---------------------------------------------------------------------------------------- the bound
def roofline(
    operators: Iterable[Operator],
    *,
    rates: dict[str, float],
    bandwidth: float,
    measured: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return the bound of a step and of each group of operators, in seconds, as plain values.

    `rates` are FLOP/s by the name of a dtype (that of float32 replaces a missing one), `bandwidth` is in bytes per
    second, `measured` are seconds by group if they are known. `limit` is what bounds most of a group.
    """
    groups: dict[str, dict[str, Any]] = {}
    for operator in operators:
        arithmetic = operator.flops / rates.get(operator.dtype, rates["float32"])
        traffic = operator.bytes / bandwidth
        row = groups.setdefault(
            operator.group, {"flops": 0, "bytes": 0, "bound_seconds": 0.0, "by_arithmetic": 0.0, "calls": 0}
        )
        row["flops"] += operator.flops
        row["bytes"] += operator.bytes
        row["calls"] += 1
        row["bound_seconds"] += max(arithmetic, traffic)
        row["by_arithmetic"] += arithmetic if arithmetic >= traffic else 0.0
    total = sum(row["bound_seconds"] for row in groups.values())
    for name, row in groups.items():
        by_arithmetic = row.pop("by_arithmetic")
        row["limit"] = "arithmetic" if 2 * by_arithmetic >= row["bound_seconds"] else "memory"
        row["share_of_bound"] = row["bound_seconds"] / total if total else 0.0
        row["measured_seconds"] = (measured or {}).get(name)
    order = sorted(groups, key=lambda name: -groups[name]["bound_seconds"])
    return {
        "bound_seconds": total,
        "flops": sum(row["flops"] for row in groups.values()),
        "bytes": sum(row["bytes"] for row in groups.values()),
        "rates": dict(rates),
        "bandwidth": bandwidth,
        "groups": {name: groups[name] for name in order},
    }


def measured_groups(events: Iterable[Any], *, cuda: bool) -> dict[str, float]:
    """Return the seconds by group from a profiler's `key_averages()`, summed over all profiled steps."""
    totals: dict[str, float] = {}
    for event in events:
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        group = group_of(event.key)
        totals[group] = totals.get(group, 0.0) + microseconds / 1e6
    return totals


def beyond(shares: Iterable[float | None]) -> list[str]:
    """Return a sentence that explains a printed share of a bound above 100 %, if one of these shares is."""
    if not any(share is not None and round(share, 2) > 1 for share in shares):
        return []
    return [
        "The bound is an estimate: a share of it above 100 % means that tensors stayed in the caches or operators were "
        "joined, because it counts the traffic of each operator alone, or that its rates were measured while the "
        "machine was busier."
    ]
