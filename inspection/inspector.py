"""What AMP did to one model on one batch: dtypes operator by operator, memory, gradient underflow, loss scale.

Everything is seen or measured while a real step runs, on copies, so that the caller's model stays as it was.
Knows nothing of options, data sets or how a run is laid out on disk.
"""

from __future__ import annotations

import bisect
import copy
import gc
import itertools
import json
import math
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inspection.probe import Update, timed
from precision import Precision, named_precision
from reports.pictures import BLUE, FAINT, INK, STYLES, VERMILION, picture
from utils import UserError, atomic_write, linux_memory

WIDTH = 80


def inspect(
    model_factory: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    precisions: list[Precision],
    *,
    out: Path,
    metrics: list[dict[str, Any]] | None = None,
    full: bool = False,
) -> str:
    """All four sections as text of 80 columns; inspect.json and pictures go into the folder `out`.

    `model_factory` makes the same model each time, on the device of `images` (N, 3, H, W) and `labels` (N).
    `metrics` are the lines of a run's metrics.jsonl. Raises UserError where `out` cannot be written.
    """
    out = Path(out)
    model = model_factory()
    metrics = metrics or []
    dtypes = {precision.name: trace_dtypes(model, images, labels, precision) for precision in precisions}
    casts = {
        precision.name: cast_cost(model, images, labels, precision, dtypes[precision.name]) for precision in precisions
    }
    ledger = [memory_ledger(model_factory, images, labels, precision) for precision in precisions]
    scales = [line["loss_scale"] for line in metrics if (line.get("loss_scale") or 1) != 1]
    underflow = underflow_map(model, images, labels, scaler_scale=scales[-1] if scales else None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        magnitude_picture(underflow["histogram"], out / "underflow.png")
        memory_picture(ledger, out / "memory.png")
        if scales:
            diary_picture(metrics, out / "scaler.png")
        content = {"dtypes": dtypes, "casts": casts, "memory": ledger, "underflow": underflow, "scaler": metrics}
        with atomic_write(out / "inspect.json") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}). Name another folder with --out.") from None
    lines = heading(
        "1. What ran in which dtype",
        "Each line is one operator as it ran below autocast: the types of "
        "the tensors that went in, the type that came out, how often, and for which modules. Where weights "
        "are fp32 and a product ran in 16 bits, autocast has put a cast in between; the casts are lines of "
        "their own.",
    )
    for precision in precisions:
        lines += ["", *dtype_lines(precision, dtypes[precision.name], casts[precision.name], full=full)]
    lines += ["", *memory_lines(ledger), "", *underflow_lines(underflow), "", *diary_lines(metrics)]
    return "\n".join([*lines, "", *paragraph(f"Pictures and inspect.json are in {out}.")])


def paragraph(text: str, mark: str = "") -> list[str]:
    """The lines of a wrapped text; `mark` stands before the first one and indents the others by its length."""
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)


def heading(title: str, how_to_read: str) -> list[str]:
    return [title, "-" * len(title), *paragraph(how_to_read)]


def table(align: str, rows: list[list[str]], gap: int = 2) -> list[str]:
    """Rows of cells as lines, columns set to the left (<) or right (>) by `align`, and cut where the terminal ends.

    A row of one cell is a heading.
    """
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)]
        line = row[0] if len(row) == 1 else "  " + (" " * gap).join(cells).rstrip()
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return lines


class _Tracer(TorchDispatchMode):
    """Counts every aten operator by module: in forward known from hooks, in backward from the autograd node.

    Nodes and modules are matched by autograd's sequence numbers, which forward hands out in order and backward
    looks up again; see "Forward-backward correlation" in the documentation of torch.autograd.profiler.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.phase = "forward"
        self.calls = Counter()
        self._running = [""]  # modules, the innermost last
        self._numbers = [-1]
        self._owners = [""]  # from each sequence number on, nodes belong to this module
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._move([*self._running, name]))
            module.register_forward_hook(lambda *_: self._move(self._running[:-1]))
        model.register_forward_hook(lambda *_: setattr(self, "phase", "loss"))

    def _move(self, running: list[str]) -> None:
        self._running = running
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._owners.append(running[-1])

    def _module(self) -> str:
        if self.phase != "backward":
            return self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None or node._sequence_nr() >= 2**63:  # the sums into .grad belong to no forward operator
            return ""
        return self._owners[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        op = str(operator.overloadpacket).removeprefix("aten.")
        inputs = tuple(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in given))
        output = str(made[0].dtype).removeprefix("torch.") if made else ""
        cast = (given[0].shape, given[0].stride()) if op == "_to_copy" and inputs[0] != output else None
        self.calls[self.phase, self._module(), op, inputs, output, cast, operator.is_view] += 1
        return result


def _loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision) -> torch.Tensor:
    with precision.autocast():
        return nn.functional.cross_entropy(model(images), labels)


def _update(model: nn.Module, precision: Precision) -> Update:
    """On a copy of the model, with the precision set up again: on CUDA float32's mode is a global switch."""
    return Update(copy.deepcopy(model), named_precision(precision.name, precision.device))


