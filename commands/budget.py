"""Choose the number of epochs for --budget: as many as fit into the time, by the measured speed of the first updates.

The training, including its schedule, is then that of --epochs with this number. A resumed run keeps its number.
"""

from __future__ import annotations

import bisect
import copy
import gc
import math
import time
from dataclasses import replace

from assemble import Setup, make_trainer
from command_line.groups import Training
from command_line.kinds import seconds_of
from evaluate import evaluate
from images.subsets import DataSet
from runs.config import read_config
from runs.folder import RunDirectory
from system.progress import work
from system.terminal import duration
from train import Trainer
from transforms import growing_sizes
from utils import STARTED, amount, log

SAMPLE = 5.0  # seconds of updates to measure


def begun_length(setup: Setup, run: RunDirectory) -> Setup:
    """Return the setup with the number of epochs that --budget chose when the run was begun, if it is resumed."""
    asked = setup.asked
    if not asked.recording.budget or not asked.place.resume:
        return setup
    file = run.file("config.json")
    is_begun = file.exists() and run.file("last.pt").exists()
    chosen = setup.ranks.share(lambda: read_config(file)["options"].get("epochs") if is_begun else None)
    return _with_epochs(setup, chosen) if chosen else setup


def chosen_length(setup: Setup, data: DataSet, run: RunDirectory) -> Setup:
    """Return the setup with as many epochs as --budget has time for, and say so.

    The updates are made by a trainer of its own, which is thrown away.
    """
    asked = setup.asked
    if not asked.recording.budget:
        return setup
    epoch, validation = measured(make_trainer(setup, data, run))
    gc.collect()  # frees the trainer's memory, as its parts refer to one another
    left = seconds_of(asked.recording.budget) - (time.monotonic() - STARTED)
    found = epochs_within(left, epoch, validation, asked.training, setup.preprocess.image_size)
    epochs = setup.ranks.share(lambda: found)  # the clocks of ranks differ
    each = f"{duration(epoch)} of updates and {duration(validation)} of validation in each"
    log.info(f"--budget {asked.recording.budget}: {amount(epochs, 'epoch', 'epochs')}, {each}")
    if epochs * (epoch + validation) > left and epochs <= _fewest(asked.training):
        log.warning(f"--budget {asked.recording.budget} is too short for {amount(epochs, 'epoch', 'epochs')}")
    return _with_epochs(setup, epochs)


def measured(trainer: Trainer) -> tuple[float, float]:
    """Return the seconds of an epoch's updates, with all layers and images of full size, and of a validation."""
    batches = trainer.batches
    last = trainer.plan.epochs - 1
    trainer.progress.epoch = last
    trainer.network.begin_epoch(last)

    def seconds_of_updates(count: int) -> float:
        trainer.progress.update = 0
        begun = time.perf_counter()
        for micro_batches in batches.epoch(last, 0, count):
            stats = trainer.make_update(micro_batches, batches.images_in(trainer.progress.update))
        float(stats.loss_sum)  # waits for the device
        return time.perf_counter() - begun

    seconds_of_updates(min(2, batches.updates_per_epoch))  # compiles, searches kernels, starts the loaders
    one = seconds_of_updates(1)
    # Every rank takes part in every update, so all must make equally many.
    count = batches.ranks.share(lambda: min(batches.updates_per_epoch, math.ceil(SAMPLE / one)))
    epoch = seconds_of_updates(count) * batches.updates_per_epoch / count

    some = copy.copy(trainer.validation.subset)
    some.keep(2 * trainer.validation.evaluation_size * batches.ranks.size)
    validation = replace(trainer.validation, subset=some)
    model = trainer.network.ready_to_evaluate()
    for _ in range(2):  # the first warms up
        begun = time.perf_counter()
        evaluate(model, validation, trainer.recipe.precision, description="measuring")
        seconds = time.perf_counter() - begun
    return epoch, seconds * len(trainer.validation.subset) / len(some)


def epochs_within(seconds: float, epoch: float, validation: float, training: Training, image_size: int) -> int:
    """Return the largest number of epochs that take at most `seconds`; growing images take less at first."""

    def total(epochs: int) -> float:
        sizes = growing_sizes(training.start_size, image_size, epochs)
        return epochs * validation + epoch * sum(map(work, sizes)) / work(image_size)

    fewest = _fewest(training)
    smallest = work(training.start_size or image_size) / work(image_size)
    most = int(max(0.0, seconds) / (epoch * smallest + validation))
    return max(fewest, fewest - 1 + bisect.bisect_right(range(fewest, most + 1), seconds, key=total))


def _fewest(training: Training) -> int:
    """Return the fewest epochs that the other options allow."""
    frozen = int(training.freeze_epochs) + 1 if int(training.freeze_epochs) else 1
    return max(frozen, math.ceil(training.warmup_epochs or 0), 2 if training.start_size else 1)


def _with_epochs(setup: Setup, epochs: int) -> Setup:
    asked = setup.asked
    training = replace(asked.training, epochs=epochs)
    given = replace(asked.given, flat=asked.given.flat | {"epochs": epochs})
    return replace(setup, asked=replace(asked, training=training, given=given))
