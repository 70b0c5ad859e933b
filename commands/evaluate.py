"""Test the best checkpoint of a finished run; with --precisions, in each of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from assemble import Setup, answering_model, evaluation_batches, set_up
from choices import METRICS
from dataset import Batches
from distributed import Ranks
from evaluate import evaluate
from images.asked import data_to_test_on
from precision import named_precision
from reports import tables
from reports.results import CONFIDENCES, calibration
from runs.config import record
from runs.evaluation import NO_PREDICTION, Evaluation
from runs.folder import RunDirectory
from runs.result import confusion_entry
from runs.writing import PROBABILITIES, csv_text, prediction_rows
from system.files import json_text, refuse_missing_folders, write_text
from system.machine import device_name, peak_memory, reset_peak_memory
from utils import UserError, log, printable

if TYPE_CHECKING:
    from command_line.groups import Asked
    from command_line.groups import Evaluation as Options
    from images.subsets import DataSet


def evaluate_run(asked: Asked, ranks: Ranks, own: Options) -> None:
    """Print the test's summary, or with --precisions one line for each and which predictions change."""
    precisions = own.precisions
    if precisions and (own.csv or own.out):
        raise UserError(
            f"--{'csv' if own.csv else 'out'} holds the test in one precision: leave it out, or leave out "
            "--precisions. --json takes the table of all precisions."
        )
    files = asked.place.checkpoint_files
    if precisions and len(files) > 1:
        raise UserError("--precisions compares the answers of one model: name one --checkpoint.")
    refuse_missing_folders(own.csv, own.json)
    setup = set_up(asked, ranks)
    checkpoint = setup.trained
    data = data_to_test_on(asked, ranks, setup.preprocess, checkpoint)
    model = answering_model(setup)
    batches = evaluation_batches(setup, data, data.test)
    if precisions:
        rows = parity(model, batches, precisions, data.names(data.test), data.classes)
        if ranks.is_first:
            file = asked.place.checkpoint_file.with_name("parity.json")
            print(tables.parity_table(rows))
            for place in [file, *([Path(own.json)] if own.json else [])]:
                write_text(place, json_text(rows, indent=1) + "\n")
            log.info(f"details: {file}")
        return
    reset_peak_memory(setup.device)
    started = time.perf_counter()
    keep_logits = len(data.classes) <= PROBABILITIES
    found = evaluate(model, batches, setup.precision, keep_logits=keep_logits, description="testing")
    seconds = time.perf_counter() - started
    found.require_finite(setup.precision)
    if ranks.is_first:
        training = {
            "best_epoch": checkpoint["epoch"],
            "best_val_acc": checkpoint["val_acc"],
            "total_seconds": seconds,
            "train_seconds": None,
            "training_memory_mb": None,
            "images_per_second": len(data.test) / seconds,
        }
        if len(files) > 1:
            training |= {"models": len(files), "epoch_name": "First's epoch"}
        temperature = checkpoint.get("temperature") if len(files) == 1 else None
        result = test_result(setup, data, found, temperature) | training
        if "progress" in checkpoint:  # last.pt
            result["epoch_name"] = "Epoch"
        print(tables.summary(result))
        _write(setup, own, data, found, result)


def _write(setup: Setup, own: Options, data: DataSet, found: Evaluation, result: dict[str, Any]) -> None:
    """Write the files that a training writes about its test: all into --out, or predictions and result alone."""
    if own.json:
        write_text(Path(own.json), json_text(result, indent=1) + "\n")
    if own.csv:
        write_text(Path(own.csv), csv_text(predictions(data, found)))
    if own.out:
        run = RunDirectory(own.out)
        if run.file("best_model.pt").exists():
            raise UserError(
                f"--out {printable(own.out)} is a run's folder: choose another, or one that is not there yet."
            )
        checkpoint = setup.trained
        settled = {"model": checkpoint["model_name"]}
        config = record(setup, data, model_options=checkpoint["model_options"], settled=settled)
        run.open()
        try:
            run.write_json("config.json", config)
            run.write_csv("predictions.csv", predictions(data, found))
            run.write_json("result.json", result)
        finally:
            run.close()
        from reports.draw import draw_run  # half a second, which no start should wait for

        draw_run(run.path)
        log.info(f"results: {run.path}")


def predictions(data: DataSet, found: Evaluation) -> Iterator[list[Any]]:
    """Return the rows of predictions.csv."""
    names = data.names(data.test)
    return prediction_rows(names, found.labels, found.predicted, found.confidence, data.classes, found.probabilities)


def test_result(setup: Setup, data: DataSet, found: Evaluation, temperature: float | None) -> dict[str, Any]:
    """Return the part of result.json that is about the test; `temperature` is that of the checkpoint, if it has one."""
    known = temperature if temperature and len(found.logits) else None
    confidence = found.confidence_at(known) if known else found.confidence
    return {
        **{metric.test_key: metric.compute(found) for metric in METRICS.values()},  # NaN if undefined
        **peak_memory(setup.device),
        "precision": setup.precision.name,
        "tta": setup.asked.reading.tta,
        "device": setup.device.type,
        "device_name": device_name(setup.device),
        "classes": data.classes,
        "macro": found.macro(),
        "per_class": found.per_class(data.classes),
        **confusion_entry(found.cells(), len(data.classes)),
        "calibration_error": calibration(found.confidence, found.right)["ece"],
        "temperature": known,
        "calibrated_error": calibration(confidence, found.right)["ece"],
        "refusals": [refusals(confidence, found.right, least) for least in CONFIDENCES],
    }


def refusals(confidence: np.ndarray, right: np.ndarray, least: float) -> dict[str, float]:
    """Return how many test images `predict --min_confidence` would refuse, and how many of those were wrong."""
    refused = confidence < least
    return {"min_confidence": least, "refused": int(refused.sum()), "rightly": int((refused & ~right).sum())}


def parity(
    model: nn.Module, batches: Batches, precisions: list[str], paths: list[str], classes: list[str]
) -> dict[str, Any]:
    """Return one checkpoint's figures in each precision, and how its predictions differ from the first one's.

    A precision in which logits are not finite has no accuracy and no loss (None); `not_finite` counts its images.
    Logits and predictions are compared for the images that are finite in both.
    """
    named = [named_precision(name, batches.device) for name in precisions]  # refuses a name before the first test
    rows = {}
    reference: Evaluation | None = None
    for name in [precision.name for precision in named]:
        precision = named_precision(name, batches.device)  # on CUDA this sets the mode of float32 products
        found = evaluate(model, batches, precision, keep_logits=True, description=precision.label)
        reference = found if reference is None else reference
        before = reference.predicted
        after = found.predicted
        finite = (before != NO_PREDICTION) & (after != NO_PREDICTION)
        differences = np.abs(found.logits[finite] - reference.logits[finite])
        rows[name] = {
            "accuracy": found.accuracy if found.is_finite else None,
            "loss": found.loss if found.is_finite else None,
            "not_finite": found.unpredicted,
            "largest_logit_difference": float(differences.max()) if len(differences) else None,
            "flipped": [
                {
                    "path": paths[place],
                    "label": classes[batches.subset.labels[place]],
                    "from": classes[before[place]],
                    "to": classes[after[place]],
                }
                for place in np.flatnonzero(finite & (before != after))
            ],
        }
    return rows
