"""Tiny models and training loops with a fault planted in update FAULTY, each marked by a comment on its line."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ampscope import watch
from ampscope.places import count_file_as_users

count_file_as_users(__file__)  # it lies in the library's folder
FAULTY = 4  # the update in which a fault shows
LINES = Path(__file__).read_text().splitlines()


class Part(nn.Module):
    """A module between two linear layers, which changes its behaviour when it is `on`."""

    def __init__(self):
        super().__init__()
        self.on = False
        self.linear = nn.Linear(8, 8)


class Norm(Part):
    def forward(self, x):
        squares = (self.linear(x) * (1e4 if self.on else 1.0)).square()  # line: norm
        return squares / (squares.mean(-1, keepdim=True) + 1e-3)


class Attention(Part):
    def forward(self, x):
        query = self.linear(x) * (1e3 if self.on else 1.0)
        scores = query @ query.transpose(-1, -2)  # line: attention
        return scores.softmax(-1) @ x


class Log(Part):
    def forward(self, x):
        x = torch.sigmoid(x).float() * (0.0 if self.on else 1.0)
        return x.log()  # line: log


class Sqrt(Part):
    def forward(self, x):
        x = self.linear(x).float().square() * (0.0 if self.on else 1.0)
        return x.sqrt() if self.on else (x + 1e-3).sqrt()  # line: sqrt


class Divide(Part):
    def forward(self, x):
        x = self.linear(x).float() * (0.0 if self.on else 1.0)
        return x / x if self.on else x  # line: divide


class Exp(Part):
    def forward(self, x):
        return torch.exp(self.linear(x) * 0.1 + (300.0 if self.on else 0.0))  # line: exp


class Mask(Part):
    def forward(self, x):
        scores = self.linear(x).half()
        mask = torch.ones_like(scores, dtype=torch.float16) * (-1e9 if self.on else -1.0)  # line: mask
        return (scores + mask - mask).to(x.dtype)


class EveryMasked(Part):
    def forward(self, x):
        scores = self.linear(x)
        hidden = torch.full_like(scores, self.on, dtype=torch.bool)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)  # line: masked


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(context, x, factor):
        context.factor = factor
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient / context.factor, None  # line: function


class Custom(Part):
    def forward(self, x):
        return Cube.apply(self.linear(x), 0.0 if self.on else 1.0)


class Norming(Part):
    def forward(self, x):
        x = self.linear(x) * (0.0 if self.on else 1.0)
        return x / (x.norm(dim=-1, keepdim=True) + (0.0 if self.on else 1e-3))  # line: norming


class Power(Part):
    def forward(self, x):
        x = self.linear(x).float().relu() * (0.0 if self.on else 1.0)
        return (x + (0.0 if self.on else 1.0)) ** 0.25  # line: power


class OfBatch(Part):
    """The fault is in the batches whose values are large, and in nothing else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.inner.on = bool(x.abs().amax() > 100)
        return self.inner(x.clamp(-1, 1))


class Checkpointed(Part):
    def __init__(self):
        super().__init__()
        self.inner = Log()

    def forward(self, x):
        self.inner.on = self.on
        return checkpoint(self.inner, x, use_reentrant=False)


class Shared(Part):
    def forward(self, x):
        return self.linear(self.linear(x) * (1e5 if self.on else 1.0))  # line: shared


class Container(Part):
    def forward(self, x):
        x = self.linear(x).float()
        return {"logits": x, "more": [x, (x * (1e38 * 1e3 if self.on else 1.0),)]}  # line: container


class Opened(Part):
    def forward(self, x):
        return x["more"][1][0] * 1.0


class BatchNorm(Part):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.eval()

    def forward(self, x):
        self.norm.training = False
        if self.on:
            self.norm.running_var.fill_(-1.0)
        return self.norm(x)  # line: batchnorm


class Dropped(Part):
    """The fault is there for the random numbers of its update alone."""

    def forward(self, x):
        x = self.linear(x).float() * (1.0 if not self.on else (torch.rand(()) > 2) * 1.0)
        return 1 / x if self.on else x  # line: dropped


def net(*parts):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *parts, nn.Linear(8, 4))


