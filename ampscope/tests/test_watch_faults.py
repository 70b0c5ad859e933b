"""`watch` names the update, the module and the line of planted faults, and says nothing of healthy trainings."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from faulty import (
    BF16,
    F16,
    FAULTY,
    LINES,
    Attention,
    BatchNorm,
    Checkpointed,
    Container,
    Custom,
    Divide,
    Dropped,
    Embedded,
    EveryMasked,
    Exp,
    Log,
    Mask,
    Norm,
    Norming,
    OfBatch,
    Opened,
    Power,
    Shared,
    Sqrt,
    accumulated,
    batch,
    closures,
    cross_entropy,
    gan,
    ids,
    large_batch,
    log_loss,
    nan_in_batch,
    net,
    plain,
    spoil_gradient,
    thousandfold,
    zero_norm,
)
from torch import nn

from ampscope import InspectError, watch

# name: (loop, module or parameter, line)
FAULTS = {
    "attention float16": (lambda: plain(net(Attention()), F16), "1", "attention"),
    "norm float16": (lambda: plain(net(Norm()), F16), "1", "norm"),
    "log of 0 float16": (lambda: plain(net(Log()), F16), "1", "log"),
    "log of 0 bfloat16": (lambda: plain(net(Log()), BF16), "1", "log"),
    "log of 0 float32": (lambda: plain(net(Log()), None), "1", "log"),
    "gradient of sqrt(0) float16": (lambda: plain(net(Sqrt()), F16), "1", "sqrt"),
    "gradient of sqrt(0) bfloat16": (lambda: plain(net(Sqrt()), BF16), "1", "sqrt"),
    "gradient of sqrt(0) unclipped": (lambda: plain(net(Sqrt()), None, clip=False), "1", "sqrt"),
    "0/0 bfloat16": (lambda: plain(net(Divide()), BF16), "1", "divide"),
    "0/0 float16": (lambda: plain(net(Divide()), F16), "1", "divide"),
    "exp float16": (lambda: plain(net(Exp()), F16), "1", "exp"),
    "exp float32": (lambda: plain(net(Exp()), None), "1", "exp"),
    "mask float16": (lambda: plain(net(Mask()), F16), "1", "mask"),
    "row masked": (lambda: plain(net(EveryMasked()), BF16), "1", "masked"),
    "autograd function": (lambda: plain(net(Custom()), None), "1", "function"),
    "norm of 0": (lambda: plain(net(Norming()), None), "1", "norming"),
    "power": (lambda: plain(net(Power()), BF16), "1", "power"),
    "checkpoint": (lambda: plain(net(Checkpointed()), BF16), "1.inner", "log"),
    "shared module": (lambda: plain(net(Shared()), F16), "1", "shared"),
    "container": (lambda: plain(net(Container(), Opened()), None), "1", "container"),
    "batch norm": (lambda: plain(net(BatchNorm()), None), "1.norm", "batchnorm"),
    "random numbers": (lambda: plain(net(Dropped()), None), "1", "dropped"),
    "embedding": (lambda: plain(Embedded(), BF16, data=ids), "head.1", "log"),
    "NaN in the batch": (lambda: plain(net(), BF16, data=nan_in_batch), "0", None),
    "batch too large": (lambda: plain(net(), F16, data=large_batch), "0", None),
    "accumulation float16": (lambda: accumulated(net(OfBatch(Log())), F16), "1.inner", "log"),
    "accumulation float32": (lambda: accumulated(net(OfBatch(Log())), None), "1.inner", "log"),
    "accumulation backward": (lambda: accumulated(net(OfBatch(Sqrt())), F16), "1.inner", "sqrt"),
    "closure": (lambda: closures(net(Log()), BF16), "net.1", "log"),
    "closure backward": (lambda: closures(net(Sqrt()), None), "net.1", "sqrt"),
    "discriminator": (lambda: gan(Log(), "critic"), "critic.1", "log"),
    "discriminator backward": (lambda: gan(Sqrt(), "critic"), "critic.1", "sqrt"),
    "generator backward": (lambda: gan(Sqrt(), "generator"), "generator.1", "sqrt"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_update_module_and_line(name, caplog):
    run, module, line = FAULTS[name]
    with caplog.at_level(logging.WARNING, "ampscope"):
        event = run().events[0]
    origin = event["forward"] or event["backward"]
    assert origin is not None, event
    assert (event["update"], origin["module"]) == (FAULTY, module)
    if line is not None:
        assert LINES[origin["place"]["line"] - 1].endswith(f"# line: {line}"), origin
    assert sum("update" in record.message and "was" in record.message for record in caplog.records) <= 2


def test_weights_that_a_step_spoiled_are_named(caplog):
    def steep(outputs, target, on):
        return 1e3 * cross_entropy(outputs, target, on)

    model = net()
    with caplog.at_level(logging.WARNING, "ampscope"):
        watcher = plain(model, None, steep, rate=3e38, clip=False)
    (event,) = watcher.events
    assert (event["update"], event["weights"][0]) == (2, "0.weight")
    assert event["forward"] is None and "look at the step of update 1." in caplog.text


@pytest.mark.parametrize("dtype", [F16, BF16, None])
@pytest.mark.parametrize("loss", [log_loss, zero_norm])
def test_a_fault_of_the_loss_is_told_from_those_of_the_model(dtype, loss, caplog):
    with caplog.at_level(logging.WARNING, "ampscope"):
        event = plain(net(), dtype, loss).events[0]
    assert (event["update"], event["forward"], event["backward"]) == (FAULTY, None, None)
    assert event["from_loss"] and "what the model put out was finite" in caplog.text
    number = int(event["line"].rpartition(":")[2])
    assert LINES[number - 1].strip() == "scaler.scale(value).backward()"


def test_gradients_that_the_loop_spoiled_are_told_from_the_backward_pass(caplog, monkeypatch):
    monkeypatch.setattr("ampscope.gradients.RARELY", 1)
    with caplog.at_level(logging.WARNING, "ampscope"):
        event = plain(net(), None, clip=False, spoil=spoil_gradient).events[0]
    assert (event["update"], event["parameter"]) == (FAULTY, "1.bias")
    assert "which the backward pass had left finite" in caplog.text


def test_what_came_with_the_batch_is_counted(caplog):
    with caplog.at_level(logging.WARNING, "ampscope"):
        plain(net(), BF16, data=nan_in_batch)
    assert "3 of 64 values of input 0 are not finite" in caplog.text


def test_one_fault_is_said_once(caplog):
    def always(update):
        inputs, target = batch(update)
        return inputs * (1e6 if update >= FAULTY else 1.0), target

    with caplog.at_level(logging.WARNING, "ampscope"):
        skipped = plain(net(), F16, data=always, updates=30)
        spoiled = plain(net(Log()), BF16, updates=30)
    assert len(skipped.events) == 30 - FAULTY + 1 and len(spoiled.events) == 1
    assert len(caplog.records) == 2


def test_a_drift_is_told_before_anything_overflows(caplog, monkeypatch):
    monkeypatch.setattr("ampscope.gradients.RARELY", 1)
    with caplog.at_level(logging.WARNING, "ampscope"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
        with watch(model) as watcher:
            for update in range(1, 14):
                optimizer.zero_grad()
                (model(batch(1)[0]).square().mean() * 0.01 * 3.0**update).backward()
                optimizer.step()
                with torch.no_grad():
                    model.load_state_dict(net().state_dict())
    assert not watcher.events and "the largest gradient grows from update to update" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("part", [Log, Sqrt, Exp, Divide])
@pytest.mark.parametrize("dtype", [BF16, None])
def test_what_is_read_an_update_later_is_repeated_with_its_own_weights(part, dtype, monkeypatch):
    """As on a GPU, where nothing may wait."""

    class Later(watch.__globals__["Watcher"]):
        def __enter__(self):
            self.later = True
            return super().__enter__()

    monkeypatch.setitem(watch.__globals__, "Watcher", Later)
    (event,) = plain(net(OfBatch(part())), dtype, data=thousandfold).events
    origin = event["forward"] or event["backward"]
    assert (event["update"], origin["module"], event["weights"]) == (FAULTY, "1.inner", [])
    assert LINES[origin["place"]["line"] - 1].endswith(f"# line: {part.__name__.lower()}")


def healthy_gan():
    return gan(nn.Tanh(), "critic")


def test_lazy_parameters_are_refused_and_scripted_models_watched_by_their_gradients():
    with pytest.raises(InspectError, match="called once: 0.weight has no size yet"):
        watch(nn.Sequential(nn.LazyLinear(8)))
    with pytest.warns(DeprecationWarning if torch.__version__ < "2.14" else FutureWarning):
        model = torch.jit.script(nn.Sequential(nn.Linear(8, 4)))
    event = plain(model, F16, data=large_batch).events[0]
    assert (event["update"], event["not_repeated"]) == (FAULTY, "no call of the model was seen")


def test_a_copy_of_a_watched_model_is_not_watched():
    model = net()
    with watch(model) as watcher:
        other = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        other(batch(1)[0])
        assert not watcher.calls.of_update()
        model(batch(1)[0])
        assert [call.module for call in watcher.calls.of_update()] == [model]


def test_calls_that_cannot_be_repeated_are_no_proof_of_anything(caplog):
    class Once(Log):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > FAULTY:
                raise RuntimeError("no more")
            return super().forward(x)

    with caplog.at_level(logging.WARNING, "ampscope"):
        (event,) = plain(net(Once()), BF16, updates=FAULTY).events
    assert event["update"] == FAULTY and event["forward"] is None and not event["from_loss"]
    assert "could not be repeated (RuntimeError: no more)" in caplog.text


HEALTHY = {
    **{
        f"{type(part()).__name__} {dtype}": (lambda part=part, dtype=dtype: plain(net(part()), dtype, updates=3))
        for part in (Attention, Norm, Sqrt, Exp, Mask, Custom, Checkpointed, BatchNorm)
        for dtype in (F16, BF16, None)
    },
    "accumulation": lambda: accumulated(net(nn.Tanh()), F16),
    "closure": lambda: closures(net(nn.Tanh()), BF16),
    "gan": healthy_gan,
    "long": lambda: plain(net(nn.LayerNorm(8)), BF16, updates=60),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_training(name, caplog):
    with caplog.at_level(logging.WARNING, "ampscope"):
        watcher = HEALTHY[name]()
    assert watcher.updates >= 3 and not watcher.events and not caplog.records
