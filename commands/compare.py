"""Train once per precision and seed, each time in a fresh process, then write the performance table.

A fresh process has a clean allocator and cold caches, so no run inherits another's. The table is made from the files
that the runs wrote. Knows nothing of models or training.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.kinds import seconds_of
from command_line.parsing import parse, precision_words, training_words
from images.demo import draw_scenes
from images.labels import list_images
from option import MAY_DIFFER_IN_COMPARISON, SAME_TRAINING
from precision import named_precision, sensible_precisions
from precision_table import PRECISIONS
from reports import results, tables
from runs.config import read_config
from system.files import json_text, lock, remove, write_text
from system.parent import environment_of_child
from system.progress import Block
from system.terminal import duration, linked
from utils import (
    OUT_OF_TIME,
    STARTED,
    STOP_SIGNALS,
    RunError,
    Stopped,
    UserError,
    choose_device,
    importing,
    log,
    on_stop,
    open_page,
    own_command,
    printable,
    shows_bars,
    with_type,
)

if TYPE_CHECKING:
    from command_line.groups import Asked, Comparison


@dataclass(frozen=True)
class Planned:
    """One training of a comparison: `epochs` are those still to be trained, `state` is new, begun or finished."""

    folder: Path
    precision: str
    words: list[str]
    device: str
    state: str
    epochs: int


def compare(asked: Asked, own: Comparison) -> None:
    """Train once per precision and seed, each time in a fresh process, and print the performance table."""
    folder = Path(asked.place.checkpoint_dir) / (asked.place.checkpoint_name or "comparison")
    if not own.report_only and not own.runs:
        device = asked.computing.device
        max_time = asked.recording.max_time
        if asked.data.demo:
            draw_scenes(asked.data.data_dir, device)
        run_all(
            folder,
            own.precisions or sensible_precisions(choose_device(device, use=False)),
            [asked.model.seed + extra for extra in range(own.seeds)],
            training_words(asked.given.flat),
            float32_layers=asked.computing.float32_layers,
            overwrite=asked.place.overwrite,
            max_seconds=seconds_of(max_time) if max_time else None,
        )
    failed = report_runs([Path(run) for run in own.runs] if own.runs else run_folders(folder), folder)
    if own.open:
        open_page(folder / "report.html")
    if failed and not (own.report_only or own.runs):
        raise RunError(f"not all runs finished; the table shows the others. {'; '.join(failed)}.")


def run_all(
    folder: Path,
    precisions: list[str],
    seeds: list[int],
    words: list[str],
    *,
    float32_layers: str | None = None,
    overwrite: bool = False,
    max_seconds: int | None = None,
) -> None:
    """Train every precision with every seed below `folder`; keep runs that are finished with these options.

    With `float32_layers` train each 16-bit precision twice, the second time with these layers in float32. `words` are
    the training options that all runs share. A run that fails is recorded and leaves the others standing.
    Raise UserError before the first training if a folder holds a run with other options or there are no images,
    Stopped if a signal or `max_seconds` ended a run, and RunError at the end if a run that was to be replaced failed.
    """
    planned = []
    sides: list[tuple[str, str, list[str]]] = []
    for name in precisions:
        sides.append((name, name, precision_words(name)))
        if float32_layers and PRECISIONS[name].amp_dtype:
            sides.append((name, f"{name}-layers", [*precision_words(name), f"--float32_layers={float32_layers}"]))
    for seed, (name, place, own) in itertools.product(seeds, sides):
        run = folder / (place if seed == seeds[0] else f"{place}-seed{seed}")  # the same with more seeds later
        planned.append(plan(run, name, [*words, *own, f"--seed={seed}"], overwrite=overwrite))
    train_all(planned, max_seconds=max_seconds)


def plan(run: Path, precision: str, words: list[str], *, overwrite: bool) -> Planned:
    """Return the plan of a training in the folder `run`. Raise UserError if that holds a run with other options."""
    with contextlib.suppress(OSError), open(run / "lock", encoding="utf-8") as file:
        if not lock(file):  # the training of a comparison that was killed saves and ends
            log.info(f"{printable(run)} is still in use: waiting until its training has saved and ended")
            lock(file, wait=True)
    own = [*words, f"--checkpoint_dir={run.parent}", f"--checkpoint_name={run.name}"]
    options = vars(parse(own))
    state = "new" if overwrite else _state(run, options)
    done = {"new": 0, "begun": _epochs(run), "finished": options["epochs"]}[state]
    return Planned(run, precision, own, options["device"], state, options["epochs"] - done)


def train_all(planned: list[Planned], *, max_seconds: int | None = None) -> None:
    """Train the runs that are not finished, each in a fresh process. Raise as `run_all` does.

    Each run logs its own remaining time; the line before it logs that of all runs, from the second run on.
    """
    drawn = [run for run in planned if run.state != "finished"]
    block = Block(sum(run.epochs for run in drawn)) if drawn and shows_bars() else None
    try:
        _train_all(planned, max_seconds, block)
    finally:
        if block:
            block.close()


def _train_all(planned: list[Planned], max_seconds: int | None, block: Block | None) -> None:
    kept = []
    seconds = 0.0  # of the runs that this process has trained to their end
    done = 0  # their epochs
    for run in [run for run in planned if run.state != "finished"][:1]:
        options = vars(parse(run.words))  # fail once for a wrong data folder, not once in each run
        list_images(options["data_dir"], labels=options["labels"], group=options["group"])
    for number, run in enumerate(planned, 1):
        remark = ", already finished" if run.state == "finished" else ""
        left = sum(later.epochs for later in planned[number - 1 :] if later.state != "finished")
        if done and left and not remark:
            remark = f", about {duration(seconds / done * left)} left for all runs"
        title = f"run {number} of {len(planned)}: {run.folder.name}"
        if not block:
            log.info(f"\n{title}{remark}")
        elif run.state != "finished":
            block.begin(title)
        if run.state != "finished":
            remove(run.folder / "failure.json")  # an earlier attempt's
            earlier = _written(run.folder / "result.json")
            before = _epochs(run.folder) if run.state == "begun" else 0
            started = time.monotonic()
            reason = _train(run, max_seconds, block)
            if block:
                block.end(run.epochs)
            if not reason:
                seconds += time.monotonic() - started
                done += run.epochs - before
            now = _written(run.folder / "result.json")
            if reason and earlier and now == earlier:  # nothing was replaced
                kept.append(f"{run.folder.name} ({reason})")
            elif reason and now:  # it failed after its results were written, and has said why
                log.warning(f"{run.folder.name} is finished, but ended with {reason}")
            elif (
                reason and not (run.folder / "failure.json").exists()
            ):  # the reason that the training itself gave counts more
                run.folder.mkdir(parents=True, exist_ok=True)
                failure = {"precision": run.precision, "reason": reason}
                write_text(run.folder / "failure.json", json_text(failure))
    if kept:
        raise RunError(
            f"these runs are still those of an earlier comparison, because the new ones failed: {', '.join(kept)}."
        )


def _train(run: Planned, max_seconds: int | None, block: Block | None) -> str | None:
    """Run one training in a process; return the reason if it failed."""
    try:
        named_precision(run.precision, choose_device(run.device, use=False))
    except UserError as error:
        log.info(str(error))
        return str(error).splitlines()[0]
    words = [*run.words, "--resume=auto" if run.state == "begun" else "--overwrite"]
    if max_seconds is not None:
        words.append(f"--max_time={max(1, round(max_seconds - (time.monotonic() - STARTED)))}s")
    status = _process(words, block)
    if status == OUT_OF_TIME or status - 128 in STOP_SIGNALS:
        raise Stopped(
            None if status == OUT_OF_TIME else status - 128,
            f"comparison stopped in {run.folder.name}; the same command, without --overwrite, goes on from there.",
        )
    if status > 128:
        return ended_by(status - 128)
    return f"exit status {status}" if status else None


def ended_by(number: int) -> str:
    """Return the sentence that a signal ended a training; for SIGKILL also the options that need less memory.

    These options do not change the training, so that the run is resumed and finished runs are kept.
    """
    if number != getattr(signal, "SIGKILL", None):
        return f"ended by signal {number}"
    return (
        f"ended by signal {number}, as systems do when memory runs out (dmesg says if so): the same command with "
        "--cache none --num_workers 1 goes on, or begin all anew with a smaller --batch_size"
    )


def _state(run: Path, options: dict[str, Any]) -> str:
    """Return new, begun or finished. Raise UserError if the folder holds a run with other options."""
    if not (run / "config.json").exists():
        return "new"
    stored = read_config(run / "config.json")["options"]
    changed = [
        f"  --{name}: {printable(stored[name])}, now {printable(options[name])}"
        for name in sorted(stored.keys() & options.keys() - SAME_TRAINING)
        if stored[name] != options[name]
    ]
    if changed:
        raise UserError(
            "\n".join(
                [
                    f"{printable(run)} was run with other options:",
                    *changed,
                    "Choose another --checkpoint_name, or replace it with --overwrite.",
                ]
            )
        )
    return "finished" if (run / "result.json").exists() else "begun" if (run / "last.pt").exists() else "new"


def _written(file: Path) -> int | None:
    """Return the time when a file was last written, in nanoseconds; None if it does not exist."""
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns
    return None


def _epochs(run: Path) -> int:
    """Return the number of epochs in metrics.jsonl."""
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _process(words: list[str], block: Block | None) -> int:
    """Run one training in a process and a session of its own, hand signals on, and return its exit status.

    It ends by itself if this process is killed. Its output is this process's, or what a block draws.
    """
    sys.stdout.flush()
    command = [*own_command(), "train", *words]
    options: dict[str, Any] = {"start_new_session": True, "env": environment_of_child(draws=block is not None)}
    if block:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    child = subprocess.Popen(command, **options)
    reader = threading.Thread(target=block.follow, args=(child.stdout,), daemon=True) if block else None
    if reader:
        reader.start()
    # On Windows the console sends the signal to the child as well.
    hand_on = (lambda number, _: None) if os.name == "nt" else (lambda number, _: child.send_signal(number))
    previous = on_stop(hand_on)
    try:
        status = child.wait()
        if reader:
            reader.join(2)  # a worker that outlives the training keeps the pipe open
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs directly below `folder`, in the order of their names."""
    return sorted({file.parent for name in ("config.json", "failure.json") for file in folder.glob(f"*/{name}")})


