"""The report on one update of a program that ran as it was written."""

from __future__ import annotations

from typing import Any

import torch

from ampscope import payoff
from ampscope.content import product_record, subject_record
from ampscope.execution import Event
from ampscope.findings import Finding, by_place
from ampscope.inspecting import refused_by_scaler
from ampscope.model_rules import failure, model_findings, nonfinite, range_findings, wide_products
from ampscope.recipe_rules import recipe_findings
from ampscope.report import Report
from ampscope.script_trace import ScriptTrace
from ampscope.subject import core
from ampscope.tensors import dtype_name
from ampscope.text import cut, heading, paragraph, table
from ampscope.trace import Trace
from ampscope.updates import ScriptSubject, Updates

NAME = "this update"


class ScriptReport(Report):
    """A Report whose one precision is the program's own."""

    def text(self, *, full: bool = False) -> str:
        """Say what was traced, then all sections; with `full` every operator of every module.

        Of an update in which the program failed only the findings are shown.
        """
        script = self.content["script"]
        lines = heading(cut(f"Update {script['update']} of {script['program']}"))
        for sentence in script["words"]:
            lines += paragraph(sentence)
        if not script["whole"]:
            return "\n".join([*lines, "", *self._findings()])
        return "\n".join([*lines, "", super().text(full=full)])

    def _diary_lines(self) -> list[str]:
        scale = self.content["precisions"][NAME]["loss_scale"]
        lines = heading("4. Loss scale")
        if scale is None:
            return [*lines, "  No GradScaler was at work: it is needed for float16 alone."]
        fate = "was skipped: a gradient was not finite" if self.content["script"]["skipped"] else "was not skipped"
        lines += paragraph(f"The scale was {scale:,.10g}, and the update {fate}.", "  ")
        return lines + paragraph("`ampscope watch` writes the scale and the skips of a whole training.", "  ")

    def _payoff_lines(self) -> list[str]:
        pay = self.content["script"]["payoff"]
        if pay is None:
            return [*heading("8. Will it pay?"), "  Not measured."]
        if not pay["speed"]:
            return [*heading("8. Will it pay?"), *(line for text in pay["words"] for line in paragraph(text, "  "))]
        lines = heading(
            "8. Will it pay?",
            "The program was started twice more: as it is written, and with autocast and GradScaler switched off. "
            "The times are those between the ends of updates, with all that the program does in between; half of the "
            "updates lie between the two columns after the median. The peak is that of CUDA's allocator, on a CPU that "
            "of the whole process.",
        )
        cells = [["", "ms (median)", "from", "to", "updates", "loading ms", "peak MB"]]
        for name, row in pay["speed"].items():
            times = [f"{1000 * row[key]:,.1f}" for key in ("seconds", "lower", "upper")]
            size = "–" if row["peak"] is None else f"{row['peak'] / 2**20:,.1f}"
            cells.append([name, *times, str(row["rounds"]), f"{1000 * row['loading']:,.1f}", size])
        lines += table("<>>>>>>", cells)
        for sentence in pay["words"]:
            lines += paragraph(sentence, "  ")
        return lines


def script_report(seen: ScriptTrace, program: str, pay: dict[str, Any] | None) -> ScriptReport:
    """Return the report on what a ScriptTrace saw, whole or until the program failed."""
    assert seen.trace is not None
    trace, subject = seen.trace, seen.subject
    found = _findings(seen, trace, subject)
    kinds = {name: type(module).__name__ if name else "" for name, module in subject.named_modules()}
    rows = trace.records(kinds)
    casts = payoff.cast_cost(trace, rows, subject.device) | {"update_seconds": _seconds(pay)}
    origin = trace.lineage.first
    content = {
        "schema": 1,
        "torch": torch.__version__,
        "device": str(subject.device),
        "script": {
            "program": program,
            "update": seen.number,
            "whole": seen.whole,
            "skipped": seen.skipped,
            "words": _words(seen, trace, subject),
            "payoff": pay,
        },
        "subject": subject_record(subject, trace.execution, "script", _amp(trace)),
        "precisions": {
            NAME: {
                "label": "As it is written",
                "reason": _regions(trace),
                "error": None if trace.error is None else f"{type(trace.error).__name__}: {trace.error}",
                "loss_scale": trace.execution.scale if trace.execution.scalers else None,
                "first_overflow": None,
                "first_nonfinite": origin.record() if origin is not None else None,
            }
        },
        "dtypes": {NAME: rows},
        "casts": {NAME: casts},
        "memory": [] if seen.ledger is None else [seen.ledger],
        "underflow": seen.ranges,
        "scaler": [],
        "float32_products": {NAME: [product_record(row) for row in wide_products(trace)]} if _amp(trace) else {},
        "synchronisations": trace.waits(),
        "payoff": None,
    }
    return ScriptReport(content, by_place(found))


def _seconds(pay: dict[str, Any] | None) -> float | None:
    """Return the seconds of an update as written, if it was timed."""
    return pay["speed"]["as written"]["seconds"] if pay and "as written" in pay["speed"] else None


