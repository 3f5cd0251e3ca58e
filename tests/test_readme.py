"""The README: its code runs, the functions that it names exist, and its commands parse."""

import importlib
import re
import shlex

import jax
from conftest import ROOT

import evaluate
import meta_train

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("mup", "lopt", "tasks", "es", "meta_train", "evaluate")


def test_the_names_in_the_readme_exist():
    names = re.findall(rf"`({'|'.join(MODULES)})\.([a-z_]\w+)", README)
    assert len(names) >= 30
    for module, name in names:
        assert name in ("py", "npz") or hasattr(importlib.import_module(module), name), name


def test_the_training_loop_runs(monkeypatch):
    """It lowers the loss of its network, which is none of ours."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    scope = {}
    exec(code.replace("range(5)", "range(40)"), scope)
    before = scope["mup"].init(scope["weights"], scope["key"], scope["p"])
    losses = [jax.jit(scope["loss"])(params, scope["x"], scope["labels"])
              for params in (scope["params"], before)]
    assert losses[0] < losses[1] - 0.5


def test_commands_and_flags_parse():
    commands = re.findall(r"python (meta_train|evaluate)\.py([^#\n`]*)", README)
    assert commands
    for module, flags in commands:
        parse = meta_train.parse if module == "meta_train" else evaluate.parse
        parse(shlex.split(flags))
    known = [parser.format_help() for parser in (meta_train.make_parser(),)]
    known += [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    for flag in set(re.findall(r"--[a-z][a-z-]+", README)):
        assert any(flag in text for text in known), flag
