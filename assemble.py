"""Make objects from options: the device, the precision, the data, the model and the trainer that they ask for.

Each function makes one object. `set_up` makes what all others need. Knows nothing of what the commands do with what is
built here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import option
from command_line.groups import Asked, Place
from command_line.kinds import ALL, images_asked, intervals, seconds_of
from dataset import Batches
from distributed import Ranks, synchronized
from features.checkpointing import checkpoint_blocks
from features.cpu_layers import adapt_to_cpu
from features.float32_layers import keep_layers_float32
from features.frozen import keep_outputs
from features.means import MeanOfModels, MeanOfViews
from images.subsets import DataSet, Subset
from model import (
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
from runs.config import known_runs, read_config
from runs.fitting import micro_batch_that_fits
from runs.folder import RunDirectory
from system.machine import GPUS
from system.meeting import share_cores
from train import Plan, Recipe, Trainer
from transforms import Preprocess
from utils import StopSignal, UserError, choose_device, log, printable, seed_everything


@dataclass(frozen=True)
class Setup:
    """What one command line asks for, and what every part of the command is made with."""

    asked: Asked
    ranks: Ranks
    device: torch.device
    precision: Precision
    checkpoint: dict[str, Any] | None  # the trained model that the command uses; None if it makes a new model
    preprocess: Preprocess

    @property
    def trained(self) -> dict[str, Any]:
        """Return the checkpoint of a command that always uses one."""
        assert self.checkpoint is not None
        return self.checkpoint


def set_up(asked: Asked, ranks: Ranks) -> Setup:
    """Return the parts that all others need. Raise UserError if one cannot be had."""
    # The shapes of full batches never change; a single pass would not pay for the search.
    torch.backends.cudnn.benchmark = asked.command not in ("evaluate", "predict")
    device = find_device(asked, ranks)
    precision = find_precision(asked, device)
    checkpoint = find_checkpoint(asked.place) if asked.uses_checkpoint else None
    return Setup(asked, ranks, device, precision, checkpoint, find_preprocess(asked, device, checkpoint))


def find_device(asked: Asked, ranks: Ranks) -> torch.device:
    """Return the device of this process; another one, with a note, if a recorded device is not available here."""
    name = asked.computing.device
    if ranks.size > 1 and name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: under torchrun each process takes its own GPU; use cuda or cpu.")
    try:
        device = choose_device(name, ranks.local_rank)
    except UserError:
        if "device" not in asked.given.recorded:
            raise
        device = choose_device("auto", ranks.local_rank)
        log.info(f"note: {name}, which was recorded, is not available here: computing on {device}")
    if device.type == "cpu":
        share_cores(ranks)
    return device


def find_precision(asked: Asked, device: torch.device) -> Precision:
    """Return the precision that was asked for; what a trained run recorded is only advice on another device."""
    wanted = asked.computing
    amp_dtype = wanted.amp_dtype
    recorded = {name for name in ("amp", "tf32") if getattr(wanted, name)}
    recorded |= {"amp_dtype"} if amp_dtype != "auto" else set()
    advice = asked.uses_checkpoint and recorded and recorded <= asked.given.recorded
    if advice and device.type == "cpu" != asked.given.recorded_on and amp_dtype == "float16":
        amp_dtype = "auto"  # on CPUs float16 takes many times as long
    try:
        precision = choose_precision(device, amp=wanted.amp, amp_dtype=amp_dtype, tf32=wanted.tf32)
    except UserError:
        if not advice:
            raise
        precision = choose_precision(device, amp=wanted.amp and device.type != "cuda")
    if advice and (amp_dtype != wanted.amp_dtype or (wanted.tf32 and precision.name != "tf32")):
        log.info(f"note: the precision that was recorded is for another device: computing in {precision.label}")
    return precision


def find_checkpoint(place: Place, file: Path | None = None) -> dict[str, Any]:
    """Return the checkpoint to use, or that in `file`, another one. Raise UserError if there is none."""
    file = file or place.checkpoint_file
    if not file.exists():
        raise UserError(f"{printable(file)} does not exist. {known_runs(place.checkpoint_dir, 'best_model.pt')}")
    return as_tested(load_checkpoint(file))


def find_preprocess(asked: Asked, device: torch.device, checkpoint: dict[str, Any] | None) -> Preprocess:
    """Return how images become the model's input: as asked, else as recorded, else as the model's weights need it."""
    defaults = checkpoint or {name: each.default for name, each in option.options_of("train").items()}
    normalize = asked.reading.normalize or defaults["normalize"]
    if checkpoint and normalize == checkpoint["normalize"]:
        own = {name: checkpoint[name] for name in ("mean", "std", "interpolation")}
    else:
        own = preprocessing(checkpoint["model_name"] if checkpoint else asked.model.model)
        if normalize != "imagenet":
            own |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    size = int(asked.reading.image_size or defaults["image_size"])
    return Preprocess(device, size, channels_last=asked.computing.channels_last, **own)


def run_folder(setup: Setup) -> RunDirectory:
    """Return the run's folder; a run without a name is called after its model and precision."""
    asked = setup.asked
    own_name = f"{known_model(asked.model.model)}_{setup.precision.name}".replace(":", "_")  # timm:NAME, on Windows
    name = asked.place.checkpoint_name or own_name
    return RunDirectory(Path(asked.place.checkpoint_dir) / name, writes=setup.ranks.is_first)


