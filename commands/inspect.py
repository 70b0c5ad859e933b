"""What AMP did to a model: dtypes, memory, gradient underflow, loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inspection import inspector
from precision import named_precision, sensible_precisions
from reports.results import read_metrics

if TYPE_CHECKING:
    from assemble import Setup


def inspect(
    setup: Setup,
    *,
    checkpoint_dir: str,
    checkpoint_name: str,
    checkpoint: str | None,
    precisions: list[str] | None,
    out: str,
    full: bool,
) -> None:
    """The command: prints what AMP does to the model in one update, and writes JSON and pictures into `out`."""
    stored = setup.checkpoint if checkpoint_name or checkpoint else None
    data = setup.data(classes=stored and stored["classes"])
    images, labels, *_ = next(next(setup.batches(data, data.train, train=True).epoch(0)))
    names = precisions or sensible_precisions(setup.device)
    metrics = Path(checkpoint_dir) / checkpoint_name / "metrics.jsonl"
    print(
        inspector.inspect(
            lambda: setup.trained(stored).train() if stored else setup.model(len(data.classes)),
            images,
            labels,
            [named_precision(name, setup.device) for name in names],
            out=Path(out),
            metrics=read_metrics(metrics) if checkpoint_name else None,
            full=full,
        )
    )
