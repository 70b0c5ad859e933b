"""How many images a training can compute at once: tried with real updates, before the first epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from precision import Precision
from system.machine import available_memory, linux_memory, peak_memory, reset_peak_memory
from utils import UserError, is_out_of_memory

TRIED_ON_CPU = 16  # images of the largest trial there; what more would take follows from those before
USABLE = 0.8  # share of a CPU's free memory: its end is no error that could be caught, but the process's


def micro_batch_that_fits(
    model: nn.Module, image_size: int, most: int, precision: Precision, device: torch.device, *, processes: int = 1
) -> int:
    """How many images of `image_size` pixels fit into memory at once in training: `most`, or the largest power of two.

    On a CPU the memory that the control groups leave is shared by `processes`. `model` stays as it is. Raises UserError
    where not even two images fit.
    """
    twin = copy.deepcopy(model).train()

    def update(count: int) -> None:
        labels = torch.zeros(count, dtype=torch.long, device=device)
        images = torch.zeros(count, 3, image_size, image_size, device=device)
        with precision.autocast():
            loss = F.cross_entropy(twin(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()

    weights = sum(parameter.nbytes for parameter in model.parameters())
    find = _by_trial if device.type == "cuda" else _by_growth
    fits = find(update, most, 3 * weights, device, processes)  # two moments of Adam, and a moving average
    if not fits:
        raise UserError("--batch_size auto: not even 2 images fit into memory. Use a smaller --image_size or --model.")
    return fits


def _counts(most: int) -> Iterator[int]:
    """2, 4, 8 ... and at last `most`."""
    count = 2
    while count < most:
        yield count
        count *= 2
    yield most


def _by_trial(update: Callable[[int], None], most: int, beside: int, device: torch.device, _processes: int) -> int:
    """The largest count of which an update fits into a GPU's memory with `beside` bytes more."""
    fits = 0
    reserved = torch.empty(beside, dtype=torch.uint8, device=device)
    for count in _counts(most):
        try:
            update(count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = count
    del reserved
    torch.cuda.empty_cache()
    reset_peak_memory(device)
    return fits


def _by_growth(update: Callable[[int], None], most: int, beside: int, device: torch.device, processes: int) -> int:
    """The largest count that fits into a CPU's memory, if each image takes as much as it did in small updates."""
    free = available_memory()
    if free is None:
        return most
    taken = linux_memory("/proc/self/status", "VmRSS") or 0
    allowed = USABLE * free / processes - beside
    peaks: dict[int, float] = {}
    for count in [count for count in _counts(most) if count <= TRIED_ON_CPU] or [most]:
        if peaks and _peak_of(2 * count, peaks) > allowed:
            break
        reset_peak_memory(device)
        try:
            update(count)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            break
        peaks[count] = peak_memory(device)["peak_memory_mb"] * 2**20 - taken
    fitting = [count for count in _counts(most) if peaks and _peak_of(count, peaks) <= allowed]
    return max(fitting, default=0)


def _peak_of(count: int, peaks: dict[int, float]) -> float:
    """The peak of an update of `count` images in bytes, on the line through the smallest and the largest trial."""
    first, *_, last = [next(iter(peaks)), *peaks]
    slope = (peaks[last] - peaks[first]) / (last - first) if last > first else peaks[first] / first
    return peaks[last] + max(0.0, slope) * (count - last)
