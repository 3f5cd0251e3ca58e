"""Optimizers: small_fc_lopt, VeLO and AdamW, and the files of learned optimizers.

    python lopt.py       print the features of a weight matrix (10 s)

An optimizer is a pair of pure functions, as in optax: `init(params) -> state` and
`update(grads, state, params, *, value=None) -> (updates, state)`.

The learned optimizer is small_fc_lopt. It computes 39 features of each weight from the gradient
g, the weight p, three kinds of decaying averages and the step t. An MLP with weights θ, the same
for all weights of a network, maps them to a direction d and a log-magnitude s:

    update = step_mult · d · exp(exp_mult · s),      p ← p − update_multiplier · update

Sources: small_fc_lopt (arXiv 2203.11860); Adafactor (arXiv 1804.04235) for the averages r and c;
μLO (arXiv 2406.00153) for the update multiplier; TP5 = "Tensor Programs V" (arXiv 2203.03466) for
Adam in μP; VeLO (arXiv 2211.09760).

Dimensions: S the shape of one weight tensor, F features, H hidden units of the MLP.
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import struct
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mup
from mup import Array, Tree

MOMENTUM_BETAS = (0.9, 0.99, 0.999)
RMS_BETAS = (0.999,)
ADAFACTOR_BETAS = (0.9, 0.99, 0.999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)


class Optimizer(NamedTuple):
    """optax's pair; inside its combinators use `optax.GradientTransformationExtraArgs(*optimizer)`.

    value of `update`: the training loss before the update; only VeLO needs it.
    """
    init: Callable
    update: Callable


class Learned(NamedTuple):
    """A learned optimizer as a file holds it; `learned_optimizer` makes an `Optimizer` of it.

    theta: the arrays of θ by name. parametrization: the one of meta-training. made: how θ was
    meta-trained, as JSON. decay and horizon are ours, and 0 turns them off.
    """
    theta: dict[str, Array]
    step_mult: float
    exp_mult: float = 0.001
    parametrization: mup.Parametrization = mup.MUP
    architecture: str = "small_fc_lopt"  # or velo
    made: dict[str, Any] = {}
    decay: float = 0.0
    horizon: int = 0


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf, in the types of the params."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u, jnp.result_type(p)), params, updates)


# -------- small_fc_lopt


class Averages(NamedTuple):
    """The decaying averages of one tensor, all 0 at first, without bias correction.

    m [3, S]: of g. v [S]: of g². r [3, S]: of the mean of g² over the largest axis (there S has
    length 1). c [3, S]: over the second largest axis. For vectors and scalars r is of g² itself,
    and c is None.
    """
    m: Array
    v: Array
    r: Array
    c: Array | None


def trained_decays(theta: dict[str, Array]) -> tuple[Array, Array, Array]:
    """β = 1 − exp(10·(ln(1−β₀)/10 + offset)): of m; of v, clipped; of r and c, clipped."""
    def decays(betas: tuple[float, ...], offset: Array) -> Array:
        return 1.0 - jnp.exp(10.0 * (np.log(1.0 - np.asarray(betas, np.float32)) / 10.0 + offset))

    return (decays(MOMENTUM_BETAS, theta["momentum_decays"]),
            jnp.clip(decays(RMS_BETAS, theta["rms_decays"]), 0.0, 1.0)[0],
            jnp.clip(decays(ADAFACTOR_BETAS, theta["adafactor_decays"]), 0.0, 1.0))


def largest_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """(d0, d1), the largest and the second largest axis, both negative; in a tie d0 is later."""
    *_, d1, d0 = np.argsort(shape, kind="stable") - len(shape)
    return int(d0), int(d1)


def update_averages(averages: Averages, g: Array, decays: tuple[Array, Array, Array]) -> Averages:
    """The averages after a gradient g [S].

    m_i ← β m_i + (1−β) g;   v ← β v + (1−β) g²;
    matrices: r_i ← β r_i + (1−β) mean_d0(g² + 1e-30),   c_i ← β c_i + (1−β) mean_d1(g² + 1e-30);
    vectors and scalars: r_i ← β r_i + (1−β)(g² + 1e-30).
    """
    def decayed(beta: Array, old: Array, new: Array) -> Array:
        beta = beta.reshape(beta.shape + (1,) * (old.ndim - beta.ndim))
        return beta * old + (1.0 - beta) * new

    momentum, rms, adafactor = decays
    square = g * g + 1e-30
    m = decayed(momentum, averages.m, g[None])
    v = decayed(rms, averages.v, g * g)
    if averages.c is None:
        return Averages(m, v, decayed(adafactor, averages.r, square[None]), None)
    d0, d1 = largest_axes(g.shape)
    r = decayed(adafactor, averages.r, jnp.mean(square[None], d0, keepdims=True))
    c = decayed(adafactor, averages.c, jnp.mean(square[None], d1, keepdims=True))
    return Averages(m, v, r, c)


class Statistics(NamedTuple):
    """The inputs of the features of one tensor; ρ and κ are Adafactor's factors, shaped as r and c.

    For vectors and scalars rho and kappa are None, and c is r.
    """
    g: Array
    p: Array
    m: Array
    v: Array
    r: Array
    c: Array
    rho: Array | None
    kappa: Array | None


def rsqrt_plus(x: Array) -> Array:
    """rsqrt₊(x) = rsqrt(max(x, 1e-9))."""
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def statistics(averages: Averages, g: Array, p: Array) -> Statistics:
    """The statistics after g, with ρ_i = rsqrt₊(r_i / (mean_d1 r_i + 1e-9)), κ_i = rsqrt₊(c_i)."""
    m, v, r, c = averages
    if c is None:
        return Statistics(g, p, m, v, r, r, None, None)
    _, d1 = largest_axes(g.shape)
    rho = rsqrt_plus(r / (jnp.mean(r, d1, keepdims=True) + 1e-9))
    return Statistics(g, p, m, v, r, c, rho, rsqrt_plus(c))


def each(function: Callable, *rows: Any) -> list[Array]:
    """Map a function over the decays. rows: arrays [3, S], or lists of three arrays [S]."""
    at_once = isinstance(rows[0], jax.Array)
    return [*(jax.vmap(function)(*rows) if at_once else map(function, *rows))]


def features(s: Statistics) -> dict[str, list[Array]]:
    """The features of one tensor: arrays [S], or with length 1 along axes where they are constant.

    To change the learned optimizer, add, change or drop a line: all other code follows this table.
    Compute means over the tensor in `statistics`: the fast paths take a few weights at a time. They
    also reshape: test `rho is None` to detect vectors, not `g.ndim`. VeLO needs these names.
    """
    g, p, m, v, r, c, rho, kappa = s
    if rho is None:
        g_scale = each(lambda r: rsqrt_plus(r + 1e-9), r)
        m_scaled = each(lambda m, r: m * lax.rsqrt(r + 1e-6), m, r)
    else:
        g_scale = each(lambda ρ, κ: ρ * κ, rho, kappa)
        m_scaled = each(lambda m, ρ, κ: m * (ρ * κ), m, rho, kappa)
    rsqrt_v = lax.rsqrt(v + 1e-6)
    return {
        "g": [g],                                                 # 0
        "p": [p],                                                 # 1
        "m": [*m],                                                # 2–4
        "v": [v],                                                 # 5
        "m rsqrt(v+1e-6)": each(lambda m: m * rsqrt_v, m),        # 6–8
        "rsqrt(v+1e-6)": [rsqrt_v],                               # 9
        "g ρκ": [g * x for x in g_scale],                         # 10–12
        "r": [*r],                                                # 13–15
        "c": [*c],                                                # 16–18
        "rsqrt(r+1e-8)": each(lambda r: lax.rsqrt(r + 1e-8), r),  # 19–21
        "rsqrt(c+1e-8)": each(lambda c: lax.rsqrt(c + 1e-8), c),  # 22–24
        "m ρκ": m_scaled,                                         # 25–27
    }


def time_features(t: Array) -> Array:
    """Features 28–38, the same for all weights: tanh(t/τ − 1) for each timescale τ [11]."""
    return jnp.tanh(t / jnp.asarray(TIMESCALES, jnp.float32) - 1.0)


def rms_scale(mean_square: Array) -> Array:
    """The factor that normalises a feature by its root mean square: rsqrt(1e-5 + mean x²)."""
    return lax.rsqrt(1e-5 + mean_square)


def init_theta(key: Array, hidden: tuple[int, ...] = (32, 32)) -> dict[str, Array]:
    """Fresh θ: MLP weights N(0, 1/fan_in) cut at 2σ, biases 0, decay offsets 0.

    hidden: the units of each hidden layer.
    """
    sizes = (sum(block_sizes(features)) + len(TIMESCALES), *hidden, 2)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    theta = {"momentum_decays": zeros(3), "rms_decays": zeros(1), "adafactor_decays": zeros(3)}
    keys = jax.random.split(key, len(sizes) - 1)
    for i, (layer_key, fan_in, fan_out) in enumerate(zip(keys, sizes, sizes[1:])):
        normal = jax.random.truncated_normal(layer_key, -2.0, 2.0, (fan_in, fan_out), jnp.float32)
        theta |= {f"w{i}": normal / math.sqrt(fan_in), f"b{i}": zeros(fan_out)}
    return theta


def dense(w: Array, x: Array, b: Array) -> Array:
    """wᵀ x + b at each weight of a tensor: w [F, H], x [F, S], b [H] → [H, S]."""
    return jnp.tensordot(w.T, x, 1) + b.reshape(-1, *(1,) * (x.ndim - 1))


activation = jax.nn.relu  # of the MLP's hidden units


def mlp_update(learned: Learned, hidden: Array) -> Array:
    """The update [S] from the pre-activations [H, S] of the MLP's first layer."""
    theta, i = learned.theta, 1
    while f"w{i}" in theta:
        hidden = dense(theta[f"w{i}"], activation(hidden), theta[f"b{i}"])
        i += 1
    return update_from(learned, hidden[0], hidden[1])


