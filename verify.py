"""Proof that a run resumes exactly: a training that was stopped against one that was not, tensor by tensor.

Serves `train --verify_resume`, on the user's own model, data, precision and machine. Knows nothing of options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dataset import DataSet
from run import load_checkpoint
from train import Trainer
from utils import RunError

_MEASURED = {"seconds", "elapsed", "images_per_second", "data_wait_share", "peak_memory_mb", "epoch_seconds",
             "epoch_waited"}  # fmt: skip


def shortened(data: DataSet, batch_size: int) -> None:
    """Cuts the data to epochs of three updates, the last of them ragged, and a small validation."""
    data.train.keep(2 * batch_size + max(1, batch_size // 2))
    data.validation.keep(batch_size + 1)


def verify_resume(make_trainer: Callable[[str], Trainer]) -> list[str]:
    """Trains five updates straight, and again stopped after the fourth, in the middle of the second epoch.

    Returns the findings in words. Raises RunError naming the first values that differ.
    """
    straight = _train(make_trainer("straight"), 5)
    _train(make_trainer("stopped"), 4)
    resumed = make_trainer("stopped")
    resumed.load_state(load_checkpoint(resumed.run.file("last.pt")))
    again = _train(resumed, 5)
    before, after = dict(_leaves(straight.state())), dict(_leaves(again.state()))
    different = [name for name in before if not _equal(before[name], after.get(name))]
    if different or before.keys() != after.keys():
        shown = "".join(f"\n  {name}" for name in different[:10])
        raise RunError(f"the resumed run differs from the one that was not stopped in {len(different)} values:{shown}")
    tensors = [value for value in before.values() if torch.is_tensor(value)]
    return [
        "resume verified: 5 updates straight equal 4 updates, a stop in mid-epoch, a resume and 1 more",
        f"  {len(tensors)} tensors ({sum(t.numel() for t in tensors):,} values) bit for bit, "
        f"{len(before) - len(tensors)} plain values; learning rate {straight.optimizer.param_groups[0]['lr']:.3e}, "
        f"loss scale {straight.scaler.get_scale() if straight.scaler.is_enabled() else 'none'}",
    ]


def _train(trainer: Trainer, updates: int) -> Trainer:
    trainer.run.open()
    try:
        trainer.train(stop_after=updates)
    finally:
        trainer.run.close()
    return trainer


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every tensor and plain value of a checkpoint by its path; what a clock or the allocator says left out."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() if key not in _MEASURED for leaf in _leaves(item, f"{name}/{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, f"{name}/{index}")]
    return [(name, value)]


def _equal(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return repr(one) == repr(other)  # so that NaN equals NaN
