"""Every check of the project, in one command: format, lint, types, tests. All are run, also after one has failed.

python tests/check.py              all of them; CI runs this
python tests/check.py --fix        formats the code and mends what can be mended, before it checks
python tests/check.py -k resume    other words go to pytest
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXES = (("ruff", "check", "--fix", "--quiet", "."), ("ruff", "format", "--quiet", "."))
CHECKS = (("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",), ("pytest",))


def run(words: list[str]) -> bool:
    """Runs one tool in the project's folder; returns whether it was content."""
    print(f"\n$ {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode == 0


def main(words: list[str]) -> int:
    missing = [tool for tool in ("ruff", "mypy", "pytest") if importlib.util.find_spec(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: pip install '.[dev]'", file=sys.stderr)
        return 2
    if "--fix" in words:
        for fix in FIXES:
            run(list(fix))
    given = [word for word in words if word != "--fix"]
    failed = [check[0] for check in CHECKS if not run([*check, *(given if check == ("pytest",) else [])])]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
