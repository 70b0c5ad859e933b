"""What is on disk: class folders, their images and the parts of a data set. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from images.decode import picture_formats
from utils import UserError, amount, printable, typed

Listing = list[tuple[Path, int]]

# What a folder, or a cell of a table, may call a part of a data set; case, blanks and punctuation do not count.
PART_NAMES = {
    "train": ("train", "training", "segtrain"),
    "validation": ("val", "valid", "validation", "segval"),
    "test": ("test", "testing", "eval", "evaluation", "segtest"),
}
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}  # pictures whether their plugin is installed or not
_LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}

WAYS = (
    "\nThree ways to get data:"
    "\n  python main.py train --demo                        draws a small data set and trains on it"
    "\n  python main.py prepare --download                  fetches Intel Image Classification from Kaggle"
    "\n  python main.py prepare --archive FILE.zip          unpacks an archive you have"
    "\nor name the folder that holds your images with --data_dir."
)


@dataclass
class ImageSet:
    """The files of a data set: (path, label) lists, labels indexing `classes`.

    `validation` or `test` is None if it is to be split off `train`. `groups` names for a path the images that
    must stay together; `from_table` says that a table gave labels and groups. `passed_over` counts the files that are
    no images, by suffix; `notes` are sentences to say.
    """

    root: Path
    classes: list[str]
    train: Listing
    test: Listing | None = None
    validation: Listing | None = None
    groups: dict[Path, str] = field(default_factory=dict)
    from_table: bool = False
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, Listing]:
        """The parts that are there by their names, in the order in which they are counted and decoded."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: listing for name, listing in parts.items() if listing}

    def remarks(self) -> list[str]:
        """The sentences about what was passed over, missing or taken for something else."""
        return [*self.notes, *([counted(self.passed_over)] if self.passed_over else [])]


