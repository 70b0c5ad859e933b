"""The loss, parameter groups, the optimizer and the schedule: the learning rate as a function of attempted updates."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from warmup_scheduler import GradualWarmupScheduler

from choices import OPTIMIZERS, SCHEDULES
from pretrained.fitting import belongs
from utils import UserError


class SmoothedCrossEntropy(nn.Module):
    """Compute the cross entropy, summed over images, in which each image has the weight of its own class.

    With logits z (images, classes), p = softmax(z), K classes, label smoothing e and class weights w (classes,), the
    loss of an image of class y is

        L(y) = w[y] * ((1 - e) * -log p[y] + e / K * sum over k of -log p[k])

    and it is smallest where p is the smoothed label, whatever the weights are. nn.CrossEntropyLoss weights each term of
    the sum by w[k] instead: with e = 0.1 and 400 images of one class against 20 of another, every image is then pulled
    to the rare class. Labels are class indices (images,), or shares q (images, classes) that sum to 1, as MixUp and
    CutMix make them: then the loss of an image is the sum over c of q[c] * L(c). Without weights this is
    nn.CrossEntropyLoss, bit for bit.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        class_count = logits.shape[1]
        shares = labels if labels.ndim > 1 else F.one_hot(labels, class_count)
        weighted = shares * self.class_weights
        spread = weighted.sum(1, keepdim=True) / class_count
        targets = (1 - self.label_smoothing) * weighted + self.label_smoothing * spread
        return F.cross_entropy(logits, targets, reduction="sum")


def balanced_weights(labels: torch.Tensor, class_count: int) -> torch.Tensor:
    """Return a weight for each class (class_count,), float32, inverse to its frequency among `labels` (images,).

    Their mean over these images is 1. A class without an image has weight 0.
    """
    counts = torch.bincount(labels, minlength=class_count)
    weights = len(labels) / (counts.count_nonzero() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0.0)


