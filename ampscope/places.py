"""Find the origin of a call: the innermost frame outside PyTorch, Python's own files, and this package.

A place is in the user's code or in a library (site-packages), and names the file of PyTorch in between.
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
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch

TORCH = str(Path(torch.__file__).parent) + os.sep
TOOL = str(Path(__file__).parent) + os.sep
TESTS = TOOL + "tests" + os.sep  # these files count as a user's
STANDARD = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib"))
# Files of PyTorch that only pass a call on: the caller is responsible.
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
_users: dict[str, list[CodeType]] = {}  # files that are the user's in any folder, and functions in them
_outermost: set[CodeType] = set()


@dataclass(frozen=True)
class Place:
    """A line of code. `kind` is "user" or "library"; `via` is PyTorch's file between this line and the operator, ""
    if it only passes calls on or there is none."""

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
    """Return a path, shortened: relative to the working folder, or below site-packages."""
    for folder in ("site-packages", "dist-packages"):
        if f"{os.sep}{folder}{os.sep}" in file:
            return file.rpartition(f"{os.sep}{folder}{os.sep}")[2]
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def count_as_users(function: object) -> None:
    """Count the file of `function` as the user's, even inside site-packages."""
    code = getattr(function, "__code__", None)
    if code is not None and (not code.co_filename.startswith((TORCH, TOOL)) or code.co_filename.startswith(TESTS)):
        _users.setdefault(code.co_filename, []).append(code)
        kind_of_file.cache_clear()


def count_file_as_users(file: str) -> None:
    """Count a whole file as the user's, even inside site-packages."""
    _users.setdefault(file, [])
    kind_of_file.cache_clear()


def users_sources() -> list[tuple[str, int, list[str]]]:
    """Return (file, first line, lines) of the functions named as the user's (make(), step, loss), then their files."""
    functions = []
    for file, codes in _users.items():
        # The latest first, but lambdas last, because their line also contains the code beside them.
        latest = [*reversed(codes)]
        for code in sorted(latest, key=lambda code: code.co_name == "<lambda>"):
            with contextlib.suppress(OSError, TypeError):
                lines, start = inspect.getsourcelines(code)
                functions.append((file, start, lines))
    return [*functions, *((file, 1, linecache.getlines(file)) for file in _users)]


def class_sources(kind: type) -> list[tuple[str, int, list[str]]]:
    """Return (file, first line, lines) of a class's own functions, also if the program that it is from has ended."""
    found = []
    for value in vars(kind).values():
        code = getattr(value, "__code__", None)
        if code is not None:
            with contextlib.suppress(OSError, TypeError):
                lines, start = inspect.getsourcelines(code)
                found.append((code.co_filename, start, lines))
    return found


def line_with(pattern: str, sources: list[tuple[str, int, list[str]]]) -> Place | None:
    """Return the first line of code in these sources that matches the pattern; text and comments are no code."""
    for file, start, lines in sources:
        for number, line in enumerate(_code_alone(lines), start):
            if re.search(pattern, line):
                return Place(file, number, "", "user")
    return None


def _code_alone(lines: list[str]) -> list[str]:
    """Return the lines without their comments and the text in quotes."""
    code = [*lines]
    with contextlib.suppress(tokenize.TokenError, IndentationError):
        for token in tokenize.generate_tokens(iter(lines).__next__):
            (first, start), (last, end) = token.start, token.end
            if token.type == tokenize.COMMENT:
                code[first - 1] = code[first - 1][:start]
            elif token.type == tokenize.STRING and first == last:
                code[first - 1] = code[first - 1][:start] + " " * (end - start) + code[first - 1][end:]
            elif token.type == tokenize.STRING:
                code[first - 1 : last] = [lines[first - 1][:start], *[""] * (last - first - 1), lines[last - 1][end:]]
    return code


@functools.cache
def kind_of_file(file: str) -> str:
    """Return the owner of a file: "user", "library", "torch", "tool" (this package's) or "standard"."""
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
    """Mark the function that calls the step: the search for a place stops there."""
    _outermost.add(function.__code__)
    return function


def users_line(within: int | None = None) -> Place | None:
    """Return the innermost line of the user's, also if a library is called from there; `within` so many frames."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and within != 0:
        kind = kind_of_file(frame.f_code.co_filename)
        if kind == "user":
            return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, "user")
        within = within - (kind == "library") if within is not None else None
        frame = frame.f_back
    return None


def place_of_caller() -> Place | None:
    """Return the place of the current call, or None if only PyTorch and this package are on the way."""
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
