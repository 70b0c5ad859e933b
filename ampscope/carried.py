"""Track gradients that carry the loss scale, and gradients left over from the previous update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ampscope.tensors import address, tensors_in

FAR = 64  # operators to follow from a scaled loss back to the loss


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Hide operators in this context from all modes: they do not belong to the step."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


class Carried:
    """Follow the gradients of a step from the backward pass to the optimizer.

    `scaled` are the ids of parameters whose gradients are multiplied by the loss scale, `left` are the parameters whose
    gradients an optimizer has used and nothing has cleared since.
    """

    def __init__(self) -> None:
        self.scaled: set[int] = set()
        self.left: dict[int, torch.Tensor] = {}
        self._nodes: list[Any] = []  # nodes that made scaled losses
        self._unscaled: dict[int, list[torch.Tensor]] = {}  # parameters by optimizer, from unscale_ to update
        self._scaled_gradients: dict[int, torch.Tensor] = {}  # returned by autograd.grad

    def loss_scaled(self, losses: Any) -> None:
        self._nodes += [loss.grad_fn for loss in tensors_in(losses) if loss.grad_fn is not None]

    def is_scaled(self, losses: Any) -> bool:
        """Return True if a loss was computed from a scaled one."""
        waiting = [loss.grad_fn for loss in tensors_in(losses) if loss.grad_fn is not None]
        for _ in range(FAR):
            if not waiting or not self._nodes:
                return False
            node = waiting.pop(0)
            if any(node is known for known in self._nodes):
                return True
            waiting += [following for following, _ in node.next_functions if following is not None]
        return False

    def clear(self) -> None:
        """Forget the gradients that were set to None or to zero."""
        with unseen():
            self.left = {key: part for key, part in self.left.items() if _holds(part.grad)}

    def versions(self, parameters: Sequence[torch.Tensor]) -> dict[int, tuple[int, int]]:
        return {id(part): (id(part.grad), part.grad._version) for part in parameters if part.grad is not None}

    def went_back(self, before: dict[int, tuple[int, int]], parameters: Sequence[torch.Tensor], scaled: bool) -> bool:
        """Record a backward pass; return True if it added to gradients that were already unscaled."""
        after = self.versions(parameters)
        changed = {key for key, version in after.items() if before.get(key) != version}
        if scaled:
            self.scaled |= changed
        return any(id(part) in changed for parts in self._unscaled.values() for part in parts)

    def unscale(self, optimizer: Any) -> None:
        parts = _parameters_of(optimizer)
        self._unscaled[id(optimizer)] = parts
        self.scaled -= {id(part) for part in parts}

    def carries(self, optimizer: Any) -> bool:
        return any(id(part) in self.scaled for part in _parameters_of(optimizer))

    def step(self, optimizer: Any) -> bool:
        """Record a step; return True if it used gradients of the previous update again."""
        parts = [part for part in _parameters_of(optimizer) if part.grad is not None]
        again = any(id(part) in self.left for part in parts)
        self.left |= {id(part): part for part in parts}
        self._unscaled.pop(id(optimizer), None)
        return again

    def end_update(self) -> None:
        """Record the end of an update, after scaler.update."""
        self.scaled.clear()
        self._unscaled.clear()

    def gradients_made(self, gradients: Any) -> None:
        """Record the gradients that autograd.grad returned for a scaled loss."""
        self._scaled_gradients |= {address(gradient): gradient for gradient in tensors_in(gradients)}

    def misuses(self, op: str, given: list[torch.Tensor]) -> bool:
        """Return True if an operator computes with scaled gradients before they are unscaled."""
        used = [address(tensor) for tensor in given if address(tensor) in self._scaled_gradients]
        if not used or op in ("detach", "view", "reshape", "alias", "_to_copy"):
            return False
        divided = op.removeprefix("_foreach_").rstrip("_") in ("mul", "div") and len({*used}) == len(used)
        for key in used:
            del self._scaled_gradients[key]
        return not divided

    def is_gradient(self, tensor: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
        """Return True if a tensor is the gradient, still scaled, of one of these parameters."""
        memory = address(tensor)
        return memory > 0 and any(
            id(part) in self.scaled and part.grad is not None and address(part.grad) == memory for part in parameters
        )


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    return [part for group in getattr(optimizer, "param_groups", []) for part in group["params"]]


def _holds(gradient: torch.Tensor | None) -> bool:
    """Return True if a gradient has a nonzero value."""
    if gradient is None:
        return False
    values = gradient._values() if gradient.layout is torch.sparse_coo else gradient
    return bool(values.any())
