"""What each device is given for the precision asked, with reasons; cards are impersonated, none is needed.

Run it alone: pytest tests/test_precision.py
"""

from types import SimpleNamespace

import pytest
import tiny
import torch

import precision
from features.cpu_layers import bfloat16_products
from precision import card_of, choose_precision, named_precision, sensible_precisions
from precision_table import PRECISIONS
from system import cards, machine
from utils import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Let CUDA report a card of this name and compute capability; restore float32's mode."""

    def be(name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield be
    precision._set_float32_mode(False)


def modes():
    return {part.fp32_precision for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_is_its_dtype_its_autocast_and_its_scaler(name, card):
    card("NVIDIA H100", (9, 0))
    found = named_precision(name, CUDA if name == "tf32" else CPU)
    expected = {"amp-fp16": torch.float16, "amp-bf16": torch.bfloat16}.get(name, torch.float32)
    assert (found.name, found.dtype, found.label) == (name, expected, PRECISIONS[name].label) and found.reason
    if found.device == CPU:
        with found.autocast():
            assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype is expected
        assert found.grad_scaler().is_enabled() == (name == "amp-fp16")


def test_fp32_is_told_not_to_be_tf32_and_tf32_to_be_by_every_switch(card):
    """Also by the old ones, which torch.compile reads."""
    card("NVIDIA A100", (8, 0))
    choose_precision(CUDA, tf32=True)
    assert modes() == {"tf32"} and torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    for options in ({}, {"amp": True}):  # what autocast leaves in float32 is true float32
        choose_precision(CUDA, tf32=True)
        choose_precision(CUDA, **options)
        assert modes() == {"ieee"} and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "name, capability, auto, sensible",
    [
        ("NVIDIA H100", (9, 0), "amp-fp16", list(PRECISIONS)),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), "amp-fp16", ["fp32", "amp-fp16"]),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "amp-fp16", ["fp32", "amp-fp16"]),
    ],
)
def test_cards_get_float16_and_what_they_can_do(card, name, capability, auto, sensible):
    card(name, capability)
    assert choose_precision(CUDA, amp=True).name == auto and sensible_precisions(CUDA) == sensible


def test_without_a_card_auto_is_bfloat16():
    assert choose_precision(CPU, amp=True).name == "amp-bf16" and sensible_precisions(CPU) == ["fp32", "amp-bf16"]


@pytest.mark.parametrize(
    "name, capability, asked, named",
    [
        ("NVIDIA GeForce GTX 1660", (7, 5), {"amp": True}, "GTX 16"),
        ("NVIDIA T1000 8GB", (7, 5), {"amp": True}, "NaN"),
        ("Tesla K40m", (3, 5), {"amp": True}, "NaN"),
        ("Quadro T2000", (7, 5), {"amp": True, "amp_dtype": "bfloat16"}, "without --amp"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), {"amp": True, "amp_dtype": "bfloat16"}, "float16"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), {"tf32": True}, "Ampere"),
    ],
)
def test_what_a_card_cannot_do_is_refused_with_its_name(card, name, capability, asked, named):
    card(name, capability)
    with pytest.raises(UserError, match=named) as error:
        choose_precision(CUDA, **asked)
    assert name in str(error.value)


def test_tf32_needs_cuda_and_a_faulty_card_may_be_insisted_on(card):
    with pytest.raises(UserError, match="--device cuda"):
        choose_precision(CPU, tf32=True)
    card("NVIDIA GeForce GTX 1650", (7, 5))
    assert sensible_precisions(CUDA) == ["fp32"]
    assert choose_precision(CUDA, amp=True, amp_dtype="float16").name == "amp-fp16"


def test_every_card_that_can_is_given_what_the_table_says(card):
    """The table that doctor and docs/cards.md show is the one by which --amp chooses."""
    for row in cards.NVIDIA:
        card("a card", row.capability)
        assert choose_precision(CUDA, amp=True).name == row.pick and card_of(CUDA) == row


@pytest.mark.parametrize(
    "chip, expected", [("Apple M1 Pro", "amp-fp16"), ("Apple M2", "amp-fp16"), ("Apple M4", "amp-bf16")]
)
def test_apple_chips_by_their_name(chip, expected, monkeypatch):
    monkeypatch.setattr(precision, "chip_name", lambda: chip)
    mps = torch.device("mps")
    found = choose_precision(mps, amp=True)
    assert found.name == expected and found.reason and sensible_precisions(mps) == ["fp32", expected]
    assert found.grad_scaler().is_enabled() == (expected == "amp-fp16")


def test_a_chip_without_a_name_is_an_old_one(monkeypatch):
    monkeypatch.setattr(machine.subprocess, "run", tiny.raising(FileNotFoundError("sysctl")))
    assert machine.chip_name() == "" and card_of(torch.device("mps")).pick == "amp-fp16"


def test_xpu_trains_in_bfloat16_without_a_scaler():
    xpu = torch.device("xpu")
    found = choose_precision(xpu, amp=True)
    assert found.name == "amp-bf16" and not found.grad_scaler().is_enabled()
    assert sensible_precisions(xpu) == ["fp32", "amp-bf16"]
    with pytest.raises(UserError, match="--device cuda"):
        choose_precision(xpu, tf32=True)


def test_amd_has_no_tf32_and_its_matrix_cores_both_types(card, monkeypatch):
    card("AMD Instinct MI300X", (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+")
    )
    assert sensible_precisions(CUDA) == ["fp32", "amp-fp16", "amp-bf16"]
    with pytest.raises(UserError, match="MI300X has no TF32"):
        choose_precision(CUDA, tf32=True)


def test_bfloat16_products_inside_float32_can_be_turned_on_and_off():
    for on, mode in ((True, "bf16"), (False, "ieee")):
        bfloat16_products(on)
        assert torch.backends.mkldnn.conv.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == mode


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", {"fpu", "avx2", "avx512_f", "avx512_bf16"}),
        ("Features\t: fp asimd asimdhp sve bf16", {"fp", "neon", "fp16_arith", "sve", "bf16"}),
    ],
)
def test_an_older_pytorch_learns_the_instructions_from_linux(line, expected, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\nbugs : none\n")
    assert machine.cpu_instructions(tmp_path / "cpuinfo") == expected
    assert machine.cpu_instructions(tmp_path / "nowhere") == set()
