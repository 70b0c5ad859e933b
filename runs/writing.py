"""Files of a run, replaced whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from system.files import FULL, atomic_write
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
            f"{advice}, then go on with --resume."
        ) from None


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    table = io.StringIO()
    csv.writer(table).writerows(rows)  # CRLF: with less a return in a name would not be quoted
    return table.getvalue()


def prediction_rows(paths: list[str], labels: Any, probabilities: Any, classes: list[str]) -> Iterator[list[Any]]:
    """The rows of predictions.csv, its header first: one for each image, probabilities with six digits."""
    yield ["path", "label", "predicted", "confidence", *classes]
    for path, label, row in zip(paths, labels, probabilities, strict=True):
        best = int(row.argmax())
        yield [path, classes[label], classes[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in row)]
