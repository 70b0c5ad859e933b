"""Open the data set that the options ask for, follow the split of an earlier run, and compare it over all ranks."""

from __future__ import annotations

from pathlib import Path

from command_line.groups import Asked, Data
from command_line.idle import about_division
from command_line.kinds import images_asked
from distributed import Ranks
from images.opening import Opening, open_data_set, open_test_set
from images.soundness import say_uneven
from images.split import read_split
from images.subsets import DataSet, Split
from runs.config import read_config
from utils import UserError, log


def training_data(asked: Asked, opening: Opening, *, image_size: int, recorded: Split | None) -> DataSet:
    """Return the data set to train on, and log the consequences of its size, its classes and its division for the
    options.

    `recorded` is the split of a run to continue.
    """
    training = asked.training
    data = open_data_set(
        asked.data.data_dir,
        image_size=image_size,
        seed=asked.model.seed,
        labels=asked.data.labels,
        group=asked.data.group,
        split=asked.data.split,
        recorded=recorded,
        keep_larger="crop" in training.augment.split(","),
        opening=opening,
    )
    balanced = training.sampler == "balanced" or training.class_weights == "balanced"
    best_by = training.best_by if asked.command == "train" else None
    say_uneven(data.train, data.classes, balanced=balanced, best_by=best_by)
    for sentence in about_division(asked.typed, asked.data.split, data.divided):
        log.warning(sentence)
    batch_size = images_asked(training.batch_size)
    if len(data.train) < batch_size:
        log.info(f"--batch_size {batch_size} is more than there are training images: one update an epoch")
    return data


def tested_data(
    asked: Data, opening: Opening, *, image_size: int, known: list[str], folder: Path, ranks: Ranks
) -> DataSet:
    """Return the images to test the run in `folder` on: its test images, a test part, or a folder of class folders.

    `known` are the classes of its checkpoint.
    """
    config = folder / "config.json"
    was = ranks.share(lambda: read_config(config)["dataset"] if config.exists() else {})
    return open_test_set(
        asked.data_dir,
        image_size=image_size,
        known=known,
        labels=asked.labels,
        recorded=recorded_split(folder, ranks),
        same_place=was.get("folder") == str(Path(asked.data_dir).resolve()),
        checksum=was.get("tested"),
        opening=opening,
    )


def recorded_split(folder: Path, ranks: Ranks) -> Split | None:
    """Return the split that a run's folder records; None if it records none."""
    file = folder / "split.csv"
    split: Split | None = ranks.share(lambda: read_split(file) if file.exists() else None)
    return split


def agreed(data: DataSet, asked: Data, classes: list[str] | None, ranks: Ranks) -> DataSet:
    """Return the data set. Raise UserError if ranks have different ones, or if its classes are not the expected
    ones."""
    if ranks.share(lambda: data.fingerprint) != data.fingerprint:
        raise UserError(
            f"the images in {asked.data_dir} are not those of the first process: give all processes the same."
        )
    if asked.num_classes not in (None, len(data.classes)):
        raise UserError(f"--num_classes {asked.num_classes}: {asked.data_dir} holds {len(data.classes)} class folders.")
    if classes not in (None, data.classes):
        raise UserError(f"{asked.data_dir} holds the classes {data.classes}, the checkpoint {classes}.")
    return data
