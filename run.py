"""Everything a run writes and reads back: its folder and lock, config, metrics, checkpoints, result.

Files are replaced whole, so a reader or a resumed run never meets half of one; checkpoints are written by a
thread, so the step does not wait for the disk. Knows nothing of how the values came about.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from model import load_file
from utils import RunError, UserError, atomic_write, printable, remove_stale_temporaries


class RunDirectory:
    """The folder of one run. `writes` is False on ranks that only read."""

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self._lock: io.TextIOWrapper | None = None
        self._saver = Saver()

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
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held while the run lasts)
        except OSError as error:
            kind = RunError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO) else UserError
            raise kind(
                f"cannot write into {printable(self.path)} ({error.strerror}). Mend that, or name another "
                "--checkpoint_dir."
            ) from None
        self._take_lock()
        remove_stale_temporaries(self.path)

    def _take_lock(self) -> None:
        """The kernel frees this lock when its holder dies, however it dies; the text is for people."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise UserError(
                f"{printable(self.path)} is in use by {holder}. Wait for it, or choose another --checkpoint_name."
            ) from None
        except OSError:  # a network file system without locks: two runs of one name are the user's to avoid
            return
        lock = self._lock
        with contextlib.suppress(OSError):  # a full disk
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        os.register_at_fork(after_in_child=lambda: lock.closed or os.close(lock.fileno()))

    def close(self) -> None:
        """Waits for pending checkpoints and gives the folder free."""
        try:
            self._saver.flush()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    # ---------------------------------------------------------------------------- small files
    def file(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1, allow_nan=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        if self.writes:
            write_bytes(self.file(name), text.encode("utf-8", "surrogateescape"))

    def write_metrics(self, history: Iterable[dict[str, Any]]) -> None:
        """Rewrites metrics.jsonl and metrics.csv from all epochs so far."""
        history = list(history)
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        table = io.StringIO()
        writer = csv.DictWriter(table, list(history[0]) if history else ["epoch"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self.write_text("metrics.csv", table.getvalue())

    def write_predictions(self, paths: list[str], labels, probabilities, classes: list[str]) -> None:
        """predictions.csv: path, label, predicted, confidence and one probability per class, a row an image."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["path", "label", "predicted", "confidence", *classes])
        for path, label, row in zip(paths, labels, probabilities, strict=True):
            best = int(row.argmax())
            writer.writerow([path, classes[label], classes[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in row)])
        self.write_text("predictions.csv", table.getvalue())

    # ---------------------------------------------------------------------------- checkpoints
    def save(self, files: dict[str, dict[str, Any]]) -> None:
        """Hands checkpoints (name to content) to the writing thread, which replaces them in this order."""
        if self.writes:
            self._saver.submit({self.file(name): _snapshot(content) for name, content in files.items()})

    def flush(self) -> None:
        """Waits until every checkpoint handed over is on disk; raises RunError where that failed."""
        self._saver.flush()


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint that this program wrote. Raises UserError where it is missing, damaged or another's."""
    content = load_file(file)
    known = isinstance(content, dict) and content.get("format") == 1
    if not known or any(not fits(content.get(name)) for name, fits in _PARTS.items()):
        raise UserError(f"{printable(file)} is no checkpoint of this program, or damaged.")
    if not all(weight.isfinite().all() for weight in content["model"].values()):
        raise UserError(f"{printable(file)} holds weights that are not finite: its run diverged, or it is damaged.")
    return content


def _is_list_of_words(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value)


_PARTS: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, dict) and all(map(torch.is_tensor, value.values())),
    "classes": _is_list_of_words,
    "model_name": lambda value: isinstance(value, str),
    "image_size": lambda value: isinstance(value, int) and value > 0,
    "normalize": lambda value: value in ("imagenet", "none"),
}


class Saver:
    """Writes checkpoints in a thread; when a newer one comes before an older one was begun, the newer counts."""

    def __init__(self) -> None:
        self._pending: dict[Path, dict] = {}
        self._error: Exception | None = None
        self._change = threading.Condition()
        self._busy = False

    def submit(self, files: dict[Path, dict]) -> None:
        with self._change:
            self._raise_error()
            self._pending = {path: files.get(path, self._pending.get(path)) for path in {**self._pending, **files}}
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, name="checkpoint writer").start()

    def flush(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._busy)
            self._raise_error()

    def _work(self) -> None:
        while True:
            with self._change:
                files, self._pending = self._pending, {}
                if not files or self._error:
                    self._busy = False
                    self._change.notify_all()
                    return
            try:
                # best_model.pt before last.pt, which speaks of it
                for path, content in sorted(files.items(), key=lambda item: item[0].name == "last.pt"):
                    buffer = io.BytesIO()
                    torch.save(content, buffer)
                    write_bytes(path, buffer.getbuffer())
            except Exception as error:  # handed to the thread that trains
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file whole. Raises RunError where the disk is full or the folder is gone."""
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        advice = (
            f"free at least {len(content) / 2**20:,.0f} MB there" if full
            else "make the folder writable again" if path.parent.exists() else "the folder is gone: put it back"
        )
        raise RunError(
            f"{printable(path)} could not be written ({error.strerror}). What was saved before is intact: "
            f"{advice}, then go on with --resume."
        ) from None


def _snapshot(value: Any) -> Any:
    """A copy on the CPU that later updates do not change; tensors that share memory are copied apart."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = {key: _snapshot(item) for key, item in value.items()}
        if hasattr(value, "_metadata"):  # a state dict's versions of layers, which MNASNet's loader asks for
            copied = OrderedDict(copied)
            copied._metadata = value._metadata
        return copied
    if isinstance(value, (list, tuple)):
        return [_snapshot(item) for item in value]
    return value


def refuse_finished(run: RunDirectory) -> None:
    """Raises UserError where the folder holds a run already."""
    present = [name for name in ("result.json", "last.pt", "best_model.pt") if run.file(name).exists()]
    if present:
        kind, way = ("finished", "") if "result.json" in present else ("begun", "go on with --resume, ")
        raise UserError(
            f"{printable(run.path)} holds a {kind} run.\n"
            f"Choose another --checkpoint_name, {way}or replace it with --overwrite."
        )


def remove_results(run: RunDirectory) -> None:
    """Removes what an earlier run of this name wrote, the files first that make it look finished."""
    for name in ("result.json", "failure.json", "last.pt", "best_model.pt", "metrics.jsonl", "metrics.csv",
                 "predictions.csv", "learning_curve.png", "confusion_matrix.png", "mistakes.png", "report.html"):
        if run.writes:
            run.file(name).unlink(missing_ok=True)


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
