"""Open a data set: list and decode its files, and divide them into training, validation and test images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from command_line.kinds import parse_shares
from images.cache import Opening, checksums, make_room
from images.decode import NO_DEEP, try_decode
from images.folders import ImageSet, Listing
from images.labels import list_images
from images.soundness import refuse_empty, report_unreadable, say_absent, warn_of_leaks
from images.split import PARTS, digest, divide, extend, in_groups, read_split, same_pictures
from images.stores import open_store
from images.subsets import DataSet, Split, Subset, files_checksum, split_name
from images.walk import composed
from utils import UserError, amount, log, printable


def open_data_set(
    data_dir: str | Path,
    *,
    image_size: int,
    seed: int,
    labels: str | None = None,
    group: str | None = None,
    split: str | None = None,
    recorded: Split | None = None,
    keep_larger: bool = False,
    opening: Opening | None = None,
) -> DataSet:
    """Find, decode and divide the images below `data_dir`.

    `labels` and `group` are those of `list_images`; `split` is shares, or a split.csv to follow; `recorded` is the
    split of a run to continue. `keep_larger` keeps training images of up to 1.5 times `image_size` pixels, for random
    crops. Raise UserError if anything is wrong with the data.
    """
    image_set = list_images(data_dir, labels=labels, group=group)
    shares, follow = _asked(split, recorded)
    if split and shares is None:  # a file decides about all images, whatever their folder
        _merge(image_set)
    if follow is not None:
        _keep(image_set, follow, strictly=recorded is not None)
    limit = image_size * 3 // 2 if keep_larger else image_size
    opened = _open_parts(image_set, opening or Opening(), image_size, limit)
    missing = [name for name in PARTS[1:] if name not in opened.subsets]
    if missing or follow:
        strictly = recorded is not None
        parts = _divided(opened, follow, shares, seed, with_test="test" in missing, strictly=strictly)
        opened.divide(parts, missing, image_size)
    make_room(image_set.root, opened.opening)
    data = replace(opened.data_set(), divided=tuple(missing))
    refuse_empty(data.subsets, image_set)
    warn_of_leaks(data.subsets, image_set, opened.compared)
    return data


def open_test_set(
    data_dir: str | Path,
    *,
    image_size: int,
    known: Sequence[str],
    labels: str | None = None,
    recorded: Split | None = None,
    same_place: bool = False,
    checksum: str | None = None,
    opening: Opening | None = None,
) -> DataSet:
    """Return the images to test a trained model on; `known` are its classes.

    Return the test images of the run's split `recorded` if `data_dir` is its training folder (`same_place`), or if all
    of them exist, nothing else is called a test part, and the files have the run's `checksum`. Otherwise return the
    test part, or all images.
    """
    image_set = list_images(data_dir, labels=labels, known=known)
    listing = image_set.test or image_set.train
    tested = {name for name, (_, part) in (recorded or {}).items() if part == "test"}
    everything = [entry for part in image_set.parts.values() for entry in part]
    names = {split_name(path, image_set.root): path for path, _ in everything} if tested else {}
    there = {name: names[name] for name in sorted(tested & names.keys())}
    is_whole = bool(tested) and len(there) == len(tested)
    is_same = is_whole and files_checksum(there.values(), image_set.root) == checksum
    if there and (same_place or (is_same and not image_set.test)):
        chosen = set(there.values())
        listing = [entry for entry in everything if entry[0] in chosen]
        tested_images = amount(len(listing), "image", "images")
        image_set.notes.append(f"tested: the {tested_images} of the test part in the run's split.csv")
        gone = tested - there.keys()
        if gone:
            are = amount(len(gone), "of its test images is", "of its test images are")
            image_set.notes.append(f"{are} gone, such as {printable(min(gone))}")
        elif checksum and not is_same:
            image_set.notes.append("files of the run's test part were changed after its training")
        _say_relabelled(image_set, recorded or {}, listing)
    elif there and not image_set.test:
        have = amount(len(there), "image has", "images have")
        image_set.notes.append(
            f"{have} the names of the run's test images, but these files are not all there as they were: every image "
            "is tested"
        )
    image_set = replace(image_set, train=[], validation=None, test=listing)
    opened = _open_parts(image_set, opening or Opening(), image_size, image_size)
    make_room(image_set.root, opened.opening)
    if not len(opened.subsets["test"]):
        raise UserError(f"no readable image is left in {printable(data_dir)}.")
    say_absent(opened.subsets, image_set)
    return opened.data_set()


def _asked(split: str | None, recorded: Split | None) -> tuple[tuple[float, ...] | None, Split | None]:
    """Return --split as shares or as a split to follow; the split of a continued run replaces both."""
    if split and not is_split_file(split):
        return parse_shares(split), recorded
    return None, recorded or (read_split(Path(split)) if split else None)


def is_split_file(split: str) -> bool:
    return split.lower().endswith(".csv")


def _merge(image_set: ImageSet) -> None:
    image_set.train = [entry for listing in image_set.parts.values() for entry in listing]
    image_set.test = None
    image_set.validation = None


def _keep(image_set: ImageSet, follow: Split, *, strictly: bool) -> None:
    """Leave out files that a split gives no part, and, if `strictly`, those that it does not name."""
    names = {path: split_name(path, image_set.root) for listing in image_set.parts.values() for path, _ in listing}
    gone = sorted(follow.keys() - set(names.values()))
    if gone and strictly:
        raise UserError(
            f"{amount(len(gone), 'image', 'images')} of the run's split.csv cannot be found in "
            f"{printable(image_set.root)}, such as "
            f"{printable(gone[0])}. Restore them, or start another --checkpoint_name."
        )
    if gone:
        lost = amount(len(gone), "image of --split is", "images of --split are")
        image_set.notes.append(f"{lost} gone, such as {printable(gone[0])}")
    added = [name for name in names.values() if name not in follow]
    if added:
        fate = "left out" if strictly else "divided as if the split were new"
        new = amount(len(added), "image is", "images are")
        image_set.notes.append(f"{new} not in split.csv, such as {printable(added[0])}: {fate}")

    _say_relabelled(image_set, follow, [entry for listing in image_set.parts.values() for entry in listing])

    apart = [name for name in names.values() if not strictly and name in follow and not follow[name][1]]
    if apart:
        have = amount(len(apart), "image has", "images have")
        image_set.notes.append(f"{have} no part in --split, such as {printable(min(apart))}: left out")

    def wanted(path: Path) -> bool:
        entry = follow.get(names[path])
        return not strictly if entry is None else bool(strictly or entry[1])

    for name, listing in image_set.parts.items():
        setattr(image_set, name, [entry for entry in listing if wanted(entry[0])] or None)
    if not image_set.train:
        raise UserError(f"--split calls no image in {printable(image_set.root)} a training image.")


def _say_relabelled(image_set: ImageSet, split: Split, listing: Listing) -> None:
    """Log which images have another label now than when a split was written."""
    changed = []
    for path, label in listing:
        name = split_name(path, image_set.root)
        now = image_set.classes[label]
        if composed(split.get(name, (now, ""))[0]) != composed(now):
            changed.append(f"{printable(name)} ({printable(split[name][0])} there, {printable(now)} now)")
    if changed:
        have = amount(len(changed), "image has", "images have")
        image_set.notes.append(f"{have} another label than in split.csv, such as {changed[0]}")


@dataclass
class _Opened:
    """The stores of a data set's parts, and the facts read from them."""

    image_set: ImageSet
    opening: Opening
    limit: int  # of training images
    subsets: dict[str, Subset] = field(default_factory=dict)
    bad: dict[Path, str] = field(default_factory=dict)
    crc32: dict[str, np.ndarray] = field(default_factory=dict)
    compared: dict[str, np.ndarray] = field(default_factory=dict)  # checksums at the training images' limit

    def divide(self, parts: np.ndarray, missing: list[str], image_size: int) -> None:
        """Make subsets of the training images by `parts`, indices of PARTS. Images of other parts are kept smaller."""
        pool = self.subsets["train"]
        for number, name in enumerate(PARTS):
            if name != "train" and name not in missing:
                continue
            positions = pool.positions[parts == number]
            subset = Subset(pool.store, pool.listing, positions)
            if name != "train" and self.limit != image_size and len(positions):
                listing = [pool.listing[position] for position in positions]
                paths = [path for path, _ in listing]
                store = open_store(paths, self.image_set.root, limit=image_size, opening=self.opening, part=name)
                subset = Subset(store, listing, np.arange(len(listing)))
            self.subsets[name] = subset

    def fingerprint(self) -> str:
        """Return a text that identifies these images: classes, names and pixels of all listed files.

        It includes labels and groups if they come from a table; with class folders, the file names contain the labels.
        """
        image_set = self.image_set
        found = hashlib.sha256(json.dumps(image_set.classes).encode())
        for name, listing in image_set.parts.items():
            names = [os.path.relpath(path, image_set.root) for path, _ in listing]
            found.update(json.dumps([name, names]).encode())
            found.update(self.crc32[name].tobytes())
            if image_set.from_table:
                told = [[label, image_set.groups.get(path)] for path, label in listing]
                found.update(json.dumps(told).encode())
        return found.hexdigest()[:16]

    def data_set(self) -> DataSet:
        """Return the opened data set with its parts in the order of PARTS."""
        image_set = self.image_set
        return DataSet(
            image_set.root,
            image_set.classes,
            {name: self.subsets[name] for name in PARTS if name in self.subsets},
            self.fingerprint(),
            [str(path) for path in self.bad],
            self.opening.rules,
            [entry for listing in image_set.parts.values() for entry in listing],
        )


