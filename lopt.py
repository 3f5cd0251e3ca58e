"""Optimizers: the small MLP learned optimizer, AdamW, and learned optimizers on disk.

    python lopt.py       the features of one weight matrix over a few steps, and the update they give (10 s)

An optimizer is a pair of pure functions, as in optax: `init(params) -> state` and
`update(grads, state, params, *, value=None) -> (updates, state)`, applied by `params + updates` on any pytree.

The learned optimizer is small_fc_lopt ("small fully connected learned optimizer"). From each weight's gradient g, its
value p and three kinds of decaying averages it builds 39 features; an MLP with weights θ, the same for all weights of a
network, turns them into a direction d and a log-magnitude s:

    update = step_mult · d · exp(exp_mult · s),      p ← p − update_multiplier · update

Sources: small_fc_lopt (arXiv 2203.11860); Adafactor (arXiv 1804.04235) for the factored second moments; μLO (arXiv
2406.00153) for the update multiplier; TP5 = "Tensor Programs V" (arXiv 2203.03466) for Adam in μP.

Dimensions: S the axes of one weight tensor; f of a block of features (3 where there is one for each decay), F of all
features; H hidden units of the MLP.
"""

import errno
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mup
from mup import Array, Tree

MOMENTUM_BETAS = (0.9, 0.99, 0.999)
RMS_BETAS = (0.999,)
ADAFACTOR_BETAS = (0.9, 0.99, 0.999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)


class Optimizer(NamedTuple):
    """init(params) → state; update(grads, state, params, *, value=None) → (updates, state); then params + updates.

    value: the training loss before the update, optax's name for it. Optimizers that do not need it ignore it.
    """
    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class Learned(NamedTuple):
    """A learned optimizer: what a file holds, and what `learned_optimizer` makes an optimizer of.

    theta: the arrays of θ by name (`init_theta`). step_mult, exp_mult: the scales of the update. parametrization: the one
    that θ was meta-trained in, hence needs. architecture: the rule that θ belongs to. made: how θ was meta-trained (JSON).
    """
    theta: dict[str, Array]
    step_mult: float
    exp_mult: float = 0.001
    parametrization: mup.Parametrization = mup.MUP
    architecture: str = "small_fc_lopt"
    made: dict[str, Any] = {}


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf, in the params' own types."""
    return jax.tree.map(lambda p, u: jnp.asarray(p + u, jnp.asarray(p).dtype), params, updates)


# ---------------------------------------------------------------------------------------------------------
# small_fc_lopt: averages


class Decays(NamedTuple):
    """The decays β of a tensor's averages. momentum, adafactor: [3]. rms: a number."""
    momentum: Array
    rms: Array
    adafactor: Array


class Averages(NamedTuple):
    """The decaying averages of one weight tensor, all 0 at first and without bias correction.

    m [3, S]: of the gradient. v [S]: of its square. r, c [3, S]: of its square's mean over the largest axis (r) and over
    the second largest (c), each of which keeps that axis with length 1, so that it broadcasts against [3, S]. A tensor
    with fewer than two axes is not factored: r, of its square itself, has all of S, and c is None.
    """
    m: Array
    v: Array
    r: Array
    c: Array | None


def trained_decays(theta: dict[str, Array]) -> Decays:
    """small_fc_lopt's trained decays: β = 1 − exp(10·(ln(1−β₀)/10 + offset)); all but momentum's in [0, 1]."""
    def decays(betas: tuple[float, ...], offset: Array) -> Array:
        return 1.0 - jnp.exp(10.0 * (np.log(1.0 - np.asarray(betas, np.float32)) / 10.0 + offset))

    return Decays(decays(MOMENTUM_BETAS, theta["momentum_decays"]),
                  jnp.clip(decays(RMS_BETAS, theta["rms_decays"]), 0.0, 1.0)[0],
                  jnp.clip(decays(ADAFACTOR_BETAS, theta["adafactor_decays"]), 0.0, 1.0))


