"""How the processes of a job meet, and what is said if they do not: as real processes, ports and signals.

Each waits a second instead of five minutes. Run it alone: pytest tests/long/test_meeting.py
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from tiny import ROOT, free_port

from distributed import Ranks
from system import meeting

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
QUICK = """
import sys
from datetime import timedelta
from system import meeting
meeting.PATIENCE = timedelta(seconds={patience})
import main
main.run()
"""
COMMAND = ["train", "--device=cpu", "--data_dir=nothing", "--checkpoint_dir=nowhere"]


def start(*, patience: float = 1, command=COMMAND, **variables: object) -> subprocess.Popen:
    """One process of a job of two, or what `variables` say."""
    job = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | variables
    environment = {name: value for name, value in os.environ.items() if name not in job}
    environment |= {name: str(value) for name, value in job.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", QUICK.format(patience=patience), *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in err and out == "", (out, err)
    return process.returncode, err


@pytest.mark.parametrize(
    "variables",
    [{}, {"RANK": 1, "LOCAL_RANK": 1}, {"RANK": 1, "MASTER_ADDR": "no-such-host.invalid"}],
    ids=["the first alone", "the second alone", "unknown host"],
)
def test_processes_that_cannot_meet_say_where(variables):
    port = free_port()
    status, said = end(start(MASTER_PORT=port, **variables))
    assert status == 1 and f"could not meet the others at {variables.get('MASTER_ADDR', '127.0.0.1')}:{port}" in said
    assert "firewall" in said


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        status, said = end(start(MASTER_PORT=port))
    assert status == 1 and f":{port} is taken" in said and "--master_port" in said


def test_a_missing_interface():
    port = free_port()
    pair = [start(RANK=rank, MASTER_PORT=port, GLOO_SOCKET_IFNAME="nope7") for rank in (0, 1)]
    ended = [end(process) for process in pair]
    assert [status for status, _ in ended] == [1, 1]
    assert any("lacks a network interface" in said and "nope7" in said for _, said in ended)


@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_process_that_waits_hears_signals(number, rank):
    process = start(RANK=rank, LOCAL_RANK=rank, patience=600)
    time.sleep(5)
    assert process.poll() is None
    process.send_signal(number)
    begun = time.monotonic()
    status, _ = end(process, 20)
    assert status == 128 + number and time.monotonic() - begun < 8


def test_waiting_is_said():
    process = start(patience=600)
    assert process.stderr.readline().startswith("waiting for other processes at 127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
    ],
    ids=["left over", "empty", "a word", "too large"],
)
def test_half_of_a_jobs_environment_is_a_mistake(variables, named):
    status, said = end(start(**variables))
    assert status == 2 and named in said


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


def test_a_real_time_out_and_a_real_loss(tmp_path):
    """Two threads' process groups on one store: one is silent, then gone."""
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
    time.sleep(0 if what == "lost" else 5)
    os._exit(0)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(meeting.in_words(error))
"""
    for what, kind in (("lost", "has ended"), ("silent", "did not answer in time")):
        file = str(tmp_path / what)
        pair = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), what, file], cwd=ROOT, stdout=-1, text=True)
            for rank in (0, 1)
        ]
        out, _ = pair[0].communicate(timeout=60)
        pair[1].wait(60)
        assert kind in out


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
import os, signal, sys, threading, time
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
    print("done")
"""


@pytest.mark.parametrize("grace, signals, seconds", [(1, 1, 4), (60, 2, 4)], ids=["after its grace", "second signal"])
def test_a_wait_that_hears_no_signal_is_ended(grace, signals, seconds):
    command = [sys.executable, "-c", DEAF, str(grace), "deaf"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it waits
    begun = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "SIGTERM: ended while waiting for other processes" in err
    assert time.monotonic() - begun < seconds


def test_a_signal_that_is_heard_is_left_to_its_handler():
    command = [sys.executable, "-c", DEAF, "0.5", "hearing"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "done\n", "")


END = """
import atexit, concurrent.futures, sys, time
import main

class Last:
    def __del__(self):
        print("Python has shut down", flush=True)

kept = Last()
atexit.register(print, "handlers of exit ran")
concurrent.futures.ThreadPoolExecutor(1).submit(lambda: (time.sleep(2), print("threads ended")))
sys.argv = ["main.py", "evaluate", "--checkpoint_name=none"]
main.run()
"""


@pytest.mark.parametrize("size", ["2", "1"])
def test_one_of_several_processes_ends_without_pythons_shutdown(size):
    """In which gloo's threads, which outlive the group, could abort it."""
    done = subprocess.run(
        [sys.executable, "-c", END],
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": size},  # and none of the other variables: the processes cannot meet
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = ["threads ended", "handlers of exit ran"] + ([] if size == "2" else ["Python has shut down"])
    assert (done.returncode, done.stdout.splitlines()) == (2, lines)
    assert ("is one of 2 processes" in done.stderr) == (size == "2") and "Traceback" not in done.stderr
