"""The README: its code runs, the functions that its table names exist, and its commands parse."""

import dataclasses
import importlib
import re
import shlex

import jax
import pytest
from conftest import ROOT

import evaluate
import lopt
import meta_train
import tasks

README = (ROOT / "README.md").read_text()
HOW = (ROOT / "results" / "README.md").read_text().split("## How each file was made")[1]
THETA = dict(re.findall(r"^\| `(\w+)\.npz` \| (.*?) \|", HOW, re.M))  # {name: its flags, in words}
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


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "results").glob("*.npz")))
def test_shipped_theta_have_the_flags_that_made_them(name):
    """What results/README.md says of a θ are the settings in its file, and so for the θ that it began with."""
    short = {word: " ".join(flags.split()) for word, flags in re.findall(r"\b([A-Z]+) (?:stands )?for\s+`([^`]*)`", HOW)}
    stages = []
    for flags in re.findall("`(.*?)`", THETA[name]):
        words = shlex.split(" ".join(short.get(word, word) for word in flags.split()))
        stages.append(stages.pop() + words if "--resume" in words else words)
    made = lopt.load(ROOT / "results" / f"{name}.npz").made
    for words in reversed(stages):
        given = tasks.given_flags(meta_train.make_parser().parse_args(words), meta_train.Settings)
        settings, recorded = meta_train.Settings(**meta_train.preset_settings("laptop", given)), made["settings"]
        settings = dataclasses.replace(settings, step_mult=meta_train.without_theta(settings).step_mult)
        if recorded["step_mult"] is None:
            recorded["step_mult"] = meta_train.STEP_MULT[settings.parametrization]
        apart = {"data_dir", "first_theta"} | ({"start"} if settings.first_theta else set())
        for field in dataclasses.fields(settings):
            was = recorded.get(field.name, field.default)
            was = tuple(was) if isinstance(was, list) else was
            assert field.name in apart or was == getattr(settings, field.name), field.name
        made = made.get("origin")
