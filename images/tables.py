"""A table of text: its separator, and which of its columns say image, label, part and group. Imports no torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from images.folders import part_of, some
from images.lookup import Index
from system.files import from_cell, read_text, reading
from utils import UserError, printable

# Names of columns, the likeliest first; case, blanks and punctuation do not count.
_PATH: tuple[str, ...] = (
    *("path", "filepath", "imagepath", "file", "filename", "imagefile", "imagename", "image", "img", "picture"),
    *("photo", "imageid", "imgid", "idcode", "isicid", "id", "name"),
)
_LABEL: tuple[str, ...] = (
    *("label", "class", "classname", "labelname", "category", "categoryid", "classid", "labelid", "target"),
    *("species", "breed", "diagnosis", "dx", "y", "tag", "labels"),
)
_PART = ("part", "split", "subset", "partition", "set")
_GROUP = ("group", "groupid")
_FLAGS = dict.fromkeys(("true", "t", "1", "1.0", "yes", "y"), True) | dict.fromkeys(
    ("false", "f", "0", "0.0", "no", "n"), False
)


class Row(NamedTuple):
    """What a row says, in its own words; empty if it says nothing."""

    image: str
    label: str
    part: str
    group: str


def read_rows(file: Path, index: Index, group: str | None) -> tuple[list[Row], str]:
    """Return the rows of a table, and in words what its columns were taken for. `group` names the column of groups.

    Raises UserError if the table cannot be read, names no image, or has no column that can be the label.
    """
    table = read_table(file)
    columns = _columns(file, table, index, group)
    rows = [Row(*(_cell(row, place) for place in columns.places)) for row in table[columns.has_header :]]
    if columns.flags:
        said = [_flagged(row, columns.flags) for row in table[columns.has_header :]]
        rows = [row._replace(part=part) for row, part in zip(rows, said, strict=True)]
    return rows, columns.described(table[0])


def _cell(row: list[str], place: int | None) -> str:
    return from_cell(row[place].strip()) if place is not None and place < len(row) else ""


def read_table(file: Path) -> list[list[str]]:
    """The rows of a table of text that a spreadsheet or a program wrote, without the empty ones.

    Separated by comma, semicolon or tab, or else by the last blank of each line; in UTF-8, UTF-16 with its mark, or
    else Windows' western code page.
    """
    with reading(file):
        with open(file, "rb") as content:
            if content.read(4) == b"PK\x03\x04":
                raise ValueError("a spreadsheet's own format: save it as CSV")
        text = read_text(file)
        first, _, rest = text.partition("\n")
        if re.fullmatch(r"\"?sep=.\"?\s*", first):  # Excel's hint to itself
            text = rest
        tables = [list(csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=False)) for sign in ",;\t"]
    tables = [[row for row in table if any(cell.strip() for cell in row)] for table in tables]
    best = max(tables, key=_regularity)
    if not best or len(best[0]) < 2:
        best = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]  # "my photos/1.png cat"
    if not best or len(best[0]) < 2:
        shown = f"; its first line is {printable(text.strip().splitlines()[0])[:80]!r}" if text.strip() else ""
        raise UserError(f"{printable(file)} is no table of at least two columns (path or id, and label){shown}.")
    return best


def _regularity(table: list[list[str]]) -> tuple[float, int]:
    """How likely a separator is the right one: the share of rows as wide as the first, then its columns."""
    if not table or len(table[0]) < 2:
        return 0.0, 0
    return sum(len(row) == len(table[0]) for row in table) / len(table), len(table[0])


class _Columns(NamedTuple):
    """The columns of image, label, part and group; `flags` are columns that say yes or no to a part."""

    places: tuple[int, int, int | None, int | None]
    flags: dict[int, str]
    has_header: bool

    def described(self, first: list[str]) -> str:
        """Return in words what each column was taken for, given the first row."""
        names = [
            f"'{printable(cell)}'" if self.has_header else f"column {place + 1}" for place, cell in enumerate(first)
        ]
        taken = zip(("images", "classes", "parts", "groups"), self.places, strict=True)
        said = [f"{what} from {names[place]}" for what, place in taken if place is not None]
        said += [f"parts from {names[place]}" for place in self.flags]
        unused = [name for place, name in enumerate(names) if place not in self.places and place not in self.flags]
        return ", ".join(said) + (f"; not used: {some(unused)}" if unused else "")


def _columns(file: Path, rows: list[list[str]], index: Index, group: str | None) -> _Columns:
    """Return what the columns of a table are for. Files on disk decide which one names images."""
    sample = rows[1:200] or rows
    width = len(rows[0])
    hits = [sum(bool(index.find(_cell(row, place))) for row in sample) for place in range(width)]
    plain = [re.sub(r"[\W_]+", "", cell.casefold()) for cell in rows[0]]
    best = max(hits)
    if not best:
        shown = ", ".join(repr(printable(cell)) for cell in sample[0][:6])
        raise UserError(
            f"{printable(file)}: no cell names an image below {printable(index.root)}, where {len(index.paths):,} "
            f"images are; its second row is {shown}. Name the folder of the images with --data_dir."
        )
    path = min((place for place in range(width) if hits[place] == best), key=lambda place: _rank(plain[place], _PATH))
    names_a_file = bool(index.find(rows[0][path].strip())) and plain[path] not in _PATH
    has_header = not names_a_file
    others = [place for place in range(width) if place != path]
    part = _part_column(plain, rows, others) if has_header else None
    by_name = re.sub(r"[\W_]+", "", group.casefold()) if group else None
    groups = _named(plain, others, (by_name,) if by_name else _GROUP) if has_header else None
    flags = _flags(plain, rows, others) if has_header and part is None else {}
    left = [place for place in others if place not in (part, groups, *flags)]
    label = _named(plain, left, _LABEL) if has_header else None
    if label is None and len(left) == 1 or not has_header and left:
        label = left[0]
        if not has_header:
            part, groups = _unnamed(rows, left[1:])
    if label is None:
        names = ", ".join(printable(rows[0][place]) for place in left)
        raise UserError(f"{printable(file)}: which column is the label, of {names}? Rename it to 'label'.")
    return _Columns((path, label, part, groups), flags, has_header)


def _part_column(plain: list[str], rows: list[list[str]], places: list[int]) -> int | None:
    """Return the column that says each row's part: by its name, or else, beside a named label, by all its cells."""
    named = _named(plain, places, _PART)
    if named is not None or _named(plain, places, _LABEL) is None:
        return named
    cells = {place: {_cell(row, place) for row in rows[1:]} for place in places if plain[place] not in _LABEL}
    return next((place for place, said in cells.items() if len(said) > 1 and all(map(part_of, said))), None)


