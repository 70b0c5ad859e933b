"""Measure images per second of this package and of five others that train a ResNet-18, each with its own loop.

The 2020 tutorial's loop, PyTorch Lightning, Hugging Face's Trainer, Ultralytics' classify and timm, in FP32 and in 16
bits. Each side is a process of its own that stops after so many updates and goes on when its turn comes again (A B C
A B C ...), so that a drifting machine favours none: first those in FP32, then those in 16 bits beside the first side
again. On a GPU, whose memory may hold one only, they come one after another. While a side waits its loader may fetch a
few batches ahead, which favours the others a little. All sides together need up to 20 GB of memory.

    pip install '.[peers]' && python benchmarks/peers.py --data_dir data --image_size 256 --batch_size 64
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from peer_sides import SIDES  # noqa: E402

WARM_UP = 2  # updates before the first round


def main() -> None:
    arguments = parse()
    if arguments.child:
        serve(arguments)
        return
    sides = []
    for name in arguments.sides.split(","):
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {missing[0]} is not installed. Run: pip install {' '.join(PACKAGES[name])}")
        else:
            sides.append(f"{name} fp32")
            if name == "ultralytics" and not uses_cuda(arguments):
                print("ultralytics has no 16-bit training on a CPU")
            else:
                sides.append(f"{name} amp")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    failed = {}
    for group in groups(sides, one_at_a_time=uses_cuda(arguments)):
        failed |= measure(group, arguments.rounds, rates)
    report(arguments, {side: values for side, values in rates.items() if values}, failed)


def groups(sides: list[str], *, one_at_a_time: bool) -> list[list[str]]:
    """Return which sides take turns: as many as memory holds. Each precision measures the first side again."""
    if one_at_a_time:
        return [[side] for side in sides]
    by_precision = [[side for side in sides if side.endswith(precision)] for precision in ("fp32", "amp")]
    return [list(dict.fromkeys([*sides[:1], *group])) for group in by_precision if group]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder in the Intel layout, or with train/ and test/")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {','.join(SIDES)}")
    parser.add_argument("--workers", type=int, help="of each side's loader (default: the cores, at most 16)")
    parser.add_argument("--updates", type=int, default=4, help="in one round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sides.split(",")) - set(SIDES)
    if unknown:
        parser.error(f"--sides {sorted(unknown)[0]}: choose from {','.join(SIDES)}")
    if arguments.workers is None:
        from system.machine import cores

        arguments.workers = min(16, cores())
    return arguments


def uses_cuda(arguments: argparse.Namespace) -> bool:
    from utils import choose_device

    return choose_device(arguments.device, use=False).type == "cuda"


# ------------------------------------------------------------------------------ parent and children
def measure(sides: list[str], rounds: int, rates: dict[str, list[float]]) -> dict[str, str]:
    """Let some sides take turns; return the failed ones with their last output."""
    failed = {}
    children: dict[str, subprocess.Popen] = {}

    def ask(side: str, word: str | None) -> None:
        child = children[side]
        try:
            if word:
                child.stdin.write(word + "\n")
                child.stdin.flush()
            while not (line := child.stdout.readline()).startswith("RATE"):
                if not line:
                    status = child.wait()
                    killed = "it was killed, probably because memory ran out" if status == -signal.SIGKILL else ""
                    raise RuntimeError(killed or f"it ended with exit status {status}")
            if word == "round":
                rates[side].append(float(line.split()[1]))
        except (OSError, RuntimeError) as error:
            failed[side] = f"{error}: {last_words(child)}"
            del children[side]

    for side in sides:  # one by one: all that start at once would need more memory than all that wait
        children[side] = start(side)
        ask(side, None)
        print(f"{side}: {'ready' if side in children else failed[side]}", file=sys.stderr, flush=True)
    for number in range(rounds):
        for side in list(children):
            ask(side, "round")
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for child in children.values():
        child.kill()  # in the middle of its loop
        child.wait()
    return failed


def start(side: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the child has ended)
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
    )
    child.errors = errors
    return child


def environment() -> dict[str, str]:
    """Return an environment in which no side uses the network or writes outside a temporary folder."""
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    return {**os.environ, **quiet, "YOLO_CONFIG_DIR": tempfile.gettempdir(), "TOKENIZERS_PARALLELISM": "false"}


def last_words(child: subprocess.Popen) -> str:
    child.errors.seek(0)
    lines = child.errors.read().strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


class Turn:
    """Count updates, time rounds, and wait for the side's turn between them; called after every update."""

    def __init__(self, updates: int, batch_size: int, out: Any, finish: Callable[[], None]):
        self.updates = updates
        self.batch_size = batch_size
        self.out = out
        self.finish = finish  # returns when the device has finished its work
        self.left = WARM_UP
        self.started: float | None = None

    def __call__(self) -> None:
        self.left -= 1
        if self.left:
            return
        self.finish()
        seconds = 0.0 if self.started is None else time.perf_counter() - self.started
        print("RATE", self.updates * self.batch_size / seconds if seconds else 0, file=self.out, flush=True)
        if sys.stdin.readline().strip() != "round":
            os._exit(0)
        self.left = self.updates
        self.started = time.perf_counter()


