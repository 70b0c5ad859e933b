"""Draw contact sheets: image files or arrays side by side, with captions and class activation maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from ampscope.look import DPI, picture
from images.decode import Rules, try_decode
from reports.text import fit

# In pixels.
SIDE = 224  # largest height of an image; photographs are decoded at this size and shown pixel by pixel
GAP = 8  # beside an image
WIDTH = 6 * (SIDE + 2 * GAP)  # of a sheet with all its columns
LINE = 19  # of a caption
HEADLINE = 28  # line of the heading
LETTER = 16  # of the heading, with some reserve


def load_picture(path: Path, side: int, rules: Rules | None = None) -> np.ndarray | None:
    """Return an image as RGB array [height, width, 3] of at most `side` pixels; None if it cannot be read.

    It is shown as a network sees it that crops or pads its images, but not squashed.
    """
    pixels = try_decode(path, None if rules is None or rules.resize == "squash" else side, rules)
    if isinstance(pixels, str):
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


def enlarged(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    """Return an RGB array as an image that fits a box of this size, with sharp pixels from three times on."""
    image = Image.fromarray(pixels)
    factor = min(width / image.width, height / image.height)
    size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 3 else Image.Resampling.BICUBIC)


def labelled_sheet(
    images: Sequence[Path | np.ndarray],
    captions: list[str],
    path: Path,
    *,
    most: int = 60,
    heading: str = "",
    across: int = 6,
    rules: Rules | None = None,
) -> None:
    """Write a contact sheet of image files or RGB arrays with a caption over each; at most `most`, evenly chosen.

    matplotlib draws only the text. The images are pasted at their positions, because one panel per image takes 50 ms.
    """
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    shown = ["\n".join(fit(line, 24 * 6 // across) for line in captions[place].split("\n")) for place in chosen]
    columns = min(across, max(3, len(chosen)))
    cell = WIDTH // across
    width = columns * cell
    title = textwrap.wrap(heading, width // LETTER)
    top = len(title) * HEADLINE + (LINE if title else 0)
    above = GAP + LINE * max((caption.count("\n") + 1 for caption in shown), default=0)
    row = above + SIDE + GAP
    height = max(LINE, top + math.ceil(len(chosen) / columns) * row)
    photographs: list[tuple[Image.Image, tuple[int, int]]] = []
    with picture(path, width / DPI, height / DPI, photographs) as figure:

        def write(text: str, x: float, y: float, **style: Any) -> None:
            figure.text(x / width, 1 - y / height, text, **style)

        write("\n".join(title), GAP, GAP, va="top", fontsize=11, fontweight="bold")
        for number, (place, caption) in enumerate(zip(chosen, shown, strict=True)):
            middle = cell * (number % columns) + cell // 2
            upper = top + row * (number // columns) + above
            write(caption, middle, upper - GAP // 2, ha="center", va="bottom", fontsize=7.5)
            image = images[place]
            pixels = load_picture(image, SIDE, rules) if isinstance(image, Path) else image
            if pixels is None:
                note = f"cannot be read:\n{fit(image.name, 18)}"
                grey = {"facecolor": "#e8e8e8", "edgecolor": "none", "pad": 20}
                write(note, middle, upper + SIDE // 2, ha="center", va="center", fontsize=6.5, bbox=grey)
            else:
                photograph = enlarged(pixels, cell - 2 * GAP, SIDE)
                photographs.append((photograph, (middle - photograph.width // 2, upper)))


def with_map(pixels: np.ndarray, values: list[list[int]]) -> np.ndarray:
    """Return an RGB image beside a grey copy overlaid with its class activation map (rows of 0 to 255)."""
    size = (pixels.shape[1], pixels.shape[0])
    smooth = np.asarray(Image.fromarray(np.array(values, np.uint8)).resize(size, Image.Resampling.BILINEAR))
    colours = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
    grey = pixels.mean(2, keepdims=True)
    gap = np.full((pixels.shape[0], 4, 3), 255)
    return np.hstack([pixels, gap, 0.45 * grey + 0.55 * colours]).astype(np.uint8)


def explained_sheet(
    paths: list[Path],
    captions: list[str],
    maps: Sequence[list[list[int]] | None],
    path: Path,
    *,
    heading: str = "",
    rules: Rules | None = None,
) -> None:
    """Write a contact sheet with each image's class activation map beside it; an image without a map is shown alone."""
    images: list[Path | np.ndarray] = []
    for file, values in zip(paths, maps, strict=True):
        pixels = load_picture(file, SIDE, rules)
        images.append(file if pixels is None or values is None else with_map(pixels, values))
    labelled_sheet(images, captions, path, heading=heading, across=3, rules=rules)
