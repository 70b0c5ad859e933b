"""The style of every picture: fonts, and colours, lines and hatches that read in grey and for the colour-blind.

Keeps no global plotting state. Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from ampscope.files import replacing

# Hues of Okabe and Ito and of Tol, which the colour-blind tell apart, with steps of lightness that remain in grey;
# line, marker and hatch repeat the distinction.
BLUE = "#004488"
VERMILION = "#D55E00"
GOLD = "#EEBB33"
INK = "#222222"
SKY = "#66BBEE"
PURPLE = "#AA6699"
STYLES = [
    (BLUE, "-", "o", ""),
    (VERMILION, "--", "D", "///"),
    (GOLD, "-.", "s", "..."),
    (INK, ":", "^", "xxx"),
    (SKY, (0, (6, 1, 1, 1, 1, 1)), "v", "---"),
    (PURPLE, (0, (8, 3)), "P", "++"),
]
FAINT = "#8a8a8a"
GRID = "#e4e4e4"
PAPER = "#ffffff"
DARK = {  # what these colours become in an SVG on a dark page
    INK: "#e4e7eb",
    FAINT: "#9aa2ab",
    GRID: "#363c44",
    PAPER: "#14171b",
    BLUE: "#79b0ff",
    VERMILION: "#ff9a57",
    GOLD: "#f2cc60",
    SKY: "#a5dcff",
    PURPLE: "#dda6cb",
}
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Microsoft YaHei",
    "PingFang SC",
    "Noto Emoji",
)
LOOK = {
    "font.size": 10,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "ampscope",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
DPI = 150  # pixels of an inch
COLUMN = 5.0  # inches: the widest SVG, whose letters a telephone shows in the size of its text


@contextmanager
def picture(
    path: Path | io.BytesIO,
    width: float,
    height: float,
    photographs: Sequence[tuple[Image.Image, tuple[int, int]]] = (),
) -> Iterator[Figure]:
    """Yield a figure of this size in inches, and write it to `path` as PNG when the block ends.

    `photographs` are pasted over it, each with the column and the row of its upper left corner in pixels. The figure is
    painted once and without transparency; `savefig` paints it twice to lay it out. A buffer in place of a path gets an
    SVG for a page: as wide as a column at most, and in light and dark colours.
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in FONTS if font in installed] or ["sans-serif"]
    with warnings.catch_warnings(), matplotlib.style.context(["default", LOOK | {"font.family": fonts}]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        is_svg = isinstance(path, io.BytesIO)
        figure = Figure(figsize=(min(width, COLUMN) if is_svg else width, height), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        if isinstance(path, io.BytesIO):
            path.write(_adapting(figure))
            return
        canvas.draw()
    painted = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    for photograph, place in photographs:
        painted.paste(photograph, place)
    # compress runs of equal bytes only: as small as the default, in a fraction of its time
    with replacing(path) as file:
        painted.save(file, "PNG", dpi=(DPI, DPI), compress_type=zlib.Z_RLE)


def legend_below(axes: Axes, columns: int = 1, **options: Any) -> None:
    """Put the legend of a panel below it, where it covers no line."""
    below = axes.transAxes + ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)  # half an inch: ticks and label
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=columns, borderaxespad=0, **options
    )


def svg(draw: Callable[..., None], *what: Any, height: float = 3.2) -> bytes:
    """Return the SVG of one panel, which `draw(axes, *what)` draws."""
    buffer = io.BytesIO()
    with picture(buffer, COLUMN, height) as figure:
        draw(figure.add_subplot(), *what)
    return buffer.getvalue()


def _adapting(figure: Figure) -> bytes:
    """Return a figure as SVG without a background, whose colours suit a light and a dark page."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue().decode()
    names = {color.lower(): f"--c{place}" for place, color in enumerate(DARK)}
    for color, name in names.items():
        text = text.replace(color, f"var({name})")
    light, dark = (
        "".join(f"{name}:{color};" for name, color in zip(names.values(), colors, strict=True))
        for colors in (names, DARK.values())
    )
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return text.replace("<defs>", f"<defs>{style}", 1).encode()
