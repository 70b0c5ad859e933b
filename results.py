"""Result files in, numbers and tables out: run directories, calibration, comparison, performance table.
Everything comes from what runs wrote, so a table can be made again later and on another machine.
It must not know torch, the training code, live objects or how anything is drawn."""

import csv
import io
import json
import math
import os
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
from scipy import stats

PRECISIONS = {"fp32": "FP32", "tf32": "TF32", "amp-fp16": "AMP float16", "amp-bf16": "AMP bfloat16"}
MEMORY_HEADERS = {"CUDA allocated": "GPU Memory (peak allocated)",
                  "process resident peak": "Memory (process resident peak)"}
SHOWN_OPTIONS = ("model", "epochs", "batch_size", "image_size")
# Options that differ between the runs of one comparison without making it unfair.
FREE_OPTIONS = {"amp", "amp_dtype", "tf32", "precision", "precisions", "seed", "seeds", "checkpoint_name",
                "checkpoint_dir", "resume", "command", "device", "data_dir", "num_workers", "log_interval",
                "quiet", "evaluate", "runs", "report_only", "tensorboard", "cache", "config", "demo", "overwrite",
                "checkpoint_every", "verify_resume"}


# Reading ---------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged, no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is damaged, a JSON object was expected")
    return content


def read_metrics(path: Path, *, finished: bool = True) -> list[dict]:
    """The epochs of metrics.jsonl; the half-written last line of an unfinished run is passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    lines, metrics = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            epoch = json.loads(line) if line.strip() else None
            if epoch is not None:
                epoch["epoch"] = int(epoch["epoch"])
                metrics.append(epoch)
        except (ValueError, TypeError, KeyError):
            if number < len(lines) or finished:
                raise ValueError(f"{path}: line {number} is damaged, no epoch can be read from it") from None
    return metrics


def check_result(result: dict, path: Path) -> None:
    """ValueError when result.json lacks what tables and pictures need, or holds something else in its place."""
    try:
        numbers = [result[key] for key in ("test_acc", "best_val_acc", "best_epoch", "total_seconds",
                                           "train_seconds", "images_per_second", "peak_memory_mb")]
        confusion = np.asarray(result["confusion"], dtype=np.int64)
        valid = (all(isinstance(number, (int, float)) for number in numbers)
                 and confusion.shape == (len(result["classes"]),) * 2 and confusion.sum() > 0
                 and (confusion >= 0).all())
    except KeyError as error:
        raise ValueError(f"{path}: has no entry {error}") from None
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{path}: is damaged, its numbers or its confusion matrix make no sense")


def read_run(directory: Path) -> dict:
    """A run directory as {name, directory, config, metrics, result, failure}; the last two may be None.
    Raises ValueError naming the file that is missing or damaged."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: there is no such run directory")
    result_file, failure_file = directory / "result.json", directory / "failure.json"
    result = read_json(result_file) if result_file.exists() else None
    failure = read_json(failure_file) if failure_file.exists() and result is None else None
    if result is not None:
        check_result(result, result_file)
    # A run that failed at once may have written neither options nor epochs.
    config_file, metrics_file = directory / "config.json", directory / "metrics.jsonl"
    config = {} if failure and not config_file.exists() else read_json(config_file)
    if not isinstance(config.get("options", {}), dict):
        raise ValueError(f"{config_file}: is damaged, its options are not a JSON object")
    metrics = (read_metrics(metrics_file, finished=result is not None)
               if result or metrics_file.exists() else [])
    return {"name": directory.resolve().name, "directory": directory, "config": config, "metrics": metrics,
            "result": result, "failure": failure}


