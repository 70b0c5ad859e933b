"""List a data set: the class, part and group of each image, from tables or from class folders. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from images.folders import ImageSet, find_image_set, numbers_of, part_of, some
from images.lookup import Index
from images.naming import augmented_copies, groups_by_pattern, odd_names
from images.tables import Row, read_rows, read_table
from images.walk import composed, relative_name, subfolders
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
        image_set.notes += [] if image_set.groups else augmented_copies(names)
    return image_set


def find_metadata(root: Path) -> list[Path]:
    """Return the tables of labels that Hugging Face's image folders have: in `root`, or in the folder of each part.

    Leave out tables without a column `label`, such as those of captions.
    """
    folders = [root, *(folder for folder in subfolders(root) if part_of(folder.name))] if root.is_dir() else []
    tables = [folder / f"metadata.{kind}" for folder in folders for kind in ("jsonl", "csv")]
    tables = [file for file in tables if file.is_file() and _has_labels(file)]
    return [file for file in tables if file.parent == root] or tables


def _has_labels(file: Path) -> bool:
    with suppress(UserError):
        return {"file_name", "label"} <= {name.strip() for name in read_table(file)[0]}
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
    image_set = ImageSet(root, [], [], from_table=True)
    found: dict[Path, Row] = {}
    for table in tables:
        file, named = _located(str(table), root)
        rows, columns = read_rows(file, index, group, named)
        folder = file.parent.name
        if file.stem == "metadata" and file.parent.parent == root and part_of(folder):
            rows = [row._replace(image=f"{folder}/{row.image}", part=folder) for row in rows]
        index.named |= {index.folder(row.image) for row in rows} - {""}
        image_set.notes += [f"{printable(file.name)}: {columns}", *_add(found, rows, file, index)]
    for paths, what in (
        ([path for path, row in found.items() if not row.label], "label"),
        ([path for path in index.paths if path not in found], "row"),
    ):
        if paths:
            have = amount(len(paths), "image has", "images have")
            shown = printable(relative_name(paths[0], root))
            image_set.notes.append(f"{have} no {what} in {printable(file.name)}, such as {shown}: left out")
    _fill(image_set, {path: row for path, row in found.items() if row.label}, printable(file), known)
    return image_set


def _located(table: str, root: Path) -> tuple[Path, list[str]]:
    """Return the file in --labels, and the names of its columns if they follow a colon."""
    name, colon, columns = table.rpartition(":")
    if not colon or Path(table).exists() or (root / table).exists():
        name, columns = table, ""
    return Path(name) if Path(name).exists() else root / name, columns.split(",") if columns else []


def _add(found: dict[Path, Row], rows: list[Row], file: Path, index: Index) -> list[str]:
    """Add the rows of a table to `found`; return sentences about rows whose image is missing or in another folder.

    Raise UserError if a row may mean two images, or contradicts an earlier one.
    """
    shown = printable(file)
    missing: list[str] = []
    moved: dict[str, Path] = {}
    for row in rows:
        path = index.one(row.image, file)
        if path is None:
            missing.append(row.image)
            continue
        if not row.label:
            found.setdefault(path, row)
            continue
        entry = Row(row.image, composed(row.label), part_of(row.part) or "", row.group)
        if row.part and not entry.part:
            raise UserError(f"{shown}: {printable(row.part)!r} is not a part of a data set: use train, val and test.")
        if path not in found or not found[path].label:
            found[path] = entry
        for name, one, other in zip(Row._fields[1:], found[path][1:], entry[1:], strict=True):
            if one != other:
                raise UserError(
                    f"{shown} gives {printable(path)} two {name}s: {printable(one) or 'none'} and "
                    f"{printable(other) or 'none'}. Keep one of its rows."
                )
        if index.folder(row.image) not in ("", index.folder(str(path))):
            moved[row.image] = path
    name = printable(file.name)
    notes = []
    if missing:
        them = amount(len(missing), f"row of {name} names", f"rows of {name} name")
        notes.append(f"{them} no image that is there, such as {printable(missing[0])}")
    for cell, path in list(moved.items())[:1]:
        them = amount(len(moved), f"row of {name} names", f"rows of {name} name")
        notes.append(f"{them} a folder that is not there, such as {printable(cell)}: taken for {printable(path)}")
    return notes


def _fill(image_set: ImageSet, found: dict[Path, Row], file: str, known: Sequence[str] | None) -> None:
    """Sort the images into classes and parts. Raise UserError if too few are left."""
    labels = {row.label for row in found.values()}
    numeric = all(re.fullmatch(r"-?\d+", label) for label in labels)
    image_set.classes = list(known or sorted(labels, key=int if numeric else None))
    if len(image_set.classes) < 2:
        raise UserError(f"{file} labels one class, {printable(min(labels, default=''))}: two are needed.")
    numbers = numbers_of(image_set.classes)
    unknown = [row.label for row in found.values() if row.label not in numbers]
    if unknown:
        images = amount(len(unknown), "image", "images")
        names = some(sorted(set(unknown)))
        image_set.notes.append(f"left out, as the model does not know them: {images} of {names}")
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "validation": [], "test": []}
    for path, row in sorted(found.items(), key=lambda item: item[0].parts):
        if row.label in numbers:
            parts[row.part or "train"].append((path, numbers[row.label]))
            image_set.groups |= {path: row.group} if row.group else {}
    if not any(parts.values()):
        raise UserError(f"{file} labels no image of the classes that the model knows.")
    if not parts["train"] and not known:
        raise UserError(f"{file} calls no image a training image.")
    image_set.train = parts["train"]
    image_set.test = parts["test"] or parts["validation"] or None
    image_set.validation = (parts["validation"] or None) if parts["test"] else None
