"""Prediction on image files and folders: top classes with probabilities, as text, CSV, JSON, contact sheet.

Files are decoded by threads while the model works; what cannot be read is reported and skipped. Rows are written as
they come, so memory does not grow with the number of files, and a stopped prediction keeps what it has.
"""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ampscope.text import end_of
from command_line.kinds import images_asked
from commands.explain import explain_predictions
from evaluate import probabilities, way_out
from images.decode import Rules, ahead, try_decode
from images.lookup import Index
from images.walk import counted, find_images
from precision import Precision
from runs.writing import PROBABILITIES, class_columns
from system.files import as_cell, json_text, refuse_missing_folders
from system.machine import cores, images_at_once
from transforms import Preprocess
from utils import RunError, Stopped, UserError, amount, log, printable, progress

if TYPE_CHECKING:
    from assemble import Setup
    from command_line.groups import Prediction

SHOWN = 50  # lines on the terminal; files hold all
FOLDERS = 20  # subfolders summed up on the terminal
SHEET = 60  # images on the contact sheet


def predict(setup: Setup, own: Prediction) -> None:
    """Classify files and folders with a trained run."""
    refuse_missing_folders(own.csv, own.json, own.contact_sheet, own.explain)
    checkpoint = setup.checkpoint
    asked = setup.asked
    predict_files(
        setup.trained(checkpoint),
        checkpoint["classes"],
        own,
        preprocess=setup.preprocess,
        precision=setup.precision,
        rules=setup.rules,
        batch_size=images_at_once(images_asked(asked.training.batch_size), setup.device),
        workers=min(8, cores()) if asked.data.num_workers is None else asked.data.num_workers,
    )


@dataclass(frozen=True)
class Item:
    """A file to classify, and the subfolder of the input folder in which it was found ("" in that folder itself)."""

    path: Path
    folder: str = ""


def predict_files(
    model: nn.Module,
    classes: list[str],
    own: Prediction,
    *,
    preprocess: Preprocess,
    precision: Precision,
    rules: Rules | None = None,
    batch_size: int,
    workers: int,
) -> int:
    """Classify every image named or found in `own.inputs`; write a row for each readable one and return their number.

    Raise UserError if an input does not exist or no image is readable, RunError at the end if some are not or have
    logits that are not finite, Stopped if a signal ended it.
    """
    _refuse_missing(own.inputs)
    table = Table(classes, own.top_k, sheet=own.contact_sheet, samples=bool(own.contact_sheet or own.explain))
    pool = ThreadPoolExecutor(max(1, workers))
    bar = progress(desc="predicting", unit="image", delay=2)
    try:
        with ExitStack() as opened, bar, torch.inference_mode():
            table.open(opened, own.csv, own.json)
            limit = preprocess.image_size
            items = ahead(
                pool, lambda item: (item, try_decode(item.path, limit, rules)), _listed(own.inputs), 2 * batch_size
            )
            while batch := list(islice(items, batch_size)):
                _classify(batch, model, preprocess, precision, table)
                bar.update(len(batch))
    except (KeyboardInterrupt, Stopped) as error:
        file = own.csv or own.json
        where = f", which are in {printable(file)}" if file else ""
        status = error.exit_status - 128 if isinstance(error, Stopped) else 2
        raise Stopped(status, f"stopped after {amount(table.count, 'prediction', 'predictions')}{where}") from None
    finally:
        pool.shutdown(cancel_futures=True)
    table.report()
    if own.explain and table.count:
        explain_predictions(model, table.on_sheet, preprocess, rules, Path(own.explain))
    total = table.count + table.unreadable + table.overflowed
    failed = []
    if table.unreadable:
        failed.append(f"{table.unreadable:,} of {total:,} files could not be read; the others are classified.")
    if table.overflowed:
        failed.append(
            f"{table.overflowed:,} of {total:,} files have no prediction: their logits are not finite in "
            f"{precision.label}. {way_out(precision)}"
        )
    if failed:
        raise RunError("\n".join(failed))
    return table.count


def _classify(
    batch: list[tuple[Item, Any]], model: nn.Module, preprocess: Preprocess, precision: Precision, table: Table
) -> None:
    """Puts a batch into the table; each item has its image, or in words why it cannot be read."""
    table.add_unreadable([(item, image) for item, image in batch if isinstance(image, str)])
    good = [(item, image) for item, image in batch if not isinstance(image, str)]
    if not good:
        return
    with precision.autocast():
        logits = model(preprocess(*_boxed([image for _, image in good], preprocess.device)))
    found = logits.float().cpu().numpy()
    finite = np.isfinite(found).all(1)
    table.add([item for (item, _), fine in zip(good, finite, strict=True) if fine], probabilities(found[finite]))
    table.add_overflowed([item for (item, _), fine in zip(good, finite, strict=True) if not fine])


