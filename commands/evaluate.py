"""Tests a finished run's best checkpoint; with --precisions, in each of them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from evaluate import Evaluation, evaluate, parity, probabilities
from reports import tables
from reports.results import calibration
from utils import device_name, log, peak_memory, reset_peak_memory, write_text

if TYPE_CHECKING:
    from assemble import Setup
    from dataset import DataSet


def evaluate_run(setup: Setup, *, precisions: list[str] | None) -> None:
    """The command: prints the test's summary, or one line per precision and which predictions change."""
    checkpoint = setup.checkpoint
    data = setup.data(test_only=True, classes=checkpoint["classes"])
    model = setup.trained(checkpoint)
    batches = setup.batches(data, data.test)
    if precisions:
        rows = parity(model, batches, precisions, data.names(data.test), data.classes)
        if setup.ranks.is_first:
            file = setup.checkpoint_file.with_name("parity.json")
            print(tables.parity_table(rows))
            write_text(file, json.dumps(rows, indent=1))
            log.info(f"details: {file}")
        return
    reset_peak_memory(setup.device)
    started = time.perf_counter()
    found = evaluate(model, batches, setup.precision, keep_logits=True, description="testing")
    seconds = time.perf_counter() - started
    if setup.ranks.is_first:
        training = {
            "best_epoch": checkpoint["epoch"],
            "best_val_acc": checkpoint["val_acc"],
            "total_seconds": seconds,
            "train_seconds": None,
            "images_per_second": len(data.test) / seconds,
        }
        print(tables.summary(test_result(setup, data, found) | training))


def test_result(setup: Setup, data: DataSet, found: Evaluation) -> dict[str, Any]:
    """What result.json says of a test, before anything about the training."""
    return {
        "test_acc": found.accuracy,
        "test_loss": found.loss,
        **peak_memory(setup.device),
        "precision": setup.precision.name,
        "tta": setup.options.tta,
        "device": setup.device.type,
        "device_name": device_name(setup.device),
        "classes": data.classes,
        "per_class": found.per_class(data.classes),
        "confusion": found.confusion.tolist(),
        "calibration_error": calibration(probabilities(found.logits), data.test.labels)["ece"],
    }
