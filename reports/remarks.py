"""What a reader of a comparison must know beside its numbers, in whole sentences: why a number is not stated.

The terminal, Markdown, HTML and comparison.json say the same sentences.
"""

from __future__ import annotations

from typing import Any

from reports.ratios import UNCLEAR
from system.waiting import BUSY
from utils import printable

_RATIOS = {"speed_up": ("speed-up", "images/s"), "memory_ratio": ("memory ratio", "memory")}


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """Return the sentences for the rows of a comparison, as `results.compare_runs` makes them."""
    sentences = _busy_machines(rows)
    for row in rows:
        sentences += _unclear_ratios(row)
    return [printable(text) for text in sentences]


def _busy_machines(rows: list[dict[str, Any]]) -> list[str]:
    """Say which rows lost time to other programs."""
    lost = [f"{row['label']} lost {100 * row['busy_share']:.0f} %" for row in rows if row["busy_share"] > BUSY]
    if not lost:
        return []
    return [
        f"The machine was busy: times are not comparable ({', '.join(lost)} of the time waiting for processors that "
        "other programs used)."
    ]


def _unclear_ratios(row: dict[str, Any]) -> list[str]:
    """Say for each ratio that is not stated how far its values lie apart."""
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
