"""How many times as fast, and in what share of the memory: one row of a comparison against its FP32 row.

Takes plain numbers. The only place in which a ratio of two rows is computed, and decided whether it may be stated.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

# What stands in a table in place of a ratio.
UNCLEAR = "unclear"  # it differs between seeds by more than it gains
MACHINE_BUSY = "busy"  # other programs used the machine while it was measured


def set_ratio(row: dict[str, Any], base: dict[str, Any], name: str, measure: str, *, busy: bool = False) -> None:
    """Set `row[name]` to the median ratio of `measure` to that of `base`, or to None if it may not be stated.

    Beside it, `row["ratios"][name]` holds `values`, the ratio of each seed that both rows have (of each pair of runs
    if they share fewer than two), and `unstated`, the reason in one word or None. A ratio is not stated if its values
    spread further (largest ÷ smallest) than their median is from 1, and no ratio of times is if a machine was `busy`.
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
    """Return the ratios of `measure` seed by seed; none if a value is missing or 0, as memory is on Windows."""
    own = row[measure]["values"]
    theirs = base[measure]["values"]
    if not all([*own, *theirs]):
        return []
    one = dict(zip(row["seeds"], own, strict=True))
    other = dict(zip(base["seeds"], theirs, strict=True))
    shared = [seed for seed in one if seed in other]
    seed_by_seed = ((one[seed], other[seed]) for seed in shared)
    pairs = seed_by_seed if len(shared) > 1 else itertools.product(own, theirs)
    return [mine / reference for mine, reference in pairs]