def largest_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(d0, d1): the largest and the second largest axis, counted from the end; None below two axes.

    Of equal axes the later one is the larger.
    """
    if len(shape) < 2:
        return None
    *_, d1, d0 = np.argsort(shape, kind="stable") - len(shape)
    return int(d0), int(d1)


def update_averages(averages: Averages, g: Array, decays: Decays) -> Averages:
    """The averages after a gradient g [S].

    m_i ← β m_i + (1−β) g;   v ← β v + (1−β) g²;   not factored: r_i ← β r_i + (1−β)(g² + 1e-30);
    factored: r_i ← β r_i + (1−β) mean_d0(g² + 1e-30),   c_i ← β c_i + (1−β) mean_d1(g² + 1e-30).
    """
    def decayed(beta: Array, old: Array, new: Array) -> Array:
        beta = beta.reshape(beta.shape + (1,) * (old.ndim - beta.ndim))
        return beta * old + (1.0 - beta) * new

    square = g * g + 1e-30
    m = decayed(decays.momentum, averages.m, g)
    v = decayed(decays.rms, averages.v, g * g)
    if averages.c is None:
        return Averages(m, v, decayed(decays.adafactor, averages.r, square), None)
    d0, d1 = largest_axes(g.shape)
    return Averages(m, v, decayed(decays.adafactor, averages.r, jnp.mean(square, d0, keepdims=True)),
                    decayed(decays.adafactor, averages.c, jnp.mean(square, d1, keepdims=True)))


# ---------------------------------------------------------------------------------------------------------
# small_fc_lopt: features


class Statistics(NamedTuple):
    """All that the features of one tensor are made of: g, p, v [S]; m [3, S]; r, c [3, S] as in `Averages`.

    rho, kappa: Adafactor's factors ρ and κ, shaped as r and c; None for a tensor that is not factored, where c is r.
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
    """A tensor's statistics, with ρ_i = rsqrt₊(r_i / (mean_d1 r_i + 1e-9)) and κ_i = rsqrt₊(c_i).

    averages: those that g has entered already.
    """
    m, v, r, c = averages
    if c is None:
        return Statistics(g, p, m, v, r, r, None, None)
    _, d1 = largest_axes(g.shape)
    return Statistics(g, p, m, v, r, c, rsqrt_plus(r / (jnp.mean(r, d1, keepdims=True) + 1e-9)), rsqrt_plus(c))


class Feature(NamedTuple):
    """A block of features [f, S], of length 1 along each axis of S on which it does not vary.

    normalised: whether each is divided by its root mean square over the tensor before it enters the MLP.
    """
    name: str
    values: Array
    normalised: bool = True


def features(tensor: Statistics, t: Array) -> list[Feature]:
    """small_fc_lopt's features, in its order. t: updates made before this one.

    To change the learned optimizer, add, change or drop a line: all else follows from this list.
    """
    g, p, m, v, r, c, rho, kappa = tensor
    if rho is None:  # fewer than two axes
        g_scale, m_scale = rsqrt_plus(r + 1e-9), lax.rsqrt(r + 1e-6)
    else:
        g_scale = m_scale = rho * kappa
    rsqrt_v = lax.rsqrt(v + 1e-6)
    tau = jnp.asarray(TIMESCALES, jnp.float32).reshape(-1, *(1,) * g.ndim)
    return [
        Feature("g", g[None]),                                             # 0
        Feature("p", p[None]),                                             # 1
        Feature("m", m),                                                   # 2–4
        Feature("v", v[None]),                                             # 5
        Feature("m rsqrt(v+1e-6)", m * rsqrt_v),                           # 6–8
        Feature("rsqrt(v+1e-6)", rsqrt_v[None]),                           # 9
        *[Feature("g ρκ", (g * scale)[None]) for scale in g_scale],        # 10–12
        Feature("r", r),                                                   # 13–15
        Feature("c", c),                                                   # 16–18
        Feature("rsqrt(r+1e-8)", lax.rsqrt(r + 1e-8)),                     # 19–21
        Feature("rsqrt(c+1e-8)", lax.rsqrt(c + 1e-8)),                     # 22–24
        Feature("m ρκ", m * m_scale),                                      # 25–27
        Feature("tanh(t/τ−1)", jnp.tanh(t / tau - 1.0), normalised=False)  # 28–38
    ]


