"""What AMP does to any PyTorch model: `inspect_step` for one step, `watch` for a real training."""

from inspection.inspecting import inspect_step
from inspection.report import Report
from inspection.watching import Watcher, watch

__all__ = ["Report", "Watcher", "inspect_step", "watch"]
