"""Joules that this machine's own counters report: NVML on CUDA, RAPL on a processor. Nothing if there are none.

NVML needs the package nvidia-ml-py and a Volta card or later; RAPL's files are often readable by root alone.
Knows nothing of what the energy is spent on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that returns the joules used so far by the card, or by the processors' packages; None without one.

    Only differences mean something. RAPL counts whatever else the processors do in the meantime, too.
    """
    if device.type == "cuda":
        return _nvml_counter(device)
    if device.type == "cpu":
        return _rapl_counter(POWERCAP)
    return None


def _nvml_counter(device: torch.device) -> Callable[[], float] | None:
    """NVML's total energy of the card, found by its UUID: CUDA's numbers are not NVML's."""
    with suppress(Exception):  # no package, no driver, no such card, no counter: all the same to who asks
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # raises before Volta
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return None


def _rapl_counter(root: Path) -> Callable[[], float] | None:
    """The sum over the processors' packages (`intel-rapl:0`, AMD's as well), whose counters begin anew when full."""
    packages = []
    with suppress(OSError, ValueError):
        for folder in sorted(root.glob("intel-rapl:*")):
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                packages.append(_Package(folder))
    if not packages:
        return None
    return lambda: sum(package.joules() for package in packages)


class _Package:
    """One RAPL counter, its overflows added up; it must be asked more than once in each turn (minutes)."""

    def __init__(self, folder: Path):
        self.file = folder / "energy_uj"
        self.size = int((folder / "max_energy_range_uj").read_text()) + 1
        self.last = int(self.file.read_text())
        self.total = 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.total += (now - self.last) % self.size
        self.last = now
        return self.total / 1e6
