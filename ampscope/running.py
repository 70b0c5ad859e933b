"""Run somebody's program in this process as Python itself would start it."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from ampscope.places import TOOL, count_file_as_users


class Ended(BaseException):
    """Raised inside the program when all that was wanted has been seen; no `except Exception` stops it."""


@dataclass
class Outcome:
    """How a program ended: `status` is what Python would have exited with, `error` what it raised, if it did."""

    status: int = 0
    error: BaseException | None = None
    ended: bool = False


@dataclass
class Program:
    """A script or, with `module`, a module by its name; and the arguments that it gets."""

    name: str
    arguments: list[str] = field(default_factory=list)
    module: bool = False

    @property
    def command(self) -> str:
        return " ".join([*(["-m"] if self.module else []), self.name, *self.arguments])

    def run(self) -> Outcome:
        """Run the program to its end, to an error, or until something raises Ended in it."""
        kept = sys.argv, [*sys.path], sys.modules["__main__"]
        sys.argv = [self.name, *self.arguments]
        if not sys.flags.safe_path:  # then it is the folder of whoever started this process
            del sys.path[0]
        try:
            self._start()
        except Ended:
            return Outcome(ended=True)
        except SystemExit as error:
            return Outcome(status=_status(error))
        except BaseException as error:
            return Outcome(status=130 if isinstance(error, KeyboardInterrupt) else 1, error=error)
        finally:
            sys.argv, sys.path[:], sys.modules["__main__"] = kept
        return Outcome()

    def _start(self) -> None:
        if self.module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        elif Path(self.name).is_dir():
            runpy.run_path(self.name, run_name="__main__")
        else:
            file = os.path.abspath(self.name)
            sys.path.insert(0, str(Path(file).resolve().parent))
            count_file_as_users(file)
            main = ModuleType("__main__")
            main.__dict__.update(__file__=file, __builtins__=__builtins__, __spec__=None, __cached__=None)
            sys.modules["__main__"] = main
            # As in a start by Python, the name is what the user wrote: tracebacks show it.
            exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), main.__dict__)


def _status(error: SystemExit) -> int:
    """Return the exit status that SystemExit asks for; print its text, as Python does."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)
    return 1


def show_traceback(error: BaseException) -> None:
    """Print the traceback that the program would have had by itself."""
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, error.__traceback__)
        return
    shown = traceback.TracebackException.from_exception(error)
    _without_tool(shown)
    print("".join(shown.format()), end="", file=sys.stderr)


def _without_tool(shown: traceback.TracebackException) -> None:
    """Leave out the frames of this package, and of what it starts the program with."""
    hidden = (TOOL, "<frozen runpy>", runpy.__file__)
    shown.stack[:] = [frame for frame in shown.stack if not frame.filename.startswith(hidden)]
    for other in (shown.__cause__, shown.__context__, *(getattr(shown, "exceptions", None) or [])):
        if other is not None:
            _without_tool(other)
