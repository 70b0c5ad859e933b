"""Write the report as one HTML page, with its tables and pictures inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampscope import html
from ampscope.files import replacing
from ampscope.words import cast_words, megabytes, payoff_words, share

if TYPE_CHECKING:
    from ampscope.report import Report

PICTURES = {
    "memory.png": "What one update holds",
    "underflow.png": "Gradient magnitudes",
    "activations.png": "Activation ranges",
    "scaler.png": "Loss scale",
}


def write_report_page(report: Report, folder: Path, drawn: dict[str, bytes]) -> None:
    """Write inspect.html into a folder, with the report's pictures, which were `drawn` as SVG."""
    content = report.content
    parts = [_findings(report), _payoff(report), _memory(content["memory"])]
    parts.append(html.panels({title: drawn[name] for name, title in PICTURES.items() if name in drawn}))
    parts += [_products(content), _waits(content), _operators(content)]
    if content["underflow"] is not None:
        parts += [_gradients(content["underflow"]), _activations(content["underflow"]["activations"])]
    text = html.html_page(f"AMP in {content['subject']['name']}", "".join(parts))
    with replacing(folder / "inspect.html") as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def _findings(report: Report) -> str:
    if not report.everything:
        return "<h2>Findings</h2>\n<p>None: no rule is broken.</p>\n"
    rows = [
        [
            f"{finding.rule} ({finding.level})",
            f"{finding.place}: {finding.place.code}" if finding.place else finding.module or "",
            f"{finding.record()['title']}. {finding.message}",
            "; or ".join(finding.cures),
        ]
        for finding in report.everything
    ]
    return "<h2>Findings</h2>\n" + html.table(["Rule", "Where", "What", "What helps"], rows, "plain")


def _payoff(report: Report) -> str:
    payoff = report.content["payoff"]
    if payoff is None:
        return _trials(report.content.get("script", {}).get("payoff"))
    base = next(iter(payoff["speed"].values()))["shortest"]
    rows = [
        [name, f"{1000 * entry['shortest']:,.1f}", f"{base / entry['shortest']:.2f}", entry["rounds"]]
        for name, entry in payoff["speed"].items()
    ]
    words = " ".join(line.strip() for line in payoff_words(payoff))
    table = html.table(["Precision", "ms an update (the shortest)", "Speed-up", "Updates timed"], rows)
    return f"<h2>Will it pay?</h2>\n{table}<p>{html.text(words)}</p>\n"


def _trials(payoff: dict[str, Any] | None) -> str:
    """Return a table of a program's updates as written and with AMP switched off."""
    if payoff is None:
        return ""
    rows = [
        [name, *(f"{1000 * row[key]:,.1f}" for key in ("seconds", "lower", "upper")), row["rounds"]]
        for name, row in payoff["speed"].items()
    ]
    header = ["", "ms an update (median)", "A quarter is below", "A quarter is above", "Updates timed"]
    table = html.table(header, rows) if rows else ""
    return f"<h2>Will it pay?</h2>\n{table}<p>{html.text(' '.join(payoff['words']))}</p>\n"


def _memory(ledger: list[dict[str, Any]]) -> str:
    if not ledger:
        return ""
    parts = [part for part in ledger[0] if part != "precision"]
    rows = [[part.replace("_", " "), *(megabytes(row[part]) for row in ledger)] for part in parts]
    return "<h2>Memory (MB)</h2>\n" + html.table(["", *(row["precision"] for row in ledger)], rows)


def _products(content: dict[str, Any]) -> str:
    rows = [
        [name, row["op"], row["module"] or "–", f"{row['share']:.1%}", row["why"], row["where"] or ""]
        for name, found in content["float32_products"].items()
        for row in found
    ]
    if not rows:
        return ""
    header = ["Precision", "Operator", "Module", "Share", "Why", "Line"]
    return "<h2>Products left in float32 under AMP</h2>\n" + html.table(header, rows, "plain")


def _waits(content: dict[str, Any]) -> str:
    rows = [[row["where"], row["what"], row["count"]] for row in content["synchronisations"]]
    return "<h2>What the host waits for</h2>\n" + html.table(["Line", "What", "Times"], rows, "plain") if rows else ""


def _operators(content: dict[str, Any]) -> str:
    parts = []
    for name, rows in content["dtypes"].items():
        cells = [
            [row["phase"], row["module"] or "–", row["op"], ", ".join(row["inputs"]), row["output"], row["calls"]]
            for row in rows
            if not row["view"]
        ]
        entry = content["precisions"][name]
        parts.append(f"<h2>Operators: {html.text(entry['label'])}</h2>\n<p>{html.text(entry['reason'])}. ")
        parts.append(f"{html.text(cast_words(content['casts'][name]))}</p>\n")
        parts.append(html.table(["Phase", "Module", "Operator", "In", "Out", "Calls"], cells, "wide"))
    return "".join(parts)


def _gradients(underflow: dict[str, Any]) -> str:
    scales = [f"{scale:g}" for scale in underflow["scales"]]
    rows = []
    for row in underflow["layers"]:
        cells = [
            share(row["by_scale"][scale][kind] if row["by_scale"][scale] else None, row["nonzero"])
            for kind in ("zero", "overflow")
            for scale in scales
        ]
        what = "weights" if row["group"] == "parameter" else "output"
        rows.append([row["name"] or "(the model)", what, *cells])
    header = ["Gradient of", ""] + [f"{kind} at {scale}" for kind in ("zero", "overflow") for scale in scales]
    return "<h2>Gradients against float16, by loss scale</h2>\n" + html.table(header, rows, "wide")


def _activations(activations: list[dict[str, Any]]) -> str:
    rows = []
    for row in activations:
        cells = [
            share(formats["1"][kind] if formats["1"] else None, row["nonzero"])
            for formats in row["formats"].values()
            for kind in ("zero", "subnormal", "overflow")
        ]
        ends = ["–" if row[end] is None else f"{row[end]:.3g}" for end in ("smallest", "largest")]
        rows.append([row["name"] or "(the model)", row["kind"], *ends, *cells])
    names = [*activations[0]["formats"]] if activations else []
    header = ["Module", "Kind", "Smallest", "Largest"]
    header += [f"{name} {kind}" for name in names for kind in ("zero", "subnormal", "overflow")]
    return "<h2>Activations against narrow formats</h2>\n" + html.table(header, rows, "wide")
