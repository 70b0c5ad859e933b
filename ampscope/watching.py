"""`watch(model, scaler)`: which layer was first, at each update of a real training that is skipped or not finite.

While nothing happens, one fused reduction over the gradients is all there is, and only as often as stays below one
percent of an update. Everything else (reading back, running the forward pass once more) is done when it happened.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizer_hooks

from ampscope.errors import InspectError
from ampscope.files import json_text
from ampscope.finite import ranged
from ampscope.precisions import Precision
from ampscope.subject import core
from ampscope.tensors import buffers_not_finite, tensors_in

log = logging.getLogger("ampscope")
SHARE = 0.01  # of an update, which the reduction may cost
KEPT = 8  # updates whose ranges are remembered
SHOWN = 4  # of them in a message
WINDOW = 100  # updates that share a line of the diary, if nobody marks epochs


def watch(
    model: nn.Module | Mapping[str, nn.Module],
    scaler: Any = None,
    *,
    diary: str | Path | None = None,
    every: int = WINDOW,
) -> Watcher:
    """A context around a training loop of any shape; nothing in the loop changes.

    `model` is one model or a dictionary of several, `scaler` the GradScaler (None or a disabled one: each optimizer
    that trains the model is watched instead). At each update that is skipped or has a gradient that is not finite, a
    warning says which layer was first, in the forward pass if it began there, and how its gradients moved in the
    updates before; a second one names the buffers that the update left not finite. `diary` is a file of lines that
    `inspect --diary` draws, one for every so many updates, or for each epoch if the loop calls `watcher.epoch()`.
    Raises InspectError if the diary cannot be written.
    """
    return Watcher(model, scaler, diary=diary, every=every)


class Watcher:
    """What `watch` gives: `events` are the updates that went wrong, `updates` counts all of them."""

    def __init__(self, model: nn.Module | Mapping[str, nn.Module], scaler: Any, *, diary: Any, every: int):
        models = model if isinstance(model, Mapping) else {"": model}
        self.models = {name: core(part) for name, part in models.items()}
        self.parameters = {
            ".".join(word for word in (prefix, name) if word): parameter
            for prefix, part in self.models.items()
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }
        if not self.parameters:
            raise InspectError("watch needs a model with at least one trained parameter.")
        self.scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self.every = every
        self.updates = 0
        self.events: list[dict[str, Any]] = []
        self.interval = 1
        self._diary = Path(diary) if diary is not None else None
        self._ring: deque[tuple[int, list[str], torch.Tensor, Any]] = deque(maxlen=KEPT)
        self._order: dict[str, int] = {}
        self._inputs: dict[str, tuple[Any, ...]] = {}
        self._waiting: deque[tuple[int, list[str], torch.Tensor, Any]] = deque()
        self._line = 1
        self._line_start = (0, 0)
        self._last: float | None = None
        self._handles: list[Any] = []
        self._arrivals: list[Any] = []
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
        for name, part in self.models.items():
            keep = part.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: self._keep(name, args, kwargs), with_kwargs=True
            )
            self._handles.append(keep)
        self._arrivals = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrived(name))
            for name, parameter in self.parameters.items()
            if parameter.is_leaf
        ]
        if self.scaler is not None:
            self._step = self.scaler.step
            self.scaler.step = self._scaler_step
        else:
            self._handles.append(optimizer_hooks.register_optimizer_step_pre_hook(self._before_step))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (*self._handles, *self._arrivals):
            handle.remove()
        if self.scaler is not None:
            del self.scaler.step  # the class's own shows again
        self._read_waiting(all_of_them=True)
        self._look_at_buffers()
        if self.updates > self._line_start[0]:
            self._write_line()
        self._inputs.clear()

    def epoch(self) -> None:
        """Ends a line of the diary; once called, lines are epochs and not windows of updates."""
        self.every = 0
        self._write_line()

    def _keep(self, name: str, args: Any, kwargs: Any) -> None:
        """What the model was called with, so that the call can be repeated if its update goes wrong."""
        self._look_at_buffers()
        if torch.is_grad_enabled():
            device = next(iter(self.parameters.values())).device.type
            enabled = torch.is_autocast_enabled(device)
            self._inputs[name] = (args, kwargs, torch.get_autocast_dtype(device) if enabled else None)

    def _arrived(self, name: str) -> None:
        """The order in which gradients arrive on the way back: known after the first update."""
        self._order.setdefault(name, len(self._order))

    def _scaler_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        names = self._names(optimizer)
        if not names:
            return self._step(optimizer, *args, **kwargs)
        self._begin(optimizer)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        measured = self._measure(names, always=fused)
        state = self.scaler._per_optimizer_states[id(optimizer)]
        scaled = state["stage"].name == "READY"
        result = self._step(optimizer, *args, **kwargs)
        scale = self.scaler._scale if scaled else None
        if measured is not None and fused and measured.device.type != "cpu":
            self._later(names, measured, scale)
        elif any(found.item() for found in state["found_inf_per_device"].values()):
            if measured is None:
                measured = self._norms(names)
            self._ring.append((self.updates, names, measured, _copied(scale)))
            self._report(names, measured, scale)
        elif measured is not None:
            self._ring.append((self.updates, names, measured, _copied(scale)))
        self._end()
        return result

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        names = self._names(optimizer)
        if not names:
            return
        self._begin(optimizer)
        measured = self._measure(names)
        if measured is not None:
            self._later(names, measured, None)
        self._end()

    def _names(self, optimizer: Any) -> list[str]:
        """The watched parameters that this optimizer trains, and that have a gradient."""
        if id(optimizer) not in self._trains:
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._trains[id(optimizer)] = [name for name, part in self.parameters.items() if id(part) in owned]
        return [name for name in self._trains[id(optimizer)] if self.parameters[name].grad is not None]

    def _begin(self, optimizer: Any) -> None:
        """An update begins when an optimizer steps that has stepped in the one before, or the first one does."""
        if not self._stepped or id(optimizer) in self._stepped:
            self.updates += 1
            self._stepped.clear()
        self._stepped.add(id(optimizer))
        self._started = time.perf_counter()
        if self._arrivals and len(self._order) and self.updates > 1:
            for handle in self._arrivals:
                handle.remove()
            self._arrivals = []

    def _measure(self, names: list[str], *, always: bool = False) -> torch.Tensor | None:
        """The largest magnitude of each gradient, on the device, unless this update is one to leave out."""
        if not always and self.updates % self.interval:
            return None
        started = time.perf_counter()
        measured = self._norms(names)
        self._pace(time.perf_counter() - started)
        return measured

    @torch.no_grad()
    def _norms(self, names: list[str]) -> torch.Tensor:
        found = [self.parameters[name].grad for name in names]
        gradients = [part.coalesce().values() if part.is_sparse else part for part in found if part is not None]
        return torch.stack([norm.float() for norm in torch._foreach_norm(gradients, torch.inf)])

    def _pace(self, cost: float) -> None:
        """How often the reduction may run, from what it cost and how long an update takes."""
        if self._last is not None and self.updates > 2:
            update = (self._started - self._last) / self.interval
            self.interval = min(max(1, round(cost / max(update, 1e-9) / SHARE)), 50)
        self._last = self._started

    def _later(self, names: list[str], measured: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Reads on the CPU at once, elsewhere when the next update comes, so that nothing waits for the device."""
        self._waiting.append((self.updates, names, measured, _copied(scale)))
        self._read_waiting(all_of_them=measured.device.type == "cpu")

    def _read_waiting(self, *, all_of_them: bool = False) -> None:
        while self._waiting and (all_of_them or len(self._waiting) > 2):
            update, names, measured, scale = self._waiting.popleft()
            self._ring.append((update, names, measured, scale))
            if not torch.isfinite(measured).all():
                self._report(names, measured, scale, update=update)

    def _end(self) -> None:
        if self.every and self.updates - self._line_start[0] >= self.every:
            self._write_line()

    def _report(self, names: list[str], measured: torch.Tensor, scale: Any, *, update: int | None = None) -> None:
        """Notes one update that went wrong, and says so."""
        values = dict(zip(names, measured.tolist(), strict=True))
        bad = [name for name, value in values.items() if not value < float("inf")]
        if not bad:
            return
        first = min(bad, key=lambda name: self._order.get(name, len(self._order)))
        event = {
            "update": update or self.updates,
            "parameter": first,
            "scale": scale.item() if scale is not None else self.scaler.get_scale() if self.scaler else 1.0,
            "bad": len(bad),
            "of": len(names),
            "forward": self._forward() if update in (None, self.updates) else None,
            "before": self._before(first),
            "buffers": [],
        }
        self._suspect = event
        self.events.append(event)
        log.warning(in_words(event, skipped=self.scaler is not None))

    def _look_at_buffers(self) -> None:
        """Names the buffers that an update that went wrong has left not finite, once each.

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

    def _before(self, name: str) -> list[dict[str, float]]:
        """The largest magnitude of one gradient in the updates before, without the loss scale."""
        moved = []
        for update, names, measured, scale in self._ring:
            if name in names:
                value = measured[names.index(name)].item() / (scale.item() if scale is not None else 1.0)
                moved.append({"update": update, "largest": value})
        return [entry for entry in moved[:-1] if entry["largest"] < float("inf")]

    def _forward(self) -> dict[str, Any] | None:
        """The first module of the forward pass whose output is not finite; None if all are, or if it cannot be told.

        The call is repeated without gradients; buffers and random numbers are put back.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None  # one rank alone must not begin a collective operation
        for prefix, part in self.models.items():
            if prefix in self._inputs:
                with contextlib.suppress(Exception):
                    found = _first_bad_module(part, *self._inputs[prefix])
                    if found is not None:
                        return found | {"module": ".".join(word for word in (prefix, found["module"]) if word)}
        return None

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


