"""Time a call on a device, and compute how far a faster part can speed up the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed_once(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def timed(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> list[float]:
    """Return the seconds of each of some calls, after one for warm-up."""
    return [timed_once(function, device) for _ in range(repeats + 1)][1:]


def amdahl(share: float, speedup: float) -> float:
    """Return the speed-up of the whole if a part, `share` of the old time, gets faster by `speedup`: 1 / (1 - f + f/s).

    Source: G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing capabilities",
    AFIPS 1967.
    """
    return 1 / (1 - share + share / speedup)
