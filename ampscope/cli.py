"""The command `ampscope`: run and watch a program as it is, or inspect one step."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ampscope import __version__
from ampscope.errors import InspectError

USAGE = f"""ampscope {__version__}: what mixed precision does in a PyTorch training

ampscope run SCRIPT.py [its arguments]      trace one update of a program as it is, and report
ampscope watch SCRIPT.py [its arguments]    let a program run to its end, and note each update
ampscope inspect FILE.py:make               inspect one step that make() returns: (model, batch, loss)

ampscope VERB --help lists the options of a verb."""


def inspect(words: Sequence[str]) -> int:
    """Inspect the step that a function of a file makes; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ampscope inspect",
        description="Inspect one training step. make() returns (model, batch, loss) with loss(outputs, batch), or "
        "(model, batch, step) with step(model, batch).",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="FILE.py:make")
    parser.add_argument("--device", help="move models and batch there (default: leave them where make() put them)")
    parser.add_argument("--precisions", type=lambda text: text.split(","), help="such as fp32,amp-bf16")
    parser.add_argument("--diary", metavar="FILE", help="draw the loss scale from this file, which watch wrote")
    parser.add_argument("--out", default="inspect", metavar="DIR", help="folder for JSON, pictures and page (inspect)")
    parser.add_argument("--full", action="store_true", help="list every operator")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a rule is broken")
    parser.add_argument("--layers", action="store_true", help="show the error of each layer in place of the report")
    parser.add_argument("--find_layers", action="store_true", help="also search for the layers to keep in float32")
    options = parser.parse_args(words)

    import torch

    from ampscope.module import broken_rules, inspect_module, layers_of_module, show, show_layers

    device = torch.device(options.device) if options.device else None
    if options.layers or options.find_layers:
        find = options.find_layers
        show_layers(
            layers_of_module(options.target, device=device, precisions=options.precisions, find=find), options.out
        )
        return 0
    report = inspect_module(options.target, device=device, precisions=options.precisions, diary=options.diary)
    show(report, out=options.out, full=options.full)
    if options.strict and not report.ok:
        print(f"error: {broken_rules(report)}", file=sys.stderr)
        return 1
    return 0


def run(words: Sequence[str]) -> int:
    """Trace one update of a program; return the exit status."""
    from ampscope import script_commands

    return script_commands.run(words)


def watch(words: Sequence[str]) -> int:
    """Let a program run to its end and note each update; return its exit status."""
    from ampscope import script_commands

    return script_commands.watch(words)


VERBS = {"run": run, "watch": watch, "inspect": inspect}


def main(words: Sequence[str] | None = None) -> int:
    """Do what a command line says; return the exit status: 2 for a wrong word, 1 for a broken rule with --strict."""
    words = sys.argv[1:] if words is None else words
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its allocator warns of each profile that begins
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ampscope {__version__}")
        return 0
    if words[0] not in VERBS:
        print(f"error: there is no verb {words[0]!r}: choose from {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        return VERBS[words[0]](words[1:])
    except InspectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