def parameter_groups(
    model: nn.Module,
    heads: tuple[str, ...],
    *,
    learning_rate: float,
    weight_decay: float,
    decay_norms: bool = True,
    backbone_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return all parameters of `model`, grouped by learning rate and weight decay; the heads' rate comes first.

    Without `decay_norms` parameters of one dimension (scales and shifts of norms, biases) have no weight decay.
    `backbone_lr` is a factor of the learning rate of all but the layers named in `heads`; `layer_decay` is one more for
    each transformer block between a parameter and the head (Clark et al. 2020). Groups of one kind are one group.
    """
    depths = block_depths(model) if layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.0 if belongs(name, heads) else backbone_lr * layer_decay ** (deepest - depths.get(name, deepest))
        decay = weight_decay if decay_norms or parameter.ndim > 1 else 0.0
        groups.setdefault((learning_rate * factor, decay), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != learning_rate, -key[0], -key[1]))
    return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def block_depths(model: nn.Module) -> dict[str, int]:
    """Return how many transformer blocks lead to each parameter, its own counted; for those behind all blocks one more.

    Raise UserError if the model has no such block.
    """
    blocks = attention_blocks(model)
    if not blocks:
        raise UserError(f"--layer_decay is for transformers: {type(model).__name__} has no attention blocks.")
    depth = 0
    depths = {}
    for name, _ in model.named_parameters():
        inside = [number for number, block in enumerate(blocks, 1) if name.startswith(f"{block}.")]
        if not inside and depth == len(blocks):
            depths[name] = depth + 1
            continue
        depth = max(depth, *inside) if inside else depth
        depths[name] = depth
    return depths


def attention_blocks(model: nn.Module) -> list[str]:
    """Return the names of the transformer blocks, in the order of the model's layers.

    A block is the nearest member of an nn.ModuleList or nn.Sequential around an attention layer. Attention that lies in
    no such list pools the output of all blocks. A stage that holds blocks and attention of its own is not a block.
    """
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for name, module in modules.items():
        while name and _is_attention(module):
            outside, _, _ = name.rpartition(".")
            is_member = isinstance(modules[outside], (nn.ModuleList, nn.Sequential))
            if is_member and not _is_attention(modules[name]):
                found[name] = None
                break
            name = outside
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _is_attention(module: nn.Module) -> bool:
    """Return True if a layer is called attention, or computes queries as attention does."""
    called = type(module).__name__.lower()
    computes_queries = not {"q", "qk", "qkv"}.isdisjoint(name for name, _ in module.named_children())
    return computes_queries or ("attention" in called and "block" not in called)


def make_optimizer(
    groups: Iterable[Any], name: str, *, learning_rate: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """Return the optimizer that `choices.OPTIMIZERS` calls `name`.

    `groups` are parameters, or the result of `parameter_groups`; a group's own learning rate and weight decay win.
    A fused optimizer reads the scaler's verdict on the device; others make `scaler.step` wait for it. An optimizer that
    PyTorch does not fuse ignores `fused`.
    """
    rule = OPTIMIZERS[name]
    optimizer_class = getattr(torch.optim, rule.class_name)
    arguments = {"lr": learning_rate, "weight_decay": weight_decay, **rule.arguments}
    if "fused" in inspect.signature(optimizer_class).parameters:
        arguments["fused"] = fused
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **arguments)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].update({key: torch.zeros_like(parameter) for key in rule.zero_state})
    return optimizer


def hold_from_fault_on(optimizer: torch.optim.Optimizer, norm: torch.Tensor, scaler: torch.amp.GradScaler) -> None:
    """Let a fused optimizer leave out each step from the first on whose `norm`, of all gradients, is not finite.

    A scaler does this itself, step by step. Without one the run ends when its numbers are read next; until then the
    weights stay, so that the update can be looked at again. Nothing waits for the device.
    """
    if scaler.is_enabled() or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    bad = norm.isfinite().logical_not().float()
    held = getattr(optimizer, "found_inf", None)
    optimizer.found_inf = bad if held is None else torch.maximum(held, bad)  # type: ignore[attr-defined]


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    decay_type: str,
    *,
    epochs: int,
    updates_per_epoch: int,
    warmup_epochs: float | None = None,
    done: int = 0,
) -> LRScheduler:
    """Return the schedule `decay_type`, of `choices.SCHEDULES`, as it is after `done` updates, which are replayed.

    The learning rate is a function of attempted updates t = 0 .. T-1, with W updates of warmup. Warmup is (t+1)/W, so
    no update runs at rate 0; then, for `cosine_warmup`, (1+cos(pi (t-W+1)/(T-W+1)))/2, so the peak is one update; for
    `linear_warmup`, 1-(t-W+1)/(T-W+1); `step` and `step_warmup` divide by 10 at epochs 30, 60 and 90, counted from the
    end of warmup.
    """
    schedule = SCHEDULES[decay_type]
    if warmup_epochs is None:
        warmup_epochs = epochs / 10 if schedule.warmup_epochs is None else schedule.warmup_epochs
    total = epochs * updates_per_epoch
    warmup = min(max(1, round(warmup_epochs * updates_per_epoch)), total)
    for group in optimizer.param_groups:  # an optimizer that had a schedule before starts from its peak again
        group["lr"] = group.pop("initial_lr", group["lr"])

    def factor(step: int) -> float:
        return schedule.factor(step, total - warmup, updates_per_epoch)

    scheduler: LRScheduler = _Curve(optimizer, factor)
    # A schedule wants an optimizer step before its own. Without gradients that step changes nothing, and
    # a first update that the scaler skips draws no warning.
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    if schedule.warms_up:
        scheduler = GradualWarmupScheduler(optimizer, multiplier=1.0, total_epoch=warmup, after_scheduler=scheduler)
        scheduler.step()  # leaves the rate of 0 that it starts with
    for _ in range(done):
        scheduler.step()
    return scheduler


class _Curve(LambdaLR):
    """A LambdaLR whose get_lr may be called outside step(), as GradualWarmupScheduler does at the end of warmup."""

    def get_lr(self) -> list[float | torch.Tensor]:
        return [base * curve(self.last_epoch) for base, curve in zip(self.base_lrs, self.lr_lambdas, strict=True)]
