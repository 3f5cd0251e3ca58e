"""The waterline of each module: nothing above it, where the paper stands, uses what is defined below, but one door."""

import ast

import pytest
from conftest import ROOT

WATERLINE = "# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below "
DOORS = {"mup": "standard_normals", "lopt": "fast_update", "tasks": None, "es": "draw_key", "meta_train": "Run",
         "evaluate": "over_seeds"}
ORDER = ("mup", "lopt", "tasks", "es", "meta_train", "evaluate")
MAY_IMPORT = {"mup": set(), "lopt": {"mup"}, "tasks": {"mup", "lopt"}, "es": {"lopt"},
              "meta_train": {"mup", "lopt", "tasks", "es"}, "evaluate": {"mup", "lopt", "tasks"}}


def defined(node):
    """The names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}


def crossings(source):
    """The names defined below the waterline of a source that are used above it."""
    lines = [i for i, line in enumerate(source.splitlines(), start=1) if line.startswith(WATERLINE)]
    assert len(lines) == 1, f"{len(lines)} waterlines"
    body = ast.parse(source).body
    above, below = ([node for node in body if (node.lineno < lines[0]) == side] for side in (True, False))
    assert above and below
    names = set().union(*map(defined, below))
    return names & {x.id for node in above for x in ast.walk(node) if isinstance(x, ast.Name)}


@pytest.mark.parametrize("module", ORDER)
def test_nothing_above_the_waterline_uses_what_is_below(module):
    door = {DOORS[module]} - {None}
    assert crossings((ROOT / f"{module}.py").read_text()) == door


def test_a_crossing_is_found():
    source = f"def a():\n    return b() + C\n\n{WATERLINE}\n\ndef b():\n    return 1\n\nC: int = 2\n"
    assert crossings(source) == {"b", "C"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    """An import of one of ours is one that the order of the modules allows."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(ORDER) <= MAY_IMPORT[module]