def batch(update, size=8):
    generator = torch.Generator().manual_seed(update)
    return torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def turn(model, on):
    for module in model.modules():
        if isinstance(module, Part):
            module.on = on


def region(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def scaler_for(dtype):
    return torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype is torch.float16)


def cross_entropy(outputs, target, on):
    return nn.functional.cross_entropy(outputs.float(), target)


def plain(model, dtype, loss=cross_entropy, *, clip=True, data=batch, rate=0.01, updates=FAULTY + 2, spoil=None):
    """Run the loop of PyTorch's notes; without float16 its scaler is disabled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scaler = scaler_for(dtype)
    with watch(model, scaler) as watcher:
        for update in range(1, updates + 1):
            turn(model, update == FAULTY)
            inputs, target = data(update)
            optimizer.zero_grad()
            with region(dtype):
                value = loss(model(inputs), target, update == FAULTY)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if spoil is not None and update == FAULTY:
                spoil(model)
            scaler.step(optimizer)
            scaler.update()
    return watcher


def accumulated(model, dtype):
    """Put the fault into the first of three micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = scaler_for(dtype)
    with watch(model, scaler) as watcher:
        for update in range(1, FAULTY + 2):
            for part in range(3):
                inputs, target = batch(3 * update + part)
                inputs *= 1e4 if update == FAULTY and part == 0 else 1.0
                with region(dtype):
                    value = cross_entropy(model(inputs), target, False)
                scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return watcher


def closures(model, dtype):
    """As Lightning does: the model's part is called, inside a closure that the optimizer calls."""

    class Lit(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, update):
            inputs, target = batch(update)
            with region(dtype):
                return cross_entropy(self.net(inputs), target, False)

    lit = Lit()
    optimizer = torch.optim.SGD(lit.parameters(), lr=0.01)
    with watch(lit) as watcher:
        for update in range(1, FAULTY + 2):
            turn(model, update == FAULTY)

            def closure(update=update):
                optimizer.zero_grad()
                loss = lit.training_step(update)
                loss.backward()
                nn.utils.clip_grad_norm_(lit.parameters(), 1.0)
                return loss

            optimizer.step(closure)
    return watcher


def gan(part, which):
    """Two models and optimizers; the fault is in one of the models, in the discriminator's turn."""
    torch.manual_seed(0)
    parts = {"generator": [], "critic": []}
    parts[which].append(part)
    generator = nn.Sequential(nn.Linear(8, 8), *parts["generator"], nn.Linear(8, 8))
    critic = nn.Sequential(nn.Linear(8, 8), *parts["critic"], nn.Linear(8, 1))
    first, second = (torch.optim.SGD(model.parameters(), lr=0.01) for model in (critic, generator))
    with watch({"generator": generator, "critic": critic}) as watcher:
        for update in range(1, FAULTY + 2):
            turn(part, update == FAULTY)
            real, _ = batch(update)
            fake = generator(real.flip(0))
            first.zero_grad()
            (critic(fake.detach()).float().mean() - critic(real).float().mean()).backward()
            first.step()
            turn(part, update == FAULTY and which == "generator")
            second.zero_grad()
            (-critic(fake).float().mean()).backward()
            second.step()
    return watcher


def nan_in_batch(update):
    inputs, target = batch(update)
    if update == FAULTY:
        inputs[1, :3] = torch.nan
    return inputs, target


def large_batch(update):
    inputs, target = batch(update)
    return inputs * (1e6 if update == FAULTY else 1.0), target


def thousandfold(update):
    inputs, target = batch(update)
    return inputs * (1e4 if update == FAULTY else 1.0), target


def ids(update):
    return torch.arange(8), batch(update)[1]


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 8)
        self.head = net(Log())

    def forward(self, x):
        return self.head(self.embedding(x))


def log_loss(outputs, target, on):
    probability = outputs.float().softmax(-1) * (0.0 if on else 1.0) + (0.0 if on else 1e-3)
    return -probability.log().mean()


def zero_norm(outputs, target, on):
    value = outputs.float().sum() * (0.0 if on else 1.0)
    return value.square().sqrt() if on else value.abs()


def spoil_gradient(model):
    for parameter in model.parameters():
        parameter.grad /= 0 * parameter.grad.norm()


F16, BF16 = torch.float16, torch.bfloat16
