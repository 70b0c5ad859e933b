"""Text laid out for a terminal and for Markdown."""

from __future__ import annotations

import html
import textwrap

from tqdm.utils import disp_len, disp_trim  # columns on a terminal: wide letters take two

from utils import printable

WIDTH = 80


def fit(text: object, columns: int) -> str:
    """`text` on one printable line of at most so many terminal columns."""
    text = printable(text)
    return text if disp_len(text) <= columns else disp_trim(text, columns - 1) + "…"


def paragraph(text: str, mark: str = "") -> list[str]:
    """The lines of a wrapped text; `mark` stands before the first one and indents the others by its length."""
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)


def cut(text: str, width: int = WIDTH) -> str:
    """The beginning of a text, in at most so many letters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def end_of(text: str, width: int) -> str:
    """The end of a text, in at most so many letters: of a path or of a module's name the part that tells more."""
    return text if len(text) <= width else "…" + text[1 - width :]


def heading(title: str, how_to_read: str = "") -> list[str]:
    """An underlined title, and a paragraph on how to read what follows."""
    return [title, "-" * len(title), *paragraph(how_to_read)]


def table(sides: str, rows: list[list[str]], gap: int = 2) -> list[str]:
    """Rows of cells as lines, columns set to the left (<) or right (>) by `sides`, and cut where the terminal ends.

    A row of one cell is a heading.
    """
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)]
        lines.append(cut(row[0] if len(row) == 1 else "  " + (" " * gap).join(cells).rstrip()))
    return lines


def align(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of one width: the first column to the left, the others to the right."""
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
    """Seconds, minutes or hours, whichever reads well: (divisor, name)."""
    return (1, "s") if seconds < 120 else (60, "min") if seconds < 36000 else (3600, "h")


def duration(seconds: float) -> str:
    divisor, unit = time_unit(seconds)
    return f"{seconds / divisor:.1f} {unit}"


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of plain text as a table of Markdown, a header first; the first column to the left, the others right."""
    header, *lines = [[markdown(cell) for cell in row] for row in rows]
    sides = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, sides, *lines])


def markdown(text: str) -> str:
    """Plain text as Markdown that shows exactly that text, also inside a table cell."""
    return "".join("\\" + letter if letter in "\\`*_[]|$~#" else letter for letter in html.escape(text, quote=False))
