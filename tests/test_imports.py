"""The import rules of the design: who may know whom, what stays free of torch, who touches the scaler.

Read from the syntax tree, never by importing. Run it alone: pytest tests/test_imports.py
"""

import ast

import pytest
from conftest import ROOT

FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}

# What each file may import of the project; main.py may import all.
MAY = {
    "option": {"utils"},
    "assemble": {"option", "dataset", "model", "precision", "prepare", "run", "train", "utils"},
    "job": {"utils"},
    "precision": {"option", "utils"},
    "model": {"utils"},
    "images": {"utils"},
    "dataset": {"images", "utils"},
    "scenes": set(),
    "prepare": {"dataset", "scenes", "utils"},  # dataset for --check alone
    "train": {"dataset", "evaluate", "model", "precision", "run", "utils"},
    "evaluate": {"dataset", "precision", "utils"},
    "predict": {"dataset", "evaluate", "images", "precision", "report", "utils"},
    "run": {"model", "utils"},
    "verify": {"dataset", "run", "train", "utils"},
    "results": {"option", "utils"},
    "report": {"images", "results", "utils"},  # images to show photographs
    "html_report": {"report", "results", "utils"},
    "compare": {"dataset", "html_report", "option", "precision", "report", "results", "run", "utils"},
    "export": {"dataset", "utils"},
    "inspector": {"precision", "probe", "report", "utils"},
    "probe": {"dataset", "images", "model", "precision", "train", "utils"},
    "doctor": {"dataset", "inspector", "model", "option", "precision", "probe", "utils"},
    "utils": set(),
}
HEAVY = {"torch", "torchvision", "warmup_scheduler"}
WITHOUT_TORCH = ("option", "results", "report", "html_report", "prepare", "scenes")


def tree(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported(node, *, type_checking=False):
    """Top-level names of every import below `node`; those for type checkers alone are left out."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found.add(child.module.split(".")[0])
        found |= imported(child)
    return found


def test_every_file_has_its_rule():
    assert set(FILES) - {"main"} == set(MAY)


@pytest.mark.parametrize("name", sorted(MAY))
def test_a_file_imports_only_whom_it_may_know(name):
    assert imported(tree(name)) & set(FILES) - {name} <= MAY[name]


def test_what_trains_can_be_read_in_an_evening():
    """CONTRIBUTING.md promises how long main.py and all that a training loads are; results and pictures come after."""
    reached, waiting = set(), ["main", "assemble"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        heads = [node for node in tree(name).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        waiting += imported(ast.Module(heads, [])) & set(FILES) - reached
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("The others each serve")[0]
    assert reached == {name for name in FILES if f"| `{name}.py` |" in listed}
    assert sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in reached) <= 3400


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_where_none_is_needed(name):
    """Nor through a file that it imports at its head."""
    assert not imported(tree(name)) & HEAVY
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        heads = [node for node in tree(current).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in heads if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in heads if isinstance(node, ast.ImportFrom)}
        assert not {found.split(".")[0] for found in names} & HEAVY, current
        waiting += [found for found in names & set(FILES) if found not in reached]
        reached |= names


def calls(name):
    return {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("name", sorted(set(MAY) | {"main"}))
def test_precision_alone_configures_autocast_and_the_scaler(name):
    configures = {call for call in calls(name) if call.split(".")[-1] in ("GradScaler", "autocast") and "torch" in call}
    assert bool(configures) == (name == "precision"), configures
    assigned = [ast.unparse(target) for node in ast.walk(tree(name)) if isinstance(node, ast.Assign)
                for target in node.targets]
    assert name == "precision" or not [target for target in assigned if "fp32_precision" in target]


@pytest.mark.parametrize("name", sorted(set(MAY) - {"option", "assemble"}))
def test_nobody_below_main_touches_the_options(name):
    """Below main.py and assemble.py every function takes plain keywords."""
    names = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
    assert not names & {"Namespace", "argparse"}


def test_no_deprecated_amp_and_no_half():
    for name in FILES:
        attributes = {ast.unparse(node) for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)}
        assert not [text for text in attributes if "cuda.amp" in text], name
        if name not in ("inspector", "probe"):  # which round numbers on purpose, to see what is lost
            assert not [call for call in calls(name) if call.endswith(".half")], name


def test_the_recipe_keeps_the_order_of_the_scalers_calls():
    function = next(node for node in ast.walk(tree("train"))
                    if isinstance(node, ast.FunctionDef) and node.name == "update_weights")
    source = ast.unparse(function)
    steps = (".backward()", "scaler.unscale_(", "clip_grads_with_norm_(", "scaler.step(", "scaler.update()")
    order = [source.index(step) for step in steps]
    assert order == sorted(order)
    assert not [name for name in (".item(", ".tolist(", "float(loss", ".cpu(") if name in source]  # nothing waits


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_says_what_it_is_in_three_lines_or_so(name):
    text = ast.get_docstring(tree(name))
    assert text and 2 <= len(text.splitlines()) <= 8
