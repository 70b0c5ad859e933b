"""Define the precisions of a step: a name, a 16-bit type, a scaler, and the float32 mode of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ampscope.errors import InspectError


@dataclass(frozen=True)
class Kind:
    """One precision on any device. `dtype` is what autocast casts to, float32 if it is off."""

    label: str
    dtype: torch.dtype
    reason: str

    @property
    def amp(self) -> bool:
        return self.dtype != torch.float32


PRECISIONS = {
    "fp32": Kind("FP32", torch.float32, "no autocast"),
    "tf32": Kind("TF32", torch.float32, "float32 storage, factors of products rounded to 10 bits of fraction"),
    "amp-fp16": Kind("AMP float16", torch.float16, "10 bits of fraction, a small range: GradScaler saves gradients"),
    "amp-bf16": Kind("AMP bfloat16", torch.bfloat16, "the range of float32: no GradScaler is needed"),
}


@dataclass(frozen=True)
class Precision:
    """A precision on one device; `name` is one of PRECISIONS."""

    name: str
    device: torch.device

    @property
    def label(self) -> str:
        return PRECISIONS[self.name].label

    @property
    def reason(self) -> str:
        return PRECISIONS[self.name].reason

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.name].dtype

    @property
    def amp(self) -> bool:
        return PRECISIONS[self.name].amp

    def autocast(self) -> torch.autocast:
        """Return a region for the forward pass and the loss; a disabled one for FP32 and TF32."""
        return torch.autocast(self.device.type, self.dtype if self.amp else None, enabled=self.amp)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler, which is enabled for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def use(self) -> Precision:
        """Set the float32 mode of a CUDA device, which is global: true float32 for all but tf32. Return self."""
        if self.device.type == "cuda":
            tf32 = self.name == "tf32"
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            backends: Any = torch.backends  # their types know only some of these switches
            for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                part.fp32_precision = "tf32" if tf32 else "ieee"
        return self


def named_precision(name: str, device: torch.device) -> Precision:
    """Return the precision called `name` on `device`, in use there.

    Raises:
        InspectError: if there is no such precision, or the device cannot compute in it.
    """
    if name not in PRECISIONS:
        raise InspectError(f"there is no precision {name!r}: choose from {', '.join(PRECISIONS)}.")
    if name == "tf32" and device.type != "cuda":
        raise InspectError("tf32 is a mode of NVIDIA's Tensor Cores: it needs a CUDA device.")
    if name == "amp-bf16" and device.type == "cuda" and not _has_bfloat16(device):
        raise InspectError(f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic: take amp-fp16.")
    return Precision(name, device).use()


def sensible_precisions(device: torch.device) -> list[str]:
    """Return the names of the precisions worth comparing on `device`."""
    if device.type == "cuda":
        ampere = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
        wanted = {"fp32", "amp-fp16"} | ({"tf32"} if ampere else set())
        wanted |= {"amp-bf16"} if _has_bfloat16(device) else set()
        return [name for name in PRECISIONS if name in wanted]
    return ["fp32", "amp-fp16" if device.type == "mps" else "amp-bf16"]


def _has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
