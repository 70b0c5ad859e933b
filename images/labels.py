"""List a data set: the class, part and group of each image, from tables or from class folders. Imports no torch."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from images.folders import ImageSet, Listing, find_image_set, part_of, some
from images.lookup import Index
from images.naming import augmented_copies, groups_by_pattern, odd_names
from images.tables import Row, read_rows
from images.walk import composed, relative_name, same_name, subfolders
from system.files import read_text, reading
from utils import UserError, amount, printable


def list_images(
    data_dir: str | Path,
    *,
    labels: str | Path | None = None,
    group: str | None = None,
    known: Sequence[str] | None = None,
) -> ImageSet:
    """Return the images of a data set, labelled by a table if one is named or found, otherwise by their class folders.

    `group` is a column of the table, or a regular expression that finds an image's group in its path. `known` are the
    classes of a trained model. Raise UserError if there are no images to train on, or to test.
    """
    tables = [labels] if labels else find_metadata(Path(data_dir))
    if tables:
        image_set = find_labelled(data_dir, *tables, group=group, known=known)
    else:
        image_set = find_image_set(data_dir, known=known)
    paths = [path for listing in image_set.parts.values() for path, _ in listing]
    names = [relative_name(path, image_set.root) for path in paths]
    if group and not image_set.groups:
        found = groups_by_pattern(names, group)
        image_set.groups = {path: name for path, name in zip(paths, found, strict=True) if name is not None}
        alone = len(paths) - len(image_set.groups)
        if alone:
            image_set.notes.append(f"--group {printable(group)} finds nothing in {alone:,} paths: each is by itself")
    if not known:
        image_set.notes += odd_names(image_set)
        copies = None if image_set.groups else augmented_copies(names)
        image_set.notes += [copies] if copies else []
    return image_set


def find_metadata(root: Path) -> list[Path]:
    """Return the tables of labels that Hugging Face's image folders have: in `root`, or in the folder of each part.

    Leave out tables without a column `label`, such as those of captions.
    """
    folders = [root] if root.is_dir() else []
    folders += [folder for place in folders for folder in subfolders(place) if part_of(folder.name)]
    files = [folder / f"metadata.{kind}" for folder in folders for kind in ("jsonl", "csv")]
    tables = [file for file in files if file.is_file() and _has_labels(file)]
    return [file for file in tables if file.parent == root] or tables


def _has_labels(file: Path) -> bool:
    """Return True if the first line of a metadata file names files and labels."""
    with suppress(UserError), reading(file):
        first = read_text(file).lstrip().partition("\n")[0]
        keys = json.loads(first) if file.suffix == ".jsonl" else next(csv.reader([first]))
        return {"file_name", "label"} <= {key.strip() for key in keys}
    return False


def find_labelled(
    data_dir: str | Path, *tables: str | Path, group: str | None = None, known: Sequence[str] | None = None
) -> ImageSet:
    """Return the images below `data_dir` that tables label: columns of images and labels, optionally of part and group.

    A table is looked for in the working folder, then in `data_dir`; FILE:IMAGE,LABEL names its columns. The images of a
    table in the folder of a part belong to that part. `group` names the column of groups. With `known`, the classes of
    a trained model, leave out rows of other classes. Raise UserError if a table cannot be read, names no image, or
    gives an image two labels.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"{printable(root)} does not exist. Name the folder that holds the images with --data_dir.")
    index = Index(root)
    found = _Found(index)
    image_set = ImageSet(root, [], [], from_table=True)
    for table in tables:
        file, named = _located(table, root)
        rows, columns = read_rows(file, index, group, named)
        folder = file.parent.name
        if file.stem == "metadata" and file.parent.parent == root and part_of(folder):
            rows = [row._replace(image=f"{folder}/{row.image}", part=folder) for row in rows]
        index.named |= {index.folder(row.image) for row in rows} - {""}
        found.add(file, rows)
        image_set.notes.append(f"{printable(file.name)}: {columns}")
    _fill(image_set, found, known)
    return image_set


