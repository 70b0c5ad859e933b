"""Decode once: image files of any mode to uint8 arrays, mapped from a cache file or streamed by workers.

Decoding is the slowest thing a loader does, so it is done once and kept; what is kept is checked against
checksums. Knows nothing of classes, labels, splits or the device.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from utils import RunError, atomic_write, cores, linux_memory, lock, printable, progress, remove

DECODER = f"rgb uint8, bilinear, exif; Pillow {PIL.__version__}; v1"

# A file that unpacks to a hundred million pixels is an attack or an accident: `decode` refuses what Pillow warns of.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


# ---------------------------------------------------------------------------------- decoding
def decode(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image of any mode to RGB uint8 (height, width, 3), upright by its EXIF orientation.

    `size` is (height, width); Pillow's bilinear filter is antialiased when it reduces.
    Raises OSError, ValueError or Image.DecompressionBombError for what is not a whole image.
    """
    with Image.open(path) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
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
        (size, count), = sizes.most_common(1)
        if count >= 0.9 * sizes.total() and max(size) <= limit:
            return size
    return limit, limit


# ------------------------------------------------------------------------------ image stores
@dataclass
class DecodedImages:
    """All images decoded, in one array (count, height, width, 3), usually mapped from a cache file."""

    array: np.ndarray
    crc32: np.ndarray
    unreadable: dict[int, str]
    pin: bool = False

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """One uint8 tensor (len(batch), height, width, 3) for each array of listing positions."""
        if not self.pin:  # the CPU computes the step itself: a thread would only take a core from it
            yield from map(self._gather, batches)
            return
        with ThreadPoolExecutor(1) as pool:
            yield from ahead(pool, self._gather, batches, 2)

    def _gather(self, batch: np.ndarray) -> torch.Tensor:
        images = torch.empty((len(batch), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=self.pin)
        np.take(self.array, batch, axis=0, out=images.numpy(), mode="clip")
        return images


class StreamedImages:
    """Images decoded when they are asked for, by DataLoader workers; memory is a few batches."""

    def __init__(self, paths: list[Path], size: tuple[int, int], crc32: np.ndarray, unreadable: dict[int, str],
                 *, workers: int, pin: bool):
        self.crc32, self.unreadable = crc32, unreadable
        self._order: list[list[int]] = []  # of the epoch that comes: workers stay from one to the next
        self._loader = torch.utils.data.DataLoader(
            _Files(paths, size), sampler=self._order, batch_size=None, num_workers=workers, pin_memory=pin,
            persistent_workers=workers > 0, worker_init_fn=_quiet_worker,
        )

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """As `DecodedImages.batches`. Raises RunError where a file can no longer be read."""
        self._order[:] = [batch.tolist() for batch in batches]
        for batch in self._loader:
            if isinstance(batch, str):
                raise RunError(f"{batch}\nRestore the file, then go on with --resume.")
            yield batch


ImageStore = DecodedImages | StreamedImages


@dataclass
class _Files(torch.utils.data.Dataset):
    paths: list[Path]
    size: tuple[int, int]

    def __getitem__(self, batch: list[int]) -> torch.Tensor | str:
        """A batch, or why it cannot be made: an exception would bring its worker's traceback along."""
        images = [try_decode(self.paths[position], self.size) for position in batch]
        for image, position in zip(images, batch, strict=True):
            if isinstance(image, str):
                return f"{printable(self.paths[position])} can no longer be read: {printable(image)}"
        return torch.from_numpy(np.stack(images))


def _quiet_worker(_worker: int) -> None:
    """Signals to the whole group are the main process's to handle; a second SIGTERM still ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable, count: int) -> Iterator[Any]:
    """`map` by a pool, in order, at most `count` results ahead of their reader."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def open_store(
    paths: list[Path], root: Path, *, limit: int, cache: str = "auto", workers: int | None = None, pin: bool = False,
    log: Callable[[str], None] = print,
) -> ImageStore:
    """Decodes a listing, or finds it decoded by an earlier run, as `cache` says (auto, memory, none).

    `limit` is the largest side kept, in pixels. Every image is read once whatever the mode, so that
    unreadable ones are known (`store.unreadable`: listing position to reason) before training starts.
    """
    workers = min(8, cores()) if workers is None else workers
    size = stored_size(paths, limit)
    shape = (len(paths), *size, 3)
    identity = [DECODER, size, [str(root.resolve()), *map(str, paths)], [_stat(path) for path in paths]]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    memory = linux_memory("/proc/meminfo", "MemAvailable") or 4 * 2**30
    streamed = cache == "none" or (cache == "auto" and math.prod(shape) > 0.6 * memory)
    file = cache_folder(root) / f"{key}.npy"
    with _only_builder(file.with_suffix(".lock"), log):
        kept = _read_cache(file, shape, streamed, workers, log)
        array, crc32, unreadable = kept or _build_cache(file, paths, shape, streamed, workers, log)
    if not streamed:
        return DecodedImages(array, crc32, unreadable, pin)
    log(f"images: {len(paths):,} streamed through {workers} workers at {size[1]}x{size[0]}")
    return StreamedImages(paths, size, crc32, unreadable, workers=workers, pin=pin)