def normalise(feature: Feature) -> Array:
    """A block of features [f, S] as the MLP takes it: each divided by its root mean square over the tensor,
    x · rsqrt(1e-5 + mean x²), unless it is not to be normalised."""
    x = feature.values
    if not feature.normalised:
        return x
    return x * lax.rsqrt(1e-5 + jnp.mean(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


# ---------------------------------------------------------------------------------------------------------
# small_fc_lopt: the MLP and the update


def init_theta(key: Array, hidden: int = 32) -> dict[str, Array]:
    """Fresh θ: MLP weights N(0, 1/fan_in) cut at 2σ, biases 0, offsets of the decays 0.

    The MLP takes the features through two layers of `hidden` units to 2 outputs (d, s).
    """
    sizes = (feature_count(), hidden, hidden, 2)
    theta = {"momentum_decays": jnp.zeros(3), "rms_decays": jnp.zeros(1), "adafactor_decays": jnp.zeros(3)}
    for i, (key, fan_in, fan_out) in enumerate(zip(jax.random.split(key, 3), sizes, sizes[1:])):
        normal = jax.random.truncated_normal(key, -2.0, 2.0, (fan_in, fan_out), jnp.float32)
        theta |= {f"w{i}": normal / math.sqrt(fan_in), f"b{i}": jnp.zeros(fan_out)}
    return jax.tree.map(lambda x: x.astype(jnp.float32), theta)


def feature_count() -> int:
    """How many features there are, counted on a tensor of one weight."""
    one = jnp.zeros((1, 1))
    return sum(len(f.values) for f in features(statistics(init_averages(one), one, one), 0))


def dense(w: Array, x: Array, b: Array) -> Array:
    """wᵀ x + b at every place of a tensor: w [F, H], x [F, S], b [H] → [H, S]."""
    return jnp.tensordot(w.T, x, 1) + b.reshape(-1, *(1,) * (x.ndim - 1))


def mlp_update(learned: Learned, hidden: Array) -> Array:
    """step_mult · d · exp(exp_mult · s), from the pre-activations of the MLP's first layer: [H, S] → [S]."""
    theta, i = learned.theta, 1
    while f"w{i}" in theta:
        hidden = dense(theta[f"w{i}"], jax.nn.relu(hidden), theta[f"b{i}"])
        i += 1
    d, s = hidden
    return learned.step_mult * d * jnp.exp(learned.exp_mult * s)


def plain_update(learned: Learned, tensor: Statistics, t: Array) -> Array:
    """The update of one tensor [S], as it is defined: all features of every weight go through the MLP."""
    blocks = map(normalise, features(tensor, t))
    x = jnp.concatenate([jnp.broadcast_to(block, (len(block), *tensor.g.shape)) for block in blocks])  # [F, S]
    return mlp_update(learned, dense(learned.theta["w0"], x, learned.theta["b0"]))


class LearnedOptimizerState(NamedTuple):
    """step: int32, updates made so far. averages: one `Averages` for each leaf of the params."""
    step: Array
    averages: tuple[Averages, ...]


def learned_optimizer(learned: Learned, update_multipliers: Tree = 1.0, gradient_multiplier: float | Array = 1.0,
                      num_steps: int | Array | None = None) -> Optimizer:
    """A learned optimizer as an optax-style pair, for any pytree of params.

    update_multipliers: μP's multipliers of the updates (`mup.update_multipliers`): a tree like the params, or a prefix
    of one, or one number. gradient_multiplier: multiplies all gradients, before anything else
    (`mup.gradient_multiplier`). num_steps: the planned number of updates, which small_fc_lopt does not use.

    The averages are float32 and so is all arithmetic (float64 for params of float64); updates have the params' types.
    Raises ValueError for a θ that does not fit the features, for complex params, and for params without a multiplier.
    """
    check_theta(learned.theta)

    def init(params: Tree) -> LearnedOptimizerState:
        return LearnedOptimizerState(jnp.zeros((), jnp.int32), tuple(map(init_averages, jax.tree.leaves(params))))

    def update(grads: Tree, state: LearnedOptimizerState, params: Tree, *,
               value: Array | None = None) -> tuple[Tree, LearnedOptimizerState]:
        decays = trained_decays(learned.theta)

        def of_tensor(g: Array, p: Array, averages: Averages, multiplier: float | Array):
            if jnp.size(p) == 0:
                return jnp.zeros_like(p), averages
            g, p = (jnp.asarray(x, working_type(p)) for x in (g, p))
            g = gradient_multiplier * jnp.where(jnp.isfinite(g), g, 0.0)
            averages = update_averages(averages, g, decays)
            # plain_update(learned, statistics(averages, g, p), state.step) is the same, only slower.
            step = in_chunks(learned, statistics(averages, g, p), state.step)
            return -multiplier * step, averages  # μP acts here: a hidden weight moves 1/fan_in as far

        leaves, treedef = jax.tree.flatten(params)
        moved = [of_tensor(*x) for x in zip(treedef.flatten_up_to(grads), leaves, state.averages,
                                            multiplier_of_each(update_multipliers, params))]
        updates = [as_type_of(p, u) for p, (u, _) in zip(leaves, moved)]
        return treedef.unflatten(updates), LearnedOptimizerState(state.step + 1, tuple(a for _, a in moved))

    return Optimizer(init, update)


# ---------------------------------------------------------------------------------------------------------
# AdamW: the meta-optimizer, and the baseline in SP (AdamW) and in μP (μAdam)


class AdamState(NamedTuple):
    """step: int32, updates made so far. m, v: trees like the params."""
    step: Array
    m: Tree
    v: Tree


def adamw(learning_rate: float | Array | Callable[[Array], Array], *, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-8, weight_decay: float = 0.0, update_multipliers: Tree = 1.0) -> Optimizer:
    """AdamW, decoupled weight decay: u = −η · multiplier · (m̂/(√v̂ + ε) + weight_decay · p), m̂ = m/(1−β₁ᵗ).

    learning_rate: η, or a function of the number of updates made before. With μP's update_multipliers and no weight
    decay this is μAdam (TP5, Table 8). Types of params, state and updates are as in `learned_optimizer`.
    """
    def init(params: Tree) -> AdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, working_type(p)), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Tree, state: AdamState, params: Tree, *, value: Array | None = None) -> tuple[Tree, AdamState]:
        eta = learning_rate(state.step) if callable(learning_rate) else learning_rate
        t = state.step.astype(jnp.float32) + 1.0

        def of_tensor(p: Array, g: Array, m: Array, v: Array, multiplier: float | Array):
            p32, g = (jnp.asarray(x, working_type(p)) for x in (p, g))
            m = b1 * m + (1.0 - b1) * g
            v = b2 * v + (1.0 - b2) * g * g
            m_hat, v_hat = m / (1.0 - b1**t), v / (1.0 - b2**t)
            u = -eta * multiplier * (m_hat / (jnp.sqrt(v_hat) + eps) + weight_decay * p32)
            return as_type_of(p, u), m, v

        leaves, treedef = jax.tree.flatten(params)
        moved = [of_tensor(*x) for x in zip(leaves, *map(treedef.flatten_up_to, (grads, state.m, state.v)),
                                            multiplier_of_each(update_multipliers, params))]
        updates, m, v = map(treedef.unflatten, list(zip(*moved)) or [()] * 3)
        return updates, AdamState(state.step + 1, m, v)

    return Optimizer(init, update)


