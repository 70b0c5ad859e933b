"""The style of every picture: fonts, and colours, lines and hatches that read in grey and for the colour-blind.

Keeps no global plotting state. Knows nothing of what is drawn.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
DPI = 150  # pixels of an inch


@contextmanager
def picture(
    path: Path, width: float, height: float, photographs: Sequence[tuple[Image.Image, tuple[int, int]]] = ()
) -> Iterator[Figure]:
    """Yield a figure of this size in inches, and write it to `path` as PNG when the block ends.

    `photographs` are pasted over it, each with the column and the row of its upper left corner in pixels. The figure is
    painted once and without transparency; `savefig` paints it twice to lay it out.
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in FONTS if font in installed] or ["sans-serif"]
    with warnings.catch_warnings(), matplotlib.style.context(["default", LOOK | {"font.family": fonts}]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        canvas.draw()
    painted = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    for photograph, place in photographs:
        painted.paste(photograph, place)
    # compress runs of equal bytes only: as small as the default, in a fraction of its time
    with replacing(path) as file:
        painted.save(file, "PNG", dpi=(DPI, DPI), compress_type=zlib.Z_RLE)