def serve(arguments: argparse.Namespace) -> None:
    """Train one side without end, in a child process."""
    out = os.fdopen(os.dup(1), "w")  # the libraries' output must not mix with the figures
    os.dup2(2, 1)
    name, _, precision = arguments.child.partition(" ")
    if name == "ours":  # as main.py does, before torch is imported
        import utils

        utils.keep_freed_memory()
    import torch

    from utils import choose_device

    device = choose_device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False  # FP32 is FP32 on every side
    torch.backends.cuda.matmul.allow_tf32 = False

    def finish() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    arguments.device_in_use = device
    arguments.half = torch.float16 if device.type == "cuda" else torch.bfloat16
    turn = Turn(arguments.updates, arguments.batch_size, out, finish)
    with tempfile.TemporaryDirectory() as folder:
        SIDES[name](arguments, precision == "amp", turn, Path(folder))


PACKAGES = {
    "tutorial": [],
    "lightning": ["lightning"],
    "hugging_face": ["transformers", "accelerate"],
    "ultralytics": ["ultralytics"],
    "timm": ["timm"],
    "ours": [],
}
TITLES = {
    "tutorial": "the 2020 tutorial's loop",
    "lightning": "Lightning",
    "hugging_face": "Hugging Face's Trainer",
    "ultralytics": "Ultralytics classify",
    "timm": "timm",
    "ours": "this package",
}


# ---------------------------------------------------------------------------------------- report
def report(arguments: argparse.Namespace, rates: dict[str, list[float]], failed: dict[str, str]) -> None:
    import torch

    from option import VERSION
    from system.machine import device_name
    from utils import choose_device

    device = choose_device(arguments.device)
    versions = {
        name: importlib.metadata.version(PACKAGES[name][0])
        for name in SIDES
        if PACKAGES[name] and any(side.startswith(f"{name} ") for side in rates)
    }
    versions |= {"ours": VERSION}
    half = "float16" if device.type == "cuda" else "bfloat16"
    print(
        f"\n{device_name(device)}; torch {torch.__version__}; ResNet-18, {arguments.image_size} px, batch "
        f"{arguments.batch_size}, {arguments.workers} loader workers; {arguments.rounds} rounds of {arguments.updates} "
        f"updates in turn; {date.today()}\n"
    )
    print(f"| images/s, median (min to max) | version | FP32 | {half} | this package ÷ it: FP32 | {half} |")
    print("|---|---|---:|---:|---:|---:|")
    for name in SIDES:
        cells = [f"{name} {precision}" for precision in ("fp32", "amp")]
        if any(side in rates for side in cells):
            row = [TITLES[name], versions.get(name, ""), *(cell(rates.get(side)) for side in cells)]
            row += [ratio(rates, f"ours {precision}", f"{name} {precision}") for precision in ("fp32", "amp")]
            print(f"| {' | '.join(row)} |")
    for side, reason in failed.items():
        print(f"\n{side} failed: {reason}")
    if arguments.json:
        content = {"arguments": vars(arguments), "versions": versions, "rates": rates, "failed": failed}
        Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False))
    if failed:
        sys.exit(1)


def cell(values: list[float] | None) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})" if values else ""


def ratio(rates: dict[str, list[float]], ours: str, theirs: str) -> str:
    """Return the speed-up of this package: the median over rounds of neighbouring measurements."""
    if ours == theirs or not rates.get(ours) or not rates.get(theirs):
        return ""
    return f"{statistics.median(one / other for one, other in zip(rates[ours], rates[theirs], strict=False)):.2f}"


if __name__ == "__main__":
    main()
