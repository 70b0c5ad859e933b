"""Decode a listing once and keep the result with checksums, or find an earlier result. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from images.cache_files import cache_folder, limit_caches, only_builder
from images.decode import Header, Rules, ahead, deep_mode, read_header, try_decode, value_range
from system.files import atomic_write, json_text, remove
from system.machine import available_memory, cores
from utils import log, progress_bar


@dataclass
class Opening:
    """The way to open files: where decoded images are kept, and the rules that turn files into pixels."""

    cache: str = "auto"  # auto, memory or none
    workers: int | None = None  # None: one a core, at most 8
    pin: bool = False  # prepare batches in page-locked memory for a CUDA device
    cache_limit: float = math.inf  # GB
    rules: Rules = field(default_factory=Rules)
    skip_unreadable: bool = False  # leave out images that cannot be read, instead of raising UserError
    own_window: bool = False  # use the range of the training images for windows that `rules` leave open
    own: set[Path] = field(default_factory=set)  # caches of this data set, which `cache_limit` never removes

    def __post_init__(self) -> None:
        if self.workers is None:
            self.workers = min(8, cores())


def file_state(path: Path) -> tuple[int, int, int]:
    """Return a file's size and times. They change with its content; no program can set the last one (ctime) back."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass
class Kept:
    """The facts known about a listing's images after reading each: KEY.json, beside the images themselves in KEY.npy.

    `box` is the (height, width) that holds each of them; `shapes` their own (count, 2), None if all fill it. `several`
    counts the files that contain several pictures; `deep` lists the modes of deep grey pictures.
    """

    box: tuple[int, int]
    rules: Rules
    shapes: np.ndarray | None = None
    several: int = 0
    deep: list[str] = field(default_factory=list)
    crc32: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    unreadable: dict[int, str] = field(default_factory=dict)
    array: np.ndarray | None = None  # None: streamed, or not kept in a file

    def shape(self, count: int) -> tuple[int, int, int, int]:
        return count, *self.box, 3

    def own(self, array: np.ndarray, position: int) -> np.ndarray:
        """Return the image at a position of the array, without padding."""
        image = array[position]
        if self.shapes is None:
            return image
        height, width = self.shapes[position]
        return np.ascontiguousarray(image[:height, :width])


class _OtherShape(Exception):
    """A decoded image has another size than its header says."""


def make_room(root: Path, opening: Opening) -> None:
    """Remove the least recently used caches of other data sets and sizes beyond `opening.cache_limit`.

    Call it when all parts are open.
    """
    limit_caches(cache_folder(root), opening.cache_limit * 2**30, keep=opening.own)


def checksums(paths: list[Path], root: Path, limit: int, opening: Opening) -> np.ndarray:
    """Return the CRC-32 of each image (count,) as `open_store` would keep it with that limit; keep no pixels."""
    return decoded(paths, root, limit, replace(opening, cache="none", own_window=False)).crc32


def decoded(paths: list[Path], root: Path, limit: int, opening: Opening, part: str = "") -> Kept:
    """Return the facts about a listing's images: found in the cache folder, or decoded now.

    `part` begins the log messages.
    """
    workers = opening.workers or 0
    states = [file_state(path) for path in paths]
    identity = [opening.rules.identity, opening.own_window, limit, [str(root.resolve()), *map(str, paths)], states]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    file = cache_folder(root) / f"{key}.npy"
    with only_builder(file.with_suffix(".lock")):
        kept = read_notes(file, len(paths))
        plan = kept or survey(paths, limit, opening.rules, opening.own_window, workers)
        others = sum(each.stat().st_size for each in opening.own - {file} if each.exists())
        size = math.prod(plan.shape(len(paths)))
        streamed = _is_streamed(opening.cache, size, opening.cache_limit * 2**30 - others)
        if kept and not streamed:
            kept.array = map_array(file, kept, workers, part)
        if kept is None or (kept.array is None and not streamed):
            kept = build_cache(file, paths, plan, limit, streamed=streamed, workers=workers, part=part)
    opening.own.add(file)
    return kept


def _is_streamed(cache: str, size: int, room: float) -> bool:
    """Return True if images are decoded in each epoch: on request, or if memory or the room for caches is too small."""
    memory = available_memory()
    memory = 4 * 2**30 if memory is None else memory
    return cache == "none" or (cache == "auto" and size > min(0.6 * memory, room))


