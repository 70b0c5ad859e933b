"""Report what AMP does to a model in one update: a run's, a new one, or the user's with `--module FILE.py:make`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ampscope import InspectError, inspect_step, layer_errors
from ampscope.module import broken_rules, show, show_layers
from assemble import Setup, new_model, set_up, trained_model, training_batches, update_shape
from images.asked import data_to_train_on
from reports.results import read_metrics
from utils import RunError, UserError, open_page

if TYPE_CHECKING:
    from command_line.groups import Asked, Inspection
    from distributed import Ranks

ROOT = str(Path(__file__).resolve().parent.parent)
# Once the library is imported, this program's folder leaves the path: `import evaluate` in a user's file then finds
# the package of that name. -P keeps the working folder, which may be the checkout, off the path.
START = (
    "import sys; root = sys.argv.pop(1); sys.path.insert(0, root); from ampscope.cli import main; "
    "sys.path.remove(root); sys.exit(main())"
)


def inspect(asked: Asked, ranks: Ranks, own: Inspection) -> None:
    """Print the report, and write JSON, pictures and a page into --out."""
    try:
        _inspect(asked, ranks, own)
    finally:
        page = Path(own.out) / "inspect.html"
        if own.open and page.exists():
            open_page(page)


def _inspect(asked: Asked, ranks: Ranks, own: Inspection) -> None:
    place = asked.place
    device = asked.computing.device
    words = [f"--out={own.out}", *(["--full"] if own.full else []), *(["--strict"] if own.strict else [])]
    if own.script is not None:
        trace_script([*words, own.script, *(own.inputs or [])])
        return
    if own.module is not None:
        words += [] if device == "auto" else [f"--device={device}"]
        words += [f"--precisions={','.join(own.precisions)}"] if own.precisions else []
        words += [f"--diary={own.diary}"] if own.diary else []
        words += [f"--{name}" for name in ("layers", "find_layers") if getattr(own, name)]
        call_library(["inspect", own.module, *words])
        return
    file = own.diary or (
        Path(place.checkpoint_dir) / place.checkpoint_name / "metrics.jsonl" if place.checkpoint_name else None
    )
    metrics = read_metrics(Path(file)) if file else []
    try:
        step = classifier_step(set_up(asked, ranks))
        if own.layers or own.find_layers:
            show_layers(layer_errors(*step, precisions=own.precisions, find=own.find_layers), own.out)
            return
        scales = [line["loss_scale"] for line in metrics if (line.get("loss_scale") or 1) != 1]
        scale = scales[-1] if scales else None
        report = inspect_step(*step, precisions=own.precisions, metrics=metrics, scaler_scale=scale)
        show(report, out=own.out, full=own.full)
    except InspectError as error:
        raise UserError(str(error)) from error
    if own.strict and not report.ok:
        raise RunError(broken_rules(report))


def call_library(words: list[str]) -> None:
    """Run `ampscope` in a process of its own, in which no module of this program hides one of the user's.

    Raise UserError or RunError with the library's message if it fails.
    """
    command = [sys.executable, "-P", "-c", START, ROOT, *words]
    reason = ""
    with tempfile.TemporaryFile("w+", errors="replace") as report:
        with subprocess.Popen(command, stdout=report, stderr=subprocess.PIPE, text=True, errors="replace") as process:
            for line in process.stderr or ():  # shown at once: it says how long the rest takes
                if reason or line.startswith("error: "):
                    reason += line
                else:
                    print(line, end="", file=sys.stderr, flush=True)
        report.seek(0)
        print(report.read(), end="")
    if process.returncode:
        reason = reason.removeprefix("error: ").strip() or f"it ended with {process.returncode}"
        raise (UserError if process.returncode == 2 else RunError)(reason)


def trace_script(words: list[str]) -> None:
    """Run `ampscope run` on a training script, whose output and errors are its own.

    Raise UserError or RunError if it, or the script, does not end with 0.
    """
    done = subprocess.run([sys.executable, "-P", "-c", START, ROOT, "run", *words], check=False)
    if done.returncode:
        raise (UserError if done.returncode == 2 else RunError)(f"the script's trace ended with {done.returncode}")


def classifier_step(setup: Setup) -> tuple[nn.Module, Any, Callable[[Any, Any], torch.Tensor]]:
    """Return the model of a run, or a new one, a batch of the data set, and the loss."""
    stored = setup.checkpoint
    classes = stored["classes"] if stored else None
    data = data_to_train_on(setup.asked, setup.ranks, setup.preprocess, classes=classes)
    images, labels, *_ = next(next(training_batches(setup, data, update_shape(setup)).epoch(0)))
    model = trained_model(setup, stored).train() if stored else new_model(setup, len(data.classes))
    return model, (images, labels), lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])
