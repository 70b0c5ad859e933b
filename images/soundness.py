"""Refuse, or warn of, a data set that is unfit for training: unreadable files, empty classes, shared images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from images.decode import try_decode
from images.folders import ImageSet, some
from images.split import PARTS, digest
from images.subsets import Subset
from utils import UserError, amount, log, printable


def report_unreadable(bad: dict[Path, str], skip: bool) -> None:
    """Log unreadable files, each with its reason. Raise UserError unless `skip` leaves them out."""
    if not bad:
        return
    lines = [f"  {printable(path)}: {printable(reason)}" for path, reason in list(bad.items())[:10]]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    head = f"{amount(len(bad), 'image', 'images')} cannot be read"
    if not skip:
        lines.append("Repair or remove them, or go on without them: --skip_unreadable.")
        raise UserError("\n".join([f"{head}:", *lines]))
    log.warning("\n".join([f"{head} and {'are' if len(bad) > 1 else 'is'} left out:", *lines]))


def refuse_empty(subsets: dict[str, Subset], image_set: ImageSet) -> None:
    """Raise UserError if a part is empty or a class has no training image; log which classes other parts lack."""
    for name, subset in subsets.items():
        if not len(subset):
            raise UserError(f"no {name} image is left in {printable(image_set.root)}.")
    empty = sorted(set(range(len(image_set.classes))) - set(subsets["train"].labels.tolist()))
    if empty:
        raise UserError(f"no readable train image is left in {printable(image_set.classes[empty[0]])}.")
    say_absent({name: subset for name, subset in subsets.items() if name != "train"}, image_set)


def say_uneven(train: Subset, classes: list[str], *, balanced: bool, best_by: str | None) -> None:
    """Warn if one class has more than ten times the training images of another, and name options that help.

    `balanced` is True if rare classes are already sampled or weighted more.
    """
    counts = Counter(train.labels.tolist()).most_common()
    (most, large), (least, small) = counts[0], counts[-1]
    if large <= 10 * small:
        return
    ways = [] if balanced else ["learnt better with --sampler balanced or --class_weights balanced"]
    if best_by == "accuracy":
        ways.append("counted like the others by --best_by balanced_accuracy")
    advice = f" Rare classes may be {', and '.join(ways)}." if ways else ""
    log.info(
        f"{printable(classes[most])} has {large / small:.0f} times as many training images as "
        f"{printable(classes[least])}.{advice}"
    )


def say_absent(subsets: dict[str, Subset], image_set: ImageSet) -> None:
    """Log which classes have no image in a part."""
    for name, subset in subsets.items():
        absent = sorted(set(range(len(image_set.classes))) - set(subset.labels.tolist()))
        if absent:
            names = some([image_set.classes[label] for label in absent])
            log.info(f"no {name} image of {names}: tested with support 0, and left out of averages over classes")


def warn_of_leaks(subsets: dict[str, Subset], image_set: ImageSet, crc32: dict[str, np.ndarray]) -> None:
    """Warn of pictures, or groups, that a given test or validation part shares with the training images.

    `crc32` contains for each given part the checksums of its listing's images, all decoded to one size.
    """
    train = subsets["train"]
    for name in PARTS[1:]:
        other = subsets[name]
        if other.listing is getattr(image_set, name):  # not split off
            copies = _copies(train, other, crc32[name])
            if copies:
                both = amount(
                    len(copies), f"{name} image is also a training image", f"{name} images are also training images"
                )
                log.warning(
                    f"{both}, such as {printable(copies[0])}: results on such images mean nothing "
                    "(prepare --check lists them)."
                )
        known = image_set.groups
        groups = [{known[path] for path in subset.paths if path in known} for subset in (train, other)]
        shared = groups[0] & groups[1]
        if shared:
            have = amount(len(shared), "group has", "groups have")
            log.warning(f"{have} images on both sides, training and {name}, such as {min(shared)}.")


def _copies(train: Subset, other: Subset, crc32: np.ndarray) -> list[Path]:
    """Return the images of another part that are also training images.

    `crc32` contains the checksums of the other part's listing. Equal checksums may be chance, so the files are
    compared.
    """
    theirs = crc32[other.positions]
    both = np.intersect1d(train.store.crc32, theirs)
    both = both[both > 0]
    if not len(both):
        return []
    rules = train.store.rules
    paths = [train.listing[place][0] for place in np.flatnonzero(np.isin(train.store.crc32, both))]
    known = {digest(try_decode(path, 512, rules)) for path in paths}
    suspects = [other.paths[place] for place in np.flatnonzero(np.isin(theirs, both))]
    return [path for path in suspects if digest(try_decode(path, 512, rules)) in known]
