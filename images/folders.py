"""Find class folders, their images and the parts of a data set on disk. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from images.walk import Seen, counted, find_images, is_image_name, same_name, subfolders, walk
from utils import UserError, amount, printable, typed

Listing = list[tuple[Path, int]]

# Names of a folder, or of a table cell, for a part of a data set; case, blanks and punctuation do not count.
PART_NAMES = {
    "train": ("train", "training", "segtrain"),
    "validation": ("val", "valid", "validation", "segval"),
    "test": ("test", "testing", "eval", "evaluation", "segtest"),
}

WAYS = (
    "\nThree ways to get data:"
    "\n  python main.py train --demo                        draws a small data set and trains on it"
    "\n  python main.py prepare --download                  fetches Intel Image Classification from Kaggle"
    "\n  python main.py prepare --archive FILE.zip          unpacks an archive you have"
    "\nor name the folder that holds your images with --data_dir."
)


@dataclass
class ImageSet:
    """The files of a data set: (path, label) lists, with labels as indices into `classes`.

    `validation` or `test` is None if it is to be split off `train`. `groups` names for a path the images that must stay
    together; `from_table` is True if a table gave labels and groups. `passed_over` counts files that are not images by
    suffix; `notes` are sentences to log.
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
        """Return the existing parts by name, in the order in which they are counted and decoded."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: listing for name, listing in parts.items() if listing}

    def remarks(self) -> list[str]:
        """Return sentences about files that were skipped, missing or interpreted in another way."""
        return [*self.notes, *([counted(self.passed_over)] if self.passed_over else [])]


def find_image_set(data_dir: str | Path, *, known: Sequence[str] | None = None) -> ImageSet:
    """List the class folders below `data_dir`: in parts (`train/`, `test/`, `val/` by any usual name), or alone.

    With `known`, the classes of a trained model, list only these; training images may be missing, and a folder of class
    folders is listed as `train`. Raise UserError if there is no data, fewer than two classes, an empty class, or a
    class in another part that the training images lack.
    """
    root = Path(data_dir)
    if (root / ".partial").exists():
        raise UserError(f"{root} holds only a part of a data set, because `prepare` was stopped. Run `prepare` again.")
    if not root.is_dir():
        raise UserError(f"no training images in {printable(root)}: there is no such folder.{WAYS}")
    parts = _find_parts(root)
    if parts and _are_classes(root, parts, known):
        parts = {}
        source: Path | None = root
    else:
        source = parts.get("train") or (None if parts and known else _class_folder(root, parts, known))
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    image_set = ImageSet(root, list(known or (_class_names(source) if source else ())), [])
    if len(image_set.classes) < 2:
        raise UserError(f"{printable(source)} holds {len(image_set.classes)} class folder: at least two are needed.")
    seen: Seen = set()
    if source is not None:
        alone = source not in parts.values()
        image_set.train = _list_part(source, image_set, None if known else "train", seen, alone=alone)
    for name in ("test", "validation"):
        if name in parts:
            setattr(image_set, name, _list_part(parts[name], image_set, None if known else name, seen))
    if not image_set.parts:
        raise UserError(
            f"{printable(root)} holds no image of the classes {some(image_set.classes)}; {'; '.join(image_set.notes)}."
        )
    odd = [name for name in image_set.classes if part_of(name)] if not parts and not known else []
    if odd:
        image_set.notes.append(
            f"taken for classes, like the folders beside: {some(odd)} (move folders of other data elsewhere)"
        )
    left = list(walk(str(root), Counter(), [], seen))
    if left:
        images = amount(len(left), "image", "images")
        image_set.notes.append(f"{images} in no class folder that is used: left out, such as {printable(left[0])}")
    return image_set


def part_of(name: str) -> str | None:
    """Return the part of a data set that a name means ("Training set": "train"); None if it means none."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    plain = re.sub(r"(?<=.)(dataset|data|set|images|imgs)$", "", plain)
    return next((part for part, names in PART_NAMES.items() if plain in names), None)


