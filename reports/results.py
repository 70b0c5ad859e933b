"""Result files in, numbers and tables out: run folders, calibration, the comparison, the performance table.

Everything comes from what runs wrote, so a table can be made again later and on another machine. Knows nothing of
torch, of training, or of how anything is drawn.
"""

from __future__ import annotations

import csv
import html
import json
import math
import textwrap
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm.utils import disp_len, disp_trim  # columns on a terminal: wide letters take two

from option import PRECISIONS
from utils import UserError, printable, read_json, reading

SHARES = ("precision", "recall", "f1")
WIDTH = 80


# ------------------------------------------------------------------------------------- files
def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The epochs of metrics.jsonl. Raises UserError where it is missing or damaged."""
    with reading(file):
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if any(isinstance(value, (str, dict)) for line in metrics for value in line.values()):
            raise ValueError("no number")
        return [line | {"epoch": int(line["epoch"])} for line in metrics]


def read_run(directory: str | Path) -> dict[str, Any]:
    """What a run's folder holds: directory, config, options, metrics, result (None where it is not finished), failure
    (its reason or None), and of the run its label, model, precision, device_name and seed.

    Raises UserError naming the file that is missing or damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{printable(directory)}: there is no such run folder.")
    config_file, metrics_file, result_file, failure_file = (
        directory / name for name in ("config.json", "metrics.jsonl", "result.json", "failure.json"))
    result = read_json(result_file) if result_file.exists() else None
    failure = read_json(failure_file) if failure_file.exists() and result is None else {}
    # A run that failed at once may have written neither options nor epochs.
    config = read_json(config_file) if config_file.exists() or not failure else {}
    metrics = read_metrics(metrics_file) if metrics_file.exists() or result else []
    with reading(config_file):
        config |= {part: dict(config.get(part, {})) for part in ("options", "dataset", "versions")}
        options, precision = config["options"], config.get("precision") or failure.get("precision")
        if precision not in PRECISIONS or not isinstance(options.get("seed", 0), int):
            raise ValueError(f"unknown precision {precision}, or no seed")
    if result is not None:
        with reading(result_file):
            _check(result)
    run = {
        "directory": directory, "config": config, "options": options, "metrics": metrics, "result": result,
        "failure": failure.get("reason"), "precision": precision, "model": str(options.get("model", "")),
        "device_name": str(config.get("device_name", "")), "seed": options.get("seed"),
    }  # fmt: skip
    tell_apart([run])
    return run


def _check(result: dict[str, Any]) -> None:
    """Raises where result.json lacks what tables and pictures need, or holds something else in its place."""
    numbers = [result[name] for name in ("test_acc", "best_val_acc", "best_epoch", "total_seconds", "train_seconds",
                                         "images_per_second", "peak_memory_mb")]
    rows = [result["per_class"][name] for name in result["classes"]]
    numbers += [row[name] for row in rows for name in (*SHARES, "support")]
    confusion = np.array(result["confusion"], dtype=int)
    if not all(map(math.isfinite, numbers)) or confusion.shape != (len(rows),) * 2 or confusion.sum() < 1:
        raise ValueError("its numbers or its confusion matrix make no sense")


def read_predictions(file: Path) -> dict[str, Any]:
    """predictions.csv as {classes, paths, labels, predicted (lists of text), confidence [N],
    probabilities [N, classes]}. Raises UserError where it is missing or damaged."""
    with reading(file), open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        header, *rows = csv.reader(lines)
        numbers = np.array([row[3:] for row in rows], dtype=float).reshape(len(rows), len(header) - 3)
        if len(header) < 5 or not np.isfinite(numbers).all():
            raise ValueError("a column or a number is missing")
        return {"classes": header[4:], "paths": [row[0] for row in rows], "labels": [row[1] for row in rows],
                "predicted": [row[2] for row in rows], "confidence": numbers[:, 0],
                "probabilities": numbers[:, 1:]}  # fmt: skip


def column(metrics: list[dict[str, Any]], name: str) -> np.ndarray:
    """One entry of all epochs as floats [epochs]; NaN where it is absent or null."""
    return np.array([epoch.get(name) for epoch in metrics], dtype=float)


