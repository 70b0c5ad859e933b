"""The command line: parse, assemble, call one command, close, and say in words what went wrong.

Below this file and assemble.py every function takes plain keywords. torch is imported by the command that needs
it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import option
import utils
from distributed import Ranks
from utils import RunError, Stopped, UserError, printable


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status (0 done, 1 failed, 2 wrong input, 130 and 143 stopped)."""
    ranks = Ranks.from_environment()
    options = Namespace(command="")
    try:
        options = option.parse(argv)
        if ranks.size > 1 and options.command not in ("train", "evaluate"):
            raise UserError(f"{options.command} is one process's work: run it without torchrun.")
        utils.quiet = getattr(options, "quiet", False)
        utils.keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
        distributed.join(ranks)
        COMMANDS[options.command](options, ranks)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status, reason = explain(error, options)
        if reason is None:
            raise
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun sends one to all when the first has failed
        distributed.say_once(reason if isinstance(error, Stopped) else f"error: {reason}")
        return status
    finally:
        distributed.leave(ranks)


def run() -> None:
    """The console command `amp-train`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader of a pipe went away; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _terminate(number: int, _frame: object) -> None:
    raise Stopped(number, "terminated; what was saved before can go on with --resume")


def explain(error: BaseException, options: Namespace) -> tuple[int, str | None]:
    """Exit status and reason of a failure; no reason where only a defect of this program can be one."""
    text = str(error)
    if isinstance(error, Stopped):
        return error.exit_status, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; what was saved before can go on with --resume"
    if isinstance(error, (UserError, RunError)):
        return 2 if isinstance(error, UserError) else 1, text
    if isinstance(error, OSError):
        return 1, f"{printable(error.filename)}: {error.strerror}" if error.filename else error.strerror or text
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return 1, _memory_advice(options)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"--compile does not work here: {' '.join(text.split())[:200]}\nLeave it out."
    if "DataLoader worker" in text:
        return 1, (
            f"a data loading worker died: {text.splitlines()[0]}\nUsually the machine ran out of memory: "
            "use fewer --num_workers, then go on with --resume."
        )
    if Ranks.from_environment().size > 1 and distributed.is_lost_connection(error):
        return 1, distributed.LOST_RANK
    return 1, None


def _is_out_of_memory(error: BaseException) -> bool:
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU's, CUDA's, cuBLAS's and cuDNN's
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _memory_advice(options: Namespace) -> str:
    batch = getattr(options, "batch_size", 1)
    pieces = getattr(options, "accumulate", 1)
    if options.command not in ("train", "compare"):
        return f"out of memory at --batch_size {batch}: use a smaller one."
    smaller = f"--accumulate {pieces * 2} computes it in smaller pieces"
    way = smaller if batch >= 2 * pieces else "use a smaller --image_size"
    return f"out of memory at --batch_size {batch} --accumulate {pieces}: {way}; --amp needs less, too."


def log(text: str) -> None:
    """Prints to stdout, above any bar; with --quiet warnings alone, on all ranks but the first nothing."""
    from tqdm import tqdm

    if Ranks.from_environment().is_first and (not utils.quiet or text.startswith("warning")):
        tqdm.write(utils.wrapped(text, sys.stdout), file=sys.stdout)


def _setup(options: Namespace, ranks: Ranks) -> Any:
    from assemble import Setup

    return Setup(options, ranks, log)


def train(options: Namespace, ranks: Ranks) -> None:
    """Trains, tests the best epoch once, and writes the run's results."""
    from runs.resume import remove_results

    setup = _setup(options, ranks)
    run = setup.run
    precision = setup.precision
    writer = _tensorboard() if options.tensorboard else None
    log(f"{options.model} on {setup.device}: {precision.label} ({precision.reason})")
    if precision.name == "amp-fp16" and setup.device.type == "cpu":
        log("warning: on CPUs float16 is many times slower than FP32: fit for tiny tests only")
    if options.verify_resume:
        _verify_resume(setup)
        return
    run.open()
    try:
        resuming, then = ranks.share(lambda: _earlier(setup))  # other machines may not see the folder
        data = setup.data()
        trainer = setup.trainer(data, run)
        config = setup.config(data)
        if resuming:
            _restore(setup, trainer, data, then["dataset"])
        else:  # only here is everything known to be right: a mistake must not cost an earlier run
            remove_results(run)
            run.write_json("config.json", config)
        if then:
            _say_differences(then, config)
        log(
            f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images in "
            f"{len(data.classes)} classes; {trainer.batches.updates_per_epoch} updates an epoch; run: {run.path}"
        )
        events = writer(run.file("tensorboard")) if writer and run.writes else None
        trainer.on_epoch = partial(_report_epoch, options.epochs, events)
        trainer.train()
        _finish(setup, trainer, data, events)
    except Exception as error:
        status, reason = explain(error, options)
        earlier = any(run.file(name).exists() for name in ("last.pt", "result.json"))
        if reason and (status == 1 or status == 2 and not earlier):
            with contextlib.suppress(RunError):  # the disk may be the failure
                run.write_json("failure.json", {"precision": precision.name, "reason": reason.splitlines()[0]})
        raise
    finally:
        run.close()


