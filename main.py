"""The command line: parse, assemble, call one command, close.

The only file that touches the Namespace of options; everything below it takes plain keywords. torch is
imported by the command that needs it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
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
    way = f"--accumulate {pieces * 2} computes the same batch in smaller pieces" if batch > pieces else "a smaller --image_size"
    return f"out of memory at --batch_size {batch} --accumulate {pieces}: {way}; --amp needs less, too. Go on with --resume."


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


# ---------------------------------------------------------------------------------- assembling
def _device(options: Namespace, ranks: Ranks) -> Any:
    from utils import choose_device

    if ranks.size > 1 and options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {options.device}: under torchrun each process takes its own GPU; use cuda or cpu.")
    return choose_device(options.device, ranks.local_rank)


def _precision(options: Namespace, device: Any) -> Any:
    from precision import choose_precision

    return choose_precision(device, amp=options.amp, amp_dtype=options.amp_dtype, tf32=options.tf32)


def _data_set(options: Namespace, ranks: Ranks, device: Any, log: Log, *, test_only: bool = False) -> Any:
    from dataset import open_data_set

    if options.demo and ranks.is_first:
        from prepare import draw_demo

        if not (Path(options.data_dir) / "demo.json").exists():
            log(f"drawing demo scenes into {options.data_dir}")
        draw_demo(Path(options.data_dir))
    ranks.barrier()
    data = open_data_set(
        options.data_dir, image_size=options.image_size, seed=options.seed, cache=options.cache,
        workers=options.num_workers, skip_unreadable=options.skip_unreadable, pin=device.type == "cuda",
        keep_larger=getattr(options, "augment", "flip") == "crop", test_only=test_only, log=log,
    )
    wanted = getattr(options, "num_classes", None)
    if wanted is not None and wanted != len(data.classes):
        raise UserError(f"--num_classes {wanted}: {options.data_dir} holds {len(data.classes)} class folders.")
    return data


def _batches(options: Namespace, ranks: Ranks, device: Any, data: Any, subset: Any, *, train: bool = False) -> Any:
    from dataset import Augmentation, Batches

    extra = {}
    if train:
        extra = {
            "seed": options.seed, "accumulate": options.accumulate,
            "augmentation": Augmentation(options.augment, options.mixup, options.cutmix),
        }  # fmt: skip
    return Batches(
        subset, device, options.image_size, options.batch_size, len(data.classes), normalize=options.normalize,
        ranks=ranks, channels_last=options.channels_last, **extra,
    )


def _model(options: Namespace, class_count: int, device: Any, *, pretrained: bool) -> Any:
    """The network on the device; for a finished run, without weights of its own yet."""
    import torch

    from model import build_model
    from utils import seed_everything

    seed_everything(getattr(options, "seed", 0))
    given = options.pretrained_path if pretrained else None
    network = build_model(options.model, class_count, pretrained=pretrained and bool(options.pretrained), pretrained_path=given)
    return network.to(device, memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)


def _trainer(options: Namespace, ranks: Ranks, device: Any, precision: Any, data: Any, run_directory: Any, log: Log) -> Any:
    """Everything a training needs, wired together."""
    from functools import partial

    import torch

    from model import check_input_size, head_name
    from train import Trainer, make_optimizer, make_scheduler

    if options.batch_size < ranks.size * options.accumulate:
        raise UserError(f"--batch_size {options.batch_size} cannot be cut among {ranks.size} processes "
                        f"in {options.accumulate} pieces each.")
    network = _model(options, len(data.classes), device, pretrained=True)
    if options.sync_batchnorm and ranks.size > 1:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    batches = _batches(options, ranks, device, data, data.train, train=True)
    left_over = len(data.train) % options.batch_size or options.batch_size
    check_input_size(network, options.image_size, max(1, left_over // (ranks.size * options.accumulate)))
    optimizer = make_optimizer(
        network.parameters(), options.optimizer, learning_rate=options.learning_rate,
        weight_decay=options.weight_decay, fused=device.type in ("cpu", "cuda"),
    )
    schedule = partial(
        make_scheduler, optimizer, options.decay_type, epochs=options.epochs, warmup_epochs=options.warmup_epochs,
        updates_per_epoch=batches.updates_per_epoch,
    )
    return Trainer(
        network, optimizer, lambda done: schedule(done=done), precision, batches,
        _batches(options, ranks, device, data, data.validation), run_directory, options.epochs, options.seed,
        label_smoothing=options.label_smoothing, clip_grad_norm=options.clip_grad_norm,
        log_interval=options.log_interval, checkpoint_every=options.checkpoint_every, patience=options.patience,
        freeze_epochs=options.freeze_epochs, head=head_name(network), ema=_average(network, options.ema),
        compile=options.compile, log=log,
        record={"format": 1, "classes": data.classes, "model_name": options.model, "image_size": options.image_size,
                "normalize": options.normalize, "precision": precision.name, "fingerprint": data.fingerprint},
    )


def _average(network: Any, decay: float) -> Any:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _run_directory(options: Namespace, ranks: Ranks, precision: Any) -> Any:
    from run import RunDirectory

    if not options.checkpoint_name:
        options.checkpoint_name = f"{options.model.lower()}_{precision.name}"
    return RunDirectory(Path(options.checkpoint_dir) / options.checkpoint_name, writes=ranks.is_first)


def _config(options: Namespace, device: Any, precision: Any, data: Any) -> dict[str, Any]:
    """What config.json records: every option, versions, device and data."""
    import platform

    import numpy
    import PIL
    import torch
    import torchvision

    from utils import device_name

    hidden = ("command", "trained_with", "evaluate")
    return {
        "options": {name: value for name, value in vars(options).items() if name not in hidden},
        "versions": {"amp-train": option.VERSION, "python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__},
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision.name,
        "precision_reason": precision.reason,
        "dataset": {"fingerprint": data.fingerprint, "classes": data.classes, "train": len(data.train),
                    "val": len(data.validation), "test": len(data.test), "unreadable": data.unreadable},
    }  # fmt: skip


# ------------------------------------------------------------------------------------ commands
def train(options: Namespace, ranks: Ranks) -> None:
    """Trains, tests the best epoch once, and writes the run's results."""
    import torch

    log = _logger(options, ranks)
    device = _device(options, ranks)
    precision = _precision(options, device)
    run_directory = _run_directory(options, ranks, precision)
    if options.verify_resume:
        verify_resume(options, ranks)
        return
    log(f"{options.model} on {device}: {precision.label} ({precision.reason})")
    if precision.name == "amp-fp16" and device.type == "cpu":
        log("warning: this CPU emulates float16, many times slower than FP32: fit for tiny tests only")
    torch.backends.cudnn.benchmark = True
    run_directory.open()
    try:
        from run import refuse_finished

        resuming = bool(options.resume) and (options.resume == "yes" or run_directory.file("last.pt").exists())
        if not resuming:
            refuse_finished(run_directory, overwrite=options.overwrite)
        data = _data_set(options, ranks, device, log)
        trainer = _trainer(options, ranks, device, precision, data, run_directory, log)
        if resuming:
            _resume(options, trainer, run_directory, data, log)
        else:
            run_directory.write_json("config.json", _config(options, device, precision, data))
        log(f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images, "
            f"{len(data.classes)} classes; {trainer.batches.updates_per_epoch} updates an epoch; run: {run_directory.path}")
        trainer.on_epoch = _epoch_line(options, log, run_directory)
        trainer.train()
        _finish(options, ranks, trainer, data, log)
    except RunError as error:
        run_directory.write_json("failure.json", {"precision": precision.name, "reason": str(error).splitlines()[0]})
        raise
    finally:
        run_directory.close()


