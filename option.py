"""Every option of every command: declared once, grouped, validated; imports no torch, so --help is instant.

`parse(argv)` gives the Namespace that only main.py and assemble.py touch. What comes later wins: the defaults,
--demo's, those of --config or of the named run, the command line. Knows nothing of what options do.
"""

from __future__ import annotations

import argparse
import difflib
import math
import shutil
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from utils import UserError, read_json, reading

VERSION = "0.1.0"
COMMANDS = {
    "train": "train a classifier, test its best epoch (the default command)",
    "evaluate": "test the best checkpoint of a named run, with the options it was trained with",
    "predict": "classify image files and folders with a trained run",
    "compare": "train once per precision and tabulate accuracy, memory and time",
    "doctor": "say what this machine can do, and what to expect of AMP on it",
    "inspect": "show what AMP did: dtypes, memory, gradient underflow, loss scale",
    "prepare": "put a data set on disk: download, archive or demo scenes; --check reports on one",
    "export": "write a trained run as ONNX",
}
PRECISIONS = {"fp32": "FP32", "tf32": "TF32", "amp-fp16": "AMP float16", "amp-bf16": "AMP bfloat16"}  # as tables say it

# What --demo changes: a problem that two CPU cores learn from scratch in well under a minute.
DEMO = {
    "data_dir": "data/demo",
    "pretrained": 0,
    "image_size": 64,
    "batch_size": 64,
    "epochs": 8,
    "learning_rate": 2e-3,
    "log_interval": 5,
}
_FROM_RUN = ("evaluate", "predict", "export", "inspect")  # take their defaults from the named run's config.json
_NEVER_HANDED_ON = {  # to another run
    "checkpoint_dir",
    "checkpoint_name",
    "config",
    "resume",
    "overwrite",
    "verify_resume",
    "quiet",
    "evaluate",
    "precisions",
    "report_only",
    "runs",
    "demo",
    "inputs",
}
_EACH_RUN_SETS = {"amp", "amp_dtype", "tf32"}  # of a comparison


class Parser(argparse.ArgumentParser):
    """Suggests the option that was meant and raises UserError, where argparse would print and exit."""

    def __init__(self, **options: Any):
        width = min(100, max(60, shutil.get_terminal_size((100, 24)).columns))
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
            close = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1, 0.6)
            if close:
                message += f" (did you mean {close[0]}?)"
        raise UserError(f"{message}\nSee: python main.py --help")


