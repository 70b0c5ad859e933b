"""Find the entries in a file of weights that fit a model, and their names in the model.

`read_weights` opens a file, `fitted` finds the entries that a model needs, `load_weights` loads them or says why they
do not fit. Knows nothing of how models are built.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrained.computed import with_computed
from pretrained.files import METADATA, load_file
from pretrained.transformers_names import with_usual_names
from utils import UserError, printable

State = dict[str, torch.Tensor]

# Parts of names that wrappers add: DDP and DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Entries outside the network: counters of the EMA and of a profiler, losses and metrics.
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged|total_ops|total_params)$")
_BESIDE = re.compile(r"(criterion|loss|metric|accuracy|acc|auroc|f1)", re.I)


@dataclass
class Weights:
    """The content of a file of weights: every dictionary of tensors in it by its position, and the file's metadata."""

    source: str
    places: dict[str, State]
    saved_from: str | None = None  # the model's name, if the file contains it
    options: dict[str, Any] = field(default_factory=dict)  # the keyword arguments of its model
    notes: dict[str, str] = field(default_factory=dict)  # by position: which weights were computed from others
    classes: list[str] | None = None  # in the order of the head's rows, if the file contains them


def read_weights(path: str | Path) -> Weights:
    """Return the content of a file of weights. Raise UserError if it cannot be read or holds no state dict."""
    content = load_file(path)
    places = {}
    notes = {}
    for place, state in _state_dicts(content):
        state, notes[place] = with_computed(state)
        places[place] = with_usual_names(state)
    if not places:
        raise UserError(f"{printable(path)} holds no state dict (names to tensors).{_contents(content)}")
    options = content.get("model_options") if isinstance(content, dict) else None
    told = dict(options) if isinstance(options, dict) else {}
    return Weights(str(path), places, _saved_from(content), told, notes, _classes_of(content))


def _state_dicts(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, State]]:
    """Yield dictionaries of tensors by name, at any key of a checkpoint that is not an optimizer's or the like."""
    if not isinstance(content, dict):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    if len(tensors) > len(content) / 2:
        state = type(content)(tensors) if isinstance(content, collections.OrderedDict) else tensors
        if hasattr(content, "_metadata"):
            set_versions(state, content._metadata)
        yield place, state
    for key, value in content.items():
        if depth and isinstance(key, str) and not re.search("optimizer|sched|scaler|callback|loop|hyper", key):
            yield from _state_dicts(value, f"{place}.{key}" if place else key, depth - 1)


def _contents(content: Any) -> str:
    """Describe the content of a file that holds no weights."""
    if isinstance(content, dict) and content:
        return f" It holds: {', '.join(printable(key) for key in list(content)[:8])}."
    return f" It holds a {type(content).__name__}."


def _saved_from(content: Any) -> str | None:
    """Return the model's name in a checkpoint of timm, torchvision's reference code or this program."""
    if not isinstance(content, dict):
        return None
    args = content.get("args", content.get("hyper_parameters"))
    args = vars(args) if isinstance(args, types.SimpleNamespace) else args
    for table, key in ((content, "model_name"), (content, "arch"), (args, "model"), (args, "arch")):
        if isinstance(table, dict) and isinstance(table.get(key), str):
            return table[key]
    return None


def _classes_of(content: Any) -> list[str] | None:
    """Return the class names in a checkpoint of this program or of another; None if it has none."""
    if not isinstance(content, dict):
        return None
    for key in ("classes", "class_names", "names", "class_to_idx", "classes_to_idx", "idx_to_class", "id2label"):
        told = content.get(METADATA, content).get(key)
        with contextlib.suppress(ValueError, TypeError):  # text that is not JSON; values that are not numbers
            told = json.loads(told) if isinstance(told, str) else told
            names = _in_order(told) if isinstance(told, dict) else told
            if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _in_order(told: dict[Any, Any]) -> list[Any]:
    """Return the class names by index, given {name: index} or {index: name}."""
    if all(isinstance(name, str) for name in told.values()):
        told = {name: int(index) for index, name in told.items()}
    return sorted(told, key=lambda name: told[name])


@dataclass
class Fit:
    """The entries of a file that a model can use, under the model's own names, and how they were found."""

    state: State
    place: str = ""
    prefix: str = ""
    by_order: bool = False
    matched: int = 0

    def described(self) -> str:
        """Describe how the entries were found; return an empty string if they had the model's names."""
        parts = [f"entry {printable(self.place)}"] if self.place else []
        parts += [f"names without {printable(self.prefix)!r}"] if self.prefix else []
        if _is_average(self.place) or _is_average(self.prefix):
            parts += ["the averaged weights (EMA)"]
        if self.by_order:
            parts += ["its names are another program's: entries are matched by order and shape, one to one"]
        return ", ".join(parts)


