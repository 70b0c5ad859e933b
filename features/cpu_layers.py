"""Layers that a CPU trains faster than PyTorch's own, with the same weights under the same names.

Convolutions of small maps: oneDNN computes the gradient of a convolution's weights image by image, and each image goes
through all weights once; with millions of weights a 3x3 convolution takes nearly as long for 2x2 pixels as for 4x4, and
matrix products are faster (CHANGELOG.md, Decisions). In 16 bits: activations that write new tensors, and depthwise
convolutions in float32 (`DepthwiseConv2d`). Knows nothing of options.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from system.machine import cpu_instructions

WEIGHTS = 500_000  # that a convolution must have
MANY_WEIGHTS = 1_000_000
FEW_PIXELS = 4  # that its output may have on every processor
AMX_PIXELS = (FEW_PIXELS, 16, 64)  # on one with AMX: a step more in 16 bits, and a step more for many weights


def adapt_to_cpu(model: nn.Module, *, amp: bool) -> nn.Module:
    """Gives `model` every layer that this processor trains faster, in place; `amp`: whether it trains in 16 bits."""
    multiply_small_maps(model, amp=amp)
    if amp:
        keep_depthwise_float32(model)
        avoid_in_place(model)
    return model


def avoid_in_place(model: nn.Module) -> nn.Module:
    """Makes activations write new tensors; those a backward pass keeps are the same ones as in place.

    On CPUs PyTorch's 16-bit kernels take twice the time in place (34 against 14 ms for 67 million values).
    """
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


class SmallMapConv2d(nn.Conv2d):
    """A convolution that in training, if its output has few pixels, is computed by matrix products.

    It is one product of all pixels' neighbourhoods or, for very few pixels, one for each of them. The same sums in
    another order. Weights and their names are those of `nn.Conv2d`.
    """

    pixels = FEW_PIXELS
    apart = 0  # up to how many pixels each has a product of its own

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = self._output_size(images)
        if not self.training or images.dim() != 4 or min(height, width) < 1 or height * width > self.pixels:
            return super().forward(images)
        if height * width <= self.apart:
            return self._pixel_by_pixel(images, height, width)
        rows = self._neighbourhoods(images, height, width)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        outputs = F.linear(rows, weight, self.bias)  # (count * height * width, out_channels)
        return outputs.reshape(len(images), height, width, -1).permute(0, 3, 1, 2)

    def _pixel_by_pixel(self, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """A product for each pixel of the output leaves out what its kernel sees of the padding: with 3x3 weights and
        2x2 pixels five ninths of the arithmetic."""
        rows = images.permute(0, 2, 3, 1)
        kernel = self.weight.to(images.dtype)  # once: autocast would do it for each pixel
        taps = [line.unbind(0) for line in kernel.permute(2, 3, 0, 1).unbind(0)]
        outputs = []
        for row in range(height):
            for column in range(width):
                ys = self._seen(0, row, images)
                xs = self._seen(1, column, images)
                weight = torch.cat([taps[y][x] for y in ys.values() for x in xs.values()], 1)
                seen = rows[:, min(ys) : max(ys) + 1, min(xs) : max(xs) + 1].flatten(1)
                outputs.append(F.linear(seen, weight, self.bias))  # (count, out_channels)
        return torch.stack(outputs, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def _seen(self, axis: int, place: int, images: torch.Tensor) -> dict[int, int]:
        """The rows (axis 0) or columns (1) of `images` that one of the output sees, and the kernel's for each."""
        first = place * self.stride[axis] - int(self.padding[axis])
        taps = {first + tap: tap for tap in range(self.kernel_size[axis])}
        return {pixel: tap for pixel, tap in taps.items() if 0 <= pixel < images.shape[2 + axis]}

    def _output_size(self, images: torch.Tensor) -> tuple[int, int]:
        """Height and width of the output for images (count, channels, height, width)."""
        padding = map(int, self.padding)  # never a word here
        height, width = (
            (size + 2 * margin - kernel) // stride + 1
            for size, margin, kernel, stride in zip(
                images.shape[-2:], padding, self.kernel_size, self.stride, strict=True
            )
        )
        return height, width

    def _neighbourhoods(self, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the kernel sees at each pixel of the output: (count * height * width, kernel pixels * in_channels)."""
        down, right = map(int, self.padding)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, right, right, down, down))  # channels last
        row_step, column_step = self.stride
        shifted = [
            padded[:, row : row + height * row_step : row_step, column : column + width * column_step : column_step]
            for row in range(self.kernel_size[0])
            for column in range(self.kernel_size[1])
        ]
        return torch.cat(shifted, 3).reshape(len(images) * height * width, -1)


def multiply_small_maps(model: nn.Module, *, amp: bool) -> nn.Module:
    """Makes each convolution of `model` for which it can pay on this processor a `SmallMapConv2d`, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _can_pay(module):
            pixels, apart = _most_pixels(module.weight.numel(), amp)
            module.__class__ = SmallMapConv2d
            module.pixels = pixels  # type: ignore[assignment]
            module.apart = apart if _leaves_out_padding(module) else 0  # type: ignore[assignment]
    return model


def _most_pixels(weights: int, amp: bool) -> tuple[int, int]:
    """Up to how many pixels of an output products pay on this processor, and one for each pixel; 0: never.

    One for each pixel reads the weights more often, which in bfloat16 with AMX takes longer than the arithmetic.
    """
    instructions = cpu_instructions()
    if "amx_bf16" in instructions:
        return AMX_PIXELS[amp + (weights >= MANY_WEIGHTS)], 1 if amp else FEW_PIXELS
    if amp and "avx512_bf16" not in instructions:
        return 0, 0
    return FEW_PIXELS, FEW_PIXELS


def _leaves_out_padding(convolution: nn.Conv2d) -> bool:
    """Whether there is padding, and no pixel of the output that sees nothing else."""
    margins = [int(margin) for margin in convolution.padding]
    sizes = zip(margins, convolution.kernel_size, strict=True)
    return any(margins) and all(margin < size for margin, size in sizes)


def _can_pay(convolution: nn.Conv2d) -> bool:
    """Whether it has many weights, and none of the traits that the matrix product leaves out."""
    plain = (
        convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )
    return plain and convolution.weight.numel() >= WEIGHTS


def bfloat16_products(on: bool) -> None:
    """Lets a CPU's float32 convolutions and matrix products round their factors to bfloat16, or not.

    oneDNN may take this up or not: on processors without AMX it has no such kernels, and with AMX none for the
    gradients of weights. `doctor --ladder` measures it; no option uses it.
    """
    mkldnn: Any = torch.backends.mkldnn  # whose types do not know these switches
    for part in (mkldnn.conv, mkldnn.matmul):
        part.fp32_precision = "bf16" if on else "ieee"


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that trains in float32 under autocast; what it returns has its input's type.

    On CPUs the gradient of its inputs takes several times as long in 16 bits, where oneDNN has a kernel for dense
    convolutions only. Other convolutions are faster in 16 bits.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_autocast_enabled("cpu")):  # the forward pass alone is faster in 16 bits
            return super().forward(images)
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.float()).to(images.dtype)


def keep_depthwise_float32(model: nn.Module) -> nn.Module:
    """Makes each depthwise convolution of `model` a `DepthwiseConv2d`, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d
    return model
