"""Watch a program to its end: a line for each update, and a warning at each one that goes wrong, with its cause.

While nothing happens, the loss is looked at, and the gradients as often as stays below one percent of the time. When
an update goes wrong, the forward passes that led to it are repeated under a trace, before its weights are gone.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.utils.hooks import RemovableHandle

from ampscope.events import finding, in_words
from ampscope.files import json_text
from ampscope.gradients import Gradients
from ampscope.memory import of_this_process
from ampscope.places import Place, place_of_caller
from ampscope.repeating import Call, Calls, finite, record
from ampscope.subject import core
from ampscope.tensors import tensors_in
from ampscope.updates import Listener, ScriptSubject, Updates

SHARE = 0.01  # of an update, which looking at the gradients may cost
RARELY = 100  # updates between two looks at the loss scale on a GPU, and at most between two at the gradients
KNOWN = 2  # updates after which every model has been called
WRITTEN = 1.0  # seconds between two writes of the file


class ScriptWatch(Listener):
    """Note each update of a program in `file`, a line for every so many (`every`), and say what goes wrong.

    `events` are the updates that went wrong.
    """

    def __init__(self, file: Path, every: int = 1):
        self.every = every
        self.updates = Updates(self._at_end)
        self.events: list[dict[str, Any]] = []
        self._file = file.open("w")
        self._lines = 0
        self._said: set[tuple] = set()
        self._calls: list[Call] = []
        self._losses: list[torch.Tensor] = []
        self._backward: Place | None = None
        self._batch: Any = None
        self._skips: list[dict[str, Any]] = []
        self._order: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []
        self._norm: torch.Tensor | None = None
        self._end: torch.Tensor | None = None
        self._later: tuple[int, Any, torch.Tensor] | None = None
        self._device = torch.device("cpu")
        self._interval = 1
        self._scale = 1.0
        self._good = 0  # updates since the scale last changed
        self._poisoned = False
        self._wrong = False  # this update has been spoken of
        self._repeating = False
        self._written = time.perf_counter()
        self._memory: int | None = None

    def __enter__(self) -> ScriptWatch:
        self.updates.__enter__()
        self.updates.listener = self
        for owner in (nn.utils, clip_grad):
            self.updates.wrap(owner, "clip_grad_norm_", self._clip)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.updates.__exit__()
        if self.updates.count > self._lines * self.every or self._skips:
            self._write_line()
        self._file.close()

    def summary(self) -> str:
        """Say in a sentence what was seen."""
        skipped = sum(event["skipped"] for event in self.events)
        wrong = len(self.events) - skipped
        text = f"{self.updates.count:,} updates, {skipped:,} skipped"
        return f"{text}, {wrong} not finite." if wrong else f"{text}."

    # What Updates tells

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._device = next(module.parameters()).device
        if self._repeating or not torch.is_grad_enabled():
            return
        self._calls.append(record(core(module), args, kwargs, self._device))

    def _left(self, module: nn.Module, _: Any, outputs: Any) -> None:
        self.returned(module, outputs)

    def returned(self, module: nn.Module, outputs: Any) -> None:
        call = next((call for call in reversed(self._calls) if call.module is core(module)), None)
        if call is not None and not self._repeating:
            call.follow(outputs)

    def going_back(self, losses: Any) -> None:
        self._losses += [loss for loss in tensors_in(losses) if loss.numel() == 1]
        self._backward = self._backward or place_of_caller()

    def loaded(self, batch: Any) -> None:
        self._batch = batch

    def before_step(self, optimizer: Any) -> None:
        if not self.updates.scaling:
            self._look(optimizer)

    def after_step(self, optimizer: Any) -> None:
        if not self.updates.scaling:
            self._losses.clear()

    def scaler_stepped(self, scaler: Any, optimizer: Any, *, skipped: bool) -> None:
        self._read_scale(scaler, skipped=skipped)
        if skipped:
            self._say(optimizer, scaler)
        self._losses.clear()

    # Looking

    def _clip(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Look before clipping, which makes every gradient NaN if one is."""
        scaler = self._at_work()
        if scaler is None:
            self._look(None)
        else:
            states = scaler._per_optimizer_states.values()
            if any(value.item() for state in states for value in state["found_inf_per_device"].values()):
                self._say(None, scaler)
        norm = original(*args, **kwargs)
        if isinstance(norm, torch.Tensor):
            self._norm = norm.detach()
        return norm

    def _at_work(self) -> Any:
        """Return the scaler that has scaled a loss, if there is one."""
        scalers = self.updates.scalers.values()
        return next((scaler for scaler in scalers if scaler.is_enabled() and scaler._scale is not None), None)

    def _look(self, optimizer: Any) -> None:
        """Look at the loss and, as often as is cheap, at the gradients: without a scaler nobody else does."""
        if self._poisoned or self._wrong:
            return
        if self._device.type != "cpu":
            self._look_later()
        elif not all(map(finite, self._losses)) or not finite(self._last_gradient(optimizer)):
            self._say(optimizer, None)
        elif self.updates.count % self._interval == 0 and self._norm is None:
            started = time.perf_counter()
            self._norm = norm_of(self._parameters(optimizer))
            bad = self._norm is not None and not math.isfinite(self._norm.item())
            cost = time.perf_counter() - started
            if self.updates.seconds:
                self._interval = min(max(1, round(cost / self.updates.seconds[-1] / SHARE)), RARELY)
            if bad:
                self._say(optimizer, None)

    def _last_gradient(self, optimizer: Any) -> torch.Tensor | None:
        """Return the gradient that arrives last: what is not finite on the way back most often reaches it."""
        if self._end is None or self._end.grad is None:
            parameters = self._parameters(optimizer)
            self._end = max(parameters, key=lambda part: self._order.get(id(part), 0), default=None)
        return None if self._end is None else self._end.grad

    def _look_later(self) -> None:
        """Look at the loss one update later on a GPU, so that nothing waits; its weights are gone then."""
        losses, update = self._losses, self.updates.count + 1
        if self._later is not None and self._later[0] != update:
            before, event, finite = self._later
            self._later = None
            event.synchronize()
            if not bool(finite):
                self._say(None, None, update=before)
        if losses and self._later is None:
            finite = torch.isfinite(torch.stack([loss.detach().float().sum() for loss in losses])).all()
            event = torch.Event(self._device)
            finite = finite.to("cpu", non_blocking=True)
            event.record()
            self._later = update, event, finite

    def _parameters(self, optimizer: Any) -> list[torch.Tensor]:
        optimizers = [optimizer] if optimizer is not None else [*self.updates.optimizers.values()]
        groups = [group for one in optimizers for group in one.param_groups]
        parameters = [part for group in groups for part in group["params"]]
        if not optimizers:
            parameters = ScriptSubject(self.updates).parameters()
        return [part for part in parameters if part.grad is not None]

    # An update that went wrong

    def _read_scale(self, scaler: Any, *, skipped: bool) -> None:
        """Read the scale when it can have changed: on a GPU each read waits."""
        if not scaler.is_enabled():
            return
        self._good = 0 if skipped else self._good + 1
        interval = scaler.get_growth_interval()
        if skipped or self._good % interval < 2 or self._good % RARELY == 1 or self._device.type == "cpu":
            self._scale = scaler.get_scale()

    def _say(self, optimizer: Any, scaler: Any, *, update: int | None = None) -> None:
        """Note what was wrong, once for each update, and print it the first time it is seen."""
        if self._wrong:
            return
        self._wrong = True
        if scaler is None:
            self._poisoned = True  # what comes later is this one's doing
        event = {
            "update": update or self.updates.count + 1,
            "scale": self._scale if scaler is not None else 1.0,
            "skipped": scaler is not None,
            "line": str(self._backward) if self._backward is not None else None,
            "after_backward": False,
            **self._cause(optimizer),
        }
        if update is not None:
            reason = "its loss was read when its weights had changed"
            event |= {"parameter": None, "weights": [], "batch": None, "forward": None, "not_repeated": reason}
        self.events.append(event)
        self._skips.append(event)
        origin = event["forward"] or event["backward"] or {}
        key = (origin["module"], origin["where"]) if origin else (event["parameter"], event["line"])
        if key not in self._said:
            self._said.add(key)
            print(f"ampscope: {in_words(event, skipped=scaler is not None)}", file=sys.stderr, flush=True)

    def _cause(self, optimizer: Any) -> dict[str, Any]:
        """Return why this update went wrong; see `finding`."""
        subject = ScriptSubject(self.updates)
        named = dict(subject.named_parameters())
        gradients = Gradients(named)
        # Until the order of their arrival is known, the last to be made is the first on the way back.
        gradients.order = {name: self._order.get(id(part), -place) for place, (name, part) in enumerate(named.items())}
        trained = {id(part) for part in self._parameters(optimizer)}
        names = [name for name in gradients.present(named) if id(named[name]) in trained]
        measured = gradients.norms(names) if names else None
        calls = Calls(subject.tops, self._device)
        good = all(map(finite, self._losses))
        self._repeating = True
        try:
            return finding(calls, self._calls, gradients, names, measured, good=good, batch=self._batch)
        finally:
            self._repeating = False

    # The end of an update

    def _at_end(self, updates: Updates) -> None:
        if updates.count == KNOWN:
            self._attach()
        if updates.count // self.every > self._lines:
            self._write_line()
        self._calls.clear()
        self._losses.clear()
        self._backward = None
        self._wrong = False

    def _attach(self) -> None:
        """Follow the models that are known by now, instead of every module; and the order of their gradients, once."""
        self.updates.forget_modules()
        for _, module, _ in self.updates.roots.values():
            self._handles.append(module.register_forward_pre_hook(self.called, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._left))
        parameters = [part for group in self.updates.optimizers.values() for part in group.param_groups]
        for part in [part for group in parameters for part in group["params"]]:
            if part.requires_grad and part.is_leaf:
                self._follow(part)

    def _follow(self, parameter: torch.Tensor) -> None:
        def arrived(_: Any) -> None:
            self._order[id(parameter)] = len(self._order)
            self._end = parameter
            handle.remove()

        handle = parameter.register_post_accumulate_grad_hook(arrived)
        self._handles.append(handle)

    def _write_line(self) -> None:
        updates = self.updates
        self._lines += 1
        line = {
            "epoch": self._lines,
            "updates": updates.count,
            "loss_scale": self._scale,
            "skipped_updates": sum(skip["skipped"] for skip in self._skips),
            "skips": self._skips,
            "gradient_norm": self._read_norm(),
            "seconds": sum(updates.seconds[-self.every :]) / max(1, len(updates.seconds[-self.every :])),
            "memory": self._read_memory(),
        }
        del updates.seconds[: -self.every]
        del updates.loading[: -self.every]
        self._skips = []
        self._file.write(json_text(line) + "\n")
        if time.perf_counter() - self._written > WRITTEN:
            self._file.flush()
            self._written = time.perf_counter()

    def _read_memory(self) -> int | None:
        """Ask the system as often as the file is written: it takes a hundredth of a short update."""
        if self._memory is None or time.perf_counter() - self._written > WRITTEN:
            self._memory = memory()
        return self._memory

    def _read_norm(self) -> float | str | None:
        """Read the norm, rarely on a GPU, where this waits; JSON has no number for what is not finite."""
        norm, self._norm = self._norm, None
        if norm is None or (norm.device.type != "cpu" and self._lines % RARELY):
            return None
        value = norm.item()
        return value if math.isfinite(value) else str(value)


def norm_of(parameters: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the norm of all dense gradients together; None if there are none."""
    gradients = [part.grad for part in parameters if part.grad is not None and not part.grad.is_sparse]
    if not gradients:
        return None
    with torch.no_grad():
        return torch.nn.utils.get_total_norm(gradients)


def memory() -> int | None:
    """Return the most that CUDA's allocator gave out, elsewhere the memory that this process has now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return of_this_process("VmRSS")