def warmup_cosine(initial: float, peak: float, final: float, warmup_steps: int,
                  decay_steps: int) -> Callable[[Array], Array]:
    """A schedule: linear from initial to peak over warmup_steps, then a cosine to final at step decay_steps."""
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
    """The tree, scaled down where its global norm is above the limit, to that norm."""
    norm = global_norm(tree)
    return jax.tree.map(lambda x: jnp.where(norm > limit, x / norm * limit, x), tree)


# ---------------------------------------------------------------------------------------------------------
# Params of any tree, type and shape


def working_type(p: Array) -> jnp.dtype:
    """The type in which a tensor's update is computed and its state is kept: float64 for float64, else float32.

    Raises ValueError for complex numbers.
    """
    dtype = jnp.asarray(p).dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"params of shape {list(jnp.shape(p))} are complex: wrap the optimizer in "
                         "optax.contrib.split_real_and_imaginary, or split them yourself")
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def as_type_of(p: Array, update: Array) -> Array:
    """An update in the type of its params; that of integers stays as it is, and `apply_updates` rounds their sum."""
    dtype = jnp.asarray(p).dtype
    return update.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else update


def init_averages(p: Array) -> Averages:
    """The averages of a tensor before its first update: all 0."""
    shape, dtype = jnp.shape(p), working_type(p)

    def zeros(*kept: int, without: int | None = None) -> Array:
        return jnp.zeros((*kept, *(1 if i - len(shape) == without else n for i, n in enumerate(shape))), dtype)

    if (axes := largest_axes(shape)) is None:
        return Averages(zeros(3), zeros(), zeros(3), None)
    d0, d1 = axes
    return Averages(zeros(3), zeros(), zeros(3, without=d0), zeros(3, without=d1))


