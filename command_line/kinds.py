"""Define the kinds of options: how a value is read and checked, and the roles that options have.

The options themselves stand in option.py. Imports no torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from choices import AUGMENTATIONS
from precision_table import PRECISIONS
from runs.logs import LOGS
from utils import UserError

# The role of an option says where its value may differ: on resuming, within a comparison, between repeats.
CALL = "call"  # about this call alone: no other run takes it from a config
HANDLING = "handling"  # how the work is done, without an effect on results: may differ anywhere
PLACE = "place"  # where: may differ when a run is resumed, and within a comparison
START = "start"  # counts only at the start of a run: may differ when it is resumed
PRECISION = "precision"  # differs between the rows of a comparison
REPEAT = "repeat"  # differs between repeats of one training
RESULT = "result"  # changes the results


@dataclass(frozen=True)
class Option:
    """One option: keywords of argparse's `add_argument`, its default, its help text and its role."""

    kind: dict[str, Any]
    default: Any
    help: str
    role: str = RESULT

    @property
    def is_flag(self) -> bool:
        return "action" in self.kind

    @property
    def has_negation(self) -> bool:
        """Return True if there is --no-NAME beside --NAME."""
        return self.kind.get("action") is argparse.BooleanOptionalAction

    def checked(self, name: str, value: Any) -> Any:
        """Return a value from a file, checked as a typed one is. Raise UserError if the option does not accept it."""
        if value is None and self.default is None:
            return None
        if self.is_flag:
            if isinstance(value, bool):
                return value
            raise UserError(f"argument --{name}: invalid value: {value!r}")
        convert = self.kind.get("type", str)
        if convert in (str, path) and not isinstance(value, str):
            raise UserError(f"argument --{name}: invalid value: {value!r}")
        try:
            found = convert(",".join(map(str, value)) if isinstance(value, list) else str(value))
        except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
            raise UserError(f"argument --{name}: {error}") from None
        if isinstance(value, list) and not isinstance(found, list):
            raise UserError(f"argument --{name}: invalid value: {value!r}")
        if found not in self.kind.get("choices", [found]):
            raise UserError(f"argument --{name}: invalid choice: {value!r}")
        return found

    def words(self, name: str, value: Any) -> list[str]:
        """Return the arguments that give the option this value on a command line."""
        if value is None:
            return []
        if not self.is_flag:
            return [f"--{name}={','.join(value) if isinstance(value, list) else value}"]
        if value:
            return [f"--{name}"]
        return [f"--no-{name}"] if self.has_negation else []


def number(metavar: str, kind: type, fits: Callable[[Any], bool], bounds: str) -> dict[str, Any]:
    """Return the keywords of `add_argument` for a number that `fits`; `bounds` describes such numbers in words."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return {"metavar": metavar, "type": convert}


def whole(low: int, high: int = 2**31, metavar: str = "N") -> dict[str, Any]:
    return number(metavar, int, lambda value: low <= value <= high, f"at least {low} and at most {high}")


def precision_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(PRECISIONS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(PRECISIONS)}, separated by commas")
    return list(dict.fromkeys(names))


def checkpoint_every(text: str) -> str:
    """Return `30m` (minutes) or `500u` (updates) unchanged; refuse any other text."""
    try:
        amount = {"m": float, "u": int}[text[-1:]](text[:-1])
    except (KeyError, ValueError):
        amount = 0
    if not amount > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be minutes such as 10m or updates such as 500u")
    return text


def intervals(text: str | None) -> dict[str, Any]:
    """Return `--checkpoint_every` as the keyword `save_every_updates` or `save_every_seconds`."""
    if text is None:
        return {}
    return {"save_every_updates": int(text[:-1])} if text[-1] == "u" else {"save_every_seconds": 60 * float(text[:-1])}


def augmentations(text: str) -> str:
    """Return names of augmentations in one order and spelling: `crop,jitter` for `jitter, crop`."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if not names or not names <= set(AUGMENTATIONS) or ("none" in names and len(names) > 1):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(AUGMENTATIONS)}, separated by commas")
    if names == {"upright"}:
        return "none"
    if "flip" in names and "upright" in names:
        raise argparse.ArgumentTypeError(f"{text!r}: flip and upright exclude each other")
    return ",".join(name for name in AUGMENTATIONS if name in names - {"flip"}) or "flip"


def count_or_auto(text: str) -> int | str:
    """Return a count, `auto`, or `auto:COUNT`."""
    name, _, count = text.partition(":")
    if name != AUTO:
        return COUNT["type"](text)
    return f"{AUTO}:{COUNT['type'](count)}" if count else AUTO


