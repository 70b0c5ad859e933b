"""Layers of `--float32_layers`: the library keeps them in float32 under autocast. Knows nothing of options."""

from __future__ import annotations

from torch import nn

from ampscope import InspectError, keep_float32
from utils import UserError


def keep_layers_float32(model: nn.Module, pattern: str) -> nn.Module:
    """Keep the modules whose names match in float32, in place; none if the pattern is empty.

    Raise UserError if a pattern matches no module.
    """
    try:
        keep_float32(model, pattern)
    except InspectError as error:
        raise UserError(f"--float32_layers: {error}") from None
    return model
