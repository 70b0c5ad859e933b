"""Result files in, tables and pictures out: learning curve, confusion matrix, comparison, gallery.
Every picture is drawn from files alone; the numbers and tables of `results` are offered here as well.
It must not know torch, the training code or live objects, and it keeps no global plotting state."""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from results import (
    calibration,
    clean,
    column,
    compare_runs,
    duration_unit,
    group_runs,
    metrics_csv,
    performance_table,
    read_predictions,
    read_run,
    run_calibration,
    summary,
    write_atomically,
)

__all__ = ["calibration", "compare_runs", "comparison_picture", "confusion_matrix", "gallery", "learning_curve",
           "metrics_csv", "performance_table", "read_predictions", "read_run", "reliability_curve", "summary"]

# Okabe and Ito's palette; line styles, markers and hatches carry the same distinction in grey.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
STYLES = [(BLUE, "-", "o", ""), (VERMILION, "--", "D", "///"), (GREEN, "-.", "s", "..."),
          (ORANGE, ":", "^", "xxx"), (PURPLE, (0, (6, 1, 1, 1, 1, 1)), "v", "---"), (SKY, (0, (8, 3)), "P", "++")]
INK, FAINT = "#222222", "#8a8a8a"


def plot_style() -> dict:
    """The look of every picture; fonts for other scripts only where they are installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari",
             "Microsoft YaHei", "PingFang SC", "Noto Emoji"]
    return {"font.family": [font for font in fonts if font in installed] or ["sans-serif"], "font.size": 10,
            "text.parse_math": False, "text.usetex": False, "axes.titlesize": 11, "axes.titlelocation": "left",
            "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
            "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
            "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.8,
            "legend.frameon": False, "figure.facecolor": "white", "savefig.facecolor": "white", "hatch.linewidth": 0.8}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches that is written to `path`, as JPEG or PNG by its ending, when the block ends."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", plot_style()]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        buffer = io.BytesIO()
        if Path(path).suffix.lower() in (".jpg", ".jpeg"):
            figure.savefig(buffer, format="jpeg", dpi=150, pil_kwargs={"quality": 85})
        else:
            figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def curve_panel(axes: Axes, metrics: list[dict], name: str, title: str) -> None:
    """Training and validation of one quantity over the epochs."""
    epochs, marked = column(metrics, "epoch"), "o" if len(metrics) <= 15 else None
    for part, label, (color, line, _, _) in zip(("train", "val"), ("training", "validation"), STYLES[1::-1],
                                                strict=True):
        axes.plot(epochs, column(metrics, f"{part}_{name}"), color=color, linestyle=line, marker=marked,
                  markersize=4.5, label=label)
    axes.set(title=title, xlabel="epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="best")


def learning_curve(metrics: list[dict], path: Path, *, title: str, best_epoch: int | None) -> None:
    """Loss and accuracy over the epochs, the best epoch marked; below, with a scaler, its loss scale and the
    skipped updates."""
    if not metrics:
        raise ValueError("a learning curve needs at least one epoch")
    scale = column(metrics, "loss_scale")
    with_scaler = bool(np.isfinite(scale).any())
    with picture(path, 10, 5.6 if with_scaler else 4.2) as figure:
        figure.suptitle(clean(title, 100), x=0.01, ha="left", fontsize=13)
        grid = figure.add_gridspec(2 if with_scaler else 1, 2, height_ratios=[3, 1] if with_scaler else None)
        panels = [figure.add_subplot(grid[0, side]) for side in (0, 1)]
        curve_panel(panels[0], metrics, "loss", "Loss")
        curve_panel(panels[1], metrics, "acc", "Accuracy (%)")
        best = next((epoch for epoch in metrics if epoch["epoch"] == best_epoch), None)
        for axes, name in zip(panels, ("val_loss", "val_acc"), strict=True) if best else ():
            axes.axvline(best_epoch, color=FAINT, linestyle=":", linewidth=1.2, zorder=1)
            value = math.nan if best.get(name) is None else best[name]
            axes.plot([best_epoch], [value], marker="o", markersize=10, markerfacecolor="none",
                      markeredgecolor=INK, markeredgewidth=1.4)
        if best and best.get("val_acc") is not None:
            panels[1].set_title(f"best: {best['val_acc']:.2f} % in epoch {best_epoch}", loc="right", fontsize=10,
                                fontweight="normal")
        if with_scaler:
            scale_panel(figure.add_subplot(grid[1, :]), metrics, scale)


def scale_panel(axes: Axes, metrics: list[dict], scale: np.ndarray) -> None:
    """The scaler's loss scale over the epochs and, as bars, how many updates it skipped in each."""
    epochs, skipped = column(metrics, "epoch"), np.nan_to_num(column(metrics, "skipped_updates"))
    axes.step(epochs, scale, where="mid", color=GREEN, marker="o" if len(metrics) <= 15 else None, markersize=4)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="epoch", ylabel="loss scale", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"Loss scale (line) and skipped updates (bars, {skipped.sum():.0f} in all)")
    bars = axes.twinx()
    bars.bar(epochs, skipped, width=min(0.6, 0.05 * len(epochs)), color=PURPLE, hatch="///", edgecolor="white",
             alpha=0.8)
    bars.set(ylabel="skipped", ylim=(0, max(3, skipped.max() * 1.6)))
    bars.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bars.grid(False)
    axes.set_zorder(bars.get_zorder() + 1)  # the line over the bars
    axes.patch.set_visible(False)