def _number(metavar: str, kind: type, fits: Callable[[Any], bool], bounds: str) -> dict[str, Any]:
    """A number that `fits`; `bounds` says in words what does."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return {"metavar": metavar, "type": convert}


def _whole(low: int, high: int = 2**31, metavar: str = "N") -> dict[str, Any]:
    return _number(metavar, int, lambda value: low <= value <= high, f"at least {low} and at most {high}")


def _precision_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(PRECISIONS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(PRECISIONS)}, separated by commas")
    return list(dict.fromkeys(names))


def _checkpoint_every(text: str) -> str:
    """`30m` (minutes) or `500u` (updates)."""
    try:
        amount = {"m": float, "u": int}[text[-1:]](text[:-1])
    except (KeyError, ValueError):
        amount = 0
    if not amount > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be minutes such as 10m or updates such as 500u")
    return text


def _one_of(*choices: Any, **more: Any) -> dict[str, Any]:
    return {"choices": choices, **more}


FLAG = {"action": "store_true"}
SWITCH = {"action": argparse.BooleanOptionalAction}
DIR = {"metavar": "DIR"}
FILE = {"metavar": "FILE"}
NAME = {"metavar": "NAME"}
COUNT = _whole(1)
SEED = _whole(0, 2**63)
PIXELS = _whole(16, 4096, "PIXELS")
RATE = _number("RATE", float, lambda value: 0 <= value < math.inf, "at least 0 and finite")
POSITIVE = _number("VALUE", float, lambda value: 0 < value < math.inf, "greater than 0 and finite")
SHARE = _number("SHARE", float, lambda value: 0 <= value < 1, "at least 0 and less than 1")
ALPHA = _number(
    "ALPHA",
    float,
    lambda value: value == 0 or 0.001 <= value <= 1000,  # what float32 can draw with
    "0 (off) or between 0.001 and 1000",
)
EVERY = {"metavar": "10m|500u", "type": _checkpoint_every}
LIST = {"metavar": "LIST", "type": _precision_list}

# Groups of options, each as: its kind, its default, what it does.
OPTIONS = {
    "run": {
        "checkpoint_dir": (DIR, "checkpoint", "folder of all runs"),
        "checkpoint_name": (NAME, "", "this run's folder below it (default: model and precision)"),
        "seed": (SEED, 42, "of split, order, weights"),
        "config": (FILE, None, "take options from a run's config.json; the command line wins"),
        "quiet": (FLAG, False, "print results and warnings only, and no bars"),
    },
    "data": {
        "data_dir": (DIR, "data", "folder that holds the images"),
        "demo": (FLAG, False, "use drawn scenes and demo-sized defaults"),
        "image_size": (PIXELS, 256, "side of the square images"),
        "normalize": (_one_of("imagenet", "none"), "imagenet", "by ImageNet's mean and deviation; none: values 0 to 1"),
        "cache": (
            _one_of("auto", "memory", "none"),
            "auto",
            "memory: keep images decoded; none: stream them; auto: what fits",
        ),
        "num_workers": (_whole(0, 1024), None, "decoding threads or processes (default: cores, at most 8)"),
        "skip_unreadable": (FLAG, False, "leave out images that cannot be read"),
    },
    "model": {
        "model": (NAME, "ResNet18", "any torchvision classification model"),
        "num_classes": (_whole(2), None, "default: counted from the folders"),
        "pretrained": (_one_of(1, 0, type=int), 1, "start from ImageNet weights"),
        "pretrained_path": (FILE, None, "start from this state dict instead"),
    },
    "device and precision": {
        "device": (NAME, "auto", "auto, cpu, cuda, cuda:1, mps"),
        "amp": (SWITCH, False, "automatic mixed precision"),
        "amp_dtype": (_one_of("auto", "float16", "bfloat16"), "auto", "auto: float16 on CUDA, bfloat16 elsewhere"),
        "tf32": (SWITCH, False, "without --amp, let CUDA round the factors of products to TF32"),
        "channels_last": (SWITCH, True, "memory format of convolutions"),
        "compile": (SWITCH, False, "use torch.compile"),
    },
    "training": {
        "batch_size": (COUNT, 256, "images in one update"),
        "accumulate": (COUNT, 1, "pieces that a batch is computed in, to save memory (BatchNorm sees each by itself)"),
        "epochs": (COUNT, 120, "passes over the images"),
        "optimizer": (_one_of("ADAM", "SGD", "ADAMW", type=str.upper), "ADAM", "the optimizer"),
        "learning_rate": (POSITIVE, 1e-4, "at its peak"),
        "weight_decay": (RATE, 1e-4, "L2 penalty; with ADAMW decoupled from the gradient"),
        "decay_type": (
            _one_of("cosine_warmup", "step", "step_warmup"),
            "cosine_warmup",
            "learning rate schedule; step: a tenth at epochs 30, 60 and 90",
        ),
        "warmup_epochs": ({**RATE, "metavar": "N"}, None, "default: epochs/10 for cosine_warmup, 5 for step_warmup"),
        "clip_grad_norm": (POSITIVE, None, "largest gradient norm"),
        "label_smoothing": (SHARE, 0.0, "spread over all classes"),
        "augment": (
            _one_of("flip", "crop", "trivial", "none"),
            "flip",
            "flip; flip and random resized crop; flip and TrivialAugment; nothing",
        ),
        "mixup": (ALPHA, 0.0, "mix pairs of images; 0: off"),
        "cutmix": (ALPHA, 0.0, "paste patches; 0: off"),
        "ema": (SHARE, 0.0, "evaluate a moving average of the weights with this decay; 0: off"),
        "freeze_epochs": (_whole(0), 0, "train the head alone at first"),
        "patience": (COUNT, None, "stop after N epochs without a better one"),
        "sync_batchnorm": (FLAG, False, "share batch statistics among processes"),
    },
    "recording and resuming": {
        "log_interval": (COUNT, 20, "updates between readings"),
        "resume": (
            _one_of("yes", "auto", nargs="?", const="yes", metavar="auto"),
            None,
            "go on from last.pt; auto: start anew where there is none",
        ),
        "overwrite": (FLAG, False, "replace a finished run of the same name"),
        "checkpoint_every": (EVERY, None, "save within epochs, too, by minutes or updates"),
        "verify_resume": (FLAG, False, "prove on a short run that resuming is exact"),
        "tensorboard": (FLAG, False, "write TensorBoard events into the run's folder"),
    },
    "testing": {"evaluate": (FLAG, False, "same as the command evaluate")},
    "a finished run": {
        "batch_size": (COUNT, 256, "images at a time"),
        "checkpoint": (FILE, None, "default: best_model.pt of the run"),
    },
    "evaluation": {
        "evaluate": (FLAG, False, argparse.SUPPRESS),
        "precisions": (LIST, None, "run the checkpoint in each, e.g. fp32,amp-bf16, and report what changes"),
    },
    "prediction": {
        "top_k": (COUNT, 3, "classes shown for each image"),
        "csv": (FILE, None, "write every prediction as CSV"),
        "json": (FILE, None, "write every prediction as JSON"),
        "contact_sheet": (FILE, None, "write a PNG of images with their labels"),
    },
    "comparison": {
        "precisions": (
            LIST,
            None,
            f"of {','.join(PRECISIONS)} (default: all on Ampere GPUs and later, fp32 and "
            "amp-fp16 on older ones, fp32 and amp-bf16 elsewhere)",
        ),
        "seeds": (COUNT, 1, "runs per precision"),
        "report_only": (FLAG, False, "redraw table and picture from finished runs"),
        "runs": ({"metavar": "DIR", "nargs": "+"}, None, "report on these run folders instead"),
    },
    "examination": {
        "device": (NAME, "auto", "auto, cpu, cuda, cuda:1, mps"),
        "model": (NAME, "ResNet18", "any torchvision classification model"),
        "image_size": (PIXELS, None, "side of the square images (default: 256 on a GPU, 128 on a CPU)"),
        "batch_size": (COUNT, None, "images in one update (default: what fits on a GPU, 32 on a CPU)"),
        "data_dir": (DIR, None, "measure this data set's loader too"),
        "json": (FILE, None, "write all findings as JSON"),
    },
    "inspection": {
        "device": (NAME, "auto", "auto, cpu, cuda, cuda:1, mps"),
        "batch_size": (COUNT, 32, "images in the batch"),
        "precisions": (LIST, None, "default: those that make sense"),
        "full": (FLAG, False, "list every operator"),
        "checkpoint": (FILE, None, "inspect this checkpoint's weights"),
        "out": (DIR, "inspect", "folder for JSON and pictures"),
    },
    "one of these": {
        "download": (FLAG, False, "Intel Image Classification from Kaggle"),
        "archive": (FILE, None, "unpack this .zip"),
        "demo": (FLAG, False, "draw six classes of scenes"),
        "check": (FLAG, False, "report on the data set that is there"),
    },
    "preparation": {
        "data_dir": (DIR, "data", "where to put the data set"),
        "train_images": (_whole(60, 10**6), 1200, "demo scenes for training"),
        "test_images": (_whole(12, 10**6), 300, "demo scenes for testing"),
        "seed": (SEED, 0, "of the drawing"),
    },
    "export": {
        "checkpoint": (FILE, None, "default: best_model.pt of the run"),
        "out": (FILE, None, "default: model.onnx in the run's folder"),
    },
}
_TRAINING = ("run", "data", "model", "device and precision", "training", "recording and resuming")
_FINISHED = ("run", "data", "device and precision", "a finished run")
GROUPS = {
    "train": (*_TRAINING, "testing"),
    "evaluate": (*_FINISHED, "evaluation"),
    "predict": (*_FINISHED, "prediction"),
    "compare": (*_TRAINING, "comparison"),
    "doctor": ("examination",),
    "inspect": ("run", "data", "model", "inspection"),
    "prepare": ("one of these", "preparation"),
    "export": ("run", "export"),
}
# Defaults of a command's own, and what it does not ask but its data or model want to know.
_AS_TRAINED = {"image_size": None, "normalize": None, "augment": "flip", "num_classes": None}  # as the checkpoint says
_DEFAULTS = {
    "evaluate": _AS_TRAINED,
    "predict": _AS_TRAINED,
    "inspect": {
        "pretrained": 0,
        "amp": False,
        "channels_last": True,
        "accumulate": 1,
        "augment": "flip",
        "mixup": 0.0,
        "cutmix": 0.0,
    },
    "export": {**_AS_TRAINED, "device": "cpu", "amp": False, "channels_last": True},
}


def build_parser(command: str) -> Parser:
    """The parser of one command; `train`'s help also lists the commands."""
    about = COMMANDS[command]
    parser = Parser(
        prog=f"main.py {command}",
        description=f"{about[0].upper()}{about[1:]}.",
        usage=f"python main.py {'[COMMAND]' if command == 'train' else command} [options]",
    )
    if command == "train":
        listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        parser.description = (
            "Train an image classifier in FP32 or with automatic mixed precision.\n\n"
            f"commands (python main.py COMMAND --help shows its options):\n{listing}"
        )
    parser.add_argument("--version", action="version", version=f"amp-train {VERSION}")
    if command == "predict":
        parser.usage += " PATH ..."
        parser.add_argument("inputs", nargs="+", metavar="PATH", help="image files and folders")
    own_defaults = _DEFAULTS.get(command, {})
    parser.set_defaults(**own_defaults)
    for title in GROUPS[command]:
        group = parser.add_argument_group(title)
        for name, (kind, default, text) in OPTIONS[title].items():
            default = own_defaults.get(name, default)
            if default is not None and default is not False and default != "":
                text += f" (default: {'on' if default is True else default})"
            group.add_argument(f"--{name}", default=default, help=text, **kind)
    return parser


