"""Steps that train nothing, or not everything: each is found with its line (`# here`)."""

import math

import pytest
import torch
from test_recipe_faults import Step
from torch import nn
from whole_step import Whole, batch, findings, line_of, loss_of, network

from ampscope import inspect_step

functional = nn.functional


def returns_nothing(model, batch):
    loss_of(model(batch[0]), batch)  # here


def detached(model, batch):
    return loss_of(model(batch[0]), batch).detach()  # here


def without_grad(model, batch):
    with torch.no_grad():
        return loss_of(model(batch[0]), batch)  # here


def argmaxed(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()  # here


def counted(model, batch):
    return (model(batch[0]).argmax(1) != batch[1]).sum()  # here


def vector(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # here


STEPS = {
    returns_nothing: ("trains-nothing", "returns nothing"),
    detached: ("trains-nothing", "does not depend on a trained parameter"),
    without_grad: ("trains-nothing", "does not depend on a trained parameter"),
    argmaxed: ("trains-nothing", "does not depend on a trained parameter"),
    counted: ("trains-nothing", "int64"),
    vector: ("vector-loss", "16 values"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_loss_that_trains_nothing_is_found(step):
    (finding,) = findings(network(), step)
    rule, words = STEPS[step]
    assert (finding.rule, finding.place.line) == (rule, line_of(step)[1]) and words in finding.message


def test_a_step_that_trains_nothing_gets_no_verdict():
    report = inspect_step(network(), batch(), step=detached, precisions=["fp32", "amp-bf16"])
    assert report.content["payoff"] is None and not report.ok


def test_frozen_parameters_are_said():
    (finding,) = findings(network().requires_grad_(False), lambda model, batch: loss_of(model(batch[0]), batch))
    assert "All 8 parameters are frozen" in finding.message


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 10)

    def forward(self, inputs):
        return self.second(self.first(inputs).detach())  # here


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 10)
        self.spare = nn.Linear(32, 10)  # here

    def forward(self, inputs):
        return self.first(inputs)


def plain(model, batch):
    return loss_of(model(batch[0]), batch)


@pytest.mark.parametrize("model, names", [(Cut, "first.weight, first.bias"), (Unused, "spare.weight, spare.bias")])
def test_parameters_without_a_gradient_are_named(model, names):
    (finding,) = findings(model(), plain)
    assert (finding.rule, finding.place.line) == ("no-gradient", line_of(model)[1]) and names in finding.message


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(16), nn.Dropout(0.5)])
def test_layers_in_evaluation_mode_are_named(layer):
    model = nn.Sequential(nn.Linear(32, 16), layer, nn.Linear(16, 10))
    assert not findings(model, plain)
    layer.eval()
    (finding,) = findings(model, plain)
    assert finding.rule == "evaluation-mode" and "mode: 1." in finding.message


def test_a_frozen_batch_norm_may_be_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    model[1].eval().requires_grad_(False)
    assert not findings(model, plain)


class TooLarge(Whole):
    """Without a scaler, the first run of the step makes the weights NaN."""

    scaled = False

    def step(self, model, batch):
        self.optimizer.zero_grad()
        loss = torch.log(model(batch[0]) - 100).mean()  # here
        loss.backward()
        self.optimizer.step()


def test_what_the_first_run_made_of_the_weights_is_not_blamed():
    whole = TooLarge()
    report = inspect_step(whole.model, batch(), step=whole.step, precisions=["fp32"], speed=False)
    (finding,) = report.findings
    assert (finding.rule, finding.place.line) == ("nonfinite-forward", line_of(TooLarge)[1]), finding


class Overflowing(Step):
    """Finite from a scale of 16 on; its own scaler begins at 2**15."""

    init_scale = 2.0**15

    def step(self, model, batch):
        self.optimizer.zero_grad()
        with torch.autocast(**self.autocast):
            loss = loss_of(model(batch[0]), batch) * 1000
        self.scaler.scale(loss).backward()
        self.finish()


def test_a_steps_own_scaler_comes_down_as_in_training():
    whole = Overflowing()
    report = inspect_step(whole.model, batch(), step=whole.step, precisions=["fp32", "amp-fp16"], speed=False)
    assert report.ok, report.findings
    record = report.content["precisions"]["amp-fp16"]
    assert record["loss_scale"] < whole.init_scale and record["first_overflow"]["kind"] in ("inf", "NaN")
    assert math.isclose(whole.scaler.get_scale(), whole.init_scale)
