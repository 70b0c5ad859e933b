"""Replace files atomically, lock them, and read them with errors in words."""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils import RunError, UserError, log, printable

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # a full disk, an exceeded quota (not on Windows)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` and rename it to `path` when the block succeeds.

    A reader sees the old file or the new one, never a part, even if the writer is killed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    with contextlib.suppress(OSError, AttributeError):  # force the rename itself onto the disk
        directory = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)


def write_text(file: Path, text: str) -> None:
    """Replace a text file atomically. Raise UserError if the path is not writable, RunError if the disk fails."""
    try:
        with atomic_write(file) as handle:
            handle.write(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        misplaced = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
        raise (UserError if misplaced else RunError)(
            f"{printable(file)} cannot be written ({error.strerror})."
        ) from None


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return `content` as strict JSON. NaN and infinities, which JSON does not have, become null."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(content), indent=indent, allow_nan=False)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


_FORMULA = re.compile("'*[=+\\-@\t\r\n]")


def as_cell(name: str) -> str:
    """Return a name as a CSV cell that no spreadsheet computes; `from_cell` reverses it.

    A spreadsheet reads a cell that begins with = + - @, a tab or a return as a formula, unless it begins with an
    apostrophe. Numbers need no apostrophe.
    """
    return f"'{name}" if _FORMULA.match(name) else name


def from_cell(cell: str) -> str:
    """Return the name in a cell that `as_cell` made."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


def refuse_missing_folders(*files: str | None) -> None:
    """Raise UserError if the folder of an output file does not exist: before the work, not after it."""
    for file in files:
        if file and not Path(file).parent.is_dir():
            raise UserError(f"{printable(file)} cannot be written: its folder does not exist.")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn every error in reading a file into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({error.strerror or error}).") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise UserError(f"{printable(file)} is damaged ({type(error).__name__}: {error}).") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise UserError if it is missing or damaged, or holds NaN or Infinity."""
    with reading(file):
        text = read_text(file)
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            line = text.splitlines()[error.lineno - 1 :][:1]
            raise UserError(
                f"{printable(file)} is damaged, no valid JSON in line {error.lineno} ({error.msg}): "
                f"{printable(''.join(line).strip())[:80]}\nJSON wants straight double quotes, no comma after the last "
                "entry, and \\\\ or / in paths."
            ) from None
        if not isinstance(content, dict):
            raise TypeError("no JSON object")
        return content


def _refuse_constant(name: str) -> None:
    raise ValueError(
        f"it holds {name}, which JSON does not allow: the program that wrote it had numbers that are not finite"
    )


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, UTF-16 with a BOM, or Windows-1252 with a warning."""
    raw = file.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252")  # raises for five byte values
        log.warning(f"{printable(file)} is not UTF-8: read as Windows-1252. Save it as UTF-8 if names look wrong.")
        return text


def remove(*paths: Path) -> None:
    """Delete files that exist and can be deleted, such as the temporary files of a killed process."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def lock(file: IO | int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends; return False if another process holds the lock.

    Return True on Windows and on network file systems without such locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
