"""Answer first: how much faster, how much less memory, how accurate, and what to do. From a comparison's numbers."""

from __future__ import annotations

from typing import Any

from reports.ratios import MACHINE_BUSY, UNCLEAR
from reports.text import fit

GAIN = 0.05  # a smaller gain in time and memory is not worth a second precision
LONGEST = 40  # columns of a label in pictures


def short_labels(comparison: dict[str, Any]) -> list[str]:
    """Return a name for each row that tells it from the others: without the model if all have the same.

    A name that is too long loses its middle, so that the precision stays.
    """
    rows = comparison["rows"]
    one = len({row["model"] for row in rows}) == 1
    names = []
    for row in rows:
        model = f"{row['model']} "
        rest = row["label"].removeprefix(model)
        names.append(fit(rest, LONGEST) if one else f"{fit(model.strip(), 22)} {fit(rest, LONGEST)}".strip())
    return names


def title_of(comparison: dict[str, Any]) -> str:
    """Return the title: the model and its precisions."""
    models = list(dict.fromkeys(row["model"] for row in comparison["rows"] if row["model"]))
    names = list(dict.fromkeys(short_labels(comparison))) if len(models) == 1 else []
    return f"{', '.join(models) or 'Comparison'}: {', '.join(names)}" if names else ", ".join(models) or "Comparison"


def best_row(comparison: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str] | None:
    """Return the fastest row that is compared with FP32, its FP32 row and its short label; None if there is none."""
    names = dict(zip((row["label"] for row in comparison["rows"]), short_labels(comparison), strict=True))
    rows = [row for row in comparison["rows"] if row["difference"]]
    if not rows:
        return None
    row = max(rows, key=lambda row: (row["speed_up"] or 0.0, -(row["memory_ratio"] or 1.0)))
    base = next(other for other in comparison["rows"] if other["label"] == row["against"])
    return row, base, names[row["label"]]


def level(comparison: dict[str, Any]) -> float:
    """Return the p-value below which a difference in accuracy is not noise: all tests share 5 % (Bonferroni)."""
    tests = sum(bool(row["difference"]) and row["difference"]["p_value"] is not None for row in comparison["rows"])
    return 0.05 / max(1, tests)


def cards(comparison: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return title, figure and words of speed, memory and accuracy; an empty list if nothing stands beside FP32."""
    found = best_row(comparison)
    if not found:
        return []
    row, base, _ = found
    return [
        ("Speed", *_speed(row, base)),
        ("Memory", *_memory(row, base)),
        ("Accuracy", *_accuracy(row, base, level(comparison))),
    ]


def _speed(row: dict[str, Any], base: dict[str, Any]) -> tuple[str, str]:
    """Return the figure and the words about speed."""
    both = _medians(row, base, "images_per_second", "images/s")
    if row["speed_up"] is not None:
        return f"{row['speed_up']:.2f}×", f"as fast as FP32{both}"
    if not both:
        return "unknown", "speed: the runs were not trained here"
    busy = row["ratios"].get("speed_up", {}).get("unstated") == MACHINE_BUSY
    return "unclear", f"{'speed, because the machine was busy' if busy else 'speed from seed to seed'}{both}"


def _memory(row: dict[str, Any], base: dict[str, Any]) -> tuple[str, str]:
    """Return the figure and the words about memory."""
    both = _medians(row, base, "memory_mb", "MB")
    if row["memory_ratio"] is None:
        return "unclear" if both else "unknown", f"memory{both}"
    percent = round(100 * (1 - row["memory_ratio"]))
    if percent == 0:
        return "same", f"memory as FP32{both}"
    return f"{abs(percent)} % {'less' if percent > 0 else 'more'}", f"memory than FP32{both}"


def _medians(row: dict[str, Any], base: dict[str, Any], measure: str, unit: str) -> str:
    if not (row[measure] and base[measure]):
        return ""
    return f": {row[measure]['median']:,.0f} against {base[measure]['median']:,.0f} {unit}"


def _accuracy(row: dict[str, Any], base: dict[str, Any], level: float) -> tuple[str, str]:
    """Return the figure and the words about accuracy."""
    entry = row["difference"]
    both = f"{row['test_acc']['mean']:.2f} against {base['test_acc']['mean']:.2f} %"
    points = f"{entry['points']:+.2f} points"
    if entry["p_value"] is None:
        return points, f"in accuracy, which could not be tested: {both}"
    if entry["p_value"] < level:
        return points, f"in accuracy, more than chance explains: {both}"
    seeds = len(row["seeds"])
    shown = f"{seeds} seeds" if seeds > 1 else f"{entry['images']:,} images" if entry.get("images") else "this test"
    return "no difference", f"in accuracy that {shown} could show: {both}"


def advice(comparison: dict[str, Any]) -> str:
    """Return one sentence of advice."""
    found = best_row(comparison)
    if not found:
        return "Finish an FP32 run and another precision: then they can be compared."
    row, _, name = found
    points = row["difference"]["points"]
    p_value = row["difference"]["p_value"]
    unstated = row["ratios"].get("speed_up", {}).get("unstated")
    if p_value is not None and p_value < level(comparison) and points < 0:
        return f"Stay with FP32: {name} is less accurate by {-points:.2f} points, more than chance explains."
    if unstated == MACHINE_BUSY:
        return "Measure again while nothing else runs: other programs took part of the time."
    if unstated == UNCLEAR:
        return f"Measure with more seeds (--seeds 5): from run to run times differ by more than {name} gains."
    gains = (row["speed_up"] or 1.0) >= 1 + GAIN or (row["memory_ratio"] or 1.0) <= 1 - GAIN
    if not gains:
        return f"Stay with FP32: {name} gains less than {100 * GAIN:.0f} % here."
    if len(row["seeds"]) == 1 and abs(points) >= 1:
        return f"Use {name}; more seeds (--seeds 3) would say if its accuracy differs."
    return f"Use {name}."


def in_one_sentence(comparison: dict[str, Any]) -> str:
    """Return the figures of the cards and the advice for the end of a terminal's output."""
    found = best_row(comparison)
    figures = ", ".join(f"{figure} {words.partition(': ')[0]}" for _, figure, words in cards(comparison))
    return f"{found[2]}: {figures}. {advice(comparison)}" if found else advice(comparison)
