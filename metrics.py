"""An epoch's numbers: left on the device by each update, read back now and then, summed, and turned into a line.

Also the alarms: a loss or gradient that is not finite, a loss scale that falls. Knows nothing of files or options.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from choices import METRICS
from distributed import Ranks
from evaluate import Evaluation, NotFinite, way_out
from model import Forward
from precision import Precision, wider_range
from runs.checkpoint import Progress
from system.machine import peak_memory, reset_peak_memory
from system.waiting import Waiting
from utils import RunError, amount, log, typed


def best_epochs(history: list[dict[str, Any]], name: str) -> list[int]:
    """Return the epochs (from 1) that are the best by the metric `name`: one, or more if nothing tells them apart.

    Of equal values the one with the lower validation loss is better: on few validation images accuracies are often
    equal, while the loss still falls. Only epochs with the image size of the last one count. An epoch whose value or
    loss is NaN is never the best.
    """
    metric = METRICS[name]
    sign = 1 if metric.larger_is_better else -1
    same_size = [line for line in history if line.get("image_size") == history[-1].get("image_size")]
    scores = {
        line["epoch"]: (sign * line[metric.validation_key], -line["val_loss"])
        for line in same_size
        if not math.isnan(line[metric.validation_key] + line["val_loss"])
    }
    best = max(scores.values(), default=None)
    return [epoch for epoch, score in scores.items() if score == best]


class UpdateRecord:
    """What one update leaves on the device: nothing here waits for it."""

    def __init__(self) -> None:
        self.loss_sum = torch.zeros(())
        self.correct = torch.zeros(())
        self.gradients: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: int) -> None:
        """Adds a micro-batch: its loss (a sum), logits (count, classes), and labels or their probabilities."""
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        right = (logits.argmax(1) == class_indices(labels)) & logits.isfinite().all(1)
        self.correct = self.correct.to(loss.device) + weight * right.sum()

    def gradient_norm(self, model: Forward, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """The L2 norm of all gradients; notes which parameter's is bad, and the loss scale before it changes."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = iter(torch._foreach_norm([parameter.grad for parameter in trained if parameter.grad is not None]))
        none = torch.zeros_like(self.loss_sum)  # of a parameter that the forward pass does not use
        norms = torch.stack([none if parameter.grad is None else next(found) for parameter in trained])
        norm = torch.linalg.vector_norm(norms)
        last_bad = len(norms) - 1 - norms.isfinite().logical_not().flip(0).float().argmax()
        loss_scale = scaler.scale(torch.ones_like(self.loss_sum))  # on the device: get_scale() would wait for it
        self.gradients = [norm, last_bad.float(), loss_scale.float()]
        return norm

    def row(self) -> torch.Tensor:
        """(5,): loss sum, correct predictions, gradient norm, index of the last trained parameter whose gradient is
        not finite (the first that the backward pass reached), loss scale."""
        return torch.stack([self.loss_sum.float(), self.correct.float(), *self.gradients])


def class_indices(labels: torch.Tensor) -> torch.Tensor:
    """Class indices of labels that may be probabilities (count, classes) after MixUp or CutMix."""
    return labels.argmax(1) if labels.ndim > 1 else labels


