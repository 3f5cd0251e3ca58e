"""PES: unbiased gradients of the meta-loss from truncated, perturbed inner runs.

    python es.py         truncated ES is biased and PES is not, on influence balancing (15 s)

N antithetic pairs run side by side. Pair j holds two inner runs, at θ+ε_j and θ−ε_j, that share their initial
weights, batches and lengths; they are never unrolled from start to end for one gradient, but K steps at a time (a
*truncation*). What a perturbation of an earlier truncation does to a later loss would be lost: truncated ES is
biased. PES keeps it, in an accumulator ξ_j of all perturbations that the run has felt.

The gradient of one truncation takes three calls: `perturb` draws ε_j, `unroll` moves every run K steps on and records
its losses, `pes_gradient` makes the estimate of them. `estimate` ties them together.

A task here is anything with init(key), sample(key, split), loss(params, batch) and max_loss, and an optimizer is a
function from θ to an `lopt.Optimizer`.

Sources: PES (arXiv 2112.13835); μLO (arXiv 2406.00153) for meta-loss, lengths and offsets.

Dimensions: N pairs, 2 signs (θ+ε, θ−ε), T = K inner steps of a truncation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from lopt import Array, Optimizer, Tree, apply_updates


class Settings(NamedTuple):
    """std: σ of the perturbations. truncation: K. min_length, max_length: of inner runs, in steps.

    max_offset: below which the step counters of the first runs begin; None: K.
    """
    std: float = 0.01
    truncation: int = 50
    min_length: int = 100
    max_length: int = 1000
    max_offset: int | None = None


class Pairs(NamedTuple):
    """The state of N antithetic pairs between truncations.

    params, opt_state: of the inner runs, leaves [N, 2, ...]. accumulator: ξ, leaves of θ [N, ...].
    step, length: int32 [N], steps made in the present run and steps after which it ends.
    """
    params: Tree
    opt_state: Any
    accumulator: Tree
    step: Array
    length: Array


class Losses(NamedTuple):
    """What a truncation records. pos, neg: losses at θ+ε and θ−ε; counted, after: masks; all [T, N]."""
    pos: Array
    neg: Array
    counted: Array
    after: Array


# ---------------------------------------------------------------------------------------------------------
# Randomness: each draw depends on the seed, the pair and the time alone, so that it does not matter where a pair runs

EPS, START, LENGTH, BATCH, OFFSET = range(5)


def pair_keys(key: Array, pairs: Array) -> Array:
    """One key for each pair: key, int32 [N] → keys [N]."""
    return jax.vmap(lambda j: jax.random.fold_in(key, j))(pairs)


def _keys(keys: Array, purpose: int, time: Array) -> Array:
    """The pairs' keys for one purpose at one time."""
    return jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, purpose), time))(keys)


# ---------------------------------------------------------------------------------------------------------
# The three steps of PES


def one_by_one(function: Callable[[Tree], Tree], xs: Tree, zero: Array | int = 0) -> Tree:
    """`lax.map`, but a loop also when there is one x alone: leaves [n, ...] → leaves [n, ...].

    zero: a traced 0. XLA would unroll a loop whose single pass it knows of, and round otherwise than in a longer one.
    """
    n = jax.tree.leaves(xs)[0].shape[0]
    # x[i] and y.at[i].set(new) would handle indices out of range, too, which takes long to compile.
    at = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False, allow_negative_indices=False), xs)
    start = jax.tree.map(lambda y: jnp.zeros((n, *y.shape), y.dtype), jax.eval_shape(function, at(0)))
    put = lambda y, new, i: lax.dynamic_update_index_in_dim(y, new, i, 0, allow_negative_indices=False)
    write = lambda i, ys: jax.tree.map(lambda y, new: put(y, new, i), ys, function(at(i)))
    return lax.fori_loop(0, n + zero, write, start)


