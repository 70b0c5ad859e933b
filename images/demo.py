"""Draw the built-in demo data set: scenes of six classes, in the layout of the Intel archive.

Imports no torch. command_line/presets.py says how many scenes a CUDA device gets, and their size.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from command_line.presets import SCENES_ON_CUDA
from images.placing import building, explained, finish_interrupted, one_writer, refuse_existing
from images.scenes import CLASSES, SIZE, VERSION, draw_scene
from system.files import json_text
from system.machine import cores
from utils import RunError, choose_device, progress_bar

IN_PROCESSES = 400  # the number of scenes above which processes draw faster than one, their start included


def draw_scenes(data_dir: str, device_name: str) -> None:
    """Draw the demo's scenes below `data_dir` if they are missing, as many and as large as suit the device."""
    is_cuda = choose_device(device_name, use=False).type == "cuda"
    draw_demo(Path(data_dir), exact=False, workers=cores(), **(SCENES_ON_CUDA if is_cuda else {}))


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

    Every picture depends on (seed, split, class, index, size) only, not on the number of processes. Return at once if
    `root` contains these scenes already, or, unless `exact`, others of this version; an interrupted drawing starts
    again. Raise UserError if `root` contains other data or cannot be written, RunError if the disk is full or a process
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
        bar = progress_bar(total=train_images + test_images, desc="drawing", unit="image")
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
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads or a GPU may hang
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
