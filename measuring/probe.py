"""Measure the package's own training update in one precision, in a process of its own.

A fresh process has clean memory and a clean allocator, so that precisions can be compared; `doctor` starts one for each
and lets them take turns. Knows nothing of verdicts, options or how results are shown.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ampscope.roofline import OTHER, matrix_rate, measured_groups
from ampscope.timing import timed, wait
from dataset import Batches
from features.cpu_layers import adapt_to_cpu
from images.stores import DecodedImages
from images.subsets import Subset
from model import build_model
from optimizer import make_optimizer
from precision import Precision, named_precision
from system.machine import GPUS, images_that_fit, peak_memory, reset_peak_memory
from train import update_weights
from transforms import Preprocess
from utils import RunError, choose_device, keep_freed_memory

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr
PHASES = ("data", "forward", "backward", "optimizer")
ROUNDS = 5
ROUND_SECONDS = 1.0
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192}  # of a matrix product large enough for the device's full rate
GRACE = 5  # seconds for an idle process to end by itself
PATIENCE = 240  # seconds for an answer: a hung driver must not hang the doctor
# The roofline's groups of operators, by the effect that autocast can have on them; the rest is "other".
KINDS = {
    "products": ("convolutions", "matrix products"),
    "optimizer": ("optimizer",),
    "casts": ("casts and copies",),
    "activations": ("normalization", "activations and sums", "pooling"),
}


class Update:
    """One model with everything that `train.update_weights` needs to train it with Adam."""

    def __init__(self, model: nn.Module, precision: Precision):
        if precision.device.type == "cpu":  # as in training
            adapt_to_cpu(model, amp=precision.amp)
        self.model: Any = model.train()  # or a wrapper around it
        self.precision = precision
        self.optimizer = make_optimizer(
            model.parameters(),
            "ADAM",
            learning_rate=1e-4,
            weight_decay=1e-4,
            fused=precision.device.type in ("cpu", *GPUS),
        )
        self.scaler = precision.grad_scaler()
        self.criterion = nn.CrossEntropyLoss(reduction="sum")

    def __call__(self, pieces: Any, image_count: int) -> None:
        """Run one update of `pieces`: (images, labels, weight, True for the last), as `dataset.Batches` yields them."""
        update_weights(
            self.model,
            pieces,
            image_count,
            optimizer=self.optimizer,
            scaler=self.scaler,
            precision=self.precision,
            criterion=self.criterion,
            clip_grad_norm=None,
        )


def updates_of_a_round(seconds: float) -> int:
    """Return the number of updates that fill a round, if one takes this many `seconds`."""
    return int(min(50, max(1, ROUND_SECONDS / seconds)))


def batch_that_fits(device: torch.device, image_size: int, wanted: int) -> int:
    """Return the number of images for a measured update: `wanted`, or fewer.

    A GPU gets a power of two that takes at most three fifths of its free memory. A CPU gets 32, because more do not
    keep it busier.
    """
    if device.type != "cuda":
        return min(wanted, 32)
    fits = images_that_fit(0.6 * torch.cuda.mem_get_info(device)[0], image_size)
    return int(min(wanted, 2 ** (fits.bit_length() - 1)))


def update_seconds(rounds: list[dict[str, Any]]) -> list[float]:
    """Return the seconds of an update in each of some rounds."""
    return [turn["seconds"] / turn["updates"] for turn in rounds]


def endless(batches: Batches) -> Iterator[Iterator]:
    """Yield the updates of epoch after epoch."""
    return itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())


class Bench:
    """The update on random pixels, built as in training; each method answers one question."""

    def __init__(self, *, device: str, precision: str, model_name: str, image_size: int, batch_size: int):
        self.device = choose_device(device)
        self.batch_size = batch_size
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        reset_peak_memory(self.device)
        self.memory_before = peak_memory(self.device)["peak_memory_mb"]
        model = build_model(model_name, 6, pretrained=False, image_size=image_size)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        self.update = update = Update(model, named_precision(precision, self.device))
        self.updates = endless(_random_batches(self.device, image_size, batch_size))
        # The update itself marks the end of each phase, so that training's own code is timed.
        self.moments: list[tuple[str, Any]] = []
        unscale = update.scaler.unscale_
        self.data_hook = model.register_forward_pre_hook(lambda *_: self._mark("data"))
        update.criterion.register_forward_hook(lambda *_: self._mark("forward"))

        def unscale_and_mark(optimizer: torch.optim.Optimizer) -> None:
            self._mark("backward")
            unscale(optimizer)

        setattr(update.scaler, "unscale_", unscale_and_mark)  # noqa: B010 (a method is replaced)

    def _mark(self, phase: str) -> None:
        """Record the end of `phase` by the device's own clock."""
        if self.device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.moments.append((phase, moment))

    def warm_up(self) -> dict[str, Any]:
        """Run a few updates, in which kernels are chosen and memory is first taken; then time one."""
        self.round(2)
        reset_peak_memory(self.device)
        return self.round(1)

    def round(self, updates: int) -> dict[str, Any]:
        """Time some updates in a row; return the seconds in all and by phase."""
        wait(self.device)
        started = time.perf_counter()
        self.moments.clear()
        self._mark("start")
        for _ in range(updates):
            self.update(next(self.updates), self.batch_size)
            self._mark("optimizer")
        wait(self.device)
        seconds = time.perf_counter() - started
        self.peak = peak_memory(self.device)
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, begin), (phase, end) in itertools.pairwise(self.moments):
            phases[phase] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return {"seconds": seconds, "updates": updates, "phases": phases}

    def memory(self) -> dict[str, Any]:
        """Return the peak memory in MB over all rounds so far, and the memory held before the model was built."""
        return {**self.peak, "before_mb": self.memory_before}

    def details(self, size: int) -> dict[str, Any]:
        """Return memory in MB over all rounds, shares by kind of operator, and TFLOP/s of a square matrix product."""
        memory = self.memory()
        shares, busy = self._shares()
        tflops = matrix_rate(self.device, self.update.precision.dtype, size=size) / 1e12
        slowdown = None
        if self.device.type == "cpu" and not self.update.precision.amp:
            # Processors may support float16 without PyTorch having fast kernels for it.
            slowdown = _convolution_seconds(torch.float16) / _convolution_seconds(torch.float32)
        return {"memory": memory, "shares": shares, "busy": busy, "tflops": tflops, "float16_slowdown": slowdown}

    def _profiled(self, updates: list[list]) -> list[Any]:
        """Return the operators of some updates with their time, as torch.profiler sums them."""
        cuda = self.device.type == "cuda"
        watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        wait(self.device)
        with profile(activities=watched, acc_events=True) as profiler:
            for pieces in updates:
                self.update(pieces, self.batch_size)
            wait(self.device)
        # On CUDA each operator carries the time of the kernels that it started; leave out entries that are not
        # operators.
        return [
            event
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU and (not cuda or "::" in event.key)
        ]

    def _shares(self) -> tuple[dict[str, float], float | None]:
        """Return shares of some updates by kind of operator, and on CUDA how busy the device is."""
        cuda = self.device.type == "cuda"
        updates = [list(next(self.updates)) for _ in range(3)]  # on the device already: `round` times the data
        seconds = measured_groups(self._profiled(updates), cuda=cuda)
        total = sum(seconds.values())
        shares = {kind: sum(seconds.get(group, 0.0) for group in groups) for kind, groups in KINDS.items()}
        shares["other"] = seconds.get(OTHER, 0.0)
        shares = {kind: share / total if total else 0.0 for kind, share in shares.items()}
        if not cuda:
            return shares, None
        phases = self.round(len(updates))["phases"]  # by the device's clock, without the profiler's overhead
        return shares, min(1.0, total / (sum(phases.values()) - phases["data"]))


