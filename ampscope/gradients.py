"""Measure the largest magnitude of each gradient, update by update, while it is cheap; nothing waits for a device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch

SHARE = 0.005  # of an update: the most that a measurement may cost; there may be two
RARELY = 50  # updates between two measurements, at most
KEPT = 8  # measurements that are kept
GROWING = 5  # consecutive measurements that must all have grown
DRIFT = 100.0  # report growth beyond this multiple of the usual largest gradient


class Gradients:
    """The gradients of some parameters by name, and their order of arrival in the backward pass."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]):
        self.parameters = parameters
        self.interval = 1
        self.order: dict[str, int] = {}
        self._ring: deque[tuple[int, list[str], torch.Tensor, torch.Tensor | None]] = deque(maxlen=KEPT)
        self._largest: list[tuple[int, float, str]] = []
        self._arrivals: list[Any] = []
        self._ends: dict[tuple[str, str], torch.Tensor] = {}
        self._began: float | None = None
        self._seconds = 0.0

    def follow_arrivals(self) -> None:
        """Learn the order of arrival in the first updates."""
        self._arrivals = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrived(name))
            for name, parameter in self.parameters.items()
            if parameter.is_leaf
        ]

    def _arrived(self, name: str) -> None:
        self.order.setdefault(name, len(self.order))

    def forget_arrivals(self) -> None:
        """Stop learning the order of arrival."""
        for handle in self._arrivals:
            handle.remove()
        self._arrivals = []

    def begin(self) -> None:
        """Record the time at which an optimizer steps."""
        now = time.perf_counter()
        if self._began is not None:
            self._seconds = now - self._began
        self._began = now

    def present(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that have a gradient."""
        return [name for name in names if self.parameters[name].grad is not None]

    def first(self, names: list[str]) -> str:
        """Return the name of the gradient that arrives first, the nearest to the loss."""
        return min(names, key=lambda name: self.order.get(name, len(self.order)))

    def last(self, names: list[str]) -> torch.Tensor | None:
        """Return the gradient that arrives last: a value that is not finite in an earlier one usually reaches it."""
        key = names[0], names[-1]
        if self._arrivals or key not in self._ends:
            self._ends[key] = self.parameters[max(names, key=lambda name: self.order.get(name, -1))]
        return self._ends[key].grad

    def measure(self, names: list[str], update: int, *, always: bool = False) -> torch.Tensor | None:
        """Return the largest magnitude of each, on the device, or None if this update is left out."""
        if not always and update % self.interval:
            return None
        started = time.perf_counter()
        measured = self.norms(names)
        if update > 2 and self._seconds:
            cost = time.perf_counter() - started
            self.interval = min(max(1, round(cost / self._seconds / SHARE)), RARELY)
        return measured

    @torch.no_grad()
    def norms(self, names: list[str]) -> torch.Tensor:
        """Return the largest magnitude of each."""
        found = [self.parameters[name].grad for name in names]
        gradients = [part.coalesce().values() if part.is_sparse else part for part in found if part is not None]
        return torch.stack([norm.float() for norm in torch._foreach_norm(gradients, torch.inf)])

    def remember(self, update: int, names: list[str], measured: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Keep the measurement of an update; `scale` is the loss scale that is still in it."""
        if self._ring and self._ring[-1][:2] == (update, names):  # the sum of several micro-batches
            self._ring.pop()
            self._largest = [entry for entry in self._largest if entry[0] != update]
        self._ring.append((update, names, measured, scale))
        if measured.device.type == "cpu":
            values = measured.tolist()
            largest = max(values)
            factor = scale.item() if scale is not None else 1.0
            self._largest.append((update, largest / factor, names[values.index(largest)]))

    def before(self, name: str) -> list[dict[str, float]]:
        """Return the largest magnitude of one gradient in the previous updates, without the loss scale."""
        moved: dict[int, float] = {}
        for update, names, measured, scale in self._ring:
            if name in names:
                value = measured[names.index(name)].item() / (scale.item() if scale is not None else 1.0)
                moved[update] = value
        return [{"update": update, "largest": value} for update, value in moved.items() if value < float("inf")]

    def drift(self) -> str | None:
        """Describe the growth of the largest gradient, if it grew at each measurement, far beyond the usual."""
        usual, last = self._largest[:KEPT], self._largest[-GROWING:]
        del self._largest[KEPT:-GROWING]
        if len(self._largest) < 2 * GROWING - 2:
            return None
        start = median(value for _, value, _ in usual[: GROWING - 1])
        growing = all(before[1] < after[1] for before, after in zip(last, last[1:], strict=False))
        if not growing or not 0 < start * DRIFT < last[-1][1] < float("inf"):
            return None
        moved = ", ".join(f"{value:.3g} ({update:,})" for update, value, _ in last)
        return f"the largest gradient grows from update to update: {moved}, at last in {last[-1][2]}"


class Late:
    """A measurement on a device at one update, read at the next one, so that nothing waits for it."""

    def __init__(self, update: int, names: list[str], calls: list[Any], **tensors: torch.Tensor | None):
        self.update = update
        self.names = names
        self.calls = calls
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._tensors = {name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in found.items()}
        device = next(iter(found.values())).device
        self._ready: Callable[[], None] = lambda: None
        if device.type != "cpu":
            event = torch.Event(device)
            event.record()
            self._ready = event.synchronize

    def read(self) -> dict[str, torch.Tensor]:
        """Return the values: their update has ended on the device, but for what came after the look."""
        self._ready()
        return self._tensors
