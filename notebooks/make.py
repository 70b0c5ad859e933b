"""Make amp_in_ten_minutes.ipynb from the script of the same name; a test keeps them equal.

Edit the script, which reads well and can be compared; the notebook holds no outputs. The badges and `git clone` lead to
`Repository` in `[project.urls]` of pyproject.toml. While there is none, the cells that need it are left out, and the
notebook works from the folder that it lies in.

    pip install jupytext
    python notebooks/make.py
"""

import json
import tomllib
from pathlib import Path

import jupytext
import nbformat

SCRIPT = Path(__file__).with_name("amp_in_ten_minutes.py")
MARK = "@REPOSITORY@"


def public_address() -> str:
    """Return the address of the repository, or an empty string if the project is not published."""
    project = tomllib.loads((SCRIPT.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def notebook(address: str) -> nbformat.NotebookNode:
    """Return the notebook of the script as it is, with links to this address."""
    made = jupytext.reads(SCRIPT.read_text(encoding="utf-8"), fmt="py:percent")
    made.metadata = {"kernelspec": made.metadata["kernelspec"], "language_info": {"name": "python"}}
    made.cells = [cell for cell in made.cells if address or MARK not in cell.source]
    for number, cell in enumerate(made.cells):
        cell.source = cell.source.replace(MARK, address.removeprefix("https://github.com/"))
        cell.id = f"cell-{number}"  # jupytext chooses random ones
        cell.metadata = {}
    return made


def text() -> str:
    """Return the file of the notebook."""
    made = notebook(public_address())
    nbformat.validate(made)
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCRIPT.with_suffix(".ipynb").write_text(text(), encoding="utf-8")
