"""Steps that train nothing, or not everything: each is found with its line (`# here`)."""

import pytest
import torch
from torch import nn
from whole_step import findings, line_of, loss_of, network

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