def _resume(options: Namespace, trainer: Any, run_directory: Any, data: Any, log: Log) -> None:
    """Loads last.pt into a trainer; refuses options or images that would make it another run."""
    from run import refuse_changed

    stored = option.read_config(run_directory.file("config.json"))
    refuse_changed(stored["options"], vars(options))
    state = run_directory.load("last.pt")
    if state["fingerprint"] != data.fingerprint:
        before = stored["dataset"]
        raise UserError(
            f"the images in {options.data_dir} are not those this run began with ({before['train'] + before['val']:,} + "
            f"{before['test']:,} then, {len(data.train) + len(data.validation):,} + {len(data.test):,} now; content or "
            "names differ). Restore them, or start another --checkpoint_name."
        )
    trainer.load_state(state)
    trainer.run.file("failure.json").unlink(missing_ok=True)
    at = trainer.progress
    log(f"resuming after epoch {at.epoch}, update {at.update}")
    for name, now in _config(options, trainer.device, trainer.precision, data)["versions"].items():
        if stored["versions"].get(name) != now:
            log(f"note: {name} is {now} now, {stored['versions'].get(name)} when this run began")


def _epoch_line(options: Namespace, log: Log, run_directory: Any) -> Callable[[dict[str, Any]], None]:
    """What happens after each epoch: a line on the terminal, and TensorBoard where asked."""
    writer = None
    if options.tensorboard and run_directory.writes:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        writer = SummaryWriter(run_directory.file("tensorboard"))

    def report(line: dict[str, Any]) -> None:
        scale = f"  scale {line['loss_scale']:g}, {line['skipped_updates']} skipped" if line["loss_scale"] else ""
        loss = "nan" if line["train_loss"] is None else f"{line['train_loss']:.3f}"
        log(f"epoch {line['epoch']:>3}/{options.epochs}  train {loss} {line['train_acc']:5.1f}%  "
            f"val {line['val_loss']:.3f} {line['val_acc']:5.1f}%  {line['images_per_second']:,.0f} img/s{scale}")
        if writer is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(name, value, line["epoch"])
            writer.flush()

    return report


