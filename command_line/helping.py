"""The parser of each command and its help: the options that most runs need, or all of them. Imports no torch."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from typing import Any, NoReturn

from command_line import meant
from command_line.idle import never_acts
from command_line.kinds import Option
from command_line.presets import OWN_DEFAULTS
from option import COMMANDS, GROUPS, OPTIONS, VERSION, options_of
from utils import UserError

FIRST_STEPS = """first steps:
  python main.py compare --demo               see what AMP gains, on drawn scenes
  python main.py doctor                       see what this machine can do
  python main.py --data_dir FOLDER --amp      train on FOLDER/train/CLASS and FOLDER/test/CLASS
README.md shows more; docs/errors.md explains messages that PyTorch gives with AMP."""
# The options of these groups that most runs need: `--help` shows them, `--help all` shows all.
COMMON = {
    "run": ("checkpoint_name",),
    "data": ("data_dir", "demo", "image_size"),
    "model": ("model", "pretrained"),
    "device and precision": ("device", "amp"),
    "training": ("preset", "batch_size", "epochs", "learning_rate", "augment"),
    "recording and resuming": ("resume", "overwrite", "max_time"),
    "time": ("budget",),
    "testing": (),
}
# An example of each group of options, and its beginning for some commands.
EXAMPLES = {
    "run": ("--checkpoint_name flowers",),
    "data": ("--data_dir photos", "--image_size 224"),
    "model": ("--model ResNet50",),
    "device and precision": ("--device cuda", "--amp"),
    "training": ("--preset finetune", "--epochs 20"),
    "recording and resuming": ("--resume auto", "--max_time 8h"),
    "time": ("--budget 20m",),
    "a finished run": ("--batch_size 64",),
    "a finished run's folder": ("--checkpoint_name flowers",),
    "evaluation": ("--precisions fp32,amp-bf16",),
    "new data": ("--data_dir photos", "--out results"),
    "prediction": ("--top_k 5", "--csv answers.csv"),
    "comparison": ("--precisions fp32,amp-bf16", "--seeds 3"),
    "examination": ("--model ResNet50", "--image_size 224"),
    "inspection": ("--module model.py:make",),
    "one of these": ("--archive photos.zip",),
    "preparation": ("--check", "--data_dir photos"),
    "auditing": ("--folds 10",),
    "export": ("--out model.onnx",),
}
BEGINNINGS = {
    "train": "",
    "evaluate": "evaluate --checkpoint_name flowers",
    "predict": "predict a.jpg --checkpoint_name flowers",
    "export": "export --checkpoint_name flowers",
}


class Parser(argparse.ArgumentParser):
    """Raise UserError, where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{meant.in_words(message)}\nSee: python {self.prog} --help")


class Help(argparse.Action):
    """Print the help of a command, with all options if `all` follows."""

    def __call__(self, parser: argparse.ArgumentParser, _names: object, value: object, _option: object = None) -> None:
        if value == "all":
            parser = build_parser(self.const, everything=True)
        parser.print_help()
        parser.exit()


def build_parser(command: str, *, also: str | None = None, everything: bool = False) -> Parser:
    """Return the parser of one command; its help shows the common options, or everything.

    It also accepts the options of the command `also`, without a word in the help.
    """
    known = options_of(command)
    inputs = {"predict": " PATH ...", "inspect": " [-- ARGUMENT ...]"}.get(command, "")
    width = min(100, max(40, shutil.get_terminal_size((100, 24)).columns))
    parser = Parser(
        prog="main.py" if command == "train" else f"main.py {command}",
        description=_description(command),
        usage=f"python main.py {'[COMMAND]' if command == 'train' else command} [options]{inputs}",
        epilog=FIRST_STEPS if command == "train" else None,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width),
    )
    shown = [name for title in GROUPS[command] for name in _shown(command, title, everything)]
    of_all = {name for name in known if known[name].help is not argparse.SUPPRESS} - never_acts(command).keys()
    more = f"; --help all: all {len(of_all)} options" if len(shown) < len(of_all) else ""
    about = f"show this help and exit{more}"
    parser.add_argument("-h", "--help", action=Help, nargs="?", const=command, metavar="all", help=about)
    parser.add_argument("--version", action="version", version=f"amp-train {VERSION}", help="show the version and exit")
    for title in GROUPS[command]:
        group = parser.add_argument_group(f"{title} ({_example(command, title)})" if title in EXAMPLES else title)
        for name, option in OPTIONS[title].items():
            text = _help(command, name, option) if name in shown else argparse.SUPPRESS
            group.add_argument(name if name == "inputs" else f"--{name}", help=text, **option.kind)
    for name, option in options_of(also).items() if also else ():
        if name not in known:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **option.kind)
    return parser


def _description(command: str) -> str:
    about = COMMANDS[command]
    if command != "train":
        return f"{about[0].upper()}{about[1:]}."
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "Train an image classifier in FP32 or with automatic mixed precision.\n\n"
        f"commands (python main.py COMMAND --help shows its options):\n{listing}"
    )


def _shown(command: str, title: str, everything: bool) -> list[str]:
    """Return the options of a group that the help of a command shows."""
    shown = OPTIONS[title] if everything else COMMON.get(title, OPTIONS[title])
    hidden = {*never_acts(command), *(name for name, each in OPTIONS[title].items() if each.help is argparse.SUPPRESS)}
    return [name for name in shown if name not in hidden]


def _help(command: str, name: str, option: Option) -> str:
    """Return the line of help of an option, with its default in this command."""
    default: Any = OWN_DEFAULTS.get(command, {}).get(name, option.default)
    if default is None or default is False or default == "":
        return option.help
    return f"{option.help} (default: {'on' if default is True else default})"


def _example(command: str, title: str) -> str:
    """Return a command line with options of a group, less those that this command does not take."""
    beginning = BEGINNINGS.get(command, command)
    hidden = never_acts(command)
    parts = [part for part in EXAMPLES[title] if part not in beginning and part.split()[0][2:] not in hidden]
    return " ".join(["python main.py", *filter(None, [beginning]), *parts])
