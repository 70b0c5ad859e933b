"""The zoo: data sets and networks small enough to train in a second, and the ways to run the program on them.

All tests share it. Knows nothing of what they test.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import _api as torchvision_registry

import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--pretrained=0", "--image_size=33", "--batch_size=16", "--epochs=2"]
CLASSES = ("coast", "field", "town")
# Measured by a clock or the memory allocator: only these may differ between two equal runs.
MEASURED = {
    "seconds",
    "elapsed",
    "images_per_second",
    "data_wait_share",
    "busy_share",
    "peak_memory_mb",
    "reserved_memory_mb",
    "training_memory_mb",
    "epoch_seconds",
    "epoch_waited",
    "total_seconds",
    "train_seconds",
    "frozen_seconds",
    "steady",
    "peaks",
    "training_peaks",
}


class Classifier(nn.Module):
    """A torchvision classifier with 2,000 weights: `--model=tiny_classifier` once it is registered."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
        )
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.features(images).flatten(1)))


def register_classifier() -> None:
    """Register `Classifier` as one of torchvision's models in this process."""

    def tiny_classifier(*, weights: None = None, **options: int) -> Classifier:
        return Classifier(**options)

    tiny_classifier.__module__ = "torchvision.models.tiny"
    torchvision_registry.BUILTIN_MODELS["tiny_classifier"] = tiny_classifier


class Network(nn.Module):
    """A convolution and a head; `spoil` makes its gradients infinite at that backward pass."""

    def __init__(self, spoil=(), classes=3):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, stride=2)
        self.head = nn.Linear(4, classes)
        self.passes = 0
        self.spoil = set(spoil)
        self.head.weight.register_hook(self._spoiled)

    def _spoiled(self, gradient):
        self.passes += 1
        return gradient * math.inf if self.passes in self.spoil else gradient

    def forward(self, images):
        return self.head(self.body(images).relu().mean((2, 3)))


def network(seed=0, **options):
    torch.manual_seed(seed)
    return Network(**options)


def subset(count=22, classes=3, seed=0, side=9):
    """Return noise images with a brightness that depends on the class, so that there is something to learn."""
    from images.stores import DecodedImages
    from images.subsets import Subset

    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    array = generator.integers(0, 60, (count, side, side, 3)) + 80 * labels[:, None, None, None]
    store = DecodedImages(array.astype(np.uint8), np.zeros(count, np.uint32), {})
    listing = [(Path(f"{place}.png"), int(label)) for place, label in enumerate(labels)]
    return Subset(store, listing, np.arange(count))


def identity(image_size: int = 9) -> dict:
    """Return the description in a checkpoint of a network with three classes."""
    import torch

    from images.subsets import DataSet
    from runs import checkpoint
    from transforms import Preprocess

    return checkpoint.identity(
        DataSet(Path("."), ["a", "b", "c"], {}, "of noise", []),
        model_name="mine",
        model_options={},
        preprocess=Preprocess(torch.device("cpu"), image_size),
        normalize="imagenet",
        precision="fp32",
    )


def noise(seed: int = 0, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Return an RGB image of noise; `size` is (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def save_noise(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), **options) -> Path:
    """Save an image of noise; its folder may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path, **options)
    return path


def draw(folder: Path, *, train: int = 24, test: int = 6, classes: tuple = CLASSES) -> Path:
    """Write noisy coloured squares as PNG in Intel's layout, equally many of each class."""
    numbers = np.random.default_rng(7)
    for part, count in (("seg_train", train), ("seg_test", test)):
        for position in range(count):
            label = position % len(classes)
            place = folder / part / part / classes[label]
            place.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 160, (36, 36, 3))
            pixels[..., label % 3] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{position:03}.png")
    return folder


def images(folder: Path, part: str = "seg_train") -> list[Path]:
    return sorted((folder / part / part).glob("*/*.png"))


def words(data: Path, runs: Path, *more: object, name: str = "run") -> list[str]:
    """Return a command line that trains two epochs of three updates, the last batch smaller; `more` wins."""
    return [
        str(word)
        for word in (
            "train",
            f"--data_dir={data}",
            f"--checkpoint_dir={runs}",
            f"--checkpoint_name={name}",
            "--device=cpu",
            "--model=tiny_classifier",
            "--pretrained=0",
            "--image_size=36",
            "--batch_size=8",
            "--epochs=2",
            "--num_workers=1",
            "--learning_rate=1e-2",
            "--log_interval=2",
            "--quiet",
            *more,
        )
    ]


