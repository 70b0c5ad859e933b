"""Report an audit: accuracy over folds, doubtful labels (list and contact sheet), confused pairs, duplicate images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ampscope import html
from images.decode import Rules
from reports.doubt import Doubt, find_doubtful
from reports.page import picture
from reports.results import read_predictions, read_run, student
from reports.sheets import labelled_sheet
from reports.text import align, fit
from runs.writing import csv_text
from system.files import as_cell, json_text, write_text
from utils import RunError, amount, log, printable

SHEET = 48  # doubtful images on the contact sheet


def report_audit(runs: list[Path], folder: Path, data_dir: Path, copies: list[list[str]]) -> None:
    """Write doubtful.csv, doubtful.png, audit.json and report.html into `folder`, and print the summary.

    `runs` are the folders of the folds; each group in `copies` lists files with the same image and different labels.
    Raise RunError if a fold did not finish.
    """
    found = [read_run(run) for run in runs]
    failed = [run["directory"].name for run in found if not run["result"]]
    if failed:
        raise RunError(f"{', '.join(failed)} did not finish: the same command, without --overwrite, goes on.")
    tables = [read_predictions(run / "predictions.csv") for run in runs]
    classes = tables[0]["classes"]
    paths = [path for table in tables for path in table["paths"]]
    labels = np.array([classes.index(name) for table in tables for name in table["labels"]])
    doubt = find_doubtful(np.concatenate([table["probabilities"] for table in tables]), labels)
    rows = doubtful_rows(np.concatenate([table["probabilities"] for table in tables]), labels, paths, classes, doubt)
    report = {
        "images": len(paths),
        "classes": classes,
        **accuracy([run["result"]["test_acc"] for run in found]),
        "doubtful": len(rows),
        "estimated_errors": float(doubt.joint.sum() - np.trace(doubt.joint)),
        "pairs": pairs(labels, classes, doubt),
        "copies_under_two_labels": copies,
    }
    cells = ([*map(as_cell, row[:3]), *row[3:]] for row in rows)
    write_text(folder / "doubtful.csv", csv_text([HEADER, *cells]))
    write_text(folder / "audit.json", json_text(report, indent=1))
    rules = Rules.recorded(found[0]["config"]["dataset"])
    captions = [f"{fit(row[2], 20)} {100 * float(row[4]):.0f} %\nlabel: {row[1]}" for row in rows[:SHEET]]
    heading = f"The {len(captions)} most doubtful of {len(paths):,} labels: what other models say, and the label"
    labelled_sheet(
        [data_dir / row[0] for row in rows[:SHEET]],
        captions,
        folder / "doubtful.png",
        most=SHEET,
        heading=heading if captions else "No label is doubtful",
        rules=rules,
    )
    write_page(report, rows, folder)
    print(summary(report))
    log.info(f"results: {folder}")


HEADER = ["path", "label", "suggested", "label_probability", "suggested_probability", "margin"]


def doubtful_rows(
    probabilities: np.ndarray, labels: np.ndarray, paths: list[str], classes: list[str], doubt: Doubt
) -> list[list[str]]:
    """Return the rows of doubtful.csv, the most probable errors first."""
    return [
        [
            paths[place],
            classes[labels[place]],
            classes[doubt.suggested[place]],
            f"{probabilities[place, labels[place]]:.6f}",
            f"{probabilities[place, doubt.suggested[place]]:.6f}",
            f"{doubt.margin[place]:.6f}",
        ]
        for place in doubt.order
    ]


def accuracy(folds: list[float]) -> dict[str, Any]:
    """Return the mean over folds in percent and half its 95 % interval. The interval is slightly too narrow, because
    folds share training images."""
    return {"folds": folds, "accuracy": float(np.mean(folds)), "interval": student(folds)}


def pairs(labels: np.ndarray, classes: list[str], doubt: Doubt) -> list[dict[str, Any]]:
    """Return the number and share of doubtful images for each (label, suggested class), the most frequent first."""
    counts = Counter((int(labels[place]), int(doubt.suggested[place])) for place in doubt.order)
    sizes = np.bincount(labels, minlength=len(classes))
    return [
        {
            "label": classes[label],
            "suggested": classes[other],
            "doubtful": count,
            "share": count / int(sizes[label]),
            "estimated_share": float(doubt.joint[label, other] / sizes[label]),
        }
        for (label, other), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def pair_table(report: dict[str, Any], most: int) -> list[list[str]]:
    return [
        [
            f"{pair['label']} → {pair['suggested']}",
            f"{pair['doubtful']:,}",
            f"{100 * pair['share']:.2f}",
            f"{100 * pair['estimated_share']:.2f}",
        ]
        for pair in report["pairs"][:most]
    ]


PAIR_HEADER = ["Label → rather", "Doubtful", "% of the label", "% estimated"]


def summary(report: dict[str, Any]) -> str:
    """Return the summary of the audit, at most 80 columns wide."""
    shown = ", ".join(f"{value:.2f}" for value in report["folds"])
    share = 100 * report["doubtful"] / report["images"]
    lines = [
        f"Accuracy       {report['accuracy']:.2f} ± {report['interval']:.2f} % (folds: {shown})",
        f"Doubtful       {report['doubtful']:,} of {report['images']:,} labels ({share:.2f} %)",
        f"Estimated      {report['estimated_errors']:,.0f} wrong labels, by the confident joint",
        f"Copies         {amount(len(report['copies_under_two_labels']), 'picture', 'pictures')} under two labels",
    ]
    rows = [[fit(name, 40), *cells] for name, *cells in pair_table(report, 15)]
    if rows:
        lines += ["", *align([PAIR_HEADER, *rows])]
    for group in report["copies_under_two_labels"][:10]:
        lines.append("same picture: " + " = ".join(map(printable, group)))
    return "\n".join(lines)


def write_page(report: dict[str, Any], rows: list[list[str]], folder: Path) -> None:
    """Write report.html: the summary, the contact sheet, pairs of classes, duplicates, the first 500 doubtful
    labels."""
    body = "".join(f"<p>{html.text(line)}</p>\n" for line in summary(report).split("\n\n")[0].splitlines())
    body += "<h2>Most doubtful</h2>\n" + picture(folder / "doubtful.png", "The most doubtful labels", 1040)
    body += "<h2>Pairs of classes</h2>\n" + html.table(PAIR_HEADER, pair_table(report, 100))
    if report["copies_under_two_labels"]:
        copies = [[" = ".join(group)] for group in report["copies_under_two_labels"]]
        body += "<h2>One picture, two labels</h2>\n" + html.table(["Files"], copies, "plain")
    body += "<h2>Doubtful labels</h2>\n" + html.table([name.replace("_", " ") for name in HEADER], rows[:500], "plain")
    write_text(folder / "report.html", html.html_page(f"Audit: {folder.resolve().name}", body))
