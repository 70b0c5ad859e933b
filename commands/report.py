"""Draw the pictures and the page of a finished run again, from the files in its folder alone."""

from __future__ import annotations

from pathlib import Path

from command_line.groups import Redrawing
from reports.draw import draw_run
from runs.config import known_runs
from system.terminal import linked
from utils import UserError, log, open_page, printable


def report(place: Redrawing) -> None:
    """Draw the pictures and the page of a run that has a result. Raise UserError if the run is not finished."""
    folder = Path(place.checkpoint_dir) / place.checkpoint_name
    if not place.checkpoint_name or not (folder / "result.json").exists():
        raise UserError(f"{printable(folder)} is not a finished run. {known_runs(place.checkpoint_dir, 'result.json')}")
    draw_run(folder)
    log.info(f"drawn: {linked(str(folder), folder / 'report.html')}")
    if place.open:
        open_page(folder / "report.html")
