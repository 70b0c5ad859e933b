"""The built wheel: one package folder, and a command that works beside a user's own files of any name.

The wheel is built from a copy of the checkout without network, and installed into an environment of its own that
sees this one's libraries. Run it alone: pytest tests/long/test_install.py
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny

import option

ROOT = tiny.ROOT
IMPORTED = "raise SystemExit('the user\\'s own file was imported')\n"
NO_PART = {"benchmarks", "build", "docs", "notebooks", "recipes", "tests"}  # of the package
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "assets", "build", "checkpoint", "data", "docs")

pytest.importorskip("setuptools", "77", reason="setuptools 77 or later builds the wheel")


def call(*words: object, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs a command line to its end."""
    options.setdefault("env", tiny.environment())
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, in which an earlier version was once built."""
    copy = tmp_path_factory.mktemp("source") / "amp-train"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    stale = copy / "build" / "lib" / "utils.py"
    stale.parent.mkdir(parents=True)
    stale.write_text(IMPORTED)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    done = call(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, source, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The folder of scripts of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--disable-pip-version-check")
    call(*pip, "--no-deps", "--no-index", "--quiet", wheel)
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    own = call(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(own) / "libraries.pth").write_text("\n".join(sorted(places)))
    return scripts


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A user's folder, with files of the project's names in it that nobody may import."""
    for name in (*(path.name for path in ROOT.glob("*.py")), "commands.py", "images.py", "reports.py"):
        (tmp_path / name).write_text(IMPORTED)
    return tmp_path


def with_path() -> dict[str, str]:
    return tiny.environment(PYTHONPATH=".")


def test_the_wheel_holds_one_package_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"amp_train-{option.VERSION}.dist-info"
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
    assert {name.split("/")[0] for name in names} == {"amp_train", info}
    assert "amp-train = amp_train.main:run" in entries
    needed = {line.split(": ")[1] for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line}
    asked = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert needed == {line for line in asked if "pytest" not in line} != set(asked)


def test_every_module_is_in_it_and_imports_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {
            name.removeprefix("amp_train/"): archive.read(name) for name in archive.namelist() if name.endswith(".py")
        }
    folders = {path.parent for path in ROOT.glob("*/*.py") if path.parent.name not in NO_PART}
    modules = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    expected = {path.relative_to(ROOT).as_posix() for path in modules} - {"setup.py"}
    assert files.keys() == expected | {"__init__.py", "__main__.py"}
    own = {path.partition("/")[0].removesuffix(".py") for path in expected}
    for path, content in files.items():
        for node in ast.walk(ast.parse(content)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & own, path
        if path in expected:  # nothing else has moved: what an error says about a line is true in a checkout, too
            assert len(content.splitlines()) == len((ROOT / path).read_bytes().splitlines())


def test_a_process_with_its_own_modules_uses_it_as_a_library(environment, foreign):
    """Every module can be imported, none of the user's is touched, and a measuring process can be spawned."""
    (foreign / "utils.py").write_text("MINE = True\n")
    (foreign / "program.py").write_text(
        "import importlib, pkgutil, sys\n"
        "import utils\n"
        "import amp_train\n"
        "from amp_train.measuring.probe import Probe\n"
        "if __name__ == '__main__':\n"
        "    for found in pkgutil.walk_packages(amp_train.__path__, 'amp_train.'):\n"
        "        if found.name != 'amp_train.__main__':\n"
        "            importlib.import_module(found.name)\n"
        "    assert utils.MINE and sys.modules['utils'] is utils and 'main' not in sys.modules\n"
        "    probe = Probe(device='cpu', precision='fp32', model_name='squeezenet1_1', image_size=33, batch_size=2)\n"
        "    print(amp_train.__version__, sorted(probe.ask('warm_up')), amp_train.__file__)\n"
        "    probe.close()\n"
    )
    version, *_, place = call(environment / "python", "program.py", cwd=foreign).stdout.split()
    assert version == option.VERSION and Path(place).is_relative_to(environment.parent)


def test_nothing_else_is_importable(environment, tmp_path):
    for name in ("utils", "main", "train", "option", "images", "commands", "setup"):
        code = f"import {name}"
        done = call(environment / "python", "-c", code, cwd=tmp_path, check=False)
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_a_training_that_it_starts_is_its_own(environment, foreign, tmp_path_factory):
    """Beside files of the same names; nor in a folder that the command does not see: with a file of Python's name."""
    code = "import subprocess; from amp_train.utils import own_command as own; subprocess.run([*own(), '--version'])"
    other = tmp_path_factory.mktemp("other")
    (other / "inspect.py").write_text(IMPORTED)
    for folder, variables in ((foreign, with_path()), (other, tiny.environment())):
        done = call(environment / "python", "-P", "-c", code, cwd=folder, env=variables)
        assert done.stdout == f"amp-train {option.VERSION}\n"


def test_torchrun_starts_it_as_a_module(environment, foreign, tmp_path_factory):
    data = tiny.draw(tmp_path_factory.mktemp("data"))
    launch = (environment / "python", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    words = tiny.words(data, foreign / "runs", "--model=squeezenet1_1", "--epochs=1")
    call(*launch, "-m", "amp_train", *words, cwd=foreign, env=with_path())
    assert tiny.config(foreign / "runs" / "run")["ranks"] == 2


def test_what_the_user_is_told_to_type_is_what_is_installed(environment, foreign):
    done = call(environment / "amp-train", "--help", cwd=foreign, env=with_path())
    assert "usage: amp-train " in done.stdout and "main.py" not in done.stdout
    words = ("prepare", "--check", "--data_dir=none")
    done = call(environment / "amp-train", *words, cwd=foreign, env=with_path(), check=False)
    assert done.returncode == 2 and "amp-train prepare --download" in done.stderr and "main.py" not in done.stderr


def test_an_editable_install_is_refused_in_one_sentence(source):
    code = "from setuptools.build_meta import build_editable; build_editable('.')"
    done = call(sys.executable, "-c", code, cwd=source, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("amp-train has no editable install: run python main.py")


@pytest.fixture(scope="module")
def rewrite():
    spec = importlib.util.spec_from_file_location("packaging_of_the_project", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.rewrite(text, "file.py")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import utils\n", "from amp_train import utils\n"),
        ("import main as program\n", "from amp_train import main as program\n"),
        ("from utils import log, wrapped  # why\n", "from amp_train.utils import log, wrapped  # why\n"),
        ("from images import demo\n", "from amp_train.images import demo\n"),
        ("from images.decode import (\n    decode,\n)\n", "from amp_train.images.decode import (\n    decode,\n)\n"),
        ("def f():\n    import option; import os\n", "def f():\n    from amp_train import option; import os\n"),
        ("name = 'é'; import utils\n", "name = 'é'; from amp_train import utils\n"),
        ("import utilsx\nfrom evaluate_x import y\nimport torch.utils\n",) * 2,
        ("text = 'import utils'  # import utils\n",) * 2,
        ("from torch import utils\nfrom torch.utils import data\n",) * 2,
        ("usage = f'python main.py {1}'\n", "usage = f'amp-train {1}'\n"),
    ],
)
def test_imports_are_rewritten_where_they_stand(rewrite, before, after):
    assert rewrite(before) == after


@pytest.mark.parametrize("text", ["import images.demo\n", "import os, utils\n", "from  utils import log\n"])
def test_a_form_that_cannot_be_rewritten_stops_the_build(rewrite, text):
    with pytest.raises(ValueError, match="file.py:1: "):
        rewrite(text)
