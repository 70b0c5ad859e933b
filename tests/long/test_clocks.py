"""What clocks say of real runs: a frozen network's own time, and another program on the same processor."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_report import compare
from tqdm import tqdm

from reports import results, tables
from system import waiting


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count waiting")
def test_a_competing_process_is_noticed():
    """Two processes on one processor: each waits half of the time, whatever else the machine does."""
    one = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", f"import os; os.sched_setaffinity(0, {{{one}}})\nwhile 1: pass"]
    )
    os.sched_setaffinity(0, {one})
    try:
        time.sleep(0.1)
        measured = waiting.Waiting()
        until = time.perf_counter() + 0.4
        while time.perf_counter() < until:
            pass
        assert measured.share() > 0.3
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()


def test_the_work_of_a_frozen_network_is_in_its_time_and_rate(data, tmp_path, monkeypatch):
    seconds = {"fp32": 0.3, "amp-bf16": 0.1}
    for name, taken in seconds.items():
        monkeypatch.setattr(
            "features.frozen.progress_bar", lambda taken=taken, **_: time.sleep(taken) or tqdm(disable=True)
        )
        words = ("--preset=probe", "--epochs=3", "--model=tiny_classifier", "--augment=flip")
        assert tiny.train(data, tmp_path, *words, *(["--amp"] if name != "fp32" else []), name=name) == 0
    runs, comparison = compare(*(tmp_path / name for name in seconds))
    for run, taken in zip(runs, seconds.values(), strict=True):
        frozen = [line["frozen_seconds"] for line in run["metrics"]]
        assert taken <= frozen[0] < taken + 0.5 and frozen[1:] == [0, 0], "once for the training images"
        result = run["result"]
        assert result["train_seconds"] == pytest.approx(sum(frozen) + sum(results.column(run["metrics"], "seconds")))
        images = run["config"]["dataset"]["train"]
        assert result["images_per_second"] == pytest.approx(3 * images / result["train_seconds"], rel=0.01)
        assert result["total_seconds"] >= result["train_seconds"]
    ratio = runs[0]["result"]["train_seconds"] / runs[1]["result"]["train_seconds"]
    assert comparison["rows"][1]["ratios"]["speed_up"]["values"] == pytest.approx([ratio], rel=0.01)
    assert "the frozen network is computed once" in tables.performance_table(comparison)
