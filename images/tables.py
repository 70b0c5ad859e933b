"""Read a table of labels, and find its columns of images, labels, parts and groups. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
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
LABEL = (
    *("label", "class", "classname", "labelname", "category", "categoryid", "classid", "labelid", "target"),
    *("species", "breed", "diagnosis", "dx", "y", "tag", "labels"),
)
_PART = ("part", "split", "subset", "partition", "set")
_GROUP = ("group", "groupid")
_YES = {"true", "t", "1", "1.0", "yes", "y"}
_YES_OR_NO = _YES | {"false", "f", "0", "0.0", "no", "n", ""}
BETWEEN = "\x1f"  # separates several labels of one row


class Row(NamedTuple):
    """The content of a row; empty strings for missing values."""

    image: str
    label: str
    part: str
    group: str


def read_rows(file: Path, index: Index, group: str | None = None, named: Sequence[str] = ()) -> tuple[list[Row], str]:
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
        if zipfile.is_zipfile(file):
            raise ValueError("a spreadsheet's own format: save it as CSV")
        text = read_text(file)
        if file.suffix.lower() == ".jsonl":
            return _of_objects([json.loads(line) for line in text.splitlines() if line.strip()])
        text = re.sub(r'\A"?sep=."?\s*\n', "", text)  # Excel's own separator line
        tables = [list(csv.reader(io.StringIO(text, newline=""), delimiter=sign)) for sign in ",;\t"]
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
    width = len(table[0]) if table else 0
    return (sum(len(row) == width for row in table) / len(table), width) if width > 1 else (0.0, 0)


def cell_of(row: list[str], place: int) -> str:
    return from_cell(row[place].strip()) if place < len(row) else ""


def plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


@dataclass
class _Columns:
    """The positions of a table's columns; `yes` holds the meaning of a yes in columns of yes and no."""

    image: int
    label: list[int]
    part: list[int]
    group: list[int]
    yes: dict[int, str]
    has_header: bool

    def row(self, row: list[str]) -> Row:
        """Return the content of a row; several labels are separated by BETWEEN."""
        part = self._content(row, self.part).split(BETWEEN)[0]
        if not part and "train" in [self.yes.get(place) for place in self.part]:
            part = "validation"
        return Row(cell_of(row, self.image), self._content(row, self.label), part, self._content(row, self.group))

    def _content(self, row: list[str], places: list[int]) -> str:
        cells = {place: cell_of(row, place) for place in places}
        chosen = [place for place in places if place not in self.yes or cells[place].casefold() in _YES]
        return BETWEEN.join(self.yes.get(place, cells[place]) for place in chosen)

    def described(self, first: list[str]) -> str:
        """Describe how each column was interpreted, given the first row."""
        names = [f"'{cell}'" if self.has_header else f"column {number}" for number, cell in enumerate(first, 1)]
        roles = {"images": [self.image], "classes": self.label, "parts": self.part, "groups": self.group}
        used = [f"{what} from {some([names[place] for place in places])}" for what, places in roles.items() if places]
        unused = [name for place, name in enumerate(names) if all(place not in places for places in roles.values())]
        return ", ".join(used) + (f"; not used: {some(unused)}" if unused else "")


def _columns(file: Path, table: list[list[str]], index: Index, group: str | None, named: Sequence[str]) -> _Columns:
    """Return the meaning of a table's columns: from --labels, its header, its cells, and the files on disk."""
    header = [plain(cell) for cell in table[0]]
    image = image_column(file, table, header, index)
    has_header = bool(named) or header[image] in _IMAGE or not index.find(table[0][image].strip())
    labels = []
    if named:
        image, *labels = _named_columns(file, table[0], named)
    header = header if has_header else [""] * len(header)
    rows = table[has_header:]
    others = [place for place in range(len(header)) if place != image]
    labels = labels or (called(header, others, LABEL) if has_header else others[:1])
    groups = called(header, others, [plain(group)] if group else _GROUP)
    left = [place for place in others if place not in labels + groups]
    cells = {place: {cell_of(row, place).casefold() for row in rows} for place in left}
    parts = called(header, left, _PART)
    yes: dict[int, str] = {}
    if not parts:
        flags = [place for place in left if {""} != cells[place] <= _YES_OR_NO]
        yes = {place: part for place in flags if (part := part_of(header[place].removeprefix("is")))}
        parts = list(yes)
    if not parts and labels:
        split = [place for place in left if all(map(part_of, cells[place] - {""}))]
        parts = [place for place in split if not has_header or len(cells[place]) > 1][:1]
    left = [place for place in left if place not in parts]
    if not has_header:
        groups = left[:1]
    if not labels:
        classes = {place: from_cell(table[0][place].strip()) for place in left if cells[place] <= _YES_OR_NO}
        once = sum(sum(cell_of(row, place).casefold() in _YES for place in classes) == 1 for row in rows)
        if len(left) > 1 and len(classes) > 1 and 2 * once >= len(rows):
            yes |= classes
            left = list(classes)
        elif len(left) != 1:
            names = printable(", ".join(table[0][place] for place in left))
            raise UserError(
                f"{printable(file)}: which column is the label, of {names}? Name the columns of images and labels, as "
                f"in --labels {printable(file)}:{printable(table[0][image])},NAME"
            )
        labels = left
    return _Columns(image, labels, parts, groups, yes, has_header)


def image_column(file: Path, table: list[list[str]], header: list[str], index: Index) -> int:
    """Return the column with the most cells that name images; of several, the one with the most probable name."""
    sample = table[1:200] or table
    hits = [sum(bool(index.find(cell_of(row, place))) for row in sample) for place in range(len(header))]
    if not any(hits):
        shown = ", ".join(repr(printable(cell)) for cell in sample[0][:6])
        images = amount(len(index.paths), "image is", "images are")
        raise UserError(
            f"{printable(file)}: no cell names an image below {printable(index.root)}, where {images}; its second row "
            f"is {shown}. Name the folder that holds the images."
        )
    best = [place for place, count in enumerate(hits) if count == max(hits)]
    return [*called(header, best, _IMAGE), *best][0]


def _named_columns(file: Path, header: list[str], named: Sequence[str]) -> list[int]:
    """Return the columns of images and labels in --labels FILE:IMAGE,LABEL."""
    names = [cell.strip() for cell in header]
    if len(named) != 2 or not set(named) <= set(names):
        raise UserError(
            f"{printable(file)} has the columns {printable(', '.join(names))}, not {printable(', '.join(named))}. "
            "Name two, of images and labels: FILE:path,label"
        )
    return [names.index(name) for name in named]


def called(header: list[str], places: list[int], names: Sequence[str]) -> list[int]:
    """Return the column with the most probable of `names`, in a list; an empty list if no column has one."""
    named = [place for place in places if header[place] in names]
    return sorted(named, key=lambda place: names.index(header[place]))[:1]
