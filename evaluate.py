"""Test a classifier: one prediction an image and a loss sum, from which all figures derive (runs/evaluation.py).

Ranks take strides of the images and add up once; nothing is padded, nothing counted twice. Knows nothing of optimizers
or of where results are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dataset import Batches
from precision import Precision
from runs.evaluation import NO_PREDICTION, Evaluation
from utils import Interrupted, progress_bar


def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    batches: Batches,
    precision: Precision,
    *,
    keep_logits: bool = False,
    stop: Callable[[], bool] | None = None,
    description: str = "evaluating",
) -> Evaluation:
    """Run `model` (in evaluation mode) over all images of `batches`.

    Nothing is read back from the device before the last batch. Ranks ask `stop` together, equally often. Raise
    Interrupted if it returned True.
    """
    count = len(batches.subset)
    device = batches.device
    exact = torch.float64 if device.type != "mps" else torch.float32
    predicted = torch.zeros(count, dtype=torch.int64, device=device)
    confidence = torch.zeros(count, dtype=exact, device=device)
    loss_sum = torch.zeros((), dtype=exact, device=device)
    kept = torch.zeros(count if keep_logits else 0, batches.class_count, device=device)
    bar = progress_bar(total=count, desc=description, unit="image", delay=2)
    # Ranks ask together, so one with an image more must not ask once more: count the batches of the smallest share.
    questions = math.ceil((count // batches.ranks.size) / batches.evaluation_size)
    with torch.inference_mode(), bar:
        for number, (images, labels, positions) in enumerate(batches.evaluation()):
            if stop is not None and number < questions and stop():
                raise Interrupted
            with precision.autocast():
                logits = model(images)
            logits = logits.float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            mine = slice(positions[0], positions[-1] + 1, batches.ranks.size)
            predicted[mine] = torch.where(logits.isfinite().all(1), logits.argmax(1), NO_PREDICTION)
            confidence[mine] = logits.softmax(1, dtype=exact).amax(1)
            if keep_logits:
                kept[mine] = logits
            bar.update(len(positions) * batches.ranks.size)
    batches.ranks.sum(predicted, confidence, loss_sum, *([kept] if keep_logits else []))  # each rank has its own images
    return Evaluation(
        batches.subset.labels,
        predicted.cpu().numpy(),
        batches.class_count,
        float(loss_sum),
        confidence.cpu().numpy(),
        kept.cpu().numpy(),
    )
