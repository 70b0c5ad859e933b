"""Divide images into training, validation and test images, stratified, with equal pictures on one side."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np

from images.walk import composed
from system.files import from_cell, reading
from utils import UserError

PARTS = ("train", "validation", "test")
SHARES = (70.0, 15.0, 15.0)  # of one folder, in percent; beside a test folder 80 and 20
TEST_SEED = 0  # for the test images: they stay the same with any --seed, so that runs can be compared


def united(pairs: Iterable[Sequence[int]], count: int) -> np.ndarray:
    """Return the unit of each of `count` images, named by its first image; each list in `pairs` joins its images."""
    unit = np.arange(count)

    def first(place: int) -> int:
        while unit[place] != place:
            unit[place] = unit[unit[place]]
            place = int(unit[place])
        return place

    for together in pairs:
        for other in together[1:]:
            one, two = sorted((first(int(together[0])), first(int(other))))
            unit[two] = one
    return np.array([first(place) for place in range(count)], np.int64)


def in_groups(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return lists of the positions of equal keys, if there are at least two; None equals nothing."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            places[key].append(place)
    return [group for group in places.values() if len(group) > 1]


def same_pictures(crc32: np.ndarray, look: Callable[[int], bytes | None]) -> list[list[int]]:
    """Return lists of the positions of equal pictures: of equal checksum, and equal in the result of `look`."""
    return [
        [candidates[place] for place in group]
        for candidates in in_groups(int(value) if value else None for value in crc32)
        for group in in_groups(look(place) for place in candidates)
    ]


def digest(pixels: np.ndarray | str) -> bytes | None:
    return None if isinstance(pixels, str) else hashlib.sha256(pixels.tobytes()).digest() + repr(pixels.shape).encode()


def hold_out(labels: np.ndarray, fraction: float, seed: int, units: np.ndarray) -> np.ndarray:
    """Return the positions held out of `labels`, ascending: `fraction` of each class, in whole units.

    `units` (images,) names the unit of each image. Each class gives at least one unit if it has two, and keeps one.
    """
    return np.flatnonzero(_shared_out(labels, units, (1 - fraction, fraction), (seed,)))


def some_of_each(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the positions of a `fraction` of each class, ascending, at least one image of each.

    A larger fraction with the same seed has all images of a smaller one.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([places[: max(1, round(fraction * len(places)))] for places in by_class]))


def divide(
    labels: np.ndarray,
    *,
    seed: int,
    shares: Sequence[float] | None = None,
    with_test: bool = False,
    together: Iterable[Sequence[int]] = (),
) -> np.ndarray:
    """Return the part of each image, an index of PARTS: validation and, with `with_test`, test are held out.

    `shares` are percentages of training, validation and test (of training and validation if nothing is to be
    tested); `together` lists images that must stay on one side. Without such lists each part, and each class within
    it, is within one image of its share. Raise UserError if nothing can be held out.
    """
    shares = shares or (SHARES if with_test else (80.0, 20.0))
    if with_test and len(shares) < 3:
        raise UserError("--split: three shares are needed, for training, validation and test, such as 70,15,15.")
    asked, seeds = (shares, (seed, TEST_SEED)) if with_test else (shares[:2], (seed,))
    parts = _shared_out(labels, united(together, len(labels)), asked, seeds)
    for part in range(1, len(asked)):
        if not (parts == part).any():
            raise UserError(
                f"nothing can be held out for {PARTS[part]}: a class needs two images that are neither copies of one "
                "another nor of one group; to be split in three, a data set needs two such classes, or one of three."
            )
    return parts


def _shared_out(labels: np.ndarray, units: np.ndarray, shares: Sequence[float], seeds: Sequence[int]) -> np.ndarray:
    """Return the part of each image: 0, or the number of the share that it was drawn for.

    `seeds` has one seed for each share except the first. A unit is drawn whole, with the class of its first image.
    """
    _, heads, inverse, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    weights = np.rint(np.asarray(shares) * 1e6).astype(np.int64)  # integers: 15/85 of 170 images are 30
    own = labels[heads]
    parts = _stratified(own, weights, seeds[0]) if len(weights) == 2 and sizes.max() == 1 else None
    return (_drawn(own, sizes, weights, seeds) if parts is None else parts)[inverse]


def _stratified(labels: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray | None:
    """Return scikit-learn's part of each image, 0 or 1; None if a class is not within one image of its share.

    The computation is that of `train_test_split` with `stratify`; importing it takes a second.
    """
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    exact = counts[:, None] * weights
    whole = weights.sum()
    if (exact < whole).any():  # a part would lack a class
        return None
    held = (2 * exact[:, 1].sum() + whole) // (2 * whole)
    random = np.random.RandomState(seed % 2**32)
    kept = _most_likely(counts, len(labels) - held, random)
    drawn = _most_likely(counts - kept, held, random)
    parts = np.zeros(len(labels), np.int64)
    for own, first, count in zip(np.unique(labels), kept, drawn, strict=True):
        places = np.flatnonzero(labels == own)
        parts[places[random.permutation(len(places))[first : first + count]]] = 1
    return parts if (abs(drawn * whole - exact[:, 1]) <= whole).all() else None


def _most_likely(counts: np.ndarray, draws: int, random: np.random.RandomState) -> np.ndarray:
    """Return the most probable number of draws for each class; `random` decides between equal remainders."""
    exact = counts / counts.sum() * draws
    taken = np.floor(exact)
    remainders = exact - taken
    for remainder in np.unique(remainders)[::-1]:
        missing = int(draws - taken.sum())
        if missing:
            equal = np.flatnonzero(remainders == remainder)
            taken[random.choice(equal, min(len(equal), missing), replace=False)] += 1
    return taken.astype(int)


def _drawn(labels: np.ndarray, sizes: np.ndarray, weights: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Return the part of each unit, given its class, its number of images, and the parts' weights.

    Class by class, each part gets its share rounded down, and the rest goes to the parts that are furthest behind in
    all classes so far. Units are drawn in the order of each part's seed until their images come nearest to that.
    """
    counts = np.bincount(labels)
    orders = [np.random.default_rng(seed % 2**32).permutation(len(labels)) for seed in seeds]
    by_class = [np.split(order[np.argsort(labels[order], kind="stable")], np.cumsum(counts)) for order in orders]
    parts = np.zeros(len(labels), np.int64)
    behind = np.zeros(len(weights), np.int64)  # images, in units of 1 / weights.sum()
    owed = np.zeros(len(weights), np.int64)  # images by which whole units missed the wanted number
    pairs = 0
    for label in np.flatnonzero(counts):
        gives = np.arange(len(weights)) < counts[label]
        if len(weights) == 3 and counts[label] == 2:  # of two units, one is for test or validation
            gives[1:] = [pairs % 2, not pairs % 2]
            pairs += 1
        wanted = _wanted(int(sizes[by_class[0][label]].sum()), weights, behind, gives)
        for part in np.flatnonzero(gives)[:0:-1]:
            free = [unit for unit in by_class[part - 1][label] if not parts[unit]]
            taken = _nearest(free, sizes, wanted[part] + owed[part], len(free) - gives[:part].sum())
            parts[taken] = part
            owed[part] += wanted[part] - sizes[taken].sum()
    return parts


