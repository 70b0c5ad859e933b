"""Doubtful labels by confident learning, from the probabilities that models gave to images they were not trained on.

Northcutt, Jiang and Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels. Journal of Artificial
Intelligence Research 70 (2021), 1373-1411. https://arxiv.org/abs/1911.00068
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Doubt:
    """Which of N labels are doubtful, the likeliest errors first, and how often which class is taken for which.

    `order` holds positions of doubtful images, `suggested` (N,) the class that each image confidently is (its own
    label where it is in none), `margin` (N,) the probability of the label less the largest other one. `joint`
    (classes, classes) estimates the number of images by given label and true class.
    """

    order: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray
    joint: np.ndarray


def find_doubtful(probabilities: np.ndarray, labels: np.ndarray) -> Doubt:
    """Confident learning: `probabilities` (N, classes) of images out of their fold, `labels` (N,) class indices.

    An image is confidently of a class if its probability is at least the mean that the images of this label have
    (equation 2 of the paper); of several such classes, of the likeliest. A label is doubtful if the image is
    confidently of another class, and the label is not what the model says (off-diagonals of the confident joint).
    """
    count, classes = probabilities.shape
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(count), labels]
    thresholds = np.bincount(labels, own, classes) / np.maximum(counts, 1)
    thresholds[counts == 0] = np.inf  # a class without an image takes none
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    certain = confident.max(1) >= 0
    suggested = np.where(certain, confident.argmax(1), labels)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[certain], suggested[certain]), 1)
    rows = joint.sum(1, keepdims=True)
    joint = np.where(rows > 0, joint / np.maximum(rows, 1), np.eye(classes)) * counts[:, None]  # equation 3
    others = probabilities.copy()
    others[np.arange(count), labels] = -1
    margin = own - others.max(1)
    doubtful = np.flatnonzero((suggested != labels) & (probabilities.argmax(1) != labels))
    return Doubt(doubtful[np.argsort(margin[doubtful], kind="stable")], suggested, margin, joint)
