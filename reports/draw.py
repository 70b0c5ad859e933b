"""Draw all pictures and the page of a finished run from the files in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from images.decode import Rules
from precision_table import label_of
from reports import curves, page, pictures
from reports.results import EXPLANATIONS, read_run
from runs.result import confusion_cells
from system.files import read_json
from utils import log, printable


def draw_run(directory: Path) -> None:
    """Draw learning_curve.png, confusion_matrix.png, curves.png, mistakes.png, reliability.png and report.html.

    Raise UserError if a file that they are drawn from is missing or damaged.
    """
    run = read_run(directory)
    result = run["result"]
    title = f"{run['model']}, {label_of(run['precision'])}"
    if run["metrics"]:  # `evaluate` writes none
        pictures.learning_curve(
            run["metrics"], directory / "learning_curve.png", title=title, best_epoch=result["best_epoch"]
        )
    cells = confusion_cells(result)
    pictures.confusion_matrix(cells, result["classes"], directory / "confusion_matrix.png", title=title)
    curves.class_curves(result, directory / "predictions.csv", directory / "curves.png", title=title)
    dataset = run["config"]["dataset"]
    images = Path(dataset.get("folder") or run["options"].get("data_dir", ""))  # the second may be relative
    rules = Rules.recorded(dataset)
    file = directory / EXPLANATIONS
    maps = read_json(file) if file.exists() else {}
    mistakes = directory / "mistakes.png"
    if not _keeps(mistakes, directory / "predictions.csv", images):
        pictures.gallery(directory / "predictions.csv", images, mistakes, rules=rules, maps=maps)
    page.html_report(directory, directory / "report.html")


def _keeps(picture: Path, predictions: Path, images: Path) -> bool:
    """Warn if images of a contact sheet are missing; return True if an earlier sheet is kept because of that."""
    files = [images / name for name in pictures.wrong_images(predictions)]
    gone = sum(not os.path.isfile(file) for file in files)
    keeps = gone > 0 and picture.exists()
    if gone:
        outcome = "stays as it is" if keeps else "shows empty places"
        log.warning(f"{picture.name} {outcome}: {gone} of its {len(files)} images are not in {printable(images)}")
    return keeps
