"""Every option of every command: declared once, grouped, validated; imports no torch, so --help is instant.

`parse(argv)` gives the Namespace that only main.py touches. Precedence: command line, then --config or the
named run's own config.json, then --demo's defaults, then the defaults. Knows nothing of what options do.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import UserError

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
PRECISIONS = ("fp32", "tf32", "amp-fp16", "amp-bf16")

# What --demo changes: a problem that two CPU cores learn from scratch in well under a minute.
DEMO = {
    "data_dir": "data/demo", "pretrained": 0, "image_size": 64, "batch_size": 64, "epochs": 8,
    "learning_rate": 2e-3, "log_interval": 5,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Accepts dashes for underscores, suggests the option that was meant, exits with 2 and one message."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
            close = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1, 0.6)
            if close:
                message += f" (did you mean {close[0]}?)"
        raise UserError(f"{message}\nSee: python main.py --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args([self._spelled(word) for word in args or ()], namespace)

    def _spelled(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            name = "--no-" + name[5:] if name.startswith("--no_") else name
        return name + equals + value


class _Formatter(argparse.HelpFormatter):
    """Shows the default of every option that has one, wide enough to read."""

    def __init__(self, prog: str):
        width = min(100, max(60, shutil.get_terminal_size((100, 24)).columns))
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "", argparse.SUPPRESS) or "%(default)" in action.help or action.default is False:
            return action.help
        return f"{action.help} (default: {'on' if action.default is True else '%(default)s'})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.nargs != 0 and action.choices:
            return f"{', '.join(action.option_strings)} {'|'.join(map(str, action.choices))}"
        return super()._format_action_invocation(action)


# ------------------------------------------------------------------------------------- types
def _number(kind: type, low: float, high: float, low_open: bool = False, high_open: bool = False):
    """An argparse type: `kind` within bounds; the message says what the bounds are."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if not (above and below):
            bound = f"{'greater than' if low_open else 'at least'} {low:g}"
            if value == high == _INFINITY:
                bound = "finite"
            elif high < _INFINITY:
                bound += f" and {'less than' if high_open else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    return convert


_INFINITY = float("inf")
_positive_int = _number(int, 1, 2**31)
_count = _number(int, 0, 2**31)
_positive = _number(float, 0, _INFINITY, low_open=True, high_open=True)
_not_negative = _number(float, 0, _INFINITY, high_open=True)
_share = _number(float, 0, 1, high_open=True)


def _mixing(text: str) -> float:
    """An alpha that PyTorch can draw from a Beta distribution in float32; 0 is off."""
    value = _not_negative(text)
    if value and not 0.001 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} must be 0 (off) or between 0.001 and 1000")
    return value


def _precision_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(PRECISIONS))
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(PRECISIONS)}, separated by commas")
    return list(dict.fromkeys(names))


def _checkpoint_every(text: str) -> str:
    """`30m` (minutes) or `500u` (updates)."""
    if text[-1:] in ("m", "u"):
        try:
            if float(text[:-1]) > 0 and (text[-1] == "m" or float(text[:-1]).is_integer()):
                return text
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"{text!r} must be minutes such as 10m or updates such as 500u")


# ------------------------------------------------------------------------------------ groups
def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--checkpoint_dir", default="checkpoint", metavar="DIR", help="folder of all runs")
    group.add_argument("--checkpoint_name", default="", metavar="NAME",
                       help="this run's folder below it (default: model and precision)")
    group.add_argument("--seed", type=_number(int, 0, 2**63), default=42, metavar="N", help="of split, order, weights")
    group.add_argument("--config", metavar="FILE", help="take options from a run's config.json; the command line wins")
    group.add_argument("--quiet", action="store_true", help="print results and warnings only")


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="folder that holds the images")
    group.add_argument("--demo", action="store_true", help="use drawn scenes and demo-sized defaults")
    group.add_argument("--image_size", type=_number(int, 16, 4096), default=256, metavar="PIXELS", help="side")
    group.add_argument("--normalize", choices=("imagenet", "none"), default="imagenet", help="of pixels, per channel")
    group.add_argument("--cache", choices=("auto", "memory", "none"), default="auto",
                       help="keep images decoded (memory), stream them (none), or whichever fits (auto)")
    group.add_argument("--num_workers", type=_number(int, 0, 1024), metavar="N",
                       help="decoding threads or processes (default: cores)")
    group.add_argument("--skip_unreadable", action="store_true", help="leave out images that cannot be read")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="ResNet18", metavar="NAME", help="any torchvision classification model")
    group.add_argument("--num_classes", type=_number(int, 2, 2**31), metavar="N",
                       help="default: counted from the folders")
    group.add_argument("--pretrained", type=int, choices=(1, 0), default=1, help="start from ImageNet weights")
    group.add_argument("--pretrained_path", metavar="FILE", help="start from this state dict instead")


