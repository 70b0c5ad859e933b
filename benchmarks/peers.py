"""Images per second of five ways to train a ResNet-18, each with its own loop and loader, and of this package.

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

WARM_UP = 2  # updates before the first round
LEARNING_RATE = 1e-4


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
    """Which sides take turns: as many as memory holds. With each precision the first side is measured again."""
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
    """Lets some sides take turns; returns those that failed, with what they said last."""
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

    for side in sides:  # one by one: all that begin at once would need more memory than all that wait
        children[side] = start(side)
        ask(side, None)
        print(f"{side}: {'ready' if side in children else failed[side]}", file=sys.stderr, flush=True)
    for number in range(rounds):
        for side in list(children):
            ask(side, "round")
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for child in children.values():
        child.kill()  # in the middle of its loop, as it was
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
    """No side may look something up on the network or write outside a temporary folder while it is timed."""
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    return {**os.environ, **quiet, "YOLO_CONFIG_DIR": tempfile.gettempdir(), "TOKENIZERS_PARALLELISM": "false"}


def last_words(child: subprocess.Popen) -> str:
    child.errors.seek(0)
    lines = child.errors.read().strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


class Turn:
    """Called by a side's loop after every update: counts, times rounds, and waits for its turn between them."""

    def __init__(self, updates: int, batch_size: int, out: Any, finish: Callable[[], None]):
        self.updates = updates
        self.batch_size = batch_size
        self.out = out
        self.finish = finish  # returns when the device has done all it was given
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
    """A child: trains one side without end."""
    out = os.fdopen(os.dup(1), "w")  # what the libraries print must not come between the figures
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


def train_folder(arguments: argparse.Namespace) -> Path:
    """The folder of the training images' class folders."""
    from images.folders import find_image_set

    return Path(find_image_set(arguments.data_dir).train[0][0]).parents[1]


