"""An opened data set: training, validation and test images as positions in stores, and the rows of split.csv."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images.decode import Rules
from images.folders import Listing
from images.stores import ImageStore
from images.walk import composed
from system.files import as_cell

Split = dict[str, tuple[str, str]]  # path in one Unicode form: (class, part), as in split.csv


@dataclass
class Subset:
    """Some images of a store: listing positions and their labels, in evaluation order."""

    store: ImageStore
    listing: Listing
    positions: np.ndarray
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.array([self.listing[position][1] for position in self.positions], np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def keep(self, count: int) -> None:
        """Reduce the subset to at most `count` images, spread evenly over it."""
        self.choose(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))

    def choose(self, places: np.ndarray) -> None:
        """Reduce the subset to the images at these places in it."""
        self.positions = self.positions[places]
        self.labels = self.labels[places]

    @property
    def paths(self) -> list[Path]:
        return [self.listing[position][0] for position in self.positions]


@dataclass
class DataSet:
    """Training, validation and test images, ready to be batched; `fingerprint` identifies their pixels."""

    root: Path
    classes: list[str]
    subsets: dict[str, Subset]  # train, validation and test, or test alone
    fingerprint: str
    unreadable: list[str]
    rules: Rules = field(default_factory=Rules)  # the rules that turned the files into pixels
    listed: Listing = field(default_factory=list)  # all files, including unreadable ones
    divided: tuple[str, ...] = ()  # parts that were split off the training images

    @property
    def train(self) -> Subset:
        return self.subsets["train"]

    @property
    def validation(self) -> Subset:
        return self.subsets["validation"]

    @property
    def test(self) -> Subset:
        return self.subsets["test"]

    def names(self, subset: Subset) -> list[str]:
        """Return the files of a subset, relative to the data folder, with slashes on every system."""
        return [relative(path, self.root) for path in subset.paths]

    def split(self) -> Iterator[list[str]]:
        """Yield the rows of split.csv: path, class and part of every file; empty if it is unreadable or left out."""
        yield ["path", "class", "part"]
        parts = {path: part for part, subset in self.subsets.items() for path in subset.paths}
        for path, label in self.listed:
            yield [as_cell(relative(path, self.root)), as_cell(self.classes[label]), parts.get(path, "")]


def relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def split_name(path: Path, root: Path) -> str:
    """Return a file's name in a split that was read: its path in one Unicode form."""
    return composed(relative(path, root))


def files_checksum(paths: Iterable[Path], root: Path) -> str:
    """Return a checksum of files: of their names, sizes, and first and last 4,096 bytes."""
    found = hashlib.sha256()
    for name, path in sorted((split_name(path, root), path) for path in paths):
        size = 0
        ends = []
        with suppress(OSError), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(size - 4096, 0)):
                file.seek(start)
                ends.append(file.read(4096))
        found.update(repr((name, size, ends)).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]
