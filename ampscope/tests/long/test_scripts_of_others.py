"""Programs that leave the loop to Lightning, Hugging Face's Trainer or accelerate; torchrun; torch.compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_scripts import report_of, watched

import ampscope

LIGHTNING = """
import lightning
import torch
from torch import nn


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def training_step(self, batch, index):
        inputs, labels = batch
        outputs = self.net(inputs) * (1 if index != 9 else WRONG)
        loss = nn.functional.cross_entropy(outputs, labels)
        FAULT
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


WRONG = 1
data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(0, 8, (64,)))
trainer = lightning.Trainer(max_epochs=1, precision="bf16-mixed", accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, accumulate_grad_batches=2, gradient_clip_val=1.0)
trainer.fit(Model(), torch.utils.data.DataLoader(data, 4))
"""
TRANSFORMERS = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
data = [{"input_ids": torch.randint(0, 64, (8,)), "labels": index % 2} for index in range(64)]
arguments = TrainingArguments("out", per_device_train_batch_size=4, bf16=True, use_cpu=True, report_to=[],
    save_strategy="no", gradient_accumulation_steps=2, disable_tqdm=True, num_train_epochs=1)
Trainer(BertForSequenceClassification(BertConfig(**sizes)), arguments, train_dataset=data).train()
"""
ACCELERATE = """
import torch
from accelerate import Accelerator
from torch import nn

accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randint(0, 8, (64,)))
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()), torch.utils.data.DataLoader(data, 4))
for inputs, labels in loader:
    with accelerator.accumulate(model):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        FAULT
        optimizer.step()
        optimizer.zero_grad()
"""
PROGRAMS = {"lightning": LIGHTNING, "transformers": TRANSFORMERS, "accelerate": ACCELERATE}


def program(tmp_path, text, fault="pass"):
    file = tmp_path / "program.py"
    file.write_text(text.replace("FAULT", fault))
    return file


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_healthy_training_has_no_finding(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    seen, report = report_of(program(tmp_path, PROGRAMS[name]))
    assert report.findings == []
    assert sum(event.kind == "backward" for event in seen.trace.execution.events) == 2
    assert report.content["subject"]["own_autocast"] == ["bfloat16"]
    (rows,) = report.content["dtypes"].values()
    products = [row for row in rows if row["op"] == "addmm"]
    assert {row["inputs"][0] for row in products} == {"bfloat16"}
    assert all(row["module"] for row in products)
    assert {layer["name"] for layer in report.content["underflow"]["layers"] if layer["group"] == "parameter"}


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_a_read_in_every_step_is_found_on_its_line(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    _, report = report_of(program(tmp_path, PROGRAMS[name], "print(loss.item())"))
    assert [(finding.rule, finding.place.code) for finding in report.findings] == [("host-sync", "print(loss.item())")]


def test_gradients_that_nobody_clears_are_found_on_the_users_line(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    _, report = report_of(program(tmp_path, ACCELERATE.replace("        optimizer.zero_grad()\n", "")))
    said = [(finding.rule, finding.place.code) for finding in report.findings]
    assert said == [("gradients-kept", "accelerator.backward(loss)")]


def test_lightning_names_the_module_as_its_user_does(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    _, report = report_of(program(tmp_path, LIGHTNING))
    names = {layer["name"] for layer in report.content["underflow"]["layers"]}
    assert {"net.0.weight", "net.2.bias"} <= names


def test_watch_sees_the_update_in_which_lightning_goes_wrong(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    text = LIGHTNING.replace("WRONG = 1", "WRONG = float('nan')")
    _, lines, said = watched(program(tmp_path, text), tmp_path, capsys=capsys)
    assert len(lines) == 8
    assert len(said) == 1 and said[0].startswith("ampscope: update 5 was not finite: what the model put out was finite")


RANKS = """
import torch
import torch.distributed
from torch import nn

torch.distributed.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(16, 8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(12):
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 16)), torch.randint(0, 8, (8,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_first_rank_of_torchrun_is_traced(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(ampscope.__file__).parent.parent)}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ampscope", "run"]
    command = [sys.executable, *words, "--out", tmp_path / "out", program(tmp_path, RANKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.count("Update 3 of") == 1
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["findings"] == []


COMPILED = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
compiled = torch.compile(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(8):
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(torch.randn(4, 16)).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_compiled_model_is_traced_as_it_was_written(tmp_path):
    seen, report = report_of(program(tmp_path, COMPILED))
    assert seen.updates.compiled and report.findings == []
    (rows,) = report.content["dtypes"].values()
    assert {row["module"] for row in rows if row["op"] == "addmm"} == {"0", "2"}
    assert "traced as they were written" in report.text()


def test_both_ways_to_run_are_timed(tmp_path):
    file = program(
        tmp_path, COMPILED.replace("compiled = torch.compile(model)", "compiled = model").replace("8)", "60)")
    )
    command = [sys.executable, "-m", "ampscope", "run", file]
    environment = os.environ | {"PYTHONPATH": str(Path(ampscope.__file__).parent.parent)}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout
    rows = [line.split() for line in text.splitlines() if line.startswith(("  autocast off", "  as written"))]
    assert [row[-3] for row in rows] == ["40", "40"]
    assert "times" in text[text.index("8. Will it pay?") :]
