"""The rules of μP and SP, one by one, and what they are for: changes and learning rates alike at every width."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side
from jax.sharding import Mesh, PartitionSpec

import lopt
import mup
import tasks

ROOT = pathlib.Path(mup.__file__).resolve().parent
KEY = jax.random.key(0)
TRUNCATED = 0.8796  # standard deviation of a standard normal that is cut at ±2


# ---------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("kind, fan_in, in_mup, in_sp", [
    ("input", 64, TRUNCATED / 8, TRUNCATED / 8),
    ("hidden", 64, TRUNCATED / 8, TRUNCATED / 8),
    ("output", 64, 0.0, TRUNCATED / 8),
    ("vector", 1, 1.0, 0.0),
    ("vector", 64, 1.0, 0.0),
])
def test_initial_standard_deviations(kind, fan_in, in_mup, in_sp):
    weight = mup.Weight(kind, (64, 512) if kind != "vector" else (20_000,), fan_in)
    for parametrization, std in ((mup.MUP, in_mup), (mup.SP, in_sp)):
        value = mup.init([weight], KEY, parametrization)[0]
        assert value.shape == weight.shape and value.dtype == jnp.float32
        assert float(jnp.std(value)) == pytest.approx(std, rel=0.02) and abs(float(jnp.mean(value))) < 0.03
        if kind != "vector":  # cut at two standard deviations, and not rescaled for the cut
            assert float(jnp.max(jnp.abs(value))) <= 2 / 8
        elif parametrization.is_mup:
            assert float(jnp.max(jnp.abs(value))) > 3


@pytest.mark.parametrize("parametrization", [mup.MUP, mup.SP])
def test_given_initialisations_depend_on_nothing(parametrization):
    embedding = mup.init([mup.Weight("input", (100, 200), 100, std=0.1)], KEY, parametrization)[0]
    assert float(jnp.std(embedding)) == pytest.approx(0.1, rel=0.02)
    assert float(jnp.max(jnp.abs(embedding))) > 0.3, "must not be truncated"
    norm = mup.init(mup.norm(7), KEY, parametrization)
    np.testing.assert_array_equal(norm["gain"], np.ones(7))
    np.testing.assert_array_equal(norm["shift"], np.zeros(7))
    assert not np.any(mup.init([mup.Weight("input", (9,), constant=0.0)], KEY, parametrization)[0])


TUNED = mup.Parametrization("mup", input_mult=3.0, output_mult=5.0, hidden_lr_mult=7.0)


@pytest.mark.parametrize("parametrization, kind, forward, update", [
    (mup.MUP, "input", 1.0, 1.0), (mup.MUP, "hidden", 1.0, 1 / 64), (mup.MUP, "output", 1 / 64, 1.0),
    (mup.MUP, "vector", 1.0, 1.0),
    (TUNED, "input", 3.0, 1.0), (TUNED, "hidden", 1.0, 7 / 64), (TUNED, "output", 5 / 64, 1.0),
    (TUNED, "vector", 1.0, 1.0),
    *((p, kind, 1.0, 1.0) for kind in mup.KINDS for p in (mup.SP, TUNED._replace(name="sp"))),
])
def test_multipliers(parametrization, kind, forward, update):
    weight = mup.Weight(kind, (64, 32) if kind != "vector" else (32,), 64)
    assert mup.forward_multiplier(weight, parametrization) == pytest.approx(forward)
    assert mup.update_multipliers([weight], parametrization) == [pytest.approx(update)]
    assert mup.rule_of(weight, parametrization) == mup.rules(parametrization, 64)[kind]
    assert mup.rules(parametrization, 64)[kind][1:] == (pytest.approx(forward), pytest.approx(update))


@pytest.mark.parametrize("parametrization, stds", [
    (mup.MUP, (1 / 8, 1 / 8, 0.0, 1.0)), (TUNED, (1 / 8, 1 / 8, 0.0, 1.0)), (mup.SP, (1 / 8, 1 / 8, 1 / 8, 0.0))])
def test_the_table_has_a_row_for_every_kind(parametrization, stds):
    """No multiplier that is tuned reaches the initialisation."""
    table = mup.rules(parametrization, 64)
    assert tuple(table) == mup.KINDS and tuple(rule.std for rule in table.values()) == stds


def test_update_multipliers_is_a_tree_like_the_weights():
    weights = {"a": mup.matrix("input", 3, 8), "b": [mup.matrix("hidden", 8, 8), mup.norm(8)],
               "c": mup.matrix("output", 8, 2)}
    params, multipliers = mup.init(weights, KEY, mup.MUP), mup.update_multipliers(weights, mup.MUP)
    assert jax.tree.structure(params) == jax.tree.structure(multipliers)
    assert multipliers["b"][0] == {"w": 1 / 8, "b": 1.0} and multipliers["c"] == {"w": 1.0, "b": 1.0}
    assert set(jax.tree.leaves(mup.update_multipliers(weights, mup.SP))) == {1.0}


@pytest.mark.parametrize("base_width, expected", [(0, 1.0), (32, 2.0), (128, 0.5)])
def test_gradient_multiplier(base_width, expected):
    """The width is the read-out's fan_in, whatever other fan_ins there are."""
    weights = {"in": mup.matrix("input", 192, 64), "hidden": mup.matrix("hidden", 64, 256),
               "back": mup.matrix("hidden", 256, 64), "out": mup.matrix("output", 64, 10)}
    assert mup.gradient_multiplier(weights, mup.MUP._replace(base_width=base_width)) == expected
    assert mup.gradient_multiplier(weights, mup.SP._replace(base_width=base_width)) == 1.0


