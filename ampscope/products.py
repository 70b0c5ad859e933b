"""Describe matrix products, convolutions, attention and recurrent layers, the targets of autocast: sizes and FLOPs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ampscope.places import Place
from ampscope.tensors import dtype_name

PRODUCTS = r"^(addmm|mm|bmm|baddbmm|addbmm|mv|addmv|dot|linear|linear_backward|matmul|_scaled_mm)_?(\.|$)"
PRODUCTS += r"|convolution|conv\w*$|scaled_dot_product|attention|mkldnn_(linear|rnn)|rnn_layer|_cudnn_rnn|lstm|gru"
PRODUCTS += r"|^_?cdist|^_?trilinear|_fft_|grouped_mm|^_?sparse_(mm|addmm|semi_structured)|^s?spm|^smm$|^hspmm"
PRODUCTS += r"|^_int_mm|^_weight_int\d|^_addmm_activation|^ger$|^addr|^vdot|^einsum|^bilinear|^linalg_multi_dot"
ALIGNED = 8  # Tensor Cores read multiples of this many 16-bit numbers
BUILT_IN = (  # namespaces of operators
    "aten",
    "prims",
    "prim",
    "torchvision",
    "c10d",
    "_c10d_functional",
    "profiler",
    "higher_order",
    "torchaudio",
    "quantized",
    "mkldnn",
)


@dataclass
class Product:
    """One product of the step. `dims` are the sizes of inner and output features, whatever the batch."""

    op: str
    dtype: str
    flops: float | None
    dims: tuple[int, ...] = ()
    groups: int = 1
    phase: str = ""
    module: str = ""
    place: Place | None = None
    function: str = ""
    autocast: bool | None = None
    seconds: float = 0.0
    in_custom_function: bool = False
    written_cast: Place | None = None
    out_form: bool = False

    @property
    def narrow(self) -> bool:
        """Return True if it ran in 16 bits."""
        return self.dtype in ("float16", "bfloat16")


def is_product(op: str, operator: Any) -> bool:
    """Return True if an operator is a product; custom operators on floating point are judged by time."""
    return bool(re.search(PRODUCTS, op)) or is_custom(operator)


def is_custom(operator: Any) -> bool:
    """Return True if an operator was registered outside PyTorch and its own packages."""
    return operator.namespace not in BUILT_IN


def describe(operator: Any, args: Any, kwargs: Any, result: Any, given: list[torch.Tensor]) -> Product:
    """Return the product's type, sizes and floating-point operations (None if no formula is known)."""
    packet = operator.overloadpacket
    op = str(packet).removeprefix("aten.")
    floating = [tensor for tensor in given if tensor.is_floating_point()]
    dtype = dtype_name((floating or given or [torch.empty(0)])[0].dtype)
    if op in ("addmm", "baddbmm") and len(floating) > 1:
        dtype = dtype_name(floating[1].dtype)
    if is_custom(operator) and isinstance(result, torch.Tensor) and result.dtype in (torch.float16, torch.bfloat16):
        dtype = dtype_name(result.dtype)  # autocast applies to the operators that it calls
    flops = None
    formula = flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, op.rstrip("_"), None))
    if formula is not None:
        given_out = {name: value for name, value in kwargs.items() if name != "out"}
        try:
            flops = float(formula(*args, **given_out, out_val=result))
        except Exception:  # the formula does not support this overload
            flops = None
    if flops is None and len(floating) > 1:
        flops = _counted(op, floating)
    product = Product(op, dtype, flops, out_form="out" in kwargs or "out" in operator._overloadname)
    if op in ("mm", "addmm", "bmm", "baddbmm") and len(floating) > 1:
        left, right = floating[-2:]
        product.dims = (right.shape[-2], right.shape[-1])
    elif op == "convolution" and len(floating) > 1:
        weight = floating[1]
        product.groups = args[8] if len(args) > 8 else 1
        product.dims = (weight.shape[1], weight.shape[0]) if not args[6] else (weight.shape[0], weight.shape[1])
    return product


def _counted(op: str, floating: list[torch.Tensor]) -> float | None:
    """Return the floating point operations of products that PyTorch's own table does not know."""
    left, right = floating[-2:] if op.startswith("addmv") else floating[:2]
    if op.rstrip("_") in ("mv", "addmv", "dot", "vdot"):
        return 2.0 * left.numel()
    if "grouped_mm" in op:  # each row meets the weights of one group
        return 2.0 * left.numel() * right.shape[-1]
    return None