def trace_dtypes(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision
) -> list[dict[str, Any]]:
    """Every aten operator of one forward, loss and backward that ran, as records in order of first appearance.

    Keys: phase (forward, loss, backward), module (its name, "" where there is none), kind (its class), op, inputs
    (distinct dtypes, in order), output (dtype), cast (shape and stride of the tensor where the operator changed its
    dtype, else None), view (whether it only reshaped), calls. `images` (N, 3, H, W), `labels` (N).
    """
    update = _update(model, precision)
    tracer = _Tracer(update.model)
    with tracer:
        loss = update.scaler.scale(_loss(update.model, images, labels, update.precision))
        tracer.phase = "backward"
        loss.backward()
    kinds = {name: type(module).__name__ if name else "" for name, module in model.named_modules()}
    return [
        {
            "phase": phase,
            "module": module,
            "kind": kinds[module],
            "op": op,
            "inputs": list(inputs),
            "output": output,
            "cast": cast,
            "view": view,
            "calls": calls,
        }
        for (phase, module, op, inputs, output, cast, view), calls in tracer.calls.items()
    ]


def cast_cost(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: Precision, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the casts among `rows` cost: the same casts timed again by themselves, beside the time of an update.

    Their number by phase, the bytes read and written, and seconds, as medians of 3.
    """
    update = _update(model, precision)
    phases = Counter()
    size = 0
    casts = []
    for row in rows:
        if row["cast"]:
            old, new = (getattr(torch, name) for name in (row["inputs"][0], row["output"]))
            source = torch.empty_strided(*row["cast"], dtype=old, device=images.device).fill_(1)
            casts += row["calls"] * [(source, new)]
            phases[row["phase"]] += row["calls"]
            size += row["calls"] * source.numel() * (old.itemsize + new.itemsize)
    seconds = timed(lambda: [source.to(new) for source, new in casts], images.device)
    whole = timed(lambda: update([(images, labels, 1, True)], len(images)), images.device)
    return {
        "casts": phases,
        "bytes": size,
        "seconds": statistics.median(seconds),
        "update_seconds": statistics.median(whole),
    }


def dtype_lines(
    precision: Precision, rows: list[dict[str, Any]], cost: dict[str, Any], *, full: bool = False
) -> list[str]:
    """The trace as a table grouped by operator and types, or with `full` module by module."""
    lines = paragraph(f"{precision.label}: {precision.reason}")
    ran = [row for row in rows if not row["view"]]
    calls, count = (sum(row["calls"] for row in some) for some in (ran, rows))
    if not full and not any("float16" in name for row in ran for name in (*row["inputs"], row["output"])):
        return [*lines, f"  All {calls} operators ran in float32, without a cast (--full lists them)."]
    groups = defaultdict(list)
    for row in rows if full else ran:
        inputs = ",".join([name for name in row["inputs"] if "float" in name] or row["inputs"][:1])
        types = [name.replace("bfloat", "bf").replace("float", "fp") for name in (inputs, row["output"])]
        place = f"{row['phase']} {row['module']} {row['kind']}".rstrip() if full else row["phase"]
        groups[place, row["op"] + " (cast)" * bool(row["cast"]), *types].append(row)
    cells = [["operator", "in", "out", "calls", "" if full else "modules"]]
    for place, found in itertools.groupby(groups.items(), lambda group: group[0][0]):
        cells.append([place])
        for (_, op, *types), members in found:
            modules = {row["module"]: row["kind"] for row in members if row["module"]}
            kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(modules.values()).items())
            name = "".join(modules) if len(modules) == 1 else kinds
            cells.append([op, *types, str(sum(row["calls"] for row in members)), "" if full else name])
    update = cost["update_seconds"]
    phases = ", ".join(f"{cost['casts'][phase]} in {phase}" for phase in ("forward", "loss", "backward"))
    return (
        lines
        + table("<<<><", cells, gap=1)
        + paragraph(
            (
                ""
                if full
                else f"{count - calls} views, which compute nothing, are left out; --full lists all by module. "
            )
            + f"Casts: {sum(cost['casts'].values())} an update ({phases}), {cost['bytes'] / 2**20:,.0f} MB read and "
            f"written. By themselves they take {1000 * cost['seconds']:,.1f} ms, {cost['seconds'] / update:.1%} of the "
            f"update's {1000 * update:,.0f} ms.",
            "  ",
        )
    )


class _KeptForBackward(TorchDispatchMode):
    """Notes the storages that autograd keeps, by address, and which of them are casts of parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.copies: set[int] = set()
        self._parameters = {_address(parameter) for parameter in model.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and _address(args[0]) in self._parameters:
            self.copies.add(_address(result))
        return result


def _address(tensor: torch.Tensor) -> int:
    """Of the memory behind a tensor, which views share."""
    return tensor.untyped_storage().data_ptr()


def memory_ledger(
    build: Callable[[], nn.Module], images: torch.Tensor, labels: torch.Tensor, precision: Precision
) -> dict[str, Any]:
    """The bytes that an update with Adam holds, by purpose.

    Activations are the distinct storages autograd keeps between forward and backward, parameters, buffers,
    autocast's copies of weights and the batch left out. The peak is the allocator's own on CUDA, on the CPU that of
    the allocations torch.profiler records. Workspace is what is left of it without gradients, which fill the place
    of activations that backward has freed. Reserved (by the allocator) and driver (in use on the whole GPU) are
    CUDA's; resident is this process's on a CPU.
    """
    device = images.device
    cuda = images.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    update = Update(build().to(device), named_precision(precision.name, precision.device))
    model = update.model
    state = update.optimizer.state

    def step() -> None:
        update([(images, labels, 1, True)], len(images))

    step()  # the optimizer's state is made in the first update
    kept = _KeptForBackward(model)
    with kept, kept.hooks:
        step()
    known = {_address(tensor) for tensor in (*model.parameters(), *model.buffers(), images, labels)}
    sizes = {
        "parameters": sum(parameter.nbytes for parameter in model.parameters()),
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        "gradients": sum(parameter.nbytes for parameter in state),
        "optimizer_state": sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values()),
        "batch": images.nbytes + labels.nbytes,
        "activations": sum(size for place, size in kept.bytes.items() if place not in known | kept.copies),
        "weight_copies": sum(size for place, size in kept.bytes.items() if place in kept.copies - known),
    }
    fixed = sum(sizes[part] for part in ("parameters", "buffers", "optimizer_state", "batch"))
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        free, total = torch.cuda.mem_get_info(device)
        # What the caller holds besides the batch (another model, say) is no part of this update.
        peak = torch.cuda.max_memory_allocated(device) - before + sizes["batch"]
        outside = {"reserved": torch.cuda.memory_reserved(device), "driver": total - free}
    else:
        peak = fixed + peak_of_allocations(step)
        outside = {"resident": linux_memory("/proc/self/status", "VmRSS") or 0}
    workspace = max(0, peak - fixed - sizes["activations"] - sizes["weight_copies"])
    return {"precision": precision.name, **sizes, "workspace": workspace, "peak": peak, **outside}


def peak_of_allocations(function: Callable[[], Any]) -> int:
    """Most bytes that CPU tensors made inside `function` held at one time, oneDNN's scratch memory included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def memory_lines(ledger: list[dict[str, Any]]) -> list[str]:
    """The ledger as a table with a column for each precision, and why the peak fell or did not."""
    lines = heading(
        "2. Memory ledger",
        "What one training update holds, in MB of 2**20 bytes, by what it is for; the "
        "parts do not add up to the peak, because gradients are made while activations are freed. AMP "
        "shrinks activations only: weights, gradients and Adam's state stay FP32, and autocast adds 16-bit "
        "copies of the weights.",
    )
    first = ledger[0]
    lines += table(
        "<" + ">" * len(ledger),
        [["", *(row["precision"] for row in ledger)]]
        + [
            [part.replace("_", " "), *(f"{row[part] / 2**20:,.1f}" for row in ledger)]
            for part in first
            if part != "precision"
        ],
    )
    for row in ledger[1:]:
        lines += paragraph(
            f"{row['precision']} against {first['precision']}: the peak is {row['peak'] / first['peak']:.0%}, the "
            f"activations are {row['activations'] / max(1, first['activations']):.0%}; a larger batch or image makes "
            "these count for more.",
            "  ",
        )
    if "resident" in first:
        lines += paragraph(
            "Resident memory seldom falls within a process: `doctor` measures each precision in one of its own.", "  "
        )
    return lines


def memory_picture(ledger: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars of what stays FP32 and what AMP changes."""
    parts = ("parameters", "gradients", "optimizer_state", "activations", "weight_copies")
    with picture(path, 9, 1.9 + 0.7 * len(ledger)) as figure:
        axes = figure.add_subplot()
        ends = [0.0] * len(ledger)
        for part, (color, _, _, hatch) in zip(parts, STYLES, strict=False):
            sizes = [row[part] / 2**20 for row in ledger]
            axes.barh(
                range(len(ledger)),
                sizes,
                left=ends,
                height=0.55,
                color=color,
                hatch=hatch,
                edgecolor="white",
                label=part.replace("_", " "),
            )
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        for place, (end, row) in enumerate(zip(ends, ledger, strict=True)):
            axes.text(end, place, f"  peak {row['peak'] / 2**20:,.0f} MB", va="center")
        axes.set_yticks(range(len(ledger)), [row["precision"] for row in ledger])
        axes.set(
            title="What one training update holds",
            xlim=(0, 1.2 * max(ends)),
            xlabel="MB (gradients come as activations go, so the peak is not the sum)",
        )
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        figure.legend(loc="outside lower center", ncols=5, fontsize=9)


def underflow_map(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, scaler_scale: float | None = None
) -> dict[str, Any]:
    """What float16 would do to the true gradients of one batch, layer by layer, at several loss scales.

    Gradients of parameters, and of what every innermost module puts out, come from a plain FP32 step on any device.
    `by_scale` counts the values that are `zero`, `subnormal` or `overflow` in float16 among the `nonzero` ones, at
    the scales 1, 2**8, 2**16 and `scaler_scale`. `through_float16` says whether autocast would compute that gradient
    in float16 at all: BatchNorm's parameters, for one, never leave FP32. `histogram` counts nonzero values by
    floor(log2 of the magnitude).
    """
    update = _update(model, named_precision("fp32", images.device))
    model = update.model
    scales = list(dict.fromkeys([1.0, 2.0**8, 2.0**16, float(scaler_scale or 1)]))
    modules = {name: module for name, module in model.named_modules() if not list(module.children())}
    fates = defaultdict(Counter)
    histogram = {"parameter": Counter(), "activation": Counter()}

    def note(group: str, name: str, gradient: torch.Tensor) -> None:  # a module that runs twice is added up
        counts, exponents = fate(gradient, scales)
        fates[group, name].update(counts)
        histogram[group].update(exponents)

    def watch(name: str, output: Any) -> None:
        # A hook on the tensor, not on the module: in-place ReLU would overwrite what a module's hook hands on.
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: note("activation", name, gradient))

    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: watch(name, output))
    _loss(model, images, labels, update.precision).backward()
    names = [("parameter", name) for name, parameter in model.named_parameters() if parameter.grad is not None]
    for _, name in names:
        note("parameter", name, model.get_parameter(name).grad)
    layers = []
    for group, name in [*names, *(key for key in itertools.product(["activation"], modules) if key in fates)]:
        products = isinstance(modules.get(name.rpartition(".")[0]), (nn.Linear, nn.modules.conv._ConvNd))
        counts = fates[group, name]
        layers.append(
            {
                "group": group,
                "name": name,
                "through_float16": group == "activation" or products,
                "values": counts["values"],
                "nonzero": counts["nonzero"],
                "by_scale": {
                    f"{scale:g}": {kind: counts[kind, scale] for kind in ("zero", "subnormal", "overflow")}
                    for scale in scales
                },
            }
        )
    return {
        "scales": scales,
        "scaler_scale": scaler_scale,
        "layers": layers,
        "histogram": {group: dict(sorted(counts.items())) for group, counts in histogram.items()},
    }


