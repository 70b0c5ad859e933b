"""Bodies of training loops with one fault each, as a stranger would write them; `# here` marks the line.

The same body is a program's loop for `run` and a step for `inspect`.
"""

from planted_recipes import RECIPES

HEAD = """\
import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
critic = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
second = torch.optim.Adam(critic.parameters())
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
other_scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
criterion = nn.CrossEntropyLoss()
inputs = torch.randn(8, 16)
labels = torch.randint(0, 8, (8,))
history = []
ema = copy.deepcopy(model)


def half():
    return torch.autocast("cpu", torch.float16)


def brain():
    return torch.autocast("cpu", torch.bfloat16)
"""
MORE = {  # what a loop needs besides
    "evaluation left on": """\
tail = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)).eval()  # here
""",
    "loss twice in bfloat16": """\
narrow = copy.deepcopy(model).bfloat16()  # here
third = torch.optim.SGD(narrow.parameters(), 0.01)
""",
}
LOOPS = RECIPES | {
    "exp outside": (
        "narrow-loss",
        """\
with brain():
    outputs = model(inputs)
probabilities = torch.exp(outputs) / torch.exp(outputs).sum(-1, keepdim=True)  # here
loss = -probabilities[torch.arange(8), labels].float().log().mean()
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "sum outside": (
        "narrow-loss",
        """\
optimizer.zero_grad()
with half():
    outputs = model(inputs)
loss = ((outputs - 1) ** 2).sum() / 64  # here
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
""",
    ),
    "mean square outside": (
        "narrow-loss",
        """\
optimizer.zero_grad()
with brain():
    outputs = model(inputs)
loss = (outputs - 1).square().mean()  # here
loss.backward()
optimizer.step()
""",
    ),
    "log softmax outside": (
        "narrow-loss",
        """\
optimizer.zero_grad()
with brain():
    outputs = model(inputs)
loss = -outputs.log_softmax(-1)[torch.arange(8), labels].float().mean()  # here
loss.backward()
optimizer.step()
""",
    ),
    "criterion outside": (
        "narrow-loss",
        """\
optimizer.zero_grad()
with half():
    outputs = model(inputs)
loss = criterion(outputs, labels)  # here
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
""",
    ),
    "no scaler": (
        "no-scaler",
        """\
with half():
    loss = criterion(model(inputs), labels)
loss.backward()  # here
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "everything inside": (
        "backward-in-autocast",
        """\
with brain():
    loss = criterion(model(inputs), labels)
    loss.backward()  # here
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "step inside": (
        "step-in-autocast",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
with brain():
    optimizer.step()  # here
optimizer.zero_grad()
""",
    ),
    "wrong device": (
        "autocast-no-effect",
        """\
with torch.autocast("cuda", dtype=torch.bfloat16):  # here
    loss = criterion(model(inputs), labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "only the loss inside": (
        "autocast-no-effect",
        """\
outputs = model(inputs)
with brain():  # here
    loss = criterion(outputs, labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "item": (
        "host-sync",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
history.append(loss.item())  # here
""",
    ),
    "finite check": (
        "host-sync",
        """\
with brain():
    loss = criterion(model(inputs), labels)
if not torch.isfinite(loss):  # here
    raise SystemExit("the loss is not finite")
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "math.isnan": (
        "host-sync",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
if math.isnan(loss):  # here
    raise SystemExit("NaN")
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "accuracy": (
        "host-sync",
        """\
with brain():
    outputs = model(inputs)
    loss = criterion(outputs, labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
right = int((outputs.argmax(1) == labels).sum())  # here
""",
    ),
    "to numpy": (
        "numpy",
        """\
with brain():
    outputs = model(inputs)
    loss = criterion(outputs, labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
history.append(outputs.detach().float().cpu().numpy())  # here
""",
    ),
    "gradient norm": (
        "host-sync",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
optimizer.zero_grad()
history.append(float(norm))  # here
""",
    ),
    "never cleared": (
        "gradients-kept",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()  # here
optimizer.step()
""",
    ),
    "wrong one cleared": (
        "gradients-kept",
        """\
second.zero_grad()
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()  # here
optimizer.step()
""",
    ),
    "cleared between": (
        "trains-nothing",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
optimizer.zero_grad()  # here
optimizer.step()
""",
    ),
    "schedule first": (
        "schedule-first",
        """\
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
schedule.step()  # here
optimizer.step()
optimizer.zero_grad()
""",
    ),
    "zeros": (
        "zero-grad-in-place",
        """\
optimizer.zero_grad(set_to_none=False)  # here
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
optimizer.step()
""",
    ),
    "zeros by hand": (
        "zero-grad-in-place",
        """\
for parameter in model.parameters():
    if parameter.grad is not None:
        parameter.grad.zero_()  # here
with brain():
    loss = criterion(model(inputs), labels)
loss.backward()
optimizer.step()
""",
    ),
    "evaluation left on": (
        "evaluation-mode",
        """\
optimizer.zero_grad()
with brain():
    dropped = functional.dropout(model(inputs), 0.1)
    loss = criterion(tail(dropped), labels)
loss.backward()
optimizer.step()
""",
    ),
    "detached loss": (
        "trains-nothing",
        """\
optimizer.zero_grad()
with brain():
    loss = criterion(model(inputs), labels)
loss = loss.detach().requires_grad_()
loss.backward()  # here
optimizer.step()
""",
    ),
    "loss twice in bfloat16": (
        "bfloat16-weights",
        """\
optimizer.zero_grad()
loss = criterion(narrow(inputs.bfloat16()).float(), labels)
loss.backward()
third.step()
third.zero_grad()
""",
    ),
    "large loss": (
        "nonfinite-forward",
        """\
optimizer.zero_grad()
with half():
    outputs = model(inputs)
    penalty = (outputs * 900).square().mean()  # here
    loss = criterion(outputs, labels) + 1e-9 * penalty
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
""",
    ),
    "log of zero": (
        "nonfinite-forward",
        """\
optimizer.zero_grad()
with brain():
    probabilities = model(inputs).float().softmax(-1)
loss = -(probabilities * 0).log().mean()  # here
loss.backward()
optimizer.step()
""",
    ),
    "empty mask": (
        "nonfinite-forward",
        """\
optimizer.zero_grad()
with brain():
    outputs = model(inputs)
chosen = labels > 100
loss = outputs[chosen].float().mean()  # here
loss.backward()
optimizer.step()
""",
    ),
    "NaN in the inputs": (
        "nonfinite-forward",
        """\
optimizer.zero_grad()
spoiled = inputs / (inputs * 0)  # here
with brain():
    loss = criterion(model(spoiled), labels)
loss.backward()
optimizer.step()
""",
    ),
}
