"""Makes amp_in_ten_minutes.ipynb from the script of the same name; a test keeps them equal.

Everything is edited in the script, which reads well and can be compared; the notebook holds no outputs. REPOSITORY is
where the badges and `git clone` lead: set it when the project is published somewhere else.

    pip install jupytext
    python notebooks/make.py
"""

import json
from pathlib import Path

import jupytext
import nbformat

REPOSITORY = "OWNER/amp-train"  # account and name on GitHub
SCRIPT = Path(__file__).with_name("amp_in_ten_minutes.py")


def notebook() -> nbformat.NotebookNode:
    """The notebook of today's script."""
    made = jupytext.reads(SCRIPT.read_text(encoding="utf-8").replace("@REPOSITORY@", REPOSITORY), fmt="py:percent")
    made.metadata = {"kernelspec": made.metadata["kernelspec"], "language_info": {"name": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # jupytext draws them by chance
        cell.metadata = {}
    return made


def text() -> str:
    made = notebook()
    nbformat.validate(made)
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCRIPT.with_suffix(".ipynb").write_text(text(), encoding="utf-8")
