"""Labels in a table: its text, columns and rows, and the image file that each row means. Imports no torch."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from images.folders import ImageSet, Listing, composed, find_image_set, find_images, part_of, relative_name
from images.split import groups_by_pattern
from system.files import read_text, reading
from utils import UserError, amount, printable

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


def list_images(
    data_dir: str | Path,
    *,
    labels: str | Path | None = None,
    group: str | None = None,
    known: Sequence[str] | None = None,
) -> ImageSet:
    """The images of a data set: labelled by a table where one is named, or else by their class folders.

    `group` is a column of the table, or a regular expression whose find in a file's path names its group. `known` are
    the classes of a trained model. Raises UserError if there are none to train on, or to test.
    """
    if labels:
        image_set = find_labelled(data_dir, labels, group=group, known=known)
    else:
        image_set = find_image_set(data_dir, known=known)
    if group and not image_set.groups:
        paths = [path for listing in image_set.parts.values() for path, _ in listing]
        names = [path.relative_to(image_set.root).as_posix() for path in paths]
        found = groups_by_pattern(names, group)
        image_set.groups = {path: name for path, name in zip(paths, found, strict=True) if name is not None}
        alone = len(paths) - len(image_set.groups)
        if alone:
            image_set.notes.append(f"--group {printable(group)} finds nothing in {alone:,} paths: each is by itself")
    return image_set


def find_labelled(
    data_dir: str | Path, table: str | Path, *, group: str | None = None, known: Sequence[str] | None = None
) -> ImageSet:
    """The images below `data_dir` that a table labels: a column of paths or ids, one of labels, optionally part, group.

    `table` is taken from the working folder, or else from `data_dir`. `group` names the column of groups. With
    `known`, the classes of a trained model, rows of other classes are left out. Raises UserError if the table
    cannot be read, names no image, or gives an image two labels.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"{printable(root)} does not exist. Name the folder that holds the images with --data_dir.")
    file = Path(table) if Path(table).exists() else root / table
    rows = read_table(file)
    image_set = ImageSet(root, [], [], from_table=True)
    index = _Index(root)
    header, columns = _columns(file, rows, index, group)
    image_set.notes.append(f"{printable(file.name)}: {header}")
    cells = [[_cell(row, place) for place in columns.places] for row in rows[columns.first :]]
    index.named = {index.folder(name) for name, *_ in cells} - {""}
    found = _Found(file, index)
    for row in cells:
        found.add(*row)
    _fill(image_set, found, known)
    return image_set


def _cell(row: list[str], place: int | None) -> str:
    return row[place].strip() if place is not None and place < len(row) else ""


