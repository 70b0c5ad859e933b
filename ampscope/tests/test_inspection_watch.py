"""`watch` names the layer, keeps a diary that `inspect` draws, and changes nothing."""

import logging

import pytest
import torch
from torch import nn
from whole_step import Whole, batch, loss_of, network

from ampscope import InspectError, watch
from ampscope.module import read_diary
from ampscope.pictures import diary_picture


class Spoiled(nn.Module):
    """Multiplies what the first layer puts out, in the updates asked for."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.factor = 1.0

    def forward(self, inputs):
        return self.net[1:](self.net[0](inputs * self.factor))


@pytest.fixture
def whole():
    class Step(Whole):
        def __init__(self):
            super().__init__()
            self.model = Spoiled()
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    return Step()


def test_a_forward_overflow_names_its_module_and_input(whole, caplog):
    with caplog.at_level(logging.WARNING), watch(whole.model, whole.scaler) as watcher:
        for update in range(1, 11):
            whole.model.factor = 1e5 if update == 7 else 1.0
            whole.step(whole.model, batch())
    assert watcher.updates == 10
    (event,) = watcher.events
    assert event["update"] == 7 and event["scale"] == 2**8
    assert event["forward"]["module"] == "net.0" and event["forward"]["kind"] == "Linear"
    assert event["forward"]["inputs"][0]["max"] > 1e5
    before = [entry["update"] for entry in event["before"]]  # as many as stay below one percent of the time
    assert before and before == sorted(before) and set(before) <= set(range(1, 7))
    assert all(0 < entry["largest"] < 100 for entry in event["before"])
    assert "update 7 was skipped at loss scale 256" in caplog.text and "net.0 (Linear)" in caplog.text


def test_a_backward_overflow_names_the_parameter_nearest_to_the_loss(whole):
    whole.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with watch(whole.model, whole.scaler) as watcher:
        whole.step(whole.model, batch())
    (event,) = watcher.events
    assert event["forward"] is None and event["parameter"].startswith("net.5.") and event["scale"] == 2**30


def test_without_a_scaler_the_first_bad_update_is_named(caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), watch(model) as watcher:
        for update in range(1, 4):
            optimizer.zero_grad()
            loss_of(model(batch()[0]), batch()).backward()
            if update == 3:
                model[3].weight.grad[0, 0] = torch.nan
            optimizer.step()
    (event,) = watcher.events
    assert (event["update"], event["parameter"], event["bad"]) == (3, "3.weight", 1)
    assert "not finite" in caplog.text


def test_the_diary_is_drawn_by_inspect(whole, tmp_path):
    file = tmp_path / "diary.jsonl"
    whole.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    with watch(whole.model, whole.scaler, diary=file, every=5) as watcher:
        for _ in range(12):
            whole.step(whole.model, batch())
    metrics = read_diary(file)
    assert [line["updates"] for line in metrics] == [5, 10, 12]
    assert sum(line["skipped_updates"] for line in metrics) == len(watcher.events) > 2
    assert [skip["update"] for line in metrics for skip in line["skips"]] == [e["update"] for e in watcher.events]
    diary_picture(metrics, tmp_path / "scaler.png")
    assert (tmp_path / "scaler.png").stat().st_size > 10_000
    with watch(whole.model, whole.scaler, diary=tmp_path / "own.jsonl") as watcher:
        for _ in range(2):  # epochs are the loop's own
            for _ in range(3):
                whole.step(whole.model, batch())
            watcher.epoch()
    assert [(line["epoch"], line["updates"]) for line in read_diary(tmp_path / "own.jsonl")] == [(1, 3), (2, 6)]
    with (
        pytest.raises(InspectError, match="cannot be written"),
        watch(network(), diary=tmp_path / "no" / "diary.jsonl"),
    ):
        pass


def test_watching_changes_nothing(whole):
    def train(watched):
        step = type(whole)()
        model = step.model
        torch.manual_seed(0)
        if watched:
            with watch(model, step.scaler):
                [step.step(model, batch()) for _ in range(5)]
        else:
            [step.step(model, batch()) for _ in range(5)]
        assert not model._forward_pre_hooks and "step" not in vars(step.scaler)
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(*pair) for pair in zip(train(False), train(True), strict=True))


def test_two_optimizers_of_one_update_are_one_update():
    models = {"left": network(), "right": network()}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models.values()]
    with watch(models) as watcher:
        for update in range(3):
            for model, optimizer in zip(models.values(), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model(batch()[0]), batch()).backward()
                if update == 1 and model is models["right"]:
                    model[0].bias.grad[0] = torch.inf
                optimizer.step()
    assert watcher.updates == 3
    assert [(event["update"], event["parameter"]) for event in watcher.events][:1] == [(2, "right.0.bias")]
