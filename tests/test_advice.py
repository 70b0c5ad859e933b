"""Verdicts, reasons and advice: what they say agrees with the numbers beside them, and can help where it is said."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import precision
from ampscope import finite, payoff, roofline
from ampscope.words import payoff_words
from command_line.failures import explain
from commands import compare as compare_command
from commands import doctor
from dataset import Batches
from images.soundness import say_uneven
from measuring import advice, probe
from model import _advice, check_input_size
from option import SAME_TRAINING
from precision import named_precision
from runs.evaluation import way_out
from runs.failures import Failures
from system.cards import EMULATED, NATIVE
from system.machine import images_at_once, images_that_fit
from transforms import Preprocess
from utils import Stopped, choose_device

CPU = torch.device("cpu")


# Estimates, bounds and their words


def examined(speedup: float, saving: float, products: float = 0.5) -> dict:
    """Return the doctor's results on a CPU that computes large products twice as fast in bfloat16."""

    def row(speed: float, memory: float, tflops: float) -> dict:
        return {
            "speedup": speed,
            "images_per_second": 50 * speed,
            "training_mb": memory,
            "tflops": tflops,
            "spread": 0.0,
            "busy": None,
            "shares": {"products": products},
            "phase_shares": {"data": 0.0},
        }

    measured = {"fp32": row(1.0, 1000.0, 1.0), "amp-bf16": row(speedup, 1000.0 * saving, 2.0)}
    setting = {"model_name": "ResNet18", "image_size": 64, "batch_size": 8}
    machine = {"device": "cpu", "bfloat16": "native", "name": "x"}
    found = {"measured": measured, "failed": {}, "machine": machine, "setting": setting}
    return found | {"ceiling": advice.ceilings(measured)}


@pytest.mark.parametrize("speedup", [0.9449, 0.945, 1.0449, 1.0451, 1.2])
def test_a_verdict_agrees_with_the_number_that_it_prints(speedup):
    found = advice.advise(examined(speedup, 0.9))
    printed = float(re.search(r"trains (\S+) times", found["verdict"])[1])
    pays, slower = "AMP pays" in found["verdict"], "is slower" in found["verdict"]
    assert pays == (printed >= 1.05) == (found["recommended"] == "amp-bf16") and slower == (printed < 0.95)
    speed = {"fp32": {"shortest": speedup, "longest": speedup}, "amp-bf16": {"shortest": 1.0, "longest": 1.0}}
    choice = payoff.recommend(speed, [], {})
    assert (choice["precision"] == "amp-bf16") == (printed >= 1.05)
    assert ("does not pay" in choice["words"][0]) == (f"{printed:.2f}" < "1.05")


def test_more_than_an_estimate_is_explained_and_nothing_is_called_a_ceiling():
    found = examined(2.65, 0.9)
    assert found["ceiling"]["amp-bf16"]["ceiling"] == pytest.approx(4 / 3)
    reasons = " ".join(advice.advise(found)["reasons"])
    assert "by itself would give 1.33" in reasons and "The measured 2.65 exceeds this because" in reasons
    assert "exceeds this" not in " ".join(advice.advise(examined(1.2, 0.9))["reasons"])
    amdahl = {"product_share": 0.5, "ceiling": 2.0, "product_gain": 3.0, "expected": 1.5}
    for gain, said in ((1.7, True), (1.4, False)):
        pay = {"amdahl": amdahl, "recommendation": {"speedup": {"amp-bf16": gain}, "words": []}}
        text = " ".join(" ".join(payoff_words(pay)).split())
        assert (f"{gain:.2f} was measured: other operators became faster too" in text) == said
    assert "does not fall" in " ".join(advice.advise(examined(1.2, 1.1))["reasons"])