def _open_parts(image_set: ImageSet, opening: Opening, image_size: int, train_limit: int) -> _Opened:
    """Open a store for each part. The windows of deep pictures come from the first one, the training images.

    Log which files were skipped. Raise UserError for unreadable images unless `opening.skip_unreadable`.
    """
    for sentence in image_set.remarks():
        log.info(sentence)
    said: dict[str, str] = {}  # by mode of deep grey pictures: a sentence on its window
    opened = _Opened(image_set, opening, train_limit)
    for name, listing in image_set.parts.items():
        paths = [path for path, _ in listing]
        limit = train_limit if name == "train" else image_size
        part = name if len(image_set.parts) > 1 else ""
        store = open_store(paths, image_set.root, limit=limit, opening=opened.opening, part=part)
        for mode in store.deep:
            said.setdefault(mode, store.rules.described([mode])[0])
        opened.opening = replace(opened.opening, rules=store.rules, own_window=False)
        opened.bad |= {listing[position][0]: reason for position, reason in store.unreadable.items()}
        opened.subsets[name] = Subset(store, listing, np.setdiff1d(np.arange(len(listing)), list(store.unreadable)))
        opened.crc32[name] = store.crc32
        opened.compared[name] = store.crc32
        if name != "train" and train_limit != image_size:
            opened.compared[name] = checksums(paths, image_set.root, train_limit, opened.opening)
    for sentence in said.values():
        log.info(sentence)
    if "train" in opened.subsets and opening.rules.windows and not said:
        log.info(NO_DEEP)
    report_unreadable(opened.bad, opening.skip_unreadable)
    return opened


