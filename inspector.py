"""What AMP did to one model on one batch: dtypes operator by operator, memory, gradient underflow, loss scale.

Everything is seen or measured while a real step runs, on copies, so that the caller's model stays as it was.
Knows nothing of options, data sets or how a run is laid out on disk.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import gc
import json
import math
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from precision import Precision, named_precision
from utils import UserError, atomic_write

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write to stderr on its own
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
SCALES = (1.0, 2.0**8, 2.0**16)
WIDTH = 80


def inspect(
    model_factory: Callable[[], nn.Module], images: torch.Tensor, labels: torch.Tensor, precisions: list[Precision],
    *, out: Path, metrics: list[dict[str, Any]] | None = None, full: bool = False,
) -> str:
    """All four sections as text of 80 columns; inspect.json and pictures go into the folder `out`.

    `model_factory` makes the same model each time, on the device of `images` (N, 3, H, W) and `labels` (N).
    `metrics` are the lines of a run's metrics.jsonl. Raises UserError where `out` cannot be written.
    """
    out = Path(out)
    model = model_factory()
    traces = [_trace(model, images, labels, precision) for precision in precisions]
    costs = [cast_cost(model, images, labels, precision, trace.casts)
             for precision, trace in zip(precisions, traces, strict=True)]
    ledger = memory_ledger(model_factory, images, labels, precisions)
    found = [line["loss_scale"] for line in metrics or [] if (line.get("loss_scale") or 1) != 1]
    underflow = underflow_map(model, images, labels, scaler_scale=found[-1] if found else None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        memory_picture(ledger, out / "memory.png")
        underflow_picture(underflow, out / "underflow.png")
        diary = scaler_diary(metrics, picture=out / "scaler.png") if metrics else None
        content = {
            "dtypes": {precision.name: trace.rows() for precision, trace in zip(precisions, traces, strict=True)},
            "casts": {precision.name: cost for precision, cost in zip(precisions, costs, strict=True)},
            "memory": ledger, "underflow": underflow, "scaler": metrics,
        }  # fmt: skip
        with atomic_write(out / "inspect.json") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}). Name another folder with --out.") from None
    sections = [dtype_text(precision, trace.rows(), cost, full=full)
                for precision, trace, cost in zip(precisions, traces, costs, strict=True)]
    sections = [_heading("1. What ran in which dtype", _HOW_DTYPES), *sections, memory_text(ledger),
                underflow_text(underflow, full=full)]
    sections.append(diary or _heading("4. Scaler diary", "No run was named, so there is no diary to show. Name one "
                                      "with --checkpoint_name to see its loss scale and skipped updates."))
    return "\n\n".join([*sections, *_wrapped(f"Pictures and inspect.json are in {out}.")])


def _heading(title: str, how_to_read: str) -> str:
    return "\n".join([title, "-" * len(title), *_wrapped(how_to_read)])


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


# ------------------------------------------------------------------------------------ one step
def _fresh(model: nn.Module, precision: Precision) -> tuple[nn.Module, Precision]:
    """A copy to experiment on, and the precision set up again: on CUDA float32's mode is a global switch."""
    return copy.deepcopy(model).train(), named_precision(precision.name, precision.device)


def _forward(model: nn.Module, images: torch.Tensor, precision: Precision) -> torch.Tensor:
    with precision.autocast():
        return model(images)


def _loss(logits: torch.Tensor, labels: torch.Tensor, precision: Precision) -> torch.Tensor:
    with precision.autocast():
        return nn.functional.cross_entropy(logits, labels)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _median_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of some calls; the first one is warm-up and not counted."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


# ------------------------------------------------------------------- 1. what ran in which dtype
_HOW_DTYPES = (
    "Each line is one operator as it ran below autocast: the types of the tensors that went in, the type that came "
    "out, how often, and for which modules. Where weights are fp32 and a product ran in 16 bits, autocast has put a "
    "cast in between; the casts are lines of their own."
)