def _with_underscores(word: str) -> str:
    """--batch-size=4 as --batch_size=4, and --no_amp as --no-amp."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
        name = "--no-" + name[5:] if name.startswith("--no_") else name
    return name + equals + value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of one command line. Raises UserError for anything that is not a valid one."""
    end = argv.index("--") if "--" in argv else len(argv)  # what follows are files, whatever they look like
    words = [*map(_with_underscores, argv[:end]), *argv[end:]]
    command = words.pop(0) if words and not words[0].startswith("-") else "train"
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command!r}: {hint}")
    trained_like = command == "train" and "--evaluate" in words
    command = "evaluate" if trained_like else command
    parser = build_parser(command)
    if trained_like:  # the training's own command line with --evaluate behind it is welcome, too
        _accept_training_options(parser)
    given = parser.parse_args(words)
    demo = {name: value for name, value in DEMO.items() if parser.get_default(name) is not None}
    earlier = as_words(parser, demo) if getattr(given, "demo", False) and command != "prepare" else []
    stored = _stored_options(command, given)
    try:  # the command line alone was right: what fails now comes from the file
        earlier += as_words(parser, stored, _NEVER_HANDED_ON | (_EACH_RUN_SETS if command == "compare" else set()))
        options = parser.parse_args([*earlier, *words])
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    options.command = command
    _check_together(options)
    return options