def _flags(plain: list[str], rows: list[list[str]], places: list[int]) -> dict[int, str]:
    """Return the columns that say yes or no to a part, as `is_valid` and `train` do, each with that part."""
    found = {}
    for place in places:
        part = part_of(plain[place].removeprefix("is"))
        values = {_cell(row, place).casefold() for row in rows[1:]} - {""}
        if part and values and values <= _FLAGS.keys():
            found[place] = part
    return found


def _flagged(row: list[str], flags: dict[int, str]) -> str:
    """Return the first part that a row says yes to, else the one that is left."""
    chosen = [part for place, part in flags.items() if _FLAGS.get(_cell(row, place).casefold())]
    return chosen[0] if chosen else "validation" if "train" in flags.values() else "train"


def _rank(name: str, names: Sequence[str | None]) -> int:
    return names.index(name) if name in names else len(names)


def _named(plain: list[str], places: list[int], names: Sequence[str | None]) -> int | None:
    """The place of the likeliest of `names`; None if no column has one."""
    named = [place for place in places if plain[place] in names]
    return min(named, key=lambda place: _rank(plain[place], names), default=None)


def _unnamed(rows: list[list[str]], places: list[int]) -> tuple[int | None, int | None]:
    """Part and group of a table without a header: a column of the usual names of parts, and another one."""
    part = next((p for p in places if all(part_of(row[p]) for row in rows if p < len(row) and row[p].strip())), None)
    return part, next((place for place in places if place != part), None)
