"""Do the steps of a training, in the order of main.train: announce, open, begin, report, finish, show.

Each is short and takes the objects that the steps before it made. Knows nothing of how a training computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from assemble import Setup, evaluation_batches, trained_model
from commands.evaluate import predictions, test_result
from commands.explain import explain_mistakes
from commands.export import require_safetensors, write_safetensors
from evaluate import evaluate
from images.subsets import DataSet
from model import constructor_options
from precision import Precision
from reports import tables
from reports.results import EXPLANATIONS, busy_share, training_rate, training_seconds
from runs import resume
from runs.checkpoint import load_checkpoint
from runs.config import record
from runs.folder import RunDirectory
from runs.layer_watch import LayerWatch
from runs.logs import Logs, refuse_missing_packages
from runs.writing import PROBABILITIES
from system import parent
from system.files import read_json
from system.terminal import duration, linked
from train import Trainer
from utils import RunError, Stopped, amount, importing, log, printable, typed, with_type


def announce(setup: Setup, *, model: str, logs: list[str], safetensors: bool) -> None:
    """Log the model, the device and the precision, with the reason for that precision.

    Raise UserError if one of `logs` or `safetensors` needs a package that is missing.
    """
    refuse_missing_packages(logs)
    if safetensors:
        require_safetensors()
    precision = setup.precision
    log.info(f"{model} on {setup.device}: {precision.label} ({precision.reason})")
    if precision.name == "amp-fp16" and setup.device.type == "cpu":
        log.warning("on CPUs float16 is many times slower than FP32: fit for tiny tests only")


@contextlib.contextmanager
def opened(
    run: RunDirectory, precision: Precision, explain: Callable[[BaseException], tuple[int, str]]
) -> Iterator[None]:
    """Lock the run's folder; record a failure that belongs to the run in it.

    `explain` gives an error's exit status and its reason in words.
    """
    run.open()
    try:
        yield
    except Exception as error:
        status, reason = explain(error)
        earlier = any(run.file(name).exists() for name in ("last.pt", "result.json"))
        if reason and not isinstance(error, NotDrawn) and (status == 1 or (status == 2 and not earlier)):
            with contextlib.suppress(RunError):  # the disk may be the failure
                failure = {"precision": precision.name, "reason": reason.splitlines()[0]}
                run.write_json("failure.json", failure | getattr(error, "record", {}))
        raise
    finally:
        run.close()


def begin_or_resume(setup: Setup, trainer: Trainer, data: DataSet, earlier: resume.Earlier) -> None:
    """Go on from last.pt, or begin a new run that replaces an earlier one in the folder."""
    run = trainer.run
    settled = {
        "batch_size": trainer.batches.batch_size,
        "accumulate": trainer.batches.accumulate,
        "checkpoint_name": run.path.relative_to(setup.asked.place.checkpoint_dir).as_posix(),
    }
    config = record(setup, data, model_options=constructor_options(trainer.network.model), settled=settled)
    if earlier.resuming:
        begun_in = earlier.config.get("precision")
        resume.restore(trainer, data, model_name=config["options"]["model"], was=earlier.config["dataset"])
        if setup.precision.name != begun_in:  # only after its validation overflowed
            run.write_json("config.json", config | {"begun_in": begun_in})
    else:  # only now: a mistake in the options must not cost an earlier run
        resume.remove_results(run)
        run.write_json("config.json", config)
        run.write_csv("split.csv", data.split())
        show_first_batch(trainer, data)
    if earlier.config:
        resume.say_differences(earlier.config, config)
    log.info(
        f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images in "
        f"{len(data.classes)} classes; {amount(trainer.batches.updates_per_epoch, 'update', 'updates')} an epoch; "
        f"run: {run.path}"
    )


def show_first_batch(trainer: Trainer, data: DataSet) -> None:
    """Draw batch.png, the first images that the network gets: look here first if accuracy disappoints."""
    if not trainer.run.writes:
        return
    images, labels = trainer.batches.first_images(24)
    try:
        with importing():
            from reports.pictures import batch

        batch(images, labels.numpy(), data.classes, trainer.run.file("batch.png"))
    except Exception as error:  # as in `show`; a training does not depend on a picture
        log.warning(f"no batch.png: {with_type(error)}")


def watch_layers(trainer: Trainer, *, every: int | None) -> None:
    """Let the first rank write layers.jsonl every so many updates; None: never."""
    if every is not None and trainer.run.writes:
        file = trainer.run.file("layers.jsonl")
        trainer.around_update = LayerWatch(trainer.network.model, trainer.scaler, file, every)


@contextlib.contextmanager
def opened_logs(names: list[str], trainer: Trainer, options: dict[str, Any]) -> Iterator[Logs]:
    """Open the logs `names` on the first rank, and close them with the ending of the training."""
    run = trainer.run
    history = trainer.progress.history
    logs = Logs(names if run.writes else [], run.path, options=options, history=history, warn=log.warning)
    ending = "failed"
    try:
        yield logs
        ending = "finished"
    except NotDrawn:
        ending = "finished"
        raise
    except (Stopped, KeyboardInterrupt):
        ending = "stopped"
        raise
    finally:
        logs.close(ending)


def report_epoch(trainer: Trainer, logs: Logs, line: dict[str, Any]) -> None:
    """Print and log the figures of an epoch, and print the remaining time."""
    scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
    loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
    says_left = line["epoch"] < trainer.plan.epochs and not parent.estimates()
    left = f"  {duration(trainer.seconds_left())} left" if says_left else ""
    log.info(
        f"epoch {line['epoch']:>3}/{trainer.plan.epochs}  train {loss} {line['train_acc']:5.1f}%  "
        f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} images/s{scale}{left}"
    )
    logs.epoch(line)


def finish(setup: Setup, trainer: Trainer, data: DataSet, *, safetensors: bool) -> None:
    """Test the best epoch once, write the predictions and the result, and print the summary."""
    run = trainer.run
    at = trainer.progress
    best = setup.ranks.share(lambda: load_checkpoint(run.file("best_model.pt")))
    model = trained_model(setup, best)
    torch.backends.cudnn.benchmark = (
        False  # otherwise cudnn would tune kernels for the smaller last batch, inside the measured time
    )
    batches = evaluation_batches(setup, data, data.test, trainer.validation.batch_size)
    keep_logits = len(data.classes) <= PROBABILITIES
    found = evaluate(model, batches, setup.precision, keep_logits=keep_logits, description="testing")
    found.require_finite(setup.precision, "go on with --resume")
    if not run.writes:
        return
    result = {
        **test_result(setup, data, found, best.get("temperature")),
        "best_epoch": at.best_epoch,
        "best_val_acc": at.best_val_acc,
        "total_seconds": round(at.elapsed, 3),  # to the end of the last epoch, without the test
        "train_seconds": round(training_seconds(at.history), 3),
        "images_per_second": training_rate(at.history, len(data.train)),
        "busy_share": busy_share(at.history),
        "skipped_updates": sum(line["skipped_updates"] for line in at.history),
    }
    result["training_memory_mb"] = at.training_memory_mb
    result["peak_memory_mb"] = max(result["peak_memory_mb"], at.peak_memory_mb)
    run.write_csv("predictions.csv", predictions(data, found))
    run.write_json("result.json", result)
    run.file("failure.json").unlink(missing_ok=True)
    if safetensors:
        write_safetensors(best, run.file("best_model.safetensors"))
    run.write_json(EXPLANATIONS, explain_mistakes(model, data, batches, found))
    if not parent.draws():
        print(tables.summary(result))
    log.info(f"results: {linked(str(run.path), run.file('report.html'))}")


class NotDrawn(RunError):
    """The run is finished and its results are written, but its pictures are not."""


def show(run: RunDirectory, logs: Logs) -> None:
    """Draw the pictures and the page. This comes last, so that the results are on disk if it fails."""
    if not run.writes:
        return
    try:
        from reports.draw import draw_run

        draw_run(run.path)
    except Exception as error:  # matplotlib, its fonts and its caches raise nearly every type
        where = ("--checkpoint_dir", run.path.parent, "--checkpoint_name", run.path.name)
        raise NotDrawn(
            f"the results are in {printable(run.path)}, but the pictures could not be drawn ({with_type(error)}).\n"
            f"Once that is fixed: {typed('python', 'main.py', 'report', *where)}"
        ) from None
    finally:
        pictures = (run.file(name) for name in ("learning_curve.png", "confusion_matrix.png", "mistakes.png"))
        logs.result(read_json(run.file("result.json")), pictures)
