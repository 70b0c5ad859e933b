"""Write, read and check result.json. Imports no torch.

Of the test: a number for each of choices.METRICS (percent; test_loss in nats; None: undefined), macro and per_class (a
share for each of FIGURES; support), classes, confusion (true by predicted class; or `confusion_cells`),
calibration_error. Of the training: best_epoch, best_val_acc (percent; None: not validated), total_seconds,
train_seconds (None: only tested), images_per_second, busy_share (lost to other programs; None: unknown),
skipped_updates. Of the machine: precision, device, device_name, memory_kind, peak_memory_mb, reserved_memory_mb,
training_memory_mb (None: unknown).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from system.files import read_json, reading

SHARES = ("precision", "recall", "f1")  # of a class
FIGURES = {  # of a class, and titles; the later ones are undefined for a class that no image has, or every image
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "specificity": "Specificity",
    "roc_auc": "ROC AUC",
    "average_precision": "Average precision",
}
NUMBERS = (
    "test_acc",
    "best_val_acc",
    "best_epoch",
    "total_seconds",
    "train_seconds",
    "images_per_second",
    "peak_memory_mb",
)
MATRIX = 100  # classes; a matrix of 3,000 would be 9 million numbers, with at most one nonzero cell per image
# None after `evaluate`: nothing was trained, and last.pt may not be validated
OF_TRAINING = ("train_seconds", "best_val_acc")


def read_result(file: Path) -> dict[str, Any]:
    """Return a finished run's result. Raise UserError if the file is missing or damaged."""
    result = read_json(file)
    with reading(file):
        check_result(result)
    return result


def check_result(result: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if an entry that tables and pictures need is missing or wrong."""
    tested_alone = result["train_seconds"] is None
    numbers = [result[name] for name in NUMBERS if not (tested_alone and name in OF_TRAINING and result[name] is None)]
    numbers += [result.get(name) or 0.0 for name in ("busy_share", "training_memory_mb")]
    rows = [result["per_class"][name] for name in result["classes"]]
    numbers += [row[name] for row in rows for name in (*SHARES, "support")]
    cells = confusion_cells(result)
    is_matrix = cells.min(initial=0) >= 0 and cells[:, :2].max(initial=0) < len(rows) and cells[:, 2].sum() > 0
    if not all(map(math.isfinite, numbers)) or not is_matrix:
        raise ValueError("its numbers or its confusion matrix make no sense")


def confusion_entry(cells: np.ndarray, class_count: int) -> dict[str, Any]:
    """Return the entry of result.json for a confusion matrix with these `cells` (true class, predicted class, images).

    It is the whole matrix as `confusion` or, above MATRIX classes, `confusion_cells`: [true, predicted, images] of each
    nonzero cell, with classes as indices into `classes`.
    """
    if class_count > MATRIX:
        return {"confusion_cells": cells.tolist()}
    return {"confusion": matrix_of(cells, class_count).tolist()}


def confusion_cells(result: dict[str, Any]) -> np.ndarray:
    """Return the nonzero cells of a result's confusion matrix: (cells, 3) of true, predicted, images.

    Raise ValueError, TypeError or KeyError if there is no such matrix.
    """
    if "confusion" in result:
        return cells_of(np.array(result["confusion"], dtype=int), len(result["classes"]))
    return np.array(result["confusion_cells"], dtype=int).reshape(-1, 3)


def matrix_of(cells: np.ndarray, class_count: int) -> np.ndarray:
    """Return the whole confusion matrix (true class, predicted class) with these `cells`."""
    true, predicted, images = cells.T
    matrix = np.zeros((class_count, class_count), dtype=int)
    matrix[true, predicted] = images
    return matrix


def cells_of(matrix: np.ndarray, class_count: int) -> np.ndarray:
    """Return the nonzero cells of a whole confusion matrix. Raise ValueError if it is not square."""
    if matrix.shape != (class_count, class_count):
        raise ValueError("its confusion matrix does not fit its classes")
    true, predicted = np.nonzero(matrix)
    return np.stack([true, predicted, matrix[true, predicted]], 1)
