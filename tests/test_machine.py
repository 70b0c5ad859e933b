"""What the machine gives: control groups of both versions, fabricated and real, limits of a process, open files.

The fabricated trees are those that systems and containers show; a real group is made if this process may.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

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


@pytest.mark.parametrize("top", ["/", "/../.."], ids=["own namespace", "mounted before it was made"])
def test_version_2_in_a_container(top, tmp_path, many_cores):
    """The container's own group is the top of what it sees."""
    files = {
        "sys/fs/cgroup/cpu.max": "300000 100000",
        "sys/fs/cgroup/memory.max": "max",
        "sys/fs/cgroup/memory.high": 700 * MB,
        "sys/fs/cgroup/memory.current": 0,
    }
    root = tree(tmp_path, "0::/", V2_MOUNT.format(top=top, place="/sys/fs/cgroup"), files)
    assert machine.cores(root) == 3
    assert machine.memory_limit(root) == machine.available_memory(root) == 700 * MB


@pytest.mark.parametrize("top", ["/", "/docker/1f"], ids=["seen from the host", "seen from the container"])
def test_version_1(top, tmp_path, many_cores):
    below = "" if top != "/" else "/docker/1f"
    root = tree(
        tmp_path,
        "9:name=systemd:/x\n5:cpuacct,cpu:/docker/1f\n4:memory:/docker/1f",
        V1_MOUNTS.format(top=top),
        {
            f"sys/fs/cgroup/cpu,cpuacct{below}/cpu.cfs_quota_us": 250000,
            f"sys/fs/cgroup/cpu,cpuacct{below}/cpu.cfs_period_us": 50000,
            f"sys/fs/cgroup/memory{below}/memory.limit_in_bytes": 256 * MB,
            f"sys/fs/cgroup/memory{below}/memory.usage_in_bytes": 250 * MB,
            f"sys/fs/cgroup/memory{below}/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MB}",
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


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"},
        {"sys/fs/cgroup/cpu.max": "100000 0", "sys/fs/cgroup/memory.max": ""},
        {"sys/fs/cgroup/cpu.max": "what", "sys/fs/cgroup/memory.max": "is this"},
    ],
    ids=["no files", "no limits", "nonsense", "words"],
)
def test_no_limit(files, tmp_path, many_cores):
    root = tree(tmp_path, "0::/", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), files)
    assert machine.cores(root) == 64 and machine.memory_limit(root) is None


def test_less_than_one_core_is_one(tmp_path, many_cores):
    files = {"sys/fs/cgroup/cpu.max": "20000 100000"}
    root = tree(tmp_path, "0::/", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), files)
    assert machine.cores(root) == 1


def test_a_system_without_control_groups(tmp_path, many_cores):
    assert machine.cores(tmp_path) == 64 and machine.memory_limit(tmp_path) is None


def test_a_group_that_is_not_seen(tmp_path, many_cores):
    """Version 1 in a container that mounts the host's whole tree elsewhere, or not at all."""
    mounts = V1_MOUNTS.format(top="/elsewhere")
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": 300 * MB}
    root = tree(tmp_path, "5:cpu,cpuacct:/a/b\n4:memory:/a/b", mounts, files)
    assert machine.memory_limit(root) == 300 * MB


def test_hardware_threads_of_one_core_count_once(tmp_path, many_cores):
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 32},{n % 32 + 32}" for n in range(64)
    }
    root = tree(tmp_path, "0::/", V2_MOUNT.format(top="/", place="/sys/fs/cgroup"), files)
    assert (machine.cores(root), machine.computing_cores(root)) == (64, 32)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("1000000 100000")
    assert machine.cores(root) == machine.computing_cores(root) == 10


# --------------------------------------------------------------------------------- real limits
def in_process(code: str, *before: str, **options) -> str:
    """What a fresh Python process that has imported `machine` prints."""
    command = [*before, sys.executable, "-c", f"from system import machine\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def real_group(request):
    """A function that makes a control group with a limit of this machine's own, and returns its list of processes."""
    made = []

    def make(*files: tuple[str, str, str]) -> list[Path]:
        for controller, name, value in files:
            own = next(machine._groups(controller, machine.ROOT), Path("/nonexistent"))
            group = own / f"amp-train-test-{os.getpid()}"
            try:
                group.mkdir()
                made.append(group)
                (group / name).write_text(value)
            except OSError:
                pytest.skip(f"this process may not make a control group for {controller}")
        return [group / "cgroup.procs" for group in made]

    yield make
    for group in made:
        group.rmdir()


def test_a_real_group_limits_cores_and_memory(real_group):
    lists = real_group(("cpu", "cpu.cfs_quota_us", "100000"), ("memory", "memory.limit_in_bytes", str(300 * MB)))
    join = "".join(f"echo $$ > {file}; " for file in lists)
    code = "print(machine.cores(), machine.cpu_quota(), machine.memory_limit(), machine.available_memory())"
    cores, quota, limit, available = in_process(code, "sh", "-c", join + 'exec "$@"', "sh").split()
    assert (cores, quota, limit) == ("1", "1.0", str(300 * MB))
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
