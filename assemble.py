"""Make objects from options: the device, the precision, the data, the model and the trainer that they ask for.

Everything below takes groups of options or plain keywords, so that it can be used without a command line. Changes no
option. Knows nothing of what the commands do with what it builds.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import option
from command_line.groups import Computing, grouped
from command_line.kinds import ALL, images_asked, intervals, seconds_of
from command_line.presets import SCENES_ON_CUDA
from dataset import Batches
from distributed import Ranks
from features.cpu_layers import adapt_to_cpu
from features.float32_layers import keep_layers_float32
from features.frozen import keep_outputs
from images.asked import agreed, recorded_split, tested_data, training_data
from images.decode import Rules, windows_of
from images.demo import draw_demo
from images.opening import Opening
from images.subsets import DataSet, Subset
from model import (
    MeanOfViews,
    Network,
    build_model,
    check_input_size,
    constructor_options,
    empty_model,
    head_names,
    known_model,
    preprocessing,
    rebuild_model,
)
from optimizer import SmoothedCrossEntropy, balanced_weights, make_optimizer, make_scheduler, parameter_groups
from precision import Precision, choose_precision
from runs.checkpoint import as_tested, identity, load_checkpoint
from runs.config import NOT_RECORDED, describe, known_runs, read_config, versions
from runs.fitting import micro_batch_that_fits
from runs.folder import RunDirectory
from system.machine import GPUS, cores, device_name
from system.meeting import share_cores
from train import Plan, Recipe, Trainer
from transforms import Preprocess
from utils import StopSignal, UserError, choose_device, log, printable, seed_everything


def draw_scenes(data_dir: str, device_name: str) -> None:
    """Draw the demo's scenes below `data_dir` if they are missing, as many and as large as suit the device."""
    is_cuda = choose_device(device_name, use=False).type == "cuda"
    draw_demo(Path(data_dir), exact=False, workers=cores(), **(SCENES_ON_CUDA if is_cuda else {}))


def _compile_mode(computing: Computing) -> str | None:
    """Return the mode of torch.compile; None if the model is not compiled."""
    if computing.cuda_graphs:
        return "reduce-overhead"
    return "default" if computing.compile else None


