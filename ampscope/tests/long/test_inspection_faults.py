"""Faults planted in small steps, one for each rule: each is found, named and located; clean steps give no finding.

The line that does wrong carries the comment `# here`. Run: pytest ampscope/tests/long/test_inspection_faults.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_recipe_faults import FAULTS
from test_scripts import FAULTS as OF_SCRIPTS
from test_training_faults import STEPS
from torch import nn
from whole_step import CPU_BF16, Whole, batch, line_of, loss_of, network

from ampscope import inspect_step
from ampscope.findings import RULES


class Bfloat16(Whole):
    autocast = CPU_BF16
    scaled = False


class ReadsTheLoss(Bfloat16):
    def step(self, model, batch):
        loss = super().step(model, batch)
        self.last = loss.item()  # here
        return loss


class NeverScales(Whole):
    def step(self, model, batch):
        self.optimizer.zero_grad()
        with torch.autocast(**self.autocast):
            loss = loss_of(model(batch[0]), batch)
        loss.backward()  # here
        self.scaler.step(self.optimizer)
        self.scaler.update()


class ScaledOnce(Whole):
    """GradScaler refuses a step before the first scale(); after one in an earlier update it says nothing any more."""

    def step(self, model, batch):
        self.optimizer.zero_grad()
        with torch.autocast(**self.autocast):
            loss = loss_of(model(batch[0]), batch)
        if self.scaler._scale is None:
            self.scaler.scale(torch.ones(()))
        loss.backward()  # here
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Block(nn.Module):
    """Two layers with something in between."""

    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, width)
        self.second = nn.Linear(width, 10)

    def forward(self, inputs):
        return self.second(self.between(self.first(inputs)))

    def between(self, hidden):
        return hidden.relu()


class Half(Block):
    def __init__(self):
        super().__init__()
        self.first.bfloat16()  # here


class Float16Weights(Block):
    def __init__(self):
        super().__init__()
        self.first.half()  # here


class ByNumpy(Block):
    def between(self, hidden):
        return hidden * float(np.abs(hidden.detach().float().numpy()).max())  # here


class Floats(Block):
    def between(self, hidden):
        return hidden.relu().float()  # here


class Switched(Block):
    def between(self, hidden):
        with torch.autocast("cpu", enabled=False):
            return hidden.float() @ hidden.float().t() @ hidden.float()  # here


class InPlace(Block):
    def between(self, hidden):
        return torch.zeros(16, 64).addmm_(hidden.float().detach(), torch.eye(64)) + hidden  # here


class Unaligned(Block):
    def __init__(self):
        super().__init__(width=509)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())  # here


class Double(Block):
    def between(self, hidden):
        return (hidden.double() @ torch.eye(64, dtype=torch.float64)).float()  # here


@torch.library.custom_op("planted::product", mutates_args=())
def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(left.detach().numpy() @ right.detach().numpy())


@product.register_fake
def _(left, right):
    return left.new_empty(left.shape[0], right.shape[1])


def _product_backward(ctx, gradient):
    left, right = ctx.saved_tensors
    return gradient @ right.t(), left.t() @ gradient


product.register_autograd(_product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Custom(Block):
    def __init__(self):
        super().__init__()
        self.first = None
        self.weight = nn.Parameter(torch.randn(32, 64) / 8)

    def forward(self, inputs):
        return self.second(product(inputs.repeat(64, 1), self.weight)[:16])  # here


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return (inputs @ weight).float()

    @staticmethod
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        return gradient @ weight.t(), inputs.t() @ gradient  # here


class ByFunction(Block):
    def __init__(self):
        super().__init__()
        self.first = None
        self.weight = nn.Parameter(torch.randn(32, 64) / 8)

    def forward(self, inputs):
        return self.second(Squared.apply(inputs, self.weight).relu())


class Mixing(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return inputs @ weight

    @staticmethod
    def backward(context, gradient):
        inputs, weight = context.saved_tensors
        return gradient @ weight.t(), inputs.t() @ gradient  # here


class Attends(Block):
    dropout = 0.1

    def between(self, hidden):
        heads = hidden.view(1, 4, 16, 16)
        attention = nn.functional.scaled_dot_product_attention
        return attention(heads, heads, heads, dropout_p=self.dropout).view(16, 64)  # here


class AttendsWithoutDropout(Attends):
    dropout = 0.0


class Normed(Block):
    """A step of power iteration, as spectral norms do it: matrix times vector."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4096, 1024) / 64)
        self.vector = nn.Parameter(torch.randn(1024) / 32)

    def between(self, hidden):
        return hidden.relu() * self.long_side().norm()

    def long_side(self):
        return torch.mv(self.table, self.vector)  # here


