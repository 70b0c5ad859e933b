"""What a precision is: its name, how tables call it, its 16-bit type, its scaler, and the options that choose it.

Readable without torch, so that options, reports and comparisons speak of the same thing. What a precision means on a
device is in precision.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """One numeric regime. `amp_dtype` is autocast's 16-bit type by torch's name; None if autocast is off."""

    label: str
    amp_dtype: str | None = None
    scaled: bool = False  # whether the loss is scaled: float16 alone has so few exponents that gradients vanish
    tf32: bool = False  # whether CUDA may round the factors of float32 products to TF32

    @property
    def options(self) -> dict[str, bool | str]:
        """The values of the options --amp, --amp_dtype and --tf32 that choose this regime."""
        return {"amp": self.amp_dtype is not None, "amp_dtype": self.amp_dtype or "auto", "tf32": self.tf32}


PRECISIONS = {
    "fp32": Regime("FP32"),
    "tf32": Regime("TF32", tf32=True),
    "amp-fp16": Regime("AMP float16", "float16", scaled=True),
    "amp-bf16": Regime("AMP bfloat16", "bfloat16"),
}


def label_of(name: str) -> str:
    """How tables and messages call the precision `name`."""
    return PRECISIONS[name].label


def name_of(amp_dtype: str | None, *, tf32: bool = False) -> str:
    """The name of the precision with this 16-bit type and float32 mode."""
    return next(name for name, regime in PRECISIONS.items() if (regime.amp_dtype, regime.tf32) == (amp_dtype, tf32))