def _add_device(parser: Parser, precision: bool = True) -> None:
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    if precision:
        group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False,
                           help="automatic mixed precision")
        group.add_argument("--amp_dtype", choices=("auto", "float16", "bfloat16"), default="auto",
                           help="auto: float16 on CUDA, bfloat16 elsewhere")
        group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=False,
                           help="without --amp, let CUDA round products to TF32")
    group.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=True,
                       help="memory format of convolutions")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")


def _add_training(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=_positive_int, default=256, metavar="N", help="images in one update")
    group.add_argument("--accumulate", type=_positive_int, default=1, metavar="N",
                       help="pieces that a batch is computed in, to save memory")
    group.add_argument("--epochs", type=_positive_int, default=120, metavar="N", help="passes over the images")
    group.add_argument("--optimizer", choices=("ADAM", "SGD", "ADAMW"), default="ADAM", type=str.upper, help="rule")
    group.add_argument("--learning_rate", type=_positive, default=1e-4, metavar="RATE", help="at its peak")
    group.add_argument("--weight_decay", type=_not_negative, default=1e-4, metavar="RATE", help="L2 penalty")
    group.add_argument("--decay_type", choices=("cosine_warmup", "step", "step_warmup"), default="cosine_warmup",
                       help="learning rate schedule")
    group.add_argument("--warmup_epochs", type=_not_negative, metavar="N",
                       help="default: epochs/10 for cosine_warmup, 5 for step_warmup")
    group.add_argument("--clip_grad_norm", type=_positive, metavar="NORM", help="largest gradient norm")
    group.add_argument("--label_smoothing", type=_share, default=0.0, metavar="SHARE", help="spread over all classes")
    group.add_argument("--augment", choices=("flip", "crop", "trivial", "none"), default="flip",
                       help="flip; flip and random resized crop; flip and TrivialAugment; nothing")
    group.add_argument("--mixup", type=_mixing, default=0.0, metavar="ALPHA", help="mix pairs of images; 0: off")
    group.add_argument("--cutmix", type=_mixing, default=0.0, metavar="ALPHA", help="paste patches; 0: off")
    group.add_argument("--ema", type=_share, default=0.0, metavar="DECAY",
                       help="evaluate an exponential moving average of the weights; 0: off")
    group.add_argument("--freeze_epochs", type=_count, default=0, metavar="N", help="train the head alone at first")
    group.add_argument("--patience", type=_positive_int, metavar="N", help="stop after N epochs without a better one")
    group.add_argument("--sync_batchnorm", action="store_true", help="share batch statistics among ranks")


def _add_recording(parser: Parser) -> None:
    group = parser.add_argument_group("recording and resuming")
    group.add_argument("--log_interval", type=_positive_int, default=20, metavar="N", help="updates between readings")
    group.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), metavar="auto",
                       help="go on from last.pt; auto: start anew where there is none")
    group.add_argument("--overwrite", action="store_true", help="replace a finished run of the same name")
    group.add_argument("--checkpoint_every", type=_checkpoint_every, metavar="10m|500u",
                       help="save within epochs too, by minutes or updates")
    group.add_argument("--verify_resume", action="store_true", help="prove on a short run that resuming is exact")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard events into the run's folder")


def _add_training_all(parser: Parser) -> None:
    for add in (_add_run, _add_data, _add_model, _add_device, _add_training, _add_recording):
        add(parser)


def _add_train(parser: Parser) -> None:
    _add_training_all(parser)
    parser.add_argument("--evaluate", action="store_true", help="same as the command evaluate")


def _add_trained(parser: Parser, batch_size: int = 256) -> None:
    """What commands that use a finished run share; its own config.json gives the other defaults."""
    _add_run(parser)
    _add_data(parser)
    _add_device(parser)
    parser.add_argument("--batch_size", type=_positive_int, default=batch_size, metavar="N", help="images at a time")
    parser.add_argument("--checkpoint", metavar="FILE", help="default: best_model.pt of the run")


def _add_evaluate(parser: Parser) -> None:
    _add_trained(parser)
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--precisions", type=_precision_list, metavar="LIST",
                        help="run the checkpoint in each, e.g. fp32,amp-bf16, and report what changes")


