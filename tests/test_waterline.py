"""The shape of the house: the budgets, the waterline of each module, and the order of imports."""

import ast

import pytest
from conftest import ROOT

# module: (lines, lines above the waterline, what is used above and defined below, its imports)
HOUSE = {"mup": (240, 145, {"standard_normals"}, set()),
         "lopt": (1040, 395, {"fast_update", "flat", "block_sizes", "init_averages", "spread",
                              "zeros", "for_any_params", "by_average"}, {"mup"}),
         "tasks": (680, 250, set(), {"mup", "lopt"}),
         "es": (260, 170, {"draw_key", "SIDE_BY_SIDE"}, {"lopt", "tasks"}),
         "meta_train": (470, 165, set(), {"mup", "lopt", "tasks", "es"}),
         "evaluate": (500, 215, {"over_seeds", "or_inf", "summary", "check_rows"},
                      {"mup", "lopt", "tasks"})}
WATERLINE = "# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~"
SOURCES = {module: (ROOT / f"{module}.py").read_text(encoding="utf-8") for module in HOUSE}


def defined(node):
    """The names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else (
        [node.target] if isinstance(node, ast.AnnAssign) else [])
    return {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}


def crossings(source):
    """The names defined below the waterline of a source that are used above it."""
    line = source.splitlines().index(WATERLINE)
    body = ast.parse(source).body
    above, below = ([node for node in body if (node.lineno <= line) == side]
                    for side in (True, False))
    assert above and below
    names = set().union(*map(defined, below))
    return names & {x.id for node in above for x in ast.walk(node) if isinstance(x, ast.Name)}


@pytest.mark.parametrize("module", HOUSE)
def test_nothing_above_the_waterline_uses_what_is_below_but_the_doors(module):
    assert crossings(SOURCES[module]) == HOUSE[module][2]


def test_a_crossing_is_found():
    source = f"def a():\n    return b() + C\n\n{WATERLINE}\n\ndef b():\n    return 1\n\nC: int = 2\n"
    assert crossings(source) == {"b", "C"}


@pytest.mark.parametrize("module", HOUSE)
def test_imports_point_one_way(module):
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(HOUSE) <= HOUSE[module][3]


def test_the_house_keeps_its_budgets():
    for module, (lines, above, *_) in HOUSE.items():
        source = SOURCES[module].splitlines()
        assert len(source) <= lines and source.index(WATERLINE) < above, module
        assert max(map(len, source)) <= 100, module
    assert sum(len(source.encode()) for source in SOURCES.values()) <= 150_000
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")]
    assert sum(len(source.splitlines()) for source in tests) <= 3_200
    assert (ROOT / "README.md").stat().st_size <= 8_000