@pytest.mark.parametrize("true_rate", [2e9, 0.4e9])
def test_a_step_faster_than_the_roofline_is_measured_again_and_explained(monkeypatch, true_rate):
    """A step of 1 GFLOP in a second; the first measurement of the rates met a busy machine."""
    operators = [roofline.Operator("aten.mm", "matrix products", 10**9, 8, "float32")]
    rates = iter([0.5e9, true_rate, true_rate])
    monkeypatch.setattr(roofline, "count_step", lambda step, device: operators)
    monkeypatch.setattr(roofline, "matrix_rate", lambda *_, **__: next(rates))
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda *_, **__: 1e12)
    monkeypatch.setattr(payoff, "Execution", lambda *_, **__: SimpleNamespace(run=print, put_back=lambda: None))
    fp32 = SimpleNamespace(name="fp32", dtype=torch.float32)
    subject = SimpleNamespace(device=torch.device("cpu"))
    found = payoff.bounds(subject, [fp32], {"fp32": {"shortest": 1.0}}, ambient=True)
    if true_rate > 1e9:
        assert found["precisions"]["fp32"]["share"] == 0.5 and "estimate" not in found["words"]
    else:  # the best rate of three is still too low
        assert found["precisions"]["fp32"]["share"] == 2.0
        assert "200% in fp32" in found["words"] and "a share of it above 100 % means" in found["words"]
    assert roofline.beyond([0.5, None, 1.004]) == [] and "above 100 %" in roofline.beyond([0.5, 1.19])[0]


def test_a_gpu_is_examined_with_as_many_images_as_fit_at_their_size(monkeypatch):
    assert [images_that_fit(4 * 2**30, size) for size in (256, 128, 512, 4096)] == [97, 390, 24, 1]
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 2**30, 8 * 2**30))
    monkeypatch.setattr(doctor, "machine", lambda device: {})
    monkeypatch.setattr(doctor, "_measure", lambda device, setting: asked.append(setting) or 1 / 0)
    for size in (None, 64, 512):
        with pytest.raises(ZeroDivisionError):
            doctor.examine(torch.device("cuda"), image_size=size)
    assert [setting["batch_size"] for setting in asked] == [32, 256, 8]


# What ended a child


@pytest.mark.parametrize(("status", "memory"), [(137, True), (139, False)])
def test_a_killed_training_says_that_memory_may_be_the_reason(data, tmp_path, monkeypatch, status, memory):
    monkeypatch.setattr(compare_command, "_process", lambda *_: status)
    line = tiny.words(data, tmp_path)[1:]
    planned = compare_command.plan(tmp_path / "fp32", "fp32", line, overwrite=False)
    compare_command.train_all([planned])  # as compare and audit do
    reason = json.loads((tmp_path / "fp32" / "failure.json").read_text())["reason"]
    assert f"ended by signal {status - 128}" in reason and ("memory runs out" in reason) == memory
    advised = re.findall(r"--(cache|num_workers)", reason)
    assert set(advised) <= SAME_TRAINING, "so that the run goes on and finished ones are kept"
    assert len(reason) <= 200, "a cell of the table holds no more"
    assert "signal 9, as systems do when memory runs out" in probe._ending(-9)
    assert probe._ending(-11).endswith("signal 11") and probe._ending(3).endswith("exit status 3")


# Advice helps where it is given


def advised(command: str, error: BaseException, **options) -> str:
    return explain(error, command, options)[1]


def test_what_goes_on_after_an_interruption_depends_on_the_command():
    for error in (KeyboardInterrupt(), Stopped(15, "")):
        assert "--resume" in advised("train", error)
        assert "without --overwrite, goes on" in advised("compare", error)
        for command in ("evaluate", "predict", "doctor", "prepare"):
            assert "--resume" not in advised(command, error) and "goes on" not in advised(command, error)
    assert advised("predict", Stopped(15, "")) == "stopped by SIGTERM"
    assert advised("train", Stopped(15, "saved in x")) == "saved in x"


DIED = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")
FULL = RuntimeError("CUDA out of memory")
UNCOMPILED = type("CompilerError", (Exception,), {"__module__": "torch._inductor.exc"})("no compiler")


