"""List the files that `predict` is given: files, folders, lists of paths, lines on stdin. Imports no torch."""

from __future__ import annotations

import codecs
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.lookup import Index
from images.walk import counted, find_images
from utils import UserError, log, printable


@dataclass(frozen=True)
class Item:
    """A file to classify, and the subfolder of the input folder in which it was found ("" in that folder itself)."""

    path: Path
    folder: str = ""


def refuse_missing(inputs: list[str]) -> None:
    """Raise UserError if an input does not exist."""
    if "-" in inputs and (sys.stdin is None or sys.stdin.closed):
        raise UserError("- reads paths from standard input, which is closed: pipe paths into it, or name files.")
    for name in inputs:
        path = Path(name)
        if name == "-" or (name.startswith("@") and Path(name[1:]).exists() and not Path(name[1:]).is_dir()):
            continue
        if not path.exists():
            raise UserError(f"{printable(name.removeprefix('@'))} does not exist.")
        if path.is_dir() and next(find_images(path), None) is None:
            raise UserError(f"{printable(name)} holds no image.")


def listed(inputs: list[str]) -> Iterator[Item]:
    """Yield the files of inputs: a file, a folder, `@FILE` with a path on each line, or `-` for such lines on stdin."""
    passed_over: Counter[str] = Counter()
    for name in inputs:
        if name == "-":
            lines = _lines_of(sys.stdin.buffer) if hasattr(sys.stdin, "buffer") else sys.stdin
            yield from _of_lines(lines, Path("."), passed_over)
        elif name.startswith("@") and not Path(name).exists():
            with open(name[1:], "rb") as file:
                yield from _of_lines(_lines_of(file), Path(name[1:]).parent, passed_over, seek=True)
        else:
            yield from _of_path(Path(name), passed_over)
    if passed_over:
        log.info(counted(passed_over))


def _lines_of(file: Any) -> Iterator[str]:
    """Yield the lines of a buffered binary file as they come, in UTF-8 or, with its mark, UTF-16."""
    wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = io.TextIOWrapper(file, "utf-16" if wide else "utf-8-sig", errors="surrogateescape")
    yield from text
    text.detach()  # else the file would be closed with it


def _of_lines(lines: Iterable[str], beside: Path, passed_over: Counter[str], *, seek: bool = False) -> Iterator[Item]:
    """Yield the files that lines name, taken from the working folder or from `beside`.

    With `seek`, find other names as in a table: an id without suffix, or the end of a path that
    another machine wrote.
    """
    index = None
    for line in lines:
        name = line.strip("\r\n")
        path = next((path for path in (Path(name), beside / name) if path.exists()), None)
        if name.strip() and path is None and seek:
            index = index or Index(beside)
            found = index.find(name.strip())
            path = found[0] if len(found) == 1 else None
        if name.strip():
            yield from _of_path(path or beside / name, passed_over)


def _of_path(path: Path, passed_over: Counter[str]) -> Iterator[Item]:
    if not path.is_dir():
        yield Item(path)
        return
    for found in find_images(path, passed_over):
        folder = found.parent.relative_to(path).as_posix()
        yield Item(found, "" if folder == "." else folder)
