"""Runs of a step that keep what each module computes, or compare it with what it computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils._pytree import tree_map

from ampscope.errors import InspectError
from ampscope.execution import Execution
from ampscope.precisions import Precision
from ampscope.subject import Subject
from ampscope.tensors import tensors_in

Key = tuple[str, int]  # a module's name, and which of its calls


@dataclass
class Seen:
    """What the reference showed of each call of a module. Other runs are compared with it as they go."""

    order: list[Key] = field(default_factory=list)
    inputs: dict[Key, list[torch.Tensor]] = field(default_factory=dict)  # of the innermost modules
    outputs: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    gradients: dict[Key, dict[int, torch.Tensor]] = field(default_factory=dict)  # of the outputs, by place
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # gradients, by parameter
    leaves: set[str] = field(default_factory=set)  # modules inside which no other one was called


@dataclass
class Off:
    """Sums of squares over tensors: of what is off, and of what is true."""

    off: float = 0.0
    size: float = 0.0
    fits: bool = True

    def add(self, found: torch.Tensor, true: torch.Tensor | None) -> None:
        if true is None or found.shape != true.shape:
            self.fits = False
            return
        self.off += (found.float() - true).norm(dtype=torch.float64).item() ** 2
        self.size += true.norm(dtype=torch.float64).item() ** 2

    def relative(self) -> float | None:
        """Return the relative error, inf if a value is not finite; None if the tensors do not fit, or are zero."""
        if not self.fits or not self.size:
            return None
        return math.sqrt(self.off / self.size) if math.isfinite(self.off) else math.inf


Errors = dict[tuple[Any, str], Off]  # by call, or by parameter; and output, gradient or weights


class Recorder:
    """Hooks on every module that keep what goes in and comes out, and change it for the floor and for own errors."""

    def __init__(self, subject: Subject, *, true: Seen | None, noise: float = 0.0, feed: bool = False):
        self.subject = subject
        self.true = true
        self.noise = noise
        self.feed = feed  # give each innermost module the inputs that it has in float32
        self.scale: Callable[[], float] = lambda: 1.0
        self.seen = Seen()
        self.errors: Errors = {}
        self.drew = False  # the step drew random numbers
        self._calls: dict[str, int] = {}
        self._open: list[tuple[Key, bool]] = []
        self._draw = torch.Generator().manual_seed(0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.subject.named_modules():
                before = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _enter(self, name: str) -> Callable:
        def enter(_module: nn.Module, arguments: Any, options: Any) -> Any:
            key = (name, self._calls.get(name, 0))
            if self._open:
                self._open[-1] = (self._open[-1][0], False)
            self._open.append((key, True))
            self._calls[name] = key[1] + 1
            arguments, options = self._changed(name, key, arguments, options)
            if self.true is None:
                self.seen.inputs[key] = _copies((arguments, options))
            return arguments, options

        return enter

    def _changed(self, name: str, key: Key, arguments: Any, options: Any) -> tuple[Any, Any]:
        """Return a module's inputs off by a rounding, or those that it has in float32."""
        given: tuple[Any, Any] = (arguments, options)
        if self.true is None or name not in self.true.leaves:
            return given
        if self.feed:
            true = iter(self.true.inputs.get(key, []))
            given = tree_map(lambda value: _like(value, true), given)
        if self.noise:
            given = tree_map(self._off, given)
        return given

    def _off(self, value: Any) -> Any:
        if not _is_floating(value):
            return value
        drawn = torch.rand(value.shape, generator=self._draw).to(value.device, value.dtype)
        return value * (1 + self.noise * (2 * drawn - 1))

    def _leave(self, _module: nn.Module, _arguments: Any, outputs: Any) -> Any:
        key, leaf = self._open.pop()
        if leaf and self.noise:
            outputs = tree_map(self._off, outputs)
        tensors = [tensor for tensor in tensors_in(outputs) if _is_floating(tensor)]
        if self.true is None:
            self._keep(key, tensors, leaf=leaf)
            return outputs
        error = self.errors[key, "output"] = Off()
        true = self.true.outputs.get(key, [])
        error.fits = len(true) == len(tensors)
        for place, tensor in enumerate(tensors[: len(true)]):
            error.add(tensor.detach(), true[place])
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: self._compare(key, place, gradient))
        return outputs

    def _keep(self, key: Key, tensors: list[torch.Tensor], *, leaf: bool) -> None:
        seen = self.seen
        if leaf:
            seen.leaves.add(key[0])
        else:
            seen.inputs.pop(key, None)
        seen.order.append(key)
        seen.outputs[key] = _copies(tensors)
        kept = seen.gradients[key] = {}
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: kept.update({place: gradient.detach().float()}))

    def _compare(self, key: Key, place: int, gradient: torch.Tensor) -> None:
        assert self.true is not None
        error = self.errors.setdefault((key, "gradient"), Off())
        error.add(gradient.detach().float() / self.scale(), self.true.gradients.get(key, {}).get(place))

    def finish(self) -> None:
        """Take the gradients of the weights."""
        for name, parameter in self.subject.named_parameters():
            if parameter.grad is None or not _is_floating(parameter.grad):
                continue
            gradient = parameter.grad.detach().float() / self.scale()
            if self.true is None:
                self.seen.weights[name] = gradient.clone()
            else:
                owner = name.rpartition(".")[0]
                self.errors.setdefault((owner, "weights"), Off()).add(gradient, self.true.weights.get(name))


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


