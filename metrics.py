"""The numbers of an epoch: left on the device by each update, read now and then, summed, and turned into a line.

Also the alarms: a loss or gradient that is not finite, a loss scale that falls (their words are in runs/failures.py).
Knows nothing of files or options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from choices import METRICS
from distributed import Ranks
from model import StepModel
from runs.checkpoint import Progress
from runs.evaluation import Evaluation
from runs.failures import Failures
from runs.writing import PROBABILITIES
from system.machine import peak_memory, reset_peak_memory
from system.waiting import Waiting
from utils import UserError, amount, log

# Look again at an update of an epoch (both from 0), at a loss scale: runs/second_look.py.
Look = Callable[[int, int, float], dict[str, Any] | None]


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


def require_figure(name: str, labels: np.ndarray, class_count: int) -> None:
    """Raise UserError if the metric `name` would be undefined for validation images with these labels."""
    metric = METRICS[name]
    if not metric.needs:
        return
    kept = len(labels) if class_count <= PROBABILITIES else 0
    perfect = Evaluation(labels, labels, class_count, 0.0, logits=np.zeros((kept, class_count), np.float32))
    if math.isnan(metric.compute(perfect)):
        raise UserError(f"--best_by {name} needs {metric.needs}, for validation: choose another figure.")


class UpdateStats(NamedTuple):
    """Numbers of one update, on the device until `Meter.read`: a tensor of shape () each."""

    loss_sum: torch.Tensor  # over this rank's images
    correct: torch.Tensor  # predictions for this rank's images
    gradient_norm: torch.Tensor  # L2, of all ranks
    last_bad: torch.Tensor  # index of the last trained parameter whose gradient is not finite
    loss_scale: torch.Tensor


class UpdateRecord:
    """Collect the `UpdateStats` of one update without waiting for the device."""

    def __init__(self) -> None:
        self.loss_sum = torch.zeros(())
        self.correct = torch.zeros(())
        self.gradients: tuple[torch.Tensor, ...] = ()

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, weight: int) -> None:
        """Add a micro-batch: its loss (a sum), logits (count, classes), and class indices or probabilities."""
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        right = (logits.argmax(1) == class_indices(labels)) & logits.isfinite().all(1)
        self.correct = self.correct.to(loss.device) + weight * right.sum()

    def gradient_norm(self, model: StepModel, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Return the L2 norm of all gradients; note which one is bad, and the loss scale before it changes."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = iter(torch._foreach_norm([parameter.grad for parameter in trained if parameter.grad is not None]))
        zero = torch.zeros_like(self.loss_sum)  # of a parameter that the forward pass does not use
        norms = torch.stack([zero if parameter.grad is None else next(found) for parameter in trained])
        norm = torch.linalg.vector_norm(norms)
        # The backward pass reaches the last parameter first, so the last bad gradient is where the overflow began.
        # argmax finds the first True: it searches the reversed list.
        bad = norms.isfinite().logical_not()
        last_bad = len(norms) - 1 - bad.flip(0).float().argmax()
        loss_scale = scaler.scale(torch.ones_like(self.loss_sum))  # on the device: get_scale() would wait for it
        self.gradients = (norm, last_bad.float(), loss_scale.float())
        return norm

    def stats(self) -> UpdateStats:
        """Return the numbers of the whole update."""
        return UpdateStats(self.loss_sum.float(), self.correct.float(), *self.gradients)


def class_indices(labels: torch.Tensor) -> torch.Tensor:
    """Return the class indices of labels, which are probabilities (count, classes) after MixUp or CutMix."""
    return labels.argmax(1) if labels.ndim > 1 else labels


class UnusedParameters:
    """Warn of the trained parameters that have no gradient in the next step of `optimizer` while this is `due`.

    The forward pass does not use them, so they never change. Nothing waits for the device.
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


