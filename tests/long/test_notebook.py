"""The notebook is the one that its script makes, it holds no outputs, and it runs from its first cell to its last.

It runs on a CPU, small (AMP_NOTEBOOK_QUICK), in a copy of the checkout, so that it leaves nothing behind. That takes a
minute, so it does so only if NOTEBOOK is set, as it is in CI: NOTEBOOK=1 pytest tests/long/test_notebook.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny

ROOT = tiny.ROOT
NOTEBOOK = ROOT / "notebooks/amp_in_ten_minutes.ipynb"


@pytest.fixture(scope="module")
def content():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture
def make():
    pytest.importorskip("jupytext")
    return tiny.module_of(ROOT / "notebooks/make.py")


def test_the_script_makes_this_notebook(make):
    assert NOTEBOOK.read_text(encoding="utf-8") == make.text(), "run python notebooks/make.py"


def test_outputs_are_stripped(content):
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 10
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


def test_machines_are_named(content):
    first = "".join(content["cells"][0]["source"])
    assert "T4" in first and "bfloat16" in first and "TF32" in first


def test_badges_and_clone_lead_to_the_public_address_once_there_is_one(make):
    published = str(make.notebook("https://github.com/someone/amp"))
    assert "colab.research.google.com/github/someone/amp/blob" in published
    assert "welcome?src=https://github.com/someone/amp/blob" in published
    assert "git clone --quiet https://github.com/someone/amp amp-train" in published and make.MARK not in published
    unpublished = str(make.notebook(""))
    assert not [word for word in ("colab.research", "welcome?src", "git clone", make.MARK) if word in unpublished]


def said(cell):
    """Everything that a cell printed, and the kinds of pictures that it showed."""
    texts = ["".join(output.get("text", "")) for output in cell["outputs"]]
    return "".join(texts) + " ".join(kind for output in cell["outputs"] for kind in output.get("data", {}))


@pytest.mark.skipif(not os.environ.get("NOTEBOOK"), reason="takes a minute: set NOTEBOOK=1")
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    ignored = shutil.ignore_patterns(".*", "data", "checkpoint", "inspect*.json", "build", "__pycache__", "*.egg-info")
    checkout = tmp_path / "amp-train"
    shutil.copytree(ROOT, checkout, ignore=ignored)
    monkeypatch.setenv("AMP_NOTEBOOK_QUICK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    draw = [sys.executable, "main.py", "prepare", "--demo", "--data_dir=data/quick", "--train_images=60"]
    subprocess.run([*draw, "--test_images=12"], cwd=checkout, check=True, capture_output=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    install = next(cell for cell in notebook.cells if "%pip install" in cell.source)
    install.source = ""  # what is installed here is what is tested
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(checkout / "notebooks")}}
    )
    client.execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]  # display() reports errors, raises none
    cells = {index: said(cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    everything = "\n".join(cells.values())
    assert everything.count("Traceback") == 2
    assert len(re.findall(r"^AssertionError", everything, re.MULTILINE)) == 2, "both broken recipes stop"
    assert "FutureWarning: `torch.cuda.amp.GradScaler(args...)` is deprecated" in everything
    assert re.search(r"today, FP32 +loss", everything) and "scaler.unscale_(optimizer)" in everything
    assert "image/png" in everything and "Findings" in everything
    assert (checkout / "checkpoint/notebook/report.html").exists()
