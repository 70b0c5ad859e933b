"""Whole programs, as their authors wrote them, run and traced in this process."""

import json
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.optim import optimizer as optimizer_hooks

import ampscope
from ampscope.running import Program
from ampscope.script_commands import run, trace, watch
from ampscope.script_report import script_report

HEAD = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
inputs = torch.randn(8, 16)
labels = torch.randint(0, 8, (8,))
cross_entropy = nn.functional.cross_entropy
for step in range(8):
"""
PLAIN = """
with torch.autocast("cpu", torch.bfloat16):
    loss = cross_entropy(model(inputs), labels)
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
SCALED = """
with torch.autocast("cpu", torch.float16):
    loss = cross_entropy(model(inputs), labels)
scaler.scale(loss).backward()
scaler.unscale_(optimizer)
nn.utils.clip_grad_norm_(model.parameters(), 1.0)
scaler.step(optimizer)
scaler.update()
optimizer.zero_grad()
"""


def write(folder, loop, head=HEAD):
    """Return a program: its head, then the loop's body."""
    file = folder / "program.py"
    file.write_text(head.lstrip() + textwrap.indent(loop.strip("\n") + "\n", "    "))
    return file


def report_of(file, *, update=3, arguments=()):
    seen, outcome = trace(Program(str(file), list(arguments)), update)
    assert outcome.ended or outcome.error is not None
    return seen, script_report(seen, file.name, None)


@pytest.mark.parametrize("loop", [PLAIN, SCALED], ids=["bfloat16", "float16"])
def test_a_healthy_loop_has_no_finding_and_every_section(tmp_path, loop):
    seen, report = report_of(write(tmp_path, loop))
    assert report.everything == []
    (rows,) = report.content["dtypes"].values()
    phases = {row["phase"] for row in rows}
    assert phases == {"forward", "loss", "backward"}
    assert {row["module"] for row in rows if row["op"] == "addmm"} == {"0", "2"}
    assert report.content["memory"][0]["gradients"] == report.content["memory"][0]["parameters"] == 4 * 808
    assert [row["name"] for row in report.content["underflow"]["layers"]][:2] == ["0.weight", "0.bias"]
    assert "Backward passes: 1" in report.text()


def test_the_program_starts_as_python_starts_it(tmp_path):
    text = """
    import json, os, sys
    print(json.dumps([sys.argv, sys.path[0], __name__, __file__, os.getcwd(), __spec__ is None]))
    print(json.dumps(sys.modules["__main__"].__file__))
    """
    file = tmp_path / "start.py"
    file.write_text(textwrap.dedent(text))
    own = subprocess.run([sys.executable, str(file), "--x", "-m", "y"], capture_output=True, text=True, check=True)
    code = f"import sys; sys.path.insert(0, {sys.path[0]!r}); from ampscope.running import Program\n"
    code += f"Program({str(file)!r}, ['--x', '-m', 'y']).run()"
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ours.stdout == own.stdout


def test_transforms_of_torch_func_run_as_they_do_alone(tmp_path):
    head = HEAD.replace("for step", "slope = torch.func.vmap(torch.func.grad(lambda row: row.tanh().sum()))\nfor step")
    seen, report = report_of(write(tmp_path, PLAIN.replace("model(inputs)", "model(slope(inputs))"), head))
    assert seen.whole and report.findings == []
    assert torch.autograd.graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"


def test_accumulation_is_one_update(tmp_path):
    loop = """
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(model(inputs), labels) / 2
    loss.backward()
    if step % 2:
        optimizer.step()
        optimizer.zero_grad()
    """
    seen, report = report_of(write(tmp_path, textwrap.dedent(loop)))
    assert [event.kind for event in seen.trace.execution.events if event.kind != "autocast"][:3] == [
        "backward",
        "backward",
        "step",
    ]
    assert report.everything == []