def _earlier(setup: Any) -> tuple[bool, dict[str, Any] | None]:
    """Whether a run goes on, and the config.json it was begun with, or that of --config where a new one begins.

    Raises UserError where there is nothing to resume, where the options would make it another run, and where a new
    run would replace one.
    """
    from runs.resume import refuse_changed, refuse_finished

    options = setup.options
    run = setup.run
    last = run.file("last.pt")
    if options.resume == "yes" and not last.exists():
        raise UserError(f"{printable(last)} does not exist: nothing to resume. Start without --resume.")
    if options.resume and last.exists():
        then = option.read_config(run.file("config.json"))
        refuse_changed(then["options"], vars(options))
        return True, then
    if not options.overwrite and not (options.resume and not run.file("result.json").exists()):
        refuse_finished(run)  # --resume auto may meet a run that ended before its first last.pt: it begins anew
    return False, option.read_config(Path(options.config)) if options.config else None


def _restore(setup: Any, trainer: Any, data: Any, was: dict[str, Any]) -> None:
    """Loads last.pt into a trainer; refuses images other than those that config.json says they were."""
    from runs.checkpoint import load_checkpoint

    file = setup.run.file("last.pt")
    state = setup.ranks.share(lambda: load_checkpoint(file))
    if state.get("fingerprint") != data.fingerprint:
        raise UserError(
            f"the images in {setup.options.data_dir} are not those this run began with: names or content differ "
            f"({was.get('train')} + {was.get('val')} + {was.get('test')} images then, {len(data.train)} + "
            f"{len(data.validation)} + {len(data.test)} now). Restore them, or start another --checkpoint_name."
        )
    if state.get("precision") != setup.precision.name:  # "auto" is another one on another device
        raise UserError(
            f"--resume would change the precision: begun in {printable(state.get('precision'))}, now "
            f"{setup.precision.name}. Choose with --amp_dtype and --device, or start another run."
        )
    try:
        if (state["classes"], state["model_name"]) != (data.classes, setup.options.model):
            raise ValueError("other classes, or another model")
        trainer.load_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{printable(file)} does not fit this run, or is damaged ({reason}).") from None
    if setup.run.writes:
        setup.run.file("failure.json").unlink(missing_ok=True)
    log(f"resuming after {trainer.progress.epoch} epochs and {trainer.progress.update} updates")