def confusion_matrix(confusion: list[list[int]], classes: list[str], path: Path, *, title: str) -> None:
    """Counts and row percentages of the test images; above 20 classes the colours alone speak."""
    counts = np.asarray(confusion, dtype=np.int64)
    share, number = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), len(classes)
    cell = 0.85 if number <= 8 else 0.62 if number <= 20 else max(0.15, 9 / number)
    names = [clean(name, 18 if number <= 20 else 22) for name in classes]
    with picture(path, max(4.6, cell * number + 3.2), max(3.8, cell * number + 2.2)) as figure:
        figure.suptitle(clean(title, max(40, int(cell * number * 10) + 20)), x=0.01, ha="left", fontsize=12)
        axes = figure.add_subplot()
        # The square root keeps the few errors visible beside the full diagonal.
        image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        every = range(0, number, math.ceil(number / 100))
        small = 10 if number <= 8 else 8.5 if number <= 20 else max(5, 8 - number / 25)
        turned = {"rotation": 90} if number > 20 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(every, [names[place] for place in every], fontsize=small, **turned)
        axes.set_yticks(every, [names[place] for place in every], fontsize=small)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for row, place in np.ndindex(counts.shape) if number <= 20 else ():
            count, percent = counts[row, place], share[row, place]
            text = f"{count:,}\n{percent:.{int(percent < 1)}f} %" if count else "0"
            axes.text(place, row, text, ha="center", va="center", fontsize=9.5 if number <= 8 else 7,
                      color="#b8b8b8" if not count else "white" if percent > 35 else INK)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 20, 50, 100], pad=0.02)
        bar.set_label("% of the true class")
        bar.outline.set_visible(False)


