"""The number formats of each GPU and processor, and the precision that `--amp` picks there. Imports no torch.

One table for precision.py, which chooses by it, for `doctor`, which shows its row, and for docs/cards.py, which writes
docs/cards.md. The facts are NVIDIA's, AMD's, Intel's, Arm's and Apple's own; docs/cards.md lists the sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

NATIVE = "native"  # computed by the hardware
EMULATED = "emulated"  # the numbers are stored in 16 bits and computed as float32
NONE = "none"
FAULTY = "gives NaN"
STORED = "no faster than FP32"  # the type exists, but no unit multiplies it at a higher rate

SCALER_REASON = "float16 runs on every Tensor Core since Volta, and GradScaler saves its small gradients"
NO_SCALER_REASON = "bfloat16 has the range of FP32, so no GradScaler is needed"


@dataclass(frozen=True)
class Card:
    """The number formats of one family of devices. `capability` is NVIDIA's, (0, 0) for other makers."""

    family: str
    examples: str
    float16: str
    bfloat16: str
    tf32: bool
    float8: bool
    matrix_unit: str  # the unit that multiplies small matrices, or "none"
    pick: str | None  # the precision that `--amp` picks; None: `--amp` is refused
    reason: str
    capability: tuple[int, int] = (0, 0)


def _nvidia(low: tuple[int, int], family: str, examples: str) -> Card:
    """Return a row for the cards from compute capability `low` to the next row."""
    tensor_cores = low >= (7, 0)
    ampere = low >= (8, 0)
    slow = "no Tensor Cores: float16 halves the memory of activations and brings little or no speed"
    return Card(
        family=family,
        examples=examples,
        float16=NATIVE if tensor_cores or low == (6, 0) else STORED,
        bfloat16=NATIVE if ampere else EMULATED,
        tf32=ampere,
        float8=low >= (8, 9),
        matrix_unit="Tensor Cores" if tensor_cores else NONE,
        pick="amp-fp16",
        reason=SCALER_REASON if tensor_cores else slow,
        capability=low,
    )


NVIDIA = (  # by compute capability, ascending; a card belongs to the last row that is not above its own
    _nvidia((3, 0), "Kepler", "GTX 780, Tesla K80"),
    _nvidia((5, 0), "Maxwell", "GTX 980, Tesla M40"),
    _nvidia((6, 0), "Pascal, data centre", "Tesla P100"),
    _nvidia((6, 1), "Pascal", "GTX 1080 Ti, Tesla P4, P40"),
    _nvidia((7, 0), "Volta", "Tesla V100, Titan V"),
    _nvidia((7, 5), "Turing", "T4, RTX 2080 Ti, Quadro RTX 6000"),
    _nvidia((8, 0), "Ampere, data centre", "A100, A30"),
    _nvidia((8, 6), "Ampere", "RTX 3060, RTX 3090, A10, A40, Orin"),
    _nvidia((8, 9), "Ada", "RTX 4090, L4, L40S"),
    _nvidia((9, 0), "Hopper", "H100, H200, GH200"),
    _nvidia((10, 0), "Blackwell, data centre", "B200, B300, Thor"),
    _nvidia((12, 0), "Blackwell", "RTX 5090, RTX PRO 6000, DGX Spark"),
)

# Cards that users report to give NaN in float16 convolutions; T500, MX450 and MX550 carry the chip of the T550 and
# the GTX 1650 (TU117). "T4" and "RTX 2000" must not match.
_FAULTY = re.compile(r"\bGTX\s?16[3-6]0|\bT(400|500|550|600|1000|1200|2000)\b|\bMX(450|550)\b|\bK40m\b", re.IGNORECASE)

FAULTY_CARDS = Card(
    family="Turing without Tensor Cores, Tesla K40m",
    examples="GTX 1630, 1650, 1660; (Quadro) T400, T500, T550, T600, T1000, T1200, T2000; MX450, MX550; Tesla K40m",
    float16=FAULTY,
    bfloat16=EMULATED,
    tf32=False,
    float8=False,
    matrix_unit=NONE,
    pick=None,
    reason="these cards are known to give NaN in float16: train without --amp, or insist with --amp_dtype float16",
    capability=(7, 5),
)

AMD_MATRIX = Card(
    family="AMD CDNA 1 and 2 (ROCm)",
    examples="MI100, MI250",
    float16=NATIVE,
    bfloat16=NATIVE,
    tf32=False,
    float8=False,
    matrix_unit="matrix cores",
    pick="amp-fp16",
    reason="float16 as on other GPUs of device cuda; --amp_dtype bfloat16 works as well",
)
AMD = (  # the first row whose prefix the architecture has
    (("gfx908", "gfx90a"), AMD_MATRIX),
    (("gfx94", "gfx95"), replace(AMD_MATRIX, family="AMD CDNA 3 and 4 (ROCm)", examples="MI300X, MI355X", float8=True)),
    (("gfx11",), replace(AMD_MATRIX, family="AMD RDNA 3 (ROCm)", examples="RX 7900", matrix_unit="WMMA")),
    (("gfx12",), replace(AMD_MATRIX, family="AMD RDNA 4 (ROCm)", examples="RX 9070", matrix_unit="WMMA", float8=True)),
    (
        ("",),
        replace(
            AMD_MATRIX,
            family="AMD, older (ROCm)",
            examples="RX 6900, Radeon VII",
            bfloat16=EMULATED,
            matrix_unit=NONE,
            reason="no matrix unit: float16 products run at twice the rate of FP32 at most",
        ),
    ),
)

