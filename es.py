"""Persistent Evolution Strategies (PES): unbiased gradients of the meta-loss from truncated, perturbed inner runs.

    python es.py         truncated ES is biased and PES is not, on influence balancing (15 s)

An antithetic pair is two inner runs, at θ+ε and θ−ε, that share their initial weights, batches and length. They are
never unrolled from start to end for one gradient, but K steps at a time (a *truncation*). What a perturbation of an
earlier truncation does to a later loss would be lost: truncated Evolution Strategies (ES) is biased. PES keeps it, in
an accumulator ξ of all perturbations that the run has felt.

All above the waterline is about one pair, to be called under `over_pairs`, which makes N of it, over all devices.

Four clocks: `run_step`, the steps of the inner run since it began (a pair's first run begins at an offset); t, those
since the truncation began; `meta_step`, the truncations made; `time` = meta_step · K + t, all steps of the pair.

Sources: PES (arXiv 2112.13835); μLO (arXiv 2406.00153) for the meta-loss, lengths and offsets.

Dimensions: N pairs, 2 signs (θ+ε, θ−ε), K inner steps of a truncation, P numbers of θ.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lopt import Array, Optimizer, Tree, apply_updates, prepare_to_print


class Settings(NamedTuple):
    """sigma: σ of the perturbations. truncation: K. min_length, max_length: of inner runs, in steps.

    max_offset: the first runs are shortened by less than that; None means K.
    """
    sigma: float = 0.01
    truncation: int = 50
    min_length: int = 100
    max_length: int = 1000
    max_offset: int | None = None


class Inner(NamedTuple):
    """What is trained, and by what.

    task: anything with init(key) → params, sample(key, split) → batch, loss(params, batch), and max_loss.
    optimizer: a function of θ [P] and of the planned number of steps of the run, to an `Optimizer`.
    """
    task: Any
    optimizer: Callable[[Array, Array], Optimizer]


class Pair(NamedTuple):
    """The state of one antithetic pair between two truncations.

    params, opt_state: of its two runs, leaves [2, …]. xi: the accumulator ξ [P]. run_step, length: int32, the steps
    made in the present run, and those after which it ends.
    """
    params: Tree
    opt_state: Any
    xi: Array
    run_step: Array
    length: Array


def truncation(inner: Inner, settings: Settings, key: Array, pair: Pair, theta: Array, split: Any,
               meta_step: Array) -> tuple[tuple[Array, Array], Pair]:
    """One truncation of a pair: ((its estimate of the meta-gradient [P], its mean loss), the pair after it).

    key: the pair's own, from `pair_keys`. split: the data, for task.sample.
    """
    # A fresh perturbation, ε ~ N(0, σ² I)
    eps = settings.sigma * jax.random.normal(draw_key(key, "eps", meta_step), theta.shape)

    # K steps of both runs, at θ+ε and θ−ε
    pair, losses, counted, after = unroll(inner, jnp.stack([theta + eps, theta - eps]), pair, key, split, meta_step,
                                          settings)

    # The estimate, and the accumulator for the next truncation
    gradient, xi = pes_gradient(losses, counted, after, eps, pair.xi, settings.sigma)
    return (gradient, mean_loss(losses, counted)), pair._replace(xi=xi)


def pes_gradient(losses: Array, counted: Array, after: Array, eps: Array, xi: Array,
                 sigma: float) -> tuple[Array, Array]:
    """(the PES estimate of ∇θ of the mean loss from one truncation of a pair [P], the accumulator after it [P]).

    ξ ← ξ + ε, and with Δ_t = L_t(θ+ε) − L_t(θ−ε) over the counted steps,

        gradient = 1/(2σ²) · [ Σ_{t not after} Δ_t · ξ + Σ_{t after} Δ_t · ε ] / (number of counted steps)

    and then ξ ← ε where a new run has begun. losses [K, 2]: at θ+ε and θ−ε. counted, after: bool [K]; after marks the
    steps of a run that began in this truncation, which has felt ε alone. eps, xi [P]. Source: PES.
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


