"""Operators as they really run, below autocast: types, casts, module, line, time."""

from __future__ import annotations

import bisect
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ampscope.functions import AMP_TYPES, Functions
from ampscope.places import Place, place_of_caller
from ampscope.products import describe, is_custom, is_product
from ampscope.subject import Subject
from ampscope.tensors import address, dtype_name, tensors_in
from ampscope.timing import wait
from ampscope.trace import Trace

WAITS = {
    "nonzero": "nonzero",
    "_local_scalar_dense": "item",
    "item": "item",  # tensors of inference mode keep such operators whole
    "is_nonzero": "item",
    "masked_select": "masked_select",
    "_unique2": "unique",
}
# Of what autocast computes in float32 on a GPU, the operators that losses are made of.
IN_FLOAT32 = {"exp", "expm1", "log", "log1p", "log2", "log10", "pow", "sum", "prod", "cumsum", "norm", "dist"}
IN_FLOAT32 |= {"linalg_vector_norm", "logsumexp", "_softmax", "_log_softmax", "reciprocal", "rsqrt", "nll_loss_forward"}
IN_FLOAT32 |= {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy_with_logits"}


class Operators(TorchDispatchMode):
    """Count every operator by module, known from hooks in forward and from the autograd node in backward.

    Nodes and forward operators are matched by autograd's sequence numbers, which forward hands out in order and
    backward looks up again; see "Forward-backward correlation" in the documentation of torch.autograd.profiler.
    """

    def __init__(self, trace: Trace, functions: Functions, subject: Subject):
        super().__init__()
        self.trace = trace
        self.functions = functions
        self.device = subject.device
        self._running: list[str] = [""]
        self._numbers = [-1]
        self._owners: list[tuple[str, Place | None]] = [("", None)]
        self._gradients: dict[int, str] = {}
        self.hooks = [
            hook
            for name, module in subject.named_modules()
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)),
                module.register_forward_hook(functools.partial(self._leave, name), always_call=True),
            )
        ]
        self.hooks += [
            parameter.register_hook(lambda gradient, name=name: self._gradient(name, gradient))
            for name, parameter in subject.named_parameters()
            if parameter.requires_grad and parameter.is_leaf
        ]
        self.parameters = [parameter for _, parameter in subject.named_parameters()]

    def _leave(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._running.pop()
        trains = any(tensor.requires_grad for tensor in tensors_in(output))
        if trains and not module.training and _differs_in_training(module):
            self.trace.evaluated[name] = type(module).__name__

    def _gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.trace.with_gradient.add(name)
        if isinstance(gradient, torch.Tensor):
            self.trace.lineage.arrived(f"the gradient of {name}", gradient)

    def _where(self) -> tuple[str, str, Place | None]:
        """Return phase, module and place of the operator that runs now."""
        node = torch._C._current_autograd_node()
        phase = "backward" if node is not None else self.trace.execution.phase
        if phase != "backward" or len(self._running) > 1:
            return phase, self._running[-1], place_of_caller()
        if node is None or node._sequence_nr() >= 2**63:  # the sums into .grad belong to no forward operator
            return phase, "", None
        if _in_custom_function():
            return phase, self._owner(node)[0], place_of_caller()
        return phase, *self._owner(node)

    def _owner(self, node: Any) -> tuple[str, Place | None]:
        """Return module and line of the forward operator whose backward runs."""
        # An operator's node is made before the operator runs, so the next number above the node's is the operator's.
        position = bisect.bisect_right(self._numbers, node._sequence_nr())
        return self._owners[min(position, len(self._owners) - 1)]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number = torch.autograd._get_sequence_nr()
        phase, module, place = self._where()
        if phase != "backward" and self._numbers[-1] < number:
            self._numbers.append(number)
            self._owners.append((module, place))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on = self.trace.execution.autocast_on and phase != "backward" and is_custom(operator)
        started = self._clock()
        try:
            with _autocast_inside(self.device) if on else contextlib.nullcontext():
                result = operator(*args, **kwargs)
        except Exception:
            if phase == "backward":
                self.trace.refused = _name(operator), place
            raise
        seconds = self._clock() - started
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        op = _name(operator)
        self._notice(op, place, given, made)
        self._edits(op, operator, given)
        self._stays_on_host(op, given, made)
        if phase == "update" or operator.namespace == "profiler":
            return result
        inputs = tuple(dict.fromkeys(dtype_name(tensor.dtype) for tensor in given))
        output = dtype_name(made[0].dtype) if made else ""
        cast = None
        if op == "_to_copy" and given and made and given[0].dtype != made[0].dtype:
            stored = given[0].values() if given[0].is_nested else given[0]
            cast = (tuple(stored.shape), _strides(stored))
            self._round_trip(given[0], made[0], phase)
        elif not operator.is_view:
            self._in_loss(op, phase, place, given, made)
        key = (phase, module, op, inputs, output, cast, operator.is_view)
        self.trace.rows[key] += 1
        self.trace.seconds[key] += seconds
        function, enabled, written_at = self.functions.current
        if is_product(op, operator):
            product = describe(operator, args, kwargs, result, given)
            product.phase = phase
            product.module = module
            product.place = written_at or place
            product.function = function
            product.autocast = enabled
            product.seconds = seconds
            product.in_custom_function = _in_custom_function()
            product.written_cast = self._written_cast(given)
            self.trace.products.append(product)
        elif output == "float32" and not operator.is_view and not cast:
            self.trace.float32_places.setdefault((phase, module, op), (function, enabled, written_at or place))
        if not operator.is_view:
            self.trace.lineage.observe(op, given, made, phase=phase, module=module, place=place)
        return result

    def _written_cast(self, given: list[torch.Tensor]) -> Place | None:
        """Return the line on which the user made one of these tensors float32."""
        written = self.functions.written
        return next((written[address(tensor)][0] for tensor in given if address(tensor) in written), None)

    def _clock(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def _notice(self, op: str, place: Place | None, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Note reads by the host, gradients set to zero in place, and clipping."""
        execution = self.trace.execution
        place = place_of_caller() if place is None and op in WAITS else place
        if place is None:
            return
        to_host = op == "_to_copy" and given and given[0].device.type != "cpu" and made[0].device.type == "cpu"
        quiet = (self.functions.quiet and self.functions.quiet[-1]) or (
            bool(given) and all(address(tensor) in self.functions.host for tensor in given)
        )
        if (op in WAITS or to_host) and not place.via and not quiet:
            self.trace.synchronisations[place, WAITS.get(op, "cpu")] += 1
        elif op in ("zero_", "_foreach_zero_"):
            gradients = {address(parameter.grad) for parameter in self.parameters if parameter.grad is not None}
            if given and address(given[0]) in gradients:
                self.trace.zeroed.add(place)
        elif place.via == "nn/utils/clip_grad.py" and any(
            execution.carried.is_gradient(tensor, self.parameters) for tensor in given
        ):
            execution.note_once("clip", place)

    def _stays_on_host(self, op: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """On a CPU, tell what would lie on the GPU from what is made without a device, and computed from that alone."""
        host = self.functions.host
        inside = bool(self.functions.quiet) and self.functions.quiet[-1]
        stays = all(address(tensor) in host for tensor in given) if given else inside
        for index, tensor in enumerate(made):
            sizes = op == "_pack_padded_sequence" and index == 1  # which PyTorch keeps on the CPU
            if (stays or sizes) and tensor.device.type == "cpu":
                host.add(address(tensor))
            else:
                host.discard(address(tensor))

    def _edits(self, op: str, operator: Any, given: list[torch.Tensor]) -> None:
        """Note gradients that are computed with, or changed in place, while the loss scale is on them."""
        execution = self.trace.execution
        if execution.carried.misuses(op, given):
            place = place_of_caller()
            if place is not None and not place.via:
                execution.note_once("penalty", place)
        if execution.phase != "update" or not operator._schema.is_mutable or execution.busy or "zero_" in op:
            return
        if given and execution.carried.is_gradient(given[0], self.parameters):
            place = place_of_caller()
            if place is not None and not place.via:
                execution.note_once("edit", place)

    def _round_trip(self, given: torch.Tensor, made: torch.Tensor, phase: str) -> None:
        """Note a tensor that the user made float32 and that autocast casts straight back for a product."""
        known = self.functions.written.get(address(given))
        function = self.functions.current[0]
        if known and phase != "backward" and made.dtype in AMP_TYPES and function not in ("to", "half", "bfloat16"):
            self.trace.round_trips[known[0], function] += 1
            self.trace.round_trip_bytes[known[0], function] += given.nbytes + made.nbytes

    def _in_loss(
        self, op: str, phase: str, place: Place | None, given: list[torch.Tensor], made: list[torch.Tensor]
    ) -> None:
        """Note what tells if a cast is needed, and if a loss is computed in 16 bits."""
        if phase == "backward":
            self.trace.went_back.add(place)
            return
        cast = self._written_cast(given)
        if cast is not None and op != "detach":
            self.trace.needed.add(cast)
        outside = phase == "loss" and not self.trace.execution.autocast_on
        if outside and place is not None and op in IN_FLOAT32 and given and made and made[0].dtype in AMP_TYPES:
            self.trace.narrow.setdefault(place, (op, dtype_name(made[0].dtype)))


@contextlib.contextmanager
def _autocast_inside(device: torch.device) -> Iterator[None]:
    """Let autocast see the operators that a custom operator calls, as it does when nobody watches."""
    kind = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS"}.get(device.type)
    key = getattr(torch._C.DispatchKey, kind or "", None)
    if key is None:
        yield
        return
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _differs_in_training(module: nn.Module) -> bool:
    """Return True for a layer of dropout, or a trained BatchNorm, which compute something else in training."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.weight is None or module.weight.requires_grad
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _in_custom_function() -> bool:
    """Return True while a Python autograd function's backward runs, unless torch.library generated it."""
    node = torch._C._current_autograd_node()
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return python and not type(node).__name__.startswith("GeneratedBackwardFor")


def _name(operator: Any) -> str:
    return str(operator.overloadpacket).removeprefix("aten.")


def _strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    return tuple(tensor.stride()) if tensor.layout is torch.strided else None
