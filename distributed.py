"""Describe this process among the processes of one torchrun job, and share values; system/meeting.py joins them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import UserError, printable

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a torchrun job; `Ranks()` is a job of one."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets. Raise UserError if they contradict each other."""
        size = _from_environment("WORLD_SIZE", 1)
        if size <= 1:  # ignore a RANK that an earlier job left in the environment
            return cls()
        rank = _from_environment("RANK", 0)
        if rank >= size:
            raise UserError(
                f"RANK={rank} cannot be: the processes of this job are 0 to {size - 1} (WORLD_SIZE={size})."
            )
        return cls(rank, _from_environment("LOCAL_RANK", 0), size)

    @property
    def is_first(self) -> bool:
        """Return True for the one process that writes, prints and draws."""
        return self.rank == 0

    def sum(self, *tensors: torch.Tensor) -> None:
        """Add each tensor up over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is true on any rank; every rank must ask."""
        if self.size == 1:
            return flag
        import torch

        count = torch.tensor(int(flag))
        self.sum(count)
        return count.item() > 0

    def share(self, make: Callable[[], Any]) -> Any:
        """Call `make` on the first rank and return its result on every rank: other machines may not see a file."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        shared = [make() if self.is_first else None]
        dist.broadcast_object_list(shared)
        return shared[0]


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"the environment variable {name}={printable(text)} is not a whole number: unset it.")
    return int(text)


def synchronized(model: nn.Module, ranks: Ranks, device: torch.device, *, accumulate: int, left_over: int) -> nn.Module:
    """Return `model` with batch statistics of all ranks; the model itself if there is only one.

    `left_over` is the number of images in the last update. Raise UserError if the ranks could wait for one another.
    """
    if ranks.size == 1:
        return model
    if device.type != "cuda":
        raise UserError("--sync_batchnorm needs CUDA devices: PyTorch has no such layer for the CPU.")
    if accumulate > 1:
        raise UserError("--sync_batchnorm needs the same number of micro-batches: leave out --accumulate.")
    if left_over < ranks.size:
        raise UserError(
            f"--sync_batchnorm needs an image on each of {ranks.size} processes, and the last batch holds {left_over}: "
            "choose another --batch_size."
        )
    import torch

    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