def train(data: Path, runs: Path, *more: object, name: str = "run") -> int:
    """Run that command line in this process; return its exit status."""
    torch.set_num_threads(1)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        return main.main(words(data, runs, *more, name=name))
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def run_main(argv):
    """Call main(argv) in this process, on the CPU unless argv names a device; return (exit status, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    words = [str(word) for word in argv]
    has_device = not words or words[0].startswith("-") or words[0] not in ("prepare", "export")
    if has_device and not any(word.startswith(("--device", "--help", "--version")) for word in words):
        words.append("--device=cpu")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main(words)
    return status, out.getvalue(), err.getvalue()


def stop_after(patch, updates: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal after this many updates of later trainings; `patch` is a pytest.MonkeyPatch."""
    import train as training

    update_weights = training.update_weights
    done = []

    def counted(*arguments, **options):
        row = update_weights(*arguments, **options)
        done.append(row)
        if len(done) == updates:
            os.kill(os.getpid(), number)
        return row

    patch.setattr(training, "update_weights", counted)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **extra}


def start(command: list[str], **options) -> forks.Process:
    """Start a command line in a process of its own, which may use `tiny_classifier`; see forks.py."""
    return forks.Process(command, env=environment(), **options)


class Subprocess:
    """Replace the module subprocess in a command that starts trainings: they are forks then."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def Popen(command: list[str], *, env: dict[str, str] | None = None, **_: object) -> forks.Process:
        return forks.Process(command[2:], env=env, stdout=1, stderr=2)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Wait for a process; return its exit status, output and errors. Fail the test if it hangs."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, errors


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until `condition` is true; fail if the process ends before, or after the time limit."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "never came about"
        time.sleep(0.002)


def leaves(value, name: str = ""):
    """Yield every tensor and plain value of nested content with its path, except measured ones."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in MEASURED:
                yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, (value.dtype, value.numpy().tobytes()) if torch.is_tensor(value) else repr(value)


def outcome(run: Path) -> dict:
    """Return everything that a finished run computed: both checkpoints, the metrics, the result, the predictions."""
    content = {name: torch.load(run / name, weights_only=True) for name in ("last.pt", "best_model.pt")}
    content["metrics"] = metrics(run)
    content["result"] = json.loads((run / "result.json").read_text())
    content["predictions"] = (run / "predictions.csv").read_text()
    return dict(leaves(content))


def assert_equal(one: dict, other: dict) -> None:
    """Compare bit for bit; name the first values that differ."""
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]][:5] == []


def strict(file: Path):
    """Return the content of a JSON file; fail at NaN and Infinity, which JSON does not have."""

    def refuse(constant: str):
        raise AssertionError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def config(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def computed_metrics(run: Path) -> list[dict]:
    """Return the same without measured values: equal for equal runs."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(run)]


def refused(call: Callable, *positional, **options) -> str:
    """Return the message of the UserError that a call must raise."""
    from utils import UserError

    with pytest.raises(UserError) as error:
        call(*positional, **options)
    return str(error.value)


def raising(error: BaseException) -> Callable:
    """Return a function that raises this error, whatever it is called with."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def module_of(path: Path) -> ModuleType:
    """Return the module that a file is, which need not be importable by its name."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _drawn() -> list[tuple[object, str]]:
    from reports import curves, page, pictures

    drawn = ("learning_curve", "confusion_matrix", "gallery", "batch", "comparison_picture", "reliability_curve")
    return [
        *((pictures, name) for name in drawn),
        (curves, "class_curves"),
        (page, "html_report"),
        (page, "html_comparison"),
    ]


_functions: dict[tuple[object, str], Callable] = {}


def leave_out_pictures(*_: object) -> None:
    """Skip pictures and pages, which take most of the time of a tiny run and have tests of their own."""
    for owner, name in _drawn():
        _functions.setdefault((owner, name), getattr(owner, name))
        setattr(owner, name, lambda *_, **__: None)
    for owner in {owner for owner, _ in _drawn()}:  # also within `drawing`: an eighth of a second each
        vars(owner).update(svg=lambda *_, **__: b"<svg/>")


@contextlib.contextmanager
def drawing():
    """Draw pictures and pages inside this context."""
    for (owner, name), function in _functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        leave_out_pictures()