class Meter:
    """Sum up the numbers of an epoch's updates in a run's `Progress`, and stop a run that cannot go on."""

    def __init__(self, failures: Failures, scaler: torch.amp.GradScaler, ranks: Ranks, look: Look):
        self.failures = failures
        self.look = look
        self.scaler = scaler
        self.ranks = ranks
        self.warming = True  # this epoch's peak memory includes memory taken once, such as cuDNN's searches
        self.waiting = Waiting()  # since the epoch began
        self.stood: float | None = None  # memory in MB before this process's first update; None: unknown
        self._unread: list[UpdateStats] = []
        self._scale_warned = False
        self._loss_warned = False
        self._found: dict[str, Any] | None = None  # when the scale fell below 1

    def begin(self, device: torch.device) -> None:
        """Measure the waiting for processors and the memory from here on, and note the memory that stands already."""
        self.waiting = Waiting()
        self.stood = peak_memory(device)["peak_memory_mb"] if reset_peak_memory(device) else None

    def add(self, stats: UpdateStats) -> None:
        """Keep the numbers of an update on the device until `read`."""
        self._unread.append(stats)

    @property
    def unread(self) -> int:
        """Return the number of updates that were not read yet."""
        return len(self._unread)

    def read(self, state: Progress, parameters: list[str], image_counts: list[int]) -> None:
        """Read the numbers of all updates since the last reading, the only wait for the device, and add them up.

        `parameters` are the names of those that are trained, `image_counts` the images of each unread update. Raise
        RunError if the run cannot go on.
        """
        begun = state.update - len(self._unread)
        stats = torch.stack([torch.stack(update) for update in self._unread])
        of_ranks = stats[:, :2].contiguous()
        self.ranks.sum(of_ranks)  # loss and correct predictions; the rest is the same on all ranks
        rows = torch.cat([of_ranks, stats[:, 2:]], 1).tolist()
        self._unread.clear()
        for update, (row, image_count) in enumerate(zip(rows, image_counts, strict=True), begun + 1):
            loss_sum, correct, norm, last_bad, loss_scale = row
            finite = math.isfinite(norm)
            if not finite and not self.scaler.is_enabled():
                found = self.look(state.epoch, update - 1, 1.0)
                raise self.failures.not_finite("gradient" if math.isfinite(loss_sum) else "loss", state, update, found)
            state.sums["images"] += image_count
            state.sums["correct"] += correct
            if finite:
                state.sums["loss"] += loss_sum
                state.sums["norm"] += norm
                state.sums["updates"] += 1
                state.sums["counted"] += image_count
            else:
                number = state.epoch * self.failures.updates_per_epoch + update
                skip = {"update": number, "parameter": parameters[int(last_bad)], "scale": loss_scale}
                state.skips.append(skip)
                if not math.isfinite(loss_sum) and not self._loss_warned:
                    self._loss_warned = True
                    found = self.look(state.epoch, update - 1, loss_scale)
                    log.warning(self.failures.skipped_for_its_loss(state, update, found))
        self._watch_scale(state)

    def readings(self, state: Progress) -> dict[str, str]:
        """Return the figures for the progress bar, short enough for 80 columns."""
        sums = state.sums
        shown = {
            "loss": f"{sums['loss'] / max(1, sums['counted']):.3f}",
            "acc": f"{100 * sums['correct'] / max(1, sums['images']):.1f}%",
        }
        if self.scaler.is_enabled():
            shown |= {"scale": f"{self.scaler.get_scale():g}", "skipped": str(len(state.skips))}
        return shown

    def _watch_scale(self, state: Progress) -> None:
        """Warn once of a loss scale below 1; raise RunError if it is so small that every update overflows."""
        if not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        if scale < 1 and not self._scale_warned:
            self._scale_warned = True
            self._found = self._look_at_last_skip(state)
            log.warning(self.failures.scale_below_one(scale, state, self._found))
        if scale < 2.0**-20:
            raise self.failures.scale_exhausted(scale, state, self._look_at_last_skip(state) or self._found)

    def _look_at_last_skip(self, state: Progress) -> dict[str, Any] | None:
        """Look again at the last update of this epoch that was skipped, at its loss scale."""
        if not state.skips:
            return None
        last = state.skips[-1]
        return self.look(state.epoch, last["update"] - 1 - state.epoch * self.failures.updates_per_epoch, last["scale"])

    def line(
        self, state: Progress, validation: Evaluation, device: torch.device, *, best_by: str, size: int, trained: int
    ) -> dict[str, Any]:
        """Return a line of metrics.jsonl: mean losses in nats, accuracies in percent, times in seconds, memory in MB.

        The epoch had images of `size` pixels and trained `trained` tensors.
        """
        figures = [metric for name, metric in METRICS.items() if name == best_by or not metric.needs]
        memory = peak_memory(device)
        state.note_peak(size, trained, memory["peak_memory_mb"], warming=self.warming, stood=self.stood)
        sums = state.sums
        busy = self.waiting.share()
        return {
            "epoch": state.epoch + 1,
            "updates": (state.epoch + 1) * self.failures.updates_per_epoch,
            "train_loss": sums["loss"] / sums["counted"] if sums["counted"] else None,
            "train_acc": 100 * sums["correct"] / sums["images"],
            **{metric.validation_key: metric.compute(validation) for metric in figures},
            "learning_rate": state.learning_rate,
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "skipped_updates": len(state.skips),
            "grad_norm": sums["norm"] / max(1, sums["updates"]),
            "images_per_second": round(sums["images"] / state.epoch_seconds, 2),
            "data_wait_share": round(state.epoch_waited / state.epoch_seconds, 4),
            "busy_share": None if busy is None else round(busy, 4),
            "seconds": round(state.epoch_seconds, 3),
            "elapsed": round(state.elapsed, 3),
            "peak_memory_mb": memory["peak_memory_mb"],
            "skips": state.skips,
            "image_size": size,
        }

    def next_epoch(self, device: torch.device) -> None:
        """Measure the waiting for processors anew and, after an epoch that warmed up, the peak memory."""
        self.waiting = Waiting()
        if self.warming:
            self.warming = False
            reset_peak_memory(device)