def end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name curves beside the right edge, pushed apart so that none covers another: (x, y, text, colour)."""
    low, high = axes.get_ylim()
    ends, step = sorted(ends, key=lambda end: end[1]), 0.06
    heights = [(end[1] - low) / (high - low) for end in ends]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + step)
    # Half of what the topmost was pushed up is given back, so that the labels spread both ways.
    shift = max(heights, default=0) - max(((end[1] - low) / (high - low) for end in ends), default=0)
    for (x, y, text, color), height in zip(ends, heights, strict=True):
        axes.annotate(text, (x, y), (1.03, height - shift / 2), textcoords="axes fraction", va="center",
                      fontsize=9.5, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9, "alpha": 0.8, "shrinkB": 3})


def comparison_picture(runs: list[dict], comparison: dict, path: Path) -> None:
    """Validation accuracy against wall-clock time, a curve per precision, beside bars of training time and
    memory; colours, line styles and hatches each tell the precisions apart alone."""
    rows = [(row, STYLES[place % len(STYLES)]) for place, row in enumerate(comparison["rows"]) if row["test_acc"]]
    with picture(path, 11.5, max(4.4, 2.6 + 0.6 * len(rows))) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1])
        axes, *panels = (figure.add_subplot(grid[place]) for place in (np.s_[:, 0], np.s_[0, 1], np.s_[1, 1]))
        by_directory = {str(run["directory"]): run for run in runs if run["result"] and run["metrics"]}
        longest = max((elapsed(run).max() for run in by_directory.values()), default=0)
        divisor, unit = duration_unit([longest])
        ends = []
        for row, (color, line, marker, _) in rows:
            curves = [by_directory[name] for name in row["runs"] if name in by_directory]
            for place, run in enumerate(curves):
                times, accuracy = elapsed(run) / divisor, column(run["metrics"], "val_acc")
                axes.plot(times, accuracy, color=color, linestyle=line, marker=marker, markersize=5,
                          markevery=1 if len(times) <= 15 else [len(times) - 1], alpha=1 if place == 0 else 0.4)
                if place == 0 and np.isfinite(accuracy[-1]):
                    ends.append((times[-1], accuracy[-1], clean(row["label"], 24), color))
        end_labels(axes, ends)
        axes.set(title="Validation accuracy (%)", xlabel=f"time since the start, evaluation included ({unit})")
        axes.set_xlim(left=0)
        if not rows:
            axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center")
        divisor, unit = duration_unit([row["train_seconds"]["mean"] for row, _ in rows])
        bar_panel(panels[0], rows, "train_seconds", divisor, f"Training time ({unit})", "without evaluation",
                  "speed_up")
        kinds = {row["memory_kind"] for row, _ in rows}
        bar_panel(panels[1], rows, "memory_mb", 1, "Peak memory (MB)", " or ".join(filter(None, kinds)), "memory_ratio")


def elapsed(run: dict) -> np.ndarray:
    """Wall-clock seconds at the end of each epoch; the training seconds added up where a run has no clock."""
    times = column(run["metrics"], "elapsed")
    return times if np.isfinite(times).all() else np.nancumsum(column(run["metrics"], "seconds"))


def bar_panel(axes: Axes, rows: list[tuple], name: str, divisor: float, title: str, remark: str,
              factor: str) -> None:
    """A bar per precision with its value and its quotient to FP32."""
    form = ",.0f" if name == "memory_mb" else ".1f"
    for place, (row, (color, _, _, hatch)) in enumerate(rows):
        mean, error = row[name]["mean"] / divisor, (row[name]["std"] or 0) / divisor
        axes.barh(place, mean, xerr=error or None, color=color, hatch=hatch, edgecolor="white", height=0.62,
                  error_kw={"ecolor": INK, "capsize": 3})
        note = f" ({row[factor]:.2f}×{' images/s' if factor == 'speed_up' else ''})" if (
            row[factor] and row["precision"] != "fp32") else ""
        axes.annotate(format(mean, form) + note, (mean + error, place), (5, 0), textcoords="offset points",
                      va="center", fontsize=9)
    longest = max(((row[name]["mean"] + (row[name]["std"] or 0)) / divisor for row, _ in rows), default=1)
    axes.set(title=title, xlabel=remark, xlim=(0, longest * 1.55 or 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_yticks(range(len(rows)), [clean(row["label"], 24) for row, _ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def reliability_curve(runs: list[dict], path: Path) -> None:
    """Accuracy against confidence on the test images, the runs over one another, with the share of images in
    each bin below; runs without predictions.csv are left out."""
    found = [(group["label"], run, run_calibration(run)) for group in group_runs(runs) for run in group["runs"]]
    found = [entry for entry in found if entry[2]]
    with picture(path, 6, 6.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        upper.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2, label="perfectly calibrated")
        for place, (label, _run, numbers) in enumerate(found):
            color, line, marker, hatch = STYLES[place % len(STYLES)]
            filled = [number for number, count in enumerate(numbers["count"]) if count]
            upper.plot(*([100 * numbers[axis][number] for number in filled] for axis in ("confidence", "accuracy")),
                       color=color, linestyle=line, marker=marker, markersize=5,
                       label=f"{clean(label, 40)}: calibration error {100 * numbers['ece']:.2f} %")
            size, share = 100 / numbers["bins"], np.array(numbers["count"]) / sum(numbers["count"]) * 100
            lower.bar((np.arange(numbers["bins"]) + (place + 0.5) / len(found)) * size, share, color=color,
                      width=0.9 * size / len(found), hatch=hatch, edgecolor="white", linewidth=0.3)
        upper.set(title="Reliability on the test images", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
        lower.set(xlabel="confidence (%)", ylabel="% of images")
        upper.legend(loc="best")


def load_picture(path: Path, side: int) -> np.ndarray | None:
    """An image as RGB array [height, width, 3] of at most `side` pixels, None when it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image, dtype=np.float64)
                image = Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
            image.thumbnail((side, side))
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def gallery(predictions_csv: Path, data_root: Path, path: Path, *, count: int = 24) -> None:
    """The test images that were wrong with the highest confidence, at most `count`, with their true and their
    predicted class. Paths in the file are taken below `data_root`; an image that is not there is a blank."""
    table = read_predictions(Path(predictions_csv))
    wrong = [place for place in np.argsort(-table["confidence"], kind="stable")
             if table["labels"][place] != table["predicted"][place]][:count]
    columns = min(6, max(3, len(wrong)))
    lines = max(1, math.ceil(len(wrong) / columns))
    with picture(path, 1.85 * columns, 2.3 * lines + 0.5) as figure:
        heading = (f"The {len(wrong)} most confidently wrong test images" if wrong
                   else "No test image was classified wrongly")
        figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes in panels:
            axes.axis("off")
        for axes, place in zip(figure.axes, wrong, strict=False):
            image = load_picture(Path(data_root) / table["paths"][place], 224)
            if image is None:
                axes.imshow(np.full((100, 100, 3), 232, dtype=np.uint8))
                name = clean(Path(table["paths"][place]).name, 18)
                axes.text(50, 50, f"not found:\n{name}", ha="center", va="center", fontsize=7.5, color="#555555")
            else:
                axes.imshow(image, interpolation="lanczos")
            axes.set_title(f"{clean(table['predicted'][place], 14)} {100 * table['confidence'][place]:.0f} %\n"
                           f"true: {clean(table['labels'][place], 15)}", fontsize=8.5, fontweight="normal")


def labelled_sheet(paths: list[Path], captions: list[str], path: Path, *, most: int = 60, columns: int = 6) -> None:
    """A contact sheet of image files with a caption under each; at most `most`, evenly chosen."""
    chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    with picture(path, 1.7 * columns, 2.0 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for axes, index in zip(grid, chosen, strict=False):
            pixels = load_picture(paths[index], 160)
            if pixels is not None:
                axes.imshow(pixels)
            axes.set_title(clean(captions[index], 24), fontsize=8, parse_math=False)
