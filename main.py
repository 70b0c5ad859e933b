"""The command line: parse, dispatch, train, say in words what went wrong, close.

Below this file and assemble.py every function takes plain keywords. torch is imported by the command that needs
it, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import utils
from command_line import idle
from command_line.parsing import parse
from distributed import Ranks
from system import meeting
from system.machine import NO_THREAD, allow_more_files
from system.parent import end_with_parent
from system.terminal import open_streams
from utils import RunError, Stopped, UserError, printable

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from assemble import Setup


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
        utils.start_logging(quiet=getattr(options, "quiet", False))
        for sentence in idle.said(options.command, options.typed, vars(options), processes=ranks.size):
            utils.log.warning(sentence)
        # Memory and files before torch allocates; signals before join, so that Ctrl-C ends the wait for other ranks.
        utils.keep_freed_memory()
        allow_more_files()
        utils.on_stop(_terminate)
        meeting.join(ranks)
        with utils.importing():
            function = entry(options.command)
        call(function, options, ranks)
        return 0
    except (Exception, KeyboardInterrupt, Stopped) as error:
        status, reason = explain(error, options)
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


def entry(command: str) -> Callable[..., None]:
    """Return the function that does a command; its keyword-only parameters are names of options."""
    if command == "train":
        return train
    module = importlib.import_module(f"commands.{command}")
    return getattr(module, "evaluate_run" if command == "evaluate" else command)


def call(function: Callable[..., None], options: Namespace, ranks: Ranks) -> None:
    """Call a command with the options that it names, and with the Setup if it asks for one."""
    names = inspect.signature(function).parameters
    values: dict[str, Any] = {name: getattr(options, name) for name in names if name != "setup"}
    if "setup" in names:
        with utils.importing():
            from assemble import Setup

        values["setup"] = Setup(options, ranks)
    function(**values)


def train(setup: Setup) -> None:
    """Train, test the best epoch once, and write the run's results. Its steps are in commands/train.py."""
    from commands.train import announce, begin_or_resume, finish, opened, opened_logs, report_epoch, show
    from runs.resume import find_earlier

    asked = setup.asked
    place = asked.place
    recording = asked.recording
    announce(setup, model=asked.model.model, logs=recording.logs, safetensors=recording.safetensors)
    with opened(setup, partial(explain, options=Namespace(**asked.flat))) as run:
        search = partial(find_earlier, run, asked.flat, resume=place.resume, overwrite=place.overwrite)
        earlier = setup.ranks.share(lambda: search(config=place.config))  # the other ranks may not see the folder
        started_from = asked.typed & {"pretrained", "pretrained_path", "weights"}
        if earlier.resuming and started_from:
            utils.log.warning(idle.no_effect(started_from, "the run goes on from its last.pt"))
        data = setup.data(resuming=earlier.resuming)
        trainer = setup.trainer(data, run, resumed=earlier.config if earlier.resuming else None)
        begin_or_resume(setup, trainer, data, earlier)
        with opened_logs(recording.logs, trainer, asked.flat) as logs:
            trainer.on_epoch = partial(report_epoch, trainer, logs)
            trainer.train()
            finish(setup, trainer, data, safetensors=recording.safetensors)
            show(run, logs)


def is_cuda(device: str) -> bool:
    """Return True if the device of that name, which may be auto, is a CUDA device."""
    with utils.importing():
        return utils.choose_device(device, use=False).type == "cuda"


def explain(error: BaseException, options: Namespace) -> tuple[int, str]:
    """Return exit status and reason of a failure; no reason if it can only be a defect of this program."""
    text = str(error)
    if isinstance(error, Stopped):
        return error.exit_status, text or f"stopped by {signal.Signals(error.exit_status - 128).name}{_kept(options)}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted{_kept(options)}"
    if isinstance(error, (UserError, RunError)):
        return 2 if isinstance(error, UserError) else 1, text
    if "DataLoader timed out" in text:
        return 1, (
            "no batch came from the loading workers in a quarter of an hour: does the disk that holds the images still "
            f"answer? --num_workers 0 does without the workers{_kept(options)}."
        )
    if "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):  # in the middle of a message, too
        reason = text.splitlines()[0] if text else "it gave no reason"
        workers = getattr(options, "num_workers", None)
        fewer = "--num_workers 0, which loads without workers" if workers == 1 else "fewer --num_workers"
        ran_out = f"Usually the machine ran out of memory: use {fewer}{_kept(options)}."
        return 1, f"a data loading worker died: {reason}\n{ran_out}"
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return 1, "too many open files: raise the limit (ulimit -n 1024), or use fewer --num_workers."
    if NO_THREAD in text or getattr(error, "errno", None) == errno.EAGAIN:
        return 1, (
            "no more threads or processes can be started: raise the limit (ulimit -u, or a container's limit of pids), "
            "or use fewer --num_workers."
        )
    if isinstance(error, OSError):
        return 1, f"{printable(error.filename)}: {error.strerror}" if error.filename else error.strerror or text
    if isinstance(error, MemoryError) or utils.is_out_of_memory(error):
        return 1, _memory_advice(options)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"--compile does not work here: {' '.join(text.split())[:200]}\nLeave out {_compiling(options)}."
    return 1, _of_other_processes(error)


def _of_other_processes(error: BaseException) -> str:
    """What an error says of the other processes of a job; nothing if there are none, or if it says nothing of them."""
    return (meeting.in_words(error) or "") if (os.environ.get("WORLD_SIZE") or "1") != "1" else ""


def _kept(options: Namespace) -> str:
    """What an end before its time leaves to go on from, in words that follow a clause."""
    if options.command == "train":
        return "; what was saved before can go on with --resume"
    if options.command in ("compare", "audit"):
        return "; the same command, without --overwrite, goes on from what was saved"
    return ""


def _compiling(options: Namespace) -> str:
    """The options of this command that compile."""
    return " and ".join(f"--{name}" for name in ("compile", "cuda_graphs") if getattr(options, name, False))


def _memory_advice(options: Namespace) -> str:
    """Where memory ran out, and an option that can help there."""
    get: Callable[..., Any] = vars(options).get
    batch = get("batch_size")
    accumulate = get("accumulate") or 1
    if options.command != "train":
        at = f" at --batch_size {batch}" if batch else ""
        way = "use another --device, or close other programs" if batch == 1 else "use a smaller --batch_size"
        return f"out of memory{at}: {way}."
    if isinstance(batch, str):
        return f"out of memory at --batch_size {batch}: name --batch_size and an --accumulate larger than it chose."
    whole = get("cuda_graphs") or get("sync_batchnorm")  # which take no micro-batches
    if batch >= 2 * accumulate and not whole:
        way = f"--accumulate {accumulate * 2} computes it in smaller micro-batches"
    else:
        way = "use a smaller --batch_size" if whole and batch > 1 else "use a smaller --image_size"
    less = "" if get("amp") else f"; --amp needs less, too{', in place of --tf32' if get('tf32') else ''}"
    return f"out of memory at --batch_size {batch} --accumulate {accumulate}: {way}{less}."


def _terminate(number: int, _frame: object) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number, "")


if __name__ == "__main__":
    run()
