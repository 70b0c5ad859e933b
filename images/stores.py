"""Decode once: image files of any mode to uint8 arrays, mapped from a cache file or streamed by workers.

Decoding is the slowest thing a loader does, so it is done once and kept; what is kept is checked against
checksums. Knows nothing of classes, labels, splits or the device.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from images.cache import (
    Kept,
    build_cache,
    cache_folder,
    described,
    file_state,
    limit_caches,
    map_array,
    only_builder,
    read_notes,
    survey,
)
from images.decode import Rules, ahead, try_decode
from system.machine import available_memory, cores, free_files, shared_memory
from utils import STOP_SIGNALS, RunError, log, printable

# uint8 (count, height, width, 3); images smaller than that lie in its upper left corner, and `shapes` (count, 2) says
# how high and wide each is. None: all fill it.
Batch = tuple[torch.Tensor, np.ndarray | None]


@dataclass
class DecodedImages:
    """All images decoded, in one array (count, height, width, 3), usually mapped from a cache file."""

    array: np.ndarray
    crc32: np.ndarray
    unreadable: dict[int, str]
    pin: bool = False
    shapes: np.ndarray | None = None
    rules: Rules = field(default_factory=Rules)

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One uint8 tensor (len(batch), height, width, 3), and its shapes, for each array of listing positions."""
        if not self.pin:  # the CPU computes the step itself: a thread would only take a core from it
            yield from map(self._gather, batches)
            return
        with ThreadPoolExecutor(1) as pool:
            yield from ahead(pool, self._gather, batches, 2)

    def _gather(self, batch: np.ndarray) -> Batch:
        images = torch.empty((len(batch), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=self.pin)
        np.take(self.array, batch, axis=0, out=images.numpy(), mode="clip")
        return images, None if self.shapes is None else self.shapes[batch]


class StreamedImages:
    """Images decoded when they are asked for, by DataLoader workers; memory is a few batches."""

    def __init__(self, paths: list[Path], kept: Kept, limit: int, *, workers: int, pin: bool):
        self.crc32 = kept.crc32
        self.unreadable = kept.unreadable
        self.rules = kept.rules
        self.shapes = kept.shapes
        self._order: list[list[int]] = []  # of the epoch that comes: workers stay from one to the next
        self._loader = torch.utils.data.DataLoader(
            _Files(paths, kept.box, limit, kept.rules),
            sampler=self._order,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the default one belongs to dropout: each new iterator draws a seed
        )
        self._pin = pin
        self._said = False

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """As `DecodedImages.batches`. Raises RunError if a file can no longer be read."""
        self._order[:] = [batch.tolist() for batch in batches]
        for positions, batch in zip(batches, self._loader, strict=True):
            if isinstance(batch, str):
                raise RunError(f"{batch}\nRestore the file, then go on with --resume.")
            if isinstance(batch, np.ndarray):
                self._say_pipes()
                batch = torch.from_numpy(batch)
                batch = batch.pin_memory() if self._pin else batch
            yield batch, None if self.shapes is None else self.shapes[positions]

    def _say_pipes(self) -> None:
        if not self._said:
            self._said = True
            log.info(
                "note: there is too little shared memory (/dev/shm) for the loading workers' batches, so they come "
                "through pipes, which is slower: give a container more, docker run --shm-size=1g or --ipc=host"
            )


ImageStore = DecodedImages | StreamedImages


@dataclass
class _Files(torch.utils.data.Dataset):
    paths: list[Path]
    box: tuple[int, int]
    limit: int
    rules: Rules

    def __getitem__(self, batch: list[int]) -> torch.Tensor | np.ndarray | str:
        """A batch, or why it cannot be made: an exception would bring its worker's traceback along.

        It is a tensor, which a worker passes on in shared memory, if that has room; PyTorch would wait for ever for
        one that has not. An array goes through a pipe.
        """
        images = torch.zeros((len(batch), *self.box, 3), dtype=torch.uint8)
        for place, position in enumerate(batch):
            image = try_decode(self.paths[position], self.limit, self.rules)
            if isinstance(image, str):
                return f"{printable(self.paths[position])} can no longer be read: {printable(image)}"
            height, width = image.shape[:2]
            if height > self.box[0] or width > self.box[1]:
                return f"{printable(self.paths[position])} is another picture than it was"
            images.numpy()[place, :height, :width] = image
        return images if _fits_shared_memory(images.nbytes) else images.numpy()


def _as_it_is(batch: Any) -> Any:
    return batch


def _fits_shared_memory(size: int) -> bool:
    """Whether a worker can pass on `size` bytes through shared memory, and the others may do so at the same time."""
    worker = torch.utils.data.get_worker_info()
    if worker is None or not sys.platform.startswith("linux"):
        return True
    files = free_files()
    if (files is not None and files < 16) or not os.access("/dev/shm", os.W_OK):
        return False
    return (shared_memory() or 0) > (worker.num_workers + 1) * (size + 2**16)


def _can_share() -> bool:
    """Whether this machine lets processes share locks and send one another files: worker processes need both."""
    try:
        torch.multiprocessing.Lock()
        tempfile.gettempdir()
    except OSError:
        return False
    return True


def _quiet_worker(_worker: int) -> None:
    """Signals to the whole group are the main process's to handle; a second SIGTERM still ends a worker."""
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def open_store(
    paths: list[Path],
    root: Path,
    *,
    limit: int,
    cache: str = "auto",
    workers: int | None = None,
    pin: bool = False,
    rules: Rules | None = None,
    own_window: bool = False,
    cache_limit: float = math.inf,
) -> ImageStore:
    """Decodes a listing, or finds it decoded by an earlier run, as `cache` says (auto, memory, none).

    `limit` is the largest side kept, in pixels: what a file becomes depends on it and on `rules` alone, not on the
    other files. Every image is read once whatever the mode, so that unreadable ones are known (`store.unreadable`:
    listing position to reason) before training starts. With `own_window` the windows of deep grey pictures are the
    range of these files' values; `store.rules` says which. Caches in the same folder are kept to `cache_limit` GB.
    """
    workers = min(8, cores()) if workers is None else workers
    kept = _kept(paths, root, limit, cache, workers, rules or Rules(), own_window, cache_limit)
    if kept.several:
        log.info(f"{kept.several:,} files hold several pictures: the first of each is used")
    for mode, window in kept.rules.windows.items():
        log.info(f"deep grey pictures (mode {mode}): {window[0]:g} becomes black, {window[1]:g} white")
    if kept.array is not None:
        return DecodedImages(kept.array, kept.crc32, kept.unreadable, pin, kept.shapes, kept.rules)
    shape = kept.shape(len(paths))
    if workers and not _can_share():
        workers = 0
        log.info("note: no worker processes can be had here (no shared memory, or no folder for temporary files)")
    log.info(f"images: {described(shape)}, streamed through {workers} workers")
    return StreamedImages(paths, kept, limit, workers=workers, pin=pin)


def checksums(paths: list[Path], root: Path, *, limit: int, rules: Rules, workers: int | None = None) -> np.ndarray:
    """Return the CRC-32 of each image (count,) as `open_store` would keep it with that limit; keep no pixels."""
    workers = min(8, cores()) if workers is None else workers
    return _kept(paths, root, limit, "none", workers, rules, False, math.inf).crc32


def _kept(
    paths: list[Path],
    root: Path,
    limit: int,
    cache: str,
    workers: int,
    rules: Rules,
    own_window: bool,
    cache_limit: float,
) -> Kept:
    """Return what is known of a listing's images: found in the cache folder, or decoded now."""
    states = [file_state(path) for path in paths]
    identity = [rules.identity, own_window, limit, [str(root.resolve()), *map(str, paths)], states]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    file = cache_folder(root) / f"{key}.npy"
    with only_builder(file.with_suffix(".lock")):
        kept = read_notes(file, len(paths))
        plan = kept or survey(paths, limit, rules, own_window, workers)
        streamed = _is_streamed(cache, math.prod(plan.shape(len(paths))), cache_limit)
        if kept and not streamed:
            kept.array = map_array(file, kept, workers)
        if kept is None or (kept.array is None and not streamed):
            kept = build_cache(file, paths, plan, limit, streamed, workers)
    limit_caches(file.parent, cache_limit * 2**30, keep=file)
    return kept


def _is_streamed(cache: str, size: int, cache_limit: float) -> bool:
    """Whether images are decoded anew in each epoch: asked for, or too many bytes for memory or for the caches."""
    memory = available_memory() or 4 * 2**30
    return cache == "none" or (cache == "auto" and size > min(0.6 * memory, cache_limit * 2**30))
