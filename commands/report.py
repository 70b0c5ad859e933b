"""Draws the pictures and the page of a finished run again, from the files in its folder alone."""

from __future__ import annotations

from pathlib import Path

from reports.draw import draw_run
from utils import UserError, log, printable


def report(*, checkpoint_dir: str, checkpoint_name: str) -> None:
    """The command: for pictures that could not be drawn after the training, or were lost."""
    folder = Path(checkpoint_dir) / checkpoint_name
    if not checkpoint_name or not (folder / "result.json").exists():
        runs = sorted(path.parent.name for path in Path(checkpoint_dir).glob("*/result.json"))
        known = f"Finished runs there: {', '.join(map(printable, runs))}." if runs else "No run there is finished."
        raise UserError(f"{printable(folder)} is no finished run. Name one with --checkpoint_name. {known}")
    draw_run(folder)
    log.info(f"drawn: {folder}")
