"""The README says what the code does: its quotation of the update, its files and its commands.

A reader learns AMP from the quotation, so it has to be the code that runs.
"""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import option
import train

ROOT = Path(train.__file__).parent
PAGES = [
    path
    for folder in (".", "docs", "recipes", "benchmarks", "notebooks")
    for suffix in ("md", "html")
    for path in sorted((ROOT / folder).glob(f"*.{suffix}"))
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quoted_update_is_the_code():
    quoted = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    body = inspect.getsource(train.update_weights).partition('"""')[2].partition('"""\n')[2]
    assert inspect.cleandoc("\n" + body) == quoted.rstrip("\n")


def load_tree():
    specification = importlib.util.spec_from_file_location("tree", ROOT / "docs/tree.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_tree_names_what_is_there():
    tree = load_tree()
    assert tree.named(README).keys() == tree.there(), "mend the tree in README.md, then run python docs/tree.py"


def test_the_trees_line_counts_are_about_right():
    """Within a quarter (a folder: a half), so that not every change of a file is one of the README."""
    tree = load_tree()
    for name, count in tree.named(README).items():
        slack = max(40, count // (2 if name.endswith("/") else 4))
        assert abs(tree.lines(name) - count) <= slack, f"{name}: run python docs/tree.py"


def slugs(page):
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Files and headings; addresses elsewhere only have to look like some."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+(?:\([^)]*\))?[^)\s]*)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or file.suffix != ".md" or anchor in slugs(file), f"{page.name} links to {target}"


def test_every_command_is_listed():
    for command in option.COMMANDS:
        assert f"| `{command}" in README


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts_from_any_folder(script, tmp_path):
    """As the documents call it: it finds the project's modules by itself."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
