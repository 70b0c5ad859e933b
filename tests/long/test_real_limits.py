"""Limits that the system really sets: control groups, ulimit, affinity, open files; and the peak of memory."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from system import machine

MB = 2**20


def in_process(code: str, *before: str, **options) -> str:
    """Return the output of a fresh Python process that has imported `machine`."""
    command = [*before, sys.executable, "-c", f"from system import machine\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def real_group():
    """Make a control group with limits of this machine's own, and return its list of processes."""
    above = machine._groups(machine.ROOT)[0]
    if not (above / "cgroup.controllers").exists():
        pytest.skip("no control groups of version 2")
    group = above / f"amp-train-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.max").write_text("100000 100000")
        (group / "memory.max").write_text(str(300 * MB))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip("this process may not make a control group of version 2")
    yield group / "cgroup.procs"
    group.rmdir()


def test_a_real_group_limits_cores_and_memory(real_group):
    join = f"echo $$ > {real_group}; "
    code = "print(machine.cores(), machine.cpu_quota(), machine.available_memory())"
    cores, quota, available = in_process(code, "sh", "-c", join + 'exec "$@"', "sh").split()
    assert (cores, quota) == ("1", "1.0")
    assert 200 * MB < int(available) < 300 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ulimit_counts_as_memory():
    code = "print(machine.available_memory())"
    left = int(in_process(code, "bash", "-c", 'ulimit -v 1000000; exec "$@"', "bash"))
    assert 0 < left < 1000000 * 1024


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_counts():
    first = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, [{first}])\nprint(machine.cores())"
    assert in_process(code) == "1"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no list of open files here")
def test_open_files_are_raised_as_far_as_allowed():
    code = "import resource\nmachine.allow_more_files()\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))"
    limits = in_process(code, "bash", "-c", 'ulimit -S -n 40; ulimit -H -n 90; exec "$@"', "bash")
    assert limits == "(90, 90)"


def test_device_name_and_peak():
    name = machine.device_name(torch.device("cpu"))
    assert name
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert name.endswith(f"{machine.cores()} core" if machine.cores() == 1 else f"{machine.cores()} cores")
    code = """
import torch
device = torch.device("cpu")
machine.reset_peak_memory(device)
before = machine.peak_memory(device)
block = torch.ones(2**24)  # 64 MB
after = machine.peak_memory(device)
print(after["peak_memory_mb"] - before["peak_memory_mb"], after["memory_kind"])
"""
    grown, kind = in_process(code).split(" ", 1)  # this process may have 64 MB that it freed, and not grow
    assert float(grown) > 50 and kind == "process resident peak"