def _add_predict(parser: Parser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="image files and folders")
    _add_trained(parser)
    group = parser.add_argument_group("prediction")
    group.add_argument("--top_k", type=_positive_int, default=3, metavar="K", help="classes shown for each image")
    group.add_argument("--csv", metavar="FILE", help="write every prediction as CSV")
    group.add_argument("--json", metavar="FILE", help="write every prediction as JSON")
    group.add_argument("--contact_sheet", metavar="FILE", help="write a PNG of images with their labels")


def _add_compare(parser: Parser) -> None:
    _add_training_all(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--precisions", type=_precision_list, metavar="LIST",
                       help=f"of {','.join(PRECISIONS)} (default: those that make sense on the device)")
    group.add_argument("--seeds", type=_positive_int, default=1, metavar="N", help="runs per precision")
    group.add_argument("--report_only", action="store_true", help="redraw table and picture from finished runs")
    group.add_argument("--runs", nargs="+", metavar="DIR", help="report on these run folders instead")


def _add_doctor(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--model", default="ResNet18", metavar="NAME", help="any torchvision classification model")
    parser.add_argument("--image_size", type=_number(int, 16, 4096), metavar="PIXELS",
                        help="side (default: 256 on a GPU, 128 on a CPU)")
    parser.add_argument("--batch_size", type=_positive_int, metavar="N",
                        help="images in one update (default: what fits on a GPU, 32 on a CPU)")
    parser.add_argument("--data_dir", metavar="DIR", help="measure this data set's loader too")
    parser.add_argument("--json", metavar="FILE", help="write all findings as JSON")


def _add_inspect(parser: Parser) -> None:
    _add_run(parser)
    _add_data(parser)
    _add_model(parser)
    parser.set_defaults(pretrained=0)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch_size", type=_positive_int, default=32, metavar="N", help="images in the batch")
    parser.add_argument("--precisions", type=_precision_list, metavar="LIST", help="default: those that make sense")
    parser.add_argument("--full", action="store_true", help="list every operator")
    parser.add_argument("--checkpoint", metavar="FILE", help="inspect this checkpoint's weights")
    parser.add_argument("--out", default="inspect", metavar="DIR", help="folder for JSON and pictures")
    parser.set_defaults(channels_last=True, accumulate=1, augment="flip", mixup=0.0, cutmix=0.0)


def _add_prepare(parser: Parser) -> None:
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="where to put the data set")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--download", action="store_true", help="Intel Image Classification from Kaggle")
    what.add_argument("--archive", metavar="FILE", help="unpack this .zip or .tar.gz")
    what.add_argument("--demo", action="store_true", help="draw six classes of scenes")
    what.add_argument("--check", action="store_true", help="report on the data set that is there")
    group = parser.add_argument_group("demo scenes")
    group.add_argument("--train_images", type=_number(int, 60, 10**6), default=1200, metavar="N", help="to draw")
    group.add_argument("--test_images", type=_number(int, 12, 10**6), default=300, metavar="N", help="to draw")
    group.add_argument("--seed", type=_number(int, 0, 2**63), default=0, metavar="N", help="of the drawing")
    group.add_argument("--num_workers", type=_positive_int, metavar="N", help="processes (default: cores)")


def _add_export(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: best_model.pt of the run")
    parser.add_argument("--out", metavar="FILE", help="default: model.onnx in the run's folder")


_ADD = {
    "train": _add_train, "evaluate": _add_evaluate, "predict": _add_predict, "compare": _add_compare,
    "doctor": _add_doctor, "inspect": _add_inspect, "prepare": _add_prepare, "export": _add_export,
}  # fmt: skip
_FROM_RUN = ("evaluate", "predict", "export", "inspect")  # take their defaults from the named run's config.json
_NEVER_FROM_CONFIG = {
    "command", "config", "checkpoint_dir", "checkpoint_name", "resume", "overwrite", "verify_resume", "quiet",
    "evaluate", "report_only", "runs", "demo",
}  # fmt: skip


# ----------------------------------------------------------------------------------- parsing
def build_parser(command: str) -> Parser:
    """The parser of one command; `train`'s help also lists the commands."""
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="main.py" if command == "train" else f"main.py {command}",
        usage=f"python main.py {'[COMMAND]' if command == 'train' else command} [options]",
        description=f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
    )
    if command == "train":
        parser.formatter_class = lambda prog: _WithCommands(prog, listing)
        parser.description = "Train an image classifier in FP32 or with automatic mixed precision."
    parser.add_argument("--version", action="version", version=f"amp-train {VERSION}")
    _ADD[command](parser)
    return parser