def update_from(learned: Learned, d: Array, s: Array) -> Array:
    """step_mult · d · exp(exp_mult · s)."""
    return learned.step_mult * d * jnp.exp(learned.exp_mult * s)


def at_time(learned: Learned, t: Array) -> Learned:
    """The MLP for step t: the time features times their rows of w0 are added to the bias b0."""
    w0, b0 = learned.theta["w0"], learned.theta["b0"]
    of_time = time_features(t)
    n = len(w0) - len(of_time)
    return learned._replace(theta=learned.theta | {"w0": w0[:n], "b0": b0 + of_time @ w0[n:]})


def plain_update(features_of: Callable, learned: Learned, s: Statistics) -> Array:
    """The update of one tensor [S] by definition; `fast_update` computes the same, only faster.

    features_of: a table such as `features`. learned: with the MLP for this step (`at_time`).
    """
    x = jnp.stack([jnp.broadcast_to(f * rms_scale(jnp.mean(f * f)), s.g.shape)
                   for f in flat(features_of(s))])  # [F, S]
    return mlp_update(learned, dense(learned.theta["w0"], x, learned.theta["b0"]))


class LearnedOptimizerState(NamedTuple):
    """step: int32, the updates made so far. averages: `Averages` of four trees like the params."""
    step: Array
    averages: Tree


