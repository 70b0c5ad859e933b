"""What mixed precision means on this device: the dtype, autocast, GradScaler, and why.

The only file that configures them. FP32 is not another path but a disabled autocast and a disabled
scaler, so that the training step reads the same in every precision. Knows nothing of models or data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from precision_table import PRECISIONS, Regime, name_of
from utils import UserError


@dataclass(frozen=True)
class Precision:
    """One numeric regime on one device: `name` is one of PRECISIONS, `reason` says in words why it was chosen."""

    name: str
    device: torch.device
    reason: str

    @property
    def regime(self) -> Regime:
        return PRECISIONS[self.name]

    @property
    def label(self) -> str:
        return self.regime.label

    @property
    def amp(self) -> bool:
        return self.regime.amp_dtype is not None

    @property
    def dtype(self) -> torch.dtype:
        """What autocast casts matrix products and convolutions to; float32 where it is disabled."""
        return getattr(torch, self.regime.amp_dtype or "float32")

    def autocast(self) -> torch.autocast:
        """Wraps forward and loss only; the weights stay float32."""
        return torch.autocast(self.device.type, self.dtype if self.amp else None, enabled=self.amp)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Enabled for float16 alone: bfloat16 has float32's range, so nothing underflows there."""
        return torch.amp.GradScaler(self.device.type, enabled=self.regime.scaled)


def choose_precision(
    device: torch.device, *, amp: bool = False, amp_dtype: str = "auto", tf32: bool = False
) -> Precision:
    """The precision that the options ask for on `device`, set up and ready to use.

    On CUDA this also sets cuDNN's and cuBLAS's float32 mode, because convolutions there use TF32
    unless told not to: an FP32 baseline must not be TF32 by accident.
    Raises UserError where the device cannot do what is asked.
    """
    cuda = device.type == "cuda"
    if tf32 and not cuda:
        raise UserError("--tf32 is a mode of NVIDIA's Tensor Cores: it needs --device cuda.")
    if cuda:
        card = torch.cuda.get_device_name(device)
        if tf32 and torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"--tf32 needs an Ampere or later GPU; {card} is older.")
        if amp and amp_dtype == "auto" and gives_nan_in_float16(device):
            raise UserError(
                f"{card}: cards of the GTX 16 series are known to give NaN in float16. Train without "
                "--amp, or insist with --amp_dtype float16."
            )
        if amp and amp_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(f"{card} has no bfloat16 arithmetic. Use --amp_dtype float16.")
        _set_float32_mode(tf32)
    if tf32:
        reason = "--tf32: float32 storage, factors of products rounded to 10 bits of fraction"
    elif not amp:
        reason = "no --amp: true FP32, TF32 off" if cuda else "no --amp"
    elif amp_dtype != "auto":
        reason = f"--amp_dtype {amp_dtype}"
    elif cuda:
        amp_dtype = "float16"
        reason = "float16 on CUDA: runs on every Tensor Core, GradScaler saves small gradients"
    else:
        amp_dtype = "bfloat16"
        reason = f"bfloat16 on {device.type}: the 16-bit type it computes in, no scaler needed"
    return Precision(name_of(amp_dtype if amp else None, tf32=tf32), device, reason)


def _set_float32_mode(tf32: bool) -> None:
    """Old switches first, then the new: torch.compile reads the old ones, which raise where the two disagree."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    backends: Any = torch.backends  # whose types know only some of these switches
    for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        part.fp32_precision = "tf32" if tf32 else "ieee"


def named_precision(name: str, device: torch.device) -> Precision:
    """The precision called `name` (one of PRECISIONS) on `device`, set up as by `choose_precision`."""
    regime = PRECISIONS[name]
    amp_dtype = regime.amp_dtype or "auto"
    return choose_precision(device, amp=regime.amp_dtype is not None, amp_dtype=amp_dtype, tf32=regime.tf32)


def sensible_precisions(device: torch.device) -> list[str]:
    """Names of the precisions worth comparing on `device`."""
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return list(PRECISIONS) if ampere else ["fp32", "amp-fp16"]
    return ["fp32", "amp-bf16"]


def gives_nan_in_float16(device: torch.device) -> bool:
    """Whether this is a GTX 16xx card, which give NaN in float16 convolutions."""
    return device.type == "cuda" and "GTX 16" in torch.cuda.get_device_name(device)


def bfloat16_products(on: bool) -> None:
    """Lets a CPU's float32 convolutions and matrix products round their factors to bfloat16, or not.

    oneDNN may take this up or not: on processors without AMX it has no such kernels, and with AMX none for the
    gradients of weights. `compare --ladder` measures it; no option uses it.
    """
    for part in (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):
        part.fp32_precision = "bf16" if on else "ieee"