def fate(gradient: torch.Tensor, scales: list[float]) -> tuple[Counter, Counter]:
    """Counts what becomes of the nonzero values in float16 at each scale, by really casting them; and the values by
    floor(log2 of the magnitude): frexp's mantissa is in [0.5, 1), so its exponent is one more."""
    nonzero = gradient.detach().float()[gradient != 0]
    tiny = torch.finfo(torch.float16).tiny
    counts = Counter(values=gradient.numel(), nonzero=nonzero.numel())
    for scale in scales:
        half = (nonzero * scale).half().abs()
        counts["zero", scale] = int((half == 0).sum())
        counts["subnormal", scale] = int(((half > 0) & (half < tiny)).sum())
        counts["overflow", scale] = int((half.isinf() & nonzero.isfinite()).sum())
    exponents, numbers = (torch.frexp(nonzero[nonzero.isfinite()]).exponent - 1).unique(return_counts=True)
    return counts, Counter(dict(zip(exponents.tolist(), numbers.tolist(), strict=True)))


def underflow_lines(underflow: dict[str, Any]) -> list[str]:
    """The map as a table of the layers whose products autocast computes in float16."""
    rows = {(row["group"], row["name"]): row for row in underflow["layers"] if row["through_float16"]}
    names = [name.removesuffix(".weight") for group, name in rows if group == "parameter" and name.endswith(".weight")]
    scales = {f"{scale:g}": f"2^{math.log2(scale):.4g}" for scale in underflow["scales"]}
    room = 78 - 14 * len(scales)

    def cells(title: str, kind: str, layers: list[str]) -> list[str]:
        """A line: the shares among these layers' weight gradients, then among those of their outputs."""
        shares = []
        for keys in ([("parameter", f"{name}.weight") for name in layers], [("activation", name) for name in layers]):
            found = [rows[key] for key in keys if key in rows]
            total = max(1, sum(row["nonzero"] for row in found))
            shares += [sum(row["by_scale"][scale][kind] for row in found) / total for scale in scales]
        title = title if len(title) <= room else f"…{title[1 - room :]}"
        return [title, *(f"{share:.2%}" if share >= 1e-4 else "<.01%" if share else "0" for share in shares)]

    lines = heading(
        "3. Underflow map",
        "The share of nonzero gradient values, computed in true FP32, that become zero "
        "when they are multiplied by the loss scale and cast to float16. What vanishes at scale 2^0 and "
        "not at 2^16 is what GradScaler saves; bfloat16 has FP32's range and needs no scale. The last line "
        "is what would overflow: one such value, and GradScaler skips the update.",
    )
    lines += table(
        "<" + 2 * len(scales) * ">",
        [
            ["gradient of", *["weight"] * len(scales), *["output"] * len(scales)],
            ["at loss scale", *2 * [*scales.values()]],
            *(cells(name, "zero", [name]) for name in names),
            *(cells(f"all: {kind}", kind, names) for kind in ("zero", "subnormal", "overflow")),
        ],
        gap=1,
    )
    if underflow["scaler_scale"]:
        lines.append(f"  The scaler's own scale stood at {underflow['scaler_scale']:,.10g}.")
    return lines


