"""All pictures and the page of one finished run, from the files in its folder alone."""

from __future__ import annotations

from pathlib import Path

from images.decode import Rules
from precision_table import label_of
from reports import page, pictures
from reports.results import EXPLANATIONS, read_run
from system.files import read_json


def draw_run(directory: Path) -> None:
    """Draws learning_curve.png, confusion_matrix.png, mistakes.png, reliability.png and report.html.

    Raises UserError if a file that they are drawn from is missing or damaged.
    """
    run = read_run(directory)
    result = run["result"]
    title = f"{run['model']}, {label_of(run['precision'])}"
    if run["metrics"]:  # of `evaluate` there are none
        pictures.learning_curve(
            run["metrics"], directory / "learning_curve.png", title=title, best_epoch=result["best_epoch"]
        )
    pictures.confusion_matrix(result["confusion"], result["classes"], directory / "confusion_matrix.png", title=title)
    images = Path(run["options"].get("data_dir", ""))
    rules = Rules(windows=run["config"]["dataset"].get("windows") or {})
    file = directory / EXPLANATIONS
    maps = read_json(file) if file.exists() else {}
    pictures.gallery(directory / "predictions.csv", images, directory / "mistakes.png", rules=rules, maps=maps)
    page.html_report(directory, directory / "report.html")
