"""The table "which precision on my card": names, capabilities and chips to what they compute with.

Run it alone: pytest tests/test_cards.py
"""

import importlib.util
from pathlib import Path

import pytest

from system import cards

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "name, capability, family, bfloat16, tf32, float8",
    [
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "Pascal", "emulated", False, False),
        ("Tesla P100-PCIE-16GB", (6, 0), "Pascal, data centre", "emulated", False, False),
        ("Xavier", (7, 2), "Volta", "emulated", False, False),
        ("Tesla T4", (7, 5), "Turing", "emulated", False, False),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "Ampere, data centre", "native", True, False),
        ("NVIDIA GeForce RTX 3060", (8, 6), "Ampere", "native", True, False),
        ("Orin", (8, 7), "Ampere", "native", True, False),
        ("NVIDIA GeForce RTX 4090", (8, 9), "Ada", "native", True, True),
        ("NVIDIA H100 80GB HBM3", (9, 0), "Hopper", "native", True, True),
        ("NVIDIA B300", (10, 3), "Blackwell, data centre", "native", True, True),
        ("NVIDIA GB10", (12, 1), "Blackwell", "native", True, True),
        ("a card of the future", (15, 0), "Blackwell", "native", True, True),
        ("Quadro 6000", (2, 0), "Kepler", "emulated", False, False),
    ],
)
def test_nvidia_by_compute_capability(name, capability, family, bfloat16, tf32, float8):
    card = cards.nvidia_card(name, capability)
    assert (card.family, card.bfloat16, card.tf32, card.float8) == (family, bfloat16, tf32, float8)
    assert card.pick == "amp-fp16" and (card.matrix_unit == "Tensor Cores") == (capability >= (7, 0))


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1650",
        "NVIDIA GeForce GTX 1660 Ti",
        "NVIDIA GeForce GTX 1660 SUPER",
        "NVIDIA GeForce GTX 1630",
        "Quadro T400",
        "NVIDIA T400 4GB",
        "NVIDIA T500",
        "NVIDIA T550 Laptop GPU",
        "NVIDIA T600",
        "Quadro T1000",
        "NVIDIA T1000 8GB",
        "NVIDIA T1200 Laptop GPU",
        "Quadro T2000 with Max-Q Design",
        "NVIDIA GeForce MX450",
        "Tesla K40m",
    ],
)
def test_cards_that_give_nan_are_known(name):
    card = cards.nvidia_card(name, (7, 5))
    assert card.pick is None and card.float16 == cards.FAULTY and card.matrix_unit == "none"


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4",
        "GRID T4-16Q",
        "NVIDIA GeForce RTX 2060",
        "NVIDIA RTX 2000 Ada Generation",
        "NVIDIA RTX A2000",
        "NVIDIA GeForce GTX 1060 6GB",
        "Quadro RTX 4000",
        "Tesla K40c",
        "NVIDIA RTX PRO 2000 Blackwell",
    ],
)
def test_their_neighbours_are_not(name):
    assert not cards.gives_nan_in_float16(name)


@pytest.mark.parametrize(
    "chip, bfloat16, pick",
    [
        ("Apple M1", "emulated", "amp-fp16"),
        ("Apple M1 Ultra", "emulated", "amp-fp16"),
        ("Apple M2 Pro", "emulated", "amp-fp16"),
        ("Apple M3", "native", "amp-bf16"),
        ("Apple M4 Max", "native", "amp-bf16"),
        ("Apple M10", "native", "amp-bf16"),
        ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", "emulated", "amp-fp16"),
    ],
)
def test_apple_chips(chip, bfloat16, pick):
    card = cards.apple_chip(chip)
    assert (card.bfloat16, card.pick) == (bfloat16, pick)


@pytest.mark.parametrize(
    "flags, family, float16, bfloat16, unit",
    [
        ({"amx_bf16", "avx512_bf16", "avx512_fp16"}, "x86 with AMX", "native", "native", "AMX"),
        ({"avx512_bf16", "avx2"}, "x86 with AVX512-BF16", "emulated", "native", "none"),
        ({"neon", "bf16", "fp16_arith"}, "Arm with BF16", "native", "native", "none"),
        ({"avx2"}, "other CPUs", "emulated", "emulated", "none"),
        (set(), "other CPUs", "emulated", "emulated", "none"),
    ],
)
def test_processors(flags, family, float16, bfloat16, unit):
    card = cards.processor(flags)
    assert (card.family, card.float16, card.bfloat16, card.matrix_unit) == (family, float16, bfloat16, unit)
    assert card.pick == "amp-bf16"  # avx512_fp16 does not make float16 the faster type


@pytest.mark.parametrize(
    "architecture, family, bfloat16, float8",
    [
        ("gfx90a:sramecc+:xnack-", "AMD CDNA 1 and 2 (ROCm)", "native", False),
        ("gfx942:sramecc+:xnack-", "AMD CDNA 3 and 4 (ROCm)", "native", True),
        ("gfx1100", "AMD RDNA 3 (ROCm)", "native", False),
        ("gfx1201", "AMD RDNA 4 (ROCm)", "native", True),
        ("gfx1030", "AMD, older (ROCm)", "emulated", False),
        ("", "AMD, older (ROCm)", "emulated", False),
    ],
)
def test_amd_by_architecture(architecture, family, bfloat16, float8):
    card = cards.amd_card(architecture)
    assert (card.family, card.bfloat16, card.float8, card.tf32) == (family, bfloat16, float8, False)


def test_the_page_is_generated_from_the_table():
    """Run `python docs/cards.py` after a change of the table."""
    spec = importlib.util.spec_from_file_location("cards_page", ROOT / "docs" / "cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cards.md").read_text(encoding="utf-8") == module.page()


def test_every_row_is_whole():
    rows = cards.markdown_table().splitlines()
    assert len(rows) == len(cards.all_cards()) + 2 and len({row.count("|") for row in rows}) == 1
    assert len({card.family for card in cards.all_cards()}) == len(cards.all_cards())
    assert all(card.reason and card.examples for card in cards.all_cards())