def read_notes(file: Path, count: int) -> Kept | None:
    """Return the facts in KEY.json about `count` images; None if it is missing or damaged."""
    try:
        notes = json.loads(file.with_suffix(".json").read_text())
        shapes = notes["shapes"]
        kept = Kept(
            (int(notes["box"][0]), int(notes["box"][1])),
            Rules.recorded(notes),
            None if shapes is None else np.array(shapes, np.int64).reshape(count, 2),
            int(notes["several"]),
            [str(mode) for mode in notes["deep"]],
            np.array(notes["crc32"], np.uint32).reshape(count),
            {int(position): str(reason) for position, reason in notes["unreadable"].items()},
        )
        os.utime(file.with_suffix(".json"))  # the last use, which decides which caches are kept
        return kept
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        log.info(f"the cache {file} is damaged ({error}); decoding again")
        return None


def map_array(file: Path, kept: Kept, workers: int, part: str) -> np.ndarray | None:
    """Return the decoded images in KEY.npy; None if it is missing or its checksums differ."""
    shape = kept.shape(len(kept.crc32))
    try:
        array: np.ndarray = np.load(file, mmap_mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError("another shape")
        with ThreadPoolExecutor(max(1, workers)) as pool:
            whole = range(len(array))
            sums = ahead(pool, lambda position: zlib.crc32(kept.own(array, position).data), whole, 64 * workers)
            found = np.fromiter(sums, np.uint32, len(array))
        found[list(kept.unreadable)] = 0
        if not np.array_equal(found, kept.crc32):
            raise ValueError("checksums differ")
        log.info(f"{part}images: {described(shape)}, mapped from {file}")
        return array
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.info(f"the cache {file} is damaged ({error}); decoding again")
        return None


def survey(paths: list[Path], limit: int, rules: Rules, own_window: bool, workers: int) -> Kept:
    """Read the files' headers; return the box that holds all images, and the windows of deep grey pictures.

    Images up to `limit` pixels keep their size, or are made square as `rules` say; larger ones are resized to `limit`
    square. With `own_window`, windows
    missing in `rules` are the range of the values in these files.
    """
    headers: list[Header | None] = []
    with ThreadPoolExecutor(max(1, workers)) as pool, _bar(paths, "reading headers") as bar:
        for header in ahead(pool, lambda path: read_header(path, rules), paths, 64 * workers):
            headers.append(header)
            bar.update(1)
    known = [header for header in headers if header is not None]
    shapes_read = {rules.shape(header.size) for header in known}
    sizes = {shape if max(shape) <= limit else (limit, limit) for shape in shapes_read} or {(limit, limit)}
    box = max(height for height, _ in sizes), max(width for _, width in sizes)
    deep = [path for path, header in zip(paths, headers, strict=True) if header and deep_mode(header.mode)]
    if deep and own_window:
        rules = replace(rules, windows=_ranges(deep, rules, workers) | rules.windows)
    shapes = np.zeros((len(paths), 2), np.int64) if len(sizes) > 1 else None
    modes = {deep_mode(header.mode) for header in known} - {None}
    return Kept(box, rules, shapes, sum(header.several for header in known), sorted(map(str, modes)))


def _ranges(paths: list[Path], rules: Rules, workers: int) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of each deep mode over all files."""
    ranges: dict[str, tuple[float, float]] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool, _bar(paths, "reading values") as bar:
        for found in ahead(pool, lambda path: value_range(path, rules), paths, 2 * workers):
            bar.update(1)
            if isinstance(found, tuple):
                mode, low, high = found
                before = ranges.get(mode, (low, high))
                ranges[mode] = min(low, before[0]), max(high, before[1])
    return ranges


def _bar(paths: list[Path], what: str) -> Any:
    return progress_bar(total=len(paths), desc=what, unit="image", delay=2)


def build_cache(
    file: Path, paths: list[Path], kept: Kept, limit: int, *, streamed: bool, workers: int, part: str
) -> Kept:
    """Decode every image into a cache file, or into memory if the disk is too small; only check streamed ones.

    `part` begins the log message.
    """
    remove(*file.parent.glob(f".{file.stem}.*.tmp"))  # of killed builders: a living one holds the lock
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    started = time.perf_counter()
    try:
        try:
            kept = _decode_all(temporary, paths, kept, limit, streamed, workers)
        except _OtherShape:
            free = replace(kept, box=(limit, limit), shapes=np.zeros((len(paths), 2), np.int64))
            kept = _decode_all(temporary, paths, free, limit, streamed, workers)
        mapped = isinstance(kept.array, np.memmap)
        done = "checked" if streamed else f"decoded into {file if mapped else 'memory'}"
        seconds = time.perf_counter() - started
        log.info(f"{part}images: {described(kept.shape(len(paths)))}, {done} in {seconds:.1f} s")
        if streamed or mapped:
            write_notes(file, kept, paths[0].absolute().parent)
        if mapped:
            kept.array = None
            place = temporary  # Windows cannot move a mapped file
            with suppress(OSError):  # without waiting for the disk: after a power cut the checksum fails
                os.replace(temporary, file)
                place = file
            kept.array = np.load(place, mmap_mode="r")
    finally:
        remove(temporary)
    return kept


def write_notes(file: Path, kept: Kept, images_in: Path) -> None:
    """Write KEY.json; `images_in` is the folder of the first image."""
    notes = {
        "images_in": str(images_in),
        "box": kept.box,
        "shapes": None if kept.shapes is None else kept.shapes.tolist(),
        "max_megapixels": kept.rules.max_megapixels,
        "windows": kept.rules.windows,
        "interpolation": kept.rules.interpolation,
        "resize": kept.rules.resize,
        "several": kept.several,
        "deep": kept.deep,
        "crc32": kept.crc32.tolist(),
        "unreadable": kept.unreadable,
    }
    with suppress(OSError), atomic_write(file.with_suffix(".json")) as handle:
        handle.write(json_text(notes).encode())


def _allocate(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array in a new .npy file, or in memory if the disk has no room.

    Reserve its blocks: a full disk must show here, not as SIGBUS later.
    """
    try:
        if shutil.disk_usage(file.parent).free < math.prod(shape) + 2**28:
            raise OSError(errno.ENOSPC, "not enough free disk space")
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(file, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, os.path.getsize(file))
        return array
    except OSError as error:
        log.info(f"no cache of decoded images ({error.strerror}: {file.parent}); keeping them in memory")
        remove(file)
        return np.zeros(shape, np.uint8)


def _decode_all(temporary: Path, paths: list[Path], kept: Kept, limit: int, streamed: bool, workers: int) -> Kept:
    """Decode every path with threads, into an array unless streamed; return `kept` with the results.

    Raise _OtherShape if an image does not fit the box, or does not fill it although all images should.
    """
    array = None if streamed else _allocate(temporary, kept.shape(len(paths)))
    crc32 = np.zeros(len(paths), np.uint32)
    unreadable = {}

    def some(start: int) -> int:  # a task per image costs a tenth of the speed
        positions = range(start, min(start + 16, len(paths)))
        for position in positions:
            image = try_decode(paths[position], limit, kept.rules)
            if isinstance(image, str):
                unreadable[position] = image
                continue
            height, width = image.shape[:2]
            fits = height <= kept.box[0] and width <= kept.box[1]
            if not fits or (kept.shapes is None and (height, width) != kept.box):
                raise _OtherShape
            crc32[position] = zlib.crc32(image.data)
            if kept.shapes is not None:
                kept.shapes[position] = height, width
            if array is not None:
                array[position, :height, :width] = image
        return len(positions)

    workers = max(1, workers)
    with ThreadPoolExecutor(workers) as pool, progress_bar(total=len(paths), desc="decoding", unit="image") as bar:
        for done in ahead(pool, some, range(0, len(paths), 16), 2 * workers):  # after Ctrl-C these few are finished
            bar.update(done)
    return replace(kept, array=array, crc32=crc32, unreadable=dict(sorted(unreadable.items())))


def described(shape: tuple[int, ...]) -> str:
    count, height, width, _ = shape
    return f"{count:,} of {width}x{height} pixels ({math.prod(shape) / 2**20:,.0f} MB)"
