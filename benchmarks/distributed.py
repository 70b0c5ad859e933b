"""Two ranks of one thread against one process of two threads, and on paper eight GPUs.

Both sides are the program as a user runs it, on the same images, batch and seed; runs alternate, so that a
drifting machine favours neither; medians are compared. What a GPU cluster would do is computed, not measured.

    python benchmarks/distributed.py --data_dir data/demo --image_size 128 --batch_size 64 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LINKS = {"NVLink, 450 GB/s": 450e9, "100 Gbit/s": 12.5e9}  # bytes per second and direction of one GPU


def main() -> None:
    arguments = parse()
    if not arguments.paper_only:
        measured(arguments)
        print()
    on_paper(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data/demo", help="drawn there where it is missing")
    parser.add_argument("--model", default="ResNet18")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3, help="the first one of each run is not counted")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--paper_only", action="store_true")
    parser.add_argument("--gpu_rate", type=float, default=3000, help="images/s of one GPU, for the calculation")
    return parser.parse_args()


# ---------------------------------------------------------------------------------- measured
def measured(arguments: argparse.Namespace) -> None:
    """Runs both sides in turn and prints each run, the medians and the efficiency."""
    from images.demo import draw_demo

    data = Path(arguments.data_dir)
    if not (data / "seg_train").exists():
        draw_demo(data)
    sides = {"one process, 2 threads": (1, 2), "two ranks, 1 thread each": (2, 1)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        turns = list(sides.items())
        for side, (ranks, threads) in turns if repeat % 2 == 0 else reversed(turns):
            rates[side].append(rate_of(arguments, ranks, threads))
            print(f"{side}: {rates[side][-1]:.1f} images/s", flush=True)
    medians = {side: statistics.median(found) for side, found in rates.items()}
    one, two = medians.values()
    precision = "AMP" if arguments.amp else "FP32"
    print(
        f"\n{arguments.model}, {precision}, {arguments.image_size} px, batch {arguments.batch_size}, medians of "
        f"{arguments.repeats} runs:"
    )
    for side, found in rates.items():
        print(f"  {side:<26}{medians[side]:>8.1f} images/s  ({min(found):.1f} to {max(found):.1f})")
    print(f"  efficiency {two / one:.3f} (two ranks over one process; 0.9 or more is wanted)")


def rate_of(arguments: argparse.Namespace, ranks: int, threads: int) -> float:
    """images/s of one training: the median of its epochs after the first, as the run itself records it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "main.py"),
            f"--data_dir={arguments.data_dir}",
            "--pretrained=0",
            f"--model={arguments.model}",
            f"--image_size={arguments.image_size}",
            f"--batch_size={arguments.batch_size}",
            f"--epochs={arguments.epochs}",
            f"--checkpoint_dir={folder}",
            "--checkpoint_name=run",
            "--device=cpu",
            "--quiet",
            *(["--amp"] if arguments.amp else []),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"a run failed:\n{done.stderr}")
        return json.loads((Path(folder) / "run" / "result.json").read_text())["images_per_second"]


# ---------------------------------------------------------------------------------- on paper
def on_paper(arguments: argparse.Namespace) -> None:
    """Bytes that a ring all-reduce sends per GPU and update, 2(N-1)/N of the gradients, and their share of a step.

    The share assumes that nothing overlaps; DDP overlaps the exchange with the backward pass, so it is a bound.
    """
    from model import build_model

    count = sum(parameter.numel() for parameter in build_model(arguments.model, 6, pretrained=False).parameters())
    size = 4 * count  # gradients are float32 under AMP, too
    print(f"{arguments.model}: {count:,} parameters, {size / 1e6:.1f} MB of float32 gradients per update.")
    print(f"On paper, at {arguments.gpu_rate:,.0f} images/s of one GPU (an assumption), nothing overlapped:\n")
    heads = [f"{name}: ms, share" for name in LINKS]
    print(f"{'GPUs':>4}  {'images each':>11}  {'MB sent':>8}  " + "  ".join(f"{head:>28}" for head in heads))
    for images, fixed in ((256, True), (256, False)):
        print("  batch of one update 256" if fixed else "  256 images on each GPU")
        for gpus in (1, 2, 4, 8, 16):
            each = images / gpus if fixed else images
            sent = 2 * (gpus - 1) / gpus * size
            compute = each / arguments.gpu_rate
            cells = []
            for speed in LINKS.values():
                seconds = sent / speed
                cells.append(f"{1e3 * seconds:>17.2f}, {100 * seconds / (seconds + compute):>7.1f} %")
            print(f"{gpus:>4}  {each:>11.0f}  {sent / 1e6:>8.1f}  " + "  ".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()
