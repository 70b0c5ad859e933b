"""Write the messages about a run that fails: the values that are not finite, where, why, and what to do.

Knows nothing of how the numbers were computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precision import Precision, wider_range
from runs.checkpoint import Progress
from runs.evaluation import Evaluation, NotFinite, way_out
from utils import RunError, typed

Found = dict[str, Any] | None  # see ampscope.events.second_look


class Diagnosed(RunError):
    """A failure of a training; `found` is the result of a second look at it, for failure.json."""

    def __init__(self, text: str, found: Found):
        super().__init__(text)
        self.record = {"second_look": found} if found else {}


@dataclass(frozen=True)
class Failures:
    """Create the errors and warnings of the run in `folder`, which trains in `precision`."""

    folder: Path
    precision: Precision
    updates_per_epoch: int

    def not_finite(self, quantity: str, state: Progress, update: int, found: Found) -> RunError:
        """Return the error for a training whose `quantity` (loss or gradient) is not finite in an update."""
        kept = f"best_model.pt of epoch {state.best_epoch}" if state.epoch else "none is of a finished epoch"
        best = self.folder / "best_model.pt" if state.epoch else None
        way = "" if found and found["cures"] else f"\n{_usual_cause(best, first=state.epoch == 0 and update == 1)}"
        return Diagnosed(
            f"the {quantity} is not finite in epoch {state.epoch + 1}, update {update} of {self.updates_per_epoch} "
            f"({self.precision.label}). Last good checkpoint: {kept} ({self.folder}).{_looked(found)}{way}",
            found,
        )

    def bad_validation(
        self, state: Progress, evaluation: Evaluation, spoiled: list[str], found: Found = None
    ) -> RunError:
        """Return the error for a validation that is not finite after an epoch that trained well.

        `spoiled` are the names of the buffers that hold NaN.
        """
        subject = "logits are" if math.isfinite(evaluation.loss_sum) else "loss is"
        if spoiled:
            best = self.folder / "best_model.pt"
            way = f"from the best epoch: {typed('--pretrained_path', best)}" if state.epoch else "with --overwrite"
            return RunError(
                f"the validation {subject} not finite in epoch {state.epoch + 1} ({self.precision.label}), because "
                f"buffers of the model hold NaN, such as {spoiled[0]}: a forward pass overflowed into its statistics. "
                f"No precision mends them.\nBegin another run {way}."
            )
        last = self.folder / "last.pt"
        precisions = f"fp32,{self.precision.name}"
        error = NotFinite(
            f"the validation {subject} not finite in epoch {state.epoch + 1} ({self.precision.label}). The epoch's "
            f"training is saved; a resume begins with this validation.{_looked(found)}\n"
            f"{way_out(self.precision, 'go on with --resume')}\nTo compare precisions on these weights, run: "
            + typed("python", "main.py", "evaluate", "--checkpoint", last, "--precisions", precisions)
        )
        error.record = error.record | {"second_look": found} if found else error.record
        return error

    def skipped_for_its_loss(self, state: Progress, update: int, found: Found) -> str:
        """Return the warning for an update that was skipped because of its forward pass."""
        return (
            f"epoch {state.epoch + 1}, update {update} was skipped because its loss is not finite, which a lower loss "
            f"scale does not cure.{_looked(found)}"
        )

    def scale_below_one(self, scale: float, state: Progress, found: Found) -> str:
        """Return the warning for a loss scale below 1."""
        first = f" The backward pass met it first at {state.skips[0]['parameter']}." if state.skips else ""
        return (
            f"the loss scale fell to {scale:g}. Below 1 float16 gradients overflow whatever the scale: the run has "
            f"probably diverged.{first} Begin another with a lower --learning_rate, or with "
            f"{wider_range(self.precision)}.{_looked(found)}"
        )

    def scale_exhausted(self, scale: float, state: Progress, found: Found) -> RunError:
        """Return the error for a loss scale so small that no update can succeed any more."""
        return Diagnosed(
            f"every update overflows in float16 (loss scale {scale:g}, epoch {state.epoch + 1}): the run has diverged. "
            f"What was saved before is intact in {self.folder}. Begin another run with a lower --learning_rate, or "
            f"with {wider_range(self.precision)}.{_looked(found)}",
            found,
        )


def _looked(found: Found) -> str:
    """Return the result of a second look and the remedy as a line of its own; "" if it found nothing."""
    if not found or not found["text"]:
        return ""
    ways = found["cures"][:2]
    if found.get("overflow") and found["phase"] == "forward" and found["module"]:
        ways = [typed("--float32_layers", found["module"]), *ways[-1:]]
    cure = f" What may help: {'; or '.join(ways)}." if ways else ""
    return f"\nLooked at again: {found['text']}.{cure}"


def _usual_cause(best: Path | None, *, first: bool) -> str:
    """Return the usual cause of a loss that is not finite, and the remedy; `best` is the checkpoint to restart from.

    Before the `first` update the learning rate cannot be the cause. A resumed run keeps its options, so a new run is
    needed.
    """
    if first:
        return (
            "No update was made before it, so the weights that the run began from are the usual cause: begin from "
            "others (--pretrained_path, --weights, --pretrained 0), or with their own --normalize."
        )
    begin = "Begin another run with a lower --learning_rate, more --warmup_epochs or --clip_grad_norm"
    weights = f", from the best epoch: {typed('--pretrained_path', best)}" if best else ""
    return f"A learning rate that is too high is the usual cause. {begin}{weights}."