def magnitude_picture(histogram: dict[str, dict[int, int]], path: Path) -> None:
    """Gradient magnitudes against the ranges of float16 and bfloat16."""
    half = torch.finfo(torch.float16)
    brain = torch.finfo(torch.bfloat16)
    # Half of the smallest subnormal number rounds to zero, everything above it to that number or more.
    smallest = math.log2(half.smallest_normal * half.eps / 2)
    tiny = math.log2(half.tiny)
    largest = math.log2(half.max)
    span = range(-45, 20)
    tallest = 1.0
    with picture(path, 9, 5) as figure:
        axes = figure.add_subplot()
        for group, color, line in (("parameter", BLUE, "-"), ("activation", VERMILION, "--")):
            counts = Counter()
            for exponent, count in histogram[group].items():  # what lies beyond the picture stands at its edge
                counts[min(max(exponent, span[0]), span[-2])] += count
            shares = [100 * counts[exponent] / max(1, counts.total()) for exponent in span[:-1]]
            axes.stairs(shares, span, color=color, linestyle=line, linewidth=1.8, label=f"gradients of {group}s")
            axes.stairs(shares, span, color=color, alpha=0.15, fill=True)
            tallest = max(tallest, *shares)
        axes.axvspan(smallest, tiny, color=FAINT, alpha=0.25, linewidth=0)
        for border in (smallest, largest):
            axes.axvline(border, color=INK, linewidth=1.2)
        for place, text in (
            ((span[0] + smallest) / 2, f"zero in float16\n(below 2^{smallest:.0f})"),
            ((smallest + tiny) / 2, "float16,\nsubnormal"),
            ((tiny + largest) / 2, f"float16, full precision\n(2^{tiny:.0f} to {half.max:,.0f})"),
        ):
            axes.text(place, 1.24 * tallest, text, ha="center", va="top", fontsize=9)
        axes.annotate(
            "",
            (smallest - 0.3, 0.55 * tallest),
            (smallest - 16.3, 0.55 * tallest),
            arrowprops={"arrowstyle": "->", "color": INK},
        )
        axes.text(smallest - 16, 0.57 * tallest, "a loss scale of 2^16 moves\nevery value this far", fontsize=9)
        axes.set(
            xlim=(span[0], span[-1]),
            ylim=(0, 1.26 * tallest),
            ylabel="% of nonzero values",
            title="Gradient magnitudes against what float16 can hold",
            xlabel="log2 of the magnitude of a gradient value   (bfloat16 holds all of it: "
            f"2^{math.log2(brain.tiny):.0f} to 2^{math.log2(brain.max):.0f})",
        )
        axes.legend(loc="upper right", bbox_to_anchor=(0.93, 0.82), fontsize=9)


