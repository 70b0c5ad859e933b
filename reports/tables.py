"""Write the tables and sentences of a result and of a comparison."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

from tqdm.utils import disp_len  # width on a terminal: wide letters take two columns

from ampscope.text import WIDTH
from choices import METRICS, VIEWS
from reports.answer import in_one_sentence, short_labels
from reports.results import wilson
from reports.text import align, fit, markdown, markdown_table, time_unit
from runs.result import SHARES, confusion_cells
from system.terminal import duration
from system.waiting import BUSY
from utils import amount, printable


def facts(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the headline numbers of a result: (name, value, remark)."""
    true, predicted, images = confusion_cells(result).T
    right = int(images[true == predicted].sum())
    total = int(images.sum())
    low, high = wilson(right, total)
    time = f"{duration(result['train_seconds'])} training, " if result["train_seconds"] is not None else ""
    taken = result.get("training_memory_mb")
    training = f", the training itself {taken:,.0f} MB" if taken else ""
    views = VIEWS[result.get("tta") or "none"]
    reserved = f", {result['reserved_memory_mb']:,.0f} MB reserved" if result.get("reserved_memory_mb") else ""
    return [
        (
            METRICS["accuracy"].title,
            f"{result['test_acc']:.2f} %",
            f"{right:,} of {total:,}, 95 % interval {low:.2f} to {high:.2f} %",
        ),
        *([("Models", str(result["models"]), "the mean of their probabilities")] if result.get("models") else []),
        *([(views.title, "on", views.remark)] if views.title else []),
        *_other_figures(result),
        (result.get("epoch_name", "Best epoch"), str(result["best_epoch"]), _validation(result["best_val_acc"])),
        ("Time", duration(result["total_seconds"]), f"{time}{result['images_per_second']:,.1f} images/s"),
        *_busy(result),
        ("Peak memory", f"{result['peak_memory_mb']:,.0f} MB", f"{result.get('memory_kind')}{reserved}{training}"),
        *_calibration(result),
        ("Precision", str(result.get("precision")), f"on {result.get('device_name') or result.get('device')}"),
    ]


def _other_figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return a row for each metric with a title, except accuracy, if the result has a value of it."""
    rows = []
    for name, metric in METRICS.items():
        value = result.get(metric.test_key)
        if metric.title and name != "accuracy" and value is not None and math.isfinite(value):
            rows.append((metric.title, f"{value:.2f}{metric.unit}", metric.remark))
    return rows


def _busy(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return a warning to print beside the time if other programs used the machine."""
    share = result.get("busy_share") or 0.0
    if share <= BUSY:
        return []
    return [("Machine busy", f"{100 * share:.0f} %", "of the time lost waiting for processors: times say little")]


