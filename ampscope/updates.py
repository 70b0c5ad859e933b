"""Observe the updates of an unchanged program by global hooks: its optimizers, models, scalers and batches.

An update ends when each optimizer that takes part in it has stepped. The first updates show which ones do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as optimizer_hooks
from torch.utils.data import dataloader

from ampscope.places import kind_of_file
from ampscope.subject import Subject, core, takes_hooks

FRAMES = 40  # to search for the owner of a called module


class Listener:
    """An observer of more than the ends of updates: these methods are called for each event.

    With `eager` models of torch.compile run uncompiled.
    """

    eager = False

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Handle a call of a module with parameters from outside of any other; requires `modules` of Updates."""

    def returned(self, module: nn.Module, outputs: Any) -> None:
        """Handle the end of such a call."""

    def going_back(self, losses: Any) -> None:
        """Handle the start of a backward pass."""

    def before_step(self, optimizer: Any) -> None:
        """Handle an optimizer that is about to step."""

    def after_step(self, optimizer: Any) -> None:
        """Handle an optimizer that has stepped."""

    def scaler_stepped(self, scaler: Any, optimizer: Any, *, skipped: bool) -> None:
        """Handle a call of scaler.step that is about to return."""

    def paused(self) -> Any:
        """Return a context that batches are loaded in."""
        return contextlib.nullcontext()

    def loaded(self, batch: Any) -> None:
        """Handle a loaded batch."""


