"""What the tests are worth: small faults are put into the lines that compute, one at a time, and the tests must fail.

python tests/mutants.py --count 100 --seed 1                 the smoke tests against 100 faults
python tests/mutants.py --count 100 --seed 1 --everything    then those in tests/long/ against the survivors
python tests/mutants.py --show 17                            the line of one fault before and after

A fault changes an operator, a comparison, a constant or a condition, or leaves out a statement, in one of the files
below; which ones are tried follows from the seed. Each is tried in a copy of the project, in a fork of a process that
has imported PyTorch once; tests that name the file in their own name run first, and the first failure ends the try.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("train", "metrics", "evaluate", "dataset", "transforms", "optimizer", "precision", "model")
FIRST = {  # tests that most probably detect a fault in the file: run before the others
    "train": ("test_train", "test_same_run", "test_resume"),
    "metrics": ("test_train", "test_training_numbers", "test_resume"),
    "evaluate": ("test_report", "test_finite", "test_train"),
    "dataset": ("test_dataset", "test_train", "test_properties"),
    "transforms": ("test_dataset", "test_pixels", "test_pictures"),
    "optimizer": ("test_train", "test_heads", "test_accuracy"),
    "precision": ("test_precision", "test_train"),
    "model": ("test_model", "test_heads", "test_train"),
}
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One fault: the change, its line and file, and the whole text of the changed file."""

    file: str
    line: int
    what: str
    text: str


def mutants_of(name: str) -> list[Mutant]:
    """Return every fault of a file, in the order of its lines."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = []
    for place, (node, changes) in enumerate(_changes(tree)):
        for number, what in enumerate(changes):
            twin = copy.deepcopy(tree)
            target, _ = list(_changes(twin))[place]
            _apply(twin, target, number)
            found.append(Mutant(name, node.lineno, what, ast.unparse(ast.fix_missing_locations(twin)) + "\n"))
    return found


def _changes(tree: ast.Module):
    """Yield the nodes of functions that can be changed, each with the names of its changes."""
    for node in _computing(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not _is_text(node):
            yield node, [f"{type(node.op).__name__} becomes {SWAPS[type(node.op)].__name__}"]
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, [f"{type(node.ops[0]).__name__} becomes {SWAPS[type(node.ops[0])].__name__}"]
        elif isinstance(node, ast.BoolOp):
            yield node, [f"{type(node.op).__name__} becomes {SWAPS[type(node.op)].__name__}"]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, [f"{type(node.op).__name__} is left out"]
        elif isinstance(node, ast.IfExp | ast.If | ast.While):
            yield node, ["the condition is turned round"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            yield node, ["the constant is another"]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, ["the call is left out"]
        elif isinstance(node, ast.AugAssign):
            yield node, ["the assignment is left out"]


def _computing(tree: ast.Module):
    """Yield the nodes within functions, without annotations, default values, messages and docstrings."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            waiting = list(function.body)
            while waiting:
                node = waiting.pop(0)
                if isinstance(node, ast.FunctionDef | ast.JoinedStr | ast.Raise):
                    continue
                yield node
                skipped = {node.annotation} if isinstance(node, ast.AnnAssign) else set()
                waiting[:0] = [child for child in ast.iter_child_nodes(node) if child not in skipped]


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(side, ast.JoinedStr | ast.Constant) and not isinstance(getattr(side, "value", 0), int | float)
               for side in (node.left, node.right))  # fmt: skip


def _apply(tree: ast.Module, node: ast.AST, number: int) -> None:
    if isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp):
        _replace(tree, node, node.operand)
    elif isinstance(node, ast.IfExp | ast.If | ast.While):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        _replace(tree, node, ast.Pass())


def _replace(tree: ast.Module, node: ast.AST, other: ast.AST) -> None:
    class Replacing(ast.NodeTransformer):
        def visit(self, found: ast.AST) -> ast.AST:
            return other if found is node else self.generic_visit(found)

    Replacing().visit(tree)


def drawn(count: int, seed: int) -> list[Mutant]:
    """Return `count` faults: the same for the same seed and the same files."""
    every = [mutant for name in FILES for mutant in mutants_of(name)]
    chosen = random.Random(seed).sample(range(len(every)), min(count, len(every)))
    return [every[place] for place in sorted(chosen)]


