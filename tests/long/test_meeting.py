"""How the processes of a job meet, and what is said if they do not: as real processes, ports and signals.

Each waits a second instead of five minutes. Run it alone: pytest tests/long/test_meeting.py
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import tiny
import torch
from forks import Process
from tiny import ROOT, free_port

from distributed import Ranks
from system import meeting

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
IMPATIENT = """
import sys
from datetime import timedelta
from system import meeting
meeting.PATIENCE = timedelta(seconds=float(sys.argv.pop(1)))
import main
main.run()
"""
COMMAND = ["train", "--device=cpu", "--data_dir=nothing", "--checkpoint_dir=nowhere"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Start Python code, with arguments for its sys.argv, in a process of its own."""
    folder = tmp_path_factory.mktemp("programs")

    def start(code: str, *words: object, **options) -> Process:
        file = folder / f"program{len(list(folder.iterdir()))}.py"
        file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
        return Process(words, script=file, **options)

    return start


@pytest.fixture(scope="module")
def rank(program):
    """Start one process of a job of two, or of the job in `variables`."""

    def start(*, patience: float = 1, **variables: object) -> Process:
        job = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | variables
        environment = {name: value for name, value in tiny.environment().items() if name not in job}
        environment |= {name: str(value) for name, value in job.items() if value is not None}
        return program(IMPATIENT, patience, *COMMAND, env=environment)

    return start


def end(process: Process, seconds: float = 60) -> tuple[int, str]:
    status, out, err = tiny.finish(process, seconds)
    assert "Traceback" not in err and out == "", (out, err)
    return status, err


