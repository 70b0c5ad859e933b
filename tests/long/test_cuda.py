"""What only an NVIDIA card can show; skipped without one: no waiting in the step, true FP32, resume, compile.

Run it alone: pytest tests/long/test_cuda.py
"""

import json
import signal

import pytest
import tiny
import torch
from tiny import network, subset
from torch import nn

import train
from dataset import Batches
from optimizer import make_optimizer
from precision import named_precision, sensible_precisions
from train import update_weights
from transforms import Preprocess

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRECISIONS = sensible_precisions(torch.device("cuda")) if torch.cuda.is_available() else ["fp32"]


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_nothing_in_the_step_waits_for_the_device(name, clip):
    """PyTorch raises at every operation that would make the host wait; two updates, the batches included."""
    device = torch.device("cuda")
    precision = named_precision(name, device)
    model = network().to(device)
    optimizer = make_optimizer(model.parameters(), "ADAM", learning_rate=1e-3, weight_decay=0.0, fused=True)
    scaler = precision.grad_scaler()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    images = subset()
    images.store.pin = True
    updates = Batches(images, Preprocess(device, 9), 8, 3).epoch(0)

    def update(pieces):
        return update_weights(
            model,
            pieces,
            8,
            optimizer=optimizer,
            scaler=scaler,
            precision=precision,
            criterion=criterion,
            clip_grad_norm=clip,
        )

    update(next(updates))  # the first one makes the scaler's and the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = update(next(updates))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert record.is_cuda and record.isfinite().all()


def test_fp32_is_not_tf32():
    """A product of numbers that TF32's ten bits of mantissa would round."""
    precision = named_precision("fp32", torch.device("cuda"))
    assert precision.name == "fp32" and torch.backends.cudnn.conv.fp32_precision == "ieee"
    images = torch.full((1, 8, 16, 16), 1 + 2.0**-12, device="cuda")
    assert torch.equal(nn.functional.conv2d(images, torch.full((8, 8, 1, 1), 0.125, device="cuda")), images)


def test_batches_equal_those_of_the_cpu():
    """Copied ahead on a stream of their own, they hold the same pixels in the same order."""
    images = subset()
    pinned = subset()
    pinned.store.pin = True
    for ours, theirs in zip(
        Batches(pinned, Preprocess(torch.device("cuda"), 9), 8, 3).epoch(1),
        Batches(images, Preprocess(torch.device("cpu"), 9), 8, 3).epoch(1),
        strict=True,
    ):
        for (one, labels, *_), (other, expected, *_) in zip(ours, theirs, strict=True):
            assert torch.equal(labels.cpu(), expected) and (one.cpu() - other).abs().max() < 1e-5


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "--compile"], ["--amp", "--cuda_graphs"]], ids=" ".join)
def test_training_stops_and_resumes(flags, data, tmp_path, monkeypatch):
    def stop(*arguments, original=train.update_weights, **options):
        result = original(*arguments, **options)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return result

    calls = []
    monkeypatch.setattr(train, "update_weights", stop)
    words = ["--device=cuda", *flags]
    assert tiny.train(data, tmp_path, *words) == 143
    assert tiny.train(data, tmp_path, *words, "--resume") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == "cuda" and result["memory_kind"] == "CUDA allocated" and result["peak_memory_mb"] > 0
    assert result["precision"] == ("amp-fp16" if flags else "fp32")
