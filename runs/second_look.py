"""Look again at an update or a validation that went wrong, under the library: which module, operator and line began it.

Costs nothing before: an update is a function of (seed, epoch, position) and of the weights, which one that goes wrong
leaves as they were. Knows nothing of the words in which it is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dataset import Batches
from model import Network
from precision import Precision
from utils import seed_everything


@dataclass(frozen=True)
class SecondLook:
    """Repeat what `network` does with `batches`; both methods return what `ampscope.events.second_look` does.

    They return None if everything is finite this time, and among several processes, of which one alone must not begin
    a collective operation.
    """

    network: Network
    precision: Precision
    criterion: nn.Module
    batches: Batches
    seed: int

    def at_update(self, epoch: int, update: int, scale: float) -> dict[str, Any] | None:
        """Repeat an update (from 0) of the epoch at this loss scale, up to the micro-batch that goes wrong."""
        if self.batches.ranks.size > 1:
            return None
        model = self.network.forward.model
        waited = self.batches.seconds_waited
        seed_everything(self.seed, epoch, update, self.batches.ranks.rank)  # for dropout, as in the training
        parts = next(self.batches.epoch(epoch, update, update + 1))
        try:
            inputs = ((images, labels) for images, labels, *_ in parts)
            return self._first(model, inputs, scale / self.batches.images_in(update))
        finally:
            self.batches.seconds_waited = waited
            model.zero_grad(set_to_none=True)

    def at_validation(self, validation: Batches) -> dict[str, Any] | None:
        """Find the first batch of a validation whose logits are not finite."""
        if validation.ranks.size > 1:
            return None
        with torch.no_grad():
            parts = ((images, labels) for images, labels, _ in validation.evaluation())
            return self._first(self.network.validation_forward.model, parts, None)

    def _first(self, model: nn.Module, parts: Iterable[Any], factor: float | None) -> dict[str, Any] | None:
        """Return what is found in the first part that is not finite; `factor` is for the loss; None: no way back."""
        from ampscope.events import second_look
        from ampscope.repeating import finite, record

        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        name = self.network.heads[0] if self.network.only_head else ""
        try:
            for images, labels in parts:
                with self.precision.autocast():
                    call = record(model, (images,), {}, self.batches.device)
                    logits = model(images)
                    loss = self.criterion(logits, labels)
                good = finite(loss) and finite(logits)
                if good and factor is not None:
                    call.follow(logits)
                    (loss * factor).backward()
                if good and all(finite(parameter.grad) for parameter in model.parameters()):
                    continue
                model.zero_grad(set_to_none=True)
                found = second_look({name: model}, call, good=good)
                return found if found["text"] else None
        except Exception as error:  # a diagnosis must not hide the failure
            return {"text": f"it could not be repeated ({type(error).__name__})", "cures": []}
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        return None
