"""`mup.infer`: each tensor's kind and fan_in from two widths, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side

import lopt
import mup

N, W = 32, 64  # the narrow and the wide width


def infer(tree_of, widths=(N, W), **options):
    """The declaration of a network, given as a function from the width to a tree of shapes."""
    narrow, wide = (jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree_of(n),
                                 is_leaf=lambda x: isinstance(x, tuple)) for n in widths)
    return mup.infer(narrow, wide, **options)


KINDS = {
    "layers": lambda n: [
        ((7, n), "input", 7), ((1, n), "input", 1), ((n, n), "hidden", n),
        ((n, 4 * n), "hidden", n), ((4 * n, n), "hidden", 4 * n), ((n, 10), "output", n),
        ((49 * n, 10), "output", 49 * n), ((n,), "vector", 1), ((3 * n,), "vector", 1),
        ((), "vector", 1), ((10,), "vector", 1)],
    "convolutions, depthwise, in groups": lambda n: [
        ((5, n, n), "hidden", 5 * n), ((3, 3, 3, n), "input", 27), ((3, 3, n, n), "hidden", 9 * n),
        ((3, 3, n, 3), "output", 9 * n), ((2, 3, 4, n, 2 * n), "hidden", 24 * n),
        ((3, 3, 1, n), "input", 9), ((3, 3, n // 4, n), "hidden", 9 * n // 4)],
    "more heads, wider heads": lambda n: [
        ((n, n // 8, 8), "hidden", n), ((n // 8, 8, n), "hidden", n),
        ((n, 4, n // 4), "hidden", n), ((4, n // 4, n), "hidden", n)],
    "outputs first": lambda n: [
        ((n, 3), "input", 3), ((2 * n, n), "hidden", n), ((10, n), "output", n),
        ((n,), "vector", 1), ((n, 3, 5, 5), "input", 75), ((n, n, 3, 3), "hidden", 9 * n)]}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    cases, transposed = KINDS[name], name == "outputs first"
    found = infer(lambda n: [case[0] for case in cases(n)], transposed=transposed)
    assert [(w.shape, w.kind, w.fan_in) for w in found] == cases(W)


def test_stacked_layers():
    """Their axes stay in the shape and count neither for the kind nor for fan_in."""
    found = infer(lambda n: {"net": {"blocks": {"w": (5, n, 2 * n), "b": (5, n)}},
                             "conv": (5, n, n), "grid": [(2, 5, 7, n), (n // 8, 5, n)]},
                  stacked={"blocks": 1, "grid": 2})
    assert found["net"]["blocks"] == {"w": mup.Weight("hidden", (5, W, 2 * W), W),
                                      "b": mup.Weight("vector", (5, W), 1)}
    assert found["conv"] == mup.Weight("hidden", (5, W, W), 5 * W)
    assert found["grid"] == [mup.Weight("input", (2, 5, 7, W), 7),
                             mup.Weight("vector", (8, 5, W), 1)]


def test_leaves_that_do_not_grow_are_filled_or_no_weights():
    """A matrix that does not grow begins as N(0, 1/fan_in). A number that fills one is kept."""
    declared = mup.Weight("hidden", (W, 3, W // 8, 8), W)
    narrow, wide = ({
        "w": np.zeros((n, n)), "gain": jnp.ones(n, jnp.bfloat16), "zeros": np.zeros((2, 3)),
        "fixed": np.arange(6.0), "table": np.arange(32.0).reshape(2, 2, 8), "qkv": declared,
        "count": np.zeros((), int), "mask": np.ones(n, bool), "function": jax.nn.relu}
        for n in (N, W))
    assert mup.infer(narrow, wide) == {
        "w": mup.Weight("hidden", (W, W), W), "gain": mup.Weight("vector", (W,), 1, constant=1.0),
        "zeros": mup.Weight("vector", (2, 3), 1, constant=0.0),
        "fixed": mup.Weight("vector", (6,), 1), "qkv": declared,
        "table": mup.Weight("vector", (2, 2, 8), 1, std=0.5),
        "count": None, "mask": None, "function": None}


@pytest.mark.parametrize("tree_of, name", [
    (lambda n: {"a": {"w": (n, n, n)}}, "a/w"), (lambda n: [(3, n), (n, 2, 8)], "1"),
    (lambda n: {"torch": (n, n, 3, 3)}, "torch"), (lambda n: {"qkv": (n, 3, n // 8, 8)}, "qkv"),
    (lambda n: {"w": (n,) * (n // N)}, "w"), (lambda n: {"w": (n, n), f"of_{n}": (n, n)}, "of_64"),
    (lambda n: {"w": (5, 5), "b": (5,)}, "no tensor grows"), (lambda n: {}, "no tensor grows")])
def test_ambiguous_shapes_are_refused(tree_of, name):
    with pytest.raises(ValueError, match=f"^{name}") as error:
        infer(tree_of)
    assert "\n" not in str(error.value)


def test_mulo_trains_a_network_alike_at_two_widths():
    """A network that is not ours, with a convolution and an attention of 8 units a head."""
    learned, rng = lopt.load(ROOT / "results" / "mulo_m_128.npz"), np.random.default_rng(0)
    p, labels = learned.parametrization, rng.integers(0, 10, (40, 32))
    images = 0.5 * rng.standard_normal((10, 192))[labels] + rng.standard_normal((40, 32, 192))

    def run(n):
        weights = infer(lambda n: {"stem": (3, 3, 3, n), "qkv": (3, n, n // 8, 8),
                                   "out": (n // 8, 8, n), "logits": (n, 10)},
                        (n // 2, n), stacked={"qkv": 1})
        optimizer = lopt.learned_optimizer(learned, mup.update_multipliers(weights, p),
                                           mup.gradient_multiplier(weights, p))

        def loss(params, x, labels):
            x = jax.lax.conv_general_dilated(x.reshape(-1, 8, 8, 3), params["stem"], (2, 2), "SAME",
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x).reshape(len(x), -1, n)
            q, k, v = jnp.einsum("blw,iwhs->iblhs", x, params["qkv"])
            scores = mup.attention_scale(8, p) * jnp.einsum("blhs,bmhs->bhlm", q, k)
            x += jnp.einsum("bhlm,bmhs,hsw->blw", jax.nn.softmax(scores), v, params["out"])
            logits = weights["logits"].rule(p).forward * jnp.mean(x, 1) @ params["logits"]
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

        def step(carry, batch):
            value, grads = jax.value_and_grad(loss)(carry[0], *batch)
            updates, state = optimizer.update(grads, carry[1], carry[0])
            return (lopt.apply_updates(carry[0], updates), state), value

        params = mup.init(weights, jax.random.key(0), p)
        batches = jnp.float32(images), labels
        return jnp.mean(jax.lax.scan(step, (params, optimizer.init(params)), batches)[1][-10:])

    run = jax.jit(run, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    narrow, wide = map(float, side_by_side(run, (16, 48)))
    assert narrow < 2.1 and narrow == pytest.approx(wide, abs=0.1)
