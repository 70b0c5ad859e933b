"""Write and read all files of a run: its folder and lock, config, metrics, checkpoints, result.

Files are replaced atomically, so no reader and no resumed run meets half of one. A thread writes checkpoints, so the
step does not wait for the disk. Knows nothing of how the values were computed.
"""

from __future__ import annotations

import errno
import io
import os
import socket
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from runs.checkpoint import snapshot, write_checkpoints
from runs.writing import csv_text, replace_file
from system.files import FULL, json_text, lock, remove
from system.machine import submitted
from utils import RunError, UserError, printable


class RunDirectory:
    """The folder of one run. `writes` is False on ranks that only read."""

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self._lock: io.TextIOWrapper | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint writer")
        self._writing: Future | None = None

    # ------------------------------------------------------------------------ open and close
    def open(self) -> None:
        """Create the folder, lock it, and remove the partial files of a killed run.

        Raise UserError if the path is not a folder or another live process holds it, RunError if the disk is full or
        read-only.
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
        with suppress(OSError):  # a full disk; only people read this text
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        if hasattr(os, "register_at_fork"):  # a loading worker that outlives this process must not hold the lock
            os.register_at_fork(after_in_child=lambda: None if file.closed else os.close(file.fileno()))
        remove(*self.path.glob(".*.tmp"))

    def close(self) -> None:
        """Wait for pending checkpoints and release the lock."""
        try:
            self.flush()
        finally:
            if self._lock is not None:
                self._lock.close()

    # ---------------------------------------------------------------------------- small files
    def file(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json_text(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        if self.writes:
            content = text.encode("utf-8", "surrogateescape")
            replace_file(self.file(name), len(content), lambda file: file.write(content))

    def write_csv(self, name: str, rows: Iterable[Iterable[Any]]) -> None:
        self.write_text(name, csv_text(rows))

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl and metrics.csv again from all epochs so far."""
        self.write_text("metrics.jsonl", "".join(json_text(line) + "\n" for line in history))
        header = list(history[-1]) if history else ["epoch"]
        self.write_csv("metrics.csv", [header, *([line.get(name) for name in header] for line in history)])

    # ---------------------------------------------------------------------------- checkpoints
    def save(self, files: dict[str, dict[str, Any]]) -> None:
        """Pass checkpoints (name to content) to the writing thread, which replaces the files in this order.

        Wait for earlier ones first, so that memory holds one copy at a time.
        """
        if self.writes:
            self.flush()
            copies = {self.file(name): snapshot(content) for name, content in files.items()}
            self._writing = submitted(self._writer, write_checkpoints, copies)

    def flush(self) -> None:
        """Wait until every pending checkpoint is on disk; raise RunError if writing failed."""
        writing = self._writing
        self._writing = None
        if writing is not None:
            writing.result()
