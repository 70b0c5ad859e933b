"""Write one HTML file with tables and pictures inside, opened from disk.

It needs no script, network or other file, and is readable in light and dark mode and on paper.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ampscope.text import printable

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#5b636d;--line:#d5d9de}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#a0a8b2;--line:#363c44}}
body{margin:0 auto;max-width:68rem;padding:1rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
p{max-width:46rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.75rem}
dl div{border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem}
dd{margin:0;font-size:1.2rem;font-weight:600}
.cards{grid-template-columns:repeat(auto-fit,minmax(14rem,1fr))}.cards div{padding:1rem 1.2rem}
.cards dd{font-size:clamp(2.2rem,3.3vw,2.5rem);line-height:1.15;overflow-wrap:normal}
.cards small{font-size:1rem;line-height:1.4;margin-top:.4rem}
.advice{font-size:1.25rem;font-weight:600;max-width:none}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;align-items:start;
 margin:1.5rem 0}
dt,small,th{color:var(--soft);font-size:.85rem;font-weight:400}small{display:block}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th,td{overflow-wrap:normal}.plain td{overflow-wrap:anywhere}
th:first-child,td:first-child,td[colspan],.plain td{text-align:left}
td{white-space:nowrap}.plain td,td[colspan]{white-space:normal;min-width:7rem}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper)}
.wide td{white-space:nowrap;font-size:.8rem;padding:.1rem .5rem}
img{display:block;box-sizing:border-box;margin:1rem 0;background:#fff;border:1px solid var(--line);border-radius:.5rem}
.panels img{background:none;border:0;margin:0;width:100%;max-width:36rem}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb}body{max-width:none;padding:0;font-size:10pt}
 img,tr,dl div{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
 img{max-height:13cm;max-width:100%;width:auto!important}
 table{font-size:8.5pt}.wide td,.wide th{font-size:6pt;padding:.1rem .2rem}}
"""


def text(value: object) -> str:
    """Return a value as HTML text on one line."""
    return escape(printable(value))


def table(header: list[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """Return a table; the last cell of a row that is shorter than the header spans the rest of it."""
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
    """Return a PNG embedded in HTML, or an empty string if the file is missing."""
    return embedded(file.read_bytes(), "png", name, width) if file.exists() else ""


def embedded(content: bytes, kind: str, name: str, width: int) -> str:
    """Return the content of a picture file embedded in HTML; `kind` is its format, `width` in pixels."""
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/{kind};base64,{data}" alt="{text(name)}" style="width:{width}px">'
    return f'<div class="scroll">{image}</div>\n'


def cards(rows: Sequence[tuple[str, str, str]], kind: str = "") -> str:
    """Return figures, each with its title above and its words below."""
    tiles = "".join(
        f"<div><dt>{text(title)}</dt><dd>{text(figure)}<small>{text(words)}</small></dd></div>\n"
        for title, figure, words in rows
    )
    return f'<dl class="{kind}">{tiles}</dl>\n'


def panels(drawn: dict[str, bytes]) -> str:
    """Return SVG pictures by what they show, side by side if there is room, or an empty string without any."""
    images = "".join(
        f'<img src="data:image/svg+xml;base64,{base64.b64encode(content).decode()}" alt="{text(name)}">\n'
        for name, content in drawn.items()
    )
    return f'<div class="panels">{images}</div>\n' if images else ""


def html_page(title: str, body: str) -> str:
    """Return a whole page; its policy forbids everything outside it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
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
"""
