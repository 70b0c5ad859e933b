"""report.html of a run or a comparison: one file with tables and pictures inside, opened straight from disk.
It needs no script, no network and no other file, reads well in light and dark and on paper.
It must not know torch or the training code; numbers come from `results`, pictures from `report`."""

import base64
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path

import report
from results import (
    class_table,
    clean,
    conditions,
    duration,
    group_runs,
    option,
    precision_name,
    rate,
    read_run,
    table_cells,
    verdict,
    wilson,
    write_atomically,
)

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#5b636d;--line:#d5d9de;--band:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#a0a8b2;--line:#363c44;--band:#1d2127}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.5rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.6rem 0 .8rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
h3{font-size:1.05rem;margin:1.8rem 0 .6rem}
p{max-width:46rem}.soft{color:var(--soft)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}
dl.facts div{background:var(--band);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.2rem;font-weight:600}
dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;overflow-wrap:normal}
th:first-child,td:first-child,table.plain td{text-align:left}
th{color:var(--soft);font-weight:600}table.plain td{overflow-wrap:anywhere}
table.dense{font-size:.82rem}table.dense td{white-space:nowrap;padding:.15rem .6rem}
figure{margin:1rem 0;background:#fff;border:1px solid var(--line);border-radius:.5rem;padding:.8rem;width:fit-content;
 max-width:100%}
figure img{display:block;max-width:100%;height:auto}
@media screen and (max-width:40rem){figure{overflow-x:auto}figure img{min-width:34rem}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--band:#fff}body{max-width:none;padding:0;
 font-size:10pt}figure,tr,dl.facts div{break-inside:avoid}h2,h3,p.soft{break-after:avoid}.scroll{overflow:visible}
 figure img{max-height:22cm;width:auto}table{font-size:8.5pt}th,td{padding:.2rem .4rem}
 table.dense{font-size:6.5pt}table.dense th,table.dense td{padding:.1rem .25rem}}
"""


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """One HTML file; its policy forbids everything but what is inside it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    write_atomically(path, f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(clean(title))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(clean(title))}</h1>
{"".join(parts)}
</body>
</html>
""")


def paragraph(text: str, kind: str = "") -> str:
    return f'<p{f" class={kind}" if kind else ""}>{escape(clean(text))}</p>\n'


def cell(value: object) -> str:
    """A number of the epoch table to at least four digits, a dash for none."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return "–" if value is None else str(value)


def table(header: list[str], rows: list[list[object]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(clean(name))}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(clean(value))}</td>" for value in row) + "</tr>\n" for row in rows)
    return (f'<div class="scroll"><table class="{kind}">{f"<thead><tr>{head}</tr></thead>" if header else ""}'
            f"<tbody>\n{body}</tbody></table></div>\n")


def figure(alternative: str, width: int, draw: Callable[..., None], *arguments: object, **options: object) -> str:
    """What `draw` writes as a picture inside the page, at most `width` pixels wide; `arguments` may hold Path as
    the place where the function takes the file to write."""
    with tempfile.TemporaryDirectory() as folder:
        # Photographs are a fifth of the size as JPEG.
        kind = "jpeg" if draw is report.gallery else "png"
        file = Path(folder) / f"picture.{kind}"
        draw(*(file if argument is Path else argument for argument in arguments), **options)
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    return (f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(clean(alternative))}" '
            f'style="width:{width}px"></figure>\n')


def facts(run: dict) -> str:
    """The headline numbers of a finished run as tiles."""
    result = run["result"]
    right = sum(row[place] for place, row in enumerate(result["confusion"]))
    total = sum(map(sum, result["confusion"]))
    low, high = wilson(right, total)
    tiles = [("Test accuracy", f"{result['test_acc']:.2f} %", f"95 % interval {low:.2f} to {high:.2f} %"),
             ("Best epoch", result["best_epoch"], f"validation accuracy {result['best_val_acc']:.2f} %"),
             ("Total time", duration(result["total_seconds"]), f"{duration(result['train_seconds'])} training, "
              f"{rate(result['images_per_second'])} images/s"),
             ("Peak memory", f"{result['peak_memory_mb']:,.0f} MB", result.get("memory_kind") or "kind unknown"),
             ("Precision", precision_name(result.get("precision")),
              run["config"].get("device_name") or run["config"].get("device") or "unknown device")]
    return '<dl class="facts">' + "".join(
        f"<div><dt>{escape(clean(name))}</dt><dd>{escape(clean(value))}<small>{escape(clean(note))}</small></dd></div>"
        for name, value, note in tiles) + "</dl>\n"


