"""Read a table of labels, and find its columns of images, labels, parts and groups. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from images.folders import part_of, some
from images.lookup import Index
from system.files import from_cell, read_text, reading
from utils import UserError, amount, printable

# Names of columns, the most probable first; case, blanks and punctuation do not count.
_IMAGE = (
    *("path", "filepath", "imagepath", "file", "filename", "imagefile", "imagename", "image", "img", "picture"),
    *("photo", "imageid", "imgid", "idcode", "isicid", "id", "name"),
)
_LABEL = (
    *("label", "class", "classname", "labelname", "category", "categoryid", "classid", "labelid", "target"),
    *("species", "breed", "diagnosis", "dx", "y", "tag", "labels"),
)
_PART = ("part", "split", "subset", "partition", "set")
_GROUP = ("group", "groupid")
_ONES = ("true", "t", "1", "1.0", "yes", "y")
_ZEROS = ("false", "f", "0", "0.0", "no", "n", "")
SPREADSHEET = b"PK\x03\x04"
BETWEEN = "\x1f"  # separates several labels of one row


class Row(NamedTuple):
    """The content of a row; empty strings for missing values."""

    image: str
    label: str
    part: str
    group: str


def read_rows(file: Path, index: Index, group: str | None = None, named: tuple[str, ...] = ()) -> tuple[list[Row], str]:
    """Return the rows of a table, and a description of how its columns were interpreted.

    `group` names the column of groups, `named` those of images and labels. Raise UserError if the table cannot be read,
    names no image, or has no column that can be the label.
    """
    table = read_table(file)
    columns = _columns(file, table, index, group, named)
    rows = [columns.row(row) for row in table[columns.has_header :]]
    several = [row for row in rows if BETWEEN in row.label]
    if several:
        image, label, *_ = several[0]
        raise UserError(
            f"{printable(file)} gives {printable(image)!r} several labels at once, "
            f"{printable(label.replace(BETWEEN, ' and '))} ({amount(len(several), 'such row', 'such rows')}). An image "
            "has one class here: keep one label in each row."
        )
    return rows, columns.described(table[0])


def read_table(file: Path) -> list[list[str]]:
    """Return the rows of a table from a spreadsheet or a program, without empty ones.

    Cells are separated by comma, semicolon or tab, or otherwise by the last blank of each line; `.jsonl` has an object
    in each line. The text is UTF-8, UTF-16 with a BOM, or otherwise Windows-1252.
    """
    with reading(file):
        with open(file, "rb") as content:
            if content.read(4) == SPREADSHEET:
                raise ValueError("a spreadsheet's own format: save it as CSV")
        text = read_text(file)
        if file.suffix.lower() == ".jsonl":
            return _of_objects([json.loads(line) for line in text.splitlines() if line.strip()])
        first, _, rest = text.partition("\n")
        if re.fullmatch(r"\"?sep=.\"?\s*", first):  # Excel's own separator line
            text = rest
        tables = [list(csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=False)) for sign in ",;\t"]
    tables = [[row for row in table if any(cell.strip() for cell in row)] for table in tables]
    best = max(tables, key=_regularity)
    if not best or len(best[0]) < 2:
        best = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]  # "my photos/1.png cat"
    if not best or len(best[0]) < 2:
        shown = f"; its first line is {printable(text.strip().splitlines()[0])[:80]!r}" if text.strip() else ""
        raise UserError(f"{printable(file)} is not a table of at least two columns (path or id, and label){shown}.")
    return best


def _of_objects(lines: list[dict[str, object]]) -> list[list[str]]:
    """Return lines of JSON as a table: the keys, then each line's values; a list means several values."""
    keys = list(dict.fromkeys(key for line in lines for key in line))

    def cell(value: object) -> str:
        if isinstance(value, list):
            return BETWEEN.join(map(str, value))
        return "" if value is None else str(value)

    return [keys, *([cell(line.get(key)) for key in keys] for line in lines)]


def _regularity(table: list[list[str]]) -> tuple[float, int]:
    """Return a score for a separator: the share of rows as wide as the first, then the number of columns."""
    if not table or len(table[0]) < 2:
        return 0.0, 0
    return sum(len(row) == len(table[0]) for row in table) / len(table), len(table[0])


def _cell(row: list[str], place: int | None) -> str:
    return from_cell(row[place].strip()) if place is not None and place < len(row) else ""


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


@dataclass
class _Columns:
    """The meaning of a table's columns: positions, and yes/no columns with the part or class that each means."""

    image: int
    label: int | None = None
    part: int | None = None
    group: int | None = None
    parts: dict[int, str] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    has_header: bool = True

    def row(self, row: list[str]) -> Row:
        """Return the content of a row; several labels are separated by BETWEEN."""
        label = _cell(row, self.label)
        part = _cell(row, self.part)
        if self.classes:
            label = BETWEEN.join(_chosen(row, self.classes))
        if self.parts:
            rest = "validation" if "train" in self.parts.values() else "train"
            part = next(iter(_chosen(row, self.parts)), rest)
        return Row(_cell(row, self.image), label, part, _cell(row, self.group))

    def described(self, first: list[str]) -> str:
        """Describe how each column was interpreted, given the first row."""
        names = [
            f"'{printable(cell)}'" if self.has_header else f"column {place + 1}" for place, cell in enumerate(first)
        ]
        single = {"images": self.image, "classes": self.label, "parts": self.part, "groups": self.group}
        said = [f"{what} from {names[place]}" for what, place in single.items() if place is not None]
        said += [f"parts from {names[place]}" for place in self.parts]
        said += [f"classes are the columns {some([names[place] for place in self.classes])}"] if self.classes else []
        used = {*single.values(), *self.parts, *self.classes}
        unused = [name for place, name in enumerate(names) if place not in used]
        return ", ".join(said) + (f"; not used: {some(unused)}" if unused else "")