def _copies(tree: Any) -> list[torch.Tensor]:
    return [tensor.detach().float().clone() for tensor in tensors_in(tree) if _is_floating(tensor)]


def _like(value: Any, true: Iterator[torch.Tensor]) -> Any:
    """Return the next true value in the type of `value`, through which gradients still flow."""
    if not _is_floating(value):
        return value
    other = next(true, None)
    if other is None or other.shape != value.shape:
        return value
    return value + (other.to(value.dtype) - value).detach() if value.requires_grad else other.to(value.dtype)


def has_regions(subject: Subject) -> bool:
    """Return True if the step enters autocast itself; then its own regions take the precision."""
    with subject.kept():
        execution = Execution(subject, None)
        try:
            execution.run()
        except Exception as error:
            raise InspectError(f"the step fails as it is written: {type(error).__name__}: {error}") from error
    subject.forget()
    return any(event.kind == "autocast" and event.details["enabled"] for event in execution.events)


def run_once(
    subject: Subject,
    precision: Precision,
    true: Seen | None = None,
    *,
    ambient: bool,
    scale: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
    feed: bool = False,
) -> Recorder:
    """Run the step once, as the models are, and compare it with `true` if that is given."""
    recorder = Recorder(subject, true=true, noise=noise, feed=feed)
    recorder._draw.manual_seed(seed)
    with subject.kept():
        if noise:
            with torch.no_grad():
                for parameter in subject.parameters():
                    if _is_floating(parameter):
                        parameter.copy_(recorder._off(parameter))
        execution = Execution(subject, precision.use(), ambient=ambient, scale=scale)
        recorder.scale = lambda: execution.scale
        random = _random_state(subject.device)
        try:
            with _without_checkpointing(), recorder.attached():
                execution.run()
        except Exception as error:
            raise InspectError(f"the step fails in {precision.label}: {type(error).__name__}: {error}") from error
        recorder.drew = not all(map(torch.equal, random, _random_state(subject.device)))
        recorder.finish()
        subject.forget()
    return recorder


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _Direct:
    """Stands for the autograd function of reentrant checkpointing, and calls the block directly."""

    @staticmethod
    def apply(function: Callable, _preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """Let checkpointed blocks keep their activations: computed again they would be off by other roundings."""

    def nothing(*_arguments: Any, **_options: Any) -> Iterator[None]:
        yield

    def directly(function: Callable, arguments: Any, options: Any, **_how: Any) -> Any:
        return function(*arguments, **options)

    kept = {  # before PyTorch 2.14 the first two, then the third
        "CheckpointFunction": _Direct,
        "_checkpoint_without_reentrant_generator": nothing,
        "_checkpoint_impl": directly,
    }
    originals = {name: getattr(checkpointing, name) for name in kept if hasattr(checkpointing, name)}
    try:
        for name in originals:
            setattr(checkpointing, name, kept[name])
        yield
    finally:
        for name, original in originals.items():
            setattr(checkpointing, name, original)