# ----------------------------------------------------------------------------------- numbers
def steady_rate(metrics: list[dict[str, Any]]) -> float:
    """Median images/s of the epochs after the first, which pays for warm-up; the first where it is the only one."""
    return float(np.median(column(metrics[1:] or metrics, "images_per_second")))


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share after Wilson (1927), in percent."""
    interval = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error (a share, 0 to 1) after Guo et al. 2017: equal bins ((m-1)/M, m/M] of the highest
    probability. probabilities [N, classes], labels [N] class indices. `count` and the mean `confidence` and
    `accuracy` are arrays [bins], the means NaN in an empty bin."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count, confident, correct = (np.bincount(place, weights, bins) for weights in (None, confidence, right))
    filled = np.where(count, count, math.nan)
    return {"ece": float(np.abs(confident - correct).sum() / len(labels)), "count": count,
            "confidence": confident / filled, "accuracy": correct / filled}  # fmt: skip


def run_calibration(run: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration of a run's test predictions; None where it wrote none."""
    file = run["directory"] / "predictions.csv"
    if not file.exists():
        return None
    table = read_predictions(file)
    with reading(file):
        return calibration(table["probabilities"], np.array([table["classes"].index(name) for name in table["labels"]]))


def mcnemar(reference: Path, other: Path) -> dict[str, Any] | None:
    """Exact McNemar test of two predictions.csv on the images both list; None where they share none: a two-sided
    binomial test on the images that exactly one of the two gets right."""
    if not (reference.exists() and other.exists()):
        return None
    first, second = ({(path, label): label == predicted for path, label, predicted
                      in zip(table["paths"], table["labels"], table["predicted"], strict=True)}
                     for table in map(read_predictions, (reference, other)))
    shared = first.keys() & second.keys()
    lost = sum(first[image] and not second[image] for image in shared)
    gained = sum(second[image] and not first[image] for image in shared)
    p_value = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return {"images": len(shared), "lost": lost, "gained": gained, "p_value": p_value} if shared else None


# -------------------------------------------------------------------------------- comparison
def tell_apart(runs: list[dict[str, Any]]) -> None:
    """Gives each run a `label` of model, precision and whatever else it takes so that runs of one label differ in
    their seed alone. What a run that failed at once did not record is taken to be as in the others."""
    for name in ("model", "device_name"):
        known = next((run[name] for run in runs if run[name]), "")
        for run in runs:
            run[name] = run[name] or known
    several = len({run["device_name"] for run in runs}) > 1
    for run in runs:
        name = f"{run['model']} {PRECISIONS[run['precision']]}".strip()
        run["label"] = f"{name}, {run['device_name']}" if several else name
    count = Counter((run["label"], run["seed"]) for run in runs)
    for label in {label for (label, _), number in count.items() if number > 1}:
        for run in runs:
            run["label"] += f" ({run['directory']})" if run["label"] == label else ""


