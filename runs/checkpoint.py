"""What a checkpoint holds: its fields, its writer, its reader and its check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from model import load_file
from runs.writing import replace_file
from utils import UserError, printable


def write_checkpoints(files: dict[Path, dict[str, Any]]) -> None:
    for path, content in files.items():
        size = sum(leaf.nbytes for leaf in tree_leaves(content) if torch.is_tensor(leaf))
        replace_file(path, size, partial(torch.save, content))


def snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that later updates do not change; tensors that share memory are copied apart."""
    copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
    for name in ("model", "ema"):
        if content.get(name) is not None:  # versions of layers, which MNASNet's loader asks for
            copied[name]._metadata = content[name]._metadata
    return copied


_PARTS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == 1,
    "model": lambda value: (
        isinstance(value, dict)
        and all(isinstance(name, str) and torch.is_tensor(weight) for name, weight in value.items())
    ),
    "classes": lambda value: (
        isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value)
    ),
    "model_name": lambda value: isinstance(value, str),
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "normalize": lambda value: value in ("imagenet", "none"),
}


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint that this program wrote. Raises UserError where it is missing, damaged or another's."""
    content = load_file(file)
    if not isinstance(content, dict) or not all(fits(content.get(name)) for name, fits in _PARTS.items()):
        raise UserError(f"{printable(file)} is no checkpoint of this program, or damaged.")
    if not all(weight.isfinite().all() for weight in content["model"].values()):
        raise UserError(f"{printable(file)} holds weights that are not finite: its run diverged, or it is damaged.")
    return content
