"""`python main.py inspect --module`: a user's file of any name, in a process of its own; mistakes in one sentence.

Run: pytest tests/long/test_inspection_program.py
"""

import json

import tiny

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
