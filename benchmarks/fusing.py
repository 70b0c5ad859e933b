"""What compiling only BatchNorm, ReLU and the residual sum would bring on this CPU, forward and backward.

Eager and compiled take turns on one thread and are timed by the process's own CPU time, so that other programs hardly
matter. `no mask` is a ReLU whose backward pass takes the sign of its output: the compiler saves a mask of bool
otherwise, and packing and unpacking that mask is what costs.

    python benchmarks/fusing.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import keep_freed_memory  # noqa: E402 (found beside this folder)


class Rectified(torch.autograd.Function):
    """ReLU whose backward pass needs no mask."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        out = values.clamp_min(0)
        context.save_for_backward(out)
        return out

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        (out,) = context.saved_tensors
        return gradient * out.sign()


def parts(relu: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Callable[..., torch.Tensor]]:
    """The groups of operators, each a function of (values, residual, running mean and variance, weight, bias)."""

    def norm(x: torch.Tensor, mean: Any, variance: Any, weight: Any, bias: Any) -> torch.Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, True, 0.1, 1e-5)

    return {
        "ReLU": lambda x, y, *_: relu(x),
        "sum, ReLU": lambda x, y, *_: relu(x + y),
        "BatchNorm": lambda x, y, *rest: norm(x, *rest),
        "BatchNorm, ReLU": lambda x, y, *rest: relu(norm(x, *rest)),
        "BatchNorm, sum, ReLU": lambda x, y, *rest: relu(norm(x, *rest) + y),
    }


def milliseconds(sides: dict[str, Callable[..., torch.Tensor]], inputs: tuple, rounds: int) -> dict[str, float]:
    """The median CPU time of forward and backward of each side, in turn, after one call each that warms up."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    gradient = torch.randn_like(inputs[0]).detach()
    for _ in range(rounds + 1):
        for name, function in sides.items():
            started = time.process_time()
            function(*inputs).backward(gradient)
            spent[name].append(time.process_time() - started)
            for tensor in inputs:
                tensor.grad = None
    return {name: 1000 * statistics.median(values[1:]) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    shape = (arguments.images, arguments.channels, arguments.size, arguments.size)
    print(f"torch {torch.__version__}; {shape}, channels last, one thread; ms forward and backward\n")
    print("| | eager | compiled | compiled, no mask | eager ÷ compiled | eager ÷ compiled, no mask |")
    print("|---|---:|---:|---:|---:|---:|")
    for dtype in (torch.bfloat16, torch.float32):
        values, residual = (
            torch.randn(shape).to(memory_format=torch.channels_last).to(dtype).requires_grad_() for _ in range(2)
        )
        weight = torch.ones(arguments.channels, requires_grad=True)
        bias = torch.zeros(arguments.channels, requires_grad=True)
        inputs = (values, residual, torch.zeros(arguments.channels), torch.ones(arguments.channels), weight, bias)
        unmasked = parts(Rectified.apply)
        for name, function in parts(F.relu).items():
            torch._dynamo.reset()
            sides = {
                "eager": function,
                "compiled": torch.compile(function, dynamic=False),
                "no mask": torch.compile(unmasked[name], dynamic=False),
            }
            found = milliseconds(sides, inputs, arguments.rounds)
            cells = [*(f"{value:.1f}" for value in found.values())]
            cells += [f"{found['eager'] / found[side]:.2f}" for side in ("compiled", "no mask")]
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
