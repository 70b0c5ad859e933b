"""Options that do nothing: never in a command, which refuses them, or beside other options. Imports no torch.

An option acts, is refused (command_line/parsing.py), or stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from command_line.kinds import ALL, parse_shares
from command_line.presets import OWN_DEFAULTS
from option import options_of
from precision_table import PRECISIONS

Values = Mapping[str, Any]


class Idle(NamedTuple):
    """Options that have no effect in a command if `when` holds for the values of all options, and why."""

    command: str
    names: frozenset[str]
    why: str
    when: Callable[[Values], Any] | None  # None: always


def _all_but(command: str, acting: str) -> str:
    return " ".join(options_of(command).keys() - {*acting.split(), "quiet", "evaluate"})


def _given(name: str) -> Callable[[Values], Any]:
    return lambda values: values[name]


def _missing(*names: str) -> Callable[[Values], Any]:
    return lambda values: not any(values[name] for name in names)


def _without_amp(values: Values) -> bool:
    names = values["precisions"]
    return bool(names) and not any(PRECISIONS[name].amp_dtype for name in names)


def _only_head(values: Values) -> bool:
    return values["freeze_epochs"] in (ALL, values["epochs"])


PRECISION = "amp amp_dtype tf32"
FLOAT32 = "without --amp all layers compute in float32"
TRAININGS = "train compare audit"
NEVER = (  # commands, options, why
    ("evaluate predict export", "seed", "nothing is drawn at random"),
    ("evaluate predict", "start_size", "images have the size of --image_size"),
    ("evaluate predict", "compile cuda_graphs", "only a training is compiled"),
    ("evaluate", "split group", "the images of --data_dir are not divided: its test part is tested, or else all"),
    (
        "predict",
        "data_dir demo labels split group skip_unreadable cache cache_limit",
        "the files that are named are classified, each by itself",
    ),
    ("audit", "split", "audit divides the images into --folds"),
    ("inspect", "start_size", "one batch is inspected, at --image_size"),
    ("compare", "ladder", "python main.py doctor --ladder measures it"),
    ("compare", PRECISION, "it trains in each precision itself: choose with --precisions"),
    ("compare audit", "resume", "the same command goes on by itself, unless --overwrite is given"),
)
BESIDE: tuple[tuple[str, str, str, Callable[[Values], Any]], ...] = (  # commands, options, why, when
    ("train audit predict", "float32_layers", FLOAT32, _missing("amp")),
    ("evaluate", "float32_layers", FLOAT32, _missing("amp", "precisions")),
    ("compare", "float32_layers", FLOAT32, _without_amp),
    (TRAININGS, "backbone_lr layer_decay", "--freeze_epochs trains the head alone, in all epochs", _only_head),
    (TRAININGS, "decay_norms", "--weight_decay is 0", _missing("weight_decay")),
    (
        TRAININGS,
        "patience",
        "the run ends before so many epochs",
        lambda values: values["patience"] >= values["epochs"],
    ),
    (TRAININGS, "pretrained", "--pretrained_path gives the weights", _given("pretrained_path")),
    (
        TRAININGS,
        "checkpoint_blocks",
        "--freeze_epochs trains the head alone, which keeps nothing of the blocks",
        _only_head,
    ),
    (
        TRAININGS,
        "sync_batchnorm",
        "there is one process: start several with torchrun",
        lambda values: values["processes"] == 1,
    ),
    ("doctor", "json data_dir", "--ladder writes its own files and loads no images", _given("ladder")),
    ("doctor", "out", "only --ladder writes there", _missing("ladder")),
    ("evaluate", PRECISION, "--precisions names what is tested", _given("precisions")),
    (
        "inspect",
        _all_but("inspect", "module device precisions diary out full strict open layers find_layers"),
        "--module gives the model and its batch",
        _given("module"),
    ),
    ("inspect", _all_but("inspect", "script inputs out full strict open"), "--script brings its own", _given("script")),
    (
        "inspect",
        "full strict diary",
        "--layers and --find_layers replace the report",
        lambda values: values["layers"] or values["find_layers"],
    ),
    ("inspect", "inputs", "they are for --script", _missing("script")),
    (
        "inspect",
        "model pretrained weights pretrained_path",
        "the checkpoint says its model and weights",
        lambda values: not values["module"] and (values["checkpoint"] or values["checkpoint_name"]),
    ),
    ("prepare", "pretrained_path", "they are the weights of --model", _missing("model")),
    ("export", "tta float16", "--safetensors writes weights", _given("safetensors")),
)
# Each of these options chooses what the command does: all options but the named ones then do nothing.
MODES = {
    ("compare", "runs"): ("checkpoint_dir checkpoint_name open", "only reports"),
    ("compare", "report_only"): ("checkpoint_dir checkpoint_name open", "only reports"),
    ("prepare", "demo"): ("data_dir train_images test_images seed", "reads none of it"),
    ("prepare", "archive"): ("data_dir archive_encoding", "reads none of it"),
    ("prepare", "download"): ("data_dir", "reads none of it"),
    ("prepare", "check"): ("data_dir labels window max_megapixels model pretrained_path json", "reads none of it"),
    ("prepare", "clean"): ("data_dir", "reads none of it"),
}


def _table() -> Iterator[Idle]:
    for commands, names, why, when in (*((*never, None) for never in NEVER), *BESIDE):
        for command in commands.split():
            yield Idle(command, frozenset(names.split()), why, when)
    for (command, mode), (acting, why) in MODES.items():
        names = _all_but(command, f"{mode} {acting}")
        yield Idle(command, frozenset(names.split()), f"--{mode} {why}", _given(mode))


IDLE = tuple(_table())


def never_acts(command: str) -> dict[str, str]:
    """Return the options of a command that never have an effect in it, each with the reason."""
    return {name: each.why for each in IDLE if each.command == command and each.when is None for name in each.names}


def no_effect(names: Collection[str], why: str) -> str:
    """Return the sentence about typed options that do nothing."""
    listed = ", ".join(f"--{name}" for name in sorted(names))
    return f"{listed} {'has' if len(names) == 1 else 'have'} no effect: {why}."


def said(command: str, typed: Collection[str], values: Values, *, processes: int = 1) -> list[str]:
    """Return sentences about options that were typed and do nothing.

    `values` are those of all options. One that was typed with its default value is named only if it never acts in
    this command: `compare` types all options of its trainings.
    """
    defaults = {name: option.default for name, option in options_of(command).items()} | OWN_DEFAULTS.get(command, {})
    facts = {**values, "processes": processes}
    others = set(typed) - options_of(command).keys()
    sentences = [no_effect(others, "a training's options do not matter to --evaluate")] if others else []
    for each in IDLE:
        names = each.names & set(typed) if each.command == command else set()
        if each.when is not None:
            names = {name for name in names if values[name] != defaults[name]}
        if names and (each.when is None or each.when(facts)):
            sentences.append(no_effect(names, each.why))
    return sentences


def about_division(typed: Collection[str], split: str | None, divided: Collection[str]) -> list[str]:
    """Return sentences about a typed --split or --group that does nothing, given the parts that were split off."""
    shares = 0 if split is None or split.lower().endswith(".csv") else len(parse_shares(split))
    asked = {"group"} | ({"split"} if shares else set())
    names = asked & set(typed)
    if names and not divided:
        return [no_effect(names, "all parts of the data set are given")]
    if "split" in names and shares == 3 and "test" not in divided:
        return ["the last share of --split has no effect: the test part is given."]
    return []
