"""How many images a training can compute at once, from what autograd keeps of one image for the backward pass."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from precision import Precision
from system.machine import GPUS, available_memory
from utils import UserError, return_freed_memory

SPARE = 1.3  # bytes that an update takes for each that is kept: gradients of activations, and holes in the heap
USABLE = 0.8  # share of the free memory: on a CPU, running out of it is no error that could be caught


def micro_batch_that_fits(
    model: nn.Module, image_size: int, most: int, precision: Precision, device: torch.device, *, processes: int = 1
) -> int:
    """Return how many images of `image_size` pixels fit into memory at once in training: `most`, or a power of two.

    Updates of two and of three images tell what one more keeps, whatever the process allocated before. `processes`
    share a CPU's memory. `model` stays as it is. Raises UserError if not even two images fit.
    """
    two, three = (_kept_bytes(copy.deepcopy(model), count, image_size, precision, device) for count in (2, 3))
    each = three - two
    weights = sum(parameter.nbytes for parameter in model.parameters())
    once = two - 2 * each + 4 * weights  # 16-bit copies of weights; gradients, Adam's two moments, a moving average
    free = _free_bytes(device, processes)
    fits = most if free is None else int((USABLE * free - once) / max(1.0, SPARE * each))
    if fits < min(2, most):
        raise UserError("--batch_size auto: not even 2 images fit into memory. Use a smaller --image_size or --model.")
    return most if fits >= most else 2 ** (fits.bit_length() - 1)


def _kept_bytes(model: nn.Module, count: int, image_size: int, precision: Precision, device: torch.device) -> int:
    """Compute one update of `count` images and return the bytes that autograd kept for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    labels = torch.zeros(count, dtype=torch.long, device=device)
    images = torch.zeros(count, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with precision.autocast():
            loss = F.cross_entropy(model.train()(images), labels)
        loss.backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    return sum(size for place, size in kept.items() if place not in own)


def _free_bytes(device: torch.device, processes: int) -> float | None:
    """Return this process's share of the free memory, freed memory included; None if the system does not say it."""
    if device.type in GPUS:
        gpu = getattr(torch, device.type)
        gpu.empty_cache()
        free: int = gpu.mem_get_info(device)[0]
        return free
    return_freed_memory()
    available = available_memory()
    return None if available is None else available / processes