def unroll(inner: Inner, thetas: Array, pair: Pair, key: Array, split: Any, meta_step: Array,
           settings: Settings) -> tuple[Pair, Array, Array, Array]:
    """K inner steps of both runs, on the same batches: (the pair after them, losses [K, 2], counted [K], after [K]).

    A run that has reached its length is begun anew in the next step; that step counts no loss. Each loss is taken on
    the step's own batch *before* its update, clipped to [0, max_loss], and is max_loss where it is not finite. after
    marks the steps from the first new beginning on. thetas: θ ± ε [2, P].
    """
    def inner_step(carry, t):
        pair, began = carry
        time = meta_step * settings.truncation + t
        batch = inner.task.sample(draw_key(key, "batch", time), split)

        def train_step(theta, params, opt_state):
            loss, grads = jax.value_and_grad(inner.task.loss)(params, batch)
            updates, opt_state = inner.optimizer(theta, pair.length).update(grads, opt_state, params, value=loss)
            return apply_updates(params, updates), opt_state, loss

        params, opt_state, loss = jax.vmap(train_step)(thetas, pair.params, pair.opt_state)
        loss = jnp.where(jnp.isfinite(loss), jnp.clip(loss, 0.0, inner.task.max_loss), inner.task.max_loss)  # [2]

        due = pair.run_step >= pair.length

        def begin_anew(pair):
            fresh = begin_run(inner, thetas, key, time, settings)._replace(xi=pair.xi)
            return jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, pair)

        moved = pair._replace(params=params, opt_state=opt_state, run_step=pair.run_step + 1)
        # Fresh weights are drawn only when this pair, or one that is unrolled side by side with it, needs them.
        moved = lax.cond(lax.pmax(due, SIDE_BY_SIDE), begin_anew, lambda pair: pair, moved)
        return (moved, began | due), (loss, ~due, began | due)

    (pair, _), recorded = lax.scan(inner_step, (pair, jnp.zeros((), bool)), jnp.arange(settings.truncation))
    return pair, *recorded


def begin(inner: Inner, theta: Array, key: Array, settings: Settings) -> Pair:
    """A pair at the start of its first run, with a random offset U{0, …, max_offset−1} for its run_step.

    The offsets keep pairs from beginning anew in lockstep. Where all lengths are the same, that needs offsets up to the
    length, or all pairs are in the same phase of training for ever.
    """
    time = jnp.int32(-1)  # before the first step, so that no later draw repeats these
    max_offset = settings.truncation if settings.max_offset is None else settings.max_offset
    offset = jax.random.randint(draw_key(key, "offset", time), (), 0, max_offset)
    return begin_run(inner, jnp.stack([theta, theta]), key, time, settings)._replace(run_step=offset)


def begin_run(inner: Inner, thetas: Array, key: Array, time: Array, settings: Settings) -> Pair:
    """A pair at the start of a run: fresh weights, the same for both signs, the optimizer's state for them, ξ = 0."""
    length = draw_length(key, time, settings)
    params = inner.task.init(draw_key(key, "start", time))
    opt_state = jax.vmap(lambda theta: inner.optimizer(theta, length).init(params))(thetas)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    return Pair(both, opt_state, jnp.zeros_like(thetas[0]), jnp.zeros_like(length), length)


def draw_length(key: Array, time: Array, settings: Settings) -> Array:
    """The length of a run, exp(U(ln min_length, ln max_length)), rounded to whole steps: int32."""
    low, high = np.log(settings.min_length), np.log(settings.max_length)
    uniform = jax.random.uniform(draw_key(key, "length", time), minval=low, maxval=high)
    return jnp.round(jnp.exp(uniform)).astype(jnp.int32)


SIDE_BY_SIDE = "side by side"  # the name of the axis of pairs that are unrolled together: see `over_pairs`

# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

DRAWS = ("eps", "start", "length", "batch", "offset")


def draw_key(key: Array, purpose: str, when: Array) -> Array:
    """The key of one draw of a pair: it depends on the pair's key, the purpose and the time alone.

    when: `meta_step` for what is drawn once in a truncation, else `time`.
    """
    return jax.random.fold_in(jax.random.fold_in(key, DRAWS.index(purpose)), when)


