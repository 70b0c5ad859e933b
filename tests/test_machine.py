"""What the machine gives: control groups of version 2, as systems and containers show them.

Real groups and limits: tests/long/test_real_limits.py.
"""

import gc
import importlib
import os
from pathlib import Path

import pytest

import utils
from system import machine

MB = 2**20


def tree(folder: Path, group: str, files: dict[str, object]) -> Path:
    """Make a root folder with what /proc says of the control group, and their files."""
    for name, content in {"proc/self/cgroup": group, **files}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n" if content != "" else "")
    return folder


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def test_version_2_takes_the_smallest_limit_on_the_way_up(tmp_path, many_cores):
    """As systemd and Kubernetes nest them: the limit may stand at any level."""
    root = tree(
        tmp_path,
        "0::/kubepods/pod7/box",
        {
            "sys/fs/cgroup/cgroup.controllers": "cpu memory",
            "sys/fs/cgroup/kubepods/cpu.max": "400000 100000",
            "sys/fs/cgroup/kubepods/memory.max": 900 * MB,
            "sys/fs/cgroup/kubepods/memory.current": 600 * MB,
            "sys/fs/cgroup/kubepods/pod7/cpu.max": "150000 100000",
            "sys/fs/cgroup/kubepods/pod7/memory.max": 512 * MB,
            "sys/fs/cgroup/kubepods/pod7/memory.current": 400 * MB,
            "sys/fs/cgroup/kubepods/pod7/memory.stat": f"anon {MB}\ninactive_file {100 * MB}\nactive_file 5",
            "sys/fs/cgroup/kubepods/pod7/box/cpu.max": "max 100000",
            "sys/fs/cgroup/kubepods/pod7/box/memory.max": "max",
        },
    )
    assert machine.cpu_quota(root) == 1.5 and machine.cores(root) == 2
    assert machine.available_memory(root) == 212 * MB  # less than the 300 that are left one level higher


def test_what_a_group_does_not_say_limits_nothing(tmp_path, many_cores, monkeypatch):
    """No control groups, no files, no limits, nonsense; less than one core is one."""
    monkeypatch.setattr(machine, "linux_memory", lambda *_: 900 * MB)
    monkeypatch.setattr(machine, "_address_space_left", lambda: None)
    assert machine.cores(tmp_path) == 64 and machine.available_memory(tmp_path) == 900 * MB
    for place, (cpu, memory, cores) in enumerate(
        [
            (None, None, 64),
            ("max 100000", "max", 64),
            ("100000 0", "", 64),
            ("what", "is this", 64),
            ("20000 100000", "max", 1),
        ]
    ):
        files = {"sys/fs/cgroup/cpu.max": cpu, "sys/fs/cgroup/memory.max": memory} if cpu else {}
        root = tree(tmp_path / str(place), ["0::/../..", "5:cpu:/a\n0::/a"][place % 2], files)
        assert machine.cores(root) == cores and machine.available_memory(root) == 900 * MB, (cpu, memory)


def test_hardware_threads_of_one_core_count_once(tmp_path, many_cores):
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 32},{n % 32 + 32}" for n in range(64)
    }
    root = tree(tmp_path, "0::/", files)
    assert (machine.cores(root), machine.computing_cores(root)) == (64, 32)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("1000000 100000")
    assert machine.cores(root) == machine.computing_cores(root) == 10


def test_garbage_is_searched_again_after_an_import_even_one_that_fails():
    frozen = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError), utils.importing():
        assert not gc.isenabled()
        importlib.import_module("no_such_module")
    assert gc.isenabled() and gc.get_freeze_count() == frozen  # what a test left must not stay for ever