def test_the_call_that_makes_lazy_weights_is_the_programs_own(tmp_path):
    """In it there is nothing to trace: the weights have no shape yet."""
    head = HEAD.replace("nn.Linear(32, 8))", "nn.LazyLinear(8))\nmodel(torch.randn(2, 16))")
    _, report = report_of(write(tmp_path, PLAIN, head))
    assert report.everything == [] and "(808 parameters)" in report.text()


def test_an_update_of_two_optimizers_is_traced_whole(tmp_path):
    head = HEAD.replace(
        "for step", "critic = nn.Linear(8, 1)\nsecond = torch.optim.Adam(critic.parameters())\nfor step"
    )
    loop = """
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
        judged = critic(outputs.detach()).mean()
    judged.backward()
    second.step()
    second.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(outputs, labels) - critic(outputs).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    """
    seen, report = report_of(write(tmp_path, textwrap.dedent(loop), head))
    assert [name for name, _ in seen.trace.execution.stepped] == ["Adam", "SGD"]
    assert sorted(report.content["subject"]["models"]) == ["critic", "model"]
    assert report.everything == []


def test_an_update_that_the_scaler_skips_is_a_note(tmp_path):
    seen, report = report_of(write(tmp_path, SCALED, HEAD.replace("1024.0", "2.0**60")))
    assert seen.skipped
    assert [(note.rule, note.level) for note in report.everything] == [("nonfinite-backward", "note")]
    assert "the update was skipped" in report.text()


FAULTS = {
    "clip-before-unscale": SCALED.replace("scaler.unscale_(optimizer)\n", "").replace("1.0)", "1.0)  # here"),
    "scaler-not-updated": SCALED.replace("scaler.update()\n", "").replace("step(optimizer)", "step(optimizer)  # here"),
    "step-around-scaler": SCALED.replace("scaler.unscale_(optimizer)\n", "")
    .replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", "")
    .replace("scaler.step(optimizer)", "optimizer.step()  # here"),
    "no-scaler": PLAIN.replace("bfloat16", "float16").replace("backward()", "backward()  # here"),
    "scaler-with-bfloat16": SCALED.replace("float16", "bfloat16").replace("backward()", "backward()  # here"),
    "host-sync": PLAIN + "total = loss.item()  # here\n",
    "backward-in-autocast": PLAIN.replace("loss.backward()", "    loss.backward()  # here"),
    "step-in-autocast": PLAIN.replace("loss.backward()\nopt", "    loss.backward()\n    opt").replace(
        "step()", "step()  # here"
    ),
    "zero-grad-in-place": PLAIN.replace("zero_grad()", "zero_grad(set_to_none=False)  # here"),
    "autocast-no-effect": PLAIN.replace('"cpu", torch.bfloat16)', '"cuda", torch.bfloat16)').replace(
        "):", "):  # here"
    ),
    "explicit-float": PLAIN.replace("model(inputs)", "model[2](model[:2](inputs).float())").replace(
        "labels)", "labels)  # here"
    ),
    "nonfinite-forward": PLAIN.replace("model(inputs)", "model(inputs) / 0").replace("labels)", "labels)  # here"),
}


FAIL = ("scaler-not-updated", "step-around-scaler")  # PyTorch itself raises an error there
MEANT = {"step-in-autocast": {"backward-in-autocast"}} | dict.fromkeys(FAIL, {"fails"})


def test_a_read_is_found_in_a_later_update_and_none_where_batches_are_made(tmp_path):
    head = HEAD.replace("for step in range(8)", "held = torch.empty(8, 16)\nfor step in range(20)")
    loop = """
    order = torch.randperm(8).numpy()
    if torch.empty(1).uniform_().item() < 2:
        held.numpy()[:] = inputs[torch.from_numpy(order)].numpy()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(model(held.clone()), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    """
    loop = textwrap.dedent(loop)
    assert report_of(write(tmp_path, loop, head), update=9)[1].everything == []
    _, report = report_of(write(tmp_path, loop + "total = loss.item()\n", head), update=9)
    assert [finding.place.code for finding in report.findings] == ["total = loss.item()"]


