"""The doctor's arithmetic and advice against numbers worked out by hand, and one real examination, tiny.

No test depends on how fast this machine is.
"""

import json

import pytest
import tiny
import torch
from torch.nn import functional

from ampscope.roofline import GROUPS
from ampscope.timing import amdahl
from commands import doctor
from measuring import advice, arithmetic, hardware, probe
from reports.doctor import doctor_text
from system.cards import nvidia_card, processor
from utils import RunError, UserError

CPU = torch.device("cpu")


def row(speed, speedup, memory_mb, tflops, *, busy=None, spread=0.02, kind="process resident peak"):
    return {
        "images_per_second": speed,
        "seconds_per_update": 32 / speed,
        "speedup": speedup,
        "spread": spread,
        "rounds": 3 * [{"updates": 2}],
        "phase_seconds": dict.fromkeys(probe.PHASES, 0.1),
        "phase_shares": {"data": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1},
        "training_mb": memory_mb,
        "memory": {"memory_kind": kind, "peak_memory_mb": memory_mb + 300, "before_mb": 300},
        "shares": {"products": 0.8, "activations": 0.1, "optimizer": 0.05, "casts": 0.0, "other": 0.05},
        "busy": busy,
        "tflops": tflops,
    }


@pytest.fixture
def findings():
    found = {
        "machine": {
            "device": "cpu",
            "name": "A processor",
            "instructions": "avx2 avx512_bf16",
            "bfloat16": "native",
            "float16": "emulated",
            "matrix_unit": "none",
            "memory_gb": 8.0,
            "torch_threads": 2,
            "torch": "2",
            "torchvision": "0",
            "python": "3.12",
            "system": "an OS",
        },
        "setting": {"model_name": "ResNet18", "image_size": 128, "batch_size": 32},
        "failed": {},
        "measured": {"fp32": row(50.0, 1.0, 960, 0.2), "amp-bf16": row(80.0, 1.6, 480, 0.5)},
        "arithmetic": {
            "bfloat16": {
                "right": 24,
                "wrong": {"GELU": 0.5},
                "slow": {"linear": [0.009, 0.001]},
                "missing": ["SiLU"],
                "failed": {"softmax": "RuntimeError: no memory"},
            }
        },
    }
    found["ceiling"] = advice.ceilings(found["measured"])
    return found


def advised(findings):
    findings["ceiling"] = advice.ceilings(findings["measured"])
    return {**findings, **advice.advise(findings), "seconds": 20.0}


# ------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize(
    "share, speedup, whole", [(0.5, 2.0, 4 / 3), (1.0, 3.0, 3.0), (0.0, 9.0, 1.0), (0.9, float("inf"), 10.0)]
)
def test_amdahl_by_hand(share, speedup, whole):
    assert amdahl(share, speedup) == pytest.approx(whole)


def test_ceilings_by_hand(findings):
    findings["measured"]["amp-bf16"]["shares"]["products"] = 0.5
    (top,) = advice.ceilings(findings["measured"]).values()
    # 80 % of the 90 % that is not data, products 2.5 times as fast
    assert top["f"] == pytest.approx(0.72) and top["s"] == pytest.approx(2.5)
    assert top["ceiling"] == pytest.approx(1 / (0.28 + 0.72 / 2.5))
    # at 50 images/s products took 0.8 of 20 ms an image, at 80 images/s 0.5 of 12.5 ms
    assert top["gained"] == pytest.approx(0.8 * 20 / (0.5 * 12.5))


def lines(memory_share):
    """Return a first and a last roofline with these shares of memory traffic."""
    row = {"flops": 1, "bytes": 1, "calls": 1, "measured_seconds": None}
    groups = {
        "convolutions": {**row, "limit": "arithmetic", "share_of_bound": 1 - memory_share, "bound_seconds": 1.0},
        "normalization": {**row, "limit": "memory", "share_of_bound": memory_share, "bound_seconds": 0.5},
    }
    first = {"bound_seconds": 6.0, "rates": {"float32": 1.0}, "groups": groups}
    return first, {"bound_seconds": 2.0, "rates": {"float32": 1.0, "bfloat16": 8.0}, "groups": groups}


