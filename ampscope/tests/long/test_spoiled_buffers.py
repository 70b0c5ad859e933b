"""Watch and inspect name the buffers that an update or a step spoiled."""

import math

import pytest
import torch
from torch import nn

from ampscope import inspect_step, watch

OVERFLOW = 1e6  # beyond 65,504 after the first convolution


def images(seed=0, factor=1.0):
    return factor * torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def classifier():
    """Return a network with two layers of BatchNorm, and its optimizer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)]
    layers += [nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)


class Looped:
    """A float16 training of one's own; the batch of one update overflows, and its buffers may be put back."""

    def __init__(self, *, cured):
        self.model, self.optimizer = classifier()
        self.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        self.cured = cured

    def step(self, model, batch):
        before = [buffer.clone() for buffer in model.buffers()]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.cured and not loss.isfinite():
            for buffer, old in zip(model.buffers(), before, strict=True):
                buffer.copy_(old)
        return loss.detach()


@pytest.mark.parametrize(("cured", "last"), [(False, False), (False, True), (True, False)])
def test_watch_names_the_buffers_that_an_update_spoiled(cured, last, caplog):
    loop = Looped(cured=cured)
    with watch(loop.model, loop.scaler) as watcher:
        for number in range(2 if last else 4):
            loop.step(loop.model, (images(number, OVERFLOW if number == 1 else 1.0), torch.arange(6) % 3))
    (event,) = watcher.events
    spoiled = {f"{layer}.running_{name}" for layer in (1, 3) for name in ("mean", "var")}
    assert event["update"] == 2 and set(event["buffers"]) == (set() if cured else spoiled)
    assert ("update 2 left buffers" in caplog.text) == (not cured)


@pytest.mark.parametrize("cured", [False, True])
def test_inspect_names_the_buffers_that_a_step_spoiled(cured):
    loop = Looped(cured=cured)
    report = inspect_step(
        loop.model,
        (images(1, OVERFLOW), torch.arange(6) % 3),
        step=loop.step,
        optimizers=loop.optimizer,
        scaler=loop.scaler,
        precisions=["amp-fp16"],
        speed=False,
    )
    (found,) = [finding for finding in report.findings if finding.rule == "nonfinite-forward"]
    assert ("1.running_mean and 3 more" in found.message) == (not cured)
    assert any("put the buffers back" in cure for cure in found.cures) == (not cured)
