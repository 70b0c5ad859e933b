"""Write predictions to files as they come, and sum them up for the terminal.

Memory does not grow with the number of files, and a stopped prediction keeps its rows.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ampscope.text import end_of
from commands.submission import Submission
from images.inputs import Item
from runs.writing import PROBABILITIES, class_columns
from system.files import as_cell, json_text
from utils import UserError, amount, log, printable

NONE = "none of these"
SHOWN = 50  # lines on the terminal; files hold all
FOLDERS = 20  # subfolders summed up on the terminal
SHEET = 60  # images on the contact sheet


@dataclass
class Table:
    """The predictions: written to files as they come; kept are the first lines, counts, and a few for the sheet."""

    classes: list[str]
    top_k: int
    sheet: str | None = None
    samples: bool = False  # keep a few images, for a sheet
    submission: Submission | None = None
    live: bool = False  # print each answer when it comes
    least: float | None = None  # an image whose likeliest class is below this probability gets NONE as its class
    count: int = 0
    unreadable: int = 0
    overflowed: int = 0  # whose logits are not finite
    lines: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    folders: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    on_sheet: list[tuple[Path, str]] = field(default_factory=list)
    stride: int = 1  # of the images that are kept for the sheet
    _csv: IO[str] | None = None
    _json: IO[str] | None = None

    def open(self, opened: ExitStack, csv_file: str | None, json_file: str | None) -> None:
        """Begin the files; `opened` closes them, and ends the JSON, however the prediction ends."""
        if csv_file:
            self._csv = opened.enter_context(_begun(csv_file))
            header = ["path", "folder", "predicted", "confidence"]
            csv.writer(self._csv).writerow([*header, *(class_columns(self.classes) if self._with_all else [])])
        if json_file:
            self._json = opened.enter_context(_begun(json_file))
            self._json.write("[")
            opened.callback(self._json.write, "\n]\n")

    def add(self, items: list[Item], shares: np.ndarray) -> None:
        """Write and count a batch; `shares` (count, classes) are probabilities."""
        for item, share in zip(items, shares, strict=True):
            row = self._row(item, share)
            best = row["top"][0]
            name = NONE if row.get("refused") else best["class"]
            if self._csv:
                names = map(as_cell, (row["path"], row["folder"], name))
                others = row["probabilities"].values() if self._with_all else []
                csv.writer(self._csv).writerow([*names, best["probability"], *others])
            if self.submission:
                self.submission.add(item.path, share)
            if self._json:
                self._json.write((",\n" if self.count else "\n") + json_text(row))
            top = [f"{printable(entry['class'])} {100 * entry['probability']:.1f}%" for entry in row["top"]]
            self._show(item, "  ".join([f"{NONE}:", *top] if row.get("refused") else top))
            if self.samples and self.count % self.stride == 0:
                self._keep_for_sheet(item.path, f"{name} {100 * best['probability']:.0f}%")
            self.counts[name] += 1
            if item.folder in self.folders or len(self.folders) <= FOLDERS:
                self.folders[item.folder][name] += 1
            self.count += 1
        for file in (self._csv, self._json):
            if file:
                file.flush()

    def _show(self, item: Item, answer: str) -> None:
        """Print an answer at once, or keep it among the first ones."""
        if self.live:
            print(f"{printable(item.path)}  {answer}", flush=True)
        elif len(self.lines) < SHOWN:
            self.lines.append((end_of(printable(item.path), 40), answer))

    def add_unreadable(self, found: list[tuple[Item, str]]) -> None:
        for item, reason in found:
            self.unreadable += 1
            if self.live:
                self._show(item, f"cannot be read: {printable(reason)}")
            elif self.unreadable <= 10:
                log.warning(f"cannot be read, skipped: {printable(item.path)}: {printable(reason)}")

    def add_overflowed(self, items: list[Item]) -> None:
        for item in items:
            self.overflowed += 1
            if self.live:
                self._show(item, "no prediction, its logits are not finite")
            elif self.overflowed <= 10:
                log.warning(f"no prediction, its logits are not finite: {printable(item.path)}")

    def report(self) -> None:
        """Draw the sheet and print the first lines and the counts. Raise UserError if no image could be read."""
        if self.unreadable > 10 and not self.live:
            log.warning(f"and {self.unreadable - 10:,} more cannot be read")
        if self.overflowed > 10 and not self.live:
            log.warning(f"and {self.overflowed - 10:,} more have no prediction")
        if not self.count + self.overflowed + self.unreadable:
            raise UserError("no image was named: the list, or standard input, is empty.")
        if not self.count + self.overflowed:
            raise UserError("none of the images can be read.")
        if not self.count:
            return
        if self.sheet:
            from reports.sheets import labelled_sheet

            paths, captions = zip(*self.on_sheet, strict=True)
            labelled_sheet(list(paths), list(captions), Path(self.sheet), most=SHEET)
        width = max((len(name) for name, _ in self.lines), default=0)
        for name, top in self.lines:
            print(f"{name:<{width}}  {top}")
        if self.count > SHOWN and not self.live:
            print(f"and {self.count - SHOWN:,} more (--csv FILE or --json FILE keeps all)")
        if len(self.folders) > 1:
            for folder in sorted(self.folders)[:FOLDERS]:
                print(f"{printable(folder) or '.'}/: {_counted(self.folders[folder])}")
        print(_counted(self.counts))
        if not self._with_all and (self._csv or self._json):
            log.info(f"of {len(self.classes):,} classes --json holds the --top_k likeliest, --csv the likeliest")

    @property
    def _with_all(self) -> bool:
        """Return True if rows hold the probability of every class; of very many they hold the likeliest."""
        return len(self.classes) <= PROBABILITIES

    def _row(self, item: Item, share: np.ndarray) -> dict[str, Any]:
        best = np.argsort(-share, kind="stable")[: self.top_k]
        rounded = np.round(share, 6).tolist()
        row: dict[str, Any] = {
            "path": str(item.path),
            "folder": item.folder,
            "top": [{"class": self.classes[place], "probability": rounded[place]} for place in best],
        }
        if self.least is not None:
            row["refused"] = bool(share.max() < self.least)
        return row | ({"probabilities": dict(zip(self.classes, rounded, strict=True))} if self._with_all else {})

    def _keep_for_sheet(self, path: Path, caption: str) -> None:
        """Keep one image of `stride`; when twice as many as needed are kept, every other one goes."""
        self.on_sheet.append((path, caption))
        if len(self.on_sheet) >= 2 * SHEET:
            del self.on_sheet[1::2]
            self.stride *= 2


def _begun(file: str) -> IO[str]:
    try:
        return open(file, "w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be written ({error.strerror}).") from None


def _counted(counts: Counter[str]) -> str:
    shown = sorted(counts.items()) if len(counts) <= SHOWN else counts.most_common(SHOWN)
    summary = ", ".join(f"{count:,} as {printable(name)}" for name, count in shown)
    if len(counts) > SHOWN:
        summary += f" and {len(counts) - SHOWN:,} rarer classes"
    return f"{amount(counts.total(), 'image', 'images')}: {summary}"