def _divided(
    opened: _Opened,
    follow: Split | None,
    shares: tuple[float, ...] | None,
    seed: int,
    *,
    with_test: bool,
    strictly: bool,
) -> np.ndarray:
    """Return the part of each training image, an index of PARTS: from a split, or random by `seed`.

    With `strictly`, an image to which the split gives no part, because of --fraction, has none: -1.
    """
    pool = opened.subsets["train"]
    image_set = opened.image_set
    together = _joined(pool, image_set.groups)
    parts = _parts(pool, image_set, follow)
    if strictly or (parts >= 0).all():
        return parts
    fresh = divide(pool.labels, seed=seed, shares=shares, with_test=with_test, together=together)
    return extend(parts, fresh, together)


def _joined(pool: Subset, groups: dict[Path, str]) -> list[list[int]]:
    """Return lists of images of a pool that must stay together: equal pictures, and those of one group."""
    paths = pool.paths

    def look(place: int) -> bytes | None:
        return digest(try_decode(paths[place], 512, pool.store.rules))

    same = same_pictures(pool.store.crc32[pool.positions], look)
    if same:
        copies = sum(len(places) - 1 for places in same)
        are = amount(copies, "image is a copy of another", "images are copies of others")
        log.info(f"{are}: kept on one side of the split (prepare --check lists them)")
    return same + in_groups(groups.get(path) for path in paths)


def _parts(pool: Subset, image_set: ImageSet, follow: Split | None) -> np.ndarray:
    """Return the part of each image of the pool in a split, an index of PARTS; -1 if the split does not name it."""
    said = [(follow or {}).get(split_name(path, image_set.root), ("", ""))[1] for path in pool.paths]
    return np.array([PARTS.index(part) if part else -1 for part in said], np.int64)