def perturb(keys: Array, theta: Tree, std: float, meta_step: Array) -> Tree:
    """Fresh ε_j ~ N(0, σ² I) for every pair and truncation: leaves of θ [N, ...].

    Drawn for one pair after the other: side by side, a draw's rounding would depend on how many they are.
    """
    flat, unravel = ravel_pytree(theta)  # one draw for all of θ compiles faster than one for each leaf
    eps = one_by_one(lambda key: std * jax.random.normal(key, flat.shape), _keys(keys, EPS, meta_step),
                     jnp.minimum(meta_step, 0))
    return jax.vmap(unravel)(eps)


def pes_gradient(pos_loss: Array, neg_loss: Array, counted: Array, after: Array, eps: Tree, accumulator: Tree,
                 std: float) -> tuple[Tree, Tree]:
    """The PES estimate of ∇θ of the mean loss, from one truncation of N pairs.

    ξ_j ← ξ_j + ε_j, and with Δ_t = L_t(θ+ε) − L_t(θ−ε) over the counted steps,

        gradient = 1/(2σ²) · mean_j [ (Σ_{t not after} Δ_t · ξ_j + Σ_{t after} Δ_t · ε_j) / number of counted steps ]

    and then ξ_j ← ε_j where the pair began a new run. pos_loss, neg_loss [T, N]; counted, after: bool [T, N], after
    marks the steps of a run that began in this truncation; eps, accumulator: leaves [N, ...].
    Returns (gradient: leaves [...], next accumulator: leaves [N, ...]). Source: PES.
    """
    delta = jnp.where(counted, pos_loss - neg_loss, 0.0)
    steps = jnp.maximum(jnp.sum(counted, axis=0), 1)
    weight_old = jnp.sum(jnp.where(after, 0.0, delta), axis=0) / steps  # (N,)
    weight_new = jnp.sum(jnp.where(after, delta, 0.0), axis=0) / steps  # (N,)
    began = jnp.any(after, axis=0)
    accumulator = jax.tree.map(jnp.add, accumulator, eps)

    def gradient(xi, e):
        pairs = weight_old.shape[0]
        return (jnp.tensordot(weight_old, xi, 1) + jnp.tensordot(weight_new, e, 1)) / (2.0 * std**2 * pairs)

    def carry_on(xi, e):
        return jnp.where(began.reshape(-1, *(1,) * (e.ndim - 1)), e, xi)

    return jax.tree.map(gradient, accumulator, eps), jax.tree.map(carry_on, accumulator, eps)


def _draw_lengths(keys: Array, settings: Settings, time: Array) -> Array:
    """Lengths exp(U(ln min_length, ln max_length)), rounded to whole steps: int32 [N]."""
    low, high = np.log(settings.min_length), np.log(settings.max_length)
    return jax.vmap(lambda k: jnp.round(jnp.exp(jax.random.uniform(k, minval=low, maxval=high))).astype(jnp.int32))(
        _keys(keys, LENGTH, time))


def _begin_runs(task: Any, optimizer: Callable[[Tree], Optimizer], thetas: Tree, keys: Array,
                time: Array) -> tuple[Tree, Any]:
    """Fresh weights, the same for both signs, and zero optimizer state: leaves [N, 2, ...]."""
    params = jax.vmap(task.init)(_keys(keys, START, time))
    params = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), params)
    return params, jax.vmap(jax.vmap(lambda theta, p: optimizer(theta).init(p)))(thetas, params)


def init_pairs(task: Any, optimizer: Callable[[Tree], Optimizer], theta: Tree, keys: Array,
               settings: Settings) -> Pairs:
    """N pairs at the start of their first runs: ξ = 0, and step counters offset by U{0, …, max_offset−1}.

    The offsets keep the pairs from being reset in lockstep. Where all lengths are the same, that needs offsets up to
    the length, or all pairs are in the same phase of training for ever. keys: from `pair_keys`.
    """
    max_offset = settings.truncation if settings.max_offset is None else settings.max_offset
    time = jnp.int32(-1)  # before the first step, so that no later draw repeats these

    def first_run(keys):  # (1,)
        both = jax.tree.map(lambda x: jnp.broadcast_to(x, (1, 2, *x.shape)), theta)
        params, opt_state = _begin_runs(task, optimizer, both, keys, time)
        step = jax.vmap(lambda k: jax.random.randint(k, (), 0, max_offset))(_keys(keys, OFFSET, time))
        accumulator = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), theta)
        return Pairs(params, opt_state, accumulator, step, _draw_lengths(keys, settings, time))

    return jax.tree.map(lambda x: x[:, 0], lax.map(first_run, keys[:, None]))


