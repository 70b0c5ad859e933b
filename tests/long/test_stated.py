"""What is stated follows from the files: accuracies, peaks and ratios, whatever the numbers are (hypothesis)."""

import math
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_report import make_run

from commands.evaluate import predictions
from commands.evaluate import test_result as result_of
from dataset import Batches
from evaluate import evaluate
from images.subsets import DataSet
from precision import named_precision
from reports import results, tables
from runs.checkpoint import Progress
from runs.folder import RunDirectory
from system.files import json_text
from transforms import Preprocess

CPU = torch.device("cpu")
QUICK = settings(max_examples=20, deadline=None, derandomize=True)
CLASSES = ["a", "b", "c"]


LOGITS = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1e-45, -1e-30, 3e38, -3e38])


@QUICK
@given(arrays.arrays(np.float32, (11, 3), elements=LOGITS))
def test_a_stated_accuracy_is_that_of_the_predictions(logits):
    subset = tiny.subset(11)
    data = DataSet(Path("."), CLASSES, {"test": subset}, "f", [])
    waiting = iter(torch.from_numpy(logits).split(4))
    found = evaluate(
        lambda images: next(waiting),
        Batches(subset, Preprocess(CPU, 9), 4, 3),
        named_precision("fp32", CPU),
        keep_logits=True,
    )
    asked = SimpleNamespace(reading=SimpleNamespace(tta="none"))
    setup = SimpleNamespace(device=CPU, precision=named_precision("fp32", CPU), asked=asked)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        run.write_json("result.json", result_of(setup, data, found, None))
        run.write_csv("predictions.csv", predictions(data, found))
        result = tiny.strict(run.file("result.json"))
        table = results.read_predictions(run.file("predictions.csv"))
    right = [label == predicted for label, predicted in zip(table["labels"], table["predicted"], strict=True)]
    assert math.isclose(result["test_acc"], 100 * statistics.mean(right))
    assert math.isclose(result["test_acc"], 100 * np.trace(result["confusion"]) / np.sum(result["confusion"]))
    recalls = [
        statistics.mean(hit for hit, label in zip(right, table["labels"], strict=True) if label == name)
        for name in CLASSES
    ]
    assert math.isclose(result["balanced_acc"], 100 * statistics.mean(recalls))
    assert [row["recall"] for row in result["per_class"].values()] == [round(recall, 6) for recall in recalls]
    assert np.isfinite(table["probabilities"]).all() and np.allclose(table["probabilities"].sum(1), 1, atol=1e-5)


EPOCHS = st.lists(
    st.tuples(st.sampled_from([48, 64]), st.sampled_from([2, 60]), st.floats(1, 1e5), st.booleans()), min_size=1
)


@QUICK
@given(EPOCHS)
def test_a_stated_peak_is_not_below_that_of_any_epoch_that_counts(epochs):
    """One that warms up counts unless a steady one of its size and its trained layers is there."""
    at = Progress()
    for size, trained, peak, warming in epochs:
        at.note_peak(size, trained, peak, warming=warming)
    steady = {(size, trained) for size, trained, _, warming in epochs if not warming}
    assert at.peak_memory_mb == max(
        peak for size, trained, peak, warming in epochs if not warming or (size, trained) not in steady
    )


POSITIVE = st.floats(0.5, 2000)
MEASURED = st.tuples(POSITIVE, POSITIVE)


@settings(QUICK, max_examples=10)
@given(st.lists(st.tuples(MEASURED, MEASURED), min_size=1, max_size=4))
def test_ratios_in_the_table_are_those_of_the_results(seeds):
    """Each pair is (images/s, MB) of FP32 and of AMP with one seed."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            make_run(Path(folder, f"{name}{seed}"), name, seed=seed, rates=(1.0, pair[side][0]), memory=pair[side][1])
            for seed, pair in enumerate(seeds)
            for side, name in enumerate(("fp32", "amp-bf16"))
        ]
        comparison = results.compare_runs([results.read_run(run) for run in runs])
        (Path(folder) / "comparison.json").write_text(json_text(comparison))
        assert tiny.strict(Path(folder) / "comparison.json") == comparison
        stored = {run.name: tiny.strict(run / "result.json") for run in runs}
    cells = tables.table_cells(comparison)[1][1]
    for place, name, measure in ((5, "speed_up", "images_per_second"), (6, "memory_ratio", "peak_memory_mb")):
        ratios = [stored[f"amp-bf16{seed}"][measure] / stored[f"fp32{seed}"][measure] for seed in range(len(seeds))]
        median = statistics.median(ratios)
        if math.log(max(ratios) / min(ratios)) > abs(math.log(median)):
            assert comparison["rows"][1][name] is None and cells[place] == "unclear"
        else:
            assert math.isclose(comparison["rows"][1][name], median) and cells[place] == f"{median:.2f}×"
    middle = statistics.median(stored[f"amp-bf16{seed}"]["images_per_second"] for seed in range(len(seeds)))
    assert cells[4].split(" ")[0] == (f"{middle:,.0f}" if middle >= 100 else f"{middle:.1f}")
