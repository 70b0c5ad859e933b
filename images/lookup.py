"""Find the images below a folder from the names in a table. Imports no torch."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from images.walk import composed, find_images, relative_name
from utils import UserError, printable


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
        self._folders: dict[str, set[str]] = defaultdict(set)  # folders of images by each end of their path
        self._images: dict[tuple[str | None, int, str], list[Path]] = defaultdict(list)  # None: in any folder
        for path, name in zip(self.paths, names, strict=True):
            folder, _, last = self._fold(name).rpartition("/")
            for end in _ends(folder):
                self._folders[end].add(folder)
            for kind, key in enumerate(_keys(last, posixpath.splitext(last)[0])):
                self._images[folder, kind, key].append(path)
                self._images[None, kind, key].append(path)

    def find(self, cell: str) -> list[Path]:
        """Return the images that a cell may mean: one, none, or several of the same name in different folders."""
        if os.path.isabs(cell) and os.path.isfile(cell):
            inside = os.path.relpath(cell, os.path.abspath(self.root))
            if inside.startswith(os.pardir):
                return [Path(cell)]
            cell = inside
        folder, last = self._split(cell)
        places = self._places(folder)
        for kind, key in enumerate(_keys(last, last)):
            found = [path for place in places or () for path in self._images.get((place, kind, key), [])]
            if not folder or places is None:
                found = found or self._images.get((None, kind, key), [])
            if folder and places is None:  # perhaps renamed, but not into a folder that other cells name
                found = [path for path in found if self.folder(relative_name(path, self.root)) not in self.named]
            if found:
                return found
        return []

    def one(self, cell: str, file: Path) -> Path | None:
        """Return the image that a cell of the table `file` means; None if there is none.

        Raise UserError if it may mean two images.
        """
        paths = self.find(cell) if cell else []
        if len(paths) > 1:
            several = " and ".join(map(printable, paths[:2]))
            raise UserError(f"{printable(file)}: {printable(cell)!r} may mean {several}. Name the folder, too.")
        return paths[0] if paths else None

    def folder(self, cell: str) -> str:
        """Return the last folder in a cell, with case and Unicode form folded; an empty string if it has none."""
        return self._split(cell)[0].rpartition("/")[2]

    def _split(self, cell: str) -> tuple[str, str]:
        folder, _, last = self._fold(posixpath.normpath(cell.replace("\\", "/"))).rpartition("/")
        return folder, last

    def _places(self, folder: str) -> list[str] | None:
        """Return the folders of images that the folder in a cell may mean; None if none of its names is on disk.

        The longest end of its path that exists counts: folders before it are those of another machine.
        """
        ends = _ends(folder)
        for end, shorter in zip(ends, [*ends[1:], ""], strict=True):
            if end in self._folders:
                return [end] if end in self._folders[end] else sorted(self._folders[end])
            first = end.partition("/")[0]
            if first in self._names and first != shorter.partition("/")[0]:
                return []
        return None


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
