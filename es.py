"""Persistent Evolution Strategies (PES): unbiased meta-gradients from truncated inner runs.

    python es.py         compare truncated ES and PES with the exact gradient (20 s)

An antithetic pair is two inner runs, at θ+ε and θ−ε, with the same initial weights, batches and
length. It is unrolled K steps at a time; these steps are a *truncation*. Truncated Evolution
Strategies (ES) ignores how earlier perturbations change a later loss, and is biased. PES keeps an
accumulator ξ of all perturbations that a run has felt.

Clocks: run_step counts the steps of an inner run, t those of a truncation, meta_step the
truncations, time = meta_step · K + t all steps of the pair.

Sources: PES (arXiv 2112.13835); μLO (arXiv 2406.00153) for the meta-loss, lengths and offsets.

Dimensions: N pairs, K inner steps of a truncation, P numbers of θ.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lopt import Array, Optimizer, Tree
from tasks import inner_step


class PES(NamedTuple):
    """sigma: σ of the perturbations. truncation: K. max_offset: see `new_pair`."""
    sigma: float = 0.01
    truncation: int = 50
    min_length: int = 100
    max_length: int = 1000
    max_offset: int = 50


class Inner(NamedTuple):
    """A `tasks.Task`, and optimizer(θ [P], planned steps) → `Optimizer`."""
    task: Any
    optimizer: Callable


class Pair(NamedTuple):
    """The state of an antithetic pair between two truncations.

    params, opt_state: of its two runs, leaves [2, …]. xi: the accumulator ξ [P]. run_step, length:
    int32, the steps that the present run has made, and its length.
    """
    params: Tree
    opt_state: Any
    xi: Array
    run_step: Array
    length: Array


def unroll_pair(inner: Inner, pes: PES, key: Array, pair: Pair, theta: Array, split: Any,
                meta_step: Array) -> tuple[tuple[Array, Array], Pair]:
    """One truncation of a pair: ((its estimate of the meta-gradient [P], its mean loss), the pair).

    key: the pair's own, from `pair_keys`. split: the data.
    """
    # A fresh perturbation, ε ~ N(0, σ² I)
    eps = pes.sigma * jax.random.normal(draw_key(key, "eps", meta_step), theta.shape)

    # K steps of both runs, at θ+ε and θ−ε
    thetas = jnp.stack([theta + eps, theta - eps])
    pair, losses, counted, after = unroll(inner, pes, key, pair, thetas, split, meta_step)

    # The estimate, and the accumulator for the next truncation
    gradient, xi = pes_gradient(losses, counted, after, eps, pair.xi, pes.sigma)
    return (gradient, mean_loss(losses, counted)), pair._replace(xi=xi)


def pes_gradient(losses: Array, counted: Array, after: Array, eps: Array, xi: Array,
                 sigma: float) -> tuple[Array, Array]:
    """(PES's estimate of ∇θ of the mean loss from one truncation [P], the next accumulator [P]).

    ξ ← ξ + ε, and with Δ_t = L_t(θ+ε) − L_t(θ−ε) over the counted steps,

        gradient = 1/(2σ²) · [ Σ_{t not after} Δ_t · ξ + Σ_{t after} Δ_t · ε ] / (counted steps)

    and then ξ ← ε if a new run has begun. losses [K, 2]: at θ+ε and θ−ε. counted, after: bool [K];
    counted is False at a reset; after is True once a new run has begun. Source: PES.
    """
    xi = xi + eps
    delta = jnp.where(counted, losses[:, 0] - losses[:, 1], 0.0)
    felt = jnp.where(after[:, None], eps, xi)  # [K, P]
    gradient = delta @ felt / jnp.maximum(jnp.sum(counted), 1) / (2.0 * sigma**2)
    return gradient, jnp.where(after[-1], eps, xi)


def mean_loss(losses: Array, counted: Array) -> Array:
    """The mean over the counted steps of (L(θ+ε) + L(θ−ε))/2: losses [K, 2], counted [K]."""
    both = jnp.where(counted, jnp.mean(losses, axis=1), 0.0)
    return jnp.sum(both) / jnp.maximum(jnp.sum(counted), 1)


def unroll(inner: Inner, pes: PES, key: Array, pair: Pair, thetas: Array, split: Any,
           meta_step: Array) -> tuple[Pair, Array, Array, Array]:
    """K inner steps of both runs: (the pair after them, losses [K, 2], counted [K], after [K]).

    Both runs get the same batches. A run that has reached its length is reset in the next step, and
    that step counts no loss. A loss is taken on the step's own batch *before* its update, clipped
    to [0, max_loss], and is max_loss where it is not finite. thetas: θ ± ε [2, P].
    """
    task = inner.task

    def step(carry, t):
        pair, began = carry
        time = meta_step * pes.truncation + t
        batch = task.sample(draw_key(key, "batch", time), split)

        def train_step(theta, params, opt_state):
            return inner_step(task, inner.optimizer(theta, pair.length), params, opt_state, batch)

        params, opt_state, loss = jax.vmap(train_step)(thetas, pair.params, pair.opt_state)
        finite = jnp.isfinite(loss)  # [2]
        loss = jnp.where(finite, jnp.clip(loss, 0.0, task.max_loss), task.max_loss)

        due = pair.run_step >= pair.length

        def reset(pair):
            fresh = new_run(inner, pes, key, thetas, time)._replace(xi=pair.xi)
            return jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, pair)

        moved = pair._replace(params=params, opt_state=opt_state, run_step=pair.run_step + 1)
        # Fresh weights are drawn only when this pair, or one unrolled beside it, needs them.
        moved = lax.cond(lax.pmax(due, SIDE_BY_SIDE), reset, lambda pair: pair, moved)
        return (moved, began | due), (loss, ~due, began | due)

    carry = pair, jnp.zeros((), bool)
    (pair, _), recorded = lax.scan(step, carry, jnp.arange(pes.truncation))
    return pair, *recorded


def new_pair(inner: Inner, pes: PES, key: Array, theta: Array) -> Pair:
    """A pair in its first run. run_step begins at a random offset below max_offset, so that the
    pairs do not reset in lockstep."""
    time = jnp.int32(-1)  # before the first step, so that no later draw repeats these
    offset = jax.random.randint(draw_key(key, "offset", time), (), 0, pes.max_offset)
    return new_run(inner, pes, key, jnp.stack([theta, theta]), time)._replace(run_step=offset)


def new_run(inner: Inner, pes: PES, key: Array, thetas: Array, time: Array) -> Pair:
    """A pair at the start of a run: fresh weights, the same for both runs, and ξ = 0.

    Its length is exp(U(ln min_length, ln max_length)), rounded to whole steps.
    """
    low, high = np.log(pes.min_length), np.log(pes.max_length)
    uniform = jax.random.uniform(draw_key(key, "length", time), minval=low, maxval=high)
    length = jnp.round(jnp.exp(uniform)).astype(jnp.int32)
    params = inner.task.init(draw_key(key, "start", time))
    opt_state = jax.vmap(lambda theta: inner.optimizer(theta, length).init(params))(thetas)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    return Pair(both, opt_state, jnp.zeros_like(thetas[0]), jnp.zeros_like(length), length)


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~

SIDE_BY_SIDE = "side by side"  # the name of the axis of pairs that are unrolled together
DRAWS = ("eps", "start", "length", "batch", "offset")


def draw_key(key: Array, purpose: str, when: Array) -> Array:
    """The key of one draw of a pair. when: meta_step for eps, else time."""
    return jax.random.fold_in(jax.random.fold_in(key, DRAWS.index(purpose)), when)


def pair_keys(key: Array, pairs: Array) -> Array:
    """One key for each pair: key, indices [N] → keys [N]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, pairs)


