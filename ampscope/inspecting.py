"""`inspect_step`: what AMP does to any PyTorch model, from one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ampscope import payoff
from ampscope.content import product_record, subject_record
from ampscope.errors import InspectError
from ampscope.findings import Finding, by_place
from ampscope.memory import memory_ledger
from ampscope.model_rules import failure, model_findings, nonfinite, range_findings, wide_products
from ampscope.places import Place, count_as_users
from ampscope.precisions import Precision, named_precision, sensible_precisions
from ampscope.ranges import measure_ranges
from ampscope.recipe_rules import recipe_findings
from ampscope.report import Report
from ampscope.subject import Subject, core
from ampscope.tensors import buffers_not_finite, dtype_name
from ampscope.trace import Trace
from ampscope.tracing import place_of_error, trace_step

log = logging.getLogger("ampscope")
LONG = 1.0  # seconds of a traced step from which it runs as rarely as can be
SHORT = 3.0  # seconds that a CPU may take for a step in float16, which it emulates
QUICK = 0.03  # seconds of a step that no CPU makes longer than SHORT in float16
WORTH_SAYING = 10.0  # seconds; what takes longer is announced
FLOAT16 = ("overflow-hidden", "unsafe-function")
SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)  # that a scaler which starts at the first would come down to


def inspect_step(
    model: nn.Module | Mapping[str, nn.Module],
    batch: Any,
    loss: Callable | None = None,
    *,
    step: Callable | None = None,
    optimizers: Any = None,
    scaler: Any = None,
    precisions: Sequence[str] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    scaler_scale: float | None = None,
    speed: bool = True,
) -> Report:
    """Run a training step in each precision and report what AMP does to it.

    The step has one of three forms. `loss(outputs, batch)`: the model is called with what its `forward` requires of
    the batch (any nesting of tensors). `step(model, batch)` returns the loss; or it is the whole training step, with
    its own autocast, scaler, backward and optimizer, which is then also judged as it is written. `model` may be a
    dictionary of models by name, `optimizers` an optimizer, a list or a dictionary; `step` may take `optimizer`,
    `optimizers` and `scaler` after (model, batch). Without a loss, the model's own is used (outputs.loss, or a
    dictionary of losses).

    Models, optimizers and scaler are put back as they were. `precisions` are names such as fp32, amp-bf16, amp-fp16;
    the default is what makes sense on the model's device. `metrics` are lines of a diary (see `watch`),
    `scaler_scale` is one more loss scale at which gradients are judged. Without `speed` nothing is timed.
    Raises InspectError if the arguments do not fit together or the step fails in every precision.
    """
    subject = Subject(model, batch, loss, step=step, optimizers=optimizers, scaler=scaler)
    for function in (subject.step, subject.loss):
        count_as_users(function)
    return Inspection(subject, precisions, metrics or [], scaler_scale).run(speed=speed)


class Inspection:
    """Inspect one step, part by part; each part leaves the models as it found them."""

    def __init__(
        self, subject: Subject, names: Sequence[str] | None, metrics: list[dict[str, Any]], scaler_scale: float | None
    ):
        self.subject = subject
        self.metrics = metrics
        self.scaler_scale = scaler_scale
        self.names = names
        self.traces: dict[str, Trace] = {}
        self.precisions: dict[str, Precision] = {}
        self.scales: dict[str, dict[str, Any]] = {}
        self.spoiled: dict[str, list[str]] = {}  # buffers that the step left not finite
        self.everything: list[Finding] = []

    def run(self, *, speed: bool) -> Report:
        if not self.subject.parameters():
            names = ", ".join(type(core(model)).__name__ for model in self.subject.models.values())
            raise InspectError(f"{names} has no parameters, so that there is nothing to train.")
        try:
            return self._run(speed=speed)
        except StopIteration as error:
            raise _ended(error) from None

    def _run(self, *, speed: bool) -> Report:
        self.subject.materialise()
        written = self.trace_as_written()
        update = sum(written.seconds.values())
        self.long = update > LONG
        self._choose_precisions()
        self._announce(update, speed=speed)
        self._trace_all(written)
        ranges = self._ranges()
        self._judge_range(ranges)
        ran = [name for name, trace in self.traces.items() if trace.error is None and name in self.precisions]
        with self.subject.kept():
            memory = [self._memory(name) for name in ran]
            trains = not any(finding.rule == "trains-nothing" for finding in self.everything)
            pay = self._payoff(ran, memory) if speed and ran and trains else None
        self.subject.forget()
        content = self._content(written, ranges, memory, pay, ran)
        return Report(content, by_place(self.everything))

    def _prepare(self, precision: Precision) -> Precision:
        """Set the precision up again: on CUDA, float32's mode is a global switch."""
        return named_precision(precision.name, precision.device)

    def trace_as_written(self) -> Trace:
        """Run the step as its author wrote it, and judge its recipe."""
        subject = self.subject
        written, self.spoiled["as written"] = self._traced(None)
        if isinstance(written.error, (InspectError, StopIteration)):
            raise written.error
        regions = [event for event in written.execution.events if event.kind == "autocast"]
        on = [event for event in regions if event.details["enabled"] and event.details["device"] == subject.device.type]
        self.ambient = not on
        self.plain = not regions and not written.execution.scalers and subject.scaler is None
        self.written_types = {event.details["dtype"] for event in on}
        self.everything += recipe_findings(subject, written)
        return written

    def _choose_precisions(self) -> None:
        names = list(self.names or sensible_precisions(self.subject.device))
        if self.names is None and torch.float16 in self.written_types and "amp-fp16" not in names:
            names.append("amp-fp16")
        self.precisions = {name: named_precision(name, self.subject.device) for name in names}

    def _announce(self, update: float, *, speed: bool) -> None:
        """Say how long the rest takes, if it is long, from the seconds of an update."""
        rounds = payoff.LEAST if self.long else payoff.WARM + payoff.LEAST
        seconds = update * (1 + len(self.precisions) * (3 + (rounds if speed else 0)))
        if seconds > WORTH_SAYING:
            log.warning(f"An update takes about {update:.1f} s here; the report takes about {seconds:.0f} s more.")

    def _trace_all(self, written: Trace) -> None:
        for name in self.precisions:
            if name == "fp32" and self.plain and written.error is None:  # as written it was float32
                self.traces[name] = written
                self.spoiled[name] = self.spoiled["as written"]
                self.scales[name] = {"lowest": None, "scale": None, "first_overflow": None}
            else:
                self.traces[name] = self._trace(name)
        failed = [name for name, trace in self.traces.items() if trace.error is not None]
        if len(failed) == len(self.precisions) and not self.everything:
            trace = next(trace for trace in (written, *self.traces.values()) if trace.error is not None)
            raise InspectError(f"the step fails in every precision: {_in_words(trace)}.{self.subject.misfit}")
        if not refused_by_scaler(written) or not self.everything:
            for name, trace in [("as written", written), *self.traces.items()]:
                if trace.error is not None:
                    self.everything.append(failure(trace, name))
        for name, trace in self.traces.items():
            if trace.error is None and self.precisions[name].amp:
                self.everything += model_findings(trace, name, self.subject.device.type)
        if self._hides_float16(written):
            self.traces["amp-fp16"] = hidden = self._trace("amp-fp16")
            self.everything += self._of_float16_alone(hidden)
        self._judge_finite()

    def _hides_float16(self, written: Trace) -> bool:
        """Return True if a CPU's default precisions leave out float16, in which the step may run on a GPU."""
        if self.names is not None or self.subject.device.type != "cpu" or "amp-fp16" in self.traces:
            return False
        trains = not any(finding.rule == "trains-nothing" for finding in self.everything)
        if written.error is not None or not trains or self.written_types - {torch.float16}:
            return False
        seconds = sum(written.seconds.values())
        return seconds < QUICK or seconds * payoff.slower_in_float16(self.subject.device) < SHORT

    def _of_float16_alone(self, hidden: Trace) -> list[Finding]:
        """Return what float16 does and bfloat16 does not, without the operators that only the CPU lacks."""
        if hidden.error is not None:
            found = [failure(hidden, "amp-fp16")]
        else:
            found = [finding for finding in model_findings(hidden, "amp-fp16", "cpu") if finding.rule in FLOAT16]
        return [finding for finding in found if finding.level == "finding"]

    def _trace(self, name: str) -> Trace:
        """Trace one precision; if float16's backward overflows, at lower and lower loss scales, as GradScaler would."""
        precision = self._prepare(self.precisions.get(name) or named_precision(name, self.subject.device))
        scales = SCALES if precision.name == "amp-fp16" else (1.0,)
        first = None
        lowest = None  # of several loss scales that were tried
        for scale in scales:
            trace, self.spoiled[name] = self._traced(precision, scale)
            origin = trace.lineage.first
            first = first or origin
            execution = trace.execution
            if execution.calls_backward and not any(scaler.is_enabled() for scaler in execution.scalers):
                scales = (1.0,)  # the step calls backward itself, on a loss that nobody scales
            if trace.error is not None or origin is None or origin.phase != "backward" or len(scales) == 1:
                break
            lowest = scale
        self.scales[name] = {
            "lowest": lowest,
            "scale": scale if len(scales) > 1 else None,
            "first_overflow": first.record() if first is not None and len(scales) > 1 else None,
        }
        return trace

    def _traced(self, precision: Precision | None, scale: float | None = None) -> tuple[Trace, list[str]]:
        """Return the trace of a step, and the buffers that it left not finite."""
        subject = self.subject
        models = {prefix: core(model) for prefix, model in subject.models.items()}
        # A long step needs no warm-up, and float16 that is traced for its faults alone is not timed.
        warm = precision is None or not (self.long or precision.name not in self.precisions)
        ambient = precision is not None and self.ambient
        with subject.kept():
            before = buffers_not_finite(models)  # masks of -inf, which are no fault
            scaler = subject.scaler
            if scale not in (None, SCALES[0]) and scaler is not None and scaler.is_enabled():
                scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
            trace = trace_step(subject, precision, ambient=ambient, scale=scale or 1.0, warm=warm)
            after = buffers_not_finite(models)
        return trace, [buffer for buffer in after if buffer not in before]

    def _judge_finite(self) -> None:
        finite = any(
            trace.lineage.first is None and trace.error is None
            for name, trace in self.traces.items()
            if not named_precision(name, self.subject.device).amp
        )
        for name, trace in self.traces.items():
            origin = trace.lineage.first
            if origin is not None:
                lowest = self.scales[name]["lowest"]
                found = nonfinite(origin, name, overflow=finite, scale=lowest, spoiled=self.spoiled[name])
                self.everything.append(found)

    def _ranges(self) -> dict[str, Any] | None:
        modules = {
            product.module
            for name, trace in self.traces.items()
            if trace.error is None
            for product in trace.products
            if product.phase != "backward"
        }
        try:
            with self.subject.kept():
                self._prepare(named_precision("fp32", self.subject.device))
                return measure_ranges(self.subject, scaler_scale=self.scaler_scale, product_modules=modules)
        except Exception:
            if "fp32" in self.traces and self.traces["fp32"].error is None:
                raise
            return None  # the step does not run in float32, which the report says already

    def _judge_range(self, ranges: dict[str, Any] | None) -> None:
        """If float16 could not hold the activations, look for the place in float16 itself."""
        found = range_findings(ranges, self._places()) if ranges is not None else []
        hidden = "amp-fp16" not in self.precisions
        known = [finding for finding in self.everything if not hidden or finding.precision != "amp-fp16"]
        if found and not any(finding.rule.startswith("nonfinite") for finding in known):
            if "amp-fp16" not in self.traces:
                self.traces["amp-fp16"] = trace = self._trace("amp-fp16")
                if trace.error is None and trace.lineage.first is not None:
                    origin = trace.lineage.first
                    spoiled = self.spoiled["amp-fp16"]
                    found.append(nonfinite(origin, "amp-fp16", overflow=True, scale=None, spoiled=spoiled))
            self.everything += found

    def _places(self) -> dict[str, Place | None]:
        return {
            product.module: product.place
            for trace in self.traces.values()
            for product in trace.products
            if product.phase != "backward"
        }

    def _memory(self, name: str) -> dict[str, Any]:
        return memory_ledger(self.subject, self._prepare(self.precisions[name]), ambient=self.ambient)

    def _payoff(self, ran: list[str], memory: list[dict[str, Any]]) -> dict[str, Any]:
        some = [self.precisions[name] for name in ran]
        warm = 0 if self.long else payoff.WARM  # the ledger has just run the same updates
        speed = payoff.measure_speed(self.subject, some, self._prepare, ambient=self.ambient, warm=warm)
        roof = payoff.bounds(self.subject, some, speed, ambient=self.ambient)
        amp = next((precision for precision in some if precision.amp), None)
        base = ran[0] if not self.precisions[ran[0]].amp else None
        rates = roof["rates"] if roof else {}
        gain = rates[dtype_name(amp.dtype)] / rates["float32"] if amp is not None and roof else None
        ceiling = payoff.products_ceiling(self.traces[base], speed[base]["shortest"], gain) if base else None
        failed = {
            name: _in_words(trace)
            for name, trace in self.traces.items()
            if trace.error is not None and name in self.precisions
        }
        return {
            "speed": speed,
            "amdahl": ceiling,
            "roofline": roof,
            "recommendation": payoff.recommend(speed, memory, failed),
        }

    def _content(
        self, written: Trace, ranges: Any, memory: list, pay: dict[str, Any] | None, ran: list[str]
    ) -> dict[str, Any]:
        subject = self.subject
        form = "whole step" if written.execution.calls_backward else "step" if subject.step else "loss"
        kinds = {name: type(module).__name__ if name else "" for name, module in subject.named_modules()}
        dtypes = {name: self.traces[name].records(kinds) for name in ran}
        casts = {}
        for name in ran:
            casts[name] = payoff.cast_cost(self.traces[name], dtypes[name], subject.device)
            casts[name]["update_seconds"] = pay["speed"][name]["seconds"] if pay else None
        products = {
            name: [product_record(row) for row in wide_products(self.traces[name])]
            for name in ran
            if self.precisions[name].amp
        }
        return {
            "schema": 1,
            "torch": torch.__version__,
            "device": str(subject.device),
            "subject": subject_record(subject, written.execution, form, self.written_types),
            "precisions": {name: self._precision_record(name) for name in self.precisions},
            "dtypes": dtypes,
            "casts": casts,
            "memory": memory,
            "underflow": ranges,
            "scaler": self.metrics,
            "float32_products": products,
            "synchronisations": written.waits(),
            "payoff": pay,
        }

    def _precision_record(self, name: str) -> dict[str, Any]:
        precision = self.precisions[name]
        trace = self.traces[name]
        origin = trace.lineage.first
        return {
            "label": precision.label,
            "reason": precision.reason,
            "error": _in_words(trace) if trace.error is not None else None,
            "loss_scale": self.scales[name]["scale"],
            "first_overflow": self.scales[name]["first_overflow"],
            "first_nonfinite": origin.record() if origin is not None else None,
        }


def refused_by_scaler(trace: Trace) -> bool:
    """Return True if GradScaler itself raised the step's error."""
    traceback = trace.error.__traceback__ if trace.error is not None else None
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_filename.endswith("grad_scaler.py")


def _ended(error: StopIteration) -> InspectError:
    place = place_of_error(error)
    where = f" ({place})" if place else ""
    return InspectError(
        f"an iterator of the step has no more batches{where}: the step is run some thirty times. Let it use the batch "
        "that it is given, or itertools.cycle."
    )


def _in_words(trace: Trace) -> str:
    text = " ".join(str(trace.error).split())[:300]
    where = f" ({trace.error_place})" if trace.error_place else ""
    return f"{type(trace.error).__name__}: {text}{where}"


__all__ = ["Inspection", "inspect_step"]
