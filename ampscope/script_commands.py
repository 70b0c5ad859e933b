"""`run` and `watch`: the verbs that take somebody's program as it is."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ampscope.observed import observed
from ampscope.running import Ended, Outcome, Program, show_traceback
from ampscope.script_report import ScriptReport, nothing_traced, script_report, uses_amp
from ampscope.script_trace import ScriptTrace
from ampscope.script_watch import ScriptWatch
from ampscope.trial import will_it_pay
from ampscope.updates import Updates


def run_parser(name: str = "ampscope run") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [options] SCRIPT.py [its arguments]\n       {name} [options] -m MODULE [its arguments]",
        description="Run a training program as it is, trace one of its updates whole, print the report, and end.",
        allow_abbrev=False,
    )
    parser.add_argument("--update", type=int, default=3, metavar="N", help="trace the Nth update (3)")
    parser.add_argument("--out", metavar="DIR", help="also write inspect.json, pictures and inspect.html there")
    parser.add_argument("--full", action="store_true", help="list every operator of every module")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a rule is broken")
    parser.add_argument("--go-on", action="store_true", help="let the program continue after the report")
    parser.add_argument("--no-payoff", action="store_true", help="do not start the program twice more to time it")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.Namespace, Program]:
    """Return the tool's own options, and the program with its arguments: everything after its name."""
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module by its name, as python -m")
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    module = options.module is not None
    given = options.module if module else options.words[options.words[:1] == ["--"] :]
    if not given:
        parser.error("name the program to run: SCRIPT.py or -m MODULE.")
    program = Program(given[0], given[1:], module)
    if not module and not Path(program.name).exists():
        parser.error(f"there is no file {program.name}.")
    return options, program


def run(words: Sequence[str]) -> int:
    """Trace one update of a program; return the exit status."""
    parser = run_parser()
    options, program = parse(parser, words)
    if options.update < 1:
        parser.error("--update: updates are counted from 1.")
    if os.environ.get("RANK", "0") != "0":
        return follow(program, options.update, go_on=options.go_on)
    reports: list[ScriptReport] = []

    def show(seen: ScriptTrace, pay: dict[str, Any] | None = None) -> None:
        report = script_report(seen, program.command, pay)
        reports.append(report)
        print(report.text(full=options.full), flush=True)
        if options.out is not None:
            report.write(options.out)

    started = time.perf_counter()
    seen, outcome = trace(program, options.update, finished=show if options.go_on else None)
    if outcome.error is not None:
        show_traceback(outcome.error)
    if seen.trace is None:
        print(f"ampscope: {nothing_traced(seen.updates, options.update)}", file=sys.stderr)
        return outcome.status or 2
    if not reports:
        pay = None
        if seen.whole and not options.no_payoff and "WORLD_SIZE" not in os.environ:
            pay = will_it_pay(program, amp=uses_amp(seen), started=started)
        show(seen, pay)
    broken = options.strict and not reports[0].ok
    return outcome.status or int(broken)


def watch(words: Sequence[str]) -> int:
    """Let a program run to its end, with a line for each update; return the program's exit status."""
    parser = argparse.ArgumentParser(
        prog="ampscope watch",
        usage="ampscope watch [options] SCRIPT.py [its arguments]\n"
        "       ampscope watch [options] -m MODULE [its arguments]",
        description="Run a training program to its end, note each update, and say which went wrong, where and why.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="diary.jsonl", metavar="FILE", help="file of the lines (diary.jsonl)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="write a line for every N updates (1)")
    options, program = parse(parser, words)
    if options.every < 1:
        parser.error("--every: a line is for one update or more.")
    first = os.environ.get("RANK", "0") == "0"
    try:
        watcher = ScriptWatch(Path(options.out if first else os.devnull), options.every)
    except OSError as error:
        parser.error(f"{options.out} cannot be written ({error.strerror}).")
    with watcher:
        outcome = program.run()
    if outcome.error is not None:
        show_traceback(outcome.error)
    if not watcher.updates.count:
        print(f"ampscope: {nothing_traced(watcher.updates, 1)}", file=sys.stderr)
    elif first:
        print(f"ampscope: {watcher.summary()}", file=sys.stderr)
    return outcome.status


def trace(
    program: Program, number: int, *, finished: Callable[[ScriptTrace], None] | None = None
) -> tuple[ScriptTrace, Outcome]:
    """Run a program until its update `number` and the one after it were seen.

    With `finished` the program goes on to its end; the function is called as soon as the update was seen.
    """
    seen = ScriptTrace(number, finished)
    with observed(), seen:
        outcome = program.run()
        if not seen.done:
            seen.failed(outcome.error)
    return seen, outcome


def follow(program: Program, number: int, *, go_on: bool) -> int:
    """Count the updates of a rank that is not the first one, and end where the first one does."""

    def at_end(updates: Updates) -> None:
        if updates.count > number and not go_on:
            raise Ended

    with Updates(at_end, modules=False):
        outcome = program.run()
    if outcome.error is not None:
        show_traceback(outcome.error)
    return outcome.status