def image_folder(arguments: argparse.Namespace) -> Any:
    """torchvision's data set with the tutorial's transforms: resize, flip, to a tensor."""
    import torchvision
    from torchvision import transforms

    side = (arguments.image_size, arguments.image_size)
    steps = [transforms.Resize(side), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return torchvision.datasets.ImageFolder(train_folder(arguments), transforms.Compose(steps))


def loader_of(arguments: argparse.Namespace, images: Any) -> Any:
    import torch

    return torch.utils.data.DataLoader(
        images,
        batch_size=arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        pin_memory=arguments.device_in_use.type == "cuda",
    )


# ---------------------------------------------------------------------------------------- the sides
def tutorial(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """The 2020 tutorial's loop, its `.cuda()` made device-agnostic: ImageFolder, PIL transforms, DataLoader."""
    import torch
    import torchvision

    device = arguments.device_in_use
    images = image_folder(arguments)
    loader = loader_of(arguments, images)
    model = torchvision.models.resnet18(num_classes=len(images.classes)).to(device).train()
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=amp and arguments.half == torch.float16)
    while True:
        for inputs, labels in loader:
            inputs = inputs.to(device)
            labels = labels.to(device)
            with torch.autocast(device.type, arguments.half, enabled=amp):
                outputs = model(inputs)
                loss = criterion(outputs, labels)
            correct = (outputs.argmax(1) == labels).float().mean()
            loss.item()
            correct.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            loss.tolist()
            turn()


def lightning(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """Lightning's Trainer with its own precision plugin."""
    import torch
    import torchvision
    from lightning import pytorch as pl

    images = image_folder(arguments)

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torchvision.models.resnet18(num_classes=len(images.classes))

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            inputs, labels = batch
            return torch.nn.functional.cross_entropy(self.model(inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)

        def on_train_batch_end(self, *_: Any) -> None:
            turn()

    sixteen = "16-mixed" if arguments.half == torch.float16 else "bf16-mixed"
    trainer = pl.Trainer(
        max_epochs=10**6,
        accelerator={"cuda": "gpu"}.get(arguments.device_in_use.type, arguments.device_in_use.type),
        devices=1,
        precision=sixteen if amp else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Classifier(), loader_of(arguments, images))


def hugging_face(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """transformers.Trainer on torchvision's ResNet-18, wrapped as it wants models to be."""
    import torch
    import torchvision
    import transformers

    images = image_folder(arguments)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torchvision.models.resnet18(num_classes=len(images.classes))

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.model(pixel_values)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    def collate(batch: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([image for image, _ in batch]),
            "labels": torch.tensor([label for _, label in batch]),
        }

    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch_size,
        num_train_epochs=10**4,
        learning_rate=LEARNING_RATE,
        dataloader_num_workers=arguments.workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        use_cpu=arguments.device_in_use.type == "cpu",
        bf16=amp and arguments.half == torch.bfloat16,
        fp16=amp and arguments.half == torch.float16,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(Classifier(), settings, train_dataset=images, data_collator=collate)
    trainer.add_callback(Ticks())
    trainer.train()


# Its own yolo11-cls-resnet18.yaml, but for the weights, which it would download.
ULTRALYTICS_MODEL = """
nc: 1000
backbone:
  - [-1, 1, TorchVision, [512, resnet18, null, True, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


def ultralytics(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """Ultralytics' classify on its ResNet-18, with its own augmentation and EMA."""
    from ultralytics.models.yolo.classify import ClassificationTrainer

    (folder / "resnet18-cls.yaml").write_text(ULTRALYTICS_MODEL)
    for part in ("train", "val"):  # its layout
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / part).symlink_to(train_folder(arguments).resolve(), target_is_directory=True)
    device = arguments.device_in_use
    trainer = ClassificationTrainer(
        overrides={
            "model": str(folder / "resnet18-cls.yaml"),
            "data": str(folder / "data"),
            "imgsz": arguments.image_size,
            "batch": arguments.batch_size,
            "device": device.type if device.index is None else str(device.index),
            "amp": amp,
            "pretrained": False,
            "workers": arguments.workers,
            "epochs": 10**4,
            "optimizer": "Adam",
            "lr0": LEARNING_RATE,
            "project": str(folder),
            "plots": False,
            "val": False,
            "save": False,
            "verbose": False,
        }
    )
    trainer.add_callback("on_train_batch_end", lambda _: turn())
    trainer.train()


def timm(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """timm's model, loader, optimizer and scaler, as its train.py joins them, with --channels-last."""
    import timm as library
    import torch
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter, NativeScaler

    device = arguments.device_in_use
    images = create_dataset("", root=str(train_folder(arguments)))
    loader = create_loader(
        images,
        input_size=(3, arguments.image_size, arguments.image_size),
        batch_size=arguments.batch_size,
        is_training=True,
        num_workers=arguments.workers,
        pin_memory=device.type == "cuda",
        device=device,
        use_prefetcher=device.type == "cuda",
    )
    model = library.create_model("resnet18", num_classes=len(images.reader.class_to_idx))
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="adam", lr=LEARNING_RATE, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    scaler = NativeScaler(device=device.type) if amp and arguments.half == torch.float16 else None
    losses = AverageMeter()
    updates = 0
    while True:
        for inputs, labels in loader:
            inputs = inputs.to(device).contiguous(memory_format=torch.channels_last)
            labels = labels.to(device)
            with torch.autocast(device.type, arguments.half, enabled=amp):
                loss = criterion(model(inputs), labels)
            if scaler is not None:
                scaler(loss, optimizer, parameters=model.parameters())
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if updates % 50 == 0:  # its --log-interval
                losses.update(loss.item(), len(inputs))
            turn()


def ours(arguments: argparse.Namespace, amp: bool, turn: Turn, folder: Path) -> None:
    """This package's own Trainer, as `python main.py` runs it."""
    import train
    from assemble import Setup
    from command_line.parsing import parse
    from distributed import Ranks
    from runs.folder import RunDirectory

    words = [
        "--amp" if amp else "--no-amp",
        "--pretrained=0",
        f"--device={arguments.device}",
        f"--data_dir={arguments.data_dir}",
        f"--checkpoint_dir={folder}",
        "--checkpoint_name=peers",
        f"--batch_size={arguments.batch_size}",
        f"--image_size={arguments.image_size}",
        "--epochs=10000",
        "--quiet",
    ]
    original = train.update_weights

    def update_weights(*positional: Any, **keywords: Any) -> Any:
        record = original(*positional, **keywords)
        turn()
        return record

    train.update_weights = update_weights
    setup = Setup(parse(words), Ranks())
    trainer = setup.trainer(setup.data(), RunDirectory(folder / "peers"))
    trainer.train()


SIDES: dict[str, Callable[[argparse.Namespace, bool, Turn, Path], None]] = {
    "tutorial": tutorial,
    "lightning": lightning,
    "hugging_face": hugging_face,
    "ultralytics": ultralytics,
    "timm": timm,
    "ours": ours,
}
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
    """How many times as fast this package is: the median over rounds, whose sides stood beside one another."""
    if ours == theirs or not rates.get(ours) or not rates.get(theirs):
        return ""
    return f"{statistics.median(one / other for one, other in zip(rates[ours], rates[theirs], strict=False)):.2f}"


if __name__ == "__main__":
    main()
