"""Which layer loses the precision: the error of each module's output and gradients in a 16-bit type, by depth.

The same step on the same batch with the same random numbers runs in float32 and in the 16-bit type. Beside each error
stands a noise floor: the error that mere rounding makes. For the floor float32 runs with the inputs, the weights and
the outputs of each innermost module off by one random rounding of the 16-bit type, several times.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils._pytree import tree_map

from ampscope.errors import InspectError
from ampscope.execution import Execution
from ampscope.float32_layers import keep_float32, put_back
from ampscope.precisions import PRECISIONS, Precision, named_precision, sensible_precisions
from ampscope.subject import Subject, core
from ampscope.tensors import tensors_in
from ampscope.text import cut, heading, paragraph, table

DRAWS = 3  # runs with random roundings, of which the floor is the largest
ABOVE = 4.0  # times the floor: an error above that is more than rounding
SEARCHED = 12  # modules that the search tries in float32, those of the largest errors of their own
TIMED = 5  # updates of each side
SCALE = 1024.0  # factor on the loss in float16, by which gradients are divided again
Key = tuple[str, int]  # a module's name, and which of its calls


@dataclass
class Seen:
    """What one run showed of each call of a module, in float32 on the model's device."""

    order: list[Key] = field(default_factory=list)
    inputs: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    gradients: dict[Key, list[torch.Tensor]] = field(default_factory=dict)  # of the outputs
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # gradients, by parameter
    leaves: set[str] = field(default_factory=set)  # modules inside which no other one was called


class _Recorder:
    """Hooks on every module that keep what goes in and comes out, and change it for the floor and for own errors."""

    def __init__(self, subject: Subject, *, noise: float = 0.0, feed: Seen | None = None):
        self.subject = subject
        self.noise = noise
        self.feed = feed
        self.seen = Seen()
        self._calls: dict[str, int] = {}
        self._open: list[tuple[Key, bool]] = []
        self._draw = torch.Generator().manual_seed(0)

    @contextmanager
    def attached(self) -> Iterator[Seen]:
        with ExitStack() as stack:
            for name, module in self.subject.named_modules():
                before = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield self.seen

    def _enter(self, name: str) -> Callable:
        def enter(_module: nn.Module, arguments: Any, options: Any) -> Any:
            key = (name, self._calls.get(name, 0))
            if self._open:
                self._open[-1] = (self._open[-1][0], False)
            self._open.append((key, True))
            self._calls[name] = key[1] + 1
            arguments, options = self._changed(name, key, arguments, options)
            self.seen.inputs[key] = _copies((arguments, options))
            return arguments, options

        return enter

    def _changed(self, name: str, key: Key, arguments: Any, options: Any) -> tuple[Any, Any]:
        """Return a module's inputs off by a rounding, or those that it has in float32."""
        given: tuple[Any, Any] = (arguments, options)
        if self.feed is not None and name in self.feed.leaves:
            true = iter(self.feed.inputs.get(key, []))
            given = tree_map(lambda value: _like(value, true), given)
        if self.noise and (self.feed is None or name in self.feed.leaves):
            given = tree_map(self._off, given)
        return given

    def _off(self, value: Any) -> Any:
        if not _is_floating(value):
            return value
        drawn = torch.rand(value.shape, generator=self._draw).to(value.device, value.dtype)
        return value * (1 + self.noise * (2 * drawn - 1))

    def _leave(self, _module: nn.Module, _arguments: Any, outputs: Any) -> Any:
        key, leaf = self._open.pop()
        if leaf:
            self.seen.leaves.add(key[0])
            if self.noise:
                outputs = tree_map(self._off, outputs)
        self.seen.order.append(key)
        self.seen.outputs[key] = _copies(outputs)
        self.seen.gradients[key] = []
        for tensor in tensors_in(outputs):
            if _is_floating(tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.seen.gradients[key].append(gradient.detach().float()))
        return outputs


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


def _copies(tree: Any) -> list[torch.Tensor]:
    return [tensor.detach().float().clone() for tensor in tensors_in(tree) if _is_floating(tensor)]


def _like(value: Any, true: Iterator[torch.Tensor]) -> Any:
    """Return the next true value in the type of `value`, through which gradients still flow."""
    if not _is_floating(value):
        return value
    other = next(true, None)
    if other is None or other.shape != value.shape:
        return value
    return value + (other.to(value.dtype) - value).detach() if value.requires_grad else other.to(value.dtype)


