"""Run the command line: parse, dispatch, train, explain failures, close.

Below this file every function takes typed groups of options, or plain keywords. torch is imported by the command that
needs it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import utils
from command_line import groups, idle
from command_line.failures import explain
from command_line.groups import Asked, grouped, take
from command_line.parsing import parse
from distributed import Ranks
from system import meeting
from system.machine import allow_more_files
from system.parent import draws, end_with_parent
from system.terminal import open_streams
from utils import Stopped, UserError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


def main(argv: Sequence[str]) -> int:
    """Run one command line; return its exit status.

    0 done, 1 failed, 2 wrong input, 124 out of --max_time, 128 + n stopped by signal n (130 by Ctrl-C).
    """
    ranks = Ranks()
    options = Namespace(command="")
    children = set(multiprocessing.active_children())
    try:
        ranks = Ranks.from_environment()
        options = parse(argv, is_cuda=is_cuda)
        if ranks.size > 1 and options.command not in ("train", "evaluate"):
            raise UserError(f"run {options.command} without torchrun: it uses one process.")
        utils.start_logging(quiet=getattr(options, "quiet", False) or draws())
        for sentence in idle.said(options.command, options.typed, vars(options), processes=ranks.size):
            utils.log.warning(sentence)
        # Memory and files before torch allocates; signals before join, so that Ctrl-C ends the wait for other ranks.
        utils.keep_freed_memory()
        allow_more_files()
        utils.on_stop(_terminate)
        meeting.join(ranks)
        with utils.importing():
            run_command = action(options, ranks)
        run_command()
        return 0
    except (Exception, KeyboardInterrupt, Stopped) as error:
        status, reason = explain(error, options.command, vars(options))
        if not reason:
            raise
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun sends one to all when the first has failed
        meeting.say_once(reason if isinstance(error, Stopped) else f"error: {reason}", ranks)
        return status
    finally:
        _end_workers(children)
        meeting.leave(ranks)


def run() -> None:
    """Run this process's command line as `python main.py` does, and end the process."""
    end_with_parent()
    lost = open_streams()
    os.environ["MPLBACKEND"] = "agg"  # notebooks hand their own to every child
    utils.name_this_user()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name) == "":  # the libraries reject an empty value
            del os.environ[name]
    if any(action.startswith("error") for action in sys.warnoptions):
        warnings.resetwarnings()  # warnings of libraries must not become errors (python -W error)
        warnings.simplefilter("ignore")
    status = main(sys.argv[1:])
    error = lost()
    if error is not None:
        print(f"error: the output is not complete: {error.strerror}.", file=sys.stderr)
    meeting.end(status or (1 if error else 0))


def _end_workers(others: set[BaseProcess]) -> None:
    """End the loading workers, which are all children but `others`.

    They leave SIGTERM to this process, so that Python would wait for them for ever when it exits.
    """
    workers = set(multiprocessing.active_children()) - others
    if not workers:
        return
    has_signal = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if has_signal else None  # PyTorch would raise for each
    for worker in workers:
        worker.kill()
        worker.join()
    if has_signal:
        signal.signal(signal.SIGCHLD, heard or signal.SIG_DFL)


def action(options: Namespace, ranks: Ranks) -> Callable[[], None]:
    """Import the module of the command, and torch if it needs it; return the call that runs the command."""
    asked = grouped(options)
    match options.command:
        case "prepare":
            from commands.prepare import prepare

            return partial(prepare, take(groups.Preparation, options))
        case "report":
            from commands.report import report

            return partial(report, take(groups.Redrawing, options))
        case "doctor":
            from commands.doctor import doctor

            return partial(doctor, take(groups.Examination, options))
        case "compare":
            from commands.compare import compare

            return partial(compare, asked, take(groups.Comparison, options))
        case "evaluate":
            from commands.evaluate import evaluate_run

            return partial(evaluate_run, asked, ranks, take(groups.Evaluation, options))
        case "predict":
            from commands.predict import predict

            return partial(predict, asked, ranks, take(groups.Prediction, options))
        case "inspect":
            from commands.inspect import inspect

            return partial(inspect, asked, ranks, take(groups.Inspection, options))
        case "export":
            from commands.export import export

            return partial(export, asked, ranks, take(groups.Export, options))
        case "audit":
            from commands.audit import audit

            return partial(audit, asked, ranks, take(groups.Auditing, options))
    return partial(train, asked, ranks)


def train(asked: Asked, ranks: Ranks) -> None:
    """Train, test the best epoch once, and write the run's results. Its steps are in commands/train.py."""
    with utils.importing():
        from assemble import make_trainer, run_folder, set_up
        from commands.budget import begun_length, chosen_length
        from commands.train import (
            announce,
            begin_or_resume,
            finish,
            opened,
            opened_logs,
            report_epoch,
            show,
            watch_layers,
        )
        from images.asked import data_to_train_on
        from runs.resume import find_earlier

    setup = set_up(asked, ranks)
    place = asked.place
    recording = asked.recording
    announce(setup, model=asked.model.model, logs=recording.logs, safetensors=recording.safetensors)
    run = run_folder(setup)
    with opened(run, setup.precision, partial(explain, command=asked.command, options=asked.given.flat)):
        setup = begun_length(setup, run)
        asked = setup.asked
        search = partial(find_earlier, run, asked.given.flat, resume=place.resume, overwrite=place.overwrite)
        earlier = ranks.share(lambda: search(config=place.config))  # the other ranks may not see the folder
        started_from = asked.given.typed & {"pretrained", "pretrained_path", "weights"}
        if earlier.resuming and started_from:
            utils.log.warning(idle.no_effect(started_from, "the run goes on from its last.pt"))
        continued = run.path if earlier.resuming else None
        data = data_to_train_on(asked, ranks, setup.preprocess, continued=continued)
        setup = setup if earlier.resuming else chosen_length(setup, data, run)
        trainer = make_trainer(setup, data, run, resumed=earlier.config if earlier.resuming else None)
        begin_or_resume(setup, trainer, data, earlier)
        watch_layers(trainer, every=recording.watch)
        with opened_logs(recording.logs, trainer, setup.asked.given.flat) as logs:
            trainer.on_epoch = partial(report_epoch, trainer, logs)
            trainer.train()
            finish(setup, trainer, data, safetensors=recording.safetensors)
            show(run, logs)


def is_cuda(device: str) -> bool:
    """Return True if the device of that name, which may be auto, is a CUDA device."""
    with utils.importing():
        return utils.choose_device(device, use=False).type == "cuda"


def _terminate(number: int, _frame: object) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number, "")


if __name__ == "__main__":
    run()
