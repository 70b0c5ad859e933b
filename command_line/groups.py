"""The options of one command line as frozen, typed groups. A misspelled option is an error of mypy.

Names, defaults and help are in option.py; a test compares the fields with that table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from option import OPTIONS

Group = TypeVar("Group")


@dataclass(frozen=True)
class Place:
    """The run or the checkpoint to use."""

    checkpoint_dir: str
    checkpoint_name: str
    checkpoint: list[str] | None
    config: str | None
    resume: str | None
    overwrite: bool

    @property
    def checkpoint_files(self) -> list[Path]:
        """Return the files of --checkpoint, or best_model.pt of the named run."""
        own = Path(self.checkpoint_dir, self.checkpoint_name, "best_model.pt")
        return [Path(file) for file in self.checkpoint] if self.checkpoint else [own]

    @property
    def checkpoint_file(self) -> Path:
        """Return the first of them."""
        return self.checkpoint_files[0]


@dataclass(frozen=True)
class Data:
    """The images, how they are divided, and where they are kept."""

    data_dir: str
    demo: bool
    labels: str | None
    group: str | None
    split: str | None
    num_classes: int | None
    skip_unreadable: bool
    cache: str
    cache_limit: float
    num_workers: int | None


@dataclass(frozen=True)
class Reading:
    """How a file becomes the input of the model; None: as the checkpoint says."""

    image_size: int | None
    resize: str | None
    normalize: str | None
    window: str | None
    max_megapixels: float
    tta: str


@dataclass(frozen=True)
class Model:
    """The model and the weights from which it starts."""

    model: str
    pretrained: int
    weights: str | None
    pretrained_path: str | None
    seed: int


@dataclass(frozen=True)
class Computing:
    """The device, the precision and the layout."""

    device: str
    amp: bool
    amp_dtype: str
    float32_layers: str | None
    tf32: bool
    channels_last: bool
    compile: bool
    cuda_graphs: bool

    @property
    def compile_mode(self) -> str | None:
        """Return the mode of torch.compile; None if the model is not compiled."""
        if self.cuda_graphs:
            return "reduce-overhead"
        return "default" if self.compile else None


@dataclass(frozen=True)
class Training:
    """The updates: batches, optimizer, schedule, loss, augmentation."""

    batch_size: int | str
    accumulate: int
    epochs: int
    fraction: float
    optimizer: str
    learning_rate: float
    weight_decay: float
    decay_norms: bool
    backbone_lr: float
    layer_decay: float
    decay_type: str
    warmup_epochs: float | None
    class_weights: str
    sampler: str
    best_by: str
    clip_grad_norm: float | None
    label_smoothing: float
    augment: str
    mixup: float
    cutmix: float
    start_size: int
    ema: float
    freeze_epochs: int | str
    patience: int | None
    checkpoint_blocks: bool
    sync_batchnorm: bool


@dataclass(frozen=True)
class Recording:
    """The files that a training writes, and the time when it stops."""

    log_interval: int
    watch: int | None
    max_time: str | None
    budget: str | None
    checkpoint_every: str | None
    log: list[str] | None
    tensorboard: bool
    safetensors: bool

    @property
    def logs(self) -> list[str]:
        """Return the names in --log, and tensorboard for --tensorboard, each once."""
        return list(dict.fromkeys([*(self.log or []), *(["tensorboard"] if self.tensorboard else [])]))


@dataclass(frozen=True)
class Comparison:
    """The options of `compare` alone."""

    precisions: list[str] | None
    seeds: int
    report_only: bool
    runs: list[str] | None
    open: bool


@dataclass(frozen=True)
class Evaluation:
    """The options of `evaluate` alone."""

    precisions: list[str] | None
    out: str | None
    csv: str | None
    json: str | None


@dataclass(frozen=True)
class Prediction:
    """The options of `predict` alone."""

    inputs: list[str]
    top_k: int
    min_confidence: float | None
    csv: str | None
    json: str | None
    submission: str | None
    embed: str | None
    contact_sheet: str | None
    explain: str | None


@dataclass(frozen=True)
class Auditing:
    """The option of `audit` alone."""

    folds: int


@dataclass(frozen=True)
class Examination:
    """The options of `doctor`."""

    device: str
    model: str
    image_size: int | None
    batch_size: int | None
    data_dir: str | None
    json: str | None
    ladder: bool
    out: str


@dataclass(frozen=True)
class Inspection:
    """The options of `inspect` alone."""

    module: str | None
    script: str | None
    inputs: list[str] | None
    precisions: list[str] | None
    diary: str | None
    out: str
    full: bool
    strict: bool
    open: bool
    layers: bool
    find_layers: bool


@dataclass(frozen=True)
class Preparation:
    """The options of `prepare`; the last thing to do, a check, needs no option of its own."""

    data_dir: str
    demo: bool
    archive: str | None
    archive_encoding: str | None
    download: bool
    clean: bool
    train_images: int
    test_images: int
    seed: int
    labels: str | None
    window: str
    max_megapixels: float
    model: str | None
    pretrained_path: str | None
    json: str | None


@dataclass(frozen=True)
class Redrawing:
    """The options of `report`."""

    checkpoint_dir: str
    checkpoint_name: str
    open: bool


@dataclass(frozen=True)
class Export:
    """The options of `export` alone."""

    out: str | None
    safetensors: bool
    float16: bool


@dataclass(frozen=True)
class Given:
    """Every option by name, and where it comes from."""

    typed: frozenset[str]  # names of the options that were typed
    recorded: frozenset[str]  # names of those that a config.json gave
    recorded_on: str | None  # the type of the device that it names
    flat: dict[str, Any]  # all options, as config.json holds them


@dataclass(frozen=True)
class Asked:
    """Everything that one command line asks for."""

    command: str
    place: Place
    data: Data
    reading: Reading
    model: Model
    computing: Computing
    training: Training
    recording: Recording
    given: Given

    @property
    def uses_checkpoint(self) -> bool:
        """Return True if the command uses a trained model."""
        if self.command in ("train", "compare", "audit"):
            return False
        return self.command != "inspect" or bool(self.place.checkpoint or self.place.checkpoint_name)


DEFAULTS = {name: each.default for options in reversed(OPTIONS.values()) for name, each in options.items()}


def take(group: type[Group], options: argparse.Namespace) -> Group:
    """Return the group's options; one that the command does not have has its default."""
    values = vars(options)
    names = [field.name for field in fields(group)]  # type: ignore[arg-type]
    return group(**{name: values.get(name, DEFAULTS[name]) for name in names})


def grouped(options: argparse.Namespace) -> Asked:
    """Return the options that `command_line.parsing.parse` found, in groups."""
    return Asked(
        command=options.command,
        place=take(Place, options),
        data=take(Data, options),
        reading=take(Reading, options),
        model=take(Model, options),
        computing=take(Computing, options),
        training=take(Training, options),
        recording=take(Recording, options),
        given=Given(options.typed, options.recorded, options.recorded_on, dict(vars(options))),
    )
