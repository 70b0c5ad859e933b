"""Compute ROC and precision-recall curves of one class against the rest, and the areas under them. Needs numpy alone.

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