def _regions_on(trace: Trace) -> list[Event]:
    """Return the autocast regions of the update that are on, for the device that trains."""
    device = trace.execution.device
    regions = [event for event in trace.execution.events if event.kind == "autocast"]
    return [event for event in regions if event.details["enabled"] and event.details["device"] == device]


def _amp(trace: Trace) -> set[torch.dtype]:
    """Return the types of the autocast regions that are on."""
    return {event.details["dtype"] for event in _regions_on(trace)}


def uses_amp(seen: ScriptTrace) -> bool:
    """Return True if the traced update has an autocast region that is on, or a scaler at work."""
    assert seen.trace is not None
    return bool(_amp(seen.trace)) or any(scaler.is_enabled() for scaler in seen.trace.execution.scalers)


def _findings(seen: ScriptTrace, trace: Trace, subject: ScriptSubject) -> list[Finding]:
    found = recipe_findings(subject, trace)
    explained = found and refused_by_scaler(trace)
    if isinstance(trace.error, Exception) and not isinstance(trace.error, EOFError) and not explained:
        found.append(failure(trace, NAME))
    if _amp(trace):
        found += model_findings(trace, NAME, subject.device.type)
    origin = trace.lineage.first
    if origin is not None:
        rows = [*seen.ranges["layers"], *seen.ranges["activations"]] if seen.ranges else []
        finite = not any(row["nonfinite"] for row in rows) if rows else origin.output == "float16" or None
        finding = nonfinite(origin, NAME, overflow=finite, scale=None, spoiled=[])
        if seen.skipped and origin.phase == "backward":
            finding.level = "note"
            finding.message += f" The scaler skipped the update at scale {trace.execution.scale:,.10g}, as it should."
        found.append(finding)
    elif seen.ranges is not None and torch.float16 in _amp(trace):
        places = {product.module: product.place for product in trace.products if product.phase != "backward"}
        found += range_findings(seen.ranges, places)
    return found


def _regions(trace: Trace) -> str:
    regions: dict[str, list[str]] = {}
    for event in _regions_on(trace):
        regions.setdefault(dtype_name(event.details["dtype"]), []).append(str(event.place))
    if not regions:
        return f"no autocast region was on for {trace.execution.device}"
    return "; ".join(f"autocast to {name} at {', '.join(dict.fromkeys(at))}" for name, at in regions.items())


def _words(seen: ScriptTrace, trace: Trace, subject: ScriptSubject) -> list[str]:
    """Say in sentences what the update consisted of."""
    execution: Any = trace.execution
    models = []
    for name, model in subject.models.items():
        kind = type(core(model)).__name__
        size = sum(parameter.numel() for parameter in model.parameters())
        models.append(f"{name + ', a ' if name else ''}{kind} ({size:,} parameters)")
    words = [f"Models: {'; '.join(models)}." if subject.called else "No torch.nn.Module with parameters was called."]
    count = sum(event.kind == "backward" for event in execution.events)
    places = dict.fromkeys(str(event.place) for event in execution.events if event.kind == "backward")
    words.append(f"Backward passes: {count} ({', '.join(places) or 'none'}).")
    steps = [f"{name} ({place})" for name, place in execution.stepped]
    words.append(f"Optimizer steps: {', '.join(steps) or 'none'}.")
    if not seen.whole:
        words.append("The program failed in the middle of it.")
    scalers = [scaler for scaler in execution.scalers if scaler.is_enabled()]
    if scalers:
        fate = "; the update was skipped" if seen.skipped else ""
        words.append(f"GradScaler at scale {execution.scale:,.10g}{fate}.")
    if seen.updates.compiled:
        words.append("Models of torch.compile were traced as they were written.")
    if seen.ranges is not None:
        words.append(
            f"Underflow and ranges are those of update {seen.number + 1}, which was computed in float32 to see the "
            "true gradients."
        )
    elif seen.poisoned:
        words.append(f"Update {seen.number} left weights that are not finite, so it was the last to look at.")
    elif seen.whole:
        words.append(
            "Underflow and ranges need one more update, computed in float32: "
            + (
                "--go-on leaves it as it is written."
                if seen.finished is not None
                else "the program did not get to its end."
            )
        )
    return words


def nothing_traced(updates: Updates, number: int) -> str:
    """Say in one sentence what was seen in place of the update that was to be traced."""
    if updates.count:
        made = "one update" if updates.count == 1 else f"{updates.count} updates"
        what = f"the program made {made}, and update {number} was to be traced"
        return f"{what}: let it make more" + (f", or name --update {updates.count}." if updates.count > 1 else ".")
    passes = ", ".join(f"{count} of {name}" for name, count in updates.forwards.most_common(3))
    seen = f"forward passes ({passes})" if passes else "no call of a torch.nn.Module"
    if updates.optimizers:
        return "the program ended in its first update: let it make more."
    if updates.backwards:
        return f"no optimizer of torch.optim stepped: {updates.backwards} backward passes and {seen} were seen."
    if updates.children:
        return (
            f"no optimizer stepped in this process: {seen} and {updates.children} other processes were seen. If one of "
            "those trains, start ampscope in it."
        )
    return f"no optimizer stepped: {'only ' if passes else ''}{seen} was seen.".replace(") was", ") were")
