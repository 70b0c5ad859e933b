"""The ladder: which rungs a device has, how they are set against one another, their bounds, and how they are shown.

Processes are impersonated except in one real, tiny climb. Run it alone: pytest tests/long/test_ladder.py
"""

import json

import pytest
import torch
from tiny import SMALL
from torch import nn

from ampscope.roofline import Operator
from features.cpu_layers import SmallMapConv2d
from measuring import ladder, probe
from measuring.rungs import FIRST, Loop2020, Rung, RungBench, rungs_for, step_up
from reports.ladder import ladder_markdown, ladder_picture, ladder_text
from utils import RunError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BFLOAT16 = {"avx512_bf16"}


def names(rungs):
    return [rung.name for rung in rungs if not rung.skipped]


def test_the_rungs_of_an_ampere_card():
    rungs = rungs_for(CUDA, ["fp32", "tf32", "amp-fp16", "amp-bf16"], set())
    assert names(rungs) == [
        "FP32 as the 2020 loop ran it",
        "channels-last",
        "TF32",
        "AMP",
        "fused optimizer, nothing waits",
        "--compile",
        "--cuda_graphs",
        "images kept on the device",
    ]
    settings = {}
    for rung in rungs:
        settings = step_up(settings, rung)
    assert settings["precision"] == "amp-fp16" and settings["on_device"] and settings["compile_mode"] == "graphs"


def test_older_cards_and_processors_say_what_they_leave_out():
    turing = {rung.name: rung.skipped for rung in rungs_for(CUDA, ["fp32", "amp-fp16"], set())}
    assert "no TF32" in turing["TF32"] and not turing["AMP"]
    faulty = {rung.name: rung.skipped for rung in rungs_for(CUDA, ["fp32"], set())}
    assert "no 16-bit type" in faulty["AMP"]
    processor = {rung.name: rung.skipped for rung in rungs_for(CPU, ["fp32", "amp-bf16"], BFLOAT16)}
    assert processor["bfloat16 products inside FP32"] == "" and "CUDA" in processor["--cuda_graphs"]
    old = {rung.name: rung.skipped for rung in rungs_for(CPU, ["fp32", "amp-bf16"], {"avx2"})}
    assert "no bfloat16" in old["bfloat16 products inside FP32"]


@pytest.mark.parametrize(
    "device, free, asked, batch", [(CPU, 0, 256, 32), (CPU, 0, 8, 8), (CUDA, 4, 256, 32), (CUDA, 80, 256, 256)]
)
def test_a_batch_that_fits(device, free, asked, batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, free * 2**30))
    assert probe.batch_that_fits(device, 256, asked) == batch


# ------------------------------------------------------------------------------------------ climbing
def operator(dtype):
    return [
        Operator("aten.convolution.default", "convolutions", 4000, 100, dtype),
        Operator("aten.native_batch_norm.default", "normalization", 0, 200, dtype),
    ]


class FakeProbe:
    """Answers as a process would: `speeds` are seconds of an update by rung, in the order in which they are begun."""

    speeds: list = []
    alive: list = []

    def __init__(self, bench, *, keep_memory, settings, **request):
        self.seconds = FakeProbe.speeds.pop(0)
        self.settings = settings
        self.asked = []
        FakeProbe.alive.append(self)
        assert bench is RungBench and settings["keep_memory"] == keep_memory

    def ask(self, question, *, patience=None, **arguments):
        self.asked.append(question)
        if isinstance(self.seconds, str):
            raise RunError(self.seconds)
        if question == "memory":
            return {"memory_kind": "process resident peak", "peak_memory_mb": 500.0, "before_mb": 300.0}
        if question == "evidence":
            amp = self.settings["precision"].startswith("amp")
            rates = {"float32": 1000.0} | ({"bfloat16": 4000.0} if amp else {})
            counted = None if self.settings["compile_mode"] else operator("bfloat16" if amp else "float32")
            measured = None if counted is None else {"convolutions": 3.0, "normalization": 5.0}
            return {"rates": rates, "bandwidth": 100.0, "operators": counted, "measured": measured}
        updates = arguments.get("updates", 1)
        return {"seconds": self.seconds * updates, "updates": updates, "phases": {}}

    def close(self):
        if self in FakeProbe.alive:
            FakeProbe.alive.remove(self)


@pytest.fixture
def climb(monkeypatch):
    """Climbs with processes that take so many seconds; returns what was found."""
    monkeypatch.setattr(ladder, "Probe", FakeProbe)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(FakeProbe, "alive", [])

    def run(*speeds):
        monkeypatch.setattr(FakeProbe, "speeds", list(speeds))
        found = ladder.climb(CPU, image_size=64, batch_size=16)
        assert FakeProbe.alive == [] and FakeProbe.speeds == []
        return found

    return run


