"""Compute the speed-up and the memory ratio of one row of a comparison against its FP32 row.

Takes plain numbers. No other module computes a ratio of two rows or decides if it may be stated.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

# Printed in a table instead of a ratio.
UNCLEAR = "unclear"  # the ratio varies more between seeds than it differs from 1
MACHINE_BUSY = "busy"  # other programs used the machine during the measurement


def set_ratio(row: dict[str, Any], base: dict[str, Any], name: str, measure: str, *, busy: bool = False) -> None:
    """Set `row[name]` to the median ratio of `measure` to that of `base`, or to None if it may not be stated.

    `row["ratios"][name]` gets `values`, the ratio of each seed that both rows have (of each pair of runs if they share
    fewer than two), and `unstated`, the reason in one word or None. A ratio is not stated if its values spread further
    (largest ÷ smallest) than their median is from 1; a ratio of times is not stated if a machine was `busy`.
    """
    values = _by_seed(row, base, measure)
    if not values:
        return
    median = statistics.median(values)
    spread = math.log(max(values) / min(values))
    unclear = UNCLEAR if spread > abs(math.log(median)) else None
    unstated = MACHINE_BUSY if busy else unclear
    row[name] = None if unstated else median
    row["ratios"][name] = {"values": values, "unstated": unstated}


def _by_seed(row: dict[str, Any], base: dict[str, Any], measure: str) -> list[float]:
    """Return the ratios of `measure` seed by seed; empty if a value is missing or 0, as memory is on Windows."""
    own, theirs = ((part[measure] or {"values": []})["values"] for part in (row, base))
    if not all([*own, *theirs]) or (len(own), len(theirs)) != (len(row["seeds"]), len(base["seeds"])):
        return []
    one = dict(zip(row["seeds"], own, strict=True))
    other = dict(zip(base["seeds"], theirs, strict=True))
    shared = [seed for seed in one if seed in other]
    seed_by_seed = ((one[seed], other[seed]) for seed in shared)
    pairs = seed_by_seed if len(shared) > 1 else itertools.product(own, theirs)
    return [mine / reference for mine, reference in pairs]