def _wanted(images: int, weights: np.ndarray, behind: np.ndarray, gives: np.ndarray) -> np.ndarray:
    """Return how many of a class's images each part gets, at least one if it `gives` to it; update `behind`."""
    whole = weights.sum()
    exact = images * weights
    behind += exact
    wanted = np.where(gives, np.maximum(exact // whole, 1), 0)
    while wanted.sum() > images:
        wanted[wanted.argmax()] -= 1
    due = behind - wanted * whole
    lacking = [part for part in np.argsort(-due, kind="stable") if gives[part] and wanted[part] * whole < exact[part]]
    wanted[lacking[: images - wanted.sum()]] += 1
    wanted[0] = images - wanted[1:].sum()
    behind -= wanted * whole
    return wanted


def _nearest(units: list[int], sizes: np.ndarray, images: int, most: int) -> list[int]:
    """Return the first units, at least one and at most `most`, whose sizes add up nearest to `images`."""
    taken: list[int] = []
    for unit in units:
        if len(taken) < most and sizes[unit] < 2 * images:
            taken.append(unit)
            images -= sizes[unit]
    return taken or [min(units, key=lambda unit: sizes[unit])]


def extend(recorded: np.ndarray, divided: np.ndarray, together: Iterable[Sequence[int]]) -> np.ndarray:
    """Return `recorded` parts; for -1 the part of an equal or grouped image, or otherwise that in `divided`."""
    parts = recorded.copy()
    units = united(together, len(recorded))
    known = {int(unit): int(part) for unit, part in zip(units[recorded >= 0], recorded[recorded >= 0], strict=True)}
    for place in np.flatnonzero(recorded == -1):
        parts[place] = known.get(int(units[place]), divided[place])
    return parts


def read_split(file: Path) -> dict[str, tuple[str, str]]:
    """Return a split.csv as {path: (class, part)}; an empty part leaves the file out. Raise UserError if damaged."""
    with reading(file), open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = {
            composed(from_cell(row["path"])): (from_cell(row["class"]), row["part"]) for row in csv.DictReader(lines)
        }
        wrong = {part for _, part in rows.values()} - {*PARTS, ""}
        if wrong or not rows:
            raise ValueError(f"no such part: {', '.join(sorted(map(str, wrong)))}" if wrong else "no rows")
        return rows
