"""PES: the estimator against the reference, its unbiasedness, and the rules of runs, resets and randomness."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

import es
from lopt import Optimizer

KEY = jax.random.key(7)


def test_the_estimator_meets_the_reference():
    data = np.load(GOLDEN_DIR / "pes.npz", allow_pickle=False)
    tree = lambda prefix: {name.split("/")[1]: jnp.asarray(data[name]) for name in sorted(data.files)
                           if name.startswith(prefix + "/")}
    flat = lambda prefix: jax.vmap(lambda one: ravel_pytree(one)[0])(tree(prefix))  # (N, P)
    assert tree("grad")
    unravel = ravel_pytree(tree("grad"))[1]
    losses = jnp.stack([data["pos_loss"].T, data["neg_loss"].T], axis=-1)  # (N, K, 2)
    counted, after = jnp.asarray(data["counted"].T), jnp.asarray(data["after"].T)
    estimate = jax.jit(jax.vmap(es.pes_gradient, (0, 0, 0, 0, 0, None)))
    gradients, xi = estimate(losses, counted, after, flat("eps"), flat("accumulator"), data["std"])
    gradient, xi = unravel(jnp.mean(gradients, axis=0)), jax.vmap(unravel)(xi)
    for name, expected in tree("grad").items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for name, expected in tree("next_accumulator").items():
        np.testing.assert_allclose(xi[name], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.mean(jax.vmap(es.mean_loss)(losses, counted)), data["mean_loss"], rtol=1e-5)


def test_accumulators_add_up_and_begin_anew_with_a_run():
    losses, eps, xi = jnp.ones((3, 2)), jnp.asarray([0.5, 0.25]), jnp.asarray([2.0, 3.0])
    for after, expected in (([False] * 3, [2.5, 3.25]), ([False, True, True], [0.5, 0.25])):
        after = jnp.asarray(after)
        _, accumulator = es.pes_gradient(losses, ~after, after, eps, xi, 0.1)
        np.testing.assert_array_equal(accumulator, expected)


def test_a_truncation_without_counted_steps_gives_no_gradient():
    nothing, ones = jnp.zeros(1, bool), jnp.ones(2)
    gradient, _ = es.pes_gradient(jnp.asarray([[1.0, 0.0]]), nothing, ~nothing, ones, ones, 0.1)
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


# ---------------------------------------------------------------------------------------------------------
# Unbiasedness


def step_weights(length: int, truncation: int) -> np.ndarray:
    """How much each step of a run counts in the mean over truncations of the mean over their counted steps.

    Runs of one length make a cycle of length + 1 steps, the last being the reset; a truncation may begin at any.
    """
    weights, cycle = np.zeros(length + 1), length + 1
    for start in range(cycle):
        counted = [step for step in np.arange(start, start + truncation) % cycle if step != length]
        weights[counted] += 1 / len(counted) / cycle
    return weights[:length]


def influence_gradient(theta: float, length: int, truncation: int) -> float:
    """Of the mean loss, in float64: x₁ is linear in θ, so that smoothing by σ does not change it."""
    a = 0.5 * (np.eye(23) + np.eye(23, k=1))
    v = np.r_[np.ones(10), -np.ones(13)]
    x, dx, gradient = np.ones(23), np.zeros(23), []
    for _ in range(length):
        gradient.append((x[0] - 1.0) * dx[0])
        x, dx = a @ x + theta * v, a @ dx + v
    return float(step_weights(length, truncation) @ gradient)


CURVATURE, NOISE = jnp.asarray([1.0, 0.1]), 0.5


def least_squares() -> es.Inner:
    """Noisy least squares in two dimensions by SGD; the sum of θ is the logarithm of its learning rate."""
    def optimizer(theta, num_steps):
        return Optimizer(lambda w: (), lambda g, state, w, *, value: (-jnp.exp(jnp.sum(theta)) * g, state))

    return es.Inner(es.Problem(lambda key: 1.0 + jax.random.normal(key, (2,)),
                               lambda key, split: NOISE * jax.random.normal(key, (2,)),
                               lambda w, b: 0.5 * jnp.sum(CURVATURE * (w - b) ** 2), max_loss=1e3), optimizer)


def least_squares_gradient(log_lr: float, length: int, truncation: int) -> float:
    """Of the expected mean loss: E[w²] ← (1 − ηh)² E[w²] + (ηh)² noise², starting at 2."""
    def loss(log_lr):
        square, losses = jnp.full(2, 2.0), []
        rate = jnp.exp(log_lr) * CURVATURE
        for _ in range(length):
            losses.append(0.5 * jnp.sum(CURVATURE * (square + NOISE**2)))
            square = (1 - rate) ** 2 * square + (rate * NOISE) ** 2
        return step_weights(length, truncation) @ jnp.stack(losses)

    return float(jax.grad(loss)(log_lr))


PROBLEMS = {"influence balancing": (es.influence_balancing, 0.5, 96, 10, influence_gradient, 512),
            "least squares": (least_squares, -1.2, 20, 5, least_squares_gradient, 2048)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_pes_is_unbiased_and_truncated_es_is_not(name):
    """Runs of one length, longer than a truncation, over whole cycles of resets (the first runs left out)."""
    make, value, length, truncation, gradient, repeats = PROBLEMS[name]
    theta, truth = jnp.asarray([value]), gradient(value, length, truncation)
    keys, settings = es.pair_keys(KEY, jnp.arange(repeats)), es.Settings(0.01, truncation, length, length)
    skip = -(-length // truncation) + 1
    truncations = skip + (length + 1) * (1 if length > 50 else 4)

    def measure(persistent):
        g = np.asarray(es.independent_estimates(make(), theta, keys, truncations, settings, persistent=persistent,
                                                skip=skip), np.float64)
        assert g.shape == (repeats, 1)
        return g.mean(), g.std() / np.sqrt(repeats)

    (pes, pes_error), (truncated, truncated_error) = side_by_side(measure, (True, False))
    print(f"{name}: exact {truth:.4f}, PES {pes:.4f} ± {pes_error:.4f}, "
          f"truncated ES {truncated:.4f} ± {truncated_error:.4f}")
    assert pes_error < 0.03 * abs(truth)
    assert abs(pes - truth) < 4 * pes_error, (pes, pes_error, truth)
    assert abs(truncated - truth) > 10 * max(truncated_error, pes_error), (truncated, truncated_error, truth)


def test_pes_is_unbiased_with_runs_of_random_lengths():
    """Against the derivative through the same runs (weights, batches, lengths, offsets), first runs included."""
    keys, settings = es.pair_keys(KEY, jnp.arange(2048)), es.Settings(0.01, 5, 7, 40)
    arguments = (least_squares(), jnp.asarray([-1.2]), keys, 40, settings)
    exact = float(es.exact_gradient(*arguments)[1][0])
    estimates = side_by_side(lambda persistent: es.independent_estimates(*arguments, persistent=persistent),
                             (True, False))
    for persistent, estimate in zip((True, False), estimates):
        g = np.asarray(estimate, np.float64)
        error, miss = g.std() / np.sqrt(g.size), abs(g.mean() - exact)
        print(f"random lengths: exact {exact:.4f}, {'PES' if persistent else 'truncated ES'} "
              f"{g.mean():.4f} ± {error:.4f}")
        assert error < 0.04 * abs(exact)
        assert miss < 4 * error if persistent else miss > 10 * error


def test_the_exact_gradient_of_the_demonstration_is_exact():
    _, exact = es.exact_gradient(es.influence_balancing(), jnp.asarray([0.5]), es.pair_keys(KEY, jnp.arange(2)), 31 + 4,
                                 es.Settings(0.1, 10, 30, 30), skip=4)
    np.testing.assert_allclose(exact, [influence_gradient(0.5, 30, 10)], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Runs and their resets


def counting() -> es.Inner:
    """A run whose loss tells its story: the whole part counts its updates, the rest marks its initial weights.

    The optimizer's state counts its updates, too; its update is the first of θ (1 for the whole part to count).
    """
    def optimizer(theta, num_steps):
        return Optimizer(lambda w: jnp.zeros((), jnp.int32),
                         lambda g, count, w, *, value: ({"w": theta[0] * jnp.ones(())}, count + 1))

    return es.Inner(es.Problem(lambda key: {"w": 0.9 * jax.random.uniform(key)}, lambda key, split: (),
                               lambda params, batch: params["w"], max_loss=1e6), optimizer)


class Recorded(NamedTuple):
    """What several truncations of N pairs record, one after the other: losses [N, T, 2]; counted, after [N, T]."""
    losses: np.ndarray
    counted: np.ndarray
    after: np.ndarray


def begin_all(inner, theta, keys, settings):
    """N pairs, each at the start of its first run."""
    return jax.jit(jax.vmap(lambda key: es.begin(inner, theta, key, settings)))(keys)


def unroll_all(inner, thetas, pairs, keys, settings, truncations):
    """Several truncations of N pairs at thetas [2, P]: (the pairs at last, `Recorded`)."""
    step = jax.jit(jax.vmap(lambda key, pair, i: es.unroll(inner, thetas, pair, key, None, i, settings), (0, 0, None),
                            axis_name=es.SIDE_BY_SIDE))
    recorded = []
    for i in range(truncations):
        pairs, *records = step(keys, pairs, jnp.int32(i))
        recorded.append(jax.tree.map(np.asarray, records))
    return pairs, Recorded(*(np.concatenate(x, axis=1) for x in zip(*recorded)))


ONE = jnp.ones(1)


def test_runs_count_their_steps_and_begin_anew():
    settings, n = es.Settings(0.1, 6, 9, 9), 16
    keys = es.pair_keys(KEY, jnp.arange(n))
    first = begin_all(counting(), ONE, keys, settings)
    last, (losses, counted, after) = unroll_all(counting(), jnp.ones((2, 1)), first, keys, settings, 6)
    steps = losses.shape[1]
    assert steps == 36
    for j in range(n):
        loss = losses[j, :, 0]
        counter, update, mark, began = int(first.run_step[j]), 0, loss[0] % 1, False
        marks = [mark]
        for t in range(steps):
            began = began and t % settings.truncation > 0
            due = counter == 9
            began = began or due
            assert counted[j, t] != due and after[j, t] == began, (j, t)
            if due:
                counter, update = 0, 0
                marks.append(loss[t + 1] % 1 if t + 1 < steps else -1.0)
            else:
                assert loss[t] == pytest.approx(update + marks[-1], abs=1e-5), (j, t)
                counter, update = counter + 1, update + 1
        assert int(last.run_step[j]) == counter
        np.testing.assert_array_equal(last.opt_state[j], [update, update])  # the optimizer began anew as well
        assert len(marks) >= 4 and len(set(np.round(marks, 5))) == len(marks), "fresh weights must differ"
    assert len(set(np.asarray(first.run_step).tolist())) > 1, "pairs must not be reset in lockstep"


@pytest.mark.parametrize("max_offset, bound", [(None, 50), (80, 80)])
def test_lengths_are_log_uniform_and_offsets_uniform(max_offset, bound):
    n, settings = 20_000, es.Settings(0.1, 50, 100, 1000, max_offset)
    pairs = begin_all(counting(), ONE, es.pair_keys(KEY, jnp.arange(n)), settings)
    lengths, offsets = np.asarray(pairs.length), np.asarray(pairs.run_step)
    assert lengths.dtype == np.int32 and lengths.min() >= 100 and lengths.max() <= 1000
    shares = np.quantile(np.log(lengths / 100) / np.log(10), [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(shares, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.02)
    counts = np.bincount(offsets, minlength=bound)
    assert len(counts) == bound and np.abs(counts - n / bound).max() < 5 * np.sqrt(n / bound)
    assert pairs.xi.shape == (n, 1) and not np.any(pairs.xi)


def test_later_runs_draw_new_lengths():
    inner, settings, keys = counting(), es.Settings(0.1, 10, 10, 20), es.pair_keys(KEY, jnp.arange(32))
    pairs = begin_all(inner, ONE, keys, settings)
    step = jax.jit(jax.vmap(lambda key, pair, i: es.unroll(inner, jnp.ones((2, 1)), pair, key, None, i, settings),
                            (0, 0, None), axis_name=es.SIDE_BY_SIDE))
    seen = [pairs.length]
    for i in range(6):
        pairs, *_ = step(keys, pairs, jnp.int32(i))
        seen.append(pairs.length)
    seen = np.stack(seen)
    assert seen.min() >= 10 and seen.max() <= 20
    assert np.mean([len(set(column)) > 1 for column in seen.T]) > 0.8


def test_losses_are_clipped_and_a_diverged_run_recovers():
    """The loss grows to infinity and NaN at θ+ε, and falls below 0 at θ−ε, until the reset."""
    def optimizer(theta, num_steps):
        return Optimizer(lambda w: jnp.zeros(()), lambda g, state, w, *, value: (theta[0] * (1.0 + jnp.abs(w)),
                                                                                 state + g * w))

    inner = es.Inner(es.Problem(lambda key: jnp.float32(1.0), lambda key, split: (), lambda w, batch: w - 0.0 * w * w,
                                2.5), optimizer)
    settings, n = es.Settings(0.1, 7, 12, 12), 3
    keys = es.pair_keys(KEY, jnp.arange(n))
    pairs = begin_all(inner, ONE, keys, settings)
    _, (losses, counted, _) = unroll_all(inner, jnp.asarray([[1e30], [-1.0]]), pairs, keys, settings, 5)
    pos, neg = losses[..., 0], losses[..., 1]
    assert np.all(np.isfinite(pos)) and pos.max() <= 2.5 and neg.min() >= 0.0
    assert np.all(neg[:, 1:5] == 0.0) and np.all(pos[:, 1:5] == 2.5)
    for j in range(n):
        resets = np.flatnonzero(~counted[j])
        assert len(resets) >= 2
        for t in resets[resets + 2 < losses.shape[1]]:
            assert pos[j, t + 1] == neg[j, t + 1] == 1.0, "the fresh run's first loss"
            assert pos[j, t + 2] == 2.5 and neg[j, t + 2] == 0.0


def truncate(inner, settings):
    """A jitted truncation of N pairs: (keys, pairs, θ, meta-step) → ((mean gradient, mean loss), pairs)."""
    return jax.jit(es.over_pairs(
        lambda key, pair, theta, i: es.truncation(inner, settings, key, pair, theta, None, i)))


def test_a_diverged_pair_gives_a_finite_gradient():
    inner, n, settings = least_squares(), 4, es.Settings(0.1, 5, 20, 20)
    theta, keys = jnp.asarray([20.0]), es.pair_keys(KEY, jnp.arange(n))
    pairs, step = begin_all(inner, theta, keys, settings), truncate(inner, settings)
    for i in range(6):
        (gradient, loss), pairs = step(keys, pairs, theta, jnp.int32(i))
        assert gradient.shape == (1,) and np.isfinite(gradient[0]) and 0.0 < float(loss) <= inner.task.max_loss


def test_each_run_is_told_its_length_and_its_loss():
    """An optimizer is made for the length of the run, first or later, and its update is given the loss before it."""
    def optimizer(theta, num_steps):
        def init(w):
            return {"begun for": num_steps, "made for": jnp.int32(-1), "value": jnp.float32(-1.0)}

        def update(g, state, w, *, value):
            return -jnp.exp(theta[0]) * g, {**state, "made for": num_steps, "value": value}

        return Optimizer(init, update)

    inner, settings, n = es.Inner(least_squares().task._replace(max_loss=0.4), optimizer), es.Settings(0.1, 1, 3, 9), 8
    keys, thetas = es.pair_keys(KEY, jnp.arange(n)), jnp.asarray([[-1.0], [-2.0]])
    pairs = begin_all(inner, ONE, keys, settings)
    step = jax.jit(jax.vmap(lambda key, pair, i: es.unroll(inner, thetas, pair, key, None, i, settings), (0, 0, None),
                            axis_name=es.SIDE_BY_SIDE))
    lengths, told = [pairs.length], []
    for i in range(24):
        pairs, losses, counted, _ = step(keys, pairs, jnp.int32(i))
        state, length = pairs.opt_state, np.stack([pairs.length] * 2, axis=1)  # (N, 2)
        np.testing.assert_array_equal(state["begun for"], length)
        counted = np.asarray(counted)[:, 0]
        np.testing.assert_array_equal(state["made for"], np.where(counted[:, None], length, -1))
        value = np.asarray(state["value"])[counted]  # of both runs; it is not clipped
        np.testing.assert_array_equal(np.minimum(value, 0.4), losses[:, 0][counted])
        lengths.append(pairs.length)
        told.append(value)
    assert np.all(np.asarray(lengths[-1]) != -1) and len(np.unique(lengths)) > 4, "lengths must differ"
    told = np.concatenate(told)
    assert np.any(told > 0.4) and np.mean(told[:, 0] != told[:, 1]) > 0.5, "each run has a loss of its own"


# ---------------------------------------------------------------------------------------------------------
# Randomness


def perturbations(inner, theta, pairs, keys, settings, i):
    """The ε of a truncation of N pairs [N, P]: what accumulators hold after it that were 0 before."""
    return jax.vmap(lambda key, pair: es.truncation(inner, settings, key, pair, theta, None, i)[1].xi,
                    axis_name=es.SIDE_BY_SIDE)(keys, es.forget(pairs))


def test_both_signs_share_weights_batches_and_lengths():
    """At equal θ the two runs of a pair are the same; those of different pairs are not."""
    settings, n = es.Settings(0.1, 8, 10, 15), 6
    keys = es.pair_keys(KEY, jnp.arange(n))
    pairs = begin_all(least_squares(), ONE, keys, settings)
    _, (losses, counted, _) = unroll_all(least_squares(), jnp.full((2, 1), -1.0), pairs, keys, settings, 4)
    np.testing.assert_allclose(losses[..., 0], losses[..., 1], rtol=1e-6)
    assert not np.all(counted), "no run was reset"
    assert np.all(np.std(losses[..., 0], axis=0) > 0), "pairs must see different batches"
    assert np.all(np.std(losses[..., 0], axis=1) > 0), "steps must see different batches"


def all_side_by_side(function):
    """As `es.over_pairs`, which does so on an accelerator only."""
    def mapped(keys, pairs, *everywhere):
        return jax.vmap(lambda key, pair: function(key, pair, *everywhere), axis_name=es.SIDE_BY_SIDE)(keys, pairs)

    return mapped


@pytest.mark.parametrize("over_pairs", [es.over_pairs, all_side_by_side])
def test_a_pair_depends_on_the_seed_and_its_number_only(over_pairs):
    inner, settings, theta = least_squares(), es.Settings(0.1, 6, 9, 14), jnp.full(3, -1 / 3)

    def truncation(key, pair, i):
        (_, loss), moved = es.truncation(inner, settings, key, es.forget(pair), theta, None, i)
        return (), (moved, (moved.xi, loss, moved.params, moved.run_step, moved.length))  # ξ is ε, having been 0

    @jax.jit
    def four_truncations(keys):
        meta_step = lambda pairs, i: over_pairs(truncation)(keys, pairs, i)[1]
        pairs = jax.vmap(lambda key: es.begin(inner, theta, key, settings))(keys)
        return jax.lax.scan(meta_step, pairs, jnp.arange(4))[1]

    def run(numbers, seed=7):
        records = four_truncations(es.pair_keys(jax.random.key(seed), jnp.asarray(numbers)))  # (4, N, …) each
        return [np.moveaxis(np.asarray(x, np.float64), 0, 1).reshape(len(numbers), -1) for x in records]

    together, alone, other_seed = side_by_side(run, (range(8), range(4, 8), range(8)), (7, 7, 8))
    for a, b, c in zip(together, alone, other_seed):
        np.testing.assert_allclose(a[4:], b, rtol=1e-6, atol=1e-6)
        assert not np.allclose(a, c)
        if over_pairs is es.over_pairs:
            np.testing.assert_array_equal(a[4:], b)
    eps = together[0].reshape(8, 4, 3)
    assert len(np.unique(eps)) == eps.size, "ε must be fresh for every pair, truncation and entry"


def test_perturbations_are_normal_with_the_given_standard_deviation():
    keys, settings, theta = es.pair_keys(KEY, jnp.arange(500)), es.Settings(0.3, 1, 9, 9), jnp.zeros(27)
    pairs = begin_all(counting(), theta, keys, settings)
    eps = jax.jit(lambda pairs: perturbations(counting(), theta, pairs, keys, settings, jnp.int32(0)))(pairs)
    draws = np.ravel(eps)
    assert draws.shape == (500 * 27,)
    assert draws.std() == pytest.approx(0.3, rel=0.03) and abs(draws.mean()) < 0.01
    assert np.mean(np.abs(draws) < 0.3) == pytest.approx(0.6827, abs=0.015)


def test_an_estimate_is_its_three_steps():
    inner, settings, theta = least_squares(), es.Settings(0.1, 6, 9, 14), jnp.asarray([-1.0])
    keys, i = es.pair_keys(KEY, jnp.arange(5)), jnp.int32(1)
    pairs = begin_all(inner, theta, keys, settings)._replace(xi=jnp.linspace(-0.1, 0.3, 5)[:, None])
    truncation = lambda key, pair, theta, i: es.truncation(inner, settings, key, pair, theta, None, i)

    def in_three_steps(keys, pairs, theta, i):
        def three_steps(key, pair, eps):
            moved, *recorded = es.unroll(inner, jnp.stack([theta + eps, theta - eps]), pair, key, None, i, settings)
            return moved, recorded, es.pes_gradient(*recorded, eps, pair.xi, settings.sigma)

        eps = perturbations(inner, theta, pairs, keys, settings, i)
        return jax.vmap(three_steps, axis_name=es.SIDE_BY_SIDE)(keys, pairs, eps)

    (mean, mapped), (of_each, by_vmap), (moved, (losses, counted, _), (gradients, xi)) = side_by_side(
        lambda function: jax.jit(function)(keys, pairs, theta, i),
        (es.over_pairs(truncation), all_side_by_side(truncation), in_three_steps))
    both, counted = np.mean(losses, axis=2), np.asarray(counted)
    mean_loss = np.mean([np.mean(both[j][counted[j]]) for j in range(5)])
    for (gradient, loss), after in ((mean, mapped), (jax.tree.map(lambda x: jnp.mean(x, axis=0), of_each), by_vmap)):
        np.testing.assert_allclose(gradient, jnp.mean(gradients, axis=0), rtol=1e-4)
        np.testing.assert_allclose(after.xi, xi, rtol=1e-6)
        np.testing.assert_array_equal(after.run_step, moved.run_step)
        assert float(loss) == pytest.approx(mean_loss, rel=1e-5)


def test_the_number_of_devices_changes_no_bit():
    """Four devices with two pairs each, and eight with one, against a single device with all of them."""
    inner, settings, theta = least_squares(), es.Settings(0.01, 6, 9, 14), jnp.full(3, -0.4)
    keys = es.pair_keys(KEY, jnp.arange(8))

    start = begin_all(inner, theta, keys, settings)

    def run(devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("pairs",)) if devices else None
        estimate = es.over_pairs(
            lambda key, pair, theta, i: es.truncation(inner, settings, key, pair, theta, None, i), mesh)

        def meta_step(pairs, i):
            values, pairs = estimate(keys, pairs, theta, i)
            return pairs, (values, pairs)

        return jax.jit(lambda: jax.lax.scan(meta_step, start, jnp.arange(4))[1])()

    alone, four, eight = side_by_side(run, (0, 4, 8))
    for others in (four, eight):
        assert jax.tree.structure(others) == jax.tree.structure(alone)
        jax.tree.map(np.testing.assert_array_equal, others, alone)
    (gradients, losses), _ = alone
    assert gradients.shape == (4, 3) and np.all(gradients) and losses.shape == (4,)