def compare_runs(runs: list[dict[str, Any]], may_differ: Collection[str] = ()) -> dict[str, Any]:
    """The content of comparison.json from runs as `read_run` gives them: config (of the first run), devices, rows,
    and differences (options that are not the same in all runs, less those of `may_differ`).

    A row holds the runs of one label: spreads of what was measured, reasons of failures, and, against the FP32 runs
    of the same model and device, `speed_up` (of images/s), `memory_ratio` and `difference` (of accuracy).
    """
    tell_apart(runs)
    order, groups = list(PRECISIONS), {}
    for run in sorted(runs, key=lambda run: (run["device_name"], run["model"], order.index(run["precision"]))):
        groups.setdefault(run["label"], []).append(run)
    rows = [_row(group) for group in groups.values()]
    finished = [row for row in rows if row["test_acc"]]
    for row in finished:
        base = next((other for other in finished if other["precision"] == "fp32" and
                     all(other[name] == row[name] for name in ("model", "device_name"))), None)
        if base:
            row["speed_up"] = row["images_per_second"]["mean"] / base["images_per_second"]["mean"]
            if base["memory_mb"]["mean"]:  # Windows does not say
                row["memory_ratio"] = row["memory_mb"]["mean"] / base["memory_mb"]["mean"]
            row["difference"] = None if row is base else _difference(base, row)
    configs = [run["config"] for run in runs if run["options"]]
    options = [config["options"] | {"images": config["dataset"].get("fingerprint")} for config in configs]
    values = {name: [one.get(name) for one in options] for name in set().union(*options) - {*may_differ, "model"}}
    return {
        "rows": rows, "devices": list(dict.fromkeys(row["device_name"] for row in rows)),
        "differences": {name: found for name, found in sorted(values.items()) if found.count(found[0]) < len(found)},
        "config": configs[0] if configs else {},
    }  # fmt: skip


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    finished = [run for run in runs if run["result"]]
    keys = ("test_acc", "peak_memory_mb", "reserved_memory_mb", "total_seconds", "train_seconds", "images_per_second")
    return {
        **{name: runs[0][name] for name in ("label", "precision", "model", "device_name")},
        "runs": [str(run["directory"]) for run in finished], "seeds": [run["seed"] for run in finished],
        **{key.replace("peak_", ""): _spread([run["result"].get(key) for run in finished]) for key in keys},
        "memory_kind": next((str(run["result"].get("memory_kind")) for run in finished), None),
        "speed_up": None, "memory_ratio": None, "difference": None,
        "failures": [
            {"run": str(run["directory"]), "seed": run["seed"], "reason": f"failed: {run['failure']}" if run["failure"]
             else f"not finished: {len(run['metrics'])} of {run['options'].get('epochs')} epochs done"}
            for run in runs if not run["result"]],
    }  # fmt: skip


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    """{mean, std (n - 1; None for one value), values}; None without values."""
    values = [float(value) for value in values if value is not None]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": values} if values else None


