"""Models with one fault each, as a stranger would write them; the line that does wrong carries `# here`."""

from __future__ import annotations

import math

import numpy as np
import torch
from planted_values import VALUES, WIDTH, Net
from torch import nn
from torch.nn import functional

# Weights in 16 bits


class HalfInPlace(Net):
    """Nothing is made .half() in this docstring."""

    note = "never call .half() here"

    def build(self):
        for parameter in self.first.parameters():
            parameter.data = parameter.data.half()  # here

    def forward(self, x):
        return self.last(self.first(x).relu())


class DtypeArgument(Net):
    def build(self):
        self.inner = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)  # here

    def middle(self, x):
        return self.inner(x.bfloat16()).relu()


class Factory(Net):
    def build(self):
        options = {"dtype": torch.bfloat16}
        self.scale = nn.Parameter(torch.ones(WIDTH, **options))  # here

    def middle(self, x):
        return x.to(torch.bfloat16) * self.scale


class ToHalf(Net):
    def build(self):
        narrow = torch.float16
        self.first.to(narrow)  # here


# Reads


class ChecksNaN(Net):
    def middle(self, x):
        if torch.isnan(x).any():  # here
            raise ValueError("NaN")
        return x.relu()


class Asserts(Net):
    def middle(self, x):
        assert (x < 1e4).all()  # here
        return x.relu()


class PythonSqrt(Net):
    def middle(self, x):
        return x.relu() / math.sqrt(x.detach().var())  # here


class ListOfLengths(Net):
    def middle(self, x):
        counts = (x > 0).sum(-1).tolist()  # here
        return torch.stack([row.relu() / (1 + count) for row, count in zip(x, counts, strict=True)])


class LoopOverTensor(Net):
    def middle(self, x):
        chosen = x.argmax(-1)
        return torch.stack([row.roll(int(shift)) for row, shift in zip(x, chosen, strict=True)])  # here


class ToNumpy(Net):
    def middle(self, x):
        low = np.percentile(x.detach().float().numpy(), 5)  # here
        return x.clamp(min=float(low))


class Printed(Net):
    def middle(self, x):
        self.text = f"{x.mean():.2f}"  # here
        return x.relu()


# Products that autocast does not reach


class DecoratedOff(Net):
    @torch.autocast("cpu", enabled=False)
    def middle(self, x):
        x = x.float()
        return torch.relu(x @ x.t() @ x)  # here


class InPlaceBatched(Net):
    def middle(self, x):
        grid = x.float().view(8, 8, 8)
        total = torch.zeros(8, 8, 8)
        total.baddbmm_(grid.detach(), torch.eye(8).expand(8, 8, 8))  # here
        return x + total.flatten(1)


class WithOut(Net):
    def build(self):
        self.register_buffer("held", torch.zeros(8, WIDTH))
        self.register_buffer("mixing", torch.randn(WIDTH, WIDTH) / 8)

    def middle(self, x):
        with torch.no_grad():
            torch.mm(x.float(), self.mixing, out=self.held)  # here
        return x + self.held


class NumpyTable(Net):
    def build(self):
        self.table = torch.from_numpy(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))

    def middle(self, x):
        return (x.double() @ self.table).float().relu()  # here


class DoubleWeights(Net):
    def build(self):
        self.scale = nn.Parameter(torch.from_numpy(np.ones(WIDTH)))  # here

    def middle(self, x):
        return (x * self.scale).float()


class Mixing(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        return gradient.float() @ weight.t(), x.float().t() @ gradient.float()  # here


class OwnFunction(Net):
    def build(self):
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def middle(self, x):
        return Mixing.apply(x, self.weight)


class ToWeightType(Net):
    def middle(self, x):
        return x.relu().to(self.last.weight.dtype)  # here


class TypeAs(Net):
    def build(self):
        self.inner = nn.Linear(WIDTH, WIDTH)

    def middle(self, x):
        return self.inner(x.relu().type_as(self.inner.weight)).relu()  # here


class WideVocabulary(Net):
    def build(self):
        self.last = nn.Linear(WIDTH, 5003)

    def forward(self, x):
        return self.last(self.first(x).relu())[:, :10] * 1.0  # here


# Types that do not meet


class ScatterAdd(Net):
    def middle(self, x):
        sums = torch.zeros(4, WIDTH)
        return sums.index_add_(0, torch.arange(8) % 4, x).repeat(2, 1)  # here


class Lerp(Net):
    def build(self):
        self.average = nn.Parameter(torch.zeros(WIDTH))

    def middle(self, x):
        return torch.lerp(self.average.expand_as(x), x, 0.5)  # here


class MaskedScatter(Net):
    def middle(self, x):
        canvas = torch.zeros(8, WIDTH)
        return canvas.masked_scatter(torch.arange(WIDTH) > 7, x)  # here


class Dot(Net):
    def build(self):
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def middle(self, x):
        return x * torch.dot(x[0], self.weight)  # here


class Assigned(Net):
    def middle(self, x):
        memory = torch.zeros(8, WIDTH)
        memory[torch.arange(8) > 3] = x[4:]  # here
        return memory + x


# Training


class Cut(Net):
    def build(self):
        self.gate = nn.Linear(WIDTH, WIDTH)

    def middle(self, x):
        with torch.no_grad():  # here
            gate = self.gate(x).sigmoid()
        return x * gate


class Copied(Net):
    def build(self):
        self.gate = nn.Linear(WIDTH, WIDTH)

    def middle(self, x):
        return x * self.gate(x).sigmoid().data  # here


class Spare(Net):
    def build(self):
        self.other = nn.Linear(WIDTH, 10)  # here


class FrozenNorm(Net):
    def build(self):
        self.norm = nn.BatchNorm1d(WIDTH).eval()  # here

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, x):
        return self.norm(x).relu()


class Probabilities(Net):
    def forward(self, x):
        outputs = super().forward(x).sigmoid()
        return outputs + functional.binary_cross_entropy(outputs, torch.full_like(outputs, 0.5))  # here


FAULTS = VALUES | {
    HalfInPlace: "half-weights",
    DtypeArgument: "bfloat16-weights",
    Factory: "bfloat16-weights",
    ToHalf: "half-weights",
    ChecksNaN: "host-sync",
    Asserts: "host-sync",
    PythonSqrt: "host-sync",
    ListOfLengths: "host-sync",
    LoopOverTensor: "host-sync",
    ToNumpy: "numpy",
    Printed: "host-sync",
    DecoratedOff: "autocast-off",
    InPlaceBatched: "in-place-product",
    WithOut: "in-place-product",
    NumpyTable: "float64",
    DoubleWeights: "float64",
    OwnFunction: "custom-function",
    ToWeightType: "explicit-float",
    TypeAs: "explicit-float",
    WideVocabulary: "unaligned-sizes",
    ScatterAdd: "fails",
    Lerp: "fails",
    MaskedScatter: "fails",
    Dot: "fails",
    Assigned: "fails",
    Cut: "no-gradient",
    Copied: "no-gradient",
    Spare: "no-gradient",
    FrozenNorm: "evaluation-mode",
    Probabilities: "unsafe-function",
}