def small_fc_lopt(learned: Learned, update_multipliers: Tree = 1.0) -> Optimizer:
    """The paper's learned optimizer for float32 tensors; `learned_optimizer` is the public one.

    A gradient entry whose square is not finite counts as 0.
    """
    def init(params):
        averages = jax.tree.map(init_averages, params)
        return LearnedOptimizerState(jnp.zeros((), jnp.int32), by_average(params, averages))

    def update(grads, state, params, value=None):
        decays, mlp = trained_decays(learned.theta), at_time(learned, state.step)

        def new_update(p, g, averages, multiplier):
            update = fast_update(features, mlp, statistics(averages, g, p))
            return -multiplier * update  # μP acts here: a hidden weight moves 1/fan_in as far

        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g * g), g, 0.0), grads)
        averages = jax.tree.map(lambda g, *old: update_averages(Averages(*old), g, decays),
                                grads, *state.averages)
        multipliers = spread(update_multipliers, params)
        updates = jax.tree.map(new_update, params, grads, averages, multipliers)
        return updates, LearnedOptimizerState(state.step + 1, by_average(params, averages))

    return Optimizer(init, update)


# -------- AdamW: the meta-optimizer, and the baseline in SP (AdamW) and in μP (μAdam)


class AdamState(NamedTuple):
    """step: int32, the updates made so far. m, v: trees like the params."""
    step: Array
    m: Tree
    v: Tree


def adamw(learning_rate: float | Array | Callable, *, b1: float = 0.9,
          b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
          update_multipliers: Tree = 1.0) -> Optimizer:
    """AdamW: −η · multiplier · (m̂/(√v̂ + ε) + weight_decay · p), m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

    learning_rate: η, or a function of the step. With μP's update_multipliers this is μAdam (TP5,
    Table 8).
    """
    def init(params):
        zero = jax.tree.map(zeros, params)
        return AdamState(jnp.zeros((), jnp.int32), zero, zero)

    def update(grads, state, params, value=None):
        eta = learning_rate(state.step) if callable(learning_rate) else learning_rate
        t = state.step.astype(jnp.float32) + 1.0
        correction1, correction2 = 1.0 - b1**t, 1.0 - b2**t

        def new_update(p, m, v, multiplier):
            m_hat, v_hat = m / correction1, v / correction2
            return -eta * multiplier * (m_hat / (jnp.sqrt(v_hat) + eps) + weight_decay * p)

        m = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.v, grads)
        updates = jax.tree.map(new_update, params, m, v, spread(update_multipliers, params))
        return updates, AdamState(state.step + 1, m, v)

    return for_any_params(init, update)


def warmup_cosine(initial: float, peak: float, final: float, warmup_steps: int,
                  decay_steps: int) -> Callable:
    """A schedule: linear from initial to peak in warmup_steps, a cosine to final at decay_steps."""
    def learning_rate(step: Array) -> Array:
        warm = initial + (peak - initial) * step / max(warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / max(decay_steps - warmup_steps, 1), 0.0, 1.0)
        cosine = final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, cosine)

    return learning_rate


def global_norm(tree: Tree) -> Array:
    """√(Σ x²) over all entries of a tree."""
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(tree: Tree, limit: float) -> Tree:
    """The tree, scaled down to the limit if its global norm exceeds it."""
    norm = global_norm(tree)
    return jax.tree.map(lambda x: jnp.where(norm > limit, x / norm * limit, x), tree)


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~

class InputError(ValueError):
    """A user's error: one line, exit code 2."""


# -------- The public learned optimizer: any params, and what is ours


def learned_optimizer(learned: Learned, update_multipliers: Tree = 1.0,
                      gradient_multiplier: float | Array = 1.0,
                      num_steps: int | Array | None = None) -> Optimizer:
    """A learned optimizer for params of any tree, type, shape and mesh.

    update_multipliers: a tree like the params, or one number. num_steps: the planned number of
    updates; VeLO needs it. Raises ValueError.

    Ours: gradient_multiplier (`mup.gradient_multiplier`) multiplies all gradients. Each update also
    takes away the share learned.decay of the params. With learned.horizon, the features see
    pace · t, and updates are multiplied by √pace, where pace = horizon/num_steps.
    """
    check_theta(learned)
    optimizer = (velo(learned, update_multipliers, num_steps) if learned.architecture == "velo"
                 else small_fc_lopt(learned, update_multipliers))
    pace = learned.horizon / num_steps if learned.horizon and num_steps is not None else 1.0

    def update(grads, state, params, value=None):
        grads = jax.tree.map(lambda g: gradient_multiplier * g, grads)
        paced = state._replace(step=pace * state.step)
        updates, after = optimizer.update(grads, paced, params, value)
        updates = jax.tree.map(lambda u, p: pace**0.5 * (u - learned.decay * p), updates, params)
        return updates, after._replace(step=state.step + 1)

    return for_any_params(optimizer.init, update)


def with_cooldown(optimizer: Optimizer, num_steps: int | Array,
                  cooldown: float | Array) -> Optimizer:
    """Ours: in the last share `cooldown` of a run the updates fall linearly to 0.

    The factor of update t is (num_steps − t) / (cooldown · num_steps), cut to [0, 1].
    """
    def update(grads, state, params, *, value=None, **_):
        updates, after = optimizer.update(grads, state, params, value=value)
        left = (num_steps - state.step) / jnp.maximum(cooldown * num_steps, 1e-9)
        factor = jnp.where(cooldown > 0, jnp.clip(left, 0.0, 1.0), 1.0)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), after

    return Optimizer(optimizer.init, update)


