"""Write docs/cards.md: the precisions of each GPU and processor, from the table in system/cards.py.

python docs/cards.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from system import cards  # noqa: E402 (found beside this folder)

PAGE = """# Which precision on my card?

`python main.py doctor` shows the row of your device and times it. `--amp` chooses by the same table, which is in
`system/cards.py`; `python docs/cards.py` writes this page. Where the table and your own timing disagree,
believe the timing.

{table}

- **native**: a unit of the device multiplies these numbers. **emulated**: they are stored in 16 bits and computed as
  FP32, which saves memory traffic and no arithmetic. PyTorch's `torch.cuda.is_bf16_supported()` says True for
  emulation, too, unless it is called with `including_emulation=False`.
- **TF32** is off unless you ask for `--tf32`, so that FP32 means FP32.
- **float8** is a fact about the hardware. PyTorch's autocast has no float8, and the libraries that train with it
  (torchao, Transformer Engine) have no convolutions, so no precision here uses it.
- **gives NaN**: reported for these cards in float16 convolutions. `--amp` refuses them; `--amp_dtype float16` insists.
  T500, MX450 and MX550 are listed because they carry the same chip as the T550 and the GTX 1650.
- **A CPU with `avx512_fp16`** computes float16 natively, but that does not make float16 the faster type for training:
  `doctor` times a convolution, forward and backward, and reports the ratio to FP32 in its row "float16".
- **MXFP8 and NVFP4** are formats of Blackwell, with a scale for each 32 or 16 values; autocast has neither.
  TensorRT-RTX runs FP4 products on an RTX 5090
  ([matrix](https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix-1/1.5.html)), but
  Transformer Engine refused to train with MXFP8 on compute capability 12.0
  ([2304](https://github.com/NVIDIA/TransformerEngine/issues/2304)).
- **float64 on Intel GPUs**: Arc A cards have none, and PyTorch raises "Required aspect fp64 is not supported on the
  device" ([torch-xpu-ops 1742](https://github.com/intel/torch-xpu-ops/issues/1742)).
- **GradScaler on Apple's GPUs**: torch 2.5 raised "Cannot convert a MPS Tensor to float64"
  ([142397](https://github.com/pytorch/pytorch/issues/142397)); torch 2.14.1 computes in float32 there.
- A precision may be listed for a card that the PyTorch you have no longer supports: wheels for CUDA 13 begin at compute
  capability 7.5. PyTorch warns when it meets an older card.

Sources: NVIDIA, [CUDA programming guide, compute
capabilities](https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities) and [Tensor Core
precisions](https://www.nvidia.com/en-us/data-center/tensor-cores/); AMD, [ROCm precision
support](https://rocm.docs.amd.com/en/latest/reference/precision-support.html); Intel, [AMP on Intel
GPUs](https://docs.pytorch.org/docs/stable/notes/get_start_xpu.html); Apple, [Metal feature
set](https://developer.apple.com/metal/Metal-Feature-Set-Tables.pdf); cards that give NaN: the list in Ultralytics'
`check_amp`, collected from its users' reports.
"""


def all_cards() -> list[cards.Card]:
    """Return all rows."""
    turing = next(place for place, card in enumerate(cards.NVIDIA) if card.capability == (7, 5))
    nvidia = [*cards.NVIDIA[: turing + 1], cards.FAULTY_CARDS, *cards.NVIDIA[turing + 1 :]]
    return [
        *nvidia,
        *(card for _, card in cards.AMD),
        cards.INTEL_GPU,
        cards.APPLE_NEW,
        cards.APPLE_OLD,
        *(card for _, card in cards.CPUS),
    ]


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


def page() -> str:
    """Return the whole of docs/cards.md."""
    return PAGE.format(table=markdown_table())


if __name__ == "__main__":
    (HERE / "cards.md").write_text(page(), encoding="utf-8")