def images_asked(batch_size: int | str) -> int:
    """Return the number of images in one update, given `--batch_size`, which may be `auto:COUNT`."""
    return int(str(batch_size).removeprefix(f"{AUTO}:"))


def epochs_or_all(text: str) -> int | str:
    return text if text == ALL else whole(0)["type"](text)


def parse_shares(text: str) -> tuple[float, ...]:
    """Return the percentages of training, validation and test in "70,15,15", or in "80,20" if a test part exists.

    Raise ValueError for anything else.
    """
    shares = tuple(float(word) for word in re.split(r"[,;:/ ]+", text.strip()))
    if (
        len(shares) not in (2, 3)
        or min(shares) <= 0
        or not (abs(sum(shares) - 100) < 0.5 or abs(sum(shares) - 1) < 0.005)
    ):
        raise ValueError(f"{text!r} is neither 2 or 3 percentages above 0 that add up to 100, nor a split.csv")
    return tuple(100 * share / sum(shares) for share in shares)


def split(text: str) -> str:
    """Return percentages such as 70,15,15, or the path of a split.csv, unchanged; refuse any other text."""
    if not text.lower().endswith(".csv"):
        try:
            parse_shares(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def window(text: str) -> str:
    """Return `data`, `type`, or two numbers LOW,HIGH, unchanged; refuse any other text."""
    if text not in ("data", "type"):
        try:
            low, high = map(float, text.split(","))
        except ValueError:
            low, high = 0.0, 0.0
        if not -math.inf < low < high < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} must be data, type, or LOW,HIGH with LOW below HIGH")
    return text


def path(text: str) -> str:
    """Return a path with `~` and `$VAR` resolved, unless a file of exactly this name exists."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, but must name a file or folder")
    return text if os.path.lexists(text) else os.path.expanduser(os.path.expandvars(text))


def max_time(text: str) -> str:
    """Return a duration such as `3h30m`, `90m` or `1d12h` unchanged; refuse any other text."""
    if not re.fullmatch(r"(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text) or not seconds_of(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be days, hours, minutes and seconds such as 3h30m")
    return text


def seconds_of(text: str) -> int:
    """Return the seconds in a duration such as 3h30m."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(amount) * units[unit] for amount, unit in re.findall(r"(\d+)([dhms])", text))


def log_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(LOGS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(LOGS)}, separated by commas")
    return list(dict.fromkeys(names))


def pretrained(text: str) -> int:
    """Return the integer that follows --pretrained."""
    try:
        return int(text)
    except ValueError:
        right = 0 if text.lower() in ("false", "no", "off", "none") else 1
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0: type --pretrained {right}") from None


def one_of(*choices: Any, **more: Any) -> dict[str, Any]:
    return {"choices": choices, **more}


def key_of(table: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the keywords for a key of a table. The table is read with the option, so later entries count."""
    return {"choices": table, **more}


ALL = "all"
AUTO = "auto"
COUNT_OR_AUTO = {"metavar": "N|auto", "type": count_or_auto}
AUGMENT = {"metavar": "LIST", "type": augmentations}
EPOCHS = {"metavar": "N|all", "type": epochs_or_all}
FLAG = {"action": "store_true"}
SWITCH = {"action": argparse.BooleanOptionalAction}
DIR = {"metavar": "DIR", "type": path}
FILE = {"metavar": "FILE", "type": path}
FILES = {**FILE, "nargs": "+"}
ONE_FILE = {**FILE, "nargs": 1}  # a list, as of FILES
NAME = {"metavar": "NAME"}
COUNT = whole(1)
SEED = whole(0, 2**63)
PIXELS = whole(16, 4096, "PIXELS")
START_PIXELS = number("PIXELS", int, lambda value: value == 0 or 16 <= value <= 4096, "0 (off) or from 16 to 4096")
RATE = number("RATE", float, lambda value: 0 <= value < math.inf, "at least 0 and finite")
POSITIVE = number("VALUE", float, lambda value: 0 < value < math.inf, "greater than 0 and finite")
SHARE = number("SHARE", float, lambda value: 0 <= value < 1, "at least 0 and less than 1")
FACTOR = number("FACTOR", float, lambda value: 0 < value <= 1, "greater than 0 and at most 1")
ALPHA = number(
    "ALPHA",
    float,
    lambda value: value == 0 or 0.001 <= value <= 1000,  # float32 cannot draw with others
    "0 (off) or between 0.001 and 1000",
)
EVERY = {"metavar": "10m|500u", "type": checkpoint_every}
TIME = {"metavar": "3h30m", "type": max_time}
LIST = {"metavar": "LIST", "type": precision_list}
LOG = {"metavar": "LIST", "type": log_list}
