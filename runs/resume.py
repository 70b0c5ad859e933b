"""Decide if a run may continue, which options may differ, and restore its state."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.kinds import PRECISION, images_asked
from option import MAY_DIFFER_ON_RESUME, named
from runs.checkpoint import load_checkpoint
from runs.config import read_config
from runs.folder import RunDirectory
from system.files import read_json, reading
from utils import UserError, amount, is_out_of_memory, log, printable, typed

if TYPE_CHECKING:
    from images.subsets import DataSet
    from train import Trainer

OVERFLOW = "validation overflowed"  # in failure.json
_PRECISION = named(PRECISION)

WRITTEN = (  # written by a run; the files that make it look finished come first
    "result.json",
    "failure.json",
    "last.pt",
    "best_model.pt",
    "best_model.safetensors",
    "model.onnx",
    "metrics.jsonl",
    "metrics.csv",
    "layers.jsonl",
    "predictions.csv",
    "split.csv",
    "learning_curve.png",
    "confusion_matrix.png",
    "curves.png",
    "mistakes.png",
    "reliability.png",
    "report.html",
    "parity.json",
    "batch.png",
    "explanations.json",
)


@dataclass(frozen=True)
class Earlier:
    """The state a run starts from: `resuming` is True if it continues from last.pt; `config` is its first config.json.

    For a new run `config` is that of --config; empty if there is none.
    """

    resuming: bool
    config: dict[str, Any]


def find_earlier(
    run: RunDirectory, options: dict[str, Any], *, resume: str | None, overwrite: bool, config: str | None
) -> Earlier:
    """Return the state that this run starts from.

    Raise UserError if there is nothing to resume, if the options do not belong to the run, or if a new run would
    replace another.
    """
    last = run.file("last.pt")
    if resume == "yes" and not last.exists():
        raise UserError(f"{printable(last)} does not exist: nothing to resume. Start without --resume.")
    if resume and last.exists():
        file = run.file("config.json")
        stored = read_config(file)
        with reading(file):
            if not isinstance(stored["model_options"], dict):
                raise TypeError("a table was expected")
        _refuse_longer(run, stored["options"], options)
        _refuse_changed(stored["options"], options, may_differ=_PRECISION if overflowed(run) else frozenset())
        return Earlier(True, stored)
    if not overwrite and not (resume and not run.file("result.json").exists()):
        _refuse_existing(run)  # --resume auto may find a run that ended before its first last.pt: start anew
    return Earlier(False, read_config(Path(config)) if config else {})


def _refuse_existing(run: RunDirectory) -> None:
    """Raise UserError if the folder already holds a run."""
    present = [name for name in ("result.json", "last.pt", "best_model.pt") if run.file(name).exists()]
    if present:
        kind = "finished" if "result.json" in present else "begun"
        way = "go on with --resume, " if kind == "begun" and "last.pt" in present else ""
        raise UserError(
            f"{printable(run.path)} holds a {kind} run.\n"
            f"Choose another --checkpoint_name, {way}or replace it with --overwrite."
        )


def overflowed(run: RunDirectory) -> bool:
    """Return True if the run ended with a validation that overflowed: it may continue in another precision."""
    file = run.file("failure.json")
    return file.exists() and read_json(file).get("kind") == OVERFLOW


def _refuse_longer(run: RunDirectory, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError, with the command that continues from its weights, if a finished run should train longer."""
    epochs = current.get("epochs")
    if not run.file("result.json").exists() or not epochs or epochs <= stored.get("epochs", epochs):
        return
    name = f"{run.path.name}_longer"
    words = ["python", "main.py", "--config", run.file("config.json"), "--checkpoint_dir", current["checkpoint_dir"]]
    words += ["--checkpoint_name", name, "--pretrained_path", run.file("best_model.pt")]
    words += ["--epochs", epochs - stored["epochs"]]
    raise UserError(
        f"{printable(run.path)} is finished: its learning rate schedule ended with epoch {stored['epochs']}, so more "
        "epochs would be another run.\nGo on from its best weights, with a schedule of its own:\n  " + typed(*words)
    )


def _refuse_changed(stored: dict[str, Any], current: dict[str, Any], *, may_differ: frozenset[str]) -> None:
    """Raise UserError naming every changed option that a resumed run must keep."""
    if isinstance(current.get("batch_size"), str):  # auto: use the batch size that this run chose when it began
        current = current | {"batch_size": images_asked(current["batch_size"]), "accumulate": stored.get("accumulate")}
    changed = [
        f"  --{name}: begun with {stored[name]}, now {current[name]}"
        for name in sorted(stored.keys() & current.keys() - MAY_DIFFER_ON_RESUME - may_differ)
        if stored[name] != current[name]
    ]
    if changed:
        advice = "Give the options it was begun with (--config its config.json), or start another --checkpoint_name."
        raise UserError("\n".join(["--resume would change the run:", *changed, advice]))


def remove_results(run: RunDirectory) -> None:
    """Remove the files that an earlier run of this name wrote."""
    if run.writes:
        for name in WRITTEN:
            run.file(name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb"):  # otherwise the events of two runs would be drawn as one
            shutil.rmtree(run.file(name), ignore_errors=True)


def restore(trainer: Trainer, data: DataSet, *, model_name: str, was: dict[str, Any]) -> None:
    """Load last.pt into a trainer; raise UserError if the images differ from those in `was`, the recorded data set."""
    run = trainer.run
    file = run.file("last.pt")
    state = trainer.batches.ranks.share(lambda: load_checkpoint(file))
    if state.get("fingerprint") != data.fingerprint:
        raise UserError(
            f"the images in {data.root} are not those this run began with: names, content or labels differ "
            f"({was.get('train')} + {was.get('val')} + {was.get('test')} images then, {len(data.train)} + "
            f"{len(data.validation)} + {len(data.test)} now). Restore them, or start another --checkpoint_name."
        )
    now = trainer.recipe.precision.name  # --amp_dtype auto may choose another one on another device
    changed = state.get("precision") != now
    if changed and not trainer.batches.ranks.share(lambda: overflowed(run)):
        raise UserError(
            f"--resume would change the precision: begun in {printable(state.get('precision'))}, now "
            f"{now}. Choose with --amp_dtype and --device, or start another run."
        )
    try:
        if (state["classes"], state["model_name"]) != (data.classes, model_name):
            raise ValueError("other classes, or another model")
        trainer.load_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{printable(file)} does not fit this run, or is damaged ({reason}).") from None
    if run.writes and not changed:  # otherwise last.pt still names the other precision
        run.file("failure.json").unlink(missing_ok=True)
    epochs = amount(trainer.progress.epoch, "epoch", "epochs")
    if changed:
        log.warning(
            f"this run was begun in {printable(state['precision'])} and goes on in {now}, because "
            f"its validation overflowed after {epochs}: it is not a run of one precision"
        )
    log.info(f"resuming after {epochs} and {amount(trainer.progress.update, 'update', 'updates')}")


def say_differences(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Log each version, device setting and fingerprint that changed since the config.json `then` was written."""

    def environment(config: dict[str, Any]) -> dict[str, Any]:
        machine = {name: config.get(name) for name in ("device", "device_name", "threads", "ranks")}
        return {**config["versions"], **machine, "fingerprint of the images": config["dataset"].get("fingerprint")}

    was = environment(then)
    for name, value in environment(now).items():
        if was.get(name) not in (value, None):
            log.info(f"note: {name} is {value} now and was {printable(was[name])} when that run began")