INTEL_GPU = Card(
    family="Intel GPU (xpu)",
    examples="Arc A770, Arc B580, Data Center GPU Max",
    float16=NATIVE,
    bfloat16=NATIVE,
    tf32=False,
    float8=False,
    matrix_unit="XMX",
    pick="amp-bf16",
    reason=NO_SCALER_REASON,
)

APPLE_NEW = Card(
    family="Apple M3 and later (mps)",
    examples="M3, M4 Pro",
    float16=NATIVE,
    bfloat16=NATIVE,
    tf32=False,
    float8=False,
    matrix_unit=NONE,
    pick="amp-bf16",
    reason=NO_SCALER_REASON,
)
APPLE_OLD = replace(
    APPLE_NEW,
    family="Apple M1 and M2 (mps)",
    examples="M1 Max, M2 Ultra",
    bfloat16=EMULATED,
    pick="amp-fp16",
    reason="the GPU of M1 and M2 emulates bfloat16 and computes float16 itself; GradScaler saves small gradients",
)

_CPU = Card(
    family="",
    examples="",
    float16=EMULATED,
    bfloat16=NATIVE,
    tf32=False,
    float8=False,
    matrix_unit=NONE,
    pick="amp-bf16",
    reason=f"{NO_SCALER_REASON}; PyTorch's float16 kernels on CPUs are slower than those of FP32",
)
CPUS = (  # the first row with an instruction (a name of torch.cpu.get_capabilities) that the processor has
    ("amx_bf16", replace(_CPU, family="x86 with AMX", examples="Xeon Sapphire Rapids and later", matrix_unit="AMX")),
    ("avx512_bf16", replace(_CPU, family="x86 with AVX512-BF16", examples="Xeon Cooper Lake, EPYC Zen 4 and later")),
    ("bf16", replace(_CPU, family="Arm with BF16", examples="Graviton 3 and later, Neoverse V1, N2")),
    (
        "",
        replace(
            _CPU,
            family="other CPUs",
            examples="Core, Ryzen before Zen 4, older Xeon and EPYC",
            bfloat16=EMULATED,
            reason="bfloat16 is imitated with FP32: only memory traffic shrinks; run doctor to see if that helps",
        ),
    ),
)
HALF_INSTRUCTIONS = {"avx512_fp16", "amx_fp16", "fp16_arith"}


def nvidia_card(name: str, capability: tuple[int, int]) -> Card:
    """Return the row of an NVIDIA card, given its name in CUDA and its compute capability."""
    if gives_nan_in_float16(name):
        return replace(FAULTY_CARDS, capability=capability)
    below = [card for card in NVIDIA if card.capability <= capability]
    return below[-1] if below else NVIDIA[0]


def amd_card(architecture: str) -> Card:
    """Return the row of an AMD GPU, given its architecture in ROCm (`gfx942:sramecc+:xnack-`)."""
    return next(card for prefixes, card in AMD if architecture.startswith(prefixes))


def apple_chip(name: str) -> Card:
    """Return the row of an Apple chip, given its name in the system (`Apple M2 Pro`); an Intel Mac counts as old."""
    found = re.search(r"\bM(\d+)\b", name)
    return APPLE_NEW if found and int(found[1]) >= 3 else APPLE_OLD


def processor(flags: set[str]) -> Card:
    """Return the row of a CPU, given the instructions that torch.cpu.get_capabilities names.

    AVX512-FP16, AMX-FP16 and Arm's FP16 make float16 arithmetic native, but do not make it the faster type for
    training.
    """
    card = next(card for instruction, card in CPUS if instruction in flags or not instruction)
    return replace(card, float16=NATIVE) if flags & HALF_INSTRUCTIONS else card


def gives_nan_in_float16(name: str) -> bool:
    """Return True if users report that cards of this name compute NaN in float16."""
    return bool(_FAULTY.search(name))


def all_cards() -> list[Card]:
    """Return all rows, in the order of the table in docs/cards.md."""
    turing = next(place for place, card in enumerate(NVIDIA) if card.capability == (7, 5))
    nvidia = [*NVIDIA[: turing + 1], FAULTY_CARDS, *NVIDIA[turing + 1 :]]
    return [*nvidia, *(card for _, card in AMD), INTEL_GPU, APPLE_NEW, APPLE_OLD, *(card for _, card in CPUS)]


def markdown_table() -> str:
    """Return the table "which precision on my card" in Markdown."""
    lines = [
        "| device | compute capability | examples | float16 | bfloat16 | TF32 | float8 | `--amp` picks | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for card in all_cards():
        cells = [
            f"NVIDIA {card.family}" if card.capability > (0, 0) else card.family,
            "{}.{}".format(*card.capability) if card.capability > (0, 0) else "",
            card.examples,
            card.float16,
            card.bfloat16,
            "yes" if card.tf32 else "no",
            "yes" if card.float8 else "no",
            {"amp-fp16": "float16", "amp-bf16": "bfloat16", None: "nothing: refused"}[card.pick],
            card.reason,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
