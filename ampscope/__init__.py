"""What AMP does to any PyTorch model: `inspect_step` for one step, `watch` for a real training."""

from ampscope.inspecting import inspect_step
from ampscope.report import Report
from ampscope.watching import Watcher, watch

__all__ = ["Report", "Watcher", "inspect_step", "watch"]