def unroll(task: Any, optimizer: Callable[[Tree], Optimizer], thetas: Tree, pairs: Pairs, keys: Array, split: Any,
           meta_step: Array, settings: Settings) -> tuple[Pairs, Losses]:
    """Moves every run on by K inner steps, each pair's two runs on the same batches.

    A run that has reached its length is reset in the next step (fresh weights, zero optimizer state, new length);
    that step counts no loss. Each loss is taken on the step's own batch *before* its update, clipped to [0, max_loss],
    and is max_loss where it is not finite. thetas: θ ± ε, leaves [N, 2, ...]; keys: from `pair_keys`.
    """
    def train_step(theta, params, opt_state, batch):
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, opt_state = optimizer(theta).update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, loss

    def inner_step(carry, t):
        params, opt_state, step, length, began = carry
        time = meta_step * settings.truncation + t
        batch = jax.vmap(task.sample, (0, None))(_keys(keys, BATCH, time), split)
        params, opt_state, loss = jax.vmap(jax.vmap(train_step, (0, 0, 0, None)))(thetas, params, opt_state, batch)
        loss = jnp.where(jnp.isfinite(loss), jnp.clip(loss, 0.0, task.max_loss), task.max_loss)  # (N, 2)

        def reset(runs):
            fresh = (*_begin_runs(task, optimizer, thetas, keys, time), jnp.zeros_like(step),
                     _draw_lengths(keys, settings, time))
            choose = lambda new, old: jnp.where(due.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
            return jax.tree.map(choose, fresh, runs)

        due = step >= length  # (N,)
        runs = (params, opt_state, step + 1, length)
        # Resets are rare: drawing fresh weights only when some pair needs them makes the step cheap.
        params, opt_state, step, length = lax.cond(jnp.any(due), reset, lambda runs: runs, runs)
        began = began | due
        return (params, opt_state, step, length, began), Losses(loss[:, 0], loss[:, 1], ~due, began)

    start = (pairs.params, pairs.opt_state, pairs.step, pairs.length, jnp.zeros_like(pairs.step, bool))
    (params, opt_state, step, length, _), losses = lax.scan(inner_step, start, jnp.arange(settings.truncation))
    return Pairs(params, opt_state, pairs.accumulator, step, length), losses


def pairs_at_once(pairs: int) -> int:
    """How many of a device's pairs are unrolled side by side.

    One on a CPU: its state stays in the cache, a reset costs nothing when none is due, and what a pair computes
    does not depend on how many others its device holds. All on a GPU, which needs the parallel work.
    """
    return 1 if jax.default_backend() == "cpu" else pairs


def estimate(task: Any, optimizer: Callable[[Tree], Optimizer], theta: Tree, pairs: Pairs, keys: Array, split: Any,
             meta_step: Array, settings: Settings, axis: str | None = None) -> tuple[Tree, Array, Pairs]:
    """One truncation of every pair: (gradient of the meta-loss, mean counted loss, pairs after it).

    axis: the mesh axis over whose devices the pairs are spread, if they are. Each pair's gradient is computed where
    the pair is, and the mean is taken of all of them on every device in the same order, so that the number of
    devices changes nothing: the smallest change would grow, since PES divides differences of losses by σ².
    """
    eps = perturb(keys, theta, settings.std, meta_step)
    thetas = jax.tree.map(lambda x, e: jnp.stack([x + e, x - e], axis=1), theta, eps)  # (N, 2, ...)

    one = lambda tree: jax.tree.map(lambda x: x[None], tree)

    def of_pair(losses, eps, accumulator):
        losses = jax.tree.map(lambda x: x[:, None], losses)  # (T, 1)
        gradient, accumulator = pes_gradient(*losses, one(eps), one(accumulator), settings.std)
        return gradient, mean_loss(losses), jax.tree.map(lambda x: x[0], accumulator)

    def of_block(block):
        thetas, eps, pairs, keys = block
        pairs, losses = unroll(task, optimizer, thetas, pairs, keys, split, meta_step, settings)
        gradients, losses, accumulator = jax.vmap(of_pair, (1, 0, 0))(losses, eps, pairs.accumulator)
        return gradients, losses, pairs._replace(accumulator=accumulator)

    at_once = pairs_at_once(keys.shape[0])
    blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (thetas, eps, pairs, keys))
    gradients, mean_losses, pairs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]),
                                                 one_by_one(of_block, blocks, jnp.minimum(meta_step, 0)))
    if axis is not None:
        gradients, mean_losses = lax.all_gather((gradients, mean_losses), axis, tiled=True)
    gradient, loss = jax.tree.map(lambda x: jnp.mean(x, axis=0), (gradients, mean_losses))
    return gradient, loss, pairs


