"""Options that do nothing: never in a command, which refuses them, or beside other options. Imports no torch.

An option acts, is refused (command_line/parsing.py), or stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from command_line.kinds import ALL, parse_shares
from option import OWN_DEFAULTS, options_of
from precision_table import PRECISIONS

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Idle:
    """Options that have no effect in a command if `when` holds for the values of all options, and why."""

    command: str
    names: frozenset[str]
    why: str
    when: Callable[[Values], Any] | None = None  # None: always


def _all_but(command: str, *acting: str) -> frozenset[str]:
    return frozenset(options_of(command)) - {*acting, "quiet", "evaluate"}


def _table() -> Iterator[Idle]:
    for command in ("evaluate", "predict"):
        yield Idle(command, frozenset({"seed"}), "nothing is drawn at random")
        yield Idle(command, frozenset({"start_size"}), "images have the size of --image_size")
        yield Idle(command, frozenset({"compile", "cuda_graphs"}), "only a training is compiled")
    yield Idle(
        "evaluate",
        frozenset({"split", "group"}),
        "the images of --data_dir are not divided: its test part is tested, or else all",
    )
    files = frozenset({"data_dir", "demo", "labels", "split", "group", "skip_unreadable", "cache", "cache_limit"})
    yield Idle("predict", files, "the files that are named are classified, each by itself")
    yield Idle("audit", frozenset({"split"}), "audit divides the images into --folds")
    yield Idle("inspect", frozenset({"start_size"}), "one batch is inspected, at --image_size")
    yield Idle("export", frozenset({"seed"}), "nothing is drawn at random")
    yield Idle("compare", frozenset({"ladder"}), "python main.py doctor --ladder measures it")
    precision = frozenset({"amp", "amp_dtype", "tf32"})
    yield Idle("compare", precision, "it trains in each precision itself: choose with --precisions")
    for command in ("compare", "audit"):
        yield Idle(command, frozenset({"resume"}), "the same command goes on by itself, unless --overwrite is given")
    for command in ("train", "audit", "predict"):
        yield _without_amp(command, lambda values: not values["amp"])
    yield _without_amp("evaluate", lambda values: not values["amp"] and not values["precisions"])
    yield _without_amp("compare", lambda values: values["precisions"] and not _has_amp(values["precisions"]))
    for command in ("train", "compare", "audit"):
        yield from _of_a_training(command)
    yield from _of_a_mode()


def _has_amp(precisions: list[str]) -> bool:
    return any(PRECISIONS[name].amp_dtype for name in precisions)


def _without_amp(command: str, when: Callable[[Values], Any]) -> Idle:
    return Idle(command, frozenset({"float32_layers"}), "without --amp all layers compute in float32", when)


def _of_a_training(command: str) -> Iterator[Idle]:
    layers = frozenset({"backbone_lr", "layer_decay"})
    yield Idle(command, layers, "--freeze_epochs trains the head alone, in all epochs", _only_head)
    yield Idle(command, frozenset({"decay_norms"}), "--weight_decay is 0", lambda values: values["weight_decay"] == 0)
    yield Idle(
        command,
        frozenset({"patience"}),
        "the run ends before so many epochs",
        lambda values: values["patience"] >= values["epochs"],
    )
    yield Idle(
        command,
        frozenset({"pretrained"}),
        "--pretrained_path gives the weights",
        lambda values: values["pretrained_path"],
    )
    yield Idle(
        command,
        frozenset({"checkpoint_blocks"}),
        "--freeze_epochs trains the head alone, which keeps nothing of the blocks",
        _only_head,
    )
    yield Idle(
        command,
        frozenset({"sync_batchnorm"}),
        "there is one process: start several with torchrun",
        lambda values: values["processes"] == 1,
    )


def _of_a_mode() -> Iterator[Idle]:
    """Yield the options that do nothing because the command does one of several things."""
    folder = ("checkpoint_dir", "checkpoint_name", "open")
    compared: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("runs", folder, "only reports"),
        ("report_only", folder, "only reports"),
    )
    for mode, acting, does in compared:
        yield Idle("compare", _all_but("compare", mode, *acting), f"--{mode} {does}", itemgetter(mode))
    layers = ("layers", "find_layers")
    measured = frozenset({"json", "data_dir"})
    yield Idle("doctor", measured, "--ladder writes its own files and loads no images", itemgetter("ladder"))
    yield Idle("doctor", frozenset({"out"}), "only --ladder writes there", lambda values: not values["ladder"])
    yield Idle(
        "evaluate",
        frozenset({"amp", "amp_dtype", "tf32"}),
        "--precisions names what is tested",
        lambda values: values["precisions"],
    )
    yield Idle(
        "inspect",
        _all_but("inspect", "module", "device", "precisions", "diary", "out", "full", "strict", "open", *layers),
        "--module gives the model and its batch",
        lambda values: values["module"],
    )
    yield Idle(
        "inspect",
        _all_but("inspect", "script", "inputs", "out", "full", "strict", "open"),
        "--script brings its own",
        lambda values: values["script"],
    )
    yield Idle(
        "inspect",
        frozenset({"full", "strict", "diary"}),
        "--layers and --find_layers replace the report",
        lambda values: values["layers"] or values["find_layers"],
    )
    yield Idle("inspect", frozenset({"inputs"}), "they are for --script", lambda values: not values["script"])
    yield Idle(
        "inspect",
        frozenset({"model", "pretrained", "weights", "pretrained_path"}),
        "the checkpoint says its model and weights",
        lambda values: not values["module"] and (values["checkpoint"] or values["checkpoint_name"]),
    )
    yield Idle("export", frozenset({"tta"}), "--safetensors writes weights", lambda values: values["safetensors"])
    prepared: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("demo", ("train_images", "test_images", "seed")),
        ("archive", ("archive_encoding",)),
        ("download", ()),
        ("check", ("labels", "window", "max_megapixels", "json")),
        ("clean", ()),
    )
    for source, acting in prepared:
        names = _all_but("prepare", source, "data_dir", *acting)
        yield Idle("prepare", names, f"--{source} reads none of it", itemgetter(source))


def _only_head(values: Values) -> bool:
    return values["freeze_epochs"] in (ALL, values["epochs"])


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