def by_name(found):
    return {rung["name"]: rung for rung in found["rungs"]}


def test_each_rung_is_set_against_the_one_before_and_the_first(climb):
    found = climb(8.0, 7.0, 6.9, 4.0, 3.5, 2.0, 3.0)
    rungs = by_name(found)
    assert rungs["FP32 as the 2020 loop ran it"]["speedup_before"] is None
    assert rungs["channels-last"]["speedup_before"] == pytest.approx(8 / 7)
    assert rungs["AMP"]["speedup_before"] == pytest.approx(6.9 / 4) and rungs["AMP"]["speedup_first"] == 2.0
    assert rungs["freed memory kept, no ReLU in place"]["speedup_first"] == 4.0
    assert rungs["--compile"]["speedup_before"] == pytest.approx(2 / 3) and not rungs["--compile"]["kept"]
    assert rungs["AMP"]["images_per_second"] == 4.0 and rungs["AMP"]["training_mb"] == 200.0
    assert "CUDA" in rungs["--cuda_graphs"]["skipped"]
    json.dumps(found)


def test_a_rung_that_loses_is_left_out_of_those_that_follow(climb):
    found = climb(8.0, 7.0, 14.0, 4.0, 3.5, 2.0, 1.0)
    rungs = by_name(found)
    assert not rungs["bfloat16 products inside FP32"]["kept"]
    assert rungs["AMP"]["speedup_before"] == pytest.approx(7 / 4), "against the last that was kept"
    assert rungs["--compile"]["settings"]["compile_mode"] == "default" and rungs["--compile"]["kept"]
    settings = rungs["freed memory kept, no ReLU in place"]["settings"]
    assert settings["channels_last"] and settings["keep_memory"] and settings["products"] == "float32"


def test_a_rung_that_fails_is_a_line_and_the_first_one_an_error(climb):
    found = climb(8.0, 7.0, 6.0, 4.0, 3.5, 2.0, "no C++ compiler was found.")
    assert by_name(found)["--compile"]["skipped"] == "no C++ compiler was found"
    assert "--compile: no C++ compiler was found." in ladder_text(found)
    with pytest.raises(RunError, match="out of memory(.|\n)*--batch_size"):
        climb("out of memory")
    assert FakeProbe.alive == []


def test_bounds_by_hand(climb):
    rungs = by_name(found := climb(8.0, 7.0, 6.9, 4.0, 3.5, 2.0, 1.0))
    # FP32: max(4000/1000, 100/100) + 200/100 = 6 s; AMP: max(4000/4000, 1) + 2 = 3 s; 16 images in an update.
    assert rungs["channels-last"]["bound_images_per_second"] == pytest.approx(16 / 6)
    assert rungs["AMP"]["bound_images_per_second"] == pytest.approx(16 / 3)
    assert rungs["AMP"]["share_of_bound"] == pytest.approx(3 / 4)
    assert rungs["--compile"]["bound_images_per_second"] == pytest.approx(16 / 3), "of the same update in eager mode"
    assert found["roofline_of"] == "freed memory kept, no ReLU in place"
    assert found["roofline"]["groups"]["normalization"]["limit"] == "memory"
    assert "67% of the last bound is memory traffic" in found["why"] and "8.00 times" in found["why"]


def test_the_table_the_page_and_the_picture(climb, tmp_path):
    found = climb(8.0, 7.0, 6.9, 4.0, 3.5, 2.0, 3.0)
    text = ladder_text(found)
    for part in ("÷ before", "÷ first", "of bound", "--compile *", "left out of what follows", found["why"][:40]):
        assert part in text
    page = ladder_markdown(found)
    assert page.startswith("| rung |") and page.count("\n|") == 12
    ladder_picture(found, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------- the real thing, tiny
def bench_of(model_name="squeezenet1_1", **changes):
    own = {**FIRST.settings, **changes}
    return RungBench(own, device="cpu", model_name=model_name, image_size=32, batch_size=4)


@pytest.fixture(autouse=True)
def _products_as_they_were():
    yield
    from features.cpu_layers import bfloat16_products

    bfloat16_products(False)


def test_the_first_rung_is_the_loop_of_2020():
    bench = bench_of()
    images, *_ = next(next(bench.updates))
    assert images.is_contiguous() and isinstance(bench.update, Loop2020)
    assert any(module.inplace for module in bench.update.model.modules() if isinstance(module, nn.ReLU))
    assert bench.update.optimizer.defaults["fused"] is None and bench.update.optimizer.defaults["foreach"] is False
    before = [parameter.clone() for parameter in bench.update.model.parameters()]
    bench.warm_up()
    assert any(not torch.equal(old, new) for old, new in zip(before, bench.update.model.parameters(), strict=True))


@pytest.mark.parametrize("habits", [False, True])
def test_small_maps_are_multiplied_with_the_habits_of_this_package_alone(habits, monkeypatch):
    monkeypatch.setattr("features.cpu_layers.cpu_instructions", lambda: {"amx_bf16"})
    bench = bench_of("resnet18", keep_memory=habits, precision="amp-bf16")
    kinds = {type(module) for module in bench.update.model.modules()}
    assert nn.Conv2d in kinds and (SmallMapConv2d in kinds) == habits


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True, "products": "bfloat16"},
        {"channels_last": True, "precision": "amp-bf16"},
        {"channels_last": True, "precision": "amp-bf16", "loop": "package", "keep_memory": True},
        {"channels_last": True, "precision": "amp-bf16", "loop": "package", "on_device": True},
    ],
    ids=["products", "amp", "package", "on_device"],
)
def test_every_rung_trains_and_gives_its_evidence(changes):
    bench = bench_of(**changes)
    assert torch.backends.mkldnn.conv.fp32_precision == ("bf16" if "products" in changes else "ieee")
    bench.warm_up()
    images, *_ = next(next(bench.updates))
    assert images.is_contiguous(memory_format=torch.channels_last)
    found = bench.evidence(64)
    assert found["rates"]["float32"] > 0 and found["bandwidth"] > 0
    assert sum(one.flops for one in found["operators"]) > 1e6 and found["measured"]["convolutions"] > 0
    assert ("bfloat16" in found["rates"]) == ("precision" in changes)
    assert isinstance(bench.update, Loop2020) == ("loop" not in changes)