def multiplier_of_each(multipliers: Tree, params: Tree) -> list[float | Array]:
    """The multiplier of each leaf of the params, from a tree like theirs or a prefix of it; one number is of all.

    What it says of params that are not there, such as those that optax.masked leaves out, does not matter.
    Raises ValueError for params that it does not reach.
    """
    given, found = dict(jax.tree_util.tree_leaves_with_path(multipliers)), []
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        reached = [given[path[:n]] for n in range(len(path) + 1) if path[:n] in given]
        if not reached:
            raise ValueError(f"update_multipliers have no number for the params at {jax.tree_util.keystr(path)}")
        found.append(reached[0])
    return found


def check_theta(theta: dict[str, Array]) -> None:
    """Raises ValueError, in one line, for arrays that are no θ of small_fc_lopt with this list of features."""
    shapes, inputs = {name: np.shape(x) for name, x in theta.items()}, feature_count()
    layers = sum(f"w{i}" in theta or f"b{i}" in theta for i in range(len(theta)))
    expected = {"momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
    for i in range(max(layers, 2)):
        hidden = 2 if i == layers - 1 else (shapes.get(f"b{i}") or (1,))[0]
        expected |= {f"w{i}": (inputs, hidden), f"b{i}": (hidden,)}
        inputs = hidden
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"this is no θ of small_fc_lopt with {feature_count()} features: {name!r} is "
                             f"{shapes.get(name, 'missing')}, and should be {expected.get(name, 'absent')}")


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

# How many weights of one network go through the MLP at once. On a CPU the activations of two networks, which PES updates
# side by side, then stay in the L2 cache (1.5 times as fast as whole tensors); on a GPU it bounds the memory.
CHUNK = {"cpu": 2048, "gpu": 2**16, "tpu": 2**16}


