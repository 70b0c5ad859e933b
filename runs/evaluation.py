"""The predictions for the images of a subset, and all figures that derive from them.

Memory grows with the images and the classes, never with classes squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from precision import Precision, wider_range
from runs.scores import areas, fitted_temperature, probabilities
from utils import RunError, amount

NO_PREDICTION = -1  # for an image whose logits are not finite


class NotFinite(RunError):
    """The precision could not compute the logits of some images: the run may go on in another precision."""

    record: dict[str, Any] = {"kind": "validation overflowed"}  # in failure.json, for runs/resume.py


@dataclass(frozen=True)
class Evaluation:
    """The predictions for the images of a subset, in its order.

    `labels` and `predicted` (images,) are class indices, `confidence` (images,) the probability of the predicted
    class; `loss_sum` is the summed cross entropy in nats. `logits` (images, classes) are empty unless they are kept.
    """

    labels: np.ndarray
    predicted: np.ndarray
    class_count: int
    loss_sum: float
    confidence: np.ndarray = field(default_factory=lambda: np.empty(0))
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def right(self) -> np.ndarray:
        """Return True for each correct prediction (images,)."""
        return self.labels == self.predicted

    @property
    def unpredicted(self) -> int:
        """Return the number of images whose logits are not finite."""
        return int(np.sum(self.predicted == NO_PREDICTION))

    @property
    def is_finite(self) -> bool:
        """Return True if every logit and the loss are finite: else no figure of this evaluation means anything."""
        return self.unpredicted == 0 and math.isfinite(self.loss_sum)

    @property
    def fault(self) -> str:
        """Return a description of the values that are not finite; empty if all are."""
        if self.unpredicted:
            return f"the logits of {self.unpredicted:,} of {amount(len(self.labels), 'image', 'images')} are not finite"
        return "" if self.is_finite else "the loss is not finite"

    def require_finite(self, precision: Precision, way: str = "use") -> None:
        """Raise NotFinite, with the advice of `way_out`, if the logits or the loss are not finite."""
        if self.fault:
            raise NotFinite(f"{self.fault} in {precision.label}: there is no accuracy.\n{way_out(precision, way)}")

    @property
    def probabilities(self) -> np.ndarray | None:
        """Return the probabilities (images, classes), float64; None if the logits were not kept."""
        return probabilities(self.logits) if len(self.logits) else None

    @property
    def temperature(self) -> float | None:
        """Return the temperature that makes the kept logits agree best with the labels; None if none were kept."""
        return fitted_temperature(self.logits, self.labels) if len(self.logits) else None

    def confidence_at(self, temperature: float) -> np.ndarray:
        """Return the probability of each predicted class (images,) at this temperature of the kept logits."""
        return probabilities(self.logits, temperature).max(1)

    @property
    def accuracy(self) -> float:
        """Return the share of correct predictions, in percent."""
        return 100 * float(np.mean(self.right))

    @property
    def loss(self) -> float:
        """Return the mean cross entropy in nats."""
        return self.loss_sum / len(self.labels)

    @cached_property
    def _areas(self) -> np.ndarray:
        """ROC AUC and average precision of each class (classes, 2): it takes a sort of all images for each."""
        shares = probabilities(self.logits)
        return np.array([areas(shares[:, label], self.labels == label) for label in range(self.class_count)])

    def by_class(self) -> dict[str, np.ndarray]:
        """Return the support and the figures (shares) of each class, (classes,) each.

        Precision, recall and F1 are 0 if they are undefined. Specificity and, if finite logits were kept, ROC AUC and
        average precision (one class against the rest) are NaN for a class that no image has, or every image.
        """
        hits, support, predicted = (
            np.bincount(places, minlength=self.class_count)
            for places in (self.labels[self.right], self.labels, self.predicted[self.predicted >= 0])
        )
        others = len(self.labels) - support
        specificity = 1 - (predicted - hits) / np.maximum(others, 1)
        table = {
            "precision": hits / np.maximum(predicted, 1),
            "recall": hits / np.maximum(support, 1),
            "f1": 2 * hits / np.maximum(support + predicted, 1),
            "support": support,
            "specificity": np.where((support > 0) & (others > 0), specificity, math.nan),
        }
        if len(self.logits) and self.is_finite:
            table["roc_auc"], table["average_precision"] = self._areas.T
        return table

    def macro(self) -> dict[str, float]:
        """Return the mean of each figure (a share) over the classes that were tested: each counts alike.

        The mean recall is the balanced accuracy. A class without an image is left out, as its recall is undefined. A
        figure that is undefined for all of them is NaN.
        """
        table = self.by_class()
        tested = table.pop("support") > 0
        defined = {name: values[tested & np.isfinite(values)] for name, values in table.items()}
        return {name: float(np.mean(values)) if len(values) else math.nan for name, values in defined.items()}

    def per_class(self, classes: list[str]) -> dict[str, dict[str, float]]:
        """Return the figures of `by_class` by the name of the class, with six digits."""
        table = self.by_class()
        rows = zip(*(np.round(values, 6).tolist() for values in table.values()), strict=True)
        return {name: dict(zip(table, row, strict=True)) for name, row in zip(classes, rows, strict=True)}

    def top(self, count: int) -> float:
        """Return the share of images, in percent, whose class is among the `count` likeliest.

        Return NaN if there are no other classes, or if the logits were not kept or are not finite.
        """
        if not len(self.logits) or count >= self.class_count or not self.is_finite:
            return math.nan
        likeliest = np.argsort(-self.logits, axis=1, kind="stable")[:, :count]
        return 100 * float(np.mean((likeliest == self.labels[:, None]).any(1)))

    def cells(self) -> np.ndarray:
        """Return the cells of the confusion matrix that are not 0, in order: (cells, 3) of true, predicted, count."""
        numbers, counts = np.unique(self.labels * self.class_count + self.predicted, return_counts=True)
        return np.stack([numbers // self.class_count, numbers % self.class_count, counts], 1)


def way_out(precision: Precision, way: str = "use") -> str:
    """Return advice for logits that are not finite in this precision; `way` stands before the option that helps."""
    if precision.name == "amp-fp16":
        return f"Values beyond 65,504, float16's largest, are the usual cause: {way} {wider_range(precision)}."
    return "Weights that grew too large are the usual cause: train with a lower --learning_rate, or --clip_grad_norm."
