"""Fill a competition's sample_submission.csv: its ids, order and columns, with a model's answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from images.folders import some
from images.lookup import Index
from images.tables import LABEL, called, cell_of, image_column, plain, read_table
from images.walk import same_name
from runs.writing import csv_text
from system.files import from_cell, read_text, write_text
from utils import RunError, UserError, amount, log, printable


@dataclass
class Submission:
    """The rows of a sample, the image of each, and the columns to fill: one of labels, or one for each class."""

    sample: Path
    header: list[list[str]]  # one row, or none
    rows: list[list[str]]
    paths: list[Path]
    label: int | None
    numbers: dict[int, int]  # of the class that a column holds the probability of
    classes: list[str]
    answers: dict[Path, dict[int, str]] = field(default_factory=dict)

    def add(self, path: Path, shares: np.ndarray) -> None:
        """Keep the answer for an image; `shares` (classes,) are probabilities."""
        if self.label is None:
            self.answers[path] = {place: f"{shares[number]:.6f}" for place, number in self.numbers.items()}
        else:
            self.answers[path] = {self.label: self.classes[int(shares.argmax())]}

    def write(self, file: Path) -> None:
        """Write the sample with the answers in it. Raise RunError if an image has none."""
        missing = [path for path in dict.fromkeys(self.paths) if path not in self.answers]
        if missing:
            images = amount(len(missing), "image has", "images have")
            raise RunError(f"{printable(file)} is not written: {images} no answer, such as {printable(missing[0])}.")
        filled = []
        for row, path in zip(self.rows, self.paths, strict=True):
            answer = self.answers[path]
            width = max(len(row), *(place + 1 for place in answer))
            cells = [*row, *[""] * (width - len(row))]
            filled.append([answer.get(place, cell) for place, cell in enumerate(cells)])
        separator = max(",;\t", key=read_text(self.sample).partition("\n")[0].count)
        write_text(file, csv_text([*self.header, *filled], separator))
        log.info(f"{printable(file)}: {amount(len(filled), 'row', 'rows')} in the form of {printable(self.sample)}")


def read_sample(file: Path, inputs: list[str], classes: list[str]) -> Submission:
    """Return a sample whose ids name images below the one folder in `inputs`.

    Raise UserError if an id names no image or several, or if a column has no meaning.
    """
    if len(inputs) != 1 or not Path(inputs[0]).is_dir():
        raise UserError(
            "--submission takes the ids of its images from the sample: name the one folder that holds them."
        )
    table = read_table(file)
    index = Index(Path(inputs[0]))
    place = image_column(file, table, [plain(cell) for cell in table[0]], index)
    start = 0 if index.find(cell_of(table[0], place)) else 1  # a row that names an image is no header
    ids = [cell_of(row, place) for row in table[start:]]
    found = [index.one(cell, file) for cell in ids]
    paths = [path for path in found if path is not None]
    missing = [cell for cell, path in zip(ids, found, strict=True) if path is None]
    if missing:
        rows = amount(len(missing), "row names", "rows name")
        raise UserError(f"{printable(file)}: {rows} no image below {printable(inputs[0])}, such as {missing[0]!r}.")
    others = [other for other in range(len(table[0])) if other != place]
    label, numbers = _columns(file, table[0], others, classes) if start else (others[0], {})
    labels = {cell_of(row, label) for row in table[start:]} if label is not None else set()
    strange = sorted(labels - {*classes, ""})
    if strange:
        log.warning(
            f"{printable(file)} has labels that are not classes of the model, such as {printable(strange[0])!r}: the "
            f"answers are {some(classes)}"
        )
    return Submission(file, table[:start], table[start:], paths, label, numbers, classes)


def _columns(file: Path, first: list[str], others: list[int], classes: list[str]) -> tuple[int | None, dict[int, int]]:
    """Return the column of labels, or the columns of classes and the index of each class."""
    known = {same_name(name).casefold(): number for number, name in enumerate(classes)}
    known |= {same_name(name): number for number, name in enumerate(classes)}
    names = {place: same_name(from_cell(first[place])) for place in others}
    numbers = {
        place: known.get(name, known.get(name.casefold(), -1))
        for place, name in names.items()
        if name in known or name.casefold() in known
    }
    unknown = [printable(name) for place, name in names.items() if place not in numbers]
    if numbers and unknown:
        raise UserError(
            f"{printable(file)}: {amount(len(unknown), 'column is', 'columns are')} no class of the model: "
            f"{some(unknown)}. Its classes are {some(classes)}."
        )
    if numbers:
        return None, numbers
    labels = others if len(others) == 1 else called([plain(cell) for cell in first], others, LABEL)
    if not labels:
        raise UserError(
            f"{printable(file)}: which column is the label, of {some(unknown)}? None is called label, or like a class "
            f"of the model ({some(classes)})."
        )
    return labels[0], {}
