"""Judge every training image by a model that was not trained on it, and list doubtful labels.

The training images are cut into folds; each fold is the test part of one run, made as `compare` makes its runs. Knows
nothing of how doubt is computed or drawn.
"""

from __future__ import annotations

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from assemble import find_device, find_precision
from command_line.kinds import seconds_of
from command_line.parsing import precision_words, training_words
from commands.compare import plan, train_all
from images.decode import Rules, ahead, try_decode, windows_of
from images.demo import draw_scenes
from images.folders import Listing
from images.labels import list_images
from images.split import PARTS, digest, hold_out, in_groups, united
from reports.audit import report_audit
from runs.writing import PROBABILITIES
from system.files import as_cell, write_text
from system.machine import cores
from utils import UserError, log, printable, progress_bar

if TYPE_CHECKING:
    from command_line.groups import Asked, Auditing
    from distributed import Ranks


def audit(asked: Asked, ranks: Ranks, own: Auditing) -> None:
    """Train one model for each fold, then report the labels that their predictions contradict."""
    precision = find_precision(asked, find_device(asked, ranks)).name
    seed = asked.model.seed
    overwrite = asked.place.overwrite
    max_time = asked.recording.max_time
    folder = Path(asked.place.checkpoint_dir) / (asked.place.checkpoint_name or "audit")
    if asked.data.demo:
        draw_scenes(asked.data.data_dir, asked.computing.device)
    image_set = list_images(asked.data.data_dir, labels=asked.data.labels, group=asked.data.group)
    if len(image_set.classes) > PROBABILITIES:
        raise UserError(
            f"audit needs the probability of each class, which a run writes of at most {PROBABILITIES:,}; there are "
            f"{len(image_set.classes):,}. Audit some of the classes in a folder of their own."
        )
    listing = image_set.train
    names = [path.relative_to(image_set.root).as_posix() for path, _ in listing]
    same = _same_pictures(listing, Rules(asked.reading.max_megapixels, windows_of(asked.reading.window or "data")))
    groups = in_groups(image_set.groups.get(path) for path, _ in listing)
    labels = np.array([label for _, label in listing])
    fold_of = cut(labels, united(same + groups, len(listing)), own.folds, seed, grouped=bool(groups))
    others = [
        path.relative_to(image_set.root).as_posix()
        for part in ("test", "validation")
        for path, _ in image_set.parts.get(part, [])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    layers = asked.computing.float32_layers
    shared = [*training_words(asked.given.flat), *precision_words(precision), f"--seed={seed}"]
    shared += [f"--float32_layers={layers}"] if layers else []
    planned = []
    for fold in range(fold_of.max() + 1):
        parts = _parts(labels, fold_of == fold, united(same + groups, len(listing)), seed)
        file = folder / f"fold-{fold + 1}.csv"
        text = _table(names, [image_set.classes[label] for label in labels], parts, others)
        _write_once(file, text, overwrite)
        words = [*shared, f"--split={file}"]
        planned.append(plan(folder / f"fold-{fold + 1}", precision, words, overwrite=overwrite))
    train_all(planned, max_seconds=seconds_of(max_time) if max_time else None)
    copies = [[names[place] for place in places] for places in same if len(set(labels[places])) > 1]
    report_audit([run.folder for run in planned], folder, Path(asked.data.data_dir), copies)


def _same_pictures(listing: Listing, rules: Rules) -> list[list[int]]:
    """Return groups of positions of images with equal pixels."""
    workers = min(16, 2 * cores())
    with ThreadPoolExecutor(workers) as pool:
        looks = ahead(pool, lambda entry: digest(try_decode(entry[0], None, rules)), listing, 2 * workers)
        return in_groups(progress_bar(looks, total=len(listing), desc="looking for copies", unit="image"))


def cut(labels: np.ndarray, units: np.ndarray, folds: int, seed: int, *, grouped: bool) -> np.ndarray:
    """Return the fold of each image, stratified by scikit-learn; -1 for a class that cannot be left out.

    The images of a unit (copies, or a group) share a fold. Groups are balanced by their number of images.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, heads, inverse = np.unique(units, return_index=True, return_inverse=True)
    alone = np.bincount(labels[heads])[labels] < 2  # its only unit would be missing from its own training
    fold_of = np.full(len(heads), -1)
    usable = np.flatnonzero(~alone[heads])
    most = int(np.bincount(labels[heads[usable]]).max(initial=0))
    if most < folds:
        raise UserError(f"--folds {folds} is more than the largest class has images or groups ({most}).")
    if grouped:
        wanted = np.flatnonzero(~alone)
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32).split(
            wanted, labels[wanted], units[wanted]
        )
        for number, (_, held) in enumerate(parts):
            fold_of[inverse[wanted[held]]] = number
    else:
        import warnings

        with warnings.catch_warnings():  # of classes that have fewer images than there are folds
            warnings.simplefilter("ignore", UserWarning)
            splits = list(
                StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32).split(usable, labels[heads[usable]])
            )
        for number, (_, held) in enumerate(splits):
            fold_of[usable[held]] = number
    found = fold_of[inverse]
    for label in np.unique(labels):
        if len(set(found[labels == label])) == 1:  # all in one fold
            found[labels == label] = -1
    return found


def _parts(labels: np.ndarray, tested: np.ndarray, units: np.ndarray, seed: int) -> list[str]:
    """Return the part of each image in one fold's run: a tenth of the images not tested chooses the best epoch."""
    parts = np.where(tested, 2, 0)
    rest = np.flatnonzero(~tested)
    parts[rest[hold_out(labels[rest], 0.1, seed, units[rest])]] = 1
    return [PARTS[part] for part in parts]


def _table(names: list[str], classes: list[str], parts: list[str], others: list[str]) -> str:
    """Return the text of a split.csv. Images of other parts have no part in it, so that the run leaves them out."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["path", "class", "part"])
    writer.writerows(zip(map(as_cell, names), map(as_cell, classes), parts, strict=True))
    writer.writerows([as_cell(name), "", ""] for name in others)
    return table.getvalue()


def _write_once(file: Path, text: str, overwrite: bool) -> None:
    """Write the split of a fold. Raise UserError if the folder holds an audit with another split."""
    if file.exists() and not overwrite:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            if lines.read() != text:
                raise UserError(
                    f"{printable(file.parent)} holds an audit of other images, or of other --folds or --seed. Choose "
                    "another --checkpoint_name, or replace it with --overwrite."
                )
    write_text(file, text)
    log.debug(f"wrote {file}")
