"""Every check of the project, in one command: format, lint, types, tests. All are run, also after one has failed.

`pytest` alone runs the smoke tests in tests/; here those in tests/long/ are run, too, shared among up to four
processes if pytest-xdist is installed. Each test uses one thread. The ten slowest are printed.

python tests/check.py              all of them; CI runs this
python tests/check.py --fix        formats the code and mends what can be mended, before it checks
python tests/check.py -k resume    other words go to pytest
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXES = (("ruff", "check", "--fix", "--quiet", "."), ("ruff", "format", "--quiet", "."))
HANG = ("-o", "faulthandler_timeout=300", "-o", "faulthandler_exit_on_timeout=true")  # seconds of one test
CHECKS = (("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",))


def run(words: list[str]) -> bool:
    """Run one tool in the project's folder; return True if it passed."""
    print(f"\n$ {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode == 0


def in_parallel() -> list[str]:
    """Return pytest's options for sharing the files of tests among processes; an empty list without pytest-xdist."""
    processes = min(4, os.cpu_count() or 1)
    if processes == 1 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(processes), "--dist", "loadfile"]


def main(words: list[str]) -> int:
    missing = [tool for tool in ("ruff", "mypy", "pytest") if importlib.util.find_spec(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: pip install '.[dev]'", file=sys.stderr)
        return 2
    if "--fix" in words:
        for fix in FIXES:
            run(list(fix))
    given = [word for word in words if word != "--fix"]
    failed = [check[0] for check in CHECKS if not run(list(check))]
    if not run(["pytest", "-o", "norecursedirs=.*", "--durations=10", *HANG, *in_parallel(), *given]):
        failed.append("pytest")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
