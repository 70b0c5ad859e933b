"""Contact sheets: image files or arrays side by side, a caption over each, with their class activation maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from images.decode import Rules, try_decode
from reports.look import picture
from reports.text import fit


def load_picture(path: Path, side: int, rules: Rules | None = None) -> np.ndarray | None:
    """An image as RGB array [height, width, 3] of at most `side` pixels, None when it cannot be read."""
    pixels = try_decode(path, None, rules)
    if isinstance(pixels, str):
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


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
    """A contact sheet of image files or RGB arrays with a caption over each; at most `most`, evenly chosen."""
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    columns = min(across, max(3, len(chosen)))
    rows = max(1, math.ceil(len(chosen) / columns))
    with picture(path, 1.85 * 6 / across * columns, 2.2 * rows + 0.5 * bool(heading)) as figure:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.axis("off")
        for axes, place in zip(figure.axes, chosen, strict=False):
            image = images[place]
            pixels = load_picture(image, 224, rules) if isinstance(image, Path) else image
            axes.imshow(np.full((100, 100, 3), 232, dtype=np.uint8) if pixels is None else pixels)
            if pixels is None:
                text = f"cannot be read:\n{fit(image.name, 18)}"
                axes.text(50, 50, text, ha="center", va="center", fontsize=7)
            caption = "\n".join(fit(line, 24 * 6 // across) for line in captions[place].split("\n"))
            axes.set_title(caption, fontsize=8.5, fontweight="normal", loc="center")


def with_map(pixels: np.ndarray, values: list[list[int]]) -> np.ndarray:
    """An RGB image beside itself with a class activation map (rows of 0 to 255) over it: where it is bright."""
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
    """A contact sheet with each image's class activation map beside it; an image without a map stands alone."""
    images: list[Path | np.ndarray] = []
    for file, values in zip(paths, maps, strict=True):
        pixels = load_picture(file, 224, rules)
        images.append(file if pixels is None or values is None else with_map(pixels, values))
    labelled_sheet(images, captions, path, heading=heading, across=3, rules=rules)
