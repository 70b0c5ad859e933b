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

    `scaled` are the ids of parameters whose gradients are multiplied by a loss scale, each with the id of the scaler;
    `plain` are those with a gradient of a loss that is not. `left` are the parameters whose gradients an optimizer has
    used and nothing has cleared since, `kept` those of them that a backward pass has added to.
    """

    def __init__(self) -> None:
        self.scaled: dict[int, int] = {}
        self.plain: dict[int, Any] = {}  # and the event of that backward pass
        self.left: dict[int, torch.Tensor] = {}
        self.kept: set[int] = set()
        self._nodes: list[tuple[Any, int]] = []  # nodes that made scaled losses, and the scaler
        self._unscaled: dict[int, list[torch.Tensor]] = {}  # parameters by optimizer, from unscale_ to update
        self._scaled_gradients: dict[int, torch.Tensor] = {}  # returned by autograd.grad

    def loss_scaled(self, losses: Any, scaler: Any) -> None:
        self._nodes += [(loss.grad_fn, id(scaler)) for loss in tensors_in(losses) if loss.grad_fn is not None]

    def scaled_by(self, losses: Any) -> int | None:
        """Return the id of the scaler that scaled a loss, or one that it was computed from."""
        waiting = [loss.grad_fn for loss in tensors_in(losses) if loss.grad_fn is not None]
        for _ in range(FAR):
            if not waiting or not self._nodes:
                return None
            node = waiting.pop(0)
            for known, scaler in self._nodes:
                if node is known:
                    return scaler
            waiting += [following for following, _ in node.next_functions if following is not None]
        return None

    def clear(self, parameters: Sequence[torch.Tensor]) -> None:
        """Forget the gradients of these parameters that were set to None or to zero."""
        with unseen():
            self.left = {key: part for key, part in self.left.items() if _holds(part.grad)}
            known = self.scaled.keys() | self.plain.keys()
            cleared = {id(part) for part in parameters if id(part) in known and not _holds(part.grad)}
        self.scaled = {key: scaler for key, scaler in self.scaled.items() if key not in cleared}
        self.plain = {key: event for key, event in self.plain.items() if key not in cleared}

    def versions(self, parameters: Sequence[torch.Tensor]) -> dict[int, tuple[int, int]]:
        return {id(part): (id(part.grad), part.grad._version) for part in parameters if part.grad is not None}

    def went_back(
        self, before: dict[int, tuple[int, int]], parameters: Sequence[torch.Tensor], event: Any, *, scaler: int | None
    ) -> bool:
        """Record a backward pass; return True if it added scaled gradients to those that were already unscaled."""
        after = self.versions(parameters)
        changed = {key for key, version in after.items() if before.get(key) != version}
        unscaled = {id(part) for parts in self._unscaled.values() for part in parts}
        self.kept |= changed & self.left.keys()
        if scaler is not None:
            self.scaled |= dict.fromkeys(changed, scaler)
        else:
            self.plain |= dict.fromkeys(changed - unscaled, event)
        return scaler is not None and bool(changed & unscaled)

    def never_scaled(self, optimizer: Any) -> Any:
        """Return the event of a backward pass whose loss was not scaled, although the scaler is to unscale it."""
        parts = [id(part) for part in _parameters_of(optimizer) if part.grad is not None]
        return next((self.plain[key] for key in parts if key in self.plain), None)

    def scaled_by_another(self, optimizer: Any, scaler: Any) -> bool:
        """Return True if gradients carry the scale of another scaler than the one that is to unscale them."""
        return any(self.scaled.get(id(part), id(scaler)) != id(scaler) for part in _parameters_of(optimizer))

    def unscale(self, optimizer: Any) -> None:
        parts = _parameters_of(optimizer)
        self._unscaled[id(optimizer)] = parts
        for part in parts:
            self.scaled.pop(id(part), None)
            self.plain.pop(id(part), None)

    def carries(self, optimizer: Any) -> bool:
        return any(id(part) in self.scaled for part in _parameters_of(optimizer))

    def step(self, optimizer: Any) -> bool:
        """Record a step; return True if it used gradients of the previous update again."""
        parts = [part for part in _parameters_of(optimizer) if part.grad is not None]
        again = any(id(part) in self.kept for part in parts)
        self.left |= {id(part): part for part in parts}
        self.kept -= {id(part) for part in parts}
        for part in parts:
            self.scaled.pop(id(part), None)
            self.plain.pop(id(part), None)
        self._unscaled.pop(id(optimizer), None)
        return again

    def missing(self, optimizer: Any) -> str:
        """Return "all" if an optimizer has no gradient to step on, "zero" if each of them is zero, else ""."""
        gradients = [part.grad for part in _parameters_of(optimizer) if part.grad is not None]
        with unseen():
            return "all" if not gradients else "" if any(map(_holds, gradients)) else "zero"

    def end_update(self) -> None:
        """Record the end of an update, after scaler.update."""
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
