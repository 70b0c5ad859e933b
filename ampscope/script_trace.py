"""Trace one whole update of a running program, then measure the true gradients of the next one in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ampscope.execution import Event, Execution
from ampscope.finite import Lineage
from ampscope.functions import TO_PYTHON, Functions
from ampscope.memory import KeptForBackward, nbytes
from ampscope.operators import WAITS, Operators
from ampscope.places import Place, place_of_caller
from ampscope.precisions import Precision
from ampscope.ranges import SCALES, Watch, is_product_module, records
from ampscope.running import Ended
from ampscope.tensors import address, tensors_in
from ampscope.trace import Trace
from ampscope.tracing import eager, place_of_error
from ampscope.updates import Listener, ScriptSubject, Updates

EARLY = 2  # updates that are traced whatever was asked for: a fault of the recipe often shows in the second
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

    def _keep_state(self, thing: Any) -> None:
        """Note a scaler; nothing is put back in a program that runs on."""
        if isinstance(thing, torch.amp.GradScaler) and not any(thing is known for known in self.scalers):
            self.scalers.append(thing)

    def before_step(self, optimizer: Any) -> None:
        self._before_step(optimizer)

    def after_step(self, optimizer: Any) -> None:
        self._after_step(optimizer)
        self.stepped.append((type(optimizer).__name__, place_of_caller()))

    def begin_inside(self, subject: ScriptSubject) -> list[Any]:
        """Follow models that were not known before, one of which is just being called; return the hooks."""
        self.subject = subject
        self.device = subject.device.type
        self.autocast_on = torch.is_autocast_enabled(self.device)
        self._enter()
        models = subject.models.values()
        return [model.register_forward_pre_hook(self._enter) for model in models] + [
            model.register_forward_hook(self._leave, always_call=True) for model in models
        ]


class ScriptFunctions(Functions):
    """See calls as they are written, but for those that load a batch."""

    def __init__(self, trace: Trace, live: Live):
        super().__init__(trace)
        self._live = live

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        execution: Any = self.trace.execution
        if execution.paused or (function in TO_PYTHON and not self._live.holds(args[:1])):
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


class ScriptOperators(Operators):
    """See operators below autocast, but for those that load a batch."""

    def __init__(self, trace: Trace, functions: Functions, subject: ScriptSubject, live: Live):
        super().__init__(trace, functions, subject)
        self._live = live
        live.add(subject.parameters())

    def enter(self, name: str) -> None:
        """Note a module that is being called and had no hook yet."""
        self._running.append(name)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        execution: Any = self.trace.execution
        if execution.paused:
            return operator(*args, **(kwargs or {}))
        live = self._live.holds((args, kwargs))
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        if live:
            self._live.add(result)
        else:
            self._live.drop(result)
        return result

    def _notice(self, op: str, place: Place | None, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        if op not in WAITS or self._live.holds(given):
            super()._notice(op, place, given, made)


class Live:
    """The tensors that would be on the GPU: weights, what goes into models, and all that is computed from it.

    What a program does to its data before, and how it draws the order of it, waits for nothing.
    """

    def __init__(self) -> None:
        self._places: set[int] = set()

    def holds(self, tree: Any) -> bool:
        return any(address(leaf) in self._places for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    def add(self, tree: Any) -> None:
        self._places |= {address(tensor) for tensor in tensors_in(tree)} - {0, -1}

    def drop(self, tree: Any) -> None:
        """Forget tensors whose memory may be used again."""
        self._places -= {address(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class ScriptTrace(Listener):
    """Trace update `number`, and look at the gradients of the next one, which computes in float32.

    The first updates are traced, too: if one leaves weights that are not finite, or fails, it is the one to report.
    `trace` is that of the update to report and `whole` if it ended; `ranges` are those of the next one. When all has
    been seen, Ended is raised in the program at the end of each further update. With `finished` the program goes on
    instead, so that no update computes in float32; it is called with this object.
    """

    eager = True

    def __init__(self, number: int, finished: Callable[[ScriptTrace], None] | None = None):
        self.number = number
        self.finished = finished
        self.updates = Updates(self._at_end)
        self.trace: Trace | None = None
        self.subject = ScriptSubject(self.updates)
        self.whole = False
        self.done = False
        self.skipped = False
        self.poisoned = False
        self.ledger: dict[str, Any] | None = None
        self.ranges: dict[str, Any] | None = None
        self.batches: list[torch.Tensor] = []
        self._open = contextlib.ExitStack()
        self._execution: ScriptExecution | None = None
        self._current: Trace | None = None
        self._following = False  # operators are followed: the models are known
        self._kept: Any = None
        self._watch: Watch | None = None
        self._skips = 0
        self._live = Live()
        self._before: list[Event] = []
        self._left: dict[int, torch.Tensor] = {}  # with gradients that the update before has used
        os.register_at_fork(after_in_child=self._in_child)

    def __enter__(self) -> ScriptTrace:
        self.updates.__enter__()
        self.updates.listener = self
        self._begin()
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.close()
        self.updates.__exit__(*details)

    # What Updates tells

    def before_step(self, optimizer: Any) -> None:
        if self._execution is not None:
            self._execution.before_step(optimizer)

    def after_step(self, optimizer: Any) -> None:
        if self._execution is not None:
            self._execution.after_step(optimizer)

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Follow the operators from the first call of a model on: it is known now."""
        self._live.add((args, kwargs))
        if self._current is not None and not self._following and torch.is_grad_enabled():
            known: Any = SimpleNamespace(batch=[*args, *kwargs.values()], named_parameters=list)
            self._current.lineage.expect(known, "the model's input")
            self._follow(inside=True)

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
        if self._current is not None:
            self._live.add(batch)
            self.batches += tensors_in(batch)
            known: Any = SimpleNamespace(batch=batch, named_parameters=list)
            with self.paused():
                self._current.lineage.expect(known)

    def _in_child(self) -> None:
        if self._execution is not None:
            self._execution.paused = True

    # The updates that are looked at

    def _at_end(self, updates: Updates) -> None:
        if self.done:
            if self.finished is None:
                raise Ended
        elif self._watch is not None:
            self._end_ranges()
            self._finish()
        else:
            if self._current is not None:
                self._end(updates.count)
            # One more than was asked for, because what is read first was computed in the update before.
            if self.trace is None and (updates.count < EARLY or updates.count >= self.number - 2):
                self._begin()
                self._follow()
            elif self.trace is not None and (self.poisoned or self.finished is not None):
                self._finish()
            elif self.trace is not None:
                self._begin_ranges()

    def _begin(self) -> None:
        """Note the events of an update from here on."""
        self.subject = ScriptSubject(self.updates)
        self._execution = execution = ScriptExecution(self.subject)
        execution.carried.left = self._left
        self._current = Trace(execution, Lineage())
        self._skips = self.updates.skipped
        self.batches = []
        self._kept = None
        self._open.enter_context(eager())
        self._open.enter_context(execution._patches())

    def _follow(self, *, inside: bool = False) -> None:
        """Follow the operators, too; `inside` a model that is just being called."""
        trace, execution = self._current, self._execution
        assert trace is not None and execution is not None
        self._following = True
        if inside:
            self.subject = ScriptSubject(self.updates)
            for hook in execution.begin_inside(self.subject):
                self._open.callback(hook.remove)
        elif not self.subject.called:
            execution.phase = "forward"
        trace.lineage.expect(self.subject)
        functions = ScriptFunctions(trace, self._live)
        operators = ScriptOperators(trace, functions, self.subject, self._live)
        if inside:
            operators.enter("")
        for hook in operators.hooks:
            self._open.callback(hook.remove)
        self._kept = KeptForBackward(self.subject.parameters())
        self._open.enter_context(_apart_from_transforms(self._kept))
        for mode in (self._kept, functions, operators):
            self._open.enter_context(mode)

    def _end(self, number: int, error: BaseException | None = None) -> None:
        """End an update: it is the one to report if it was asked for, or if it went wrong."""
        trace, execution = self._current, self._execution
        assert trace is not None and execution is not None
        self._open.close()
        self._open = contextlib.ExitStack()
        self._left = execution.carried.left
        self._current = None
        self._execution = None
        self._following = False
        trace.lineage.finish([*execution.roots])
        execution.roots.clear()
        if error is None and trace.lineage.first is not None:
            weights = self.subject.parameters()
            self.poisoned = not all(bool(torch.isfinite(weight).all()) for weight in weights)
        if number < self.number and error is None and not self.poisoned:
            self._before = execution.events
            return
        self.trace = trace
        self.number = number
        self.whole = error is None
        self.skipped = self.updates.skipped > self._skips
        trace.error = error
        trace.error_place = place_of_error(error) if error is not None else None
        # What is wrong with an update that fails is often what the one before left out.
        trace.first_events = [*self._before, *execution.events]
        execution.events = in_order(execution.events)
        self.ledger = self._memory() if self._kept is not None else None

    def failed(self, error: BaseException | None) -> None:
        """Handle a program that ended by itself, or failed, before everything was seen."""
        events = self._current is not None and self._current.execution.events
        if error is not None and events:
            self._end(self.updates.count + 1, error)
        self._current = self._execution = None

    def _memory(self) -> dict[str, Any]:
        """Return what the update held, by purpose; see memory_ledger."""
        subject, kept = self.subject, self._kept
        parameters = subject.parameters()
        buffers = [buffer for model in subject.models.values() for buffer in model.buffers()]
        known = {address(tensor) for tensor in (*parameters, *buffers, *self.batches)}
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [optimizer.state for optimizer in subject.optimizers.values()]
        cuda = subject.device.type == "cuda"
        ledger = {
            "precision": "this update",
            "parameters": nbytes(parameters),
            "buffers": nbytes(buffers),
            "gradients": nbytes(gradients),
            "optimizer_state": nbytes(tensors_in([[*state.values()] for state in states])),
            "batch": nbytes(self.batches),
            "activations": sum(size for place, size in kept.bytes.items() if place not in known | kept.copies),
            "weight_copies": sum(size for place, size in kept.bytes.items() if place in kept.copies - known),
            "workspace": None,
            "peak": torch.cuda.max_memory_allocated(subject.device) if cuda else None,
        }
        self.batches = []
        self._kept = None
        return ledger

    def _begin_ranges(self) -> None:
        assert self.trace is not None
        subject = self.subject
        precision = Precision("fp32", subject.device)
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
        self.updates.listener = Listener()
        if self.finished is None:
            raise Ended
        self.finished(self)


@contextlib.contextmanager
def _apart_from_transforms(kept: KeptForBackward) -> Iterator[None]:
    """Take the hooks on saved tensors away while a transform of torch.func runs: it refuses them."""
    graph: Any = torch.autograd.graph
    refuse = graph.disable_saved_tensors_hooks

    @contextlib.contextmanager
    def without(error_message: str) -> Iterator[None]:
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:  # one inside another
            with refuse(error_message):
                yield
            return
        kept.hooks.__exit__()
        try:
            with refuse(error_message):
                yield
        finally:
            kept.hooks.__enter__()

    graph.disable_saved_tensors_hooks = without
    try:
        yield
    finally:
        graph.disable_saved_tensors_hooks = refuse


def in_order(events: list[Event]) -> list[Event]:
    """Begin with the forward pass: what the update before did after its step comes last."""
    first = next((index for index, event in enumerate(events) if event.kind not in AFTER), len(events))
    return [*events[first:], *events[:first]]
