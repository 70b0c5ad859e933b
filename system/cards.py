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
    pick: str | None = "amp-bf16"  # the precision that `--amp` picks; None: `--amp` is refused
    reason: str = NO_SCALER_REASON
    matrix_unit: str = NONE  # the unit that multiplies small matrices
    float16: str = NATIVE
    bfloat16: str = NATIVE
    float8: bool = False
    capability: tuple[int, int] = (0, 0)

    @property
    def tf32(self) -> bool:
        """Return True if the device has TF32, which NVIDIA's GPUs have since Ampere."""
        return self.capability >= (8, 0)


def _nvidia(low: tuple[int, int], family: str, examples: str) -> Card:
    """Return a row for the cards from compute capability `low` to the next row."""
    tensor_cores = low >= (7, 0)
    slow = "no Tensor Cores: float16 halves the memory of activations and brings little or no speed"
    return Card(
        family,
        examples,
        "amp-fp16",
        SCALER_REASON if tensor_cores else slow,
        "Tensor Cores" if tensor_cores else NONE,
        float16=NATIVE if tensor_cores or low == (6, 0) else STORED,
        bfloat16=NATIVE if low >= (8, 0) else EMULATED,
        float8=low >= (8, 9),
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
    "Turing without Tensor Cores, Tesla K40m",
    "GTX 1630, 1650, 1660; (Quadro) T400, T500, T550, T600, T1000, T1200, T2000; MX450, MX550; Tesla K40m",
    None,
    "these cards are known to give NaN in float16: train without --amp, or insist with --amp_dtype float16",
    float16=FAULTY,
    bfloat16=EMULATED,
    capability=(7, 5),
)

_ROCM = ("amp-fp16", "float16 as on other GPUs of device cuda; --amp_dtype bfloat16 works as well")
_NO_UNIT = "no matrix unit: float16 products run at twice the rate of FP32 at most"
AMD = (  # the first row whose prefix the architecture has
    (("gfx908", "gfx90a"), Card("AMD CDNA 1 and 2 (ROCm)", "MI100, MI250", *_ROCM, "matrix cores")),
    (("gfx94", "gfx95"), Card("AMD CDNA 3 and 4 (ROCm)", "MI300X, MI355X", *_ROCM, "matrix cores", float8=True)),
    (("gfx11",), Card("AMD RDNA 3 (ROCm)", "RX 7900", *_ROCM, "WMMA")),
    (("gfx12",), Card("AMD RDNA 4 (ROCm)", "RX 9070", *_ROCM, "WMMA", float8=True)),
    (("",), Card("AMD, older (ROCm)", "RX 6900, Radeon VII", "amp-fp16", _NO_UNIT, bfloat16=EMULATED)),
)

INTEL_GPU = Card("Intel GPU (xpu)", "Arc A770, Arc B580, Data Center GPU Max", matrix_unit="XMX")

APPLE_NEW = Card("Apple M3 and later (mps)", "M3, M4 Pro")
APPLE_OLD = Card(
    "Apple M1 and M2 (mps)",
    "M1 Max, M2 Ultra",
    "amp-fp16",
    "the GPU of M1 and M2 emulates bfloat16 and computes float16 itself; GradScaler saves small gradients",
    bfloat16=EMULATED,
)

_CPU = ("amp-bf16", f"{NO_SCALER_REASON}; PyTorch's float16 kernels on CPUs are slower than those of FP32")
_IMITATED = "bfloat16 is imitated with FP32: only memory traffic shrinks; run doctor to see if that helps"
CPUS = (  # the first row with an instruction (a name of torch.cpu.get_capabilities) that the processor has
    ("amx_bf16", Card("x86 with AMX", "Xeon Sapphire Rapids and later", *_CPU, "AMX", EMULATED)),
    ("avx512_bf16", Card("x86 with AVX512-BF16", "Xeon Cooper Lake, EPYC Zen 4 and later", *_CPU, float16=EMULATED)),
    ("bf16", Card("Arm with BF16", "Graviton 3 and later, Neoverse V1, N2", *_CPU, float16=EMULATED)),
    (
        "",
        Card(
            "other CPUs",
            "Core, Ryzen before Zen 4, older Xeon and EPYC",
            reason=_IMITATED,
            float16=EMULATED,
            bfloat16=EMULATED,
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
