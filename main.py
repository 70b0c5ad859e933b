"""The command line: parse, dispatch, train, say in words what went wrong, close.

Below this file and assemble.py every function takes plain keywords. torch is imported by the command that needs
it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import distributed
import option
import utils
from distributed import Ranks
from utils import RunError, Stopped, UserError, log, printable

if TYPE_CHECKING:
    from assemble import Setup
    from dataset import DataSet
    from runs.folder import RunDirectory
    from train import Trainer


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status (0 done, 1 failed, 2 wrong input, 130 and 143 stopped)."""
    ranks = Ranks.from_environment()
    options = Namespace(command="")
    try:
        options = option.parse(argv, fit_demo=demo_that_fits)
        if ranks.size > 1 and options.command not in ("train", "evaluate"):
            raise UserError(f"run {options.command} without torchrun: it uses one process.")
        utils.start_logging(quiet=getattr(options, "quiet", False))
        utils.keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
        distributed.join(ranks)
        call(entry(options.command), options, ranks)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status, reason = explain(error, options)
        if not reason:
            raise
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun sends one to all when the first has failed
        distributed.say_once(reason if isinstance(error, Stopped) else f"error: {reason}")
        return status
    finally:
        distributed.leave(ranks)


def run() -> None:
    """The console command `amp-train`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader of a pipe went away; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


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
        trainer = setup.trainer(data, run)
        begin_or_resume(setup, trainer, data, earlier)
        with epoch_log(trainer, tensorboard=options.tensorboard) as trainer.on_epoch:
            trainer.train()
            finish(setup, trainer, data)


def demo_that_fits(device: str) -> dict[str, Any]:
    """What --demo changes on the device of that name: nothing on a CPU."""
    from assemble import demo_size

    size = demo_size(device)
    return size.options() if size else {}


def announce(setup: Setup) -> None:
    """Says what will be trained, where and in which precision, and why in that one."""
    if setup.options.tensorboard:
        _summary_writer()  # a missing package is found before the training, not after it
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
        if reason and (status == 1 or (status == 2 and not earlier)):
            with contextlib.suppress(RunError):  # the disk may be the failure
                run.write_json("failure.json", {"precision": setup.precision.name, "reason": reason.splitlines()[0]})
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
    from runs import resume

    config = setup.config(data)
    if earlier.resuming:
        resume.restore(trainer, data, model_name=setup.options.model, was=earlier.config["dataset"])
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
def epoch_log(trainer: Trainer, *, tensorboard: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is called after each epoch: a line on the terminal and, where asked for, TensorBoard's scalars."""
    run = trainer.run
    events = _summary_writer()(run.file("tensorboard")) if tensorboard and run.writes else None

    def report(line: dict[str, Any]) -> None:
        scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
        loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
        log.info(
            f"epoch {line['epoch']:>3}/{trainer.epochs}  train {loss} {line['train_acc']:5.1f}%  "
            f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} images/s{scale}"
        )
        if events is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    events.add_scalar(name, value, line["epoch"])
            events.flush()

    yield report
    if events is not None:
        from images.decode import decode

        for file in (run.file("confusion_matrix.png"), run.file("mistakes.png")):
            if file.exists():
                events.add_image(file.stem, decode(file), dataformats="HWC")
        events.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def finish(setup: Setup, trainer: Trainer, data: DataSet) -> None:
    """Tests the best epoch once; writes the result, the predictions, the pictures and the page; prints the summary."""
    import torch

    from commands.evaluate import test_result
    from commands.explain import explain_mistakes
    from evaluate import evaluate, probabilities
    from reports import tables
    from reports.draw import draw_run
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
    run.write_json(EXPLANATIONS, explain_mistakes(model, data, batches, probabilities(found.logits)))
    draw_run(run.path)
    print(tables.summary(result))
    log.info(f"results: {run.path}")


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
    if Ranks.from_environment().size > 1 and distributed.is_lost_connection(error):
        return 1, distributed.LOST_RANK
    return 1, ""


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
    raise Stopped(number, "terminated; what was saved before can go on with --resume")


if __name__ == "__main__":
    run()
