"""The number of updates that an inspection runs, and what it says of its time before."""

import logging

import pytest
from torch import nn
from whole_step import batch, loss_of, network

from ampscope import inspect_step, inspecting
from ampscope.execution import Execution


@pytest.fixture
def runs(monkeypatch):
    counted = []
    run = Execution.run
    monkeypatch.setattr(Execution, "run", lambda self, **options: counted.append(self) or run(self, **options))
    return counted


def test_a_long_update_runs_at_most_15_times_and_is_announced(runs, monkeypatch, caplog):
    monkeypatch.setattr(inspecting, "LONG", 0.0)
    monkeypatch.setattr(inspecting, "WORTH_SAYING", 0.0)
    monkeypatch.setattr(inspecting.payoff, "BUDGET", 0.0)
    monkeypatch.setattr(inspecting.Inspection, "_hides_float16", lambda *_: False)
    with caplog.at_level(logging.WARNING, "ampscope"):
        report = inspect_step(network(), batch(), loss_of)
    assert len(runs) <= 13
    assert "An update takes about" in caplog.text and report.content["payoff"]["speed"]["amp-bf16"]["rounds"] == 2


def test_nothing_of_a_step_is_held_after_its_trace(runs):
    model = nn.Sequential(nn.Linear(32, 10))
    inspect_step(model, batch(), loss_of, precisions=["fp32", "amp-bf16"], speed=False)
    assert not any(execution.roots or execution.states for execution in runs)