def _say_differences(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Notes what is not as it was when the config.json `then` was written."""

    def environment(config: dict[str, Any]) -> dict[str, Any]:
        machine = {name: config.get(name) for name in ("device", "device_name", "threads", "ranks")}
        return {**config["versions"], **machine, "fingerprint of the images": config["dataset"].get("fingerprint")}

    was = environment(then)
    for name, value in environment(now).items():
        if was.get(name) not in (value, None):
            log(f"note: {name} is {value} now and was {printable(was[name])} when that run began")


def _report_epoch(epochs: int, events: Any, line: dict[str, Any]) -> None:
    """A line on the terminal after each epoch and, where asked, TensorBoard's scalars."""
    scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
    loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
    log(
        f"epoch {line['epoch']:>3}/{epochs}  train {loss} {line['train_acc']:5.1f}%  "
        f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} images/s{scale}"
    )
    if events is not None:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "epoch":
                events.add_scalar(name, value, line["epoch"])
        events.flush()


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def _finish(setup: Any, trainer: Any, data: Any, events: Any) -> None:
    """Tests the best epoch once; writes the result, the predictions, the pictures and the page; prints the summary."""
    import torch

    from evaluate import evaluate, probabilities
    from images.decode import decode
    from reports import page, pictures, results, tables
    from runs.checkpoint import load_checkpoint

    options = setup.options
    run = setup.run
    at = trainer.progress
    network = setup.trained(setup.ranks.share(lambda: load_checkpoint(run.file("best_model.pt"))))
    torch.backends.cudnn.benchmark = False  # a search for the ragged batch would count in the run's memory and time
    found = evaluate(network, setup.batches(data, data.test), setup.precision, keep_logits=True, description="testing")
    if not run.writes:
        return
    result = {
        **_result(setup, data, found),
        "best_epoch": at.best_epoch,
        "best_val_acc": at.best_val_acc,
        "total_seconds": round(trainer.seconds, 3),
        "train_seconds": round(sum(line["seconds"] for line in at.history), 3),
        "images_per_second": results.steady_rate(at.history),
        "skipped_updates": sum(line["skipped_updates"] for line in at.history),
    }
    result["peak_memory_mb"] = max(result["peak_memory_mb"], at.peak_memory_mb)
    run.write_predictions(_test_names(setup, data), data.test.labels, probabilities(found.logits), data.classes)
    run.write_json("result.json", result)
    title = f"{options.model}, {setup.precision.label}"
    pictures.learning_curve(at.history, run.file("learning_curve.png"), title=title, best_epoch=at.best_epoch)
    pictures.confusion_matrix(result["confusion"], data.classes, run.file("confusion_matrix.png"), title=title)
    pictures.gallery(run.file("predictions.csv"), Path(options.data_dir), run.file("mistakes.png"))
    page.html_report(run.path, run.file("report.html"))
    if events is not None:
        for file in (run.file("confusion_matrix.png"), run.file("mistakes.png")):
            if file.exists():
                events.add_image(file.stem, decode(file), dataformats="HWC")
        events.close()
    print(tables.summary(result))
    log(f"results: {run.path}")


def _result(setup: Any, data: Any, found: Any) -> dict[str, Any]:
    """What a test says, before anything about the training."""
    from evaluate import probabilities
    from reports.results import calibration

    return {
        "test_acc": found.accuracy,
        "test_loss": found.loss,
        **utils.peak_memory(setup.device),
        "precision": setup.precision.name,
        "device": setup.device.type,
        "device_name": utils.device_name(setup.device),
        "classes": data.classes,
        "per_class": found.per_class(data.classes),
        "confusion": found.confusion.tolist(),
        "calibration_error": calibration(probabilities(found.logits), data.test.labels)["ece"],
    }


def _test_names(setup: Any, data: Any) -> list[str]:
    return [Path(os.path.relpath(path, setup.options.data_dir)).as_posix() for path in data.test.paths]