def test_every_tensor_is_drawn_for_itself():
    params = mup.init({"a": mup.matrix("hidden", 8, 8), "b": mup.matrix("hidden", 8, 8)}, KEY, mup.MUP)
    assert not np.any(params["a"]["w"] == params["b"]["w"]) and not np.any(params["a"]["b"] == params["b"]["b"])
    again = mup.init({"a": mup.matrix("hidden", 8, 8), "b": mup.matrix("hidden", 8, 8)}, KEY, mup.MUP)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("kind, in_mup", [("input", lambda xw, b: 3 * xw + b), ("hidden", lambda xw, b: xw + b),
                                          ("output", lambda xw, b: 5 / 4 * (xw + b))])
def test_linear_places_its_multiplier(kind, in_mup):
    """The read-out's multiplies its bias, too; the first layer's does not."""
    weights = mup.matrix(kind, 4, 3)
    params = {"w": jax.random.normal(KEY, (4, 3)), "b": jnp.asarray([1.0, 2.0, 3.0])}
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    expected = in_mup(x @ params["w"], params["b"])
    np.testing.assert_allclose(mup.linear(weights, params, x, TUNED), expected, rtol=1e-5)
    np.testing.assert_allclose(mup.linear(weights, params, x, TUNED._replace(name="sp")),
                               x @ params["w"] + params["b"], rtol=1e-5)


def test_attention_scale():
    assert mup.attention_scale(16, mup.MUP) == 1 / 16 and mup.attention_scale(16, mup.SP) == 1 / 4


