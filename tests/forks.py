"""Start real processes of the program in milliseconds: one process imports it once, and each test gets a fork of it.

Importing PyTorch and torchvision takes five seconds; a fork takes ten milliseconds. Arguments, environment, working
folder, limits, signals, streams, exit status and the end of Python are the process's own. Only the start itself is not
tested this way: for that, start `python main.py`.
"""

import atexit
import contextlib
import ctypes
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = (  # imported once; a test of the imports at start must not use a fork
    "assemble",
    "commands.compare",
    "commands.evaluate",
    "commands.predict",
    "commands.prepare",
    "commands.report",
    "commands.train",
    "matplotlib.figure",
    "reports.page",
    "reports.pictures",
    "scipy.stats",
    "sklearn.metrics",
    "sklearn.model_selection",
    "system.progress",
    "tiny",
    "torchvision",
    "warmup_scheduler",
)


class Process:
    """A fork that runs `main.py` with `words`; it has the part of subprocess.Popen that tests use.

    `script` is run instead of `main.py`. `limits` holds soft and hard limits by name, such as {"NOFILE": 48}.
    `shared_memory` holds mount options of a tmpfs in /dev/shm for this process alone, such as "size=1m". Signals in
    `ignored` are ignored from the start, as under nohup. `closed` names descriptors among 0, 1, 2 that are closed.
    Without `pictures` none is drawn, because they take longer than a tiny training. Each process leads a session of its
    own. Streams are named as in Popen: `stdin` (nothing to read), `stdout` and `stderr` (pipes).
    """

    def __init__(
        self,
        words,
        *,
        script=ROOT / "main.py",
        env=None,
        cwd=None,
        limits=None,
        shared_memory=None,
        ignored=(),
        closed=(),
        pictures=False,
        **streams,
    ):
        request = {
            "script": str(script),
            "words": [str(word) for word in words],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "limits": limits or {},
            "shared_memory": shared_memory,
            "ignored": [int(number) for number in ignored],
            "closed": list(closed),
            "pictures": pictures,
        }
        status, theirs = os.pipe()
        given = streams.get("stdin")
        source = os.open(os.devnull, os.O_RDONLY) if given is None else _stream(given)[0]
        out, self.stdout = _stream(streams.get("stdout"))
        err, self.stderr = _stream(streams.get("stderr"))
        content = json.dumps(request).encode()
        with _one_at_a_time:
            control = start()
            control.sendall(struct.pack("I", len(content)))
            socket.send_fds(control, [content], [source, out, err, theirs])
        for descriptor in (source, out, err, theirs):
            os.close(descriptor)
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = struct.unpack("i", self._status.read(4))[0]
        self.returncode = None
        self.args = words

    def wait(self, timeout=None):
        """Return the exit status, negative for a signal. Raise subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not _readable(self._status, timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = struct.unpack("i", self._status.read(4))[0]
            self._status.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        """Return output and errors of the ended process. Raise subprocess.TimeoutExpired."""
        found = ["", ""]

        def read(place, stream):
            found[place] = stream.read()

        readers = [
            threading.Thread(target=read, args=(place, stream), daemon=True)
            for place, stream in enumerate((self.stdout, self.stderr))
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        until = None if timeout is None else time.monotonic() + timeout
        self.wait(timeout)
        for reader in readers:
            reader.join(None if until is None else max(0.1, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(found)

    def send_signal(self, number) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait(10)


def _stream(target):
    """Return the descriptor for a child, and our end of the pipe if `target` is None."""
    if target is not None:
        return os.dup(target if isinstance(target, int) else target.fileno()), None
    ours, theirs = os.pipe()
    return theirs, os.fdopen(ours, errors="backslashreplace")


def _readable(stream, timeout) -> bool:
    return bool(select.select([stream], [], [], timeout)[0])


_control: socket.socket | None = None
_one_at_a_time = threading.Lock()


def start() -> socket.socket:
    """Return our end of the connection to the process that forks; start it at the first call."""
    global _control
    if _control is None:
        _control, theirs = socket.socketpair()
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        theirs.close()
        atexit.register(_control.close)
    return _control


def serve(control: socket.socket) -> dict | None:
    """Fork for each request; return None when the tests have ended, and in a fork the request."""
    reports: dict[int, int] = {}

    def reap(*_):
        while reports:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # another signal came meanwhile and reaped the last child
                return
            if pid == 0:
                return
            descriptor = reports.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(descriptor, struct.pack("i", os.waitstatus_to_exitcode(status)))
            os.close(descriptor)

    signal.signal(signal.SIGCHLD, reap)
    while True:
        head = control.recv(4)
        if not head:
            return None
        content, descriptors, *_ = socket.recv_fds(control, struct.unpack("I", head)[0], 4)
        while len(content) < struct.unpack("I", head)[0]:
            content += control.recv(1 << 20)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            for descriptor in reports.values():
                os.close(descriptor)
            control.close()
            become(request := json.loads(content), descriptors)
            return request
        reports[pid] = descriptors.pop()
        os.write(reports[pid], struct.pack("i", pid))
        for descriptor in descriptors:
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def become(request: dict, descriptors: list[int]) -> None:
    """Set up this fork as requested: streams, session, environment, folder, limits and signals."""
    os.setsid()
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    for number in request["closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python itself does
    for number in (signal.SIGCHLD, signal.SIGHUP):  # the tests may run under nohup
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["shared_memory"]:
        mount_shared_memory(request["shared_memory"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if not request["pictures"]:
        sys.modules["tiny"].leave_out_pictures()
    sys.modules["utils"].STARTED = time.monotonic()
    sys.argv = [request["script"], *request["words"]]


def mount_shared_memory(options: str) -> None:
    """Mount a tmpfs over /dev/shm that only this process and its children see."""
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)


if __name__ == "__main__":
    import gc
    import importlib

    sys.path[:1] = [str(ROOT), str(Path(__file__).parent)]
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["PIL.Image"].init()  # imports the reader of each format
    sys.modules["tiny"].register_classifier()
    gc.freeze()
    if serve(line) is not None:
        sys.path[:1] = [str(Path(sys.argv[0]).parent)]
        runpy.run_path(sys.argv[0], run_name="__main__")