def _copied(scale: torch.Tensor | None) -> torch.Tensor | None:
    """The scale as it is now; the scaler changes it in place."""
    return None if scale is None else scale.detach().clone()


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [buffer.device for buffer in model.parameters() if buffer.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _first_bad_module(model: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype | None) -> dict[str, Any] | None:
    """Runs the forward pass once more and looks at what each module puts out."""
    found: list[dict[str, Any]] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if not found and not all(torch.isfinite(tensor).all() for tensor in outputs):
            ranges = [ranged(tensor) for tensor in tensors_in(inputs) if tensor.is_floating_point()]
            found.append({"module": name, "kind": type(module).__name__, "inputs": ranges})

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
        for name, module in model.named_modules()
    ]
    device = next(model.parameters()).device
    names: dict[Any, str] = {torch.float16: "amp-fp16", torch.bfloat16: "amp-bf16"}
    name = names.get(dtype, "fp32")
    try:
        with _kept_buffers(model), torch.no_grad(), Precision(name, device).autocast():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def in_words(event: dict[str, Any], *, skipped: bool) -> str:
    """One event in a sentence or three."""
    what = f"skipped at loss scale {event['scale']:,.10g}" if skipped else "not finite"
    text = f"update {event['update']:,} was {what}: "
    forward = event["forward"]
    if forward is not None:
        ranges = ", ".join(
            f"{entry['min']:.3g} to {entry['max']:.3g}" for entry in forward["inputs"] if entry["min"] is not None
        )
        text += f"the forward pass was not finite from {forward['module'] or 'the model'} ({forward['kind']}) on"
        text += f", whose inputs range from {ranges}. " if ranges else ". "
    else:
        text += (
            f"{event['parameter']} had the first bad gradient on the way back, of {event['bad']} among {event['of']}. "
        )
    before = event["before"][-SHOWN:]
    if before:
        moved = ", ".join(f"{entry['largest']:.3g} ({entry['update']:,})" for entry in before)
        text += f"The largest gradient there in the updates before: {moved}."
    return text.strip()
