"""Write the sentences that a reader of a comparison needs beside its numbers, such as why a number is not stated.

Terminal, Markdown, HTML and comparison.json show the same sentences.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.ratios import UNCLEAR
from system.waiting import BUSY
from utils import printable

_RATIOS = {
    "speed_up": ("speed-up", "images/s"),
    "memory_ratio": ("memory ratio", "memory"),
    "training_memory_ratio": ("ratio of training memory", "values of training memory"),
}
FAR_APART = 0.25  # of a run's epochs: mention a larger distance between the tested epochs
_SIZES = ("image_size", "start_size", "augment")  # options that change the size at which the same images are cached


def remarks(rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[str]:
    """Return the sentences for the rows of a comparison and their runs, as `results.compare_runs` collects them."""
    sentences = [*_busy_machines(rows), *_other_data([run for run in runs if run["result"]])]
    for row in rows:
        sentences += _unclear_ratios(row)
        if row["difference"]:
            base, own = ([run for run in runs if run["label"] == row[key]] for key in ("against", "label"))
            sentences += _choice_of_epoch(base, own)
    sentences += _training_memory(rows)
    return [printable(text) for text in sentences]


def _busy_machines(rows: list[dict[str, Any]]) -> list[str]:
    """Name the rows that lost time to other programs."""
    lost = [f"{row['label']} lost {100 * row['busy_share']:.0f} %" for row in rows if row["busy_share"] > BUSY]
    if not lost:
        return []
    return [
        f"The machine was busy: times are not comparable ({', '.join(lost)} of the time waiting for processors that "
        "other programs used)."
    ]


def _training_memory(rows: list[dict[str, Any]]) -> list[str]:
    """Say how much memory the trainings themselves took: on a CPU, libraries and decoded images take more."""
    taken = []
    for row in rows:
        if row["training_memory_mb"]:
            ratio = row["training_memory_ratio"]
            against = f", {ratio:.2f}× FP32" if ratio is not None and row["precision"] != "fp32" else ""
            taken.append(f"{row['training_memory_mb']['median']:,.0f} MB ({row['label']}{against})")
    if not taken:
        return []
    return [
        f"Of the memory, the training itself (peak less the memory before the first update) took {', '.join(taken)}."
    ]


def _unclear_ratios(row: dict[str, Any]) -> list[str]:
    """Give the range of the values of each ratio that is not stated."""
    sentences = []
    for name, (title, measure) in _RATIOS.items():
        ratio = row["ratios"].get(name, {})
        if ratio.get("unstated") == UNCLEAR:
            low = min(ratio["values"])
            high = max(ratio["values"])
            sentences.append(
                f"No {title} is stated for {row['label']}: from seed to seed its {measure} were {low:.2f} to "
                f"{high:.2f} times those of FP32, which spreads by more than the gain."
            )
    return sentences


def _choice_of_epoch(base: list[dict[str, Any]], others: list[dict[str, Any]]) -> Iterator[str]:
    """Compare runs of one seed that were tested at different epochs at one common epoch, and say what follows.

    If their validation accuracies there differ by less than half as much as the test accuracies, the choice of the
    epoch explains the difference. Otherwise epochs that are close together are not mentioned.
    """
    for one, other in ((one, other) for one in base for other in others if one["seed"] == other["seed"]):
        if not (one["result"] and other["result"] and one["metrics"] and other["metrics"]):
            continue
        tested = [run["result"]["best_epoch"] for run in (other, one)]
        last = min(len(one["metrics"]), len(other["metrics"]))
        accuracies = [run["metrics"][last - 1].get("val_acc") for run in (other, one)]
        if tested[0] == tested[1] or not all(value is not None and math.isfinite(value) for value in accuracies):
            continue
        points = other["result"]["test_acc"] - one["result"]["test_acc"]
        chosen = abs(points) >= 1 and abs(accuracies[0] - accuracies[1]) <= abs(points) / 2
        if not chosen and abs(tested[0] - tested[1]) <= FAR_APART * last:
            continue
        seed = f" (seed {one['seed']})" if len(base) > 1 else ""
        follows = ": the difference in test accuracy comes from the choice of the epoch" if chosen else ""
        yield (
            f"{other['label']} was tested at epoch {tested[0]}, {one['label']} at epoch {tested[1]}{seed}. At epoch "
            f"{last} they had validation accuracies of {accuracies[0]:.2f} % and {accuracies[1]:.2f} %{follows}."
        )


def _other_data(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Name the runs that did not use the same images and labels as the first."""
    pictures = [_pictures(run["directory"] / "split.csv") for run in runs]
    for run, own in zip(runs[1:], pictures[1:], strict=True):
        difference = _difference_of_data(runs[0], run, pictures[0], own)
        if difference:
            names = f"{run['directory'].name} and {runs[0]['directory'].name}"
            yield (
                f"{names} were not made of the same data: {difference}. What differs between them "
                "says nothing about the precision."
            )


def _difference_of_data(
    one: dict[str, Any], other: dict[str, Any], first: dict[str, str] | None, second: dict[str, str] | None
) -> str:
    """Describe how the images and labels of two runs differ; return an empty string if they do not or it is unknown."""
    if first and second:
        shared = first.keys() & second.keys()
        relabelled = sum(first[path] != second[path] for path in shared)
        if relabelled:
            return f"{relabelled:,} of {len(shared):,} images have another label"
        if first.keys() != second.keys():
            return f"{len(first.keys() ^ second.keys()):,} images are in one of them only"
    prints = [run["config"]["dataset"].get("fingerprint") for run in (one, other)]
    same_size = all(one["options"].get(name) == other["options"].get(name) for name in _SIZES)
    return "the images or their labels are others" if all(prints) and prints[0] != prints[1] and same_size else ""


def _pictures(file: Path) -> dict[str, str] | None:
    """Return the class of each image in split.csv; None if there is no such file."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            return {row["path"]: row["class"] for row in csv.DictReader(lines)}
    except (OSError, KeyError, csv.Error):
        return None
