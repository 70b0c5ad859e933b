"""Measures the real training update in one precision; run as a script, in a process of its own.

A fresh process has clean memory and a clean allocator, so that precisions can be compared. `doctor` starts one
per precision and lets them take turns. Knows nothing of verdicts, options or how findings are shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils import RunError, choose_device, keep_freed_memory, peak_memory, reset_peak_memory

PHASES = ("data", "forward", "backward", "optimizer")
# Operators of an update, by what autocast can do for them: the first pattern that matches counts.
OPERATORS = {
    "products": r"conv|::(add|b|badd)?mm$|::mv|::linear|::matmul|scaled_dot_product|attention",
    "optimizer": r"_fused_|_foreach_|Optimizer|linalg_vector_norm|_amp_",
    "casts": r"_to_copy|::copy_|::to$",
    "activations": r"norm|relu|threshold|hard|silu|sigmoid|gelu|pool|::add_?$|::mul_?$|cat|mean|dropout|softmax|clamp",
}


# --------------------------------------------------------------------------------- the parent's side
class Probe:
    """A child process that measures one precision; every method is one question to it."""

    def __init__(self, **request: Any):
        """`request`: device, precision, model_name, image_size, batch_size. Returns before it is ready."""
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)], text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )
        self._timer = threading.Timer(240, self._process.kill)  # a hung driver must not hang the doctor
        self._timer.daemon = True
        self._timer.start()
        self._write(request)

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Sends a question and waits for its answer. Raises RunError where the child failed."""
        self._write({"question": question, **arguments})
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        raise RunError(lines[-1][:200] if lines else f"the measuring process ended with {self._process.returncode}")

    def _write(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reason is read where the answer is missing
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends the child, whatever it is doing."""
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._errors):
            stream.close()
        with contextlib.suppress(OSError):  # an unsent question is of no use any more
            self._process.stdin.close()


# ---------------------------------------------------------------------------------- the child's side
class Marks:
    """The moments at which an update passes from one phase to the next, by the device's own clock."""

    def __init__(self, device):
        self.device, self.moments = device, []

    def mark(self, name: str) -> None:
        """`name` is the phase that ends here."""
        if self.device.type == "cuda":
            import torch

            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.moments.append((name, moment))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, added up; only the first mark of a name after another one's counts."""
        if self.device.type == "cuda":
            self.moments[-1][1].synchronize()
        totals = dict.fromkeys(PHASES, 0.0)
        _, since = self.moments[0]
        for name, moment in self.moments[1:]:
            gap = since.elapsed_time(moment) / 1000 if self.device.type == "cuda" else moment - since
            if name in totals:
                totals[name] += gap
            since = moment
        return totals


class Bench:
    """Model, optimizer, scaler and batches of random pixels, put together as training does."""

    def __init__(self, *, device: str, precision: str, model_name: str, image_size: int, batch_size: int):
        import torch

        from model import avoid_in_place, build_model
        from precision import named_precision
        from train import make_optimizer

        self.device = choose_device(device)
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.precision, self.batch_size = named_precision(precision, self.device), batch_size
        reset_peak_memory(self.device)
        self.memory_before = peak_memory(self.device)["peak_memory_mb"]
        model = build_model(model_name, 6, pretrained=False)
        if self.device.type == "cpu" and self.precision.amp:
            avoid_in_place(model)
        self.model = model.to(self.device, memory_format=torch.channels_last).train()
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = make_optimizer(model.parameters(), "ADAM", learning_rate=1e-4, weight_decay=1e-4, fused=fused)
        self.scaler = self.precision.grad_scaler()
        self.criterion = torch.nn.CrossEntropyLoss(reduction="sum")
        self.batches = _random_batches(self.device, image_size, batch_size)
        self._updates = self._endless()
        self._observe()

    def _endless(self) -> Iterator[Any]:
        epoch = 0
        while True:
            yield from self.batches.epoch(epoch)
            epoch += 1

    def _observe(self) -> None:
        """Lets the update itself say when it passes from phase to phase, so that training's own code is timed."""
        self.marks = Marks(self.device)
        scale, unscale = self.scaler.scale, self.scaler.unscale_

        def noted_scale(value):
            if self.marks.moments and self.marks.moments[-1][0] == "data":
                self.marks.mark("forward")
            return scale(value)

        def noted_unscale(optimizer):
            self.marks.mark("backward")
            return unscale(optimizer)

        self.model.register_forward_pre_hook(lambda *_: self.marks.mark("data"))
        self.scaler.scale, self.scaler.unscale_ = noted_scale, noted_unscale

    def update(self, pieces: Any) -> None:
        from train import update_weights

        update_weights(
            self.model, pieces, self.batch_size, optimizer=self.optimizer, scaler=self.scaler,
            precision=self.precision, criterion=self.criterion, clip_grad_norm=None,
        )

    def round(self, updates: int) -> dict[str, Any]:
        """Times some updates in a row: seconds in all, and by phase."""
        self.marks.moments.clear()
        _wait(self.device)
        started = time.perf_counter()
        for _ in range(updates):
            self.marks.mark("between")
            self.update(next(self._updates))
            self.marks.mark("optimizer")
        _wait(self.device)
        seconds, self.peak = time.perf_counter() - started, peak_memory(self.device)
        return {"seconds": seconds, "updates": updates, "phases": self.marks.seconds()}

    def warm_up(self) -> dict[str, Any]:
        """A few updates, in which kernels are chosen and memory is first taken; then one that is timed."""
        self.round(2)
        reset_peak_memory(self.device)
        return self.round(1)

    def memory(self) -> dict[str, Any]:
        """Peak over all rounds and what the process held before there was a model, in MB."""
        parameters = sum(parameter.nbytes for parameter in self.model.parameters()) / 2**20
        return {**self.peak, "before_mb": self.memory_before, "parameters_mb": round(parameters, 1)}

    def profile(self) -> dict[str, Any]:
        """Shares of an update by kind of operator, from torch.profiler; on CUDA also how busy the device is."""
        from torch.profiler import ProfilerActivity, profile

        pieces = [list(next(self._updates)) for _ in range(2)]  # on the device already: data is timed by `round`
        self.update(pieces[0])
        _wait(self.device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        started = time.perf_counter()
        with profile(activities=activities, acc_events=True) as profiler:
            self.update(pieces[1])
            _wait(self.device)
        return shares_by_kind(profiler, self.device, time.perf_counter() - started)

    def kernels(self, size: int, images: int) -> dict[str, float]:
        """Own rate, in TFLOP/s, of a square matrix product and of a convolution on so many images."""
        import torch

        dtype = self.precision.dtype
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        product = _best_seconds(lambda: left @ right, self.device)
        convolution, flop = _convolution(images, 128, 28, self.device, dtype)
        return {"matrix_product": 2 * size**3 / product / 1e12,
                "convolution": flop / _best_seconds(convolution, self.device) / 1e12}

    def float16(self) -> dict[str, float]:
        """How much longer a small convolution, forward and backward, takes in float16 than in float32."""
        import torch

        seconds = [_best_seconds(_convolution(8, 64, 28, self.device, dtype)[0], self.device)
                   for dtype in (torch.float32, torch.float16)]
        return {"slowdown": seconds[1] / seconds[0]}


def _random_batches(device, image_size: int, batch_size: int):
    """The package's own loader over random pixels held in memory, four batches of them."""
    import numpy as np

    from dataset import Batches, Pixels, Subset
    from images import DecodedImages

    count = 4 * batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, image_size, image_size, 3), np.uint8)
    store = DecodedImages(pixels, np.zeros(count, np.uint32), {}, pin=device.type == "cuda")
    listing = [(Path(str(position)), position % 6) for position in range(count)]
    return Batches(Subset(store, listing, np.arange(count)), Pixels(device, image_size), batch_size, 6)