def mean_loss(losses: Losses) -> Array:
    """The mean over pairs of the mean over counted steps of (L(θ+ε) + L(θ−ε))/2."""
    both = jnp.where(losses.counted, 0.5 * (losses.pos + losses.neg), 0.0)
    return jnp.mean(jnp.sum(both, axis=0) / jnp.maximum(jnp.sum(losses.counted, axis=0), 1))


# ---------------------------------------------------------------------------------------------------------
# Demonstration: influence balancing (PES, its Section 5)


class Problem(NamedTuple):
    """What a task must have: init(key) → params, sample(key, split) → batch, loss(params, batch), max_loss."""
    init: Callable[[Array], Tree]
    sample: Callable[[Array, Any], Tree]
    loss: Callable[[Tree, Tree], Array]
    max_loss: float


def influence_balancing() -> tuple[Problem, Callable[[Tree], Optimizer]]:
    """x ← A x + θ·(10 times +1, 13 times −1), A with ½ on diagonal and superdiagonal, loss ½(x₁ − 1)²: x [23].

    An "inner step" that is no training: the params are x, and the optimizer's update is A x + θ v − x, whatever
    the gradient. θ raises x₁ at once, by the ten nearest entries, and lowers it some twenty steps later by the
    others: in the long run x₁ = −6 θ. At θ = 0.5, whoever looks only a few steps ahead goes the wrong way.
    """
    v = jnp.asarray([1.0] * 10 + [-1.0] * 13)
    a = 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))

    def optimizer(theta: Tree) -> Optimizer:
        return Optimizer(lambda x: (), lambda grads, state, x: (a @ x + theta["theta"] * v - x, state))

    return Problem(lambda key: jnp.ones(23), lambda key, split: (), lambda x, batch: 0.5 * (x[0] - 1.0) ** 2,
                   max_loss=1e3), optimizer


def independent_estimates(task: Any, optimizer: Callable[[Tree], Optimizer], theta: Tree, key: Array, repeats: int,
                          truncations: int, settings: Settings, *, persistent: bool, skip: int = 0) -> Tree:
    """Mean estimates over many truncations at one θ, for each of R independent pairs: leaves of θ [R, ...].

    persistent: PES; otherwise ξ is 0 before each truncation, which is truncated ES. skip: how many of the first
    truncations to leave out. The R means share nothing, so that their spread gives a standard error.
    """
    def one_pair(keys):  # (1,)
        def meta_step(pairs, step):
            gradient, _, pairs = estimate(task, optimizer, theta, pairs, keys, None, step, settings)
            return pairs if persistent else forget(pairs), gradient

        start = init_pairs(task, optimizer, theta, keys, settings)
        _, gradients = lax.scan(meta_step, start, jnp.arange(truncations))
        return jax.tree.map(lambda g: jnp.mean(g[skip:], axis=0), gradients)

    return jax.jit(jax.vmap(one_pair))(pair_keys(key, jnp.arange(repeats))[:, None])


