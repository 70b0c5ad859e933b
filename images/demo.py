"""The built-in demo data set: drawn scenes of six classes, in the layout of the Intel archive.

Small as it must be on a CPU; on a CUDA device as many and as large as make the device work. Imports no torch.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from images.placing import building, explained, finish_interrupted, one_writer, refuse_existing
from images.scenes import CLASSES, SIZE, VERSION, draw_scene
from system.files import json_text
from system.machine import images_that_fit
from utils import RunError, progress

# What a demo on a GPU has to stay within, in seconds: the whole comparison, the drawing, the start of each run.
COMPARISON_SECONDS = 180
DRAWING_SECONDS = 20
START_SECONDS = 12
SCENES_PER_SECOND = 100  # that one process draws and compresses at 224 pixels, with something to spare
IN_PROCESSES = 400  # from so many scenes on processes draw them: fewer are done before the processes have started
FLOP_PER_IMAGE = 14.2e9  # ResNet-18 at 256 x 256, forward and backward: 3 x 2 x 2.37e9 multiply-adds
EFFICIENCY = 0.5  # of its nominal FP32 rate that a card reaches in training
LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}  # FP32 units of a multiprocessor; else 128


@dataclass(frozen=True)
class DemoSize:
    """A demo that fits a device; `why` says in a sentence how it was chosen."""

    train_images: int
    test_images: int
    scene_size: int
    image_size: int
    batch_size: int
    epochs: int
    why: str

    @property
    def folder(self) -> str:
        """Return a folder of its own below data/, so that demos of several sizes can lie side by side."""
        return f"data/demo_{self.scene_size}px_{self.train_images}"

    def drawing(self) -> dict[str, int]:
        """Return the keywords of `draw_demo` for this size."""
        return {"train_images": self.train_images, "test_images": self.test_images, "size": self.scene_size}

    def options(self) -> dict[str, Any]:
        """Return the options that this size sets, by name."""
        return {
            "data_dir": self.folder,
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
        }


def nominal_rate(multiprocessors: int, clock_hertz: float, capability: tuple[int, int]) -> float:
    """FP32 FLOP/s of an NVIDIA card on paper: two per unit and clock."""
    return multiprocessors * LANES.get(capability, 128) * 2 * clock_hertz


def fit_demo(*, name: str, memory: int, rate: float, runs: int, workers: int) -> DemoSize:
    """Return the demo for a GPU of `memory` bytes and `rate` nominal FP32 FLOP/s, shared by `runs` trainings.

    The drawing stays within 20 seconds on `workers` cores, and drawing and trainings within three minutes; within
    that the images are as large, as many and in as large a batch as the memory holds. A run in FP32 counts once,
    each other one for six tenths of it, and validation for a tenth.
    """
    seconds = (COMPARISON_SECONDS - DRAWING_SECONDS - runs * START_SECONDS) / (1.1 * (1 + 0.6 * (runs - 1)))
    for pixels in (224, 160, 128, 96):
        share = (pixels / 256) ** 2
        passes = EFFICIENCY * rate / (FLOP_PER_IMAGE * share) * seconds  # of images through an FP32 training
        if passes >= 8000:
            break
    drawn = min(DRAWING_SECONDS * SCENES_PER_SECOND * workers, 14_034 + 3_000)  # as many as the Intel set at most
    train = max(600, min(0.8 * drawn, passes / (4 * 0.8)))  # at least four epochs over the 80 % not held out
    train = int(train // 60 * 60)
    batch = images_that_fit(0.5 * memory, pixels)
    batch = 2 ** int(np.log2(max(8, min(256, batch, 0.8 * train / 8))))  # at least eight updates an epoch
    epochs = int(max(4, min(30, passes / (0.8 * train))))
    why = (
        f"demo for {name} ({memory / 2**30:.0f} GB, {rate / 1e12:.1f} TFLOP/s in FP32 on paper): {train:,} scenes of "
        f"{pixels} pixels, batch {batch}, {epochs} epochs"
    )
    return DemoSize(train, int(0.2 * train), pixels, pixels, batch, epochs, why)


def draw_demo(
    root: Path,
    *,
    train_images: int = 1200,
    test_images: int = 300,
    seed: int = 0,
    size: int = SIZE,
    workers: int = 1,
    exact: bool = True,
) -> None:
    """Draw six balanced classes of scenes, `size` pixels square, in the Intel layout below `root`.

    Every picture depends on (seed, split, class, index, size) alone, not on how many processes draw. Return at once
    if `root` holds these scenes already, or, unless `exact`, others of this version; an interrupted drawing starts
    anew. Raise UserError if `root` holds other data or cannot be written, RunError if the disk is full or a process
    died.
    """
    settings = {"scenes": VERSION, "seed": seed, "train_images": train_images, "test_images": test_images}
    if size != SIZE:
        settings["size"] = size
    root = Path(root)
    drawn = root / "demo.json"
    with explained(root), one_writer(root):
        finish_interrupted(root)
        if (root / "seg_train").exists() and _holds(drawn, settings, exact):
            return
        refuse_existing(root, {"demo.json"})
        bar = progress(total=train_images + test_images, desc="drawing", unit="image")
        with building(root, "demo scenes") as stage, bar:
            scenes = []
            for split, (folder, count) in enumerate((("seg_train", train_images), ("seg_test", test_images))):
                for name in CLASSES:
                    (stage / folder / folder / name).mkdir(parents=True)
                for number in range(count):
                    index, label = divmod(number, len(CLASSES))
                    file = stage / folder / folder / CLASSES[label] / f"{index:05d}.jpg"
                    scenes.append((file, CLASSES[label], (seed, split, label, index), size))
            for count in _draw_all(scenes, workers if len(scenes) >= IN_PROCESSES else 1):
                bar.update(count)
            (stage / "demo.json").write_text(json_text(settings, indent=1) + "\n")


def _holds(manifest: Path, settings: dict[str, int], exact: bool) -> bool:
    """Return True if a manifest describes the scenes of `settings`, or, unless `exact`, others of their version."""
    try:
        found = json.loads(manifest.read_text())
        return found == settings or (not exact and found["scenes"] == settings["scenes"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


Job = tuple[Path, str, tuple[int, int, int, int], int]  # file, class, seeds, pixels of a side


def _draw_all(scenes: list[Job], workers: int) -> Iterator[int]:
    """Draw scenes, in processes if there are several `workers`; yield how many more are done."""
    if workers <= 1:
        for scene in scenes:
            yield _draw([scene])
        return
    parts = [scenes[start : start + 50] for start in range(0, len(scenes), 50)]
    context = multiprocessing.get_context("spawn")  # a copy of a process with threads or a GPU may hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_signals_alone)
    try:
        yield from pool.map(_draw, parts)
    except BrokenProcessPool:
        raise RunError("a process that drew scenes died. Run the same command again.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(scenes: list[Job]) -> int:
    for file, name, seeds, size in scenes:
        draw_scene(name, np.random.default_rng(seeds), size).save(file, "JPEG", quality=90)
    return len(scenes)


def _leave_signals_alone() -> None:
    """Ignore Ctrl-C, which reaches the whole group: the first process ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
