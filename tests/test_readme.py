"""The README: its code runs, the functions that its table names exist, and its commands parse."""

import importlib
import re
import shlex

import jax
import pytest
from conftest import ROOT

import evaluate
import meta_train

README = (ROOT / "README.md").read_text()
MODULES = ("mup", "lopt", "tasks", "es", "meta_train", "evaluate")


def named(text):
    """Every `module.name` in a text, as (module, name)."""
    return re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", text)


def test_paper_to_code_names_exist():
    table = README.split("## Paper → code")[1].split("\n## ")[0]
    assert len(named(table)) >= 25
    for module, name in named(README):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_front_page_is_short():
    assert len(README.encode()) <= 8_000


def test_the_training_loop_runs(monkeypatch):
    """It lowers the loss of its network, which is none of ours."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1).replace("range(5)", "range(40)")
    scope = {}
    exec(code, scope)
    losses = [jax.jit(scope["loss"])(params, scope["x"], scope["labels"]) for params in (
        scope["params"], scope["mup"].init(scope["weights"], scope["key"], scope["p"]))]
    assert losses[0] < losses[1] - 0.5


@pytest.mark.parametrize("line", [line.strip().split("#")[0] for line in README.splitlines()
                                  if re.match(r" {4}(python (meta_train|evaluate)\.py|pip)", line)])
def test_commands_parse(line):
    """No flag of a command in the README is unknown."""
    for part in line.split("&&"):
        words = shlex.split(part)
        if "meta_train.py" in words:
            meta_train.make_parser().parse_args(words[2:])
        elif "evaluate.py" in words:
            evaluate.make_parser().parse_args(words[2:])
