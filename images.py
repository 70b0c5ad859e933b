"""Decode once: image files of any mode to uint8 arrays, mapped from a cache file or streamed by workers.

Decoding is the slowest thing a loader does, so it is done once and kept; what is kept is checked against
checksums. Knows nothing of classes, labels, splits or the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from utils import RunError, atomic_write, printable, progress

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
    step = max(1, len(paths) // 100)
    sizes = Counter()
    for path in paths[::step]:
        image = try_decode(path, None)
        if not isinstance(image, str):
            sizes[image.shape[:2]] += 1
    if sizes:
        (size, count), = sizes.most_common(1)
        if count >= 0.9 * sizes.total() and max(size) <= limit:
            return size
    return limit, limit


# ------------------------------------------------------------------------------ image stores
class ImageStore(Protocol):
    """Images of one listing, handed out as uint8 batches in a given order."""

    crc32: np.ndarray
    unreadable: dict[int, str]

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """One uint8 tensor (len(batch), height, width, 3) for each array of listing positions."""


@dataclass
class DecodedImages:
    """All images decoded, in one array (count, height, width, 3), usually mapped from a cache file."""

    array: np.ndarray
    crc32: np.ndarray
    unreadable: dict[int, str]
    pin: bool = False

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        if not self.pin:  # the CPU computes the step itself: a thread would only take a core from it
            yield from map(self._gather, batches)
            return
        with ThreadPoolExecutor(1) as pool:
            pending: deque = deque()
            for batch in batches:
                pending.append(pool.submit(self._gather, batch))
                if len(pending) > 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _gather(self, batch: np.ndarray) -> torch.Tensor:
        images = torch.empty((len(batch), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=self.pin)
        np.take(self.array, batch, axis=0, out=images.numpy(), mode="clip")
        return images


class StreamedImages:
    """Images decoded when they are asked for, by DataLoader workers; memory is a few batches."""

    def __init__(self, paths: list[Path], size: tuple[int, int], crc32: np.ndarray, unreadable: dict[int, str],
                 *, workers: int, pin: bool):
        self.crc32, self.unreadable = crc32, unreadable
        self._order = _BatchOrder()
        self._loader = torch.utils.data.DataLoader(
            _Files(paths, size), batch_sampler=self._order, num_workers=workers, pin_memory=pin,
            persistent_workers=workers > 0, worker_init_fn=_quiet_worker, collate_fn=_batch_or_reason,
        )

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        self._order.batches = [batch.tolist() for batch in batches]
        for batch in self._loader:
            if isinstance(batch, str):
                raise RunError(f"{batch}\nRestore the file, then go on with --resume.")
            yield batch


class _BatchOrder:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass
class _Files(torch.utils.data.Dataset):
    paths: list[Path]
    size: tuple[int, int]

    def __getitem__(self, position: int) -> torch.Tensor | str:
        image = try_decode(self.paths[position], self.size)
        if isinstance(image, str):  # an exception would bring its worker's traceback along
            return f"{printable(self.paths[position])} can no longer be read: {printable(image)}"
        return torch.from_numpy(image.copy())

    def __len__(self) -> int:
        return len(self.paths)


def _batch_or_reason(images: list[torch.Tensor | str]) -> torch.Tensor | str:
    reasons = [image for image in images if isinstance(image, str)]
    return reasons[0] if reasons else torch.utils.data.default_collate(images)


def _quiet_worker(_worker: int) -> None:
    """Signals to the whole group are the main process's to handle; a second SIGTERM still ends a worker."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def open_store(
    paths: list[Path], root: Path, *, limit: int, cache: str = "auto", workers: int | None = None, pin: bool = False,
    log: Callable[[str], None] = print,
) -> ImageStore:
    """Decodes a listing, or finds it decoded by an earlier run, as `cache` says (auto, memory, none).

    `limit` is the largest side kept, in pixels. Every image is read once whatever the mode, so that
    unreadable ones are known (`store.unreadable`: listing position to reason) before training starts.
    """
    workers = workers if workers is not None else min(8, len(os.sched_getaffinity(0)) or 1)
    size = stored_size(paths, limit)
    stats = [_stat(path) for path in paths]
    key = hashlib.sha256(json.dumps([DECODER, size, [str(root.resolve()), *map(str, paths)], stats]).encode())
    count_bytes = len(paths) * size[0] * size[1] * 3
    if cache == "none" or (cache == "auto" and count_bytes > 0.6 * _available_memory()):
        notes = _checked_notes(paths, size, root, key.hexdigest()[:20], workers, log)
        log(f"images: {len(paths):,} streamed through {workers} workers at {size[1]}x{size[0]}")
        return StreamedImages(paths, size, *notes, workers=workers, pin=pin)
    array, crc32, unreadable = _decoded(paths, size, root, key.hexdigest()[:20], workers, log)
    return DecodedImages(array, crc32, unreadable, pin)


def _stat(path: Path) -> tuple[int, int, int]:
    """What changes with a file's content: the time of the last change cannot be set back as that of writing can."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _available_memory() -> int:
    """Bytes that can be used without swapping (Linux), else half the physical memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 * 2**30


# ------------------------------------------------------------------------------------- cache
def cache_folder(root: Path) -> Path:
    """Where decoded images are kept: inside the data folder, or the user's cache where that is read-only."""
    inside = root / ".cache"
    try:
        inside.mkdir(exist_ok=True)
        if os.access(inside, os.W_OK):
            return inside
    except OSError:
        pass
    outside = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "amp-train"
    with contextlib.suppress(OSError):
        outside.mkdir(parents=True, exist_ok=True)
    return outside


