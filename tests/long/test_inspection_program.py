"""`python main.py inspect` on a user's file (--module) or script (--script), in a process of its own, and its mistakes.

Run: pytest tests/long/test_inspection_program.py
"""

import json
import subprocess
import sys

import tiny

SCRIPT = """
import sys
import utils

import torch

print(sys.argv[1:], utils.MINE)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(6):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""

NAMES = """
from importlib.util import find_spec
import utils

import torch

assert utils.MINE and not [name for name in ("precision", "evaluate", "commands") if find_spec(name)]


def make():
    return torch.nn.Linear(16, 8), torch.randn(4, 16), lambda outputs, batch: outputs.square().mean()
"""


def test_no_module_of_the_program_hides_one_of_the_users(tmp_path, run, monkeypatch):
    """Not even if the program is run from its own folder, as its README says."""
    monkeypatch.chdir(tiny.ROOT)
    (tmp_path / "utils.py").write_text("MINE = True\n")
    (tmp_path / "mine.py").write_text(NAMES)
    words = ["inspect", f"--module={tmp_path / 'mine.py'}", f"--out={tmp_path / 'out'}", "--precisions=fp32"]
    status, out, err = run([*words, "--strict"])
    assert (status, err) == (0, "") and "no rule is broken" in out
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["ok"] is True


def test_a_mistake_is_status_2(tmp_path, run):
    status, out, err = run(["inspect", f"--module={tmp_path / 'none.py'}:make"])
    assert status == 2 and "there is no such file" in err and not out


def test_a_script_is_traced_with_its_own_arguments_and_modules(tmp_path):
    (tmp_path / "utils.py").write_text("MINE = 7\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["inspect", f"--script={tmp_path / 'train.py'}", f"--out={tmp_path / 'out'}", "--", "--lr", "3", "-x"]
    done = subprocess.run([sys.executable, tiny.ROOT / "main.py", *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['--lr', '3', '-x'] 7\nUpdate 3 of ") and not done.stderr
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["ok"] is True
