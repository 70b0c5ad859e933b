"""Prediction on image files and folders: top classes with probabilities, as text, CSV, JSON, contact sheet.

Files are decoded by threads while the model works; what cannot be read is reported and skipped. Knows
nothing of runs, options or labels.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evaluate import probabilities
from images.decode import ahead, try_decode
from images.folders import find_images
from precision import Precision
from transforms import Preprocess
from utils import UserError, cores, log, printable, progress, refuse_missing_folders, write_text

if TYPE_CHECKING:
    from assemble import Setup

SHOWN = 50  # lines on the terminal; files hold all


def predict(
    setup: Setup,
    *,
    inputs: list[str],
    batch_size: int,
    num_workers: int | None,
    top_k: int,
    csv: str | None,
    json: str | None,
    contact_sheet: str | None,
) -> None:
    """The command: classifies files and folders with a trained run."""
    refuse_missing_folders(csv, json, contact_sheet)
    checkpoint = setup.checkpoint
    predict_files(
        setup.trained(checkpoint),
        checkpoint["classes"],
        inputs,
        preprocess=setup.preprocess,
        precision=setup.precision,
        batch_size=batch_size,
        top_k=top_k,
        workers=min(8, cores()) if num_workers is None else num_workers,
        csv_file=csv,
        json_file=json,
        sheet=contact_sheet,
    )


def predict_files(
    model: nn.Module,
    classes: list[str],
    inputs: list[str],
    *,
    preprocess: Preprocess,
    precision: Precision,
    batch_size: int,
    top_k: int,
    workers: int,
    csv_file: str | None,
    json_file: str | None,
    sheet: str | None,
) -> list[dict[str, Any]]:
    """Classifies every image named or found in `inputs`; returns and writes a row for each readable one.

    A row is {"path", "top": [{"class", "probability"}, ...], "probabilities": {class: probability}}.
    Raises UserError where an input does not exist or no image is readable.
    """
    paths = list(_listed(inputs))
    rows = []
    unreadable = []
    size = (preprocess.image_size, preprocess.image_size)
    bar = progress(total=len(paths), desc="predicting", unit="image", delay=2)
    with bar, ThreadPoolExecutor(max(1, workers)) as pool, torch.inference_mode():
        decoded = ahead(pool, lambda path: (path, try_decode(path, size)), paths, 2 * batch_size)
        while batch := list(islice(decoded, batch_size)):
            good = [(path, image) for path, image in batch if not isinstance(image, str)]
            unreadable += [(path, image) for path, image in batch if isinstance(image, str)]
            if good:
                images = torch.from_numpy(np.stack([image for _, image in good])).to(preprocess.device)
                with precision.autocast():
                    logits = model(preprocess(images))
                shares = probabilities(logits.float().cpu().numpy())
                rows += [_row(path, share, classes, top_k) for (path, _), share in zip(good, shares, strict=True)]
            bar.update(len(batch))
    for path, reason in unreadable[:10]:
        log.warning(f"cannot be read, skipped: {printable(path)}: {printable(reason)}")
    if len(unreadable) > 10:
        log.warning(f"and {len(unreadable) - 10} more cannot be read")
    if not rows:
        raise UserError("none of the images can be read.")
    _write(rows, classes, csv_file, json_file, sheet)
    print(_text(rows))
    return rows


def _listed(inputs: list[str]) -> Iterator[Path]:
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(find_images(path))
            if not found:
                raise UserError(f"{printable(name)} holds no image.")
            yield from found
        elif path.exists():
            yield path
        else:
            raise UserError(f"{printable(name)} does not exist.")


def _row(path: Path, share: np.ndarray, classes: list[str], top_k: int) -> dict[str, Any]:
    best = np.argsort(-share, kind="stable")[:top_k]
    return {
        "path": str(path),
        "top": [{"class": classes[i], "probability": round(float(share[i]), 6)} for i in best],
        "probabilities": {name: round(float(value), 6) for name, value in zip(classes, share, strict=True)},
    }


def _text(rows: list[dict[str, Any]]) -> str:
    names = [printable(row["path"]) for row in rows[:SHOWN]]
    names = [name if len(name) <= 40 else "…" + name[-39:] for name in names]
    lines = []
    width = max(map(len, names))
    for name, row in zip(names, rows, strict=False):
        top = "  ".join(f"{printable(entry['class'])} {100 * entry['probability']:.1f}%" for entry in row["top"])
        lines.append(f"{name:<{width}}  {top}")
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN:,} more (--csv FILE or --json FILE keeps all)")
    counts = Counter(row["top"][0]["class"] for row in rows)
    summary = ", ".join(f"{printable(name)} {count:,}" for name, count in sorted(counts.items()))
    return "\n".join([*lines, f"{len(rows):,} images: {summary}"])


def _write(
    rows: list[dict[str, Any]], classes: list[str], csv_file: str | None, json_file: str | None, sheet: str | None
) -> None:
    if csv_file:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["path", "predicted", "probability", *classes])
        writer.writerows([row["path"], *row["top"][0].values(), *row["probabilities"].values()] for row in rows)
        write_text(Path(csv_file), table.getvalue())
    if json_file:
        write_text(Path(json_file), json.dumps(rows, indent=1))
    if sheet:
        from reports.pictures import labelled_sheet

        captions = [f"{row['top'][0]['class']} {100 * row['top'][0]['probability']:.0f}%" for row in rows]
        labelled_sheet([Path(row["path"]) for row in rows], captions, Path(sheet))
