"""Decode an image file of any kind to an RGB uint8 array, by the same rules for every command. Imports no torch."""

from __future__ import annotations

import errno
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from images.walk import CAMERA_RAW, picture_formats
from system.machine import submitted

# Hide Pillow's warnings about odd files: only errors, and the limits of `Rules`, matter.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

BACKGROUND = (255, 255, 255)  # transparent pixels become white, as on paper and in most viewers
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

ORIENTATION = 0x0112
PHOTOMETRIC = 262  # tag of TIFF: 0 says that the smallest value is white
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Grey pictures deeper than 8 bits, by Pillow's mode, and the range of values that a file of the kind may use.
TYPE_WINDOWS = {"I;16": (0.0, 65535.0), "I": (0.0, 65535.0), "F": (0.0, 1.0)}
DEEP = {"I;16": "16-bit grey pictures", "I": "32-bit grey pictures", "F": "floating-point grey pictures"}
NO_DEEP = "--window changes nothing: no picture here has more than 8 bits"


@dataclass(frozen=True)
class Rules:
    """The rules that turn files into pixels: the largest size in megapixels, windows of deep grey pictures, the filter.

    `windows` gives for a mode ("I;16", "I" or "F") the values that become black and white. Modes without an entry use
    the range of their type. `interpolation` names Pillow's filter for resizing, bilinear or bicubic. `resize` says how
    a picture becomes square: squash it, crop its middle, or pad it with black.
    """

    max_megapixels: float = 179.0  # Pillow refuses a larger file as a decompression bomb
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    interpolation: str = "bilinear"
    resize: str = "squash"

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> Rules:
        """Return the rules that a checkpoint, a config.json or a cache's notes record; defaults for what they lack."""
        windows = {mode: (float(low), float(high)) for mode, (low, high) in (record.get("windows") or {}).items()}
        given = {name: record[name] for name in ("max_megapixels", "interpolation", "resize") if name in record}
        return cls(windows=windows, **given)

    def window(self, mode: str) -> tuple[float, float]:
        """Return the values that become black and white in pictures of a deep mode."""
        low, high = self.windows.get(mode, TYPE_WINDOWS[mode])
        return float(low), float(high)

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of a picture of this size before it is resized: a squashed one keeps them."""
        if self.resize == "squash":
            return size
        side = min(size) if self.resize == "crop" else max(size)
        return side, side

    def described(self, modes: Iterable[str]) -> list[str]:
        """Return a sentence about the window of each of these deep modes."""
        shown = {mode: self.window(mode) for mode in modes}
        return [f"{DEEP[mode]}: {low:g} becomes black, {high:g} white" for mode, (low, high) in shown.items()]

    @property
    def identity(self) -> str:
        """Return a text that identifies these rules: images decoded by other rules are different."""
        return f"{DECODER}; {sorted(asdict(self).items())}"


def windows_of(text: str) -> dict[str, tuple[float, float]]:
    """Return the windows of --window: LOW,HIGH for all modes; an empty dictionary for `type` and `data`."""
    if text in ("data", "type"):
        return {}
    low, high = map(float, text.split(","))
    return dict.fromkeys(TYPE_WINDOWS, (low, high))


DECODER = f"rgb uint8, upright, on white; Pillow {PIL.__version__}; v4"


def deep_mode(mode: str) -> str | None:
    """Return "I;16", "I" or "F" for a grey picture deeper than 8 bits; None for all others."""
    if mode.startswith("I;16"):
        return "I;16"
    return mode if mode in ("I", "F") else None


@dataclass(frozen=True)
class Header:
    """The facts in a file that are known before decoding; `size` is (height, width) of the upright picture."""

    size: tuple[int, int]
    mode: str
    several: bool  # it has several frames or pages; the first is used
    transparent: bool = False  # it has a band or a colour for transparency


def read_header(path: Path, rules: Rules) -> Header | None:
    """Return the header of an image file; None if it cannot be read."""
    header = _or_reason(_read_header, path, rules)
    return None if isinstance(header, str) else header


def _read_header(path: Path, rules: Rules) -> Header:
    with _open(path, rules) as image:
        turned = image.format != "TIFF" and _early_orientation(image) >= 5  # Pillow reports the upright size of a TIFF
        width, height = reversed(image.size) if turned else image.size
        several = False
        with suppress(Exception):  # damaged frames
            several = _holds_several(image)
        return Header((height, width), image.mode, several, image.has_transparency_data)


def _holds_several(image: Image.Image) -> bool:
    """Return True if a file contains further pictures that are not made from the first.

    Phones add gain maps and views (MPO), programs add layers (PSD), and TIFF files contain smaller copies of the first.
    """
    if image.format in ("MPO", "PSD") or not getattr(image, "is_animated", False):
        return False
    if image.format == "TIFF":
        image.seek(1)
        return not _is_reduced(image)
    return True


def _is_reduced(image: Image.Image) -> bool:
    """Return True if a TIFF marks the current picture as a reduced version of another one in the file."""
    subfile_type = 254
    return bool(getattr(image, "tag_v2", {}).get(subfile_type, 0) & 1)


def decode(path: Path, limit: int | None = None, rules: Rules | None = None) -> np.ndarray:
    """Decode the first picture of a file to RGB uint8 (height, width, 3), upright by its EXIF orientation.

    Resize a picture with a side above `limit` pixels to `limit` square, with Pillow's antialiased filter; keep a
    smaller one as it is, but crop or pad it to a square if `rules` say so. Raise OSError, ValueError or another of
    Pillow's errors if the file is not a whole image, or is larger than `rules` allow.
    """
    rules = rules or Rules()
    with _open(path, rules) as image:
        if limit is None or max(rules.shape(image.size)) <= limit:
            return np.asarray(squared(to_rgb(shown(image), rules.window), rules.resize))
        resampling = Image.Resampling[rules.interpolation.upper()]
        return np.asarray(resized(image, limit, resampling, rules.window, rules.resize))


def resized(
    image: Image.Image,
    side: int,
    resampling: Image.Resampling,
    window: Callable[[str], tuple[float, float]],
    resize: str,
) -> Image.Image:
    """Return an opened picture as RGB, upright, `side` pixels square; `window` is that of `to_rgb`."""
    width, height = image.size
    # Decode a JPEG photograph at 1/2, 1/4 or 1/8, but at least at twice `side`. Small files gain nothing.
    if min(width, height) >= 4 * side and width * height > 1_000_000:
        reduced = image.draft(None, (2 * side, 2 * side))
        if reduced and resize == "squash":
            box = reduced[1]  # the last row and column may cover less than a whole pixel
            return upright(to_rgb(image, window).resize((side, side), resampling, box))
    image = to_rgb(shown(image), window)
    if resize == "pad":  # after resizing: the square of a long picture would take much memory
        factor = side / max(image.size)
        image = image.resize((round(factor * image.width) or 1, round(factor * image.height) or 1), resampling)
    image = squared(image, resize)
    return image if image.size == (side, side) else image.resize((side, side), resampling)


def squared(image: Image.Image, resize: str) -> Image.Image:
    """Return the middle of a picture (`crop`), the picture between black borders (`pad`), or all of it (`squash`)."""
    if resize == "squash":
        return image
    side = min(image.size) if resize == "crop" else max(image.size)
    left = int((image.width - side) / 2)
    top = int((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))  # outside of the picture Pillow fills with black


def _open(path: Path, rules: Rules) -> Image.Image:
    if path.suffix.lower() in CAMERA_RAW:
        raise ValueError("camera raw, which is not read: convert it to TIFF or JPEG")
    pixels = rules.max_megapixels * 1e6
    Image.MAX_IMAGE_PIXELS = int(pixels / 2)  # Pillow refuses twice as many, also in pictures within pictures
    try:
        image = Image.open(path, formats=picture_formats())
    except UnidentifiedImageError:
        if not _is_heif(path):
            raise
        _use_heif_plugin()
        image = Image.open(path, formats=picture_formats())
    if image.width * image.height > pixels:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    problem = _unfit(image)
    if problem:
        image.close()
        raise ValueError(problem)
    return image


def _unfit(image: Image.Image) -> str:
    """Return the reason why Pillow would read another picture than the TIFF shows; an empty string if it would not."""
    tags = getattr(image, "tag_v2", {})
    bands = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    if bands > 4 and image.mode != "CMYK":
        return f"{bands} bands: save three of them as RGB"
    lower_pictures = 330  # the tag of the full picture in camera raw files
    if _is_reduced(image) and (lower_pictures in tags or getattr(image, "n_frames", 1) > 1):
        return "its first picture is a preview, as in camera raw: save the full picture alone"
    return ""


def _kind_of_tiff(path: Path) -> str:
    """Describe a file that Pillow does not recognise: the kind of TIFF, or that the format is unknown."""
    with suppress(Exception), path.open("rb") as file:
        start = file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(start + (file.read(8) if start[2] == 43 else b""))  # 43: BigTIFF
        file.seek(tags.next)
        tags.load(file)
        bands = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        return (
            f"a TIFF of {bands} {'band' if bands == 1 else 'bands'} of {bits} bits, which is not read: save it as RGB"
        )
    return "no image, or of a kind that is not read"


def _is_heif(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS


def _use_heif_plugin() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("HEIC needs a plugin: pip install pillow-heif") from None
    register_heif_opener()


def _early_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation without decoding; 1 if it follows the pixels, or is damaged."""
    with suppress(Exception):
        if "exif" in image.info or image.format != "PNG":
            return int(image.getexif().get(ORIENTATION, 1))
    return 1


