"""Trace one whole update of a running program, then measure the true gradients of the next one in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ampscope.execution import Event, Execution
from ampscope.finite import Lineage
from ampscope.memory import KeptForBackward, nbytes
from ampscope.places import Place, place_of_caller
from ampscope.ranges import SCALES, Watch, is_product_module, records
from ampscope.running import Ended
from ampscope.tensors import address, tensors_in
from ampscope.tracing import Functions, Operators, Trace, eager, place_of_error
from ampscope.updates import ScriptSubject, Updates
from precision import Precision

AFTER = ("scaler.update", "zero_grad", "schedule")  # what ends an update after its optimizer has stepped


class ScriptExecution(Execution):
    """The events of a program's update; `paused` while a batch is loaded."""

    def __init__(self, subject: ScriptSubject, precision: Precision | None = None):
        super().__init__(subject, precision, ambient=False)
        self.paused = False
        self.phase = "update"
        self.stepped: list[tuple[str, Place | None]] = []

    def _optimizer_hooks(self) -> list[Any]:
        return []  # Updates has them already, and they must not change while they run

    def before_step(self, optimizer: Any) -> None:
        self._before_step(optimizer)

    def after_step(self, optimizer: Any) -> None:
        self._after_step(optimizer)
        self.stepped.append((type(optimizer).__name__, place_of_caller()))


class ScriptFunctions(Functions):
    """Calls as they are written, but for those that load a batch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        execution: Any = self.trace.execution
        if execution.paused:
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


class ScriptOperators(Operators):
    """Operators below autocast, but for those that load a batch."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        execution: Any = self.trace.execution
        if execution.paused:
            return operator(*args, **(kwargs or {}))
        return super().__torch_dispatch__(operator, types, args, kwargs)


