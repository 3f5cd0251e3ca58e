"""Evaluation: tuning, tables and their CSV, what diverged, shared batches, the coordinate check, bad input."""

import csv
import functools
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, side_by_side

import evaluate
import lopt
import meta_train
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
    monkeypatch.setattr(meta_train, "load_data", lambda settings, download=False: dataset)
    monkeypatch.setattr(meta_train, "set_up_devices", lambda pairs, devices: None)


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
    theta = lopt.init_theta(jax.random.key(0))
    lopt.save_theta(path, theta, step_mult=0.01, exp_mult=0.001, parametrization="mup")
    return str(path)


def command(*argv):
    return meta_train.run_command(evaluate.run, "evaluate.py", [str(word) for word in argv])


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
    make_task = functools.partial(meta_train.make_task, meta_train.Settings(batch_size=8), dataset, 8, 1)
    keys = evaluate.seed_keys(jax.random.key(3), 2)
    np.testing.assert_array_equal(jax.random.key_data(keys),
                                  jax.random.key_data(evaluate.seed_keys(jax.random.key(3), 5)[:2]))
    muadam = BASELINES["muadam"]
    learned = muadam._replace(theta=lopt.init_theta(keys[0]), step_mult=0.01)

    def in_sweep(contender):
        train, _ = evaluate.compiled(contender, make_task, 3, 2)
        return np.asarray(train(contender.start, keys, dataset.train)[1])

    of_adam, of_learned = side_by_side(in_sweep, (muadam, learned))
    task = muadam.task(make_task, muadam.start)
    adam = lopt.adamw(muadam.start.learning_rate, update_multipliers=task.update_multipliers)
    alone = jax.jit(lambda key: tasks.train(task, adam, dataset.train, key, 3)[1])
    np.testing.assert_allclose(of_adam, [alone(key) for key in keys], rtol=1e-5)
    np.testing.assert_allclose(of_learned[:, 0], of_adam[:, 0], rtol=1e-6)  # same weights and batch
    assert of_adam[0, 0] != of_adam[1, 0]


def test_hyperparameters_reach_the_network(dataset):
    """Every field of Hyper changes the losses of μAdam, and in SP only the learning rate does."""
    make_task = functools.partial(meta_train.make_task, meta_train.Settings(batch_size=8), dataset, 8, 2)
    keys = evaluate.seed_keys(jax.random.key(0), 1)
    for name, expected in (("muadam", set(Hyper._fields)), ("adamw", {"learning_rate"})):
        train, _ = evaluate.compiled(BASELINES[name], make_task, 4, 1)
        start = BASELINES[name].start
        losses = lambda hyper: np.asarray(train(hyper, keys, dataset.train)[1])
        changed = {field for field in Hyper._fields
                   if not np.allclose(losses(start), losses(start._replace(**{field: 2 * getattr(start, field)})))}
        assert changed == expected == set(BASELINES[name].factors)


def test_diverged_runs_are_named_and_counted():
    losses = np.full((3, 40), 2.0)
    losses[0, -1], losses[1, -2:] = np.nan, 4.0
    row = evaluate.summary(losses, max_loss=3.4)
    assert (row["loss"], row["diverged"], row["std"], row["seeds"]) == ("diverged", "2", "-", "3")
    losses[0], losses[1] = 2.5, 3.0
    row = evaluate.summary(losses, max_loss=3.4)
    assert (row["loss"], row["diverged"], row["std"]) == ("2.5000", "0", "0.4082")
    losses = np.array([[1.0, 2.0, 9.0], [np.inf, 4.0, 2.0]])
    assert [row["loss"] for row in evaluate.smooth(losses, 5.0)] == ["diverged", "3.0000", "diverged"]


def test_each_theta_runs_by_its_metadata_and_divergence_is_no_nan(theta, tmp_path, monkeypatch, capsys):
    arrays, _ = lopt.load_theta(theta)
    wild = tmp_path / "wild.npz"
    lopt.save_theta(wild, arrays, step_mult=1e30, exp_mult=0.001, parametrization="sp")
    assert command(*TINY, "--widths", "8", "--theta", wild, "--theta", theta, "--out", tmp_path) == 0
    diverged, mine = read(tmp_path / "width.csv")
    assert (diverged["optimizer"], diverged["loss"], diverged["diverged"], diverged["test_loss"]) == (
        "wild", "diverged", "2", "-")
    assert (mine["optimizer"], mine["tuned"], mine["diverged"], mine["learning_rate"]) == ("mine", "-", "0", "-")
    assert 1.5 < float(mine["loss"]) < 3.4 and float(mine["test_loss"]) > 1.5
    assert "nan" not in capsys.readouterr().out + (tmp_path / "width.csv").read_text()
    lopt.save_theta(wild, arrays, step_mult=0.01, exp_mult=0.001, parametrization="mup", output_mult=3.0,
                    base_width=8)
    [contender] = evaluate.load_contenders([str(wild)], [])
    make_task = lambda parametrization: parametrization
    assert contender.task(make_task, contender.start) == meta_train.mup.Parametrization("mup", 1.0, 3.0, 1.0, 8)
    monkeypatch.setattr(lopt, "learned_optimizer", lambda theta, **scales: scales)
    task = types.SimpleNamespace(update_multipliers="some", gradient_multiplier=4.0)
    scales = contender.optimizer(task, contender.start, 1)
    assert (scales["step_mult"], scales["update_multipliers"], scales["gradient_multiplier"]) == (0.01, "some", 4.0)


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
    """The optimum halves at each size: transfer keeps the first, per-width follows and tunes nothing else."""
    sizes = [(32, 3), (64, 3), (128, 3)]
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


