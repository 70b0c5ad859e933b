"""Find the images below a folder from the names in a table. Imports no torch."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from images.walk import composed, find_images, relative_name


class Index:
    """Find the images below a folder by path, by name, by stem, or by a number that lost its zeros."""

    def __init__(self, root: Path):
        folders: list[str] = []
        self.root = root
        self.paths = list(find_images(root, folders=folders))
        self.named: set[str] = set()  # the folders of the table's images, as the table names them
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
        """Return the folder in a cell, with case and Unicode form folded; an empty string if it has none."""
        return self._split(cell)[0].rpartition("/")[2]

    def _split(self, cell: str) -> tuple[str, str]:
        folder, _, last = self._fold(posixpath.normpath(cell.replace("\\", "/"))).rpartition("/")
        return folder, last

    def _lying(self, table: dict[str, list[Path]], key: str, folder: str) -> list[Path]:
        """Return the images of a key that lie in the longest existing end of `folder`.

        If no end exists, the folder was perhaps renamed. Then return the images of the key without regard to the
        folder, except those in a folder that other cells name.
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
    """Return the keys of an image: its name, its stem, and its stem as a number without leading zeros."""
    return name, stem, str(int(stem)) if stem.isascii() and stem.isdigit() else stem


def _folding(names: list[str]) -> Callable[[str], str]:
    """Return a function to compare names: exact in case and Unicode form only if two names differ in nothing else."""
    different = len(set(names))
    for fold in (lambda name: composed(name).casefold(), composed):
        if len({fold(name) for name in names}) == different:
            return fold
    return str
