"""The walls of the house: who may import whom, what stays free of torch, who configures the precision.

Read from the syntax tree, never by importing.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "ampscope",
    "command_line",
    "commands",
    "features",
    "images",
    "measuring",
    "pretrained",
    "reports",
    "runs",
    "system",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PATHS)}
HEART = [name for name in MODULES if name.partition(".")[0] not in FOLDERS]
TORCH = {"torch", "torchvision", "warmup_scheduler"}
WITHOUT_TORCH = [
    "option",
    "commands.prepare",
    *(
        name
        for name in MODULES
        if name.startswith(("command_line.", "reports.", "images.folders", "images.decode", "images.scenes"))
    ),
]


def imports(node, *, lazy: bool) -> set[str]:
    """Every module imported below `node`; with `lazy` also those that a function imports when it is called."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found |= {f"{child.module}.{alias.name}" for alias in child.names}
        found |= imports(child, lazy=lazy)
    return found


def own(names: set[str]) -> set[str]:
    """Return the project's modules among imported names, which may be `folder.module` or `module.function`."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def reached(name: str) -> set[str]:
    """All that importing a module imports, the libraries' top-level names among them."""
    found = set()
    waiting = [name]
    while waiting:
        names = imports(MODULES[waiting.pop()], lazy=False)
        found |= {imported.partition(".")[0] for imported in names}
        waiting += own(names) - found
        found |= own(names)
    return found


def test_nobody_imports_in_a_circle():
    """Nor through what a function imports when it is called."""
    graph = {name: own(imports(tree, lazy=True)) - {name} for name, tree in MODULES.items()}
    while free := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


def test_nobody_imports_upwards():
    """Nobody main, nobody but a command another command, the heart neither a report nor an inspection."""
    upwards = [
        (name, found)
        for name in set(MODULES) - {"main"}
        for found in imported(name)
        if found == "main"
        or (found.startswith("commands") and not name.startswith("commands"))
        or (name in HEART and found.startswith(("reports", "ampscope", "measuring")))
    ]
    assert upwards == []


def test_images_pass_the_modules_in_the_order_of_their_docstring():
    order = re.findall(r"`(\w+)`", ast.get_docstring(MODULES["images"]))
    names = [name.partition(".")[2] for name in MODULES if name.startswith("images.")]
    assert sorted(order) == sorted(names)
    later = {
        (name, found)
        for place, name in enumerate(order)
        for found in imported(f"images.{name}")
        if found.startswith("images.") and found.partition(".")[2] not in order[:place]
    }
    assert later == set()


def test_the_library_imports_nothing_of_the_program():
    """A picture is written by Pillow, without which matplotlib does not draw."""
    allowed = {"torch", "numpy", "matplotlib", "ampscope"}
    for name in MODULES:
        if name.startswith("ampscope"):
            names = {found.partition(".")[0] for found in imports(MODULES[name], lazy=True)}
            pillow = {"PIL"} if name == "ampscope.look" else set()
            assert not names - allowed - pillow - set(sys.stdlib_module_names), name


def test_no_torch_where_none_is_needed():
    assert not [(name, reached(name) & TORCH) for name in WITHOUT_TORCH if reached(name) & TORCH]


def imported(name: str) -> set[str]:
    return own(imports(MODULES[name], lazy=True))


def calls(name: str) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call)}


def test_precision_alone_configures_autocast_and_the_scaler():
    wanted = ("GradScaler", "autocast")
    configuring = {
        name for name in MODULES if [call for call in calls(name) if call.split(".")[-1] in wanted and "torch" in call]
    }
    setting = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any("fp32_precision" in ast.unparse(target) for target in node.targets)
    }
    # Of the program, and of the library. Layers for CPUs set the mode of oneDNN; layers kept in float32 leave autocast.
    both = {"precision", "ampscope.precisions"}
    assert (configuring, setting) == (both | {"ampscope.float32_layers"}, both | {"features.cpu_layers"})


def test_nobody_below_main_touches_the_options():
    """Below main.py and assemble.py every function takes typed groups or plain keywords."""
    may = {
        "main",
        "option",
        "command_line.helping",
        "command_line.kinds",
        "command_line.parsing",
        "command_line.groups",
        "assemble",
    }
    touching = {
        name
        for name, tree in MODULES.items()
        if not name.startswith("ampscope.")  # a library with a command of its own
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in ("Namespace", "argparse")
    }
    assert not touching - may


def test_no_deprecated_amp_and_no_half():
    for name, tree in MODULES.items():
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [text for text in attributes if "cuda.amp" in text], name
        if not name.startswith("ampscope."):  # which round on purpose
            assert not [call for call in calls(name) if call.endswith(".half")], name


def test_the_recipe_keeps_the_order_of_the_scalers_calls():
    function = next(
        node
        for node in ast.walk(MODULES["train"])
        if isinstance(node, ast.FunctionDef) and node.name == "update_weights"
    )
    source = ast.unparse(function)
    steps = (".backward()", "scaler.unscale_(", "clip_grads_with_norm_(", "scaler.step(", "scaler.update()")
    order = [source.index(step) for step in steps]
    assert order == sorted(order)
    regions = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.With)]
    assert not [text for text in regions if text.startswith("with precision.autocast()") and ".backward()" in text]
    assert not [name for name in (".item(", ".tolist(", "float(loss", ".cpu(") if name in source]  # nothing waits


def test_every_file_says_what_it_is():
    texts = {name: ast.get_docstring(tree) or "" for name, tree in MODULES.items()}
    assert not [name for name, text in texts.items() if not 1 <= len(text.splitlines()) <= 8]