class _Tracer(TorchDispatchMode):
    """Notes every aten operator with its module: in forward from hooks, in backward from the autograd node.

    Nodes and modules are matched by autograd's sequence numbers, which forward hands out in order and backward
    looks up again; see "Forward-backward correlation" in the documentation of torch.autograd.profiler.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.phase, self.calls, self.casts = "forward", {}, []
        self._kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self._stack, self._numbers, self._entered = [""], [-1], [("forward", "")]
        self._hooks = []
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self, phase: str) -> None:
        self.phase = phase
        self._note()

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._note()

    def _leave(self) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        """From this sequence number on, autograd nodes belong to the module on top of the stack."""
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._entered.append((self.phase, self._stack[-1]))

    def _module(self) -> str:
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        if node is None or node._sequence_nr() >= 2**63:  # the sums into .grad belong to no forward operator
            return self._stack[-1] if self.phase == "forward" else ""
        phase, module = self._entered[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1]
        return module if phase == "forward" else ""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = str(operator.overloadpacket).removeprefix("aten.")
        cast = name in ("_to_copy", "to") and bool(made) and made[0].dtype != given[0].dtype
        if cast:
            self.casts.append((self.phase, tuple(given[0].shape), given[0].stride(), given[0].dtype, made[0].dtype))
        key = (self.phase, self._module(), name, tuple(dict.fromkeys(_name(tensor.dtype) for tensor in given)),
               _name(made[0].dtype) if made else "", cast, operator.is_view)
        moved = given[0].nbytes + made[0].nbytes if cast else 0
        calls, total = self.calls.get(key, (0, 0))
        self.calls[key] = calls + 1, total + moved
        return result

    def rows(self) -> list[dict[str, Any]]:
        """One plain record per phase, module, operator and types, in the order they first ran."""
        return [
            {"phase": phase, "module": module, "kind": self._kinds.get(module, ""), "op": op, "inputs": list(inputs),
             "output": output, "calls": calls, "casts": calls if cast else 0, "cast_bytes": moved, "view": view}
            for (phase, module, op, inputs, output, cast, view), (calls, moved) in self.calls.items()
        ]  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trace(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision) -> _Tracer:
    model, precision = _fresh(model, precision)
    scaler, tracer = precision.grad_scaler(), _Tracer(model)
    try:
        with tracer:
            logits = _forward(model, images, precision)
            tracer.begin("loss")
            loss = scaler.scale(_loss(logits, labels, precision))
            tracer.begin("backward")
            loss.backward()
    finally:
        tracer.close()
    return tracer


def trace_dtypes(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision
) -> list[dict[str, Any]]:
    """Every aten operator of one forward, loss and backward that ran, as records in order of first appearance.

    Keys: phase (forward, loss, backward), module (its name, "" where there is none), kind (its class), op,
    inputs (distinct dtypes, in order), output (dtype), calls, casts (calls that changed the dtype), cast_bytes
    (read and written), view (whether it only reshaped). `images` (N, 3, H, W), `labels` (N).
    """
    return _trace(model, images, labels, precision).rows()


def cast_cost(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision, casts: list[tuple]
) -> dict[str, Any]:
    """What the casts of a step cost: the same casts timed again by themselves, beside the time of the step.

    `casts` are (phase, shape, stride, from, to). Seconds are medians of 3.
    """
    model, precision = _fresh(model, precision)
    scaler, device = precision.grad_scaler(), precision.device

    def step() -> None:
        model.zero_grad(set_to_none=True)
        scaler.scale(_loss(_forward(model, images, precision), labels, precision)).backward()

    sources = [torch.empty_strided(shape, stride, dtype=old, device=device).fill_(1)
               for _, shape, stride, old, _ in casts]

    def cast_all() -> None:
        for source, (*_, new) in zip(sources, casts, strict=True):
            source.to(new)

    sizes = [source.numel() * (source.element_size() + new.itemsize)
             for source, (*_, new) in zip(sources, casts, strict=True)]
    return {
        "forward": sum(phase == "forward" for phase, *_ in casts), "loss": sum(phase == "loss" for phase, *_ in casts),
        "backward": sum(phase == "backward" for phase, *_ in casts), "bytes": sum(sizes),
        "seconds": _median_seconds(cast_all, device, 3) if casts else 0.0,
        "step_seconds": _median_seconds(step, device, 3),
    }  # fmt: skip


def dtype_text(precision: Precision, rows: list[dict[str, Any]], cost: dict[str, Any], *, full: bool = False) -> str:
    """The trace as a table: grouped by operator and types, or with `full` a line for every module."""
    lines = [f"{precision.label}: {precision.reason}"]
    ran = [row for row in rows if not row["view"]]
    types = {name for row in ran for name in (*row["inputs"], row["output"]) if "float" in name}
    if not full and types <= {"float32"}:
        calls = sum(row["calls"] for row in ran)
        return "\n".join([*lines, f"  All {calls} operators ran in float32, without a cast (--full lists them)."])
    lines.append(f"  {'operator':<33}{'in':<10}{'out':<6}{'calls':>5}  modules")
    begun = None
    for phase, op, inputs, output, calls, where in _grouped(rows if full else ran, full):
        lines += [phase] if phase != begun else []
        begun = phase
        line = f"  {op:<33}{','.join(inputs):<10}{output:<6}{calls:>5}  {where}".rstrip()
        lines.append(line if full or len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    views = sum(row["calls"] for row in rows if row["view"])
    count = cost["forward"] + cost["loss"] + cost["backward"]
    if not full:
        lines.append(f"  and {views} views, which compute nothing (--full lists every call by module)")
    lines += _wrapped(
        f"Casts: {count} a step ({cost['forward']} in forward, {cost['loss']} in the loss, {cost['backward']} in "
        f"backward), {cost['bytes'] / 2**20:,.0f} MB read and written. By themselves they take "
        f"{1000 * cost['seconds']:,.1f} ms, {cost['seconds'] / cost['step_seconds']:.1%} of the "
        f"{1000 * cost['step_seconds']:,.0f} ms of forward and backward.", "  ")
    return "\n".join(lines)


def _grouped(rows: list[dict[str, Any]], full: bool) -> Iterator[tuple[str, str, list[str], str, int, str]]:
    short = {_name(dtype): text for dtype, text in SHORT.items()}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        inputs = tuple(short.get(name, name) for name in row["inputs"] if "float" in name) or tuple(row["inputs"][:1])
        op = f"{row['op']} (cast)" if row["casts"] else row["op"]
        key = row["phase"], op, inputs, short.get(row["output"], row["output"]), row["module"] if full else ""
        groups.setdefault(key, []).append(row)
    for (phase, op, inputs, output, _), members in groups.items():
        modules = {row["module"]: row["kind"] for row in members if row["module"]}
        kinds = {kind: sum(value == kind for value in modules.values()) for kind in modules.values()}
        where = next(iter(modules)) if len(modules) == 1 else ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        yield phase, op, list(inputs), output, sum(row["calls"] for row in members), where


# ------------------------------------------------------------------------------ 2. memory ledger
_HOW_MEMORY = (
    "What one training update holds, in MB of 2**20 bytes, by what it is for. AMP shrinks the activations only: "
    "weights, gradients and Adam's two moments stay FP32, and autocast adds 16-bit copies of the weights."
)
_PARTS = (
    ("parameters", "parameters"), ("buffers", "buffers (running statistics)"), ("gradients", "gradients"),
    ("optimizer_state", "optimizer state (Adam)"), ("batch", "the batch of images"),
    ("activations", "activations kept for backward"), ("weight_copies", "autocast's copies of the weights"),
    ("workspace", "workspace"), ("peak", "peak of all tensors"), ("reserved", "reserved by the allocator"),
    ("driver", "in use on the GPU (driver)"), ("resident", "resident, this process"),
)  # fmt: skip


class _WeightCopies(TorchDispatchMode):
    """Notes the storages of casts whose source is a parameter."""

    def __init__(self, parameters: set[int]):
        super().__init__()
        self.parameters, self.storages = parameters, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and _storage(args[0])[0] in self.parameters:
            self.storages.add(_storage(result)[0])
        return result


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the memory behind a tensor, which views share."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def memory_ledger(
    build: Callable[[], nn.Module], images: torch.Tensor, labels: torch.Tensor, precisions: list[Precision]
) -> list[dict[str, Any]]:
    """For each precision the bytes that an update with Adam holds, by purpose; see `_PARTS` for the keys.

    Activations are the distinct storages autograd keeps between forward and backward, parameters, buffers,
    autocast's copies and the batch left out. The peak is the allocator's own on CUDA, on the CPU that of the
    allocations torch.profiler records. Workspace is the peak less parameters, buffers, optimizer state, batch,
    activations and copies: gradients fill the place of activations that backward has freed. None: not known here.
    """
    return [_ledger(build, images, labels, precision) for precision in precisions]


def _ledger(build: Callable[[], nn.Module], images, labels, precision: Precision) -> dict[str, Any]:
    precision, device = named_precision(precision.name, precision.device), images.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    model = build().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))
    scaler, kept = precision.grad_scaler(), {}

    def step(watch: bool = False) -> int:
        context = _saved_storages(model, kept) if watch else contextlib.nullcontext()
        with context:
            loss = _loss(_forward(model, images, precision), labels, precision)
        scaler.scale(loss).backward()
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return gradients

    step()  # the optimizer's state is made in the first update
    gradients = step(watch=True)
    own = {_storage(tensor)[0] for tensor in (*model.parameters(), *model.buffers())}
    row = {
        "precision": precision.name, "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        "buffers": sum(buffer.nbytes for buffer in model.buffers()), "gradients": gradients,
        "optimizer_state": sum(value.nbytes for state in optimizer.state.values() for value in state.values()
                               if isinstance(value, torch.Tensor)),
        "batch": images.nbytes + labels.nbytes,
    }  # fmt: skip
    batch = {_storage(images)[0], _storage(labels)[0]}
    row["activations"] = sum(size for place, (size, copied) in kept.items() if place not in own | batch and not copied)
    row["weight_copies"] = sum(size for place, (size, copied) in kept.items() if place not in own and copied)
    held = row["parameters"] + row["buffers"] + row["optimizer_state"] + row["batch"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        # What the caller holds besides the batch (another model, say) is no part of this update.
        row["peak"] = torch.cuda.max_memory_allocated(device) - before + row["batch"]
        free, total = torch.cuda.mem_get_info(device)
        row |= {"reserved": torch.cuda.memory_reserved(device), "driver": total - free, "resident": None}
    else:
        row |= {"peak": held + peak_of_allocations(step), "reserved": None, "driver": None, "resident": _resident()}
    row["workspace"] = max(0, row["peak"] - held - row["activations"] - row["weight_copies"])
    return row


@contextlib.contextmanager
def _saved_storages(model: nn.Module, kept: dict[int, tuple[int, bool]]) -> Iterator[None]:
    """Fills `kept` with address -> (bytes, whether it is autocast's copy of a weight) of all saved tensors."""
    copies = _WeightCopies({_storage(parameter)[0] for parameter in model.parameters()})
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place, size = _storage(tensor)
        saved[place] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), copies:
        yield
    kept.update({place: (size, place in copies.storages) for place, size in saved.items()})