def _accept_training_options(parser: Parser) -> None:
    """Lets `--evaluate` stand behind a training's options; those that do not concern a test are passed over."""
    for action in build_parser("train")._actions:
        if not set(action.option_strings) & parser._option_string_actions.keys():
            parser._add_action(action)


def _stored_options(command: str, given: argparse.Namespace) -> dict[str, Any]:
    """Options recorded in --config FILE, or by the named run for the commands that use one."""
    if getattr(given, "config", None):
        return read_config(Path(given.config))["options"]
    if command in _FROM_RUN:
        file = Path(given.checkpoint_dir) / given.checkpoint_name / "config.json"
        if file.exists():
            return read_config(file)["options"]
    return {}


def as_words(parser: Parser, values: dict[str, Any], left_out: Container[str] = ()) -> list[str]:
    """Values of options as words of a command line, so that they are checked as strictly as what a user types."""
    words = []
    for action in parser._actions:
        if action.dest not in values or action.dest in left_out or action.default is argparse.SUPPRESS:
            continue
        value = values[action.dest]
        name = action.option_strings[0]
        if action.nargs == 0 and isinstance(value, bool):
            name = name if value else action.option_strings[-1]  # --amp, --no-amp
            words += [name] if value or len(action.option_strings) > 1 else []
        elif value is not None or action.default is not None:
            if action.type is None and not isinstance(value, str):
                raise UserError(f"argument {name}: invalid value: {value!r}")
            words.append(f"{name}={value}")
    return words


