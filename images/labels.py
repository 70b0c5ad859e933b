"""Labels in a table: its text, columns and rows, and the image file that each row means. Imports no torch."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from images.folders import ImageSet, Listing, find_image_set, find_images, part_of
from images.split import groups_by_pattern
from system.files import reading
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
    image_set = ImageSet(root, [], [])
    index = _Index(root, list(find_images(root, image_set.passed_over)))
    header, columns = _columns(file, rows, index, group)
    image_set.notes.append(f"{printable(file.name)}: {header}")
    image_set.passed_over.clear()  # in such a folder lies what is no image of the data set: the table decides
    found = _Found(file, index)
    for row in rows[columns.first :]:
        found.add(*(row[place].strip() if place is not None and place < len(row) else "" for place in columns.places))
    _fill(image_set, found, known)
    return image_set


def read_table(file: Path) -> list[list[str]]:
    """The rows of a table of text that a spreadsheet or a program wrote, without the empty ones.

    Separated by comma, semicolon or tab; in UTF-8, UTF-16 with its mark, or else Windows' western code page.
    """
    with reading(file):
        content = file.read_bytes()
        if content[:4] == b"PK\x03\x04":
            raise ValueError("a spreadsheet's own format: save it as CSV")
        text = _as_text(content)
        first, _, rest = text.partition("\n")
        if re.fullmatch(r"\ufeff?\"?sep=.\"?\s*", first):  # Excel's hint to itself
            text = rest
        tables = [list(csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=False)) for sign in ",;\t"]
    tables = [[row for row in table if any(cell.strip() for cell in row)] for table in tables]
    best = max(tables, key=_regularity)
    if not best or len(best[0]) < 2:
        raise UserError(f"{printable(file)} is no table of at least two columns (path or id, and label).")
    return best


def _as_text(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _regularity(table: list[list[str]]) -> tuple[float, int]:
    """How likely a separator is the right one: the share of rows as wide as the first, then its columns."""
    if not table or len(table[0]) < 2:
        return 0.0, 0
    return sum(len(row) == len(table[0]) for row in table) / len(table), len(table[0])


class _Index:
    """The images below a folder, found again by path, by name, by stem, or by a number that lost its zeros."""

    def __init__(self, root: Path, paths: list[Path]):
        self.root = root
        self.paths = paths
        self._tables: list[dict[str, list[Path]]] = [defaultdict(list) for _ in range(5)]
        start = len(str(root)) + 1 if str(root) != "." else 0
        for path in paths:
            whole = str(path)[start:].replace(os.sep, "/")
            name = path.name
            stem = path.stem
            for table, key in zip(self._tables, self._keys(whole, name, stem), strict=True):
                table[key].append(path)

    @staticmethod
    def _keys(whole: str, name: str, stem: str) -> tuple[str, ...]:
        """Relative path, path without suffix, name, stem, and the stem as a number; case does not count."""
        whole = whole.casefold()
        number = str(int(stem)) if stem.isascii() and stem.isdigit() else stem.casefold()
        return whole, os.path.splitext(whole)[0], name.casefold(), stem.casefold(), number

    def find(self, name: str) -> list[Path]:
        """The images that a cell may mean: one, none, or several of the same name in different folders."""
        wanted = re.sub(r"^(\./)+", "", name.replace("\\", "/")).casefold()
        last = wanted.rpartition("/")[2]
        number = str(int(last)) if last.isascii() and last.isdigit() else last
        for table, key in zip(self._tables, (wanted, wanted, last, last, number), strict=True):
            found = table.get(key, [])
            if len(found) > 1 and "/" in wanted:  # the folders that the cell names decide
                tails = [path for path in found if self._ends(path, wanted)]
                found = tails or found
            if len(found) > 1 and len({path.name.casefold() for path in found}) < len(found):
                exact = [path for path in found if path.name == last]
                found = exact if len(exact) == 1 else found
            if found:
                return found
        path = Path(name)
        return [path] if path.is_absolute() and path.is_file() else []

    @staticmethod
    def _ends(path: Path, wanted: str) -> bool:
        whole = path.as_posix().casefold()
        return whole.endswith(f"/{wanted}") or os.path.splitext(whole)[0].endswith(f"/{wanted}")


class _Columns:
    """Where path, label, part and group stand, and the first row that is no header."""

    def __init__(self, path: int, label: int, part: int | None, group: int | None, first: int):
        self.places = (path, label, part, group)
        self.first = first


def _columns(file: Path, rows: list[list[str]], index: _Index, group: str | None) -> tuple[str, _Columns]:
    """The columns of a table, and in words what they were taken for. Files on disk decide which one names images."""
    sample = rows[1:200] or rows
    width = len(rows[0])
    hits = [sum(bool(index.find(row[place].strip())) for row in sample if place < len(row)) for place in range(width)]
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
        self.entries: dict[Path, tuple[str, str | None, str]] = {}  # label, part, group
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
        entry = (label, part_of(part) if part else None, group)
        earlier = self.entries.setdefault(paths[0], entry)
        if earlier[0] != label:
            raise UserError(
                f"{printable(self.file)} gives {printable(name)} two labels: {printable(earlier[0])} and "
                f"{printable(label)}. Keep one of its rows."
            )


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
    parts: dict[str | None, Listing] = {"train": [], "validation": [], "test": []}
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
