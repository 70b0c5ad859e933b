"""Write a data set to disk completely or not at all: one writer at a time, moved into place when complete."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from images.folders import part_of
from images.walk import subfolders
from system.files import FULL, lock
from utils import RunError, UserError, printable


@contextlib.contextmanager
def one_writer(data_dir: Path) -> Iterator[None]:
    """Let one process of this machine fill a folder at a time; the others wait, and then find it filled."""
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        folder = os.open(data_dir, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        yield
        return
    try:
        if not lock(folder):
            print(f"another process is filling {printable(data_dir)}; waiting for it", file=sys.stderr)
            lock(folder, wait=True)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def building(data_dir: Path, source: str) -> Iterator[Path]:
    """Yield a hidden folder to write a data set into; move its contents into place when the block succeeds.

    Delete the remains of a killed process; until then a folder that contains `.partial` is refused as a data set.
    """
    stage = data_dir / ".partial"
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    getattr(os, "sync", lambda: None)()  # once for all files: a rename must not reach the disk before their bytes
    (stage / ".complete").write_bytes(os.fsencode(source))
    finish_interrupted(data_dir)


def finish_interrupted(data_dir: Path) -> str | None:
    """Move a complete data set into place, its training images last, and return its source; None if there is none.

    Call it before anything else: it finishes moves that were interrupted.
    """
    stage = data_dir / ".partial"
    if not (stage / ".complete").exists():
        return None
    source = os.fsdecode((stage / ".complete").read_bytes())
    if not source:  # it was stopped between opening that file and writing it: `building` starts again
        return None
    for name in sorted(set(os.listdir(stage)) - {".complete"}, key=lambda name: (part_of(name) == "train", name)):
        os.replace(stage / name, data_dir / name)
    shutil.rmtree(stage)
    return source


@contextlib.contextmanager
def explained(data_dir: Path, source: Path | None = None) -> Iterator[None]:
    """Turn the errors of the disk, or of a damaged archive, into one clear message."""
    try:
        yield
    except Exception as error:  # zipfile, tarfile and the decompressors raise nearly every type on damage
        number = getattr(error, "errno", None)
        if isinstance(error, (UserError, RunError)) or source is None and number is None:
            raise
        if number is None:
            problem = f"damaged or incomplete ({printable(error)}). Download it again."
            if "password" in str(error) or "encrypted" in str(error):
                problem = "protected by a password; unpack it by hand."
            if isinstance(error, NotImplementedError):  # such as Deflate64, which Windows uses above 2 GB
                problem = f"packed in a way that Python cannot unpack ({printable(error)}); unpack it by hand."
            raise UserError(f"{printable(source)} is {problem}") from None
        if number in FULL:
            raise RunError(
                f"the disk that holds {printable(data_dir)} is full. Free some space there and run the "
                "same command again."
            ) from None
        forbidden = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or number == errno.EROFS
        name = getattr(error, "filename", None)
        verb = "read" if source and name == str(source) else "write"
        problem = f"cannot {verb} {printable(name or data_dir)}: {getattr(error, 'strerror', error)}."
        raise (UserError if forbidden else RunError)(f"{problem} Mend that, or choose another --data_dir.") from None


def refuse_existing(data_dir: Path, names: Iterable[str]) -> None:
    """Raise UserError if a folder contains a part of a data set, or anything with these names."""
    held = {name for name in names if (data_dir / name).exists()}
    if data_dir.is_dir():
        held |= {path.name for path in subfolders(data_dir) if part_of(path.name)}
    if held:
        raise UserError(
            f"{printable(data_dir)} already holds {printable(', '.join(sorted(held)))}; nothing was changed. "
            "Use it as it is, remove it, or choose another --data_dir."
        )


def put_in_place(data_dir: Path, source: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a data set into a hidden folder, and move it into `data_dir` when it is complete.

    Leave out a folder that contains everything else, unless it has the name of a part.
    """
    key = str(source.absolute())
    with one_writer(data_dir):
        if finish_interrupted(data_dir) == key:
            return
        refuse_existing(data_dir, ())
        with building(data_dir, key) as stage:
            fill(stage)
            _lift(stage)
            refuse_existing(data_dir, os.listdir(stage))


def _lift(stage: Path) -> None:
    while True:
        entries = list(stage.iterdir())
        if len(entries) != 1 or not subfolders(stage) or part_of(entries[0].name) or not subfolders(entries[0]):
            return
        lone = entries[0].rename(stage / ".lone")
        for inner in lone.iterdir():
            inner.rename(stage / inner.name)
        lone.rmdir()