def _difference(base: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against FP32 in points, and the test of whether it can be told from noise: of single runs McNemar's
    exact test on the images, of several seeds on both sides Welch's t-test on the accuracies."""
    one, other = base["test_acc"], row["test_acc"]
    counts, test, p_value = [len(one["values"]), len(other["values"])], None, None
    if counts == [1, 1]:
        found = mcnemar(*(Path(rows["runs"][0]) / "predictions.csv" for rows in (base, row)))
        if found:
            test = f"{found['gained']} images gained, {found['lost']} lost of {found['images']:,}, exact McNemar test"
            p_value = found["p_value"]
    elif min(counts) > 1 and (one["std"] or other["std"]):
        test = "Welch's t-test over seeds"
        p_value = float(stats.ttest_ind_from_stats(  # `ttest_ind` warns where the accuracies of one side are equal
            one["mean"], one["std"], counts[0], other["mean"], other["std"], counts[1], equal_var=False).pvalue)
    return {"points": other["mean"] - one["mean"], "test": test, "p_value": p_value}


# -------------------------------------------------------------------------------------- text
def fit(text: object, columns: int) -> str:
    """`text` on one printable line of at most so many terminal columns."""
    text = printable(text)
    return text if disp_len(text) <= columns else disp_trim(text, columns - 1) + "…"


def align(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of one width: the first column to the left, the others to the right."""
    widths = [max(map(disp_len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join([row[0] + " " * (widths[0] - disp_len(row[0])),
                       *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]


def time_unit(seconds: float) -> tuple[int, str]:
    """Seconds, minutes or hours, whichever reads well: (divisor, name)."""
    return (1, "s") if seconds < 120 else (60, "min") if seconds < 36000 else (3600, "h")


def duration(seconds: float) -> str:
    divisor, unit = time_unit(seconds)
    return f"{seconds / divisor:.1f} {unit}"


def facts(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline numbers of a result: (name, value, remark)."""
    right, total = int(np.trace(result["confusion"])), int(np.sum(result["confusion"]))
    low, high = wilson(right, total)
    training = f"{duration(result['train_seconds'])} training, " if result["train_seconds"] is not None else ""
    reserved = f", {result['reserved_memory_mb']:,.0f} MB reserved" if result.get("reserved_memory_mb") else ""
    return [
        ("Test accuracy", f"{result['test_acc']:.2f} %",
         f"{right:,} of {total:,}, 95 % interval {low:.2f} to {high:.2f} %"),
        ("Best epoch", str(result["best_epoch"]), f"validation accuracy {result['best_val_acc']:.2f} %"),
        ("Time", duration(result["total_seconds"]), f"{training}{result['images_per_second']:,.1f} images/s"),
        ("Peak memory", f"{result['peak_memory_mb']:,.0f} MB", f"{result.get('memory_kind')}{reserved}"),
        ("Precision", str(result.get("precision")), f"on {result.get('device_name') or result.get('device')}"),
    ]  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """The closing words of a run, at most 80 columns wide; above 30 classes only the weakest."""
    lines = [fit(f"{name:<15}{value} " + (remark if remark.startswith("on ") else f"({remark})"), WIDTH)
             for name, value, remark in facts(result)]  # fmt: skip
    rows, most = list(result["per_class"].items()), 30
    shown = rows if len(rows) <= most else sorted(rows, key=lambda row: row[1]["f1"])[:most]
    table = [[fit(name, 38), *(f"{100 * row[key]:.2f}" for key in SHARES), f"{row['support']:,.0f}"]
             for name, row in shown]
    lines += ["", *align([["Class", "Precision", "  Recall", "      F1", " Support"], *table])]
    return "\n".join(lines + [f"The {most} of {len(rows)} classes with the lowest F1."] * (len(rows) > most))


def table_cells(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the performance table; a failed run is a line of two cells, the second its reason."""
    rows = comparison["rows"]
    kinds = list(dict.fromkeys(printable(row["memory_kind"]) for row in rows if row["memory_kind"]))
    memory = "GPU Memory (peak allocated)" if kinds == ["CUDA allocated"] else f"Memory ({' or '.join(kinds) or '–'})"
    header = ["Algorithm", "Test Accuracy", memory, "Total Training Time", "Images/s", "Speed-up", "Memory ratio",
              "Time without evaluation"]  # fmt: skip
    time = time_unit(max((row["total_seconds"]["mean"] for row in rows if row["total_seconds"]), default=0))

    def measured(spread: dict[str, Any], form: str, divisor: float = 1, unit: str = "") -> str:
        numbers = [spread["mean"], *([spread["std"]] if spread["std"] is not None else [])]
        return " ± ".join(format(number / divisor, form) for number in numbers) + f" {unit}".rstrip()

    lines = []
    for row in rows:
        if row["test_acc"]:
            lines.append([
                printable(row["label"]), measured(row["test_acc"], ".2f", 1, "%"),
                measured(row["memory_mb"], ".0f", 1, "MB"), measured(row["total_seconds"], ".1f", *time),
                measured(row["images_per_second"], ",.0f" if row["images_per_second"]["mean"] >= 100 else ".1f"),
                *(f"{row[name]:.2f}×" if row[name] else "–" for name in ("speed_up", "memory_ratio")),
                measured(row["train_seconds"], ".1f", *time),
            ])  # fmt: skip
        for failure in row["failures"]:
            seed = f" (seed {failure['seed']})" if row["test_acc"] or len(row["failures"]) > 1 else ""
            lines.append([printable(row["label"]) + seed, fit(failure["reason"], 200)])
    return header, lines


def terminal_table(comparison: dict[str, Any]) -> str:
    """The performance table for a terminal of 80 columns, with the verdict on accuracy below it."""
    header, lines = table_cells(comparison)
    table = [["", "Accuracy", "Memory", "Total time", "Images/s", "Speed-up", "Memory"],
             *(line[:7] for line in lines if len(line) > 2)]  # fmt: skip
    shown = align(table)
    if disp_len(shown[0]) > WIDTH:  # labels get lines of their own
        numbers = align([["", *cells] for _, *cells in table])
        shown = [part for (label, *_), line in zip(table, numbers, strict=True) for part in (label, line) if part]
    below = [": ".join(line) for line in lines if len(line) == 2]
    below += ["", f"{header[2]}; speed-up and the last column, memory, are against FP32.", verdict(comparison)]
    return "\n".join([*shown, *(part for text in below for part in textwrap.wrap(text, WIDTH) or [""])])


def verdict(comparison: dict[str, Any]) -> str:
    """One sentence: can the differences in accuracy be told from noise? All tests share a level of 5 %
    (Bonferroni)."""
    found = {row["label"]: row["difference"] for row in comparison["rows"] if row["difference"]}
    if not found:
        return "No finished FP32 run stands beside another precision, so nothing can be said about accuracy."
    tests, parts = sum(entry["p_value"] is not None for entry in found.values()), []
    for label, entry in found.items():
        outcome = "could not be tested"
        if entry["p_value"] is not None:
            value = f"p = {entry['p_value']:.2g}" if entry["p_value"] >= 0.001 else "p < 0.001"
            different = "" if entry["p_value"] < 0.05 / tests else "not "
            outcome = f"{entry['test']}, {value}: {different}distinguishable from noise"
        parts.append(f"{label} {entry['points']:+.2f} points ({outcome})")
    level = "at a level of 5 %" + f" shared by {tests} tests" * (tests > 1)
    if all(len(row["seeds"]) <= 1 for row in comparison["rows"]):
        parts.append("the spread over seeds was not measured")
    return printable(f"Accuracy against FP32 {level}: {'; '.join(parts)}.")


def conditions(comparison: dict[str, Any]) -> list[str]:
    """What was measured, on what, and in which options the runs differ, as sentences."""
    config = comparison["config"]
    settings = config.get("options", {}) | config.get("dataset", {})
    names = {"epochs": "{} epochs", "batch_size": "batch {}", "image_size": "{0} × {0} px",
             "train": "{:,} training images", "val": "{:,} for validation", "test": "{:,} to test"}  # fmt: skip
    parts = [form.format(settings[name]) for name, form in names.items() if isinstance(settings.get(name), int)]
    parts += [*comparison["devices"], *(f"{name} {version}" for name, version in config.get("versions", {}).items())]
    lines = [f"{', '.join(parts)}."] if parts else []
    lines.append("Images/s is the median over the epochs after the first, which warms up; speed-up compares it, and "
                 "the memory ratio peak memory, with FP32.")
    lines += ["Mean ± standard deviation over seeds."] * any(len(row["seeds"]) > 1 for row in comparison["rows"])
    lines += [f"Beware: the runs also differ in {name} ({', '.join(dict.fromkeys(map(str, values)))})."
              for name, values in comparison["differences"].items()]
    return [printable(line) for line in lines]


def markdown(text: str) -> str:
    """Plain text as Markdown that shows exactly that text, also inside a table cell."""
    return "".join("\\" + letter if letter in "\\`*_[]|$~#" else letter for letter in html.escape(text, quote=False))


def performance_table(comparison: dict[str, Any]) -> str:
    """The performance table as Markdown, with the verdict on accuracy and the conditions below it."""
    header, lines = table_cells(comparison)
    cells = [[markdown(cell) for cell in [*line, *["–"] * len(header)][:len(header)]] for line in lines]
    table = [[markdown(cell) for cell in header], ["---", *["---:"] * (len(header) - 1)], *cells]
    below = [markdown(line) for line in (verdict(comparison), *conditions(comparison))]
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in table), *below]) + "\n"


def parity_table(rows: dict[str, dict[str, Any]]) -> str:
    """One checkpoint in several precisions: accuracy, flipped predictions, and which files they are."""
    lines = align([["", "Accuracy", "Loss", "Flipped", "Largest logit difference"]] + [
        [name, f"{row['accuracy']:.2f} %", f"{row['loss']:.4f}", f"{len(row['flipped']):,}",
         f"{row['largest_logit_difference']:.2e}"] for name, row in rows.items()])  # fmt: skip
    lines.append(f"Flipped predictions and logits are against {next(iter(rows))}.")
    for name, row in rows.items():
        lines += [f"{name}: {fit(flip['path'], 50)} ({flip['label']}): {flip['from']} became {flip['to']}"
                  for flip in row["flipped"][:10]]
        lines += [f"{name}: and {len(row['flipped']) - 10:,} more"] * (len(row["flipped"]) > 10)
    return "\n".join(map(printable, lines))
