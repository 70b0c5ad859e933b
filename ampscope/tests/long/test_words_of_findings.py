"""Faults in small models, each with its line (`# here`) and the words that are true of it; sound models beside them."""

import pytest
import torch
from test_inspection_faults import Block
from torch import nn
from whole_step import batch, line_of, loss_of

from ampscope import inspect_step
from ampscope.report import Report
from ampscope.words import underflow_lines

functional = nn.functional


class Normed(Block):
    """Squares overflow in float16, so that everything becomes zero."""

    def between(self, hidden):
        hidden = hidden * 400
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)  # here


class Halved(Block):
    def between(self, hidden):
        return (hidden * 1e5).half().float() / 1e5  # here


class SmallEps(Block):
    def between(self, hidden):
        hidden = hidden.relu() * 1e-5
        return hidden / (hidden.sum(-1, keepdim=True) * 0 + 1e-8)  # here


class Masked(Block):
    def between(self, hidden):
        return hidden.masked_fill(hidden < -1, -1e9).softmax(-1)  # here


class Entropy(Block):
    def forward(self, inputs):
        outputs = super().forward(inputs).sigmoid()
        return outputs + functional.binary_cross_entropy(outputs, torch.zeros_like(outputs))  # here


class Grouped(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 64, 64) / 8)

    def between(self, hidden):
        ends = torch.tensor([8, 16], dtype=torch.int32)
        return torch._grouped_mm(hidden.float(), self.experts, offs=ends).relu()  # here


class Read(Block):
    def between(self, hidden):
        return hidden / hidden.detach().abs().max().item()  # here


class ReadAfterMoving(Block):
    def between(self, hidden):
        return hidden * torch.ones(2).to(hidden.device).max().item()  # here


FAULTS = {
    Normed: ("overflow-hidden", "rsqrt makes the infinity finite again", "float32 for this line"),
    Halved: ("nonfinite-forward", "output float16", "float16 ends at 65,504"),
    SmallEps: ("nonfinite-forward", "amp-fp16", "float16 makes an eps below 6e-8 zero"),
    Masked: ("fails", "without overflow", "a number that the type holds"),
    Entropy: ("unsafe-function", "CUDA's autocast refuses binary_cross_entropy", "binary_cross_entropy_with_logits"),
    Grouped: ("not-on-lists", "_grouped_mm ran in float32", "cast its inputs"),
    Read: ("host-sync", "read once in a step", "keep the value a tensor"),
    ReadAfterMoving: ("host-sync", "read once in a step", "keep the value a tensor"),
}


@pytest.mark.parametrize("model", FAULTS)
def test_a_fault_is_told_in_true_words(model):
    (finding,) = inspect_step(model(), batch(), loss_of, speed=False).findings
    rule, words, cure = FAULTS[model]
    assert (finding.rule, finding.place.line) == (rule, line_of(model)[1])
    assert words in finding.message and finding.cures[0].startswith(cure), finding


class OneHot(Block):
    def between(self, hidden):
        return hidden + functional.one_hot(hidden.argmax(1), 64)


class Drawn(Block):
    def between(self, hidden):
        return hidden if torch.empty(1).uniform_().item() < 2 else hidden.relu()


class Packed(Block):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.back = nn.Linear(8, 64)

    def between(self, hidden):
        lengths = torch.full((16,), 16)
        packed = nn.utils.rnn.pack_padded_sequence(hidden.view(16, 16, 4), lengths, batch_first=True)
        return self.back(self.lstm(packed)[1][0][0])


@pytest.mark.parametrize("model", [Block, OneHot, Drawn, Packed])
def test_what_only_a_cpu_reads_is_no_wait(model):
    report = inspect_step(model(), batch(), loss_of, speed=False)
    assert not report.everything and not report.content["synchronisations"]


class Recurrent(Packed):
    def between(self, hidden):
        return self.back(self.lstm(hidden.view(16, 16, 4))[0][:, -1])


def test_weights_of_any_name_are_in_the_map():
    report = inspect_step(Recurrent(), batch(), loss_of, speed=False)
    (line,) = [row.split() for row in underflow_lines(report.content["underflow"]) if row.split()[:1] == ["lstm"]]
    assert "–" not in line[1:4]


def test_what_the_batch_holds_is_named_and_counted():
    inputs, labels = batch()
    inputs[2, 3] = inputs[4, 4] = torch.nan

    def step(model, batch):
        return functional.cross_entropy(model(batch["image"]), batch["label"])

    (finding,) = inspect_step(Block(), {"image": inputs, "label": labels}, step=step, speed=False).findings
    assert finding.message == "the batch['image'] holds NaN before the step begins: 2 of 512 values."


def test_nothing_is_said_of_products_where_nothing_ran_in_16_bits():
    report = inspect_step(Block(), batch(), loss_of, precisions=["fp32"], speed=False)
    assert isinstance(report, Report) and "every product ran in 16 bits" not in report.text()
