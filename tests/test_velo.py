"""VeLO against the numbers of the reference implementation, and its interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, tree

import lopt


def some_learned(lstm_hidden=8, bank=5, seed=0):
    return lopt.Learned(lopt.init_velo_theta(jax.random.key(seed), lstm_hidden, bank), 0.001, 0.001,
                        architecture="velo")


def some_params(seed=1):
    shapes = {"vector": (7,), "wide": (3, 5), "conv": (3, 4, 4)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}


def test_velo_meets_the_reference():
    """All tensors after each step, to 2e-5 of a tensor's largest weight."""
    data = np.load(GOLDEN_DIR / "velo.npz", allow_pickle=False)
    learned = lopt.Learned(tree(data, "theta"), 0.001, 0.001, architecture="velo")
    optimizer = lopt.velo(learned, num_steps=int(data["num_steps"]))
    params = tree(data, "params0")
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    steps = sum(name.startswith("loss") for name in data.files)
    assert steps > 0
    worst = 0.0
    for t in range(steps):
        updates, state = update(tree(data, f"grads{t}"), state, params, value=data[f"loss{t}"])
        params = lopt.apply_updates(params, updates)
        expected = tree(data, f"params{t + 1}")
        assert set(expected) == set(params)
        for name, x in expected.items():
            error = np.max(np.abs(params[name] - x)) / np.max(np.abs(x))
            worst = max(worst, error)
            assert error <= 2e-5, f"{name}, step {t}: {error:.1e}"
    print(f"largest error: {worst:.2e} of the tensor's largest weight")


def test_jit_scan_and_vmap_with_a_traced_number_of_steps():
    """A run in a scan, two of different planned lengths under vmap, equals single updates one after the other."""
    learned, params = some_learned(), some_params()
    grads = jax.tree.map(lambda p: jnp.stack([p, -0.5 * p, 0.1 * p]), params)
    losses = jnp.array([2.0, 1.5, 1.7])

    def run(num_steps):
        optimizer = lopt.velo(learned, num_steps=num_steps)

        def step(carry, x):
            updates, state = optimizer.update(x[0], carry[1], carry[0], value=x[1])
            return (lopt.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), (grads, losses))[0][0]

    both = jax.jit(jax.vmap(run))(jnp.array([20, 3000]))
    update = jax.jit(lambda num_steps, *args: lopt.velo(learned, num_steps=num_steps).update(*args[:3], value=args[3]))
    for i, num_steps in enumerate((20, 3000)):
        p, state = params, lopt.velo(learned, num_steps=num_steps).init(params)
        for t in range(3):
            updates, state = update(num_steps, jax.tree.map(lambda g: g[t], grads), state, p, losses[t])
            p = lopt.apply_updates(p, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=1e-6), both, p)


def test_empty_tensors_take_no_part():
    """They have no mean, and the update of the others is as if they were not there; so is one of nothing at all."""
    optimizer, params = lopt.velo(some_learned(), num_steps=10), some_params()
    more = {**params, "empty": jnp.zeros((3, 0)), "none": jnp.zeros(0)}
    one_update = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p, value=1.0))
    (plain, _), (updates, _) = one_update(params), one_update(more)
    assert updates["empty"].shape == (3, 0) and updates["none"].shape == (0,)
    for name, x in plain.items():
        np.testing.assert_allclose(updates[name], x, rtol=1e-5)
    assert all(np.isfinite(u).all() for u in updates.values())
    for nothing in ({}, {"none": jnp.zeros(0)}):
        updates, state = one_update(nothing)
        assert jax.tree.structure(updates) == jax.tree.structure(nothing) and state.step == 1


def test_the_gradient_multiplier_comes_before_the_clip():
    learned, params = some_learned(), some_params()
    (_, a), (_, b) = [jax.jit(lambda g: o.update(g, o.init(params), params, value=1.0))(g) for o, g in (
        (lopt.velo(learned, gradient_multiplier=1e6, num_steps=10), params),
        (lopt.velo(learned, num_steps=10), jax.tree.map(lambda p: 1e6 * p, params)))]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert max(jnp.max(jnp.abs(x.m)) for x in a.averages) <= 100.001


def test_what_is_missing_is_said_in_one_line():
    learned, params = some_learned(), some_params()
    with pytest.raises(ValueError, match="num_steps=1000"):
        lopt.velo(learned)
    with pytest.raises(ValueError, match="num_steps is 0"):
        lopt.velo(learned, num_steps=0)
    optimizer = lopt.velo(learned, num_steps=10)
    with pytest.raises(ValueError, match="value=loss"):
        optimizer.update(params, optimizer.init(params), params)
    theta = dict(learned.theta)
    theta["rnn_params/rnn/linear/w"] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match="rnn/linear/w.*should be"):
        lopt.velo(learned._replace(theta=theta), num_steps=10)
    del theta["rnn_params/rnn/linear/w"]
    with pytest.raises(ValueError, match="missing"):
        lopt.velo(learned._replace(theta=theta), num_steps=10)


def test_fresh_theta():
    theta = jax.jit(lambda: lopt.init_velo_theta(jax.random.key(0), 512, 256))()
    assert sum(x.size for x in theta.values()) == 2_320_385
    w = theta["rnn_params/rnn/linear/w"]
    assert abs(float(jnp.std(w)) * np.sqrt(1024) - 0.88) < 0.01 and not theta["rnn_params/rnn/linear/b"].any()
    assert not theta["lstm_init_state/cell"].any()
