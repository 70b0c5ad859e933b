"""Faults that a stranger plants, each in a step for `inspect` and in a program for `run`: its rule, its line, no other.

Of healthy programs nothing is said.

Run: pytest ampscope/tests/long/test_strangers.py
"""

import inspect as source
import textwrap
from pathlib import Path

import pytest
from healthy_programs import HEALTHY
from planted_loops import HEAD, LOOPS, MORE
from planted_models import FAULTS, Mixing, OwnFunction
from planted_values import (
    VALUES,
    ArcCosine,
    EmptyMean,
    FirstIsNaN,
    HalfPower,
    OneSampleStd,
    PaddedRow,
    SelfDistances,
    VarianceByHand,
    WhereLog,
)
from test_scripts import report_of, watched

from ampscope import inspect_step
from ampscope.module import made

MODEL = """
import torch
from torch import nn
from {module} import {name} as Net


def make():
    torch.manual_seed(1)
    batch = torch.randn(8, 32), torch.randint(0, 10, (8,))
    return Net(), batch, lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])
"""
TRAIN = """
import torch
from torch import nn
from {module} import {name} as Net

torch.manual_seed(1)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled={scaled})
for step in range(6):
    inputs, labels = torch.randn(8, 32), torch.randint(0, 10, (8,))
    with torch.autocast("cpu", torch.{dtype}):
        loss = nn.functional.cross_entropy(model(inputs), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""
IN_FLOAT16 = ("nonfinite-forward", "overflow-hidden", "half-weights", "unsafe-function")
ALSO = {  # what is true besides, by rule or by name
    "half-weights": {"fails"},
    "bfloat16-weights": {"fails"},
    "unscale each micro-batch": {"backward-after-unscale"},
    "only the loss inside": {"autocast-off"},
    "penalty": {"no-gradient"},
    "step inside": set(),
    "ToNumpy": {"host-sync"},
}


def of_step(file):
    """Return the findings on the step that a file's make() returns."""
    with made(f"{file}:make", None) as parts:
        return inspect_step(**parts, speed=False).everything


def check(found, rule, lines, also=frozenset()):
    """Fail unless the findings name this rule on one of these lines, and nothing that is not true."""
    said = [(finding.rule, str(finding.place), finding.message) for finding in found if finding.level == "finding"]
    places = {(Path(f.place.file).name, f.place.line) for f in found if f.rule == rule and f.place is not None}
    assert rule in {finding.rule for finding in found} and (not lines or places == lines), said
    assert {finding.rule for finding in found if finding.level == "finding"} <= {rule} | also, said


def write(folder, name, text):
    file = folder / name
    file.write_text(text.lstrip())
    return file


def lines_of(name, text, start=1):
    return {(name, number) for number, line in enumerate(text, start) if line.rstrip().endswith("# here")}


def lines_in(model):
    owner = Mixing if model is OwnFunction else model
    text, start = source.getsourcelines(owner)
    return lines_of(Path(source.getfile(owner)).name, text, start)


@pytest.mark.parametrize("model", FAULTS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("form", ["inspect", "run"])
def test_a_fault_in_a_model_is_found(form, model, tmp_path):
    rule = FAULTS[model]
    scaled = rule in IN_FLOAT16
    words = {
        "module": model.__module__,
        "name": model.__name__,
        "scaled": scaled,
        "dtype": "float16" if scaled else "bfloat16",
    }
    if form == "inspect":
        found = of_step(write(tmp_path, "model.py", MODEL.format(**words)))
    else:
        found = report_of(write(tmp_path, "train.py", TRAIN.format(**words)))[1].everything
    check(found, rule, lines_in(model), ALSO.get(rule, set()) | ALSO.get(model.__name__, set()))


def as_step(name, body):
    """Return a file whose make() returns this loop's body as a step."""
    names = [key for key in ("model", "critic", "narrow", "tail") if f"{key}(" in body]
    models = names[0] if len(names) == 1 else "{" + ", ".join(f'"{key}": {key}' for key in names) + "}"
    step = textwrap.indent(body, "    ")
    make = f"def make():\n    return {models}, (inputs, labels), step\n"
    return f"{HEAD}{MORE.get(name, '')}\n\ndef step(models, batch):\n{step}\n\n{make}"


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("form", ["inspect", "run"])
def test_a_fault_in_a_loop_is_found(form, name, tmp_path):
    rule, body = LOOPS[name]
    if form == "inspect":
        file = write(tmp_path, "step.py", as_step(name, body))
        found = of_step(file)
    else:
        text = f"{HEAD}{MORE.get(name, '')}\nfor update in range(6):\n{textwrap.indent(body, '    ')}"
        file = write(tmp_path, "train.py", text)
        found = report_of(file)[1].everything
    if name == "NaN in the inputs" and form == "run":  # before the model's first call nothing is followed
        lines = set()
    else:
        lines = lines_of(file.name, file.read_text().splitlines())
    check(found, rule, lines, ALSO.get(name, set()))


WATCHED = """
import torch
from torch import nn
from planted_values import {name} as Net

torch.manual_seed(1)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled={scaled})
for step in range(7):
    model.__dict__.pop("middle", None)
    if step != 4:
        model.middle = torch.relu
    inputs, labels = torch.randn(8, 32), torch.randint(0, 10, (8,))
    with torch.autocast("cpu", torch.{dtype}):
        loss = nn.functional.cross_entropy(model(inputs), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""
IN_ANY_TYPE = (PaddedRow, OneSampleStd, VarianceByHand, SelfDistances, WhereLog, HalfPower, ArcCosine, EmptyMean)
WATCHES = [
    *((model, "float16") for model, rule in VALUES.items() if rule.startswith("nonfinite") and model is not FirstIsNaN),
    *((model, "bfloat16") for model in IN_ANY_TYPE),
]


@pytest.mark.parametrize(("model", "dtype"), WATCHES, ids=lambda value: getattr(value, "__name__", value))
def test_a_watched_program_names_the_update_and_the_line(model, dtype, tmp_path, capsys):
    words = {"name": model.__name__, "scaled": dtype == "float16", "dtype": dtype}
    _, _, said = watched(write(tmp_path, "train.py", WATCHED.format(**words)), tmp_path, capsys=capsys)
    ((file, line),) = lines_in(model)
    assert len(said) == 1 and said[0].startswith("ampscope: update 5 ") and f"{file}:{line}" in said[0], said


START = """
import copy
import math

import torch
from torch import nn
from torch.nn import functional

torch.manual_seed(0)
"""
ENDS = {
    "": "",
    "bfloat16": """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
""",
    "float16": """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = compute()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_program(name, tmp_path):
    end, text = HEALTHY[name]
    for library in ("torchvision", "timm"):
        if f"import {library}" in text:
            pytest.importorskip(library)
    seen, report = report_of(write(tmp_path, "train.py", START + text + ENDS[end]))
    assert seen.whole and seen.number == 3
    assert not report.findings, [(f.rule, str(f.place), f.message) for f in report.findings]