def _find_parts(root: Path) -> dict[str, Path]:
    """Return the folders of class folders with the name of a part. Raise UserError if two name the same part."""
    found: dict[str, list[Path]] = {}
    for folder in subfolders(root):
        part = part_of(folder.name)
        inner = _without_doubling(folder)
        if part and _class_names(inner):
            found.setdefault(part, []).append(inner)
    for part, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(printable(folder.relative_to(root)) for folder in folders)
            raise UserError(f"{printable(root)}: both {names} could hold the {part} images. Rename or move one.")
    return {part: folder for part, (folder,) in found.items()}


def _are_classes(root: Path, parts: dict[str, Path], known: Sequence[str] | None) -> bool:
    """Return True if the folders in `root` are classes, although one is named like a part, as "train" among vehicles.

    The classes of a trained model decide. Without them, parts are parts if they have classes in common, or if nothing
    lies beside them, and classes if as many images lie beside them. Raise UserError in any other case.
    """
    inner = [{same_name(name) for name in _class_names(folder)} for folder in parts.values()]
    if known:
        wanted = set(map(same_name, known))
        own = {same_name(folder.name) for folder in subfolders(root)}
        return len(own & wanted) > max(len(names & wanted) for names in inner)
    beside = _beside(root)
    if not beside or any(one & other for one, other in combinations(inner, 2)):
        return False
    if _outweigh(beside, parts.values()) or "train" not in parts:
        return _outweigh(beside, parts.values())
    folder = parts["train"]
    raise UserError(
        f"{printable(root)}: is {printable(folder.relative_to(root))} a part of the data set, or a class beside "
        f"{some([path.name for path in beside])}? If it is a part, name that folder alone: --data_dir "
        f"{printable(folder)}. If it is a class, give it another name."
    )


def _beside(root: Path) -> list[Path]:
    """Return the folders of images in `root` with names that neither mean a part nor images without labels."""
    words = {"pred", "prediction", "unlabeled", "unlabelled"}.union(*PART_NAMES.values())
    return [
        path
        for path in subfolders(root)
        if not part_of(path.name) and not words & set(re.findall("[a-z]+", path.name.casefold())) and _has_images(path)
    ]


def _outweigh(folders: Sequence[Path], others: Iterable[Path]) -> bool:
    """Return True if there are at least two of these folders, with at least as many images as the others."""
    counts = [sum(1 for folder in side for _ in find_images(folder)) for side in (folders, others)]
    return len(folders) > 1 and counts[0] >= counts[1]


def _without_doubling(folder: Path) -> Path:
    """Return the inner folder of `train/train` or `seg_train/seg_train`, if it is alone and has the same meaning."""
    inner = subfolders(folder)
    if len(inner) == 1 and (
        inner[0].name.casefold() == folder.name.casefold() or part_of(inner[0].name) == part_of(folder.name) is not None
    ):
        return _without_doubling(inner[0])
    return folder


def _class_folder(root: Path, parts: dict[str, Path], known: Sequence[str] | None) -> Path:
    """Return the folder of class folders: `root`, or its double in it. Raise UserError if it has no classes."""
    folder = _without_doubling(root) if root.is_dir() else root
    names = [path.name for path in subfolders(folder) if _has_images(path)] if folder.is_dir() else []
    if known and names:
        if set(map(same_name, names)) & set(map(same_name, known)):
            return folder
        raise UserError(
            f"{printable(folder)} holds none of the classes that the model knows: there are {some(names)}, "
            f"it knows {some(known)}."
        )
    flat = [folder / name for name in names if part_of(name)]  # train/ and test/ full of images are not classes
    whole = [name for name in names if _find_parts(folder / name)]  # a data set by itself is not a class
    if not parts and not whole and len(names) > 1 and (len(flat) < 2 or _outweigh(_beside(folder), flat)):
        return folder
    raise UserError(_nothing_fits(root, folder, parts))


