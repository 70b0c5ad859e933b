"""Whole inspections of steps that train nothing, or bring a scaler of their own."""

import math

import torch
from test_recipe_faults import Step
from whole_step import Whole, batch, line_of, loss_of, network

from ampscope import inspect_step


def detached(model, batch):
    return loss_of(model(batch[0]), batch).detach()


def test_a_step_that_trains_nothing_gets_no_verdict():
    report = inspect_step(network(), batch(), step=detached, precisions=["fp32", "amp-bf16"])
    assert report.content["payoff"] is None and not report.ok


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
