"""Measure training throughput: the 2020 tutorial's loop, this package's in each precision, the compute bound.

Each side is a process of its own, warmed up and then asked for rounds in turn (A B C A B C ...), so that a
drifting machine does not favour one; on a GPU, whose memory may hold one side only, they come one after another.
Medians over rounds; ratios are what to quote.

    python benchmarks/throughput.py --data_dir data --image_size 256 --batch_size 64
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from system import machine  # noqa: E402

FLOP_PER_IMAGE = 14.2e9  # ResNet-18 at 256x256, forward and backward: 3 x 2 x 2.37e9 multiply-adds


def main() -> None:
    arguments = parse()
    if arguments.child:
        serve(arguments)
        return
    sides = [*(["tutorial"] if not arguments.no_tutorial else []), *arguments.precisions.split(",")]
    if arguments.compile:
        sides += [f"{name}+compile" for name in arguments.precisions.split(",")]
    rates: dict[str, list[float]] = {}
    facts: dict[str, dict] = {}
    failed: list[str] = []
    print(f"decoding into the cache: {decode_rate(arguments):,.0f} images/s")
    print(f"a later start: {start_up(arguments):.1f} s from `import torch` to the first update\n", flush=True)
    for group in [[side] for side in sides] if uses_cuda(arguments) else [sides]:
        try:
            measure(group, arguments.rounds, rates, facts)
        except RuntimeError as error:
            failed.append(str(error))
    report(arguments, rates, {side: fact for side, fact in facts.items() if side in rates})
    if failed:
        sys.exit("\n".join(failed))


def measure(sides: list[str], rounds: int, rates: dict[str, list[float]], facts: dict[str, dict]) -> None:
    """Let some sides take turns. Raise RuntimeError if one ends early."""
    children = {side: start(side) for side in sides}
    for side, child in children.items():  # each has been preparing itself since its start
        facts[side] = answer(child)  # measured during warm-up
        print(f"{side}: ready", file=sys.stderr)
    for number in range(rounds):
        for child in children.values():
            for figure, rate in ask(child).items():
                rates.setdefault(figure, []).append(rate)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for side, child in children.items():
        facts[side] |= ask(child, "end")
        child.wait()


def uses_cuda(arguments: argparse.Namespace) -> bool:
    from utils import choose_device

    return choose_device(arguments.device, use=False).type == "cuda"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", default="fp32,amp-bf16")
    parser.add_argument("--compile", action="store_true", help="measure each precision with torch.compile, too")
    parser.add_argument("--no_tutorial", action="store_true", help="leave the tutorial's loop out")
    parser.add_argument("--updates", type=int, default=4, help="in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------ parent and children
def start(side: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(child: subprocess.Popen) -> dict:
    for line in child.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{child.args[-1]} ended early (exit status {child.wait()})")


def ask(child: subprocess.Popen, word: str = "round") -> dict:
    child.stdin.write(word + "\n")
    child.stdin.flush()
    return answer(child)


def serve(arguments: argparse.Namespace) -> None:
    """Prepare one side in a child process, then run a round for each line of input."""
    side, _, compiled = arguments.child.partition("+")
    with tempfile.TemporaryDirectory() as folder:
        make = tutorial_loop if side == "tutorial" else package_loop
        rounds, facts = make(arguments, side, bool(compiled), folder)
        print(json.dumps(facts), flush=True)
        for line in sys.stdin:
            if line.strip() == "end":
                print(json.dumps(rounds("end")), flush=True)
                return
            print(json.dumps({f"{arguments.child}{name}": rate for name, rate in rounds("round").items()}), flush=True)


def package_loop(arguments, side: str, compiled: bool, folder: str) -> tuple[Callable[[str], dict], dict]:
    """Return this package's own loop, with its loader or, for the compute bound, with one constant batch."""
    import utils

    utils.keep_freed_memory()
    import torch

    from assemble import evaluation_batches, make_trainer, set_up
    from command_line.groups import grouped
    from command_line.parsing import parse, precision_words
    from distributed import Ranks
    from evaluate import evaluate
    from images.asked import data_to_train_on
    from runs.folder import RunDirectory
    from train import update_weights

    words = [
        *precision_words(side),
        "--pretrained=0",
        f"--device={arguments.device}",
        f"--data_dir={arguments.data_dir}",
        f"--batch_size={arguments.batch_size}",
        f"--image_size={arguments.image_size}",
        "--epochs=1000",
        *(["--compile"] if compiled else []),
    ]
    started = time.perf_counter()
    setup = set_up(grouped(parse(words)), Ranks())
    data = data_to_train_on(setup.asked, setup.ranks, setup.preprocess)
    open_seconds = time.perf_counter() - started
    trainer = make_trainer(setup, data, RunDirectory(folder))
    trainer.network.begin_epoch(0)

    def updates(source: Iterator, count: int) -> float:
        """Return images per second over `count` full updates, read back at the end as the trainer does."""
        started = time.perf_counter()
        records = []
        for _ in range(count):
            records.append(
                update_weights(
                    trainer.network.forward,
                    next(source),
                    arguments.batch_size,
                    optimizer=trainer.recipe.optimizer,
                    scaler=trainer.scaler,
                    precision=trainer.recipe.precision,
                    criterion=trainer.recipe.criterion,
                    clip_grad_norm=None,
                )
            )
            trainer.scheduler.step()
        torch.stack(records).cpu()
        return count * arguments.batch_size / (time.perf_counter() - started)

    def endless() -> Iterator:
        full = len(data.train) // arguments.batch_size
        for epoch in range(10**6):
            for number, pieces in enumerate(trainer.batches.epoch(epoch)):
                if number == full:  # a smaller last batch would cost less
                    break
                yield pieces

    loader = endless()
    piece = list(next(loader))
    resident = iter(lambda: piece, None)
    updates(loader, 2)
    machine.reset_peak_memory(setup.device)

    def answer_to(word: str) -> dict:
        if word == "round":
            return {"": updates(loader, arguments.updates), " bound": updates(resident, arguments.updates)}
        piece.clear()  # the batch of the compute bound does not belong to the loop
        machine.reset_peak_memory(setup.device)
        updates(loader, 2)
        facts = {
            **machine.peak_memory(setup.device),
            "matmul_flops": matrix_product_rate(setup.device, trainer.recipe.precision),
        }
        trainer.network.model.eval()
        data.test.keep(8 * arguments.batch_size)
        started = time.perf_counter()
        evaluate(trainer.network.model, evaluation_batches(setup, data, data.test), trainer.recipe.precision)
        return {**facts, "evaluation": len(data.test) / (time.perf_counter() - started)}

    return answer_to, {"open_seconds": open_seconds}