def _error(found: list[torch.Tensor], true: list[torch.Tensor]) -> float | None:
    """Return the relative error of tensors against others, by the norm of all; None if they cannot be compared."""
    if not true or [tensor.shape for tensor in found] != [tensor.shape for tensor in true]:
        return None
    size = math.sqrt(sum(tensor.double().square().sum().item() for tensor in true))
    off = math.sqrt(
        sum((one.double() - other.double()).square().sum().item() for one, other in zip(found, true, strict=True))
    )
    return off / size if size else None


class LayerErrors:
    """What `layer_errors` found; `content` is plain values, by precision.

    Each row has the module's name and class, and the relative errors of its output, of the gradient of its output
    and of its weights' gradients, each beside its floor. `own` is the error of the output when the module is given
    the inputs that it has in float32: what the module itself adds. None means that nothing was to compare.
    """

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def text(self, *, lines: int = 24) -> str:
        """Return a table for each precision, of the modules whose own errors are the largest, and its verdict."""
        out: list[str] = []
        for name, found in self.content["precisions"].items():
            out += heading(
                f"Error by layer, {PRECISIONS[name].label}",
                "Relative error against float32, and the floor that mere rounding reaches. `own` is what the module "
                "adds to the inputs that it has in float32.",
            )
            rows = sorted(found["rows"], key=lambda row: -(row["own"] or 0))[:lines]
            rows = [row for row in found["rows"] if row in rows]
            cells = [["module", "class", "output", "floor", "own", "floor", "gradient", "floor"]]
            for row in rows:
                keys = ("output", "output_floor", "own", "own_floor", "gradient", "gradient_floor")
                cells.append([row["name"], cut(row["class"], 16), *(_percent(row[key]) for key in keys)])
            out += ["", *table("<<>>>>>>", cells), "", *paragraph(found["verdict"]), ""]
            for step in found.get("search", []):
                out += paragraph(step, "- ")
        return "\n".join(out).rstrip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}" if math.isfinite(value) else "not finite"


def layer_errors(
    model: nn.Module | Mapping[str, nn.Module],
    batch: Any,
    loss: Callable | None = None,
    *,
    step: Callable | None = None,
    optimizers: Any = None,
    scaler: Any = None,
    precisions: list[str] | None = None,
    find: bool = False,
) -> LayerErrors:
    """Return the error of every module of a step in each 16-bit precision.

    Args:
        model, batch, loss, step, optimizers, scaler: as `inspect_step` takes them. Models are put back as they were.
        precisions: names of 16-bit precisions; None for those that make sense on the device.
        find: also look for the modules to keep in float32, one at a time.

    Raises:
        InspectError: if the step fails, or no precision has 16 bits.
    """
    subject = Subject(model, batch, loss, step=step, optimizers=optimizers, scaler=scaler)
    subject.materialise()
    chosen = precisions or [name for name in sensible_precisions(subject.device) if PRECISIONS[name].amp]
    if not chosen or not all(name in PRECISIONS and PRECISIONS[name].amp for name in chosen):
        raise InspectError("name a precision of 16 bits: amp-bf16 or amp-fp16.")
    base = named_precision("fp32", subject.device)
    ambient = not _has_regions(subject)
    true = _run(subject, base, ambient=ambient)
    content: dict[str, Any] = {"reference": "float32", "precisions": {}}
    for name in chosen:
        precision = named_precision(name, subject.device)
        factor = SCALE if precision.dtype == torch.float16 else 1.0
        low = _run(subject, precision, ambient=ambient, scale=factor)
        own = _run(subject, precision, ambient=ambient, scale=factor, feed=true)
        noise = torch.finfo(precision.dtype).eps / 2
        floors = [_run(subject, base, ambient=ambient, noise=noise, seed=draw) for draw in range(DRAWS)]
        alone = [_run(subject, base, ambient=ambient, noise=noise, seed=draw, feed=true) for draw in range(DRAWS)]
        rows = _rows(subject, true, low, own, floors, alone)
        found = {"rows": rows, **_judged(rows)}
        if find:
            found |= _search(subject, precision, true, rows, ambient=ambient)
        content["precisions"][name] = found
    return LayerErrors(content)


def _has_regions(subject: Subject) -> bool:
    """Return True if the step enters autocast itself; then its own regions take the precision."""
    with subject.kept():
        execution = Execution(subject, None)
        try:
            execution.run()
        except Exception as error:
            raise InspectError(f"the step fails as it is written: {type(error).__name__}: {error}") from error
    subject.forget()
    return any(event.kind == "autocast" and event.details["enabled"] for event in execution.events)