def in_chunks(learned: Learned, tensor: Statistics, t: Array) -> Array:
    """`plain_update`, several times as fast and with little memory, for any list of features and any MLP.

    Two identities save most of the first layer. Features that vary along some axes only are multiplied by their rows of
    w0 where they vary, and added by broadcasting: 16 of 39 inputs remain for each weight. And dividing by the root mean
    square commutes into the weights: (x·s) W = x (s[:, None] W).

    The features of every weight are built twice, for their mean squares and for the MLP, a few rows of the tensor at a
    time: that costs less than to write them to memory and to read them back.

    Dimensions: A and B the tensor's two largest axes in the order in which they stand, O all others together; a tensor
    with fewer than two axes is [1, A, 1].
    """
    shape, tensor = tensor.g.shape, jax.tree.map(lambda x: _as_oab(x, tensor.g.shape), tensor)
    others, rows, columns = tensor.g.shape
    rows_at_once = max(1, min(rows, CHUNK[jax.default_backend()] // (others * columns)))
    chunks = -(-rows // rows_at_once)

    theta, blocks = learned.theta, features(tensor, t)
    ends = np.cumsum([len(f.values) for f in blocks])
    w0 = [theta["w0"][end - len(f.values):end] for f, end in zip(blocks, ends)]
    per_weight = [i for i, f in enumerate(blocks) if f.values.shape[1:] == tensor.g.shape]

    def first_row(i):  # of chunk i; the last overlaps the one before where rows_at_once does not divide rows
        return jnp.minimum(i * rows_at_once, rows - rows_at_once)

    def cut(x, i):  # its rows in chunk i
        if x.shape[-2] == 1 or chunks == 1:
            return x
        return lax.dynamic_slice_in_dim(x, first_row(i), rows_at_once, -2, allow_negative_indices=False)

    def features_of_chunk(i):  # those of every weight: [K, O, a, B]
        made = features(jax.tree.map(lambda x: cut(x, i), tensor), t)
        return jnp.concatenate([made[j].values for j in per_weight])  # of up to eight parts XLA makes one slow loop

    def add_squares(i, total):
        x = features_of_chunk(i)
        if rows % rows_at_once:
            is_new = first_row(i) + jnp.arange(rows_at_once) >= i * rows_at_once
            x = jnp.where(is_new[:, None], x, 0.0)
        return total + jnp.sum(x * x, axis=(1, 2, 3))

    inputs = sum(len(w0[j]) for j in per_weight)
    squares = _loop(chunks, add_squares, jnp.zeros(inputs, tensor.g.dtype))
    normalised = np.concatenate([np.full(len(w0[j]), blocks[j].normalised) for j in per_weight])
    scale = jnp.where(normalised, lax.rsqrt(1e-5 + squares / tensor.g.size), 1.0)
    w0_per_weight = (jnp.concatenate([w0[j] for j in per_weight]) * scale[:, None]).T  # [H, K]

    hidden_of_rows, hidden_of_all = 0.0, theta["b0"][:, None, None, None]  # [H, O, A, 1] and [H, O, 1, B]
    for where in sorted({f.values.shape[1:] for f in blocks} - {tensor.g.shape}):
        here = [j for j, f in enumerate(blocks) if f.values.shape[1:] == where]
        x = jnp.concatenate([normalise(blocks[j]) for j in here])
        hidden = jnp.einsum("fh,foab->hoab", jnp.concatenate([w0[j] for j in here]), x)
        if where[1] > 1:
            hidden_of_rows = hidden_of_rows + hidden
        else:
            hidden_of_all = hidden_of_all + hidden
    # What the rows share is laid out once for a whole chunk: XLA's loop then adds it four times faster.
    hidden_of_all = jnp.broadcast_to(hidden_of_all, (len(theta["b0"]), others, rows_at_once, columns))

    def write_update(i, update):
        x = features_of_chunk(i)
        hidden = (w0_per_weight @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:]) + hidden_of_all
        if not isinstance(hidden_of_rows, float):
            hidden = hidden + cut(hidden_of_rows, i)  # [H, O, a, B]
        step = mlp_update(learned, hidden.reshape(len(hidden), -1)).reshape(x.shape[1:])
        if chunks == 1:
            return step
        return lax.dynamic_update_slice_in_dim(update, step, first_row(i), -2, allow_negative_indices=False)

    return _from_oab(_loop(chunks, write_update, jnp.zeros_like(tensor.g)), shape)


def _loop(n: int, body: Callable, start: Array) -> Array:
    """lax.fori_loop(0, n, body, start), but no loop for a single pass."""
    return body(0, start) if n == 1 else lax.fori_loop(0, n, body, start)


def _oab_order(ndim: int, shape: tuple[int, ...]) -> list[int]:
    """The axes of an array [..., S] of ndim axes: those before S, those of S that become O, then A and B."""
    lead, (d0, d1) = ndim - len(shape), largest_axes(shape)
    large = sorted((d0 + ndim, d1 + ndim))
    return [*range(lead), *(i for i in range(lead, ndim) if i not in large), *large]


def _as_oab(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [..., S], S of that shape or of length 1 along some axes, as [..., O, A, B]."""
    lead = x.shape[:x.ndim - len(shape)]
    if len(shape) < 2:
        return x.reshape(*lead, 1, -1, 1)
    x = x.transpose(_oab_order(x.ndim, shape))
    return x.reshape(*lead, -1, *x.shape[-2:])


def _from_oab(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [O, A, B] as a tensor of that shape: undoes `_as_oab`."""
    if len(shape) < 2:
        return x.reshape(shape)
    order = _oab_order(len(shape), shape)
    return x.reshape([shape[i] for i in order]).transpose(np.argsort(order).tolist())


# ---------------------------------------------------------------------------------------------------------
# Files: written atomically, checked when read, never unpickled


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, even if the machine stops (fsync of file and folder).

    Raises ValueError, naming the path, when the disk is full or the folder cannot be written.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        sync(folder)
        os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error.strerror}); free some space or choose another "
                         "place") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(descriptor: int) -> None:
    """Puts a file or a folder on disk, as far as its file system can: some know no fsync, or none of folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES):
            raise


def take_lock(file: Any) -> None:
    """Keeps a file for this process while it is open. Raises BlockingIOError where another one has it.

    Where there are no locks, as on Windows and on some file systems, that is a warning.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:
        print(f"warning: {file.name}: cannot be locked ({error}); let no other process write there", file=sys.stderr)


