"""Options to objects: the device, the precision, the data, the model and the trainer that they ask for.

The only file beside main.py that reads the Namespace, so that everything below takes plain keywords and can
be used without a command line. Knows nothing of what the commands do with what it builds.
"""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import torchvision
from torch import nn

import option
from dataset import Batches, DataSet, Subset, open_data_set
from distributed import Ranks
from model import avoid_in_place, build_model, check_input_size, head_name, known_model, load_weights
from optimizer import make_optimizer, make_scheduler
from precision import Precision, choose_precision
from runs.checkpoint import load_checkpoint
from runs.folder import RunDirectory
from train import Trainer
from transforms import Preprocess
from utils import UserError, choose_device, device_name, printable, seed_everything

Log = Callable[[str], None]


class Setup:
    """What one command line asks for, built piece by piece when it is first used."""

    def __init__(self, options: Namespace, ranks: Ranks, log: Log):
        self.options = options
        self.ranks = ranks
        self.log = log
        # The shapes of full batches never change; a single pass would not pay for the search.
        torch.backends.cudnn.benchmark = options.command not in ("evaluate", "predict")

    @cached_property
    def device(self) -> torch.device:
        name = self.options.device
        if self.ranks.size > 1 and name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: under torchrun each process takes its own GPU; use cuda or cpu.")
        return choose_device(name, self.ranks.local_rank)

    @cached_property
    def precision(self) -> Precision:
        options = self.options
        return choose_precision(self.device, amp=options.amp, amp_dtype=options.amp_dtype, tf32=options.tf32)

    @cached_property
    def run(self) -> RunDirectory:
        """The run's folder; a run without a name is called after its model and precision."""
        options = self.options
        if not options.checkpoint_name:
            options.checkpoint_name = f"{known_model(options.model)}_{self.precision.name}"
        return RunDirectory(Path(options.checkpoint_dir) / options.checkpoint_name, writes=self.ranks.is_first)

    def data(self, *, test_only: bool = False, classes: list[str] | None = None) -> DataSet:
        """The data set, decoded; the demo's scenes are drawn first where they are missing.

        Raises UserError where it holds others than `classes`, those of a checkpoint.
        """
        options = self.options
        if options.demo:
            from images.demo import draw_demo

            self.ranks.share(lambda: draw_demo(Path(options.data_dir)))  # the others wait for the first
        data = open_data_set(
            options.data_dir,
            image_size=options.image_size,
            seed=options.seed,
            cache=options.cache,
            workers=options.num_workers,
            skip_unreadable=options.skip_unreadable,
            pin=self.device.type == "cuda",
            keep_larger=options.augment == "crop",
            test_only=test_only,
            log=self.log,
        )
        if self.ranks.share(lambda: data.fingerprint) != data.fingerprint:
            raise UserError(f"the images in {options.data_dir} are not those of the job's first process: copy them.")
        if options.num_classes not in (None, len(data.classes)):
            raise UserError(
                f"--num_classes {options.num_classes}: {options.data_dir} holds {len(data.classes)} class folders."
            )
        if classes not in (None, data.classes):
            raise UserError(f"{options.data_dir} holds the classes {data.classes}, the checkpoint {classes}.")
        return data

    @property
    def preprocess(self) -> Preprocess:
        options = self.options
        return Preprocess(self.device, options.image_size, options.normalize, options.channels_last)

    def batches(self, data: DataSet, subset: Subset, *, train: bool = False) -> Batches:
        own = ("seed", "accumulate", "augment", "mixup", "cutmix") if train else ()
        return Batches(
            subset,
            self.preprocess,
            self.options.batch_size,
            len(data.classes),
            ranks=self.ranks,
            **{name: getattr(self.options, name) for name in own},
        )

    def network(self, class_count: int) -> nn.Module:
        """The model to train, on the device, with the weights it starts from."""
        options = self.options
        seed_everything(options.seed)  # of the new head, or of all weights
        return self.placed(
            build_model(
                options.model, class_count, pretrained=bool(options.pretrained), pretrained_path=options.pretrained_path
            )
        )

    def placed(self, network: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        if self.device.type == "cpu" and self.options.amp:
            avoid_in_place(network)
        return network.to(self.device, memory_format=layout)

    def trained(self, checkpoint: dict[str, Any]) -> nn.Module:
        """The network of a checkpoint, on the device, in evaluation mode."""
        network = build_model(checkpoint["model_name"], len(checkpoint["classes"]), pretrained=False)
        load_weights(network, checkpoint["model"], source="the checkpoint", new_head=False)
        return self.placed(network).eval()

    @property
    def checkpoint_file(self) -> Path:
        """--checkpoint FILE, or best_model.pt of the named run."""
        options = self.options
        return Path(options.checkpoint or Path(options.checkpoint_dir) / options.checkpoint_name / "best_model.pt")

    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint to use; images are read as it says, unless asked otherwise. UserError where there is none."""
        file = self.checkpoint_file
        options = self.options
        if not file.exists():
            runs = sorted(path.parent.name for path in Path(options.checkpoint_dir).glob("*/best_model.pt"))
            known = f"Runs there: {', '.join(map(printable, runs))}." if runs else "No run is there yet."
            raise UserError(f"{printable(file)} does not exist. Name a run with --checkpoint_name. {known}")
        content = load_checkpoint(file)
        for name in ("image_size", "normalize"):
            if getattr(options, name) is None:
                setattr(options, name, content[name])
        return content

    def trainer(self, data: DataSet, run: RunDirectory) -> Trainer:
        """Everything a training needs, wired together."""
        options = self.options
        ranks = self.ranks
        device = self.device
        if options.batch_size < ranks.size * options.accumulate:
            raise UserError(
                f"--batch_size {options.batch_size} cannot be cut among {ranks.size} processes in "
                f"{options.accumulate} pieces each."
            )
        network = self.network(len(data.classes))
        left_over = len(data.train) % options.batch_size or options.batch_size
        check_input_size(network, options.image_size, max(1, left_over // (ranks.size * options.accumulate)))
        if options.sync_batchnorm and ranks.size > 1:
            if device.type != "cuda":
                raise UserError("--sync_batchnorm needs CUDA devices: PyTorch has no such layer for the CPU.")
            if options.accumulate > 1 or left_over < ranks.size:
                raise UserError(
                    "--sync_batchnorm needs as many pieces on each process: leave out --accumulate, and "
                    f"take a --batch_size that leaves more than {left_over} images over."
                )
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        batches = self.batches(data, data.train, train=True)
        optimizer = make_optimizer(
            network.parameters(),
            options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        schedule = partial(
            make_scheduler,
            optimizer,
            options.decay_type,
            epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            updates_per_epoch=batches.updates_per_epoch,
        )
        return Trainer(
            network,
            optimizer,
            schedule,
            self.precision,
            batches,
            self.batches(data, data.validation),
            run,
            options.epochs,
            options.seed,
            label_smoothing=options.label_smoothing,
            clip_grad_norm=options.clip_grad_norm,
            log_interval=options.log_interval,
            checkpoint_every=options.checkpoint_every,
            patience=options.patience,
            freeze_epochs=options.freeze_epochs,
            head=head_name(network),
            ema=options.ema,
            compile=options.compile,
            record=self._record(data),
            log=self.log,
        )

    def _record(self, data: DataSet) -> dict[str, Any]:
        """What every checkpoint says of itself, enough to use it without its run's folder."""
        return {
            "format": 1,
            "classes": data.classes,
            "model_name": self.options.model,
            "image_size": self.options.image_size,
            "normalize": self.options.normalize,
            "precision": self.precision.name,
            "fingerprint": data.fingerprint,
        }

    def config(self, data: DataSet) -> dict[str, Any]:
        """What config.json records: every option, versions, device and data."""
        hidden = ("command", "evaluate")
        return {
            "options": {name: value for name, value in vars(self.options).items() if name not in hidden},
            "versions": {
                "amp-train": option.VERSION,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": numpy.__version__,
                "pillow": PIL.__version__,
            },
            "device": self.device.type,
            "device_name": device_name(self.device),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "dataset": {
                "fingerprint": data.fingerprint,
                "classes": data.classes,
                "train": len(data.train),
                "val": len(data.validation),
                "test": len(data.test),
                "unreadable": data.unreadable,
            },
        }
