"""Measure everything on a GPU in one command: draw full-size scenes, then run the project's own tools.

The tests that only a GPU can pass; the ladder of ResNet-18 and ResNet-50 with its bounds; other libraries in turn;
throughput of each precision, plain and compiled; how long the GPU idles (doctor); the 2020 recipe (256 px, batch 256,
120 epochs) with AMP from end to end; a resume that must be exact; the comparison table. All output is kept in one file.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --images 240 --image_size 64 --batch_size 32 --epochs 1 --updates 2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data_dir", default="data/full", help="scenes are drawn there if it does not exist")
    parser.add_argument("--images", type=int, default=14_034, help="training images to draw")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=120, help="of the run from end to end")
    parser.add_argument("--compare_epochs", type=int, default=10, help="of each run of the comparison")
    parser.add_argument("--updates", type=int, default=50, help="in one round of the throughput benchmark")
    parser.add_argument("--checkpoint_dir", default="checkpoint")
    parser.add_argument("--out", default="gpu.txt", help="file for all that is printed")
    arguments = parser.parse_args()

    shape = [
        f"--device={arguments.device}",
        f"--image_size={arguments.image_size}",
        f"--batch_size={arguments.batch_size}",
    ]
    data = f"--data_dir={arguments.data_dir}"
    precisions = "fp32,tf32,amp-fp16,amp-bf16" if arguments.device.startswith("cuda") else "fp32,amp-bf16"
    kept = [f"--checkpoint_dir={arguments.checkpoint_dir}"]
    train = [data, *shape, "--pretrained=0", *kept, "--overwrite"]
    with open(arguments.out, "w", encoding="utf-8") as out:
        for command in (
            ["tests/long/test_cuda.py"],
            [
                "main.py",
                "prepare",
                "--demo",
                data,
                f"--train_images={arguments.images}",
                f"--test_images={arguments.images // 5}",
            ],
            ["main.py", "doctor", "--ladder", *shape, f"--out={arguments.checkpoint_dir}/ladder18"],
            ["main.py", "doctor", "--ladder", "--model=resnet50", *shape, f"--out={arguments.checkpoint_dir}/ladder50"],
            ["benchmarks/peers.py", data, *shape, f"--updates={arguments.updates}"],
            [
                "benchmarks/throughput.py",
                data,
                *shape,
                f"--precisions={precisions}",
                f"--updates={arguments.updates}",
                "--compile",
            ],
            ["main.py", "doctor", data, *shape],
            ["main.py", "train", "--amp", *train, f"--epochs={arguments.epochs}", "--checkpoint_name=gpu_amp"],
            ["benchmarks/verify_resume.py", "--amp", data, *shape, "--pretrained=0", "--epochs=2"],
            ["main.py", "compare", *train, f"--epochs={arguments.compare_epochs}", "--checkpoint_name=gpu_comparison"],
        ):
            run(command, out)


def run(command: list[str], out) -> None:
    """Run one of the project's scripts; print and keep its output. Continue after a failure."""
    title = f"$ python {' '.join(command)}\n"
    print(title, end="", flush=True)
    out.write(title)
    script, *words = command
    start = ["-m", "pytest"] if script.startswith("tests/") else []
    process = subprocess.Popen(
        [sys.executable, *start, str(ROOT / script), *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        out.write(line)
    ending = f"(exit status {process.wait()})\n\n"
    print(ending, end="", flush=True)
    out.write(ending)
    out.flush()


if __name__ == "__main__":
    main()
