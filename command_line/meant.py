"""Say which word was meant in place of one that the command line does not know. Imports no torch."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence

from command_line.idle import never_acts
from option import COMMANDS, options_of

# Words that people know from other programs and that no likeness leads to the right one.
OPTION_MEANT = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "imgsz": "image_size",
    "arch": "model",
    "scheduler": "decay_type",
    "name": "checkpoint_name",
    "gpu": "device",
    "cuda": "device",
    "fp16": "amp",
    "half": "amp",
    "mixed_precision": "amp",
}
COMMAND_MEANT = {"test": "evaluate", "fit": "train", "classify": "predict", "benchmark": "compare", "onnx": "export"}
NO = ("0", "false", "no", "off")


def command(word: str, words: Sequence[str]) -> str:
    """Return the sentence about an unknown command; `words` follow it."""
    if word == "help":
        named = words[0] + " " if words and words[0] in COMMANDS else ""
        return f"help is an option: python main.py {named}--help"
    close = [COMMAND_MEANT[word]] if word in COMMAND_MEANT else difflib.get_close_matches(word, COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
    return f"unknown command {word!r}: {hint}"


def argument(of: str, unknown: Sequence[str], words: Sequence[str], known: Sequence[str]) -> str:
    """Return the sentence about arguments that the command `of` does not take.

    `words` is its whole command line, `known` the names of its options.
    """
    commands = [word for word in unknown if word in COMMANDS] if of == "train" else []
    if commands:
        rest = list(words)
        rest.remove(commands[0])
        return f"the command stands first: python main.py {shlex.join([commands[0], *rest])}"
    word = unknown[0]
    if not word.startswith("-"):
        before = words[words.index(word) - 1] if words.index(word) else ""
        switch = options_of(of).get(before.removeprefix("--no-").removeprefix("--"))
        return (
            no_value(before, switch.has_negation, word)
            if switch and switch.is_flag
            else f"{of} takes no argument {word!r}"
        )
    name = word.partition("=")[0].lstrip("-").removeprefix("no-")
    if OPTION_MEANT.get(name) in known:
        return f"{of} has no {word} (did you mean --{OPTION_MEANT[name]}?)"
    elsewhere = [each for each in COMMANDS if name in options_of(each).keys() - never_acts(each).keys()]
    if elsewhere and name not in known:
        return f"{of} has no --{name}, which is an option of {', '.join(elsewhere)}"
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"{of} has no {word}" + (f" (did you mean --{close[0]}?)" if close else "")


def no_value(option: str, has_negation: bool, value: str) -> str:
    """Return the sentence about a switch that was given a value."""
    no = f"--no-{option.removeprefix('--')}" if has_negation else f"no {option}"
    return f"{option} takes no value: type {no if value.lower() in NO else option}"


def in_words(message: str) -> str:
    """Return a message of argparse, in plainer words if there are any."""
    found = re.fullmatch(r"argument (--\w+)(/--no-\w+)?: ignored explicit argument '(.*)'", message)
    return no_value(found[1], bool(found[2]), found[3]) if found else message