def diary_lines(metrics: list[dict[str, Any]]) -> list[str]:
    """A run's loss scale and skipped updates; quiet epochs of the same scale share a line.

    `metrics` are the lines of metrics.jsonl: epoch, updates, loss_scale, skipped_updates, and `skips`, a list of
    {"update": 1-based over the run, "parameter": first one on the way back whose gradient was not finite, "scale"}.
    """
    if not metrics:
        return heading(
            "4. Scaler diary",
            "No run was named, so there is no diary to show. Name one with "
            "--checkpoint_name to see its loss scale and skipped updates.",
        )
    lines = heading(
        "4. Scaler diary",
        "The loss scale after each epoch and the updates that were skipped because a "
        "gradient was not finite. A few skips at the start are the scaler finding its level; skips that "
        "go on, or a scale that falls below 1, are a sick run.",
    )
    skips = [(line["epoch"], skip) for line in metrics for skip in line.get("skips") or []]
    if not skips and all(line.get("loss_scale") in (None, 1) for line in metrics):
        return [*lines, "  This run had no scaler at work: it is needed for float16 alone."]
    cells = [["epochs", "loss scale", "skipped updates"]]
    for (scale, _), members in itertools.groupby(
        metrics, lambda line: (line.get("loss_scale"), line["epoch"] if line.get("skipped_updates") else None)
    ):
        first, *rest = members
        cells.append(
            [
                f"{first['epoch']} to {rest[-1]['epoch']}" if rest else f"{first['epoch']}",
                f"{scale or math.nan:,.10g}",
                str(first.get("skipped_updates") or 0),
            ]
        )
    lines += table("<>>", cells)
    if skips:
        cells = [
            [f"{skip['update']:,} (epoch {epoch})", f"{skip['scale']:,.10g}", skip["parameter"]]
            for epoch, skip in skips[:20]
        ]
        lines += ["", *table(">><", [["update", "scale", "first bad gradient on the way back"], *cells])]
        lines.append(f"  {len(skips)} skipped{' in all; the first 20 are shown' * (len(skips) > 20)}")
    return lines


def diary_picture(metrics: list[dict[str, Any]], path: Path) -> None:
    """The loss scale of each update, as the skips and the ends of epochs tell it, and the updates skipped."""
    skips = {skip["update"]: skip["scale"] for line in metrics for skip in line.get("skips") or []}
    scales = skips | {
        line["updates"] + 1: line["loss_scale"]  # an epoch's line says what the next update begins with
        for line in metrics
        if line.get("updates") and line.get("loss_scale")
    }
    with picture(path, 9, 3.6) as figure:
        axes = figure.add_subplot()
        axes.step(sorted(scales), [scales[update] for update in sorted(scales)], color=BLUE)
        axes.plot(list(skips), list(skips.values()), "v", color=VERMILION, label="skipped")
        axes.set_xscale("log")  # the search happens in the first updates
        axes.set_yscale("log", base=2)
        axes.set(xlabel="update", ylabel="loss scale", title=f"Loss scale, and the {len(skips)} updates skipped")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.legend()