@pytest.mark.parametrize(
    ("command", "error", "options", "way", "never"),
    [
        ("train", DIED, {"num_workers": 4}, "fewer --num_workers; what was saved before can go on with --resume", "?"),
        ("train", DIED, {"num_workers": 1}, "--num_workers 0", "fewer"),
        ("predict", DIED, {"num_workers": 4}, "fewer --num_workers", "--resume"),
        ("train", FULL, {"batch_size": 8, "accumulate": 2}, "--accumulate 4", "?"),
        ("train", FULL, {"batch_size": 8, "accumulate": 2, "amp": True}, "--accumulate 4", "--amp needs"),
        ("train", FULL, {"batch_size": 8, "accumulate": 1, "tf32": True}, "--amp needs less, too, in place of", "?"),
        (
            "train",
            FULL,
            {"batch_size": 8, "accumulate": 1, "cuda_graphs": True},
            "smaller --batch_size",
            "--accumulate 2",
        ),
        (
            "train",
            FULL,
            {"batch_size": 8, "accumulate": 1, "sync_batchnorm": True},
            "smaller --batch_size",
            "--accumulate 2",
        ),
        ("train", FULL, {"batch_size": 1, "accumulate": 1}, "smaller --image_size", "--accumulate 2"),
        ("train", FULL, {"batch_size": "auto", "accumulate": 1}, "an --accumulate larger", "?"),
        ("evaluate", FULL, {"batch_size": 64}, "smaller --batch_size, below 32.", "--accumulate"),
        ("predict", FULL, {"batch_size": 1}, "", "smaller"),
        ("doctor", FULL, {"batch_size": None}, "", "None"),
        ("train", UNCOMPILED, {"compile": False, "cuda_graphs": True}, "Leave out --cuda_graphs.", "out --compile"),
        ("train", UNCOMPILED, {"compile": True, "cuda_graphs": False}, "Leave out --compile.", "out --cuda_graphs"),
    ],
)
def test_advice_names_options_that_the_command_has_and_that_go_together(command, error, options, way, never):
    text = advised(command, error, **options)
    assert way in text and never not in text


def test_evaluation_takes_no_more_images_at_once_than_training():
    """Else --accumulate could not help where memory runs out in a validation, or in a frozen network's pass."""
    preprocess = Preprocess(torch.device("cpu"), 9)
    batches = Batches(tiny.subset(22), preprocess, 8, 3, accumulate=3)
    assert [len(places) for places in batches._evaluation_places()] == [3] * 7 + [1]


def test_a_cpu_evaluates_at_most_32_images_at_a_time():
    """Else the outputs of 256 images at 224 pixels take gigabytes, in no less time."""
    batches = Batches(tiny.subset(70), Preprocess(CPU, 9), 64, 3)
    assert [len(places) for places in batches._evaluation_places()] == [32, 32, 6] == [32, batches.evaluation_size, 6]
    assert [images_at_once(count, CPU) for count in (5, 256)] == [5, 32]
    assert images_at_once(256, torch.device("cuda")) == 256


def ended(epoch: int, update: int, precision: str = "fp32") -> str:
    fake = SimpleNamespace(folder=Path("runs/x y"), updates_per_epoch=9, precision=named_precision(precision, CPU))
    return str(Failures.not_finite(fake, "loss", SimpleNamespace(epoch=epoch, best_epoch=epoch), update, None))


def test_a_loss_that_is_not_finite_is_blamed_on_what_can_have_caused_it():
    first = ended(0, 1)
    assert "learning" not in first and "--pretrained_path" in first, "no update was made yet"
    later = ended(0, 2)
    assert "lower --learning_rate" in later and "another run" in later and "pretrained" not in later
    assert "--pretrained_path 'runs/x y/best_model.pt'" in ended(3, 1)


@pytest.mark.parametrize(("bfloat16", "way"), [(NATIVE, "--amp_dtype bfloat16"), (EMULATED, "--no-amp")])
def test_bfloat16_is_not_advised_on_a_gpu_that_refuses_it(monkeypatch, bfloat16, way):
    monkeypatch.setattr(precision, "card_of", lambda device: SimpleNamespace(bfloat16=bfloat16))
    half = precision.Precision("amp-fp16", torch.device("cuda"), "")
    assert way in way_out(half) and way in precision.wider_range(half)
    assert "--amp_dtype bfloat16" in way_out(named_precision("amp-fp16", CPU))


