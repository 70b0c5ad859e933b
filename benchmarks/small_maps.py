"""What matrix products bring to convolutions of small maps on this CPU: single layers, and updates of whole networks.

`nn.Conv2d` and `features.cpu_layers`, as training uses it, take turns, forward and backward, in FP32 and with autocast
in bfloat16. The layers go beyond the bounds of that module, to show where they are right.

    python benchmarks/small_maps.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from features import cpu_layers  # noqa: E402 (found beside this folder)
from model import build_model  # noqa: E402
from utils import keep_freed_memory  # noqa: E402

# in_channels, out_channels, kernel_size, stride
LAYERS = (
    (256, 256, 3, 1),
    (256, 512, 3, 2),
    (512, 512, 3, 1),
    (512, 1024, 1, 1),
    (512, 2048, 1, 1),
    (1024, 2048, 1, 2),
)
SIDES = (1, 2, 4, 5, 7, 8)  # of a layer's output, pixels
NETWORKS = (
    ("resnet18", 32),
    ("resnet18", 64),
    ("resnet18", 96),
    ("resnet18", 128),
    ("resnet18", 160),
    ("resnet18", 224),
    ("resnet50", 64),
    ("resnet50", 128),
)


def seconds(models: list[nn.Module], images: torch.Tensor, *, amp: bool, rounds: int) -> list[float]:
    """The median time that each model takes for a forward and a backward pass, in turn; the first round is warm-up."""
    spent: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, times in zip(models, spent, strict=True):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                outputs = model(images)
            outputs.float().square().mean().backward()
            times.append(time.perf_counter() - started)
            model.zero_grad()
    return [statistics.median(times[1:]) for times in spent]


def both(plain: nn.Module, *, amp: bool) -> list[nn.Module]:
    """A model, channels last, in training mode, as it is and with matrix products."""
    plain = cpu_layers.avoid_in_place(plain).to(memory_format=torch.channels_last).train()
    return [plain, cpu_layers.multiply_small_maps(copy.deepcopy(plain), amp=amp)]


def multiplied(plain: nn.Conv2d, *, apart: int) -> nn.Conv2d:
    """The same layer as products of matrices, for maps of any size here; `apart` as the layer's own."""
    ours = copy.deepcopy(plain)
    ours.__class__ = cpu_layers.SmallMapConv2d
    ours.pixels = max(SIDES) ** 2
    ours.apart = apart
    return ours


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def compare_layers(count: int, rounds: int) -> None:
    print("| layer | weights, millions | " + " | ".join(f"{side}x{side}" for side in SIDES) + " |")
    print("|---|---:|" + "---:|" * len(SIDES))
    for inputs, outputs, kernel, stride in LAYERS:
        plain = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        plain = plain.to(memory_format=torch.channels_last)
        forms = {f"{inputs} to {outputs}, {kernel}x{kernel}, stride {stride}": multiplied(plain, apart=0)}
        if kernel > 1:
            forms["the same, pixel by pixel"] = multiplied(plain, apart=max(SIDES) ** 2)
        cells: dict[str, list[str]] = {name: [] for name in forms}
        for side in SIDES:
            batch = images(count, inputs, side * stride, side * stride)
            spent = [
                seconds([plain, *forms.values()], batch.to(dtype).requires_grad_(), amp=amp, rounds=rounds)
                for amp, dtype in ((False, torch.float32), (True, torch.bfloat16))  # as a layer before it hands it on
            ]
            for place, name in enumerate(forms, 1):
                cells[name].append(", ".join(f"{times[0] / times[place]:.2f}" for times in spent))
        for name in forms:
            print(f"| {name} | {plain.weight.numel() / 1e6:.1f} | {' | '.join(cells[name])} |", flush=True)


def compare_networks(count: int, rounds: int) -> None:
    print("| images/s | FP32 | with products | gain | AMP | with products | gain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, side in NETWORKS:
        batch = images(count, 3, side, side)
        cells = []
        for amp in (False, True):
            networks = both(build_model(name, 6, pretrained=False), amp=amp)
            plain, ours = seconds(networks, batch, amp=amp, rounds=rounds)
            cells += [f"{count / plain:.0f}", f"{count / ours:.0f}", f"{plain / ours:.2f}"]
        print(f"| {name}, {side} px | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="in an update")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.images} images in an update\n")
    print("How many times as fast a layer is by matrix products, in FP32 and in bfloat16, by its output's size:\n")
    compare_layers(arguments.images, arguments.rounds)
    print("\nWhole networks, forward and backward:\n")
    compare_networks(arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
