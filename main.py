"""The command line: parse, assemble, call one command, close.

The only file that touches the Namespace of options; everything below it takes plain keywords. torch is
imported by the command that needs it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import option
from utils import Ranks, RunError, Stopped, UserError, keep_freed_memory, printable

Log = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status (0 done, 1 failed, 2 wrong input, 130 and 143 stopped)."""
    try:
        options = option.parse(argv)
        keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
        with _ranks() as ranks:
            COMMANDS[options.command](options, ranks)
    except (UserError, RunError) as error:
        return _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before can go on with --resume", 130)
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _is_out_of_memory(error):
            raise
        return _fail(_memory_advice(options), 1)
    return 0


def run() -> None:
    """The console command `amp-train`."""
    sys.exit(main(sys.argv[1:]))


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _terminate(number: int, _frame: object) -> None:
    raise Stopped(number, "terminated; what was saved before can go on with --resume")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _memory_advice(options: Namespace) -> str:
    batch, pieces = getattr(options, "batch_size", 1), getattr(options, "accumulate", 1)
    way = f"--accumulate {pieces * 2} computes it in smaller pieces" if batch >= 2 * pieces else "use a smaller --image_size"
    return f"out of memory at --batch_size {batch} --accumulate {pieces}: {way}; --amp needs less, too."


@contextlib.contextmanager
def _ranks() -> Iterator[Ranks]:
    """Joins torchrun's process group where there is one, and leaves it."""
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _logger(options: Namespace, ranks: Ranks) -> Log:
    """Prints to stdout, above any progress bar; silent on other ranks and with --quiet."""
    from tqdm import tqdm

    silent = not ranks.is_first or getattr(options, "quiet", False)
    return lambda text: None if silent else tqdm.write(text, file=sys.stdout)


# ------------------------------------------------------------------------------------ commands
def train(options: Namespace, ranks: Ranks) -> None:
    """Trains, tests the best epoch once, and writes the run's results."""
    from assemble import Setup
    from run import refuse_changed, refuse_finished

    log = _logger(options, ranks)
    setup = Setup(options, ranks, log)
    run, precision = setup.run, setup.precision
    log(f"{options.model} on {setup.device}: {precision.label} ({precision.reason})")
    if precision.name == "amp-fp16" and setup.device.type == "cpu":
        log("warning: CPUs emulate float16, many times slower than FP32: fit for tiny tests only")
    if options.verify_resume:
        _verify_resume(setup)
        return
    run.open()
    try:
        resuming = options.resume == "yes" or (options.resume == "auto" and run.file("last.pt").exists())
        if resuming:
            refuse_changed(option.read_config(run.file("config.json"))["options"], vars(options))
        else:
            refuse_finished(run, overwrite=options.overwrite)
        data = setup.data()
        trainer = setup.trainer(data, run)
        if resuming:
            _resume(setup, trainer, data)
        else:
            run.write_json("config.json", setup.config(data))
        log(f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images in "
            f"{len(data.classes)} classes; {trainer.batches.updates_per_epoch} updates an epoch; run: {run.path}")
        trainer.on_epoch = _epoch_reporter(options, log, run)
        trainer.train()
        _finish(setup, trainer, data)
    except RunError as error:
        with contextlib.suppress(RunError):  # the disk may be the failure
            run.write_json("failure.json", {"precision": precision.name, "reason": str(error).splitlines()[0]})
        raise
    finally:
        run.close()


def _resume(setup: Any, trainer: Any, data: Any) -> None:
    """Loads last.pt into a trainer; refuses images that would make it another run."""
    from run import load_checkpoint

    file = setup.run.file("last.pt")
    if not file.exists():
        raise UserError(f"{printable(file)} does not exist: nothing to resume. Start without --resume.")
    stored, state = option.read_config(setup.run.file("config.json")), load_checkpoint(file)
    if state["fingerprint"] != data.fingerprint:
        then = stored["dataset"]
        raise UserError(
            f"the images in {setup.options.data_dir} are not those this run began with: names or content differ "
            f"({then['train']:,} + {then['val']:,} + {then['test']:,} images then, {len(data.train):,} + "
            f"{len(data.validation):,} + {len(data.test):,} now). Restore them, or start another --checkpoint_name."
        )
    trainer.load_state(state)
    if setup.ranks.is_first:
        setup.run.file("failure.json").unlink(missing_ok=True)
    setup.log(f"resuming after {trainer.progress.epoch} epochs and {trainer.progress.update} updates")
    for name, now in setup.config(data)["versions"].items():
        if stored["versions"].get(name) != now:
            setup.log(f"note: {name} is {now} now and was {stored['versions'].get(name)} when this run began")


