"""Proof that a run resumes exactly: a training that was stopped against one that was not, tensor by tensor.

Serves `train --verify_resume`, on the user's own model, data, precision and machine. Knows nothing of options.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from images.subsets import DataSet
from runs.checkpoint import load_checkpoint
from runs.folder import RunDirectory
from train import Trainer
from utils import RunError, UserError

if TYPE_CHECKING:
    from assemble import Setup

_MEASURED = {
    "seconds",
    "elapsed",
    "images_per_second",
    "data_wait_share",
    "peak_memory_mb",
    "epoch_seconds",
    "epoch_waited",
    "steady",
}


def verify(setup: Setup, *, checkpoint_dir: str, batch_size: int, epochs: int) -> None:
    """`train --verify_resume`: prints the findings; leaves nothing behind."""
    if setup.ranks.size > 1:
        raise UserError("run --verify_resume without torchrun: it uses one process.")
    data = setup.data()
    folder = Path(checkpoint_dir)
    shortened(data, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as inside:

        def make_trainer(name: str) -> Trainer:
            return setup.trainer(data, RunDirectory(Path(inside) / name), epochs=max(2, epochs))

        print("\n".join(verify_resume(make_trainer)))


def shortened(data: DataSet, batch_size: int) -> None:
    """Cuts the data to epochs of three updates, the last of them ragged, and a small validation.

    Raises UserError if the data is too small for that.
    """
    if len(data.train) <= 2 * batch_size:
        raise UserError(
            f"--verify_resume stops within an epoch: {len(data.train)} training images need a --batch_size below "
            f"{-(-len(data.train) // 2)}."
        )
    data.train.keep(2 * batch_size + max(1, batch_size // 2))
    data.validation.keep(batch_size + 1)


def verify_resume(make_trainer: Callable[[str], Trainer]) -> list[str]:
    """Trains five updates straight, and again stopped after the fourth, in the middle of the second epoch.

    Returns the findings in words. Raises RunError naming the first values that differ. On CUDA deterministic
    kernels are asked for, and a second straight training tells whether there is anything to prove.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    straight = _train(make_trainer("straight"), 5)
    if straight.batches.device.type == "cuda" and _differences(straight, _train(make_trainer("again"), 5)):
        raise RunError("two trainings that were not stopped differ on this device, so a resumed one cannot be judged.")
    if not _train(make_trainer("stopped"), 4).progress.update:
        raise RunError("the training was not stopped within an epoch, so nothing is proved.")
    resumed = make_trainer("stopped")
    resumed.load_state(load_checkpoint(resumed.run.file("last.pt")))
    different = _differences(straight, _train(resumed, 5))
    if different:
        shown = "".join(f"\n  {name}" for name in different[:10])
        raise RunError(f"the resumed run differs from the one that was not stopped in {len(different)} values:{shown}")
    values = dict(_leaves(straight.state())).values()
    tensors = [value for value in values if torch.is_tensor(value)]
    return [
        "resume verified: 5 updates straight equal 4 updates, a stop in mid-epoch, a resume and 1 more",
        f"  {len(tensors)} tensors ({sum(t.numel() for t in tensors):,} values) bit for bit, "
        f"{len(values) - len(tensors)} plain values; learning rate {straight.optimizer.param_groups[0]['lr']:.3e}, "
        f"loss scale {straight.scaler.get_scale() if straight.scaler.is_enabled() else 'none'}",
    ]


def _differences(one: Trainer, other: Trainer) -> list[str]:
    """Names of the values in which two trainers' checkpoints differ."""
    before = dict(_leaves(one.state()))
    after = dict(_leaves(other.state()))
    return [name for name in before | after if name not in after or not _equal(before.get(name), after[name])]


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