class Updates:
    """Count a program's updates and tell `at_end(self)` at the end of each, from the second one on.

    `count` is the number of updates that have ended, `seconds` the time of each that could be measured, `loading` the
    part of it in which batches were loaded. `forwards` counts calls of outermost modules by class (unless `modules` is
    False), `backwards` calls of backward, `children` the processes that were started. `listener` sees optimizer steps
    and batches; see ScriptTrace.
    """

    def __init__(self, at_end: Callable[[Updates], None], *, modules: bool = True):
        self.at_end = at_end
        self.modules = modules
        self.listener = Listener()
        self.count = 0
        self.seconds: list[float] = []
        self.loading: list[float] = []
        self.forwards: Counter = Counter()
        self.backwards = 0
        self.children = 0
        self.compiled = False
        self.skipped = 0
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.scalers: dict[int, Any] = {}
        self.roots: dict[int, tuple[str, nn.Module, nn.Module | None]] = {}
        self.made: weakref.WeakSet = weakref.WeakSet()
        self._cycle: set[int] = set()
        self._stepped: set[int] = set()
        self._depth = 0
        self._loading = 0.0
        self._last: float | None = None
        self._going_back = False
        self.scaling = False  # inside scaler.step
        self._entered = 0  # optimizer steps since scaler.step began
        self._pid = os.getpid()
        self._followed: list[Any] = []
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> Updates:
        pre = optimizer_hooks.register_optimizer_step_pre_hook(self._before_step)
        post = optimizer_hooks.register_optimizer_step_post_hook(self._after_step)
        self._undo += [pre.remove, post.remove]
        if self.modules:
            self._follow_modules()
        self.wrap(torch.amp.GradScaler, "step", self._scaler_step)
        self.wrap(torch.amp.GradScaler, "__init__", self._scaler_made)
        self.wrap(torch.optim.Optimizer, "__init__", self._optimizer_made)
        self.wrap(torch.autograd, "backward", self._backward)
        self.wrap(torch, "compile", self._compile)
        self.wrap(dataloader._BaseDataLoaderIter, "__next__", self._next_batch)
        self.wrap(BaseProcess, "start", self._child)
        self.wrap(subprocess.Popen, "__init__", self._child)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _follow_modules(self) -> None:
        """Follow calls of modules from outside of any other."""
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        enter = module_hooks.register_module_forward_pre_hook(self._enter)
        leave = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        self._followed = [enter, leave]
        self._undo += [enter.remove, leave.remove]

    def forget_modules(self) -> None:
        """Stop following calls of modules, because this takes time at each call."""
        for handle in self._followed:
            handle.remove()

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace a function by `around(original, *args, **kwargs)` until the end."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        setattr(owner, name, call)
        self._undo.append(lambda: setattr(owner, name, original) if getattr(owner, name) is call else None)

    # What is seen

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1 and torch._C._current_autograd_node() is None:
            self.forwards[type(core(module)).__name__] += 1
            first = next(module.parameters(), None)
            if first is None or first.is_meta:  # a rehearsal without computation
                return
            if id(module) not in self.roots:
                if any(is_lazy(parameter) for parameter in module.parameters()):  # this call creates its weights
                    return
                self.roots[id(module)] = _named(module)
            # PyTorch hands keywords on to hooks of a single module alone; here they are the caller's variable.
            kwargs = sys._getframe(1).f_locals.get("kwargs")
            self.listener.called(module, args, kwargs or {})

    def _leave(self, module: nn.Module, _: Any, outputs: Any) -> None:
        self._depth -= 1
        if not self._depth and torch._C._current_autograd_node() is None:
            self.listener.returned(module, outputs)

    def _backward(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        outer, self._going_back = self._going_back, True
        if not outer:  # a trace hands the call on to itself, and a checkpoint has backward passes of its own
            self.backwards += 1
            self.listener.going_back(args[:1] or kwargs.get("tensors"))
        try:
            return original(*args, **kwargs)
        finally:
            self._going_back = outer

    def _optimizer_made(self, original: Callable, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        self.made.add(optimizer)

    def _scaler_made(self, original: Callable, scaler: Any, *args: Any, **kwargs: Any) -> None:
        original(scaler, *args, **kwargs)
        self.scalers[id(scaler)] = scaler

    def _compile(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self.listener.eager:
            self.compiled = True
            torch.compiler.set_stance("force_eager")
        return result

    def _child(self, original: Callable, process: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a new process, unless it loads batches."""
        if getattr(getattr(process, "_target", None), "__name__", "") != "_worker_loop":
            self.children += 1
        return original(process, *args, **kwargs)

    def _next_batch(self, original: Callable, loader: Any) -> Any:
        """Load a batch: modules that the data set calls are not the program's models."""
        started = time.perf_counter()
        with self.listener.paused():
            batch = original(loader)
        self.listener.loaded(batch)
        self._loading += time.perf_counter() - started
        return batch

    # Steps

    def _scaler_step(self, original: Callable, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = getattr(optimizer, "optimizer", optimizer) if not hasattr(optimizer, "param_groups") else optimizer
        self.scalers[id(scaler)] = scaler
        outer, self.scaling = self.scaling, True
        self._entered = 0
        try:
            result = original(scaler, optimizer, *args, **kwargs)
        finally:
            self.scaling = outer
        skipped = not self._entered or (_fused(optimizer) and _found_inf(scaler, optimizer))
        self.skipped += skipped
        self.listener.scaler_stepped(scaler, optimizer, skipped=skipped)
        self._step_ended(optimizer)
        return result

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self._entered += 1
        self.listener.before_step(optimizer)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        self.listener.after_step(optimizer)
        if not self.scaling:
            self._step_ended(optimizer)

    def _step_ended(self, optimizer: Any) -> None:
        if os.getpid() != self._pid:
            return
        key = id(optimizer)
        self.optimizers[key] = optimizer
        if key in self._stepped:
            self._cycle = self._stepped
            self.count += 1
            self._stepped = set()
        self._stepped = self._stepped | {key}
        if not self._cycle and len(self.made) == 1:
            self._cycle = {key}
        if self._cycle and self._stepped >= self._cycle:
            self._update_ended()

    def _update_ended(self) -> None:
        self.count += 1
        self._stepped = set()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
            self.loading.append(self._loading)
        self.at_end(self)
        self._last = time.perf_counter()
        self._loading = 0.0


def _fused(optimizer: Any) -> bool:
    """Return True if an optimizer is also called at skipped updates, and skips them itself."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _found_inf(scaler: Any, optimizer: Any) -> bool:
    if not scaler.is_enabled():
        return False
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    return any(bool(value.item()) for value in found)


def _named(module: nn.Module) -> tuple[str, nn.Module, nn.Module | None]:
    """Return a called module's name in its caller, itself, and the module that contains it, if that calls it."""
    frame: FrameType | None = _callers_frame()
    name = ""
    owner = None
    for _ in range(FRAMES):
        if frame is None:
            break
        if kind_of_file(frame.f_code.co_filename) not in ("torch", "tool", "standard"):
            caller = frame.f_locals.get("self")
            name = name or _name_in(frame, caller, module)
            if isinstance(caller, nn.Module) and caller is not module and _holds(caller, module):
                owner = caller
        frame = frame.f_back
    return name or type(core(module)).__name__.lower(), module, owner


def _callers_frame() -> FrameType | None:
    return sys._getframe(2)


def _holds(owner: nn.Module, module: nn.Module) -> bool:
    return any(part is core(module) or part is module for part in owner.modules())


def _name_in(frame: FrameType, caller: Any, module: nn.Module) -> str:
    """Return the variable, or attribute of self, that holds a module."""
    for values in (frame.f_locals, getattr(caller, "__dict__", {}), getattr(caller, "_modules", {})):
        for name, value in [*values.items()]:
            if value is module and name not in ("self", "module"):
                return name
    return ""


class ScriptSubject(Subject):
    """The models and optimizers of an observed program, in the form that a trace reads.

    `models` are the modules that the program calls; `called` is False if it calls none with parameters. `tops` are they
    or the modules that call them as their own parts, as a Lightning module does, which give them their full names.
    """

    goes_on = True

    def __init__(self, updates: Updates):
        roots = [*updates.roots.values()]
        inner = {id(part) for _, root, _ in roots for part in core(root).modules() if part is not core(root)}
        kept = [root for root in roots if id(root[1]) not in inner and id(core(root[1])) not in inner]
        owners: dict[int, tuple[str, nn.Module]] = {}
        models: dict[str, nn.Module] = {}
        for name, root, owner in kept:
            models[_unused(name, models)] = root
            top = owner or core(root)
            owners.setdefault(id(top), (type(owner).__name__.lower() if owner is not None else name, top))
        self.tops: dict[str, nn.Module] = {}
        for name, top in owners.values():
            self.tops["" if len(owners) == 1 else _unused(name, self.tops)] = top
        if len(models) == 1:
            models = {"": next(iter(models.values()))}
        self.called = bool(models)
        optimizers = [*updates.optimizers.values()]
        self._updates = updates
        super().__init__(models or {"": nn.Identity()}, None, step=_nothing, optimizers=optimizers)

    def owners(self) -> dict[str, nn.Module]:
        return self.tops

    def stepped_on(self) -> list[nn.Parameter]:
        """Return also those of models that have not been called yet."""
        groups = [group for optimizer in [*self._updates.made] for group in optimizer.param_groups]
        return list(dict.fromkeys([*self.parameters(), *(part for group in groups for part in group["params"])]))

    def update_optimizers(self) -> list[torch.optim.Optimizer]:
        return [*self.optimizers.values()]

    def named_modules(self) -> Any:
        for prefix, top in self.tops.items():
            for name, module in top.named_modules():
                if takes_hooks(module):
                    yield ".".join(part for part in (prefix, name) if part), module

    def named_parameters(self) -> Any:
        for prefix, top in self.tops.items():
            for name, parameter in top.named_parameters():
                yield ".".join(part for part in (prefix, name) if part), parameter


def _unused(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else _unused(f"{name}_2", taken)


def _nothing(model: Any, batch: Any) -> None:
    """Do nothing in place of the step: the program itself runs it."""
