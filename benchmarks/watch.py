"""What `inspection.watch` costs while nothing happens: blocks of updates with it and without, in turns.

On a CPU it counts the processor time of this process, so that others matter less; one thread says most.

Run from the repository's root: OMP_NUM_THREADS=1 python benchmarks/watch.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from inspection import watch

SETTLING = 5  # updates, after which watch knows what it costs


def networks(device: torch.device) -> dict[str, tuple[nn.Module, torch.Tensor, torch.dtype]]:
    """Small and large updates: (model, inputs, autocast's type)."""
    from torchvision import models

    layers = [layer for _ in range(20) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return {
        "MLP of 20 layers, batch 256, float16": (nn.Sequential(*layers), torch.randn(256, 256), torch.float16),
        "ResNet-18, 8 images of 64 px, bfloat16": (models.resnet18(), torch.randn(8, 3, 64, 64), torch.bfloat16),
    }


def measure(model: nn.Module, inputs: torch.Tensor, dtype: torch.dtype, blocks: int, seconds: float) -> list[float]:
    """The cost of each pair of blocks, as a share of the one without: the order changes from pair to pair."""
    device = inputs.device
    # On a CPU the process's own time, which other processes do not lengthen.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, foreach=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16, init_scale=2.0**8)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = model(inputs).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def block(updates: int, context: contextlib.AbstractContextManager) -> float:
        with context:
            for _ in range(SETTLING):
                update()
            started = clock()
            for _ in range(updates):
                update()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return (clock() - started) / updates

    updates = max(20, round(seconds / block(3, contextlib.nullcontext())))
    shares = []
    for pair in range(blocks):
        taken = {}
        for watched in (pair % 2 == 0, pair % 2 == 1):
            taken[watched] = block(updates, watch(model, scaler) if watched else contextlib.nullcontext())
        shares.append(taken[True] / taken[False] - 1)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks, with and without")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one block")
    options = parser.parse_args()
    device = torch.device(options.device)
    for name, (model, inputs, dtype) in networks(device).items():
        shares = measure(model.to(device), inputs.to(device), dtype, options.blocks, options.seconds)
        low, middle, high = statistics.quantiles(shares, n=4)
        print(f"{name}: {middle:+.1%} (half of the pairs between {low:+.1%} and {high:+.1%})")


if __name__ == "__main__":
    main()