def read_predictions(path: Path) -> dict:
    """predictions.csv as {classes, paths, labels, predicted (lists of text), confidence [N],
    probabilities [N, classes]}; ValueError naming file and row when it is missing or damaged."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: is damaged or empty ({error})") from None
    if len(header) < 5:
        raise ValueError(f"{path}: is damaged, its header names no classes")
    for number, row in enumerate(rows, 1):
        try:
            valid = len(row) == len(header) and np.isfinite([float(value) for value in row[3:]]).all()
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{path}: image {number} is damaged, {len(header)} values were expected")
    numbers = np.array([row[3:] for row in rows], dtype=np.float64).reshape(len(rows), len(header) - 3)
    return {"classes": header[4:], "paths": [row[0] for row in rows], "labels": [row[1] for row in rows],
            "predicted": [row[2] for row in rows], "confidence": numbers[:, 0], "probabilities": numbers[:, 1:]}


def column(metrics: list[dict], name: str) -> np.ndarray:
    """One entry of all epochs as floats [epochs]; NaN where it is absent or null."""
    return np.array([math.nan if epoch.get(name) is None else epoch[name] for epoch in metrics], dtype=float)


# Writing ---------------------------------------------------------------------------------------------

def write_atomically(path: Path, content: str | bytes) -> None:
    """Put the content in place in one move, so that no reader ever meets half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def metrics_csv(metrics: list[dict], path: Path) -> None:
    """The epochs as CSV, a column per number; lists (the skipped updates one by one) stay in the JSON lines."""
    names = list(dict.fromkeys(name for epoch in metrics for name, value in epoch.items()
                               if not isinstance(value, (list, dict))))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(metrics)
    write_atomically(path, text.getvalue())


def text_width(text: str) -> int:
    """Columns the text takes on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
               for letter in text)


def clean(text: object, limit: int | None = None) -> str:
    """One printable line, control and direction marks removed, cut to at most `limit` terminal columns."""
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split()) or "?"
    if limit is None or text_width(text) <= limit:
        return text
    while text_width(text) > limit - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def markdown(text: object) -> str:
    """Plain text as Markdown that shows exactly that text, also inside a table cell."""
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + letter if letter in "\\`*_[]|$~#" else letter for letter in text)


# Numbers ---------------------------------------------------------------------------------------------

def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share after Wilson (1927), in percent."""
    interval = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def class_table(confusion: list[list[int]]) -> list[dict]:
    """Precision, recall and F1 in percent and the support of each class; rows of the matrix are the truth."""
    counts = np.asarray(confusion, dtype=np.int64)
    hits, support, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    return [{"precision": 100 * hit / max(named, 1), "recall": 100 * hit / max(true, 1),
             "f1": 200 * hit / max(named + true, 1), "support": int(true)}
            for hit, true, named in zip(hits, support, predicted, strict=True)]


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict:
    """Expected calibration error (a share, 0 to 1) after Guo et al. 2017: equal bins ((m-1)/M, m/M] of the
    highest probability. probabilities [N, classes], labels [N] class indices. The per-bin lists hold count,
    mean confidence and accuracy (None in an empty bin)."""
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if len(labels) == 0 or probabilities.shape[0] != len(labels):
        raise ValueError("calibration needs one row of probabilities for each label, and at least one")
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    position = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count, confident, right = (np.bincount(position, weights=weights, minlength=bins)
                               for weights in (None, confidence, correct))
    means = [[float(total / number) if number else None for total, number in zip(totals, count, strict=True)]
             for totals in (confident, right)]
    return {"ece": float(np.abs(confident - right).sum() / len(labels)), "bins": bins, "count": count.tolist(),
            "confidence": means[0], "accuracy": means[1]}


def run_calibration(run: dict) -> dict | None:
    """The calibration of a run's test predictions, None when it wrote none."""
    file = run["directory"] / "predictions.csv"
    if not file.exists():
        return None
    predictions = read_predictions(file)
    index = {name: position for position, name in enumerate(predictions["classes"])}
    try:
        labels = [index[label] for label in predictions["labels"]]
        return calibration(predictions["probabilities"], labels)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({clean(error)})") from None


def steady_rate(metrics: list[dict]) -> float | None:
    """Median images/s of the epochs after the first, which pays for warm-up; the first when it is the only one."""
    rates = column(metrics, "images_per_second")
    rates = rates[1:] if len(rates) > 1 else rates
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if len(rates) else None


def spread(values: list[float | None]) -> dict | None:
    """{mean, std (n - 1, None for one value), values}; None without values."""
    values = [float(value) for value in values if value is not None]
    if not values:
        return None
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "values": values}


def ratio(numerator: dict | None, denominator: dict | None) -> float | None:
    """The quotient of two means, None where either is missing or nothing can be divided."""
    return numerator["mean"] / denominator["mean"] if numerator and denominator and denominator["mean"] else None