def training_words(options: argparse.Namespace) -> list[str]:
    """A comparison's training options as words of `train`'s command line, less what each run sets itself."""
    return as_words(build_parser("train"), vars(options), _NEVER_HANDED_ON - {"quiet"} | _EACH_RUN_SETS | {"seed"})


def read_config(file: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError where it is missing or damaged."""
    config = read_json(file)
    with reading(file):
        parts = config["options"], config.setdefault("versions", {}), config.setdefault("dataset", {})
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a table was expected")
    return config


def _check_together(options: argparse.Namespace) -> None:
    """What no single option can be checked for."""
    get = vars(options).get
    epochs = vars(options).get("epochs", math.inf)
    name = Path(get("checkpoint_name") or ".")
    sources = OPTIONS["one of these"]
    for wrong, message in (
        (
            get("accumulate", 1) > (get("batch_size") or 1),
            "--accumulate cannot be larger than --batch_size: a piece needs at least one image.",
        ),
        (get("tf32") and get("amp"), "--tf32 and --amp exclude each other: a run has one precision."),
        (
            options.command == "compare" and (get("amp") or get("tf32") or get("amp_dtype") != "auto"),
            "compare sets --amp, --amp_dtype and --tf32 itself: choose with --precisions.",
        ),
        (options.command == "compare" and get("verify_resume"), "--verify_resume is for train."),
        (get("decay_type") == "step" and get("warmup_epochs"), "--decay_type step has no warmup: use step_warmup."),
        (
            get("amp_dtype", "auto") != "auto" and not get("amp") and options.command != "compare",
            f"--amp_dtype {get('amp_dtype')} has no effect without --amp.",
        ),
        (
            (get("warmup_epochs") or 0) > epochs,
            f"--warmup_epochs {get('warmup_epochs')} is longer than --epochs {epochs}.",
        ),
        (get("freeze_epochs", 0) > epochs, f"--freeze_epochs {get('freeze_epochs')} is longer than --epochs {epochs}."),
        (get("resume") and get("overwrite"), "--resume and --overwrite exclude each other."),
        (
            name.is_absolute() or ".." in name.parts or not str(name).isprintable(),
            f"--checkpoint_name {str(name)!r} must be a plain folder name below --checkpoint_dir.",
        ),
        (
            options.command == "prepare" and len([source for source in sources if get(source)]) != 1,
            f"prepare does one of --{', --'.join(sources)}.",
        ),
    ):
        if wrong:
            raise UserError(message)