@pytest.mark.parametrize("mode", ["default", "graphs"])
def test_a_compiled_rung_is_compiled_without_the_clock_inside(mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append((model, options)) or model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    bench = bench_of(loop="package", compile_mode=mode, channels_last=True)
    ((model, options),) = asked
    assert options["mode"] == ("reduce-overhead" if mode == "graphs" else None)
    assert not model._forward_pre_hooks, "the compiler would break its graph at the clock"
    assert bench.warm_up()["seconds"] > 0
    assert bench.evidence(64)["operators"] is None


def test_cuda_graphs_need_a_gpu(run, scenes_folder, tmp_path):
    words = ["--cuda_graphs", f"--data_dir={scenes_folder}", f"--checkpoint_dir={tmp_path}", *SMALL]
    status, _, err = run(words)
    assert status == 2 and "--cuda_graphs needs --device cuda" in err


def test_the_command_writes_its_files_and_refuses_what_makes_no_sense(run, tmp_path, monkeypatch, climb):
    found = climb(8.0, 7.0, 6.9, 4.0, 3.5, 2.0, 3.0)
    monkeypatch.setattr(ladder, "climb", lambda device, **asked: found if asked["model_name"] == "resnet18" else None)
    status, out, err = run(["doctor", "--ladder", "--model=resnet18", f"--out={tmp_path / 'new'}"])
    assert status == 0, err
    assert "of bound" in out and found["why"][:30] in out
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"ladder.json", "ladder.md", "ladder.png"}
    assert json.loads((tmp_path / "new" / "ladder.json").read_text())["why"] == found["why"]
    status, _, err = run(["doctor", "--ladder", "--model=resnet19", f"--out={tmp_path}"])
    assert status == 2 and "resnet18" in err
    status, _, err = run(["compare", "--ladder"])
    assert status == 2 and "python main.py doctor --ladder" in err


def test_images_kept_on_the_device_are_the_same_ones():
    bench = bench_of(loop="package", on_device=True, channels_last=True)
    one, other = (next(next(bench.updates))[0] for _ in range(2))
    assert one.data_ptr() == other.data_ptr()


def test_a_real_climb(monkeypatch):
    """Two rungs in processes of their own that take turns."""
    monkeypatch.setattr(ladder, "ROUNDS", 2)
    monkeypatch.setattr(probe, "ROUND_SECONDS", 0.1)
    monkeypatch.setitem(probe.PRODUCT_SIZE, "cpu", 64)
    amp = Rung("AMP", {"precision": "amp-bf16", "channels_last": True, "loop": "package", "keep_memory": True})
    monkeypatch.setattr(ladder, "rungs_for", lambda *_: [FIRST, amp])
    monkeypatch.setattr(ladder, "LOSS", 0.0)
    found = ladder.climb(CPU, model_name="squeezenet1_1", image_size=32, batch_size=4)
    first, second = found["rungs"]
    assert first["images_per_second"] > 0 and second["speedup_before"] == second["speedup_first"] > 0
    assert second["bound_images_per_second"] > 0 and second["settings"]["precision"] == "amp-bf16"
    assert "The gain ends at" in found["why"] and found["roofline_of"] == "AMP"
    json.dumps(found)
    assert all(len(line) <= 100 for line in ladder_text(found).splitlines())