def _verify_resume(setup: Any) -> None:
    """Trains a little, stops in mid-epoch, resumes, and compares with a training that was not stopped."""
    import tempfile

    from commands.verify_resume import shortened, verify_resume
    from runs.folder import RunDirectory

    if setup.ranks.size > 1:
        raise UserError("--verify_resume is one process's work: run it without torchrun.")
    data = setup.data()
    folder = Path(setup.options.checkpoint_dir)
    setup.options.epochs = max(2, setup.options.epochs)
    shortened(data, setup.options.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        lines = verify_resume(lambda name: setup.trainer(data, RunDirectory(Path(inside) / name)))
    print("\n".join(lines))


def evaluate(options: Namespace, ranks: Ranks) -> None:
    """Tests a finished run's best checkpoint; with --precisions, in each of them."""
    from evaluate import evaluate, parity
    from reports import tables

    setup = _setup(options, ranks)
    checkpoint = setup.checkpoint()
    data = setup.data(test_only=True, classes=checkpoint["classes"])
    network = setup.trained(checkpoint)
    batches = setup.batches(data, data.test)
    if options.precisions:
        rows = parity(network, batches, options.precisions, _test_names(setup, data), data.classes)
        if ranks.is_first:
            file = setup.checkpoint_file.with_name("parity.json")
            print(tables.parity_table(rows))
            utils.write_text(file, json.dumps(rows, indent=1))
            log(f"details: {file}")
        return
    utils.reset_peak_memory(setup.device)
    started = time.perf_counter()
    found = evaluate(network, batches, setup.precision, keep_logits=True, description="testing")
    seconds = time.perf_counter() - started
    if ranks.is_first:
        print(
            tables.summary(
                {
                    **_result(setup, data, found),
                    "best_epoch": checkpoint["epoch"],
                    "best_val_acc": checkpoint["val_acc"],
                    "total_seconds": seconds,
                    "train_seconds": None,
                    "images_per_second": len(data.test) / seconds,
                }
            )
        )


def predict(options: Namespace, ranks: Ranks) -> None:
    """Classifies files and folders with a trained run."""
    from commands.predict import predict_files

    utils.refuse_missing_folders(options.csv, options.json, options.contact_sheet)
    setup = _setup(options, ranks)
    checkpoint = setup.checkpoint()
    predict_files(
        setup.trained(checkpoint),
        checkpoint["classes"],
        options.inputs,
        pixels=setup.preprocess,
        precision=setup.precision,
        batch_size=options.batch_size,
        top_k=options.top_k,
        workers=min(8, utils.cores()) if options.num_workers is None else options.num_workers,
        csv_file=options.csv,
        json_file=options.json,
        sheet=options.contact_sheet,
        log=log,
    )


def compare(options: Namespace, ranks: Ranks) -> None:
    """One training per precision, each in a fresh process, and the performance table."""
    from commands import compare

    folder = Path(options.checkpoint_dir) / (options.checkpoint_name or "comparison")
    if options.runs:
        compare.report_runs([Path(run) for run in options.runs], folder)
        return
    if not options.report_only:
        from images.demo import draw_demo
        from precision import sensible_precisions

        if options.demo:
            draw_demo(Path(options.data_dir))
        compare.run_all(
            folder,
            options.precisions or sensible_precisions(utils.choose_device(options.device, use=False)),
            [options.seed + extra for extra in range(options.seeds)],
            option.training_words(options),
            log,
            parse=lambda words: vars(option.parse(words)),
            overwrite=options.overwrite,
        )
    compare.report_runs(compare.run_folders(folder), folder)


def doctor(options: Namespace, ranks: Ranks) -> None:
    """What this machine can do, and what to expect of AMP on it."""
    from commands import doctor

    utils.refuse_missing_folders(options.json)
    findings = doctor.examine(
        utils.choose_device(options.device),
        image_size=options.image_size,
        batch_size=options.batch_size,
        model_name=options.model,
        data_dir=options.data_dir,
    )
    print(doctor.report(findings))
    if options.json:
        utils.write_text(Path(options.json), json.dumps(findings, indent=1))


def inspect(options: Namespace, ranks: Ranks) -> None:
    """What AMP did: dtypes, memory, gradient underflow, loss scale."""
    from inspection import inspector
    from precision import named_precision, sensible_precisions
    from reports.results import read_metrics

    setup = _setup(options, ranks)
    checkpoint = setup.checkpoint() if options.checkpoint_name or options.checkpoint else None
    data = setup.data(classes=checkpoint and checkpoint["classes"])
    images, labels, *_ = next(next(setup.batches(data, data.train, train=True).epoch(0)))
    names = options.precisions or sensible_precisions(setup.device)
    metrics = Path(options.checkpoint_dir) / options.checkpoint_name / "metrics.jsonl"
    print(
        inspector.inspect(
            lambda: setup.trained(checkpoint).train() if checkpoint else setup.network(len(data.classes)),
            images,
            labels,
            [named_precision(name, setup.device) for name in names],
            out=Path(options.out),
            metrics=read_metrics(metrics) if options.checkpoint_name else None,
            full=options.full,
        )
    )


def export(options: Namespace, ranks: Ranks) -> None:
    """Writes a trained run as ONNX."""
    from commands.export import export_onnx

    utils.refuse_missing_folders(options.out)
    setup = _setup(options, ranks)
    checkpoint = setup.checkpoint()
    file = Path(options.out or setup.checkpoint_file.with_name("model.onnx"))
    print(export_onnx(setup.trained(checkpoint), checkpoint, file))


def prepare(options: Namespace, ranks: Ranks) -> None:
    """Puts a data set on disk, or reports on one."""
    from commands import prepare
    from images.demo import draw_demo

    folder = Path(options.data_dir)
    if options.demo:
        draw_demo(folder, train_images=options.train_images, test_images=options.test_images, seed=options.seed)
        print(f"{options.train_images + options.test_images:,} demo scenes are in {folder}")
    elif options.archive:
        prepare.extract_archive(Path(options.archive), folder)
        print(f"{options.archive} is unpacked in {folder}")
    elif options.download:
        prepare.download(folder)
        print(f"Intel Image Classification is in {folder}")
    else:
        print(prepare.format_check(prepare.check(folder)))


COMMANDS: dict[str, Callable[[Namespace, Ranks], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "compare": compare,
    "doctor": doctor,
    "inspect": inspect,
    "prepare": prepare,
    "export": export,
}

if __name__ == "__main__":
    run()
