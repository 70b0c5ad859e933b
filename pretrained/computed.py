"""Compute weights that a state dict stores as several tensors: pruned, weight_norm, spectral_norm.

torch.nn.utils writes them by hooks (weight_orig and weight_mask, weight_g and weight_v, weight_orig and weight_u) or by
parametrizations (parametrizations.weight.original0). Knows nothing of models.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable

import torch

State = dict[str, torch.Tensor]
_NEW_NAME = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.(original0|original1|original|0\._u|0\._v)")
_NEW_PARTS = {"original0": "g", "original1": "v", "original": "orig", "0._u": "u", "0._v": "v"}
_OLD_NAME = re.compile(r"(.*)_(orig|mask|g|v|u)")


def with_computed(state: State) -> tuple[State, str]:
    """Return `state` with each such weight computed in place of its parts, and a sentence about them."""
    found: dict[str, State] = collections.defaultdict(dict)
    names: dict[str, str] = {}
    for name, tensor in state.items():
        weight, part = _split(name)
        if part:
            found[weight][part] = tensor
            names[name] = weight
    computed = {weight: _computed(parts) for weight, parts in found.items()}
    kinds = collections.Counter(kind for kind, _ in computed.values() if kind)
    plain: State = collections.OrderedDict()
    for name, tensor in state.items():
        weight = names.get(name, "")
        kind, value = computed.get(weight, ("", tensor))
        plain[weight if kind else name] = value if kind else tensor
    if hasattr(state, "_metadata"):
        vars(plain)["_metadata"] = state._metadata
    said = ", ".join(f"{kind} of {count} tensors computed" for kind, count in kinds.items())
    return (plain if kinds else state), said


def _split(name: str) -> tuple[str, str]:
    """Return the weight's name and the part's name for an entry of `state`; two empty strings if it is not a part."""
    new = _NEW_NAME.fullmatch(name)
    if new:
        return ".".join(filter(None, (new[1], new[2]))), _NEW_PARTS[new[3]]
    old = _OLD_NAME.fullmatch(name)
    return (old[1], old[2]) if old else ("", "")


def _computed(parts: State) -> tuple[str, torch.Tensor]:
    """Return the kind and the weight of these parts; the kind is empty if they do not form one."""
    for kind, needed, compute in _KINDS:
        if parts.keys() == needed:
            weight = compute(parts)
            if weight is not None:
                return kind, weight
    return "", torch.empty(0)


def _pruned(parts: State) -> torch.Tensor | None:
    """Return orig * mask (torch.nn.utils.prune)."""
    return parts["orig"] * parts["mask"] if parts["orig"].shape == parts["mask"].shape else None


def _normed(parts: State) -> torch.Tensor | None:
    """Return g * v / |v|, with the norm over all dimensions that g does not have (Salimans and Kingma 2016)."""
    scale = parts["g"].float()
    direction = parts["v"].float()
    if scale.dim() not in (0, direction.dim()):
        return None
    dimensions = [d for d in range(direction.dim()) if scale.dim() == 0 or scale.shape[d] == 1]
    if not dimensions or any(scale.shape[d] not in (1, direction.shape[d]) for d in range(scale.dim())):
        return None
    norm = torch.linalg.vector_norm(direction, dim=dimensions, keepdim=scale.dim() > 0)
    return (scale * direction / norm).to(parts["v"].dtype)


def _spectral(parts: State) -> torch.Tensor | None:
    """Return orig / (u^T W v); W is the weight as a matrix with a row for each element of u (Miyato et al. 2018)."""
    weight = parts["orig"].float()
    rows = [d for d in (0, 1) if d < weight.dim() and weight.shape[d] == len(parts["u"])]
    if not rows or len(parts["u"]) * len(parts["v"]) != weight.numel():
        return None
    matrix = weight.movedim(rows[0], 0).flatten(1)
    return (weight / (parts["u"].float() @ (matrix @ parts["v"].float()))).to(parts["orig"].dtype)


_KINDS: tuple[tuple[str, set[str], Callable[[State], torch.Tensor | None]], ...] = (
    ("pruned weights", {"orig", "mask"}, _pruned),
    ("weight_norm", {"g", "v"}, _normed),
    ("spectral_norm", {"orig", "u", "v"}, _spectral),
)