class _WithCommands(_Formatter):
    def __init__(self, prog: str, listing: str):
        super().__init__(prog)
        self._listing = listing

    def format_help(self) -> str:
        usage, _, rest = super().format_help().partition("\n\noptions:")
        heading = "commands (python main.py COMMAND --help shows its options):"
        return f"{usage}\n\n{heading}\n{self._listing}\n\noptions:{rest}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of one command line; `explicit` names those that were given on it.

    Raises UserError for anything that is not a valid command line.
    """
    words = list(argv)
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
    first = parser.parse_args(words)
    if getattr(first, "demo", False) and command != "prepare":
        parser.set_defaults(**{name: value for name, value in DEMO.items() if hasattr(first, name)})
    stored = _stored_options(command, first)
    parser.set_defaults(**{
        action.dest: _checked(parser, action, stored[action.dest])
        for action in parser._actions if action.dest in stored.keys() - _NEVER_FROM_CONFIG
    })
    options = parser.parse_args(words)
    options.command = command
    options.trained_with = stored
    _check_together(options)
    return options


def _accept_training_options(parser: Parser) -> None:
    """Lets `--evaluate` stand behind a training's options; those that do not concern a test are passed over."""
    for action in build_parser("train")._actions:
        if not set(action.option_strings) & parser._option_string_actions.keys():
            parser._add_action(action)


def _checked(parser: Parser, action: argparse.Action, value: Any) -> Any:
    """A value out of a config.json, as strictly as if it stood on the command line."""
    if value == action.default or (action.nargs == 0 and isinstance(value, bool)):
        return value
    try:
        if action.nargs == 0 or (action.type is None and not isinstance(value, str)):
            raise argparse.ArgumentError(action, f"invalid value: {value!r}")
        converted = parser._get_value(action, ",".join(value) if isinstance(value, list) else str(value))
        parser._check_value(action, converted)
        return converted
    except (argparse.ArgumentError, TypeError) as error:
        raise UserError(f"config.json: {error}") from None


def _stored_options(command: str, first: argparse.Namespace) -> dict[str, Any]:
    """Options recorded in --config FILE, or by the named run for the commands that use one."""
    if getattr(first, "config", None):
        return read_config(Path(first.config))["options"]
    if command in _FROM_RUN:
        file = Path(first.checkpoint_dir) / first.checkpoint_name / "config.json"
        if file.exists():
            return read_config(file)["options"]
    return {}


def training_words(options: argparse.Namespace) -> list[str]:
    """A comparison's training options as words of `train`'s command line, less what each run sets itself."""
    own = {"checkpoint_dir", "checkpoint_name", "seed", "amp", "amp_dtype", "tf32", "config", "demo", "evaluate",
           "resume", "overwrite"}  # fmt: skip
    words = []
    for action in build_parser("train")._actions:
        value = getattr(options, action.dest, None)
        if action.dest in own or value is None:
            continue
        if isinstance(value, bool):
            words += [action.option_strings[0 if value else -1]] if value or len(action.option_strings) > 1 else []
        else:
            words.append(f"{action.option_strings[0]}={value}")
    return words


def read_config(file: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError where it is missing or damaged."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["options"], dict):
            raise TypeError("options is not a table")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a run's config.json ({type(error).__name__}: {error}).") from None
    return config


def _check_together(options: argparse.Namespace) -> None:
    """What no single option can be checked for."""
    values = vars(options)
    if values.get("accumulate", 1) > (values.get("batch_size") or 1):
        raise UserError("--accumulate cannot be larger than --batch_size: a piece needs at least one image.")
    if values.get("tf32") and values.get("amp"):
        raise UserError("--tf32 and --amp exclude each other: a run has one precision.")
    if values.get("amp_dtype", "auto") != "auto" and not values.get("amp") and options.command == "train":
        raise UserError(f"--amp_dtype {options.amp_dtype} has no effect without --amp.")
    warmup = values.get("warmup_epochs")
    if warmup is not None and warmup > options.epochs:
        raise UserError(f"--warmup_epochs {warmup:g} is longer than --epochs {options.epochs}.")
    if values.get("freeze_epochs", 0) > values.get("epochs", 0):
        raise UserError(f"--freeze_epochs {options.freeze_epochs} is longer than --epochs {options.epochs}.")
    if values.get("resume") and values.get("overwrite"):
        raise UserError("--resume and --overwrite exclude each other.")
    name = values.get("checkpoint_name", "")
    if name and (Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable()):
        raise UserError(f"--checkpoint_name {name!r} must be a plain folder name below --checkpoint_dir.")


