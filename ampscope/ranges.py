"""Count which gradients and activations of one step would vanish or overflow in narrow formats, layer by layer.

Everything comes from a plain FP32 step; the effect of a format follows exactly from its limits (torch.finfo), with
rounding to the nearest, ties to even.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from ampscope.execution import Execution
from ampscope.precisions import Precision
from ampscope.subject import Subject
from ampscope.tensors import tensors_in
from ampscope.tracing import eager

FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
KINDS = ("zero", "subnormal", "overflow")
SCALES = (1.0, 2.0**8, 2.0**16)
LOWEST = -160  # below the exponent of float32's smallest number


def limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the largest float32 magnitudes that become zero, subnormal or zero, and finite in `dtype`."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    spacing = info.eps * 2.0 ** (math.frexp(info.max)[1] - 1)
    edge = info.max + spacing / 2  # halfway to the number that would be next
    # float8_e4m3fn has the next number's pattern for NaN: its largest is even, so the tie goes down to it.
    return smallest / 2, -(info.tiny - smallest / 2), edge if dtype is torch.float8_e4m3fn else -edge


@functools.cache
def _boundaries(scales: tuple[float, ...]) -> tuple[torch.Tensor, list[tuple[str, float, int]]]:
    """Return sorted magnitudes up to which (inclusive) values have the same outcome, and the format of each."""
    found = []
    for name, dtype in FORMATS.items():
        for scale in scales:
            for index, limit in enumerate(limits(dtype)):
                value = torch.tensor(abs(limit) / scale, dtype=torch.float64).to(torch.float32)
                if limit < 0:  # values equal to the limit are above it
                    value = torch.nextafter(value, torch.zeros(()))
                found.append((value.item(), (name, scale, index)))
    found.sort(key=lambda pair: pair[0])
    return torch.tensor([value for value, _ in found]), [key for _, key in found]


def _magnitudes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of a tensor's values, in one dimension: of sparse and nested tensors, the stored values."""
    values = tensor.detach()
    if values.is_nested:
        values = values.values() if values.layout is torch.jagged else torch.cat([part.flatten() for part in values])
    elif values.layout is torch.sparse_coo:
        values = values._values()
    elif values.layout is not torch.strided:
        values = values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.float().abs().flatten()


