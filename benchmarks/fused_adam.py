"""What it brings that fused Adam copies no gradient: whole updates of ResNet-18 on this CPU, in FP32 and with AMP.

PyTorch's AdamW and that of `optimizer.py` take turns on two copies of one model, 64 images an update.

    python benchmarks/fused_adam.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from features.cpu_layers import adapt_to_cpu  # noqa: E402 (found beside this folder)
from model import build_model  # noqa: E402
from optimizer import make_optimizer  # noqa: E402
from utils import keep_freed_memory  # noqa: E402

SIDES = (64, 96, 128)


def milliseconds(side: int, count: int, rounds: int, *, amp: bool) -> list[tuple[float, float]]:
    """The medians of a whole update and of its optimizer step: with PyTorch's AdamW, with ours."""
    model = build_model("resnet18", 6, pretrained=False).to(memory_format=torch.channels_last).train()
    models = [copy.deepcopy(model) for _ in range(2)]
    for each in models:
        adapt_to_cpu(each, amp=amp)
    plain = torch.optim.AdamW(models[0].parameters(), 1e-3, weight_decay=0.05, fused=True)
    ours = make_optimizer(models[1].parameters(), "ADAMW", learning_rate=1e-3, weight_decay=0.05, fused=True)
    images = torch.randn(count, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.arange(count) % 6
    spent: list[list[tuple[float, float]]] = [[], []]
    for _ in range(rounds + 1):
        for each, optimizer, times in zip(models, (plain, ours), spent, strict=True):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(each(images), labels)
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            ended = time.perf_counter()
            optimizer.zero_grad()
            times.append((1e3 * (ended - started), 1e3 * (ended - before)))
    return [tuple(map(statistics.median, zip(*times[1:], strict=True))) for times in spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print("| ResNet-18, ms | update, PyTorch's AdamW | ours | gain | its step, PyTorch's | ours |")
    print("|---|---:|---:|---:|---:|---:|")
    for amp in (False, True):
        for side in SIDES:
            plain, ours = milliseconds(side, arguments.batch_size, arguments.rounds, amp=amp)
            name = f"{'AMP' if amp else 'FP32'}, {side} px"
            gain = f"{plain[0] / ours[0]:.2f}"
            print(f"| {name} | {plain[0]:.0f} | {ours[0]:.0f} | {gain} | {plain[1]:.1f} | {ours[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
