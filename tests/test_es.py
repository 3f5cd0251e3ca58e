"""PES: the estimator against the reference, its unbiasedness, and the rules of runs, resets and randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side

import es
from lopt import Optimizer

KEY = jax.random.key(7)


def test_the_estimator_meets_the_reference():
    data = np.load(GOLDEN_DIR / "pes.npz", allow_pickle=False)
    tree = lambda prefix: {name.split("/")[1]: jnp.asarray(data[name]) for name in data.files
                           if name.startswith(prefix + "/")}
    losses = es.Losses(*(jnp.asarray(data[name]) for name in ("pos_loss", "neg_loss", "counted", "after")))
    assert tree("grad")
    gradient, accumulator = jax.jit(es.pes_gradient)(*losses, tree("eps"), tree("accumulator"), data["std"])
    for name, expected in tree("grad").items():
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for name, expected in tree("next_accumulator").items():
        np.testing.assert_allclose(accumulator[name], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(es.mean_loss(losses), data["mean_loss"], rtol=1e-5)


def test_accumulators_add_up_and_begin_anew_with_a_run():
    losses = jnp.ones((3, 2))
    after = jnp.asarray([[False, False], [False, True], [False, True]])
    eps, xi = jnp.asarray([0.5, 0.25]), jnp.asarray([2.0, 3.0])
    _, accumulator = es.pes_gradient(losses, losses, ~after, after, eps, xi, 0.1)
    np.testing.assert_array_equal(accumulator, [2.5, 0.25])


def test_a_truncation_without_counted_steps_gives_no_gradient():
    nothing, ones = jnp.zeros((1, 2), bool), jnp.ones(2)
    gradient, _ = es.pes_gradient(jnp.ones((1, 2)), jnp.zeros((1, 2)), nothing, ~nothing, ones, ones, 0.1)
    assert gradient == 0.0


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


def least_squares() -> tuple[es.Problem, object]:
    """Noisy least squares in two dimensions by SGD; θ is the logarithm of its learning rate."""
    def optimizer(theta):
        return Optimizer(lambda w: (), lambda g, state, w: (-jnp.exp(theta["log_lr"]) * g, state))

    return es.Problem(lambda key: 1.0 + jax.random.normal(key, (2,)),
                      lambda key, split: NOISE * jax.random.normal(key, (2,)),
                      lambda w, b: 0.5 * jnp.sum(CURVATURE * (w - b) ** 2), max_loss=1e3), optimizer


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


PROBLEMS = {"influence balancing": (es.influence_balancing, "theta", 0.5, 96, 10, influence_gradient, 512),
            "least squares": (least_squares, "log_lr", -1.2, 20, 5, least_squares_gradient, 2048)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_pes_is_unbiased_and_truncated_es_is_not(name):
    """Runs of one length, longer than a truncation, over whole cycles of resets (the first runs left out)."""
    make, leaf, value, length, truncation, gradient, repeats = PROBLEMS[name]
    task, optimizer = make()
    theta, truth = {leaf: jnp.float32(value)}, gradient(value, length, truncation)
    settings = es.Settings(0.01, truncation, length, length)
    skip = -(-length // truncation) + 1
    truncations = skip + (length + 1) * (1 if length > 50 else 4)

    def measure(persistent):
        g = np.asarray(es.independent_estimates(task, optimizer, theta, KEY, repeats, truncations, settings,
                                                persistent=persistent, skip=skip)[leaf], np.float64)
        return g.mean(), g.std() / np.sqrt(repeats)

    (pes, pes_error), (truncated, truncated_error) = side_by_side(measure, (True, False))
    print(f"{name}: exact {truth:.4f}, PES {pes:.4f} ± {pes_error:.4f}, "
          f"truncated ES {truncated:.4f} ± {truncated_error:.4f}")
    assert pes_error < 0.03 * abs(truth)
    assert abs(pes - truth) < 4 * pes_error, (pes, pes_error, truth)
    assert abs(truncated - truth) > 10 * max(truncated_error, pes_error), (truncated, truncated_error, truth)


def test_pes_is_unbiased_with_runs_of_random_lengths():
    """Against the derivative through the same runs (weights, batches, lengths, offsets), first runs included."""
    task, optimizer = least_squares()
    theta, settings = {"log_lr": jnp.float32(-1.2)}, es.Settings(0.01, 5, 7, 40)
    arguments = (task, optimizer, theta, KEY, 2048, 40, settings)
    _, exact = es.exact_gradient(*arguments)
    estimates = side_by_side(lambda persistent: es.independent_estimates(*arguments, persistent=persistent),
                             (True, False))
    for persistent, estimate in zip((True, False), estimates):
        g = np.asarray(estimate["log_lr"], np.float64)
        error, miss = g.std() / np.sqrt(g.size), abs(g.mean() - float(exact["log_lr"]))
        print(f"random lengths: exact {exact['log_lr']:.4f}, {'PES' if persistent else 'truncated ES'} "
              f"{g.mean():.4f} ± {error:.4f}")
        assert error < 0.04 * abs(exact["log_lr"])
        assert miss < 4 * error if persistent else miss > 10 * error


def test_the_exact_gradient_of_the_demonstration_is_exact():
    task, optimizer = es.influence_balancing()
    _, exact = es.exact_gradient(task, optimizer, {"theta": jnp.float32(0.5)}, KEY, 2, 31 + 4,
                                 es.Settings(0.1, 10, 30, 30), skip=4)
    np.testing.assert_allclose(exact["theta"], influence_gradient(0.5, 30, 10), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# Runs and their resets


def counting() -> tuple[es.Problem, object]:
    """A run whose loss tells its story: the whole part counts its updates, the rest marks its initial weights.

    The optimizer's state counts its updates, too; its update is θ's "step" (1 for the whole part to count).
    """
    def optimizer(theta):
        return Optimizer(lambda w: jnp.zeros((), jnp.int32),
                         lambda g, count, w: ({"w": theta["step"] * jnp.ones(())}, count + 1))

    return es.Problem(lambda key: {"w": 0.9 * jax.random.uniform(key)}, lambda key, split: (),
                      lambda params, batch: params["w"], max_loss=1e6), optimizer


def both_signs(theta, pairs):
    return jax.tree.map(lambda x: jnp.full((pairs, 2), x), theta)


def unroll_all(task, optimizer, thetas, pairs, keys, settings, truncations):
    """Several truncations: (the pairs at last, their losses, one after the other [truncations · T, N])."""
    step = jax.jit(lambda pairs, i: es.unroll(task, optimizer, thetas, pairs, keys, None, i, settings))
    recorded = []
    for i in range(truncations):
        pairs, losses = step(pairs, jnp.int32(i))
        recorded.append(jax.tree.map(np.asarray, losses))
    return pairs, es.Losses(*(np.concatenate(x) for x in zip(*recorded)))


def test_runs_count_their_steps_and_begin_anew():
    task, optimizer = counting()
    settings, n = es.Settings(0.1, 6, 9, 9), 16
    keys, thetas = es.pair_keys(KEY, jnp.arange(n)), both_signs({"step": 1.0}, n)
    first = es.init_pairs(task, optimizer, {"step": jnp.float32(1.0)}, keys, settings)
    last, losses = unroll_all(task, optimizer, thetas, first, keys, settings, 6)
    steps = len(losses.pos)
    assert steps == 36
    for j in range(n):
        counter, update, mark, began = int(first.step[j]), 0, losses.pos[0, j] % 1, False
        marks = [mark]
        for t in range(steps):
            began = began and t % settings.truncation > 0
            due = counter == 9
            began = began or due
            assert losses.counted[t, j] != due and losses.after[t, j] == began, (j, t)
            if due:
                counter, update = 0, 0
                marks.append(losses.pos[t + 1, j] % 1 if t + 1 < steps else -1.0)
            else:
                assert losses.pos[t, j] == pytest.approx(update + marks[-1], abs=1e-5), (j, t)
                counter, update = counter + 1, update + 1
        assert int(last.step[j]) == counter
        np.testing.assert_array_equal(last.opt_state[j], [update, update])  # the optimizer began anew as well
        assert len(marks) >= 4 and len(set(np.round(marks, 5))) == len(marks), "fresh weights must differ"
    assert len(set(np.asarray(first.step).tolist())) > 1, "pairs must not be reset in lockstep"


@pytest.mark.parametrize("max_offset, bound", [(None, 50), (80, 80)])
def test_lengths_are_log_uniform_and_offsets_uniform(max_offset, bound):
    task, optimizer = counting()
    n, settings = 20_000, es.Settings(0.1, 50, 100, 1000, max_offset)
    keys = es.pair_keys(KEY, jnp.arange(n))
    pairs = jax.jit(lambda keys: es.init_pairs(task, optimizer, {"step": jnp.float32(1.0)}, keys, settings))(keys)
    lengths, offsets = np.asarray(pairs.length), np.asarray(pairs.step)
    assert lengths.dtype == np.int32 and lengths.min() >= 100 and lengths.max() <= 1000
    shares = np.quantile(np.log(lengths / 100) / np.log(10), [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(shares, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.02)
    counts = np.bincount(offsets, minlength=bound)
    assert len(counts) == bound and np.abs(counts - n / bound).max() < 5 * np.sqrt(n / bound)
    assert not np.any(np.asarray(jax.tree.leaves(pairs.accumulator)[0]))


def test_later_runs_draw_new_lengths():
    task, optimizer = counting()
    settings, n = es.Settings(0.1, 10, 10, 20), 32
    keys = es.pair_keys(KEY, jnp.arange(n))
    pairs = es.init_pairs(task, optimizer, {"step": jnp.float32(1.0)}, keys, settings)
    thetas = both_signs({"step": 1.0}, n)
    step = jax.jit(lambda pairs, i: es.unroll(task, optimizer, thetas, pairs, keys, None, i, settings)[0])
    seen = [pairs.length]
    for i in range(6):
        pairs = step(pairs, jnp.int32(i))
        seen.append(pairs.length)
    seen = np.stack(seen)
    assert seen.min() >= 10 and seen.max() <= 20
    assert np.mean([len(set(column)) > 1 for column in seen.T]) > 0.8


def test_losses_are_clipped_and_a_diverged_run_recovers():
    """The loss grows to infinity and NaN at θ+ε, and falls below 0 at θ−ε, until the reset."""
    def optimizer(theta):
        return Optimizer(lambda w: jnp.zeros(()), lambda g, state, w: (theta["factor"] * (1.0 + jnp.abs(w)),
                                                                       state + g * w))

    task = es.Problem(lambda key: jnp.float32(1.0), lambda key, split: (), lambda w, batch: w - 0.0 * w * w, 2.5)
    settings, n = es.Settings(0.1, 7, 12, 12), 3
    keys = es.pair_keys(KEY, jnp.arange(n))
    thetas = {"factor": jnp.tile(jnp.asarray([1e30, -1.0]), (n, 1))}
    pairs = es.init_pairs(task, optimizer, {"factor": jnp.float32(1.0)}, keys, settings)
    pairs, losses = unroll_all(task, optimizer, thetas, pairs, keys, settings, 5)
    assert np.all(np.isfinite(losses.pos)) and losses.pos.max() <= 2.5 and losses.neg.min() >= 0.0
    assert np.all(losses.neg[1:5] == 0.0) and np.all(losses.pos[1:5] == 2.5)
    for j in range(n):
        resets = np.flatnonzero(~losses.counted[:, j])
        assert len(resets) >= 2
        for t in resets[resets + 2 < len(losses.pos)]:
            assert losses.pos[t + 1, j] == losses.neg[t + 1, j] == 1.0, "the fresh run's first loss"
            assert losses.pos[t + 2, j] == 2.5 and losses.neg[t + 2, j] == 0.0


def test_a_diverged_pair_gives_a_finite_gradient():
    task, optimizer = least_squares()
    n, settings = 4, es.Settings(0.1, 5, 20, 20)
    theta, keys = {"log_lr": jnp.float32(20.0)}, es.pair_keys(KEY, jnp.arange(n))
    pairs = es.init_pairs(task, optimizer, theta, keys, settings)
    step = jax.jit(lambda pairs, i: es.estimate(task, optimizer, theta, pairs, keys, None, i, settings))
    for i in range(6):
        gradient, loss, pairs = step(pairs, jnp.int32(i))
        assert np.isfinite(gradient["log_lr"]) and 0.0 < float(loss) <= task.max_loss


# ---------------------------------------------------------------------------------------------------------
# Randomness


def test_both_signs_share_weights_batches_and_lengths():
    """At equal θ the two runs of a pair are the same; those of different pairs are not."""
    task, optimizer = least_squares()
    settings, n = es.Settings(0.1, 8, 10, 15), 6
    keys = es.pair_keys(KEY, jnp.arange(n))
    theta = {"log_lr": jnp.float32(-1.0)}
    pairs = es.init_pairs(task, optimizer, theta, keys, settings)
    pairs, losses = unroll_all(task, optimizer, both_signs(theta, n), pairs, keys, settings, 4)
    np.testing.assert_allclose(losses.pos, losses.neg, rtol=1e-6)
    assert not np.all(losses.counted), "no run was reset"
    assert np.all(np.std(losses.pos, axis=1) > 0), "pairs must see different batches"
    assert np.all(np.std(losses.pos, axis=0) > 0), "steps must see different batches"


def test_a_pair_depends_on_the_seed_and_its_number_only():
    task, optimizer = least_squares()
    settings, theta = es.Settings(0.1, 6, 9, 14), {"log_lr": jnp.zeros(3)}
    scalar = lambda theta: optimizer({"log_lr": jnp.sum(theta["log_lr"]) - 1.0})

    @jax.jit
    def truncation(keys, pairs, i):
        eps = es.perturb(keys, theta, settings.std, i)
        thetas = jax.tree.map(lambda x, e: jnp.stack([x + e, x - e], axis=1), theta, eps)
        return eps, *es.unroll(task, scalar, thetas, pairs, keys, None, i, settings)

    def run(numbers, seed=7):
        keys = es.pair_keys(jax.random.key(seed), jnp.asarray(numbers))
        pairs, out = es.init_pairs(task, scalar, theta, keys, settings), []
        for i in range(4):
            eps, pairs, losses = truncation(keys, pairs, jnp.int32(i))
            out.append((eps["log_lr"], losses.pos.T, losses.neg.T, losses.counted.T, pairs.step, pairs.length))
        return [np.concatenate([np.asarray(x[k], np.float64).reshape(len(numbers), -1) for x in out], axis=1)
                for k in range(6)]

    together, alone, other_seed = run(range(8)), run(range(4, 8)), run(range(8), seed=8)
    for a, b, c in zip(together, alone, other_seed):
        np.testing.assert_allclose(a[4:], b, rtol=1e-6, atol=1e-6)
        assert not np.allclose(a, c)
    eps = together[0].reshape(8, 4, 3)
    assert len(np.unique(eps)) == eps.size, "ε must be fresh for every pair, truncation and entry"


def test_perturbations_are_normal_with_the_given_standard_deviation():
    keys = es.pair_keys(KEY, jnp.arange(500))
    eps = jax.jit(es.perturb)(keys, {"a": jnp.zeros((4, 5)), "b": jnp.zeros(7)}, 0.3, jnp.int32(0))
    assert eps["a"].shape == (500, 4, 5) and eps["b"].shape == (500, 7)
    draws = np.concatenate([np.ravel(x) for x in eps.values()])
    assert draws.std() == pytest.approx(0.3, rel=0.03) and abs(draws.mean()) < 0.01
    assert np.mean(np.abs(draws) < 0.3) == pytest.approx(0.6827, abs=0.015)


def test_an_estimate_is_its_three_steps():
    task, optimizer = least_squares()
    settings, theta = es.Settings(0.1, 6, 9, 14), {"log_lr": jnp.float32(-1.0)}
    keys = es.pair_keys(KEY, jnp.arange(5))
    pairs = es.init_pairs(task, optimizer, theta, keys, settings)
    pairs = pairs._replace(accumulator={"log_lr": jnp.linspace(-0.1, 0.3, 5)})
    gradient, loss, after = es.estimate(task, optimizer, theta, pairs, keys, None, jnp.int32(1), settings)
    eps = es.perturb(keys, theta, settings.std, jnp.int32(1))
    thetas = {"log_lr": jnp.stack([-1.0 + eps["log_lr"], -1.0 - eps["log_lr"]], axis=1)}
    moved, losses = es.unroll(task, optimizer, thetas, pairs, keys, None, jnp.int32(1), settings)
    expected, accumulator = es.pes_gradient(*losses, eps, pairs.accumulator, settings.std)
    np.testing.assert_allclose(gradient["log_lr"], expected["log_lr"], rtol=1e-4)
    np.testing.assert_allclose(after.accumulator["log_lr"], accumulator["log_lr"], rtol=1e-6)
    np.testing.assert_array_equal(after.step, moved.step)
    counted = np.asarray(losses.counted)
    mean = np.mean([np.mean((np.asarray(losses.pos + losses.neg) / 2)[counted[:, j], j]) for j in range(5)])
    assert float(loss) == pytest.approx(mean, rel=1e-5)