def over_pairs(function: Callable, mesh: Mesh | None = None) -> Callable:
    """Map a function of one pair over N pairs, sharded over the mesh's devices.

    function(key, pair, *everywhere) → (values, pair). The mapped function takes keys [N] and pairs
    (leaves [N, …], or None), and returns (the mean of the values, pairs).

    A CPU takes its pairs one by one: the state of one stays in the cache. Each device averages all
    values in order, so that no bit depends on the number of devices.
    """
    def on_device(keys, pairs, *everywhere):
        at_once = 1 if jax.default_backend() == "cpu" else len(keys)
        blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (keys, pairs))
        done = lax.map(lambda block: jax.vmap(lambda key, pair: function(
            key, pair, *everywhere), axis_name=SIDE_BY_SIDE)(*block), blocks)
        values, pairs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)
        if mesh is not None:
            values = lax.all_gather(values, mesh.axis_names[0], tiled=True)
        return values, pairs

    def mapped(keys, pairs, *everywhere):
        sharded = on_device
        if mesh is not None:
            copies, by_pair = PartitionSpec(), PartitionSpec(mesh.axis_names[0])
            sharded = jax.shard_map(on_device, mesh=mesh, check_vma=False,
                                    in_specs=(by_pair, by_pair, *[copies] * len(everywhere)),
                                    out_specs=(copies, by_pair))
        values, pairs = sharded(keys, pairs, *everywhere)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), values), pairs

    return mapped


