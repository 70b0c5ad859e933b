"""Draw the ROC and the precision-recall curve of each class against the rest, from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ampscope.look import FAINT, STYLES, picture
from reports.results import read_predictions
from reports.text import fit
from runs.scores import counts


def class_curves(result: dict[str, Any], predictions_csv: Path, path: Path, *, title: str) -> None:
    """Draw a curve for each class that has a ROC AUC; for two classes also the figures at each threshold.

    The six classes with the lowest ROC AUC are coloured. Draw nothing if no class has one, as above 1,000 classes.
    """
    rows = result["per_class"]
    defined = [name for name, row in rows.items() if row.get("roc_auc") is not None]
    if not defined:
        return
    worst = sorted(defined, key=lambda name: rows[name]["roc_auc"])
    table = read_predictions(predictions_csv)
    labels = np.array(table["labels"])
    two = len(table["classes"]) == 2
    with picture(path, 14 if two else 10.5, 5.2) as figure:
        absent = [name for name, row in rows.items() if not row["support"]]
        left_out = f", without {', '.join(absent)}: no test image" if absent else ""
        figure.suptitle(fit(title + left_out, 100), x=0.01, ha="left", fontsize=13)
        roc, precision, *by_threshold = figure.subplots(1, 3 if two else 2)
        roc.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2)
        roc.set(title="ROC", xlabel="false positive rate (%): 100 − specificity", ylabel="recall (%)")
        precision.set(title="Precision and recall", xlabel="recall (%)", ylabel="precision (%)")
        for place in reversed(range(len(worst))):  # the coloured ones over the others
            name = worst[place]
            scores = table["probabilities"][:, table["classes"].index(name)]
            found = _shares(scores, labels == name)
            is_coloured = place < len(STYLES)
            color, line, _, _ = STYLES[place] if is_coloured else (FAINT, "-", "", "")
            style = {"color": color, "linestyle": line, "linewidth": 1.8 if is_coloured else 0.6}
            label = fit(name, 22)
            area, mean = (100 * rows[name][key] for key in ("roc_auc", "average_precision"))
            roc.plot(
                found["others"], found["recall"], label=f"{label}: area {area:.2f} %" if is_coloured else None, **style
            )
            precision.plot(
                found["recall"][1:],
                found["precision"][1:],
                label=f"{label}: average {mean:.2f} %" if is_coloured else None,
                drawstyle="steps-pre",
                **style,
            )
            if two:
                used = np.flatnonzero(found["threshold"] >= 0.5)[-1]
                roc.plot(found["others"][used], found["recall"][used], "o", color=color)
                precision.plot(found["recall"][used], found["precision"][used], "o", color=color)
        for axes, corner in ((roc, "lower right"), (precision, "lower left")):
            axes.set(xlim=(-2, 102), ylim=(-2, 102))
            axes.legend(loc=corner, reverse=True, fontsize=9)
        if two:
            name = table["classes"][1]
            _thresholds(by_threshold[0], _shares(table["probabilities"][:, 1], labels == name), name)


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
    axes.legend(loc="lower center", fontsize=9)
