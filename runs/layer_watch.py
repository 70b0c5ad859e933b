"""Write layers.jsonl: every so many updates, how large each layer's values are and how many of its gradients vanish.

A layer that drifts towards 65,504, float16's largest value, is seen before its first update is skipped. Knows nothing
of options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from system.files import json_text


class LayerWatch:
    """A context around each update; every `every` updates it measures the layers that have weights of their own.

    Between them nothing is attached. A measured update waits for its device once.
    """

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler, file: Path, every: int):
        self.layers = {name: part for name, part in model.named_modules() if name and [*part.parameters(recurse=False)]}
        self.scaler = scaler
        self.file = file
        self.every = every
        self._begun = False
        self._found: dict[tuple[str, str], torch.Tensor] = {}

    @contextmanager
    def __call__(self, update: int) -> Iterator[None]:
        """Watch this update (from 1), if it is due."""
        if update % self.every:
            yield
            return
        scale = self.scaler.get_scale()
        self._found.clear()
        hooks = [hook for name, layer in self.layers.items() for hook in self._hooks(name, layer)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        values = torch.stack([*self._found.values()]).tolist() if self._found else []
        rows: dict[str, dict[str, float]] = {}
        for (name, key), value in zip(self._found, values, strict=True):
            rows.setdefault(name, {})[key] = value
        self._write({"update": update, "loss_scale": scale, "layers": rows})

    def _hooks(self, name: str, layer: nn.Module) -> list[Any]:
        def forward(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._note(name, "output", output)
                if output.requires_grad:
                    output.register_hook(lambda gradient: self._note(name, "gradient", gradient))

        def accumulated(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                self._found[name, "zeros"] = (parameter.grad == 0).float().mean()

        hooks: list[Any] = [layer.register_forward_hook(forward)]
        weight = max(layer.parameters(recurse=False), key=torch.numel)
        return [*hooks, weight.register_post_accumulate_grad_hook(accumulated)] if weight.requires_grad else hooks

    def _note(self, name: str, key: str, tensor: torch.Tensor) -> None:
        """Keep the largest magnitude of all micro-batches."""
        largest = tensor.detach().abs().max().float()
        before = self._found.get((name, key))
        self._found[name, key] = largest if before is None else torch.maximum(before, largest)

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line; the first one replaces those of updates that are made again after a resume."""
        if not self._begun and self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            earlier = [text for text in lines if json.loads(text)["update"] < line["update"]]
            self.file.write_text("".join(earlier), encoding="utf-8")
        self._begun = True
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{json_text(line)}\n")