def influence_balancing() -> Inner:
    """PES's example (Section 5): x ← A x + θ·(10 times +1, 13 times −1), loss ½(x₁ − 1)².

    θ first raises x₁. Twenty steps later it lowers x₁ by more. The optimizer makes these steps.
    """
    v, a = jnp.asarray([1.0] * 10 + [-1.0] * 13), 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))
    task = SimpleNamespace(init=lambda key: jnp.ones(23), sample=lambda key, split: (),
                           loss=lambda x, batch: 0.5 * (x[0] - 1.0) ** 2, max_loss=1e3)
    return Inner(task, lambda theta, steps: Optimizer(
        lambda x: (), lambda grads, state, x, value: (a @ x + theta[0] * v - x, state)))


def estimates(inner: Inner, pes: PES, theta: Array, keys: Array, truncations: int,
              persistent: bool = True, skip: int = 0) -> tuple[Array, Array]:
    """Each pair's (estimate [N, P], loss [N]), means over all truncations but the first `skip`.
    Without persistent, ξ is set to 0 after each truncation: this is truncated ES."""
    def one_pair(key):
        def meta_step(pair, step):
            values, pair = unroll_pair(inner, pes, key, pair, theta, None, step)
            return pair if persistent else pair._replace(xi=jnp.zeros_like(theta)), values

        pair = new_pair(inner, pes, key, theta)
        values = lax.scan(meta_step, pair, jnp.arange(truncations))[1]
        return jax.tree.map(lambda x: jnp.mean(x[skip:], axis=0), values)

    return jax.vmap(one_pair, axis_name=SIDE_BY_SIDE)(keys)


def main() -> None:
    """Print the gradient by truncated ES and by PES beside the exact one."""
    inner, theta, k = influence_balancing(), jnp.asarray([0.5]), 10
    keys = pair_keys(jax.random.key(0), jnp.arange(512))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def run(sigma, theta, persistent):
        return estimates(inner, PES(sigma, k, 200, 200), theta, keys, 1000 // k, persistent)

    exact = jax.grad(lambda theta: jnp.mean(run(1e-12, theta, True)[1]))(theta)
    print(f"gradient of the mean loss, exact: {exact[0]:.2f}; mean ± standard error of 512 pairs:")
    for persistent in (False, True):
        g, _ = run(0.1, theta, persistent)
        print(f"{'PES' if persistent else 'truncated ES':>12}, truncations of {k} steps: "
              f"{jnp.mean(g):.2f} ± {jnp.std(g) / np.sqrt(len(g)):.2f}")


if __name__ == "__main__":
    main()