def write_npz(path: str | os.PathLike, arrays: dict[str, Any]) -> None:
    """Writes arrays as an .npz that ends in the SHA-256 of all bytes before it (as the comment of a zip file)."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in arrays.items()})
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"0" * 64
    body = buffer.getvalue()[:-64]
    write_atomically(path, body + hashlib.sha256(body).hexdigest().encode())


def read_npz(path: str | os.PathLike, max_bytes: int, checksum: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an .npz file of at most max_bytes, compressed or not. checksum: it must be from `write_npz`.

    Raises ValueError, in one line that names the file, when it is missing, damaged, too large, or holds anything
    but plain arrays.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path}: has {size:,} bytes, more than the {max_bytes:,} expected")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if checksum and hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
        raise ValueError(f"{path}: is damaged (its checksum does not match)")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > max_bytes:
                raise ValueError(f"unpacks to more than the {max_bytes:,} bytes expected")
            return {member.filename.removesuffix(".npy"): _read_npy(archive.read(member))
                    for member in archive.infolist()}
    except Exception as error:  # zipfile, zlib and NumPy raise errors of a dozen types when bytes are damaged
        raise ValueError(f"{path}: is no .npz file of plain arrays, or is damaged "
                         f"({' '.join(str(error).split())})") from None


def _read_npy(content: bytes) -> np.ndarray:
    """The array of an .npy file. Raises ValueError for objects, and for a shape that is not that of the bytes."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of {dtype} {list(shape)} does not have {len(content) - file.tell():,} bytes")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C").copy()


MAX_THETA_BYTES = 1 << 24


