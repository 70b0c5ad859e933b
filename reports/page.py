"""report.html of a run or a comparison: one file with tables and pictures inside, opened straight from disk.

It needs no script, no network and no other file, reads well in light and dark and on paper. The pictures are those
that lie in the run folders; the numbers come from `results`. Knows nothing of torch or training.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from reports import pictures
from reports.results import read_run
from reports.tables import class_rows, conditions, facts, table_cells, verdict
from system.files import write_text
from utils import printable

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#5b636d;--line:#d5d9de}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#a0a8b2;--line:#363c44}}
body{margin:0 auto;max-width:68rem;padding:1.5rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
p{max-width:46rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.75rem}
dl div{border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
dd{margin:0;font-size:1.2rem;font-weight:600}
dt,small,th{color:var(--soft);font-size:.85rem;font-weight:400}small{display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th,td{overflow-wrap:normal}.plain td{overflow-wrap:anywhere}
th:first-child,td:first-child,td[colspan],.plain td{text-align:left}
.wide td{white-space:nowrap;font-size:.8rem;padding:.1rem .5rem}
img{display:block;box-sizing:border-box;max-width:100%;margin:1rem 0;background:#fff;border:1px solid var(--line);
 border-radius:.5rem}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb}body{max-width:none;padding:0;font-size:10pt}
 img,tr,dl div{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
 img{max-height:13cm;width:auto!important}
 table{font-size:8.5pt}.wide td,.wide th{font-size:6pt;padding:.1rem .2rem}}
"""
LARGEST_CHART = 200_000  # bytes of a PNG without photographs
PICTURES = {  # of a run's folder: heading, and width on the page in pixels
    "learning_curve.png": ("Learning curve", 960),
    "confusion_matrix.png": ("Confusion matrix of the test images", 620),
    "mistakes.png": (
        "The wrongest test images: predicted class with its confidence, true class, and where the network saw it",
        960,
    ),
    "batch.png": ("The first training images as the network sees them", 960),
    "reliability.png": ("Calibration: a calibrated model is right in 80 % of the images it is 80 % sure of", 560),
}


def text(value: object) -> str:
    return escape(printable(value))


def table(header: list[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """The last cell of a row that is shorter than the header spans the rest of it."""
    head = "".join(f"<th>{text(name)}</th>" for name in header)
    lines = ""
    for row in rows:
        span = f' colspan="{len(header) - len(row) + 1}"' if len(row) < len(header) else ""
        lines += f"<tr>{''.join(f'<td>{text(value)}</td>' for value in row[:-1])}<td{span}>{text(row[-1])}</td></tr>\n"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n"
    )


def picture(file: Path, name: str, width: int) -> str:
    """Return a picture inside the page, or nothing if the file is missing.

    A chart stands in it as it is. Photographs, whose PNG is large, become WebP of a tenth of it.
    """
    if not file.exists():
        return ""
    kind = "png"
    content = file.read_bytes()
    if len(content) > LARGEST_CHART:
        kind = "webp"
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.convert("RGB").save(buffer, "WEBP", quality=90, method=0)
        content = buffer.getvalue()
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{text(name)}" style="width:{width}px">\n'


def run_parts(run: dict[str, Any], level: int) -> str:
    """Headline numbers, pictures and classes of a finished run, under headings of that level."""
    result = run["result"]
    tiles = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(remark)}</small></dd></div>\n"
        for name, value, remark in facts(result)
    )
    parts = [f"<dl>{tiles}</dl>\n"]
    for file, (name, width) in PICTURES.items():
        if image := picture(run["directory"] / file, name, width):
            parts += [f"<h{level}>{text(name)}</h{level}>\n", image]
    rows = class_rows(result)
    return "".join(
        [
            *parts,
            f"<h{level}>Classes</h{level}>\n",
            table(["Class", "Precision (%)", "Recall (%)", "F1 (%)", "Support"], rows),
        ]
    )


def epochs(metrics: list[dict[str, Any]]) -> str:
    """metrics.jsonl as a table, numbers to four digits; lists (the skipped updates one by one) are left out."""
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
    """config.json as a table."""
    rows = [[name, value] for name, value in config.items() if not isinstance(value, dict)]
    rows += [
        [f"{part}: {name}", value]
        for part, values in config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return "<h2>Configuration</h2>\n" + table(["", ""], rows, "plain")


def html_report(directory: Path, path: Path) -> None:
    """Writes the report of a finished run. Raises UserError naming a file that is missing or damaged."""
    run = read_run(directory)
    pictures.reliability_curve([run], run["directory"] / "reliability.png")
    write_page(
        path,
        f"{run['label']}: {run['directory'].name}",
        run_parts(run, 2) + (epochs(run["metrics"]) if run["metrics"] else "") + configuration(run["config"]),
    )


def html_comparison(directory: Path, runs: list[dict[str, Any]], comparison: dict[str, Any], path: Path) -> None:
    """Writes the report of a comparison: its table and pictures, then the finished `runs`, one of each row."""
    header, rows = table_cells(comparison)
    body = table(header, rows) + "".join(
        f"<p>{text(line)}</p>\n" for line in (verdict(comparison), *conditions(comparison))
    )
    body += picture(directory / "comparison.png", "Validation accuracy against time, and time and memory", 1040)
    body += picture(directory / "reliability.png", "Accuracy against confidence in each precision", 560)
    for run in runs:
        body += f"<h2>{text(run['label'])}</h2>\n" + run_parts(run, 3)
    write_page(path, f"Comparison: {directory.resolve().name}", body + configuration(comparison["config"]))


def write_page(path: Path, title: str, body: str) -> None:
    """One HTML file, whose policy forbids everything but what is inside it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
{body}
</body>
</html>
""",
    )