def read_table(file: Path) -> list[list[str]]:
    """The rows of a table of text that a spreadsheet or a program wrote, without the empty ones.

    Separated by comma, semicolon or tab; in UTF-8, UTF-16 with its mark, or else Windows' western code page.
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
        raise UserError(f"{printable(file)} is no table of at least two columns (path or id, and label).")
    return best


def _regularity(table: list[list[str]]) -> tuple[float, int]:
    """How likely a separator is the right one: the share of rows as wide as the first, then its columns."""
    if not table or len(table[0]) < 2:
        return 0.0, 0
    return sum(len(row) == len(table[0]) for row in table) / len(table), len(table[0])


class _Index:
    """The images below a folder, found again by path, by name, by stem, or by a number that lost its zeros."""

    def __init__(self, root: Path):
        folders: list[str] = []
        self.root = root
        self.paths = list(find_images(root, folders=folders))
        self.named: set[str] = set()  # the folders in which the table's images lie, as it says itself
        names = [relative_name(path, root) for path in self.paths]
        folders = [relative_name(folder, root) for folder in folders]
        self._fold = _folding([*names, *folders])
        self._names = {self._fold(name) for folder in folders for name in folder.split("/")} - {""}
        self._folders: set[str] = set()  # those that hold images
        self._ends: dict[str, list[str]] = defaultdict(list)
        self._tables: list[dict[str, list[Path]]] = [defaultdict(list) for _ in range(3)]
        for path, name in zip(self.paths, names, strict=True):
            folder, _, last = self._fold(name).rpartition("/")
            if folder not in self._folders:
                self._folders.add(folder)
                for end in _ends(folder):
                    self._ends[end].append(folder)
            for table, key in zip(self._tables, _keys(last, posixpath.splitext(last)[0]), strict=True):
                table[key].append(path)
                table[f"{folder}/{key}"].append(path)

    def find(self, cell: str) -> list[Path]:
        """Return the images that a cell may mean: one, none, or several of the same name in different folders."""
        if os.path.isabs(cell) and os.path.isfile(cell):
            inside = os.path.relpath(cell, os.path.abspath(self.root))
            if inside.startswith(os.pardir):
                return [Path(cell)]
            cell = inside
        folder, last = self._split(cell)
        for table, key in zip(self._tables, _keys(last, last), strict=True):
            found = self._lying(table, key, folder)
            if found:
                return found
        return []

    def folder(self, cell: str) -> str:
        """Return the name of the folder that a cell gives its image, folded; empty if it gives none."""
        return self._split(cell)[0].rpartition("/")[2]

    def _split(self, cell: str) -> tuple[str, str]:
        folder, _, last = self._fold(posixpath.normpath(cell.replace("\\", "/"))).rpartition("/")
        return folder, last

    def _lying(self, table: dict[str, list[Path]], key: str, folder: str) -> list[Path]:
        """Return the images of a table's key that lie where a cell says: in the longest end of `folder` on disk.

        If no end is on disk, the folder was perhaps renamed. Then the key alone decides, but it takes no image from a
        folder that other cells name.
        """
        if not folder:
            return table.get(f"/{key}") or table.get(key, [])
        ends = _ends(folder)
        for end, shorter in zip(ends, [*ends[1:], ""], strict=True):
            if end in self._ends:
                places = [end] if end in self._folders else self._ends[end]
                return [path for place in places for path in table.get(f"{place}/{key}", [])]
            first = end.partition("/")[0]
            if first in self._names and first != shorter.partition("/")[0]:
                return []
        return [path for path in table.get(key, []) if self.folder(relative_name(path, self.root)) not in self.named]


def _ends(folder: str) -> list[str]:
    """Return the ends of a path, the longest first: a/b/c, b/c, c."""
    names = folder.split("/")
    return ["/".join(names[first:]) for first in range(len(names))]


def _keys(name: str, stem: str) -> tuple[str, str, str]:
    """Return what an image is found by: its name, its stem, and its stem as a number without leading zeros."""
    return name, stem, str(int(stem)) if stem.isascii() and stem.isdigit() else stem


def _folding(names: list[str]) -> Callable[[str], str]:
    """Return how to compare names: case, and the Unicode form of accents, count only if two names differ by them."""
    different = len(set(names))
    for fold in (lambda name: composed(name).casefold(), composed):
        if len({fold(name) for name in names}) == different:
            return fold
    return str


class _Columns:
    """Where path, label, part and group stand, and the first row that is no header."""

    def __init__(self, path: int, label: int, part: int | None, group: int | None, first: int):
        self.places = (path, label, part, group)
        self.first = first


def _columns(file: Path, rows: list[list[str]], index: _Index, group: str | None) -> tuple[str, _Columns]:
    """The columns of a table, and in words what they were taken for. Files on disk decide which one names images."""
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
    part = _named(plain, others, _PART) if has_header else None
    by_name = re.sub(r"[\W_]+", "", group.casefold()) if group else None
    groups = _named(plain, others, (by_name,) if by_name else _GROUP) if has_header else None
    left = [place for place in others if place not in (part, groups)]
    label = _named(plain, left, _LABEL) if has_header else None
    if label is None and len(left) == 1 or not has_header and left:
        label = left[0]
        if not has_header:
            part, groups = _unnamed(rows, left[1:])
    if label is None:
        names = ", ".join(printable(rows[0][place]) for place in left)
        raise UserError(f"{printable(file)}: which column is the label, of {names}? Rename it to 'label'.")

    taken = {"images": path, "classes": label, "parts": part, "groups": groups}
    said = [
        f"{what} from " + (f"'{printable(rows[0][place])}'" if has_header else f"column {place + 1}")
        for what, place in taken.items()
        if place is not None
    ]
    return ", ".join(said), _Columns(path, label, part, groups, int(has_header))


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


class _Found:
    """What the rows of a table came to: an entry for each image, and the rows that mean none."""

    def __init__(self, file: Path, index: _Index):
        self.file = file
        self.index = index
        self.entries: dict[Path, tuple[str, str, str]] = {}  # label, part, group
        self.moved: dict[str, Path] = {}
        self.missing: list[str] = []
        self.unlabelled: list[str] = []

    def add(self, name: str, label: str, part: str, group: str) -> None:
        paths = self.index.find(name) if name else []
        if len(paths) > 1:
            shown = " and ".join(printable(path) for path in paths[:2])
            raise UserError(f"{printable(self.file)}: {printable(name)!r} may mean {shown}. Name the folder, too.")
        if not paths:
            self.missing.append(name)
            return
        if not label:
            self.unlabelled.append(name)
            return
        if part and not part_of(part):
            raise UserError(
                f"{printable(self.file)}: {printable(part)!r} is no part of a data set: use train, val and test."
            )
        path = paths[0]
        entry = (label, part_of(part) or "", group)
        earlier = self.entries.setdefault(path, entry)
        for what, one, other in zip(("labels", "parts", "groups"), earlier, entry, strict=True):
            if one != other:
                raise UserError(
                    f"{printable(self.file)} gives {printable(path)} two {what}: {printable(one) or 'none'} and "
                    f"{printable(other) or 'none'}. Keep one of its rows."
                )
        folder = self.index.folder(name)
        if folder and folder != self.index.folder(str(path)):
            self.moved.setdefault(name, path)


def _fill(image_set: ImageSet, found: _Found, known: Sequence[str] | None) -> None:
    """Sorts the entries into parts and says what is missing or surplus. Raises UserError if too little is left."""
    file = printable(found.file.name)
    for names, one, more in (
        (found.missing, "names no image that is there", "name no image that is there"),
        (found.unlabelled, "has no label", "have no label"),
    ):
        if names:
            rows = amount(len(names), f"row of {file} {one}", f"rows of {file} {more}")
            image_set.notes.append(f"{rows}, such as {printable(names[0])}")
    for name, path in list(found.moved.items())[:1]:
        rows = amount(len(found.moved), f"row of {file} names", f"rows of {file} name")
        image_set.notes.append(
            f"{rows} a folder that is not there, such as {printable(name)}: taken for {printable(path)}"
        )
    surplus = [path for path in found.index.paths if path not in found.entries]
    if surplus:
        shown = printable(surplus[0].relative_to(image_set.root))
        have = amount(len(surplus), "image has", "images have")
        image_set.notes.append(f"{have} no row in {file}, such as {shown}: left out")
    labels = {label for label, *_ in found.entries.values()}
    image_set.classes = list(known or _in_order(labels))
    unknown = sorted(labels - set(image_set.classes))
    if unknown:
        shown = ", ".join(map(printable, unknown[:10]))
        image_set.notes.append(f"left out, as the model does not know them: {shown}")
    if len(image_set.classes) < 2:
        raise UserError(
            f"{printable(found.file)} labels one class, {printable(min(labels, default=''))}: two are needed."
        )
    numbers = {name: label for label, name in enumerate(image_set.classes)}
    parts: dict[str, Listing] = {"train": [], "validation": [], "test": []}
    for path in sorted(found.entries, key=lambda path: path.parts):
        label, part, group = found.entries[path]
        if label in numbers:
            parts[part or "train"].append((path, numbers[label]))
            if group:
                image_set.groups[path] = group
    if not parts["train"] and not known:
        raise UserError(f"{printable(found.file)} calls no image a training image.")
    image_set.train = parts["train"]
    image_set.test = parts["test"] or parts["validation"] or None
    image_set.validation = (parts["validation"] or None) if parts["test"] else None
    if not image_set.parts:
        raise UserError(f"{printable(found.file)} labels no image of the classes that the model knows.")


def _in_order(labels: set[str]) -> list[str]:
    """Class names by alphabet; whole numbers by their value."""
    numeric = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return sorted(labels, key=int) if numeric else sorted(labels)