def save(path: str | os.PathLike, learned: Learned) -> None:
    """Writes a learned optimizer as an .npz: the arrays of θ, and all else as JSON under the name `metadata`."""
    p = learned.parametrization._asdict()
    metadata = learned.made | {"architecture": learned.architecture, "step_mult": float(learned.step_mult),
                               "exp_mult": float(learned.exp_mult), "parametrization": p.pop("name"),
                               **{name: float(x) for name, x in p.items()}}
    arrays = {name: np.asarray(x, np.float32) for name, x in learned.theta.items()}
    write_npz(path, {**arrays, "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})


def load(path: str | os.PathLike) -> Learned:
    """Reads what `save` wrote. Raises ValueError, in one line that names the file, for what is no learned optimizer."""
    theta = read_npz(path, MAX_THETA_BYTES)
    if "metadata" not in theta:
        raise ValueError(f"{path}: is no learned optimizer: it has no array 'metadata'")
    try:
        made = json.loads(theta.pop("metadata").tobytes())
        numbers = {name: made.pop(name, default) for name, default in (
            ("step_mult", None), ("exp_mult", None), *mup.MUP._asdict().items()) if name != "name"}
        name, architecture = made.pop("parametrization"), made.pop("architecture", "small_fc_lopt")
        wrong = [f"{key} is {x!r:.40}, and must be a finite number" for key, x in numbers.items()
                 if type(x) not in (int, float) or not math.isfinite(x)]
        if wrong or name not in ("mup", "sp") or architecture != "small_fc_lopt" or numbers["base_width"] < 0:
            raise ValueError(wrong[0] if wrong else f"{name!r:.40}, {architecture!r:.40}, base width "
                             f"{numbers['base_width']}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata do not give step_mult, exp_mult and a known parametrization "
                         f"({' '.join(str(error).split())})") from None
    for name_of, x in theta.items():
        if x.dtype != np.float32 or not np.isfinite(x).all():
            raise ValueError(f"{path}: {name_of} must be finite float32, but is {x.dtype} {list(x.shape)}"
                             + " with entries that are not" * bool(x.dtype == np.float32))
    try:
        check_theta(theta)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    step_mult, exp_mult, *scales, base_width = numbers.values()
    return Learned({key: jnp.asarray(x) for key, x in theta.items()}, step_mult, exp_mult,
                   mup.Parametrization(name, *scales, int(base_width)), architecture, made)


# ---------------------------------------------------------------------------------------------------------
# Demonstration


def main() -> None:
    """Prints the features of a weight matrix during five steps of least squares, and what f_θ makes of them."""
    keys = jax.random.split(jax.random.key(0), 4)
    learned = Learned(init_theta(keys[0]), step_mult=0.01)
    weights = 0.5 * jax.random.normal(keys[1], (6, 8))
    x, target = jax.random.normal(keys[2], (32, 6)), jax.random.normal(keys[3], (32, 8))
    optimizer, steps = learned_optimizer(learned), 5
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    value_and_grad = jax.jit(jax.value_and_grad(lambda w: jnp.mean((x @ w - target) ** 2)))

    def rms(y: Array) -> float:
        return float(jnp.sqrt(jnp.mean(y**2)))

    tensors, lines = [], []
    for t in range(steps):
        loss, g = value_and_grad(weights)
        updates, state = update(g, state, weights)
        tensors.append(statistics(state.averages[0], g, weights))
        plain = -plain_update(learned, tensors[-1], t)
        lines.append(f"  {t:4}{loss:9.4f}{rms(updates):13.6f}{jnp.max(jnp.abs(updates - plain)):14.1e}")
        weights = apply_updates(weights, updates)
    print(f"The {feature_count()} features of a 6 × 8 weight matrix in least squares.")
    print(f"RMS at steps 0 and {steps - 1}; smallest and largest entry at step {steps - 1} as the MLP sees them.")
    print("Those that depend on the step t alone are not divided by their RMS.\n")
    print(f"  {'feature':20}{'shape':>12}{'RMS, 0':>11}{f'RMS, {steps - 1}':>11}{'smallest':>10}{'largest':>10}")
    for first, last in zip(features(tensors[0], 0), features(tensors[-1], steps - 1)):
        for i, (a, b, seen) in enumerate(zip(first.values, last.values, normalise(last)), start=1):
            name = f"{last.name}, {i}" if len(last.values) > 1 else last.name
            shape = " × ".join(map(str, b.shape))
            print(f"  {name:20}{shape:>12}{rms(a):11.4g}{rms(b):11.4g}{jnp.min(seen):10.3f}{jnp.max(seen):10.3f}")
    print("\nθ, fresh and not meta-trained, maps them to d and s; the update is −step_mult · d · exp(exp_mult · s).")
    print("Last column: its largest difference from the definition, `plain_update`.\n")
    print(f"  {'step':>4}{'loss':>9}{'RMS update':>13}{'difference':>14}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
