"""`inspect --module FILE.py:make`: the forms of make(), a user's own files of any name, and mistakes in one sentence.

Run: pytest ampscope/tests/long/test_inspection_module.py
"""

import json
import re
from pathlib import Path

import pytest
import torch
from whole_step import LOSS, written

from ampscope import InspectError, cli
from ampscope import module as command
from ampscope.findings import RULES

ROOT = Path(__file__).resolve().parents[3]
STEP = """
import torch
from torch import nn

def make():
    model = nn.Linear(16, 8)

    def step(model, batch):
        return model(batch["x"]["features"]).square().mean()

    return model, {"x": {"features": torch.randn(8, 16)}, "names": ["a"]}, step
"""
GAN = """
import torch
from torch import nn

def make():
    models = {
        "generator": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24)),
        "discriminator": nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 1)),
    }
    optimizers = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
    judge = nn.functional.binary_cross_entropy_with_logits

    def step(models, batch, optimizers):
        real, noise = batch
        fake = models["generator"](noise)
        loss = judge(models["discriminator"](real), torch.ones(8, 1))
        loss = loss + judge(models["discriminator"](fake.detach()), torch.zeros(8, 1))
        optimizers["discriminator"].zero_grad()
        loss.backward()
        optimizers["discriminator"].step()
        cheated = judge(models["discriminator"](fake), torch.ones(8, 1))
        optimizers["generator"].zero_grad()
        cheated.backward()
        optimizers["generator"].step()
        return loss + cheated

    return {"models": models, "optimizers": optimizers, "batch": (torch.randn(8, 24), torch.randn(8, 16)),
            "step": step}
"""


@pytest.mark.parametrize("text, form", [(LOSS, "loss"), (STEP, "step"), (GAN, "whole step")])
def test_each_form_of_make_gives_a_full_report(text, form, tmp_path, capsys):
    report = command.inspect_module(written(tmp_path, text))
    command.show(report, out=tmp_path / "out")
    printed = capsys.readouterr().out
    assert report.ok, [finding.message for finding in report.everything]
    assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)
    content = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert content["subject"]["form"] == form and content["ok"] is True
    assert set(content["dtypes"]) == {"fp32", "amp-bf16"}
    assert any("bfloat16" in row["output"] for row in content["dtypes"]["amp-bf16"])
    assert content["payoff"]["speed"]["amp-bf16"]["seconds"] > 0
    assert {row["precision"] for row in content["memory"]} == {"fp32", "amp-bf16"}
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert "Will it pay?" in page and "data:image/" in page and "<script" not in page


def test_two_models_are_told_apart(tmp_path):
    report = command.inspect_module(written(tmp_path, GAN), precisions=["amp-bf16"])
    rows = report.content["dtypes"]["amp-bf16"]
    assert {row["module"] for row in rows if row["op"] == "addmm"} == {
        f"{name}.{layer}" for name in ("generator", "discriminator") for layer in "02"
    }
    assert set(report.content["subject"]["models"]) == {"generator", "discriminator"}


def test_strict_is_status_1_and_names_the_line(tmp_path, capsys):
    text = LOSS.replace("return model, batch, lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])",
                        """
    def loss(outputs, batch):
        value = nn.functional.cross_entropy(outputs, batch[1])
        print(value.item())
        return value
    return model, batch, loss""")  # fmt: skip
    words = ["inspect", written(tmp_path, text), "--precisions=fp32", f"--out={tmp_path / 'out'}"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--strict"]) == 1
    assert re.fullmatch(r"error: 1 rule is broken: host-sync \(.*mine.py:11\).\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "text, words",
    [
        ("def other(): pass", "has no function make; it has other"),
        ("import no_such_thing", r"cannot be imported: ModuleNotFoundError: .*mine.py:1"),
        ("def make():\n    return 3", "returned a int: make.. returns .model, batch, loss."),
        ("def make():\n    return {'net': 1}", "dictionary with net"),
        ("def make():\n    raise KeyError('data')", r"make\(\) fails: KeyError: 'data' \(mine.py:2\)"),
        ("def make():\n    return 1, 2, 3", "torch.nn.Module"),
        ("import sys\nsys.exit(3)", "SystemExit"),
        (
            "import torch\ndef make():\n"
            "    return torch.nn.Linear(3, 4), torch.randn(2, 5), lambda outputs, batch: outputs.sum()",
            "the step fails in every precision: RuntimeError",
        ),
        (
            "import torch\ndef make():\n    return {'a': torch.nn.Linear(3, 4)}, torch.randn(2, 3)",
            "several models need a step",
        ),
    ],
)
def test_a_mistake_is_one_sentence(text, words, tmp_path):
    with pytest.raises(InspectError, match=words):
        command.inspect_module(written(tmp_path, text))


@pytest.mark.parametrize("target", ["none.py:make", "none.py", "mine.py:1", "mine"])
def test_a_target_that_is_none_is_one_sentence(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, LOSS)
    with pytest.raises(InspectError, match="FILE.py:FUNCTION"):
        command.inspect_module(target)


def test_a_diary_of_watch_is_drawn(tmp_path):
    diary = tmp_path / "diary.jsonl"
    skip = {"update": 1, "parameter": "0.weight", "scale": 65536.0}
    line = {"epoch": 1, "updates": 10, "loss_scale": 32768.0, "skipped_updates": 1, "skips": [skip]}
    diary.write_text(json.dumps(line) + "\n")
    report = command.inspect_module(written(tmp_path, LOSS), precisions=["fp32"], diary=diary)
    command.show(report, out=tmp_path / "out")
    assert (tmp_path / "out" / "scaler.png").exists() and "32,768" in report.text()


def test_models_and_batch_are_moved(tmp_path):
    parts = command.arguments_of((torch.nn.Linear(2, 2), {"x": [torch.ones(1, 2)], "n": 3}, None))
    command.move(parts, torch.device("meta"))
    assert parts["batch"]["x"][0].is_meta and parts["batch"]["n"] == 3 and parts["model"].weight.is_meta


def test_every_rule_is_documented():
    page = (ROOT / "ampscope/docs/rules.md").read_text(encoding="utf-8")
    assert all(f"| `{rule}` | {title} |" in page for rule, title in RULES.items())


def test_the_documents_example_runs(tmp_path):
    page = (ROOT / "ampscope/docs/step.md").read_text(encoding="utf-8")
    examples = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    example = next(text for text in examples if "def make()" in text)
    assert command.inspect_module(written(tmp_path, example)).ok
