"""What AMP does to a model in one update: a trained run's, or any of the reader's with `--module FILE.py:make`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ampscope import inspect_step
from ampscope.places import count_as_users
from ampscope.report import Report
from reports.results import read_metrics
from reports.text import paragraph
from utils import RunError, UserError, choose_device, printable

if TYPE_CHECKING:
    from assemble import Setup

FORMS = (
    "make() returns (model, batch, loss) with loss(outputs, batch), or (model, batch, step) with step(model, batch), "
    "or a dictionary with model or models, batch, loss or step, optimizer or optimizers, and scaler"
)
ALIASES = {"models": "model", "optimizer": "optimizers"}
KEYS = ("model", "batch", "loss", "step", "optimizers", "scaler")
ROOT = Path(__file__).resolve().parent.parent


def inspect(
    setup: Setup,
    *,
    module: str | None,
    device: str,
    checkpoint_dir: str,
    checkpoint_name: str,
    checkpoint: str | None,
    precisions: list[str] | None,
    diary: str | None,
    out: str,
    full: bool,
    strict: bool,
) -> None:
    """The command: prints the report, and writes JSON, pictures and a page into `out`."""
    if module is not None:
        place = None if device == "auto" else choose_device(device)
        report = inspect_module(module, device=place, precisions=precisions, diary=diary)
    else:
        file = diary or (Path(checkpoint_dir) / checkpoint_name / "metrics.jsonl" if checkpoint_name else None)
        report = inspect_classifier(
            setup,
            trained=bool(checkpoint_name or checkpoint),
            precisions=precisions,
            metrics=read_metrics(Path(file)) if file else [],
        )
    show(report, out=out, full=full, strict=strict)


def inspect_classifier(
    setup: Setup, *, trained: bool, precisions: list[str] | None, metrics: list[dict[str, Any]]
) -> Report:
    """The report on a batch of the data set and the model of a run, or a new one."""
    stored = setup.checkpoint if trained else None
    data = setup.data(classes=stored["classes"] if stored else None)
    images, labels, *_ = next(next(setup.batches(data, data.train, train=True).epoch(0)))
    scales = [line["loss_scale"] for line in metrics if (line.get("loss_scale") or 1) != 1]
    return inspect_step(
        setup.trained(stored).train() if stored else setup.model(len(data.classes)),
        (images, labels),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        precisions=precisions,
        metrics=metrics,
        scaler_scale=scales[-1] if scales else None,
    )


def inspect_module(
    target: str,
    *,
    device: torch.device | None = None,
    precisions: list[str] | None = None,
    diary: str | Path | None = None,
) -> Report:
    """The report on what `make` in FILE.py returns; `target` is "FILE.py:make" (without ":make" it is called make).

    `device` moves models and batch there; None leaves them where make() put them. `diary` is a file that `watch`
    wrote. Raises UserError if the file, the function or what it returns is not usable.
    """
    metrics = read_metrics(Path(diary)) if diary is not None else None
    file, name = split_target(target)
    with users_modules(file.parent):
        made = call_make(load(file), name, file)
        parts = arguments_of(made)
        if device is not None:
            move(parts, device)
        return inspect_step(**parts, precisions=precisions, metrics=metrics)


def show(report: Report, *, out: str | Path, full: bool = False, strict: bool = False) -> None:
    """Prints the report and writes its files; with `strict` a broken rule is a RunError."""
    report.write(out)
    print(report.text(full=full))
    print("\n".join(["", *paragraph(f"Pictures, inspect.json and inspect.html are in {out}.")]))
    if strict and not report.ok:
        rules = [f"{finding.rule}{f' ({finding.place})' if finding.place else ''}" for finding in report.findings]
        word = "rule is" if len(rules) == 1 else "rules are"
        raise RunError(f"{len(rules)} {word} broken: {', '.join(rules)}.")


def split_target(target: str) -> tuple[Path, str]:
    """The file and the function's name in "FILE.py:make"."""
    path, colon, name = target.rpartition(":")
    if not colon or not path.endswith(".py"):
        path, name = target, "make"
    file = Path(path).expanduser()
    if not name.isidentifier():
        raise UserError(f"--module {printable(target)}: write FILE.py:FUNCTION.")
    if not file.is_file():
        raise UserError(f"--module {printable(path)}: there is no such file. Write FILE.py:FUNCTION.")
    return file.resolve(), name


def load(file: Path) -> ModuleType:
    """The user's file as a module. Raises UserError with the line at which importing it fails."""
    spec = importlib.util.spec_from_file_location(f"inspected_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--module {printable(file)}: it is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{printable(file)} cannot be imported: {_reason(error, file)}") from error
    return module


def call_make(module: ModuleType, name: str, file: Path) -> Any:
    """What the function returns."""
    make = getattr(module, name, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        raise UserError(f"{printable(file)} has no function {name}; it has {', '.join(known) or 'none'}.")
    count_as_users(make)
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise UserError(f"{name}() fails: {_reason(error, file)}") from error


def _reason(error: BaseException, file: Path) -> str:
    """An error in words, with the innermost line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" ({file.name}:{lines[-1]})" if lines else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{where}."


def arguments_of(made: Any) -> dict[str, Any]:
    """What make() returned as the arguments of inspect_step."""
    if isinstance(made, Mapping):
        parts = {ALIASES.get(str(name), str(name)): value for name, value in made.items()}
        unknown = [name for name in parts if name not in KEYS]
        if unknown:
            raise UserError(f"make() returned a dictionary with {', '.join(unknown)}: {FORMS}.")
    elif isinstance(made, (tuple, list)) and 2 <= len(made) <= 5:
        parts = dict(zip(("model", "batch", "loss", "optimizers", "scaler"), made, strict=False))
    else:
        raise UserError(f"make() returned a {type(made).__name__}: {FORMS}.")
    missing = [name for name in ("model", "batch") if name not in parts]
    if missing:
        raise UserError(f"what make() returned has no {' and no '.join(missing)}: {FORMS}.")
    return parts


def move(parts: dict[str, Any], device: torch.device) -> None:
    """Models in place, and the batch's tensors, to a device."""
    models = parts["model"]
    for model in models.values() if isinstance(models, Mapping) else [models]:
        if isinstance(model, nn.Module):
            model.to(device)
    parts["batch"] = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, parts["batch"])


@contextlib.contextmanager
def users_modules(folder: Path) -> Iterator[None]:
    """Imports inside the block find the user's files first, also those that are called as this project's are."""
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
    hidden = {
        name: module
        for name, module in [*sys.modules.items()]
        if name.partition(".")[0] in names and _is_ours(module) and folder != ROOT
    }
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
        sys.modules.update(hidden)


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(ROOT)
