"""Where a call came from: the innermost frame that is neither PyTorch's, nor Python's own, nor this package's.

A place is the user's, or that of a library (site-packages), and says through which file of PyTorch it passed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch

TORCH = str(Path(torch.__file__).parent) + os.sep
TOOL = str(Path(__file__).parent) + os.sep
TESTS = TOOL + "tests" + os.sep  # whose files count as a user's
STANDARD = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib"))
# Files of PyTorch that only pass a call on: what happens in them is the caller's doing.
WRAPPERS = (
    "_tensor.py",
    "_tensor_str.py",
    "overrides.py",
    "functional.py",
    "_ops.py",
    "_compile.py",
    "_VF.py",
    "autograd/__init__.py",
    "autograd/function.py",
    "nn/functional.py",
    "nn/modules/",
    "utils/_",
    "_dynamo/",
)
_users: dict[str, list[CodeType]] = {}  # files that are the user's wherever they lie, and functions in them
_outermost: set[CodeType] = set()


@dataclass(frozen=True)
class Place:
    """`kind` is "user" or "library"; `via` is PyTorch's file between this line and the operator, "" if there is none
    but those that pass a call on."""

    file: str
    line: int
    function: str
    kind: str
    via: str = ""

    @property
    def own(self) -> bool:
        return self.kind == "user"

    @property
    def code(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}"


def shown(file: str) -> str:
    """A path as short as it stays clear: from the working folder, or below site-packages."""
    for folder in ("site-packages", "dist-packages"):
        if f"{os.sep}{folder}{os.sep}" in file:
            return file.rpartition(f"{os.sep}{folder}{os.sep}")[2]
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def count_as_users(function: object) -> None:
    """The file in which `function` is written is the user's, even inside site-packages."""
    code = getattr(function, "__code__", None)
    if code is not None and (not code.co_filename.startswith((TORCH, TOOL)) or code.co_filename.startswith(TESTS)):
        _users.setdefault(code.co_filename, []).append(code)
        kind_of_file.cache_clear()


def count_file_as_users(file: str) -> None:
    """A whole file is the user's, even inside site-packages."""
    _users.setdefault(file, [])
    kind_of_file.cache_clear()


def users_sources() -> list[tuple[str, int, list[str]]]:
    """(file, first line, lines) of the functions named as the user's (make(), the step, the loss), then their files."""
    functions = []
    for file, codes in _users.items():
        # The latest first; but the line of a lambda also holds what stands beside it, so lambdas come last.
        latest = [*reversed(codes)]
        for code in sorted(latest, key=lambda code: code.co_name == "<lambda>"):
            with contextlib.suppress(OSError, TypeError):
                lines, start = inspect.getsourcelines(code)
                functions.append((file, start, lines))
    return [*functions, *((file, 1, linecache.getlines(file)) for file in _users)]


def line_with(pattern: str, sources: list[tuple[str, int, list[str]]]) -> Place | None:
    """The first line of code in these sources that the pattern is found in."""
    for file, start, lines in sources:
        for number, line in enumerate(lines, start):
            if re.search(pattern, line.partition("#")[0]):
                return Place(file, number, "", "user")
    return None


@functools.cache
def kind_of_file(file: str) -> str:
    """Whose a file is: "user", "library", "torch", "tool" (this package's) or "standard"."""
    if file in _users:
        return "user"
    if file.startswith(TOOL) and not file.startswith(TESTS):
        return "tool"
    if file.startswith(TORCH):
        return "torch"
    if file.startswith("<") and not file.startswith(("<stdin", "<ipython", "<string")):
        return "standard"
    if f"{os.sep}site-packages{os.sep}" in file or f"{os.sep}dist-packages{os.sep}" in file:
        return "library"
    return "standard" if file.startswith(STANDARD) else "user"


@functools.cache
def _passes(file: str) -> bool:
    return file[len(TORCH) :].replace(os.sep, "/").startswith(WRAPPERS)


def outermost(function: Callable) -> Callable:
    """Marks the function that calls the step: who called that is not asked."""
    _outermost.add(function.__code__)
    return function


def place_of_caller() -> Place | None:
    """The place that led here, or None if only PyTorch and this package are on the way."""
    frame: FrameType | None = sys._getframe(1)
    via = ""
    while frame is not None and frame.f_code not in _outermost:
        file = frame.f_code.co_filename
        kind = kind_of_file(file)
        if kind in ("user", "library"):
            return Place(file, frame.f_lineno, frame.f_code.co_name, kind, via)
        if kind == "torch" and not via and not _passes(file):
            via = file[len(TORCH) :].replace(os.sep, "/")
        frame = frame.f_back
    return None
