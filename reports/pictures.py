"""Draw pictures from result files: learning curve, confusion matrix, comparison, reliability curve, galleries.

Every picture is drawn from files alone. Knows nothing of torch, of training, or of live objects.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from ampscope.look import BLUE, FAINT, INK, STYLES, VERMILION, legend_below, picture, svg
from images.decode import Rules
from reports.answer import short_labels, title_of
from reports.results import WRONGEST, column, most_confidently_wrong, read_predictions, run_calibration
from reports.sheets import explained_sheet, labelled_sheet
from reports.text import fit, time_unit
from runs.result import matrix_of

LEARNING = {"loss": "Loss", "acc": "Accuracy (%)"}  # in metrics.jsonl: title


def learning_curve(metrics: list[dict[str, Any]], path: Path, *, title: str, best_epoch: int | None) -> None:
    """Draw loss and accuracy over the epochs with the best epoch; below, with a scaler, loss scale and skipped
    updates."""
    with_scaler = has_scale(metrics)
    with picture(path, 10, 6.0 if with_scaler else 4.6) as figure:
        figure.suptitle(fit(title, 100), x=0.01, ha="left", fontsize=13)
        grid = figure.add_gridspec(2, 2, height_ratios=[3, 1]) if with_scaler else figure.add_gridspec(1, 2)
        for side, name in enumerate(LEARNING):
            learning_panel(figure.add_subplot(grid[0, side]), metrics, name, best_epoch)
        if with_scaler:
            scale_panel(figure.add_subplot(grid[1, :]), metrics)


def learning_panels(metrics: list[dict[str, Any]], best_epoch: int | None) -> dict[str, bytes]:
    """Return the panels of `learning_curve`, each an SVG by its name."""
    panels = {title: svg(learning_panel, metrics, name, best_epoch) for name, title in LEARNING.items()}
    return panels | ({"Loss scale": svg(scale_panel, metrics, height=2.6)} if has_scale(metrics) else {})


def learning_panel(axes: Axes, metrics: list[dict[str, Any]], name: str, best_epoch: int | None) -> None:
    """Draw loss or accuracy of training and validation over the epochs."""
    for part, what, (color, line, marker, _) in (("train", "training", STYLES[1]), ("val", "validation", STYLES[0])):
        axes.plot(
            column(metrics, "epoch"),
            column(metrics, f"{part}_{name}"),
            color=color,
            linestyle=line,
            marker=marker if len(metrics) <= 15 else None,
            markersize=4.5,
            label=what,
        )
    if best_epoch is not None:
        axes.axvline(best_epoch, color=FAINT, linestyle=":", label=f"best epoch ({best_epoch})")
    axes.set(title=LEARNING[name], xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(axes, 3)


def has_scale(metrics: list[dict[str, Any]]) -> bool:
    """Return True if the run had a scaler."""
    return bool(np.isfinite(column(metrics, "loss_scale")).any())


def scale_panel(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    """Draw the loss scale over the epochs and, as bars, the number of updates skipped in each."""
    epochs = column(metrics, "epoch")
    scale = column(metrics, "loss_scale")
    skipped = np.nan_to_num(column(metrics, "skipped_updates"))
    axes.step(epochs, scale, where="mid", color=BLUE)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="epoch", ylabel="loss scale", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"Loss scale (line) and skipped updates (bars, {skipped.sum():.0f} in all)")
    bars = axes.twinx()
    bars.bar(epochs, skipped, width=min(0.6, 0.05 * len(epochs)), color=VERMILION, hatch="///", edgecolor="white")
    bars.set(ylabel="skipped", ylim=(0, max(3, skipped.max() * 1.6)))
    bars.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bars.grid(False)
    axes.set_zorder(bars.get_zorder() + 1)  # draw the line over the bars
    axes.patch.set_visible(False)


def confusion_matrix(cells: np.ndarray, classes: list[str], path: Path, *, title: str) -> None:
    """Draw counts and row percentages; for many classes draw an overview and the most frequent confusions.

    `cells` (cells, 3) are the nonzero cells of the confusion matrix: true class, predicted class, images.
    """
    if len(classes) > 30:
        confused_classes(cells, classes, path, title=title)
        return
    number = len(classes)
    counts = matrix_of(cells, number)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = number * (0.85 if number <= 8 else 0.62)
    small = 10 if number <= 8 else 8
    with picture(path, size + 3.2, size + 2.2) as figure:
        figure.suptitle(fit(title, 50), x=0.01, ha="left", fontsize=12)
        axes = figure.add_subplot()
        image = _shares(axes, share)
        names = [fit(name, 18) for name in classes]
        axes.set_xticks(
            range(number),
            names,
            fontsize=small,
            rotation=90 if number > 8 else 40,
            ha="center" if number > 8 else "right",
            rotation_mode="anchor" if number <= 8 else "default",
        )
        axes.set_yticks(range(number), names, fontsize=small)
        for row, place in np.ndindex(counts.shape):
            count = counts[row, place]
            percent = share[row, place]
            axes.text(
                place,
                row,
                f"{count:,}\n{percent:.{int(percent < 1)}f} %" if count else "0",
                ha="center",
                va="center",
                fontsize=small - 1,
                color="white" if percent > 35 else INK if count else FAINT,
                in_layout=False,  # each text stays inside its cell; measuring all takes longer than painting them
            )
        figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 20, 50, 100], label="% of the true class")


def _shares(axes: Axes, share: np.ndarray) -> Any:
    """Draw row percentages as colours. Their square root keeps rare errors visible beside the diagonal."""
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    return image


def confused_classes(cells: np.ndarray, classes: list[str], path: Path, *, title: str, most: int = 25) -> None:
    """Draw an overview of a matrix of many classes, beside bars for the `most` frequent confusions.

    Each pixel of the overview is the largest of the cells that it covers. `cells` are as in `confusion_matrix`.
    """
    number = len(classes)
    true, predicted, images = cells.T
    share = 100 * images / np.bincount(true, images, number)[true]
    step = math.ceil(number / 200)
    side = math.ceil(number / step)
    coarse = np.zeros((side, side))
    np.maximum.at(coarse, (true // step, predicted // step), share)
    wrong = np.flatnonzero(true != predicted)
    shown = wrong[np.argsort(-images[wrong], kind="stable")[:most]]
    with picture(path, 15, 7.6) as figure:
        figure.suptitle(fit(f"{title}, {number:,} classes", 110), x=0.01, ha="left", fontsize=12)
        overview, bars = figure.subplots(1, 2, width_ratios=[1.15, 1])
        image = _shares(overview, coarse)
        ticks = np.linspace(0, len(coarse) - 1, 12).astype(int)
        names = [fit(classes[tick * step], 16) for tick in ticks]
        overview.set_xticks(ticks, names, fontsize=8, rotation=60, ha="right", rotation_mode="anchor")
        overview.set_yticks(ticks, names, fontsize=8)
        figure.colorbar(image, ax=overview, shrink=0.8, ticks=[0, 1, 5, 20, 50, 100], label="% of the true class")
        bars.barh(range(len(shown)), images[shown], color=BLUE)
        labels = [f"{fit(classes[true[cell]], 22)} as {fit(classes[predicted[cell]], 22)}" for cell in shown]
        bars.set_yticks(range(len(shown)), labels, fontsize=8)
        for place, cell in enumerate(shown):
            bars.text(images[cell], place, f" {images[cell]:,} ({share[cell]:.0f} %)", va="center", fontsize=8)
        heading = "Most frequent confusions" if len(shown) else "No confusion"
        bars.set(title=heading, xlabel="images (% of the true class)")
        bars.margins(x=0.2)
        bars.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bars.invert_yaxis()
        bars.grid(False, axis="y")


Styled = list[tuple[dict[str, Any], tuple[Any, ...]]]  # rows of a comparison, each with its colour, line and hatch


def comparison_picture(runs: list[dict[str, Any]], comparison: dict[str, Any], path: Path) -> None:
    """Draw validation accuracy against wall-clock time, a curve per run, beside bars for training time and memory."""
    rows = _styled(comparison)
    with picture(path, 11.5, 4.8 + 0.5 * max(0, len(rows) - 3)) as figure:
        figure.suptitle(fit(title_of(comparison), 100), x=0.01, ha="left", fontsize=13)
        panels = figure.subplot_mosaic([["curves", "time"], ["curves", "memory"]], width_ratios=[1.4, 1])
        curves_panel(panels["curves"], rows, runs)
        bars_panel(panels["time"], rows, "train_seconds")
        bars_panel(panels["memory"], rows, "memory_mb")


def comparison_panels(runs: list[dict[str, Any]], comparison: dict[str, Any]) -> dict[str, bytes]:
    """Return the panels of `comparison_picture`, each an SVG by its name."""
    rows = _styled(comparison)
    height = 1.2 + 0.45 * len(rows)
    return {
        "Training time": svg(bars_panel, rows, "train_seconds", height=height),
        "Peak memory": svg(bars_panel, rows, "memory_mb", height=height),
        "Validation accuracy against time": svg(curves_panel, rows, runs, height=3.6),
    }


def _styled(comparison: dict[str, Any]) -> Styled:
    names = short_labels(comparison)
    shown = [row | {"name": name} for row, name in zip(comparison["rows"], names, strict=True) if row["runs"]]
    return list(zip(shown, STYLES * 9, strict=False))


def curves_panel(axes: Axes, rows: Styled, runs: list[dict[str, Any]]) -> None:
    """Draw the validation accuracy of each run against the time since its start."""
    metrics = {str(run["directory"]): run["metrics"] for run in runs}
    times = {name: column(lines, "elapsed") for name, lines in metrics.items()}
    longest = max((ends.max(initial=0) for ends in times.values()), default=0)
    divisor, unit = time_unit(longest)
    for row, (color, line, marker, _) in rows:
        for name in filter(metrics.get, row["runs"]):
            first = name == row["runs"][0]
            axes.plot(
                times[name] / divisor,
                column(metrics[name], "val_acc"),
                color=color,
                linestyle=line,
                marker=marker,
                markersize=5,
                markevery=max(1, len(times[name]) // 12),
                alpha=1 if first else 0.4,
                label=row["name"] if first else None,
            )
    axes.set(
        title="Validation accuracy (%)", xlabel=f"time since the start, evaluation included ({unit})", xlim=(0, None)
    )
    if rows:
        legend_below(axes, 2)


def bars_panel(axes: Axes, rows: Styled, name: str) -> None:
    """Draw a bar with its value for each precision: the median over seeds, with the lowest and the highest value."""
    longest = max((row[name]["median"] for row, _ in rows if row[name]), default=0)
    divisor, unit = time_unit(longest) if name == "train_seconds" else (1, "MB")
    for place, (row, (color, _, _, hatch)) in enumerate(rows):
        if row[name] is None:  # a run that was only tested has no training time
            continue
        median = row[name]["median"] / divisor
        lowest = min(row[name]["values"]) / divisor
        highest = max(row[name]["values"]) / divisor
        errors = [[median - lowest], [highest - median]] if highest > lowest else None
        axes.barh(place, median, xerr=errors, color=color, hatch=hatch, edgecolor="white", height=0.62, capsize=3)
        axes.annotate(
            f"{median:,.0f}" if median >= 100 else f"{median:.1f}",
            (highest, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    kinds = " or ".join(dict.fromkeys(row["memory_kind"] for row, _ in rows))
    axes.set(
        title=f"Training time without evaluation ({unit})" if name == "train_seconds" else f"Peak memory (MB, {kinds})"
    )
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_yticks(range(len(rows)), [row["name"] for row, _ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def reliability_curve(runs: list[dict[str, Any]], path: Path | io.BytesIO) -> None:
    """Draw accuracy against confidence on the test images, all runs in one plot, and below it the share of images
    per bin. Leave out runs without predictions.csv."""
    found = [(run, numbers) for run in runs if (numbers := run_calibration(run))]
    names = short_labels({"rows": [run for run, _ in found]})
    with picture(path, 6, 6.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        upper.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2, label="perfectly calibrated")
        for place, (_, numbers) in enumerate(found):
            color, line, marker, hatch = STYLES[place % len(STYLES)]
            filled = numbers["count"] > 0
            bins = len(numbers["count"])
            upper.plot(
                100 * numbers["confidence"][filled],
                100 * numbers["accuracy"][filled],
                color=color,
                linestyle=line,
                marker=marker,
                markersize=5,
                label=f"{names[place]}: calibration error {100 * numbers['ece']:.2f} %",
            )
            lower.bar(
                (np.arange(bins) + (place + 0.5) / len(found)) * 100 / bins,
                color=color,
                hatch=hatch,
                height=100 * numbers["count"] / numbers["count"].sum(),
                width=90 / bins / len(found),
                edgecolor="white",
                linewidth=0.3,
            )
        upper.set(title="Reliability on the test images", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
        lower.set(xlabel="confidence (%)", ylabel="% of images")
        figure.legend(loc="outside lower left")


def batch(images: np.ndarray, labels: np.ndarray, classes: list[str], path: Path) -> None:
    """Draw images uint8 (count, side, side, 3) as the model receives them, with their classes.

    `labels` are class indices (count,), or after MixUp and CutMix probabilities (count, classes).
    """
    if labels.ndim == 1:
        captions = [classes[label] for label in labels]
    else:
        captions = [
            "\n".join(f"{100 * row[place]:.0f} % {classes[place]}" for place in np.argsort(-row)[:2] if row[place] > 0)
            for row in labels
        ]
    side = images.shape[1]
    heading = f"The first {len(images)} training images as the network sees them, {side} × {side} pixels"
    labelled_sheet(list(images), captions, path, heading=heading)


def wrong_images(predictions_csv: Path) -> list[str]:
    """Return the paths of the images that `gallery` shows."""
    table = read_predictions(predictions_csv)
    return [table["paths"][place] for place in _wrongest(table, WRONGEST)]


def _wrongest(table: dict[str, Any], count: int) -> np.ndarray:
    differ = np.array(table["labels"]) != np.array(table["predicted"])
    return most_confidently_wrong(np.asarray(table["confidence"]), differ, count)


def gallery(
    predictions_csv: Path,
    data_root: Path,
    path: Path,
    *,
    count: int = WRONGEST,
    rules: Rules | None = None,
    maps: dict[str, list[list[int]]] | None = None,
) -> None:
    """Draw at most `count` test images with the most confident wrong predictions, with predicted and true class.

    Draw their class activation `maps` beside them. Paths are relative to `data_root`.
    """
    table = read_predictions(Path(predictions_csv))
    wrong = _wrongest(table, count)
    captions = [
        f"{fit(table['predicted'][place], 14)} {100 * table['confidence'][place]:.0f} %\ntrue: {table['labels'][place]}"
        for place in wrong
    ]
    names = [table["paths"][place] for place in wrong]
    files = [Path(data_root) / name for name in names]
    heading = f"The {len(wrong)} most confidently wrong test images" if len(wrong) else "No test image was wrong"
    if not maps or not len(wrong):
        labelled_sheet(files, captions, path, heading=heading, rules=rules)
        return
    heading += ", and what spoke for the predicted class (bright)"
    found = [maps.get(name) for name in names]
    explained_sheet(files, captions, found, path, heading=heading, rules=rules)
