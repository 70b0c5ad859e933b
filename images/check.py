"""Check a data set for `prepare --check`: read every image, and report its parts, classes and faults."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from images.cache import survey
from images.decode import NO_DEEP, Rules, ahead, deep_mode, is_transparent, read_header, try_decode
from images.folders import ImageSet
from images.labels import list_images
from images.split import digest, in_groups
from images.walk import raw_advice, relative_name
from system.machine import cores
from utils import printable, progress_bar


@dataclass(frozen=True)
class Look:
    """The result of reading one file: a digest of its pixels, size and mode, or its problem, and its peculiarities."""

    digest: bytes | None
    size: str
    mode: str
    problem: str
    flat: bool = False  # all its pixels have one colour
    several: bool = False  # the file contains several pictures
    transparent: bool = False  # some pixels are transparent, and become white


def look(path: Path, rules: Rules) -> Look:
    """Decode a file as every other command does, and return the result."""
    pixels = try_decode(path, None, rules)
    if isinstance(pixels, str):
        return Look(None, "", "", pixels)
    flat = bool((pixels == pixels[0, 0]).all())
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    header = read_header(path, rules)
    if header is None:
        return Look(digest(pixels), size, "", "", flat)
    transparent = header.transparent and is_transparent(path, rules)
    return Look(digest(pixels), size, header.mode, "", flat, header.several, transparent)


def check(
    data_dir: str | Path, *, labels: str | None = None, rules: Rules | None = None, own_window: bool = True
) -> dict[str, Any]:
    """Read every image of a data set, and report its parts, classes and faults.

    Return `classes`, `counts` {split: {class: images}}, `balance` {split: largest class / smallest, None if that is
    empty}, `sizes` and `modes` {name: images}, `passed_over` {suffix: files}, `notes` (sentences), `windows` of deep
    grey pictures, `unreadable` {file: reason}, `flat` (files of one colour), `several` (files of several pictures),
    `transparent` (files with transparent pixels), and lists of groups of equal pictures: `duplicates`, and of these
    `across_splits` (`shared` has them for each two splits) and `across_labels`. Files are named relative to `data_dir`.
    Raise UserError if there is no data set.
    """
    images = list_images(data_dir, labels=labels)
    rules = rules or Rules()
    workers = min(16, 2 * cores())
    if own_window:
        rules = survey([path for path, _ in images.train], 2**31, rules, True, workers).rules
    files = [(part, label, path) for part, listing in images.parts.items() for path, label in listing]
    with ThreadPoolExecutor(workers) as pool:
        looks = ahead(pool, lambda file: look(file[2], rules), files, 2 * workers)
        seen = list(progress_bar(looks, total=len(files), desc="checking"))
    return _report(str(data_dir), images, rules, files, seen)


def _report(
    data_dir: str, images: ImageSet, rules: Rules, files: list[tuple[str, int, Path]], seen: list[Look]
) -> dict[str, Any]:
    names = [relative_name(path, images.root) for *_, path in files]
    groups = in_groups(found.digest for found in seen)
    counts = {}
    for part, listing in images.parts.items():
        found = Counter(label for _, label in listing)
        counts[part] = {name: found[label] for label, name in enumerate(images.classes)}
    parts_of = [{files[place][0] for place in places} for places in groups]
    shared = {
        f"{one} and {other}": [places for places, parts in zip(groups, parts_of, strict=True) if {one, other} <= parts]
        for one, other in combinations(images.parts, 2)
    }

    deep = {mode for found in seen if (mode := deep_mode(found.mode))}

    def shown(wanted: list[list[int]]) -> list[list[str]]:
        return [[names[place] for place in places] for places in wanted]

    return {
        "data_dir": data_dir,
        "classes": images.classes,
        "counts": counts,
        "balance": {part: _balance(list(found.values())) for part, found in counts.items()},
        "sizes": dict(Counter(found.size for found in seen if found.size).most_common()),
        "modes": dict(Counter(found.mode for found in seen if found.mode).most_common()),
        "passed_over": dict(images.passed_over.most_common()),
        "notes": [*images.notes, *([NO_DEEP] if rules.windows and not deep else [])],
        "windows": {mode: list(rules.windows[mode]) for mode in sorted(deep & rules.windows.keys())},
        "unreadable": {name: found.problem for name, found in zip(names, seen, strict=True) if found.problem},
        "flat": [name for name, found in zip(names, seen, strict=True) if found.flat],
        "several": [name for name, found in zip(names, seen, strict=True) if found.several],
        "transparent": [name for name, found in zip(names, seen, strict=True) if found.transparent],
        "duplicates": shown(groups),
        "across_splits": shown([places for places, parts in zip(groups, parts_of, strict=True) if len(parts) > 1]),
        "shared": {parts: shown(both) for parts, both in shared.items()},
        "across_labels": shown([places for places in groups if len({files[place][1] for place in places}) > 1]),
    }


def _balance(counts: list[int]) -> float | None:
    return round(max(counts) / min(counts), 3) if min(counts) else None


def format_check(report: dict[str, Any], *, most: int = 10) -> str:
    """Return the report of `check` as text for a terminal; cut lists after `most` entries."""
    counts = report["counts"]
    width = max(18, *(len(printable(name)) for name in report["classes"]))
    rows = [("images", *counts)]
    rows += [(printable(name), *(f"{part.get(name, 0):,}" for part in counts.values())) for name in report["classes"]]
    rows.append(("total", *(f"{sum(part.values()):,}" for part in counts.values())))
    balance = ["inf" if value is None else f"{value:.2f}" for value in report["balance"].values()]
    rows.append(("largest / smallest", *balance))
    lines = [printable(report["data_dir"]), *map(printable, report["notes"]), ""]
    lines += [f"{first:{width}}" + "".join(f"{value:>11}" for value in rest) for first, *rest in rows] + [""]
    lines += [_sizes(report["sizes"], most)] if report["sizes"] else []
    for title in ("modes", "passed_over"):
        shown = [f"{printable(name)}: {count:,}" for name, count in list(report[title].items())[:most]]
        rest = len(report[title]) - len(shown)
        if shown:
            more = f", and {rest} more" if rest > 0 else ""
            lines.append(f"{title.replace('_', ' ')}: {', '.join(shown)}{more}")
    lines += raw_advice(Counter(report["passed_over"]))
    lines += Rules.recorded(report).described(report["windows"])
    if len(counts) == 1:
        lines.append("there is one part: a training splits validation and test images off")
    return "\n".join([*lines, *_lists(report, most)])


def _sizes(sizes: dict[str, int], most: int) -> str:
    """Return a line about the sizes of pictures: each with its count, or the smallest and the largest of many."""
    if len(sizes) <= most:
        return "sizes: " + ", ".join(f"{size}: {count:,}" for size, count in sizes.items())
    by_area = sorted(sizes, key=lambda size: math.prod(map(int, size.split("x"))))
    frequent, count = next(iter(sizes.items()))
    often = f", most often {frequent} ({count:,})" if count > 1 else ""
    return f"sizes: {len(sizes):,} different ones, from {by_area[0]} to {by_area[-1]}{often}"


def _lists(report: dict[str, Any], most: int) -> list[str]:
    lines = []
    unreadable = [[f"{name}: {reason}"] for name, reason in report["unreadable"].items()]
    for title, groups in (
        ("\nunreadable files", unreadable),
        ("pictures that come out in one colour", [[name] for name in report["flat"]]),
        ("files of several pictures (only the first is used)", [[name] for name in report["several"]]),
        (
            "pictures with transparency or a fourth band (transparent pixels become white)",
            [[name] for name in report["transparent"]],
        ),
        ("equal pictures that are stored more than once", report["duplicates"]),
        *((f"of these, in both {parts}", groups) for parts, groups in report["shared"].items()),
        ("of these, under two labels", report["across_labels"]),
    ):
        lines += [f"{title}: {len(groups):,}", *("  " + " = ".join(map(printable, group)) for group in groups[:most])]
        lines += [f"  … and {len(groups) - most:,} more"] if len(groups) > most else []
    return lines
