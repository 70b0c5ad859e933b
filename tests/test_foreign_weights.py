"""Weights that others made, in forms that are not a plain state dict: read, or refused with a line that helps."""

import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from pretrained.files import load_file
from utils import typed

HOSTILE_NAMES = (
    "$(touch pwned).pt",
    "`touch pwned`.pt",
    "'; touch pwned; '.pt",
    'a"b$(touch pwned)".pt',
    "a b & touch pwned.pt",
    "%PATH% !x *.pt",
)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs a line by sh in an empty folder, where `python` prints its arguments; returns them, and what was made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    folder = tmp_path / "typed"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(line: str) -> tuple[list[str], list[Path]]:
        out = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return out.stdout.split("\0")[:-1], list(folder.iterdir())

    return run


# ------------------------------------------------------------------------------- lines to be typed
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_line_to_type_names_the_file_and_runs_nothing_of_its_name(shell, name):
    assert shell(typed("python", "main.py", "--labels", Path(name))) == (["main.py", "--labels", name], [])


def test_a_line_to_type_is_one_line_whatever_a_file_is_called():
    assert "\n" not in typed("python", "a\nb\x1b[2J.pt", os.fsdecode(b"\xff.pt")).replace("\\n", "")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_the_line_offered_for_a_refused_checkpoint_runs_nothing_of_its_name(shell, tmp_path, monkeypatch, name):
    model = nn.Sequential(nn.Linear(2, 3))
    torch.save({"net": model}, tmp_path / name)
    line = tiny.refused(load_file, tmp_path / name).splitlines()[-1]
    (option, code), made = shell(line)
    assert option == "-c" and made == []
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert torch.equal(load_file(tmp_path / "weights.pt")["0.weight"], model[0].weight)


def test_advice_of_a_run_in_a_hostile_folder_runs_nothing_of_its_name(shell, data, tmp_path, run, monkeypatch):
    monkeypatch.setattr("reports.draw.draw_run", lambda *_: 1 / 0)
    folder = tmp_path / "$(touch pwned) x"
    status, _, errors = run(tiny.words(data, folder, "--epochs=1"))
    words, made = shell(errors.strip().rpartition("mended: ")[2])
    assert status == 1 and made == []
    assert words == ["main.py", "report", "--checkpoint_dir", str(folder), "--checkpoint_name", "run"]
