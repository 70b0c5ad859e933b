"""The table of precisions: name, label, 16-bit type, scaler, and the options that choose each.

Imports no torch, so that options, reports and comparisons can share it. precision.py sets a precision up on a device.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """One numeric regime. `amp_dtype` is autocast's 16-bit type by torch's name; None if autocast is off."""

    label: str
    amp_dtype: str | None = None
    scaled: bool = False  # True if the loss is scaled: only float16 has so few exponents that gradients vanish
    tf32: bool = False  # True if CUDA may round the factors of float32 products to TF32

    @property
    def options(self) -> dict[str, bool | str]:
        """Return the values of the options --amp, --amp_dtype and --tf32 that choose this regime."""
        return {"amp": self.amp_dtype is not None, "amp_dtype": self.amp_dtype or "auto", "tf32": self.tf32}


PRECISIONS = {
    "fp32": Regime("FP32"),
    "tf32": Regime("TF32", tf32=True),
    "amp-fp16": Regime("AMP float16", "float16", scaled=True),
    "amp-bf16": Regime("AMP bfloat16", "bfloat16"),
}


def label_of(name: str) -> str:
    """Return the label of the precision `name` in tables and messages."""
    return PRECISIONS[name].label


def name_of(amp_dtype: str | None, *, tf32: bool = False) -> str:
    """Return the name of the precision with this 16-bit type and float32 mode."""
    return next(name for name, regime in PRECISIONS.items() if (regime.amp_dtype, regime.tf32) == (amp_dtype, tf32))