def upright(image: Image.Image) -> Image.Image:
    """Return the picture turned as its EXIF orientation says, or as it is if that cannot be read."""
    orientation = 1
    with suppress(Exception):
        orientation = int(image.getexif().get(ORIENTATION, 1))
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def shown(image: Image.Image) -> Image.Image:
    """Return the picture upright, and with black as its smallest value: Pillow inverts TIFF up to 8 bits alone."""
    turned = upright(image)
    if deep_mode(image.mode) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
        values = np.asarray(turned)
        return Image.fromarray(1 - values if values.dtype.kind == "f" else ~values)
    return turned


def to_rgb(image: Image.Image, window: Callable[[str], tuple[float, float]]) -> Image.Image:
    """Return a picture of any mode as RGB; `window` gives for a deep grey mode the values of black and white."""
    deep = deep_mode(image.mode)
    if deep:  # Pillow's own conversion would clip at 255
        low, high = window(deep)
        values = np.nan_to_num(np.asarray(image, np.float64), nan=low)
        grey = np.rint((values - low) * (255 / max(high - low, 1e-300))).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None: done in place
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def try_decode(path: Path, limit: int | None, rules: Rules | None = None) -> np.ndarray | str:
    """Return the decoded image, or the reason why it cannot be read."""
    return _or_reason(decode, path, limit, rules or Rules())


