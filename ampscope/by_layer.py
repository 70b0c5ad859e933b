"""Which layer loses the precision: the error of each module's output and gradients in a 16-bit type, by depth.

The same step on the same batch with the same random numbers runs in a reference (float64 if the step is small, see
reference.py, otherwise float32) and in the 16-bit type. Beside each error stands a noise floor: the error that mere
rounding makes. For the floor float32 runs with the inputs, the weights and the outputs of each innermost module off by
one random rounding of the 16-bit type, several times.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ampscope.errors import InspectError
from ampscope.execution import Execution
from ampscope.float32_layers import KeptFloat32, keep_float32, put_back
from ampscope.layer_runs import Errors, Key, Seen, has_regions, run_once
from ampscope.precisions import PRECISIONS, Precision, named_precision, sensible_precisions
from ampscope.reference import reference
from ampscope.subject import Subject, core
from ampscope.text import cut, end_of, heading, paragraph, table

DRAWS = 3  # runs with random roundings, of which the floor is the largest
ABOVE = 4.0  # times the floor: an error above that is more than rounding
SEARCHED = 12  # modules that the search tries in float32, those of the largest errors of their own
TIMED = 5  # updates of each side
SCALE = 1024.0  # factor on the loss in float16, by which gradients are divided again


class LayerErrors:
    """What `layer_errors` found; `content` is plain values, by precision.

    Each row has the module's name and class, and the relative errors of its output, of the gradient of its output
    and of its weights' gradients, each beside its floor. `own` is the error of the output when the module is given
    the inputs that it has in the reference: what the module itself adds. None means that nothing was to compare.
    """

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def text(self, *, lines: int = 24) -> str:
        """Return a table for each precision, of the modules whose own errors are the largest, and its verdict."""
        out: list[str] = []
        reference = self.content["reference"]
        for name, found in self.content["precisions"].items():
            out += heading(
                f"Error by layer, {PRECISIONS[name].label}",
                f"Relative error against {reference}, and the floor that mere rounding reaches. `own` is what the "
                f"module adds to the inputs that it has in {reference}.",
            )
            rows = sorted(found["rows"], key=lambda row: -(row["own"] or 0))[:lines]
            rows = [row for row in found["rows"] if row in rows]
            cells = [["module", "class", "output", "floor", "own", "floor", "gradient", "floor"]]
            for row in rows:
                keys = ("output", "output_floor", "own", "own_floor", "gradient", "gradient_floor")
                cells.append([end_of(row["name"], 22), cut(row["class"], 11), *(_percent(row[key]) for key in keys)])
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
    ambient = not has_regions(subject)
    true, kind = reference(subject, base, ambient=ambient)
    content: dict[str, Any] = {"reference": kind, "precisions": {}}
    for name in chosen:
        precision = named_precision(name, subject.device)
        factor = SCALE if precision.dtype == torch.float16 else 1.0
        low = run_once(subject, precision, true, ambient=ambient, scale=factor).errors
        own = run_once(subject, precision, true, ambient=ambient, scale=factor, feed=True).errors
        noise = torch.finfo(precision.dtype).eps / 2
        draws = range(DRAWS)
        floors = [run_once(subject, base, true, ambient=ambient, noise=noise, seed=draw).errors for draw in draws]
        alone = [
            run_once(subject, base, true, ambient=ambient, noise=noise, seed=draw, feed=True).errors for draw in draws
        ]
        rows = _rows(subject, true, low, own, floors, alone)
        found = {"rows": rows, **_judged(rows)}
        if find:
            found |= _search(subject, precision, true, rows, ambient=ambient)
        content["precisions"][name] = found
    return LayerErrors(content)


def _rows(
    subject: Subject, true: Seen, low: Errors, own: Errors, floors: list[Errors], alone: list[Errors]
) -> list[dict[str, Any]]:
    """Return a row for each call of a module, in the order in which the calls ended."""
    kinds = {name: type(module).__name__ for name, module in subject.named_modules()}

    def of(run: Errors, key: Key, part: str) -> float | None:
        error = run.get((key[0] if part == "weights" else key, part))
        return error.relative() if error else None

    rows = []
    for key in true.order:
        name, call = key
        leaf = name in true.leaves
        row: dict[str, Any] = {"name": name or "(model)", "call": call, "class": kinds[name], "leaf": leaf}
        for part in ("output", "gradient", "weights"):
            row[part] = of(low, key, part)
            row[f"{part}_floor"] = _largest([of(run, key, part) for run in floors])
        row["own"] = of(own, key, "output") if leaf else None
        row["own_floor"] = _largest([of(run, key, "output") for run in alone]) if leaf else None
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
    """Return the first module whose error leaves the floor, the one that adds most, and `back`, all in a sentence.

    `back` has the worst gradient of weights: a sum may lose it while outputs and what goes further back are right.
    """
    first = next((row for row in rows if row["leaf"] and _above(row, "output") > ABOVE), None)
    adding = [row for row in rows if _above(row, "own") > ABOVE]
    most = max(adding, key=lambda row: row["own"] if math.isfinite(row["own"]) else math.inf, default=None)
    lost = [row for row in rows if _above(row, "weights") > ABOVE]
    back = max(lost, key=lambda row: row["weights"] if math.isfinite(row["weights"]) else math.inf, default=None)
    if first is None and most is None and back is None:
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
        if back is not None:
            worst = f", the worst of {len(lost)} modules" if len(lost) > 1 else ""
            said.append(
                f"The gradient of the weights of {back['name']} ({back['class']}) is off by "
                f"{_percent(back['weights'])}, where rounding makes {_percent(back['weights_floor'])}{worst}: "
                f"keep_float32(model, {back['name']!r})."
            )
        verdict = " ".join(said)
    names = {"first": first, "most": most, "back": back}
    return {**{key: row["name"] if row else None for key, row in names.items()}, "verdict": verdict}


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
            errors = run_once(subject, precision, true, ambient=ambient).errors
        return errors[last, "output"].relative() or 0.0

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
    new = [name for name in names if not isinstance(network.get_submodule(name), KeptFloat32)]
    kept = keep_float32(network, ",".join(new))
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
