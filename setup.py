"""Builds the package `amp_train` from a checkout whose modules lie at its top level.

In a checkout a module is called `train`, as everything at the top level is, so that `python main.py` and
`import train` work. Installed modules of such names would meet those of other packages; they are called
`amp_train.train`. While the wheel is built, the project's imports of its own modules are therefore rewritten:
`from utils import UserError` becomes `from amp_train.utils import UserError`. Everything else stands in pyproject.toml.
"""

import ast
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = "amp_train"
PARTS = [file.parent for file in ROOT.glob("[a-z]*/__init__.py")]  # of the package: folders that say so
FOLDERS = sorted(file.parent.relative_to(ROOT) for part in PARTS for file in part.rglob("__init__.py"))
OWN = {file.stem for file in ROOT.glob("*.py")} - {"setup"} | {folder.parts[0] for folder in FOLDERS}
GENERATED = {
    "__init__.py": f'"""amp-train, installed: the modules of a checkout, below one name."""\n\n'
    f"from {PACKAGE}.option import VERSION as __version__\n",
    "__main__.py": f'"""python -m {PACKAGE}: the same as the command amp-train; torchrun needs this form."""\n\n'
    f'from {PACKAGE}.main import run\n\nif __name__ == "__main__":\n    run()\n',
    "py.typed": "",
}


def rewrite(source: str, name: str) -> str:
    """`source` with imports of the project's own modules made imports from the package, line for line.

    What it tells the user to type as `python main.py` becomes `amp-train`. Raises ValueError, with `name`, for
    `import folder.module`, which would bind another name.
    """
    lines = source.encode().splitlines(keepends=True)
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: getattr(node, "col_offset", 0), reverse=True):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level and node.module.partition(".")[0] in OWN:
            old = f"from {node.module} import".encode()
            new = f"from {PACKAGE}.{node.module} import".encode()
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in OWN for alias in node.names):
            if len(node.names) > 1 or "." in node.names[0].name:
                raise ValueError(f"{name}:{node.lineno}: write `import module` or `from folder import module`")
            old = f"import {node.names[0].name}".encode()
            new = f"from {PACKAGE} import {node.names[0].name}".encode()
        else:
            continue
        line = lines[node.lineno - 1]
        if not line.startswith(old, node.col_offset):
            raise ValueError(f"{name}:{node.lineno}: an import that cannot be rewritten")
        lines[node.lineno - 1] = line[: node.col_offset] + new + line[node.col_offset + len(old) :]
    return b"".join(lines).decode().replace("python main.py", "amp-train")


class BuildPackage(build_py):
    """Copies the modules, rewritten, and adds what only an installed package has."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # an earlier build's modules would be packed, too
        super().run()
        package = Path(self.build_lib) / PACKAGE
        for file in package.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            file.write_text(rewrite(text, str(file.relative_to(package))), encoding="utf-8")
        for name, text in GENERATED.items():
            (package / name).write_text(text, encoding="utf-8")


class NoEditableInstall(editable_wheel):
    """A checkout's modules have other names than an installed package's, so there is nothing to point to."""

    def run(self) -> None:
        sys.exit("amp-train has no editable install: run python main.py in the checkout itself, or pip install .")


def requirements() -> list[str]:
    """requirements.txt without pytest, which only the README's second command needs."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "pytest"))]


if __name__ == "__main__":
    setup(
        packages=[PACKAGE, *(f"{PACKAGE}.{'.'.join(folder.parts)}" for folder in FOLDERS)],
        package_dir={PACKAGE: "."},
        install_requires=requirements(),
        cmdclass={"build_py": BuildPackage, "editable_wheel": NoEditableInstall},
    )
