"""Keep chosen modules of a network in float32 under autocast."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ampscope.errors import InspectError
from ampscope.tensors import tensors_in


class KeptFloat32:
    """What `keep_float32` puts in front of a module's class."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run in float32 without autocast; return outputs in the type of the first floating input."""
        return in_float32(super().forward, *arguments, **options)  # type: ignore[misc]


def in_float32(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call `forward` in float32 without autocast; return outputs in the type of the first floating input."""
    floating = [tensor for tensor in tensors_in((arguments, options)) if tensor.is_floating_point()]
    device = (floating or [torch.empty(0)])[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # the meta device has none
        return forward(*arguments, **options)
    with torch.autocast(device, enabled=False):
        outputs = forward(*tree_map(_wide, arguments), **tree_map(_wide, options))
    return tree_map(lambda value: _narrow(value, floating[0].dtype), outputs) if floating else outputs


def keep_float32(model: nn.Module, pattern: str) -> list[str]:
    """Make the modules whose names match compute in float32 under autocast, in place; return their names.

    Their weights stay as they are, state dictionaries too. `pattern` is one or several shell patterns with commas
    between them, such as "head" or "blocks.*.norm1,head"; what lies inside a module that matches is kept with it.

    Raises:
        InspectError: if a pattern matches no module.
    """
    named = dict(model.named_modules())
    chosen: list[str] = []
    for part in filter(None, (part.strip() for part in pattern.split(","))):
        found = [name for name in named if name and fnmatch.fnmatchcase(name, part)]
        if not found:
            some = ", ".join(list(named)[1:6])
            raise InspectError(f"no module is called {part!r}: the first of them are {some}.")
        chosen += [name for name in found if name not in chosen]
    for name in chosen:
        module = named[name]
        if not isinstance(module, KeptFloat32):
            kind = type(module)
            module.__class__ = type(kind.__name__, (KeptFloat32, kind), {"__module__": kind.__module__})
    return chosen


def put_back(model: nn.Module, names: list[str]) -> None:
    """Undo `keep_float32` for these modules."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, KeptFloat32):
            module.__class__ = type(module).__mro__[2]


def _wide(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
