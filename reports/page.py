"""Write report.html for a run or a comparison: one file with its tables and pictures inside, opened from disk.

It needs no script, network or other file, and is readable in light and dark mode and on paper. The pictures come from
the run folders, the numbers from `results`. Knows nothing of torch or training.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ampscope import html
from ampscope.html import html_page, table, text
from reports import answer, curves, pictures
from reports.results import read_run
from reports.tables import class_rows, conditions, facts, table_cells, verdict
from runs.result import FIGURES
from system.files import write_text

LARGEST_CHART = 200_000  # bytes of a PNG without photographs
PICTURES = {  # of a run's folder: heading, and width on the page in pixels
    "confusion_matrix.png": ("Confusion matrix of the test images", 620),
    "mistakes.png": (
        "The wrongest test images: predicted class with its confidence, true class, and where the network saw it",
        960,
    ),
    "batch.png": ("The first training images as the network sees them", 960),
}


def picture(file: Path, name: str, width: int) -> str:
    """Return a picture as HTML with its data inside, or an empty string if the file is missing.

    Charts are embedded unchanged. Photographs, which make large PNG files, become WebP of a tenth of the size.
    """
    if not file.exists() or file.stat().st_size <= LARGEST_CHART:
        return html.picture(file, name, width)
    buffer = io.BytesIO()
    with Image.open(file, formats=["PNG"]) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=90, method=0)
    return html.embedded(buffer.getvalue(), "webp", name, width)


def run_parts(run: dict[str, Any], level: int) -> str:
    """Return headline numbers, pictures and classes of a finished run, under headings of this level."""
    result = run["result"]
    headings = {name: f"<h{level}>{text(name)}</h{level}>\n" for name in ("Learning curve", "Test images", "Classes")}
    parts = [html.cards(facts(result))]
    if run["metrics"]:  # `evaluate` writes none
        parts += [
            headings["Learning curve"],
            html.panels(pictures.learning_panels(run["metrics"], result["best_epoch"])),
        ]
    predictions = run["directory"] / "predictions.csv"
    if predictions.exists():
        found = curves.curve_panels(result, predictions) | {"Calibration": _reliability([run])}
        parts += [headings["Test images"], html.panels(found)]
    for file, (name, width) in PICTURES.items():
        if image := picture(run["directory"] / file, name, width):
            parts += [f"<h{level}>{text(name)}</h{level}>\n", image]
    rows = class_rows(result, FIGURES)
    header = ["Class", *(f"{title} (%)" for title in FIGURES.values()), "Support"]
    return "".join([*parts, headings["Classes"], table(header, rows)])


def _reliability(runs: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pictures.reliability_curve(runs, buffer)
    return buffer.getvalue()


def epochs(metrics: list[dict[str, Any]]) -> str:
    """Return metrics.jsonl as a table, numbers to four digits, without lists (such as the skipped updates)."""
    names = [name for name, value in metrics[0].items() if not isinstance(value, list)]
    rows = [
        [
            "–" if epoch.get(name) is None else f"{epoch[name]:.4g}" if isinstance(epoch[name], float) else epoch[name]
            for name in names
        ]
        for epoch in metrics
    ]
    return "<h2>Epochs</h2>\n" + table([name.replace("_", " ") for name in names], rows, "wide")


def configuration(config: dict[str, Any]) -> str:
    """Return config.json as a table."""
    rows = [[name, value] for name, value in config.items() if not isinstance(value, dict)]
    rows += [
        [f"{part}: {name}", value]
        for part, values in config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return "<h2>Configuration</h2>\n" + table(["", ""], rows, "plain")


def html_report(directory: Path, path: Path) -> None:
    """Write the report of a finished run. Raise UserError naming a file that is missing or damaged."""
    run = read_run(directory)
    pictures.reliability_curve([run], run["directory"] / "reliability.png")
    body = run_parts(run, 2) + (epochs(run["metrics"]) if run["metrics"] else "") + configuration(run["config"])
    write_text(path, html_page(f"{run['label']}: {run['directory'].name}", body))


def html_comparison(runs: list[dict[str, Any]], comparison: dict[str, Any], path: Path) -> None:
    """Write the report of a comparison of `runs`: the answer, its pictures and table, then a run of each row."""
    first = [run for row in comparison["rows"] for run in runs if str(run["directory"]) in row["runs"][:1]]
    header, rows = table_cells(comparison, short=True)
    body = html.cards(answer.cards(comparison), "cards") if answer.cards(comparison) else ""
    body += f'<p class="advice">{text(answer.advice(comparison))}</p>\n'
    shown = pictures.comparison_panels(runs, comparison)
    body += html.panels(shown | ({"Calibration of each precision": _reliability(first)} if first else {}))
    body += "<h2>All figures</h2>\n" + table(header, rows)
    body += "".join(f"<p>{text(line)}</p>\n" for line in (verdict(comparison), *conditions(comparison)))
    names = dict(zip((row["label"] for row in comparison["rows"]), answer.short_labels(comparison), strict=True))
    for run in first:
        body += f"<h2>{text(names[run['label']])}</h2>\n" + run_parts(run, 3)
    write_text(path, html_page(answer.title_of(comparison), body + configuration(comparison["config"])))
