"""An update or a validation that goes wrong is looked at again: the module, the operator, the line, and what to do."""

import pytest
import tiny
import torch
from torch import nn
from trainings import BF16, FP16, FP32, finish, trained, trainer

from runs.checkpoint import load_checkpoint
from runs.second_look import SecondLook
from utils import RunError


class Root(nn.Module):
    """The root of zeros, whose slope is infinite."""

    def forward(self, values):
        return values + (values * 0).abs().sqrt()


class Planted(tiny.Network):
    def __init__(self, fault):
        torch.manual_seed(0)
        super().__init__()
        self.fault = fault

    def forward(self, images):
        return self.head(self.fault(self.body(images).relu().mean((2, 3))))


class Weighed(nn.Linear):
    """A layer of large weights: its products overflow float16."""

    def __init__(self):
        super().__init__(4, 4)
        nn.init.constant_(self.weight, 1e5)

    def forward(self, values):
        return super().forward(values) * 1e-5


def failed(folder, fault, precision, scale=2.0**-18):
    made = trainer(folder, Planted(fault), precision)
    made.scaler._init_scale = scale
    with pytest.raises(RunError) as failure:
        finish(made)
    return str(failure.value), failure.value.record["second_look"]


@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=lambda each: each.name)
def test_a_gradient_that_is_not_finite_names_its_operator_and_line(precision, tmp_path):
    text, found = failed(tmp_path, Root(), precision)
    assert (found["phase"], found["module"], found["kind"]) == ("backward", "fault", "Root")
    assert found["where"].endswith("test_second_look.py:18") and not found["overflow"]
    assert "Looked at again: the loss was finite, the way back was not from fault" in text and "add an eps" in text


class Drawing(Root):
    """Keeps what each forward pass drew, as dropout does."""

    def __init__(self):
        super().__init__()
        self.draws = []

    def forward(self, values):
        self.draws.append(torch.rand(3).tolist())
        return super().forward(values)


def test_the_update_is_repeated_with_its_own_random_numbers(tmp_path):
    fault = Drawing()
    failed(tmp_path, fault, FP32)
    assert fault.draws.count(fault.draws[0]) >= 2


def test_a_layer_that_overflows_is_named_with_the_option_that_keeps_it_in_float32(tmp_path, caplog):
    text, found = failed(tmp_path, Weighed(), FP16, scale=2.0**16)
    assert (found["phase"], found["module"], found["overflow"]) == ("forward", "fault", True)
    assert "--float32_layers fault" in text and "the validation l" in text
    early = [message for message in caplog.messages if "which a lower loss scale does not cure" in message]
    assert len(early) == 1 and "fault (Weighed)" in early[0]


def test_nothing_is_looked_at_while_nothing_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(SecondLook, "_first", lambda *_: tiny.raising(AssertionError("looked")))
    made = trained(tmp_path, tiny.network(), BF16)
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(made.run.file("last.pt"))["model"].values())