def test_sizes_are_advised_only_for_failures_of_sizes():
    assert "smaller" in probe.what_may_help("DefaultCPUAllocator: can't allocate memory")
    assert "smaller" in probe.what_may_help("no answer within 240 seconds")
    too_small = probe.what_may_help("Kernel size can't be greater than actual input size")
    assert "smaller" not in too_small and "--image_size" in too_small
    assert probe.what_may_help("no C++ compiler was found") == ""


class NormAfterPooling(torch.nn.Module):
    """Has one value a channel to normalise, whatever the size of the images: a micro-batch of one cannot train it."""

    def __init__(self, smallest: int = 1):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, smallest)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images).mean((2, 3)))


def test_a_refused_size_is_answered_with_sizes_that_were_tried():
    alone = tiny.refused(check_input_size, NormAfterPooling(), 64, 1)
    assert "larger micro-batches" in alone and "another --image_size" not in alone, "no size helps"
    small = tiny.refused(check_input_size, NormAfterPooling(99), 64, 2)
    assert "another --image_size (224 suits it)" in small and "larger micro-batches" not in small
    neither = tiny.refused(check_input_size, NormAfterPooling(999), 64, 2)
    assert "Use" not in neither
    file = SimpleNamespace(saved_from=None)  # weights that do not fit are left out by the option that named them
    assert "--pretrained_path" in _advice(file, SimpleNamespace(state={}), "timm:resnet18")
    origin = SimpleNamespace(op="aten.sqrt", phase="backward", module="m", inputs=[])
    assert not any("clip" in cure for cure in finite.cures(origin, overflow=False)), "the norm of NaN is NaN"


def test_another_device_is_advised_that_this_process_does_not_already_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    monkeypatch.setattr(torch, "empty", tiny.raising(RuntimeError("CUDA error: invalid device ordinal")))
    assert "--device auto" not in tiny.refused(choose_device, "auto"), "auto chose it"
    assert "--device auto or --device cpu" in tiny.refused(choose_device, "cuda:1")
    assert "torchrun --nproc_per_node 2" in tiny.refused(choose_device, "auto", local_rank=2)


@pytest.mark.parametrize(("streams", "way"), [(True, "--num_workers"), (False, "--image_size")])
def test_a_slow_loader_is_helped_by_what_it_does(streams, way):
    found = examined(1.2, 0.9) | {"loader_images_per_second": 10.0, "loader_streams": streams}
    (reason,) = [text for text in advice.advise(found)["reasons"] if "loader" in text]
    assert way in reason and ("--num_workers" in reason) == streams
    found["loader_images_per_second"] = 7000.0
    assert any("not the limit" in reason for reason in advice.advise(found)["reasons"])


def test_a_recipe_that_stops_says_what_broke():
    bare = [
        f"{file.name}:{node.lineno}"
        for file in [*tiny.ROOT.glob("recipes/*.py"), *tiny.ROOT.glob("notebooks/*.py")]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert bare == []


def test_rare_classes_are_helped_by_what_is_not_done_yet(caplog):
    caplog.set_level("INFO")
    for balanced, best_by, ways in (
        (False, "accuracy", ["--sampler balanced", "--best_by"]),
        (True, "accuracy", ["--best_by"]),
        (False, "macro_f1", ["--sampler balanced"]),
        (True, "loss", []),
    ):
        caplog.clear()
        uneven = SimpleNamespace(labels=np.array([0] * 30 + [1]))
        say_uneven(uneven, ["a", "b"], balanced=balanced, best_by=best_by)
        assert "a has 30 times as many training images as b." in caplog.text
        assert [way for way in ("--sampler balanced", "--best_by") if way in caplog.text] == ways
    caplog.clear()
    say_uneven(SimpleNamespace(labels=np.array([0] * 10 + [1])), ["a", "b"], balanced=False, best_by="accuracy")
    assert caplog.text == ""
