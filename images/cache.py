"""Decoded images kept in a file, checked against checksums, and built by one process at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from images.decode import ahead, try_decode
from utils import atomic_write, lock, log, progress, remove


def file_state(path: Path) -> tuple[int, int, int]:
    """What changes with a file's content: the time of the last change cannot be set back as that of writing can."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


# KEY.npy holds the decoded images, KEY.json their checksums and what could not be read; streamed images have the
# second file alone.
Kept = tuple[np.ndarray | None, np.ndarray, dict[int, str]]


def cache_folder(root: Path) -> Path:
    """Where decoded images are kept: inside the data folder, or the user's cache where that is read-only."""
    inside = root / ".cache"
    with suppress(OSError):
        inside.mkdir(exist_ok=True)
        if os.access(inside, os.W_OK):
            return inside
    outside = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "amp-train"
    with suppress(OSError):
        outside.mkdir(parents=True, exist_ok=True)
    return outside


@contextmanager
def only_builder(file: Path) -> Iterator[None]:
    """One builder of a cache at a time, on this machine; the others wait and then find it built."""
    try:
        handle = open(file, "w")  # noqa: SIM115 (held while the lock is)
    except OSError:  # where no lock can be written no cache can
        yield
        return
    with handle:
        if not lock(handle):
            log.info("another process is decoding the images; waiting for it")
            lock(handle, wait=True)
        yield


def read_cache(file: Path, shape: tuple[int, ...], streamed: bool, workers: int) -> Kept | None:
    """What an earlier run kept, if it is there and whole."""
    try:
        notes = json.loads(file.with_suffix(".json").read_text())
        crc32 = np.array(notes["crc32"], np.uint32)
        unreadable = {int(position): str(reason) for position, reason in notes["unreadable"].items()}
        if crc32.shape != shape[:1]:
            raise ValueError("another number of images")
        if streamed:
            return None, crc32, unreadable
        array = np.load(file, mmap_mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError("another shape")
        with ThreadPoolExecutor(max(1, workers)) as pool:
            found = np.fromiter(pool.map(zlib.crc32, array), np.uint32, len(array))
        found[list(unreadable)] = 0
        if not np.array_equal(found, crc32):
            raise ValueError("checksums differ")
        log.info(f"images: {_described(shape)}, mapped from {file}")
        return array, crc32, unreadable
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        IndexError,
        EOFError,
        RecursionError,
    ) as error:
        log.info(f"the cache {file} is damaged ({error}); decoding again")
        return None


def build_cache(file: Path, paths: list[Path], shape: tuple[int, ...], streamed: bool, workers: int) -> Kept:
    """Decodes every image into a cache file, or into memory where there is no room; streamed ones are only checked."""
    remove(*file.parent.glob(f".{file.stem}.*.tmp"))  # of builders that were killed: a living one holds the lock
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    started = time.perf_counter()
    try:
        array = None if streamed else _allocate(temporary, shape)
        crc32, unreadable = _decode_into(array, paths, (shape[1], shape[2]), workers)
        done = "checked" if streamed else f"decoded into {file if isinstance(array, np.memmap) else 'memory'}"
        log.info(f"images: {_described(shape)}, {done} in {time.perf_counter() - started:.1f} s")
        if streamed or isinstance(array, np.memmap):
            with suppress(OSError), atomic_write(file.with_suffix(".json")) as notes:
                notes.write(json.dumps({"crc32": crc32.tolist(), "unreadable": unreadable}).encode())
        if isinstance(array, np.memmap):
            array = None
            kept = temporary  # Windows moves no file that is mapped
            with suppress(OSError):  # not waiting for the disk: what a power cut loses fails its checksum
                os.replace(temporary, file)
                kept = file
            array = np.load(kept, mmap_mode="r")
    finally:
        remove(temporary)
    return array, crc32, unreadable


def _allocate(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a new .npy file, its blocks reserved (a full disk shows here, not as SIGBUS); else in memory."""
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
        return np.empty(shape, np.uint8)


def _decode_into(
    array: np.ndarray | None, paths: list[Path], size: tuple[int, int], workers: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes every path with threads into `array` (or nowhere); returns checksums and unreadable ones."""
    crc32 = np.zeros(len(paths), np.uint32)
    unreadable = {}

    def some(start: int) -> int:  # a task for each image costs a tenth of the speed
        positions = range(start, min(start + 16, len(paths)))
        for position in positions:
            image = try_decode(paths[position], size)
            if isinstance(image, str):
                unreadable[position] = image
                continue
            crc32[position] = zlib.crc32(image.data)
            if array is not None:
                array[position] = image
        return len(positions)

    workers = max(1, workers)
    with ThreadPoolExecutor(workers) as pool, progress(total=len(paths), desc="decoding", unit="image") as bar:
        for done in ahead(pool, some, range(0, len(paths), 16), 2 * workers):  # after Ctrl-C these few are finished
            bar.update(done)
    return crc32, dict(sorted(unreadable.items()))


def _described(shape: tuple[int, ...]) -> str:
    count, height, width, _ = shape
    return f"{count:,} at {width}x{height} ({math.prod(shape) / 2**20:,.0f} MB)"
