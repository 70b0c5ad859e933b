"""Answer with a mean: of the views of an image, or of several models."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from choices import VIEWS


class MeanOfViews(nn.Module):
    """Test-time augmentation: the mean of the logits of the views of images that `choices.VIEWS` calls `tta`."""

    def __init__(self, model: nn.Module, tta: str):
        super().__init__()
        self.model = model
        self.tta = tta

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (count, classes), float32, of square images (count, 3, side, side)."""
        quarters = VIEWS[self.tta].quarters
        views = [
            view.rot90(number, (2, 3)) if number else view  # no turn would copy the image into another layout
            for number in quarters
            for view in (images, images.flip(3))
        ]
        return torch.stack([self.model(view).float() for view in views]).sum(0) / len(views)  # may overflow in float16


class MeanOfModels(nn.Module):
    """An ensemble: the logarithm of the mean of the models' probabilities, whose softmax is that mean."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (count, classes), float32, of square images (count, 3, side, side)."""
        logs = torch.stack([model(images).float().log_softmax(1) for model in self.models])
        return logs.logsumexp(0) - math.log(len(self.models))
