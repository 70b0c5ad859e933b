"""The sides of peers.py: each trains a ResNet-18 without end in its own loop and calls `turn` after every update."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4


def train_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the training images' class folders."""
    from images.folders import find_image_set

    return Path(find_image_set(arguments.data_dir).train[0][0]).parents[1]


def image_folder(arguments: argparse.Namespace) -> Any:
    """Return torchvision's data set with the tutorial's transforms: resize, flip, to a tensor."""
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
def tutorial(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run the 2020 tutorial's loop with a device instead of `.cuda()`: ImageFolder, PIL transforms, DataLoader."""
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


def lightning(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run Lightning's Trainer with its own precision plugin."""
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


def hugging_face(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run transformers.Trainer on torchvision's ResNet-18, wrapped in the interface that it needs."""
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


# Its own yolo11-cls-resnet18.yaml without the weights, which it would download.
ULTRALYTICS_MODEL = """
nc: 1000
backbone:
  - [-1, 1, TorchVision, [512, resnet18, null, True, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""


def ultralytics(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run Ultralytics' classify on its ResNet-18, with its own augmentation and EMA."""
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


def timm(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run timm's model, loader, optimizer and scaler, joined as in its train.py, with --channels-last."""
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


def ours(arguments: argparse.Namespace, amp: bool, turn: Callable[[], None], folder: Path) -> None:
    """Run this package's own Trainer, as `python main.py` does."""
    import train
    from assemble import make_trainer, set_up
    from command_line.groups import grouped
    from command_line.parsing import parse
    from distributed import Ranks
    from images.asked import data_to_train_on
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
    setup = set_up(grouped(parse(words)), Ranks())
    data = data_to_train_on(setup.asked, setup.ranks, setup.preprocess)
    trainer = make_trainer(setup, data, RunDirectory(folder / "peers"))
    trainer.train()


SIDES: dict[str, Callable[[argparse.Namespace, bool, Callable[[], None], Path], None]] = {
    "tutorial": tutorial,
    "lightning": lightning,
    "hugging_face": hugging_face,
    "ultralytics": ultralytics,
    "timm": timm,
    "ours": ours,
}
