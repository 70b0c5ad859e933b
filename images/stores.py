"""Decode once: image files of any mode to uint8 arrays, mapped from a cache file or streamed by workers.

Decoding is the slowest thing a loader does, so it is done once and kept; what is kept is checked against
checksums. Knows nothing of classes, labels, splits or the device.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from images.cache import build_cache, cache_folder, file_state, only_builder, read_cache
from images.decode import DECODER, ahead, stored_size, try_decode
from utils import RunError, cores, linux_memory, log, printable


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

    def __init__(
        self,
        paths: list[Path],
        size: tuple[int, int],
        crc32: np.ndarray,
        unreadable: dict[int, str],
        *,
        workers: int,
        pin: bool,
    ):
        self.crc32 = crc32
        self.unreadable = unreadable
        self._order: list[list[int]] = []  # of the epoch that comes: workers stay from one to the next
        self._loader = torch.utils.data.DataLoader(
            _Files(paths, size),
            sampler=self._order,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
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


def open_store(
    paths: list[Path], root: Path, *, limit: int, cache: str = "auto", workers: int | None = None, pin: bool = False
) -> ImageStore:
    """Decodes a listing, or finds it decoded by an earlier run, as `cache` says (auto, memory, none).

    `limit` is the largest side kept, in pixels. Every image is read once whatever the mode, so that
    unreadable ones are known (`store.unreadable`: listing position to reason) before training starts.
    """
    workers = min(8, cores()) if workers is None else workers
    size = stored_size(paths, limit)
    shape = (len(paths), *size, 3)
    identity = [DECODER, size, [str(root.resolve()), *map(str, paths)], [file_state(path) for path in paths]]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    memory = linux_memory("/proc/meminfo", "MemAvailable") or 4 * 2**30
    streamed = cache == "none" or (cache == "auto" and math.prod(shape) > 0.6 * memory)
    file = cache_folder(root) / f"{key}.npy"
    with only_builder(file.with_suffix(".lock")):
        kept = read_cache(file, shape, streamed, workers)
        array, crc32, unreadable = kept or build_cache(file, paths, shape, streamed, workers)
    if array is not None:
        return DecodedImages(array, crc32, unreadable, pin)
    log.info(f"images: {len(paths):,} streamed through {workers} workers at {size[1]}x{size[0]}")
    return StreamedImages(paths, size, crc32, unreadable, workers=workers, pin=pin)
