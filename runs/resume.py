"""Whether a run may go on: what is there, and which options may differ."""

from __future__ import annotations

import shutil
from typing import Any

from runs.folder import RunDirectory
from utils import UserError, printable


def refuse_finished(run: RunDirectory) -> None:
    """Raises UserError where the folder holds a run already."""
    present = [name for name in ("result.json", "last.pt", "best_model.pt") if run.file(name).exists()]
    if present:
        kind = "finished" if "result.json" in present else "begun"
        way = "go on with --resume, " if kind == "begun" and "last.pt" in present else ""
        raise UserError(
            f"{printable(run.path)} holds a {kind} run.\n"
            f"Choose another --checkpoint_name, {way}or replace it with --overwrite."
        )


def remove_results(run: RunDirectory) -> None:
    """Removes what an earlier run of this name wrote, the files first that make it look finished."""
    if run.writes:
        for name in (
            "result.json",
            "failure.json",
            "last.pt",
            "best_model.pt",
            "metrics.jsonl",
            "metrics.csv",
            "predictions.csv",
            "learning_curve.png",
            "confusion_matrix.png",
            "mistakes.png",
            "reliability.png",
            "report.html",
            "parity.json",
        ):
            run.file(name).unlink(missing_ok=True)
        shutil.rmtree(run.file("tensorboard"), ignore_errors=True)  # two runs' events would be drawn as one


# Options that may differ between a run and its continuation: they do not change what is computed.
HARMLESS = frozenset(
    {
        "checkpoint_dir",
        "checkpoint_name",
        "config",
        "quiet",
        "demo",
        "num_workers",
        "cache",
        "log_interval",
        "resume",
        "overwrite",
        "checkpoint_every",
        "verify_resume",
        "tensorboard",
        "evaluate",
        "command",
        "data_dir",
        "device",
        "skip_unreadable",
        "precisions",
        "seeds",
        "report_only",
        "runs",
        "pretrained",
        "pretrained_path",
    }
)


def refuse_changed(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError naming every difference in options that would make another run of a resumed one."""
    changed = [
        f"  --{name}: begun with {stored[name]}, now {current[name]}"
        for name in sorted(stored.keys() & current.keys() - HARMLESS)
        if stored[name] != current[name]
    ]
    if changed:
        raise UserError(
            "\n".join(
                [
                    "--resume would change the run:",
                    *changed,
                    "Give the options it was begun with (--config its config.json), "
                    "or start another --checkpoint_name.",
                ]
            )
        )