def _calibration(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the calibration error before and after the temperature, if the result has one."""
    if not result.get("temperature"):
        return []
    error, after = (f"{100 * result[name]:.2f} %" for name in ("calibration_error", "calibrated_error"))
    return [("Calibration", f"error {error}", f"{after} with temperature {result['temperature']:.2f} of validation")]


def refusal_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return for each --min_confidence the images that `predict` would refuse, how many rightly, and the rest."""
    total = int(confusion_cells(result)[:, 2].sum())
    right = round(result["test_acc"] * total / 100)
    rows = []
    for entry in result.get("refusals", []):
        answered = total - entry["refused"]
        kept = right - (entry["refused"] - entry["rightly"])
        accuracy = f"{100 * kept / answered:.2f}" if answered else "–"
        rows.append([f"{entry['min_confidence']:g}", f"{entry['refused']:,}", f"{entry['rightly']:,}", accuracy])
    return rows


def class_rows(result: dict[str, Any], names: Iterable[str] = SHARES) -> list[list[str]]:
    """Return a row for each class, and one for their mean: name, figures of these `names` in percent, support."""

    def cells(row: dict[str, Any], support: int) -> list[str]:
        shares = [row.get(name) if support else None for name in names]
        return [*("–" if share is None else f"{100 * share:.2f}" for share in shares), f"{support:,.0f}"]

    rows = [[name, *cells(row, row["support"])] for name, row in result["per_class"].items()]
    if "macro" in result:
        total = sum(row["support"] for row in result["per_class"].values())
        rows.append(["macro average", *cells(result["macro"], total)])
    return rows


def _validation(accuracy: float | None) -> str:
    return "not validated" if accuracy is None else f"validation accuracy {accuracy:.2f} %"


def summary(result: dict[str, Any]) -> str:
    """Return the final text of a run, at most 80 columns wide; above 30 classes only the weakest are listed."""
    lines = [
        fit(f"{name:<15}{value} " + (remark if remark.startswith("on ") else f"({remark})"), WIDTH)
        for name, value, remark in facts(result)
    ]
    count = len(result["per_class"])
    most = 30
    rows = class_rows(result)
    if count > most:
        figures = list(result["per_class"].values())
        tested = sorted(
            (place for place in range(count) if figures[place]["support"]), key=lambda place: figures[place]["f1"]
        )
        rows = [*(rows[place] for place in tested[:most]), *rows[count:]]
    table = [[fit(name, 38), *cells] for name, *cells in rows]
    lines += ["", *align([["Class", "Precision", "  Recall", "      F1", " Support"], *table])]
    lines += [f"The {most} of {count} classes with the lowest F1."] if count > most else []
    refused = refusal_rows(result)
    header = ["predict --min_confidence", "Refused", "Rightly", "Accuracy of the rest"]
    lines += ["", *align([header, *refused])] if refused else []
    return "\n".join(lines)


def table_cells(
    comparison: dict[str, Any], *, ranges: bool = True, short: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the performance table; a failed run has a row of two cells, the second with the reason.

    With `ranges`, the lowest and the highest value over seeds follow each median. With `short`, labels have the model's
    name only if rows differ in it.
    """
    rows = comparison["rows"]
    labels = short_labels(comparison) if short else [printable(row["label"]) for row in rows]
    kinds = list(dict.fromkeys(printable(row["memory_kind"]) for row in rows if row["memory_kind"]))
    memory = "GPU Memory (peak allocated)" if kinds == ["CUDA allocated"] else f"Memory ({' or '.join(kinds) or '–'})"
    header = [
        "Algorithm",
        "Test Accuracy",
        memory,
        "Total Training Time",
        "Images/s",
        "Speed-up",
        "Memory ratio",
        "Time without evaluation",
        "Training memory",
    ]
    longest = max((row["total_seconds"]["median"] for row in rows if row["total_seconds"]), default=0)
    divisor, unit = time_unit(longest)

    def measured(spread: dict[str, Any] | None, form: str, divisor: float = 1, unit: str = "") -> str:
        if spread is None:  # a run that was only tested has no training time
            return "–"
        values = (spread["median"], min(spread["values"]), max(spread["values"]))
        median, lowest, highest = (format(value / divisor, form) for value in values)
        between = f" ({lowest}–{highest})" if ranges and lowest != highest else ""
        return f"{median}{between} {unit}".rstrip()

    lines = []
    for row, label in zip(rows, labels, strict=True):
        if row["test_acc"]:
            lines.append(
                [
                    label,
                    _accuracy(row["test_acc"]),
                    measured(row["memory_mb"], ".0f", 1, "MB"),
                    measured(row["total_seconds"], ".1f", divisor, unit),
                    measured(row["images_per_second"], ",.0f" if row["images_per_second"]["median"] >= 100 else ".1f"),
                    *(_ratio(row, name) for name in ("speed_up", "memory_ratio")),
                    measured(row["train_seconds"], ".1f", divisor, unit),
                    measured(row["training_memory_mb"], ".0f", 1, "MB"),
                ]
            )
        for failure in row["failures"]:
            seed = f" (seed {failure['seed']})" if row["test_acc"] or len(row["failures"]) > 1 else ""
            lines.append([label + seed, fit(failure["reason"], 200)])
    return header, lines


def _accuracy(spread: dict[str, Any]) -> str:
    """Return the mean over seeds, in percent, with its standard deviation."""
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.2f}"
    return f"{spread['mean']:.2f}{deviation} %"


def _ratio(row: dict[str, Any], name: str) -> str:
    """Return a ratio to FP32, or one word for why it is not stated."""
    if row[name] is not None:
        return f"{row[name]:.2f}×"
    return row["ratios"].get(name, {}).get("unstated") or "–"


def terminal_table(comparison: dict[str, Any]) -> str:
    """Return the performance table for a terminal of 80 columns; below it remarks and the answer in one sentence."""
    header, lines = table_cells(comparison, ranges=False, short=True)
    models = {row["model"] for row in comparison["rows"]}
    table = [
        [
            fit(next(iter(models)), 30) if len(models) == 1 else "",
            "Accuracy",
            "Memory",
            "Total time",
            "Images/s",
            "Speed-up",
            "Memory",
        ],
        *(line[:7] for line in lines if len(line) > 2),
    ]
    shown = align(table)
    if disp_len(shown[0]) > WIDTH:  # print labels on lines of their own
        numbers = align([["", *cells] for _, *cells in table])
        shown = [part for (label, *_), line in zip(table, numbers, strict=True) for part in (label, line) if part]
    below = [": ".join(line) for line in lines if len(line) == 2]
    below += ["", f"{header[2]}; speed-up and the last column, memory, are against FP32."]
    below += [
        *spread_over_seeds(comparison),
        *comparison["remarks"],
        verdict(comparison),
        "",
        in_one_sentence(comparison),
    ]
    return "\n".join([*shown, *(part for text in below for part in textwrap.wrap(text, WIDTH) or [""])])


def verdict(comparison: dict[str, Any]) -> str:
    """Say if differences in accuracy can be told from noise. All tests share a level of 5 % (Bonferroni)."""
    found = {row["label"]: row["difference"] for row in comparison["rows"] if row["difference"]}
    if not found:
        return "No finished FP32 run stands beside another precision, so nothing can be said about accuracy."
    tests = sum(entry["p_value"] is not None for entry in found.values())
    parts = []
    for label, entry in found.items():
        outcome = "could not be tested"
        if entry["p_value"] is not None:
            value = f"p = {entry['p_value']:.2g}" if entry["p_value"] >= 0.001 else "p < 0.001"
            different = "" if entry["p_value"] < 0.05 / tests else "not "
            outcome = f"{entry['test']}, {value}: {different}distinguishable from noise"
        parts.append(f"{label} {entry['points']:+.2f} points ({outcome})")
    level = f"at a level of 5 % shared by {tests} tests" if tests > 1 else "at a level of 5 %"
    if all(len(row["seeds"]) <= 1 for row in comparison["rows"]):
        parts.append("the spread over seeds was not measured")
    return printable(f"Accuracy against FP32 {level}: {'; '.join(parts)}.")


def conditions(comparison: dict[str, Any]) -> list[str]:
    """Return sentences on the data, the devices and the versions, and on options that differ between the runs."""
    config = comparison["config"]
    settings = config.get("options", {}) | config.get("dataset", {})
    names = {
        "epochs": "{} epochs",
        "batch_size": "batch {}",
        "image_size": "{0} × {0} px",
        "train": "{:,} training images",
        "val": "{:,} for validation",
        "test": "{:,} to test",
    }
    views = VIEWS[settings.get("tta") or "none"].title
    parts = [form.format(settings[name]) for name, form in names.items() if isinstance(settings.get(name), int)]
    parts += [
        *([views.lower()] if views else []),
        *filter(None, comparison["devices"]),
        *(f"{name} {version}" for name, version in config.get("versions", {}).items()),
    ]
    lines = [f"{', '.join(parts)}."] if parts else []
    rate = "the median over the epochs after the first, which warms up"
    if settings.get("freeze_epochs") == "all":
        rate += " (if the frozen network is computed once: of all epochs, with the time that this takes)"
    lines.append(
        f"Images/s is {rate}; speed-up compares it, and the memory ratio peak memory, with FP32, seed by seed. "
        "Training memory is the peak less the memory before the first update."
    )
    lines += [*spread_over_seeds(comparison), *comparison["remarks"]]
    lines += [
        f"Beware: the runs also differ in {name} ({', '.join(dict.fromkeys(map(str, values)))})."
        for name, values in comparison["differences"].items()
        if name != "images"  # a remark says more about it than two checksums
    ]
    return [printable(line) for line in lines]


def spread_over_seeds(comparison: dict[str, Any]) -> list[str]:
    """Return an explanation of ± and the interval of each mean accuracy; an empty list if each row is one run."""
    intervals = [
        printable(f"{row['label']} {row['test_acc']['mean']:.2f} ± {row['test_acc']['interval']:.2f} %")
        for row in comparison["rows"]
        if len(row["seeds"]) > 1
    ]
    if not intervals:
        return []
    return [
        "Accuracy is the mean ± standard deviation over seeds; all other figures are medians, in parentheses "
        "their range.",
        f"95 % intervals of the mean accuracy (Student's t): {', '.join(intervals)}.",
    ]


def performance_table(comparison: dict[str, Any]) -> str:
    """Return the performance table as Markdown, with the verdict on accuracy and the conditions below it."""
    header, lines = table_cells(comparison)
    cells = [[*line, *["–"] * (len(header) - len(line))] for line in lines]
    below = [markdown(line) for line in (verdict(comparison), *conditions(comparison))]
    return "\n\n".join([markdown_table([header, *cells]), *below]) + "\n"


def parity_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of one checkpoint in several precisions, followed by the predictions that changed."""
    lines = align(
        [
            ["", "Accuracy", "Loss", "Flipped", "Largest logit difference"],
            *([name, *_parity_cells(row)] for name, row in rows.items()),
        ]
    )
    lines.append(f"Flipped predictions and logits are against {next(iter(rows))}.")
    for name, row in rows.items():
        if row["accuracy"] is None:
            bad = row["not_finite"]
            what = f"the logits of {amount(bad, 'image', 'images')} are" if bad else "the loss is"
            lines.append(f"{name}: {what} not finite, so there is no accuracy in this precision.")
        lines += [
            f"{name}: {fit(flip['path'], 50)} ({flip['label']}): {flip['from']} became {flip['to']}"
            for flip in row["flipped"][:10]
        ]
        if len(row["flipped"]) > 10:
            lines.append(f"{name}: and {len(row['flipped']) - 10:,} more")
    return "\n".join(map(printable, lines))


def _parity_cells(row: dict[str, Any]) -> list[str]:
    finite = row["accuracy"] is not None
    difference = row["largest_logit_difference"]
    return [
        f"{row['accuracy']:.2f} %" if finite else "not finite",
        f"{row['loss']:.4f}" if finite else "not finite",
        f"{len(row['flipped']):,}" if difference is not None else "–",
        f"{difference:.2e}" if difference is not None else "–",
    ]
