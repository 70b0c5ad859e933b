"""Rename the layers of a ResNet from Hugging Face's transformers to the names in torchvision and timm."""

from __future__ import annotations

import re

import torch

State = dict[str, torch.Tensor]

_START = "embedder.embedder."
_LAYER = re.compile(
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.(\d+))\.(convolution|normalization)\.(\w+)"
)


def with_usual_names(state: State) -> State:
    """Return a ResNet of transformers (`microsoft/resnet-18`) under torchvision's names; any other state unchanged."""
    if not any(_LAYER.search(name) for name in state):
        return state
    return {_renamed(name.removeprefix("resnet.")): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    if name.startswith(_START):
        return name.removeprefix(_START).replace("convolution", "conv1").replace("normalization", "bn1")
    found = _LAYER.fullmatch(name)
    if found is None:
        return name.replace("classifier.1.", "fc.")
    stage, block, part, number, kind, value = found.groups()
    if part == "shortcut":
        layer = "downsample.0" if kind == "convolution" else "downsample.1"
    else:
        layer = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}"
    return f"layer{int(stage) + 1}.{block}.{layer}.{value}"
