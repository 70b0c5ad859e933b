"""Find how many images fit into memory in training, from the bytes that autograd keeps for one image."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from precision import Precision
from system.machine import GPUS, available_memory
from utils import UserError, return_freed_memory

SPARE = 1.3  # bytes an update takes for each byte kept: gradients of activations, and heap fragmentation
USABLE = 0.8  # fraction of the free memory to use: on a CPU, running out kills the process instead of raising


def micro_batch_that_fits(
    model: nn.Module, image_size: int, most: int, precision: Precision, device: torch.device, *, processes: int = 1
) -> int:
    """Return how many images of `image_size` pixels fit into memory at once in training: `most`, or a power of two.

    The difference between updates of two and of three images gives the bytes for one more, whatever the process
    allocated before. `processes` share a CPU's memory. `model` is not changed. Raise UserError if two images do not
    fit.
    """
    two, three = (_kept_bytes(copy.deepcopy(model), count, image_size, precision, device) for count in (2, 3))
    each = three - two
    weights = sum(parameter.nbytes for parameter in model.parameters())
    once = two - 2 * each + 4 * weights  # 16-bit copies of weights; gradients, Adam's two moments, an EMA
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
    """Return this process's share of the free memory, including freed memory; None if the system does not report it."""
    if device.type in GPUS:
        gpu = getattr(torch, device.type)
        gpu.empty_cache()
        free: int = gpu.mem_get_info(device)[0]
        return free
    return_freed_memory()
    available = available_memory()
    return None if available is None else available / processes
