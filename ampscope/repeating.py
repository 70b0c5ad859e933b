"""Repeat the calls of a model that led to a value that is not finite, under a trace that finds its origin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ampscope.finite import Lineage, Origin
from ampscope.functions import Functions
from ampscope.operators import Operators
from ampscope.precisions import Precision
from ampscope.script_trace import ScriptExecution
from ampscope.subject import Subject, core
from ampscope.tensors import tensors_in
from ampscope.trace import Trace
from ampscope.tracing import eager

REGIONS: dict[Any, str] = {torch.float16: "amp-fp16", torch.bfloat16: "amp-bf16"}
LARGE = 2**24  # bytes of an output beyond which its gradient is not kept


@dataclass
class Call:
    """One call of a model, as it was made: `dtype` is autocast's, None if it was off.

    `gradients` are those that came back to its outputs, by the number of the output.
    """

    module: nn.Module
    args: Any
    kwargs: Any
    dtype: torch.dtype | None
    random: list[torch.Tensor]
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)

    def follow(self, outputs: Any) -> None:
        """Keep the gradients that will come back to these outputs."""
        for index, tensor in enumerate(tensors_in(outputs)):
            if tensor.grad_fn is not None and tensor.nbytes <= LARGE:
                tensor.register_hook(lambda gradient, index=index: self._came_back(index, gradient))

    def _came_back(self, index: int, gradient: torch.Tensor) -> None:
        self.gradients[index] = gradient.detach()


def record(module: nn.Module, args: Any, kwargs: Any, device: torch.device) -> Call:
    """Return a call that is about to happen; its arguments hold no graph."""
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if enabled else None
    random = [torch.get_rng_state()]
    if device.type == "cuda":
        random.append(torch.cuda.get_rng_state(device))
    args, kwargs = tree_map_only(torch.Tensor, _leaf, (args, kwargs))
    return Call(module, args, kwargs, dtype, random)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return tensor.detach().requires_grad_(tensor.requires_grad)


def finite(tensor: torch.Tensor | None) -> bool:
    """Return True if all values of a tensor are finite; wait for its device."""
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    # A sum is finite if all values are, unless it overflows: one pass, and a second one only if it is not finite.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def wrong_inputs(calls: list[Call], batch: Any = None) -> str | None:
    """Name the tensor of a batch, or input of a model, that is not finite, and the number of such values.

    A mask of -inf is allowed.
    """
    given = [(f"tensor {index} of the batch", tensor) for index, tensor in enumerate(tensors_in(batch))]
    for call in calls:
        given += [(f"input {index}", tensor) for index, tensor in enumerate(tensors_in((call.args, call.kwargs)))]
    for name, tensor in given:
        if finite(tensor):
            continue
        count = int((~torch.isfinite(tensor)).sum())
        if count != int((tensor == -torch.inf).sum()):
            return f"{count:,} of {tensor.numel():,} values of {name} are not finite"
    return None


def first_origin(
    models: Mapping[str, nn.Module], calls: list[Call], *, backward: bool
) -> tuple[Origin | None, str | None]:
    """Return the operator of the first value that is not finite, in a forward or backward pass, or None.

    The backward pass is repeated from the last call to the first. Buffers, gradients and random numbers do not change.
    The text is the error of a call that cannot be repeated, if there is no origin.
    """
    failed = None
    for call in reversed(calls) if backward else calls:
        try:
            with _kept(models, call), eager():
                origin = _origin(models, call, backward=backward)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if origin is not None:
                return origin, None
    return None, failed


@contextlib.contextmanager
def _kept(models: Mapping[str, nn.Module], call: Call) -> Iterator[None]:
    """Put buffers and random numbers back afterwards, and start with the call's random numbers."""
    values = [(buffer, buffer.detach().clone()) for model in models.values() for buffer in model.buffers()]
    device = next(next(iter(models.values())).parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_rng_state(call.random[0])
            if len(call.random) > 1:
                torch.cuda.set_rng_state(call.random[1], device)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _origin(models: Mapping[str, nn.Module], call: Call, *, backward: bool) -> Origin | None:
    subject: Any = Subject(models, (call.args, call.kwargs), step=lambda models, batch: None)
    execution = ScriptExecution(subject)
    execution.phase = "forward"
    trace = Trace(execution, Lineage())
    functions = Functions(trace)
    operators = Operators(trace, functions, subject)
    lineage = trace.lineage
    try:
        precision = Precision(REGIONS.get(call.dtype, "fp32"), subject.device)
        with torch.set_grad_enabled(backward), execution._patches(), functions, operators:
            with precision.autocast():
                outputs = call.module(*call.args, **call.kwargs)
            arrived = _gradients(subject, call, outputs) if backward else tensors_in(outputs)
            for tensor in arrived:
                lineage.arrived("", tensor)
    finally:
        for hook in operators.hooks:
            hook.remove()
    # Gradients of parameters are there already, in the order in which they arrived.
    found = {id(origin): origin for origin in lineage.reached if not origin.intended}
    return next(iter(found.values()), None)


def _gradients(subject: Any, call: Call, outputs: Any) -> list[torch.Tensor]:
    """Return the gradients of a repeated call, from those that came back to its outputs; the first to arise first."""
    made = dict(enumerate(tensors_in(outputs)))
    # An output that is a loss has all of the gradient; the others that came with it are on its way.
    losses = [index for index in call.gradients if made[index].numel() == 1] or [*call.gradients]
    if not losses or not all(finite(call.gradients[index]) for index in losses):
        return []
    inputs = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.requires_grad]
    inputs += [part for part in subject.parameters() if part.requires_grad and not any(part is one for one in inputs)]
    roots = [made[index] for index in losses]
    found = torch.autograd.grad(roots, inputs, [call.gradients[index] for index in losses], allow_unused=True)
    return [gradient for gradient in reversed(found) if gradient is not None]


