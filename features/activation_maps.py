"""Show which parts of an image a class depends on: class activation maps after Grad-CAM (Selvaraju et al. 2017).

The weight of a channel is the mean over all positions of the gradient of the class's logit; the map is the weighted sum
of the channels, without negative values. Works for convolutional networks and for transformers that keep positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F

from features.means import MeanOfViews

LATEST = 24  # number of last layers to try: their outputs take memory


def explained(
    model: nn.Module, images: Iterable[torch.Tensor], classes: Iterable[int], side: int = 32
) -> list[list[list[int]]] | None:
    """Return a map of `side` x `side` integers from 0 to 255 for each image (1, 3, height, width) and class index.

    Return None if the network has no suitable layer. Images are processed one at a time, because gradients take memory.
    """
    plain = model.model if isinstance(model, MeanOfViews) else model
    found = []
    for image, index in zip(images, classes, strict=True):
        maps = activation_maps(plain, image, torch.tensor([index], device=image.device))
        if maps is None:
            return None
        small = F.interpolate(maps[None], (side, side), mode="area")[0, 0]
        found.append((255 * small).round().int().tolist())
    return found


def activation_maps(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor | None:
    """Return maps (count, side, side) from 0 to 1 of images (count, 3, side, side) for class indices (count,).

    They are taken from the last layer that still has positions and affects the logits; None if there is no such layer.
    `model` is in evaluation mode and computes in float32.
    """
    outputs: list[tuple[nn.Module, torch.Tensor]] = []

    def keep(module: nn.Module, _inputs: object, output: object) -> None:
        if torch.is_tensor(output) and output.requires_grad and places_of(module, output) is not None:
            outputs.append((module, output))
            del outputs[:-LATEST]

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(keep) for module in leaves]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            score = logits.gather(1, classes[:, None]).sum()  # in evaluation mode images are independent
            gradients = torch.autograd.grad(score, [output for _, output in outputs], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for (module, output), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
        channels = places_of(module, output)
        if gradient is None or channels is None or not depends_on_places(gradient_of := channels(gradient)):
            continue
        weights = gradient_of.mean((2, 3), keepdim=True)
        maps = (weights * channels(output)).sum(1, keepdim=True).relu().float().detach()
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return None


def depends_on_places(gradient: torch.Tensor) -> bool:
    """Return True if the logits depend on several positions: some transformers read only one token at the end."""
    used = (gradient.abs().amax(1) > 0).flatten(1).sum(1)
    return bool((used > 1).any())


def places_of(module: nn.Module, output: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that views an output as (count, channels, height, width); None if it has only one position.

    The output may have that shape already, have its channels last (Swin), or be tokens (count, positions, channels).
    Tokens before the last square number of positions (a class token, registers) are dropped.
    """
    if output.ndim == 4:
        channels_last = isinstance(module, nn.LayerNorm) or output.shape[1] == output.shape[2] != output.shape[3]
        if channels_last:
            return _channels_first if output.shape[1] > 1 else None
        return _unchanged if output.shape[2] > 1 and output.shape[3] > 1 else None
    if output.ndim == 3 and output.shape[1] > 4:
        side = math.isqrt(output.shape[1])

        def unflattened(tokens: torch.Tensor) -> torch.Tensor:
            return tokens[:, -(side**2) :].unflatten(1, (side, side)).permute(0, 3, 1, 2)

        return unflattened
    return None


def _channels_first(values: torch.Tensor) -> torch.Tensor:
    return values.permute(0, 3, 1, 2)


def _unchanged(values: torch.Tensor) -> torch.Tensor:
    return values