def _stat(path: Path) -> tuple[int, int, int]:
    """What changes with a file's content: the time of the last change cannot be set back as that of writing can."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ------------------------------------------------------------------------------------- cache
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
def _only_builder(file: Path, log) -> Iterator[None]:
    """One builder of a cache at a time, on this machine; the others wait and then find it built."""
    try:
        handle = open(file, "w")  # noqa: SIM115 (held while the lock is)
    except OSError:  # where no lock can be written no cache can
        yield
        return
    with handle:
        if not lock(handle):
            log("another process is decoding the images; waiting for it")
            lock(handle, wait=True)
        yield


def _read_cache(file: Path, shape: tuple[int, ...], streamed: bool, workers: int, log) -> Kept | None:
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
        log(f"images: {_described(shape)}, mapped from {file}")
        return array, crc32, unreadable
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError, EOFError,
            RecursionError) as error:
        log(f"the cache {file} is damaged ({error}); decoding again")
        return None


def _build_cache(file: Path, paths: list[Path], shape: tuple[int, ...], streamed: bool, workers: int, log) -> Kept:
    """Decodes every image into a cache file, or into memory where there is no room; streamed ones are only checked."""
    remove(*file.parent.glob(f".{file.stem}.*.tmp"))  # of builders that were killed: a living one holds the lock
    temporary, started = file.with_name(f".{file.stem}.{os.getpid()}.tmp"), time.perf_counter()
    try:
        array = None if streamed else _allocate(temporary, shape, log)
        crc32, unreadable = _decode_into(array, paths, shape[1:3], workers)
        done = "checked" if streamed else f"decoded into {file if isinstance(array, np.memmap) else 'memory'}"
        log(f"images: {_described(shape)}, {done} in {time.perf_counter() - started:.1f} s")
        if streamed or isinstance(array, np.memmap):
            with suppress(OSError), atomic_write(file.with_suffix(".json")) as notes:
                notes.write(json.dumps({"crc32": crc32.tolist(), "unreadable": unreadable}).encode())
        if isinstance(array, np.memmap):
            array, kept = None, temporary  # Windows moves no file that is mapped
            with suppress(OSError):  # not waiting for the disk: what a power cut loses fails its checksum
                os.replace(temporary, file)
                kept = file
            array = np.load(kept, mmap_mode="r")
    finally:
        remove(temporary)
    return array, crc32, unreadable


def _allocate(file: Path, shape: tuple[int, ...], log) -> np.ndarray:
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
        log(f"no cache of decoded images ({error.strerror}: {file.parent}); keeping them in memory")
        remove(file)
        return np.empty(shape, np.uint8)


def _decode_into(
    array: np.ndarray | None, paths: list[Path], size: tuple[int, int], workers: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes every path with threads into `array` (or nowhere); returns checksums and unreadable ones."""
    crc32, unreadable = np.zeros(len(paths), np.uint32), {}

    def some(start: int) -> int:  # a task for each image costs a tenth of the speed
        positions = range(start, min(start + 16, len(paths)))
        for position in positions:
            image = try_decode(paths[position], size)
            if isinstance(image, str):
                unreadable[position] = image
                continue
            crc32[position] = zlib.crc32(image)
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
