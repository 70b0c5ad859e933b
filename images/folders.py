"""What is on disk: class folders, their images and the parts of a data set. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import UserError, printable

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}

_TRAIN_FOLDERS = ("seg_train/seg_train", "seg_train", "train/train", "train")

_TEST_FOLDERS = ("seg_test/seg_test", "seg_test", "test/test", "test")

_VALIDATION_FOLDERS = ("val", "valid", "validation")

Listing = list[tuple[Path, int]]


@dataclass
class ImageSet:
    """The files of a data set: (path, label) lists, labels indexing the alphabetical `classes`."""

    root: Path
    classes: list[str]
    train: Listing
    test: Listing
    validation: Listing | None = None  # a folder of its own; None: split it off train


def find_image_set(data_dir: str | Path) -> ImageSet:
    """Lists the class folders below `data_dir`: Intel's layout, or `train/` with `test/` or `val/`.

    Raises UserError where there is no data, fewer than two classes, an empty class, or where train
    and test disagree on the classes.
    """
    root = Path(data_dir)
    if (root / ".partial").exists():
        raise UserError(f"{root} holds only a part of a data set, because `prepare` was stopped. Run `prepare` again.")
    train = _first_folder(root, _TRAIN_FOLDERS)
    test = _first_folder(root, _TEST_FOLDERS)
    validation = _first_folder(root, _VALIDATION_FOLDERS)
    if test is None:
        test = validation
        validation = None
    if train is None or test is None:
        missing = "training images" if train is None else "test images"
        raise UserError(
            f"no {missing} in {printable(root)} (looked for seg_train/ and seg_test/, or train/ and test/ or val/)."
            "\nThree ways to get data:"
            "\n  python main.py train --demo                        draws a small data set and trains on it"
            "\n  python main.py prepare --download                  fetches Intel Image Classification from Kaggle"
            "\n  python main.py prepare --archive FILE.zip          unpacks an archive you have"
            "\nor name the folder that holds train/ and test/ with --data_dir."
        )
    classes = _class_names(train)
    if len(classes) < 2:
        raise UserError(f"{printable(train)} holds {len(classes)} class folder: a classifier needs at least two.")
    folders = [folder for folder in (train, test, validation) if folder is not None]
    for folder in folders:
        differing = sorted(set(classes) ^ set(_class_names(folder)))
        if differing:
            listed = ", ".join(map(printable, differing))
            raise UserError(f"{printable(folder)} and {printable(train)} differ in the classes {listed}.")
    listings = [_list_images(folder, classes) for folder in folders]
    return ImageSet(root, classes, *listings)


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir() and _class_names(root / name)), None)


def _class_names(folder: Path) -> list[str]:
    """Alphabetical names of the class folders; a lone inner folder of the same name is not a class."""
    names = [name for name in os.listdir(folder) if _is_wanted(name) and (folder / name).is_dir()]
    return [] if names == [folder.name] else sorted(names)


def _is_wanted(name: str) -> bool:
    """Whether a file or folder is the user's own, not what a desktop leaves behind."""
    return not name.startswith(".") and name != "__MACOSX"


def _list_images(folder: Path, classes: list[str]) -> Listing:
    listing: Listing = []
    for label, name in enumerate(classes):
        found = sorted(find_images(folder / name))
        if not found:
            raise UserError(f"class folder {printable(folder / name)} holds no image. Fill it or remove it.")
        listing += [(path, label) for path in found]
    return listing


def find_images(folder: Path) -> Iterator[Path]:
    """Every image file below `folder` by its suffix; hidden files and linked folders are passed over."""
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = filter(_is_wanted, subfolders)
        for name in files:
            if _is_wanted(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(directory, name)
