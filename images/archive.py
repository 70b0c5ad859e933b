"""Unpack a zip archive completely, or refuse it: no member may be hostile or get lost. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from images.walk import composed, is_image_name, is_wanted
from utils import RunError, UserError, amount, log, printable, progress_bar

MAX_MEMBERS = 1_000_000
MAX_RATIO = 100  # unpacked to packed bytes; JPEG archives stay near 1
SMALL = 16 * 2**20  # bytes that are harmless at any ratio
SPARE = 64 * 2**20  # bytes to leave free on the disk
WINDOWS = os.name == "nt"


def opened_zip(file: Path, encoding: str | None) -> zipfile.ZipFile:
    """Open a zip. `encoding` is the code page of names that are not marked as Unicode; UTF-8 if None.

    Raise UserError if it is not a zip, or the names do not fit the code page.
    """
    if not zipfile.is_zipfile(file):
        raise UserError(
            f"{printable(file)} is not a .zip archive, or it is damaged: a refused download leaves a web page, and "
            "an interrupted one leaves a part. Download it again, or unpack other archives by hand."
        )
    try:
        return zipfile.ZipFile(file, metadata_encoding=encoding or "utf-8")
    except (UnicodeDecodeError, LookupError):
        problem = f"are not in {printable(encoding)}" if encoding else "are in a code page that it does not tell"
        raise UserError(
            f"the names in {printable(file)} {problem}. Name the code page with --archive_encoding: cp437 or cp850 "
            "for Windows in the West, cp866 in Russia, cp932 in Japan, cp949 in Korea, gbk in China, big5 in Taiwan."
        ) from None


def checked(archive: zipfile.ZipFile, source: Path) -> list[zipfile.ZipInfo]:
    """Return the files to unpack: all but those that a desktop left behind.

    Raise UserError if one is hostile, if two would be one file on some system, or if they look like a bomb.
    """
    infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    places: dict[str, str] = {}
    for info in infos:
        info.filename = info.filename.replace("\\", "/")  # old Windows programs write backslashes
        problem = _problem(info)
        place = composed(str(PurePosixPath(info.filename))).casefold()
        if place in places:
            same = places[place] == info.filename
            problem = "occurs twice" if same else f"is {printable(places[place])!r} on systems that ignore case"
        if problem:
            raise _hostile(source, info.filename, problem)
        if not info.is_dir():
            places[place] = info.filename
    if len(infos) > MAX_MEMBERS or size > max(SMALL, MAX_RATIO * source.stat().st_size):
        count = f"{len(infos):,} files of {size / 2**20:,.0f} MB"
        raise _hostile(source, count, "come out of it, like a decompression bomb")
    for clash in places.keys() & {str(parent) for place in places for parent in PurePosixPath(place).parents}:
        raise _hostile(source, places[clash], "is both a file and a folder")
    return [info for info in infos if all(map(is_wanted, PurePosixPath(info.filename).parts))]


def _problem(info: zipfile.ZipInfo) -> str:
    """Return the reason why a member must not be unpacked; an empty string if it may."""
    name = info.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in info.orig_filename or re.search(r"(^|/)[A-Za-z]:", name):
        return "points outside the target folder"
    if WINDOWS and re.search(r'[<>:"|?*]|[. ](/|$)', name):  # another file's stream, or a name that Windows changes
        return "is not a file name on Windows"
    if any(len(os.fsencode(part)) > 240 for part in path.parts) or len(path.parts) > 32:
        return "is not a usable file name"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return ""


def _hostile(source: Path, name: str, problem: str) -> UserError:
    return UserError(f"{printable(source)} is not safe to unpack: {printable(name)!r} {problem}. Nothing was written.")


def unpack(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], stage: Path) -> None:
    """Unpack files into the folder `stage`. Raise RunError if the disk has too little room."""
    total = sum(info.file_size for info in infos)
    missing = total + SPARE - shutil.disk_usage(stage).free
    if missing > 0:
        raise RunError(
            f"the disk that holds {printable(stage.parent)} has too little room: free {missing / 2**20:,.1f} MB more "
            "there, or choose another --data_dir, and try again."
        )
    with progress_bar(total=total, desc="unpacking", unit="B", unit_scale=True) as bar:
        for info in infos:
            archive.extract(info, stage)
            bar.update(info.file_size)
    taken = {info.filename for info in infos}
    hidden = [name for name in archive.namelist() if name not in taken and is_image_name(name) and "._" not in name]
    inner = [name for name in taken if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))]
    if hidden:
        images = amount(len(hidden), "hidden image is", "hidden images are")
        log.warning(f"{images} not unpacked, such as {printable(hidden[0])}")
    if inner:
        archives = amount(len(inner), "archive in it is", "archives in it are")
        log.warning(f"{archives} to be unpacked by hand, such as {printable(inner[0])}")