def _nothing_fits(root: Path, folder: Path, parts: dict[str, Path]) -> str:
    """Describe the expected folders, those that were found, and the meaning that each would have."""
    lines = [f"no training images in {printable(root)}: looked for train/ and test/ or val/, or for class folders."]
    if not folder.is_dir():
        return lines[0] + WAYS
    roles = {path: part for part, path in parts.items()}
    for sub in subfolders(folder)[:20]:
        inner = _without_doubling(sub)
        names = _class_names(inner)
        part = roles.get(inner)
        images = sum(1 for _ in find_images(sub))
        pictures = amount(images, "image", "images")
        inner_folders = amount(len(names), "folder", "folders")
        taken = f"the {part} part" if part else "a class" if images and not names else "no part and no class"
        lines.append(f"  {printable(sub.name)}/: {pictures} in {inner_folders}, would be {taken}")
        if not part and len([name for name in names if _find_parts(inner) or _has_images(inner / name)]) > 1:
            lines.append(f"    perhaps you mean {typed('--data_dir', sub)}")
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".txt"))
    lines += [f"  {printable(path.name)}: a table of labels? Then add {typed('--labels', path)}" for path in tables[:3]]
    loose = sum(1 for entry in os.scandir(folder) if os.path.isfile(entry.path) and is_image_name(entry.name))
    if loose:
        them = amount(loose, "image", "images")
        lines.append(f"  {them} without a class folder: put them in folders, or name a table with --labels")
    return "\n".join(lines) + WAYS


def _class_names(folder: Path) -> list[str]:
    """Return the names of the class folders in alphabetical order; a lone inner folder of the same name is not a class.

    Of several spellings of a name return the first.
    """
    names = {same_name(path.name): path.name for path in reversed(subfolders(folder))}
    return [] if set(names.values()) == {folder.name} else sorted(names.values())


def _has_images(folder: Path) -> bool:
    return next(find_images(folder), None) is not None


def _list_part(folder: Path, image_set: ImageSet, part: str | None, seen: Seen, *, alone: bool = False) -> Listing:
    """Return the images of one part by class. `part` is None if unknown classes are only noted, not refused.

    A class may be absent from all parts but the training images. `seen` gathers the folders that were read.
    """
    labels = numbers_of(image_set.classes)
    folders: dict[int, list[Path]] = {label: [] for label in range(len(image_set.classes))}
    unknown = []
    for path in subfolders(folder) if _class_names(folder) else []:
        label = labels.get(path.name, labels.get(same_name(path.name)))
        if label is None:
            unknown.append(path)
        else:
            folders[label].append(path)
    listing: Listing = []
    empty = []
    for label, paths in folders.items():
        found = [image for path in paths for image in _sorted_images(path, image_set.passed_over, seen)]
        if not found:
            empty.append(image_set.classes[label])
        if len(paths) > 1:
            spelled = " and ".join(repr(path.name) for path in paths)
            image_set.notes.append(f"taken for one class in {printable(folder)}: {printable(spelled)}")
        listing += [(path, label) for path in found]
    if unknown and part:
        shown = some([path.name for path in unknown])
        raise UserError(f"{printable(folder)} holds the classes {shown}, which the training images lack: rename them.")
    strange = {path.name: len(_sorted_images(path, Counter(), seen)) for path in unknown}
    if any(strange.values()):
        images = amount(sum(strange.values()), "image", "images")
        shown = f"{some([name for name, count in strange.items() if count])} in {printable(folder)}"
        image_set.notes.append(f"left out, as the model does not know them: {images} of {shown}")
    if empty and part == "train" and not alone:
        raise UserError(f"class folder {printable(folder / empty[0])} holds no image. Fill it or remove it.")
    if empty and part == "train":  # other files lie beside the classes
        image_set.notes.append(f"folders without an image, not used as classes: {some(empty)}")
        names = [name for name in image_set.classes if name not in empty]
        moved = {image_set.classes.index(name): label for label, name in enumerate(names)}
        image_set.classes = names
        return [(path, moved[label]) for path, label in listing]
    if empty and listing:
        image_set.notes.append(f"no image in {printable(folder)} of: {some(empty)}")
    return listing


def numbers_of(classes: Sequence[str]) -> dict[str, int]:
    """Return the index of each class by its name, as it is and in the form for comparison."""
    numbers = {same_name(name): number for number, name in enumerate(classes)}
    return numbers | {name: number for number, name in enumerate(classes)}


def some(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def _sorted_images(folder: Path, passed_over: Counter[str], seen: Seen) -> list[Path]:
    own: Seen = set()  # a folder that is linked from two classes is read for both
    found = sorted(walk(str(folder), passed_over, [], own), key=lambda path: path.split(os.sep))
    seen |= own
    return list(map(Path, found))
