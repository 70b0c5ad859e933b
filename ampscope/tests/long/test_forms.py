"""What a step may be made of: forms of a loss, and tensors that are not dense floats in one piece."""

import itertools

import pytest
import torch
from torch import nn

from ampscope import InspectError, inspect_step

functional = nn.functional
INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
BATCH = INPUTS, torch.arange(8) % 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs, batch[1])


def inspected(model, batch=BATCH, loss=cross_entropy, **options):
    return inspect_step(model, batch, loss, precisions=["fp32", "amp-bf16"], speed=False, **options)


def of_a_model(m, batch):
    return functional.cross_entropy(m(batch[0]), batch[1])


def of_something(thing, batch):
    return functional.cross_entropy(thing(batch[0]), batch[1])


def two_step_loss(outputs, batch):
    return functional.cross_entropy(outputs, batch[1])


def one_step(outputs, batch):
    return functional.cross_entropy(outputs, batch[1])


FORMS = {
    "a first parameter m": (of_a_model, "step"),
    "a step by another name": (of_something, "step"),
    "a loss with step in its name": (two_step_loss, "loss"),
    "a loss that is called a step": (one_step, "loss"),
    "PyTorch's module": (nn.CrossEntropyLoss(), "loss"),
    "PyTorch's function": (functional.cross_entropy, "loss"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_called_as_what_it_is(form):
    loss, taken = FORMS[form]
    report = inspected(network(), loss=loss)
    assert report.ok and report.content["subject"]["form"] == taken


def test_what_a_function_was_taken_for_is_said():
    with pytest.raises(InspectError, match=r"wrong was taken for a loss\(outputs, batch\)"):

        def wrong(outputs, batch):
            raise TypeError("no")

        inspected(network(), loss=wrong)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 8, dtype=torch.cfloat))

    def forward(self, inputs):
        return (self.first(inputs).float().to(torch.cfloat) @ self.weight).abs()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8, sparse=True)
        self.head = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.head(self.embed(inputs[:, 0].long().abs()))


def jagged():
    return torch.nested.nested_tensor([INPUTS[:3], INPUTS[:5]], layout=torch.jagged)


def of_jagged(outputs, batch):
    return outputs.values().square().mean()


def lazy():
    return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8))


def scripted():
    return nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Sequential(nn.Linear(16, 16))), nn.Linear(16, 8))


KINDS = {
    "complex parameters": (Complex, lambda: BATCH, cross_entropy),
    "sparse embeddings": (Sparse, lambda: BATCH, cross_entropy),
    "jagged tensors": (network, jagged, of_jagged),
    "lazy modules": (lazy, lambda: BATCH, cross_entropy),
    "scripted modules": (scripted, lambda: BATCH, cross_entropy),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_measured(kind, tmp_path):
    model, batch, loss = KINDS[kind]
    report = inspected(model(), batch(), loss)
    assert report.ok and [row["precision"] for row in report.content["memory"]] == ["fp32", "amp-bf16"]
    assert any(row["nonzero"] for row in report.content["underflow"]["layers"])
    report.write(tmp_path)


def test_gradients_of_each_sample_are_measured():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(parameters, inputs, label):
        outputs = torch.func.functional_call(model, parameters, (inputs[None],))
        return functional.cross_entropy(outputs, label[None])

    def step(model, batch):
        parameters = dict(model.named_parameters())
        gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(parameters, *batch)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].mean(0)
        optimizer.step()

    report = inspected(model, loss=None, step=step)
    assert report.ok and report.content["memory"][0]["activations"] is None


@pytest.mark.parametrize("count", [1, 4])
def test_an_iterator_that_ends_is_said(count):
    batches = itertools.repeat(BATCH, count)
    with pytest.raises(InspectError, match="no more batches"):
        inspected(network(), None, None, step=lambda model, batch: cross_entropy(model(BATCH[0]), next(batches)))


def test_a_model_without_parameters_is_said():
    with pytest.raises(InspectError, match="no parameters"):
        inspected(nn.ReLU())
