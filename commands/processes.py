"""How this program starts itself anew: as main.py in a checkout, as a module of the package where it is installed."""

import sys
from pathlib import Path


def own_command() -> list[str]:
    """The words that start this program in a fresh process, without its options.

    With `-P` an installed program's process finds the package, and no file of the user's current folder.
    """
    package = __package__.rpartition(".")[0]
    if package:
        return [sys.executable, "-P", "-m", package]
    return [sys.executable, str(Path(__file__).resolve().parent.parent / "main.py")]
