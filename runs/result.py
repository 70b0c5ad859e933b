"""What result.json holds: its fields, its writer, its reader and its check. Imports no torch.

Of the test: test_acc and balanced_acc (percent), test_loss (nats), macro (the mean over classes) and per_class
(precision, recall, f1 as shares, support), confusion (true class by predicted class), classes, calibration_error (a
share). Of the training: best_epoch, best_val_acc (percent; None: not validated), total_seconds, train_seconds (None:
only tested), images_per_second, busy_share (of the time, lost to other programs; None: unknown), skipped_updates. Of
the machine: precision, device, device_name, peak_memory_mb, reserved_memory_mb, memory_kind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from system.files import read_json, reading

SHARES = ("precision", "recall", "f1")  # of a class
NUMBERS = (
    "test_acc",
    "best_val_acc",
    "best_epoch",
    "total_seconds",
    "train_seconds",
    "images_per_second",
    "peak_memory_mb",
)
OF_TRAINING = ("train_seconds", "best_val_acc")  # None after `evaluate`: no time, and last.pt may have no validation


def read_result(file: Path) -> dict[str, Any]:
    """A finished run's result. Raises UserError if the file is missing or damaged."""
    result = read_json(file)
    with reading(file):
        check_result(result)
    return result


def check_result(result: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if tables and pictures would lack something."""
    tested_alone = result["train_seconds"] is None
    numbers = [result[name] for name in NUMBERS if not (tested_alone and name in OF_TRAINING and result[name] is None)]
    numbers.append(result.get("busy_share") or 0.0)
    rows = [result["per_class"][name] for name in result["classes"]]
    numbers += [row[name] for row in rows for name in (*SHARES, "support")]
    confusion = np.array(result["confusion"], dtype=int)
    if not all(map(math.isfinite, numbers)) or confusion.shape != (len(rows),) * 2 or confusion.sum() < 1:
        raise ValueError("its numbers or its confusion matrix make no sense")