def _random_batches(device: torch.device, image_size: int, batch_size: int) -> Batches:
    """Return the package's own loader over random pixels held in memory, four batches of them."""
    count = 4 * batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, image_size, image_size, 3), np.uint8)
    store = DecodedImages(pixels, np.zeros(count, np.uint32), {}, pin=device.type == "cuda")
    listing = [(Path(str(position)), position % 6) for position in range(count)]
    return Batches(Subset(store, listing, np.arange(count)), Preprocess(device, image_size), batch_size, 6)


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Return the seconds of a small convolution on the CPU, forward and backward."""
    images, weight = (
        torch.randn(count, side, side, 64, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
        for count, side in ((8, 28), (64, 3))
    )  # channels last, as in training
    return min(timed(lambda: nn.functional.conv2d(images, weight).sum().backward(), images.device))


class Probe:
    """A process with a Bench in it."""

    def __init__(self, bench: Callable[..., Any] = Bench, *, keep_memory: bool = True, **request: Any):
        """Start the process; return before it is ready. `request` are the keyword arguments of `bench`.

        With `keep_memory` the process keeps freed memory, as training does.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, bench, keep_memory, request)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process closes the pipe

    def ask(self, question: str, *, patience: float = PATIENCE, **arguments: Any) -> dict[str, Any]:
        """Return the answer of the bench's method `question`, within `patience` seconds.

        Raise RunError if it fails, hangs or dies.
        """
        try:
            self._pipe.send((question, arguments))
            if not self._pipe.poll(patience):
                raise RunError(f"no answer within {patience:g} seconds")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RunError(_ending(self._process.exitcode)) from None
        if isinstance(answer, str):
            raise RunError(answer)
        return answer

    def close(self) -> None:
        """Let an idle process end by itself; terminate a busy one."""
        self._pipe.close()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()


def what_may_help(reason: str) -> str:
    """Return a line of advice for an update that failed for this reason; empty if no size is to blame."""
    if any(sign in reason for sign in ("memory", "ALLOC_FAILED", "no answer")):
        return "\nTry a smaller --batch_size or --image_size."
    return "\nTry another --image_size: 224 suits most models." if "size" in reason else ""


def _ending(status: int | None) -> str:
    """Describe how a measuring process ended; a negative status is a signal's."""
    if status is None or status >= 0:
        return f"the measuring process ended with exit status {status}"
    killed = ", as systems do when memory runs out" if -status == getattr(signal, "SIGKILL", None) else ""
    return f"the measuring process was ended by signal {-status}{killed}"


def _serve(pipe: Any, make_bench: Callable[..., Any], keep_memory: bool, request: dict[str, Any]) -> None:
    """Answer questions until the pipe closes or the parent ends this process; answer a failure with its text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    if keep_memory:
        keep_freed_memory()
    bench = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            question, arguments = pipe.recv()
            try:
                bench = bench or make_bench(**request)
                answer = getattr(bench, question)(**arguments)
            except Exception as error:
                answer = (str(error) or repr(error)).splitlines()[0][:200]
            pipe.send(answer)
