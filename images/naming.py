"""Check names: classes that may be mistakes, augmented copies of one picture, groups. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from images.folders import ImageSet
from utils import UserError, amount, printable, typed

_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "nat", "none", "null", "nil", "-", "?"}
_BETWEEN = re.compile(r"[\s,;|+&/]+")  # between labels in one cell


def odd_names(image_set: ImageSet) -> list[str]:
    """Return sentences about class names that may be mistakes."""
    images = Counter(image_set.classes[label] for listing in image_set.parts.values() for _, label in listing)
    folded: dict[str, str] = {}
    notes = []
    for name in image_set.classes:
        shown = f"{printable(name)!r}"
        count = amount(images[name], "image", "images")
        twin = folded.setdefault(name.casefold(), name)
        together = [word for word in _BETWEEN.split(name) if word]
        if name.casefold() in _MISSING:
            notes.append(f"class {shown} looks like a missing label: {count}")
        if twin != name:
            notes.append(f"classes {printable(twin)!r} and {shown} differ in capitals alone")
        if len(together) > 1 and all(word in images for word in together):
            notes.append(f"class {shown} looks like the labels {printable(', '.join(together))} together: {count}")
    return notes


_MARK = r"[ _-]+(?:aug(?:mented)?|[hv]?flip(?:ped)?|rot(?:ated)?|mirror(?:ed)?|nois[ey]|blur(?:red)?)[ _-]?\d*"
_EXPORTED = r"_(?:jpe?g|png|bmp|webp|tiff?)\.rf\."  # Roboflow's names: p01_jpg.rf.0a1b.jpg
_COPY = re.compile(rf"(?i){_EXPORTED}|{_MARK}\.[^./]+$")
_PICTURE = re.compile(rf"(?i)(.+?)(?:{_EXPORTED}|(?:{_MARK})*\.[^./]+$)")  # the group is the name without marks


def augmented_copies(names: Sequence[str]) -> list[str]:
    """Return a sentence about files with names of copies of one picture, and how to group them; none without copies.

    `names` are relative to the data folder.
    """
    copies = [name for name in names if _COPY.search(name)]
    groups = Counter(match[1] for name in names if copies and (match := _PICTURE.search(name)))
    several = {match[1] for name in copies if (match := _PICTURE.search(name)) and groups[match[1]] > 1}
    if not several:
        return []
    pictures = amount(len(several), "picture", "pictures")
    return [
        f"{sum(groups[name] for name in several):,} images have names of {pictures} and augmented copies, such as "
        f"{printable(copies[0])}: {typed('--group', _PICTURE.pattern)} keeps them on one side of the split"
    ]


def groups_by_pattern(names: Sequence[str], pattern: str) -> list[str | None]:
    """Return the group of each name: the first group of the pattern, or the whole match if it has none."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--group {pattern!r} is neither a column of --labels nor a regular expression ({error})."
        ) from None
    found = [compiled.search(name) for name in names]
    if not any(found):
        raise UserError(f"--group {pattern!r} is not a column of --labels and fits no file name, such as {names[0]!r}.")
    return [match and (match[1] if compiled.groups else match[0]) for match in found]
