"""The command line: parse, dispatch, train, say in words what went wrong, close.

Below this file and assemble.py every function takes plain keywords. torch is imported by the command that needs
it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import option
import utils
from distributed import Ranks
from runs.logs import Logs, refuse_missing_packages
from system import meeting
from system.files import read_json
from system.machine import allow_more_files
from system.parent import end_with_parent
from system.terminal import duration, open_streams
from utils import RunError, Stopped, UserError, log, printable

if TYPE_CHECKING:
    from assemble import Setup
    from images.opening import DataSet
    from runs.folder import RunDirectory
    from train import Trainer


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status.

    0 done, 1 failed, 2 wrong input, 124 out of --max_time, 128 + n stopped by signal n (130 by Ctrl-C).
    """
    ranks = Ranks()
    options = Namespace(command="")
    try:
        ranks = Ranks.from_environment()
        options = option.parse(argv, fit_demo=demo_that_fits)
        if ranks.size > 1 and options.command not in ("train", "evaluate"):
            raise UserError(f"run {options.command} without torchrun: it uses one process.")
        utils.start_logging(quiet=getattr(options, "quiet", False))
        utils.keep_freed_memory()
        allow_more_files()
        utils.on_stop(_terminate)
        if ranks.size > 1:
            meeting.watch_signals(utils.STOP_SIGNALS, utils.heard)
        meeting.join(ranks)
        call(entry(options.command), options, ranks)
        return 0
    except (Exception, KeyboardInterrupt, Stopped) as error:
        status, reason = explain(error, options)
        if not reason:
            raise
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun sends one to all when the first has failed
        meeting.say_once(reason if isinstance(error, Stopped) else f"error: {reason}", ranks)
        return status
    finally:
        meeting.leave(ranks)


def run() -> None:
    """The console command `amp-train`."""
    end_with_parent()
    lost = open_streams()
    os.environ["MPLBACKEND"] = "agg"  # notebooks hand their own to every child
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name) == "":  # of which the libraries would complain
            del os.environ[name]
    if any(action.startswith("error") for action in sys.warnoptions):
        warnings.resetwarnings()  # what a library warns of is no error of the user's
        warnings.simplefilter("ignore")
    status = main(sys.argv[1:])
    error = lost()
    if error is not None:
        print(f"error: the output is not complete: {error.strerror}.", file=sys.stderr)
    if hasattr(signal, "SIGCHLD"):  # PyTorch would raise for each loading worker that ends from here on
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():  # they leave SIGTERM to this process: Python would wait for ever
        worker.kill()
    sys.exit(status or (1 if error else 0))


def entry(command: str) -> Callable[..., None]:
    """The function that does a command; its keyword-only parameters are names of options."""
    if command == "train":
        return train
    if command == "evaluate":
        from commands.evaluate import evaluate_run

        return evaluate_run
    if command == "predict":
        from commands.predict import predict

        return predict
    if command == "compare":
        from commands.compare import compare

        return compare
    if command == "audit":
        from commands.audit import audit

        return audit
    if command == "report":
        from commands.report import report

        return report
    if command == "doctor":
        from commands.doctor import doctor

        return doctor
    if command == "inspect":
        from commands.inspect import inspect

        return inspect
    if command == "prepare":
        from commands.prepare import prepare

        return prepare
    from commands.export import export

    return export


def call(function: Callable[..., None], options: Namespace, ranks: Ranks) -> None:
    """Calls a command with the options that it names, and with the Setup if it asks for one."""
    names = inspect.signature(function).parameters
    values: dict[str, Any] = {name: getattr(options, name) for name in names if name != "setup"}
    if "setup" in names:
        from assemble import Setup

        values["setup"] = Setup(options, ranks)
    function(**values)


def train(setup: Setup) -> None:
    """Trains, tests the best epoch once, and writes the run's results."""
    options = setup.options
    announce(setup)
    if options.verify_resume:
        prove_resume(setup)
        return
    with opened(setup) as run:
        earlier = find_earlier(setup)
        data = setup.data(resuming=earlier.resuming)
        trainer = setup.trainer(data, run, resumed=earlier.config if earlier.resuming else None)
        begin_or_resume(setup, trainer, data, earlier)
        with opened_logs(setup, trainer) as logs:
            trainer.on_epoch = partial(report_epoch, trainer, logs)
            trainer.train()
            finish(setup, trainer, data)
            show(run, logs)


def demo_that_fits(device: str) -> dict[str, Any]:
    """What --demo changes on the device of that name: nothing on a CPU."""
    from assemble import demo_size

    size = demo_size(device)
    return size.options() if size else {}