def fitted(weights: Weights, model: nn.Module, head: tuple[str, ...]) -> Fit:
    """Return the entries of `weights` that fit `model` best: try each dictionary, each prefix, then by order.

    EMA weights, which DINO and its relatives call the teacher, win over others that fit as well.
    """
    own = model.state_dict()
    fits = [_without_prefix(state, own, place) for place, state in weights.places.items()]
    best = max(fits, key=lambda fit: (fit.matched, _is_average(fit.place)))
    needed = [name for name in own if not _COUNTERS.search(name) and not belongs(name, head)]
    if best.matched < len(needed) / 2:
        for place, state in sorted(weights.places.items(), key=lambda item: not _is_average(item[0])):
            ordered = _by_order(state, own, head)
            if ordered is not None:
                return Fit(ordered, place, by_order=True, matched=len(ordered))
    return best


def _is_average(place: str) -> bool:
    return "ema" in place.lower() or "teacher" in place.lower()


def belongs(name: str, modules: Iterable[str]) -> bool:
    """Return True if `name` is one of the `modules`, or a parameter, buffer or layer inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _without_prefix(state: State, own: State, place: str) -> Fit:
    """Return the entries of `state` without wrappers' parts, minus the prefix that leaves most names of `own`."""
    wrappers = _WRAPPERS - {segment for name in own for segment in name.split(".")}
    clean = {".".join(part for part in name.split(".") if part not in wrappers): name for name in state}
    votes: collections.Counter[str] = collections.Counter()
    for name, original in clean.items():
        parts = name.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in own and own[rest].shape == state[original].shape:
                votes[".".join(parts[:start])] += 1
    prefix = max(votes, key=lambda prefix: (votes[prefix], _is_average(prefix), -len(prefix)), default="")
    before = f"{prefix}." if prefix else ""
    chosen = {name.removeprefix(before): state[old] for name, old in clean.items() if name.startswith(before)}
    return Fit(_with_versions(chosen, state, before), place, prefix, matched=votes[prefix])


def note_options(model: nn.Module, options: dict[str, Any]) -> None:
    """Store the keyword arguments of a model's constructor, to be read by `model.constructor_options`."""
    vars(model)["constructor_options"] = options


def set_versions(state: Any, versions: Any) -> None:
    """Set the layer versions of a state dict, an attribute that PyTorch's type stubs lack."""
    state._metadata = versions


def _with_versions(chosen: State, state: State, start: str) -> State:
    """Return `chosen` with the layer versions in `state`, which tell PyTorch how to read an old file."""
    versions = getattr(state, "_metadata", None)
    result = collections.OrderedDict(chosen)
    if versions:
        cleaned = {
            ".".join(part for part in name.split(".") if part not in _WRAPPERS): v for name, v in versions.items()
        }
        module = start.removesuffix(".")
        kept = {name: v for name, v in cleaned.items() if not module or name == module or name.startswith(start)}
        set_versions(result, {name.removeprefix(module).removeprefix("."): v for name, v in kept.items()})
    return result


def _by_order(state: State, own: State, head: tuple[str, ...]) -> State | None:
    """Return `state` under the names in `own` if both list layers of equal kinds and shapes in the same order.

    This finds the weights of the 2020 tutorial's networks (features.4.0.norm1.weight) and of EfficientNets' first
    implementation in PyTorch (_blocks.0._bn1.weight). The head may have another number of classes.
    """
    theirs = [(name, tensor) for name, tensor in state.items() if not _COUNTERS.search(name)]
    ours = [(name, tensor) for name, tensor in own.items() if not _COUNTERS.search(name)]
    if len(theirs) != len(ours):
        return None
    for (their_name, tensor), (our_name, wanted) in zip(theirs, ours, strict=True):
        if their_name.rpartition(".")[2] != our_name.rpartition(".")[2]:
            return None
        if tensor.shape != wanted.shape and not (belongs(our_name, head) and tensor.dim() == wanted.dim()):
            return None
    return collections.OrderedDict((ours[i][0], theirs[i][1]) for i in range(len(ours)))


# ------------------------------------------------------------------------------------------ loading
def load_weights(
    model: nn.Module,
    state: State,
    *,
    source: str,
    ignored: tuple[str, ...] = (),
    head: tuple[str, ...] = (),
    new_head: str = "",
    advice: Callable[[], str] = lambda: "",
) -> list[str]:
    """Load `state` into `model`; entries of the `head` that it lacks, or has for other classes, stay initialised.

    `new_head` is the reason to leave all of the head initialised although it would fit. Return notes on entries that
    were left. Raise UserError with the names of others that are missing, unknown, of another shape, or not finite.
    """
    own = model.state_dict()
    versions = getattr(state, "_metadata", None) or getattr(own, "_metadata", None)
    drawn = {name for name, _ in model.named_buffers()} - own.keys()  # computed by constructors, not saved
    state = {
        name: tensor
        for name, tensor in state.items()
        if not belongs(name, ignored) and name not in drawn and not _is_beside(name, own)
    }
    state, notes = _with_head(state, own, head, new_head)
    state, repeated = _with_three_channels(state, own)
    notes += repeated
    problems = _problems(state, own, head)
    if problems:
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        start = f"the weights in {printable(source)} do not fit this {type(model).__name__}:"
        raise UserError("\n".join(filter(None, [start, *problems[:10], *more, advice()])))
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"the weights in {printable(source)} are not finite ({name}): their training diverged.")
    own.update(state)
    set_versions(own, versions)
    model.load_state_dict(own)
    return notes