def report_runs(directories: list[Path], folder: Path) -> list[str]:
    """Write the table, its pictures and a page into `folder`, print the table, and return the runs that failed.

    A directory is a run, or holds runs. Raise UserError if a directory holds no run, RunError if no run is finished or
    the pictures cannot be drawn.
    """
    runs = [results.read_run(run) for directory in directories for run in run_folders(directory) or [directory]]
    if not runs:
        raise UserError(f"{printable(folder)} holds no run. Run compare first, or name folders with --runs.")
    folder.mkdir(parents=True, exist_ok=True)
    comparison = results.compare_runs(runs, MAY_DIFFER_IN_COMPARISON)
    write_text(folder / "performance_table.md", tables.performance_table(comparison))
    write_text(folder / "comparison.json", json_text(comparison, indent=1))
    try:
        if any(run["result"] for run in runs):
            _draw(runs, comparison, folder)
            print(f"\nresults: {linked(str(folder), folder / 'report.html')}")
        else:
            raise RunError("no run of the comparison finished; the reasons are in the table.")
    finally:
        print("\n" + tables.terminal_table(comparison))
    return [f"{run['directory'].name}: {run['failure'] or 'not finished'}" for run in runs if not run["result"]]


def _draw(runs: list[dict[str, Any]], comparison: dict[str, Any], folder: Path) -> None:
    """Write comparison.png, reliability.png and report.html. Raise RunError if that fails."""
    rows = [row for row in comparison["rows"] if row["runs"]]
    first = [next(run for run in runs if run["result"] and run["label"] == row["label"]) for row in rows]
    try:
        with importing():
            from reports import page, pictures

        pictures.comparison_picture(runs, comparison, folder / "comparison.png")
        pictures.reliability_curve(first, folder / "reliability.png")
        page.html_comparison(runs, comparison, folder / "report.html")
    except Exception as error:  # matplotlib, its fonts and its caches raise nearly every type
        raise RunError(
            f"the table is in {printable(folder)}, but the pictures could not be drawn ({with_type(error)}).\n"
            "Once that is fixed: the same command with --report_only"
        ) from None
