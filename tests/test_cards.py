"""The table "which precision on my card": names, capabilities and chips to what they compute with."""

from pathlib import Path

import pytest
import tiny

from system.cards import amd_card, apple_chip, gives_nan_in_float16, nvidia_card, processor

ROOT = Path(__file__).resolve().parent.parent
# Family, bfloat16, TF32, float8, matrix unit and --amp's choice; below a rule's first row, at it, and above its last.
ROWS = [
    (nvidia_card("Quadro 6000", (2, 0)), "Kepler", "emulated", False, False, "none", "amp-fp16"),
    (nvidia_card("Xavier", (7, 2)), "Volta", "emulated", False, False, "Tensor Cores", "amp-fp16"),
    (nvidia_card("Orin", (8, 7)), "Ampere", "native", True, False, "Tensor Cores", "amp-fp16"),
    (nvidia_card("a later one", (15, 0)), "Blackwell", "native", True, True, "Tensor Cores", "amp-fp16"),
    (nvidia_card("GTX 1660 Ti", (7, 5)), "Turing without Tensor Cores", "emulated", False, False, "none", None),
    (amd_card("gfx942:sramecc+:xnack-"), "AMD CDNA 3 and 4", "native", False, True, "matrix cores", "amp-fp16"),
    (amd_card("gfx1030"), "AMD, older", "emulated", False, False, "none", "amp-fp16"),
    (apple_chip("Apple M2 Pro"), "Apple M1 and M2", "emulated", False, False, "none", "amp-fp16"),
    (apple_chip("Apple M10"), "Apple M3 and later", "native", False, False, "none", "amp-bf16"),
    (apple_chip("Intel(R) Core(TM) i9-9980HK"), "Apple M1 and M2", "emulated", False, False, "none", "amp-fp16"),
    (processor({"amx_bf16", "avx512_bf16"}), "x86 with AMX", "native", False, False, "AMX", "amp-bf16"),
    (processor({"avx2"}), "other CPUs", "emulated", False, False, "none", "amp-bf16"),
]


def test_a_device_is_found_in_its_row():
    for card, family, *expected in ROWS:
        assert card.family.startswith(family)
        assert [card.bfloat16, card.tf32, card.float8, card.matrix_unit, card.pick] == expected, family
    half = processor({"neon", "bf16", "avx512_fp16"})  # which does not make float16 the faster type
    assert (half.float16, processor({"bf16"}).float16, half.pick) == ("native", "emulated", "amp-bf16")


@pytest.mark.parametrize(
    "names, faulty",
    [
        ("NVIDIA GeForce GTX 1650|GTX 1660 SUPER|NVIDIA T400 4GB|Quadro T1000|NVIDIA T1200 Laptop GPU", True),
        ("Quadro T2000 with Max-Q Design|NVIDIA GeForce MX450|Tesla K40m|NVIDIA GeForce GTX 1630|NVIDIA T500", True),
        ("NVIDIA T550 Laptop GPU|NVIDIA T600|NVIDIA GeForce MX550", True),
        ("Tesla T4|GRID T4-16Q|NVIDIA GeForce RTX 2060|NVIDIA RTX 2000 Ada Generation|NVIDIA RTX A2000", False),
        ("NVIDIA GeForce GTX 1060 6GB|Quadro RTX 4000|Tesla K40c|NVIDIA RTX PRO 2000 Blackwell", False),
    ],
)
def test_cards_that_give_nan_are_known_and_their_neighbours_are_not(names, faulty):
    assert [gives_nan_in_float16(name) for name in names.split("|")] == [faulty] * len(names.split("|"))


def test_the_page_is_generated_from_the_table():
    """Run `python docs/cards.py` after a change of the table."""
    module = tiny.module_of(ROOT / "docs" / "cards.py")
    assert (ROOT / "docs" / "cards.md").read_text(encoding="utf-8") == module.page()
    rows = module.all_cards()
    assert len({card.family for card in rows}) == len(rows)
    assert all(card.reason and card.examples for card in rows)