def _with_three_channels(state: State, own: State) -> tuple[State, list[str]]:
    """Return `state` with a first layer for grey images repeated over three channels, as in timm, and a note on it.

    A third of the weights for each channel gives the same output for a grey image.
    """
    for name, wanted in own.items():
        tensor = state.get(name)
        if tensor is not None and wanted.dim() == 4 and wanted.shape[1] == 3:
            if tensor.dim() != 4 or tensor.shape[1] != 1:
                return state, []
            note = f"{printable(name)} is for one channel: it is repeated over red, green and blue, divided by three"
            return _with_versions({**state, name: tensor.repeat(1, 3, 1, 1) / 3}, state, ""), [note]
    return state, []


def _is_beside(name: str, own: State) -> bool:
    """Return True if an entry is outside the network: an unknown counter, or a tensor of a loss or metric."""
    first = name.partition(".")[0]
    layers = {own_name.partition(".")[0] for own_name in own}
    return name not in own and (bool(_COUNTERS.search(name)) or first not in layers and bool(_BESIDE.match(first)))


def narrow_head(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Initialise new linear heads again, as PyTorch does, if their weights spread wider, before files fill them.

    EfficientNets, for example, initialise a head from ±1/sqrt(classes), which suits 1,000 classes. With 6 classes so
    much of it remains beside the values learned from pretrained features that accuracy suffers. nn.Linear uses
    ±1/sqrt(inputs).
    """
    for name in heads:
        head = model.get_submodule(name)
        if isinstance(head, nn.Linear) and head.weight.std() > head.in_features**-0.5:
            head.reset_parameters()


def for_classes(
    state: State, theirs: list[str] | None, ours: list[str] | None, head: tuple[str, ...]
) -> tuple[State, str, str]:
    """Return `state` with its head's rows in the order of `ours`, a note on the change, and why the head is unusable.

    `theirs` are the classes of the rows; nothing changes if they or `ours` are unknown, or differ in number.
    """
    if theirs is None or ours is None or theirs == ours or len(theirs) != len(ours):
        return state, "", ""
    if sorted(theirs) != sorted(ours):
        shown = ", ".join([*map(printable, theirs[:3]), *(["..."] if len(theirs) > 3 else [])])
        return state, "", f"its head is for other classes ({shown})"
    order = torch.tensor([theirs.index(name) for name in ours])
    moved = {
        name: tensor[order] if belongs(name, head) and tensor.dim() and len(tensor) == len(order) else tensor
        for name, tensor in state.items()
    }
    return _with_versions(moved, state, ""), "its head's rows are moved: the classes have another order", ""


def _with_head(state: State, own: State, head: tuple[str, ...], new_head: str) -> tuple[State, list[str]]:
    """Return `state` with entries of the head only if they fit, and notes on the others.

    A head inside a Sequential (fc.1.weight) is used for the model's own if its shape is the same.
    """
    theirs = {name: tensor for name, tensor in state.items() if belongs(name, head)}
    others = {name: tensor for name, tensor in state.items() if name not in theirs}
    if new_head:
        return others, [f"{new_head}: the model starts with a new head"]
    fitting = {name: tensor for name, tensor in theirs.items() if name in own and own[name].shape == tensor.shape}
    if len(head) == 1 and theirs and not fitting:
        for name in ("weight", "bias"):
            inner = [
                t for key, t in theirs.items() if key.endswith(f".{name}") and t.shape == own[f"{head[0]}.{name}"].shape
            ]
            if len(inner) == 1:
                fitting[f"{head[0]}.{name}"] = inner[0]
    wanted = {name for name in own if belongs(name, head)}
    if fitting.keys() >= wanted:
        return {**others, **fitting}, []
    if not head:
        return state, []
    classes = [len(tensor) for name, tensor in theirs.items() if name.endswith("weight") and tensor.dim() > 1]
    reason = f"their head is for {classes[-1]:,} classes" if classes else "they have no head"
    return others, [f"{reason}: the model starts with a new one"]


def _problems(state: State, own: State, head: tuple[str, ...]) -> list[str]:
    lines = [
        f"  {name}: shape {tuple(state[name].shape)}, needs {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    missing = sorted(name for name in own.keys() - state.keys() if not _COUNTERS.search(name))
    lines += [f"  {name}: missing" for name in missing if not belongs(name, head)]
    return lines + [f"  {printable(name)}: unknown" for name in sorted(state.keys() - own.keys())]
