"""Read the limits of this process: cores, memory, open files, threads; name the device; read the peak memory.

A container or a cluster's job often gets a share of a machine. The smallest limit counts: the machine's, that of the
control groups (version 2), or that of the process. Imports torch only for CUDA.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
GPUS = ("cuda", "xpu")  # their modules in torch name the device and count its memory with the same functions
RESERVE = 16  # open files, and threads or processes, that a training needs beside its workers
NO_THREAD = "can't start new thread"  # Python's RuntimeError


# ------------------------------------------------------------------------------------- cores
def cores(root: Path = ROOT) -> int:
    """Return the number of cores that this process may use: its affinity, cut to the control groups' CPU quota.

    A quota of one and a half cores counts as two: both then run three quarters of the time.
    """
    return _within_quota(len(_affinity()), root)


def computing_cores(root: Path = ROOT) -> int:
    """Return `cores`, but count hardware threads that share one core once: arithmetic gains nothing from them."""
    folder = root / "sys/devices/system/cpu"
    own = {_text(folder / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in _affinity()}
    return _within_quota(len(own), root)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _within_quota(count: int, root: Path) -> int:
    quota = cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the control groups' CPU quota in cores; None if there is none."""
    quotas = []
    for folder in _groups(root):
        with contextlib.suppress(ValueError, ZeroDivisionError):  # "max PERIOD" means none
            quota, period = map(int, _text(folder / "cpu.max").split())  # both in microseconds
            quotas.append(quota / period)
    return min(quotas, default=None)


# ------------------------------------------------------------------------------------ memory
def available_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that this process can take before something is killed; None if the system does not tell."""
    known = [linux_memory("/proc/meminfo", "MemAvailable"), _address_space_left()]
    for folder in _groups(root):
        limit = _number(folder / "memory.max")
        if limit is not None:
            used = (_number(folder / "memory.current") or 0) - _reclaimable(folder)
            known.append(max(0, limit - max(0, used)))
    return min((size for size in known if size is not None), default=None)


def _groups(root: Path) -> list[Path]:
    """Return the folders of this process's control group and of all groups above it: each may set a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/") and ".." not in line:
            group = root / "sys/fs/cgroup" / line[len("0::/") :]
            return [folder for folder in (group, *group.parents) if folder.is_relative_to(root / "sys/fs/cgroup")]
    return [root / "sys/fs/cgroup"]


def _reclaimable(folder: Path) -> int:
    """Return the bytes of cached files that the kernel frees first, although they count as used."""
    lines = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if " " in line)
    return int(lines.get("inactive_file", 0))


def images_that_fit(memory: float, image_size: int) -> int:
    """Return how many images of this size an FP32 update of ResNet-18 can hold in `memory` bytes, at least 1.

    An image of 256 x 256 pixels takes 42 MB, others in proportion to their area.
    """
    return max(1, int(memory / (42 * 2**20 * (image_size / 256) ** 2)))


def images_at_once(count: int, device: torch.device) -> int:
    """Return how many of `count` images to compute at a time without gradients: on a CPU at most 32.

    More take as long there, and memory in proportion.
    """
    return min(count, 32) if device.type == "cpu" else count


def _address_space_left() -> int | None:
    """Return the bytes that `ulimit -v` leaves; None if it is not set."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = linux_memory("/proc/self/status", "VmSize")
    return None if limit == resource.RLIM_INFINITY or taken is None else max(0, limit - taken)


def linux_memory(file: str, name: str) -> int | None:
    """Return the bytes in line `name` of /proc/meminfo or /proc/self/status; None if there is no such file or line."""
    for line in _text(Path(file)).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


# ----------------------------------------------------------- open files, threads, processes
def allow_more_files() -> None:
    """Raise this process's limit of open files as far as it is allowed to."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = min(hard, 2**16) if hard != resource.RLIM_INFINITY else 2**16  # macOS refuses "unlimited"
    if soft != resource.RLIM_INFINITY and soft < highest:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def startable(wanted: int, files: int, threads: int) -> int:
    """Return how many worker processes, up to `wanted`, this process may start and still keep a reserve.

    Each takes `files` open files, and `threads` threads or processes, which the limits do not tell apart. They are
    taken and released again, so that every limit counts: of the process, the user and the container.
    """
    count = 0
    end = threading.Event()
    waiting = []
    with contextlib.ExitStack() as opened:
        opened.callback(end.set)
        with contextlib.suppress(OSError, RuntimeError):
            multiprocessing.Lock()  # workers need such locks, which use shared memory
            for number in range(wanted + 1):  # the first round takes the reserve
                for _ in range(files if number else RESERVE):
                    opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
                for _ in range(threads if number else RESERVE):
                    thread = threading.Thread(target=end.wait, daemon=True)
                    thread.start()
                    waiting.append(thread)
                count = number
    for thread in waiting:
        thread.join()
    return count


def submitted(pool: ThreadPoolExecutor, function: Callable, *arguments: Any) -> Future:
    """Submit a call to a pool; make the call in this thread if the pool's thread cannot be started."""
    try:
        return pool.submit(function, *arguments)
    except RuntimeError as error:
        if NO_THREAD not in str(error):
            raise
    done: Future = Future()
    done.set_result(function(*arguments))
    return done


# ------------------------------------------------------------------------ the device, the peak
def device_name(device: torch.device) -> str:
    """Return the marketing name of the device, for tables and records."""
    if device.type in GPUS:
        import torch

        return getattr(torch, device.type).get_device_name(device)
    if device.type == "cpu":
        for line in _text(Path("/proc/cpuinfo")).splitlines():
            if line.startswith("model name"):
                count = cores()
                return f"{line.split(':', 1)[1].strip()}, {count} {'core' if count == 1 else 'cores'}"
    return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> bool:
    """Reset the peak: the allocator's on CUDA and XPU, the process's on Linux. Return False if the system refuses."""
    if device.type in GPUS:
        import torch

        getattr(torch, device.type).reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory since the last reset, in MB of 2**20 bytes, under the names that `result.json` uses."""
    if device.type in GPUS:
        import torch

        gpu = getattr(torch, device.type)
        return {
            "peak_memory_mb": round(gpu.max_memory_allocated(device) / 2**20, 1),
            "reserved_memory_mb": round(gpu.max_memory_reserved(device) / 2**20, 1),
            "memory_kind": f"{device.type.upper()} allocated",
        }
    resident = round(_resident_peak() / 2**20, 1)
    return {"peak_memory_mb": resident, "reserved_memory_mb": None, "memory_kind": "process resident peak"}


def _resident_peak() -> int:
    """Return the process's resident peak in bytes, mapped cache files included."""
    peak = linux_memory("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def cpu_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the processor's instructions under the names of torch.cpu.get_capabilities, which PyTorch 2.10 lacks."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has}
    renamed = {"avx512f": "avx512_f", "asimd": "neon", "asimdhp": "fp16_arith"}  # names in Linux
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):  # on x86, on ARM
                return {renamed.get(flag, flag) for flag in line.partition(":")[2].split()}
    return set()


def chip_name() -> str:
    """Return the name of a Mac's chip (`Apple M2 Pro`); an empty string if the system does not report it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
