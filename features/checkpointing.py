"""Activation checkpointing: keep only the inputs of a network's blocks, and compute a block again for its gradients.

Knows nothing of options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from utils import UserError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Checkpointed:
    """A class that `checkpoint_blocks` puts in front of a block's own."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute the block without keeping its inner activations."""
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        arguments, options = tree_map(lambda value: value, (arguments, options))  # a DenseNet's lists grow later
        assert isinstance(self, nn.Module)
        contexts = partial(_first_and_second, self)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **options)


def checkpoint_blocks(model: nn.Module) -> list[str]:
    """Make every block of `model` compute its forward pass again in the backward pass, in place; return their names.

    Gradients and buffers are those of the plain model: dropout draws the same numbers (autocast and random state are
    kept by `torch.utils.checkpoint`), and BatchNorm counts each batch once. Blocks are the smallest layers with layers
    of their own that stand in a list of layers. Raise UserError if there are none.
    """
    names = list(_blocks(model, ""))
    if not names:
        raise UserError(f"--checkpoint_blocks: {type(model).__name__} has no list of blocks.")
    for name in names:
        block = model.get_submodule(name)
        kind = type(block)
        block.__class__ = type(kind.__name__, (Checkpointed, kind), {"__module__": kind.__module__})
    return names


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    for place, child in module.named_children():
        below = f"{name}.{place}" if name else place
        if isinstance(module, CONTAINERS) and _has_layers(child) and not _has_blocks(child):
            yield below
        else:
            yield from _blocks(child, below)


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in module.children())  # an empty nn.Sequential is false itself


def _has_blocks(module: nn.Module) -> bool:
    """Return True for a list of layers that have layers of their own."""
    return isinstance(module, CONTAINERS) and any(map(_has_layers, module.children()))


def _first_and_second(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first and of the second computation, which leaves the block's buffers as they are."""
    return contextlib.nullcontext(), _same_buffers(block)


@contextlib.contextmanager
def _same_buffers(block: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
