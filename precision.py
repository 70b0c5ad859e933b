"""Mixed precision on this device: the dtype, autocast, GradScaler, and the reason for them.

FP32 is not another path but a disabled autocast and a disabled scaler, so that the update reads the same in every
precision. Knows nothing of models or data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from precision_table import PRECISIONS, Regime, name_of
from system.cards import INTEL_GPU, NATIVE, Card, amd_card, apple_chip, nvidia_card, processor
from system.machine import chip_name, cpu_instructions
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
        """Return the type in which autocast computes matrix products and convolutions; float32 if it is disabled."""
        return getattr(torch, self.regime.amp_dtype or "float32")

    def autocast(self) -> torch.autocast:
        """Return the context for the forward pass and the loss only; the weights stay float32."""
        return torch.autocast(self.device.type, self.dtype if self.amp else None, enabled=self.amp)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler, enabled for float16 alone: bfloat16 has float32's range, so gradients do not underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.regime.scaled)


def choose_precision(
    device: torch.device, *, amp: bool = False, amp_dtype: str = "auto", tf32: bool = False
) -> Precision:
    """Return the precision that the options ask for on `device`, ready to use.

    On CUDA also set the float32 mode of cuDNN and cuBLAS: convolutions use TF32 by default, and an FP32 baseline must
    not be TF32 by accident. Raise UserError if the device cannot do what is asked.
    """
    card = card_of(device)
    _refuse_impossible(device, card, amp=amp, amp_dtype=amp_dtype, tf32=tf32)
    cuda = device.type == "cuda"
    if cuda:
        _set_float32_mode(tf32)
    if tf32:
        reason = "--tf32: float32 storage, factors of products rounded to 10 bits of fraction"
    elif not amp:
        reason = "no --amp: true FP32, TF32 off" if cuda else "no --amp"
    elif amp_dtype != "auto":
        reason = f"--amp_dtype {amp_dtype}"
    else:
        amp_dtype = PRECISIONS[card.pick or "fp32"].amp_dtype or amp_dtype  # without a pick it was refused above
        reason = card.reason
    return Precision(name_of(amp_dtype if amp else None, tf32=tf32), device, reason)


def _refuse_impossible(device: torch.device, card: Card, *, amp: bool, amp_dtype: str, tf32: bool) -> None:
    """Raise UserError, with the remedy, if the device cannot compute in this precision."""
    if tf32 and device.type != "cuda":
        raise UserError("--tf32 is a mode of NVIDIA's Tensor Cores: it needs --device cuda.")
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    if tf32 and not card.tf32:
        raise UserError(f"--tf32 needs an Ampere or later GPU of NVIDIA; {name} has no TF32.")
    faulty = card.pick is None
    if amp and amp_dtype == "auto" and faulty:
        raise UserError(
            f"{name}: this card is among those known to give NaN in float16 (GTX 16 series, T400 to T2000, Tesla "
            "K40m). Train without --amp, or insist with --amp_dtype float16."
        )
    if amp and amp_dtype == "bfloat16" and card.bfloat16 != NATIVE:
        way = "Train without --amp." if faulty else "Use --amp_dtype float16."
        raise UserError(f"{name} has no bfloat16 arithmetic. {way}")


def wider_range(precision: Precision) -> str:
    """Return the option by which a run in float16 gets the range of float32 on its device."""
    device = precision.device
    refused = device.type == "cuda" and card_of(device).bfloat16 != NATIVE
    return "--no-amp, as this GPU has no bfloat16" if refused else "--amp_dtype bfloat16"


def card_of(device: torch.device) -> Card:
    """Return the entry for this device in system/cards.py: its types, and the precision that --amp picks."""
    if device.type == "cuda" and torch.version.hip:
        return amd_card(torch.cuda.get_device_properties(device).gcnArchName)
    if device.type == "cuda":
        return nvidia_card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if device.type == "xpu":
        return INTEL_GPU
    if device.type == "mps":
        return apple_chip(chip_name())
    return processor(cpu_instructions())


def _set_float32_mode(tf32: bool) -> None:
    """Set the old switches first, then the new: torch.compile reads the old ones, which raise if the two disagree."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    backends: Any = torch.backends  # the type stubs lack some of these switches
    for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        part.fp32_precision = "tf32" if tf32 else "ieee"


def named_precision(name: str, device: torch.device) -> Precision:
    """Return the precision called `name` (one of PRECISIONS) on `device`, set up as by `choose_precision`."""
    regime = PRECISIONS[name]
    amp_dtype = regime.amp_dtype or "auto"
    return choose_precision(device, amp=regime.amp_dtype is not None, amp_dtype=amp_dtype, tf32=regime.tf32)


def sensible_precisions(device: torch.device) -> list[str]:
    """Return the names of the precisions worth comparing on `device`, on a GPU both 16-bit types if it has both."""
    card = card_of(device)
    both = device.type == "cuda" and card.pick is not None and card.bfloat16 == NATIVE
    wanted = {"fp32", card.pick} | ({"tf32"} if card.tf32 else set()) | ({"amp-bf16"} if both else set())
    return [name for name in PRECISIONS if name in wanted]
