"""μP's table, row by row, and its purpose: learning rates and changes that transfer over widths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side

import lopt
import mup

KEY = jax.random.key(0)
TUNED = mup.Parametrization("mup", input_mult=3.0, output_mult=5.0, hidden_lr_mult=7.0)


@pytest.mark.parametrize("p, output, vector", [(TUNED, 0.0, 1.0), (mup.SP, 1 / 8, 0.0)])
def test_initial_weights(p, output, vector):
    """Matrices are cut at 2σ and not rescaled, which leaves 0.88σ. Other weights are not cut."""
    stds = {"input": 1 / 8, "hidden": 1 / 8, "output": output, "vector": vector, "own": 0.1}
    weights = {kind: mup.Weight(kind, (64, 512), 64) for kind in stds}
    weights |= {"own": mup.Weight("input", (64, 512), 64, std=0.1), "again": weights["hidden"],
                "norm": mup.norm(7), "none": None}
    values = jax.device_get(jax.jit(lambda: mup.init(weights, KEY, p))())
    for name, std in stds.items():
        x, cut = values[name], name not in ("vector", "own")
        assert x.shape == (64, 512) and x.dtype == np.float32
        assert x.std() == pytest.approx(0.88 * std if cut else std, rel=0.02)
        assert abs(x).max() <= 2 * std if cut else abs(x).max() >= 3 * std
    assert not np.any(values["hidden"] == values["again"]), "each tensor has its own draw"
    assert np.all(values["norm"]["gain"] == 1.0) and not np.any(values["norm"]["shift"])


@pytest.mark.parametrize("parametrization, forward, update", [
    (mup.MUP, (1.0, 1.0, 1 / 64, 1.0), (1.0, 1 / 64, 1.0, 1.0)),
    (TUNED, (3.0, 1.0, 5 / 64, 1.0), (1.0, 7 / 64, 1.0, 1.0)),
    (TUNED._replace(name="sp"), (1.0,) * 4, (1.0,) * 4)])
def test_multipliers(parametrization, forward, update):
    table = mup.rules(parametrization, 64)
    assert tuple(table) == ("input", "hidden", "output", "vector")
    assert tuple(rule.forward for rule in table.values()) == pytest.approx(forward)
    weights = {kind: [mup.Weight(kind, (64, 32), 64), None] for kind in table}
    multipliers = mup.update_multipliers(weights, parametrization)
    assert multipliers == {kind: [pytest.approx(c), 1.0] for kind, c in zip(table, update)}


def test_multipliers_may_be_traced():
    def multipliers(c):
        table = mup.rules(mup.Parametrization("mup", c, c, c), 8)
        return table["input"].forward, table["hidden"].update, table["output"].forward

    found = jax.jit(jax.vmap(multipliers))(np.float32([1, 2]))
    np.testing.assert_array_equal(found, [[1, 2], [1 / 8, 2 / 8], [1 / 8, 2 / 8]])


@pytest.mark.parametrize("kind, in_mup", [
    ("input", lambda w, b: 3 * w + b), ("hidden", np.add), ("output", lambda w, b: 1.25 * (w + b))])
def test_linear_places_its_multiplier(kind, in_mup):
    """The read-out's multiplies its bias, too. The first layer's does not."""
    weights, rng = mup.matrix(kind, 4, 3), np.random.default_rng(0)
    w, b, x = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (3,), (2, 5, 4)))
    for p, expected in (TUNED, in_mup(x @ w, b)), (TUNED._replace(name="sp"), x @ w + b):
        np.testing.assert_allclose(mup.linear(weights, {"w": w, "b": b}, x, p), expected, 1e-5)


def test_gradient_multiplier():
    """The width is the read-out's fan_in, whatever the other fan_ins are."""
    weights = {"in": mup.matrix("input", 192, 64), "wide": mup.matrix("hidden", 64, 256),
               "back": mup.matrix("hidden", 256, 64), "out": mup.matrix("output", 64, 10)}
    for base_width, expected in (0, 1.0), (32, 2.0), (128, 0.5):
        p = mup.MUP._replace(base_width=base_width)
        assert mup.gradient_multiplier(weights, p) == expected
        assert mup.gradient_multiplier(weights, p._replace(name="sp")) == 1.0


