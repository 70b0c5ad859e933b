"""Lay out text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

WIDTH = 80


def printable(text: object) -> str:
    """Return `text` on one line: control characters and stray bytes of a file name are escaped."""
    escaped = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def paragraph(text: str, mark: str = "") -> list[str]:
    """Return the lines of a wrapped text; `mark` precedes the first one and indents the others by its length."""
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)


def cut(text: str, width: int = WIDTH) -> str:
    """Return the beginning of a text, with at most `width` letters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def end_of(text: str, width: int) -> str:
    """Return the end of a text, with at most `width` letters: the end of a path or module name tells more."""
    return text if len(text) <= width else "…" + text[1 - width :]


def heading(title: str, how_to_read: str = "") -> list[str]:
    """Return an underlined title, and a paragraph on how to read the section."""
    return [title, "-" * len(title), *paragraph(how_to_read)]


def table(sides: str, rows: list[list[str]], gap: int = 2) -> list[str]:
    """Return rows of cells as lines, columns aligned left (<) or right (>) by `sides`, cut at the terminal's width.

    A row of one cell is a heading.
    """
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) > 1), strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)]
        lines.append(cut(row[0] if len(row) == 1 else "  " + (" " * gap).join(cells).rstrip()))
    return lines
