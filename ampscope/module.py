"""Inspect the step that a function of the user's file returns: `ampscope inspect FILE.py:make`."""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ampscope.by_layer import LayerErrors, error_picture, layer_errors
from ampscope.errors import InspectError
from ampscope.files import json_text, replacing
from ampscope.inspecting import inspect_step
from ampscope.observed import observed
from ampscope.places import count_as_users
from ampscope.report import Report
from ampscope.text import paragraph, printable

FORMS = (
    "make() returns (model, batch, loss) with loss(outputs, batch), or (model, batch, step) with step(model, batch), "
    "or a dictionary with model or models, batch, loss or step, optimizer or optimizers, and scaler"
)
ALIASES = {"models": "model", "optimizer": "optimizers"}
KEYS = ("model", "batch", "loss", "step", "optimizers", "scaler")


def inspect_module(
    target: str,
    *,
    device: torch.device | None = None,
    precisions: list[str] | None = None,
    diary: str | Path | None = None,
) -> Report:
    """Return the report on what `make` in FILE.py returns.

    Args:
        target: "FILE.py:make"; without ":make" the function is called make. Its folder is searched first for imports.
        device: where models and batch are moved; None leaves them where make() put them.
        precisions: names such as fp32 and amp-bf16; None for those that make sense on the device.
        diary: a file that `watch` wrote.

    Raises:
        InspectError: if the file, the function or what it returns cannot be used.
    """
    metrics = read_diary(Path(diary)) if diary is not None else None
    with made(target, device) as parts:
        return inspect_step(**parts, precisions=precisions, metrics=metrics)


@contextmanager
def made(target: str, device: torch.device | None) -> Iterator[dict[str, Any]]:
    """Yield the result of `make` in FILE.py as keyword arguments; meanwhile the file's folder is first in sys.path."""
    file, name = split_target(target)
    sys.path.insert(0, str(file.parent))
    try:
        with observed():
            parts = arguments_of(call_make(load(file), name, file))
        if device is not None:
            move(parts, device)
        yield parts
    finally:
        if str(file.parent) in sys.path:
            sys.path.remove(str(file.parent))


def read_diary(file: Path) -> list[dict[str, Any]]:
    """Return the updates of a diary that `watch` wrote, or the epochs of a run's metrics.jsonl."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InspectError(f"{printable(file)} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InspectError(f"{printable(file)} is damaged ({error}).") from None
    if not all(isinstance(line, dict) for line in lines):
        raise InspectError(f"{printable(file)} is damaged (a line is not an object).")
    return lines


def show(report: Report, *, out: str | Path, full: bool = False) -> None:
    """Print the report, and write its pictures, inspect.json and inspect.html into `out`."""
    report.write(out)
    print(report.text(full=full))
    print("\n".join(["", *paragraph(f"Pictures, inspect.json and inspect.html are in {out}.")]))


def layers_of_module(
    target: str, *, device: torch.device | None = None, precisions: list[str] | None = None, find: bool = False
) -> LayerErrors:
    """Return the error of each layer of what `make` in FILE.py returns; arguments and errors as in inspect_module."""
    with made(target, device) as parts:
        return layer_errors(**parts, precisions=precisions, find=find)


def show_layers(found: LayerErrors, out: str | Path) -> None:
    """Print the error of each layer of a step, and write layers.json and layers.png into `out`."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "layers.json") as file:
            file.write(f"{json_text(found.content, indent=1)}\n".encode())
        error_picture(found, folder / "layers.png")
    except OSError as error:
        raise InspectError(f"cannot write into {folder} ({error.strerror}). Name another folder.") from None
    print(found.text())
    print(f"\nlayers.json and layers.png are in {out}.")


def broken_rules(report: Report) -> str:
    """Return a sentence that names the broken rules."""
    rules = [f"{finding.rule}{f' ({finding.place})' if finding.place else ''}" for finding in report.findings]
    return f"{len(rules)} {'rule is' if len(rules) == 1 else 'rules are'} broken: {', '.join(rules)}."


def split_target(target: str) -> tuple[Path, str]:
    """Return the file and the function's name in "FILE.py:make"."""
    path, colon, name = target.rpartition(":")
    if not colon or not path.endswith(".py"):
        path, name = target, "make"
    file = Path(path).expanduser()
    if not name.isidentifier():
        raise InspectError(f"{printable(target)}: write FILE.py:FUNCTION.")
    if not file.is_file():
        raise InspectError(f"{printable(path)}: there is no such file. Write FILE.py:FUNCTION.")
    return file.resolve(), name


def load(file: Path) -> ModuleType:
    """Return the user's file as a module. Raise InspectError with the line that fails in importing it."""
    spec = importlib.util.spec_from_file_location(f"inspected_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InspectError(f"{printable(file)}: it is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InspectError(f"{printable(file)} cannot be imported: {_reason(error, file)}") from error
    return module


def call_make(module: ModuleType, name: str, file: Path) -> Any:
    """Return the result of the function."""
    make = getattr(module, name, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        raise InspectError(f"{printable(file)} has no function {name}; it has {', '.join(known) or 'none'}.")
    count_as_users(make)
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise InspectError(f"{name}() fails: {_reason(error, file)}") from error


def _reason(error: BaseException, file: Path) -> str:
    """Describe an error with the innermost line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" ({file.name}:{lines[-1]})" if lines else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{where}."


def arguments_of(made: Any) -> dict[str, Any]:
    """Return the result of make() as keyword arguments of inspect_step."""
    if isinstance(made, Mapping):
        parts = {ALIASES.get(str(name), str(name)): value for name, value in made.items()}
        unknown = [name for name in parts if name not in KEYS]
        if unknown:
            raise InspectError(f"make() returned a dictionary with {', '.join(unknown)}: {FORMS}.")
    elif isinstance(made, (tuple, list)) and 2 <= len(made) <= 5:
        parts = dict(zip(("model", "batch", "loss", "optimizers", "scaler"), made, strict=False))
    else:
        raise InspectError(f"make() returned a {type(made).__name__}: {FORMS}.")
    missing = [name for name in ("model", "batch") if name not in parts]
    if missing:
        raise InspectError(f"what make() returned has no {' and no '.join(missing)}: {FORMS}.")
    return parts


def move(parts: dict[str, Any], device: torch.device) -> None:
    """Move models in place, and the batch's tensors, to a device."""
    models = parts["model"]
    for model in models.values() if isinstance(models, Mapping) else [models]:
        if isinstance(model, nn.Module):
            model.to(device)
    parts["batch"] = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, parts["batch"])
