"""Read result files; return numbers: run folders, calibration, the comparison.

Everything comes from files that runs wrote, so a table can be made again later and on another machine. Knows nothing of
torch, of training, or of how anything is drawn.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from precision_table import PRECISIONS, label_of
from reports.ratios import set_ratio
from reports.remarks import remarks
from runs.result import read_result
from runs.writing import PREDICTION, classes_of
from system.files import from_cell, read_json, reading
from system.waiting import BUSY
from utils import UserError, printable


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the epochs of metrics.jsonl. Raise UserError if it is missing or damaged."""
    with reading(file):
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if any(isinstance(value, (str, dict)) for line in metrics for value in line.values()):
            raise ValueError("no number")
        return [line | {"epoch": int(line["epoch"])} for line in metrics]


WRONGEST = 24  # images in mistakes.png, at most
EXPLANATIONS = "explanations.json"  # file name of a test image: a class activation map of 0 to 255, 32 by 32


def read_run(directory: str | Path) -> dict[str, Any]:
    """Return the content of a run's folder as a dictionary.

    Its keys are directory, config, options, metrics, result (None if the run is not finished), failure (the reason or
    None), label, model, precision, device_name and seed. Raise UserError naming a file that is missing or damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{printable(directory)}: there is no such run folder.")
    config_file, metrics_file, result_file, failure_file = (
        directory / name for name in ("config.json", "metrics.jsonl", "result.json", "failure.json")
    )
    result = read_result(result_file) if result_file.exists() else None
    failure = read_json(failure_file) if failure_file.exists() and result is None else {}
    # A run that failed at once may have written neither options nor metrics.
    config = read_json(config_file) if config_file.exists() or not failure else {}
    trained = result is not None and result["train_seconds"] is not None
    metrics = read_metrics(metrics_file) if metrics_file.exists() or trained else []
    with reading(config_file):
        config |= {part: dict(config.get(part, {})) for part in ("options", "dataset", "versions")}
        options = config["options"]
        precision = config.get("precision") or failure.get("precision")
        if precision not in PRECISIONS or not isinstance(options.get("seed", 0), int):
            raise ValueError(f"unknown precision {precision}, or no seed")
    run = {
        "directory": directory,
        "config": config,
        "options": options,
        "metrics": metrics,
        "result": result,
        "failure": failure.get("reason"),
        "precision": precision,
        "model": str(options.get("model", "")),
        "device_name": str(config.get("device_name", "")),
        "seed": options.get("seed"),
    }
    tell_apart([run])
    return run


def read_predictions(file: Path) -> dict[str, Any]:
    """Return predictions.csv as {classes, paths, labels, predicted, confidence [N], probabilities [N, classes]}.

    With very many classes, classes and probabilities are absent. Raise UserError if the file is missing or damaged.
    """
    with reading(file), open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header, *rows = csv.reader(lines)
        numbers = np.array([row[3:] for row in rows], dtype=float).reshape(len(rows), len(header) - 3)
        if header[:4] != PREDICTION or len(header) == 5:
            raise ValueError("a column is missing")
        if not np.isfinite(numbers).all():
            raise ValueError("it holds probabilities that are not finite: the logits of that test were not")
        return {
            "classes": classes_of(header[4:]),
            "paths": [from_cell(row[0]) for row in rows],
            "labels": [from_cell(row[1]) for row in rows],
            "predicted": [from_cell(row[2]) for row in rows],
            "confidence": numbers[:, 0],
            "probabilities": numbers[:, 1:],
        }


def column(metrics: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return one entry of all epochs as floats [epochs]; NaN if it is absent or null."""
    return np.array([epoch.get(name) for epoch in metrics], dtype=float)


def steady_rate(metrics: list[dict[str, Any]]) -> float:
    """Return the median images/s of the epochs after the first, which includes warm-up, or of the only one."""
    return float(np.median(column(metrics[1:] or metrics, "images_per_second")))


def training_seconds(metrics: list[dict[str, Any]]) -> float:
    """Return the seconds of training without evaluation, including the time to compute a frozen network once."""
    return sum(line["seconds"] + line.get("frozen_seconds", 0.0) for line in metrics)


def training_rate(metrics: list[dict[str, Any]], images: int) -> float:
    """Return images/s of a training with this number of images per epoch.

    If a frozen network was computed once, that is most of the work and the epochs take almost no time, so return all
    images of all epochs divided by all seconds of training. Otherwise return `steady_rate`.
    """
    if any("frozen_seconds" in line for line in metrics):
        return images * len(metrics) / training_seconds(metrics)
    return steady_rate(metrics)


def busy_share(metrics: list[dict[str, Any]]) -> float | None:
    """Return the share of the run's time spent waiting for busy processors; None if the system did not report it."""
    shares = column(metrics, "busy_share")
    known = np.isfinite(shares)
    return float(np.average(shares[known], weights=column(metrics, "seconds")[known])) if known.any() else None