def counted(passed_over: Counter[str], most: int = 12) -> str:
    """A sentence about the files that are no images, by suffix."""
    kinds = sorted(passed_over.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = ", ".join(f"{count:,} {printable(kind)}" for kind, count in kinds[:most])
    rest = sum(count for _, count in kinds[most:])
    return f"passed over as no images: {shown}" + (f" and {rest:,} others" if rest else "")


def find_image_set(data_dir: str | Path, *, known: Sequence[str] | None = None) -> ImageSet:
    """Lists the class folders below `data_dir`: in parts (`train/`, `test/`, `val/` by any usual name), or alone.

    With `known`, the classes of a trained model, only these are listed, nothing needs to be there to train on, and
    a folder of class folders is listed as `train`. Raises UserError if there is no data, fewer than two classes,
    an empty class, or a class in another part that the training images lack.
    """
    root = Path(data_dir)
    if (root / ".partial").exists():
        raise UserError(f"{root} holds only a part of a data set, because `prepare` was stopped. Run `prepare` again.")
    if not root.is_dir():
        raise UserError(f"no training images in {printable(root)}: there is no such folder.{WAYS}")
    parts = _find_parts(root)
    source = parts.get("train") or (None if parts and known else _class_folder(root, parts, known))
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    image_set = ImageSet(root, list(known or (_class_names(source) if source else ())), [])
    if len(image_set.classes) < 2:
        raise UserError(f"{printable(source)} holds {len(image_set.classes)} class folder: at least two are needed.")
    if source is not None:
        image_set.train = _list_part(source, image_set, None if known else "train", alone=source not in parts.values())
    for name in ("test", "validation"):
        if name in parts:
            setattr(image_set, name, _list_part(parts[name], image_set, None if known else name))
    if not image_set.parts:
        raise UserError(
            f"{printable(root)} holds no image of the classes {some(image_set.classes)}; {'; '.join(image_set.notes)}."
        )
    return image_set


def part_of(name: str) -> str | None:
    """The part of a data set that a name means ("Training set": "train"); None if it means none."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    plain = re.sub(r"(?<=.)(dataset|data|set|images|imgs)$", "", plain)
    return next((part for part, names in PART_NAMES.items() if plain in names), None)


def _find_parts(root: Path) -> dict[str, Path]:
    """The folders of class folders that are called after a part. Raises UserError if two claim the same one."""
    found: dict[str, list[Path]] = {}
    for folder in _subfolders(root):
        part = part_of(folder.name)
        inner = _without_doubling(folder)
        if part and _class_names(inner):
            found.setdefault(part, []).append(inner)
    for part, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(printable(folder.relative_to(root)) for folder in folders)
            raise UserError(f"{printable(root)}: both {names} could hold the {part} images. Rename or move one.")
    return {part: folder for part, (folder,) in found.items()}


def _without_doubling(folder: Path) -> Path:
    """`train` of `train/train` and `seg_train/seg_train`: the inner folder where it is alone and means the same."""
    subfolders = _subfolders(folder)
    if len(subfolders) == 1 and (
        subfolders[0].name.casefold() == folder.name.casefold()
        or part_of(subfolders[0].name) == part_of(folder.name) is not None
    ):
        return _without_doubling(subfolders[0])
    return folder


def _class_folder(root: Path, parts: dict[str, Path], known: Sequence[str] | None) -> Path:
    """The folder of class folders, which is `root` itself or its double. Raises UserError if it is none."""
    folder = _without_doubling(root) if root.is_dir() else root
    names = [path.name for path in _subfolders(folder) if _holds_images(path)] if folder.is_dir() else []
    if known and names:
        if set(names) & set(known):
            return folder
        raise UserError(
            f"{printable(folder)} holds none of the classes that the model knows: there are {some(names)}, "
            f"it knows {some(known)}."
        )
    flat_parts = {part_of(name) for name in names} - {None}  # train/ and test/ full of images are no classes
    if not parts and len(names) > 1 and len(flat_parts) < 2:
        return folder
    raise UserError(_nothing_fits(root, folder, parts))


def _nothing_fits(root: Path, folder: Path, parts: dict[str, Path]) -> str:
    """What was looked for, what is there instead, and what of it would be taken for what."""
    lines = [f"no training images in {printable(root)}: looked for train/ and test/ or val/, or for class folders."]
    if not folder.is_dir():
        return lines[0] + WAYS
    roles = {path: part for part, path in parts.items()}
    for sub in _subfolders(folder)[:20]:
        inner = _without_doubling(sub)
        names = _class_names(inner)
        part = roles.get(inner)
        images = sum(1 for _ in find_images(sub))
        pictures = amount(images, "image", "images")
        inner_folders = amount(len(names), "folder", "folders")
        taken = f"the {part} part" if part else "a class" if images and not names else "no part and no class"
        lines.append(f"  {printable(sub.name)}/: {pictures} in {inner_folders}, would be {taken}")
        if not part and len([name for name in names if _find_parts(inner) or _holds_images(inner / name)]) > 1:
            lines.append(f"    perhaps you mean {typed('--data_dir', sub)}")
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".txt"))
    lines += [f"  {printable(path.name)}: a table of labels? Then add {typed('--labels', path)}" for path in tables[:3]]
    loose = sum(1 for entry in os.scandir(folder) if os.path.isfile(entry.path) and is_image_name(entry.name))
    if loose:
        them = amount(loose, "image", "images")
        lines.append(f"  {them} without a class folder: put them in folders, or name a table with --labels")
    return "\n".join(lines) + WAYS


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _is_wanted(entry.name) and _is_folder(entry))
    return [folder / name for name in names]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _class_names(folder: Path) -> list[str]:
    """Alphabetical names of the class folders; a lone inner folder of the same name is not a class."""
    names = [path.name for path in _subfolders(folder)]
    return [] if names == [folder.name] else names


def _is_wanted(name: str) -> bool:
    """Whether a file or folder is the user's own, not what a desktop leaves behind."""
    return not name.startswith(".") and name.lower() not in _LEFT_BEHIND


def _holds_images(folder: Path) -> bool:
    return next(find_images(folder), None) is not None


def _list_part(folder: Path, image_set: ImageSet, part: str | None, *, alone: bool = False) -> Listing:
    """The images of one part by class. `part` is None if unknown classes are only noted, not refused.

    A class may be absent from all parts but the training images.
    """
    there = _class_names(folder)
    listing: Listing = []
    empty = []
    for label, name in enumerate(image_set.classes):
        found = _sorted_images(folder / name, image_set.passed_over) if name in there else []
        if not found:
            empty.append(name)
        listing += [(path, label) for path in found]
    unknown = sorted(set(there) - set(image_set.classes))
    shown = some(unknown)
    if unknown and part:
        raise UserError(f"{printable(folder)} holds the classes {shown}, which the training images lack: rename them.")
    if unknown:
        image_set.notes.append(f"left out, as the model does not know them: {shown} in {printable(folder)}")
    if empty and part == "train" and not alone:
        raise UserError(f"class folder {printable(folder / empty[0])} holds no image. Fill it or remove it.")
    if empty and part == "train":  # beside the classes lies something else
        image_set.notes.append(f"folders without an image, which are no classes: {some(empty)}")
        names = [name for name in image_set.classes if name not in empty]
        moved = {image_set.classes.index(name): label for label, name in enumerate(names)}
        image_set.classes = names
        return [(path, moved[label]) for path, label in listing]
    if empty and listing:
        image_set.notes.append(f"no image in {printable(folder)} of: {some(empty)}")
    return listing


def some(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def _sorted_images(folder: Path, passed_over: Counter[str]) -> list[Path]:
    found = list(_walk(str(folder), passed_over, []))
    found.sort(key=lambda path: path.split(os.sep))
    return list(map(Path, found))


def find_images(
    folder: Path, passed_over: Counter[str] | None = None, folders: list[str] | None = None
) -> Iterator[Path]:
    """Every image below `folder`, in the order of names, files before subfolders; linked folders are followed.

    Hidden files are passed over, and what is no image is counted in `passed_over` by its suffix. `folders` gathers
    the folders that were walked, `folder` first.
    """
    found = _walk(str(folder), Counter() if passed_over is None else passed_over, [] if folders is None else folders)
    return map(Path, found)


def relative_name(path: Path | str, root: Path) -> str:
    """Return the path of a file below `root` as it stands in tables: with slashes, without the root."""
    start = len(str(root)) + 1 if str(root) != "." else 0
    return str(path)[start:].replace(os.sep, "/")


def composed(name: str) -> str:
    """Return a name in the one Unicode form: an accent is a letter's own or, as macOS writes it, a sign behind it."""
    return unicodedata.normalize("NFC", name)


def _walk(folder: str, passed_over: Counter[str], folders: list[str]) -> Iterator[str]:
    seen = set()  # device and number of each folder: a link may lead back, or to a folder already walked
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen and state.st_ino:
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.append(folder)
        with os.scandir(folder) as entries:
            wanted = sorted((entry for entry in entries if _is_wanted(entry.name)), key=lambda entry: entry.name)
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
    """Whether a file's suffix is that of a kind of picture that Pillow opens."""
    return os.path.splitext(name)[1].lower() in _picture_kinds()[0]


@cache
def _picture_kinds() -> tuple[frozenset[str], tuple[Callable[[bytes], bool | str], ...]]:
    """The suffixes of pictures, and of each kind the function that knows it by its first bytes."""
    kinds = {*picture_formats()}
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds | {"MPO"}}
    return frozenset(suffixes | HEIF_SUFFIXES), tuple(accept for kind in kinds if (accept := Image.OPEN[kind][1]))


def _is_image(path: str) -> bool:
    """Whether Pillow opens a file whose suffix says nothing: asked by its first bytes, then by opening it."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not any(_accepts(accept, start) for accept in _picture_kinds()[1]):
            return False
        with Image.open(path, formats=picture_formats()):
            return True
    except Exception:  # Pillow's readers raise many kinds for what is not theirs
        return False


def _accepts(accept: Callable[[bytes], bool | str], start: bytes) -> bool:
    try:
        return accept(start) is True
    except Exception:  # fewer bytes than it looks at
        return False