def run_parts(run: dict, level: str) -> list[str]:
    """Curves, classes, matrix and gallery of one run under headings of that level ('h2' or 'h3')."""
    result, parts = run["result"], []
    if run["metrics"]:
        best = result["best_epoch"] if result else None
        parts += [f"<{level}>Learning curve</{level}>\n",
                  figure("Loss and accuracy over the epochs", 960, report.learning_curve, run["metrics"], Path,
                         title=run["name"], best_epoch=best)]
    if not result:
        return parts
    classes = result["classes"]
    rows = [[name, *(f"{numbers[key]:.2f}" for key in ("precision", "recall", "f1")), f"{numbers['support']:,}"]
            for name, numbers in zip(classes, class_table(result["confusion"]), strict=True)]
    parts += [f"<{level}>Classes</{level}>\n",
              table(["Class", "Precision (%)", "Recall (%)", "F1 (%)", "Support"], rows),
              figure("Confusion matrix of the test images", 640 if len(classes) <= 8 else 960,
                     report.confusion_matrix, result["confusion"], classes, Path, title="Test images")]
    predictions = run["directory"] / "predictions.csv"
    if predictions.exists():
        parts += [f"<{level}>The wrongest test images</{level}>\n",
                  paragraph("Highest confidence in a wrong class first: the predicted class and its confidence, "
                            "below it the true class.", "soft"),
                  figure("The test images that were wrong with the highest confidence", 960, report.gallery,
                         predictions, Path(str(option(run, "data_dir") or ".")), Path)]
    return parts


def reliability_part(runs: list[dict]) -> list[str]:
    """The reliability curve of those runs that wrote their predictions."""
    drawn = [run for run in runs if run["result"] and (run["directory"] / "predictions.csv").exists()]
    if not drawn:
        return []
    return ["<h2>Calibration</h2>\n",
            paragraph("Of the images to which a calibrated model gives a confidence of 80 %, 80 % are right: its "
                      "curve lies on the diagonal. The calibration error is the mean distance from it, weighted by "
                      "the number of images (15 bins, Guo et al. 2017).", "soft"),
            figure("Accuracy against confidence", 560, report.reliability_curve, drawn, Path)]


def configuration(config: dict) -> str:
    """Options, versions, device and data of a run as a table."""
    rows = [[name, value] for name, value in config.items() if not isinstance(value, (dict, list))]
    for part in ("dataset", "versions", "options"):
        content = config.get(part)
        rows += [[f"{part}: {name}", ", ".join(map(str, value)) if isinstance(value, list) else value]
                 for name, value in content.items()] if isinstance(content, dict) else []
    return "<h2>Configuration</h2>\n" + table([], rows, "plain")


def html_report(directory: Path, path: Path) -> None:
    """Write the report of one run directory; ValueError names a file that is missing or damaged."""
    run = read_run(directory)
    parts = [facts(run)] if run["result"] else [paragraph(
        f"This run has no result: {(run['failure'] or {}).get('reason') or 'it is not finished'}.")]
    reason = run["config"].get("precision_reason")
    parts += [paragraph(f"Precision: {reason}.", "soft")] if reason else []
    parts += run_parts(run, "h2") + reliability_part([run])
    epochs = run["metrics"]
    names = [name for name in (epochs[0] if epochs else {}) if not isinstance(epochs[0][name], (list, dict))]
    if epochs:
        rows = [[cell(epoch.get(name)) for name in names] for epoch in epochs]
        parts += ["<h2>Epochs</h2>\n", table([name.replace("_", " ") for name in names], rows, "dense")]
    write_page(path, f"{option(run, 'model') or 'Run'}: {run['name']}", [*parts, configuration(run["config"])])


def html_comparison(directory: Path, runs: list[dict], comparison: dict, path: Path) -> None:
    """Write the report of a comparison: its table and picture, then each precision by its first finished run."""
    header, rows = table_cells(comparison)
    parts = [table(header, rows), paragraph(verdict(comparison)),
             *(paragraph(line, "soft") for line in conditions(comparison)),
             figure("Validation accuracy against time, training time and memory of each precision", 1040,
                    report.comparison_picture, runs, comparison, Path)]
    first = [(group["algorithm"], next((run for run in group["runs"] if run["result"]), None))
             for group in group_runs(runs)]
    first = [(name, run) for name, run in first if run]
    parts += reliability_part([run for _, run in first])
    for name, run in first:
        parts += [f"<h2>{escape(clean(name))}</h2>\n", paragraph(f"Run directory: {run['name']}", "soft"), facts(run),
                  *run_parts(run, "h3")]
    parts += [configuration(first[0][1]["config"])] if first else []
    write_page(path, f"Comparison: {Path(directory).resolve().name}", parts)