def _chosen(row: list[str], columns: dict[int, str]) -> list[str]:
    """Return the meanings of the columns with a yes in this row."""
    return [meaning for place, meaning in columns.items() if _cell(row, place).casefold() in _ONES]


def _columns(file: Path, rows: list[list[str]], index: Index, group: str | None, named: tuple[str, ...]) -> _Columns:
    """Return the meaning of a table's columns. Files on disk decide which column names images."""
    header = [_plain(cell) for cell in rows[0]]
    image = _image_column(file, rows, header, index)
    if named:
        image, asked = _places_of(file, rows[0], named)
    others = [place for place in range(len(header)) if place != image]
    if not named and index.find(rows[0][image].strip()) and header[image] not in _IMAGE:
        part, grouped = _unnamed(rows, others[1:])  # the first row names an image: there is no header
        return _Columns(image, others[0], part, grouped, has_header=False)
    found = _of_header(rows, header, image, others, (_plain(group),) if group else _GROUP)
    if named:
        found.label, found.classes = asked, {}
    if found.label is None and not found.classes:
        names = ", ".join(printable(rows[0][place]) for place in others if place not in found.parts)
        raise UserError(
            f"{printable(file)}: which column is the label, of {names}? Name the columns of images and labels, as in "
            f"--labels {printable(file)}:{printable(rows[0][image])},NAME"
        )
    return found


def _places_of(file: Path, first: list[str], named: tuple[str, ...]) -> tuple[int, int]:
    """Return the columns of images and labels in --labels FILE:IMAGE,LABEL."""
    header = [cell.strip() for cell in first]
    if len(named) != 2 or not set(named) <= set(header):
        raise UserError(
            f"{printable(file)} has the columns {printable(', '.join(header))}, not {printable(', '.join(named))}. "
            "Name two, of images and labels: FILE:path,label"
        )
    return header.index(named[0]), header.index(named[1])


def _image_column(file: Path, rows: list[list[str]], header: list[str], index: Index) -> int:
    """Return the column with the most cells that name images; of several, the one with the most probable name."""
    sample = rows[1:200] or rows
    hits = [sum(bool(index.find(_cell(row, place))) for row in sample) for place in range(len(header))]
    if not any(hits):
        shown = ", ".join(repr(printable(cell)) for cell in sample[0][:6])
        images = amount(len(index.paths), "image is", "images are")
        raise UserError(
            f"{printable(file)}: no cell names an image below {printable(index.root)}, where {images}; its second row "
            f"is {shown}. Name the folder of the images with --data_dir."
        )
    best = [place for place, count in enumerate(hits) if count == max(hits)]
    named = _named(header, best, _IMAGE)
    return best[0] if named is None else named


def _of_header(
    rows: list[list[str]], header: list[str], image: int, others: list[int], group_names: tuple[str, ...]
) -> _Columns:
    """Return the columns that a header names, or that their cells reveal."""
    cells = {place: {_cell(row, place).casefold() for row in rows[1:]} for place in others}
    binary = [place for place in others if cells[place] <= {*_ONES, *_ZEROS}]
    part = _part_column(rows, header, others)
    group = _named(header, others, group_names)
    means = {place: part_of(header[place].removeprefix("is")) for place in binary if cells[place] != {""}}
    parts = {place: meaning for place, meaning in means.items() if meaning and part is None}
    left = [place for place in others if place not in (part, group, *parts)]
    label = left[0] if len(left) == 1 else _named(header, left, _LABEL)
    classes = {place: from_cell(rows[0][place].strip()) for place in left if place in binary}
    once = sum(len(_chosen(row, classes)) == 1 for row in rows[1:])
    if label is not None or len(classes) < 2 or 2 * once < len(rows) - 1:  # such columns have another meaning
        classes = {}
    return _Columns(image, label, part, group, parts, classes)


def _part_column(rows: list[list[str]], header: list[str], places: list[int]) -> int | None:
    """Return the column with each row's part: by its name, or, beside a named label, by all its cells."""
    named = _named(header, places, _PART)
    if named is not None or _named(header, places, _LABEL) is None:
        return named
    cells = {place: [_cell(row, place) for row in rows[1:]] for place in places if header[place] not in _LABEL}
    return next((place for place, said in cells.items() if len(set(said)) > 1 and all(map(part_of, said))), None)


def _named(header: list[str], places: list[int], names: tuple[str, ...]) -> int | None:
    """Return the position of the most probable of `names`; None if no column has one."""
    named = [place for place in places if header[place] in names]
    return min(named, key=lambda place: names.index(header[place]), default=None)


def _unnamed(rows: list[list[str]], places: list[int]) -> tuple[int | None, int | None]:
    """Return part and group of a table without a header: the column with usual names of parts, and another one."""
    part = next((p for p in places if all(part_of(_cell(row, p)) for row in rows if _cell(row, p))), None)
    return part, next((place for place in places if place != part), None)
