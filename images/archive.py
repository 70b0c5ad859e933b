"""What an archive holds, whichever program made it: names, sizes, and the data set among them. Imports no torch.

Every name and size is found harmless before anything is written. Names may stand in a code page that the archive does
not tell, folders may be separated by backslashes, and archives may lie in archives.
"""

from __future__ import annotations

import re
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import fsencode
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO

from images.placing import TEST_NAMES, TRAIN_NAMES
from images.walk import is_image_name
from utils import UserError, printable

MAX_MEMBERS = 1_000_000
MAX_RATIO = 100  # unpacked to packed bytes; JPEG archives stay near 1
MAX_DEPTH = 3  # of archives in archives
SMALL = 16 * 2**20  # bytes that are harmless at any ratio

# Other spellings of the folders that a training looks for.
_SPELLINGS = {"training": "train", "testing": "test"}
# Code pages in which programs of this and that country wrote names without saying so.
_CODE_PAGES = {
    "cp437": "DOS, and Windows in the USA",
    "cp850": "Windows in Western Europe",
    "cp852": "Windows in Central Europe",
    "cp866": "Windows in Russia",
    "cp932": "Windows in Japan",
    "gbk": "Windows in China",
    "big5": "Windows in Taiwan",
    "cp949": "Windows in Korea",
    "cp1252": "some programs in Western Europe",
    "cp1251": "some programs in Russia",
}


@dataclass(frozen=True)
class Member:
    """A file of an archive or a folder: its name with slashes, its bytes unpacked, how to open it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]
    mode: int = 0  # of Unix; 0 if it was not packed there


# ---------------------------------------------------------------------------------- listing
def folder_members(folder: Path) -> list[Member]:
    """The regular files below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [Member(path.relative_to(folder).as_posix(), path.stat().st_size, partial(_opened, path)) for path in files]


def _opened(path: Path) -> IO[bytes]:
    return path.open("rb")


def zip_members(archive: zipfile.ZipFile, source: object, encoding: str | None = None) -> list[Member]:
    """The files of a zip with their names as its maker meant them.

    `encoding` is the code page of names that the archive does not mark as Unicode. Raises UserError if it is needed
    but not given, or does not fit.
    """
    infos = [info for info in archive.infolist() if not _is_folder(info)]
    names = _decoded(infos, source, encoding)
    return [
        Member(
            unicodedata.normalize("NFC", name.replace("\\", "/")),  # macOS takes accents apart
            info.file_size,
            partial(archive.open, info),
            info.external_attr >> 16,
        )
        for name, info in zip(names, infos, strict=True)
    ]


def _is_folder(info: zipfile.ZipInfo) -> bool:
    return info.orig_filename.endswith(("/", "\\")) or bool(info.external_attr & 0x10 and not info.file_size)


def _decoded(infos: list[zipfile.ZipInfo], source: object, encoding: str | None) -> list[str]:
    """The members' names. Those that neither a flag nor a field marks as Unicode are all in one code page."""
    names = [info.orig_filename if info.flag_bits & 0x800 else _unicode_field(info) for info in infos]
    raw = {place: infos[place].orig_filename.encode("cp437") for place, name in enumerate(names) if name is None}
    guess = encoding or "utf-8"  # what other tools write is hardly ever UTF-8 by accident
    try:
        found = {place: name.decode(guess) for place, name in raw.items()}
    except (UnicodeDecodeError, LookupError):
        raise UserError(_which_code_page(list(raw.values()), source, encoding)) from None
    return [found[place] if name is None else name for place, name in enumerate(names)]


def _unicode_field(info: zipfile.ZipInfo) -> str | None:
    """The name in Info-ZIP's Unicode Path extra field, if there is one and it is of this very name."""
    extra = info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        data = extra[4 : 4 + length]
        extra = extra[4 + length :]
        if kind == 0x7075 and len(data) > 5:
            (checksum,) = struct.unpack("<I", data[1:5])
            if checksum == zlib.crc32(info.orig_filename.encode("cp437")):
                return data[5:].decode("utf-8", "replace")
    return None


def _which_code_page(names: list[bytes], source: object, encoding: str | None) -> str:
    """A question that shows how the names would read in each code page in which all of them can be read."""
    example = max(names, key=lambda name: sum(byte > 127 for byte in name))
    readings = []
    for page, where in _CODE_PAGES.items():
        try:
            whole = [name.decode(page) for name in names]
        except UnicodeDecodeError:
            continue
        if all(name.replace("\\", "/").isprintable() for name in whole):
            readings.append(f"  --archive_encoding {page:<7} {printable(example.decode(page))}  ({where})")
    wrong = f"--archive_encoding {encoding} does not fit" if encoding else "does not say in which code page"
    head = f"the names in {printable(source)}: {wrong}." if encoding else f"{printable(source)} {wrong} its names are."
    return "\n".join([f"{head} Choose the line that reads right:", *readings])


