"""One image file of any mode to an RGB uint8 array. Imports no torch."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

DECODER = f"rgb uint8, bilinear, exif; Pillow {PIL.__version__}; v1"

# A file that unpacks to a hundred million pixels is an attack or an accident: `decode` refuses what Pillow warns of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image of any mode to RGB uint8 (height, width, 3), upright by its EXIF orientation.

    `size` is (height, width); Pillow's bilinear filter is antialiased when it reduces.
    Raises OSError, ValueError or Image.DecompressionBombError for what is not a whole image.
    """
    with Image.open(path) as image:
        limit = Image.MAX_IMAGE_PIXELS  # a program that uses this one may have taken it away
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        upright = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
        rgb = _to_rgb(upright)
        if size is not None and rgb.size != (size[1], size[0]):
            rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey: Pillow's own conversion would clip at 255
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(np.nan_to_num(values).max()))
        image = Image.fromarray(np.nan_to_num(values * (255 / top)).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def try_decode(path: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """The decoded image, or the reason in words why it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for, a device read without end
            return "not a regular file"
        return decode(path, size)
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def stored_size(paths: Sequence[Path], limit: int) -> tuple[int, int]:
    """(height, width) at which a listing is kept decoded: its common size, or `limit` square.

    The size that nine in ten of 100 evenly spaced images share is kept as it is while it is no larger
    than `limit`, so that small images stay small in memory and are enlarged on the device.
    """
    images = (try_decode(path, None) for path in paths[:: max(1, len(paths) // 100)])
    sizes = Counter(image.shape[:2] for image in images if not isinstance(image, str))
    if sizes:
        ((size, count),) = sizes.most_common(1)
        if count >= 0.9 * sizes.total() and max(size) <= limit:
            return size
    return limit, limit


def ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable, count: int) -> Iterator[Any]:
    """`map` by a pool, in order, at most `count` results ahead of their reader."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