def for_any_params(init: Callable, update: Callable) -> Optimizer:
    """Extend an optimizer of float32 tensors to any params. Integers get zero updates."""
    def moves(p):
        if jnp.iscomplexobj(p):
            raise ValueError("params are complex: use optax.contrib.split_real_and_imaginary")
        return jnp.size(p) > 0 and jnp.issubdtype(jnp.result_type(p), jnp.floating)

    def working(params, tree):
        return jax.tree.map(lambda p, x: jnp.asarray(x, jnp.promote_types(
            jnp.result_type(p), jnp.float32)) if moves(p) else None, params, tree)

    def of_any(grads, state, params, value):
        updates, state = update(working(params, grads), state, working(params, params), value)
        return jax.tree.map(lambda p, u: jnp.zeros_like(p) if u is None
                            else u.astype(jnp.result_type(p)), params, updates), state

    @functools.partial(jax.jit, inline=True)
    def on_any_mesh(grads, state, params, value):
        mesh = mesh_of(params)
        if mesh is None:
            return of_any(grads, state, params, value)
        if AxisType.Explicit in mesh.axis_types:
            layout = jax.tree.map(lambda x: jax.typeof(x).sharding if mesh_of(x)
                                  else NamedSharding(mesh, PartitionSpec()), (params, state))
            with jax.sharding.use_abstract_mesh(mesh):
                automatic = jax.sharding.auto_axes(of_any, out_sharding=layout)
                return automatic(grads, state, params, value)
        # `where` makes XLA shard the new like the old. XLA then drops it.
        return jax.tree.map(lambda old, new: jnp.where(True, new, old), (params, state),
                            of_any(grads, state, params, value))

    init_jitted = jax.jit(lambda params: init(working(params, params)), inline=True)

    def init_any(params):
        only_shapes = any(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(params))
        return jax.eval_shape(init_jitted, params) if only_shapes else init_jitted(params)

    return Optimizer(init_any, lambda grads, state, params, *, value=None, **_: on_any_mesh(
        grads, state, params, value))


