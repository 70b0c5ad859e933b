"""The rungs of the ladder: the update of the 2020 loop, and each change since then.

Each rung is measured in a process of its own (probe.Probe). Knows nothing of how they are compared or shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ampscope.roofline import copy_bandwidth, count_step, matrix_rate, measured_groups
from ampscope.tensors import dtype_name
from ampscope.timing import wait
from features.cpu_layers import SmallMapConv2d, bfloat16_products
from measuring.probe import Bench, Update
from model import StepModel
from precision import Precision
from system.cards import NATIVE, processor


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: the change (`settings` of RungBench), or the reason why it is left out here."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""


FIRST = Rung(
    "FP32 as the 2020 loop ran it",
    {
        "precision": "fp32",
        "loop": "2020",
        "channels_last": False,
        "keep_memory": False,
        "products": "float32",
        "compile_mode": None,
        "on_device": False,
    },
)


def rungs_for(device: torch.device, precisions: list[str], flags: set[str]) -> list[Rung]:
    """Return the ladder on `device`, from the bottom: the change of each rung to those below it.

    `precisions` are those that make sense here, `flags` the instructions of a CPU.
    """
    cuda = device.type == "cuda"
    amp = next((name for name in precisions if name.startswith("amp")), None)
    rungs = [FIRST, Rung("channels-last", {"channels_last": True})]
    if device.type == "cpu":
        if processor(flags).bfloat16 == NATIVE:
            rungs.append(Rung("bfloat16 products inside FP32", {"products": "bfloat16"}))
        else:
            rungs.append(Rung("bfloat16 products inside FP32", skipped="this processor has no bfloat16 instructions"))
    elif "tf32" in precisions:
        rungs.append(Rung("TF32", {"precision": "tf32"}))
    else:
        rungs.append(Rung("TF32", skipped="this device has no TF32"))
    if amp:
        rungs.append(Rung("AMP", {"precision": amp, "products": "float32"}))
    else:
        rungs.append(Rung("AMP", skipped="no 16-bit type can be used on this device"))
    rungs.append(Rung("fused optimizer, nothing waits", {"loop": "package"}))
    if device.type == "cpu":
        rungs.append(Rung("freed memory kept, no ReLU in place", {"keep_memory": True}))
    rungs.append(Rung("--compile", {"compile_mode": "default"}))
    if cuda:
        rungs.append(Rung("--cuda_graphs", {"compile_mode": "graphs"}))
    else:
        rungs.append(Rung("--cuda_graphs", skipped="CUDA graphs need --device cuda"))
    if device.type == "cpu":
        rungs.append(Rung("images kept on the device", skipped="a CPU's images are in its memory already"))
    else:
        rungs.append(Rung("images kept on the device", {"on_device": True}))
    return rungs


def step_up(settings: dict[str, Any], rung: Rung) -> dict[str, Any]:
    """Return the settings of the rungs below, updated by those of `rung`."""
    return {**settings, **rung.settings}


class RungBench(Bench):
    """A Bench whose update has the settings of one rung, those of FIRST with some changes."""

    def __init__(self, settings: dict[str, Any], **request: Any):
        super().__init__(precision=settings["precision"], **request)
        bfloat16_products(settings["products"] == "bfloat16")
        self.compiled = settings["compile_mode"] is not None
        update = self.update
        if not settings["channels_last"]:
            update.model.to(memory_format=torch.contiguous_format)
        if not settings["keep_memory"]:  # torchvision's own layers
            for module in update.model.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = True
                if isinstance(module, SmallMapConv2d):
                    module.__class__ = nn.Conv2d  # type: ignore[assignment]
        if settings["loop"] == "2020":
            self.update = Loop2020(update)
        elif self.compiled:
            self.data_hook.remove()  # otherwise the compiler would trace it and break its graph there
            graphs = settings["compile_mode"] == "graphs"
            update.model = StepModel(update.model, {self.batch_size}, True, graphs=graphs)
        if settings["on_device"]:
            self.updates = _kept(self.updates)
        if not settings["channels_last"]:
            self.updates = _contiguous(self.updates)

    def evidence(self, size: int) -> dict[str, Any]:
        """Return the roofline's input: operators of one update, rates of this machine, seconds by group of operators.

        `size` is that of the matrix products. A compiled update has other operators, and gives only rates.
        """
        dtype = self.update.precision.dtype
        rates = {dtype_name(dtype): matrix_rate(self.device, dtype, size=size)}
        if dtype != torch.float32:
            rates["float32"] = matrix_rate(self.device, torch.float32, size=size)
        found = {"rates": rates, "bandwidth": copy_bandwidth(self.device), "operators": None, "measured": None}
        if self.compiled:
            return found
        pieces = [list(next(self.updates)) for _ in range(3)]
        wait(self.device)
        operators = count_step(lambda: self.update(pieces[0], self.batch_size), self.device)
        groups = measured_groups(self._profiled(pieces[1:]), cuda=self.device.type == "cuda")
        measured = {name: value / 2 for name, value in groups.items()}
        return {**found, "operators": operators, "measured": measured}


class Loop2020(Update):
    """The tutorial's update: it reads three values that wait for the device, and uses only its own loop's AMP calls."""

    def __init__(self, update: Update):
        self.model = update.model
        self.precision: Precision = update.precision
        # torch 1.6 had neither fused nor foreach optimizers
        self.optimizer = torch.optim.Adam(update.model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False)
        self.scaler = update.scaler
        self.criterion = nn.CrossEntropyLoss()

    def __call__(self, pieces: Any, image_count: int) -> None:
        ((images, labels, *_),) = pieces
        with self.precision.autocast():
            outputs = self.model(images)
            loss = self.criterion(outputs, labels)
        correct = (outputs.argmax(1) == labels).float().mean()
        loss.item()
        correct.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss.tolist()


def _contiguous(updates: Iterator[Iterator]) -> Iterator[Iterator]:
    """Yield the same updates with images in PyTorch's default memory format."""
    for pieces in updates:
        yield ((images.contiguous(), *rest) for images, *rest in pieces)


def _kept(updates: Iterator[Iterator]) -> Iterator[Iterator]:
    """Yield the first update's batch again and again, to measure the update without copies to the device."""
    pieces = list(next(updates))
    while True:
        yield iter(pieces)
