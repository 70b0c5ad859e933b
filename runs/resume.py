"""Whether a run may go on: what is there, which options may differ, and the way back to where it stood."""

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

WRITTEN = (  # by a run, the files first that make it look finished
    "result.json",
    "failure.json",
    "logs.json",
    "last.pt",
    "best_model.pt",
    "best_model.safetensors",
    "model.onnx",
    "metrics.jsonl",
    "metrics.csv",
    "predictions.csv",
    "split.csv",
    "learning_curve.png",
    "confusion_matrix.png",
    "mistakes.png",
    "reliability.png",
    "report.html",
    "parity.json",
    "batch.png",
    "explanations.json",
)


@dataclass(frozen=True)
class Earlier:
    """What a run begins from: whether it goes on from last.pt, and the config.json it was begun with.

    For a new run `config` is that of --config; empty if there is none.
    """

    resuming: bool
    config: dict[str, Any]


def find_earlier(
    run: RunDirectory, options: dict[str, Any], *, resume: str | None, overwrite: bool, config: str | None
) -> Earlier:
    """What is there to begin from.

    Raises UserError if there is nothing to resume, if the options would make it another run, and if a new
    run would replace one.
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
        _refuse_existing(run)  # --resume auto may meet a run that ended before its first last.pt: it begins anew
    return Earlier(False, read_config(Path(config)) if config else {})


def _refuse_existing(run: RunDirectory) -> None:
    """Raises UserError if the folder holds a run already."""
    present = [name for name in ("result.json", "last.pt", "best_model.pt") if run.file(name).exists()]
    if present:
        kind = "finished" if "result.json" in present else "begun"
        way = "go on with --resume, " if kind == "begun" and "last.pt" in present else ""
        raise UserError(
            f"{printable(run.path)} holds a {kind} run.\n"
            f"Choose another --checkpoint_name, {way}or replace it with --overwrite."
        )


def overflowed(run: RunDirectory) -> bool:
    """Whether the run ended with a validation that its precision could not compute: it may go on in another one."""
    file = run.file("failure.json")
    return file.exists() and read_json(file).get("kind") == OVERFLOW


def _refuse_longer(run: RunDirectory, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError, with the command that goes on from its weights, where a finished run is to be longer."""
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
    """Raises UserError naming every difference in options that would make another run of a resumed one."""
    if isinstance(current.get("batch_size"), str):  # auto: as this run chose when it began
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
    """Removes what an earlier run of this name wrote."""
    if run.writes:
        for name in WRITTEN:
            run.file(name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb"):  # two runs' events would be drawn as one
            shutil.rmtree(run.file(name), ignore_errors=True)


def restore(trainer: Trainer, data: DataSet, *, model_name: str, was: dict[str, Any]) -> None:
    """Loads last.pt into a trainer; refuses images other than those that config.json says they `was`."""
    run = trainer.run
    file = run.file("last.pt")
    state = trainer.batches.ranks.share(lambda: load_checkpoint(file))
    if state.get("fingerprint") != data.fingerprint:
        raise UserError(
            f"the images in {data.root} are not those this run began with: names, content or labels differ "
            f"({was.get('train')} + {was.get('val')} + {was.get('test')} images then, {len(data.train)} + "
            f"{len(data.validation)} + {len(data.test)} now). Restore them, or start another --checkpoint_name."
        )
    changed = state.get("precision") != trainer.precision.name  # "auto" is another one on another device
    if changed and not trainer.batches.ranks.share(lambda: overflowed(run)):
        raise UserError(
            f"--resume would change the precision: begun in {printable(state.get('precision'))}, now "
            f"{trainer.precision.name}. Choose with --amp_dtype and --device, or start another run."
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
    if run.writes and not changed:  # else last.pt still says the other precision
        run.file("failure.json").unlink(missing_ok=True)
    epochs = amount(trainer.progress.epoch, "epoch", "epochs")
    if changed:
        log.warning(
            f"this run was begun in {printable(state['precision'])} and goes on in {trainer.precision.name}, because "
            f"its validation overflowed after {epochs}: it is not a run of one precision"
        )
    log.info(f"resuming after {epochs} and {amount(trainer.progress.update, 'update', 'updates')}")


def say_differences(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Notes what is not as it was when the config.json `then` was written."""

    def environment(config: dict[str, Any]) -> dict[str, Any]:
        machine = {name: config.get(name) for name in ("device", "device_name", "threads", "ranks")}
        return {**config["versions"], **machine, "fingerprint of the images": config["dataset"].get("fingerprint")}

    was = environment(then)
    for name, value in environment(now).items():
        if was.get(name) not in (value, None):
            log.info(f"note: {name} is {value} now and was {printable(was[name])} when that run began")
