"""Tensors of any kind: those in a nest of containers, the memory behind one, the name of a type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in any nesting of containers; also in objects that hold them as attributes, one level deep."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf):
            found += [value for value in vars(leaf).values() if isinstance(value, torch.Tensor)]
    return found


def address(tensor: torch.Tensor) -> int:
    """Of the memory behind a tensor, which views share; 0 if it is empty, -1 if it has none that can be named."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -1


def dtype_name(dtype: torch.dtype) -> str:
    """As a report writes it, such as float16."""
    return str(dtype).removeprefix("torch.")
