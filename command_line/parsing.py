"""Parse a command line: merge defaults, those of --preset and --demo, a config's options and typed ones, in this order.

`parse(argv)` returns the Namespace that command_line/groups.py turns into typed groups; nothing changes it. The options
themselves are in option.py. Imports no torch, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from command_line import meant
from command_line.groups import DEFAULTS
from command_line.helping import build_parser
from command_line.idle import never_acts
from command_line.kinds import ALL, AUTO, CALL, PRECISION, REPEAT
from command_line.presets import DEMO, DEMO_ON_CUDA, OWN_DEFAULTS, PRESETS
from option import COMMANDS, OPTIONS, options_of
from precision_table import PRECISIONS
from runs.config import read_config
from utils import UserError


class Options(argparse.Namespace):
    """The options of one command line. `typed` names those that were typed; it is not an option, so vars() lacks it."""

    __slots__ = ("typed",)
    typed: frozenset[str]


def _with_underscores(word: str) -> str:
    """Return --batch_size=4 for --batch-size=4, and --no-amp for --no_amp."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
        name = "--no-" + name[5:] if name.startswith("--no_") else name
    return name + equals + value


def _with_paths_first(words: list[str]) -> list[str]:
    """Return the arguments of `predict` with the paths behind --checkpoint FILE put first: it would take them as files.

    Checkpoints are the files with the suffix of the first.
    """
    if "--checkpoint" not in words:
        return words
    place = words.index("--checkpoint") + 1
    files = list(takewhile(lambda word: not word.startswith("-") or word == "-", words[place:]))
    suffix = Path(files[0]).suffix if files else ""
    count = len(list(takewhile(lambda word: Path(word).suffix == suffix, files))) if suffix else 1
    return [*files[count:], *words[:place], *files[:count], *words[place + len(files) :]]


