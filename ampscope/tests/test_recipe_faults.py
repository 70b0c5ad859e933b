"""The recipe's faults in whole steps, each with its line (`# here`), and sound steps beside them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from whole_step import Whole, findings, line_of, loss_of

from ampscope.findings import RULES


class Step(Whole):
    """Pieces that the faults below put together in the wrong order."""

    def __init__(self):
        super().__init__()
        self.first = torch.optim.SGD(self.model[:5].parameters(), lr=0.1)
        self.second = torch.optim.SGD(self.model[5].parameters(), lr=0.1)
        self.other = nn.Linear(32, 10)
        self.others = torch.optim.SGD(self.other.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 10)

    def forward(self, model, batch):
        with torch.autocast(**self.autocast):
            return loss_of(model(batch[0]), batch)

    def backward(self, model, batch):
        self.optimizer.zero_grad()
        self.scaler.scale(self.forward(model, batch)).backward()

    def finish(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


class SecondBackward(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.unscale_(self.optimizer)
        self.scaler.scale(self.forward(model, batch)).backward()  # here
        self.finish()


class UpdateBetween(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.step(self.first)
        self.scaler.update()  # here
        self.scaler.step(self.second)
        self.scaler.update()


class UpdateFirst(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.update()  # here
        self.scaler.step(self.optimizer)


class ScaledPenalty(Step):
    def step(self, model, batch):
        self.optimizer.zero_grad()
        loss = self.forward(model, batch)
        scaled = self.scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, [*model.parameters()], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients).sqrt()  # here
        self.scaler.scale(loss + penalty).backward()
        self.finish()


class Clamped(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        for parameter in model.parameters():
            parameter.grad.clamp_(-1, 1)  # here
        self.finish()


class Decayed(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad.add_(parameter, alpha=0.01)  # here
        self.finish()


class ClippedByValue(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        nn.utils.clip_grad_value_(model.parameters(), 0.1)  # here
        self.finish()


class ScaledTwice(Step):
    def step(self, model, batch):
        self.optimizer.zero_grad()
        loss = self.scaler.scale(self.forward(model, batch))
        self.scaler.scale(loss).backward()  # here
        self.finish()


class UnscaledTwice(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.unscale_(self.optimizer)
        self.scaler.unscale_(self.optimizer)  # here
        self.finish()


class UnscaledAfterStep(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.step(self.optimizer)
        self.scaler.unscale_(self.optimizer)  # here
        self.scaler.update()


class SteppedTwice(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.step(self.optimizer)
        self.scaler.step(self.optimizer)  # here
        self.scaler.update()


class NeverCleared(Step):
    def step(self, model, batch):
        self.scaler.scale(self.forward(model, batch)).backward()  # here
        self.finish()


class ScheduledFirst(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.schedule.step()  # here
        self.finish()


class Recommended(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.finish()
        self.schedule.step()


class Accumulating(Step):
    def step(self, model, batch):
        self.optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            piece = batch[0][part], batch[1][part]
            self.scaler.scale(self.forward(model, piece) / 2).backward()
        self.finish()


class ClearedAtTheEnd(Step):
    def step(self, model, batch):
        self.scaler.scale(self.forward(model, batch)).backward()
        self.finish()
        self.optimizer.zero_grad()


class ClearedByHand(Step):
    def step(self, model, batch):
        for parameter in model.parameters():
            parameter.grad = None
        self.scaler.scale(self.forward(model, batch)).backward()
        self.finish()


class TwoOptimizers(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.scaler.unscale_(self.first)
        self.scaler.step(self.first)
        self.scaler.step(self.second)
        self.scaler.update()


class AnotherModelInFloat32(Step):
    def step(self, model, batch):
        self.backward(model, batch)
        self.others.zero_grad()
        loss_of(self.other(batch[0]), batch).backward()
        nn.utils.clip_grad_norm_(self.other.parameters(), 1.0)
        self.others.step()
        self.finish()


class DividedPenalty(Step):
    def step(self, model, batch):
        self.optimizer.zero_grad()
        loss = self.forward(model, batch)
        scaled = self.scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, [*model.parameters()], create_graph=True)
        gradients = [gradient / self.scaler._scale for gradient in gradients]
        penalty = sum(gradient.square().sum() for gradient in gradients).sqrt()
        self.scaler.scale(loss + penalty).backward()
        self.finish()


FAULTS = {
    SecondBackward: "backward-after-unscale",
    UpdateBetween: "update-too-early",
    UpdateFirst: "update-too-early",
    ScaledPenalty: "scaled-gradients",
    Clamped: "scaled-gradients",
    Decayed: "scaled-gradients",
    ClippedByValue: "clip-before-unscale",
    ScaledTwice: "scaled-twice",
    UnscaledTwice: "unscaled-twice",
    UnscaledAfterStep: "unscaled-twice",
    SteppedTwice: "unscaled-twice",
    NeverCleared: "gradients-kept",
    ScheduledFirst: "schedule-first",
}
SOUND = [
    Recommended,
    Accumulating,
    ClearedAtTheEnd,
    ClearedByHand,
    TwoOptimizers,
    AnotherModelInFloat32,
    DividedPenalty,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_recipe_is_found_with_its_line(fault):
    whole = fault()
    (finding,) = findings(whole.model, whole.step)
    assert FAULTS[fault] in RULES
    assert (finding.rule, (Path(finding.place.file), finding.place.line)) == (FAULTS[fault], line_of(fault))


@pytest.mark.parametrize("sound", SOUND)
def test_a_sound_recipe_breaks_no_rule(sound):
    whole = sound()
    assert not findings(whole.model, whole.step)
