"""Draw the ROC and the precision-recall curve of each class against the rest, from result files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ampscope.look import FAINT, STYLES, legend_below, picture, svg
from reports.results import read_predictions
from reports.text import fit
from runs.scores import counts


def class_curves(result: dict[str, Any], predictions_csv: Path, path: Path, *, title: str) -> None:
    """Draw a curve for each class that has a ROC AUC; for two classes also the figures at each threshold.

    The six classes with the lowest ROC AUC are coloured. Draw nothing if no class has one, as above 1,000 classes.
    """
    panels = _panels(result, predictions_csv)
    if not panels:
        return
    with picture(path, 4.8 * len(panels), 6.2) as figure:
        absent = [name for name, row in result["per_class"].items() if not row["support"]]
        left_out = f", without {', '.join(absent)}: no test image" if absent else ""
        figure.suptitle(fit(title + left_out, 100), x=0.01, ha="left", fontsize=13)
        for axes, draw in zip(figure.subplots(1, len(panels)), panels.values(), strict=True):
            draw(axes)


def curve_panels(result: dict[str, Any], predictions_csv: Path) -> dict[str, bytes]:
    """Return the panels of `class_curves` for a page, each an SVG by its name, without faint lines above ten."""
    return {name: svg(draw, height=4.6) for name, draw in _panels(result, predictions_csv, most=10).items()}


def _panels(
    result: dict[str, Any], predictions_csv: Path, most: int | None = None
) -> dict[str, Callable[[Axes], None]]:
    rows = result["per_class"]
    defined = [name for name, row in rows.items() if row.get("roc_auc") is not None]
    if not defined:
        return {}
    worst = sorted(defined, key=lambda name: rows[name]["roc_auc"])
    table = read_predictions(predictions_csv)
    labels = np.array(table["labels"])
    shares = {
        name: _shares(table["probabilities"][:, table["classes"].index(name)], labels == name)
        for name in reversed(worst[:most])  # the coloured ones over the others
    }
    colors = {name: STYLES[place][:2] if place < len(STYLES) else (FAINT, "-") for place, name in enumerate(worst)}
    panels: dict[str, Callable[[Axes], None]] = {
        "ROC curves": partial(_roc, shares=shares, colors=colors, rows=rows),
        "Precision-recall curves": partial(_precision, shares=shares, colors=colors, rows=rows),
    }
    if len(table["classes"]) == 2:
        name = table["classes"][1]
        found = shares.get(name) or _shares(table["probabilities"][:, 1], labels == name)
        panels["By threshold"] = partial(_thresholds, found=found, name=name)
    return panels


def _roc(axes: Axes, shares: dict[str, Any], colors: dict[str, Any], rows: dict[str, Any]) -> None:
    """Draw recall against the false positive rate."""
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2)
    labels = {name: f"{fit(name, 22)}: area {100 * rows[name]['roc_auc']:.2f} %" for name in shares}
    _curves(axes, {name: (found["others"], found["recall"]) for name, found in shares.items()}, colors, labels)
    if len(rows) == 2:
        _dots(axes, shares, colors, "others", "recall")
    axes.set(title="ROC", xlabel="false positive rate (%): 100 − specificity", ylabel="recall (%)")


def _precision(axes: Axes, shares: dict[str, Any], colors: dict[str, Any], rows: dict[str, Any]) -> None:
    """Draw precision against recall."""
    labels = {name: f"{fit(name, 22)}: average {100 * rows[name]['average_precision']:.2f} %" for name in shares}
    lines = {name: (found["recall"][1:], found["precision"][1:]) for name, found in shares.items()}
    _curves(axes, lines, colors, labels, drawstyle="steps-pre")
    if len(rows) == 2:
        _dots(axes, shares, colors, "recall", "precision")
    axes.set(title="Precision and recall", xlabel="recall (%)", ylabel="precision (%)")


def _curves(axes: Axes, lines: dict[str, Any], colors: dict[str, Any], labels: dict[str, str], **options: Any) -> None:
    for name, (x, y) in lines.items():
        color, line = colors[name]
        is_coloured = color != FAINT
        style = {"color": color, "linestyle": line, "linewidth": 1.8 if is_coloured else 0.6}
        axes.plot(x, y, label=labels[name] if is_coloured else None, **style, **options)
    axes.set(xlim=(-2, 102), ylim=(-2, 102))
    legend_below(axes, reverse=True, fontsize=9)


def _dots(axes: Axes, shares: dict[str, Any], colors: dict[str, Any], x: str, y: str) -> None:
    """Mark the point that a threshold of 50 % gives."""
    for name, found in shares.items():
        used = np.flatnonzero(found["threshold"] >= 0.5)[-1]
        axes.plot(found[x][used], found[y][used], "o", color=colors[name][0])


def _shares(scores: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """Return recall, precision and share of the others, in percent, at each different score."""
    thresholds, true, false = counts(scores, positive)
    return {
        "threshold": thresholds,
        "recall": 100 * true / true[-1],
        "others": 100 * false / false[-1],
        "precision": 100 * true / np.maximum(true + false, 1),
    }


def _thresholds(axes: Axes, found: dict[str, np.ndarray], name: str) -> None:
    """Draw recall, specificity and precision of the class `name` against the probability from which it is predicted."""
    lines = {"recall": found["recall"], "specificity": 100 - found["others"], "precision": found["precision"]}
    for (label, values), (color, line, _, _) in zip(lines.items(), STYLES, strict=False):
        axes.plot(
            100 * found["threshold"][1:], values[1:], color=color, linestyle=line, drawstyle="steps-post", label=label
        )
    axes.axvline(50, color=FAINT, linestyle=":", label="50 %: the dots beside")
    axes.set(title=f"By threshold for {fit(name, 22)}", xlabel="predicted from this probability on (%)", ylabel="%")
    axes.set(xlim=(0, 100), ylim=(-2, 102))
    legend_below(axes, fontsize=9)