def test_horizon_and_depth_sweeps(tmp_path):
    assert command(*TINY, "--sweep", "horizon", "--widths", "8", "--baselines", "adamw", "--tune", "none",
                   "--steps", "20", "--out", tmp_path) == 0
    rows, curve = read(tmp_path / "horizon.csv"), read(tmp_path / "horizon-curves.csv")
    assert [row["steps"] for row in rows] == ["20", "100", "500"]
    assert [row["test_loss"] == "-" for row in rows] == [True, True, False]
    assert len(curve) == 167 and curve[0]["step"] == "3" and curve[-1]["step"] == "500"
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])

    assert command("--sweep", "depth", "--depths", "1", "2", "--widths", "8", "--batch-size", "8", "--steps", "3",
                   "--baselines", "adamw", "--tune", "none", "--name", "deep", "--out", tmp_path) == 0
    assert [(row["width"], row["depth"]) for row in read(tmp_path / "deep.csv")] == [("8", "1"), ("8", "2")]


def test_slope_of_known_powers():
    widths = np.array([16, 64, 256])
    values = np.stack([3.0 * widths ** 0.5, widths ** -1.0, np.full(3, 7.0), [1, 0, 1], [1, np.nan, 1]], axis=1)
    np.testing.assert_allclose(evaluate.slope(widths, values), [0.5, -1.0, 0.0, np.nan, np.nan], atol=1e-12)


def test_coordinate_check_measures_the_change(dataset):
    """Against the definition: `tasks.train` from the start to each mark."""
    make_task = lambda width: tasks.mlp_task(dataset, width, 1, 8, mup.SP)
    keys, task, adam = evaluate.seed_keys(jax.random.key(1), 2), make_task(8), lopt.adamw(0.01)
    found = evaluate.coordinate_check(make_task, lambda task: adam, dataset.train, [8], [1, 5], keys)
    assert {layer: [x.shape for x in values] for layer, values in found.items()} == {
        "layer_0": [(1, 2)] * 2, "logits": [(1, 2)] * 2}

    @jax.jit
    def by_definition(key):
        inputs, _ = task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), 0), dataset.train)
        networks = [task.init(jax.random.fold_in(key, 0)),
                    *(tasks.train(task, adam, dataset.train, key, mark)[0] for mark in (1, 5))]
        first, *later = (task.forward(params, inputs)[1]["logits"] for params in networks)
        return later, [x - first for x in later]

    rms = lambda x: np.sqrt(np.mean(np.square(x), axis=(0, 2, 3)))
    for got, expected in zip(found["logits"], zip(*(by_definition(key) for key in keys))):
        np.testing.assert_allclose(got[0], rms(np.array(expected)), rtol=1e-4)


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
    common = {"optimizer": "a", "tuned": "-", "width": "8", "depth": "3", "layer": "logits", "step": "1"}
    rows = [common | {x: "8", "loss": "1.5", "std": "0.1", "rms_change": "0.3"},
            common | {x: "16", "loss": "diverged", "std": "-", "rms_change": "diverged"}]
    assert evaluate.figure(sweep, rows, "title").startswith(b"\x89PNG")


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
    (["--sweep", "length"], "invalid choice: 'length'"),
    (["--baselines", "adamw", "--steps", "0"], "--steps 0: must be between"),
    (["--baselines", "adamw", "--seeds", "-1"], "--seeds -1: must be between"),
    (["--baselines", "adamw", "--tune-steps", "0"], "--tune-steps 0: must be between"),
    (["--baselines", "adamw", "--widths", "0"], "must be at least 1"),
    (["--baselines", "adamw", "--widths", "8", "8"], "a width is repeated"),
    (["--baselines", "adamw", "--depths", "3"], "--depths belongs to --sweep depth"),
    (["--baselines", "adamw", "--sweep", "depth", "--depth", "3"], "--depths belongs to --sweep depth"),
    (["--baselines", "adamw", "--sweep", "depth", "--depths", "3", "0"], "--depths [3, 0]: must be between"),
    (["--baselines", "adamw", "--sweep", "coordinate-check", "--widths", "8"], "needs two or more"),
    (["--baselines", "adamw", "--name", "a/b"], "--name 'a/b': must be the beginning of a file name"),
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
    assert column("width") == set(map(str, plan.args.widths)) and column("depth") == set(map(str, plan.args.depths))
    if "seeds" in rows[0]:  # not in a coordinate check
        times = evaluate.HORIZON if plan.args.sweep == "horizon" else (1,)
        assert column("seeds") == {str(plan.args.seeds)}
        assert column("steps") == {str(plan.args.steps * n) for n in times}


def test_reproduce_goes_on_after_what_is_done(tmp_path, monkeypatch, capsys):
    flags = "--baselines adamw --tune none --batch-size 8 --steps 2 --seeds 1 --widths 4 --depth 1"
    monkeypatch.setattr(evaluate, "QUICK", {"one": flags, "two": flags})
    (tmp_path / "one.csv").write_text("done")
    assert command("--reproduce", "quick", "--out", tmp_path) == 0
    assert f"{tmp_path}/one.csv is already there" in capsys.readouterr().out
    assert (tmp_path / "one.csv").read_text() == "done" and len(read(tmp_path / "two.csv")) == 1

    monkeypatch.setattr(evaluate, "QUICK", {"three": flags, "four": f"{flags} --theta {{results}}/absent.npz"})
    assert command("--reproduce", "quick", "--out", tmp_path) == 2
    assert "absent.npz: cannot be read" in capsys.readouterr().err and not (tmp_path / "three.csv").exists()


def test_failed_run_writes_nothing(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("stop")
    monkeypatch.setattr(evaluate, "train_rows", fails)
    with pytest.raises(RuntimeError, match="stop"):
        command(*TINY, "--baselines", "adamw", "--tune", "none", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