def most_confidently_wrong(confidence: np.ndarray, wrong: np.ndarray, count: int = WRONGEST) -> np.ndarray:
    """Return positions of at most `count` wrong predictions, the highest confidence (to six digits) first."""
    order = np.argsort(-np.round(confidence, 6), kind="stable")
    return order[wrong[order]][:count]


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share after Wilson (1927), in percent."""
    z = NormalDist().inv_cdf(0.975)
    centre = right + z**2 / 2
    half = z * math.sqrt(right * (total - right) / total + z**2 / 4)
    scale = 100 / (total + z**2)
    return max(0.0, scale * (centre - half)), min(100.0, scale * (centre + half))


def sign_test(one: int, other: int) -> float:
    """Return the exact two-sided p-value of `one` against `other` outcomes of equal probability.

    The binomial distribution is summed here, because it is symmetric and importing scipy.stats takes a second.
    """
    term = tail = 1
    for position in range(min(one, other)):
        term = term * (one + other - position) // (position + 1)
        tail += term
    return min(1.0, 2 * tail / 2 ** (one + other))


def student(values: list[float]) -> float:
    """Return half of the 95 % interval of the mean of two or more values by Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


CONFIDENCES = (0.5, 0.7, 0.9, 0.95)  # for which a result says how many images `predict --min_confidence` would refuse


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Return the expected calibration error `ece` (a share, 0 to 1) after Guo et al. 2017.

    `confidence` [N] are the highest probabilities, in equal bins ((m-1)/M, m/M]; `right` [N] is True if the prediction
    is correct. `count` and the mean `confidence` and `accuracy` are arrays [bins], the means NaN in an empty bin.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count, confident, correct = (np.bincount(place, weights, bins) for weights in (None, confidence, right))
    filled = np.where(count, count, math.nan)
    return {
        "ece": float(np.abs(confident - correct).sum() / len(right)),
        "count": count,
        "confidence": confident / filled,
        "accuracy": correct / filled,
    }


