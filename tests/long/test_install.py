"""The library as it is installed: one package, one command, beside a user's own files of any name.

The wheel is built without network and installed into an empty folder. Run: pytest tests/long/test_install.py
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

import ampscope

ROOT = tiny.ROOT
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
MINE = "raise SystemExit('a file of the project was imported')\n"
SCRIPT = """
import sys, pathlib
import ampscope, train, utils
from model import make

places = {name: pathlib.Path(module.__file__).parent for name, module in sys.modules.items()
          if name in ("train", "utils", "model")}
report = ampscope.inspect_step(*make(), precisions=["fp32", "amp-bf16"])
print(set(map(str, places.values())), report.ok, ampscope.__file__)
"""

pytest.importorskip("setuptools", "77", reason="setuptools 77 or later builds the wheel")


def call(*words: object, **options) -> subprocess.CompletedProcess:
    """Run a command line to its end."""
    options.setdefault("env", tiny.environment())
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of the packed files, after a build of an earlier version."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "utils.py", "train.py"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "ampscope", copy / "ampscope", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, source)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    done = call(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", folder, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Return a user's folder with files that have names of this project's."""
    for name in ("utils", "train", "precision"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "model.py").write_text(
        "import torch\nfrom utils import MINE\n\ndef make():\n"
        "    return torch.nn.Linear(16, 8), torch.randn(4, 16), lambda outputs, batch: outputs.square().mean()\n"
    )
    return tmp_path


def test_the_wheel_holds_the_library_alone_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"ampscope-{ampscope.__version__}.dist-info"
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
    assert {name.split("/")[0] for name in names} == {"ampscope", info}
    assert "ampscope = ampscope.cli:main" in entries
    files = {path.name for path in (ROOT / "ampscope").iterdir() if path.is_file()}
    assert {name.split("/")[1] for name in names if name.startswith("ampscope/")} == files
    needed = {line.split(": ")[1] for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert {line.partition(">")[0] for line in needed} == {"torch", "numpy", "matplotlib"}


def test_it_works_beside_files_of_any_name(installed, theirs):
    (theirs / "program.py").write_text(SCRIPT)
    done = call(sys.executable, "program.py", cwd=theirs, env=tiny.environment(PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str({str(theirs)}), "True", str(installed / "ampscope" / "__init__.py")]


def test_its_command_inspects_their_file(installed, theirs):
    words = (sys.executable, "-m", "ampscope", "inspect", "model.py:make", "--precisions=fp32", "--out=report")
    done = call(*words, cwd=theirs, env=tiny.environment(PYTHONPATH=str(installed)))
    assert done.returncode == 0 and "no rule is broken" in done.stdout, done.stderr
    assert json.loads((theirs / "report" / "inspect.json").read_text())["ok"] is True


def test_an_editable_install_points_to_the_checkout(source, tmp_path):
    environment = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    done = call(*pip, "-e", source, env=tiny.environment(PYTHONPATH=os.pathsep.join(libraries)))
    assert done.returncode == 0, done.stdout + done.stderr
    done = call(python, "-c", "import ampscope; print(ampscope.__file__)", cwd=tmp_path)
    assert done.stdout.strip() == str(source / "ampscope" / "__init__.py")
