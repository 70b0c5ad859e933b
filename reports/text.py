"""Lay out text for a terminal and for Markdown."""

from __future__ import annotations

import html

from tqdm.utils import disp_len, disp_trim  # width on a terminal: wide letters take two columns

from utils import printable


def fit(text: object, columns: int) -> str:
    """Return `text` on one printable line of at most `columns` terminal columns."""
    text = printable(text)
    return text if disp_len(text) <= columns else disp_trim(text, columns - 1) + "…"


def align(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines of one width: the first column left-aligned, the others right-aligned."""
    widths = [max(map(disp_len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0] + " " * (widths[0] - disp_len(row[0])),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


def time_unit(seconds: float) -> tuple[int, str]:
    """Return the divisor and the name of a unit that suits this time: seconds, minutes or hours."""
    return (1, "s") if seconds < 120 else (60, "min") if seconds < 36000 else (3600, "h")


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows of plain text, a header first, as a Markdown table with all but the first column right-aligned."""
    header, *lines = [[markdown(cell) for cell in row] for row in rows]
    sides = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, sides, *lines])


def markdown(text: str) -> str:
    """Escape plain text so that Markdown shows it unchanged, also inside a table cell."""
    return "".join("\\" + letter if letter in "\\`*_[]|$~#" else letter for letter in html.escape(text, quote=False))
