"""Find tensors in nested containers, their memory, and the names of dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers, and in objects with tensor attributes, one level deep."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf):
            found += [value for value in vars(leaf).values() if isinstance(value, torch.Tensor)]
    return found


def buffers_not_finite(models: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the buffers that hold inf or NaN, each after the name of its model."""
    return [
        ".".join(word for word in (prefix, name) if word)
        for prefix, model in models.items()
        for name, buffer in model.named_buffers()
        if _has_values(buffer) and not (buffer.float() if buffer.element_size() < 2 else buffer).isfinite().all()
    ]


def _has_values(tensor: torch.Tensor) -> bool:
    """Return True if a tensor holds floating-point values: a lazy one or one on the meta device has none."""
    return not nn.parameter.is_lazy(tensor) and not tensor.is_meta and tensor.is_floating_point()


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory, which views share; 0 if it is empty, -1 if it has no address."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return -1


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of the values that a tensor stores, and of the indices of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    if tensor.layout is torch.strided:
        return tensor.nbytes
    return tensor.values().nbytes


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a report, such as float16."""
    return str(dtype).removeprefix("torch.")