def _run(
    subject: Subject,
    precision: Precision,
    *,
    ambient: bool,
    scale: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
    feed: Seen | None = None,
) -> Seen:
    """Run the step once, as the models are; gradients are divided by `scale`."""
    recorder = _Recorder(subject, noise=noise, feed=feed)
    recorder._draw.manual_seed(seed)
    with subject.kept():
        if noise:
            with torch.no_grad():
                for parameter in subject.parameters():
                    if _is_floating(parameter):
                        parameter.copy_(recorder._off(parameter))
        execution = Execution(subject, precision.use(), ambient=ambient, scale=scale)
        try:
            with _without_checkpointing(), recorder.attached() as seen:
                execution.run()
        except Exception as error:
            raise InspectError(f"the step fails in {precision.label}: {type(error).__name__}: {error}") from error
        factor = execution.scale
        seen.gradients = {key: [part / factor for part in parts] for key, parts in seen.gradients.items()}
        for name, parameter in subject.named_parameters():
            if parameter.grad is not None and _is_floating(parameter.grad):
                seen.weights[name] = parameter.grad.detach().float() / factor
        subject.forget()
    return seen


class _Direct:
    """Stands for the autograd function of reentrant checkpointing, and calls the block directly."""

    @staticmethod
    def apply(function: Callable, _preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """Let checkpointed blocks keep their activations: computed again they would be off by other roundings."""

    def nothing(*_arguments: Any, **_options: Any) -> Iterator[None]:
        yield

    def directly(function: Callable, arguments: Any, options: Any, **_how: Any) -> Any:
        return function(*arguments, **options)

    kept = {  # before PyTorch 2.14 the first two, then the third
        "CheckpointFunction": _Direct,
        "_checkpoint_without_reentrant_generator": nothing,
        "_checkpoint_impl": directly,
    }
    originals = {name: getattr(checkpointing, name) for name in kept if hasattr(checkpointing, name)}
    try:
        for name in originals:
            setattr(checkpointing, name, kept[name])
        yield
    finally:
        for name, original in originals.items():
            setattr(checkpointing, name, original)


def _rows(
    subject: Subject, true: Seen, low: Seen, own: Seen, floors: list[Seen], alone: list[Seen]
) -> list[dict[str, Any]]:
    """Return a row for each call of a module, in the order in which the calls ended."""
    kinds = {name: type(module).__name__ for name, module in subject.named_modules()}
    rows = []
    for key in true.order:
        name, call = key
        weights = [weight for weight in true.weights if weight.rpartition(".")[0] == name]
        leaf = name in true.leaves

        def of(run: Seen, weights: list[str] = weights, key: Key = key) -> dict[str, float | None]:
            return {
                "output": _error(run.outputs.get(key, []), true.outputs[key]),
                "gradient": _error(run.gradients.get(key, []), true.gradients[key]),
                "weights": _error(
                    [run.weights[weight] for weight in weights if weight in run.weights],
                    [true.weights[weight] for weight in weights],
                ),
            }

        noise = [of(run) for run in floors]
        row: dict[str, Any] = {"name": name or "(model)", "call": call, "class": kinds[name], "leaf": leaf, **of(low)}
        row |= {f"{part}_floor": _largest([one[part] for one in noise]) for part in ("output", "gradient", "weights")}
        row["own"] = of(own)["output"] if leaf else None
        row["own_floor"] = _largest([of(run)["output"] for run in alone]) if leaf else None
        rows.append(row)
    return rows


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _above(row: dict[str, Any], part: str) -> float:
    """Return how many times the floor an error is; 0 if it is not known."""
    error = row[part]
    if error is None:
        return 0.0
    return math.inf if not math.isfinite(error) else error / max(row[f"{part}_floor"] or 0.0, 1e-7)


def _judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first module whose error leaves the floor, the one that adds most, and both in a sentence."""
    first = next((row for row in rows if row["leaf"] and _above(row, "output") > ABOVE), None)
    adding = [row for row in rows if _above(row, "own") > ABOVE]
    most = max(adding, key=lambda row: row["own"] if math.isfinite(row["own"]) else math.inf, default=None)
    if first is None and most is None:
        verdict = "No module's error leaves the floor: what differs from float32 is rounding."
    else:
        said = []
        if most is not None:
            said.append(
                f"{most['name']} ({most['class']}) adds most: its own error is {_percent(most['own'])}, where rounding "
                f"makes {_percent(most['own_floor'])}. Try it in float32: keep_float32(model, {most['name']!r})."
            )
        if first is not None:
            said.append(
                f"The first module whose output leaves the floor is {first['name']} ({first['class']}): "
                f"{_percent(first['output'])} against {_percent(first['output_floor'])}."
            )
        verdict = " ".join(said)
    return {"first": first["name"] if first else None, "most": most["name"] if most else None, "verdict": verdict}


# ------------------------------------------------------------------------------------------------- the search
def _search(
    subject: Subject, precision: Precision, true: Seen, rows: list[dict[str, Any]], *, ambient: bool
) -> dict[str, Any]:
    """Keep one module after another in float32, largest own error first; say what each brings and costs."""
    if not subject.single:
        return {"search": ["The search takes one model, not several."]}
    network = core(subject.models[""])
    last = true.order[-1]

    def end(names: list[str]) -> float:
        with _kept(network, names):
            low = _run(subject, precision, ambient=ambient)
        return _error(low.outputs[last], true.outputs[last]) or 0.0

    candidates = sorted((row for row in rows if row["own"]), key=lambda row: -row["own"])
    names = list(dict.fromkeys(row["name"] for row in candidates if row["name"] != "(model)"))[:SEARCHED]
    whole = end([])
    alone = {name: end([name]) for name in names}
    chosen: list[str] = []
    left = whole
    for name in sorted(names, key=alone.__getitem__):
        if left <= 0.1 * whole or alone[name] > 0.95 * whole:
            break
        error = end([*chosen, name])
        if error < 0.95 * left:
            chosen.append(name)
            left = error
    said = [f"The output's error is {_percent(whole)} with everything in 16 bits."]
    said += [f"{name} in float32: {_percent(alone[name])}." for name in sorted(names, key=alone.__getitem__)[:5]]
    if chosen:
        slow = _slower(subject, precision, network, chosen, ambient=ambient)
        cost = f"for {slow - 1:.0%} more time" if slow > 1.02 else "at no cost in time that could be measured"
        said.append(
            f"{' and '.join(chosen)} in float32 bring {1 - left / whole:.0%} of the difference {cost}: "
            f"keep_float32(model, {','.join(chosen)!r})."
        )
    else:
        said.append("No single module brings more than a twentieth of the difference: keep all of them in 16 bits.")
    return {"search": said, "keep": chosen, "alone": alone, "whole": whole, "left": left}


@contextmanager
def _kept(network: nn.Module, names: list[str]) -> Iterator[None]:
    kept = keep_float32(network, ",".join(names)) if names else []
    try:
        yield
    finally:
        put_back(network, kept)


def _slower(subject: Subject, precision: Precision, network: nn.Module, names: list[str], *, ambient: bool) -> float:
    """Return how many times as long an update takes with modules in float32: medians of updates in turn."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _, kept in itertools.product(range(TIMED + 1), (False, True)):
        with subject.kept(), _kept(network, names if kept else []):
            started = time.perf_counter()
            Execution(subject, precision, ambient=ambient).run()
            if subject.device.type == "cuda":
                torch.cuda.synchronize(subject.device)
            seconds[kept].append(time.perf_counter() - started)
        subject.forget()
    return statistics.median(seconds[True][1:]) / statistics.median(seconds[False][1:])


def error_picture(found: LayerErrors, path: Path) -> None:
    """Draw the error of each module's output by depth, the floor shaded; one panel a precision."""
    from ampscope.look import BLUE, FAINT, VERMILION, picture

    panels = found.content["precisions"]
    with picture(path, 9, 3.4 * len(panels)) as figure:
        for place, (name, part) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(len(panels), 1, place)
            rows = [row for row in part["rows"] if row["leaf"] and row["output"]]
            depth = range(len(rows))
            floor = [ABOVE * (row["output_floor"] or 0) for row in rows]
            axes.fill_between(depth, floor, 1e-12, color=FAINT, alpha=0.3, label="four times the floor of rounding")
            axes.plot(depth, [row["output"] for row in rows], color=BLUE, label="error of the output")
            axes.plot(depth, [row["own"] or math.nan for row in rows], "D", color=VERMILION, ms=4, label="its own")
            sizes = [value for row in rows for value in (row["output"], row["own"]) if value]
            axes.set(
                yscale="log",
                ylim=(min(sizes, default=1e-6) / 3, 3 * max(sizes, default=1)),
                title=f"Error by layer, {PRECISIONS[name].label}",
                xlabel="module, in the order of execution",
                ylabel="relative error",
            )
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axes.legend(fontsize=9)