def mcnemar(reference: Path, other: Path) -> dict | None:
    """Exact McNemar test of two predictions.csv on the images both list, None when they share none:
    a two-sided binomial test on the images that exactly one of the two gets right."""
    if not (reference.exists() and other.exists()):
        return None
    first, second = ({(name, label): label == predicted for name, label, predicted
                      in zip(table["paths"], table["labels"], table["predicted"], strict=True)}
                     for table in map(read_predictions, (reference, other)))
    shared = first.keys() & second.keys()
    only_first = sum(first[image] and not second[image] for image in shared)
    only_second = sum(second[image] and not first[image] for image in shared)
    p_value = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    return {"images": len(shared), "only_reference_right": only_first, "only_other_right": only_second,
            "p_value": float(p_value)} if shared else None


# Comparison ------------------------------------------------------------------------------------------

def option(run: dict, name: str) -> object:
    return run["config"].get("options", {}).get(name)


def precision_name(precision: object) -> str:
    """How tables and pictures spell a precision."""
    return PRECISIONS.get(str(precision), str(precision))


def identity(run: dict) -> tuple[str, str, str]:
    """Precision, model and device name of a run; "" for what a run that failed early did not record."""
    config = run["config"]
    precisions = [(part or {}).get("precision") for part in (run["result"], run["failure"], config)]
    return (str(next(filter(None, precisions), "unknown precision")), str(option(run, "model") or ""),
            str(config.get("device_name") or config.get("device") or ""))


def group_runs(runs: list[dict]) -> list[dict]:
    """Runs that differ only in their seed, together: [{label, algorithm, precision, model, device_name, runs}],
    by device and model, FP32 first."""
    _, models, devices = ([*dict.fromkeys(filter(None, names)), ""] for names in
                          zip(*map(identity, runs), strict=True)) if runs else ([], [""], [""])
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        precision, model, device = identity(run)
        groups.setdefault((precision, model or models[0], device or devices[0]), []).append(run)
    order = list(dict.fromkeys([*PRECISIONS, *(precision for precision, _, _ in groups)]))
    found = []
    for key in sorted(groups, key=lambda key: (devices.index(key[2]), models.index(key[1]), order.index(key[0]))):
        precision, model, device = key
        # The list of names ends with "", hence more than two.
        label = precision_name(precision) + (f", {device}" if len(devices) > 2 else "")
        found.append({"label": f"{model} {label}" if len(models) > 2 else label,
                      "algorithm": f"{model} {label}".strip(), "precision": precision, "model": model,
                      "device_name": device, "runs": groups[key]})
    return found


def group_row(group: dict) -> dict:
    """One line of the comparison: means and deviations over the finished runs, and the reasons of the others."""
    finished = [run for run in group["runs"] if run["result"]]
    row = {key: group[key] for key in ("algorithm", "label", "precision", "model", "device_name")}
    row["runs"] = [str(run["directory"]) for run in group["runs"]]
    row["seeds"] = [option(run, "seed") for run in finished]
    for key, name in (("test_acc", "test_acc"), ("peak_memory_mb", "memory_mb"),
                      ("reserved_memory_mb", "reserved_memory_mb"), ("total_seconds", "total_seconds"),
                      ("train_seconds", "train_seconds")):
        row[name] = spread([run["result"].get(key) for run in finished])
    row["images_per_second"] = spread([steady_rate(run["metrics"]) for run in finished])
    row["memory_kind"] = finished[0]["result"].get("memory_kind") if finished else None
    row["failures"] = []
    for run in group["runs"]:
        if not run["result"]:
            done, planned = len(run["metrics"]), option(run, "epochs")
            unfinished = f"not finished: {done} of {planned} epochs done" if planned else "not finished"
            row["failures"].append({"run": str(run["directory"]), "seed": option(run, "seed"),
                                    "reason": str((run["failure"] or {}).get("reason") or unfinished)})
    return row


