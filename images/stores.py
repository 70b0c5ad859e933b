"""Give batches of uint8 images, mapped from a cache file or streamed by workers.

Decoding is the slowest part of loading, so it is done once and the result is kept with checksums. Knows nothing of
classes, labels, splits or the device.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from images.cache import Kept, Opening, decoded, described
from images.decode import Rules, ahead, try_decode
from system.machine import startable
from utils import STOP_SIGNALS, RunError, amount, log, printable

# uint8 (count, height, width, 3), with smaller images in the upper left corner, and their heights and widths `shapes`
# (count, 2); None if all images fill it
Batch = tuple[torch.Tensor, np.ndarray | None]

warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as the user asked for
PREFETCH = 2  # batches that each worker prepares ahead
PINNING = 2  # batches that are copied to page-locked memory ahead
LONGEST_WAIT = 900  # seconds for one batch: a file system may be slow, but a worker that never answers is an error
EACH_TAKES = 6, 3  # files, and threads or processes, that one worker takes


@dataclass
class DecodedImages:
    """All images decoded, in one array (count, height, width, 3), usually mapped from a cache file."""

    array: np.ndarray
    crc32: np.ndarray
    unreadable: dict[int, str]
    pin: bool = False
    shapes: np.ndarray | None = None
    rules: Rules = field(default_factory=Rules)
    deep: list[str] = field(default_factory=list)

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield a uint8 tensor (len(batch), height, width, 3), and its shapes, for each array of listing positions."""
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
    """Decode images on request by DataLoader workers; hold a few batches in memory.

    The workers are forked, and write into memory that they share with this process (an anonymous mapping), slot by
    slot. So a batch needs neither an open file nor room in /dev/shm, which is small in containers. On systems without
    fork, batches come through pipes.
    """

    def __init__(self, paths: list[Path], kept: Kept, limit: int, *, workers: int, pin: bool):
        self.crc32 = kept.crc32
        self.unreadable = kept.unreadable
        self.rules = kept.rules
        self.shapes = kept.shapes
        self.deep = kept.deep
        self._files = _Files(paths, kept.box, limit, kept.rules)
        self._order: list[tuple[int, list[int]]] = []  # of the next epoch: workers stay from one to the next
        self._loader: torch.utils.data.DataLoader | None = None
        self._largest = 0  # the largest batch that fits into a slot
        self._memory: mmap.mmap | None = None
        self._workers = workers
        self._pin = pin

    def batches(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield as `DecodedImages.batches` does. Raise RunError if a file can no longer be read, or no batch comes."""
        largest = max(map(len, batches), default=0)
        if self._loader is None or largest > self._largest:
            self._loader = self._started(largest)
        self._order[:] = [(number, batch.tolist()) for number, batch in enumerate(batches)]
        loaded = enumerate(zip(batches, self._loader, strict=True))
        if not self._pin:
            yield from map(self._taken, loaded)
        else:
            with ThreadPoolExecutor(1) as pool:
                yield from ahead(pool, self._taken, loaded, PINNING)
        if self._memory is not None:
            with contextlib.suppress(OSError, AttributeError):  # systems without it
                self._memory.madvise(mmap.MADV_REMOVE)  # until the next epoch others may use the slots' memory

    def _taken(self, item: tuple[int, tuple[np.ndarray, Any]]) -> Batch:
        """Copy a batch out of its slot, because the workers fill it again later."""
        number, (positions, answer) = item
        if isinstance(answer, str):
            raise RunError(f"{answer}, then repeat the command, a training with --resume.")
        slots = self._files.slots
        images = torch.from_numpy(answer if slots is None else slots[number % len(slots)][: len(positions)])
        copy = torch.empty(images.shape, dtype=torch.uint8, pin_memory=self._pin).copy_(images)
        return copy, None if self.shapes is None else self.shapes[positions]

    def _started(self, largest: int) -> torch.utils.data.DataLoader:
        """Start the workers: few, or none, if files, threads, processes or memory are short."""
        self._loader = None  # ends the workers with smaller slots
        self._order.clear()
        self._largest = largest
        workers = startable(self._workers, *EACH_TAKES)
        while (loader := self._tried(workers)) is None:
            workers //= 2
        if workers < self._workers:
            log.info(
                f"note: images are loaded by {workers or 'no'} workers instead of {self._workers}: this process may "
                "not open enough files (ulimit -n), start enough processes (ulimit -u, a container's limit of pids) "
                "or share memory"
            )
            self._workers = workers
        return loader

    def _tried(self, workers: int) -> torch.utils.data.DataLoader | None:
        """Return a loader whose workers run; None if they do not start."""
        forked = sys.platform.startswith("linux")
        shape = (workers * PREFETCH + PINNING + 2, self._largest, *self._files.box, 3)
        self._memory = _shared(math.prod(shape)) if workers and forked else None
        self._files.slots = None if self._memory is None else np.frombuffer(self._memory, np.uint8).reshape(shape)
        options: dict[str, Any] = {}
        if workers:
            options = {"persistent_workers": True, "prefetch_factor": PREFETCH, "timeout": LONGEST_WAIT}
            options["multiprocessing_context"] = "fork" if forked else None
        loader = torch.utils.data.DataLoader(
            self._files,
            sampler=self._order,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_quiet_worker,
            collate_fn=_as_it_is,
            # not the default one, which belongs to dropout: each new iterator draws a seed
            generator=torch.Generator(),
            **options,
        )
        before = multiprocessing.active_children()
        with _without_half_made():
            try:
                iter(loader)
            except (OSError, RuntimeError, MemoryError):
                if workers == 0:
                    raise
                for worker in set(multiprocessing.active_children()) - set(before):
                    worker.kill()
                return None
        return loader


ImageStore = DecodedImages | StreamedImages


@dataclass
class _Files(torch.utils.data.Dataset):
    """The files of a listing. `slots` is memory for batches that is shared with workers (slots, count, *box, 3)."""

    paths: list[Path]
    box: tuple[int, int]
    limit: int
    rules: Rules
    slots: np.ndarray | None = None

    def __getitem__(self, item: tuple[int, list[int]]) -> np.ndarray | str | None:
        """Decode a batch, given (its number in the epoch, positions in the listing).

        Return the batch, None if it is in its slot, or a sentence on why it cannot be decoded: an exception would
        include the traceback of its worker.
        """
        try:
            return self._batch(*item)
        except (OSError, MemoryError) as error:
            return f"no batch of images: {printable(error) or 'out of memory'}.\nUse fewer --num_workers"

    def _batch(self, number: int, positions: list[int]) -> np.ndarray | str | None:
        if self.slots is None:
            images = np.zeros((len(positions), *self.box, 3), np.uint8)
        else:
            images = self.slots[number % len(self.slots)][: len(positions)]
            images[:] = 0
        for place, position in enumerate(positions):
            image = try_decode(self.paths[position], self.limit, self.rules)
            if isinstance(image, str):
                return f"{printable(self.paths[position])} can no longer be read: {printable(image)}\nRestore the file"
            height, width = image.shape[:2]
            if height > self.box[0] or width > self.box[1]:
                return f"{printable(self.paths[position])} is another picture than it was\nRestore the file"
            images[place, :height, :width] = image
        return images if self.slots is None else None


def _as_it_is(batch: Any) -> Any:
    return batch


def _shared(size: int) -> mmap.mmap | None:
    """Return `size` bytes that forked processes share; None if there is too little memory."""
    try:
        return mmap.mmap(-1, size)
    except (OSError, ValueError, OverflowError):
        return None


@contextlib.contextmanager
def _without_half_made() -> Iterator[None]:
    """Hide the message of a PyTorch iterator that is deleted although its constructor was interrupted."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _quiet_worker(_worker: int) -> None:
    """Leave signals to the main process; a second SIGTERM still ends a worker."""
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def open_store(
    paths: list[Path], root: Path, *, limit: int, opening: Opening | None = None, part: str = ""
) -> ImageStore:
    """Decode a listing, or find the images that an earlier run decoded, as `opening.cache` asks.

    `limit` is the largest side kept, in pixels: the pixels of a file depend on it and on the rules only, not on the
    other files. Read every image once in each mode, so that `store.unreadable` (listing position to reason) is known
    before training starts. With `own_window` the windows of deep grey pictures are the range of these files' values;
    `store.rules` contains them. Add the cache to `opening.own`: if the next one does not fit beside those, it is
    streamed. `part` names the images in messages.
    """
    opening = opening or Opening()
    part = f"{part} " if part else ""
    kept = decoded(paths, root, limit, opening, part)
    if kept.several:
        hold = amount(kept.several, f"{part}file holds", f"{part}files hold")
        log.info(f"{hold} several pictures: the first of each is used")
    if kept.array is not None:
        return DecodedImages(kept.array, kept.crc32, kept.unreadable, opening.pin, kept.shapes, kept.rules, kept.deep)
    log.info(f"{part}images: {described(kept.shape(len(paths)))}, streamed through {opening.workers} workers")
    return StreamedImages(paths, kept, limit, workers=opening.workers or 0, pin=opening.pin)
