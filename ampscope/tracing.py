"""Trace one step: each operator as it ran below autocast, with types, casts, module, line of the user's code, time.

Two modes watch together. The function mode sees calls as they are written, above autocast; the dispatch mode sees
what really ran, below it. Models of torch.compile run eagerly meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from ampscope.execution import Event, Execution
from ampscope.finite import Lineage
from ampscope.functions import Functions
from ampscope.operators import Operators
from ampscope.places import Place, kind_of_file
from ampscope.precisions import Precision
from ampscope.subject import Subject
from ampscope.trace import Trace


def eager() -> Any:
    """Run models of torch.compile as they were written; without one, nothing is imported."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def trace_step(
    subject: Subject, precision: Precision | None, *, ambient: bool = True, scale: float = 1.0, warm: bool = True
) -> Trace:
    """Trace the second of two steps, in which gradients and the optimizers' state are there already.

    `first_events` are the first one's: a scaler that is used wrongly often raises in the second. An error of the step
    does not end the trace: it is kept in `error`, with its place.
    """
    first_events: list[Event] = []
    left: dict[int, torch.Tensor] = {}
    first_ended = False
    if warm:
        first = Execution(subject, precision, ambient=ambient, scale=scale)
        with contextlib.suppress(Exception), eager():
            torch.manual_seed(0)
            first.run()
            first_ended = True
        first.put_back()
        if first.calls_backward and not first.scalers and not _finite(subject):
            subject.rewind()  # what this run made of the weights is no fault of the next one
        first_events = first.events
        left = first.carried.left
        for optimizer in subject.optimizers.values():
            if not first.calls_backward:
                optimizer.zero_grad()
    execution = Execution(subject, precision, ambient=ambient, scale=scale)
    execution.carried.left |= left
    trace = Trace(execution, Lineage(), first_events=first_events, first_ended=first_ended)
    trace.lineage.expect(subject)
    functions = Functions(trace)
    operators = Operators(trace, functions, subject)
    torch.manual_seed(0)
    modes = contextlib.ExitStack()
    try:
        with eager():
            modes.enter_context(functions)
            modes.enter_context(operators)
            execution.run(modes=modes)
    except Exception as error:
        trace.error = error
        trace.error_place = place_of_error(error)
    finally:
        modes.close()
        for hook in operators.hooks:
            hook.remove()
        trace.lineage.finish([*execution.roots])
        execution.put_back()
    functions.written.clear()
    return trace


def _finite(subject: Subject) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in subject.parameters())


def place_of_error(error: BaseException) -> Place | None:
    """Return the innermost line of the user's, or of a library's, in a traceback."""
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        kind = kind_of_file(code.co_filename)
        if kind == "user" or (kind == "library" and (found is None or not found.own)):
            found = Place(code.co_filename, traceback.tb_lineno, code.co_name, kind)
        traceback = traceback.tb_next
    return found