def value_range(path: Path, rules: Rules) -> tuple[str, float, float] | str | None:
    """Return (mode, smallest, largest finite value) of a deep grey picture, None, or why it is unreadable."""
    return _or_reason(_value_range, path, rules)


def _value_range(path: Path, rules: Rules) -> tuple[str, float, float] | None:
    with _open(path, rules) as image:
        image.load()
        mode = deep_mode(image.mode)
        if mode is None:
            return None
        values = np.asarray(shown(image))
        values = values[np.isfinite(values)]
        return (mode, float(values.min()), float(values.max())) if values.size else None


def is_transparent(path: Path, rules: Rules) -> bool:
    """Return True if any pixel of a picture is transparent; False if it cannot be read."""
    return _or_reason(_is_transparent, path, rules) is True


def _is_transparent(path: Path, rules: Rules) -> bool:
    with _open(path, rules) as image:
        image.load()
        opacity = np.asarray(image.convert("RGBA").getchannel("A"))
        return bool(opacity.min() < 255)


def _or_reason(function: Callable, path: Path, *arguments: Any) -> Any:
    """Return the result of `function`, or in one line the reason why it raised."""
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait, reading a device would not end
            return "not a regular file"
        return function(path, *arguments)
    except UnidentifiedImageError:
        return "an empty file" if path.stat().st_size == 0 else _kind_of_tiff(path)
    except Image.DecompressionBombError as error:
        return f"larger than --max_megapixels allows ({str(error).splitlines()[0][:80]})"
    except FileNotFoundError:
        return "a link to a file that does not exist" if path.is_symlink() else "the file does not exist"
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # the process's fault, not the file's
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable, count: int) -> Iterator[Any]:
    """Yield the results of a function in the order of the items, computed by a pool at most `count` items ahead."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(submitted(pool, function, item))
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