def tests_for(folder: Path, name: str) -> tuple[list[str], list[str], list[str]]:
    """Return the smoke tests that most probably detect the fault, the other smoke tests, and the long tests."""
    files = sorted((folder / "tests").glob("test_*.py"))
    first = [file for wanted in FIRST[name] for file in files if file.stem == wanted]
    others = [file for file in files if file not in first]
    long = sorted((folder / "tests" / "long").glob("test_*.py"))
    return [str(file) for file in first], [str(file) for file in others], [str(file) for file in long]


def tried(folder: Path, mutant: Mutant, files: list[str], seconds: float) -> str:
    """Run some tests in `folder` with one fault; return which one failed, "time" if they did not end, or ""."""
    target = folder / f"{mutant.file}.py"
    before = target.read_text(encoding="utf-8")
    target.write_text(mutant.text, encoding="utf-8")
    failed = outcome(folder, files, seconds)
    target.write_text(before, encoding="utf-8")
    return failed


def outcome(folder: Path, files: list[str], seconds: float) -> str:
    """Run some tests in a fork of this process; return which one failed, "time" if they did not end, or ""."""
    report = folder / "report.txt"
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _run(folder, files, report)
    until = time.monotonic() + seconds
    ended = 0
    while not ended and time.monotonic() < until:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "time"
    return report.read_text(encoding="utf-8") if report.exists() else "it did not end by itself"


def _run(folder: Path, files: list[str], report: Path) -> None:
    """Run pytest in the fork until a test fails, write its name to the report, and end."""
    import pytest

    class Failed:
        name = ""

        def pytest_runtest_logreport(self, report):
            if report.failed and not self.name:
                self.name = report.nodeid

        def pytest_collectreport(self, report):
            if report.failed and not self.name:
                self.name = f"{report.nodeid} (not collected)"

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    failed = Failed()
    words = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/temporary", f"--rootdir={folder}"]
    status = pytest.main([*words, *files], plugins=[failed])
    report.write_text(failed.name or ("" if status == 0 else f"exit status {int(status)}"), encoding="utf-8")
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--everything", action="store_true", help="try survivors on the long tests, too")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which a try counts as failed")
    parser.add_argument("--part", default="0/1", help="every n-th fault from the k-th on, as k/n: for two processes")
    parser.add_argument("--only", help="numbers of the faults to try, separated by commas")
    parser.add_argument("--show", type=int, help="print the fault with this number")
    options = parser.parse_args()
    chosen = drawn(options.count, options.seed)
    if options.show is not None:
        mutant = chosen[options.show]
        before = ast.unparse(ast.parse((ROOT / f"{mutant.file}.py").read_text(encoding="utf-8"))).splitlines()
        for old, new in zip(before, mutant.text.splitlines(), strict=False):
            if old != new:
                print(f"- {old}\n+ {new}")
                break
        return 0
    first, step = (int(number) for number in options.part.split("/"))
    numbers = [int(number) for number in options.only.split(",")] if options.only else range(first, len(chosen), step)
    import torch  # noqa: F401  (once, for all forks)
    import torchvision  # noqa: F401

    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for file in filter(None, names.decode().split("\0")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        first, others, long = tests_for(folder, "train")
        failed = outcome(folder, [*first, *others], options.seconds)
        if failed:
            print(f"without a fault the tests fail: {failed}", file=sys.stderr)
            return 1
        caught = Counter()
        for number in numbers:
            mutant = chosen[number]
            begun = time.monotonic()
            first, others, long = tests_for(folder, mutant.file)
            failed = tried(folder, mutant, first, options.seconds) or tried(folder, mutant, others, options.seconds)
            by = "smoke" if failed else "nothing"
            if not failed and options.everything:
                failed = tried(folder, mutant, long, 4 * options.seconds)
                by = "long" if failed else "nothing"
            caught[by] += 1
            row = {"number": number, "file": mutant.file, "line": mutant.line, "what": mutant.what, "caught by": by}
            print(json.dumps(row | {"test": failed, "seconds": round(time.monotonic() - begun)}), flush=True)
        print(f"caught by {dict(caught)} of {len(numbers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
