"""A whole training without a command line: a small network, images of noise, and the heart's Trainer around them."""

from functools import partial

import tiny
import torch
from torch import nn

from dataset import Batches
from model import Network
from optimizer import SmoothedCrossEntropy, make_optimizer, make_scheduler
from precision import Precision
from runs.folder import RunDirectory
from train import Plan, Recipe, Trainer, update_weights
from transforms import Preprocess

CPU = torch.device("cpu")
FP32, BF16, FP16 = (Precision(name, CPU, "a test") for name in ("fp32", "amp-bf16", "amp-fp16"))


def batches(images=None, batch_size=8, *, side=9, **options):
    return Batches(images or tiny.subset(side=side), Preprocess(CPU, side), batch_size, 3, **options)


def trainer(
    folder,
    model=None,
    precision=FP32,
    *,
    epochs=2,
    rate=1e-2,
    side=9,
    images=None,
    validation=None,
    batch_options=None,
    optimizer="ADAM",
    fused=True,
    decay_type="cosine_warmup",
    label_smoothing=0.0,
    heads=(),
    freeze_epochs=0,
    ema=0.0,
    on_epoch=None,
    **options,
):
    """Return a training on noise with brightness by class: three updates an epoch, the last one smaller."""
    model = model or tiny.network()
    fed = batches(images, side=side, **{"seed": 3, "epochs": epochs} | (batch_options or {}))
    rule = make_optimizer(model.parameters(), optimizer, learning_rate=rate, weight_decay=1e-4, fused=fused)
    schedule = partial(make_scheduler, rule, decay_type, epochs=epochs, updates_per_epoch=fed.updates_per_epoch)
    own = {"heads": heads, "freeze_epochs": freeze_epochs, "ema": ema}
    network = Network(model, sizes=fed.full_sizes, evaluation_size=8, ranks=fed.ranks, **own)
    tested = batches(validation or tiny.subset(9, seed=1, side=side), side=side)
    recipe = Recipe(rule, schedule, precision, SmoothedCrossEntropy(label_smoothing))
    plan = Plan(epochs, seed=3, **{"log_interval": 2} | options)
    told = {"on_epoch": on_epoch} if on_epoch else {}
    made = Trainer(network, recipe, plan, fed, tested, RunDirectory(folder), tiny.identity(image_size=side), **told)
    made.run.open()
    return made


def finish(made):
    """Train to the end and unlock the run's folder, also after an error."""
    try:
        made.train()
    finally:
        made.run.close()
    return made


def trained(*positional, **options):
    return finish(trainer(*positional, **options))


def piece(count=6, seed=0, last=True, weight=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 9, 9, generator=generator), torch.arange(count) % 3, weight, last


def update(model, optimizer, pieces, count, precision=FP32, scaler=None, clip=None):
    return update_weights(
        model,
        pieces,
        count,
        optimizer=optimizer,
        scaler=scaler or precision.grad_scaler(),
        precision=precision,
        criterion=nn.CrossEntropyLoss(reduction="sum"),
        clip_grad_norm=clip,
    )


def difference(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
