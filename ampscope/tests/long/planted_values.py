"""Models with values that are not finite, as a stranger would write them; the line that does it carries `# here`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTH = 64


class Net(nn.Module):
    """32 inputs, 10 outputs, and something in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, WIDTH)
        self.last = nn.Linear(WIDTH, 10)
        self.build()

    def build(self):
        """Add layers."""

    def forward(self, x):
        return self.last(self.middle(self.first(x)))

    def middle(self, x):
        return x.relu()


# Range of float16


class UnscaledAttention(Net):
    def middle(self, x):
        tokens = x.view(8, 8, 8) * 300
        scores = tokens @ tokens.transpose(1, 2)  # here
        return (scores.softmax(-1) @ tokens).flatten(1)


class NarrowMask(Net):
    def middle(self, x):
        hidden = torch.arange(WIDTH) < 8
        penalty = hidden.float() * -1e9
        scores = x.view(8, 8, 8) + penalty.to(x.dtype).view(8, 8)  # here
        return scores.softmax(-1).flatten(1)


class FloatMinimum(Net):
    def middle(self, x):
        scores = x.masked_fill(torch.arange(WIDTH) > 60, torch.finfo(torch.float32).min)  # here
        return scores.softmax(-1)


class SumOfSquares(Net):
    def middle(self, x):
        x = x * 200
        return x / (x * x).sum(-1, keepdim=True).sqrt()  # here


class LogSumExp(Net):
    def middle(self, x):
        x = x.relu() * 20
        return x - x.exp().sum(-1, keepdim=True).log()  # here


class GradientScaleInside(Net):
    def middle(self, x):
        return (x * 4096.0 * 4096.0).relu() / 4096.0 / 4096.0  # here


class Cubed(Net):
    def middle(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044 * torch.pow(x * 50, 3))))  # here


class Distances(Net):
    def middle(self, x):
        x = x * 100
        squares = x.pow(2).sum(-1)  # here
        return x / (1 + (squares[:, None] + squares[None] - 2 * x @ x.t()).mean())


# Not finite in any type


class PaddedRow(Net):
    def middle(self, x):
        x = x * torch.tensor([1.0] * 7 + [0.0])[:, None].to(x.dtype)
        return x / x.norm(dim=-1, keepdim=True)  # here


class OneSampleStd(Net):
    def middle(self, x):
        group = x[:1]
        return x - group.mean(0) + group.std(0)  # here


class VarianceByHand(Net):
    def middle(self, x):
        constant = x * 0 + 3.3
        variance = (constant**2).mean(-1) - constant.mean(-1) ** 2 - 1e-3
        return x * variance.sqrt()[:, None]  # here


class SelfDistances(Net):
    def middle(self, x):
        difference = x[:, None] - x[None]
        distance = difference.pow(2).sum(-1).sqrt()  # here
        return x * distance.mean()


class WhereLog(Net):
    def middle(self, x):
        x = x.float().abs() * (torch.arange(WIDTH) < 60)
        return torch.where(x > 0, x.log(), torch.zeros(()))  # here


class HalfPower(Net):
    def middle(self, x):
        x = x.float().abs() * (torch.arange(WIDTH) < 60)
        return x**0.5  # here


class ArcCosine(Net):
    def middle(self, x):
        unit = functional.normalize(x.float(), dim=-1)
        cosine = (unit * unit).sum(-1).round(decimals=3) + 0 * unit.sum(-1)
        return x * torch.acos(cosine)[:, None]  # here


class Logit(Net):
    def middle(self, x):
        return torch.logit(torch.sigmoid(x.float() * 100))  # here


class FirstIsNaN(Net):
    def build(self):
        self.table = nn.Parameter(torch.full((WIDTH,), float("nan")))

    def middle(self, x):
        return x * self.table


class EmptyMean(Net):
    def middle(self, x):
        chosen = x[:, :0]
        return x + chosen.mean(-1, keepdim=True)  # here


class ZeroLengthMean(Net):
    def middle(self, x):
        lengths = torch.tensor([4, 3, 2, 1, 4, 3, 2, 0])
        mask = torch.arange(WIDTH)[None] < lengths[:, None]
        return x * (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)  # here


VALUES = {
    UnscaledAttention: "nonfinite-forward",
    NarrowMask: "nonfinite-forward",
    FloatMinimum: "fails",
    SumOfSquares: "overflow-hidden",
    LogSumExp: "nonfinite-forward",
    GradientScaleInside: "nonfinite-forward",
    Cubed: "overflow-hidden",
    Distances: "nonfinite-forward",
    PaddedRow: "nonfinite-forward",
    OneSampleStd: "nonfinite-forward",
    VarianceByHand: "nonfinite-forward",
    SelfDistances: "nonfinite-backward",
    WhereLog: "nonfinite-backward",
    HalfPower: "nonfinite-backward",
    ArcCosine: "nonfinite-backward",
    Logit: "nonfinite-forward",
    FirstIsNaN: "nonfinite-forward",
    EmptyMean: "nonfinite-forward",
    ZeroLengthMean: "nonfinite-forward",
}
