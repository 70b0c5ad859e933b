"""Who trains, who validates, who is tested: split by scikit-learn, written down, equal pictures kept together.

Imports no torch.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np

from system.files import reading
from utils import UserError

PARTS = ("train", "validation", "test")
SHARES = (70.0, 15.0, 15.0)  # of one folder, in percent; beside a test folder 80 and 20
TEST_SEED = 0  # of what is tested: the same images whatever --seed, so that runs of any seed can be compared


def united(pairs: Iterable[Sequence[int]], count: int) -> np.ndarray:
    """The unit of each of `count` images, named by its first one: images that any list in `pairs` joins are one."""
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
    """Positions of equal keys, where there are at least two; None is equal to nothing."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            places[key].append(place)
    return [group for group in places.values() if len(group) > 1]


def same_pictures(crc32: np.ndarray, look: Callable[[int], bytes | None]) -> list[list[int]]:
    """Positions of pictures that are the same: equal checksums, then equal in what `look` returns of each."""
    return [
        [candidates[place] for place in group]
        for candidates in in_groups(int(value) if value else None for value in crc32)
        for group in in_groups(look(place) for place in candidates)
    ]


def digest(pixels: np.ndarray | str) -> bytes | None:
    return None if isinstance(pixels, str) else hashlib.sha256(pixels.tobytes()).digest() + repr(pixels.shape).encode()


def hold_out(labels: np.ndarray, fraction: float, seed: int, units: np.ndarray, *, grouped: bool = False) -> np.ndarray:
    """Positions held out of `labels`, ascending: about `fraction` of each class, whole units.

    Each class gives at least one unit if it has two, and always keeps one. Stratified by scikit-learn.
    """
    _, heads, inverse = np.unique(units, return_index=True, return_inverse=True)
    own = labels[heads]
    counts = Counter(own.tolist())
    wide = np.flatnonzero([counts[label] > 1 for label in own.tolist()])
    held = np.zeros(len(heads), bool)
    if len(wide):
        sizes = np.bincount(inverse)[wide]
        chosen = _grouped(own[wide], sizes, fraction, seed) if grouped else _stratified(own[wide], fraction, seed)
        held[wide[chosen]] = True
    order = np.random.default_rng(seed % 2**32).permutation(len(heads))
    for label in np.flatnonzero(np.bincount(own)):
        members = order[own[order] == label]
        out = held[members]
        if len(members) > 1 and not out.any():
            held[members[0]] = True
        if len(members) > 1 and out.all():
            held[members[0]] = False
        if len(members) == 1:
            held[members] = False
    return np.flatnonzero(held[inverse])


def hold_out_as_before(labels: np.ndarray, seed: int) -> np.ndarray:
    """Positions that versions without split.csv held out for validation: a fifth, whatever is equal or rare."""
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed % 2**32)[1]


def _stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    classes = len(np.unique(labels))
    size = fraction
    if np.ceil(fraction * len(labels)) < classes or len(labels) - np.ceil(fraction * len(labels)) < classes:
        size = min(max(classes, round(fraction * len(labels))), len(labels) - classes)
    _, held = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed % 2**32)
    return held


def _grouped(labels: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whole groups, balanced by class and by their number of images."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(max(2, round(1 / fraction)), len(labels))
    images = np.repeat(np.arange(len(labels)), sizes)
    if np.bincount(labels[images]).max() < folds:
        folds = max(2, int(np.bincount(labels[images]).max()))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    parts = [np.unique(images[held]) for _, held in splitter.split(images, labels[images], images)]
    wanted = fraction * len(images)
    return min(parts, key=lambda part: abs(sizes[part].sum() - wanted))


def divide(
    labels: np.ndarray,
    *,
    seed: int,
    shares: Sequence[float] | None = None,
    with_test: bool = False,
    together: Iterable[Sequence[int]] = (),
    grouped: bool = False,
) -> np.ndarray:
    """The part of each image, an index of PARTS: validation and, with `with_test`, test held out of the others.

    `shares` are percentages of training, validation and test (of training and validation where nothing is to be
    tested); `together` lists images that must stay on one side. Raises UserError if nothing can be held out.
    """
    shares = shares or (SHARES if with_test else (80.0, 20.0))
    units = united(together, len(labels))
    parts = np.zeros(len(labels), np.int64)
    rest = np.arange(len(labels))
    small = _classes_of_two(labels, units)
    if with_test:
        if len(shares) < 3:
            raise UserError("--split: three shares are needed, for training, validation and test, such as 70,15,15.")
        free = np.flatnonzero(~np.isin(labels, small[1::2]))  # of two images, one is tested or validated
        test = free[hold_out(labels[free], shares[2] / 100, TEST_SEED, units[free], grouped=grouped)]
        parts[test] = 2
        rest = np.setdiff1d(rest, test)
    held = rest[hold_out(labels[rest], shares[1] / (shares[0] + shares[1]), seed, units[rest], grouped=grouped)]
    parts[held] = 1
    for part in (1, 2) if with_test else (1,):
        if not (parts == part).any():
            raise UserError(
                f"nothing can be held out for {PARTS[part]}: a class needs two images that are neither copies of one "
                "another nor of one group; to be split in three, a data set needs two such classes, or one of three."
            )
    return parts


def _classes_of_two(labels: np.ndarray, units: np.ndarray) -> np.ndarray:
    heads = np.unique(units)
    return np.flatnonzero(np.bincount(labels[heads]) == 2)


def extend(recorded: np.ndarray, divided: np.ndarray, together: Iterable[Sequence[int]]) -> np.ndarray:
    """`recorded` parts, and for -1 the one that an equal or grouped image has, or else that of `divided`."""
    parts = recorded.copy()
    units = united(together, len(recorded))
    known = {int(unit): int(part) for unit, part in zip(units[recorded >= 0], recorded[recorded >= 0], strict=True)}
    for place in np.flatnonzero(recorded == -1):
        parts[place] = known.get(int(units[place]), divided[place])
    return parts


def groups_by_pattern(names: Sequence[str], pattern: str) -> list[str | None]:
    """The group of each name: what the first bracket of a pattern finds in it, or else all that it finds."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group {pattern!r} is no column of --labels and no regular expression ({error}).") from None
    found = [compiled.search(name) for name in names]
    if not any(found):
        raise UserError(f"--group {pattern!r} is no column of --labels and fits no file name, such as {names[0]!r}.")
    return [match and (match[1] if compiled.groups else match[0]) for match in found]


def read_split(file: Path) -> dict[str, tuple[str, str]]:
    """A split.csv as {path: (class, part)}; a part may be empty: left out. Raises UserError if it is damaged."""
    with reading(file), open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = {row["path"]: (row["class"], row["part"]) for row in csv.DictReader(lines)}
        wrong = {part for _, part in rows.values()} - {*PARTS, ""}
        if wrong or not rows:
            raise ValueError(f"no such part: {', '.join(sorted(map(str, wrong)))}" if wrong else "no rows")
        return rows