def _located(table: str | Path, root: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file in --labels, and the names of its columns if they follow a colon."""
    name, colon, columns = str(table).rpartition(":")
    if not colon or Path(table).exists() or (root / table).exists():
        name, columns = str(table), ""
    return Path(name) if Path(name).exists() else root / name, tuple(columns.split(",")) if columns else ()


class _Found:
    """The result of reading tables: an entry for each image, and the rows without one."""

    def __init__(self, index: Index):
        self.file = Path()  # the table that is being read
        self.index = index
        self.entries: dict[Path, tuple[str, str, str]] = {}  # label, part, group
        self.moved: dict[str, Path] = {}
        self.missing: list[str] = []
        self.unlabelled: dict[Path, str] = {}

    def add(self, file: Path, rows: list[Row]) -> None:
        """Add the rows of a table."""
        self.file = file
        for row in rows:
            self._add(row)

    def _add(self, row: Row) -> None:
        """Add a row. Raise UserError if it may mean two images, or contradicts an earlier row."""
        paths = self.index.find(row.image) if row.image else []
        file = printable(self.file)
        if len(paths) > 1:
            shown = " and ".join(printable(path) for path in paths[:2])
            raise UserError(f"{file}: {printable(row.image)!r} may mean {shown}. Name the folder, too.")
        if not paths:
            self.missing.append(row.image)
            return
        path = paths[0]
        if not row.label:
            self.unlabelled[path] = row.image
            return
        part = part_of(row.part) or ""
        if row.part and not part:
            raise UserError(f"{file}: {printable(row.part)!r} is not a part of a data set: use train, val and test.")
        entry = (composed(row.label), part, row.group)
        earlier = self.entries.setdefault(path, entry)
        for what, one, other in zip(("labels", "parts", "groups"), earlier, entry, strict=True):
            if one != other:
                raise UserError(
                    f"{file} gives {printable(path)} two {what}: {printable(one) or 'none'} and "
                    f"{printable(other) or 'none'}. Keep one of its rows."
                )
        folder = self.index.folder(row.image)
        if folder and folder != self.index.folder(str(path)):
            self.moved.setdefault(row.image, path)

    def notes(self, root: Path) -> list[str]:
        """Return sentences about rows without an image, and about images that are left out."""
        file = printable(self.file.name)
        notes = []
        if self.missing:
            rows = amount(len(self.missing), f"row of {file} names", f"rows of {file} name")
            notes.append(f"{rows} no image that is there, such as {printable(self.missing[0])}")
        for name, path in list(self.moved.items())[:1]:
            rows = amount(len(self.moved), f"row of {file} names", f"rows of {file} name")
            notes.append(f"{rows} a folder that is not there, such as {printable(name)}: taken for {printable(path)}")
        unlabelled = [path for path in self.unlabelled if path not in self.entries]
        surplus = [path for path in self.index.paths if path not in self.entries and path not in self.unlabelled]
        for paths, what in ((unlabelled, "label"), (surplus, "row")):
            if paths:
                have = amount(len(paths), "image has", "images have")
                shown = printable(relative_name(paths[0], root))
                notes.append(f"{have} no {what} in {file}, such as {shown}: left out")
        return notes


def _fill(image_set: ImageSet, found: _Found, known: Sequence[str] | None) -> None:
    """Sort the entries into parts and log what is missing or left out. Raise UserError if too little is left."""
    file = printable(found.file)
    image_set.notes += found.notes(image_set.root)
    labels = {label for label, *_ in found.entries.values()}
    image_set.classes = list(known or _in_order(labels))
    if len(image_set.classes) < 2:
        raise UserError(f"{file} labels one class, {printable(min(labels, default=''))}: two are needed.")
    numbers = {same_name(name): label for label, name in enumerate(image_set.classes)}
    numbers |= {name: label for label, name in enumerate(image_set.classes)}
    parts: dict[str, Listing] = {"train": [], "validation": [], "test": []}
    unknown = []
    for path in sorted(found.entries, key=lambda path: path.parts):
        label, part, group = found.entries[path]
        if label not in numbers:
            unknown.append(label)
            continue
        parts[part or "train"].append((path, numbers[label]))
        if group:
            image_set.groups[path] = group
    if unknown:
        images = amount(len(unknown), "image", "images")
        names = some(sorted(set(unknown)))
        image_set.notes.append(f"left out, as the model does not know them: {images} of {names}")
    if not parts["train"] and not known:
        raise UserError(f"{file} calls no image a training image.")
    image_set.train = parts["train"]
    image_set.test = parts["test"] or parts["validation"] or None
    image_set.validation = (parts["validation"] or None) if parts["test"] else None
    if not image_set.parts:
        raise UserError(f"{file} labels no image of the classes that the model knows.")


def _in_order(labels: set[str]) -> list[str]:
    """Return class names in alphabetical order, integers in numerical order."""
    numeric = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return sorted(labels, key=int) if numeric else sorted(labels)
