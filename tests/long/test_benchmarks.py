"""Every benchmark starts from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent


SCRIPTS = [file for file in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in file.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_starts_from_any_folder(script, tmp_path):
    """As the documents call it: it finds the project's modules by itself."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
