"""Everything a run writes and reads back: its folder and lock, config, metrics, checkpoints, result.

Files are replaced whole, so a reader or a resumed run never meets half of one; checkpoints are written by a
thread, so the step does not wait for the disk. Knows nothing of how the values came about.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from model import load_file
from utils import FULL, RunError, UserError, atomic_write, lock, printable, remove


class RunDirectory:
    """The folder of one run. `writes` is False on ranks that only read."""

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self._lock: io.TextIOWrapper | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._writing: Future | None = None

    # ------------------------------------------------------------------------ open and close
    def open(self) -> None:
        """Makes the folder, locks it, and clears what a killed run left half-written.

        Raises UserError where it is no folder or another live process holds it, RunError where the disk is
        full or read-only.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = file = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            kind = RunError if error.errno in (*FULL, errno.EROFS, errno.EIO) else UserError
            raise kind(
                f"cannot write into {printable(self.path)} ({error.strerror}). Mend that, or name another "
                "--checkpoint_dir."
            ) from None
        if not lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            self.close()
            raise UserError(
                f"{printable(self.path)} is in use by {holder}. Wait for it, or choose another --checkpoint_name."
            )
        with suppress(OSError):  # a full disk; the text is for people
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        if hasattr(os, "register_at_fork"):  # a loading worker that outlives this process must not hold the lock
            os.register_at_fork(after_in_child=lambda: file.closed or os.close(file.fileno()))
        remove(*self.path.glob(".*.tmp"))

    def close(self) -> None:
        """Waits for pending checkpoints and gives the folder free."""
        try:
            self.flush()
        finally:
            if self._lock is not None:
                self._lock.close()

    # ---------------------------------------------------------------------------- small files
    def file(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        if self.writes:
            content = text.encode("utf-8", "surrogateescape")
            _write(self.file(name), len(content), lambda file: file.write(content))

    def write_csv(self, name: str, rows: Iterable[Iterable[Any]]) -> None:
        table = io.StringIO()
        csv.writer(table).writerows(rows)  # CRLF: with less a return in a name would not be quoted
        self.write_text(name, table.getvalue())

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Rewrites metrics.jsonl and metrics.csv from all epochs so far."""
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        header = list(history[0]) if history else ["epoch"]
        self.write_csv("metrics.csv", [header, *(line.values() for line in history)])

    def write_predictions(self, paths: list[str], labels, probabilities, classes: list[str]) -> None:
        """predictions.csv: path, label, predicted, confidence and one probability per class, a row an image."""
        rows = [["path", "label", "predicted", "confidence", *classes]]
        for path, label, row in zip(paths, labels, probabilities, strict=True):
            best = int(row.argmax())
            rows.append([path, classes[label], classes[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in row)])
        self.write_csv("predictions.csv", rows)

    # ---------------------------------------------------------------------------- checkpoints
    def save(self, files: dict[str, dict[str, Any]]) -> None:
        """Hands checkpoints (name to content) to the writing thread, which replaces them in this order.

        Waits for those handed over before: memory holds one copy at a time.
        """
        if self.writes:
            self.flush()
            copies = {self.file(name): _snapshot(content) for name, content in files.items()}
            self._writing = self._writer.submit(_write_checkpoints, copies)

    def flush(self) -> None:
        """Waits until every checkpoint handed over is on disk; raises RunError where that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _write_checkpoints(files: dict[Path, dict[str, Any]]) -> None:
    for path, content in files.items():
        size = sum(leaf.nbytes for leaf in tree_leaves(content) if torch.is_tensor(leaf))
        _write(path, size, partial(torch.save, content))


def _snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that later updates do not change; tensors that share memory are copied apart."""
    copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
    for name in ("model", "ema"):
        if content.get(name) is not None:  # versions of layers, which MNASNet's loader asks for
            copied[name]._metadata = content[name]._metadata
    return copied


def _write(path: Path, size: int, fill: Callable[[IO[bytes]], Any]) -> None:
    """Replaces a file whole by what `fill` writes, about `size` bytes.

    Raises RunError where the disk is full or the folder is gone.
    """
    try:
        with atomic_write(path) as file:
            fill(file)
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own over the file's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        advice = (
            f"free at least {size / 2**20:,.0f} MB there" if cause.errno in FULL
            else "make the folder writable again" if path.parent.exists() else "the folder is gone: put it back"
        )
        raise RunError(
            f"{printable(path)} could not be written ({cause.strerror}). What was saved before is intact: "
            f"{advice}, then go on with --resume."
        ) from None


# ------------------------------------------------------------------------------- reading back
_PARTS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == 1,
    "model": lambda value: isinstance(value, dict) and all(
        isinstance(name, str) and torch.is_tensor(weight) for name, weight in value.items()),
    "classes": lambda value: (
        isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value)
    ),
    "model_name": lambda value: isinstance(value, str),
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "normalize": lambda value: value in ("imagenet", "none"),
}


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint that this program wrote. Raises UserError where it is missing, damaged or another's."""
    content = load_file(file)
    if not isinstance(content, dict) or not all(fits(content.get(name)) for name, fits in _PARTS.items()):
        raise UserError(f"{printable(file)} is no checkpoint of this program, or damaged.")
    if not all(weight.isfinite().all() for weight in content["model"].values()):
        raise UserError(f"{printable(file)} holds weights that are not finite: its run diverged, or it is damaged.")
    return content


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
        for name in ("result.json", "failure.json", "last.pt", "best_model.pt", "metrics.jsonl", "metrics.csv",
                     "predictions.csv", "learning_curve.png", "confusion_matrix.png", "mistakes.png", "reliability.png",
                     "report.html", "parity.json"):
            run.file(name).unlink(missing_ok=True)
        shutil.rmtree(run.file("tensorboard"), ignore_errors=True)  # two runs' events would be drawn as one


# Options that may differ between a run and its continuation: they do not change what is computed.
HARMLESS = frozenset({
    "checkpoint_dir", "checkpoint_name", "config", "quiet", "demo", "num_workers", "cache", "log_interval", "resume",
    "overwrite", "checkpoint_every", "verify_resume", "tensorboard", "evaluate", "command", "data_dir", "device",
    "skip_unreadable", "precisions", "seeds", "report_only", "runs", "pretrained", "pretrained_path",
})  # fmt: skip


def refuse_changed(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError naming every difference in options that would make another run of a resumed one."""
    changed = [
        f"  --{name}: begun with {stored[name]}, now {current[name]}"
        for name in sorted(stored.keys() & current.keys() - HARMLESS)
        if stored[name] != current[name]
    ]
    if changed:
        raise UserError("\n".join([
            "--resume would change the run:", *changed,
            "Give the options it was begun with (--config its config.json), or start another --checkpoint_name.",
        ]))
