"""Replace the files of a run atomically."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from system.files import FULL, as_cell, atomic_write, from_cell
from utils import RunError, printable


def replace_file(path: Path, size: int, fill: Callable[[IO[bytes]], Any]) -> None:
    """Replace a file atomically with the output of `fill`, about `size` bytes.

    Raise RunError if the disk is full or the folder was deleted.
    """
    try:
        with atomic_write(path) as file:
            fill(file)
    except (OSError, RuntimeError) as error:
        # torch.save raises its own error instead of the file's.
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


def csv_text(rows: Iterable[Iterable[Any]], separator: str = ",") -> str:
    table = io.StringIO()
    csv.writer(table, delimiter=separator).writerows(
        rows
    )  # CRLF: otherwise a carriage return in a name would not be quoted
    return table.getvalue()


PREDICTION = ["path", "label", "predicted", "confidence"]  # the first columns of predictions.csv
FIXED = ("folder", *PREDICTION)  # `predict --csv` has these, except the label
PROBABILITIES = 1000  # the most classes that get a column each: files grow with images times classes
_CLASS = "class:"


def class_columns(classes: list[str]) -> list[str]:
    """Return the column of each class: its name, or class:NAME if it equals a fixed column."""
    clash = [name.casefold() in FIXED or name.startswith(_CLASS) for name in classes]
    return [as_cell(_CLASS * bad + name) for name, bad in zip(classes, clash, strict=True)]


def classes_of(columns: list[str]) -> list[str]:
    """Return the classes for the columns that `class_columns` made."""
    return [from_cell(column).removeprefix(_CLASS) for column in columns]


def prediction_rows(
    paths: list[str], labels: Any, predicted: Any, confidence: Any, classes: list[str], probabilities: Any
) -> Iterator[list[Any]]:
    """Yield the rows of predictions.csv, its header first: one for each image, probabilities with six digits.

    `labels` and `predicted` are class indices (images,), `probabilities` (images, classes) or None. `predicted` are the
    classes that the accuracy counts; if logits nearly agree, rounded probabilities would give another class.
    """
    yield [*PREDICTION, *([] if probabilities is None else class_columns(classes))]
    cells = [as_cell(name) for name in classes]
    for place, (path, label, best) in enumerate(zip(paths, labels, predicted, strict=True)):
        row = [as_cell(path), cells[label], cells[best], f"{confidence[place]:.6f}"]
        yield row if probabilities is None else [*row, *(f"{p:.6f}" for p in probabilities[place])]