def peak_of_allocations(function: Callable[[], Any]) -> int:
    """Most bytes that CPU tensors made inside `function` held at one time, oneDNN's scratch memory included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _resident() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


def memory_text(ledger: list[dict[str, Any]]) -> str:
    """The ledger as a table with a column for each precision, and why the peak fell or did not."""
    lines = [_heading("2. Memory ledger", _HOW_MEMORY)]
    lines.append(" " * 36 + "".join(f"{row['precision']:>11}" for row in ledger))
    for key, label in _PARTS:
        if any(row[key] is not None for row in ledger):
            cells = (f"{row[key] / 2**20:>11,.1f}" if row[key] is not None else f"{'-':>11}" for row in ledger)
            lines.append(f"  {label:<34}" + "".join(cells))
    first = ledger[0]
    for row in ledger[1:]:
        fixed = row["parameters"] + row["gradients"] + row["optimizer_state"]
        lines += _wrapped(
            f"{row['precision']} against {first['precision']}: the peak is {row['peak'] / first['peak']:.0%}, the "
            f"activations are {row['activations'] / max(1, first['activations']):.0%}. Weights, gradients and Adam's "
            f"state stay FP32 at {fixed / 2**20:,.0f} MB, and the copies of the weights add "
            f"{row['weight_copies'] / 2**20:,.0f} MB; a larger batch or image makes activations count for more.", "  ")
    if first["resident"] is not None:
        lines += _wrapped(
            "Parts do not add up to the peak: gradients are made while activations are freed. Resident memory seldom "
            "falls within a process; `doctor` measures each precision in one of its own.", "  ")
    return "\n".join(lines)


def memory_picture(ledger: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars of what stays FP32 and what AMP changes, the peak beside them."""
    from report import STYLES, picture

    shown = [part for part in _PARTS if part[0] in
             ("parameters", "gradients", "optimizer_state", "activations", "weight_copies")]
    with picture(path, 8.5, 2.0 + 0.7 * len(ledger)) as figure:
        axes = figure.add_subplot()
        places = range(len(ledger))
        left = [0.0] * len(ledger)
        for (key, label), (color, _, _, hatch) in zip(shown, STYLES, strict=False):
            sizes = [row[key] / 2**20 for row in ledger]
            axes.barh(places, sizes, left=left, height=0.55, color=color, hatch=hatch, edgecolor="white", label=label)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        for place, end, row in zip(places, left, ledger, strict=True):
            axes.text(end + 0.01 * max(left), place, f"peak {row['peak'] / 2**20:,.0f} MB", va="center", fontsize=9.5)
        axes.set_yticks(places, [row["precision"] for row in ledger])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="MB (gradients come as activations go, so the peak is not the sum)",
                 title="What one training update holds", xlim=(0, 1.2 * max(left)))
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)