def forget(pairs: Pairs) -> Pairs:
    """The pairs with ξ = 0: done after each truncation, it turns PES into truncated ES."""
    return pairs._replace(accumulator=jax.tree.map(jnp.zeros_like, pairs.accumulator))


def exact_gradient(task: Any, optimizer: Callable[[Tree], Optimizer], theta: Tree, key: Array, repeats: int,
                   truncations: int, settings: Settings, *, skip: int = 0) -> tuple[Array, Tree]:
    """(mean loss, its gradient), differentiated through the same runs as in `independent_estimates`, at ε = 0."""
    keys = pair_keys(key, jnp.arange(repeats))

    def loss(theta):
        both = jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, 2, *x.shape)), theta)

        def meta_step(pairs, step):
            pairs, losses = unroll(task, optimizer, both, pairs, keys, None, step, settings)
            return pairs, mean_loss(losses)

        start = init_pairs(task, optimizer, theta, keys, settings)
        _, losses = lax.scan(meta_step, start, jnp.arange(truncations))
        return jnp.mean(losses[skip:])

    return jax.jit(jax.value_and_grad(loss))(theta)


def follow(task: Any, optimizer: Callable[[Tree], Optimizer], theta: Tree, key: Array, pairs: int, meta_steps: int,
           learning_rate: float, settings: Settings, *, persistent: bool) -> tuple[Tree, Array]:
    """Gradient descent on θ by PES, or by truncated ES: (θ before each meta-step, its mean loss [meta_steps])."""
    keys = pair_keys(key, jnp.arange(pairs))

    def meta_step(carry, step):
        theta, state = carry
        gradient, loss, state = estimate(task, optimizer, theta, state, keys, None, step, settings)
        moved = jax.tree.map(lambda x, g: x - learning_rate * g, theta, gradient)
        return (moved, state if persistent else forget(state)), (theta, loss)

    start = (theta, init_pairs(task, optimizer, theta, keys, settings))
    return jax.jit(lambda: lax.scan(meta_step, start, jnp.arange(meta_steps))[1])()


def main() -> None:
    """Compares truncated ES and PES with the exact gradient, and what comes of following each."""
    task, optimizer = influence_balancing()
    theta, key, runs = {"theta": jnp.float32(0.5)}, jax.random.key(0), Settings(0.1, 10, 200, 200)
    print("Influence balancing: x ← A x + θ v with x in R²³, loss ½(x₁ − 1)², runs of 200 steps, θ = 0.5.")
    print("θ raises x₁ at once, and lowers it by more some twenty steps later.\n")
    print("Gradient of the mean loss, in truncations of K steps (mean ± standard error: 512 pairs, 1,000 steps)")
    print(f"  {'K':>3}{'exact':>10}{'truncated ES':>20}{'PES':>20}")
    for k in (5, 10, 20):
        settings = runs._replace(truncation=k)
        _, exact = exact_gradient(task, optimizer, theta, key, 2, 1000 // k, settings)
        row = f"  {k:3}{exact['theta']:10.2f}"
        for persistent in (False, True):
            g = independent_estimates(task, optimizer, theta, key, 512, 1000 // k, settings,
                                      persistent=persistent)["theta"]
            row += f"{jnp.mean(g):13.2f} ± {jnp.std(g) / np.sqrt(len(g)):4.2f}"
        print(row)
    print("\nGradient descent on θ: 128 pairs, K = 10, learning rate 2e-4; loss: mean over 41 meta-steps around")
    print(f"  {'meta-step':>9}{'truncated ES: θ':>18}{'loss':>8}{'PES: θ':>12}{'loss':>8}")
    paths = [follow(task, optimizer, theta, key, 128, 500, 2e-4, runs, persistent=p) for p in (False, True)]
    for step in (0, 50, 100, 200, 300, 499):
        row = f"  {step:9}"
        for (path, losses), width in zip(paths, (18, 12)):
            row += f"{path['theta'][step]:{width}.3f}{jnp.mean(losses[max(0, step - 20):step + 21]):8.3f}"
        print(row)


if __name__ == "__main__":
    main()