def run_calibration(run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the calibration of a run's test predictions; None if it wrote no predictions."""
    file = run["directory"] / "predictions.csv"
    if not file.exists():
        return None
    table = read_predictions(file)
    with reading(file):
        return calibration(table["confidence"], np.array(table["labels"]) == np.array(table["predicted"]))


def mcnemar(reference: Path, other: Path) -> dict[str, Any] | None:
    """Compute an exact McNemar test of two predictions.csv on their common images; return None if there are none.

    It is a two-sided binomial test on the images that exactly one of the two predicts correctly.
    """
    if not (reference.exists() and other.exists()):
        return None
    first, second = (
        {
            (path, label): label == predicted
            for path, label, predicted in zip(table["paths"], table["labels"], table["predicted"], strict=True)
        }
        for table in map(read_predictions, (reference, other))
    )
    shared = first.keys() & second.keys()
    lost = sum(first[image] and not second[image] for image in shared)
    gained = sum(second[image] and not first[image] for image in shared)
    p_value = sign_test(lost, gained)
    if not shared:
        return None
    most = max(len(first), len(second))
    return {"images": len(shared), "tested": most, "lost": lost, "gained": gained, "p_value": p_value}


def tell_apart(runs: list[dict[str, Any]]) -> None:
    """Give each run a `label` of model, precision and other options; runs with one label differ in the seed alone.

    An option that a failed run did not record is assumed to be the same as in the other runs.
    """
    for name in ("model", "device_name"):
        known = next((run[name] for run in runs if run[name]), "")
        for run in runs:
            run[name] = run[name] or known
    several = len({run["device_name"] for run in runs}) > 1
    for run in runs:
        kept = run["options"].get("float32_layers") if PRECISIONS[run["precision"]].amp_dtype else None
        name = f"{run['model']} {label_of(run['precision'])}{f', {kept} in FP32' if kept else ''}".strip()
        run["label"] = f"{name}, {run['device_name']}" if several else name
    count = Counter((run["label"], run["seed"]) for run in runs)
    for label in {label for (label, _), number in count.items() if number > 1}:
        for run in runs:
            run["label"] += f" ({run['directory']})" if run["label"] == label else ""


def compare_runs(runs: list[dict[str, Any]], may_differ: Collection[str] = ()) -> dict[str, Any]:
    """Return the content of comparison.json for runs that `read_run` returned.

    It holds config (of the first run), devices, rows, remarks (sentences), and differences (options that differ between
    runs, except those in `may_differ`). A row holds the runs of one label: the spread of each measurement, the reasons
    of failures, and, against the FP32 runs of the same model and device, `speed_up` (of images/s), `memory_ratio`,
    `training_memory_ratio` and `difference` (of accuracy). A ratio is the median over seeds, None if it may not be
    stated; `ratios` holds those of each seed (reports/ratios.py).
    """
    tell_apart(runs)
    order = list(PRECISIONS)
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["device_name"], run["model"], order.index(run["precision"]))):
        groups.setdefault(run["label"], []).append(run)
    rows = [_row(group) for group in groups.values()]
    finished = [row for row in rows if row["test_acc"]]
    for row in finished:
        base = next(
            (
                other
                for other in finished
                if other["precision"] == "fp32" and all(other[name] == row[name] for name in ("model", "device_name"))
            ),
            None,
        )
        if base:
            if (row["train_seconds"] is None) == (base["train_seconds"] is None):  # otherwise one was only tested
                busy = row is not base and max(row["busy_share"], base["busy_share"]) > BUSY
                set_ratio(row, base, "speed_up", "images_per_second", busy=busy)
            set_ratio(row, base, "memory_ratio", "memory_mb")
            set_ratio(row, base, "training_memory_ratio", "training_memory_mb")
            row["against"] = base["label"]
            row["difference"] = None if row is base else _difference(base, row)
    configs = [run["config"] for run in runs if run["options"]]
    options = [config["options"] | {"images": config["dataset"].get("fingerprint")} for config in configs]
    values = {name: [one.get(name) for one in options] for name in set().union(*options) - {*may_differ, "model"}}
    known = [config["versions"] for config in configs]
    for name in set(known[0]).intersection(*known) if known else ():
        values[f"version of {name}"] = [one[name] for one in known]
    return {
        "rows": rows,
        "remarks": remarks(rows, runs),
        "devices": list(dict.fromkeys(row["device_name"] for row in rows)),
        "differences": {name: found for name, found in sorted(values.items()) if found.count(found[0]) < len(found)},
        "config": configs[0] if configs else {},
    }


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [run for run in runs if run["result"]]
    memory = ("peak_memory_mb", "reserved_memory_mb", "training_memory_mb")
    keys = ("test_acc", *memory, "total_seconds", "train_seconds", "images_per_second")
    return {
        **{name: runs[0][name] for name in ("label", "precision", "model", "device_name")},
        "runs": [str(run["directory"]) for run in finished],
        "seeds": [run["seed"] for run in finished],
        **{key.replace("peak_", ""): _spread([run["result"].get(key) for run in finished]) for key in keys},
        "memory_kind": next((str(run["result"].get("memory_kind")) for run in finished), None),
        "busy_share": max((run["result"].get("busy_share") or 0.0 for run in finished), default=0.0),
        "speed_up": None,
        "memory_ratio": None,
        "training_memory_ratio": None,
        "ratios": {},
        "against": None,
        "difference": None,
        "failures": [
            {
                "run": str(run["directory"]),
                "seed": run["seed"],
                "reason": f"failed: {run['failure']}"
                if run["failure"]
                else f"not finished: {len(run['metrics'])} of {run['options'].get('epochs')} epochs done",
            }
            for run in runs
            if not run["result"]
        ],
    }


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    """Return {mean, median, std (n - 1), interval (half of the 95 % interval), values}; None without values.

    With one value, std and interval are None.
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    several = len(known) > 1
    return {
        "mean": float(np.mean(known)),
        "median": float(np.median(known)),
        "std": float(np.std(known, ddof=1)) if several else None,
        "interval": student(known) if several else None,
        "values": known,
    }


def _difference(base: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy against FP32 in points, and a test if the difference can be told from noise.

    For single runs it is McNemar's exact test on the images, for several seeds on both sides Welch's t-test on the
    accuracies.
    """
    one = base["test_acc"]
    other = row["test_acc"]
    counts = [len(one["values"]), len(other["values"])]
    test = None
    p_value = None
    images = None
    if counts == [1, 1]:
        found = mcnemar(*(Path(rows["runs"][0]) / "predictions.csv" for rows in (base, row)))
        if found:
            both = " that both tested under one label" if found["images"] < found["tested"] else ""
            changes = f"{found['gained']} images gained, {found['lost']} lost of {found['images']:,}{both}"
            test = f"{changes}, exact McNemar test"
            p_value = found["p_value"]
            images = found["images"]
    elif min(counts) > 1 and (one["std"] or other["std"]):
        from scipy import stats

        test = "Welch's t-test over seeds"
        p_value = float(
            stats.ttest_ind_from_stats(  # `ttest_ind` warns if the accuracies of one side are equal
                one["mean"], one["std"], counts[0], other["mean"], other["std"], counts[1], equal_var=False
            ).pvalue
        )
    return {"points": other["mean"] - one["mean"], "test": test, "p_value": p_value, "images": images}