@pytest.mark.parametrize("rule", FAULTS)
def test_a_planted_fault_is_found_on_its_line(tmp_path, rule):
    file = write(tmp_path, FAULTS[rule])
    seen, report = report_of(file)
    lines = {finding.place.line for finding in report.findings if finding.rule == rule and finding.place is not None}
    here = [number for number, line in enumerate(file.read_text().splitlines(), 1) if "# here" in line]
    assert lines == set(here)
    others = {finding.rule for finding in report.findings} - {rule}
    assert others <= MEANT.get(rule, set())
    assert seen.whole == (rule not in FAIL)


def alone(file, capsys):
    """Return what a program prints that nobody traces."""
    runpy.run_path(str(file), run_name="__main__")
    return capsys.readouterr().out


def status_of(*words, capsys):
    status = run(["--no-payoff", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_program_that_fails_shows_its_own_traceback_and_what_was_found(tmp_path, capsys):
    file = write(tmp_path, PLAIN.replace("model(inputs)", "model(inputs[:, step:])"))
    own = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    status, out, err = status_of(file, capsys=capsys)
    assert status == own.returncode == 1
    shown = [line for line in err.splitlines() if not line.startswith(" ") or str(file) in line]
    assert shown == [line for line in own.stderr.splitlines() if not line.startswith(" ") or str(file) in line]
    assert "ampscope" not in err
    assert "The program failed in the middle of it." in out
    assert "fails (finding)" in out


@pytest.mark.parametrize(
    ("loop", "says"),
    [
        ("model(inputs)\n", "only forward passes (8 of Sequential) were seen"),
        ("cross_entropy(model(inputs), labels).backward()\n", "no optimizer of torch.optim stepped: 8 backward passes"),
        (PLAIN.replace("optimizer.step()", "if step == 1: optimizer.step()"), "the program made one update"),
        ("pass\n", "no call of a torch.nn.Module was seen"),
    ],
    ids=["forward", "backward", "one", "nothing"],
)
def test_a_program_without_the_update_gets_one_sentence(tmp_path, capsys, loop, says):
    status, out, err = status_of(write(tmp_path, loop), capsys=capsys)
    assert (status, out) == (2, "")
    assert says in err and err.count("\n") == 1


def test_go_on_leaves_the_program_its_results(tmp_path, capsys):
    file = write(tmp_path, PLAIN + 'print("loss", loss.item() if step == 7 else "")\n')
    own = alone(file, capsys)
    status, out, _ = status_of("--go-on", file, capsys=capsys)
    assert status == 0
    assert out.startswith("loss") and out.endswith(own.splitlines()[-1] + "\n")
    assert out.count("Update 3 of") == 1


def test_strict_ends_with_status_one_and_out_holds_the_files(tmp_path, capsys):
    file = write(tmp_path, FAULTS["host-sync"])
    assert status_of(file, capsys=capsys)[0] == 0
    status, _, _ = status_of("--strict", "--out", tmp_path / "out", file, capsys=capsys)
    assert status == 1
    found = json.loads((tmp_path / "out/inspect.json").read_text())
    schema = json.loads((Path(ampscope.__file__).parent / "report.schema.json").read_text())
    assert {*schema["required"], "script"} == found.keys() and found.keys() <= schema["properties"].keys()
    assert schema["properties"]["script"]["required"] == [*found["script"]]
    assert [finding["rule"] for finding in found["findings"]] == ["host-sync"]


def test_a_poisoned_first_update_is_the_one_to_report(tmp_path):
    seen, report = report_of(write(tmp_path, FAULTS["nonfinite-forward"]))
    assert (seen.number, seen.poisoned) == (1, True)
    assert "Update 1 left weights that are not finite" in report.text()


def test_a_schedule_that_is_made_has_not_stepped(tmp_path):
    head = HEAD.replace("scaler =", "schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)\nscaler =")
    _, report = report_of(write(tmp_path, PLAIN + "schedule.step()\n1 / 0\n", head))
    assert [finding.rule for finding in report.findings] == ["fails"]


def test_nothing_stays_patched(tmp_path):
    names = [(torch.amp.GradScaler, "step"), (torch.autograd, "backward"), (torch.optim.Optimizer, "__init__")]
    names += [(torch.autocast, "__enter__"), (torch, "compile")]
    before = [getattr(owner, name) for owner, name in names]
    report_of(write(tmp_path, PLAIN))
    trace(Program(str(write(tmp_path, "1 / 0\n"))), 3)
    assert [getattr(owner, name) for owner, name in names] == before
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not optimizer_hooks._global_optimizer_post_hooks


def watched(file, tmp_path, *words, capsys):
    diary = tmp_path / "diary.jsonl"
    status = watch(["--out", str(diary), *words, str(file)])
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("ampscope: update ")]
    return status, [json.loads(line) for line in diary.read_text().splitlines()], said


def test_watch_writes_a_line_an_update_and_leaves_the_results(tmp_path, capsys):
    file = write(tmp_path, SCALED + "print(loss.item())\n")
    own = alone(file, capsys)
    status = watch(["--out", str(tmp_path / "diary.jsonl"), str(file)])
    printed = capsys.readouterr()
    assert (status, printed.out) == (0, own)
    lines = [json.loads(line) for line in (tmp_path / "diary.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines] == [*range(1, 9)]
    assert {(line["loss_scale"], line["skipped_updates"]) for line in lines} == {(1024.0, 0)}
    assert all(0 < line["gradient_norm"] < 100 for line in lines)
    assert printed.err == "ampscope: 8 updates, 0 skipped.\n"
    _, fewer, _ = watched(file, tmp_path, "--every", "4", capsys=capsys)
    assert [line["updates"] for line in fewer] == [4, 8]


ROOT = HEAD.replace("nn.ReLU()", "Root()").replace(
    "torch.manual_seed(0)",
    "class Root(nn.Module):\n    def forward(self, x):\n        return ((x.square() + 1) * (step != 4)).sqrt()\n",
)
BAD = {  # what is wrong in update 5, and the words that name it
    "overflow": (
        SCALED.replace("model(inputs)", "model(inputs * (1e5 if step == 4 else 1))"),
        "from 0 (Linear) on, _to_copy at",
    ),
    "input": (
        SCALED.replace("model(inputs)", "model(inputs / (step != 4))"),
        "128 of 128 values of input 0 are not finite; the",
    ),
    "loss": (PLAIN.replace("labels)\n", "labels) / (step != 4)\n"), "what came back from the loss ("),
    "backward": (
        PLAIN.replace("loss.backward()", "(loss * (step != 4)).sqrt().backward()"),
        "what came back from the loss (",
    ),
    "way back": (PLAIN, "the way back was not from 1 (Root) on, div at"),
    "scale": (SCALED.replace("scaler.scale(loss)", "(scaler.scale(loss) * (1e9 if step == 4 else 1))"), "2."),
}


@pytest.mark.parametrize("kind", BAD)
def test_watch_names_the_update_that_goes_wrong_and_its_cause_once(tmp_path, capsys, kind):
    loop, words = BAD[kind]
    head = ROOT if kind == "way back" else HEAD
    status, lines, said = watched(write(tmp_path, loop, head), tmp_path, capsys=capsys)
    assert status == 0
    assert len(said) == 1 and said[0].startswith("ampscope: update 5 ") and words in said[0]
    events = [skip for line in lines for skip in line["skips"]]
    assert [event["update"] for event in events] == [5]
    assert events[0]["weights"] == []
