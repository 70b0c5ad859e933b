"""Cost against the number of images: seconds to open and to feed one epoch, and memory, at several sizes.

The loader alone, without a model, on demo scenes, decoded in memory and streamed; each in a fresh process.

    python benchmarks/scaling.py --counts 1000,10000,50000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from system import machine  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,10000,50000")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], arguments.child[1], arguments.image_size)))
        return
    from images.demo import draw_demo

    print("| images | cache | first opening, s | later opening, s | epoch, s | images/s | peak resident, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, arguments.counts.split(",")):
            data = Path(folder, str(count))
            draw_demo(data, train_images=count, test_images=60)
            for cache in ("memory", "none"):
                size = ["--image_size", str(arguments.image_size)]
                command = [sys.executable, __file__, *size, "--child", str(data), cache]
                first, later = (
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    for _ in range(2)
                )
                print(
                    f"| {count:,} | {cache} | {first['open']:.1f} | {later['open']:.1f} | {later['epoch']:.1f} | "
                    f"{later['rate']:,.0f} | {later['memory']:,.0f} |",
                    flush=True,
                )


def measure(data_dir: str, cache: str, image_size: int) -> dict[str, float]:
    """Opens the data, feeds all training images once; seconds, images/s, and MB of resident peak."""
    import torch

    from dataset import Batches
    from images.opening import Opening, open_data_set
    from transforms import Preprocess

    started = time.perf_counter()
    data = open_data_set(data_dir, image_size=image_size, seed=0, opening=Opening(cache))
    opened = time.perf_counter() - started
    batches = Batches(data.train, Preprocess(torch.device("cpu"), image_size), 64, len(data.classes))
    started = time.perf_counter()
    for pieces in batches.epoch(0):
        for _ in pieces:
            pass
    seconds = time.perf_counter() - started
    memory = machine.peak_memory(torch.device("cpu"))["peak_memory_mb"]
    return {"open": opened, "epoch": seconds, "rate": len(data.train) / seconds, "memory": memory}


if __name__ == "__main__":
    main()