class ScriptTrace:
    """Wait for update `number`, trace it, and look at the next one's gradients unless `only_trace`.

    `trace` is there once the update began, `whole` once it ended. `ranges` are measured in the update after it, which
    computes in float32. `finished` is called when there is no more to see; then Ended is raised in the program at the
    end of each update, unless `go_on`.
    """

    def __init__(self, number: int, *, go_on: bool = False, finished: Callable[[], None] | None = None):
        self.number = number
        self.go_on = go_on
        self.finished = finished
        self.updates = Updates(self._at_end)
        self.trace: Trace | None = None
        self.subject: ScriptSubject | None = None
        self.whole = False
        self.done = False
        self.skipped = False
        self.ledger: dict[str, Any] | None = None
        self.update_seconds: float | None = None
        self.ranges: dict[str, Any] | None = None
        self.batches: list[torch.Tensor] = []
        self._open = contextlib.ExitStack()
        self._execution: ScriptExecution | None = None
        self._kept: Any = None
        self._watch: Watch | None = None
        os.register_at_fork(after_in_child=self._in_child)

    # What Updates tells

    def before_step(self, optimizer: Any) -> None:
        if self._execution is not None:
            self._execution.before_step(optimizer)

    def after_step(self, optimizer: Any) -> None:
        if self._execution is not None:
            self._execution.after_step(optimizer)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        execution = self._execution
        if execution is None:
            yield
            return
        execution.paused = True
        try:
            yield
        finally:
            execution.paused = False

    def loaded(self, batch: Any) -> None:
        if self._execution is not None and self.trace is not None and not self.whole:
            self.batches += tensors_in(batch)
            known: Any = SimpleNamespace(batch=batch, named_parameters=list)
            with self.paused():
                self.trace.lineage.expect(known)

    def _in_child(self) -> None:
        if self._execution is not None:
            self._execution.paused = True

    # The updates that are looked at

    def _at_end(self, updates: Updates) -> None:
        if self.done:
            if not self.go_on:
                raise Ended
        elif self.whole:
            self._end_ranges()
            self._finish()
        elif self.trace is not None:
            self._end_trace()
            if self.go_on:
                self._finish()
            else:
                self._begin_ranges()
        elif updates.count >= self.number - 1:
            self._begin_trace()

    def _begin_trace(self) -> None:
        updates = self.updates
        self.update_seconds = sorted(updates.seconds)[len(updates.seconds) // 2] if updates.seconds else None
        self.subject = subject = ScriptSubject(updates)
        self._execution = execution = ScriptExecution(subject)
        self.trace = trace = Trace(execution, Lineage())
        trace.lineage.expect(subject)
        self._skips = updates.skipped
        functions = ScriptFunctions(trace)
        operators = ScriptOperators(trace, functions, subject)
        for hook in operators.hooks:
            self._open.callback(hook.remove)
        self._kept = KeptForBackward(subject.parameters())
        execution.autocast_on = torch.is_autocast_enabled(execution.device)
        self._open.enter_context(eager())
        self._open.enter_context(execution._patches())
        for mode in (self._kept, functions, operators):
            self._open.enter_context(mode)

    def _end_trace(self, error: BaseException | None = None) -> None:
        assert self.trace is not None and self._execution is not None and self.subject is not None
        trace, execution = self.trace, self._execution
        self._open.close()
        self._open = contextlib.ExitStack()
        self.whole = error is None
        self.skipped = self.updates.skipped > self._skips
        trace.error = error
        trace.error_place = place_of_error(error) if error is not None else None
        execution.events = in_order(execution.events)
        trace.first_events = execution.events
        trace.lineage.finish([*execution.roots])
        execution.roots.clear()
        self.ledger = self._memory()
        self._execution = None

    def failed(self, error: BaseException | None) -> None:
        """The program ended by itself, or failed, before everything was seen."""
        if self.trace is not None and not self.whole and self._execution is not None:
            self._end_trace(error or EOFError("the program ended in the middle of the update"))
        elif self._watch is not None:
            self._open.close()
        self._execution = None

    def _memory(self) -> dict[str, Any]:
        """What the update held, by purpose; see memory_ledger."""
        assert self.subject is not None
        subject, kept = self.subject, self._kept
        parameters = subject.parameters()
        buffers = [buffer for model in subject.models.values() for buffer in model.buffers()]
        known = {address(tensor) for tensor in (*parameters, *buffers, *self.batches)}
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [optimizer.state for optimizer in subject.optimizers.values()]
        cuda = subject.device.type == "cuda"
        ledger = {
            "precision": "as written",
            "parameters": nbytes(parameters),
            "buffers": nbytes(buffers),
            "gradients": nbytes(gradients),
            "optimizer_state": nbytes(tensors_in([[*state.values()] for state in states])),
            "batch": nbytes(self.batches),
            "activations": sum(size for place, size in kept.bytes.items() if place not in known | kept.copies),
            "weight_copies": sum(size for place, size in kept.bytes.items() if place in kept.copies - known),
            "peak": torch.cuda.max_memory_allocated(subject.device) if cuda else None,
        }
        self.batches = []
        self._kept = None
        return ledger

    def _begin_ranges(self) -> None:
        assert self.subject is not None and self.trace is not None
        subject = self.subject
        precision = Precision("fp32", subject.device, "")
        self._execution = execution = ScriptExecution(subject, precision)
        scale = self.trace.execution.scale
        self.scales = list(dict.fromkeys([*SCALES, float(scale)]))
        self.modules: dict[str, nn.Module] = dict(subject.named_modules())
        self.parameters = {name: part for name, part in subject.named_parameters() if part.requires_grad}
        self._watch = Watch(execution, self.scales)
        for hook in self._watch.hooks(self.modules, self.parameters):
            self._open.callback(hook.remove)
        self._open.enter_context(eager())
        self._open.enter_context(execution._patches())

    def _end_ranges(self) -> None:
        assert self._watch is not None and self.trace is not None
        self._open.close()
        products = {product.module for product in self.trace.products if product.phase != "backward"}
        products = products or {name for name, module in self.modules.items() if is_product_module(module)}
        found = records(self._watch, self.modules, [*self.parameters], products)
        scale = self.trace.execution.scale
        self.ranges = {"scales": self.scales, "scaler_scale": scale if scale != 1 else None, **found}
        self._watch = None
        self._execution = None

    def _finish(self) -> None:
        self.done = True
        self.updates.listener = None
        if self.finished is not None:
            self.finished()
        if not self.go_on:
            raise Ended


def in_order(events: list[Event]) -> list[Event]:
    """Begin with the forward pass: what the update before did after its step comes last."""
    first = next((index for index, event in enumerate(events) if event.kind not in AFTER), len(events))
    return [*events[first:], *events[:first]]