def group_difference(reference: dict, other: dict) -> dict:
    """Is the accuracy of two groups distinguishable? McNemar's exact test for each pair of runs of one seed,
    and, with several seeds on both sides, Welch's t-test on the accuracies."""
    first, second = ([run for run in group["runs"] if run["result"]] for group in (reference, other))
    pairs = []
    for run in second:
        # With one run on either side there is nothing to confuse, whatever its seed.
        partner = next((other_run for other_run in first if option(other_run, "seed") == option(run, "seed")),
                       first[0] if len(first) == len(second) == 1 else None)
        test = partner and mcnemar(partner["directory"] / "predictions.csv", run["directory"] / "predictions.csv")
        if test:
            pairs.append({"seed": option(run, "seed"), **test})
    accuracies = [[run["result"]["test_acc"] for run in runs] for runs in (first, second)]
    found = {"reference": reference["label"], "other": other["label"], "mcnemar": pairs, "test": None,
             "difference": float(np.mean(accuracies[1]) - np.mean(accuracies[0])), "p_value": None}
    if min(len(first), len(second)) > 1:
        deviations = [float(np.std(values, ddof=1)) for values in accuracies]
        found.update(test="welch", std=deviations, seeds=[len(first), len(second)])
        if any(deviations):
            found["p_value"] = float(stats.ttest_ind(*accuracies, equal_var=False).pvalue)
        elif found["difference"] == 0:
            found["p_value"] = 1.0
    elif len(pairs) == 1:
        found.update(test="mcnemar", p_value=pairs[0]["p_value"])
    return found


def compare_runs(runs: list[dict]) -> dict:
    """The content of comparison.json from runs as read_run gives them: {settings, differences, devices, versions,
    rows (one per precision, seeds together), significance (each precision against FP32)}.
    speed_up is the quotient of steady images/s; it and memory_ratio are None without a finished FP32 run."""
    groups = group_runs(runs)
    rows, significance = [group_row(group) for group in groups], []
    for group, row in zip(groups, rows, strict=True):
        base = next((number for number, other in enumerate(rows) if other["precision"] == "fp32" and
                     (other["model"], other["device_name"]) == (row["model"], row["device_name"])), None)
        reference = rows[base] if base is not None else {}
        row["speed_up"] = ratio(row["images_per_second"], reference.get("images_per_second"))
        row["memory_ratio"] = ratio(row["memory_mb"], reference.get("memory_mb"))
        if reference and reference is not row and row["test_acc"] and reference["test_acc"]:
            significance.append(group_difference(groups[base], group))
    configs = [run["config"] for run in runs if run["config"]]
    options = [{**config.get("options", {}), "dataset": (config.get("dataset") or {}).get("fingerprint")}
               for config in configs]
    values = {name: [option_set.get(name) for option_set in options] for name in
              dict.fromkeys(name for option_set in options for name in option_set)}
    same = {name: found[0] for name, found in values.items() if all(value == found[0] for value in found)}
    return {"settings": same, "rows": rows, "significance": significance,
            "differences": {name: found for name, found in values.items()
                            if name not in same and name not in FREE_OPTIONS and name != "model"},
            "devices": list(dict.fromkeys(group["device_name"] for group in groups)),
            "versions": configs[0].get("versions", {}) if configs else {},
            "dataset": configs[0].get("dataset", {}) if configs else {}}


# Text ------------------------------------------------------------------------------------------------

def duration_unit(seconds: list[float]) -> tuple[float, str]:
    """Seconds, minutes or hours, whichever reads well for the longest."""
    longest = max(seconds, default=0)
    return (1, "s") if longest < 120 else (60, "min") if longest < 36000 else (3600, "h")


def duration(seconds: float) -> str:
    divisor, unit = duration_unit([seconds])
    return f"{seconds / divisor:.1f} {unit}"


def rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"


def summary(result: dict, *, width: int = 80) -> str:
    """The closing words of a run for the terminal, no line wider than `width` columns (at least 60)."""
    confusion = np.asarray(result["confusion"])
    correct, total = int(np.trace(confusion)), int(confusion.sum())
    low, high = wilson(correct, total)
    memory = f"{result['peak_memory_mb']:,.0f} MB ({result.get('memory_kind') or 'kind unknown'})"
    if result.get("reserved_memory_mb"):
        memory += f", {result['reserved_memory_mb']:,.0f} MB reserved"
    training = f"{duration(result['train_seconds'])} training, " if result["train_seconds"] is not None else ""
    facts = [("Test accuracy", f"{result['test_acc']:.2f} %, 95 % interval {low:.2f} to {high:.2f} %"),
             ("", f"{correct:,} of {total:,} images right"),
             ("Best epoch", f"{result['best_epoch']}, validation accuracy {result['best_val_acc']:.2f} %"),
             ("Precision", f"{result.get('precision')} on {result.get('device_name') or result.get('device')}"),
             ("Time", f"{duration(result['total_seconds'])} in all, {training}{rate(result['images_per_second'])} "
                      "images/s"),
             ("Peak memory", memory)]
    lines = [f"{name:<15}{clean(text, width - 15)}" for name, text in facts]
    rows = list(zip(result["classes"], class_table(result["confusion"]), strict=True))
    shown = rows if len(rows) <= 30 else sorted(rows, key=lambda row: row[1]["f1"])[:20]
    room = min(max(text_width(clean(name)) for name, _ in shown), width - 42)
    room = max(room, len("Class"))
    lines += ["", f"{'Class':<{room}}  Precision    Recall        F1   Support"]
    for name, numbers in shown:
        name = clean(name, room)
        lines.append(name + " " * (room - text_width(name)) + f"  {numbers['precision']:>9.2f} "
                     f"{numbers['recall']:>9.2f} {numbers['f1']:>9.2f} {numbers['support']:>9,}")
    if len(shown) < len(rows):
        lines.append(f"The {len(shown)} classes of lowest F1; all {len(rows)} are in result.json.")
    return "\n".join(lines)


