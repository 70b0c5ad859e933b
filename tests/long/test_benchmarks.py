"""Every benchmark starts from any folder."""

import subprocess
import sys

import tiny

SCRIPTS = [file for file in sorted((tiny.ROOT / "benchmarks").glob("*.py")) if "__main__" in file.read_text()]
EACH = """
import os, runpy, sys
path = list(sys.path)
for script in sys.argv[1:]:
    for name, module in list(sys.modules.items()):  # the next one has to find the project's modules by itself
        if (getattr(module, "__file__", None) or "").startswith(ROOT):
            del sys.modules[name]
    sys.path[:] = [os.path.dirname(script), *path]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def test_a_benchmark_starts_from_any_folder(tmp_path):
    """As the documents call it, but all in one process, which imports PyTorch once."""
    command = [sys.executable, "-P", "-c", f"ROOT = {str(tiny.ROOT)!r}\n{EACH}", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS) >= 7