class Hook:
    """A hook that does nothing in a copy of its module, or in a file that holds it."""

    def __init__(self, function: Callable[..., None] | None = None):
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __reduce__(self) -> tuple[type, tuple]:
        return Hook, ()


class Calls:
    """The calls of an update that a loop makes itself, of a model or, as Lightning does, of its parts.

    `before` is called before each. Which modules the loop calls is learnt; the others cost nothing from then on.
    `busy` holds while calls are repeated.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device):
        self.models = models
        self.device = device
        self.busy = False
        self.before: Callable[[], None] = lambda: None
        self._calls: list[Call] = []
        self._earlier: list[Call] = []
        self._open: Call | None = None
        self._depth = 0
        self._outer: set[int] = set()
        self._inner: set[int] = set()
        self._hooks: dict[int, list[Any]] = {}

    def follow(self, given: Mapping[str, nn.Module]) -> None:
        """Follow the models as they were `given`; one that is wrapped, as by torch.compile, is called as a whole."""
        for name, model in given.items():
            inner = self.models[name]
            for module in [model] if model is not inner else inner.modules():
                if isinstance(module, torch.jit.ScriptModule):  # it accepts no hooks
                    continue
                self._hooks[id(module)] = [
                    module.register_forward_pre_hook(Hook(self._enter), with_kwargs=True),
                    module.register_forward_hook(Hook(self._leave), always_call=True),
                ]

    def remove(self) -> None:
        """Take all hooks off."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()

    def of_update(self) -> list[Call]:
        """Return the calls of this update; with several optimizers, also the calls before the last step."""
        return [*self._earlier, *self._calls]

    def end(self, *, keep: bool) -> None:
        """Forget the calls before an optimizer's step; with `keep`, those of one step before remain."""
        self._earlier = self._calls if keep else []
        self._calls = []

    def learnt(self) -> None:
        """Stop following modules that only other modules call."""
        for key in self._inner - self._outer:
            for hook in self._hooks.pop(key, []):
                hook.remove()
        self._inner.clear()

    def origin(self, calls: list[Call], *, backward: bool) -> tuple[Origin | None, str | None]:
        """Return `first_origin`; the repeated calls are not noted."""
        self.busy = True
        try:
            return first_origin(self.models, calls, backward=backward)
        finally:
            self.busy = False

    def _ignored(self) -> bool:
        """Return True while a call is compiled or repeated, or a checkpoint computes again."""
        return torch.compiler.is_compiling() or self.busy or torch._C._current_autograd_node() is not None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._ignored():
            return
        self._depth += 1
        (self._outer if self._depth == 1 else self._inner).add(id(module))
        if self._depth == 1:
            self.before()
            if torch.is_grad_enabled():
                self._open = record(core(module), args, kwargs, self.device)
                self._calls.append(self._open)

    def _leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self._ignored():
            return
        self._depth -= 1
        if not self._depth and self._open is not None:
            self._open.follow(outputs)
            self._open = None
