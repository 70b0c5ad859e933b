"""How the processes of a job meet, and what is said if they do not: as real processes, ports and signals.

Each waits a second instead of five minutes. Run it alone: pytest tests/long/test_meeting.py
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

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
    """Starts Python code, with words for its sys.argv, in a process of its own."""
    folder = tmp_path_factory.mktemp("programs")

    def start(code: str, *words: object, **options) -> Process:
        file = folder / f"program{len(list(folder.iterdir()))}.py"
        file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
        return Process(words, script=file, **options)

    return start


@pytest.fixture(scope="module")
def rank(program):
    """Starts one process of a job of two, or what `variables` say."""

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
        "RANK, MASTER_ADDR, MASTER_PORT are not set",
    ),
    "an empty port": ({"MASTER_PORT": ""}, 2, "MASTER_PORT is not set"),
    "a word for a port": ({"MASTER_PORT": "http"}, 2, "MASTER_PORT=http is no port"),
    "too large a port": ({"MASTER_PORT": "99999"}, 2, "MASTER_PORT=99999 is no port"),
}


@pytest.fixture(scope="module")
def alone(rank):
    """A process and its port for each of ALONE; they wait for the others at the same time."""
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


def test_a_port_that_is_taken_is_named(rank):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        status, said = end(rank(MASTER_PORT=port))
    assert status == 1 and f":{port} is taken" in said and "--master_port" in said


def test_a_missing_interface_is_named(rank):
    port = free_port()
    pair = [rank(RANK=number, MASTER_PORT=port, GLOO_SOCKET_IFNAME="nope7") for number in (0, 1)]
    ended = [end(process) for process in pair]
    assert [status for status, _ in ended] == [1, 1]
    assert any("lacks a network interface" in said and "nope7" in said for _, said in ended)


def until_it_waits(process: Process) -> None:
    """It has a thread that watches signals, and one that looks for the others."""
    threads = Path(f"/proc/{process.pid}/task")
    if threads.exists():
        tiny.wait_for(lambda: len(list(threads.iterdir())) > 2, process)
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
def test_long_waiting_is_said_once(local_rank, said, monkeypatch, capsys):
    """The clock is fabricated: each look for the others takes four seconds, and the fifth finds them."""
    looks = []
    met = threading.Event()

    def look(*_, **__) -> None:
        looks.append(1)
        if len(looks) == 5:
            met.set()

    monkeypatch.setattr(meeting, "time", SimpleNamespace(monotonic=lambda: 4 * len(looks)))
    monkeypatch.setattr(meeting, "wait", look)
    meeting._hearing_signals(met.wait, Ranks(local_rank, local_rank, 2), "here:1")
    assert capsys.readouterr().err == said


# What each layer says, as it was seen; and the kind that it is.
SEEN = {
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:27531. This is "
    "typically caused by a remote worker crashing.": "has ended",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:3998: Connection reset by peer."
    " This is typically caused by a remote worker hanging or bugs in the application.": "has ended",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation "
    "to complete": "did not answer in time (Timed out waiting 5000ms for recv operation to complete)",
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find "
    "address for: nope": "lacks a network interface (ifa != nullptr. Unable to find address for: nope)",
    "[enforce fail at /gloo/transport/tcp/pair.cc:447] op.preamble.length <= op.nbytes. 20 vs 8": "out of step",
    "NCCL error in: ProcessGroupNCCL.cpp:3356, invalid usage (run with NCCL_DEBUG=WARN for details)\nDuplicate GPU "
    "detected : rank 1 and rank 0 both on CUDA device 1000": "use one GPU",
    "NCCL error in: NCCLUtils.hpp:317, remote process exited or there was a network error": "has ended",
    "NCCL error in: ProcessGroupNCCL.cpp:2, unhandled system error\nBootstrap : no socket interface found": "interface",
    "NCCL error: something quite new": "no longer speak to one another (NCCL error: something quite new)",
}


@pytest.mark.parametrize("text, kind", SEEN.items(), ids=range(len(SEEN)))
def test_errors_of_other_layers_in_their_own_words(text, kind, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    words = meeting.in_words(RuntimeError(text))
    assert kind in words and "/pytorch" not in words and len(words.splitlines()) == 2
    assert meeting.in_words(RuntimeError("a shape does not fit")) is None


def test_a_real_time_out_and_a_real_loss_are_told_apart(program, tmp_path):
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
    kinds = {"lost": "has ended", "silent": "did not answer in time"}
    pairs = {what: [program(code, number, what, tmp_path / what) for number in (0, 1)] for what in kinds}
    for what, (first, second) in pairs.items():
        out, err = first.communicate(timeout=60)
        assert kinds[what] in out, err
        second.kill()


# -------------------------------------------------------------------------- cores, deaf waits
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


DEAF = """
import signal, threading, time
from system import meeting
heard = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: heard.set())
meeting.watch_signals({signal.SIGTERM}, heard, grace=float(sys.argv[1]))
import torch.distributed as dist
from datetime import timedelta
print("ready", flush=True)
if sys.argv[2] == "deaf":
    dist.HashStore().wait(["never"], timedelta(seconds=60))
else:
    while not heard.is_set():
        time.sleep(0.05)
    time.sleep(1)
    print("done", flush=True)
"""


@pytest.mark.parametrize("grace, signals, seconds", [(1, 1, 4), (60, 2, 4)], ids=["after its grace", "second signal"])
def test_a_wait_that_hears_no_signal_is_ended(grace, signals, seconds, program):
    process = program(DEAF, grace, "deaf")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it waits
    begun = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    status, _, err = tiny.finish(process, 30)
    assert status == 143 and "SIGTERM: ended while waiting for other processes" in err
    assert time.monotonic() - begun < seconds


def test_a_signal_that_is_heard_is_left_to_its_handler(program):
    process = program(DEAF, 0.5, "hearing")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert tiny.finish(process, 30) == (0, "done\n", "")


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
    assert ("is one of 2 processes" in done.stderr) == (size == "2") and "Traceback" not in done.stderr
