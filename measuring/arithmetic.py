"""Does this device compute right? Operators that networks train with, in a 16-bit type, against float64 on the CPU.

Released versions of PyTorch had silent wrong ones: https://github.com/pytorch/pytorch/issues/163347 and 169688.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

BOUND = 6.0  # times the type's eps: rounding alone stays well below it
SLOW = 4.0  # times as long as in float32: the kernel is probably a reference implementation
NOT_THERE = ("not implemented", "not supported", "NOT_SUPPORTED")
LARGE_ENOUGH = 2e-4  # seconds in float32 from which times are compared
Case = tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]  # an operator, and the shapes of its tensors


def _convolution(shape: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Case:
    operator = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[len(shape)]
    return lambda images, kernel: operator(images, kernel, **options), [shape, weight]


CASES: dict[str, Case] = {
    "convolution 3x3": _convolution((4, 64, 28, 28), (64, 64, 3, 3), padding=1),
    "convolution 1x1": _convolution((4, 64, 28, 28), (128, 64, 1, 1)),
    "convolution 7x7, stride 2": _convolution((4, 3, 64, 64), (64, 3, 7, 7), stride=2, padding=3),
    "convolution, odd channels": _convolution((3, 17, 15, 13), (31, 17, 3, 3)),
    "convolution, dilated": _convolution((2, 32, 20, 20), (32, 32, 3, 3), dilation=2),
    "convolution, grouped": _convolution((2, 32, 16, 16), (64, 8, 3, 3), groups=4),
    "convolution, depthwise": _convolution((2, 96, 16, 16), (96, 1, 3, 3), padding=1, groups=96),
    "convolution 1-d": _convolution((4, 24, 65), (48, 24, 5)),
    "convolution 3-d": _convolution((2, 8, 9, 10, 11), (16, 8, 3, 3, 3)),
    "transposed convolution": (
        lambda images, kernel: functional.conv_transpose2d(images, kernel, stride=2),
        [(2, 32, 9, 9), (32, 16, 3, 3)],
    ),
    "matrix product": (torch.matmul, [(256, 512), (512, 256)]),
    "matrix product, odd sizes": (torch.matmul, [(33, 127), (127, 65)]),
    "batched matrix product": (torch.bmm, [(12, 64, 48), (12, 48, 80)]),
    "linear": (lambda inputs, weight, bias: functional.linear(inputs, weight, bias), [(50, 96), (10, 96), (10,)]),
    "batch norm": (
        lambda images, weight, bias: functional.batch_norm(images, None, None, weight, bias, training=True),
        [(8, 32, 14, 14), (32,), (32,)],
    ),
    "layer norm": (
        lambda inputs, weight, bias: functional.layer_norm(inputs, (96,), weight, bias),
        [(16, 20, 96), (96,), (96,)],
    ),
    "layer norm, many rows": (  # on CPUs the gradients of weight and bias are summed in 16 bits
        lambda inputs, weight, bias: functional.layer_norm(inputs, (96,), weight, bias),
        [(4, 3136, 96), (96,), (96,)],
    ),
    "group norm": (
        lambda images, weight, bias: functional.group_norm(images, 4, weight, bias),
        [(4, 32, 9, 9), (32,), (32,)],
    ),
    "max pooling": (lambda images: functional.max_pool2d(images, 3, 2, 1), [(4, 16, 29, 29)]),
    "average pooling": (lambda images: functional.avg_pool2d(images, 3, 2), [(4, 16, 29, 29)]),
    "global average pooling": (lambda images: functional.adaptive_avg_pool2d(images, 1), [(4, 64, 7, 7)]),
    "attention": (functional.scaled_dot_product_attention, [(2, 4, 50, 32)] * 3),
    "causal attention": (
        lambda query, key, value: functional.scaled_dot_product_attention(query, key, value, is_causal=True),
        [(2, 3, 33, 40)] * 3,
    ),
    "softmax": (lambda inputs: functional.softmax(inputs, -1), [(64, 100)]),
    "GELU": (functional.gelu, [(64, 200)]),
    "SiLU": (functional.silu, [(64, 200)]),
}


def check(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return how many operators agree with float64, and which do not, are slow, or are missing.

    Keys: right (a count), wrong (name to relative error of the output or of the worst gradient), slow (name to seconds
    in 16 bits and in float32), missing (names of those that are not implemented), failed (name to any other error).
    """
    found: dict[str, Any] = {"right": 0, "wrong": {}, "slow": {}, "missing": [], "failed": {}}
    for name, (operator, shapes) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        try:
            seconds, low = _timed(operator, [tensor.to(device) for tensor in tensors])
        except RuntimeError as error:  # NotImplementedError is one, too
            if isinstance(error, NotImplementedError) or any(words in str(error) for words in NOT_THERE):
                found["missing"].append(name)
            else:
                found["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        true = _gradients(operator, [tensor.double() for tensor in tensors])
        error_size = max(_error(one, other) for one, other in zip(low, true, strict=True))
        if error_size < BOUND * torch.finfo(dtype).eps:
            found["right"] += 1
        else:
            found["wrong"][name] = error_size
        plain, _ = _timed(operator, [tensor.to(device, torch.float32) for tensor in tensors])
        if plain > LARGE_ENOUGH and seconds > SLOW * plain:
            found["slow"][name] = [seconds, plain]
    return found


def _gradients(operator: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of its product with fixed numbers, each on the CPU in float64."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = operator(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every type
    gradients = torch.autograd.grad(output, leaves, weights.to(output.device, output.dtype))
    return [part.detach().cpu().double() for part in (output, *gradients)]


def _timed(operator: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Return the seconds of the fastest of three runs, after one that warms up, and its result."""
    found = _gradients(operator, tensors)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        found = _gradients(operator, tensors)
        taken.append(time.perf_counter() - started)
    return min(taken), found


def _error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the relative error by the norm; infinity for a value that is not finite."""
    error = ((found - true).norm() / true.norm().clamp_min(1e-12)).item()
    return error if math.isfinite(error) else math.inf