def _convolution(count: int, channels: int, side: int, device, dtype) -> tuple[Callable[[], None], float]:
    """A 3x3 convolution, forward and backward, as ResNet's are, and its floating-point operations."""
    import torch

    images = torch.randn(count, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    images.requires_grad_()
    weight.requires_grad_()

    def run() -> None:
        output = torch.nn.functional.conv2d(images, weight, padding=1)
        torch.autograd.grad(output, [images, weight], torch.ones_like(output))

    return run, 3 * 2 * count * side**2 * channels**2 * 9


def _best_seconds(function: Callable[[], Any], device, repeats: int = 3) -> float:
    """The shortest of some runs: whatever else runs on the machine can only make one longer."""
    seconds = []
    for _ in range(repeats + 1):  # the first one is warm-up
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def kind_of(operator: str) -> str:
    """Which of OPERATORS an operator's name belongs to, or `other`."""
    return next((kind for kind, pattern in OPERATORS.items() if re.search(pattern, operator)), "other")


def shares_by_kind(profiler, device, wall: float) -> dict[str, Any]:
    """Shares of the profiled time by kind of operator, and the share of `wall` seconds the device was busy."""
    from torch.autograd import DeviceType

    gpu = device.type == "cuda"
    totals = dict.fromkeys([*OPERATORS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # on CUDA each operator carries the time of the kernels it started
            totals[kind_of(event.key)] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(totals.values())
    shares = {kind: seconds / total if total else 0.0 for kind, seconds in totals.items()}
    return {"shares": shares, "busy": min(1.0, total / 1e6 / wall) if gpu else None}


def serve() -> None:
    """Answers the parent's questions, one JSON object a line, until it closes the pipe or ends this process."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between the answers
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    keep_freed_memory()
    bench = Bench(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        question = json.loads(line)
        method = getattr(bench, question.pop("question"))
        print(json.dumps(method(**question)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