# ------------------------------------------------------------------------------ 3. underflow map
_HOW_UNDERFLOW = (
    "The share of nonzero gradient values, computed in true FP32, that become zero when they are multiplied by the "
    "loss scale and cast to float16. What vanishes at scale 1 and not at 2^16 is what GradScaler saves; bfloat16 has "
    "FP32's range and needs no scale."
)


def underflow_map(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, scaler_scale: float | None = None
) -> dict[str, Any]:
    """What float16 would do to the true gradients of one batch, layer by layer, at several loss scales.

    Gradients of parameters, and of what every innermost module puts out, come from a plain FP32 step on any
    device. Shares are of the values that are not zero: `zero` and `subnormal` in float16, `overflow` to infinity.
    Scales are 1, 2**8, 2**16 and `scaler_scale`. `through_float16` says whether autocast would compute that
    gradient in float16 at all: BatchNorm's parameters, for one, never leave FP32. `histogram` counts values by
    floor(log2 of the magnitude).
    """
    model, precision = _fresh(model, named_precision("fp32", images.device))
    scales = list(dict.fromkeys([*SCALES, *([float(scaler_scale)] if scaler_scale else [])]))
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    modules = {name: module for name, module in model.named_modules() if not list(module.children())}

    def watch(name: str, output: Any) -> None:
        # A hook on the tensor, not on the module: in-place ReLU would overwrite what a module's hook hands on.
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: _count(layers, ("activation", name), gradient, scales))

    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: watch(name, output))
    _loss(_forward(model, images, precision), labels, precision).backward()
    order = list(modules)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            _count(layers, ("parameter", name), parameter.grad, scales)
    products = (nn.Linear, nn.modules.conv._ConvNd)
    found = []
    for (group, name), counts in layers.items():
        owner = name if group == "activation" else name.rpartition(".")[0]
        through = group == "activation" or isinstance(modules.get(owner), products)
        found.append({"group": group, "name": name, "through_float16": through, **counts})
    found.sort(key=lambda row: (row["group"] == "activation", order.index(row["name"]) if row["name"] in order else -1))
    for row in found:
        row["by_scale"] = {_scale_key(scale): {kind: count / max(1, row["nonzero"]) for kind, count in counts.items()}
                           for scale, counts in row.pop("counts").items()}
    return {"scales": scales, "scaler_scale": scaler_scale, "layers": found, "histogram": _histograms(found)}