def _boxed(images: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """Images as one uint8 tensor on the device, each in the upper left corner, and their shapes."""
    shapes = np.array([image.shape[:2] for image in images])
    height, width = shapes.max(0)
    boxed = np.zeros((len(images), height, width, 3), np.uint8)
    for place, image in enumerate(images):
        boxed[place, : image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(boxed).to(device), shapes


def _refuse_missing(inputs: list[str]) -> None:
    """Raises UserError for what is not there, before the work."""
    if "-" in inputs and (sys.stdin is None or sys.stdin.closed):
        raise UserError("- reads paths from standard input, which is closed: pipe paths into it, or name files.")
    for name in inputs:
        path = Path(name)
        if name == "-" or (name.startswith("@") and Path(name[1:]).is_file()):
            continue
        if not path.exists():
            raise UserError(f"{printable(name.removeprefix('@'))} does not exist.")
        if path.is_dir() and next(find_images(path), None) is None:
            raise UserError(f"{printable(name)} holds no image.")


def _listed(inputs: list[str]) -> Iterator[Item]:
    """The files of all inputs: a file, a folder, `@FILE` with one path on each line, or `-` for such lines on stdin."""
    passed_over: Counter[str] = Counter()
    for name in inputs:
        if name == "-":
            lines = _lines_of(sys.stdin.buffer) if hasattr(sys.stdin, "buffer") else sys.stdin
            yield from _of_lines(lines, Path("."), passed_over)
        elif name.startswith("@") and not Path(name).exists():
            with open(name[1:], "rb") as file:
                yield from _of_lines(_lines_of(file), Path(name[1:]).parent, passed_over, seek=True)
        else:
            yield from _of_path(Path(name), passed_over)
    if passed_over:
        log.info(counted(passed_over))


def _lines_of(file: Any) -> Iterator[str]:
    """Yield the lines of a buffered binary file as they come, in UTF-8 or, with its mark, UTF-16."""
    wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = io.TextIOWrapper(file, "utf-16" if wide else "utf-8-sig", errors="surrogateescape")
    yield from text
    text.detach()  # else the file would be closed with it


def _of_lines(lines: Iterable[str], beside: Path, passed_over: Counter[str], *, seek: bool = False) -> Iterator[Item]:
    """Yield the files that lines name, taken from the working folder or from `beside`.

    With `seek`, find what is in neither as a table's cells are found: an id without suffix, or the end of a path that
    another machine wrote.
    """
    index = None
    for line in lines:
        name = line.strip("\r\n")
        path = next((path for path in (Path(name), beside / name) if path.exists()), None)
        if name.strip() and path is None and seek:
            index = index or Index(beside)
            found = index.find(name.strip())
            path = found[0] if len(found) == 1 else None
        if name.strip():
            yield from _of_path(path or beside / name, passed_over)


def _of_path(path: Path, passed_over: Counter[str]) -> Iterator[Item]:
    if not path.is_dir():
        yield Item(path)
        return
    for found in find_images(path, passed_over):
        folder = found.parent.relative_to(path).as_posix()
        yield Item(found, "" if folder == "." else folder)


@dataclass
class Table:
    """The predictions: written to files as they come; kept are the first lines, counts, and a few for the sheet."""

    classes: list[str]
    top_k: int
    sheet: str | None = None
    samples: bool = False  # whether a few images are kept, for a sheet
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
        """Begins the files; `opened` closes them, and ends the JSON, however the prediction ends."""
        if csv_file:
            self._csv = opened.enter_context(_begun(csv_file))
            header = ["path", "folder", "predicted", "confidence"]
            csv.writer(self._csv).writerow([*header, *(class_columns(self.classes) if self._with_all else [])])
        if json_file:
            self._json = opened.enter_context(_begun(json_file))
            self._json.write("[")
            opened.callback(self._json.write, "\n]\n")

    def add(self, items: list[Item], shares: np.ndarray) -> None:
        """Writes and counts a batch; `shares` (count, classes) are probabilities."""
        for item, share in zip(items, shares, strict=True):
            row = self._row(item, share)
            best = row["top"][0]
            name = best["class"]
            if self._csv:
                names = map(as_cell, (row["path"], row["folder"], name))
                others = row["probabilities"].values() if self._with_all else []
                csv.writer(self._csv).writerow([*names, best["probability"], *others])
            if self._json:
                self._json.write((",\n" if self.count else "\n") + json_text(row))
            if len(self.lines) < SHOWN:
                top = (f"{printable(entry['class'])} {100 * entry['probability']:.1f}%" for entry in row["top"])
                self.lines.append((end_of(printable(row["path"]), 40), "  ".join(top)))
            if self.samples and self.count % self.stride == 0:
                self._keep_for_sheet(item.path, f"{name} {100 * best['probability']:.0f}%")
            self.counts[name] += 1
            if item.folder in self.folders or len(self.folders) <= FOLDERS:
                self.folders[item.folder][name] += 1
            self.count += 1
        for file in (self._csv, self._json):
            if file:
                file.flush()

    def add_unreadable(self, found: list[tuple[Item, str]]) -> None:
        for item, reason in found:
            self.unreadable += 1
            if self.unreadable <= 10:
                log.warning(f"cannot be read, skipped: {printable(item.path)}: {printable(reason)}")

    def add_overflowed(self, items: list[Item]) -> None:
        for item in items:
            self.overflowed += 1
            if self.overflowed <= 10:
                log.warning(f"no prediction, its logits are not finite: {printable(item.path)}")

    def report(self) -> None:
        """Draw the sheet and print the first lines and the counts. Raise UserError if no image could be read."""
        if self.unreadable > 10:
            log.warning(f"and {self.unreadable - 10:,} more cannot be read")
        if self.overflowed > 10:
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
        width = max(len(name) for name, _ in self.lines)
        print("\n".join(f"{name:<{width}}  {top}" for name, top in self.lines))
        if self.count > SHOWN:
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
        row = {
            "path": str(item.path),
            "folder": item.folder,
            "top": [{"class": self.classes[place], "probability": rounded[place]} for place in best],
        }
        return row | ({"probabilities": dict(zip(self.classes, rounded, strict=True))} if self._with_all else {})

    def _keep_for_sheet(self, path: Path, caption: str) -> None:
        """Keeps one image of `stride`; when twice as many as needed are kept, every other one goes."""
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