def test_why_the_gain_ends_in_memory_traffic_or_in_arithmetic():
    traffic = advice.why_it_ends(*lines(0.6), speedup=2.5, first_share=0.4, share=0.9)
    assert traffic.startswith("The gain ends at 2.50 times") and ". " not in traffic
    assert (
        "60% of the last bound is memory traffic" in traffic and "normalization" in traffic and "3.00 times" in traffic
    )
    arithmetic = advice.why_it_ends(*lines(0.2), speedup=2.5, first_share=0.4, share=0.9)
    assert "80% of the last bound is arithmetic in convolutions" in arithmetic and "8.0 times as fast" in arithmetic


def test_what_misses_its_bound_by_most_is_named():
    first, last = lines(0.6)
    last["groups"]["convolutions"]["measured_seconds"] = 1.1
    last["groups"]["normalization"]["measured_seconds"] = 2.0
    why = advice.why_it_ends(first, last, speedup=1.5, first_share=0.4, share=0.5)
    assert "went from 40% to 50% (normalization took 4.0 times their bound)" in why


def test_each_group_of_operators_is_of_one_kind():
    groups = [group for names in probe.KINDS.values() for group in names]
    assert sorted(groups) == sorted(GROUPS)


def test_summary_takes_medians_and_neighbouring_ratios():
    def turns(*seconds):
        phases = {"data": 0.1, "forward": 0.2, "backward": 0.6, "optimizer": 0.1}
        return [{"seconds": value, "updates": 2, "phases": phases} for value in seconds]

    answers = {
        "rounds": turns(2.0, 1.0, 4.0),
        "shares": {},
        "busy": None,
        "tflops": 0.5,
        "memory": {"memory_kind": "process resident peak", "peak_memory_mb": 900.0, "before_mb": 300.0},
    }
    found = doctor._summary(answers, {"rounds": turns(3.0, 3.0, 4.0)}, 10)
    assert found["seconds_per_update"] == 1.0 and found["images_per_second"] == 10.0
    assert found["speedup"] == 1.5  # of 1.5, 3 and 1
    assert found["spread"] == pytest.approx((2.0 - 0.5) / 1.0)
    assert found["training_mb"] == 600.0 and found["tflops"] == 0.5
    assert found["phase_shares"]["backward"] == pytest.approx(0.6)


# ---------------------------------------------------------------------------------------- advice
def test_amp_that_pays_is_recommended(findings):
    found = advised(findings)
    assert found["recommended"] == "amp-bf16" and "1.60 times as fast" in found["verdict"]
    assert "50% of its memory" in found["verdict"]
    assert found["command"] == "python main.py --amp --image_size 128 --batch_size 32"
    findings["machine"].update(GPU, compute_capability="9.0", matrix_unit="Tensor Cores")
    assert "--amp --amp_dtype bfloat16" in advised(findings)["command"]


def test_amp_that_is_slower_is_not(findings):
    findings["measured"]["amp-bf16"].update(speedup=0.7, images_per_second=35.0)
    findings["machine"].update(bfloat16="emulated", instructions="avx2")
    found = advised(findings)
    assert found["recommended"] == "fp32" and "slower" in found["verdict"] and "--amp" not in found["command"]
    assert any("imitated" in reason for reason in found["reasons"])


def test_memory_alone_can_make_amp_pay(findings):
    findings["measured"]["amp-bf16"]["speedup"] = 1.0
    assert advised(findings)["recommended"] == "amp-bf16"
    findings["measured"]["amp-bf16"]["training_mb"] = 950
    found = advised(findings)
    assert found["recommended"] == "fp32" and any("Memory falls little" in reason for reason in found["reasons"])


GPU = {
    "device": "cuda:0",
    "name": "A card",
    "driver": "1",
    "cuda": "2",
    "cudnn": 3,
    "tf32": "none",
    "gpu_memory_gb": 80.0,
    "gpu_memory_free_gb": 80.0,
}


def test_gpu_reasons(findings):
    findings["machine"].update(GPU, compute_capability="6.1", matrix_unit="none")
    findings["measured"] = {
        "fp32": row(500.0, 1.0, 960, 9, kind="CUDA allocated"),
        "amp-fp16": row(510.0, 1.02, 600, 9, busy=0.4, kind="CUDA allocated"),
    }
    found = advised(findings)
    assert any("no Tensor Cores" in reason for reason in found["reasons"])
    assert any("waits for the next kernel" in reason for reason in found["reasons"])
    assert found["recommended"] == "amp-fp16" and found["command"].startswith("python main.py --amp --image_size")
    assert all(len(line) <= 80 for line in doctor_text(found).splitlines())
    findings["machine"].update(hardware._numbers(nvidia_card("NVIDIA T1000 8GB", (7, 5))))
    assert any("float16 gives NaN) has no Tensor Cores" in reason for reason in advised(findings)["reasons"])