def pair_keys(key: Array, pairs: Array) -> Array:
    """One key for each pair: key, int32 [N] → keys [N]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, pairs)


def over_pairs(function: Callable, mesh: Mesh | None = None) -> Callable:
    """Makes a function of N pairs of a function of one, spread over the devices of a mesh.

    function(key, pair, *everywhere) → (values, pair). The function that is returned takes keys [N], pairs with leaves
    [N, …] (or None) and the same arguments everywhere; it returns (the mean over all pairs of the values, pairs).

    A device takes its pairs one by one on a CPU, where the state of one then stays in the cache and a reset costs
    nothing when none is due; on an accelerator, which needs the parallel work, all side by side. Each pair's values are
    computed where the pair is, gathered on every device, and averaged there in the order of the pairs, so that no sum
    depends on the number of devices: the smallest change grows, since PES divides differences of losses by σ². How XLA
    rounds one pair may still depend on how many a device has.
    """
    def on_device(keys, pairs, *everywhere):
        at_once = 1 if jax.default_backend() == "cpu" else len(keys)
        side_by_side = jax.vmap(lambda key, pair: function(key, pair, *everywhere), axis_name=SIDE_BY_SIDE)
        blocks = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (keys, pairs))
        values, pairs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]),
                                     lax.map(lambda block: side_by_side(*block), blocks))
        return values if mesh is None else lax.all_gather(values, mesh.axis_names[0], tiled=True), pairs

    def mapped(keys, pairs, *everywhere):
        spread = on_device
        if mesh is not None:
            all_of_it, a_share = PartitionSpec(), PartitionSpec(mesh.axis_names[0])
            spread = jax.shard_map(on_device, mesh=mesh, check_vma=False, out_specs=(all_of_it, a_share),
                                   in_specs=(a_share, a_share, *[all_of_it] * len(everywhere)))
        values, pairs = spread(keys, pairs, *everywhere)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), values), pairs

    return mapped


# ---------------------------------------------------------------------------------------------------------
# Demonstration: influence balancing (PES, its Section 5)


class Problem(NamedTuple):
    """The least that a task of `Inner` must have."""
    init: Callable[[Array], Tree]
    sample: Callable[[Array, Any], Tree]
    loss: Callable[[Tree, Tree], Array]
    max_loss: float


def influence_balancing() -> Inner:
    """x ← A x + θ·(10 times +1, 13 times −1), A with ½ on diagonal and superdiagonal, loss ½(x₁ − 1)²: x [23], θ [1].

    An "inner step" that is no training: the params are x, and the optimizer's update is A x + θ v − x, whatever the
    gradient. θ raises x₁ at once, by the ten nearest entries, and lowers it some twenty steps later by the others: in
    the long run x₁ = −6 θ. At θ = 0.5, whoever looks only a few steps ahead goes the wrong way.
    """
    v = jnp.asarray([1.0] * 10 + [-1.0] * 13)
    a = 0.5 * (jnp.eye(23) + jnp.eye(23, k=1))

    def optimizer(theta: Array, num_steps: Array) -> Optimizer:
        def update(grads, state, x, *, value):
            return a @ x + theta[0] * v - x, state

        return Optimizer(lambda x: (), update)

    return Inner(Problem(init=lambda key: jnp.ones(23), sample=lambda key, split: (),
                         loss=lambda x, batch: 0.5 * (x[0] - 1.0) ** 2, max_loss=1e3), optimizer)


def forget(pair: Pair) -> Pair:
    """The pair with ξ = 0: done after each truncation, it turns PES into truncated ES."""
    return pair._replace(xi=jnp.zeros_like(pair.xi))


def independent_estimates(inner: Inner, theta: Array, keys: Array, truncations: int, settings: Settings, *,
                          persistent: bool, skip: int = 0) -> Array:
    """The mean estimate over many truncations at one θ, of each of R pairs on its own [R, P].

    persistent: PES, else truncated ES. skip: how many of the first truncations to leave out. The R means share nothing,
    so that their spread gives a standard error.
    """
    def one_pair(key):
        def meta_step(pair, step):
            (gradient, _), pair = truncation(inner, settings, key, pair, theta, None, step)
            return pair if persistent else forget(pair), gradient

        _, gradients = lax.scan(meta_step, begin(inner, theta, key, settings), jnp.arange(truncations))
        return jnp.mean(gradients[skip:], axis=0)

    return jax.jit(jax.vmap(one_pair, axis_name=SIDE_BY_SIDE))(keys)


def exact_gradient(inner: Inner, theta: Array, keys: Array, truncations: int, settings: Settings, *,
                   skip: int = 0) -> tuple[Array, Array]:
    """(mean loss, its gradient [P]), differentiated through the runs of `independent_estimates`, at ε = 0."""
    def loss(theta):
        def one_pair(key):
            def meta_step(pair, step):
                pair, losses, counted, _ = unroll(inner, jnp.stack([theta, theta]), pair, key, None, step, settings)
                return pair, mean_loss(losses, counted)

            return lax.scan(meta_step, begin(inner, theta, key, settings), jnp.arange(truncations))[1]

        return jnp.mean(jax.vmap(one_pair, axis_name=SIDE_BY_SIDE)(keys)[:, skip:])

    return jax.jit(jax.value_and_grad(loss))(theta)


def follow(inner: Inner, theta: Array, keys: Array, meta_steps: int, learning_rate: float, settings: Settings, *,
           persistent: bool) -> tuple[Array, Array]:
    """Gradient descent on θ by PES, or by truncated ES: (θ before each meta-step [M, P], its mean loss [M])."""
    estimate = over_pairs(functools.partial(truncation, inner, settings))

    def meta_step(carry, step):
        theta, pairs = carry
        (gradient, loss), pairs = estimate(keys, pairs, theta, None, step)
        return (theta - learning_rate * gradient, pairs if persistent else forget(pairs)), (theta, loss)

    def run(theta):
        _, pairs = over_pairs(lambda key, _: ((), begin(inner, theta, key, settings)))(keys, None)
        return lax.scan(meta_step, (theta, pairs), jnp.arange(meta_steps))[1]

    return jax.jit(run)(theta)


def main() -> None:
    """Compares truncated ES and PES with the exact gradient, and what comes of following each."""
    inner, theta, runs = influence_balancing(), jnp.asarray([0.5]), Settings(0.1, 10, 200, 200)
    keys = pair_keys(jax.random.key(0), jnp.arange(512))
    print("Influence balancing: x ← A x + θ v with x in R²³, loss ½(x₁ − 1)², runs of 200 steps, θ = 0.5.")
    print("θ raises x₁ at once, and lowers it by more some twenty steps later.\n")
    print("Gradient of the mean loss, in truncations of K steps (mean ± standard error: 512 pairs, 1,000 steps)")
    print(f"  {'K':>3}{'exact':>10}{'truncated ES':>20}{'PES':>20}")
    for k in (5, 10, 20):
        settings = runs._replace(truncation=k)
        _, exact = exact_gradient(inner, theta, keys[:2], 1000 // k, settings)
        row = f"  {k:3}{exact[0]:10.2f}"
        for persistent in (False, True):
            g = independent_estimates(inner, theta, keys, 1000 // k, settings, persistent=persistent)
            row += f"{jnp.mean(g):13.2f} ± {jnp.std(g) / np.sqrt(len(g)):4.2f}"
        print(row)
    print("\nGradient descent on θ: 128 pairs, K = 10, learning rate 2e-4; loss: mean over 41 meta-steps around")
    print(f"  {'meta-step':>9}{'truncated ES: θ':>18}{'loss':>8}{'PES: θ':>12}{'loss':>8}")
    paths = [follow(inner, theta, keys[:128], 500, 2e-4, runs, persistent=p) for p in (False, True)]
    for step in (0, 50, 100, 200, 300, 499):
        row = f"  {step:9}"
        for (path, losses), width in zip(paths, (18, 12)):
            row += f"{path[step, 0]:{width}.3f}{jnp.mean(losses[max(0, step - 20):step + 21]):8.3f}"
        print(row)


if __name__ == "__main__":
    prepare_to_print()
    main()
