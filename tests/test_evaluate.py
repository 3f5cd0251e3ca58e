"""Evaluation: tuning, tables and their CSV, what diverged, shared batches, the coordinate check, bad input, kills."""

import csv
import errno
import functools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side, size_of_files_limited

import evaluate
import lopt
import mup
import tasks
from evaluate import BASELINES, Hyper

TINY = ["--widths", "8", "16", "--depth", "1", "--batch-size", "8", "--seeds", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def dataset():
    """300 random images of 10 classes, 200 of them for training."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(300, 4, 4, 1), dtype=np.uint8), np.arange(300, dtype=np.int32) % 10
    split = lambda part: tasks.Split(jax.numpy.asarray(images[part]), jax.numpy.asarray(labels[part]))
    return tasks.Dataset("random", 10, (0.5,), (0.3,), split(slice(200)), split(slice(200, 300)))


@pytest.fixture(autouse=True)
def in_process(monkeypatch, dataset):
    """The command line without files, in a process whose devices are set up already."""
    monkeypatch.setattr(tasks, "load_data", lambda settings, download=False: dataset)
    monkeypatch.setattr(tasks, "set_up_devices", lambda divides: None)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nothing here runs for long enough to gain from XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def theta(tmp_path):
    """A file with a fresh θ, in μP."""
    path = tmp_path / "mine.npz"
    lopt.save(path, lopt.Learned(lopt.init_theta(jax.random.key(0)), step_mult=0.01))
    return str(path)


def command(*argv):
    return tasks.run_command(evaluate.run, "evaluate.py", [str(word) for word in argv])


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_width_sweep_prints_what_it_writes(tmp_path, capsys):
    out = tmp_path / "out"
    assert command(*TINY, "--baselines", "adamw", "--tune", "both", "--out", out) == 0
    rows = read(out / "width.csv")
    assert [(row["optimizer"], row["tuned"], row["width"]) for row in rows] == [
        ("adamw", how, width) for width in ("8", "16") for how in ("transfer", "per-width")]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = printed.index(list(evaluate.COLUMNS["table"]))
    assert printed[start + 1:start + 1 + len(rows)] == [list(row.values()) for row in rows]
    assert all(1.5 < float(row["loss"]) < 3.4 and float(row["std"]) > 0 and row["steps"] == "4" for row in rows)
    assert all(1.5 < float(row["test_loss"]) and 0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert rows[0]["hidden_lr_mult"] == "-"
    assert float(rows[0]["learning_rate"]) == float(rows[2]["learning_rate"]) > 0
    assert rows[0]["loss"] == rows[1]["loss"]  # at the first width both ways of tuning are one
    assert [path.name for path in out.iterdir()] == ["width.csv"]

    assert command(*TINY, "--baselines", "adamw", "--out", out) == 2
    assert "width.csv: is already there" in capsys.readouterr().err


def test_losses_are_those_of_tasks_train(dataset):
    """One seed of a sweep is `tasks.train` under the same key, for each contender: hence they share batches."""
    task_in = functools.partial(tasks.task_of, tasks.TaskSettings(batch_size=8), dataset, 8, 1)
    keys = evaluate.seed_keys(jax.random.key(3), 2)
    np.testing.assert_array_equal(jax.random.key_data(keys),
                                  jax.random.key_data(evaluate.seed_keys(jax.random.key(3), 5)[:2]))
    muadam = BASELINES["muadam"]
    parametrization = mup.Parametrization("mup", *muadam.start[2:])
    learned = evaluate.Contender("mine", parametrization, functools.partial(
        evaluate.of_theta, lopt.Learned(lopt.init_theta(keys[0]), 0.01), 0.0))

    def in_sweep(contender):
        train, _ = evaluate.compiled(contender, task_in, 3, 2)
        return np.asarray(train(contender.start, keys, dataset.train)[1])

    of_adam, of_learned = side_by_side(in_sweep, (muadam, learned))
    task = task_in(parametrization)
    adam = lopt.adamw(muadam.start.learning_rate, update_multipliers=task.update_multipliers)
    alone = jax.jit(lambda key: tasks.train(task, lambda num_steps: adam, dataset.train, key, 3)[1])
    np.testing.assert_allclose(of_adam, [alone(key) for key in keys], rtol=1e-5)
    np.testing.assert_allclose(of_learned[:, 0], of_adam[:, 0], rtol=1e-6)  # same weights and batch
    assert of_adam[0, 0] != of_adam[1, 0]


@pytest.mark.parametrize("seeds", [1, 5, 8, 9, 11])
def test_any_number_of_seeds_fits_the_devices(seeds):
    """Each seed in its place, whether the eight devices divide them or not, or are more."""
    trees = {"key": evaluate.seed_keys(jax.random.key(0), seeds), "x": jnp.arange(seeds * 2.0).reshape(seeds, 2)}

    def function(hyper, tree, split):
        return hyper * tree["x"] + split, jax.random.uniform(tree["key"])

    assert len(jax.devices()) == 8
    y, draws = evaluate.over_seeds(function, seeds)(3.0, trees, 1.0)
    np.testing.assert_array_equal(y, 3 * trees["x"] + 1)
    np.testing.assert_array_equal(draws, jax.vmap(jax.random.uniform)(trees["key"]))


def test_hyperparameters_reach_the_network(dataset):
    """A field of Hyper changes the losses of the baselines for which it is tuned. Of others it does nothing in SP, or
    is 0, as the weight decay."""
    task_in = functools.partial(tasks.task_of, tasks.TaskSettings(batch_size=8), dataset, 8, 2)
    keys = evaluate.seed_keys(jax.random.key(0), 1)
    for name in ("muadam", "adamw", "adamw_cosine"):
        train, _ = evaluate.compiled(BASELINES[name], task_in, 4, 1)
        start = BASELINES[name].start
        losses = lambda hyper: np.asarray(train(hyper, keys, dataset.train)[1])
        changed = {field for field in Hyper._fields
                   if not np.allclose(losses(start), losses(start._replace(**{field: 2 * getattr(start, field)})))}
        assert changed == set(BASELINES[name].factors)


def test_a_cosine_ends_at_a_learning_rate_of_0():
    """After the planned steps nothing moves; before the first, all as without a cosine."""
    task_in = lambda parametrization: types.SimpleNamespace(update_multipliers=1.0)
    params = {"w": jnp.ones((2, 3))}

    def update_at(name, t):
        contender = BASELINES[name]
        optimizer = contender.on(task_in, contender.start)[1](100)
        state = optimizer.init(params)._replace(step=jnp.int32(t))
        return np.asarray(optimizer.update(params, state, params)[0]["w"])

    np.testing.assert_allclose(update_at("adamw_cosine", 0), update_at("adamw_decay", 0), rtol=1e-6)
    np.testing.assert_allclose(update_at("adamw_cosine", 50), update_at("adamw_decay", 50) / 2, rtol=1e-5)
    np.testing.assert_allclose(update_at("adamw_cosine", 100), 0.0, atol=1e-10)
    assert np.all(update_at("adamw_decay", 100) < 0)


def test_diverged_runs_are_named_and_counted():
    losses = np.full((3, 40), 2.0)
    losses[0, -1], losses[1, -2:] = np.nan, 4.0
    text = lambda row, *columns: tuple(evaluate.cell(row, column) for column in columns)
    row = evaluate.summary(losses, max_loss=3.4)
    assert text(row, "loss", "diverged", "std", "seeds") == ("diverged", "2", "-", "3")
    losses[0], losses[1] = 2.5, 3.0
    row = evaluate.summary(losses, max_loss=3.4)
    assert text(row, "loss", "diverged", "std") == ("2.5000", "0", "0.4082")
    assert row["loss"] == 2.5 and row["diverged"] == 0
    losses = np.array([[1.0, 2.0, 9.0], [np.inf, 4.0, 2.0]])
    assert [row["loss"] for row in evaluate.smooth(losses, 5.0)] == [np.inf, 3.0, np.inf]


def test_each_theta_runs_by_its_metadata_and_divergence_is_no_nan(theta, tmp_path, monkeypatch, capsys):
    learned, wild = lopt.load(theta), tmp_path / "wild.npz"
    lopt.save(wild, learned._replace(step_mult=1e30, parametrization=mup.SP))
    assert command(*TINY, "--widths", "8", "--theta", wild, "--theta", theta, "--out", tmp_path) == 0
    diverged, mine = read(tmp_path / "width.csv")
    assert (diverged["optimizer"], diverged["loss"], diverged["diverged"], diverged["test_loss"]) == (
        "wild", "diverged", "2", "-")
    assert (mine["optimizer"], mine["tuned"], mine["diverged"], mine["learning_rate"]) == ("mine", "-", "0", "-")
    assert 1.5 < float(mine["loss"]) < 3.4 and float(mine["test_loss"]) > 1.5
    assert "nan" not in capsys.readouterr().out + (tmp_path / "width.csv").read_text()
    parametrization = mup.Parametrization("mup", 1.0, 3.0, 1.0, 8)
    lopt.save(wild, learned._replace(parametrization=parametrization))
    [contender] = evaluate.load_contenders(evaluate.Settings(theta=(str(wild),)))
    monkeypatch.setattr(lopt, "learned_optimizer", lambda *given: given)
    task_in = lambda found: types.SimpleNamespace(name=found, update_multipliers="some", gradient_multiplier=4.0)
    task, make_optimizer = contender.on(task_in, contender.start)
    assert task.name == parametrization
    made, *multipliers, num_steps = make_optimizer(7)
    assert (made.step_mult, *multipliers, num_steps) == (0.01, "some", 4.0, 7)


def test_tune_walks_to_the_optimum():
    tried = []

    def loss_of(hyper):
        tried.append(hyper)
        if hyper.learning_rate > 0.5:
            return np.inf
        return (np.log2(hyper.learning_rate / 0.064) + np.log2(hyper.output_mult) / 2 - 1) ** 2 + hyper.input_mult

    best = evaluate.tune(loss_of, Hyper(0.001), {"learning_rate": 2.0, "output_mult": 4.0}, rounds=2)
    assert (best.learning_rate, best.output_mult) == (0.128, 1.0)
    assert len(tried) == len(set(tried)) < 15


def test_transfer_and_per_width_tuning():
    """The optimum halves at each size: transfer keeps the first, per-width follows and tunes no multipliers."""
    sizes = [evaluate.Size(width, 3, 10) for width in (32, 64, 128)]
    loss_at = lambda size, hyper: (np.log2(hyper.learning_rate * size[0] / 32 / 0.032) ** 2
                                   + np.log2(hyper.output_mult * size[0] / 32) ** 2)
    choose = lambda how: list(evaluate.hyperparameters(BASELINES["muadam"], how, sizes, loss_at))
    both = choose("both")
    assert [c["transfer"].learning_rate for c in both] == [0.032] * 3
    assert [c["per-width"].learning_rate for c in both] == [0.032, 0.016, 0.008]
    assert [c["per-width"].output_mult for c in both] == [1.0] * 3
    assert choose("transfer") == [{"transfer": c["transfer"]} for c in both]
    assert choose("per-width") == [{"per-width": c["per-width"]} for c in both]
    assert choose("none") == [{"none": BASELINES["muadam"].start}] * 3

    loss_at = lambda size, hyper: (np.log2(hyper.learning_rate / 0.004) ** 2
                                   + np.log(hyper.weight_decay * size.width / 3.2) ** 2)
    tuned = evaluate.hyperparameters(BASELINES["adamw_decay"], "per-width", [sizes[0], evaluate.Size(128, 3, 10)],
                                     loss_at)
    assert [choice["per-width"][:2] for choice in tuned] == [(0.004, 0.1), (0.004, 0.025)]


def test_horizon_and_depth_sweeps(tmp_path):
    assert command(*TINY[:-2], "--sweep", "horizon", "--widths", "8", "--baselines", "adamw", "--tune", "none",
                   "--lengths", "20", "60", "200", "500", "--out", tmp_path) == 0
    rows, curve = read(tmp_path / "horizon.csv"), read(tmp_path / "horizon-curves.csv")
    assert [row["steps"] for row in rows] == ["20", "60", "200", "500"]
    assert all(float(row["test_loss"]) > 0 for row in rows)
    longest = [row for row in curve if row["steps"] == "500"]
    assert len(curve) == 20 + 60 + 200 + 167 and longest == curve[-167:]
    assert longest[0]["step"] == "3" and longest[-1]["step"] == "500"
    assert float(longest[-1]["loss"]) < float(longest[0]["loss"])
    assert [row["loss"] for row in curve[20:40]] == [row["loss"] for row in curve[:20]]  # only the lengths differ

    assert command("--sweep", "depth", "--depths", "1", "2", "--widths", "8", "--batch-size", "8", "--steps", "3",
                   "--baselines", "adamw", "--tune", "none", "--name", "deep", "--out", tmp_path) == 0
    assert [(row["width"], row["depth"]) for row in read(tmp_path / "deep.csv")] == [("8", "1"), ("8", "2")]


def test_slope_of_known_powers():
    widths = np.array([16, 64, 256])
    values = np.stack([3.0 * widths ** 0.5, widths ** -1.0, np.full(3, 7.0), [1, 0, 1], [1, np.nan, 1]], axis=1)
    np.testing.assert_allclose(tasks.slope(widths, values), [0.5, -1.0, 0.0, np.nan, np.nan], atol=1e-12)


def test_coordinate_check_measures_the_change(dataset):
    """Against the definition: `tasks.train` from the start to each mark."""
    task, make_adam = tasks.mlp_task(dataset, 8, 1, 8, mup.SP), lambda num_steps: lopt.adamw(0.01)
    keys = evaluate.seed_keys(jax.random.key(1), 2)
    check = jax.vmap(lambda key: tasks.coordinate_check(task, make_adam, dataset.train, key, [1, 5]))
    found = jax.jit(check)(keys)
    assert {layer: [x.shape for x in squares] for layer, squares in found.items()} == {
        "layer_0": [(2, 2)] * 2, "logits": [(2, 2)] * 2}

    @jax.jit
    def by_definition(key):
        inputs, _ = task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), 0), dataset.train)
        networks = [task.init(jax.random.fold_in(key, 0)),
                    *(tasks.train(task, make_adam, dataset.train, key, mark)[0] for mark in (1, 5))]
        first, *later = (task.forward(params, inputs)[1]["logits"] for params in networks)
        return later, [x - first for x in later]

    rms = lambda x: np.sqrt(np.mean(np.square(x), axis=(0, 2, 3)))
    for squares, expected in zip(found["logits"], zip(*(by_definition(key) for key in keys))):
        np.testing.assert_allclose(np.sqrt(np.mean(squares, axis=0)), rms(np.array(expected)), rtol=1e-4)


def test_coordinate_check_sweep(tmp_path, capsys):
    assert command(*TINY, "--sweep", "coordinate-check", "--baselines", "muadam", "--tune", "none",
                   "--steps", "10", "--out", tmp_path) == 0
    rows = read(tmp_path / "coordinate-check.csv")
    assert [(row["width"], row["layer"], row["step"]) for row in rows] == [
        (width, layer, step) for width in ("8", "16") for layer in ("layer_0", "logits") for step in ("1", "10")]
    by = {(row["width"], row["layer"], row["step"]): row for row in rows}
    assert by["8", "layer_0", "1"]["rms_change"] == "0"  # the read-out is 0 at first, hence all gradients below it
    assert by["8", "layer_0", "1"]["slope"] == "-"
    changes = [float(by[width, "logits", "10"]["rms_change"]) for width in ("8", "16")]
    assert float(by["8", "logits", "10"]["slope"]) == pytest.approx(np.log2(changes[1] / changes[0]), abs=2e-3)
    assert "RMS change of the pre-activations" in capsys.readouterr().out


@pytest.mark.parametrize("sweep", evaluate.SWEEPS)
def test_figures(sweep):
    pytest.importorskip("matplotlib")
    x = evaluate.FIGURES[sweep][0]
    common = {"optimizer": "a", "tuned": "-", "width": 8, "depth": 3, "layer": "logits", "step": 1}
    rows = [common | {x: 8, "loss": 1.5, "std": 0.1, "rms_change": 0.3},
            common | {x: 16, "loss": np.inf, "std": np.nan, "rms_change": np.inf}]
    drawn = [evaluate.figure(sweep, rows, "title", known) for known in ([], [8, 8], [8, 16])]
    assert all(png.startswith(b"\x89PNG") for png in drawn)
    assert len(set(drawn)) == (3 if sweep == "width" else 1)  # the widths of meta-training are seen, of one θ or more


def test_missing_matplotlib_is_said_at_once(theta, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert command("--theta", theta, "--plot", "--out", tmp_path / "new") == 2
    assert capsys.readouterr().err.strip().endswith("pip install matplotlib, or leave --plot out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "nothing to evaluate"),
    (["--theta", "absent.npz"], "absent.npz: cannot be read"),
    (["--theta", "a.npz", "a.npz"], "--theta a.npz a.npz: one is given twice"),
    (["--baselines", "sgd"], "invalid choice: 'sgd'"),
    (["--baselines", "adamw", "adamw"], "--baselines adamw adamw: one is given twice"),
    (["--baselines", "adamw", "--decay", "1e-3"], "--decay 0.001: there is no --theta"),
    (["--baselines", "adamw", "--step-mult", "0.02"], "--step-mult 0.02: there is no --theta"),
    (["--baselines", "adamw", "--cooldown", "0.3"], "--cooldown 0.3: there is no --theta"),
    (["--baselines", "adamw", "--cooldown", "1.5"], "--cooldown 1.5: must be between 0 and 1"),
    *[(["--baselines", "adamw", "--tune", "none", *more], f"{more[0]}: nothing is tuned here") for more in (
        ("--tune-theta", "input_mult"), ("--tune-steps", "3"), ("--tune-seeds", "2"))],
    (["--theta", "a.npz", "--tune-seeds", "2"], "--tune-seeds: nothing is tuned here"),
    (["--baselines", "adamw", "--tune-theta", "input_mult"], "--tune-theta input_mult: there is no --theta in μP"),
    (["--baselines", "adamw", "--tune-theta", "input_mult", "input_mult"], "input_mult input_mult: one is given twice"),
    (["--sweep", "length"], "invalid choice: 'length'"),
    (["--baselines", "adamw", "--steps", "0"], "--steps 0: must be between"),
    (["--baselines", "adamw", "--seeds", "-1"], "--seeds -1: must be between"),
    (["--baselines", "adamw", "--tune-steps", "0"], "--tune-steps 0: must be between"),
    (["--baselines", "adamw", "--widths", "0"], "must be at least 1"),
    (["--baselines", "adamw", "--widths", "8", "8"], "--widths 8 8: one is given twice"),
    (["--baselines", "adamw", "--depths", "3"], "--depths belongs to --sweep depth"),
    (["--baselines", "adamw", "--sweep", "depth", "--depth", "3"], "--depths belongs to --sweep depth"),
    (["--baselines", "adamw", "--sweep", "depth", "--depths", "3", "0"], "--depths 3 0: must be between"),
    (["--baselines", "adamw", "--sweep", "horizon", "--steps", "3"], "--lengths belongs to --sweep horizon"),
    (["--baselines", "adamw", "--lengths", "3"], "--lengths belongs to --sweep horizon, --steps to the other sweeps"),
    (["--baselines", "adamw", "--sweep", "horizon", "--lengths", "3", "3"], "--lengths 3 3: one is given twice"),
    (["--baselines", "adamw", "--sweep", "coordinate-check", "--widths", "8"], "needs two or more"),
    (["--baselines", "adamw", "--name", "a/b"], "--name 'a/b': must be the beginning of a file name"),
    (["--baselines", "adamw", "--name", ""], "--name '': must be the beginning of a file name"),
    (["--baselines", "adamw", "--seed", "-1"], "--seed -1: must be between"),
    (["--baselines", "adamw", "--heads", "0"], "--heads 0: must be at least 1"),
    (["--baselines", "adamw", "--task", "vit", "--heads", "3", "--patch", "2"], "heads 3 does not fit width 32"),
    (["--baselines", "adamw", "--task", "lm"], "needs text"),
    (["--reproduce", "--steps", "3"], "--steps does not go with --reproduce"),
    (["--reproduce", "slow"], "invalid choice: 'slow'")])
def test_bad_flags_are_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("evaluate.py: error: ") and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_decay_and_a_step_mult_take_the_place_of_each_theta_s_own(theta):
    flags = "--sweep", "horizon", "--theta", theta, "--baselines", "adamw", "--widths", "4"
    for more, expected in (((), (0.01, 0.0)), (("--decay", "0.25"), (0.01, 0.25)),
                           (("--step-mult", "0.04"), (0.04, 0.0))):
        mine, adamw = evaluate.prepare([*flags, *more]).contenders
        assert (mine.learned.step_mult, mine.learned.decay) == expected and adamw == evaluate.BASELINES["adamw"]
    for wrong in ("--decay", "1"), ("--step-mult", "0"):
        with pytest.raises(ValueError, match=wrong[0]):
            evaluate.prepare([*flags, *wrong])


def test_a_cooldown_is_that_of_each_theta_alone(theta, dataset):
    """Losses are the same until updates become smaller: the first to differ comes after the first smaller one."""
    plain, _ = evaluate.prepare(["--theta", theta, "--baselines", "adamw"]).contenders
    cooled, adamw = evaluate.prepare(["--theta", theta, "--baselines", "adamw", "--cooldown", "0.5"]).contenders
    assert adamw == evaluate.BASELINES["adamw"]
    task_in = functools.partial(tasks.task_of, tasks.TaskSettings(batch_size=8), dataset, 8, 1)
    keys = evaluate.seed_keys(jax.random.key(0), 1)

    def losses(contender):
        return np.asarray(evaluate.compiled(contender, task_in, 8, 1)[0](contender.start, keys, dataset.train)[1])

    before, after = side_by_side(losses, (plain, cooled))
    np.testing.assert_allclose(before[:, :6], after[:, :6], rtol=1e-6)  # updates 0 to 4 are whole
    assert np.all(before[:, 6:] != after[:, 6:])


def test_multipliers_of_theta_are_tuned_as_factors_of_its_own(theta):
    """With a factor f of input_mult, the network's first layer has f times the multiplier of θ's own μP."""
    argv = "--theta", theta, "--baselines", "adamw", "--tune-theta", "input_mult"
    mine, adamw = evaluate.prepare(argv).contenders
    assert mine.factors == {"input_mult": 2.0} and adamw == evaluate.BASELINES["adamw"]
    seen = []
    mine.on(lambda p: seen.append(p) or types.SimpleNamespace(), evaluate.Hyper(input_mult=4.0))
    own = mine.learned.parametrization
    assert seen == [own._replace(input_mult=4.0 * own.input_mult)]
    in_sp = mine.learned._replace(parametrization=mup.SP)
    lopt.save(theta, in_sp)
    with pytest.raises(ValueError, match="no --theta in μP"):  # SP has no such multipliers
        evaluate.prepare(argv)


@pytest.mark.parametrize("how", ["transfer", "per-width"])
def test_a_tuned_theta_has_its_multiplier_in_the_table(how, theta, tmp_path):
    """The multiplier is that of the first width, and the table says so."""
    flags = f"--tune-theta input_mult --tune {how} --batch-size 8 --steps 2 --seeds 1 --widths 4 8 --depth 1"
    assert command(*flags.split(), "--theta", theta, "--out", tmp_path / "out") == 0
    rows = read(tmp_path / "out" / "width.csv")
    assert len(rows) == 2 and {row["tuned"] for row in rows} == {"transfer"}
    assert len({row["input_mult"] for row in rows}) == 1 and float(rows[0]["input_mult"]) > 0


def test_every_experiment_parses(theta, tmp_path):
    """The tables of --reproduce are command lines of this program."""
    for name, flags in {**evaluate.EXPERIMENTS, **evaluate.QUICK}.items():
        argv = [flag.format(results=tmp_path, data="data") for flag in flags.split()]
        for path in (flag for flag in argv if flag.endswith(".npz")):
            (tmp_path / path).write_bytes((tmp_path / "mine.npz").read_bytes())
        plan = evaluate.prepare([*argv, "--out", str(tmp_path), "--name", name])
        assert plan.contenders and [path.name for path in plan.outputs.values()][0] == f"{name}.csv"


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_shipped_tables_are_those_of_their_commands(name):
    """What --reproduce would run has the optimizers, widths, depths, seeds and steps of the shipped table."""
    rows = read(ROOT / "results" / f"{name}.csv")
    argv = [flag.format(results=ROOT / "results", data="data") for flag in evaluate.EXPERIMENTS[name].split()]
    plan = evaluate.prepare([*argv, "--out", "absent", "--name", name])
    column = lambda name: {row[name] for row in rows}
    assert column("optimizer") == {contender.name for contender in plan.contenders}
    settings = plan.settings
    assert column("width") == set(map(str, settings.widths)) and column("depth") == set(map(str, settings.depths))
    if "seeds" in rows[0]:  # not in a coordinate check
        assert column("seeds") == {str(settings.seeds)}
        assert column("steps") == set(map(str, settings.lengths))
    if name in ("width", "depth", "horizon", "horizon-planned", "horizon-512"):  # shown as figures: few lines
        assert len({(row["optimizer"], row["tuned"]) for row in rows}) <= 5


def test_reproduce_goes_on_after_what_is_done(tmp_path, monkeypatch, capsys):
    flags = "--baselines adamw --tune none --batch-size 8 --steps 2 --seeds 1 --widths 4 --depth 1"
    monkeypatch.setattr(evaluate, "QUICK", {"one": flags, "two": flags})
    (tmp_path / "one.csv").write_text("done")
    assert command("--reproduce", "quick", "--out", tmp_path) == 0
    assert f"{tmp_path}/one.csv is already there" in capsys.readouterr().out
    assert (tmp_path / "one.csv").read_text() == "done" and len(read(tmp_path / "two.csv")) == 1

    monkeypatch.setattr(evaluate, "EXPERIMENTS", {"width": flags, "depth": flags})
    assert command("--reproduce", "depth", "--out", tmp_path) == 0
    assert (tmp_path / "depth.csv").exists() and not (tmp_path / "width.csv").exists()

    monkeypatch.setattr(evaluate, "QUICK", {"three": flags, "four": f"{flags} --theta {{results}}/absent.npz"})
    assert command("--reproduce", "quick", "--out", tmp_path) == 2
    assert "absent.npz: cannot be read" in capsys.readouterr().err and not (tmp_path / "three.csv").exists()


def test_failed_run_writes_nothing(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("stop")
    monkeypatch.setattr(evaluate, "compiled", fails)
    with pytest.raises(RuntimeError, match="stop"):
        command(*TINY, "--baselines", "adamw", "--tune", "none", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------------------------------------------------
# What is on disk, and when

ONE = ["--widths", "8", "--depth", "1", "--batch-size", "8", "--seeds", "1", "--steps", "2", "--tune", "none"]


@pytest.fixture
def written(monkeypatch):
    """What is written into a figure: (text, its axes, its place), in the order of writing."""
    axes, found = pytest.importorskip("matplotlib.axes").Axes, []
    annotate = axes.annotate

    def remember(axis, text, at, *args, **kwargs):
        found.append((text, axis, at))
        return annotate(axis, text, at, *args, **kwargs)

    monkeypatch.setattr(axes, "annotate", remember)
    return found


def rows_of(losses, **others):
    """Rows of one optimizer for each name, with a loss at each number of steps."""
    return [{"optimizer": name, "tuned": "-", "width": 8, "depth": 1, "steps": steps, "loss": loss} | others
            for name, by_steps in losses.items() for steps, loss in by_steps.items()]


def test_lines_are_named_where_they_end(written):
    """At the longest run, though it was not the last; in the last panel, though its row is not full; all inside."""
    evaluate.figure("horizon", rows_of({"a": {300: 1.0, 100: 2.0}, "b": {300: 1.5, 100: 1.8}}), "title")
    assert [(text, y) for text, _, (_, y) in written] == [("b", 1.5), ("a", 1.0)]
    written.clear()
    evaluate.figure("horizon", [row for width in (4, 8, 12, 16) for row in rows_of({"a": {1: 2.0, 2: 1.0}}, width=width)],
                    "title")
    [(_, axis, _)] = written
    assert axis.get_title() == "width 16" and axis.figure is not None
    assert [one.xaxis.get_tick_params()["labelbottom"] for one in axis.figure.axes] == [False, True, True, True]
    written.clear()
    evaluate.figure("horizon", rows_of({f"{i}": {1: 9.0, 2: 1.0 + i / 1000} for i in range(16)}), "title")
    heights = [y for _, _, (_, y) in written]
    assert min(heights) >= written[0][1].get_ylim()[0] and heights == sorted(heights, reverse=True)


def test_a_coordinate_check_without_a_finite_change_is_drawn():
    pytest.importorskip("matplotlib")
    rows = [{"optimizer": "a", "tuned": "-", "layer": "logits", "step": 1, "width": width, "rms_change": math.inf}
            for width in (8, 16)]
    assert evaluate.figure("coordinate-check", rows, "title").startswith(b"\x89PNG")


@pytest.fixture
def trained(monkeypatch):
    """Training that takes no time: its losses follow from the hyperparameters. The list of what has been trained."""
    made = []

    def compiled(contender, task_in, steps, seeds):
        def train(hyper, keys, split):
            made.append((contender.name, task_in(mup.SP).name, steps))
            loss = 2.0 + 0.1 * abs(np.log2(hyper.learning_rate / 0.003)) + 0.01 * abs(np.log2(hyper.output_mult / 4))
            return None, np.full((seeds, steps), loss) + np.arange(seeds)[:, None] / 30

        return train, lambda hyper, params, split: (np.full(seeds, 2.1), np.full(seeds, 1 / 3))

    monkeypatch.setattr(evaluate, "compiled", compiled)
    return made


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def kill(*args):
    raise Killed


def test_a_killed_evaluation_goes_on(theta, trained, tmp_path, monkeypatch, capsys):
    """Killed at each of its trainings in turn, and started again: none is made twice, and the CSV is the same."""
    argv = [*TINY, "--theta", theta, "--baselines", "adamw", "--tune", "both", "--tune-steps", "3"]
    assert command(*argv, "--out", tmp_path / "whole") == 0
    expected = trained.copy()
    assert len(expected) > 10 and len(set(expected)) == 6  # θ is not tuned
    compiled, limit = evaluate.compiled, 0

    def killed(*args):
        train, test = compiled(*args)

        def train_or_die(*args):
            if len(trained) == limit:
                raise Killed
            return train(*args)

        return train_or_die, test

    monkeypatch.setattr(evaluate, "compiled", killed)
    trained.clear()
    for limit in range(len(expected)):
        with pytest.raises(Killed):
            command(*argv, "--out", tmp_path / "killed")
        assert trained == expected[:limit]
        if trained:  # what was finished can be read
            [journal] = (tmp_path / "killed").iterdir()
            settings, *lines = map(json.loads, journal.read_text().splitlines())
            assert settings["steps"] == 4 and len(lines) == limit
            with open(journal, "a") as file:
                file.write('[[1, "adamw", ')  # a line that was being written
    assert "loss" in lines[0][1]["table"][0]
    limit += 1
    capsys.readouterr()
    assert command(*argv, "--out", tmp_path / "killed") == 0
    assert trained == expected and f"going on with the {limit - 1} results in {journal}" in capsys.readouterr().err
    whole, interrupted = ((tmp_path / folder / "width.csv").read_bytes() for folder in ("whole", "killed"))
    assert whole == interrupted and [path.name for path in (tmp_path / "killed").iterdir()] == ["width.csv"]


def test_results_of_other_settings_are_not_mixed(trained, theta, dataset, tmp_path, monkeypatch, capsys):
    argv = [*ONE, "--theta", theta, "--out", tmp_path]
    journal = tmp_path / "width.partial.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "write_csv", kill)
        command(*argv)
    before = journal.read_bytes()
    capsys.readouterr()
    for flags, culprit in ((["--steps", "3"], "--steps 2, not 3"), (["--seed", "1"], "--seed 0, not 1"),
                           (["--baselines", "adamw"], "--baselines")):
        assert command(*argv, *flags) == 2
        error = capsys.readouterr().err
        assert culprit in error and str(journal) in error and error.count("\n") == 1
    others = dataset._replace(train=dataset.train._replace(labels=np.roll(dataset.train.labels, 1)))
    with monkeypatch.context() as patch:  # of the same name, shapes, means and deviations
        patch.setattr(tasks, "load_data", lambda settings, download=False: others)
        assert command(*argv) == 2 and "another data set" in capsys.readouterr().err
    lopt.save(theta, lopt.load(theta)._replace(step_mult=0.02))  # another θ in a file of the same name
    assert command(*argv) == 2 and "another θ in a file" in capsys.readouterr().err
    assert journal.read_bytes() == before
    of_a_later_version = before.replace(b"{", b'{"clipping": 3, ', 1)
    for damage in b"[1]\n", of_a_later_version, b"{}\n[[0], 1]\n", b"\xff\n{}\n", before[:40] + before[41:]:
        journal.write_bytes(damage)
        if damage != b"[1]\n":  # a single line holds no results
            assert command(*argv) == 2
            error = capsys.readouterr().err
            assert str(journal) in error and error.count("\n") == 1
            assert journal.read_bytes() == damage


def test_contenders_have_names_of_their_own(theta, tmp_path):
    paths = [str(tmp_path / name) for name in ("x.npz", "x", "adamw.npz", "mine.npz")]
    for path in paths:
        lopt.save(path, lopt.load(theta))
    named = [one.name for one in evaluate.prepare(["--theta", *paths, "--baselines", "adamw"]).contenders]
    assert named == [*paths[:3], "mine", "adamw"]


def test_the_widths_of_meta_training_are_those_of_all_of_it(theta):
    learned = lopt.load(theta)
    widths_of = lambda **made: evaluate.widths_of_meta_training([
        evaluate.Contender("mine", mup.MUP, None, learned=learned._replace(made=made)), BASELINES["adamw"]])
    assert widths_of(settings={"widths": [8, 16]}) == [8, 16] and widths_of() == []
    assert widths_of(settings={"widths": [8]}, origin={"settings": {"widths": [4, 32]}, "origin": {}}) == [4, 32]
    assert widths_of(settings={"widths": [8], "also": ["--widths 64"]}) == []


def test_of_two_at_once_the_second_is_refused(trained, tmp_path, capsys):
    argv = [*ONE, "--baselines", "adamw", "--out", tmp_path]
    with evaluate.Journal(tmp_path / "width.partial.jsonl", {}):
        assert command(*argv) == 2
        error = capsys.readouterr().err
        assert "width.partial.jsonl: another process is writing there" in error and error.count("\n") == 1
        assert command(*argv, "--name", "other") == 0
    assert command(*argv) == 0


def test_full_disk(trained, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stops the evaluation as a full disk does; the same command goes on."""
    argv = [*ONE, "--baselines", "adamw", "--out", tmp_path]
    with monkeypatch.context() as patch, size_of_files_limited() as limit:
        def after_training(job, hyper, measure=evaluate.after_training):
            limit((tmp_path / "width.partial.jsonl").stat().st_size + 3)
            return measure(job, hyper)

        patch.setattr(evaluate, "after_training", after_training)
        code = command(*argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "width.partial.jsonl: cannot be written (File too large); free some space" in error
    assert command(*argv) == 0 and len(read(tmp_path / "width.csv")) == 1


def test_locks_are_not_needed(trained, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert command(*ONE, "--baselines", "adamw", "--out", tmp_path) == 0
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert len(read(tmp_path / "width.csv")) == 1


def test_the_csv_is_written_before_anything_is_printed(trained, tmp_path, monkeypatch):
    def broken_pipe(*args, file=None, **kwargs):
        if file is not sys.stderr:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken_pipe)
    with pytest.raises(BrokenPipeError):
        evaluate.run([*ONE, "--baselines", "adamw", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["width.csv"] and len(read(tmp_path / "width.csv")) == 1


def test_a_figure_that_fails_is_a_warning(trained, tmp_path, monkeypatch, capsys):
    """A matplotlib that cannot draw: the results are there, and the exit code is 0."""
    pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(sys.modules["matplotlib.figure"], "Figure", None)
    assert command(*ONE, "--baselines", "adamw", "--plot", "--out", tmp_path) == 0
    printed = capsys.readouterr()
    [warning] = [line for line in printed.err.splitlines() if "warning" in line]
    assert "width.png: could not be drawn (TypeError: " in warning
    assert printed.out.strip().endswith(f"wrote {tmp_path}/width.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["width.csv"] and len(read(tmp_path / "width.csv")) == 1


def test_names_of_files_are_drawn_as_they_are(theta, tmp_path, written, monkeypatch, capsys):
    names = ["a$b_^$c", "_best", "µ\udcff"]  # the last is a byte that is no UTF-8
    for name in names:
        lopt.save(tmp_path / f"{name}.npz", lopt.load(theta))
    monkeypatch.setattr(evaluate, "sweep", lambda settings, dataset, contender, remember: iter([{"table": [
        {"optimizer": contender.name, "tuned": "-", "width": 8, "depth": 1, "steps": 2, "loss": 2.0}]}]))
    paths = [tmp_path / f"{name}.npz" for name in names]
    assert command(*ONE, "--theta", *paths, "--plot", "--out", tmp_path) == 0
    assert "warning" not in capsys.readouterr().err
    texts = [text.strip().replace("\\$", "$") for text, *_ in written]
    assert texts == ["a$b_^$c", "_best", "µ?"] and (tmp_path / "width.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "width.csv").read_bytes().count("µ".encode() + b"\xff,-,8,1") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.name)
def test_a_csv_read_back_is_the_same(path, tmp_path):
    rows = evaluate.read_csv(path)
    assert all(isinstance(row["width"], int) for row in rows)
    evaluate.write_csv(tmp_path / "again.csv", rows, tuple(rows[0]))
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_reproduce_loads_all_data_before_it_trains(dataset, tmp_path, monkeypatch, capsys):
    flags = "--baselines adamw " + " ".join(ONE)
    monkeypatch.setattr(evaluate, "QUICK", {"one": flags, "two": flags, "three": f"{flags} --image-size 2"})
    loaded = []

    def load_data(settings, download=False):
        loaded.append(settings.image_size)
        if settings.image_size:
            raise ValueError("data/tinyshakespeare.txt: no such file or folder")
        return dataset

    monkeypatch.setattr(tasks, "load_data", load_data)
    assert command("--reproduce", "quick", "--out", tmp_path / "new") == 2
    assert "tinyshakespeare.txt: no such file" in capsys.readouterr().err
    assert loaded == [None, 2] and not (tmp_path / "new").exists()


def test_reproduce_draws_a_figure_that_alone_is_missing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evaluate, "QUICK", {"horizon": evaluate.EXPERIMENTS["horizon"]})
    (tmp_path / "horizon.csv").write_bytes((ROOT / "results" / "horizon.csv").read_bytes())
    assert command("--reproduce", "quick", "--plot", "--out", tmp_path) == 0
    assert "warning" not in capsys.readouterr().err
    assert (tmp_path / "horizon.png").read_bytes().startswith(b"\x89PNG")