def test_report_fits_the_terminal_and_leads_with_the_verdict(findings):
    found = advised(findings)
    lines = doctor_text(found).splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert " ".join(lines[:2]).startswith(found["verdict"][:70])
    assert f"  {found['command']}" in lines
    assert lines.index("Why") < lines.index("The machine") < lines.index(f"  {found['command']}")


# --------------------------------------------------------------------------------------- machine
def test_the_row_of_a_device_is_shown_and_reasoned_with(findings):
    flags = {"amx_bf16", "amx_tile", "avx512_fp16", "sse"}
    numbers = hardware._numbers(processor(flags))
    shown = ["float16", "matrix_unit", "tf32", "float8"]
    assert [numbers[name] for name in shown] == ["native", "AMX", "none", "none"]
    assert numbers["--amp_picks"].startswith("bfloat16: ")
    assert set(hardware._instructions(flags).split()) == flags - {"sse"}
    findings["machine"].update(numbers)
    found = advised(findings)
    lines = [line.split() for line in doctor_text(found).splitlines()]
    assert "AMX" in found["reasons"][0] and ["matrix", "unit", "AMX"] in lines
    numbers = hardware._numbers(nvidia_card("NVIDIA H100", (9, 0)))
    assert numbers["float8"] == "in hardware, not in autocast" and "--tf32" in numbers["tf32"]
    assert hardware._numbers(nvidia_card("GTX 1650", (7, 5)))["--amp_picks"].startswith("nothing: ")
    findings["machine"].update(numbers)
    text = doctor_text(advised(findings))
    assert "--amp picks" in text and all(len(line) <= 80 for line in text.splitlines())


def test_machine_is_plain_values():
    found = hardware.machine(CPU)
    assert found["torch"] == str(torch.__version__) and found["torch_threads"] >= 1 and found["memory_gb"] > 0
    json.dumps(found)


def test_unknown_model_is_the_users_error():
    with pytest.raises(UserError, match="ResNet19"):
        doctor.examine(CPU, model_name="ResNet19")


def test_fp32_that_fails_fails_the_examination(monkeypatch):
    def fail(names, request, failed):
        failed["fp32"] = "out of memory"
        return {}

    monkeypatch.setattr(doctor, "_take_turns", fail)
    with pytest.raises(RunError, match="out of memory(.|\n)*--batch_size"):
        doctor._measure(CPU, {"batch_size": 2})


# -------------------------------------------------------------------------------- does it compute right
def test_operators_agree_with_float64_and_a_planted_fault_is_named(monkeypatch, findings):
    gelu = functional.gelu

    def broken(inputs):
        outputs = gelu(inputs)
        return outputs * 1.1 if inputs.dtype == torch.bfloat16 else outputs

    cases = {name: arithmetic.CASES[name] for name in ("linear", "layer norm", "attention", "max pooling", "SiLU")}
    planted = {
        "lacks": NotImplementedError("no kernel"),
        "old": RuntimeError('"x" not implemented for'),
        "ill": RuntimeError("ill"),
    }
    cases |= {name: (tiny.raising(error), [(2,)]) for name, error in planted.items()}
    monkeypatch.setattr(arithmetic, "CASES", {**cases, "GELU": (broken, [(64, 200)])})
    found = arithmetic.check(CPU, torch.bfloat16)
    assert (found["right"], list(found["wrong"]), found["missing"]) == (5, ["GELU"], ["lacks", "old"])
    assert found["wrong"]["GELU"] == pytest.approx(0.1, 0.1) and found["failed"] == {"ill": "RuntimeError: ill"}
    text = " ".join(doctor_text(advised(findings)).split())
    assert (
        "24 of 25 are right; WRONG: GELU (off by 50%)" in text
        and "linear 9 ms against 1; not implemented: SiLU" in text
    )
    assert "softmax fails: RuntimeError: no memory" in text