class NormedByColumns(Normed):
    def long_side(self):
        return self.table @ self.vector[:, None]


class Puts(Block):
    def between(self, hidden):
        rows = torch.zeros(16, 64)
        rows[torch.arange(16)] = hidden  # here
        return rows


class PutsTheSameType(Block):
    def between(self, hidden):
        rows = torch.zeros(16, 64, dtype=hidden.dtype)
        rows[torch.arange(16)] = hidden
        return rows


class Large(Block):
    def between(self, hidden):
        return torch.relu(hidden) * 3e5  # here


class Logarithm(Block):
    def between(self, hidden):
        return torch.log(torch.relu(hidden))  # here


class Root(Block):
    def between(self, hidden):
        return hidden + torch.sqrt((hidden - hidden.detach()) ** 2)  # here


MODELS = {
    "half-weights": Float16Weights,
    "bfloat16-weights": Half,
    "numpy": ByNumpy,
    "explicit-float": Floats,
    "autocast-off": Switched,
    "in-place-product": InPlace,
    "unaligned-sizes": Unaligned,
    "float64": Double,
    "custom-operator": Custom,
    "custom-function": ByFunction,
    "attention-in-float32": Attends,
    "not-on-lists": Normed,
    "fails": Puts,
    "float16-range": Large,
    "nonfinite-forward": Logarithm,
    "nonfinite-backward": Root,
}


def said(report):
    return [(finding.rule, str(finding.place), finding.message) for finding in report.everything]


def only(report, rule):
    """Return the only finding, which breaks that rule; PyTorch itself may refuse the step."""
    found = {finding.rule: finding for finding in report.findings}
    assert found.keys() - {"fails"} == {rule}, said(report)
    return found[rule]


@pytest.mark.parametrize("planted", [ReadsTheLoss, NeverScales, ScaledOnce])
def test_a_fault_in_a_whole_step_is_found(planted):
    whole = planted()
    rule = "host-sync" if planted is ReadsTheLoss else "loss-not-scaled"
    finding = only(inspect_step(whole.model, batch(), step=whole.step, speed=False), rule)
    assert (Path(finding.place.file), finding.place.line) == line_of(planted)


ALSO = {"numpy": {"host-sync"}, "float16-range": {"nonfinite-forward"}, "bfloat16-weights": {"fails"},
        "half-weights": {"fails"}, "custom-operator": {"numpy"}}  # fmt: skip
NOTES = {"attention-in-float32"}  # a library's, so that its user breaks no rule
ELSEWHERE = {"custom-function": Squared}


@pytest.mark.parametrize("rule", MODELS)
def test_a_fault_in_a_model_is_found(rule):
    model = MODELS[rule]()
    report = inspect_step(model, batch(), loss_of, speed=False)
    found = {finding.rule: finding for finding in (report.notes if rule in NOTES else report.findings)}
    assert report.ok == (rule in NOTES), said(report)
    assert rule in found and found.keys() <= {rule} | ALSO.get(rule, set()), said(report)
    if rule != "float16-range":
        assert (Path(found[rule].place.file), found[rule].place.line) == line_of(ELSEWHERE.get(rule, type(model)))


@pytest.mark.parametrize("whole", [Whole, Bfloat16])
def test_a_step_from_the_documentation_is_clean(whole):
    whole = whole()
    report = inspect_step(whole.model, batch(), step=whole.step, speed=False)
    assert report.ok and not report.notes, said(report)


def test_every_rule_has_a_planted_fault():
    trained = {rule for rule, _ in STEPS.values()} | {"no-gradient", "evaluation-mode"}
    trained |= {"overflow-hidden", "unsafe-function", "narrow-loss"}  # in test_words_of_findings.py, test_strangers.py
    assert {"host-sync", "loss-not-scaled", *MODELS, *FAULTS.values(), *OF_SCRIPTS} | trained == RULES.keys()


@pytest.mark.parametrize("model", [network, Block, AttendsWithoutDropout, NormedByColumns, PutsTheSameType])
def test_a_plain_model_is_clean(model):
    report = inspect_step(model(), batch(), loss_of, precisions=["fp32", "amp-bf16", "amp-fp16"], speed=False)
    assert report.ok and not report.notes, said(report)


def test_a_function_that_fails_under_autocast_is_named():
    model = ByFunction()
    model.forward = lambda inputs: model.second(Mixing.apply(inputs, model.weight))
    finding = only(inspect_step(model, batch(), loss_of, speed=False), "custom-function")
    assert (Path(finding.place.file), finding.place.line) == line_of(Mixing)
    assert finding.precision == "amp-bf16" and "custom_fwd" in finding.cures[0]
