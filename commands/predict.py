"""Predict the classes of image files and folders, as text, CSV, JSON, a contact sheet or a filled-in sample.

Threads decode files while the model computes. Unreadable files are reported and skipped.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from assemble import answering_model, set_up
from command_line.kinds import images_asked
from commands.answers import Table
from commands.embeddings import Embeddings
from commands.explain import explain_predictions
from commands.submission import read_sample
from images.asked import trained_rules
from images.decode import Rules, ahead, try_decode
from images.inputs import Item, listed, refuse_missing
from precision import Precision
from runs.evaluation import way_out
from runs.scores import probabilities
from system.files import refuse_missing_folders
from system.machine import cores, images_at_once
from transforms import Preprocess
from utils import RunError, Stopped, UserError, amount, log, printable, progress_bar

if TYPE_CHECKING:
    from command_line.groups import Asked, Prediction
    from distributed import Ranks

SUBMISSION = "submission.csv"


def predict(asked: Asked, ranks: Ranks, own: Prediction) -> None:
    """Classify files and folders with a trained run."""
    refuse_missing_folders(own.csv, own.json, own.contact_sheet, own.explain, own.embed)
    if own.submission and Path(own.submission).resolve() == Path(own.csv or SUBMISSION).resolve():
        raise UserError(f"{printable(own.submission)} is the sample: name another file to write with --csv.")
    if own.submission and own.min_confidence is not None:
        raise UserError("--submission needs an answer for every image: leave out --min_confidence.")
    several = len(asked.place.checkpoint_files) > 1
    if several and (own.explain or own.embed):
        raise UserError("--explain and --embed show what is inside one model: name one --checkpoint.")
    setup = set_up(asked, ranks)
    checkpoint = setup.trained
    temperature = None if several or own.min_confidence is None else checkpoint.get("temperature")
    if own.min_confidence is not None and temperature is None:
        said = "several checkpoints have no common" if several else "this checkpoint has no"
        log.info(f"note: {said} temperature, so that the probabilities are not calibrated")
    predict_files(
        answering_model(setup),
        checkpoint["classes"],
        own,
        preprocess=setup.preprocess,
        precision=setup.precision,
        rules=trained_rules(asked, setup.preprocess, checkpoint),
        batch_size=images_at_once(images_asked(asked.training.batch_size), setup.device),
        workers=min(8, cores()) if asked.data.num_workers is None else asked.data.num_workers,
        temperature=temperature or 1.0,
    )


def predict_files(
    model: nn.Module,
    classes: list[str],
    own: Prediction,
    *,
    preprocess: Preprocess,
    precision: Precision,
    rules: Rules | None = None,
    batch_size: int,
    workers: int,
    temperature: float = 1.0,
) -> int:
    """Classify every image named or found in `own.inputs`; write a row for each readable one and return their number.

    Raise UserError if an input does not exist or no image is readable, RunError at the end if some are not or have
    logits that are not finite, Stopped if a signal ended it.
    """
    refuse_missing(own.inputs)
    filled = read_sample(Path(own.submission), own.inputs, classes) if own.submission else None
    files = map(Item, dict.fromkeys(filled.paths)) if filled else listed(own.inputs)
    live = "-" in own.inputs  # an answer must not wait for the lines after its own
    batch_size, waiting = (1, 0) if live else (batch_size, 2 * batch_size)
    samples = bool(own.contact_sheet or own.explain)
    table = Table(
        classes,
        own.top_k,
        sheet=own.contact_sheet,
        samples=samples,
        submission=filled,
        live=live,
        least=own.min_confidence,
    )
    embedded = Embeddings(own.embed, model, classes) if own.embed else None
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        with ExitStack() as opened, torch.inference_mode():
            bar = None if live else opened.enter_context(progress_bar(desc="predicting", unit="image", delay=2))
            table.open(opened, None if filled else own.csv, own.json)
            items = ahead(
                pool, lambda item: (item, try_decode(item.path, preprocess.image_size, rules)), files, waiting
            )
            while batch := list(islice(items, batch_size)):
                _classify(batch, model, preprocess, precision, table, temperature, embedded)
                if bar is not None:
                    bar.update(len(batch))
    except (KeyboardInterrupt, Stopped) as error:
        raise _stopped(error, table.count, own.json if filled else own.csv or own.json) from None
    finally:
        pool.shutdown(cancel_futures=True)
    table.report()
    if own.explain and table.count:
        explain_predictions(model, table.on_sheet, preprocess, rules, Path(own.explain))
    if embedded and table.count:
        embedded.write()
    if filled:
        filled.write(Path(own.csv or SUBMISSION))
    if table.unreadable or table.overflowed:
        raise RunError(_failures(table, precision))
    return table.count


def _stopped(error: BaseException, count: int, file: str | None) -> Stopped:
    """Return the end by a signal, with the number of predictions and the file that has them."""
    where = f", which are in {printable(file)}" if file else ""
    status = error.exit_status - 128 if isinstance(error, Stopped) else 2
    return Stopped(status, f"stopped after {amount(count, 'prediction', 'predictions')}{where}")


def _failures(table: Table, precision: Precision) -> str:
    """Return a sentence about the files that could not be read, and one about those without a prediction."""
    total = table.count + table.unreadable + table.overflowed
    failed = []
    if table.unreadable:
        failed.append(f"{table.unreadable:,} of {total:,} files could not be read; the others are classified.")
    if table.overflowed:
        failed.append(
            f"{table.overflowed:,} of {total:,} files have no prediction: their logits are not finite in "
            f"{precision.label}. {way_out(precision)}"
        )
    return "\n".join(failed)


def _classify(
    batch: list[tuple[Item, Any]],
    model: nn.Module,
    preprocess: Preprocess,
    precision: Precision,
    table: Table,
    temperature: float,
    embedded: Embeddings | None,
) -> None:
    """Put a batch into the table; each item comes with its image, or with the reason why it cannot be read."""
    table.add_unreadable([(item, image) for item, image in batch if isinstance(image, str)])
    good = [(item, image) for item, image in batch if not isinstance(image, str)]
    if not good:
        return
    with precision.autocast():
        logits = model(preprocess(*_boxed([image for _, image in good], preprocess.device)))
    found = logits.float().cpu().numpy()
    finite = np.isfinite(found).all(1)
    shares = probabilities(found[finite], temperature)
    answered = [item for (item, _), fine in zip(good, finite, strict=True) if fine]
    table.add(answered, shares)
    if embedded:
        embedded.add(answered, shares, finite)
    table.add_overflowed([item for (item, _), fine in zip(good, finite, strict=True) if not fine])


def _boxed(images: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """Return images as one uint8 tensor on the device, each in the upper left corner, and their shapes."""
    shapes = np.array([image.shape[:2] for image in images])
    height, width = shapes.max(0)
    boxed = np.zeros((len(images), height, width, 3), np.uint8)
    for place, image in enumerate(images):
        boxed[place, : image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(boxed).to(device), shapes
