"""The README says what the code does: its quotation of the update, its files and its commands.

A reader learns AMP from the quotation, so it has to be the code that runs.
"""

import inspect
import re
from pathlib import Path

import option
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quoted_update_is_the_code():
    quoted = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    body = inspect.getsource(train.update_weights).partition('"""')[2].partition('"""\n')[2]
    assert inspect.cleandoc("\n" + body) == quoted.rstrip("\n")


def test_linked_files_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_listed():
    for command in option.COMMANDS:
        assert f"| `{command}" in README
