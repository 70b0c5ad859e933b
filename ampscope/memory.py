"""Measure the memory that one update holds, by purpose, in each precision."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ampscope.execution import Execution
from ampscope.precisions import Precision
from ampscope.subject import Subject
from ampscope.tensors import address, bytes_of, tensors_in
from ampscope.tracing import eager

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr


class KeptForBackward(TorchDispatchMode):
    """Record the storages that autograd keeps, by address, and which of them are casts of parameters."""

    def __init__(self, parameters: Sequence[torch.Tensor]):
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.copies: set[int] = set()
        self._parameters = {address(parameter) for parameter in parameters}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            self.bytes[address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and address(args[0]) in self._parameters:
            self.copies.add(address(result))
        return result

    def __enter__(self) -> Any:
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self.hooks.__exit__(*details)


def nbytes(tensors: Any) -> int:
    """Return the bytes of distinct storages."""
    return sum({_memory(tensor): bytes_of(tensor) for tensor in tensors}.values())


def _memory(tensor: torch.Tensor) -> int:
    """Return a key that tells two tensors apart: their memory, or the object if its memory has no address."""
    place = address(tensor)
    return place if place > 0 else -id(tensor)


def memory_ledger(subject: Subject, precision: Precision, *, ambient: bool = True) -> dict[str, Any]:
    """Return the bytes that an update holds, by purpose; a value that this device cannot measure is None.

    Activations are the distinct storages that autograd keeps between forward and backward, except parameters, buffers,
    autocast's copies of weights and the batch. The peak is the allocator's own on CUDA; on the CPU it is the peak of
    the allocations that torch.profiler records. Workspace is the rest of the peak without gradients, which use the
    memory of activations that backward has freed. Reserved (by the allocator) and driver (in use on the whole GPU) are
    CUDA's; resident is this process's on a CPU.
    """
    device = subject.device
    parameters = subject.parameters()
    buffers = [buffer for model in subject.models.values() for buffer in model.buffers()]
    batch = tensors_in(subject.batch)
    execution = Execution(subject, precision, ambient=ambient)
    gradients: dict[int, int] = {}
    watched = [
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: gradients.update({id(parameter): bytes_of(parameter.grad)})
        )
        for parameter in parameters
        if parameter.requires_grad and parameter.is_leaf
    ]
    if not any(optimizer.state for optimizer in subject.update_optimizers()):
        execution.run(update=True)  # the first update creates the optimizers' state
    optimizers = [*subject.update_optimizers()]
    optimizers += [thing for thing, _ in execution.states.values() if isinstance(thing, torch.optim.Optimizer)]
    sizes: dict[str, Any] = {
        "parameters": nbytes(parameters),
        "buffers": nbytes(buffers),
        "gradients": None,
        "optimizer_state": nbytes(tensors_in([optimizer.state for optimizer in optimizers])),
        "batch": nbytes(batch),
        "activations": None,
        "weight_copies": None,
    }
    fixed = sum(sizes[part] for part in ("parameters", "buffers", "optimizer_state", "batch"))
    old = nbytes(parameter.grad for parameter in parameters if parameter.grad is not None)
    kept = KeptForBackward(parameters)
    followed = True
    try:
        with eager():
            peak, outside = _peak(lambda: execution.run(update=True, modes=kept), device, fixed + old)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        followed = False  # torch.func's transforms allow no saved-tensor hooks
    if not followed or _is_compiled(subject):
        peak, outside = _peak(lambda: execution.run(update=True), device, fixed + old)
    for hook in watched:
        hook.remove()
    execution.put_back()
    sizes["gradients"] = sum(gradients.values())
    if followed:
        known = {address(tensor) for tensor in (*parameters, *buffers, *batch)}
        sizes["activations"] = sum(size for at, size in kept.bytes.items() if at not in known | kept.copies)
        sizes["weight_copies"] = sum(size for at, size in kept.bytes.items() if at in kept.copies - known)
    rest = None
    if peak is not None and followed:
        rest = max(0, peak - fixed - sizes["activations"] - sizes["weight_copies"])
    return {"precision": precision.name, **sizes, "workspace": rest, "peak": peak, **outside}


def _is_compiled(subject: Subject) -> bool:
    """Return True if torch.compile made a model, or a part of one."""
    models = subject.models.values()
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None)
        for model in models
        for part in model.modules()
    )


def _peak(step: Callable[[], Any], device: torch.device, held: int) -> tuple[int | None, dict[str, int | None]]:
    """Return the most bytes during a step, of which `held` exist before it, and the system's own figures."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        free, total = torch.cuda.mem_get_info(device)
        # Other memory of the caller (another model, say) does not belong to this update.
        peak = torch.cuda.max_memory_allocated(device) - before + held
        return peak, {"reserved": torch.cuda.memory_reserved(device), "driver": total - free}
    if device.type == "cpu":
        peak = held + peak_of_allocations(step)
        return peak, {"resident": of_this_process("VmRSS")}
    return None, {"driver": torch.mps.driver_allocated_memory() if device.type == "mps" else None}


def peak_of_allocations(function: Callable[[], Any]) -> int:
    """Return the most bytes of CPU tensors held at one time inside `function`, oneDNN's scratch memory included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def resident_peak() -> int | None:
    """Return the peak memory of this process in bytes; None on systems other than Linux."""
    # Not getrusage: its maximum begins with the parent's memory when it started this process.
    return of_this_process("VmHWM")


def of_this_process(name: str) -> int | None:
    """Return the bytes that Linux counts under `name`, such as VmRSS; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
