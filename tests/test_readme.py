"""The README says what the code does: its quotation of the update, its files and its commands.

A reader learns AMP from the quotation, so it has to be the code that runs.
"""

import inspect
import re
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


def test_the_tree_names_what_is_there():
    """Each module and folder of code at the top level, and nothing else."""
    tree = re.search(r"^## Where things are\n.*?^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE).group(1)
    named = set(re.findall(r"^([\w.]+(?:\.py|/)) ", tree, re.MULTILINE))
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} - {"build/"}
    assert named == modules | folders


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
