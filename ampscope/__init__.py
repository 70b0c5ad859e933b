"""AMP explained for any PyTorch training: `inspect_step` for one step, `watch` for a training that goes on.

On the command line `ampscope run SCRIPT.py` explains a program as it is, `ampscope inspect FILE.py:make` one step.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ampscope.by_layer import layer_errors
    from ampscope.errors import InspectError
    from ampscope.float32_layers import keep_float32
    from ampscope.inspecting import inspect_step
    from ampscope.module import inspect_module
    from ampscope.report import Report
    from ampscope.watching import Watcher, watch

__version__ = "0.2.0"
__all__ = [
    "InspectError",
    "Report",
    "Watcher",
    "inspect_module",
    "inspect_step",
    "keep_float32",
    "layer_errors",
    "watch",
]
_HOMES = {
    "InspectError": "errors",
    "keep_float32": "float32_layers",
    "layer_errors": "by_layer",
    "Report": "report",
    "Watcher": "watching",
    "inspect_module": "module",
    "inspect_step": "inspecting",
    "watch": "watching",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `ampscope.text` or --help need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ampscope.{_HOMES[name]}"), name)