def parse(argv: Sequence[str], *, is_cuda: Callable[[str], bool] = lambda device: False) -> Options:
    """Return the options of one command line; raise UserError if it is not valid.

    `is_cuda` answers, for the sizes of --demo, if the device of that name is a CUDA device.
    """
    end = argv.index("--") if "--" in argv else len(argv)  # all arguments behind it are files
    words = [*map(_with_underscores, argv[:end]), *argv[end:]]
    command = words.pop(0) if words and not words[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(meant.command(command, words))
    also = None
    if command == "train" and "--evaluate" in words:  # the training's own command line with --evaluate behind it
        command = "evaluate"
        also = "train"
    known = options_of(command)
    words = _with_paths_first(words) if command == "predict" else words
    parser = build_parser(command, also=also)
    # PATHs may stand on both sides of options; argparse knows no -- then
    split = parser.parse_known_args if "--" in words else parser.parse_known_intermixed_args
    namespace, unknown = split(words)
    if unknown:
        parser.error(meant.argument(command, unknown, words, [*known, *(options_of(also) if also else ())]))
    typed = vars(namespace)
    refused = {} if also else {name: why for name, why in never_acts(command).items() if name in typed}
    if refused:
        name = min(refused)
        raise UserError(f"{command} takes no --{name}: {refused[name]}\nSee: python main.py {command} --help")
    defaults = {name: option.default for name, option in known.items()} | OWN_DEFAULTS.get(command, {})
    config = _stored_config(command, defaults | typed)
    stored = _stored_options(command, config)
    preset = PRESETS[typed["preset"]] if "preset" in typed and "preset" in known else {}
    if "labels" not in typed and typed.get("data_dir", stored.get("data_dir")) != stored.get("data_dir"):
        stored.pop("labels", None)  # the table of another folder
    stored = {name: value for name, value in stored.items() if name not in preset}
    demo = {}
    if typed.get("demo") and command != "prepare":
        wanted = DEMO | (DEMO_ON_CUDA if is_cuda(typed.get("device", "auto")) else {})
        demo = {name: value for name, value in wanted.items() if name in known and defaults[name] is not None}
    merged = defaults | preset | demo | stored | {name: value for name, value in typed.items() if name in known}
    if "start_size" in preset and "start_size" not in typed:
        room = merged["start_size"] < merged["image_size"] and merged["epochs"] > 1
        merged["start_size"] = merged["start_size"] if room else 0
    if merged.get("batch_size") == AUTO:
        merged["batch_size"] = f"{AUTO}:{(defaults | preset | demo | stored)['batch_size']}"
        merged |= {} if "accumulate" in typed else {"accumulate": 1}  # one that is stored was chosen elsewhere
    recorded = frozenset(stored) - set(typed)  # advice on another machine; typed options are orders
    options = Options(**merged, command=command, recorded=recorded, recorded_on=config.get("device"))
    options.typed = frozenset(typed)
    for message in _contradictions(options):
        raise UserError(message)
    return options


def _stored_config(command: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the content of --config FILE, or of the named run's config.json if the command uses a run."""
    file = Path(given.get("checkpoint_dir") or "", given.get("checkpoint_name") or "", "config.json")
    if given.get("config"):
        return read_config(Path(given["config"]))
    return read_config(file) if command in OWN_DEFAULTS and file.exists() else {"options": {}}


def _stored_options(command: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the options that `command` takes from a config.json, each checked."""
    stored = config["options"]
    roles = (CALL, PRECISION) if command == "compare" else (CALL,)
    wanted = {name: option for name, option in options_of(command).items() if option.role not in roles}
    try:
        return {name: option.checked(name, stored[name]) for name, option in wanted.items() if name in stored}
    except UserError as error:
        raise UserError(f"config.json: {error}") from None


def training_words(values: Mapping[str, Any]) -> list[str]:
    """Return the options of a comparison's trainings as arguments of `train`, less those that each run sets itself."""
    shared = {
        name: option
        for name, option in options_of("train").items()
        if option.role not in (CALL, PRECISION, REPEAT) or name == "quiet"
    }
    return [word for name, option in shared.items() for word in option.words(name, values[name])]


def precision_words(name: str) -> list[str]:
    """Return the arguments of `train` that choose the precision `name`."""
    known = options_of("train")
    return [word for key, value in PRECISIONS[name].options.items() for word in known[key].words(key, value)]


def _contradictions(options: Options) -> Iterator[str]:
    """Yield a sentence for each set of options that contradict each other."""
    asked = argparse.Namespace(**DEFAULTS | vars(options))  # has every option of every command
    automatic = isinstance(asked.batch_size, str)
    grows = asked.start_size and "start_size" not in never_acts(asked.command)
    name = Path(asked.checkpoint_name or ".")
    sources = OPTIONS["one of these"]
    if not automatic and asked.accumulate > (asked.batch_size or 1):
        yield "--accumulate cannot be larger than --batch_size: a micro-batch needs at least one image."
    if automatic and asked.accumulate > 1:
        yield "--batch_size auto chooses --accumulate itself: leave one of the two out."
    if asked.budget and ("epochs" in options.typed or asked.freeze_epochs in (ALL, asked.epochs)):
        yield (
            "--budget chooses --epochs by the speed of the whole network: leave out --epochs and --freeze_epochs all."
        )
    if asked.tf32 and asked.amp:
        yield "--tf32 and --amp exclude each other: a run has one precision."
    if asked.watch and (asked.compile or asked.cuda_graphs):
        yield "--watch looks at layers one by one, which torch.compile merges: leave out one of the two."
    if asked.cuda_graphs and asked.accumulate > 1:
        yield "--cuda_graphs replays one micro-batch in one update: leave out --accumulate."
    if asked.weights and "weights" not in asked.recorded and (asked.pretrained_path or not asked.pretrained):
        yield "--weights chooses among published weights: it goes with neither --pretrained_path nor --pretrained 0."
    if asked.decay_type == "step" and asked.warmup_epochs:
        yield "--decay_type step has no warmup: use step_warmup."
    if asked.amp_dtype != "auto" and not asked.amp:
        yield f"--amp_dtype {asked.amp_dtype} has no effect without --amp."
    if asked.warmup_epochs and asked.warmup_epochs > asked.epochs:
        yield f"--warmup_epochs {asked.warmup_epochs} is longer than --epochs {asked.epochs}."
    if asked.freeze_epochs != ALL and asked.freeze_epochs > asked.epochs:
        yield f"--freeze_epochs {asked.freeze_epochs} is longer than --epochs {asked.epochs}."
    if grows and asked.start_size >= (asked.image_size or math.inf):
        yield f"--start_size {asked.start_size} must be smaller than --image_size {asked.image_size}."
    if grows and asked.epochs < 2:
        yield "--start_size needs two --epochs or more: the last ones have images of full size."
    if asked.class_weights != "none" and asked.sampler == "balanced":
        yield "--class_weights balanced and --sampler balanced correct the same thing twice: choose one."
    if asked.resume and asked.overwrite:
        yield "--resume and --overwrite exclude each other: the first goes on, the second begins anew."
    if name.is_absolute() or ".." in name.parts or not str(name).isprintable():
        yield f"--checkpoint_name {str(name)!r} must be a plain folder name below --checkpoint_dir."
    if asked.command == "prepare" and len([source for source in sources if getattr(asked, source)]) != 1:
        yield f"prepare does one of --{', --'.join(sources)}."