def plus_minus(value: dict | None, form: str, divisor: float = 1) -> str:
    """'mean ± deviation' of a spread; a dash without one."""
    if value is None:
        return "–"
    mean = format(value["mean"] / divisor, form)
    return mean if value["std"] is None else f"{mean} ± {format(value['std'] / divisor, form)}"


def difference_words(entry: dict) -> str:
    """One precision against FP32: the difference and how it was tested."""
    start = f"{entry['other']} differs from {entry['reference']} by {entry['difference']:+.2f} points"
    if entry["p_value"] is None:
        return f"{start}, which cannot be tested for want of matching predictions or of any spread"
    value = f"p = {entry['p_value']:.2g}" if entry["p_value"] >= 0.001 else "p < 0.001"
    if entry["test"] == "welch":
        return (f"{start} (standard deviations {entry['std'][0]:.2f} and {entry['std'][1]:.2f} over "
                f"{entry['seeds'][0]} and {entry['seeds'][1]} seeds, Welch's t-test, {value})")
    pair = entry["mcnemar"][0]
    return (f"{start} ({pair['only_other_right']} images gained, {pair['only_reference_right']} lost of "
            f"{pair['images']:,}, exact McNemar test, {value})")


def verdict(comparison: dict) -> str:
    """One sentence: are the differences in accuracy distinguishable from noise? The level of 5 % is shared by
    all comparisons (Bonferroni)."""
    found = comparison["significance"]
    if not found:
        return "No finished FP32 run stands beside another precision, so nothing can be said about accuracy."
    tested = [entry for entry in found if entry["p_value"] is not None]
    real = [entry["other"] for entry in tested if entry["p_value"] < 0.05 / len(tested)]
    sentence = "; ".join(difference_words(entry) for entry in found)
    if tested:
        level = "at a level of 5 %" + (f" shared by {len(tested)} comparisons" if len(tested) > 1 else "")
        which = ("this is" if len(tested) == 1 else "all of these are" if len(real) == len(tested)
                 else f"that of {' and of '.join(real)} is" if real else "none of these is")
        negative = " not" if len(tested) == 1 and not real else ""
        sentence += f": {which}{negative} distinguishable from noise {level}"
    if any(entry["test"] == "mcnemar" for entry in found):
        sentence += ", while the spread between seeds was not measured"
    return sentence + "."


