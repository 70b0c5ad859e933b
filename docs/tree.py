"""Fills in the line counts of the tree in README.md, and says what the tree does not name.

python docs/tree.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ROW = re.compile(r"^([\w.]+(?:\.py|/)) +[\d,]+( lines)?( +)(?=\S)", re.MULTILINE)
COUNTED = (".py", ".ipynb", ".html", ".md")


def lines(name: str) -> int:
    """Lines of a module, or of all text files of a folder."""
    path = ROOT / name
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in COUNTED]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def tree(text: str) -> str:
    """The tree's block within README.md."""
    return re.search(r"^## Where things are\n.*?^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE).group(1)


def named(text: str) -> dict[str, int]:
    """What the tree names, each with the lines that it gives."""
    rows = re.findall(r"^([\w.]+(?:\.py|/)) +([\d,]+)", tree(text), re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in rows}


def there() -> set[str]:
    """Modules and folders that a reader finds at the top level."""
    modules = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    hidden = ("data", "checkpoint", "build", "inspect", "__pycache__")
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    kept = {name for name in folders if any((ROOT / name).rglob("*.py")) or name == "docs/"}
    return modules | (kept - {f"{name}/" for name in hidden})


def filled(text: str) -> str:
    """README.md with today's counts."""
    old = tree(text)

    def count(match: re.Match) -> str:
        word = match.group(2) or ""
        return f"{match.group(1):<17}{lines(match.group(1)):>6,}{word:<6}  "

    return text.replace(old, ROW.sub(count, old))


def main() -> int:
    text = README.read_text(encoding="utf-8")
    README.write_text(filled(text), encoding="utf-8")
    missing = sorted(there() - named(text).keys())
    gone = sorted(named(text).keys() - there())
    for title, names in (("not in the tree", missing), ("in the tree, but gone", gone)):
        if names:
            print(f"{title}: {', '.join(names)}")
    return 1 if missing or gone else 0


if __name__ == "__main__":
    sys.exit(main())