def mesh_of(tree: Tree) -> Any:
    """The mesh over which JAX shards the arrays of a tree; None if none or manual."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
    meshes = [m for m in meshes if not m.empty and AxisType.Manual not in m.axis_types]
    return meshes[0] if meshes else None


def zeros(like: Array) -> Array:
    """Zeros with the shape, type and sharding of an array."""
    return jnp.where(True, 0, like)


def init_averages(p: Array) -> Averages:
    """The averages of a tensor before its first update: all 0."""
    def three(x):
        return zeros(jnp.broadcast_to(x, (len(MOMENTUM_BETAS), *x.shape)))

    if p.ndim < 2:
        return Averages(three(p), zeros(p), three(p), None)
    r, c = (three(jnp.sum(p, d, keepdims=True)) for d in largest_axes(p.shape))
    return Averages(three(p), zeros(p), r, c)


def by_average(params: Tree, averages: Tree) -> Averages:
    """Turn a tree of `Averages` into `Averages` of four trees like the params."""
    return Averages(*(jax.tree.map(lambda p, a: a[i], params, averages) for i in range(4)))


def spread(multipliers: Tree, params: Tree) -> Tree:
    """The multiplier of each leaf of the params."""
    def names(path):  # Flax NNX boxes arrays in a field `value`
        keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        return keys[:-1] if keys[-1:] == ("value",) else keys

    given = {names(path): x for path, x in jax.tree.leaves_with_path(multipliers)}

    def multiplier(path, p):
        keys = names(path)
        found = [given[keys[:n]] for n in range(len(keys) + 1) if keys[:n] in given]
        if not found:
            raise ValueError(f"update_multipliers have no number for {'/'.join(keys)}")
        return found[0]

    return jax.tree.map_with_path(multiplier, params)


def flat(table: dict[str, list[Array]]) -> list[Array]:
    """All features of a table, in order."""
    return [feature for block in table.values() for feature in block]


@functools.cache
def block_sizes(features_of: Callable) -> list[int]:
    """How many features each block of a table has."""
    one = jnp.zeros((1, 1))
    made = lambda: list(features_of(statistics(init_averages(one), one, one)).values())
    return [len(block) for block in jax.eval_shape(made)]


def check_theta(learned: Learned) -> None:
    """Raise ValueError for arrays that are no θ of the architecture."""
    shapes = {name: np.shape(x) for name, x in learned.theta.items()}
    if learned.architecture == "velo":
        units = shapes.get("lstm_init_state/hidden", (1,))[-1]
        expected = velo_shapes(units, shapes.get("ff_mod_stack/~/b0", (1,))[0])
    elif learned.architecture == "small_fc_lopt":
        layers = sum(name[0] == "b" for name in shapes)
        hidden = tuple(math.prod(shapes.get(f"b{i}", (1,))) for i in range(layers - 1)) or (32,)
        fresh = jax.eval_shape(lambda: init_theta(jax.random.key(0), hidden))
        expected = {name: x.shape for name, x in fresh.items()}
    else:
        raise ValueError(f"unknown architecture {learned.architecture!r}")
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"no θ of {learned.architecture}: {name!r} has shape "
                             f"{shapes.get(name)}, expected {expected.get(name)}")


# -------- The fast paths: `plain_update` in chunks, and as one kernel of a GPU


def fast_update(features_of: Callable, learned: Learned, s: Statistics) -> Array:
    """`plain_update` by the fastest way: in one kernel on a GPU, else in chunks."""
    fits = s.g.dtype == jnp.float32 and 1 < s.g.size < 2**31
    in_kernel = fits and jax.default_backend() == "gpu" and importlib.util.find_spec(
        "jax.experimental.pallas.triton")
    return (in_one_kernel if in_kernel else in_chunks)(features_of, learned, s)


# Weights in a chunk: the activations of two chunks (a pair's in PES) fit a CPU's L2 cache.
CHUNK = {"cpu": 2048, "gpu": 2**18}


def in_chunks(features_of: Callable, learned: Learned, s: Statistics) -> Array:
    """`plain_update`, several times as fast and with little memory.

    Features constant along an axis are multiplied by their rows of w0 as small arrays, and then
    broadcast: 16 of 39 inputs remain for each weight of a matrix. The scales commute into w0:
    (x·s) W = x (s[:, None] W). Axes: others, rows, columns; the last two are the largest.
    """
    shape = s.g.shape
    s = jax.tree.map(lambda x: as_matrices(x, shape), s)
    *others, rows, columns = s.g.shape
    weights = CHUNK.get(jax.default_backend(), 2048)
    chunk = max(1, min(rows, weights // (math.prod(others) * columns)))  # rows of a chunk
    chunks = -(-rows // chunk)

    made, w0 = flat(features_of(s)), learned.theta["w0"]
    own = [i for i, f in enumerate(made) if f.shape == s.g.shape]  # features of each weight

    def first_row(i):  # of chunk i; the last chunk overlaps the one before it
        return jnp.minimum(i * chunk, rows - chunk)

    def cut(x, i):  # the rows of x in chunk i
        return x if x.shape[-2] == 1 or chunks == 1 else lax.dynamic_slice_in_dim(
            x, first_row(i), chunk, -2, allow_negative_indices=False)

    def features_of_chunk(i):  # [len(own), others, chunk, columns]
        here = made if chunks == 1 else flat(features_of(jax.tree.map(lambda x: cut(x, i), s)))
        return jnp.concatenate([here[j][None] for j in own])

    def add_squares(i, total):
        x = features_of_chunk(i)
        if rows % chunk:
            is_new = first_row(i) + jnp.arange(chunk) >= i * chunk
            x = jnp.where(is_new[:, None], x, 0.0)
        return total + jnp.sum(x * x, axis=tuple(range(1, x.ndim)))

    def loop(body, start):
        return body(0, start) if chunks == 1 else lax.fori_loop(0, chunks, body, start)

    squares = loop(add_squares, jnp.zeros_like(s.g, shape=(len(own),)))
    w0_own = (w0[np.array(own)] * rms_scale(squares / float(s.g.size))[:, None]).T
    of_rows, of_all = hidden_of_others(learned, made, s)
    # XLA's loop adds this four times as fast if it is laid out for a whole chunk.
    of_all = jnp.broadcast_to(of_all, (w0.shape[1], *others, chunk, columns))

    def write_update(i, update):
        x = features_of_chunk(i)
        hidden = (w0_own @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:]) + of_all
        if of_rows is not None:
            hidden = hidden + cut(of_rows, i)  # [H, others, chunk, columns]
        new = mlp_update(learned, hidden.reshape(len(hidden), -1)).reshape(x.shape[1:])
        return new if chunks == 1 else lax.dynamic_update_slice_in_dim(
            update, new, first_row(i), -2, allow_negative_indices=False)

    return from_matrices(loop(write_update, jnp.zeros_like(s.g)), shape)


def hidden_of_others(learned: Learned, made: list[Array],
                     s: Statistics) -> tuple[Array | None, Array]:
    """Two parts of the first layer's pre-activations: of row features [H, others, rows, 1], or
    None; of the bias and the other constant features [H, others, 1, columns]."""
    of_rows, of_all = None, learned.theta["b0"].reshape(-1, *(1,) * s.g.ndim)
    for shape in sorted({f.shape for f in made} - {s.g.shape}):
        here = np.array([i for i, f in enumerate(made) if f.shape == shape])
        x = jnp.concatenate([made[i][None] for i in here])
        scale = rms_scale(jnp.mean(x * x, axis=tuple(range(1, x.ndim))))
        hidden = jnp.einsum("fh,f...->h...", learned.theta["w0"][here] * scale[:, None], x)
        if shape[-2] > 1:
            of_rows = hidden if of_rows is None else of_rows + hidden
        else:
            of_all = of_all + hidden
    return of_rows, of_all


def in_one_kernel(features_of: Callable, learned: Learned, s: Statistics,
                  interpret: bool = False) -> Array:
    """`plain_update` as one GPU kernel. interpret: compute it without a GPU, slowly."""
    from jax.experimental.pallas import pallas_call, program_id, triton

    shape = s.g.shape
    s = jax.tree.map(lambda x: as_matrices(x, shape), s)
    theta, table = learned.theta, features_of(s)
    made = flat(table)
    own = [i for i, f in enumerate(made) if f.shape == s.g.shape]
    blocks = [[f.ravel() for f in x if f.shape == s.g.shape] for x in table.values()]
    mean_squares = jnp.concatenate([jnp.mean(jnp.stack(x) ** 2, axis=1) for x in blocks if x])
    w0 = theta["w0"][np.array(own)] * rms_scale(mean_squares)[:, None]  # [len(own), H]
    last = sum(name[0] == "w" for name in theta) - 1

    def padded(x, *axes):  # with zeros along axes of hidden units: Triton takes 16, 32, 64 …
        return jnp.pad(x, [(0, (max(16, 1 << (n - 1).bit_length()) - n) * (i in axes))
                           for i, n in enumerate(x.shape)])

    of_others = [padded(jnp.moveaxis(x, 0, -1), s.g.ndim)  # [others, rows, columns, H]
                 for x in hidden_of_others(learned, made, s) if x is not None]
    layers = [(padded(theta[f"w{i}"], 0, 1), padded(theta[f"b{i}"], 0)) for i in range(1, last)]
    outputs = padded(theta[f"w{last}"].T, 1), theta[f"b{last}"]
    arrays, structure = jax.tree.flatten((s, of_others, padded(w0, 1), layers, outputs))
    n = 128  # weights in each program of the kernel

    def kernel(*refs):  # refs: the flat arrays, then the update
        *refs, out = refs
        which = program_id(0) * n + jnp.arange(n)
        there = which < s.g.size  # the last program has fewer
        places = jnp.unravel_index(which, s.g.shape)

        def load(array, at, mask=None):
            return triton.load(array.ref.at[at], mask=mask, other=None if mask is None else 0.0)

        def at_weights(shape):  # the weights' flat indices in an array of this shape
            at = jnp.zeros_like(which)
            for place, size in zip(places, shape):
                at = at * size + (place if size > 1 else 0)
            return at

        def statistic(x):  # [n], or a list of three
            one = x.shape[-s.g.ndim:]
            three = [load(x, i * math.prod(one) + at_weights(one), there) for i in range(
                math.prod(x.shape) // math.prod(one))]
            return three if one != x.shape else three[0]

        s_, of_others, w0, layers, (w, b) = structure.unflatten(
            [types.SimpleNamespace(ref=ref, shape=x.shape) for ref, x in zip(refs, arrays)])
        made, units = flat(features_of(jax.tree.map(statistic, s_))), jnp.arange(w0.shape[1])
        hidden = sum(load(x, at_weights(x.shape[:-1])[:, None] * len(units) + units, there[:, None])
                     for x in of_others)
        for k, i in enumerate(own):
            hidden += made[i][:, None] * load(w0, k * len(units) + units)  # [n, H]
        for w1, b1 in layers:
            square = jnp.arange(w1.shape[0])[:, None] * w1.shape[1] + jnp.arange(w1.shape[1])
            hidden = triton.dot(activation(hidden), load(w1, square),
                                precision=lax.Precision.HIGHEST)
            hidden += load(b1, jnp.arange(w1.shape[1]))
        hidden, units = activation(hidden), jnp.arange(w.shape[1])
        d_and_s = (jnp.sum(hidden * load(w, j * len(units) + units), 1) + b.ref[j] for j in (0, 1))
        triton.store(out.at[which], update_from(learned, *d_and_s), mask=there)

    update = pallas_call(kernel, jax.ShapeDtypeStruct((s.g.size,), s.g.dtype),
                         grid=(-(-s.g.size // n),), interpret=interpret,
                         compiler_params=triton.CompilerParams(num_warps=4, num_stages=1)
                         )(*map(jnp.ravel, arrays))
    return from_matrices(update.reshape(s.g.shape), shape)


def as_matrices(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [..., S], S with length 1 in places, as [..., others, rows, columns]."""
    lead = x.shape[:x.ndim - len(shape)]
    if len(shape) < 2:
        return x.reshape(*lead, -1, 1)
    return jnp.moveaxis(x, sorted(largest_axes(shape)), (-2, -1))


