"""One run of a step in one precision, and the calls of AMP's recipe that it made, each with its place.

The step runs as its author wrote it. In a given precision, the author's own autocast regions take that precision; if
there are none, the whole step but its backward passes runs under autocast. FP32 is a disabled autocast.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizer_hooks

from ampscope.carried import Carried
from ampscope.places import Place, outermost, place_of_caller, users_line
from ampscope.precisions import Precision
from ampscope.subject import Subject, losses_in, restore, takes_hooks
from ampscope.tensors import tensors_in

NEAR = 6  # frames of a library between its call by the user and a backward pass that it makes for them
SCALER_CALLS = ("scale", "unscale_", "step", "update")


@dataclass
class Event:
    """A call of the recipe: `kind` is autocast, backward, step, or scaler's scale, unscale_, step, update."""

    kind: str
    place: Place | None
    autocast: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    number: int = 0  # in the order of the events that are judged


class Execution:
    """Run the step of `subject`, in a precision or, if that is None, as it was written.

    `phase` is forward (also whatever runs before the first model), loss, backward or update. `scale` is the factor on
    the loss. After a run: `events`, `result`, `calls_backward` (the step does it itself), `roots` (the tensors that
    backward began with). `autocast_on` is kept, because PyTorch does not tell below autocast.
    """

    def __init__(self, subject: Subject, precision: Precision | None, *, ambient: bool = True, scale: float = 1.0):
        self.subject = subject
        self.precision = precision
        self.ambient = ambient and precision is not None
        self.own_scale = scale
        self.scale = scale
        self.phase = "forward"
        self.events: list[Event] = []
        self.result: Any = None
        self.roots: list[torch.Tensor] = []
        self.scalers: list[Any] = []
        self.states: dict[int, tuple[Any, dict]] = {}
        self.calls_backward = False
        self.carried = Carried()
        self.autocast_on = False
        self.depth = 0  # models that are running, one inside the other
        self.device = subject.device.type
        self._missing = ""  # gradients of the optimizer that steps
        self._busy = False  # inside the scaler or the tool's own update
        self._modes: Any = contextlib.nullcontext()

    def note(self, kind: str, **details: Any) -> None:
        if not self._busy:
            self.events.append(Event(kind, place_of_caller(), torch.is_autocast_enabled(self.device), details))

    def note_once(self, kind: str, place: Place) -> None:
        """Note a call that consists of many operators on one line."""
        last = self.events[-1] if self.events else None
        if last is None or last.kind != kind or last.place is None or last.place.line != place.line:
            self.events.append(Event(kind, place, torch.is_autocast_enabled(self.device)))

    @property
    def busy(self) -> bool:
        """True while the scaler, or this tool's own update, is at work."""
        return self._busy

    @outermost
    def run(self, *, update: bool = False, modes: Any = None) -> Any:
        """Run forward, loss and backward, and with `update` the optimizers' steps if the step does not make them."""
        self._modes = modes or contextlib.nullcontext()
        with self._patches(), self._modes:
            with self.autocast():
                self.result = self.subject.run()
            if not self.calls_backward:
                self._finish(update)
        return self.result

    def autocast(self) -> Any:
        return self.precision.autocast() if self.ambient and self.precision else contextlib.nullcontext()

    def without_autocast(self) -> Any:
        """Switch autocast off for backward passes inside a region that is this tool's and not the user's."""
        if not self.ambient or self.precision is None:
            return contextlib.nullcontext()
        return Precision("fp32", self.precision.device).autocast()

    def _finish(self, update: bool) -> None:
        """Run the tool's own backward pass, and update, for a step that only returns its loss."""
        losses: dict[str, Any] = {name: loss for name, loss in losses_in(self.result).items() if loss.requires_grad}
        scaler: Any = self.subject.update_scaler(self.precision) if update else None
        self._busy = True
        parts = self.subject.models if not self.subject.single else {}
        by_name = bool(losses) and len(losses) > 1 and losses.keys() <= parts.keys()
        if losses and not by_name:
            losses = {"": torch.stack([loss.sum() for loss in losses.values()]).sum()}
        for index, (name, loss) in enumerate(losses.items()):
            inputs = [part for part in parts[name].parameters() if part.requires_grad] if by_name else None
            factored = scaler.scale(loss) if scaler is not None else loss * self.own_scale
            torch.autograd.backward(factored, inputs=inputs, retain_graph=index < len(losses) - 1)
        if scaler is not None and losses:
            self.phase = "update"
            for optimizer in self.subject.update_optimizers():
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        self._busy = False

    @contextlib.contextmanager
    def _patches(self) -> Iterator[None]:
        """Put this object between the user's code and autocast, backward, optimizers and the scaler."""
        autocast = torch.autocast
        scaler = torch.amp.GradScaler
        kept: list[tuple[Any, str]] = [(torch.autograd, name) for name in ("backward", "grad")]
        kept += [(autocast, name) for name in ("__init__", "__enter__", "__exit__")]
        kept += [(scaler, name) for name in SCALER_CALLS]
        kept.append((torch.optim.lr_scheduler.LRScheduler, "step"))
        kept += [(torch.optim.Optimizer, "zero_grad"), (nn.Module, "zero_grad")]
        originals = {(owner, name): getattr(owner, name) for owner, name in kept}
        hooks = self._optimizer_hooks()
        entered = [
            hook
            for model in self.subject.models.values()
            if takes_hooks(model)
            for hook in (
                model.register_forward_pre_hook(self._enter),
                model.register_forward_hook(self._leave, always_call=True),
            )
        ]
        for (owner, name), original in originals.items():
            if owner is torch.autograd:
                setattr(owner, name, self._backward(name, original))
            elif name == "zero_grad":
                setattr(owner, name, self._clears(original))
            elif name == "step" and owner is not scaler:
                setattr(owner, name, self._schedule(original))
            elif owner is autocast:
                wraps = {"__init__": _keep_request, "__enter__": self._autocast_enter, "__exit__": self._autocast_exit}
                setattr(owner, name, wraps[name](original))
            else:
                setattr(owner, name, self._scaler_call(name, original))
        try:
            yield
        finally:
            for (owner, name), original in originals.items():
                setattr(owner, name, original)
            for handle in (*hooks, *entered):
                handle.remove()

    def _optimizer_hooks(self) -> list[Any]:
        """Put hooks on every optimizer's step; return the handles."""
        return [
            optimizer_hooks.register_optimizer_step_pre_hook(self._before_step),
            optimizer_hooks.register_optimizer_step_post_hook(self._after_step),
        ]

    def _enter(self, *_: Any) -> None:
        self.depth += 1
        if self.phase != "backward":  # where a checkpoint computes again
            self.phase = "forward"

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.phase == "forward" and not self.depth:
            self.phase = "loss"

    def _backward(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.phase == "backward":  # a checkpoint's own, inside the backward pass
                return original(*args, **kwargs)
            if name == "backward":
                self.calls_backward = self.calls_backward or not self._busy
                self.roots += tensors_in(args[:1] or kwargs.get("tensors"))
            self.note(name, users=users_line(NEAR))
            event = self.events[-1] if self.events and not self._busy else None
            scaler = self.carried.scaled_by(args[:1] or kwargs.get("tensors") or kwargs.get("outputs"))
            parameters: list[Any] = self.subject.stepped_on()
            self.carried.clear(parameters)
            before = self.carried.versions(parameters)
            phase, self.phase = self.phase, "backward"
            try:
                with self.without_autocast():
                    result = original(*args, **kwargs)
            finally:
                self.phase = "update" if name == "backward" else phase
            if name == "grad" and scaler is not None and kwargs.get("create_graph"):
                self.carried.gradients_made(result)
            if event is not None and self.carried.went_back(before, parameters, event, scaler=scaler):
                event.details["onto_unscaled"] = True
            return result

        return call

    def _autocast_enter(self, original: Any) -> Any:
        def enter(autocast: Any) -> Any:
            wanted = autocast._enabled, autocast.fast_dtype
            place = place_of_caller()
            if place is not None and (not place.via or _decorates()):
                asked = getattr(autocast, "asked", wanted[0])
                details = {"device": autocast.device, "dtype": wanted[1], "enabled": asked}
                self.events.append(Event("autocast", place, False, details))
                if self.precision is not None and wanted[0] and autocast.device == self.device:
                    autocast._enabled = self.precision.amp
                    autocast.fast_dtype = self.precision.dtype if self.precision.amp else wanted[1]
            try:
                return original(autocast)
            finally:
                autocast._enabled, autocast.fast_dtype = wanted
                self.autocast_on = torch.is_autocast_enabled(self.device)

        return enter

    def _autocast_exit(self, original: Any) -> Any:
        def leave(autocast: Any, *details: Any) -> Any:
            result = original(autocast, *details)
            self.autocast_on = torch.is_autocast_enabled(self.device)
            return result

        return leave

    def _scaler_call(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._busy:
                self._keep_state(scaler)
                optimizer = args[0] if args and name in ("unscale_", "step") else None
                again = name == "scale" and scaler.is_enabled() and self.carried.scaled_by(args[:1]) is not None
                details = {
                    "optimizer": id(optimizer),
                    "enabled": scaler.is_enabled(),
                    "again": again,
                    "scaler": id(scaler),
                }
                if optimizer is not None:
                    details["never_scaled"] = self.carried.never_scaled(optimizer)
                    details["another"] = self.carried.scaled_by_another(optimizer, scaler)
                self.note(f"scaler.{name}", **details)
            busy, self._busy = self._busy, name != "scale"
            try:
                result = original(scaler, *args, **kwargs)
            finally:
                self._busy = busy
            if scaler.is_enabled():
                self._after_scaler(scaler, name, args, result)
            return result

        return call

    def _after_scaler(self, scaler: Any, name: str, args: Any, result: Any) -> None:
        if name == "scale":
            self.scale = scaler.get_scale()
            self.carried.loss_scaled(result, scaler)
        elif name == "unscale_":
            self.carried.unscale(args[0])
        elif name == "update":
            self.carried.end_update()

    def _schedule(self, original: Any) -> Any:
        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_code.co_name != "_initial_step":  # of a schedule that is being made
                self.note("schedule", optimizer=id(scheduler.optimizer))
            return original(scheduler, *args, **kwargs)

        return step

    def _clears(self, original: Any) -> Any:
        @functools.wraps(original)
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            self.note("zero_grad")
            return original(owner, *args, **kwargs)

        return zero_grad

    def _keep_state(self, thing: Any) -> None:
        """Keep the state of an optimizer or scaler that was not handed over, as it is before its first use."""
        if id(thing) not in self.states:
            self.states[id(thing)] = (thing, copy.deepcopy(thing.state_dict()))
            if isinstance(thing, torch.amp.GradScaler):
                self.scalers.append(thing)
                narrow = self.precision is not None and self.precision.dtype is torch.float16
                if narrow and thing.is_enabled() and self.own_scale < thing.get_scale():
                    thing.load_state_dict(thing.state_dict() | {"scale": self.own_scale})

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        handed = any(optimizer is known for known in self.subject.update_optimizers())
        if not handed:
            self._keep_state(optimizer)
        scaled = self.carried.carries(optimizer)
        again = self.carried.step(optimizer)
        if not self._busy:
            self.note("step", optimizer=id(optimizer), scaled=scaled, again=again)
        elif again and self.events and self.events[-1].kind == "scaler.step":
            self.events[-1].details["again"] = True
        self._missing = self.carried.missing(optimizer)
        self.phase = "update"

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        last = self.events[-1] if self.events else None
        if last is not None and last.kind in ("step", "scaler.step"):
            last.details["missing"] = self._missing and self.carried.missing(optimizer)
        self.phase = "update"

    def put_back(self) -> None:
        """Restore the optimizers and scalers that the step brought itself, and let go of graphs and copies."""
        for thing, state in self.states.values():
            restore(thing, state)
        self.states.clear()
        self.roots.clear()


def _decorates() -> bool:
    """Return True if the region that is entered is a function that the user wrapped: autocast(...)(function)."""
    return sys._getframe(2).f_code.co_name == "decorate_autocast"


def _keep_request(original: Any) -> Any:
    """Keep what was asked for: autocast disables itself if the device is not there."""

    @functools.wraps(original)
    def init(
        autocast: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
    ) -> None:
        original(autocast, device_type, dtype, enabled, cache_enabled)
        autocast.asked = enabled

    return init
