"""What the machine gives: control groups of both versions, as systems and containers show them.

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
V1_MOUNTS = (
    "33 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:30 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
V2_MOUNT = "35 31 0:31 {top} {place} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(folder: Path, groups: str, mounts: str, files: dict[str, object]) -> Path:
    """A root folder with what /proc says of the control groups, and their files."""
    other = "22 26 0:21 / /proc rw,nosuid - proc proc rw\n24 1 8:1 / / rw - ext4 /dev/root rw\n"
    everything = {"proc/self/cgroup": groups, "proc/self/mountinfo": other + mounts, **files}
    for name, content in everything.items():
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
        V2_MOUNT.format(top="/", place="/sys/fs/cgroup"),
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
    assert machine.memory_limit(root) == machine.total_memory(root) == 512 * MB
    assert machine.available_memory(root) == 212 * MB  # less than the 300 that are left one level higher


def test_version_1(tmp_path, many_cores):
    """As a container sees it: its own group is the top of what is mounted."""
    root = tree(
        tmp_path,
        "9:name=systemd:/x\n5:cpuacct,cpu:/docker/1f\n4:memory:/docker/1f",
        V1_MOUNTS.format(top="/docker/1f"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 250000,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 50000,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 256 * MB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 250 * MB,
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MB}",
        },
    )
    assert machine.cores(root) == 5
    assert machine.memory_limit(root) == 256 * MB and machine.available_memory(root) == 56 * MB


def test_both_versions_at_once(tmp_path, many_cores):
    """Controllers in version 1, version 2 mounted beside it without any, as older systemd does."""
    root = tree(
        tmp_path,
        "4:memory:/user\n3:cpu,cpuacct:/user\n0::/user/session",
        V1_MOUNTS.format(top="/") + V2_MOUNT.format(top="/", place="/sys/fs/cgroup/uni\\040fied"),
        {
            "sys/fs/cgroup/cpu,cpuacct/user/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu,cpuacct/user/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/memory/user/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/uni fied/user/cpu.max": "200000 100000",
        },
    )
    assert machine.cores(root) == 2 and machine.memory_limit(root) is None


def test_what_a_group_does_not_say_limits_nothing(tmp_path, many_cores):
    """No control groups, no files, no limits, nonsense; less than one core is one."""
    assert machine.cores(tmp_path) == 64 and machine.memory_limit(tmp_path) is None
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
        root = tree(tmp_path / str(place), "0::/", V2_MOUNT.format(top="/../..", place="/sys/fs/cgroup"), files)
        assert machine.cores(root) == cores and machine.memory_limit(root) is None, (cpu, memory)


def test_hardware_threads_of_one_core_count_once(tmp_path, many_cores):
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 32},{n % 32 + 32}" for n in range(64)
    }
    root = tree(tmp_path, "0::/", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), files)
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
