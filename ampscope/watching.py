"""`watch(model, scaler)`: which layer was first, at each update of a real training that is skipped or not finite.

While nothing happens, the loss and one gradient are looked at, and all gradients only as often as stays below one
percent of an update. Everything else (repeating the calls of the model under a trace) is done when it happened.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizer_hooks

from ampscope.errors import InspectError
from ampscope.events import SHOWN, finding, in_words
from ampscope.files import json_text
from ampscope.gradients import Gradients, Late
from ampscope.places import Place, place_of_caller
from ampscope.repeating import Call, Calls, finite
from ampscope.subject import core
from ampscope.tensors import buffers_not_finite, tensors_in

log = logging.getLogger("ampscope")
WINDOW = 100  # updates that share a line of the diary, if nobody marks epochs
LEARNT = 2  # updates after which it is known which modules the loop calls, and in which order gradients arrive


def watch(
    model: nn.Module | Mapping[str, nn.Module],
    scaler: Any = None,
    *,
    diary: str | Path | None = None,
    every: int = WINDOW,
) -> Watcher:
    """Return a context for a training loop of any shape; nothing in the loop changes.

    `model` is one model or a dictionary of several, `scaler` the GradScaler (None or a disabled one: each optimizer
    that trains the model is watched instead). At the first update that is skipped or has a gradient that is not finite,
    and whenever another layer is the first, a warning names the layer, the operator and the line, and how its gradients
    moved in the updates before; a second one names the buffers that the update left not finite. `events` has each
    update that was skipped. `diary` is a file of lines that `inspect --diary` draws, one for every so many updates, or
    for each epoch if the loop calls `watcher.epoch()`.

    Raises:
        InspectError: if the diary cannot be written, or nothing of the model is trained.
    """
    return Watcher(model, scaler, diary=diary, every=every)


class Watcher:
    """Watch a training; `events` are the updates that went wrong, `updates` counts all of them."""

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], scaler: Any, *, diary: Any, every: int):
        models = model if isinstance(model, Mapping) else {"": model}
        self._given = dict(models)
        self.models = {name: core(part) for name, part in models.items()}
        self.parameters = {
            ".".join(word for word in (prefix, name) if word): parameter
            for prefix, part in self.models.items()
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }
        if not self.parameters:
            raise InspectError("watch needs a model with at least one trained parameter.")
        lazy = [name for name, part in self.parameters.items() if nn.parameter.is_lazy(part)]
        if lazy:
            raise InspectError(f"watch needs a model that was called once: {lazy[0]} has no size yet.")
        self.scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self.device = next(iter(self.parameters.values())).device
        self.later = self.device.type != "cpu"  # there nothing waits: what was measured is read one update later
        self.every = every
        self.updates = 0
        self.events: list[dict[str, Any]] = []
        self.gradients = Gradients(self.parameters)
        self.calls = Calls(self.models, self.device)
        self._diary = Path(diary) if diary is not None else None
        self._losses: list[torch.Tensor] = []
        self._line_of_backward: Place | None = None
        self._pending: dict[str, Any] | None = None  # what went wrong in an update whose number is not known yet
        self._measured: tuple[list[str], torch.Tensor] | None = None  # and what was measured in it
        self._begun = False
        self._unscaled: dict[int, tuple[list[str], torch.Tensor | None]] = {}
        self._late: Late | None = None
        self._kept: list[torch.Tensor] = []
        self._poisoned = False
        self._said: set[tuple] = set()
        self._line = 1
        self._line_start = (0, 0)
        self._undo: list[Any] = []
        self._trains: dict[int, list[str]] = {}
        self._stepped: set[int] = set()
        self._suspect: dict[str, Any] | None = None  # the event whose buffers were not looked at yet
        self._spoiled = set(buffers_not_finite(self.models))  # a mask of -inf may be one: it is no fault

    def __enter__(self) -> Watcher:
        if self._diary is not None:
            try:
                self._diary.write_text("")
            except OSError as error:
                raise InspectError(f"{self._diary} cannot be written ({error.strerror}).") from None
        self.calls.before = self._look_at_buffers
        self._undo += [self.calls.remove, self.gradients.forget_arrivals]
        self.calls.follow(self._given)
        self.gradients.follow_arrivals()
        self._put(torch.autograd, "backward", self._backward)
        if self.scaler is not None:
            self._put(self.scaler, "step", self._scaler_step)
            self._put(self.scaler, "unscale_", self._unscale)
        else:
            pre = optimizer_hooks.register_optimizer_step_pre_hook(self._before_step)
            post = optimizer_hooks.register_optimizer_step_post_hook(self._after_step)
            self._undo += [pre.remove, post.remove]
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._read_late()
        self._settle()
        self._look_at_buffers()
        if self.updates > self._line_start[0]:
            self._write_line()
        self.calls.end(keep=False)
        self.calls.end(keep=False)

    def _put(self, owner: Any, name: str, around: Any) -> None:
        """Put `around(original, *args, **kwargs)` in the place of a function until the end."""
        original = getattr(owner, name)
        own = name in vars(owner)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._undo else original(*args, **kwargs)

        def restore() -> None:
            if vars(owner).get(name) is call:
                setattr(owner, name, original) if own else delattr(owner, name)

        setattr(owner, name, call)
        self._undo.append(restore)

    def epoch(self) -> None:
        """End a line of the diary; once called, lines are epochs and not windows of updates."""
        self.every = 0
        self._write_line()

    # What the loop does

    def _backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Look after each backward pass, before anybody clips, and before an optimizer that calls it steps."""
        if self.calls.busy or torch._C._current_autograd_node() is not None:
            return original(*args, **kwargs)
        losses = [loss for loss in tensors_in(args[:1] or kwargs.get("tensors")) if loss.is_floating_point()]
        place = place_of_caller()
        result = original(*args, **kwargs)
        if self.scaler is None and self.calls.of_update():
            self._losses += [loss.detach() for loss in losses]
            self._line_of_backward = self._line_of_backward or place
            if not self.later and self._pending is None:
                self._look()
        elif self._line_of_backward is None:
            self._line_of_backward = place
        return result

    def _look(self) -> None:
        """On the CPU: is the loss finite, and what arrives last, and, as often as is cheap, are all gradients?"""
        good = all(map(finite, self._losses))
        if self._poisoned:
            self._poisoned = not good
            return
        ends = [trained for trained in self._trains.values() if trained] or [[*self.parameters]]
        bad = not good or not all(finite(self.gradients.last(end)) for end in ends)
        if not bad and (self.updates + 1) % self.gradients.interval:
            return
        names = self.gradients.present(self.parameters)
        if not names:
            return
        measured = self.gradients.measure(names, self.updates + 1, always=bad)
        if measured is not None and not torch.isfinite(measured).all():
            self._pending = self._finding(names, measured, good=good)
        elif measured is not None:
            self._measured = names, measured

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        names = self._names(optimizer)
        self._begun = bool(names or (self._trains[id(optimizer)] and self._losses))
        if not self._begun:
            return
        self._begin(optimizer)
        if self.later:
            self._read_late()
            self._look_late(self.gradients.present(self.parameters))
        elif names and self._pending is None and not self._poisoned:
            self._look_at_step(names)
        self._settle()

    def _look_at_step(self, names: list[str]) -> None:
        """Look again at what the loop did to the gradients after its backward pass."""
        if self._measured is None and finite(self.gradients.last(names)):
            return
        measured = self.gradients.norms(names)
        if not torch.isfinite(measured).all():
            calls: list[Call] | None = None if self._measured is None else []  # the backward pass had left them finite
            self._pending = self._finding(names, measured, good=True, calls=calls)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        """End the update of an optimizer; one that took a closure has called backward by now."""
        if self._trains.get(id(optimizer)):
            if not self._begun and self._names(optimizer):
                self._begin(optimizer)
            self._settle()
            self._end()

    def _look_late(self, names: list[str]) -> None:
        """On a GPU nothing waits for this update's loss: it is read in the next one, with copies of these weights."""
        last = self.gradients.last(names) if names else None
        if last is None:
            return
        sums = [tensor.detach().float().sum() for tensor in (*self._losses, last)]
        measured = None if self._poisoned else self.gradients.measure(names, self.updates)
        calls = self.calls.of_update()
        self._late = Late(self.updates, names, calls, sums=torch.stack(sums), measured=measured)
        parameters = [part.detach() for part in self.parameters.values()]
        if not self._kept:
            self._kept = [part.clone() for part in parameters]
        else:
            torch._foreach_copy_(self._kept, parameters)

    def _read_late(self) -> None:
        """Read what was measured at the update before; if it went wrong, repeat it with the weights that it had."""
        late, self._late = self._late, None
        if late is None:
            return
        values = late.read()
        measured, scale = values.get("measured"), values.get("scale")
        sums = torch.isfinite(values["sums"])
        wrong = not sums.all() or (measured is not None and not torch.isfinite(measured).all())
        if self._poisoned or not wrong:
            self._poisoned = self._poisoned and wrong
            if measured is not None and not wrong:
                self._remember(late.update, late.names, measured, scale)
            return
        with self._weights_then():
            good = None if scale is not None else bool(sums[:-1].all())
            found = self._finding(late.names, measured, good=good, calls=late.calls)
        self._report(found, late.update, scale=scale.item() if scale is not None else None)

    @contextlib.contextmanager
    def _weights_then(self) -> Iterator[None]:
        """Put the weights in that the update began with; one that the scaler skipped has changed none."""
        parameters = [part.detach() for part in self.parameters.values()] if self._kept else []
        now = [part.clone() for part in parameters]
        if parameters:
            torch._foreach_copy_(parameters, self._kept)
        try:
            yield
        finally:
            if parameters:
                torch._foreach_copy_(parameters, now)

    def _unscale(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure after the scaler has divided and before anybody clips, which spreads one NaN to all gradients."""
        result = original(optimizer, *args, **kwargs)
        names = self._names(optimizer)
        if names:
            bad = self.later or self._found(optimizer)
            self._unscaled[id(optimizer)] = names, self.gradients.measure(names, self.updates + 1, always=bad)
        return result

    def _found(self, optimizer: Any) -> bool:
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        return any(bool(value.item()) for value in found)

    def _scaler_step(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        plain = optimizer if hasattr(optimizer, "param_groups") else getattr(optimizer, "optimizer", optimizer)
        names = self._names(plain)
        if not names:
            return original(optimizer, *args, **kwargs)
        self._read_late()
        self._begin(plain)
        scaled = self.scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY"
        fused = getattr(plain, "_step_supports_amp_scaling", False)
        measured = self.gradients.measure(names, self.updates, always=True) if fused and scaled else None
        result = original(optimizer, *args, **kwargs)
        scale = self.scaler._scale.detach().clone()
        if id(optimizer) in self._unscaled:
            names, measured = self._unscaled.pop(id(optimizer))
        if fused and self.later and measured is not None:  # such an optimizer skips on the device
            calls = self.calls.of_update()
            self._late = Late(self.updates, names, calls, sums=measured, measured=measured, scale=scale)
        elif self._found(optimizer):
            measured = measured if measured is not None else self.gradients.norms(names)
            self._report(self._finding(names, measured, good=None), self.updates, scale=scale.item())
        elif measured is not None:
            self._remember(self.updates, names, measured, scale if fused and scaled else None)
        self._end()
        return result

    def _names(self, optimizer: Any) -> list[str]:
        """Return the watched parameters that this optimizer trains, and that have a gradient."""
        if id(optimizer) not in self._trains:
            owned = {id(part) for group in getattr(optimizer, "param_groups", ()) for part in group["params"]}
            self._trains[id(optimizer)] = [name for name, part in self.parameters.items() if id(part) in owned]
        return self.gradients.present(self._trains[id(optimizer)])

    def _begin(self, optimizer: Any) -> None:
        """Begin an update if an optimizer steps that has stepped in this one already, or if none has."""
        if not self._stepped or id(optimizer) in self._stepped:
            self.updates += 1
            self._stepped.clear()
            self.gradients.begin()
        self._stepped.add(id(optimizer))

    def _end(self) -> None:
        self._losses.clear()
        self._line_of_backward = None
        self.calls.end(keep=sum(map(bool, self._trains.values())) > 1)  # several optimizers share an update
        if self.updates == LEARNT:
            self.calls.learnt()
            self.gradients.forget_arrivals()
        if self.every and self.updates - self._line_start[0] >= self.every:
            self._write_line()

    # What is said

    def _finding(
        self, names: list[str], measured: torch.Tensor | None, *, good: bool | None, calls: list[Call] | None = None
    ) -> dict[str, Any]:
        line = str(self._line_of_backward) if self._line_of_backward is not None else None
        after: bool = good is True and calls == []
        calls = self.calls.of_update() if calls is None else calls
        found = finding(self.calls, calls, self.gradients, names, measured, good=good)
        return {**found, "line": line, "after_backward": after}

    def _settle(self) -> None:
        """Report what a backward pass found, now that the number of its update is known."""
        found, self._pending = self._pending, None
        measured, self._measured = self._measured, None
        if found is not None:
            self._report(found, self.updates, scale=None)
        elif measured is not None:
            self._remember(self.updates, *measured, None)

    def _remember(self, update: int, names: list[str], measured: torch.Tensor, scale: torch.Tensor | None) -> None:
        self.gradients.remember(update, names, measured, scale)
        drift = self.gradients.drift() if ("drift",) not in self._said else None
        if drift is not None:
            self._said.add(("drift",))
            log.warning(f"update {update:,}: {drift}.")

    def _report(self, found: dict[str, Any], update: int, *, scale: float | None) -> None:
        """Note one update that went wrong, and say so unless the same was said before."""
        event = {"update": update, "scale": 1.0 if scale is None else scale, **found}
        self._suspect = event
        self._poisoned = scale is None
        self.events.append(event)
        origin = event["forward"] or event["backward"] or {}
        key = (event["parameter"], origin.get("module"), origin.get("where"), bool(event["weights"]))
        if key not in self._said:
            self._said.add(key)
            log.warning(in_words(event, skipped=scale is not None))

    def _look_at_buffers(self) -> None:
        """Name the buffers that an update that went wrong has left not finite, once each.

        It is done before the next forward pass: a loop that puts them back has done so by then.
        """
        event, self._suspect = self._suspect, None
        if event is None:
            return
        bad = buffers_not_finite(self.models)
        event["buffers"] = [name for name in bad if name not in self._spoiled]
        self._spoiled.update(bad)
        if event["buffers"]:
            log.warning(
                f"update {event['update']:,} left buffers that are not finite: {', '.join(event['buffers'][:SHOWN])}"
                f"{' ...' if len(event['buffers']) > SHOWN else ''}. Running statistics stay so, and each evaluation "
                "with them is not finite. Put the buffers back if an update is skipped."
            )

    def _write_line(self) -> None:
        skipped = self.events[self._line_start[1] :]
        line = {
            "epoch": self._line,
            "updates": self.updates,
            "loss_scale": self.scaler.get_scale() if self.scaler is not None else 1.0,
            "skipped_updates": len(skipped),
            "skips": skipped,
        }
        self._line += 1
        self._line_start = (self.updates, len(self.events))
        if self._diary is not None:
            with self._diary.open("a") as file:
                file.write(json_text(line) + "\n")
