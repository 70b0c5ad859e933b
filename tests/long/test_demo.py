"""The demo: its sizes on a GPU, scenes of any size, drawing in processes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import utils
from command_line import presets
from commands import compare
from images import demo, scenes
from images.demo import draw_demo
from utils import UserError


def test_demo_on_cuda_has_sizes_of_its_own(monkeypatch, tmp_path):
    """A comparison on a GPU, up to its first training."""
    monkeypatch.chdir(tmp_path)
    drawn = []
    for module in (utils, demo, compare):
        monkeypatch.setattr(module, "choose_device", lambda name, use: torch.device("cuda", 0))
    monkeypatch.setattr(demo, "draw_demo", lambda root, **asked: drawn.append((root, asked)))
    monkeypatch.setattr(compare, "sensible_precisions", lambda device: ["fp32", "amp-fp16"])
    monkeypatch.setattr(compare, "run_all", lambda folder, names, seeds, words, **_: drawn.append((names, words)))
    monkeypatch.setattr(compare, "report_runs", lambda *_: None)
    assert main.main(["compare", "--demo", "--epochs=3"]) == 0
    root, asked = drawn[0]
    assert str(root) == presets.DEMO_ON_CUDA["data_dir"] and asked.items() >= presets.SCENES_ON_CUDA.items()
    names, words = drawn[1]
    assert names == ["fp32", "amp-fp16"] and {f"--data_dir={root}", "--image_size=224", "--epochs=3"} <= set(words)


def test_a_demo_of_another_size_in_the_same_folder_is_used_as_it_is(tmp_path):
    draw_demo(tmp_path, train_images=12, test_images=12)
    before = contents(tmp_path)
    draw_demo(tmp_path, exact=False)
    assert contents(tmp_path) == before
    (tmp_path / "demo.json").write_text('{"scenes": 0}')  # of an older version
    with pytest.raises(UserError, match="already holds"):
        draw_demo(tmp_path, exact=False)


def contents(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


def test_processes_draw_the_same_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IN_PROCESSES", 0)
    for name, workers in (("one", {}), ("two", {"workers": 2})):
        draw_demo(tmp_path / name, train_images=12, test_images=6, size=48, **workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 19


@pytest.mark.parametrize("name", scenes.CLASSES)
def test_a_larger_scene_is_the_same_scene(name):
    """Grain and noise are drawn anew, but light and layout are the same: means over blocks agree."""
    means = []
    for size in (150, 300):
        image = scenes.draw_scene(name, np.random.default_rng([3, 1]), size)
        assert image.size == (size, size)
        means.append(np.asarray(image.convert("L").resize((3, 3), scenes.Image.Resampling.BOX), np.float32))
    assert np.abs(means[0] - means[1]).mean() < 12
