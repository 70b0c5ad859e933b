"""What AMP does to any PyTorch model: `inspect_step` for one step, `watch` for a real training.

`probe` and `roofline` measure this machine for `doctor`.
"""

from inspection.inspecting import inspect_step
from inspection.report import Report

__all__ = ["Report", "inspect_step"]