def update_shape(setup: Setup, run: RunDirectory | None = None) -> tuple[int, int]:
    """Return the images in one update and its micro-batches: as asked; for auto as `run` chose before, or as fit."""
    asked = setup.asked
    count = images_asked(asked.training.batch_size)
    if count == asked.training.batch_size:
        return count, asked.training.accumulate
    return count, setup.ranks.share(lambda: _chosen_before(asked, run) or _micro_batches(setup, count))


def _chosen_before(asked: Asked, run: RunDirectory | None) -> int | None:
    """Return the number of micro-batches that a run recorded which is resumed; None if it recorded none."""
    if asked.place.resume is None or run is None or not run.file("last.pt").exists():
        return None
    chosen: int | None = read_config(run.file("config.json"))["options"].get("accumulate")
    return chosen


def _micro_batches(setup: Setup, count: int) -> int:
    """Return the number of micro-batches of an update of `count` images, so that each fits into memory."""
    processes = setup.ranks.size
    share = -(-count // processes)
    model = new_model(setup, setup.asked.data.num_classes or 1000)
    size = setup.preprocess.image_size
    fits = micro_batch_that_fits(model, size, share, setup.precision, setup.device, processes=processes)
    number = -(-share // fits)
    log.info(f"--batch_size auto: {count} images in an update, in {number} micro-batches of at most {fits}")
    return number


def training_batches(setup: Setup, data: DataSet, shape: tuple[int, int]) -> Batches:
    """Return the training images in updates of `shape`, which is what `update_shape` returned."""
    own = setup.asked.training
    return Batches(
        data.train,
        setup.preprocess,
        batch_size=shape[0],
        class_count=len(data.classes),
        seed=setup.asked.model.seed,
        accumulate=shape[1],
        sampler=own.sampler,
        augment=own.augment,
        mixup=own.mixup,
        cutmix=own.cutmix,
        start_size=own.start_size,
        epochs=own.epochs,
        ranks=setup.ranks,
    )


def evaluation_batches(setup: Setup, data: DataSet, subset: Subset, size: int | None = None) -> Batches:
    """Return the images of `subset` in batches of `size`; default: of a micro-batch, which fits into memory."""
    return Batches(
        subset, setup.preprocess, size or micro_batch(update_shape(setup)), len(data.classes), ranks=setup.ranks
    )


def micro_batch(shape: tuple[int, int]) -> int:
    """Return the images in the largest micro-batch of an update of `shape`."""
    return -(-shape[0] // shape[1])


def new_model(setup: Setup, class_count: int, classes: list[str] | None = None) -> nn.Module:
    """Return the model to train, on the device, with the weights it starts from."""
    own = setup.asked.model
    seed_everything(own.seed)  # of the new head, or of all weights
    model = build_model(
        own.model,
        class_count,
        pretrained=bool(own.pretrained),
        pretrained_path=own.pretrained_path,
        weights=own.weights,
        image_size=setup.preprocess.image_size,
        classes=classes,
    )
    return _placed(setup, model, train=True)


def trained_model(setup: Setup, checkpoint: dict[str, Any]) -> nn.Module:
    """Return the model of a checkpoint, on the device, in evaluation mode."""
    model = _placed(setup, rebuild_model(checkpoint), train=False).eval()
    tta = setup.asked.reading.tta
    return model if tta == "none" else MeanOfViews(model, tta)


def answering_model(setup: Setup) -> nn.Module:
    """Return the model of --checkpoint or, of several, one that answers with the mean of their probabilities.

    Raise UserError if they have other classes than the first, or need other images.
    """
    place = setup.asked.place
    first = setup.trained
    models = [trained_model(setup, first)]
    for file in place.checkpoint_files[1:]:
        other = find_checkpoint(place, file)
        for what in ("classes", "image_size", "resize", "interpolation", "mean", "std", "windows"):
            one, two = (found.get(what) or {"resize": "squash"}.get(what) for found in (first, other))
            if one != two:
                raise UserError(
                    f"{printable(file)} has other {what} than {printable(place.checkpoint_file)}, {two} for {one}: "
                    "their answers have no mean."
                )
        models.append(trained_model(replace(setup, checkpoint=other), other))
    return MeanOfModels(models) if len(models) > 1 else models[0]


def _placed(setup: Setup, model: nn.Module, *, train: bool) -> nn.Module:
    """Return `model` on the device, in the layout and with the layers that suit it."""
    computing = setup.asked.computing
    keep_layers_float32(model, _float32_layers(setup))
    if train and setup.asked.training.checkpoint_blocks:
        checkpoint_blocks(model)
    if setup.device.type == "cpu":
        adapt_to_cpu(model, amp=computing.amp)
    layout = torch.channels_last if computing.channels_last else torch.contiguous_format
    return model.to(setup.device).to(memory_format=layout)


def _float32_layers(setup: Setup) -> str:
    """Return --float32_layers or, for a finished run, the pattern that its checkpoint records; empty if none."""
    asked = setup.asked.computing.float32_layers
    recorded = (setup.checkpoint or {}).get("float32_layers") if asked is None else None
    return asked or recorded or ""


def make_trainer(setup: Setup, data: DataSet, run: RunDirectory, *, resumed: dict[str, Any] | None = None) -> Trainer:
    """Return everything that a training needs, wired together.

    A run that is `resumed`, from what its config.json says, needs no weights to start from: last.pt holds them.
    """
    asked = setup.asked
    epochs = asked.training.epochs
    shape = update_shape(setup, run)
    batches = training_batches(setup, data, shape)
    validation = evaluation_batches(setup, data, data.validation, micro_batch(shape))
    model = _model_to_train(setup, data, batches, resumed)
    heads = head_names(model)
    frozen = epochs if asked.training.freeze_epochs == ALL else int(asked.training.freeze_epochs)
    kept = keep_outputs(model, heads, batches, validation, setup.precision) if frozen == epochs else None
    batches, validation = kept or (batches, validation)
    network = Network(
        model,
        sizes=batches.full_sizes,
        evaluation_size=validation.evaluation_size,
        ranks=setup.ranks,
        heads=heads,
        freeze_epochs=frozen,
        ema=asked.training.ema,
        compile_mode=asked.computing.compile_mode,
        only_head=kept is not None,
    )
    recipe = _recipe(setup, data, model, batches.updates_per_epoch)
    stop = StopSignal(seconds_of(asked.recording.max_time) if asked.recording.max_time else None)
    return Trainer(network, recipe, _plan(asked), batches, validation, run, _identity(setup, data, model), stop)


def _model_to_train(setup: Setup, data: DataSet, batches: Batches, resumed: dict[str, Any] | None) -> nn.Module:
    """Return the model to train. Raise UserError if these batches on these processes cannot train it."""
    asked = setup.asked
    processes = setup.ranks.size
    if batches.batch_size < processes * batches.accumulate:
        raise UserError(
            f"--batch_size {batches.batch_size} is too small for {processes} processes with {batches.accumulate} "
            "micro-batches each: every micro-batch needs an image."
        )
    if resumed is None:
        model = new_model(setup, len(data.classes), data.classes)
    elif isinstance(resumed.get("model_options"), dict):
        model = _placed(setup, empty_model(asked.model.model, len(data.classes), resumed["model_options"]), train=True)
    else:
        raise UserError("The run's config.json does not say how its model was built.")
    check_input_size(model, setup.preprocess.image_size, batches.smallest_micro_batch, asked.training.start_size)
    if asked.training.checkpoint_blocks and asked.computing.compile_mode:
        raise UserError("--checkpoint_blocks works without --compile, which itself decides what to compute again.")
    if asked.computing.cuda_graphs and (setup.device.type != "cuda" or processes > 1):
        raise UserError("--cuda_graphs needs --device cuda and a single process. Use --compile instead.")
    if not asked.training.sync_batchnorm:
        return model
    left_over = batches.images_in(batches.updates_per_epoch - 1)
    model = synchronized(model, setup.ranks, setup.device, accumulate=batches.accumulate, left_over=left_over)
    return keep_layers_float32(model, _float32_layers(setup))  # its layers of normalisation are new


def _recipe(setup: Setup, data: DataSet, model: nn.Module, updates_per_epoch: int) -> Recipe:
    """Return the optimizer of all weights, in groups, with its schedule, the precision and the loss."""
    own = setup.asked.training
    groups = parameter_groups(
        model,
        head_names(model),
        learning_rate=own.learning_rate,
        weight_decay=own.weight_decay,
        decay_norms=own.decay_norms,
        backbone_lr=own.backbone_lr,
        layer_decay=own.layer_decay,
    )
    fused = setup.device.type in ("cpu", *GPUS)
    optimizer = make_optimizer(
        groups, own.optimizer, learning_rate=own.learning_rate, weight_decay=own.weight_decay, fused=fused
    )
    schedule = partial(
        make_scheduler,
        optimizer,
        own.decay_type,
        epochs=own.epochs,
        warmup_epochs=own.warmup_epochs,
        updates_per_epoch=updates_per_epoch,
    )
    class_weights = None
    if own.class_weights != "none":
        class_weights = balanced_weights(torch.from_numpy(data.train.labels), len(data.classes)).to(setup.device)
    criterion = SmoothedCrossEntropy(own.label_smoothing, class_weights)
    return Recipe(optimizer, schedule, setup.precision, criterion, own.clip_grad_norm)


def _plan(asked: Asked) -> Plan:
    """Return how long the training goes on, by what it chooses the best epoch, and when it saves."""
    own = asked.training
    saves = intervals(asked.recording.checkpoint_every)
    return Plan(own.epochs, asked.model.seed, own.best_by, own.patience, asked.recording.log_interval, **saves)


def _identity(setup: Setup, data: DataSet, model: nn.Module) -> dict[str, Any]:
    """Return the part of a checkpoint that describes the run."""
    asked = setup.asked
    return identity(
        data,
        model_name=asked.model.model,
        model_options=constructor_options(model),
        preprocess=setup.preprocess,
        normalize=asked.reading.normalize or option.options_of("train")["normalize"].default,
        precision=setup.precision.name,
        float32_layers=_float32_layers(setup) or None,
    )