def _epoch_reporter(options: Namespace, log: Log, run: Any) -> Callable[[dict[str, Any]], None]:
    """What happens after each epoch: a line on the terminal, and TensorBoard where asked."""
    writer = _tensorboard(run) if options.tensorboard and run.writes else None

    def report(line: dict[str, Any]) -> None:
        scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
        loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
        log(f"epoch {line['epoch']:>3}/{options.epochs}  train {loss} {line['train_acc']:5.1f}%  "
            f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} images/s{scale}")
        if writer is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(name, value, line["epoch"])
            writer.flush()

    return report


def _tensorboard(run: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(run.file("tensorboard"))


def _finish(setup: Any, trainer: Any, data: Any) -> None:
    """Tests the best epoch once; writes the result; prints the summary."""
    from evaluate import evaluate
    from run import load_checkpoint

    setup.ranks.barrier()
    network = setup.trained(load_checkpoint(setup.run.file("best_model.pt")))
    found = evaluate(network, setup.batches(data, data.test), setup.precision, keep_logits=True, description="testing")
    if not setup.ranks.is_first:
        return
    at = trainer.progress
    steady = sorted(line["images_per_second"] for line in at.history[1:] or at.history)
    result = _result(setup, data, found) | {
        "best_epoch": at.best_epoch, "best_val_acc": at.best_val_acc,
        "total_seconds": round(trainer.stopwatch.seconds, 3),
        "train_seconds": round(sum(line["seconds"] for line in at.history), 3),
        "images_per_second": steady[len(steady) // 2],
        "skipped_updates": sum(line["skipped_updates"] for line in at.history),
    }  # fmt: skip
    result["peak_memory_mb"] = max(result["peak_memory_mb"], at.peak_memory_mb)
    _write_result(setup, data, found, result)
    if setup.options.tensorboard:
        _tensorboard_pictures(setup.run)


def _result(setup: Any, data: Any, found: Any) -> dict[str, Any]:
    """What a test says, before anything about the training."""
    from evaluate import probabilities
    from results import calibration
    from utils import device_name, peak_memory

    shares = probabilities(found.logits)
    return {
        "test_acc": found.accuracy, "test_loss": found.loss, **peak_memory(setup.device),
        "precision": setup.precision.name, "device": setup.device.type, "device_name": device_name(setup.device),
        "classes": data.classes, "per_class": found.per_class(data.classes), "confusion": found.confusion.tolist(),
        "calibration_error": calibration(shares, data.test.labels)["ece"],
    }  # fmt: skip


def _write_result(setup: Any, data: Any, found: Any, result: dict[str, Any]) -> None:
    """result.json, predictions.csv, the pictures and report.html; the summary on the terminal."""
    import html_report
    import report
    import results
    from evaluate import probabilities

    options, run = setup.options, setup.run
    paths = [os.path.relpath(path, options.data_dir) for path in data.test.paths]
    run.write_predictions(paths, data.test.labels, probabilities(found.logits), data.classes)
    run.write_json("result.json", result)
    history = results.read_run(run.path)["metrics"]
    title = f"{options.model}, {setup.precision.label}"
    report.learning_curve(history, run.file("learning_curve.png"), title=title, best_epoch=result["best_epoch"])
    report.confusion_matrix(result["confusion"], data.classes, run.file("confusion_matrix.png"), title=title)
    report.gallery(run.file("predictions.csv"), Path(options.data_dir), run.file("mistakes.png"))
    html_report.html_report(run.path, run.file("report.html"))
    print(results.summary(result))
    setup.log(f"results: {run.path}")


def _tensorboard_pictures(run: Any) -> None:
    import numpy as np
    from PIL import Image

    writer = _tensorboard(run)
    for name in ("confusion_matrix", "mistakes", "learning_curve"):
        if run.file(f"{name}.png").exists():
            with Image.open(run.file(f"{name}.png")) as picture:
                writer.add_image(name, np.asarray(picture.convert("RGB")), dataformats="HWC")
    writer.close()


def _verify_resume(setup: Any) -> None:
    """Trains a little, stops in mid-epoch, resumes, and compares with a training that was not stopped."""
    import tempfile

    from run import RunDirectory
    from verify import shortened, verify_resume

    data = setup.data()
    shortened(data, setup.options.batch_size)
    with tempfile.TemporaryDirectory(dir=_existing(Path(setup.options.checkpoint_dir))) as folder:
        lines = verify_resume(lambda name: setup.trainer(data, RunDirectory(Path(folder) / name)))
    print("\n".join(lines))


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evaluate(options: Namespace, ranks: Ranks) -> None:
    """Tests a finished run's best checkpoint; with --precisions, in each of them."""
    import results
    from assemble import Setup
    from evaluate import evaluate, parity
    from precision import named_precision
    from utils import reset_peak_memory

    log = _logger(options, ranks)
    setup = Setup(options, ranks, log)
    checkpoint = setup.checkpoint()
    for name in ("image_size", "normalize"):  # what the network was trained on, unless asked otherwise
        if name not in options.trained_with:
            setattr(options, name, checkpoint[name])
    data = setup.data(test_only=True)
    if data.classes != checkpoint["classes"]:
        raise UserError(f"{options.data_dir} holds the classes {data.classes}, the checkpoint {checkpoint['classes']}.")
    network, batches = setup.trained(checkpoint), setup.batches(data, data.test)
    if options.precisions:
        precisions = [named_precision(name, setup.device) for name in options.precisions]
        paths = [os.path.relpath(path, options.data_dir) for path in data.test.paths]
        rows = parity(network, batches, precisions, paths, data.classes)
        if ranks.is_first:
            print(results.parity_table(rows))
            run_file = Path(options.checkpoint_dir) / options.checkpoint_name / "parity.json"
            results.write_atomically(run_file, json.dumps(rows, indent=1))
            log(f"details: {run_file}")
        return
    reset_peak_memory(setup.device)
    started = time.perf_counter()
    found = evaluate(network, batches, setup.precision, keep_logits=True, description="testing")
    if ranks.is_first:
        seconds = time.perf_counter() - started
        result = _result(setup, data, found) | {
            "best_epoch": checkpoint["epoch"], "best_val_acc": checkpoint["val_acc"],
            "total_seconds": seconds, "train_seconds": None, "images_per_second": len(data.test) / seconds,
        }  # fmt: skip
        print(results.summary(result))


def predict(options: Namespace, ranks: Ranks) -> None:
    """Classifies files and folders with a trained run."""
    from assemble import Setup
    from dataset import Pixels
    from predict import predict_files

    _alone(options, ranks)
    setup = Setup(options, ranks, _logger(options, ranks))
    checkpoint = setup.checkpoint()
    pixels = Pixels(setup.device, checkpoint["image_size"], checkpoint["normalize"], options.channels_last)
    workers = len(os.sched_getaffinity(0)) if options.num_workers is None else options.num_workers
    predict_files(
        setup.trained(checkpoint), checkpoint["classes"], options.inputs, pixels=pixels, precision=setup.precision,
        batch_size=options.batch_size, top_k=options.top_k, workers=workers, csv_file=options.csv,
        json_file=options.json, sheet=options.contact_sheet, log=setup.log,
    )


def compare(options: Namespace, ranks: Ranks) -> None:
    """One training per precision, each in a fresh process, and the performance table."""
    import compare

    _alone(options, ranks)
    log = _logger(options, ranks)
    folder = Path(options.checkpoint_dir) / (options.checkpoint_name or "comparison")
    if options.runs:
        compare.report_runs([Path(run) for run in options.runs], folder)
        return
    if not options.report_only:
        from precision import sensible_precisions
        from utils import choose_device

        if options.demo:
            from prepare import draw_demo

            draw_demo(Path(options.data_dir))
        compare.run_all(
            folder, options.precisions or sensible_precisions(choose_device(options.device)),
            [options.seed + extra for extra in range(options.seeds)], option.training_words(options), log,
            parse=lambda words: vars(option.parse(words)), overwrite=options.overwrite,
        )
    compare.report_runs(compare.run_folders(folder), folder)


def doctor(options: Namespace, ranks: Ranks) -> None:
    """What this machine can do, and what to expect of AMP on it."""
    import doctor
    from utils import choose_device

    _alone(options, ranks)
    device = choose_device(options.device)
    findings = doctor.examine(
        device, image_size=options.image_size, batch_size=options.batch_size, model_name=options.model,
        data_dir=options.data_dir,
    )
    print(doctor.report(findings))
    if options.json:
        _write_json(Path(options.json), findings)


def inspect(options: Namespace, ranks: Ranks) -> None:
    """What AMP did: dtypes, memory, gradient underflow, loss scale."""
    import inspector

    from assemble import Setup
    from precision import named_precision, sensible_precisions
    from results import read_metrics

    _alone(options, ranks)
    setup = Setup(options, ranks, _logger(options, ranks))
    data = setup.data()
    images, labels, *_ = next(next(setup.batches(data, data.train, train=True).epoch(0)))
    names = options.precisions or sensible_precisions(setup.device)
    run = Path(options.checkpoint_dir) / options.checkpoint_name
    trained = bool(options.checkpoint_name) or bool(options.checkpoint)
    checkpoint = setup.checkpoint() if trained else None
    text = inspector.inspect(
        lambda: setup.trained(checkpoint).train() if trained else setup.network(len(data.classes)), images, labels,
        [named_precision(name, setup.device) for name in names], out=Path(options.out),
        metrics=read_metrics(run / "metrics.jsonl") if options.checkpoint_name else None, full=options.full,
    )
    print(text)


def export(options: Namespace, ranks: Ranks) -> None:
    """Writes a trained run as ONNX."""
    from assemble import Setup
    from export import export_onnx

    _alone(options, ranks)
    setup = Setup(options, ranks, _logger(options, ranks))
    file = Path(options.out or Path(options.checkpoint_dir) / options.checkpoint_name / "model.onnx")
    checkpoint = setup.checkpoint()
    print(export_onnx(setup.trained(checkpoint), checkpoint, file))


def _write_json(file: Path, content: Any) -> None:
    from results import write_atomically

    write_atomically(file, json.dumps(content, indent=1))


def prepare(options: Namespace, ranks: Ranks) -> None:
    """Puts a data set on disk, or reports on one."""
    import prepare

    _alone(options, ranks)
    folder = Path(options.data_dir)
    if options.demo:
        prepare.draw_demo(folder, train_images=options.train_images, test_images=options.test_images,
                          seed=options.seed, workers=options.num_workers)
        print(f"{options.train_images + options.test_images:,} demo scenes are in {folder}")
    elif options.archive:
        prepare.extract_archive(Path(options.archive), folder)
        print(f"{options.archive} is unpacked in {folder}")
    elif options.download:
        prepare.download(folder)
        print(f"Intel Image Classification is in {folder}")
    else:
        print(prepare.format_check(prepare.check(folder)))


def _alone(options: Namespace, ranks: Ranks) -> None:
    if ranks.size > 1:
        raise UserError(f"{options.command} is one process's work: run it without torchrun.")


COMMANDS: dict[str, Callable[[Namespace, Ranks], None]] = {
    "train": train, "evaluate": evaluate, "predict": predict, "compare": compare, "doctor": doctor,
    "inspect": inspect, "prepare": prepare, "export": export,
}  # fmt: skip

if __name__ == "__main__":
    run()