class UnusedParameters:
    """Names the trained parameters that have no gradient when `optimizer` makes the next step that is `due`.

    The forward pass does not use them, so that they stay as they are. Nothing waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        self.model = model
        self.due = False
        self._named: set[str] = set()
        optimizer.register_step_pre_hook(self._look)

    def _look(self, *_: object) -> None:
        if not self.due:
            return
        self.due = False
        trained = {name: part for name, part in self.model.named_parameters() if part.requires_grad}
        missing = [name for name, part in trained.items() if part.grad is None and name not in self._named]
        self._named.update(missing)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            log.warning(
                f"{amount(len(missing), 'trained parameter gets', 'trained parameters get')} no gradient, because the "
                f"forward pass does not use {'it' if len(missing) == 1 else 'them'}: {shown}"
            )


def what_caused(best: Path | None, *, first: bool) -> str:
    """Return the usual cause of a loss that is not finite, and what helps; `best` are weights to go on from.

    Before the `first` update no learning rate can be the cause. A resume keeps its options, so another run is needed.
    """
    if first:
        return (
            "No update was made before it, so the weights that the run began from are the usual cause: begin from "
            "others (--pretrained_path, --weights, --pretrained 0), or with their own --normalize."
        )
    begin = "Begin another run with a lower --learning_rate, more --warmup_epochs or --clip_grad_norm"
    weights = f", from the best epoch: {typed('--pretrained_path', best)}" if best else ""
    return f"A learning rate that is too high is the usual cause. {begin}{weights}."


class Meter:
    """Sums up what updates recorded, in the `Progress` of the run in `folder`."""

    def __init__(
        self, folder: Path, precision: Precision, scaler: torch.amp.GradScaler, ranks: Ranks, updates_per_epoch: int
    ):
        self.folder = folder
        self.precision = precision
        self.scaler = scaler
        self.ranks = ranks
        self.updates_per_epoch = updates_per_epoch
        self.warming = True  # this epoch's peak memory holds what comes once, such as cuDNN's searches
        self.waiting = Waiting()  # since the epoch began
        self._unread: list[torch.Tensor] = []
        self._scale_warned = False

    def add(self, row: torch.Tensor) -> None:
        """Keeps the row (5,) of an update, on the device, until `read`."""
        self._unread.append(row)

    def read(self, at: Progress, parameters: list[str], batch_sizes: list[int]) -> None:
        """Reads what the updates since the last reading left on the device: the only wait for it.

        `parameters` names those that are trained, `batch_sizes` are the images of each update that was not read.
        Raises RunError if the run cannot go on.
        """
        begun = at.update - len(self._unread)
        records = torch.stack(self._unread)
        totals = records[:, :2].contiguous()
        self.ranks.sum(totals)  # loss and correct predictions are per rank, the rest is the same on all
        rows = torch.cat([totals, records[:, 2:]], 1).tolist()
        self._unread.clear()
        for update, (row, count) in enumerate(zip(rows, batch_sizes, strict=True), begun + 1):
            loss, correct, norm, bad, scale = row
            finite = math.isfinite(norm)
            if not finite and not self.scaler.is_enabled():
                raise self.not_finite("gradient" if math.isfinite(loss) else "loss", at, update)
            at.sums["images"] += count
            at.sums["correct"] += correct
            if finite:
                at.sums["loss"] += loss
                at.sums["norm"] += norm
                at.sums["updates"] += 1
                at.sums["counted"] += count
            else:
                number = at.epoch * self.updates_per_epoch + update
                at.skips.append({"update": number, "parameter": parameters[int(bad)], "scale": scale})
        self._watch_scale(at)

    @property
    def unread(self) -> int:
        """How many updates were not read yet."""
        return len(self._unread)

    def readings(self, at: Progress) -> dict[str, str]:
        """What a bar shows: no more than fits 80 columns."""
        shown = {
            "loss": f"{at.sums['loss'] / max(1, at.sums['counted']):.3f}",
            "acc": f"{100 * at.sums['correct'] / max(1, at.sums['images']):.1f}%",
        }
        if self.scaler.is_enabled():
            shown |= {"scale": f"{self.scaler.get_scale():g}", "skipped": str(len(at.skips))}
        return shown

    def bad_validation(self, at: Progress, found: Evaluation, spoiled: list[str]) -> RunError:
        """Return the end of a run whose validation is not finite after an epoch that trained well.

        `spoiled` names the buffers that hold NaN.
        """
        what = "logits are" if math.isfinite(found.loss_sum) else "loss is"
        if spoiled:
            best = self.folder / "best_model.pt"
            way = f"from the best epoch: {typed('--pretrained_path', best)}" if at.epoch else "with --overwrite"
            return RunError(
                f"the validation {what} not finite in epoch {at.epoch + 1} ({self.precision.label}), because buffers "
                f"of the model hold NaN, such as {spoiled[0]}: a forward pass overflowed into its statistics. No "
                f"precision mends them.\nBegin another run {way}."
            )
        last = self.folder / "last.pt"
        precisions = f"fp32,{self.precision.name}"
        return NotFinite(
            f"the validation {what} not finite in epoch {at.epoch + 1} ({self.precision.label}). The epoch's training "
            f"is saved; a resume begins with this validation.\n"
            f"{way_out(self.precision, 'go on with --resume')}\nWhat each precision makes of the weights: "
            + typed("python", "main.py", "evaluate", "--checkpoint", last, "--precisions", precisions)
        )

    def not_finite(self, what: str, at: Progress, update: int) -> RunError:
        """The end of a run whose `what` is not finite, in words."""
        kept = f"best_model.pt of epoch {at.best_epoch}" if at.epoch else "none is of a finished epoch"
        best = self.folder / "best_model.pt" if at.epoch else None
        way = what_caused(best, first=at.epoch == 0 and update == 1)
        return RunError(
            f"the {what} is not finite in epoch {at.epoch + 1}, update {update} of {self.updates_per_epoch} "
            f"({self.precision.label}). Last good checkpoint: {kept} ({self.folder}).\n{way}"
        )

    def _watch_scale(self, at: Progress) -> None:
        if not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        if scale < 1 and not self._scale_warned:
            self._scale_warned = True
            where = f" The backward pass met it first at {at.skips[0]['parameter']}." if at.skips else ""
            log.warning(
                f"the loss scale fell to {scale:g}. Below 1 float16 gradients overflow whatever the scale: "
                f"the run has probably diverged.{where} Begin another with a lower --learning_rate, or with "
                f"{wider_range(self.precision)}."
            )
        if scale < 2.0**-20:
            raise RunError(
                f"every update overflows in float16 (loss scale {scale:g}, epoch {at.epoch + 1}): the run "
                f"has diverged. What was saved before is intact in {self.folder}. Begin another run with a lower "
                f"--learning_rate, or with {wider_range(self.precision)}."
            )

    def line(self, at: Progress, found: Evaluation, device: torch.device, *, size: int, trained: int) -> dict[str, Any]:
        """Return a line of metrics.jsonl; losses are means in nats, accuracies percent, times seconds, memory MB.

        The epoch had images of `size` pixels, and trained so many tensors.
        """
        memory = peak_memory(device)
        at.note_peak(size, trained, memory["peak_memory_mb"], warming=self.warming)
        sums = at.sums
        busy = self.waiting.share()
        return {
            "epoch": at.epoch + 1,
            "updates": (at.epoch + 1) * self.updates_per_epoch,
            "train_loss": sums["loss"] / sums["counted"] if sums["counted"] else None,
            "train_acc": 100 * sums["correct"] / sums["images"],
            **{metric.validation_key: metric.compute(found) for metric in METRICS.values()},
            "learning_rate": at.learning_rate,
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "skipped_updates": len(at.skips),
            "grad_norm": sums["norm"] / max(1, sums["updates"]),
            "images_per_second": round(sums["images"] / at.epoch_seconds, 2),
            "data_wait_share": round(at.epoch_waited / at.epoch_seconds, 4),
            "busy_share": None if busy is None else round(busy, 4),
            "seconds": round(at.epoch_seconds, 3),
            "elapsed": round(at.elapsed, 3),
            "peak_memory_mb": memory["peak_memory_mb"],
            "skips": at.skips,
            "image_size": size,
        }

    def next_epoch(self, device: torch.device) -> None:
        """After an epoch that warmed up, peak memory is measured anew; after each, the waiting for processors."""
        self.waiting = Waiting()
        if self.warming:
            self.warming = False
            reset_peak_memory(device)
