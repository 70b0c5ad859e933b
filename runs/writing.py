"""Files of a run, replaced whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from system.files import FULL, as_cell, atomic_write, from_cell
from utils import RunError, printable


def replace_file(path: Path, size: int, fill: Callable[[IO[bytes]], Any]) -> None:
    """Replaces a file whole by what `fill` writes, about `size` bytes.

    Raises RunError if the disk is full or the folder is gone.
    """
    try:
        with atomic_write(path) as file:
            fill(file)
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own over the file's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        advice = (
            f"free at least {size / 2**20:,.0f} MB there"
            if cause.errno in FULL
            else "make the folder writable again"
            if path.parent.exists()
            else "the folder is gone: put it back"
        )
        raise RunError(
            f"{printable(path)} could not be written ({cause.strerror}). What was saved before is intact: "
            f"{advice}, then repeat the command, a training with --resume."
        ) from None


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table).writerows(rows)  # CRLF: with less a return in a name would not be quoted
    return table.getvalue()


PREDICTION = ["path", "label", "predicted", "confidence"]  # the first columns of predictions.csv
FIXED = ("folder", *PREDICTION)  # `predict --csv` has these, but for the label
PROBABILITIES = 1000  # the most classes of which each has its column: files grow with images times classes
_CLASS = "class:"


def class_columns(classes: list[str]) -> list[str]:
    """Return the column of each class: its name, or class:NAME if it is called like a fixed column."""
    clash = [name.casefold() in FIXED or name.startswith(_CLASS) for name in classes]
    return [as_cell(_CLASS * bad + name) for name, bad in zip(classes, clash, strict=True)]


def classes_of(columns: list[str]) -> list[str]:
    """Return the classes that `class_columns` made these columns of."""
    return [from_cell(column).removeprefix(_CLASS) for column in columns]


def prediction_rows(
    paths: list[str], labels: Any, predicted: Any, confidence: Any, classes: list[str], probabilities: Any
) -> Iterator[list[Any]]:
    """Yield the rows of predictions.csv, its header first: one for each image, probabilities with six digits.

    `labels` and `predicted` are class indices (images,), `probabilities` (images, classes) or None. `predicted` are the
    classes that the accuracy counts: of logits that nearly agree, probabilities would say another.
    """
    yield [*PREDICTION, *([] if probabilities is None else class_columns(classes))]
    cells = [as_cell(name) for name in classes]
    for place, (path, label, best) in enumerate(zip(paths, labels, predicted, strict=True)):
        row = [as_cell(path), cells[label], cells[best], f"{confidence[place]:.6f}"]
        yield row if probabilities is None else [*row, *(f"{p:.6f}" for p in probabilities[place])]