# --------------------------------------------------------------------------- archives inside
def unpack_inner(
    members: Iterable[Member], source: Path, near: Path, opened: ExitStack, encoding: str | None
) -> list[Member] | None:
    """The members with every .zip among them replaced by what it holds, as if it were a folder of its name.

    None if there is no .zip. Inner archives are copied to nameless files in the folder `near`, open until `opened` is
    closed.
    """
    result = []
    found = False
    for member in members:
        if not member.name.lower().endswith(".zip"):
            result.append(member)
            continue
        found = True
        copy = opened.enter_context(tempfile.TemporaryFile(dir=near))  # noqa: SIM115 (closed by `opened`)
        with member.open() as packed:
            copyfileobj(packed, copy)
        inner = f"{printable(source)}, in it {printable(member.name)}"
        if not zipfile.is_zipfile(copy):
            raise UserError(f"{inner}: no .zip archive, or damaged.")
        listed = zip_members(opened.enter_context(zipfile.ZipFile(copy)), inner, encoding)
        result += [replace(each, name=f"{member.name[:-4]}/{each.name}") for each in listed]
    return result if found else None


# ------------------------------------------------------------------------------------ safety
def checked(members: Iterable[Member], source: Path, packed: int | None) -> dict[PurePosixPath, Member]:
    """All files by their path, refused as soon as one is hostile or their sum looks like a bomb.

    `packed` is the size of the archive in bytes; None if it is a folder.
    """
    found: dict[PurePosixPath, Member] = {}
    total = 0
    for member in members:
        name = member.name
        path = _safe_path(name, source)
        total = total + member.size
        if stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
            raise _hostile(source, name, "is a link or a device")
        if packed is not None and total > max(SMALL, MAX_RATIO * packed):
            raise _hostile(source, name, f"brings it to {total / 2**20:,.0f} MB, like a decompression bomb")
        if len(found) >= MAX_MEMBERS:
            raise _hostile(source, name, f"is one of more than {MAX_MEMBERS:,} files")
        if path in found:
            raise _hostile(source, name, "occurs twice")
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            found[path] = member
    for clash in found.keys() & {parent for path in found for parent in path.parents}:
        raise _hostile(source, str(clash), "is both a file and a folder")
    return found


def _safe_path(name: str, source: Path) -> PurePosixPath:
    """The relative path of a member; refuses absolute ones, drives, and any way upwards."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or re.search(r"(^|/)[A-Za-z]:", str(path)):
        raise _hostile(source, name, "points outside the target folder")
    if not path.parts or any(len(fsencode(part)) > 240 for part in path.parts) or len(path.parts) > 32:
        raise _hostile(source, name, "is no usable file name")
    return path


def _hostile(source: Path, name: str, problem: str) -> UserError:
    return UserError(f"{printable(source)} is not safe to unpack: {printable(name)!r} {problem}. Nothing was written.")


# ------------------------------------------------------------------------------ the data set
def data_set(found: dict[PurePosixPath, Member]) -> dict[Path, Member] | None:
    """The files of the training and test folders, by their paths below the folder that holds both.

    What lies above and beside is left out, and so is a lone folder between train and the classes. None if there is no
    such folder.
    """
    spelled = {PurePosixPath(*map(_spelled, path.parts[:-1]), path.name): member for path, member in found.items()}
    roots = {path.parts[: path.parts.index(name)] for path in spelled for name in TRAIN_NAMES & set(path.parts[:-1])}
    for root in sorted(roots, key=len):
        depth = len(root)
        inside = {path.parts[depth:]: member for path, member in spelled.items() if path.parts[:depth] == root}
        if any(parts[0] in TEST_NAMES for parts in inside):
            return {Path(*parts): inside[whole] for whole, parts in _without_lone_folders(list(inside)).items()}
    return None


def _spelled(name: str) -> str:
    """`name`, or the usual spelling of a folder of training or test images."""
    usual = _SPELLINGS.get(name.lower(), name.lower())
    return usual if usual in TRAIN_NAMES | TEST_NAMES else name


def _without_lone_folders(paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Each path, less the folders between a part of the data set and its classes; the layout train/train stays."""
    parts = defaultdict(list)
    for path in paths:
        parts[path[0]].append(path)
    shortened: dict[tuple[str, ...], tuple[str, ...]] = {}
    for top, own in parts.items():
        lone: tuple[str, ...] = (top,)
        images = [path for path in own if is_image_name(path[-1])]
        while True:
            following = {path[len(lone)] for path in images}
            if len(following) != 1 or any(len(path) < len(lone) + 3 for path in images):
                break
            lone = (*lone, *following)
        doubled = top in TRAIN_NAMES | {"test", "seg_test"} and lone[1:] == (top,)
        depth = 1 if doubled else len(lone)
        shortened |= {path: (top, *path[depth:]) for path in own if path[:depth] == lone[:depth]}
        shortened |= {path: path for path in own if path[:depth] != lone[:depth]}
    return shortened


def nothing_found(found: Iterable[PurePosixPath], source: Path) -> UserError:
    """Why there is no data set, with what there is instead."""
    folders = {path.parts[-2] for path in found if len(path.parts) > 1 and is_image_name(path.name)}
    names = sorted(map(printable, folders))
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    images = f" Its folders of images are {listed}." if names else " It holds no folder of images."
    return UserError(
        f"{printable(source)} holds no data set: it needs seg_train/ and seg_test/, or train/ and test/ or "
        f"val/, with a folder per class in each.{images}"
    )
