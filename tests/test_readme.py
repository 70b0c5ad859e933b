"""The README and the pages of docs/ say what the code does, and can be found.

A reader learns AMP from the quotation of the update, so it has to be the code that runs.
"""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import tiny

import train
from command_line.parsing import parse

ROOT = Path(train.__file__).parent
PAGES = [
    path
    for folder in (".", "docs", "recipes", "benchmarks", "notebooks", "ampscope", "ampscope/docs")
    for suffix in ("md", "html")
    for path in sorted((ROOT / folder).glob(f"*.{suffix}"))
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def test_quoted_update_is_the_code():
    quoted = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    body = inspect.getsource(train.update_weights).partition('"""')[2].partition('"""\n')[2]
    assert inspect.cleandoc("\n" + body) == quoted.rstrip("\n")


def test_the_tree_names_what_is_there():
    """Name each module and folder of code at the top level, and nothing else."""
    tree = re.search(r"^## Where things are\n.*?^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE).group(1)
    named = re.findall(r"\w+(?:\.py|/)", re.sub(r" {2,}.*", "", tree))
    modules = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} - {"build/"}
    assert set(named) == modules | folders and len(named) == len(set(named))


def test_the_test_command_is_what_ci_calls():
    command = re.search(r"pip install -r (\S+) && (pytest)", README).groups()
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(word in script for word in command)


def test_every_page_is_short():
    pages = [ROOT / "README.md", *(page for page in PAGES if page.parent.name in ("docs", "ampscope"))]
    lengths = {str(page): len(page.read_text(encoding="utf-8").splitlines()) for page in pages if page.suffix == ".md"}
    assert not {name: lines for name, lines in lengths.items() if lines > 200}


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\((\w+\.(?:md|html))[)#]", DOCS["index.md"] + DOCS["errors.md"]))
    pages = {path.name for suffix in ("md", "html") for path in (ROOT / "docs").glob(f"*.{suffix}")}
    assert linked == pages - {"index.md"}


def test_the_page_of_options_is_that_of_the_code():
    """Run `python docs/options.py` after a change of an option."""
    module = tiny.module_of(ROOT / "docs/options.py")
    assert DOCS["options.md"] == module.page(), "run python docs/options.py"


def test_the_page_of_files_names_each_file_and_key_of_a_run(data, tmp_path):
    assert tiny.train(data, tmp_path) == 0
    run = tmp_path / "run"
    named = set(re.findall(r"`(\w+(?:\.\w+)?)`", DOCS["run_files.md"]))
    files = {path.name for path in run.iterdir()}
    keys = {*tiny.metrics(run)[0], *json.loads((run / "result.json").read_text(encoding="utf-8"))}
    assert not files - named and not keys - named


def slugs(page):
    """Return the anchors that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(text):
    """Return the command lines for main.py on a page, those with placeholders left out."""
    lines = re.findall(r"(?:python|torchrun.*?) main\.py( [^\n`|]*)", text.replace("\\\n", " "))
    return [line.partition("&&")[0] for line in lines if "COMMAND" not in line and "OPTIONS" not in line]


def test_commands_are_accepted():
    """Parse each command that a reader may copy. Those of the CHANGELOG were right when they were written."""
    pages = [page for page in PAGES if page.suffix == ".md" and page.name != "CHANGELOG.md"]
    found = [line for page in pages for line in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 40
    for line in found:
        parse(shlex.split(line, comments=True))


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
