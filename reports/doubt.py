"""Find doubtful labels by confident learning, from the probabilities of models that were not trained on the image.

Northcutt, Jiang and Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels. Journal of Artificial
Intelligence Research 70 (2021), 1373-1411. https://arxiv.org/abs/1911.00068
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Doubt:
    """The doubtful ones among N labels, and an estimate of how often each class is confused with each other.

    `order` holds positions of doubtful images, the most probable errors first; `suggested` (N,) the class that each
    image confidently belongs to (its own label if there is none); `margin` (N,) the probability of the label minus the
    largest other probability. `joint` (classes, classes) estimates the number of images by given label and true class.
    """

    order: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray
    joint: np.ndarray


def find_doubtful(probabilities: np.ndarray, labels: np.ndarray) -> Doubt:
    """Find doubtful labels from out-of-fold `probabilities` (N, classes) and `labels` (N,), which are class indices.

    An image confidently belongs to a class if its probability is at least the mean probability of the images with this
    label (equation 2 of the paper); if several classes qualify, the most probable one is taken. A label is doubtful if
    the image confidently belongs to another class and the model does not predict the label (off-diagonals of the
    confident joint).
    """
    count, classes = probabilities.shape
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(count), labels]
    thresholds = np.bincount(labels, own, classes) / np.maximum(counts, 1)
    thresholds[counts == 0] = np.inf  # no image belongs to a class without images
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
