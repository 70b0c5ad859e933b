"""Compute ROC and precision-recall curves of one class against the rest, areas, calibration. Needs numpy alone.

The figures are those of scikit-learn (a test compares them), without the second that importing it takes.
"""

from __future__ import annotations

import math

import numpy as np


def counts(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return different scores, the highest first, and how many of the `positive` and of the others reach each.

    `scores` are floats, `positive` bools (images,). The first score is infinite: no image reaches it.
    """
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(np.diff(falling, append=-math.inf))  # of the images with one score
    true = np.cumsum(positive[order])[last]
    return np.append(math.inf, falling[last]), np.append(0, true), np.append(0, last + 1 - true)


def areas(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve and the average precision, as shares.

    Both are NaN if a score is NaN, or if there are no positives or no others.
    """
    if np.isnan(scores).any() or positive.all() or not positive.any():
        return math.nan, math.nan
    _, true, false = counts(scores, positive)
    roc = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2) / (true[-1] * false[-1]))
    return roc, float(np.sum(np.diff(true) * true[1:] / (true[1:] + false[1:])) / true[-1])


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the softmax of logits / temperature over classes (count, classes), in float64."""
    scaled = logits.astype(np.float64) / temperature
    shifted = np.exp(scaled - scaled.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest cross entropy of `logits` / temperature (Guo et al. 2017), 0.25 to 10.

    The cross entropy is convex in 1 / temperature: take Newton's steps, but halve an interval that a step would leave.
    If all images are right, no temperature is low enough; hence the bounds.
    """
    exact = logits.astype(np.float64)
    true = exact[np.arange(len(labels)), labels]
    low, high, inverse = 0.1, 4.0, 1.0
    for _ in range(50):
        shares = probabilities(exact, 1 / inverse)
        mean = (shares * exact).sum(1)
        slope = float(np.mean(mean - true))
        curve = float(np.mean((shares * exact**2).sum(1) - mean**2))
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curve if curve > 0 else high
        step = step if low < step < high else math.sqrt(low * high)
        if abs(step - inverse) < 1e-6:
            break
        inverse = step
    return 1 / inverse