def announce(setup: Setup) -> None:
    """Says what will be trained, where and in which precision, and why in that one."""
    refuse_missing_packages(_log_names(setup))
    if setup.options.safetensors:
        from commands.export import require_safetensors

        require_safetensors()
    precision = setup.precision
    if setup.demo:
        log.info(setup.demo.why)
    log.info(f"{setup.options.model} on {setup.device}: {precision.label} ({precision.reason})")
    if precision.name == "amp-fp16" and setup.device.type == "cpu":
        log.warning("on CPUs float16 is many times slower than FP32: fit for tiny tests only")


def prove_resume(setup: Setup) -> None:
    """`--verify_resume`: trains a little, stops in mid-epoch, resumes, and compares with what was not stopped."""
    from commands.verify_resume import verify

    options = setup.options
    verify(setup, checkpoint_dir=options.checkpoint_dir, batch_size=setup.update_shape[0], epochs=options.epochs)


@contextlib.contextmanager
def opened(setup: Setup) -> Iterator[RunDirectory]:
    """The run's folder, locked; a failure that belongs to the run is recorded in it."""
    run = setup.run
    run.open()
    try:
        yield run
    except Exception as error:
        status, reason = explain(error, setup.options)
        earlier = any(run.file(name).exists() for name in ("last.pt", "result.json"))
        if reason and not isinstance(error, NotDrawn) and (status == 1 or (status == 2 and not earlier)):
            with contextlib.suppress(RunError):  # the disk may be the failure
                failure = {"precision": setup.precision.name, "reason": reason.splitlines()[0]}
                run.write_json("failure.json", failure | getattr(error, "record", {}))
        raise
    finally:
        run.close()


def find_earlier(setup: Setup) -> Any:
    """What an earlier process left in the run's folder, the same on all ranks."""
    from runs import resume

    options = setup.options
    return setup.ranks.share(  # other machines may not see the folder
        lambda: resume.find_earlier(
            setup.run, vars(options), resume=options.resume, overwrite=options.overwrite, config=options.config
        )
    )


def begin_or_resume(setup: Setup, trainer: Trainer, data: DataSet, earlier: Any) -> None:
    """Goes on from last.pt, or begins a new run in place of what the folder held."""
    from model import constructor_options
    from runs import resume

    config = setup.config(data, constructor_options(trainer.network.model))
    if earlier.resuming:
        begun_in = earlier.config.get("precision")
        resume.restore(trainer, data, model_name=setup.options.model, was=earlier.config["dataset"])
        if setup.precision.name != begun_in:  # only after its validation overflowed
            setup.run.write_json("config.json", config | {"begun_in": begun_in})
    else:  # only here is everything known to be right: a mistake must not cost an earlier run
        resume.remove_results(setup.run)
        setup.run.write_json("config.json", config)
        setup.run.write_csv("split.csv", data.split())
        show_first_batch(setup, trainer, data)
    if earlier.config:
        resume.say_differences(earlier.config, config)
    log.info(
        f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images in "
        f"{len(data.classes)} classes; {trainer.batches.updates_per_epoch} updates an epoch; run: {setup.run.path}"
    )


def show_first_batch(setup: Setup, trainer: Trainer, data: DataSet) -> None:
    """Draws batch.png: what the network is about to see, the first thing to look at when accuracy disappoints."""
    if setup.run.writes:
        from reports.pictures import batch

        images, labels = trainer.batches.first_images(24)
        batch(images, labels.numpy(), data.classes, setup.run.file("batch.png"))


@contextlib.contextmanager
def opened_logs(setup: Setup, trainer: Trainer) -> Iterator[Logs]:
    """The logs that --log names, which are told how the training ended."""
    names = _log_names(setup) if setup.run.writes else []
    logs = Logs(names, setup.run.path, options=vars(setup.options), history=trainer.progress.history, warn=log.warning)
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


def _log_names(setup: Setup) -> list[str]:
    options = setup.options
    return list(dict.fromkeys([*(options.log or []), *(["tensorboard"] if options.tensorboard else [])]))


def report_epoch(trainer: Trainer, logs: Logs, line: dict[str, Any]) -> None:
    """Tells the terminal and the logs how an epoch went, and how long the rest will take."""
    scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
    loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
    left = f"  {duration(trainer.seconds_left())} left" if line["epoch"] < trainer.epochs else ""
    log.info(
        f"epoch {line['epoch']:>3}/{trainer.epochs}  train {loss} {line['train_acc']:5.1f}%  "
        f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} images/s{scale}{left}"
    )
    logs.epochs(trainer.progress.history)


