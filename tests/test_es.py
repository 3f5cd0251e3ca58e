"""PES: the estimator against the reference, its unbiasedness, and its runs and draws."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side, tree
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

import es
import lopt
import tasks
from lopt import Optimizer

KEY, ONES = jax.random.key(7), jnp.ones((2, 1))


def PES(sigma, truncation, shortest, longest, max_offset=None):
    return es.PES(sigma, truncation, shortest, longest, max_offset or truncation)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """XLA compiles in a fifth of the time without its optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_estimator_meets_the_reference():
    data = np.load(GOLDEN_DIR / "pes.npz", allow_pickle=False)

    def vectors(prefix):  # [N, P]
        return jax.vmap(lambda one: ravel_pytree(one)[0])(tree(data, prefix))

    losses = jnp.stack([data["pos_loss"].T, data["neg_loss"].T], axis=-1)  # [N, K, 2]
    counted, after = jnp.asarray(data["counted"].T), jnp.asarray(data["after"].T)
    estimate = jax.jit(jax.vmap(es.pes_gradient, (0, 0, 0, 0, 0, None)))
    gradients, xi = estimate(losses, counted, after, vectors("eps"), vectors("accumulator"),
                             data["std"])
    expected, _ = ravel_pytree(tree(data, "grad"))
    np.testing.assert_allclose(jnp.mean(gradients, axis=0), expected, rtol=1e-5,
                               atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(xi, vectors("next_accumulator"), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.mean(jax.vmap(es.mean_loss)(losses, counted)),
                               data["mean_loss"], rtol=1e-5)
    assert not np.all(counted) and np.any(after) and not np.all(after[:, -1])


def test_a_truncation_without_counted_steps_gives_no_gradient():
    nothing, losses = jnp.zeros(1, bool), jnp.asarray([[1.0, 0.0]])
    gradient, _ = es.pes_gradient(losses, nothing, ~nothing, jnp.ones(2), jnp.ones(2), 0.1)
    np.testing.assert_array_equal(gradient, [0.0, 0.0])
    assert es.mean_loss(losses, nothing) == 0.0


# -------- Unbiasedness
def influence_gradient(theta, length, truncation):
    """Of influence balancing's mean loss, in float64. x₁ is linear in θ, so that σ does not matter.

    A cycle is a run and the step of its reset. A truncation may begin at any step of the cycle, and
    averages its counted steps.
    """
    weights, cycle = np.zeros(length + 1), length + 1
    for start in range(cycle):
        counted = [t for t in np.arange(start, start + truncation) % cycle if t != length]
        weights[counted] += 1 / len(counted) / cycle
    a, v = 0.5 * (np.eye(23) + np.eye(23, k=1)), np.r_[np.ones(10), -np.ones(13)]
    x, dx, gradient = np.ones(23), np.zeros(23), []
    for _ in range(length):
        gradient.append((x[0] - 1.0) * dx[0])
        x, dx = a @ x + theta * v, a @ dx + v
    return weights[:length] @ gradient


CURVATURE = jnp.asarray([1.0, 0.1])


def least_squares(max_loss=1e3):
    """Noisy least squares by SGD. The sum of θ is the logarithm of its learning rate."""
    task = SimpleNamespace(init=lambda key: 1.0 + jax.random.normal(key, (2,)),
                           sample=lambda key, split: 0.5 * jax.random.normal(key, (2,)),
                           loss=lambda w, batch: 0.5 * jnp.sum(CURVATURE * (w - batch) ** 2),
                           max_loss=max_loss)
    return es.Inner(task, lambda theta, steps: Optimizer(
        lambda w: (), lambda g, state, w, value: (-jnp.exp(jnp.sum(theta)) * g, state)))


def measured(inner, pes, theta, keys, truncations, persistent=True, skip=0):
    """(the mean over the pairs of the estimates, its standard error)."""
    g, _ = jax.jit(lambda keys: es.estimates(inner, pes, theta, keys, truncations, persistent,
                                             skip))(keys)
    g = np.asarray(g, np.float64)
    assert g.shape == (len(keys), 1)
    return g.mean(), g.std() / np.sqrt(len(keys))


def test_pes_is_unbiased_and_truncated_es_is_not():
    """Over whole cycles of runs of one length, without the first runs, which offsets shorten."""
    exact, keys = influence_gradient(0.5, 96, 10), es.pair_keys(KEY, jnp.arange(512))
    (pes, error), (truncated, other_error) = side_by_side(lambda persistent: measured(
        es.influence_balancing(), PES(0.01, 10, 96, 96), jnp.asarray([0.5]), keys, 11 + 97,
        persistent, skip=11), (True, False))
    print(f"exact {exact:.2f}, PES {pes:.2f} ± {error:.2f}, ES {truncated:.2f} ± {other_error:.2f}")
    assert error < 0.03 * abs(exact) and abs(pes - exact) < 4 * error
    assert abs(truncated - exact) > 10 * max(error, other_error)


def test_pes_is_unbiased_with_runs_of_random_lengths():
    """The exact gradient is the derivative through the same runs, unperturbed for a tiny σ."""
    inner, keys = least_squares(), es.pair_keys(KEY, jnp.arange(1024))
    pes, theta = PES(0.01, 5, 7, 40), jnp.asarray([-1.2])

    def mean_loss(theta):
        unperturbed = pes._replace(sigma=1e-30)
        return jnp.mean(es.estimates(inner, unperturbed, theta, keys, 40)[1])

    (exact,), (mean, error) = side_by_side(lambda function: function(theta), (
        jax.jit(jax.grad(mean_loss)), lambda theta: measured(inner, pes, theta, keys, 40)))
    assert error < 0.04 * abs(exact) and abs(mean - exact) < 4 * error


# -------- Runs and their resets
def play(inner, pes, thetas, n, truncations, split=None):
    """Unroll N pairs at thetas [2, P] for several truncations.

    Returns, as NumPy arrays, the pairs at first, the pairs after each truncation [T, N, …], losses
    [N, T·K, 2], counted [N, T·K] and after [N, T·K].
    """
    def one(key):
        def truncation(pair, i):
            pair, *recorded = es.unroll(inner, pes, key, pair, thetas, split, i)
            return pair, (pair, recorded)

        first = es.new_pair(inner, pes, key, thetas[0])
        return first, *jax.lax.scan(truncation, first, jnp.arange(truncations))[1]

    first, pairs, recorded = jax.device_get(jax.jit(jax.vmap(
        one, axis_name=es.SIDE_BY_SIDE))(es.pair_keys(KEY, jnp.arange(n))))
    return (first, jax.tree.map(lambda x: np.moveaxis(x, 1, 0), pairs),
            *(x.reshape(n, -1, *x.shape[3:]) for x in recorded))


def counting():
    """The loss counts the updates of a run; its fraction marks the run's initial weights."""
    task = SimpleNamespace(init=lambda key: 0.9 * jax.random.uniform(key), max_loss=1e6,
                           sample=lambda key, split: (), loss=lambda w, batch: w)
    return es.Inner(task, lambda theta, steps: Optimizer(
        lambda w: jnp.zeros((), jnp.int32), lambda g, count, w, value: (theta[0], count + 1)))


def test_runs_count_their_steps_and_begin_anew():
    length, n, k = 9, 16, 6
    pes = PES(0.1, k, length, length)
    first, pairs, losses, counted, after = play(counting(), pes, ONES, n, 6)
    np.testing.assert_array_equal(losses[..., 0], losses[..., 1])
    for j in range(n):
        step, updates, began, marks = int(first.run_step[j]), 0, False, [losses[j, 0, 0] % 1]
        for t in range(36):
            due = step == length
            began = began and t % k > 0 or due
            assert counted[j, t] != due and after[j, t] == began, (j, t)
            if due:
                step, updates = 0, 0
                marks.append(losses[j, t + 1, 0] % 1 if t < 35 else -1.0)
            else:
                assert losses[j, t, 0] == pytest.approx(updates + marks[-1], abs=1e-5), (j, t)
                step, updates = step + 1, updates + 1
        assert pairs.run_step[-1, j] == step
        np.testing.assert_array_equal(pairs.opt_state[-1, j], [updates, updates])  # began anew, too
        assert len(marks) >= 4 and len(set(np.round(marks, 5))) == len(marks)  # weights differ


def test_lengths_are_log_uniform_and_offsets_uniform():
    n, pes = 20_000, PES(0.1, 50, 100, 1000, 80)
    pairs = jax.jit(jax.vmap(lambda key: es.new_pair(counting(), pes, key, jnp.ones(1))))(
        es.pair_keys(KEY, jnp.arange(n)))
    lengths = np.asarray(pairs.length)
    assert lengths.dtype == np.int32 and lengths.min() >= 100 and lengths.max() <= 1000
    shares = np.quantile(np.log10(lengths / 100), [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(shares, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.02)
    counts = np.bincount(pairs.run_step, minlength=80)
    assert len(counts) == 80 and np.abs(counts - n / 80).max() < 5 * np.sqrt(n / 80)
    assert pairs.xi.shape == (n, 1) and not np.any(pairs.xi)


def test_each_run_is_told_its_own_length_and_loss():
    """Both at initialisation and in updates. Later runs draw new lengths. No loss is clipped."""
    def optimizer(theta, steps):
        return Optimizer(
            lambda w: {"begun for": steps, "updated for": jnp.int32(-1), "value": jnp.float32(0)},
            lambda g, state, w, value: (-jnp.exp(theta[0]) * g,
                                        {**state, "updated for": steps, "value": value}))

    inner = es.Inner(least_squares(max_loss=0.4).task, optimizer)
    _, pairs, losses, counted, _ = play(inner, PES(0.1, 1, 3, 9),
                                        jnp.asarray([[-1.0], [-2.0]]), 8, 24)
    lengths, state, counted = pairs.length[..., None], pairs.opt_state, counted.T[..., None]
    np.testing.assert_array_equal(state["begun for"], np.broadcast_to(lengths, (24, 8, 2)))
    np.testing.assert_array_equal(state["updated for"], np.where(counted, lengths, -1) + [0, 0])
    clipped = np.minimum(state["value"], 0.4)
    np.testing.assert_array_equal(np.where(counted, clipped - losses.swapaxes(0, 1), 0), 0)
    assert lengths.min() >= 3 and lengths.max() <= 9
    assert all(len(set(lengths[:, j, 0])) > 1 for j in range(8))
    told = state["value"][counted[..., 0]]
    assert np.any(told > 0.4) and np.mean(told[:, 0] != told[:, 1]) > 0.5


def test_losses_are_clipped_and_a_diverged_run_recovers():
    """The loss grows to infinity and NaN at θ+ε, and falls below 0 at θ−ε, until the reset."""
    task = SimpleNamespace(init=lambda key: jnp.float32(1.0), sample=lambda key, split: (),
                           loss=lambda w, batch: w - 0.0 * w * w, max_loss=2.5)
    inner = es.Inner(task, lambda theta, steps: Optimizer(
        lambda w: jnp.zeros(()), lambda g, state, w, value: (theta[0] * (1.0 + jnp.abs(w)),
                                                             state + g * w)))
    _, pairs, losses, counted, _ = play(inner, PES(0.1, 7, 12, 12),
                                        jnp.asarray([[1e30], [-1.0]]), 3, 5)
    plus, minus = losses[..., 0], losses[..., 1]
    assert np.all(plus[:, 1:5] == 2.5) and np.all(minus[:, 1:5] == 0.0)
    assert np.all((losses >= 0.0) & (losses <= 2.5))
    for j in range(3):
        resets = np.flatnonzero(~counted[j])
        assert len(resets) >= 2
        for t in resets[resets + 2 < 35]:
            assert plus[j, t + 1] == minus[j, t + 1] == 1.0  # the first loss of the fresh run
            assert plus[j, t + 2] == 2.5 and minus[j, t + 2] == 0.0


def test_meta_training_and_evaluation_train_by_the_same_step(monkeypatch):
    """On equal weights and batches, `es.unroll` and `tasks.train` have the same losses."""
    task = SimpleNamespace(init=lambda key: {"w": jnp.ones(2), "b": jnp.zeros(2)},
                           sample=lambda key, split: split, max_loss=1e3,
                           loss=lambda x, batch: jnp.sum((x["w"] * batch + x["b"]) ** 2))
    batch, rates = jnp.asarray([1.0, 0.3]), jnp.asarray([[0.1], [0.02]])
    inner = es.Inner(task, lambda theta, steps: lopt.adamw(theta[0] / steps))
    _, _, losses, _, _ = play(inner, PES(0.1, 8, 8, 8, 1), rates, 1, 1, batch)
    train = jax.jit(jax.vmap(lambda rate: tasks.train(
        task, lambda steps: inner.optimizer(rate, steps), batch, KEY, 8)[1]))
    np.testing.assert_allclose(losses[0].T, train(rates), rtol=1e-6)
    assert losses[0, -1, 0] < losses[0, -1, 1] < losses[0, 0, 0]
    assert es.inner_step is tasks.inner_step


# -------- Randomness
def test_both_signs_share_batches_which_no_other_step_or_pair_has():
    task = SimpleNamespace(init=lambda key: jnp.zeros(()), max_loss=1.0,
                           sample=lambda key, split: jax.random.uniform(key),
                           loss=lambda w, batch: batch)
    _, _, losses, counted, _ = play(es.Inner(task, counting().optimizer), PES(0.1, 8, 10, 15),
                                    ONES, 6, 4)
    np.testing.assert_array_equal(losses[..., 0], losses[..., 1])
    assert not np.all(counted) and len(np.unique(losses[..., 0])) == 6 * 32


def test_draws_depend_on_the_pair_the_purpose_and_the_time():
    keys = {tuple(jax.random.key_data(es.draw_key(key, purpose, time)).tolist())
            for key in es.pair_keys(KEY, jnp.arange(3)) for purpose in es.DRAWS
            for time in jnp.asarray([-1, 0, 1, 5])}
    assert len(keys) == 3 * 5 * 4


def test_perturbations_are_fresh_and_normal_with_the_given_standard_deviation():
    """ξ after one truncation is ε, as it was 0 before."""
    pes, theta = PES(0.3, 1, 9, 9), jnp.zeros(27)

    def draws(key, meta_step):
        pair = es.new_pair(counting(), pes, key, theta)
        return es.unroll_pair(counting(), pes, key, pair, theta, None, meta_step)[1].xi

    draws = jax.vmap(jax.vmap(draws, (0, None), axis_name=es.SIDE_BY_SIDE), (None, 0))
    eps = np.asarray(jax.jit(draws)(es.pair_keys(KEY, jnp.arange(250)), jnp.arange(2)))
    assert eps.shape == (2, 250, 27) and len(np.unique(eps)) > 0.999 * eps.size
    assert eps.std() == pytest.approx(0.3, rel=0.03) and abs(eps.mean()) < 0.01
    assert np.mean(np.abs(eps) < 0.3) == pytest.approx(0.6827, abs=0.015)


PROBLEM, THETA = (least_squares(), PES(0.01, 6, 9, 14)), jnp.full(3, -0.4)


@functools.cache
def meta_step_on(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("pairs",)) if devices else None
    return jax.jit(es.over_pairs(lambda key, pair, i: es.unroll_pair(
        *PROBLEM, key, pair, THETA, None, i), mesh))


first_pairs = jax.jit(jax.vmap(lambda key: es.new_pair(*PROBLEM, key, THETA)))


def meta_steps(devices, first=0, seed=7):
    """((mean gradient, mean loss), pairs) after each of four meta-steps of the pairs first to 7."""
    keys = es.pair_keys(jax.random.key(seed), jnp.arange(8))
    pairs, keys = jax.tree.map(lambda x: x[first:], (jax.device_get(first_pairs(keys)), keys))
    steps = [((), pairs)]
    for i in range(4):
        steps.append(jax.device_get(meta_step_on(devices)(keys, steps[-1][1], np.int32(i))))
    return jax.tree.map(lambda *xs: np.stack(xs), *steps[1:])


@pytest.fixture(scope="module")
def alone():
    jax.config.update("jax_disable_most_optimizations", False)  # for bits as meta_train.py has them
    return meta_steps(devices=1)


def test_the_number_of_devices_changes_no_bit(alone):
    for others in side_by_side(meta_steps, (2, 4)):
        jax.tree.map(np.testing.assert_array_equal, others, alone)
    (gradients, losses), pairs = alone
    assert gradients.shape == (4, 3) and np.all(gradients) and losses.shape == (4,)
    assert len(np.unique(pairs.xi)) > 80 and np.any(pairs.run_step < 4)  # there were resets


def test_a_pair_depends_on_the_seed_and_its_number_alone(alone):
    (values, half), (_, other_seed) = (meta_steps(None, 4, seed) for seed in (7, 8))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 4:], b), alone[1], half)
    assert not np.any(half.params == other_seed.params)
    assert not np.any(values[1] == alone[0][1])  # the mean is over these pairs


def test_pairs_side_by_side_are_pairs_one_by_one(alone, monkeypatch):
    """An accelerator unrolls all pairs at once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
                 meta_steps(0), alone)
