"""Nothing grows: memory, open files, threads and time per epoch of long runs, memory of streaming workers.

ENDURANCE=200 pytest -s tests/long/test_endurance.py trains 200 epochs instead of 30,
streams 50,000 files instead of 2,000, and prints what it measured.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from images.cache import Opening
from images.stores import open_store
from runs.folder import RunDirectory

EPOCHS = int(os.environ.get("ENDURANCE", "30"))
FILES = 50_000 if EPOCHS >= 200 else 2_000
MB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def grown(values: list[float]) -> float:
    """By how much the median of the last third lies above that of the middle third."""
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[third : 2 * third])


def test_a_long_run_does_not_grow(tmp_path):
    data = tiny.draw(tmp_path / "data")
    process = tiny.start(tiny.words(data, tmp_path, f"--epochs={EPOCHS}", "--learning_rate=1e-3"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen = {"memory": [], "files": [], "threads": []}
    done = 0
    while process.poll() is None and done < EPOCHS:
        time.sleep(0.005)
        count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if count > done:
            done = count
            seen["memory"].append(resident(process.pid))
            seen["files"].append(len(os.listdir(f"/proc/{process.pid}/fd")))
            seen["threads"].append(len(os.listdir(f"/proc/{process.pid}/task")))
    assert tiny.finish(process)[0] == 0
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    assert len(seconds) == EPOCHS and len(seen["memory"]) > EPOCHS / 3
    for name, values in {**seen, "seconds per epoch": seconds}.items():
        print(f"{name}: {values[len(values) // 10]:.4g} early, {values[-1]:.4g} at the end, grown {grown(values):+.4g}")
    assert grown(seen["memory"]) < 3
    third = EPOCHS // 5
    for name in ("files", "threads"):  # the fewest of each part: one is open, or works, while a checkpoint is written
        assert min(seen[name][-third:]) <= min(seen[name][third : 2 * third]), name
    assert grown(seconds) < 0.5 * statistics.median(seconds)


def test_two_thousand_epochs_of_metrics_are_written_at_once(tmp_path):
    line = {"epoch": 1, **{f"number {index}": 0.123456789 * index for index in range(15)}, "skips": []}
    run = RunDirectory(tmp_path)
    took = []
    for epochs in (20, 2_000):
        begun = time.process_time()
        for _ in range(5):
            run.write_metrics([line] * epochs)
        took.append((time.process_time() - begun) / 5)
    print(f"metrics of 20 epochs are written in {1000 * took[0]:.1f} ms, of 2,000 in {1000 * took[1]:.1f} ms")
    assert took[1] < 0.2


def test_streaming_workers_do_not_grow(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "image.png")
    paths = []
    for index in range(FILES):
        path = tmp_path / f"{index:05}.png"
        os.link(tmp_path / "image.png", path)
        paths.append(path)
    store = open_store(paths, tmp_path, limit=8, opening=Opening(cache="none", workers=2))
    batches = np.array_split(np.arange(FILES), FILES // 200)
    memory = []
    for _ in range(6):
        assert sum(len(images) for images, _ in store.batches(batches)) == FILES
        workers = store._loader._iterator._workers
        memory.append([resident(worker.pid) for worker in workers] + [resident(os.getpid())])
    print(
        f"{FILES:,} files; memory of two workers and the program after each epoch, MB: ", np.round(memory, 1).tolist()
    )
    del store
    assert (np.array(memory[-1]) - np.array(memory[2])).max() < 3
