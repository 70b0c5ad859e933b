"""Find the lines that gave weights another type than float32, and modules their mode: observed, or read from syntax."""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.weak import WeakIdKeyDictionary

from ampscope.places import Place, class_sources, kind_of_file, line_with, users_line, users_sources
from ampscope.subject import Subject

NAMES = {
    torch.float16: {"float16", "half", "fp16"},
    torch.bfloat16: {"bfloat16", "bf16"},
    torch.float64: {"float64", "double"},
}
NO_CAST = ("autocast", "Autocast", "finfo", "isinstance", "print", "custom_fwd")
_evaluated: Any = WeakKeyDictionary()  # modules, and where they were put into evaluation mode last
_places: Any = WeakIdKeyDictionary()  # parameters, and where the user's code made them what they are
_default: list[Place] = []  # where the default type was set last


@contextlib.contextmanager
def observed() -> Iterator[None]:
    """Note which lines of the user's give weights another type than float32, and modules evaluation mode, in here."""
    apply, set_default, train = nn.Module._apply, torch.set_default_dtype, nn.Module.train

    @functools.wraps(train)
    def trained(module: nn.Module, mode: bool = True) -> Any:
        place = None if mode else users_line()
        if place is not None:
            _evaluated[module] = place
        return train(module, mode)

    @functools.wraps(apply)
    def applied(module: nn.Module, function: Any, recurse: bool = True) -> Any:
        before = {id(parameter): parameter.dtype for parameter in module._parameters.values() if parameter is not None}
        result = apply(module, function, recurse)
        for parameter in module._parameters.values():
            if parameter is not None and before.get(id(parameter)) is not parameter.dtype:
                _note(parameter, users_line())
        return result

    @functools.wraps(set_default)
    def defaulted(dtype: Any) -> None:
        set_default(dtype)
        place = users_line()
        _default[:] = [place] if place is not None else []

    def registered(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.dtype in NAMES and parameter not in _places:
            by_default = bool(_default) and parameter.dtype is torch.get_default_dtype()
            _note(parameter, _default[0] if by_default else users_line())

    hook = module_hooks.register_module_parameter_registration_hook(registered)
    nn.Module._apply = applied  # type: ignore[method-assign]
    nn.Module.train = trained  # type: ignore[method-assign,assignment]
    torch.set_default_dtype = defaulted
    try:
        yield
    finally:
        hook.remove()
        nn.Module._apply = apply  # type: ignore[method-assign]
        nn.Module.train = train  # type: ignore[method-assign]
        torch.set_default_dtype = set_default


def _note(parameter: nn.Parameter, place: Place | None) -> None:
    if place is not None and parameter.dtype in NAMES:
        _places[parameter] = place


def line_of_type(subject: Subject, parameter: nn.Parameter) -> Place | None:
    """Return the line that gave a weight its type: the observed one, or the first in the code that can do it."""
    if parameter in _places:
        return _places[parameter]
    sources = [*_sources({type(module): None for _, module in subject.named_modules()}), *users_sources()]
    trees = [(file, start, tree) for file, start, lines in sources if (tree := _parsed(lines)) is not None]
    steps = [getattr(function, "__code__", None) for function in (subject.step, subject.loss)]
    running = _running([tree for _, _, tree in trees], {code.co_name for code in steps if code is not None})
    names = NAMES[parameter.dtype]
    for file, start, tree in trees:
        known = names | _named(_parsed(linecache.getlines(file)), names)
        for node in _outside(tree, running):
            if isinstance(node, ast.Call) and _casts(node, names, known):
                return Place(file, start + node.lineno - 1, "", "user")
    return None


def line_of_evaluation(subject: Subject, name: str) -> Place | None:
    """Return the line that put a module into evaluation mode: the observed one, or the first in the code that can."""
    modules = dict(subject.named_modules())
    if modules.get(name) in _evaluated:
        return _evaluated[modules[name]]
    return line_with(r"\.eval\(|\.train\(False", [*_sources(map(type, modules.values())), *users_sources()])


def _sources(classes: Iterable[type]) -> list[tuple[str, int, list[str]]]:
    """Return (file, first line, lines) of the functions of the user's classes, and of those that they extend."""
    kinds = dict.fromkeys(base for kind in classes for base in kind.__mro__)
    return [source for kind in kinds for source in class_sources(kind) if kind_of_file(source[0]) == "user"]


def _parsed(lines: list[str]) -> ast.Module | None:
    """Return the syntax tree of some lines, None if they are a part of an expression, as those of a lambda are."""
    try:
        return ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:
        return None


def _named(tree: ast.Module | None, names: set[str]) -> set[str]:
    """Return the variables that hold one of these types."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)] if tree is not None else []
    targets = [target for node in nodes if _mentions(node.value, names) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _casts(call: ast.Call, names: set[str], known: set[str]) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in NO_CAST:
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return (name in names and not given) or any(_mentions(value, known, deep=False) for value in given)


def _mentions(node: ast.expr, names: set[str], *, deep: bool = True) -> bool:
    """Return True if an expression is one of these types by name, or `deep` inside it has one."""
    if isinstance(node, ast.Lambda) or (deep and isinstance(node, ast.Call)):
        return False
    if (
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.Constant) and node.value in names)
    ):
        return True
    parts = node.values if deep and isinstance(node, ast.Dict) else []
    return any(_mentions(part, names) for part in parts)


def _running(trees: list[ast.Module], steps: set[str]) -> set[str]:
    """Return the names of the functions that run in a step, which cast values and not weights."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, []).append(node)
    found: set[str] = set()
    waiting = ["forward", "training_step", *steps]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in found:
            found.add(name)
            bodies = [node for method in methods[name] for node in ast.walk(method)]
            waiting += [node.attr for node in bodies if isinstance(node, ast.Attribute)]
    return found


def _outside(tree: ast.AST, functions: set[str]) -> Iterator[ast.AST]:
    """Yield the nodes in the order of their lines, without the bodies of these functions."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.FunctionDef) and node.name in functions):
            yield node
            yield from _outside(node, functions)