def _scale_key(scale: float) -> str:
    return f"{scale:g}"


def _count(layers: dict, key: tuple[str, str], gradient: torch.Tensor, scales: list[float]) -> None:
    """Adds one gradient to its layer's counts, by really casting it; a module that runs twice is added up."""
    gradient = gradient.detach().float()
    nonzero = gradient != 0
    row = layers.setdefault(key, {
        "values": 0, "nonzero": 0, "exponents": {},
        "counts": {scale: {"zero": 0, "subnormal": 0, "overflow": 0} for scale in scales},
    })  # fmt: skip
    row["values"] += gradient.numel()
    row["nonzero"] += int(nonzero.sum())
    tiny = torch.finfo(torch.float16).tiny
    for scale, counts in row["counts"].items():
        half = (gradient * scale).half()
        counts["zero"] += int(((half == 0) & nonzero).sum())
        counts["subnormal"] += int(((half != 0) & (half.abs() < tiny)).sum())
        counts["overflow"] += int((half.isinf() & gradient.isfinite()).sum())
    # frexp gives a mantissa in [0.5, 1), so the exponent is floor(log2) + 1.
    exponents, counts = (torch.frexp(gradient[nonzero & gradient.isfinite()]).exponent - 1).unique(return_counts=True)
    for exponent, count in zip(exponents.tolist(), counts.tolist(), strict=True):
        row["exponents"][exponent] = row["exponents"].get(exponent, 0) + count


