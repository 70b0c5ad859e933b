"""The command line: parse, assemble, call one command, close.

The only file that touches the Namespace of options; everything below it takes plain keywords. torch is
imported by the command that needs it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import job
import option
from utils import Ranks, RunError, Stopped, UserError, keep_freed_memory, printable

Log = Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status (0 done, 1 failed, 2 wrong input, 130 and 143 stopped)."""
    ranks = Ranks.from_environment()
    try:
        options = option.parse(argv)
        keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
        job.join(ranks)
        COMMANDS[options.command](options, ranks)
    except (UserError, RunError) as error:
        return _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except Stopped as stop:
        job.say_once(str(stop))
        return stop.exit_status
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before can go on with --resume", 130)
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        reason = _explained(error, options)
        if reason is None:
            raise
        return _fail(reason, 1)
    finally:
        job.leave(ranks)
    return 0


def run() -> None:
    """The console command `amp-train`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader of a pipe went away; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    job.say_once(f"error: {message}")
    return status


def _terminate(number: int, _frame: object) -> None:
    raise Stopped(number, "terminated; what was saved before can go on with --resume")


def _explained(error: Exception, options: Namespace) -> str | None:
    """What a failure means to the user; None for one that only a defect of this program can explain."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return _memory_advice(options)
    if "DataLoader worker" in str(error):
        return (f"a data loading worker died: {str(error).splitlines()[0]}\nUsually the machine ran out of memory: "
                "use fewer --num_workers, then go on with --resume.")
    if Ranks.from_environment().size > 1 and job.is_lost_connection(error):
        return job.LOST_RANK
    return str(error) if isinstance(error, RunError) else None


def _is_out_of_memory(error: Exception) -> bool:
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the CPU's, CUDA's, cuBLAS's and cuDNN's
    return type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in signs)


def _memory_advice(options: Namespace) -> str:
    batch, pieces = getattr(options, "batch_size", 1), getattr(options, "accumulate", 1)
    if options.command not in ("train", "compare"):
        return f"out of memory at --batch_size {batch}: use a smaller one."
    smaller = f"--accumulate {pieces * 2} computes it in smaller pieces"
    way = smaller if batch >= 2 * pieces else "use a smaller --image_size"
    return f"out of memory at --batch_size {batch} --accumulate {pieces}: {way}; --amp needs less, too."


def _logger(options: Namespace, ranks: Ranks) -> Log:
    """Prints to stdout, above any progress bar; silent on other ranks and with --quiet."""
    from tqdm import tqdm

    silent = not ranks.is_first or getattr(options, "quiet", False)
    return lambda text: None if silent else tqdm.write(text, file=sys.stdout)


# ------------------------------------------------------------------------------------ commands
def train(options: Namespace, ranks: Ranks) -> None:
    """Trains, tests the best epoch once, and writes the run's results."""
    from assemble import Setup
    from run import refuse_finished, remove_results

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
        resuming = ranks.share(lambda: resuming)  # other machines may not see the folder
        if resuming and ranks.is_first:
            _refuse_other(run, options)
        elif ranks.is_first and not options.overwrite:
            refuse_finished(run)
        data = setup.data()
        trainer = setup.trainer(data, run)
        if resuming:
            _resume(setup, trainer, data)
        else:  # only here is everything known to be right: a mistake must not cost an earlier run
            remove_results(run)
            run.write_json("config.json", setup.config(data))
            if options.config:
                _say_differences(setup, data, option.read_config(Path(options.config)))
        log(f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images in "
            f"{len(data.classes)} classes; {trainer.batches.updates_per_epoch} updates an epoch; run: {run.path}")
        trainer.on_epoch = _epoch_reporter(options, log, run)
        trainer.train()
        _finish(setup, trainer, data)
    except (RunError, MemoryError, RuntimeError) as error:
        reason = _explained(error, options)
        if reason is None:
            raise
        with contextlib.suppress(RunError):  # the disk may be the failure
            run.write_json("failure.json", {"precision": precision.name, "reason": reason.splitlines()[0]})
        raise RunError(reason) from error
    finally:
        run.close()


def _refuse_other(run: Any, options: Namespace) -> None:
    """Raises UserError where there is nothing to resume, or where the options would make it another run."""
    from run import refuse_changed

    if not run.file("last.pt").exists():
        raise UserError(f"{printable(run.file('last.pt'))} does not exist: nothing to resume. Start without --resume.")
    refuse_changed(option.read_config(run.file("config.json"))["options"], vars(options))


def _resume(setup: Any, trainer: Any, data: Any) -> None:
    """Loads last.pt into a trainer; refuses images that would make it another run."""
    stored, state = setup.ranks.share(lambda: _stored(setup.run))
    if state.get("fingerprint") != data.fingerprint:
        then = stored["dataset"]
        raise UserError(
            f"the images in {setup.options.data_dir} are not those this run began with: names or content differ "
            f"({then.get('train')} + {then.get('val')} + {then.get('test')} images then, {len(data.train)} + "
            f"{len(data.validation)} + {len(data.test)} now). Restore them, or start another --checkpoint_name."
        )
    try:
        if (state["classes"], state["model_name"]) != (data.classes, setup.options.model):
            raise ValueError("other classes, or another model")
        trainer.load_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise
        file, reason = setup.run.file("last.pt"), f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{printable(file)} does not fit this run, or is damaged ({reason}).") from None
    if setup.ranks.is_first:
        setup.run.file("failure.json").unlink(missing_ok=True)
    setup.log(f"resuming after {trainer.progress.epoch} epochs and {trainer.progress.update} updates")
    _say_differences(setup, data, stored)


def _say_differences(setup: Any, data: Any, stored: dict[str, Any]) -> None:
    """Notes what is not as it was when `stored`, a run's config.json, was written."""
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        parts = (config.get("dataset"), config.get("versions"))
        dataset, versions = (part if isinstance(part, dict) else {} for part in parts)
        machine = {name: config.get(name) for name in ("device", "device_name", "threads", "ranks")}
        return {**versions, **machine, "fingerprint of the images": dataset.get("fingerprint")}

    then = flat(stored)
    for name, now in flat(setup.config(data)).items():
        if then.get(name) not in (now, None):
            setup.log(f"note: {name} is {now} now and was {printable(then[name])} when that run began")


def _stored(run: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and last.pt of a run that is resumed."""
    from run import load_checkpoint

    config = option.read_config(run.file("config.json"))
    if not isinstance(config.get("dataset"), dict):
        raise UserError(f"{printable(run.file('config.json'))} is damaged: it says nothing of the data set.")
    return config, load_checkpoint(run.file("last.pt"))


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

    network = setup.trained(setup.ranks.share(lambda: load_checkpoint(setup.run.file("best_model.pt"))))
    found = evaluate(network, setup.batches(data, data.test), setup.precision, keep_logits=True, description="testing")
    if not setup.ranks.is_first:
        return
    at = trainer.progress
    steady = statistics.median(line["images_per_second"] for line in at.history[1:] or at.history)
    result = _result(setup, data, found) | {
        "best_epoch": at.best_epoch, "best_val_acc": at.best_val_acc,
        "total_seconds": round(trainer.stopwatch.seconds, 3),
        "train_seconds": round(sum(line["seconds"] for line in at.history), 3),
        "images_per_second": steady,
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
        paths = [os.path.relpath(path, options.data_dir) for path in data.test.paths]
        rows = parity(network, batches, options.precisions, paths, data.classes)
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