def from_matrices(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [others, rows, columns] as a tensor of this shape."""
    if len(shape) < 2:
        return x.reshape(shape)
    return jnp.moveaxis(x, (-2, -1), sorted(largest_axes(shape)))


# -------- VeLO, a baseline
# An LSTM over a network's tensors chooses the step size and the MLP of each one.
# "A slip" looks wrong, but must stay: the published weights were trained with it.

def update_losses(losses: Tree, value: Array, t: Array, num_steps: Array) -> tuple[Tree, Array]:
    """The memory after a loss, and 9 features: each loss average relative to the next longer one.

    losses: the means, from short to long, and the minima of c, [10] each.
    c_j = means_j / (1 − d_j^(t+1)),   d_j = exp(−1/h_j), h_j geometric from 10 to num_steps;
    feature_j = clip((c_j − lowest_j) / max(1e-8, c_{j+1} − lowest_j) − 1, −1, 1), 0 for t < 2.
    A loss above twice the largest average counts as that much.
    """
    means, lowest = losses
    d = jnp.exp(-1.0 / jnp.logspace(1.0, jnp.log10(num_steps), 10, dtype=jnp.float32))
    correction = 1.0 - d ** (t + 1).astype(jnp.float32)
    # A slip: averages of t losses have the bias correction of t + 1.
    largest = jnp.where(t == 0, value, jnp.max(means / correction))
    means = d * means + (1.0 - d) * jnp.minimum(value, 2.0 * jnp.abs(largest))
    c = means / correction
    lowest = jnp.minimum(lowest, c)
    above = (c[:-1] - lowest[:-1]) / jnp.maximum(1e-8, c[1:] - lowest[:-1])
    return (means, lowest), jnp.where(t < 2, 0.0, jnp.clip(above - 1.0, -1.0, 1.0))


def tensor_inputs(p: Array, averages: Averages, fraction: Array, of_loss: Array) -> Array:
    """The LSTM's inputs from one tensor p [S] → [30].

    averages: before this gradient. fraction: t / num_steps. of_loss [9]: from `update_losses`.
    """
    def clipped_log(x):
        return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)

    axes = tuple(range(1, averages.m.ndim))
    scale = lax.rsqrt(jnp.maximum(1e-9, jnp.mean(p * p)))
    m, v = scale * averages.m, scale * averages.v  # a slip: v is of g², yet scaled as g is
    mean_m = jnp.mean(m, axes, keepdims=True)
    rank = sum(n > 1 for n in p.shape)
    fractions = jnp.asarray([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1], jnp.float32)
    return jnp.concatenate([
        jnp.tanh(10.0 * (fraction - fractions)),              # 0–8
        of_loss,                                              # 9–17
        clipped_log(jnp.mean(v))[None],                       # 18
        jax.nn.one_hot(rank, 5, dtype=jnp.float32),           # 19–23
        clipped_log(jnp.mean(jnp.square(m - mean_m), axes)),  # 24–26
        clipped_log(jnp.mean(jnp.square(v - mean_m), axes)),  # 27–29, a slip: not the mean of v
    ]).astype(jnp.float32)


def layer(theta: dict[str, Array], name: str, x: Array) -> Array:
    """A linear layer of the LSTM's network: x w + b."""
    return x @ theta[f"rnn_params/{name}/w"] + theta[f"rnn_params/{name}/b"]


def lstm(theta: dict[str, Array], x: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
    """A step of the LSTM for all tensors: x [tensors, 30] → (hidden, cell) [tensors, units]."""
    # Tensors meet only in this maximum. A slip: the layer `linear` of θ is not used.
    over_tensors = jnp.max(jax.nn.relu(layer(theta, "linear_1", x)), 0, initial=0.0)  # [units]
    z = jnp.concatenate([layer(theta, "linear_2", x) + over_tensors, hidden], 1)
    i, g, f, o = jnp.split(layer(theta, "rnn/linear", z), 4, axis=1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def mix_bank(theta: dict[str, Array], controls: Array) -> dict[str, Array]:
    """Each tensor's MLP: 100 · mean over the bank of (controls [tensors, bank] · weights)."""
    bank = {name[15:]: x for name, x in theta.items() if name.startswith("ff_mod_stack/~/")}
    # θ holds the first matrix in pieces, one for each block of features.
    pieces = [bank.pop(f"w0__{i}") for i in range(len(block_sizes(velo_features)))]
    bank["w0"] = jnp.concatenate(pieces, axis=1)  # [bank, 30, 4]
    return {name: 100.0 / len(x) * jnp.tensordot(controls, x, 1) for name, x in bank.items()}


def velo_features(s: Statistics) -> dict[str, list[Array]]:
    """The features of VeLO's MLPs: 30 in 14 blocks, numbered as in θ's w0__0 … w0__13."""
    g, _, m, _, r, _, rho, _ = s
    ours = features(s)
    rsqrt_v, = ours["rsqrt(v+1e-6)"]
    ours |= {"g clipped": [jnp.clip(g, -0.1, 0.1)], "g rsqrt(v+1e-6)": [g * rsqrt_v]}
    if rho is None:
        ours["m ρκ"] = each(lambda m, r: m * lax.rsqrt(r), m, r)
    names = ("g", "g clipped", "p", "m", "v", "m rsqrt(v+1e-6)", "rsqrt(v+1e-6)", "g ρκ",
             "g rsqrt(v+1e-6)", "r", "c", "rsqrt(r+1e-8)", "rsqrt(c+1e-8)", "m ρκ")
    return {name: ours[name] for name in names}


class VeLOState(NamedTuple):
    """hidden, cell: the LSTM's state [tensors, units]. averages: as in `LearnedOptimizerState`."""
    step: Array
    losses: Tree
    hidden: Array
    cell: Array
    averages: Tree


def velo(learned: Learned, update_multipliers: Tree, num_steps: int | Array | None) -> Optimizer:
    """VeLO for float32 tensors.

    update = lr_mult · √(mean p² + 1e-9) · step_mult · d · exp(exp_mult · s), with a tensor's own
    lr_mult and MLP. Gradients are clipped to ±1000; a NaN stays.
    """
    theta = learned.theta
    if num_steps is None:
        raise ValueError("VeLO needs the planned number of updates: num_steps=1000")
    num_steps = jnp.asarray(num_steps, jnp.float32)
    decays = tuple(map(jnp.float32, (MOMENTUM_BETAS, RMS_BETAS[0], ADAFACTOR_BETAS)))

    def init(params):
        tensors = len(jax.tree.leaves(params))
        hidden, cell = (jnp.tile(theta[f"lstm_init_state/{name}"], (tensors, 1))
                        for name in ("hidden", "cell"))
        losses = jnp.zeros(10, jnp.float32), jnp.full(10, 999999999999.0, jnp.float32)
        averages = by_average(params, jax.tree.map(init_averages, params))
        return VeLOState(jnp.zeros((), jnp.int32), losses, hidden, cell, averages)

    def update(grads, state, params, value=None):
        if value is None:
            raise ValueError("VeLO needs the loss: update(…, value=loss)")
        t, value = state.step, jnp.asarray(value, jnp.float32)
        losses, of_loss = update_losses(state.losses, value, t, num_steps)
        x = jax.tree.map(lambda p, *old: tensor_inputs(p, Averages(*old), t / num_steps, of_loss),
                         params, *state.averages)
        x = jnp.reshape(jnp.asarray(jax.tree.leaves(x), jnp.float32), (-1, 30))
        hidden, cell = lstm(theta, x, state.hidden, state.cell)
        mlps = mix_bank(theta, layer(theta, "rnn_to_controls", hidden))
        lr_mults = layer(theta, "step_size", hidden)[:, 0]

        def new_update(p, g, a, c, i):
            mlp = learned._replace(theta={name: w[i] for name, w in mlps.items()})
            scale = lr_mults[i] * jnp.sqrt(jnp.mean(p * p) + 1e-9)
            return -c * scale * fast_update(velo_features, mlp, statistics(a, g, p))

        grads = jax.tree.map(lambda g: jnp.clip(g, -1000.0, 1000.0), grads)
        averages = jax.tree.map(lambda g, *old: update_averages(Averages(*old), g, decays),
                                grads, *state.averages)
        treedef = jax.tree.structure(params)
        number = treedef.unflatten(range(treedef.num_leaves))
        updates = jax.tree.map(new_update, params, grads, averages,
                               spread(update_multipliers, params), number)
        after = by_average(params, averages)
        return updates, VeLOState(state.step + 1, losses, hidden, cell, after)

    return Optimizer(init, update)


def velo_shapes(units: int, bank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of VeLO's θ by their names in the published file (512 units, a bank of 256)."""
    linears = dict.fromkeys(("linear", "linear_1", "linear_2"), (30, units)) | {
        "rnn/linear": (2 * units, 4 * units), "rnn_to_controls": (units, bank),
        "step_size": (units, 1)}
    mlp = {f"w0__{i}": (n, 4) for i, n in enumerate(block_sizes(velo_features))}
    mlp |= {"b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    return {"lstm_init_state/hidden": (1, units), "lstm_init_state/cell": (1, units),
            **{f"rnn_params/{name}/w": shape for name, shape in linears.items()},
            **{f"rnn_params/{name}/b": shape[1:] for name, shape in linears.items()},
            **{f"ff_mod_stack/~/{name}": (bank, *shape) for name, shape in mlp.items()}}


# -------- Files: written atomically, checked when read, never unpickled


def write_atomically(path: str | os.PathLike, write: Callable) -> None:
    """Write a file by write(file). It appears whole or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            with contextlib.suppress(OSError):  # some file systems have no fsync
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


def lock(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read and append, locked until it is closed (not on Windows)."""
    file = open(path, "a+b")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is using it") from None
    except (ImportError, OSError):
        pass
    return file


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn an error of reading a file into an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged files raise a dozen types
        why = " ".join(str(error)[:300].split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read, or is damaged ({why})") from None


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Reading checks their CRC-32."""
    with reading(path), np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def save(path: str | os.PathLike, learned: Learned) -> None:
    """Write a learned optimizer as .npz: θ, and the rest as JSON in `metadata`."""
    numbers = learned.parametrization._asdict() | {
        name: getattr(learned, name) for name in ("step_mult", "exp_mult", "decay", "horizon")}
    metadata = learned.made | {
        "architecture": learned.architecture, "parametrization": numbers.pop("name"),
        **{name: float(x) for name, x in numbers.items()}}
    arrays = {name: np.asarray(x, np.float32) for name, x in learned.theta.items()}
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, **arrays))


def load(path: str | os.PathLike) -> Learned:
    """Read a learned optimizer that `save` wrote, or a published one. Raises `InputError`.

    Published are VeLO's `params` or `theta.state` (msgpack) and μLO's `model.safetensors`.
    """
    with reading(path):
        if zipfile.is_zipfile(path):
            theta = read_npz(path)
            made = json.loads(theta.pop("metadata").tobytes())
            name = made.pop("parametrization")
            scales = {"input_mult": 1, "output_mult": 1, "hidden_lr_mult": 1, "base_width": 0,
                      "step_mult": None, "exp_mult": None, "decay": 0, "horizon": 0}
            scales = [float(made.pop(key, default)) for key, default in scales.items()]
            if not np.isfinite(scales).all() or name not in ("mup", "sp"):
                raise ValueError("its metadata are wrong")
            *multipliers, width, step_mult, exp_mult, decay, horizon = scales
            learned = Learned(theta, step_mult, exp_mult,
                              mup.Parametrization(name, *multipliers, int(width)),
                              made.pop("architecture", "small_fc_lopt"), made, decay, int(horizon))
        else:
            learned = published(Path(path).read_bytes())
        check_theta(learned)
        for name, x in learned.theta.items():
            if x.dtype != np.float32 or not np.isfinite(x).all():
                raise ValueError(f"{name!r} is not finite float32")
    return learned._replace(theta={name: jnp.asarray(x) for name, x in learned.theta.items()})


# The authors' file lacks its decays: they are default arguments of PyLO's AdafacLO.
MULO_DECAYS = {"momentum_decays": (0.15216392, 0.14245212, 0.06812963), "rms_decays": (0.01079706,),
               "adafactor_decays": (0.18621896, -0.10864615, -0.06185547)}


def published(content: bytes) -> Learned:
    """The learned optimizer in a published file."""
    if content[8:9] != b"{":
        tree = read_msgpack(io.BytesIO(content))
        theta = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x
                 in jax.tree.leaves_with_path(tree.get("params", tree))}
        return Learned(theta, 0.001, 0.001, mup.SP, "velo")
    tensors = read_safetensors(content)
    theta = {name: np.asarray(x, np.float32) for name, x in MULO_DECAYS.items()}
    names = ["input", *(f"linear_{i}" for i in range(len(tensors) // 2 - 2)), "output"]
    for i, name in enumerate(names):
        theta[f"w{i}"] = np.ascontiguousarray(tensors.pop(f"network.{name}.weight").T)
        theta[f"b{i}"] = tensors.pop(f"network.{name}.bias")
    return Learned(theta | tensors, 0.01)


def read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, all float32."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {name: np.frombuffer(content[start:][slice(*entry["data_offsets"])], "<f4")
            .reshape(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


# Objects by their first byte from 0xc4 on: (kind, `struct` code of the value or length after it).
MSGPACK = [(kind, code) for kind, codes in (
    ("bytes", "BHI"), ("array", "BHI"), ("number", "fdBHIQbhiq"), ("array", "-----"),
    ("text", "BHI"), ("list", "HI"), ("map", "HI")) for code in codes]


def read_msgpack(file: BinaryIO) -> Any:
    """The next object of a msgpack file of flax."""
    def number(code: str) -> Any:
        return struct.unpack(">" + code, file.read(struct.calcsize(code)))[0]

    first = number("B")
    if first < 0x80 or first >= 0xe0:
        return first - 0x100 * (first >= 0xe0)
    if 0xc0 <= first < 0xc4:
        return {0xc0: None, 0xc2: False, 0xc3: True}[first]
    if first < 0xc0:
        kind, size = ("text", first & 31) if first >= 0xa0 else (
            "list" if first >= 0x90 else "map", first & 15)
    else:
        kind, code = MSGPACK[first - 0xc4]
        size = 1 << first - 0xd4 if code == "-" else number(code)
    if kind == "array":
        number("b")  # the kind of extension
        shape, dtype, content = read_msgpack(io.BytesIO(file.read(size)))
        return np.frombuffer(content, dtype).reshape(shape)
    if kind == "map":
        return {read_msgpack(file): read_msgpack(file) for _ in range(size)}
    if kind == "list":
        return [read_msgpack(file) for _ in range(size)]
    if kind == "number":
        return size
    return file.read(size).decode() if kind == "text" else file.read(size)


def main() -> None:
    """Print the features of a weight matrix after 5 steps of least squares."""
    learned = Learned(init_theta(jax.random.key(0)), step_mult=0.01)
    w, x, target = jax.random.normal(jax.random.key(1), (3, 8, 8))
    optimizer = learned_optimizer(learned)
    state = optimizer.init(w)
    for step in range(5):
        g = jax.grad(lambda w: jnp.mean((x @ w - target) ** 2))(w)
        updates, state = optimizer.update(g, state, w)
        s, w = statistics(state.averages, g, w), w + updates
    for name, block in features(s).items():
        for f in block:
            print(f"{name:20}{str(f.shape):>8}   RMS {jnp.sqrt(jnp.mean(f * f)):.4g}")


if __name__ == "__main__":
    main()