def table_cells(comparison: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the performance table as plain text; a failed run is a line with its reason."""
    rows = comparison["rows"]
    kinds = list(dict.fromkeys(row["memory_kind"] for row in rows if row["memory_kind"]))
    memory = MEMORY_HEADERS.get(kinds[0], f"Memory ({kinds[0]})") if len(kinds) == 1 else "Memory"
    header = ["Algorithm", "Test Accuracy", memory, "Total Training Time", "Training Time (without evaluation)",
              "Images/s", "Speed-up", "Memory ratio"]
    divisor, unit = duration_unit([row["total_seconds"]["mean"] for row in rows if row["total_seconds"]])
    lines = []
    for row in rows:
        if row["test_acc"]:
            rate_form = ",.0f" if row["images_per_second"] and row["images_per_second"]["mean"] >= 100 else ".1f"
            lines.append([
                row["algorithm"], plus_minus(row["test_acc"], ".2f") + " %",
                plus_minus(row["memory_mb"], ".0f") + " MB" + (f" ({row['memory_kind']})" if len(kinds) > 1 else ""),
                plus_minus(row["total_seconds"], ".1f", divisor) + f" {unit}",
                plus_minus(row["train_seconds"], ".1f", divisor) + f" {unit}",
                plus_minus(row["images_per_second"], rate_form),
                f"{row['speed_up']:.2f}×" if row["speed_up"] else "–",
                f"{row['memory_ratio']:.2f}×" if row["memory_ratio"] else "–"])
        for failure in row["failures"]:
            seed = f" (seed {failure['seed']})" if row["test_acc"] or len(row["failures"]) > 1 else ""
            lines.append([row["algorithm"] + seed, f"failed: {clean(failure['reason'], 200)}", *["–"] * 6])
    return header, lines


def terminal_table(comparison: dict) -> str:
    """The performance table for a terminal of 80 columns, with the verdict on accuracy below it."""
    header, lines = table_cells(comparison)
    kind = header[2].partition("(")[2].rstrip(")") or "peak"
    short = ["Algorithm", "Accuracy", "Memory", "Total", "Training", "Images/s", "Speed-up", "Memory"]
    failed = [line for line in lines if line[1].startswith("failed")]
    table = [short, *(line for line in lines if line not in failed)]
    widths = [max(text_width(line[column]) for line in table) for column in range(len(short))]
    rows = [line[0] + " " * (widths[0] - text_width(line[0]))
            + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            for line in table]
    rows += [f"{line[0]}: {line[1]}" for line in failed]
    notes = [f"Memory is the {kind}; Total includes evaluation; the last two columns are against FP32.",
             verdict(comparison)]
    return "\n".join([*rows, "", *(line for note in notes for line in textwrap.wrap(note, 80))])


def parity_table(rows: dict[str, dict]) -> str:
    """One checkpoint in several precisions: accuracy, flipped predictions, and which files they are."""
    first = next(iter(rows))
    lines = [f"{'Precision':<12}Accuracy     Loss   Flipped   Largest logit difference"]
    for name, row in rows.items():
        lines.append(f"{name:<12}{row['accuracy']:>6.2f} %  {row['loss']:>7.4f}  {len(row['flipped']):>7,}   "
                     + (f"{row['largest_logit_difference']:.2e}" if name != first else f"(all against {first})"))
    for name, row in rows.items():
        for flip in row["flipped"][:10]:
            lines.append(f"{name}: {clean(flip['path'], 50)} ({clean(flip['label'])}): "
                         f"{clean(flip['from'])} became {clean(flip['to'])}")
        if len(row["flipped"]) > 10:
            lines.append(f"{name}: and {len(row['flipped']) - 10:,} more")
    return "\n".join(lines)


def conditions(comparison: dict) -> list[str]:
    """What was measured, on what, and in which options the runs differ, as plain sentences."""
    settings, versions = comparison["settings"], comparison["versions"]
    names = {"model": "{}", "epochs": "{} epochs", "batch_size": "batch {}", "image_size": "{0} × {0} px"}
    parts = [names[name].format(settings[name]) for name in SHOWN_OPTIONS if settings.get(name) is not None]
    dataset = comparison["dataset"]
    if all(isinstance(dataset.get(part), int) for part in ("train", "val", "test")):
        parts.append(f"{dataset['train']:,} training, {dataset['val']:,} validation, {dataset['test']:,} test images")
    parts += comparison["devices"]
    parts += [f"{name} {version}" for name, version in versions.items()]
    lines = [", ".join(clean(part) for part in parts) + "."] if parts else []
    rate_note = ("Images/s is the median over the epochs after the first, which warms up; speed-up compares it, "
                 "and the memory ratio compares peak memory, with FP32.")
    lines.append(rate_note)
    if any(len(row["seeds"]) > 1 for row in comparison["rows"]):
        lines.append("Mean ± standard deviation over seeds.")
    for name, values in comparison["differences"].items():
        found = ", ".join(dict.fromkeys(clean(value, 40) for value in values))
        lines.append(f"Beware: the runs also differ in {clean(name)} ({found}).")
    return lines


def performance_table(comparison: dict) -> str:
    """The performance table as Markdown, with the verdict on accuracy and the conditions below it."""
    header, lines = table_cells(comparison)
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *([markdown(cell) for cell in line] for line in lines)]
    return "\n".join(["| " + " | ".join(line) + " |" for line in table]
                     + [""] + [markdown(verdict(comparison)) + "\n"]
                     + ["\n\n".join(markdown(line) for line in conditions(comparison))]) + "\n"