ALONE = {  # name: (variables, exit status, what is said)
    "the first alone": ({}, 1, "could not meet the others at 127.0.0.1:{port}"),
    "the second alone": ({"RANK": 1, "LOCAL_RANK": 1}, 1, "could not meet the others at 127.0.0.1:{port}"),
    "unknown host": (
        {"RANK": 1, "MASTER_ADDR": "no-such-host.invalid"},
        1,
        "could not meet the others at no-such-host.invalid:{port}",
    ),
    "left over": (
        {"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
        2,
        "WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR, MASTER_PORT.",
    ),
    "an empty port": ({"MASTER_PORT": ""}, 2, "WORLD_SIZE=2 is set, but not MASTER_PORT."),
    "a word for a port": ({"MASTER_PORT": "http"}, 2, "MASTER_PORT=http is not a port"),
    "too large a port": ({"MASTER_PORT": "99999"}, 2, "MASTER_PORT=99999 is not a port"),
}


@pytest.fixture(scope="module")
def alone(rank):
    """Start a process with a port for each of ALONE; they wait for the others at the same time."""
    ports = {name: variables.get("MASTER_PORT", free_port()) for name, (variables, *_) in ALONE.items()}
    return {
        name: (rank(**{"MASTER_PORT": ports[name]} | variables), ports[name]) for name, (variables, *_) in ALONE.items()
    }


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_cannot_meet_the_others_says_where_or_what_is_missing(name, alone):
    _, expected, named = ALONE[name]
    process, port = alone[name]
    status, said = end(process)
    assert (status, named.format(port=port) in said, "firewall" in said) == (expected, True, expected == 1), said


def until_it_waits(process: Process) -> None:
    """Wait until it has a thread that looks for the others."""
    threads = Path(f"/proc/{process.pid}/task")
    if threads.exists():
        tiny.wait_for(lambda: len(list(threads.iterdir())) > 1, process)
    time.sleep(0.5)


@pytest.mark.parametrize("number, place", [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_process_that_waits_hears_signals(number, place, rank):
    process = rank(RANK=place, LOCAL_RANK=place, patience=600)
    until_it_waits(process)
    process.send_signal(number)
    begun = time.monotonic()
    status, _ = end(process, 20)
    assert status == 128 + number and time.monotonic() - begun < 8


@pytest.mark.parametrize(
    "local_rank, said", [(0, "waiting for other processes at here:1 ...\n"), (1, "")], ids=["first", "another"]
)
def test_long_waiting_is_said(local_rank, said, monkeypatch, capsys):
    met = Future()
    asked = Future()
    asked.exception = lambda: met.set_result(None)  # the others appear
    for name, value in (("RANK", str(local_rank)), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_in_thread", lambda _: asked)
    monkeypatch.setattr(meeting, "wait", lambda *_, timeout: None)
    meeting.join(Ranks(local_rank, local_rank, 2))
    assert capsys.readouterr().err == said and met.done()


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "[/gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:31.\nMore",
            "Connection closed by peer [127.0.0.1]:31.",
        ),
        ("NCCL error: something quite new", "NCCL error: something quite new"),
    ],
)
def test_errors_of_other_processes_keep_their_reason(text, reason):
    words = meeting.in_words(RuntimeError(text))
    assert f"lost the others of its job ({reason})" in words and "--resume" in words
    assert meeting.in_words(RuntimeError("a shape does not fit")) is None


def test_real_losses_are_said(program, tmp_path):
    """Two processes' group on one store: one of them is silent, or gone."""
    code = """
import sys, os, time
from datetime import timedelta
import torch, torch.distributed as dist
from system import meeting
rank, what = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2,
                        timeout=timedelta(seconds=2))
dist.all_reduce(torch.ones(1))
if rank:
    time.sleep(0 if what == "lost" else 60)
    os._exit(0)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(meeting.in_words(error), flush=True)
os._exit(0)
"""
    kinds = {"lost": "", "silent": "Timed out"}
    pairs = {what: [program(code, number, what, tmp_path / what) for number in (0, 1)] for what in kinds}
    for what, (first, second) in pairs.items():
        out, err = first.communicate(timeout=60)
        assert "lost the others of its job" in out and kinds[what] in out, err
        second.kill()


# ------------------------------------------------------------------------------------ cores
@pytest.mark.parametrize(
    "asked, size, beside, threads",
    [
        ("1", 4, "4", 2),  # torchrun's own
        (None, 4, "4", 2),
        ("3", 4, "4", None),  # the user's
        ("1", 1, None, None),
        (None, 1, None, 8),
        ("", 8, "", 8),  # as many machines
        ("1", 16, "16", 1),
    ],
)
def test_cores_are_shared_out_among_the_processes_of_a_machine(asked, size, beside, threads, monkeypatch):
    for name, value in (("OMP_NUM_THREADS", asked), ("LOCAL_WORLD_SIZE", beside)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(meeting, "computing_cores", lambda: 8)
    meeting.share_cores(Ranks(0, 0, size))
    assert taken == ([] if threads is None else [threads])


END = """
import atexit, concurrent.futures, gc, sys, time
import main

class Last:
    def __del__(self):
        print("Python has shut down", flush=True)

kept = Last()
atexit.register(gc.unfreeze)  # or its shutdown would not look for it
atexit.register(print, "handlers of exit ran")
concurrent.futures.ThreadPoolExecutor(1).submit(lambda: (time.sleep(2), print("threads ended")))
sys.argv = ["main.py", *sys.argv[1:]]
main.run()
"""


@pytest.mark.parametrize("size, command", [("2", "evaluate"), ("1", "report")])
def test_one_of_several_processes_ends_without_pythons_shutdown(size, command):
    """In which gloo's threads, which outlive the group, could abort it."""
    done = subprocess.run(
        [sys.executable, "-c", END, command, "--checkpoint_name=none"],
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": size},  # and none of the other variables: the processes cannot meet
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = ["threads ended", "handlers of exit ran"] + ([] if size == "2" else ["Python has shut down"])
    assert (done.returncode, done.stdout.splitlines()) == (2, lines)
    assert ("WORLD_SIZE=2 is set" in done.stderr) == (size == "2") and "Traceback" not in done.stderr
