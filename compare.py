"""The comparison: one training per precision, each in a fresh process, then the performance table.

A fresh process has a clean allocator and cold caches, so no run inherits another's. Results are files: the
table is drawn from what the runs wrote. Knows nothing of models or training.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import html_report
import report
import results
from run import refuse_changed
from utils import RunError, Stopped, UserError, printable

FLAGS = {
    "fp32": ["--no-amp", "--no-tf32"],
    "tf32": ["--no-amp", "--tf32"],
    "amp-fp16": ["--amp", "--amp_dtype=float16"],
    "amp-bf16": ["--amp", "--amp_dtype=bfloat16"],
}


def run_all(
    folder: Path, precisions: list[str], seeds: list[int], words: list[str], log: Callable[[str], None], *,
    parse: Callable[[list[str]], dict[str, Any]], overwrite: bool = False,
) -> None:
    """Trains every precision with every seed below `folder`; what is finished with these options is kept.

    `words` are the training options that all runs share, `parse` turns a command line into its options. A run
    that fails is recorded and leaves the others standing. Raises Stopped when a signal ended one.
    """
    planned = [(seed, name) for seed in seeds for name in precisions]
    spent: list[float] = []
    for number, (seed, name) in enumerate(planned, 1):
        run = folder / (name if len(seeds) == 1 else f"{name}-seed{seed}")
        own = [*words, *FLAGS[name], f"--seed={seed}", f"--checkpoint_dir={folder}", f"--checkpoint_name={run.name}"]
        state = "new" if overwrite else _state(run, parse(own))
        left = f"; about {_minutes(sum(spent) / len(spent) * (len(planned) - number + 1))} left" if spent else ""
        title = f"run {number} of {len(planned)}: {name}, seed {seed}"
        if state == "finished":
            log(f"{title}: already finished with these options")
            continue
        log(f"\n{title}{left}")
        started = time.monotonic()
        status = _train([*own, "--overwrite" if state == "new" else "--resume=auto"])
        spent.append(time.monotonic() - started)
        if status in (130, 143):
            raise Stopped(status - 128, f"comparison stopped in {name}; the same command goes on from there.")
        if status:
            _record_failure(run, name, status)


def _state(run: Path, options: dict[str, Any]) -> str:
    """`new`, `begun` or `finished`. Raises UserError where the folder holds a run with other options."""
    try:
        stored = results.read_json(run / "config.json")["options"]
    except (ValueError, KeyError):
        return "new"
    try:
        refuse_changed(stored, options)
    except UserError as error:
        changes = "\n".join(str(error).splitlines()[1:-1])
        raise UserError(
            f"{printable(run)} was run with other options:\n{changes}\n"
            "Choose another --checkpoint_name, or replace it with --overwrite."
        ) from None
    if (run / "result.json").exists():
        return "finished"
    return "begun" if (run / "last.pt").exists() else "new"


def _train(words: list[str]) -> int:
    """Runs one training in a process and a session of its own; hands signals on once and waits for it."""
    command = [sys.executable, str(Path(__file__).with_name("main.py")), "train", *words]
    child = subprocess.Popen(command, start_new_session=True)
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda number, _frame: child.send_signal(number))
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _record_failure(run: Path, name: str, status: int) -> None:
    """Where the training itself could not say why it failed, its exit status has to do."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "failure.json").exists():
        reason = f"ended by signal {status - 128}" if status > 128 else f"exit status {status}"
        results.write_atomically(run / "failure.json", json.dumps({"precision": name, "reason": reason}))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def run_folders(folder: Path) -> list[Path]:
    """The finished and failed runs directly below `folder`."""
    found = {file.parent for name in ("result.json", "failure.json") for file in folder.glob(f"*/{name}")}
    return sorted(found, key=lambda path: [list(FLAGS).index(n) for n in FLAGS if path.name.startswith(n)] or [9])


def report_runs(directories: list[Path], folder: Path) -> None:
    """Writes performance_table.md, comparison.json, comparison.png and report.html; prints the table.

    Raises UserError where a folder holds no run, RunError where every run failed.
    """
    if not directories:
        raise UserError(f"{printable(folder)} holds no finished run. Run compare first, or name folders with --runs.")
    try:
        runs = [results.read_run(directory) for directory in directories]
    except ValueError as error:
        raise UserError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    comparison = results.compare_runs(runs)
    table = results.performance_table(comparison)
    results.write_atomically(folder / "performance_table.md", table)
    results.write_atomically(folder / "comparison.json", json.dumps(comparison, indent=1))
    print(results.terminal_table(comparison))
    finished = [run for run in runs if run["result"]]
    if not finished:
        raise RunError("every run of the comparison failed; the reasons are in the table.")
    report.comparison_picture(runs, comparison, folder / "comparison.png")
    report.reliability_curve(finished, folder / "reliability.png")
    html_report.html_comparison(folder, runs, comparison, folder / "report.html")
    print(f"\nresults: {folder}")