def test_tunable_multipliers_may_be_traced():
    weights = {"in": mup.matrix("input", 4, 6), "out": mup.matrix("output", 6, 2)}
    hidden_weight = mup.Weight("hidden", (6, 6), 6)
    params, x = mup.init(weights, KEY, mup.SP), jnp.ones((1, 4))

    def forward(multiplier):
        tuned = mup.Parametrization("mup", multiplier, multiplier, multiplier)
        hidden = mup.linear(weights["in"], params["in"], x, tuned)
        logits = mup.linear(weights["out"], params["out"], hidden, tuned)
        return logits, mup.update_multipliers(hidden_weight, tuned)

    logits, update = jax.jit(jax.vmap(forward))(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(logits[1], 4 * logits[0], rtol=1e-5)
    np.testing.assert_allclose(update, [1 / 6, 2 / 6], rtol=1e-6)


@pytest.mark.parametrize("call, message", [
    (lambda: mup.Weight("inner", (2, 2), 2), "kind of weight 'inner': use one of input, hidden, output, vector"),
    (lambda: mup.Weight("hidden", (2, 0), 2), "positive shape and fan_in"),
    (lambda: mup.Weight("hidden", (2, 2), 0), "positive shape and fan_in"),
    (lambda: mup.Weight("output", (2, 2)), "'output' needs a fan_in"),
    (lambda: mup.Weight("input", (2, 2), 2, std=0.1, constant=1.0), "not as both"),
    (lambda: mup.gradient_multiplier(mup.norm(8), mup.MUP._replace(base_width=4)), "no weight of kind 'output'"),
    (lambda: mup.matrix("hidden", -1, 2), "positive shape and fan_in"),
    (lambda: mup.init(mup.matrix("hidden", 2, 2), KEY, mup.Parametrization("ntk")),
     "unknown parametrization 'ntk': use 'mup' or 'sp'"),
    (lambda: mup.update_multipliers([mup.Weight("hidden", (2, 2), 2)], mup.Parametrization("muP")),
     "unknown parametrization"),
    (lambda: mup.attention_scale(4, mup.Parametrization("")), "unknown parametrization"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# What μP is for


@pytest.fixture(scope="module")
def dataset():
    return tasks.load_dataset("synthetic")


def on_two_devices(run, *xs):
    """run(*x) for each x along the first axis, half of them on each of two devices: twice as fast on two cores."""
    mesh, halves = Mesh(np.array(jax.devices()[:2]), ("xs",)), PartitionSpec("xs")
    mapped = lambda *xs: jax.lax.map(lambda x: run(*x), xs)
    return jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=halves, out_specs=halves, check_vma=False))(*xs)


def mlp(dataset, width, parametrization):
    """The inner task of this part: an MLP of three hidden layers on the synthetic images."""
    return tasks.make_task("mlp", dataset, width, 3, 64, parametrization)


def slopes(dataset, parametrization, optimizer_of, widths, marks):
    """`tasks.coordinate_check` over 2 seeds: {layer: slope of its RMS change against the width [marks]}.

    optimizer_of: a function from a task to a function from the number of steps to its optimizer.
    """
    def at_width(width):
        task = mlp(dataset, width, parametrization)
        run = lambda key: tasks.coordinate_check(task, optimizer_of(task), dataset.train, key, marks)
        squares = on_two_devices(run, jax.random.split(KEY, 2))
        return {layer: np.sqrt(np.mean(change, axis=0)) for layer, (_, change) in squares.items()}

    narrow, wide = side_by_side(at_width, widths)
    found = {name: tasks.slope(widths, np.stack([narrow[name], wide[name]])) for name in narrow}
    print(f"slopes after {marks} steps: " + ", ".join(f"{name} {np.round(x, 2)}" for name, x in found.items()))
    return found


def test_coordinate_check_of_adam(dataset):
    """In μP no layer's change depends on the width; in SP those behind a hidden layer grow with it.

    From step 2 on: in μP the read-out is 0 at first, so that the first step reaches no other layer.
    """
    widths, marks = (32, 512), (2, 10)
    adam = lambda rate: lambda task: lambda _: lopt.adamw(rate, update_multipliers=task.update_multipliers)
    in_mup = slopes(dataset, mup.MUP, adam(1e-2), widths, marks)
    in_sp = slopes(dataset, mup.SP, adam(1e-3), widths, marks)
    assert all(abs(in_mup[f"layer_{i}"]).max() < 0.1 for i in range(3)), in_mup
    assert abs(in_mup["logits"][1]) < 0.15, in_mup
    assert min(in_sp[name][0] for name in ("layer_1", "layer_2", "logits")) > 0.3, in_sp


def test_gradients_are_alike_at_every_width(dataset):
    """In μP those of all tensors fall as 1/width while Adam trains; times the gradient multiplier they do not change.

    Slopes of the RMS over widths 32 and 512 after 10 steps, mean of 2 seeds; ±0.2: the narrow network is far from the
    limit (measured: within 0.12).
    """
    widths = (32, 512)

    def sizes(width):
        task = mlp(dataset, width, mup.MUP._replace(base_width=32))
        adam = lopt.adamw(1e-2, update_multipliers=task.update_multipliers)

        def run(key):
            params, _ = tasks.train(task, lambda _: adam, dataset.train, key, 10)
            return jax.tree.map(lambda g: jnp.mean(g * g), jax.grad(task.loss)(params, task.sample(key, dataset.train)))

        squares = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
        rms = np.array([np.sqrt(np.mean(x)) for x in jax.tree.leaves(squares)])
        return rms, task.gradient_multiplier * rms

    plain, multiplied = (tasks.slope(widths, np.stack(x)) for x in zip(*side_by_side(sizes, widths)))
    print(np.round(plain, 2), np.round(multiplied, 2))
    assert np.abs(plain + 1).max() < 0.2 and np.abs(multiplied).max() < 0.2


RATES = {"mup": [2.0**i for i in range(-6, -1)], "sp": [2.0**i for i in range(-11, -5)]}


@pytest.mark.parametrize("name", RATES)
def test_transfer_of_the_best_learning_rate(dataset, name):
    """From width 32 to 512 Adam's best learning rate moves by at most a factor of 2 in μP, by 4 or more in SP."""
    steps, seeds, parametrization = 250, 2, mup.Parametrization(name)

    def at_width(width):
        task = mlp(dataset, width, parametrization)

        def run(rate, key):
            adam = lopt.adamw(rate, update_multipliers=task.update_multipliers)
            _, losses = tasks.train(task, lambda _: adam, dataset.train, key, steps)
            return jnp.mean(losses[-50:])

        rates = jnp.repeat(jnp.asarray(RATES[name]), seeds)
        keys = jnp.tile(jax.random.split(KEY, seeds), len(RATES[name]))
        losses = on_two_devices(run, rates, keys)
        losses = np.mean(np.reshape(losses, (-1, seeds)), axis=1)
        best = int(np.nanargmin(losses))
        print(f"{name}, width {width}:", ", ".join(f"{rate:.2g}: {x:.3f}" for rate, x in zip(RATES[name], losses)))
        assert 0 < best < len(losses) - 1, "the best learning rate lies at the edge of the grid"
        return best

    narrow, wide = side_by_side(at_width, (32, 512))
    assert abs(narrow - wide) <= 1 if name == "mup" else abs(narrow - wide) >= 2, (name, narrow, wide)


def load(name):
    """A meta-trained learned optimizer; without its file the test skips."""
    path = ROOT / "results" / name
    if not path.exists():
        pytest.skip(f"needs the meta-trained results/{name}")
    return lopt.load(path)


MARKS, WIDTHS = (1, 10, 100), (32, 512)


def passes(found):
    """Whether the width does not matter: hidden slopes within ±0.1 at all marks, logits ±0.15 from step 10."""
    logits = found.pop("logits")
    return all(np.abs(x).max() <= 0.1 for x in found.values()) and np.abs(logits[1:]).max() <= 0.15


def test_coordinate_check_of_the_learned_optimizers(dataset):
    """Widths 32 and 512 after 1, 10 and 100 steps: the meta-trained μLO passes, the SP LO must not (after 1 and 10).

    Widths up to 1,024, and those between: `python evaluate.py --sweep coordinate-check`.
    """
    def check(name, expected, marks):
        learned = load(name)
        parametrization = learned.parametrization
        assert parametrization.name == expected, f"results/{name} was meta-trained in {parametrization.name}"
        optimizer_of = lambda task: functools.partial(tasks.optimizer_for, task, learned)
        return passes(slopes(dataset, parametrization, optimizer_of, WIDTHS, marks))

    assert side_by_side(check, ("mulo_s.npz", "lo_s.npz"), ("mup", "sp"), (MARKS, MARKS[:2])) == [True, False]
