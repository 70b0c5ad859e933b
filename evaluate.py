"""Testing a classifier: one integer confusion matrix and a loss sum, and all that derives from them.

Ranks take strides of the images and add up once; nothing is padded, nothing counted twice. Runs in the
precision of the training. Knows nothing of optimisers or of where results are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batches
from precision import Precision, named_precision
from utils import Interrupted, progress


@dataclass(frozen=True)
class Evaluation:
    """Counts (true class, predicted class) and the summed cross entropy in nats; `logits` in subset order, or none."""

    confusion: np.ndarray
    loss_sum: float
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in percent."""
        return 100 * float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats."""
        return self.loss_sum / int(self.confusion.sum())

    def macro(self) -> dict[str, float]:
        """Mean precision, recall and F1 (shares) over the classes that were tested: each counts alike.

        The mean recall is the balanced accuracy. A class without an image is left out, as its recall is undefined.
        """
        right = np.diag(self.confusion)
        support = self.confusion.sum(1)
        predicted = self.confusion.sum(0)
        there = support > 0
        return {
            "precision": float(np.mean((right / np.maximum(predicted, 1))[there])),
            "recall": float(np.mean(right[there] / support[there])),
            "f1": float(np.mean(2 * right[there] / (support + predicted)[there])),
        }

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss_sum)

    def per_class(self, classes: list[str]) -> dict[str, dict[str, float]]:
        """Precision, recall and F1 (0 where undefined) and support of each class, by scikit-learn."""
        from sklearn.metrics import precision_recall_fscore_support

        true, predicted = np.nonzero(np.ones_like(self.confusion))
        table = precision_recall_fscore_support(
            true, predicted, sample_weight=self.confusion.ravel(), labels=range(len(classes)), zero_division=0
        )
        names = ("precision", "recall", "f1", "support")
        return {
            name: dict(zip(names, (round(float(v), 6) for v in row), strict=True))
            for name, row in zip(classes, np.array(table).T, strict=True)
        }


def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    batches: Batches,
    precision: Precision,
    *,
    keep_logits: bool = False,
    stop: Callable[[], bool] | None = None,
    description: str = "evaluating",
) -> Evaluation:
    """Runs `model` (in evaluation mode) over all images of `batches`.

    Nothing is read back from the device before the last batch. Ranks ask `stop` together, equally often. Raises
    Interrupted where it said so.
    """
    count = batches.class_count
    device = batches.device
    confusion = torch.zeros(count * count, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    kept = torch.zeros(len(batches.subset) if keep_logits else 0, count, device=device)
    bar = progress(total=len(batches.subset), desc=description, unit="image", delay=2)
    questions = -(-(len(batches.subset) // batches.ranks.size) // batches.batch_size)
    with torch.inference_mode(), bar:
        for number, (images, labels, positions) in enumerate(batches.evaluation()):
            if stop is not None and number < questions and stop():
                raise Interrupted
            with precision.autocast():
                logits = model(images)
            logits = logits.float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            cells = labels * count + logits.argmax(1)
            confusion.index_add_(0, cells, torch.ones_like(cells))
            if keep_logits:
                kept[positions[0] : positions[-1] + 1 : batches.ranks.size] = logits
            bar.update(len(positions) * batches.ranks.size)
    batches.ranks.sum(confusion, loss_sum, *([kept] if keep_logits else []))
    return Evaluation(confusion.view(count, count).cpu().numpy(), float(loss_sum), kept.cpu().numpy())


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over classes (count, classes), in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def parity(
    model: nn.Module, batches: Batches, precisions: list[str], paths: list[str], classes: list[str]
) -> dict[str, Any]:
    """One checkpoint in each precision: accuracy, predictions that differ from the first one's, logit difference."""
    rows = {}
    reference: Evaluation | None = None
    for name in precisions:
        precision = named_precision(name, batches.device)  # on CUDA this sets the mode of float32 products
        found = evaluate(model, batches, precision, keep_logits=True, description=precision.label)
        reference = found if reference is None else reference
        before = reference.logits.argmax(1)
        after = found.logits.argmax(1)
        rows[precision.name] = {
            "accuracy": found.accuracy,
            "loss": found.loss,
            "largest_logit_difference": float(np.abs(found.logits - reference.logits).max()),
            "flipped": [
                {
                    "path": paths[i],
                    "label": classes[batches.subset.labels[i]],
                    "from": classes[before[i]],
                    "to": classes[after[i]],
                }
                for i in np.flatnonzero(before != after)
            ],
        }
    return rows
