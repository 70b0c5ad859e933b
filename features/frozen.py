"""Batches to train only the head: the outputs of the frozen layers for each image, computed once and kept.

Frozen layers give the same output in every epoch, so only flips may change the images. Knows nothing of options.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import nn

from dataset import Batches
from precision import Precision
from system.machine import available_memory
from utils import log, progress_bar


def keep_outputs(
    model: nn.Module, heads: tuple[str, ...], batches: Batches, validation: Batches, precision: Precision
) -> tuple[Batches, Batches] | None:
    """Return training and validation batches of the head's inputs; log the reason and return None if impossible.

    The outputs are computed at the first use, at the latest by `prepare`.
    """
    reason = _obstacle(model, heads, batches, validation)
    if reason:
        log.info(f"only the head is trained, but every epoch computes the whole network: {reason}")
        return None
    log.info("only the head is trained: the outputs of the frozen network are computed once")
    found = []
    for images, mirrored in ((batches, batches.augment == "flip"), (validation, False)):
        found.append(
            replace(images, frozen=cache(partial(frozen_outputs, model, heads[0], images, precision, mirrored)))
        )
    return found[0], found[1]


def _obstacle(model: nn.Module, heads: tuple[str, ...], batches: Batches, validation: Batches) -> str:
    """Return the reason why the outputs cannot be kept; an empty string if they can."""
    if len(heads) > 1:
        return f"{type(model).__name__} has {len(heads)} heads"
    if batches.augment not in ("flip", "none") or batches.mixup or batches.cutmix:
        return "images that change in other ways than by --augment flip have other outputs in every epoch"
    if batches.start_size:
        return "images that grow (--start_size) have other outputs in every epoch"
    size = batches.preprocess.image_size
    example = torch.zeros(1, 3, size, size, device=batches.device)
    was_training = model.training
    with torch.no_grad():
        found, logits = _inputs_of(model.eval(), heads[0], example)
        fits = found.ndim == 2 and torch.equal(model.get_submodule(heads[0])(found), logits)
    model.train(was_training)
    if not fits:
        return f"in {type(model).__name__} more follows its last layer"
    needed = 4 * found.shape[1] * (2 * len(batches.subset) + len(validation.subset))
    memory = available_memory()
    if memory is not None and needed > memory / 2:
        return f"their outputs would take {needed / 2**30:.1f} GB of memory"
    return ""


def _inputs_of(model: nn.Module, head: str, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input of the layer `head` for images (count, 3, side, side), and the logits of the model."""
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        logits = model(images)
    finally:
        hook.remove()
    return caught[-1], logits


def frozen_outputs(model: nn.Module, head: str, batches: Batches, precision: Precision, mirrored: bool) -> torch.Tensor:
    """Return the inputs of the layer `head`, float32 (images, 1 or 2, features) on the CPU.

    The second is that of the mirror image, if `mirrored`. Ranks share the work; then each holds all outputs, even a
    rank without images of its own.
    """
    was_training = model.training
    model.eval()
    size = batches.preprocess.image_size
    bar = progress_bar(total=len(batches.subset), desc="frozen layers", unit="image", delay=2)
    with torch.no_grad(), bar:
        example, _ = _inputs_of(model, head, torch.zeros(1, 3, size, size, device=batches.device))
        kept = torch.zeros(len(batches.subset), 1 + mirrored, *example.shape[1:], device=batches.device)
        for images, _, places in batches.evaluation():
            views = [images, images.flip(3)] if mirrored else [images]
            with precision.autocast():
                found = torch.stack([_inputs_of(model, head, view)[0].float() for view in views], 1)
            kept[torch.from_numpy(places).to(batches.device)] = found
            bar.update(len(places) * batches.ranks.size)
    model.train(was_training)
    batches.ranks.sum(kept)
    return kept.cpu()