def decode_rate(arguments: argparse.Namespace) -> float:
    """Return images per second from files into a new cache: the median of three passes over up to 4,000 images."""
    from images.cache import Opening
    from images.folders import find_image_set
    from images.stores import open_store

    paths = [path for path, _ in find_image_set(arguments.data_dir).train][:4000]
    seconds = []
    for _ in range(4):  # the first pass reads the files from the disk
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            open_store(paths, Path(folder), limit=arguments.image_size, opening=Opening(cache="memory"))
            seconds.append(time.perf_counter() - started)
    return len(paths) / statistics.median(seconds[1:])


FIRST_UPDATE = """
import sys, time, torch
begun = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import main, train

def report(*arguments, **options):
    print(time.perf_counter() - begun, flush=True)
    raise KeyboardInterrupt

train.update_weights = report
main.main(sys.argv[2:])
"""


def start_up(arguments: argparse.Namespace) -> float:
    """Return the seconds from the end of `import torch` to the first update of a training with cached images."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--pretrained=0",
            "--quiet",
            f"--data_dir={arguments.data_dir}",
            f"--checkpoint_dir={folder}",
            f"--image_size={arguments.image_size}",
            f"--batch_size={arguments.batch_size}",
            "--overwrite",
            f"--device={arguments.device}",
        ]
        command = [sys.executable, "-c", FIRST_UPDATE, str(ROOT), *words]
        runs = [subprocess.run(command, text=True, capture_output=True) for _ in range(4)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs[1:])  # warnings may come first


def tutorial_loop(arguments, side: str, compiled: bool, folder: str) -> tuple[Callable[[str], dict], dict]:
    """Return the 2020 tutorial's loop with a device instead of `.cuda()`: ImageFolder, PIL transforms, DataLoader."""
    import torch
    import torchvision
    from torchvision import transforms

    import utils
    from images.folders import find_image_set
    from precision import named_precision

    device = utils.choose_device(arguments.device)
    named_precision("fp32", device)  # otherwise convolutions would use TF32 by default
    train = find_image_set(arguments.data_dir).train[0][0].parents[1]
    side_pixels = (arguments.image_size, arguments.image_size)
    transform = transforms.Compose(
        [transforms.Resize(side_pixels), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    images = torchvision.datasets.ImageFolder(train, transform)
    workers = min(16, len(os.sched_getaffinity(0)))
    loader = torch.utils.data.DataLoader(
        images, batch_size=arguments.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    model = torchvision.models.resnet18(num_classes=len(images.classes)).to(device).train()
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-08, weight_decay=1e-4)

    def endless() -> Iterator:
        while True:
            yield from loader

    batches = endless()

    def updates(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            inputs, labels = next(batches)
            inputs = inputs.to(device)
            labels = labels.to(device)
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            correct = (outputs.argmax(1) == labels).float().mean()
            loss.item(), correct.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.tolist()
        return count * arguments.batch_size / (time.perf_counter() - started)

    updates(2)
    return lambda word: {"": updates(arguments.updates)} if word == "round" else machine.peak_memory(device), {}


def matrix_product_rate(device, precision) -> float:
    """Return the floating-point operations per second of a large matrix product in this precision's dtype."""
    import torch

    side, times = (4096, 1) if device.type == "cpu" else (8192, 10)  # a GPU finishes a few too soon
    one, other = (torch.randn(side, side, device=device, dtype=precision.dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(times):
            product = one @ other
        product[0, 0].item()
        seconds.append((time.perf_counter() - started) / times)
    return 2 * side**3 / min(seconds)


# ---------------------------------------------------------------------------------------- report
def report(arguments: argparse.Namespace, rates: dict[str, list[float]], facts: dict[str, dict]) -> None:
    import torch

    from system.machine import device_name
    from utils import choose_device

    medians = {figure: statistics.median(values) for figure, values in rates.items()}
    base = medians.get("tutorial")
    print(
        f"{device_name(choose_device(arguments.device))}; torch {torch.__version__}; {arguments.image_size} px, "
        f"batch {arguments.batch_size}; {arguments.rounds} rounds of {arguments.updates} updates\n"
    )
    print(
        "| side | images/s, median (min to max) | ÷ tutorial | ÷ its compute bound | of its matrix product "
        "| evaluation, images/s | peak memory, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for side, fact in facts.items():
        values = rates[side]
        bound = medians.get(f"{side} bound")
        product = fact.get("matmul_flops")
        work = FLOP_PER_IMAGE * (arguments.image_size / 256) ** 2
        cells = [
            side,
            f"{medians[side]:,.1f} ({min(values):,.1f} to {max(values):,.1f})",
            f"{medians[side] / base:.2f}" if base else "",
            f"{medians[side] / bound:.3f}" if bound else "",
            f"{medians[side] * work / product:.2f}" if product else "",
            f"{fact['evaluation']:,.0f}" if "evaluation" in fact else "",
            f"{fact['peak_memory_mb']:,.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    if arguments.json:
        content = {"arguments": vars(arguments), "rates": rates, "medians": medians, "facts": facts}
        Path(arguments.json).write_text(json.dumps(content, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
