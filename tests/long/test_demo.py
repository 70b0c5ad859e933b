"""A demo that fits the device: its size from memory and rate, cards impersonated; scenes of any size, in processes."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import assemble
import main
import option
from command_line import parsing
from commands import compare
from images import demo, scenes
from images.demo import draw_demo, fit_demo, nominal_rate
from system.machine import images_that_fit
from utils import UserError

GB = 2**30
CARDS = {  # memory, multiprocessors, clock, capability, trainings of a comparison, cores, TFLOP/s of the data sheet
    "Tesla T4": (15 * GB, 40, 1.59e9, (7, 5), 2, 2, 8.1),
    "NVIDIA GeForce RTX 3060": (12 * GB, 28, 1.78e9, (8, 6), 4, 8, 12.7),
    "NVIDIA H100 80GB HBM3": (80 * GB, 132, 1.98e9, (9, 0), 4, 16, 66.9),
}


def fitted(name):
    memory, multiprocessors, clock, capability, runs, workers, _ = CARDS[name]
    rate = nominal_rate(multiprocessors, clock, capability)
    return fit_demo(name=name, memory=memory, rate=rate, runs=runs, workers=workers), rate


@pytest.mark.parametrize("name", CARDS)
def test_a_comparison_is_within_three_minutes_and_long_enough_to_show_a_difference(name):
    """At the rate that is assumed: drawing, starts, and FP32 once, every other run for six tenths of it."""
    memory, *_, runs, workers, teraflops = CARDS[name]
    size, rate = fitted(name)
    assert rate / 1e12 == pytest.approx(teraflops, rel=0.02)
    drawing = (size.train_images + size.test_images) / (demo.SCENES_PER_SECOND * workers)
    work = demo.FLOP_PER_IMAGE * (size.image_size / 256) ** 2
    trained = 0.8 * size.train_images * size.epochs * work / (demo.EFFICIENCY * rate)
    assert drawing <= 20
    assert drawing + runs * demo.START_SECONDS + 1.1 * trained * (1 + 0.6 * (runs - 1)) <= 180
    assert size.image_size == size.scene_size == 224 and size.batch_size >= 128 and size.epochs >= 4
    assert trained > 15 and 0.8 * size.train_images / size.batch_size >= 8
    assert size.batch_size <= images_that_fit(0.6 * memory, 224)
    chosen = ("224 pixels", f"batch {size.batch_size}", f"{size.epochs} epochs")
    assert all(part in size.why for part in (name, f"{memory / GB:.0f} GB", f"{rate / 1e12:.1f} TFLOP/s", *chosen))


def test_larger_devices_get_more():
    sizes = [fitted(name)[0] for name in CARDS]
    passes = [size.train_images * size.epochs for size in sizes]
    assert passes[2] > 3 * passes[1] and sizes[2].batch_size == 256
    assert len({size.folder for size in sizes}) == 3


def test_a_weak_card_gets_smaller_images_and_a_small_memory_a_smaller_batch():
    weak = fit_demo(name="a laptop's", memory=2 * GB, rate=1.2e12, runs=2, workers=4)
    assert weak.image_size < 224 and weak.batch_size <= 64 and weak.epochs >= 4
    tiny = fit_demo(name="tiny", memory=GB // 4, rate=1e9, runs=2, workers=1)
    assert tiny.batch_size >= 8 and tiny.train_images >= 600 and tiny.image_size == 96


@pytest.fixture
def impersonate(monkeypatch):
    """Makes CUDA answer as a card of that memory, clock and compute capability would."""

    def be(name):
        memory, multiprocessors, clock, capability, _, workers, _ = CARDS[name]
        properties = SimpleNamespace(
            name=name,
            total_memory=memory,
            multi_processor_count=multiprocessors,
            clock_rate=int(clock / 1000),
            major=capability[0],
            minor=capability[1],
        )
        monkeypatch.setattr(assemble, "choose_device", lambda name, use: torch.device("cuda", 0))
        monkeypatch.setattr(assemble, "cores", lambda: workers)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return be


def test_demo_on_a_card_sets_the_options_that_fit_it_and_on_a_cpu_the_usual_ones(impersonate):
    assert assemble.demo_size("cpu") is None
    options = parsing.parse(["--demo", "--device", "cpu"], fit_demo=main.demo_that_fits)
    assert {name: getattr(options, name) for name in option.DEMO} == option.DEMO
    for name in CARDS:
        impersonate(name)
        size = assemble.demo_size("auto")
        assert size == fitted(name)[0]
        options = parsing.parse(["compare", "--demo", "--epochs", "3"], fit_demo=main.demo_that_fits)
        assert (options.data_dir, options.image_size, options.batch_size) == (size.folder, 224, size.batch_size)
        assert options.epochs == 3 and options.pretrained == 0


def test_the_choice_is_printed_and_drawn(impersonate, monkeypatch, caplog, tmp_path):
    """A comparison on a T4, up to its first training."""
    impersonate("Tesla T4")
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(assemble, "draw_demo", lambda root, **asked: drawn.append((root, asked)))
    monkeypatch.setattr(compare, "choose_device", lambda name, use: torch.device("cuda", 0))
    monkeypatch.setattr(compare, "run_all", lambda folder, names, seeds, words, **_: drawn.append((names, words)))
    monkeypatch.setattr(compare, "report_runs", lambda *_: None)
    caplog.set_level("INFO", logger="amp-train")
    assert main.main(["compare", "--demo"]) == 0
    size, _ = fitted("Tesla T4")
    assert size.why in caplog.text
    root, asked = drawn[0]
    assert str(root) == size.folder and asked["size"] == 224 and asked["train_images"] == size.train_images
    assert asked["workers"] == 2 and drawn[1][0] == ["fp32", "amp-fp16"]
    assert f"--data_dir={size.folder}" in drawn[1][1] and f"--epochs={size.epochs}" in drawn[1][1]


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
