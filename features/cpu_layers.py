"""Layers that train faster or more exactly on CPUs than PyTorch's own, with the same weights under the same names.

All are for 16 bits. Convolutions of small maps: oneDNN computes the gradient of the weights image by image, and reads
all weights for each; with a million weights and at most 64 pixels one matrix product is faster on processors with AMX
(CHANGELOG.md, Decisions). Activations that write new tensors; depthwise convolutions and LayerNorm in float32. Knows
nothing of options.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ampscope.float32_layers import in_float32, keep_float32
from system.machine import cpu_instructions

MANY_WEIGHTS = 1_000_000  # of a convolution: with fewer weights a matrix product is not faster
MOST_PIXELS = 64  # of its output


def adapt_to_cpu(model: nn.Module, *, amp: bool) -> nn.Module:
    """Replace in `model` every layer that trains better otherwise here, in place. `amp`: it trains in 16 bits."""
    if amp:
        multiply_small_maps(model)
        keep_depthwise_float32(model)
        keep_layer_norms_float32(model)
        avoid_in_place(model)
    return model


def avoid_in_place(model: nn.Module) -> nn.Module:
    """Make activations write new tensors; the backward pass keeps as many tensors as in place.

    On CPUs PyTorch's 16-bit kernels take twice the time in place (34 against 14 ms for 67 million values).
    """
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is computed as one matrix product in training, if its output has at most 64 pixels.

    The sums are the same in another order. Weights and their names are those of `nn.Conv2d`.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = self._output_size(images)
        if not self.training or images.dim() != 4 or min(height, width) < 1 or height * width > MOST_PIXELS:
            return super().forward(images)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        outputs = F.linear(self._neighbourhoods(images, height, width), weight, self.bias)
        return outputs.reshape(len(images), height, width, -1).permute(0, 3, 1, 2)

    def _output_size(self, images: torch.Tensor) -> tuple[int, int]:
        """Return height and width of the output for images (count, channels, height, width)."""
        sizes = zip(images.shape[-2:], map(int, self.padding), self.kernel_size, self.stride, strict=True)
        height, width = [(size + 2 * margin - kernel) // stride + 1 for size, margin, kernel, stride in sizes]
        return height, width

    def _neighbourhoods(self, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the input of each output pixel: (count * height * width, kernel pixels * in_channels)."""
        down, right = map(int, self.padding)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, right, right, down, down))  # channels last
        row_step, column_step = self.stride
        shifted = [
            padded[:, row : row + height * row_step : row_step, column : column + width * column_step : column_step]
            for row in range(self.kernel_size[0])
            for column in range(self.kernel_size[1])
        ]
        return torch.cat(shifted, 3).reshape(len(images) * height * width, -1)


def multiply_small_maps(model: nn.Module) -> nn.Module:
    """Make each plain convolution of many weights a `SmallMapConv2d`, in place, if the processor has AMX."""
    if "amx_bf16" not in cpu_instructions():
        return model
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain(module) and module.weight.numel() >= MANY_WEIGHTS:
            module.__class__ = SmallMapConv2d
    return model


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Return True if the convolution uses no feature that the matrix product does not support."""
    return (
        convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def bfloat16_products(on: bool) -> None:
    """Let a CPU's float32 convolutions and matrix products round their factors to bfloat16, or not.

    oneDNN may ignore this: on processors without AMX it has no such kernels, and with AMX none for the gradients of
    weights. `doctor --ladder` measures it; no option uses it.
    """
    mkldnn: Any = torch.backends.mkldnn  # the type stubs lack these switches
    for part in (mkldnn.conv, mkldnn.matmul):
        part.fp32_precision = "bf16" if on else "ieee"


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that trains in float32 under autocast; its output has the type of its input.

    On CPUs the gradient of its inputs takes several times as long in 16 bits, because oneDNN uses a kernel for dense
    convolutions. Other convolutions are faster in 16 bits.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        forward = super().forward
        return in_float32(forward, images) if self.training else forward(images)  # which alone is faster in 16 bits


def keep_depthwise_float32(model: nn.Module) -> nn.Module:
    """Make each depthwise convolution of `model` a `DepthwiseConv2d`, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d
    return model


def keep_layer_norms_float32(model: nn.Module) -> nn.Module:
    """Let each LayerNorm of `model` compute in float32 under autocast, in place.

    PyTorch's kernel for CPUs sums the gradients of weight and bias in the type of its input: in bfloat16 they are off
    by 12 % at 12,544 rows (docs/errors_gain.md).
    """
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.LayerNorm)]
    keep_float32(model, ",".join(names))
    return model
