"""Describe a device as plain values by name: its number types, and the precision that `--amp` picks."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from typing import Any

import torch

from precision import card_of
from precision_table import PRECISIONS
from system.cards import Card
from system.machine import cpu_instructions, device_name, linux_memory

INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "sve",
    "bf16",
    "fp16_arith",
)  # names in torch.cpu.get_capabilities


def machine(device: torch.device) -> dict[str, Any]:
    """Return the properties of the device and its number types by name, as the doctor shows them."""
    import torchvision  # takes a second, which no other command should wait for

    card = card_of(device)
    found = {"numbers_of": card.family, **_numbers(card)}
    if device.type == "cuda":
        found = {**_cuda(device), **found}
    elif device.type == "cpu":
        found = {"instructions": _instructions(cpu_instructions()), **found}
    return {
        "device": str(device),
        "name": device_name(device),
        **found,
        "memory_gb": round((linux_memory("/proc/meminfo", "MemTotal") or 0) / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _numbers(card: Card) -> dict[str, Any]:
    """Return the row of docs/cards.md for a device."""
    pick = "nothing" if card.pick is None else PRECISIONS[card.pick].amp_dtype
    return {
        "float16": card.float16,
        "bfloat16": card.bfloat16,
        "tf32": "available, off unless --tf32" if card.tf32 else "none",
        "float8": "in hardware, not in autocast" if card.float8 else "none",
        "matrix_unit": card.matrix_unit,
        "--amp_picks": f"{pick}: {card.reason}",
    }


def _instructions(flags: set[str]) -> str:
    """Return those of a processor's instructions that matter here."""
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def _cuda(device: torch.device) -> dict[str, Any]:
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    free, total = torch.cuda.mem_get_info(device)
    return {
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_memory_gb": round(total / 2**30, 1),
        "gpu_memory_free_gb": round(free / 2**30, 1),
    }