def finish(setup: Setup, trainer: Trainer, data: DataSet) -> None:
    """Tests the best epoch once; writes the predictions and the result; prints the summary."""
    import torch

    from commands.evaluate import test_result
    from commands.explain import explain_mistakes
    from evaluate import evaluate, probabilities
    from reports import tables
    from reports.results import EXPLANATIONS, steady_rate
    from runs.checkpoint import load_checkpoint

    run = setup.run
    at = trainer.progress
    model = setup.trained(setup.ranks.share(lambda: load_checkpoint(run.file("best_model.pt"))))
    torch.backends.cudnn.benchmark = False  # a search for the ragged batch would count in the run's memory and time
    batches = setup.batches(data, data.test)
    found = evaluate(model, batches, setup.precision, keep_logits=True, description="testing")
    if not run.writes:
        return
    result = {
        **test_result(setup, data, found),
        "best_epoch": at.best_epoch,
        "best_val_acc": at.best_val_acc,
        "total_seconds": round(trainer.seconds, 3),
        "train_seconds": round(sum(line["seconds"] for line in at.history), 3),
        "images_per_second": steady_rate(at.history),
        "skipped_updates": sum(line["skipped_updates"] for line in at.history),
    }
    result["peak_memory_mb"] = max(result["peak_memory_mb"], at.peak_memory_mb)
    run.write_predictions(data.names(data.test), data.test.labels, probabilities(found.logits), data.classes)
    run.write_json("result.json", result)
    run.file("failure.json").unlink(missing_ok=True)
    if setup.options.safetensors:
        from commands.export import write_safetensors

        write_safetensors(load_checkpoint(run.file("best_model.pt")), run.file("best_model.safetensors"))
    run.write_json(EXPLANATIONS, explain_mistakes(model, data, batches, probabilities(found.logits)))
    print(tables.summary(result))
    log.info(f"results: {run.path}")


class NotDrawn(RunError):
    """The run is finished and its results are written, but its pictures are not."""


def show(run: RunDirectory, logs: Logs) -> None:
    """Draws the pictures and the page, last of all: whatever goes wrong here, the results are on disk."""
    if not run.writes:
        return
    try:
        from reports.draw import draw_run

        draw_run(run.path)
    except Exception as error:  # matplotlib, its fonts and its caches raise nearly every type
        reason = printable(f"{type(error).__name__}: {error}")[:300]
        raise NotDrawn(
            f"the results are in {printable(run.path)}, but the pictures could not be drawn ({reason}).\nOnce that is "
            f"mended: python main.py report --checkpoint_dir {printable(run.path.parent)} "
            f"--checkpoint_name {printable(run.path.name)}"
        ) from None
    finally:
        pictures = (run.file(name) for name in ("learning_curve.png", "confusion_matrix.png", "mistakes.png"))
        logs.result(read_json(run.file("result.json")), pictures)


def explain(error: BaseException, options: Namespace) -> tuple[int, str]:
    """Exit status and reason of a failure; no reason where only a defect of this program can be one."""
    text = str(error)
    if isinstance(error, Stopped):
        return error.exit_status, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; what was saved before can go on with --resume"
    if isinstance(error, (UserError, RunError)):
        return 2 if isinstance(error, UserError) else 1, text
    if "DataLoader worker" in text or isinstance(error, ConnectionResetError):
        return 1, (
            f"a data loading worker died: {text.splitlines()[0]}\nUsually the machine ran out of memory: "
            "use fewer --num_workers, then go on with --resume."
        )
    if isinstance(error, OSError):
        return 1, f"{printable(error.filename)}: {error.strerror}" if error.filename else error.strerror or text
    if isinstance(error, MemoryError) or utils.is_out_of_memory(error):
        return 1, _memory_advice(options)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"--compile does not work here: {' '.join(text.split())[:200]}\nLeave it out."
    return 1, _of_other_processes(error)


def _of_other_processes(error: BaseException) -> str:
    """What an error says of the other processes of a job; nothing if there are none, or if it says nothing of them."""
    return (meeting.in_words(error) or "") if (os.environ.get("WORLD_SIZE") or "1") != "1" else ""


def _memory_advice(options: Namespace) -> str:
    batch = getattr(options, "batch_size", 1)
    accumulate = getattr(options, "accumulate", 1)
    if options.command not in ("train", "compare"):
        return f"out of memory at --batch_size {batch}: use a smaller one."
    if isinstance(batch, str):
        return f"out of memory at --batch_size {batch}: memory was taken since. Try --resume auto."
    smaller = f"--accumulate {accumulate * 2} computes it in smaller micro-batches"
    way = smaller if batch >= 2 * accumulate else "use a smaller --image_size"
    return f"out of memory at --batch_size {batch} --accumulate {accumulate}: {way}; --amp needs less, too."


def _terminate(number: int, _frame: object) -> None:
    utils.heard.set()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    name = signal.Signals(number).name
    raise Stopped(number, f"stopped by {name}; what was saved before can go on with --resume")


if __name__ == "__main__":
    run()
