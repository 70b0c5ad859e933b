"""What float32 depthwise convolutions bring to AMP on this CPU: whole updates of networks that are full of them.

FP32, plain autocast and autocast with `precision.keep_depthwise_float32`, as training uses it, take turns on one thread
and are timed by the process's own CPU time, so that other programs hardly matter.

    python benchmarks/depthwise.py
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
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from features.cpu_layers import avoid_in_place  # noqa: E402 (found beside this folder)
from model import build_model  # noqa: E402
from precision import keep_depthwise_float32  # noqa: E402
from utils import keep_freed_memory  # noqa: E402

MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0", "convnext_tiny")


def update(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, amp: bool) -> None:
    """Forward and backward pass in FP32, or with autocast in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    images = torch.randn(arguments.images, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 6, (arguments.images,))
    print(f"torch {torch.__version__}; {tuple(images.shape)}, channels last, one thread; images/s\n")
    print("| | FP32 | AMP | AMP, depthwise in float32 | gain |")
    print("|---|---:|---:|---:|---:|")
    for name in arguments.models:
        plain = build_model(name, 6, pretrained=False).to(memory_format=torch.channels_last).train()
        sides = {
            "fp32": copy.deepcopy(plain),
            "amp": avoid_in_place(copy.deepcopy(plain)),
            "ours": keep_depthwise_float32(avoid_in_place(copy.deepcopy(plain))),
        }
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds + 1):
            for side, model in sides.items():
                started = time.process_time()
                update(model, images, labels, amp=side != "fp32")
                spent[side].append(time.process_time() - started)
        rates = {side: arguments.images / statistics.median(values[1:]) for side, values in spent.items()}
        cells = [f"{rate:.1f}" for rate in rates.values()]
        print(f"| {name} | {' | '.join(cells)} | {rates['ours'] / rates['amp']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
