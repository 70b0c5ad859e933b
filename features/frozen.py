"""Batches to train only the head: the outputs of the frozen layers for each image, computed once and kept.

Frozen layers give the same output in every epoch, so only flips may change the images. Knows nothing of options.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset import Batches, Loaded
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
    kept = []
    for images, mirrored in ((batches, batches.augment == "flip"), (validation, False)):
        same = {part.name: getattr(images, part.name) for part in fields(Batches) if part.init}
        source = FrozenNetwork(model, heads[0], images, precision, mirrored)
        kept.append(KeptBatches(**same, source=source))
    return kept[0], kept[1]


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


@dataclass
class FrozenNetwork:
    """Compute the inputs of the layer `head` of `model` for the images of `batches`."""

    model: nn.Module
    head: str
    batches: Batches
    precision: Precision
    mirrored: bool

    @cached_property
    def outputs(self) -> torch.Tensor:
        """Return (images, 1 or 2, features), float32, on the CPU: for each image and, if `mirrored`, its mirror image.

        They are computed at the first call. Ranks share the work; then each holds all outputs, even a rank without
        images of its own.
        """
        batches = self.batches
        was_training = self.model.training
        self.model.eval()
        size = batches.preprocess.image_size
        with torch.no_grad(), self._bar() as bar:
            example, _ = _inputs_of(self.model, self.head, torch.zeros(1, 3, size, size, device=batches.device))
            views_each = 2 if self.mirrored else 1
            kept = torch.zeros(len(batches.subset), views_each, *example.shape[1:], device=batches.device)
            for images, _, places in batches.evaluation():
                views = [images, images.flip(3)] if self.mirrored else [images]
                with self.precision.autocast():
                    found = torch.stack([_inputs_of(self.model, self.head, view)[0].float() for view in views], 1)
                kept[torch.from_numpy(places).to(batches.device)] = found
                bar.update(len(places) * batches.ranks.size)
        self.model.train(was_training)
        batches.ranks.sum(kept)
        return kept.cpu()

    def _bar(self) -> Any:
        return progress_bar(total=len(self.batches.subset), desc="frozen layers", unit="image", delay=2)


@dataclass
class KeptBatches(Batches):
    """Batches of the inputs of a head, float32 (count, features), instead of images."""

    source: FrozenNetwork = field(kw_only=True)

    def prepare(self) -> float:
        """Compute the outputs of the frozen network; return the seconds that it took."""
        started = time.perf_counter()
        _ = self.source.outputs
        return time.perf_counter() - started

    def first_images(self, most: int) -> tuple[np.ndarray, torch.Tensor]:
        return self.source.batches.first_images(most)

    def evaluation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        for (outputs, labels, _), places in zip(
            self._on_device(self._evaluation_places()), self._evaluation_places(), strict=True
        ):
            yield outputs[:, 0], labels, places

    def _on_device(self, batches: list[np.ndarray]) -> Iterator[Loaded]:
        for batch in batches:
            labels = torch.from_numpy(self.subset.labels[batch])
            yield self.source.outputs[torch.from_numpy(batch)].to(self.device), labels.to(self.device), None

    def _micro_batch(
        self, loaded: Loaded, random: torch.Tensor, epoch: int, places: np.ndarray, update: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, labels, _ = loaded
        if outputs.shape[1] == 1:
            return outputs[:, 0], labels
        mirrored = (random[:, 0] < 0.5).long().to(outputs.device)
        return outputs[torch.arange(len(places), device=outputs.device), mirrored], labels