class Setup:
    """What one command line asks for, built piece by piece when it is first used."""

    def __init__(self, options: Namespace, ranks: Ranks):
        self.asked = grouped(options)
        self.ranks = ranks
        # The shapes of full batches never change; a single pass would not pay for the search.
        torch.backends.cudnn.benchmark = self.asked.command not in ("evaluate", "predict")

    @cached_property
    def device(self) -> torch.device:
        name = self.asked.computing.device
        if self.ranks.size > 1 and name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: under torchrun each process takes its own GPU; use cuda or cpu.")
        try:
            device = choose_device(name, self.ranks.local_rank)
        except UserError:
            if "device" not in self.asked.recorded:
                raise
            device = choose_device("auto", self.ranks.local_rank)
            log.info(f"note: {name}, which was recorded, is not available here: computing on {device}")
        if device.type == "cpu":
            share_cores(self.ranks)
        return device

    @cached_property
    def precision(self) -> Precision:
        wanted = self.asked.computing
        amp_dtype = wanted.amp_dtype
        recorded = {name for name in ("amp", "tf32") if getattr(wanted, name)}
        recorded |= {"amp_dtype"} if amp_dtype != "auto" else set()
        advice = self._uses_checkpoint and recorded and recorded <= self.asked.recorded
        if advice and self.device.type == "cpu" != self.asked.recorded_on and amp_dtype == "float16":
            amp_dtype = "auto"  # on CPUs float16 takes many times as long
        try:
            precision = choose_precision(self.device, amp=wanted.amp, amp_dtype=amp_dtype, tf32=wanted.tf32)
        except UserError:
            if not advice:
                raise
            precision = choose_precision(self.device, amp=wanted.amp and self.device.type != "cuda")
        if advice and (amp_dtype != wanted.amp_dtype or (wanted.tf32 and precision.name != "tf32")):
            log.info(f"note: the precision that was recorded is for another device: computing in {precision.label}")
        return precision

    @cached_property
    def run(self) -> RunDirectory:
        """The run's folder; a run without a name is called after its model and precision."""
        asked = self.asked
        own_name = f"{known_model(asked.model.model)}_{self.precision.name}".replace(":", "_")  # timm:NAME, on Windows
        name = asked.place.checkpoint_name or own_name
        return RunDirectory(Path(asked.place.checkpoint_dir) / name, writes=self.ranks.is_first)

    @property
    def checkpoint_file(self) -> Path:
        """--checkpoint FILE, or best_model.pt of the named run."""
        asked = self.asked
        return Path(
            asked.place.checkpoint or Path(asked.place.checkpoint_dir) / asked.place.checkpoint_name / "best_model.pt"
        )

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint to use. UserError if there is none."""
        file = self.checkpoint_file
        if not file.exists():
            known = known_runs(self.asked.place.checkpoint_dir, "best_model.pt")
            raise UserError(f"{printable(file)} does not exist. {known}")
        return as_tested(load_checkpoint(file))

    @property
    def _uses_checkpoint(self) -> bool:
        asked = self.asked
        if asked.command in ("train", "compare"):
            return False
        return asked.command != "inspect" or bool(asked.place.checkpoint or asked.place.checkpoint_name)

    def _as_trained(self, name: str) -> Any:
        """An option that says how images are read; where it was left open, as the checkpoint says."""
        found = getattr(self.asked.reading, name)
        if found is not None:
            return found
        return self.checkpoint[name] if self._uses_checkpoint else option.options_of("train")[name].default

    @property
    def image_size(self) -> int:
        """Return the side of the images that the model sees."""
        return int(self._as_trained("image_size"))

    @cached_property
    def reading(self) -> dict[str, Any]:
        """Mean, std and interpolation with which images become the model's input: as recorded, or the model's own."""
        normalize = self._as_trained("normalize")
        if self._uses_checkpoint and normalize == self.checkpoint["normalize"]:
            return {name: self.checkpoint[name] for name in ("mean", "std", "interpolation")}
        own = preprocessing(self.checkpoint["model_name"] if self._uses_checkpoint else self.asked.model.model)
        return own if normalize == "imagenet" else {**own, "mean": [0.0] * 3, "std": [1.0] * 3}

    def data(self, *, resuming: bool = False, classes: list[str] | None = None) -> DataSet:
        """Return the data set, decoded; draw the demo's scenes first if they are missing.

        A run that goes on keeps its split. Raise UserError for classes other than `classes`, those of a checkpoint.
        """
        self._prepare_folder()
        window = self.asked.reading.window or "data"
        opening = self._opening(self._rules(windows_of(window)), own_window=window == "data")
        recorded = recorded_split(self.run.path, self.ranks) if resuming else None
        data = training_data(self.asked, opening, image_size=self.image_size, recorded=recorded)
        return agreed(data, self.asked.data, classes, self.ranks)

    def test_data(self) -> DataSet:
        """Return the images to test the checkpoint on."""
        self._prepare_folder()
        opening = self._opening(self.rules, own_window=False)
        folder = self.checkpoint_file.parent
        classes = self.checkpoint["classes"]
        size = self.image_size
        data = tested_data(self.asked.data, opening, image_size=size, known=classes, folder=folder, ranks=self.ranks)
        return agreed(data, self.asked.data, classes, self.ranks)

    @property
    def rules(self) -> Rules:
        """By which a trained model's images are read: as it was trained, unless asked otherwise."""
        asked = self.asked
        windows = windows_of(asked.reading.window) if asked.reading.window else self.checkpoint.get("windows", {})
        return self._rules(windows)

    def _rules(self, windows: dict[str, tuple[float, float]]) -> Rules:
        return Rules(self.asked.reading.max_megapixels, windows, self.reading["interpolation"])

    def _opening(self, rules: Rules, own_window: bool) -> Opening:
        asked = self.asked
        pin = self.device.type == "cuda"
        own = asked.data
        return Opening(own.cache, own.num_workers, pin, own.cache_limit, rules, own.skip_unreadable, own_window)

    def _prepare_folder(self) -> None:
        asked = self.asked
        if asked.data.demo:
            self.ranks.share(lambda: draw_scenes(asked.data.data_dir, asked.computing.device))  # the others wait
        elif "data_dir" in asked.recorded and not Path(asked.data.data_dir).is_dir():
            raise UserError(
                f"{printable(Path(asked.data.data_dir).absolute())} does not exist, but the images of this run were in "
                f"{printable(asked.data.data_dir)}. Name the folder that holds them now with --data_dir."
            )

    @property
    def preprocess(self) -> Preprocess:
        size = self.image_size
        return Preprocess(self.device, size, channels_last=self.asked.computing.channels_last, **self.reading)

    @cached_property
    def update_shape(self) -> tuple[int, int]:
        """Images in one update, and its micro-batches: as asked; for auto as this run chose before, or as fit."""
        asked = self.asked
        count = images_asked(asked.training.batch_size)
        if count == asked.training.batch_size:
            return count, asked.training.accumulate
        return count, self.ranks.share(lambda: self._chosen_before() or self._micro_batches(count))

    def _chosen_before(self) -> int | None:
        """What a run that is resumed recorded."""
        if self.asked.place.resume is None or not self.run.file("last.pt").exists():
            return None
        return read_config(self.run.file("config.json"))["options"].get("accumulate")

    def _micro_batches(self, count: int) -> int:
        share = -(-count // self.ranks.size)
        model = self.model(self.asked.data.num_classes or 1000)
        size = self.image_size
        fits = micro_batch_that_fits(model, size, share, self.precision, self.device, processes=self.ranks.size)
        number = -(-share // fits)
        log.info(f"--batch_size auto: {count} images in an update, in {number} micro-batches of at most {fits}")
        return number

    def batches(self, data: DataSet, subset: Subset, *, train: bool = False, **more: Any) -> Batches:
        size, micro_batches = self.update_shape
        if train:
            own = self.asked.training
            more |= {"accumulate": micro_batches, "seed": self.asked.model.seed, "epochs": own.epochs}
            more |= {"sampler": own.sampler, "augment": own.augment, "mixup": own.mixup, "cutmix": own.cutmix}
            more["start_size"] = own.start_size
        else:  # what does not fit at once in training is not tried here
            size = -(-size // micro_batches)
        return Batches(subset, self.preprocess, size, len(data.classes), ranks=self.ranks, **more)

    def model(self, class_count: int, classes: list[str] | None = None) -> nn.Module:
        """Return the model to train, on the device, with the weights it starts from."""
        asked = self.asked
        seed_everything(asked.model.seed)  # of the new head, or of all weights
        return self.placed(
            build_model(
                asked.model.model,
                class_count,
                pretrained=bool(asked.model.pretrained),
                pretrained_path=asked.model.pretrained_path,
                weights=asked.model.weights,
                image_size=self.image_size,
                classes=classes,
            )
        )

    @property
    def float32_layers(self) -> str:
        """Return --float32_layers or, for a finished run, the pattern that its checkpoint records; empty if none."""
        asked = self.asked.computing.float32_layers
        recorded = self.checkpoint.get("float32_layers") if asked is None and self._uses_checkpoint else None
        return asked or recorded or ""

    def placed(self, model: nn.Module) -> nn.Module:
        """Return `model` on the device, in the layout and with the layers that suit it."""
        keep_layers_float32(model, self.float32_layers)
        layout = torch.channels_last if self.asked.computing.channels_last else torch.contiguous_format
        if self.device.type == "cpu":
            adapt_to_cpu(model, amp=self.asked.computing.amp)
        return model.to(self.device).to(memory_format=layout)

    def trained(self, checkpoint: dict[str, Any]) -> nn.Module:
        """The model of a checkpoint, on the device, in evaluation mode."""
        model = self.placed(rebuild_model(checkpoint)).eval()
        tta = self.asked.reading.tta
        return model if tta == "none" else MeanOfViews(model, tta)

    def trainer(self, data: DataSet, run: RunDirectory, *, resumed: dict[str, Any] | None = None) -> Trainer:
        """Everything a training needs, wired together.

        A run that is `resumed`, from what its config.json says, needs no weights to start from: last.pt holds them.
        """
        asked = self.asked
        epochs = asked.training.epochs
        model = self._trainable(data, resumed)
        batches = self.batches(data, data.train, train=True)
        validation = self.batches(data, data.validation)
        heads = head_names(model)
        frozen = epochs if asked.training.freeze_epochs == ALL else int(asked.training.freeze_epochs)
        kept = keep_outputs(model, heads, batches, validation, self.precision) if frozen == epochs else None
        batches, validation = kept or (batches, validation)
        network = Network(
            model,
            sizes=batches.full_sizes,
            evaluation_size=validation.evaluation_size,
            ranks=self.ranks,
            heads=heads,
            freeze_epochs=frozen,
            ema=asked.training.ema,
            compile_mode=_compile_mode(asked.computing),
            only_head=kept is not None,
        )
        optimizer = self._optimizer(model, heads)
        schedule = partial(
            make_scheduler,
            optimizer,
            asked.training.decay_type,
            epochs=epochs,
            warmup_epochs=asked.training.warmup_epochs,
            updates_per_epoch=batches.updates_per_epoch,
        )
        criterion = SmoothedCrossEntropy(asked.training.label_smoothing, self._class_weights(data))
        recipe = Recipe(optimizer, schedule, self.precision, criterion, asked.training.clip_grad_norm)
        plan = Plan(
            epochs,
            asked.model.seed,
            asked.training.best_by,
            asked.training.patience,
            asked.recording.log_interval,
            **intervals(asked.recording.checkpoint_every),
        )
        stop = StopSignal(seconds_of(asked.recording.max_time) if asked.recording.max_time else None)
        return Trainer(network, recipe, plan, batches, validation, run, self._identity(data, model), stop)

    def _optimizer(self, model: nn.Module, heads: tuple[str, ...]) -> torch.optim.Optimizer:
        """The optimizer of all weights, in groups by --decay_norms, --backbone_lr and --layer_decay."""
        asked = self.asked
        groups = parameter_groups(
            model,
            heads,
            learning_rate=asked.training.learning_rate,
            weight_decay=asked.training.weight_decay,
            decay_norms=asked.training.decay_norms,
            backbone_lr=asked.training.backbone_lr,
            layer_decay=asked.training.layer_decay,
        )
        return make_optimizer(
            groups,
            asked.training.optimizer,
            learning_rate=asked.training.learning_rate,
            weight_decay=asked.training.weight_decay,
            fused=self.device.type in ("cpu", *GPUS),
        )

    def _class_weights(self, data: DataSet) -> torch.Tensor | None:
        """Return the weight of each class in the loss; None if all weigh the same."""
        if self.asked.training.class_weights == "none":
            return None
        return balanced_weights(torch.from_numpy(data.train.labels), len(data.classes)).to(self.device)

    def _trainable(self, data: DataSet, resumed: dict[str, Any] | None) -> nn.Module:
        """The model to train. Raises UserError where it cannot be trained with these batches on these processes."""
        asked = self.asked
        ranks = self.ranks.size
        batch_size, accumulate = self.update_shape
        if batch_size < ranks * accumulate:
            raise UserError(
                f"--batch_size {batch_size} is too small for {ranks} processes with {accumulate} "
                "micro-batches each: every micro-batch needs an image."
            )
        if resumed is None:
            model = self.model(len(data.classes), data.classes)
        else:
            told = resumed.get("model_options")
            if not isinstance(told, dict):
                raise UserError(f"{printable(self.run.path / 'config.json')} does not say how the model was built.")
            model = self.placed(empty_model(asked.model.model, len(data.classes), told))
        batches = self.batches(data, data.train, train=True)
        left_over = batches.images_in(batches.updates_per_epoch - 1)
        check_input_size(model, self.image_size, batches.smallest_micro_batch, asked.training.start_size)
        if asked.computing.cuda_graphs and (self.device.type != "cuda" or ranks > 1):
            raise UserError("--cuda_graphs needs --device cuda and a single process. Use --compile instead.")
        if not asked.training.sync_batchnorm or ranks == 1:
            return model
        if self.device.type != "cuda":
            raise UserError("--sync_batchnorm needs CUDA devices: PyTorch has no such layer for the CPU.")
        if accumulate > 1:
            raise UserError("--sync_batchnorm needs the same number of micro-batches: leave out --accumulate.")
        if left_over < ranks:
            raise UserError(
                f"--sync_batchnorm needs an image on each of {ranks} processes, and the last batch holds {left_over}: "
                "choose another --batch_size."
            )
        return keep_layers_float32(nn.SyncBatchNorm.convert_sync_batchnorm(model), self.float32_layers)  # new layers

    def _identity(self, data: DataSet, model: nn.Module) -> dict[str, Any]:
        return identity(
            classes=data.classes,
            model_name=self.asked.model.model,
            model_options=constructor_options(model),
            image_size=self.image_size,
            normalize=self._as_trained("normalize"),
            reading=self.reading,
            precision=self.precision.name,
            fingerprint=data.fingerprint,
            windows={mode: list(window) for mode, window in data.rules.windows.items()},
            float32_layers=self.float32_layers or None,
        )

    def config(self, data: DataSet, model_options: dict[str, Any]) -> dict[str, Any]:
        """What config.json records: every option, versions, device and data."""
        options = {name: value for name, value in self.asked.flat.items() if name not in NOT_RECORDED}
        if self.asked.command == "train":
            options["batch_size"], options["accumulate"] = self.update_shape
            options["checkpoint_name"] = self.run.path.relative_to(self.asked.place.checkpoint_dir).as_posix()
        else:
            options["model"] = self.checkpoint["model_name"]
        return {
            "options": options,
            "versions": versions(options["model"]),
            "model_options": model_options,
            "device": self.device.type,
            "device_name": device_name(self.device),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "dataset": describe(data),
        }
