"""What AMP did to a trained classifier on one batch: a user of `inspect_step` for `python main.py inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inspection.inspecting import inspect_step
from precision import Precision
from reports.text import paragraph, table

__all__ = ["inspect", "paragraph", "table"]  # doctor takes the last two from here


def inspect(
    model_factory: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    precisions: list[Precision],
    *,
    out: Path,
    metrics: list[dict[str, Any]] | None = None,
    full: bool = False,
) -> str:
    """All sections as text of 80 columns; inspect.json, pictures and inspect.html go into the folder `out`.

    `model_factory` makes the model on the device of `images` (N, 3, H, W) and `labels` (N). `metrics` are the lines
    of a run's metrics.jsonl. Raises UserError if `out` cannot be written.
    """
    scales = [line["loss_scale"] for line in metrics or [] if (line.get("loss_scale") or 1) != 1]
    report = inspect_step(
        model_factory(),
        (images, labels),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        precisions=[precision.name for precision in precisions],
        metrics=metrics,
        scaler_scale=scales[-1] if scales else None,
    )
    report.write(out)
    return "\n".join([report.text(full=full), "", *paragraph(f"Pictures, inspect.json and inspect.html are in {out}.")])