def _histograms(layers: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[int, int]] = {"parameter": {}, "activation": {}}
    for row in layers:
        for exponent, count in row.pop("exponents").items():
            totals[row["group"]][exponent] = totals[row["group"]].get(exponent, 0) + count
    return {group: {str(exponent): counts[exponent] for exponent in sorted(counts)} for group, counts in totals.items()}


def _power(scale: float) -> str:
    exponent = math.log2(scale)
    return "1" if scale == 1 else f"2^{exponent:.0f}" if exponent.is_integer() else f"{scale:g}"


def _by_layer(underflow: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """(layer, its weight's gradient, its output's gradient) of the layers that autocast computes in float16."""
    rows = {(row["group"], row["name"]): row for row in underflow["layers"] if row["nonzero"]}
    names = [name.removesuffix(".weight") for group, name in rows
             if group == "parameter" and name.endswith("weight") and rows[group, name]["through_float16"]]
    return [(name, rows.get(("parameter", f"{name}.weight" if name else "weight")), rows.get(("activation", name)))
            for name in (name if name != "weight" else "" for name in names)]


def _pooled(rows: list[dict[str, Any] | None], scale: float, kind: str) -> float | None:
    """A share over several layers, weighted by their nonzero values; None where there are none."""
    rows = [row for row in rows if row]
    total = sum(row["nonzero"] for row in rows)
    return sum(row["nonzero"] * row["by_scale"][_scale_key(scale)][kind] for row in rows) / total if total else None


def _percent(share: float | None) -> str:
    return "-" if share is None else "0" if share == 0 else "<.01%" if share < 1e-4 else f"{share:.2%}"


def underflow_text(underflow: dict[str, Any], *, full: bool = False) -> str:
    """The map as a table of the layers autocast computes in float16; the 24 that lose most, or all with `full`."""
    scales, own = underflow["scales"], underflow["scaler_scale"]
    lines = [_heading("3. Underflow map", _HOW_UNDERFLOW)]
    if own is not None:
        lines += _wrapped(f"The scaler's own scale stood at {own:,.0f} ({_power(own)}).")
    layers = _by_layer(underflow)
    if not full and len(layers) > 24:
        lost = {name: _pooled([weight, output], 1.0, "zero") for name, weight, output in layers}
        worst = set(sorted(lost, key=lost.get, reverse=True)[:24])
        layers = [layer for layer in layers if layer[0] in worst]
        lines.append("The 24 layers that lose most; --full lists all.")
    block = 7 * len(scales)
    label = min(36, WIDTH - 2 - 2 * block)
    lines.append(f"  {'zero in float16':<{label}}{'weight gradient':>{block}}{'output gradient':>{block}}")
    lines.append(f"  {'at loss scale':<{label}}" + 2 * "".join(f"{_power(scale):>7}" for scale in scales))
    pooled = [("all of these", [layer[1] for layer in layers], [layer[2] for layer in layers])] if layers else []
    for name, weights, outputs in [*((name, [weight], [output]) for name, weight, output in layers), *pooled]:
        shares = [_pooled(rows, scale, "zero") for rows in (weights, outputs) for scale in scales]
        cells = "".join(f"{_percent(share):>7}" for share in shares)
        name = name if len(name) < label else "…" + name[-(label - 2):]
        lines.append(f"  {name:<{label}}{cells}")
    return "\n".join([*lines, *_overflow_lines(underflow)])


def _overflow_lines(underflow: dict[str, Any]) -> list[str]:
    rows = [row for row in underflow["layers"] if row["through_float16"]]
    lines = []
    for scale in underflow["scales"]:
        over = [row for row in rows if row["by_scale"][_scale_key(scale)]["overflow"]]
        if over:
            names = ", ".join(("output of " if row["group"] == "activation" else "") + row["name"] for row in over[:3])
            more = f" and {len(over) - 3} more" if len(over) > 3 else ""
            lines += _wrapped(f"Overflow at {_power(scale)}: {names}{more}; GradScaler would skip this update.", "  ")
    for scale in (1.0, max(underflow["scales"])):
        subnormal = _percent(_pooled(rows, scale, "subnormal"))
        text = f"At scale {_power(scale)}, {subnormal} of all values are subnormal: kept, but with fewer bits."
        lines += _wrapped(text, "  ")
    return lines if any("Overflow" in line for line in lines) else ["  Nothing overflows at these scales.", *lines]


def underflow_picture(underflow: dict[str, Any], path: Path) -> None:
    """Gradient magnitudes against the ranges of float16 and bfloat16; below, the share lost by layer and scale."""
    from report import picture

    layers = _by_layer(underflow)
    with picture(path, 9, 8.6 if layers else 5) as figure:
        if not layers:
            _magnitude_panel(figure.add_subplot(), underflow)
            return
        top, bottom = figure.subplots(2, 1, height_ratios=(1.15, 1))
        _magnitude_panel(top, underflow)
        _lost_panel(bottom, layers, underflow["scales"])


def _magnitude_panel(axes: Any, underflow: dict[str, Any]) -> None:
    from report import BLUE, FAINT, INK, VERMILION

    half, brain = torch.finfo(torch.float16), torch.finfo(torch.bfloat16)
    lowest, highest, tallest = -40, 17, 1.0
    for group, label, color, line in (("parameter", "gradients of parameters", BLUE, "-"),
                                      ("activation", "gradients of activations", VERMILION, "--")):
        counts = {int(exponent): count for exponent, count in underflow["histogram"][group].items()}
        if counts:
            total, span = sum(counts.values()), range(min(counts), max(counts) + 2)
            shares = [100 * counts.get(exponent, 0) / total for exponent in span]
            axes.stairs(shares[:-1], span, color=color, linestyle=line, linewidth=1.8, label=label, baseline=None)
            axes.fill_between(span, shares, step="post", color=color, alpha=0.15, linewidth=0)
            lowest, highest = min(lowest, *span), max(highest, *span)
            tallest = max(tallest, *shares)
    # Half of the smallest subnormal number rounds to zero, everything above it to that number or more.
    smallest = math.log2(half.smallest_normal * half.eps / 2)
    tiny, largest = math.log2(half.tiny), math.log2(half.max)
    axes.axvspan(smallest, tiny, color=FAINT, alpha=0.25, linewidth=0)
    for border in (smallest, largest):
        axes.axvline(border, color=INK, linewidth=1.2)
    for place, text in (((lowest + smallest) / 2, f"zero in float16\n(below 2^{smallest:.0f})"),
                        ((smallest + tiny) / 2, "float16,\nsubnormal"),
                        ((tiny + largest) / 2, f"float16, full precision\n(2^{tiny:.0f} to {half.max:,.0f})")):
        axes.text(place, 1.24 * tallest, text, ha="center", va="top", fontsize=9)
    axes.annotate("", (smallest - 0.3, 0.55 * tallest), (smallest - 16.3, 0.55 * tallest),
                  arrowprops={"arrowstyle": "->", "color": INK})
    axes.text(smallest - 16, 0.57 * tallest, "a loss scale of 2^16 moves\nevery value this far", fontsize=9,
              va="bottom")
    axes.set(xlim=(lowest - 1, highest + 1), ylim=(0, 1.26 * tallest), ylabel="% of nonzero values",
             title="Gradient magnitudes against what float16 can hold",
             xlabel="log2 of the magnitude of a gradient value   (bfloat16 holds all of it: "
             f"2^{math.log2(brain.tiny):.0f} to 2^{math.log2(brain.max):.0f})")
    axes.legend(loc="upper right", bbox_to_anchor=(0.965, 0.82), fontsize=9, frameon=True, edgecolor="none",
                framealpha=1)


def _lost_panel(axes: Any, layers: list[tuple], scales: list[float]) -> None:
    """The share lost by layer, on a logarithmic axis whose lowest line stands for nothing lost."""
    from report import STYLES

    floor, places = 1e-4, range(len(layers))
    for position, what in ((2, "output"), (1, "weight")):
        for scale, (color, _, marker, _) in zip(scales, STYLES, strict=False):
            lost = [max(floor, 100 * (_pooled([layer[position]], scale, "zero") or 0)) for layer in layers]
            filled = color if what == "output" else "white"
            axes.plot(places, lost, color=color, linestyle="-" if what == "output" else ":", linewidth=1, marker=marker,
                      markersize=6, markerfacecolor=filled, label=f"{what}, scale {_power(scale)}", clip_on=False)
    step = max(1, math.ceil(len(layers) / 30))
    axes.set_xticks(places[::step], [name for name, _, _ in layers[::step]], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8)
    axes.set_yscale("log")
    ticks = (floor, 1e-3, 1e-2, 0.1, 1, 10, 100)
    axes.set_yticks(ticks, ["none", *(f"{tick:g}" for tick in ticks[1:])])
    axes.minorticks_off()
    axes.set(ylabel="% of nonzero values", ylim=(floor, 100_000),  # above 100 there is room for the legend
             title="Share of the gradients that float16 turns into zero, layer by layer")
    axes.legend(fontsize=8.5, ncols=2, loc="upper center")


# ------------------------------------------------------------------------------- 4. scaler diary
_HOW_DIARY = (
    "The loss scale after each epoch and the updates that were skipped because a gradient was not finite. A few skips "
    "at the start are the scaler finding its level; skips that go on, or a scale that falls below 1, are a sick run."
)


def scaler_diary(metrics: list[dict[str, Any]], *, picture: Path | None = None) -> str:
    """A run's loss scale and skipped updates as text, and as a picture where `picture` names a PNG file.

    `metrics` are the lines of metrics.jsonl: epoch, loss_scale, skipped_updates, and `skips`, a list of
    {"update": 1-based over the run, "parameter": first one whose gradient was not finite, "scale"}.
    """
    lines = [_heading("4. Scaler diary", _HOW_DIARY)]
    skips = [(line["epoch"], skip) for line in metrics for skip in line.get("skips") or []]
    scales = [line.get("loss_scale") for line in metrics]
    if not skips and all(scale in (None, 1, 1.0) for scale in scales):
        return "\n".join([*lines, "  This run had no scaler at work: it is needed for float16 alone."])
    lines.append(f"  {'epochs':<12}{'loss scale':>14}{'skipped updates':>18}")
    for first, last, scale, skipped in _stretches(metrics):
        epochs = f"{first}" if first == last else f"{first} to {last}"
        shown = "-" if scale is None else f"{scale:,.0f}" if scale >= 1 else f"{scale:g}"
        lines.append(f"  {epochs:<12}{shown:>14}{skipped:>18}")
    lines += ["", f"  {len(skips)} skipped; the first parameter whose gradient was not finite:"] if skips else []
    for epoch, skip in skips[:20]:
        where = f"update {skip['update']:>7,} (epoch {epoch}), scale {skip['scale']:>9,.0f}"
        lines.append(f"  {where}: {skip['parameter']}")
    if len(skips) > 20:
        lines.append(f"  and {len(skips) - 20} more")
    if picture is not None:
        diary_picture(metrics, picture)
    return "\n".join(lines)


def _stretches(metrics: list[dict[str, Any]]) -> Iterator[tuple[int, int, float | None, int]]:
    """(first epoch, last epoch, scale, skipped) with quiet epochs of the same scale drawn together."""
    begun = None
    for line in metrics:
        epoch, scale, skipped = line["epoch"], line.get("loss_scale"), line.get("skipped_updates") or 0
        if begun and begun[2] == scale and not skipped and not begun[3]:
            begun = (begun[0], epoch, scale, 0)
            continue
        if begun:
            yield begun
        begun = (epoch, epoch, scale, skipped)
    if begun:
        yield begun


def diary_picture(metrics: list[dict[str, Any]], path: Path) -> None:
    """Loss scale as a line and skipped updates as bars over the epochs."""
    from report import picture, scale_panel
    from results import column

    with picture(path, 8.5, 3.4) as figure:
        scale_panel(figure.add_subplot(), metrics, column(metrics, "loss_scale"))