def test_attention_scale():
    assert mup.attention_scale(16, mup.MUP) == 1 / 16 and mup.attention_scale(16, mup.SP) == 1 / 4
    with pytest.raises(KeyError, match="ntk"):
        mup.attention_scale(16, mup.Parametrization("ntk"))


# --------------------------------------------------------------------------------------------------
# The purpose of μP, shown with an MLP of two hidden layers that Adam trains on noisy classes

WIDTHS, STEPS = (32, 256), 40
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than training
RATES = {"mup": 2.0 ** np.arange(-6, -1), "sp": 4.0 ** np.arange(-6, -1)}


@functools.cache
def trained(name):
    """Train at each rate and width. Returns (losses, RMS changes, RMS gradients) of both widths."""
    p, rng = mup.Parametrization(name), np.random.default_rng(1)
    labels, classes = rng.integers(0, 10, (STEPS, 64)), rng.standard_normal((10, 24))
    images = np.float32(classes[labels] + 2.0 * rng.standard_normal((STEPS, 64, 24)))

    def at(width):
        sizes = {"first": ("input", 24, width), "inner": ("hidden", width, width),
                 "logits": ("output", width, 10)}
        weights = {name: mup.matrix(*size) for name, size in sizes.items()}

        def layers(params, x):
            seen = {}
            for name in weights:
                seen[name] = mup.linear(weights[name], params[name], x, p)
                x = jax.nn.relu(seen[name])
            return seen

        def loss(params, images, labels):
            log_p = jax.nn.log_softmax(layers(params, images)["logits"])
            return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))

        def run(rate):
            def step(carry, batch):
                params, state = carry
                value, grads = jax.value_and_grad(loss)(params, *batch)
                updates, state = optimizer.update(grads, state, params)
                params = lopt.apply_updates(params, updates)
                changes = jax.tree.map(jnp.subtract, layers(params, images[0]), first)
                rms = jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x * x)), (changes, grads))
                return (params, state), (value, *rms)

            optimizer = lopt.adamw(rate, update_multipliers=mup.update_multipliers(weights, p))
            params = mup.init(weights, KEY, p)
            first = layers(params, images[0])
            return jax.lax.scan(step, (params, optimizer.init(params)), (images, labels))[1]

        return jax.device_get(jax.jit(jax.vmap(run), compiler_options=QUICK)(RATES[name]))

    return side_by_side(at, WIDTHS)


def slopes(name, what, steps):
    """{name: slopes of ln x against ln width} at the middle rate, after these numbers of steps."""
    at = (2, np.array(steps) - 1)
    narrow, wide = (jax.tree.map(lambda x: np.log(x[at]), run[what]) for run in trained(name))
    return jax.tree.map(lambda n, w: (w - n) / np.log(WIDTHS[1] / WIDTHS[0]), narrow, wide)


def test_changes_are_alike_at_every_width():
    """In SP they grow behind a hidden layer. In μP step 1 changes the read-out only: it is 0."""
    in_mup, in_sp = (slopes(name, 1, (2, 10)) for name in ("mup", "sp"))
    assert max(abs(x).max() for x in in_mup.values()) < 0.1, in_mup
    assert min(in_sp["inner"].min(), in_sp["logits"].min()) > 0.5, in_sp


def test_gradients_fall_as_the_width_grows():
    """In μP as 1/width: the gradient multiplier makes them alike."""
    found = slopes("mup", 2, (10, STEPS))
    assert max(abs(x + 1).max() for x in jax.tree.leaves(found)) < 0.2, found


@pytest.mark.parametrize("name", RATES)
def test_the_best_learning_rate_transfers(name):
    """From width 32 to 256 it moves by at most a factor of 2 in μP, by 4 or more in SP."""
    losses = np.array([run[0][:, -20:].mean(1) for run in trained(name)])
    narrow, wide = losses.argmin(1)
    assert {0, len(RATES[name]) - 1}.isdisjoint({narrow, wide}), losses
    assert abs(narrow - wide) <= 1 if name == "mup" else narrow - wide >= 1, losses