def _finish(options: Namespace, ranks: Ranks, trainer: Any, data: Any, log: Log) -> None:
    """Tests the best epoch once; writes result, predictions and pictures; prints the summary."""
    import report
    from evaluate import evaluate, probabilities
    from utils import device_name, peak_memory

    run_directory, at, device = trainer.run, trainer.progress, trainer.device
    ranks.barrier()
    network = trainer.evaluated_model
    network.load_state_dict(run_directory.load("best_model.pt")["model"])
    batches = _batches(options, ranks, device, data, data.test)
    found = evaluate(network.eval(), batches, trainer.precision, keep_logits=True, description="testing")
    if not ranks.is_first:
        return
    shares = probabilities(found.logits)
    train_seconds = sum(line["seconds"] for line in at.history)
    steady = sorted(line["images_per_second"] for line in at.history[1:] or at.history)
    memory = peak_memory(device)
    result = {
        "test_acc": found.accuracy, "test_loss": found.loss, "best_epoch": at.best_epoch, "best_val_acc": at.best_val_acc,
        "total_seconds": round(trainer.stopwatch.seconds, 3), "train_seconds": round(train_seconds, 3),
        "images_per_second": steady[len(steady) // 2], **memory,
        "peak_memory_mb": max(memory["peak_memory_mb"], at.peak_memory_mb), "precision": trainer.precision.name,
        "device": device.type, "device_name": device_name(device), "classes": data.classes,
        "per_class": found.per_class(data.classes), "confusion": found.confusion.tolist(),
        "calibration_error": report.calibration(shares, data.test.labels)["ece"],
        "skipped_updates": sum(line["skipped_updates"] for line in at.history),
    }  # fmt: skip
    paths = [os.path.relpath(path, options.data_dir) for path in data.test.paths]
    run_directory.write_predictions(paths, data.test.labels, shares, data.classes)
    run_directory.write_json("result.json", result)
    _draw(options, run_directory, at.history, result)
    print(report.summary(result))
    log(f"results: {run_directory.path}")


def _draw(options: Namespace, run_directory: Any, history: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Learning curve, confusion matrix, gallery of mistakes and the HTML report."""
    import html_report
    import report

    path, title = run_directory.file, f"{options.model}, {result['precision']}"
    report.learning_curve(history, path("learning_curve.png"), title=title, best_epoch=result["best_epoch"])
    report.confusion_matrix(result["confusion"], result["classes"], path("confusion_matrix.png"), title=title)
    report.gallery(path("predictions.csv"), Path(options.data_dir), path("mistakes.png"))
    html_report.html_report(run_directory.path, path("report.html"))


COMMANDS: dict[str, Callable[[Namespace, Ranks], None]] = {"train": train}

if __name__ == "__main__":
    run()