def _is_counted(tensor: torch.Tensor) -> bool:
    """Return True if a tensor has values that can be read: inside torch.func's transforms there are none."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return (tensor.is_floating_point() or tensor.is_complex()) and not wrapped and not tensor.is_meta


class Fates:
    """Count, for tensors of one layer, how many nonzero values become zero, subnormal or infinite in each format."""

    def __init__(self, scales: list[float]):
        self.scales = scales
        self.values = 0
        self.nonzero = 0
        self.nonfinite = 0
        self.largest: float | None = None
        self.smallest: float | None = None
        self.exponents: Counter = Counter()
        self._edges, self._keys = _boundaries(tuple(scales))
        self._counts = torch.zeros(len(self._keys) + 1, dtype=torch.int64)

    def add(self, tensor: torch.Tensor, factor: float = 1.0, *, exponents: bool = True) -> None:
        """Count the values of `tensor` times `factor`; without `exponents` the histogram is left out."""
        sizes = _magnitudes(tensor).mul_(factor)
        self.values += sizes.numel()
        if not sizes.numel():
            return
        if not torch.isfinite(sizes.max()):  # a NaN is the maximum, too
            finite = sizes[torch.isfinite(sizes)]
            self.nonfinite += sizes.numel() - finite.numel()
            sizes = finite
        zeros = int((sizes == 0).sum())
        nonzero = sizes.numel() - zeros
        if not nonzero:
            return
        self.nonzero += nonzero
        high = sizes.max().item()
        low = (sizes if not zeros else sizes.masked_fill(sizes == 0, torch.inf)).min().item()
        self.smallest = low if self.smallest is None else min(low, self.smallest)
        self.largest = high if self.largest is None else max(high, self.largest)
        places = torch.bucketize(sizes, self._edges.to(sizes.device), out_int32=True)
        counts = torch.bincount(places, minlength=len(self._counts)).cpu()
        counts[0] -= zeros  # zeros lie below the first edge
        self._counts += counts
        if exponents:
            # frexp's mantissa is in [0.5, 1), so its exponent is one more than floor(log2); zero has exponent 0.
            numbers = torch.bincount(torch.frexp(sizes).exponent - 1 - LOWEST, minlength=-LOWEST).tolist()
            numbers[-1 - LOWEST] -= zeros
            self.exponents.update({i + LOWEST: count for i, count in enumerate(numbers) if count})

    def formats(self) -> dict[str, dict[str, dict[str, int] | None]]:
        """Return by format and scale the counts of zero, subnormal and overflow; None if nothing was nonzero."""
        below = self._counts.cumsum(0).tolist()
        count = {key: below[index] for index, key in enumerate(self._keys)}
        result: dict[str, dict[str, dict[str, int] | None]] = {}
        for name in FORMATS:
            for scale in self.scales:
                zero, small, finite = (count[name, scale, index] for index in range(3))
                found = {"zero": zero, "subnormal": small - zero, "overflow": self.nonzero - finite}
                result.setdefault(name, {})[f"{scale:g}"] = found if self.nonzero else None
        return result

    def record(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "nonzero": self.nonzero,
            "nonfinite": self.nonfinite,
            "smallest": self.smallest,
            "largest": self.largest,
            "formats": self.formats(),
        }


class Watch:
    """Count the gradients and activations of one run by layer; `hooks` attaches it."""

    def __init__(self, execution: Execution, scales: list[float]):
        self.gradients: dict[tuple[str, str], Fates] = defaultdict(lambda: Fates(scales))  # by group and name
        self.activations: dict[str, Fates] = defaultdict(lambda: Fates([1.0]))
        self._execution = execution
        self._seen: set[tuple[int, int]] = set()
        self._kept: list[torch.Tensor] = []  # so that no address is reused meanwhile

    def hooks(self, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]) -> list[Any]:
        """Put a hook on each module and parameter; the caller removes them."""
        on_modules = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: self._output(name, output))
            for name, module in modules.items()
        ]
        on_parameters = [
            parameter.register_hook(lambda gradient, name=name: self._gradient("parameter", name, gradient))
            for name, parameter in parameters.items()
        ]
        return on_modules + on_parameters

    def _output(self, name: str, output: Any) -> None:
        # The hook is on the tensor, not on the module: an in-place ReLU would overwrite the output that a module's hook
        # gets.
        for tensor in tensors_in(output):
            key = id(tensor), tensor._version  # an in-place module returns its input tensor, changed
            if key in self._seen or not _is_counted(tensor) or self._execution.phase == "backward":
                continue
            self._seen.add(key)
            self._kept.append(tensor)
            self.activations[name].add(tensor, exponents=False)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._gradient("activation", name, gradient))

    def _gradient(self, group: str, name: str, gradient: Any) -> None:
        if isinstance(gradient, torch.Tensor) and _is_counted(gradient):
            self.gradients[group, name].add(gradient, 1 / self._execution.scale)


def measure_ranges(
    subject: Subject, *, scaler_scale: float | None = None, product_modules: set[str] | None = None
) -> dict[str, Any]:
    """Compare gradients and activations of one FP32 step with the ranges of narrow formats.

    Keys: scales, scaler_scale, histogram (of gradients, by floor(log2 of the magnitude)), layers (gradients: `group` is
    parameter, or activation for a module's output) and activations (values of each module's output, at scale 1). A
    layer's `through_float16` is True if autocast would compute that gradient in 16 bits: BatchNorm's parameters, for
    one, never leave FP32. `by_scale` is `formats` of float16. Counts are among the `nonzero` values, and None if there
    are none, because nothing was measured.
    """
    scales = list(dict.fromkeys([*SCALES, float(scaler_scale or 1)]))
    modules = dict(subject.named_modules())
    parameters = {name: parameter for name, parameter in subject.named_parameters() if parameter.requires_grad}
    if product_modules is None:
        product_modules = {name for name, module in modules.items() if is_product_module(module)}
    execution = Execution(subject, Precision("fp32", subject.device))
    watch = Watch(execution, scales)
    hooks = watch.hooks(modules, parameters)
    try:
        torch.manual_seed(0)
        with eager():
            execution.run()
    finally:
        for hook in hooks:
            hook.remove()
        execution.put_back()
    found = records(watch, modules, [*parameters], product_modules)
    return {"scales": scales, "scaler_scale": scaler_scale, **found}


def records(
    watch: Watch, modules: dict[str, nn.Module], parameters: list[str], product_modules: set[str]
) -> dict[str, Any]:
    """Return layers, activations and histogram of a run, as in `measure_ranges`."""
    activations = [
        {"name": name, "kind": type(modules[name]).__name__, **fates.record()}
        for name, fates in watch.activations.items()
    ]
    return {
        "layers": _layers(watch.gradients, parameters, [*modules], product_modules),
        "activations": activations,
        "histogram": {group: _histogram(watch.gradients, group) for group in ("parameter", "activation")},
    }


def _layers(gradients: dict, parameters: list[str], modules: list[str], products: set[str]) -> list[dict[str, Any]]:
    keys = [("parameter", name) for name in parameters] + [("activation", name) for name in modules]
    layers = []
    for group, name in keys:
        if (group, name) in gradients:
            record = gradients[group, name].record()
            through = group == "activation" or name.rpartition(".")[0] in products
            layer = {"group": group, "name": name, "through_float16": through, **record}
            layers.append(layer | {"by_scale": record["formats"]["float16"]})
    return layers


def _histogram(gradients: dict, wanted: str) -> dict[int, int]:
    total: Counter = Counter()
    for (group, _), fates in gradients.items():
        if group == wanted:
            total.update(fates.exponents)
    return dict(sorted(total.items()))


def is_product_module(module: nn.Module) -> bool:
    """Return True if autocast runs this module's own product in 16 bits; a trace, if there is one, is more exact."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)
    return isinstance(module, kinds)
