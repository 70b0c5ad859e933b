"""Return the data set that the options ask for, divided as an earlier run was, and the same on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_line.groups import Asked
from command_line.idle import about_division
from command_line.kinds import images_asked
from distributed import Ranks
from images.decode import Rules, windows_of
from images.demo import draw_scenes
from images.opening import Opening, open_data_set, open_test_set
from images.soundness import say_uneven
from images.split import read_split, some_of_each
from images.subsets import DataSet, Split
from runs.config import read_config
from transforms import Preprocess
from utils import UserError, log, printable


def data_to_train_on(
    asked: Asked,
    ranks: Ranks,
    preprocess: Preprocess,
    *,
    continued: Path | None = None,
    classes: list[str] | None = None,
) -> DataSet:
    """Return the data set, decoded; draw the demo's scenes first if they are missing.

    `continued` is the folder of a run that keeps its split. Raise UserError for classes other than `classes`, those of
    a checkpoint.
    """
    _prepare_folder(asked, ranks)
    training = asked.training
    window = asked.reading.window or "data"
    resize = asked.reading.resize or "squash"
    rules = Rules(asked.reading.max_megapixels, windows_of(window), preprocess.interpolation, resize)
    recorded = _recorded_split(continued, ranks) if continued else None
    data = open_data_set(
        asked.data.data_dir,
        image_size=preprocess.image_size,
        seed=asked.model.seed,
        labels=asked.data.labels,
        group=asked.data.group,
        split=asked.data.split,
        recorded=recorded,
        keep_larger="crop" in training.augment.split(","),
        opening=_opening(asked, preprocess, rules, own_window=window == "data"),
    )
    if training.fraction < 1 and recorded is None:  # the split of a run to continue has only the chosen images
        data.train.choose(some_of_each(data.train.labels, training.fraction, asked.model.seed))
    balanced = training.sampler == "balanced" or training.class_weights == "balanced"
    say_uneven(
        data.train, data.classes, balanced=balanced, best_by=training.best_by if asked.command == "train" else None
    )
    for sentence in about_division(asked.given.typed, asked.data.split, data.divided):
        log.warning(sentence)
    batch_size = images_asked(training.batch_size)
    if len(data.train) < batch_size:
        log.info(f"--batch_size {batch_size} is more than there are training images: one update an epoch")
    return _agreed(data, asked, classes, ranks)


def data_to_test_on(asked: Asked, ranks: Ranks, preprocess: Preprocess, checkpoint: dict[str, Any]) -> DataSet:
    """Return the images to test a run's checkpoint on: its test images, a test part, or a folder of class folders."""
    _prepare_folder(asked, ranks)
    folder, *others = [file.parent for file in asked.place.checkpoint_files]
    config = folder / "config.json"
    was = ranks.share(lambda: read_config(config)["dataset"] if config.exists() else {})
    data = open_test_set(
        asked.data.data_dir,
        image_size=preprocess.image_size,
        known=checkpoint["classes"],
        labels=asked.data.labels,
        recorded=_recorded_split(folder, ranks),
        same_place=was.get("folder") == str(Path(asked.data.data_dir).resolve()),
        checksum=was.get("tested"),
        opening=_opening(asked, preprocess, trained_rules(asked, preprocess, checkpoint), own_window=False),
    )
    tested = set(data.names(data.test))
    for other in others:
        parts = _recorded_split(other, ranks) or {}
        known = sum(name in tested and part in ("train", "validation") for name, (_, part) in parts.items())
        if known:
            log.warning(f"{known:,} of {len(tested):,} test images trained or chose the model in {printable(other)}")
    return _agreed(data, asked, checkpoint["classes"], ranks)


def trained_rules(asked: Asked, preprocess: Preprocess, checkpoint: dict[str, Any]) -> Rules:
    """Return the rules to read images for a trained model: those of its training, unless options say otherwise."""
    window = asked.reading.window
    windows = windows_of(window) if window else checkpoint.get("windows", {})
    resize = asked.reading.resize or checkpoint.get("resize") or "squash"
    return Rules(asked.reading.max_megapixels, windows, preprocess.interpolation, resize)


def _prepare_folder(asked: Asked, ranks: Ranks) -> None:
    """Draw the demo's scenes. Raise UserError if the folder that a run recorded has gone."""
    folder = asked.data.data_dir
    if asked.data.demo:
        ranks.share(lambda: draw_scenes(folder, asked.computing.device))  # the others wait
    elif "data_dir" in asked.given.recorded and not Path(folder).is_dir():
        raise UserError(
            f"{printable(Path(folder).absolute())} does not exist, but the images of this run were in "
            f"{printable(folder)}. Name the folder that holds them now with --data_dir."
        )


def _opening(asked: Asked, preprocess: Preprocess, rules: Rules, *, own_window: bool) -> Opening:
    """Return how the images are decoded and kept."""
    own = asked.data
    pin = preprocess.device.type == "cuda"
    return Opening(own.cache, own.num_workers, pin, own.cache_limit, rules, own.skip_unreadable, own_window)


def _recorded_split(folder: Path, ranks: Ranks) -> Split | None:
    """Return the split that a run's folder records; None if it records none."""
    file = folder / "split.csv"
    split: Split | None = ranks.share(lambda: read_split(file) if file.exists() else None)
    return split


def _agreed(data: DataSet, asked: Asked, classes: list[str] | None, ranks: Ranks) -> DataSet:
    """Return the data set. Raise UserError if ranks have different ones, or for classes that are not expected."""
    folder = asked.data.data_dir
    number = asked.data.num_classes
    if ranks.share(lambda: data.fingerprint) != data.fingerprint:
        raise UserError(f"the images in {folder} are not those of the first process: give all processes the same.")
    if number not in (None, len(data.classes)):
        raise UserError(f"--num_classes {number}: {folder} holds {len(data.classes)} class folders.")
    if classes not in (None, data.classes):
        raise UserError(f"{folder} holds the classes {data.classes}, the checkpoint {classes}.")
    return data