def _decoded(paths, size, root, key, workers, log) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """The decoded array with its checksums: mapped from the cache if that is whole, else made anew."""
    folder = cache_folder(root)
    file = folder / f"{key}.npy"
    shape = (len(paths), *size, 3)
    with _locked(folder / f"{key}.lock", log):
        found = _read_cache(file, shape, workers, log)
        if found is not None:
            log(f"images: {len(paths):,} decoded at {size[1]}x{size[0]}, mapped from {file} ({_size(shape)})")
            return found
        for stale in folder.glob(f".{key}.*.tmp"):  # of builders that were killed: a living one holds the lock
            with contextlib.suppress(OSError):
                stale.unlink()
        temporary = folder / f".{key}.{os.getpid()}.tmp"
        try:
            array = _allocate(temporary, shape)
        except OSError as error:
            log(f"no cache of decoded images ({error.strerror}: {folder}); keeping {_size(shape)} in memory instead")
            array = np.empty(shape, np.uint8)
        try:
            started = time.perf_counter()
            crc32, unreadable = _decode_into(array, paths, size, workers)
            seconds = time.perf_counter() - started
            if isinstance(array, np.memmap):
                array.flush()
                os.replace(temporary, file)
                _write_notes(file.with_suffix(".json"), crc32, unreadable)
                array = np.load(file, mmap_mode="r")
                log(f"images: {len(paths):,} decoded at {size[1]}x{size[0]} in {seconds:.1f} s, kept in {file} "
                    f"({_size(shape)})")
        except OSError as error:
            log(f"the cache of decoded images was not kept ({error})")
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    return array, crc32, unreadable


def _allocate(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of this shape whose blocks are all reserved: a full disk shows here, not as SIGBUS."""
    need = int(np.prod(shape))
    if shutil.disk_usage(file.parent).free < need + 2**28:
        raise OSError(28, "not enough free disk space")
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    try:
        with open(file, "r+b") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, os.path.getsize(file))
    except OSError:
        file.unlink()
        raise
    return array


def _decode_into(array: np.ndarray | None, paths, size, workers) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes every path with threads into `array` (or nowhere); returns checksums and unreadable ones."""
    crc32, unreadable = np.zeros(len(paths), np.uint32), {}

    def one(position: int) -> None:
        image = try_decode(paths[position], size)
        if isinstance(image, str):
            unreadable[position] = image
            return
        crc32[position] = zlib.crc32(np.ascontiguousarray(image))
        if array is not None:
            array[position] = image

    interrupted = False

    def several(start: int) -> int:
        positions = range(start, min(start + 64, len(paths)))
        for position in positions:
            if not interrupted:
                one(position)
        return len(positions)

    with ThreadPoolExecutor(max(1, workers)) as pool, progress(total=len(paths), desc="decoding", unit="image") as bar:
        try:
            for done in pool.map(several, range(0, len(paths), 64)):
                bar.update(done)
        finally:  # the pool waits for its threads, which are not to finish the listing after Ctrl-C
            interrupted = True
    return crc32, dict(sorted(unreadable.items()))


def _checked_notes(paths, size, root, key, workers, log) -> tuple[np.ndarray, dict[int, str]]:
    """Checksums and unreadable images of a streamed listing; the check is made once and remembered."""
    file = cache_folder(root) / f"{key}.json"
    notes = _read_notes(file, len(paths))
    if notes is None:
        log(f"checking {len(paths):,} images once")
        notes = _decode_into(None, paths, size, workers)
        with contextlib.suppress(OSError):
            _write_notes(file, *notes)
    return notes


def _read_cache(file: Path, shape, workers, log) -> tuple[np.ndarray, np.ndarray, dict[int, str]] | None:
    notes = _read_notes(file.with_suffix(".json"), shape[0])
    if notes is None or not file.exists():
        return None
    crc32, unreadable = notes
    try:
        array = np.load(file, mmap_mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError("another shape")
        with ThreadPoolExecutor(max(1, workers)) as pool:
            found = np.fromiter(pool.map(zlib.crc32, array), np.uint32, len(array))
        readable = np.setdiff1d(np.arange(len(array)), list(unreadable))
        if not np.array_equal(found[readable], crc32[readable]):
            raise ValueError("checksums differ")
    except (OSError, ValueError, EOFError) as error:
        log(f"the cache {file} is damaged ({error}); decoding again")
        return None
    return array, crc32, unreadable


def _write_notes(file: Path, crc32: np.ndarray, unreadable: dict[int, str]) -> None:
    with atomic_write(file) as handle:
        handle.write(json.dumps({"crc32": crc32.tolist(), "unreadable": unreadable}).encode())


def _read_notes(file: Path, count: int) -> tuple[np.ndarray, dict[int, str]] | None:
    try:
        notes = json.loads(file.read_text())
        crc32 = np.array(notes["crc32"], np.uint32)
        unreadable = {int(position): str(reason) for position, reason in notes["unreadable"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return (crc32, unreadable) if crc32.shape == (count,) else None


@contextlib.contextmanager
def _locked(file: Path, log) -> Iterator[None]:
    """One builder of a cache file at a time, on this machine; the others wait and then find it built."""
    try:
        import fcntl

        handle = open(file, "w")  # noqa: SIM115 (held while the lock is)
    except (ImportError, OSError):
        yield
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log("another process is decoding the images; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _size(shape: Sequence[int]) -> str:
    return f"{int(np.prod(shape)) / 2**20:,.0f} MB"
