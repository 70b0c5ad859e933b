"""Find image files below a folder, and compare their names. Imports no torch."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from utils import amount, printable

Seen = set[tuple[int, int]]  # device and number of each folder that was walked

# Formats that are never opened, whatever a file's name is: EPS starts Ghostscript, WMF and IPTC open embedded files,
# MIC and FPX need another package, the others are stubs that only a handler of another package can draw.
NO_PICTURES = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "IPTC", "MIC", "MPEG", "PDF", "WMF"}
# Suffixes of cameras' own formats. Many are TIFF files whose first picture is a thumbnail, which Pillow would show.
CAMERA_RAW = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".k25", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
}
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}  # images even without the plugin
_LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


def find_images(
    folder: Path, passed_over: Counter[str] | None = None, folders: list[str] | None = None
) -> Iterator[Path]:
    """Return every image below `folder`, in the order of names, files before subfolders; follow linked folders.

    Skip hidden files, and count files that are not images in `passed_over` by suffix. Append the folders that were
    searched to `folders`, `folder` first.
    """
    passed_over = Counter() if passed_over is None else passed_over
    return map(Path, walk(str(folder), passed_over, [] if folders is None else folders, set()))


def relative_name(path: Path | str, root: Path) -> str:
    """Return the path of a file relative to `root` as it appears in tables: with slashes on every system."""
    text = str(path)
    before = "" if str(root) == "." else f"{root}{os.sep}"
    inside = text[len(before) :] if text.startswith(before) else os.path.relpath(text, root)  # relpath is slow
    return inside.replace(os.sep, "/")


def composed(name: str) -> str:
    """Return a name in one Unicode form (NFC): macOS writes an accent as a sign behind its letter."""
    return unicodedata.normalize("NFC", name)


def same_name(name: str) -> str:
    """Return a class's name for comparison: in one Unicode form, without blanks at its ends."""
    return composed(name).strip()


def counted(passed_over: Counter[str], most: int = 12) -> str:
    """Return a sentence about the files that are not images, by suffix."""
    kinds = sorted(passed_over.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = ", ".join(f"{count:,} {printable(kind)}" for kind, count in kinds[:most])
    rest = sum(count for _, count in kinds[most:])
    parts = [f"passed over as no images: {shown}" + (f" and {rest:,} others" if rest else "")]
    return "; ".join(parts + raw_advice(passed_over))


def raw_advice(passed_over: Counter[str]) -> list[str]:
    """Return a sentence about skipped camera raw files, if there are any."""
    raw = sum(count for kind, count in passed_over.items() if kind in CAMERA_RAW)
    return [f"{amount(raw, 'file', 'files')} of camera raw: convert to TIFF or JPEG to use them"] if raw else []


def subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_wanted(entry.name) and _is_folder(entry))
    return [folder / name for name in names]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # is_dir raises for a link to itself


def is_wanted(name: str) -> bool:
    """Return True if a file or folder is the user's own, not made by a desktop."""
    return not name.startswith(".") and name.lower() not in _LEFT_BEHIND


def walk(folder: str, passed_over: Counter[str], folders: list[str], seen: Seen) -> Iterator[str]:
    """Yield the images below a folder as `find_images` does, except in the folders of `seen`; add all others to `seen`.

    A link may lead back, or to a folder already searched.
    """
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen and state.st_ino:
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.append(folder)
        with os.scandir(folder) as entries:
            wanted = sorted((entry for entry in entries if is_wanted(entry.name)), key=lambda entry: entry.name)
        waiting += [entry.path for entry in reversed(wanted) if _is_folder(entry)]
        for entry in wanted:
            if _is_folder(entry):
                continue
            if is_image_name(entry.name) or (os.path.isfile(entry.path) and _is_image(entry.path)):
                yield entry.path
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                passed_over[suffix if 0 < len(suffix) < 12 else "without a suffix"] += 1


def is_image_name(name: str) -> bool:
    """Return True if a file has the suffix of a format that Pillow opens."""
    return os.path.splitext(name)[1].lower() in _picture_kinds()[0]


def picture_formats() -> list[str]:
    """Return the names of Pillow's formats that may be opened: pass them to each `Image.open`.

    Pillow recognises formats by content, not by suffix: without the list, PostScript in photo.jpg runs in Ghostscript.
    """
    Image.init()
    return sorted(Image.OPEN.keys() - NO_PICTURES)


@cache
def _picture_kinds() -> tuple[frozenset[str], tuple[Callable[[bytes], bool | str], ...]]:
    """Return the suffixes of image formats, and for each format the function that recognises its first bytes."""
    kinds = {*picture_formats()}
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds | {"MPO"}}
    return frozenset(suffixes | HEIF_SUFFIXES), tuple(accept for kind in kinds if (accept := Image.OPEN[kind][1]))


def _is_image(path: str) -> bool:
    """Return True if Pillow opens a file without a known suffix: test its first bytes, then open it."""
    if os.path.splitext(path)[1].lower() in CAMERA_RAW:
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not any(_accepts(accept, start) for accept in _picture_kinds()[1]):
            return False
        with Image.open(path, formats=picture_formats()):
            return True
    except Exception:  # Pillow's readers raise many types for other formats
        return False


def _accepts(accept: Callable[[bytes], bool | str], start: bytes) -> bool:
    try:
        return accept(start) is True
    except Exception:  # the file is shorter than the test expects
        return False
