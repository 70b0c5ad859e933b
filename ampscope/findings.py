"""Define the rules and the findings: which rule is broken, where, by how much, and the cures.

A finding breaks a rule and makes --strict fail. A note reports the same in a library's code, which its user cannot fix;
it breaks no rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ampscope.places import Place

RULES = {
    "host-sync": "the step reads a tensor's value, so the host waits for the device",
    "numpy": "the step leaves PyTorch for numpy: no gradient, no autocast, and the host waits",
    "half-weights": "weights are float16: small updates vanish, and GradScaler refuses such gradients",
    "bfloat16-weights": "weights are bfloat16: updates below 1/256 of a weight vanish",
    "clip-before-unscale": "gradients are clipped while the loss scale is still on them",
    "scaler-with-bfloat16": "a GradScaler works on bfloat16, which needs none",
    "no-scaler": "float16 without a GradScaler: small gradients become zero",
    "backward-in-autocast": "backward runs inside autocast",
    "step-in-autocast": "the optimizer's step runs inside autocast",
    "step-around-scaler": "the optimizer steps on gradients that still carry the loss scale",
    "scaler-not-updated": "scaler.step without scaler.update: the scale never adapts",
    "loss-not-scaled": "scaler.step without scaler.scale: gradients are divided by a scale they never had",
    "update-too-early": "scaler.update before the last step: that step divides by nothing, or by another scale",
    "unscaled-twice": "one optimizer's gradients are unscaled, or stepped on, twice in an update",
    "scaled-twice": "a loss is multiplied by the loss scale twice",
    "backward-after-unscale": "a backward pass adds scaled gradients to unscaled ones",
    "scaled-gradients": "gradients are used or changed while the loss scale is still on them",
    "gradients-kept": "gradients are never cleared: every update steps on the sum of all before it",
    "schedule-first": "the learning rate's schedule steps before the optimizer",
    "trains-nothing": "the step gives no loss that a gradient could come from",
    "narrow-loss": "the loss is computed in 16 bits, because autocast has ended before it",
    "vector-loss": "the loss is not one number",
    "no-gradient": "trained parameters get no gradient",
    "evaluation-mode": "layers are trained in evaluation mode",
    "zero-grad-in-place": "gradients are set to zero instead of None: a write and a read for each, every update",
    "unaligned-sizes": "sizes are not multiples of 8, which Tensor Cores need for 16 bits",
    "explicit-float": "16-bit values are made float32 and cast back for the next product",
    "autocast-off": "a product runs in float32 because autocast is off there",
    "in-place-product": "a product runs in float32 because autocast skips in-place and out= forms",
    "custom-operator": "a custom operator runs in float32 because autocast does not know it",
    "custom-function": "a custom autograd function computes in float32: it has no custom_fwd and custom_bwd",
    "attention-in-float32": "PyTorch's own attention computes in float32, because no fused kernel takes this call",
    "not-on-lists": "a product runs in float32 because it is not on autocast's lists",
    "float64": "float64 is at work, which autocast leaves alone",
    "autocast-no-effect": "autocast is on, but nothing runs in 16 bits",
    "fails": "the step does not run in this precision",
    "nonfinite-forward": "the forward pass or the loss is not finite",
    "nonfinite-backward": "a gradient is not finite",
    "overflow-hidden": "float16 overflows, and a later operator makes zeros or a limit of the infinity",
    "unsafe-function": "a function that autocast refuses on a GPU",
    "float16-range": "activations are larger than float16 can hold",
}


@dataclass
class Finding:
    """A broken rule. `rule` is one of RULES, `message` the observation in sentences, `cures` what helps, best first."""

    rule: str
    message: str
    cures: list[str] = field(default_factory=list)
    place: Place | None = None
    module: str | None = None
    op: str | None = None
    precision: str | None = None
    level: str = "finding"

    def record(self) -> dict[str, Any]:
        """Return the finding as plain values for JSON."""
        return {
            "rule": self.rule,
            "level": self.level,
            "title": RULES[self.rule],
            "message": self.message,
            "cures": self.cures,
            "file": self.place.file if self.place else None,
            "line": self.place.line if self.place else None,
            "code": self.place.code if self.place else None,
            "module": self.module,
            "op": self.op,
            "precision": self.precision,
        }


def by_place(findings: list[Finding]) -> list[Finding]:
    """Keep the first finding of each rule at each place; return findings before notes."""
    kept: dict[tuple, Finding] = {}
    for finding in findings:
        where = (finding.place.file, finding.place.line) if finding.place else (finding.module, finding.op)
        kept.setdefault((finding.rule, where), finding)
    return sorted(kept.values(), key=lambda finding: (finding.level != "finding", [*RULES].index(finding.rule)))
