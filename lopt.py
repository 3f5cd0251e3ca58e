"""Optimizers: learned ones (small_fc_lopt, VeLO), AdamW, and learned optimizers on disk.

    python lopt.py                          the features of one weight matrix, and the update that they give (10 s)
    python lopt.py convert IN OUT.npz       makes a file of ours of weights that others published (VeLO, μLO)

An optimizer is a pair of pure functions, as in optax: `init(params) -> state` and
`update(grads, state, params, *, value=None) -> (updates, state)`, applied by `params + updates` on any pytree.

The learned optimizer is small_fc_lopt ("small fully connected learned optimizer"). From each weight's gradient g, its
value p, three kinds of decaying averages and the step t it builds 39 features; an MLP with weights θ, the same for all
weights of a network, turns them into a direction d and a log-magnitude s:

    update = step_mult · d · exp(exp_mult · s),      p ← p − update_multiplier · update

VeLO is larger: an LSTM over a network's tensors, with the training loss and the planned number of steps among its
inputs, chooses each tensor's step size and its MLP from a bank of them.

Sources: small_fc_lopt (arXiv 2203.11860); Adafactor (arXiv 1804.04235) for the factored second moments; μLO (arXiv
2406.00153) for the update multiplier; VeLO (arXiv 2211.09760); TP5 = "Tensor Programs V" (arXiv 2203.03466) for Adam
in μP.

Dimensions: S the axes of one weight tensor; f of a block of features (3 where there is one for each decay), F of all
features; H hidden units of the MLP; of VeLO: T tensors with at least one weight, L units of the LSTM, K MLPs of the
bank.
"""

import collections
import errno
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mup
from mup import Array, Tree, prepare_to_print

MOMENTUM_BETAS = (0.9, 0.99, 0.999)
RMS_BETAS = (0.999,)
ADAFACTOR_BETAS = (0.9, 0.99, 0.999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)


class Optimizer(NamedTuple):
    """init(params) → state; update(grads, state, params, *, value=None) → (updates, state); then params + updates.

    value: the training loss before the update, optax's name for it. Optimizers that do not need it ignore it. For use
    within optax's own combinators it takes `optax.GradientTransformationExtraArgs(*optimizer)`: else they drop value.
    """
    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class Learned(NamedTuple):
    """A learned optimizer: what a file holds, and what `learned_optimizer` makes an optimizer of.

    theta: the arrays of θ by name (`init_theta`). step_mult, exp_mult: the scales of the update. parametrization: the
    one that θ was meta-trained in, hence needs. architecture: the rule that θ belongs to, small_fc_lopt or velo. made:
    how θ was meta-trained (JSON).

    Ours, and 0 in the paper: decay, the share of the params that each update also takes away, whatever the width; and
    horizon, with which small_fc_lopt trains as if every run had that many steps (`pace_of`).
    """
    theta: dict[str, Array]
    step_mult: float
    exp_mult: float = 0.001
    parametrization: mup.Parametrization = mup.MUP
    architecture: str = "small_fc_lopt"
    made: dict[str, Any] = {}
    decay: float = 0.0
    horizon: int = 0


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

    m [3, S]: of the gradient. v [S]: of its square. r, c [3, S]: of its square's mean over the largest axis (r) and
    over the second largest (c), each of which keeps that axis with length 1, so that it broadcasts against [3, S]. A
    tensor with fewer than two axes is not factored: r, of its square itself, has all of S, and c is None.
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
    t: updates made before this one, in small_fc_lopt times `pace_of`; a number.
    """
    g: Array
    p: Array
    m: Array
    v: Array
    r: Array
    c: Array
    rho: Array | None
    kappa: Array | None
    t: Array


def rsqrt_plus(x: Array) -> Array:
    """rsqrt₊(x) = rsqrt(max(x, 1e-9))."""
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def statistics(averages: Averages, g: Array, p: Array, t: Array) -> Statistics:
    """A tensor's statistics, with ρ_i = rsqrt₊(r_i / (mean_d1 r_i + 1e-9)) and κ_i = rsqrt₊(c_i).

    averages: those that g has entered already.
    """
    m, v, r, c = averages
    if c is None:
        return Statistics(g, p, m, v, r, r, None, None, t)
    _, d1 = largest_axes(g.shape)
    return Statistics(g, p, m, v, r, c, rsqrt_plus(r / (jnp.mean(r, d1, keepdims=True) + 1e-9)), rsqrt_plus(c), t)


class Feature(NamedTuple):
    """A block of features [f, S], of length 1 along each axis of S on which it does not vary.

    normalised: whether each is divided by its root mean square over the tensor before it enters the MLP.
    """
    name: str
    values: Array
    normalised: bool = True


def features(tensor: Statistics) -> list[Feature]:
    """small_fc_lopt's features, in its order.

    To change the learned optimizer, add, change or drop a line: all else follows from this list. A feature of each
    weight is made of that weight's own entries, since the fast paths take a few weights at a time: what is taken over
    the tensor, such as a mean, belongs in `Statistics`, as κ does, or has length 1 along all axes. They also move its
    axes, or add one: `rho is None` tells a tensor of fewer than two axes, its rank does not.
    """
    g, p, m, v, r, c, rho, kappa, t = tensor
    if rho is None:  # fewer than two axes
        g_scale, m_scale = rsqrt_plus(r + 1e-9), lax.rsqrt(r + 1e-6)
    else:
        g_scale = m_scale = rho * kappa
    rsqrt_v = lax.rsqrt(v + 1e-6)
    # Of single numbers, since a GPU's kernel takes no array of constants.
    tau = jnp.concatenate([jnp.full((1,) * (g.ndim + 1), timescale, jnp.float32) for timescale in TIMESCALES])
    return [
        Feature("g", g[None]),                                                 # 0
        Feature("p", p[None]),                                                 # 1
        Feature("m", m),                                                       # 2–4
        Feature("v", v[None]),                                                 # 5
        Feature("m rsqrt(v+1e-6)", m * rsqrt_v),                               # 6–8
        Feature("rsqrt(v+1e-6)", rsqrt_v[None]),                               # 9
        # Apart, since XLA makes one slow loop of several rows.
        *[Feature("g ρκ", g * x) for x in jnp.split(g_scale, len(g_scale))],   # 10–12
        Feature("r", r),                                                       # 13–15
        Feature("c", c),                                                       # 16–18
        Feature("rsqrt(r+1e-8)", lax.rsqrt(r + 1e-8)),                         # 19–21
        Feature("rsqrt(c+1e-8)", lax.rsqrt(c + 1e-8)),                         # 22–24
        Feature("m ρκ", m * m_scale),                                          # 25–27
        Feature("tanh(t/τ−1)", jnp.tanh(t / tau - 1.0), normalised=False)      # 28–38
    ]


def normalise(feature: Feature) -> Array:
    """A block of features [f, S] as the MLP takes it: each divided by its root mean square over the tensor, unless it
    is not to be normalised."""
    x = feature.values
    if not feature.normalised:
        return x
    return x * rms_scale(jnp.mean(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def rms_scale(mean_square: Array) -> Array:
    """What a feature is multiplied by to be normalised: rsqrt(1e-5 + mean x²)."""
    return lax.rsqrt(1e-5 + mean_square)


# ---------------------------------------------------------------------------------------------------------
# small_fc_lopt: the MLP and the update


def init_theta(key: Array, hidden: int = 32) -> dict[str, Array]:
    """Fresh θ: MLP weights N(0, 1/fan_in) cut at 2σ, biases 0, offsets of the decays 0.

    The MLP takes the features through two layers of `hidden` units to 2 outputs (d, s).
    """
    sizes = (feature_count(), hidden, hidden, 2)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    theta = {"momentum_decays": zeros(3), "rms_decays": zeros(1), "adafactor_decays": zeros(3)}
    for i, (layer_key, fan_in, fan_out) in enumerate(zip(jax.random.split(key, 3), sizes, sizes[1:])):
        normal = jax.random.truncated_normal(layer_key, -2.0, 2.0, (fan_in, fan_out), jnp.float32)
        theta |= {f"w{i}": normal / math.sqrt(fan_in), f"b{i}": zeros(fan_out)}
    return theta


def feature_count() -> int:
    """How many features there are."""
    return sum(block_sizes(features))


@functools.cache
def block_sizes(features_of: Callable[[Statistics], list[Feature]]) -> list[int]:
    """How many features each block of a list has; nothing is computed for it. Raises ValueError for a wrong shape."""
    def blocks() -> list[Array]:
        made = features_of(of_one_weight())
        for name, values, _ in made:
            if (axes := jnp.ndim(values)) != 3:
                raise ValueError(f"the feature {name!r} has {axes} axes for a tensor of 2, and must have 3, [f, *S]: "
                                 "x[None] is a block of one feature")
        return [feature.values for feature in made]

    return [block.shape[0] for block in jax.eval_shape(blocks)]


def of_one_weight() -> Statistics:
    """The statistics of a tensor of one weight, to ask a list of features how it is made."""
    one = jnp.zeros((1, 1))
    return statistics(init_averages(one), one, one, 0)


activation = jax.nn.relu  # of the MLP's hidden units


def dense(w: Array, x: Array, b: Array) -> Array:
    """wᵀ x + b at every place of a tensor: w [F, H], x [F, S], b [H] → [H, S]."""
    return jnp.tensordot(w.T, x, 1) + b.reshape(-1, *(1,) * (x.ndim - 1))


def mlp_update(learned: Learned, hidden: Array) -> Array:
    """The update from the pre-activations of the MLP's first layer, [H, S] → [S]; d and s are its first two outputs."""
    theta, i = learned.theta, 1
    while f"w{i}" in theta:
        hidden = dense(theta[f"w{i}"], activation(hidden), theta[f"b{i}"])
        i += 1
    return update_from(learned, hidden[0], hidden[1])


def update_from(learned: Learned, d: Array, s: Array) -> Array:
    """step_mult · d · exp(exp_mult · s)."""
    return learned.step_mult * d * jnp.exp(learned.exp_mult * s)


def plain_update(features_of: Callable[[Statistics], list[Feature]], learned: Learned, tensor: Statistics) -> Array:
    """The update of one tensor [S], as it is defined: all features of every weight go through the MLP."""
    blocks = map(normalise, features_of(tensor))
    x = jnp.concatenate([jnp.broadcast_to(block, (len(block), *tensor.g.shape)) for block in blocks])  # [F, S]
    return mlp_update(learned, dense(learned.theta["w0"], x, learned.theta["b0"]))


def pace_of(learned: Learned, num_steps: int | Array | None) -> float | Array:
    """Ours: horizon / num_steps, or 1 for a θ without a horizon, and where no number of steps is planned.

    With num_steps = 25 · horizon the pace is 1/25: the time that the features see advances 1/25 as fast. Updates, the
    decay included, are multiplied by √pace = 1/5: T random steps add up to √T of one, so that a random walk ends as far
    away whatever its length.
    """
    if not learned.horizon or num_steps is None:
        return 1.0
    check_num_steps(num_steps)
    return learned.horizon / num_steps


class LearnedOptimizerState(NamedTuple):
    """step: int32, updates made so far. averages: one `Averages` for each tensor that can move."""
    step: Array
    averages: tuple[Averages, ...]


def learned_optimizer(learned: Learned, update_multipliers: Tree = 1.0, gradient_multiplier: float | Array = 1.0,
                      num_steps: int | Array | None = None) -> Optimizer:
    """A learned optimizer as an optax-style pair, for any pytree of params.

    update_multipliers: μP's multipliers of the updates (`mup.update_multipliers`): a tree like the params, or a prefix
    of one, or one number. gradient_multiplier: multiplies all gradients, before they are averaged
    (`mup.gradient_multiplier`). num_steps: the planned number of updates, a number or traced: VeLO needs it,
    small_fc_lopt uses it where `learned.horizon` says so.

    learned.parametrization is not applied here, since only the params' `mup.Weight`s tell kinds and widths: with both
    multipliers at 1 a θ of μP runs as if in SP.

    Entries of a gradient that are not finite count as 0 (finite ones above 1.8e19 have a square that is not). The
    averages are float32 and so is all arithmetic (float64 for params of float64); updates have the params' types, and
    are 0 for params of integers. State and updates are sharded as the params are. Raises ValueError for a θ that does
    not fit its architecture, for num_steps below 1 where they are used, for complex params, and for params without a
    multiplier.
    """
    if learned.architecture == "velo":
        return velo(learned, update_multipliers, gradient_multiplier, num_steps)
    check_theta(learned.theta)
    pace = pace_of(learned, num_steps)

    def init(params: Tree) -> LearnedOptimizerState:
        return LearnedOptimizerState(jnp.zeros((), jnp.int32), tuple(map(init_averages, jax.tree.leaves(params))))

    def update(grads: Tree, state: LearnedOptimizerState, params: Tree, *,
               value: Array | None = None) -> tuple[Tree, LearnedOptimizerState]:
        decays, t = trained_decays(learned.theta), jnp.asarray(pace * state.step, jnp.float32)

        def of_tensor(g: Array, p: Array, averages: Averages, multiplier: float | Array):
            g = gradient_multiplier * jnp.where(jnp.isfinite(g), g, 0.0)
            averages = update_averages(averages, g, decays)
            # `plain_update` of the same arguments is the same, only slower.
            update = fast_update(features, learned, statistics(averages, g, p, t))
            update = multiplier * update  # μP acts here: a hidden weight moves 1/fan_in as far
            return -pace**0.5 * (update + learned.decay * p), averages

        ps, treedef = jax.tree.flatten(params)
        multipliers = multiplier_of_each(update_multipliers, params)
        moved = [of_tensor(*x) for x in zip(jax.tree.leaves(grads), ps, state.averages, multipliers)]
        updates, averages = zip(*moved) if moved else ((), ())
        return treedef.unflatten(updates), LearnedOptimizerState(state.step + 1, averages)

    return for_any_params(init, update)


# ---------------------------------------------------------------------------------------------------------
# VeLO: what its LSTM reads

LOSS_MEANS = 10
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)


class LossMeans(NamedTuple):
    """VeLO's memory of the training loss. means [10]: decaying averages of it, from short ones to those of the whole
    run. lowest [10]: the lowest that each has been, after bias correction."""
    means: Array
    lowest: Array


def init_losses() -> LossMeans:
    """The memory of the loss before the first update."""
    return LossMeans(jnp.zeros(LOSS_MEANS, jnp.float32), jnp.full(LOSS_MEANS, 999999999999.0, jnp.float32))


def update_losses(losses: LossMeans, value: Array, t: Array, num_steps: Array) -> tuple[LossMeans, Array]:
    """The memory after a loss, and its 9 features: how each average c_j stands to the next longer one, c_{j+1}.

    c_j = means_j / (1 − d_j^(t+1)),   d_j = exp(−1/h_j), h_j from 10 to num_steps in equal ratios;
    feature_j = clip((c_j − lowest_j) / max(1e-8, c_{j+1} − lowest_j) − 1, −1, 1), and 0 in the first two updates.
    A loss above twice the largest average counts as that much.
    """
    d = jnp.exp(-1.0 / jnp.logspace(1.0, jnp.log10(num_steps), LOSS_MEANS, dtype=jnp.float32))
    correction = 1.0 - d ** (t + 1).astype(jnp.float32)
    # A slip that the weights were trained with: averages of t losses have the bias correction of t + 1.
    largest = jnp.where(t == 0, value, jnp.max(losses.means / correction))
    means = d * losses.means + (1.0 - d) * jnp.minimum(value, 2.0 * jnp.abs(largest))
    c = means / correction
    lowest = jnp.minimum(losses.lowest, c)
    above = (c[:-1] - lowest[:-1]) / jnp.maximum(1e-8, c[1:] - lowest[:-1])
    return LossMeans(means, lowest), jnp.where(t < 2, 0.0, jnp.clip(above - 1.0, -1.0, 1.0))


def clipped_log(x: Array) -> Array:
    """ln(1e-8 + |10 x|), cut at ±5 and halved."""
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)


def tensor_inputs(p: Array, averages: Averages, fraction_trained: Array, of_loss: Array) -> Array:
    """What the LSTM reads of one tensor p [S] → [30].

    averages: those before the gradient of this update. fraction_trained: t / num_steps. of_loss [9]: `update_losses`.
    """
    axes = tuple(range(1, averages.m.ndim))  # those of S, in an array [3, S]
    scale = lax.rsqrt(jnp.maximum(1e-9, jnp.mean(p * p)))
    m, v = scale * averages.m, scale * averages.v  # v is of g², yet scaled as g is
    mean_m = jnp.mean(m, axes, keepdims=True)
    rank = sum(n > 1 for n in p.shape)
    return jnp.concatenate([
        jnp.tanh(10.0 * (fraction_trained - jnp.asarray(FRACTIONS, jnp.float32))),  # 0–8
        of_loss,                                                                    # 9–17
        clipped_log(jnp.mean(v))[None],                                             # 18
        jax.nn.one_hot(rank, 5, dtype=jnp.float32),                                 # 19–23, all 0 from rank 5 on
        clipped_log(jnp.mean(jnp.square(m - mean_m), axes)),                        # 24–26, the variance of m
        # A slip that the weights were trained with: from v the mean of m is subtracted, not that of v.
        clipped_log(jnp.mean(jnp.square(v - mean_m), axes)),                        # 27–29
    ]).astype(jnp.float32)


# ---------------------------------------------------------------------------------------------------------
# VeLO: the LSTM over tensors, and the bank


def layer(theta: dict[str, Array], name: str, x: Array) -> Array:
    """A linear layer of the LSTM's network: x w + b."""
    return x @ theta[f"rnn_params/{name}/w"] + theta[f"rnn_params/{name}/b"]


def lstm(theta: dict[str, Array], x: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
    """One step of the LSTM for all tensors at once: inputs x [T, 30] → its new (hidden, cell), [T, L] each.

    Tensors meet only in the maximum, which is added to the input of each.
    """
    # A slip that the weights were trained with: the layer `linear` is in θ, but what it puts out is not used.
    over_tensors = jnp.max(jax.nn.relu(layer(theta, "linear_1", x)), 0, initial=0.0)  # [L]
    z = layer(theta, "linear_2", x) + over_tensors
    i, g, f, o = jnp.split(layer(theta, "rnn/linear", jnp.concatenate([z, hidden], 1)), 4, axis=1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def mix_bank(theta: dict[str, Array], controls: Array) -> dict[str, Array]:
    """Each tensor's own MLP: its weights and biases are 100 · mean_k controls_k · bank_k, [T, K] → {name: [T, …]}.

    In θ the matrix of the first layer lies in pieces, w0__0, w0__1, …, one for each block of features.
    """
    bank = {name.removeprefix("ff_mod_stack/~/"): x for name, x in theta.items() if name.startswith("ff_mod_stack/")}
    pieces = [bank.pop(f"w0__{i}") for i in range(sum(name.startswith("w0__") for name in bank))]
    bank["w0"] = jnp.concatenate(pieces, axis=1)  # [K, 30, 4]
    return {name: 100.0 / len(x) * jnp.tensordot(controls, x, 1) for name, x in bank.items()}


# ---------------------------------------------------------------------------------------------------------
# VeLO: the MLP of every weight, and the update


def element_inputs(tensor: Statistics) -> list[Feature]:
    """What the MLP reads of each weight: 30 features in 14 blocks, numbered as in θ's w0__0 … w0__13."""
    g, p, m, v, r, c, rho, kappa, _ = tensor
    if rho is None:  # fewer than two axes
        g_scale, m_scale = rsqrt_plus(r + 1e-9), lax.rsqrt(r)
    else:
        g_scale = m_scale = rho * kappa
    rsqrt_v = lax.rsqrt(v + 1e-6)
    return [
        Feature("g", g[None]),                                   # 0
        Feature("g, clipped", jnp.clip(g, -0.1, 0.1)[None]),     # 1
        Feature("p", p[None]),                                   # 2
        Feature("m", m),                                         # 3
        Feature("v", v[None]),                                   # 4
        Feature("m rsqrt(v+1e-6)", m * rsqrt_v),                 # 5
        Feature("rsqrt(v+1e-6)", rsqrt_v[None]),                 # 6
        Feature("g ρκ", g * g_scale),                            # 7
        Feature("g rsqrt(v+1e-6)", (g * rsqrt_v)[None]),         # 8
        Feature("r", r),                                         # 9
        Feature("c", c),                                         # 10
        Feature("rsqrt(r+1e-8)", lax.rsqrt(r + 1e-8)),           # 11
        Feature("rsqrt(c+1e-8)", lax.rsqrt(c + 1e-8)),           # 12
        Feature("m ρκ", m * m_scale),                            # 13
    ]


class VeLOState(NamedTuple):
    """step: int32, updates made so far. losses: the memory of the loss. hidden, cell: the LSTM's state, [T, L] each.
    averages: one `Averages` for each of the T tensors, the leaves of the params that are not empty."""
    step: Array
    losses: LossMeans
    hidden: Array
    cell: Array
    averages: tuple[Averages, ...]


def velo(learned: Learned, update_multipliers: Tree = 1.0, gradient_multiplier: float | Array = 1.0,
         num_steps: int | Array | None = None) -> Optimizer:
    """VeLO as an optax-style pair, for any pytree of params; `update` needs the training loss as `value`.

    update = lr_mult · √(mean p² + 1e-9) · step_mult · d · exp(exp_mult · s): lr_mult and the MLP are the tensor's own,
    by the LSTM; d and s are the weight's, by that MLP, whose third output is not used.

    num_steps: the planned number of updates, a number or traced; VeLO's step sizes depend on it. Gradients are cut to
    ±1000, where a NaN stays one, as in the original. All else is as in `learned_optimizer`. With μP's update
    multipliers this is μVeLO.

    Raises ValueError when num_steps is missing or below 1, for a θ that is not VeLO's, and in `update` when `value`
    is missing.
    """
    theta = learned.theta
    check_velo_theta(theta)
    if num_steps is None:
        raise ValueError("VeLO needs the planned number of updates: give num_steps, for instance num_steps=1000")
    check_num_steps(num_steps)
    num_steps = jnp.asarray(num_steps, jnp.float32)
    decays = Decays(jnp.asarray(MOMENTUM_BETAS, jnp.float32), jnp.float32(RMS_BETAS[0]),
                    jnp.asarray(ADAFACTOR_BETAS, jnp.float32))

    def init(params: Tree) -> VeLOState:
        averages = tuple(map(init_averages, jax.tree.leaves(params)))
        hidden, cell = (jnp.tile(jnp.asarray(theta[f"lstm_init_state/{name}"], jnp.float32), (len(averages), 1))
                        for name in ("hidden", "cell"))
        return VeLOState(jnp.zeros((), jnp.int32), init_losses(), hidden, cell, averages)

    def update(grads: Tree, state: VeLOState, params: Tree, *, value: Array | None = None) -> tuple[Tree, VeLOState]:
        if value is None:
            raise ValueError("VeLO needs the training loss: call update(grads, state, params, value=loss); optax's "
                             "combinators pass it on to optax.GradientTransformationExtraArgs(*optimizer)")
        ps, treedef = jax.tree.flatten(params)
        gs = [jnp.clip(gradient_multiplier * g, -1000.0, 1000.0) for g in jax.tree.leaves(grads)]

        losses, of_loss = update_losses(state.losses, jnp.asarray(value, jnp.float32), state.step, num_steps)
        x = [tensor_inputs(p, a, state.step / num_steps, of_loss) for p, a in zip(ps, state.averages)]
        hidden, cell = lstm(theta, jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 30)), state.hidden, state.cell)
        mlps = mix_bank(theta, layer(theta, "rnn_to_controls", hidden))
        lr_mults = layer(theta, "step_size", hidden)[:, 0]

        averages = tuple(update_averages(a, g, decays) for a, g in zip(state.averages, gs))
        updates, multipliers = [], multiplier_of_each(update_multipliers, params)
        for i, (p, g) in enumerate(zip(ps, gs)):
            own = learned._replace(theta={name: w[i] for name, w in mlps.items()})
            update = fast_update(element_inputs, own, statistics(averages[i], g, p, state.step))
            update = lr_mults[i] * jnp.sqrt(jnp.mean(p * p) + 1e-9) * update
            update = multipliers[i] * update  # μP acts here, as in `learned_optimizer`
            updates.append(-update - learned.decay * p)
        return treedef.unflatten(updates), VeLOState(state.step + 1, losses, hidden, cell, averages)

    return for_any_params(init, update)


def velo_shapes(lstm_hidden: int, bank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of VeLO's θ by the names of the published file; the released weights have 512 and 256."""
    linears = {"linear": (30, lstm_hidden), "linear_1": (30, lstm_hidden), "linear_2": (30, lstm_hidden),
               "rnn/linear": (2 * lstm_hidden, 4 * lstm_hidden), "rnn_to_controls": (lstm_hidden, bank),
               "step_size": (lstm_hidden, 1)}
    mlp = {f"w0__{i}": (f, 4) for i, f in enumerate(block_sizes(element_inputs))}
    mlp |= {"b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    return {"lstm_init_state/hidden": (1, lstm_hidden), "lstm_init_state/cell": (1, lstm_hidden),
            **{f"rnn_params/{name}/w": shape for name, shape in linears.items()},
            **{f"rnn_params/{name}/b": shape[1:] for name, shape in linears.items()},
            **{f"ff_mod_stack/~/{name}": (bank, *shape) for name, shape in mlp.items()}}


def init_velo_theta(key: Array, lstm_hidden: int = 512, bank: int = 256) -> dict[str, Array]:
    """Fresh θ of VeLO: matrices N(0, 1/fan_in) cut at 2σ, biases and the LSTM's first state 0, but for two.

    The fan_in of w0__0 … w0__13 is 30, since their products are added. A random LSTM puts out little: so the step sizes
    begin near 1, and all tensors near one MLP, by biases N(0, 0.2²) of the controls. The matrices of the bank are
    √K/20 times as large, so that what they are mixed to is N(0, 1/fan_in) again. The choice of all this is ours.
    """
    theta, shapes = {}, velo_shapes(lstm_hidden, bank)
    for (name, shape), key in zip(shapes.items(), jax.random.split(key, len(shapes))):
        normal = functools.partial(jax.random.truncated_normal, key, -2.0, 2.0, shape, jnp.float32)
        if name == "rnn_params/rnn_to_controls/b":
            theta[name] = 0.2 * normal()
        elif name.split("/")[-1].startswith("w"):
            fan_in = 30 if "/w0__" in name else shape[-2]
            theta[name] = normal() / math.sqrt(fan_in) * (math.sqrt(bank) / 20 if "ff_mod_stack" in name else 1.0)
        else:
            theta[name] = jnp.full(shape, float(name == "rnn_params/step_size/b"), jnp.float32)
    return theta


def check_velo_theta(theta: dict[str, Array]) -> None:
    """Raises ValueError, in one line, for arrays that are no θ of VeLO, of any number of LSTM units and MLPs."""
    shapes = {name: np.shape(x) for name, x in theta.items()}
    lstm_hidden = (shapes.get("lstm_init_state/hidden") or (1,))[-1]
    bank = (shapes.get("ff_mod_stack/~/b0") or (1,))[0]
    check_shapes(shapes, velo_shapes(lstm_hidden, bank), f"VeLO with {lstm_hidden} LSTM units and a bank of {bank}")


# ---------------------------------------------------------------------------------------------------------
# AdamW: the meta-optimizer, and the baseline in SP (AdamW) and in μP (μAdam)


class AdamState(NamedTuple):
    """step: int32, updates made so far. m, v: trees like the params, with None for those that cannot move."""
    step: Array
    m: Tree
    v: Tree


def adamw(learning_rate: float | Array | Callable[[Array], Array], *, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-8, weight_decay: float = 0.0, decay: float = 0.0,
          update_multipliers: Tree = 1.0) -> Optimizer:
    """AdamW: u = −η · multiplier · (m̂/(√v̂ + ε) + weight_decay · p) − decay · p, m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

    learning_rate: η, or a function of the number of updates made before. weight_decay: AdamW's own, which in μP fades
    with the width, as η · multiplier does; decay: the same at all widths and learning rates. With μP's
    update_multipliers and no decay this is μAdam (TP5, Table 8). Types, shardings and errors are as in
    `learned_optimizer`, but a gradient that is not finite is taken as it is.
    """
    def init(params: Tree) -> AdamState:
        return AdamState(jnp.zeros((), jnp.int32), jax.tree.map(zeros_like, params), jax.tree.map(zeros_like, params))

    def update(grads: Tree, state: AdamState, params: Tree, *, value: Array | None = None) -> tuple[Tree, AdamState]:
        eta = learning_rate(state.step) if callable(learning_rate) else learning_rate
        t = state.step.astype(jnp.float32) + 1.0
        correction1, correction2 = 1.0 - b1**t, 1.0 - b2**t

        def of_tensor(p: Array, m: Array, v: Array, multiplier: float | Array) -> Array:
            m_hat, v_hat = m / correction1, v / correction2
            return -eta * multiplier * (m_hat / (jnp.sqrt(v_hat) + eps) + weight_decay * p) - decay * p

        m = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.v, grads)
        multipliers = jax.tree.unflatten(jax.tree.structure(params), multiplier_of_each(update_multipliers, params))
        return jax.tree.map(of_tensor, params, m, v, multipliers), AdamState(state.step + 1, m, v)

    return for_any_params(init, update)


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
# Beyond the paper: ours


def with_cooldown(optimizer: Optimizer, num_steps: int | Array, cooldown: float) -> Optimizer:
    """An optimizer whose updates fall linearly to 0 over the last share `cooldown` of a run of num_steps.

    The update after t others is multiplied by (num_steps − t) / (cooldown · num_steps), cut to [0, 1], its decay
    included: after num_steps nothing moves any more. A cooldown of 0 changes nothing. num_steps is a number or traced.
    The optimizer is any whose state counts its updates in `step`, as all in this file do. Raises ValueError for a
    cooldown outside [0, 1] and for num_steps below 1.
    """
    check_num_steps(num_steps)
    if not 0 <= cooldown <= 1:
        raise ValueError(f"cooldown is {cooldown}, but must be a share of the run, from 0 to 1")
    if not cooldown:
        return optimizer

    def update(grads: Tree, state: Any, params: Tree, *, value: Array | None = None, **_: Any) -> tuple[Tree, Any]:
        if not hasattr(state, "step"):
            raise ValueError("with_cooldown is for the optimizers of lopt alone: put it inside of optax's combinators")
        updates, after = optimizer.update(grads, state, params, value=value)
        factor = jnp.clip((num_steps - state.step) / (cooldown * num_steps), 0.0, 1.0)
        return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), after

    return Optimizer(optimizer.init, update)


# ---------------------------------------------------------------------------------------------------------
# Params of any tree, type, shape and mesh


def for_any_params(init: Callable, update: Callable) -> Optimizer:
    """An optimizer of params of any type, shape and mesh, of one to which None stands for each that cannot move: an
    empty tensor, or one of integers or truth values.

    `update` gets gradients and params in the type to compute in; what it returns gets the params' types.
    """
    def can_move(p: Array) -> bool:
        return jnp.size(p) > 0 and jnp.issubdtype(jnp.asarray(p).dtype, jnp.inexact)

    def to_compute_with(tree: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda p, x: jnp.asarray(x, working_type(p)) if can_move(p) else None, params, tree)

    def as_type_of(p: Array, u: Array | None) -> Array:
        return jnp.zeros_like(p) if u is None else u.astype(jnp.asarray(p).dtype)

    def of_any(grads: Tree, state: Any, params: Tree, *, value: Array | None = None) -> tuple[Tree, Any]:
        updates, state = update(to_compute_with(grads, params), state, to_compute_with(params, params), value=value)
        return jax.tree.map(as_type_of, params, updates), state

    return Optimizer(lambda params: init(jax.tree.map(lambda p: p if can_move(p) else None, params)), sharded(of_any))


def working_type(p: Array) -> jnp.dtype:
    """The type in which a tensor's update is computed and its state is kept: float64 for float64, else float32.

    Raises ValueError for complex numbers.
    """
    dtype = jnp.asarray(p).dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"params of shape {list(jnp.shape(p))} are complex: wrap the optimizer in "
                         "optax.contrib.split_real_and_imaginary, or split them yourself")
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def is_on_mesh(x: Array) -> bool:
    """Whether an array is laid out over a mesh of devices; not so inside shard_map, where each device has its own."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Manual not in mesh.axis_types


def laid_out_as(like: Array, x: Array) -> Array:
    """An array laid out over a mesh as one of the same shape: XLA lays out a choice between the two, then drops it."""
    return jnp.where(True, x, like)


def zeros_like(p: Array, *lead: int, without: int | None = None) -> Array:
    """Zeros [*lead, S] in the type of a tensor's state, sharded as the tensor [S] is. without: an axis of length 1."""
    shape = *lead, *(1 if i == without else n for i, n in enumerate(jnp.shape(p), -jnp.ndim(p)))
    zeros = jnp.zeros_like(p, working_type(p), shape=shape)  # of p, as whose they vary over devices inside shard_map
    if not is_on_mesh(p):
        return zeros
    like = jnp.asarray(p, zeros.dtype) if without is None else jnp.sum(p, without, zeros.dtype, keepdims=True)
    like = jnp.broadcast_to(like, zeros.shape)
    return laid_out_as(like, jnp.zeros_like(like))


def init_averages(p: Array) -> Averages:
    """The averages of a tensor before its first update: all 0."""
    if (axes := largest_axes(jnp.shape(p))) is None:
        return Averages(zeros_like(p, 3), zeros_like(p), zeros_like(p, 3), None)
    d0, d1 = axes
    return Averages(zeros_like(p, 3), zeros_like(p), zeros_like(p, 3, without=d0), zeros_like(p, 3, without=d1))


def sharded(update: Callable) -> Callable:
    """An optimizer's `update`, made to take params on a mesh of devices, too: it returns updates and state that are
    sharded as the params and the state before. What else optax's combinators pass on it ignores."""
    @functools.wraps(update)
    def on_mesh(grads: Tree, state: Any, params: Tree, *, value: Array | None = None, **_: Any) -> tuple[Tree, Any]:
        if params is None:  # as optax passes it on where it was left out
            raise ValueError("the params are missing: call update(grads, state, params)")
        there = [p for p in jax.tree.leaves(params) if is_on_mesh(p)]
        if not there:
            return update(grads, state, params, value=value)
        mesh = jax.typeof(there[0]).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            moved = update(grads, state, params, value=value)
            return jax.tree.map(lambda x, y: laid_out_as(x, y) if is_on_mesh(x) else y, (params, state), moved)

        def layout(x: Array) -> NamedSharding:
            return jax.typeof(x).sharding if is_on_mesh(x) else NamedSharding(mesh, PartitionSpec())

        automatic = jax.sharding.auto_axes(lambda *args: update(*args[:3], value=args[3]),
                                           out_sharding=jax.tree.map(layout, (params, state)))
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((grads, state, params, value)))
        # JAX takes the mesh from its context, which a trace may only lend an abstract one.
        with jax.sharding.use_abstract_mesh(mesh) if traced else jax.set_mesh(there[0].sharding.mesh):
            return automatic(grads, state, params, value)

    return on_mesh


def multiplier_of_each(multipliers: Tree, params: Tree) -> list[float | Array]:
    """The multiplier of each leaf of the params, from a tree like theirs or a prefix of it; one number is that of all.

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


def check_num_steps(num_steps: int | Array) -> None:
    """Raises ValueError where less than one update is planned; a traced number is not known yet."""
    if not isinstance(num_steps, jax.core.Tracer) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, but at least one update must be planned")


def check_theta(theta: dict[str, Array]) -> None:
    """Raises ValueError, in one line, for arrays that are no θ of small_fc_lopt with this list of features."""
    shapes = {name: np.shape(x) for name, x in theta.items()}
    layers = max(2, sum(f"w{i}" in theta or f"b{i}" in theta for i in range(len(theta))))
    sizes = feature_count(), *((shapes.get(f"b{i}") or (1,))[0] for i in range(layers - 1)), 2
    expected = {"momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        expected |= {f"w{i}": (fan_in, fan_out), f"b{i}": (fan_out,)}
    check_shapes(shapes, expected, f"small_fc_lopt with {sizes[0]} features")


def check_shapes(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], of_what: str) -> None:
    """Raises ValueError, in one line, where the arrays of a θ have not the names and shapes that they should have."""
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"this is no θ of {of_what}: {name!r} is {shapes.get(name, 'missing')}, and should be "
                             f"{expected.get(name, 'absent')}")


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~


def fast_update(features_of: Callable[[Statistics], list[Feature]], learned: Learned, tensor: Statistics) -> Array:
    """`plain_update`, by the fastest way: in one kernel where JAX's default backend is a GPU, else in chunks.

    The kernel needs Pallas' Triton, which JAX means to drop, a list that `is_made_by_decays`, and a float32 tensor of
    more than one weight, in one of which even the time counts as a feature of every weight, and fewer than 2³¹.
    """
    fits = (jax.default_backend() == "gpu" and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
            and 1 < tensor.g.size < 2**31 and tensor.g.dtype == jnp.float32 and is_made_by_decays(features_of))
    return (in_one_kernel if fits else in_chunks)(features_of, learned, tensor)


# How many weights of one network go through the MLP at once. On a CPU the activations of two networks, which PES
# updates side by side, then stay in the L2 cache (1.5 times as fast as whole tensors); on a GPU it bounds the memory.
CHUNK = {"cpu": 2048, "gpu": 2**18, "tpu": 2**16}


def in_chunks(features_of: Callable[[Statistics], list[Feature]], learned: Learned, tensor: Statistics) -> Array:
    """`plain_update`, several times as fast, for any list like `features` and any MLP, with little memory unless a row
    of the tensor is long.

    Two identities save most of the first layer. Features that vary along some axes only are multiplied by their rows of
    w0 where they vary, and added by broadcasting: 16 of 39 inputs remain for each weight. And dividing by the root mean
    square commutes into the weights: (x·s) W = x (s[:, None] W).

    The features of every weight are built twice, for their mean squares and for the MLP, a few rows of the tensor at a
    time: that costs less than to write them to memory and to read them back.

    Dimensions: A and B the tensor's two largest axes in the order in which they stand, O all others, before them; a
    tensor with fewer than two axes is [A, 1]. K features of every weight, a rows of a chunk.
    """
    shape = tensor.g.shape
    tensor = jax.tree.map(lambda x: _as_oab(x, shape), tensor._replace(t=None))._replace(t=tensor.t)
    *others, rows, columns = tensor.g.shape
    rows_at_once = max(1, min(rows, CHUNK.get(jax.default_backend(), 2048) // (math.prod(others) * columns)))
    chunks = -(-rows // rows_at_once)

    theta, blocks = learned.theta, features_of(tensor)
    per_weight = _of_every_weight(blocks, tensor)

    def first_row(i):  # of chunk i; the last overlaps the one before where rows_at_once does not divide rows
        return jnp.minimum(i * rows_at_once, rows - rows_at_once)

    def cut(x, i):  # its rows in chunk i
        if x.ndim == 0 or x.shape[-2] == 1 or chunks == 1:
            return x
        return lax.dynamic_slice_in_dim(x, first_row(i), rows_at_once, -2, allow_negative_indices=False)

    def features_of_chunk(i):  # those of every weight: [K, O, a, B]
        made = features_of(jax.tree.map(lambda x: cut(x, i), tensor))
        return jnp.concatenate([made[j].values for j in per_weight])  # of up to eight parts XLA makes one slow loop

    def add_squares(i, total):
        x = features_of_chunk(i)
        if rows % rows_at_once:
            is_new = first_row(i) + jnp.arange(rows_at_once) >= i * rows_at_once
            x = jnp.where(is_new[:, None], x, 0.0)
        return total + jnp.sum(x * x, axis=tuple(range(1, x.ndim)))

    inputs = sum(len(blocks[j].values) for j in per_weight)
    squares = _loop(chunks, add_squares, jnp.zeros_like(tensor.g, shape=(inputs,)))
    w0_per_weight = _scaled_rows(theta, blocks, per_weight, squares / float(tensor.g.size)).T  # [H, K]

    hidden_of_rows, hidden_of_all = _hidden_of_others(theta, blocks, tensor)
    # What the rows share is laid out once for a whole chunk: XLA's loop then adds it four times faster.
    hidden_of_all = jnp.broadcast_to(hidden_of_all, (len(theta["b0"]), *others, rows_at_once, columns))

    def write_update(i, update):
        x = features_of_chunk(i)
        hidden = (w0_per_weight @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:]) + hidden_of_all
        if hidden_of_rows is not None:
            hidden = hidden + cut(hidden_of_rows, i)  # [H, O, a, B]
        new = mlp_update(learned, hidden.reshape(len(hidden), -1)).reshape(x.shape[1:])
        if chunks == 1:
            return new
        return lax.dynamic_update_slice_in_dim(update, new, first_row(i), -2, allow_negative_indices=False)

    return _from_oab(_loop(chunks, write_update, jnp.zeros_like(tensor.g)), shape)


def _of_every_weight(blocks: list[Feature], tensor: Statistics) -> list[int]:
    """Which blocks vary along all axes."""
    return [j for j, f in enumerate(blocks) if f.values.shape[1:] == tensor.g.shape]


def _scaled_rows(theta: dict[str, Array], blocks: list[Feature], here: list[int], mean_squares: Array) -> Array:
    """The rows of w0 of the blocks with these indices, times what `normalise` multiplies their features by: [f, H].

    mean_squares: of these features, over the tensor, [f].
    """
    rows = jnp.split(theta["w0"], np.cumsum([len(f.values) for f in blocks])[:-1])
    normalised = np.concatenate([np.full(len(rows[j]), blocks[j].normalised) for j in here])
    scale = jnp.where(normalised, rms_scale(mean_squares), 1.0)
    return jnp.concatenate([rows[j] for j in here]) * scale[:, None]


def _hidden_of_others(theta: dict[str, Array], blocks: list[Feature], tensor: Statistics) -> tuple[Array | None, Array]:
    """What the bias, and the features that do not vary along all axes, give to the first layer of the MLP.

    (That of features of the rows [H, O, A, 1], None where there are none; all else [H, O, 1, B], or of length 1.)
    """
    of_rows, of_all = None, theta["b0"].reshape(-1, *(1,) * tensor.g.ndim)
    for where in sorted({f.values.shape[1:] for f in blocks} - {tensor.g.shape}):
        here = [j for j, f in enumerate(blocks) if f.values.shape[1:] == where]
        x = jnp.concatenate([blocks[j].values for j in here])
        mean_squares = jnp.mean(x * x, axis=tuple(range(1, x.ndim)))
        hidden = jnp.einsum("fh,f...->h...", _scaled_rows(theta, blocks, here, mean_squares), x)
        if where[-2] > 1:
            of_rows = hidden if of_rows is None else of_rows + hidden
        else:
            of_all = of_all + hidden
    return of_rows, of_all


# How many weights one program of the GPU takes.
WEIGHTS_OF_A_PROGRAM = 128


def in_one_kernel(features_of: Callable[[Statistics], list[Feature]], learned: Learned, tensor: Statistics,
                  interpret: bool = False) -> Array:
    """`plain_update` as one kernel of a GPU (Pallas, by way of Triton): hidden units never leave its registers.

    The two identities are those of `in_chunks`. Between kernels a weight's hidden units would cross the memory, about
    1,100 bytes for each weight, where its state, gradient, value and update are 28.

    interpret: computes the same without a GPU, slowly. Dimensions: O, A, B as in `in_chunks`; K features of every
    weight; n weights of a program.
    """
    from jax.experimental.pallas import pallas_call, program_id, triton

    shape, whole = tensor.g.shape, _as_oab(tensor.g, tensor.g.shape).shape

    def with_one_o(x):  # [..., O, A, B], where O may have had any number of axes
        x = _as_oab(x, shape)
        return x.reshape(*x.shape[:x.ndim - len(whole)], -1, *x.shape[-2:])

    tensor = jax.tree.map(with_one_o, tensor._replace(t=None))._replace(t=jnp.float32(tensor.t))
    theta, blocks = learned.theta, features_of(tensor)
    per_weight = _of_every_weight(blocks, tensor)
    mean_squares = jnp.concatenate([jnp.mean(blocks[j].values ** 2, axis=(1, 2, 3)) for j in per_weight])
    w0 = _scaled_rows(theta, blocks, per_weight, mean_squares)  # [K, H]
    last = sum(name.startswith("w") for name in theta) - 1  # the layer that puts out d and s

    def padded(x, *axes):  # with zeros, along axes of hidden units: Triton takes powers of 2, its products 16 at least
        size = [max(16, 1 << (n - 1).bit_length()) if i in axes else n for i, n in enumerate(x.shape)]
        return jnp.pad(x, [(0, more - n) for n, more in zip(x.shape, size)])

    of_others = [padded(jnp.moveaxis(x, 0, -1), 3)  # [O, A, 1, H] and [O, 1, B, H], or of length 1
                 for x in _hidden_of_others(theta, blocks, tensor) if x is not None]
    hidden_layers = [(padded(theta[f"w{i}"], 0, 1), padded(theta[f"b{i}"], 0)) for i in range(1, last)]
    d_and_s = padded(theta[f"w{last}"].T, 1), theta[f"b{last}"]
    arrays, structure = jax.tree.flatten((tensor, of_others, padded(w0, 1), hidden_layers, d_and_s))
    n, (_, rows, columns) = WEIGHTS_OF_A_PROGRAM, tensor.g.shape

    def kernel(*refs):  # of the arrays, all flat, and of the update
        *refs, out = refs
        which = program_id(0) * n + jnp.arange(n)
        there = which < tensor.g.size  # the last program has fewer
        o, a, b = which // (rows * columns), which // columns % rows, which % columns

        def load(array, at, mask=None):
            return triton.load(array.ref.at[at], mask=mask, other=None if mask is None else 0.0)

        def at_weights(shape):  # where an array [O, A, B], each of these or 1, has the entries of the weights
            o_, a_, b_ = (jnp.where(size > 1, i, 0) for i, size in zip((o, a, b), shape))
            return (o_ * shape[1] + a_) * shape[2] + b_

        def statistic(x):  # [n], or one for each decay, or a number
            if not x.shape:
                return x.ref[0]
            at, size = at_weights(x.shape[-3:]), math.prod(x.shape[-3:])
            each = [load(x, i * size + at, there) for i in range(math.prod(x.shape) // size)]
            return each if len(x.shape) > 3 else each[0]

        tensor_, of_others, w0, hidden_layers, (w, bias) = structure.unflatten(
            [types.SimpleNamespace(ref=ref, shape=x.shape) for ref, x in zip(refs, arrays)])
        tensor_, units = jax.tree.map(statistic, tensor_), jnp.arange(w0.shape[1])
        made = _by_decays(features_of, blocks, lambda i: Statistics(*(
            x[i][None] if isinstance(x, list) else x for x in tensor_)))
        hidden = sum(load(x, at_weights(x.shape[:3])[:, None] * len(units) + units, there[:, None]) for x in of_others)
        for k, x in enumerate(x for j in per_weight for x in made[j]):
            hidden += x[:, None] * load(w0, k * len(units) + units)  # [n, H]
        for w1, b1 in hidden_layers:
            square = jnp.arange(w1.shape[0])[:, None] * w1.shape[1] + jnp.arange(w1.shape[1])
            hidden = triton.dot(activation(hidden), load(w1, square), precision=lax.Precision.HIGHEST)
            hidden += load(b1, jnp.arange(w1.shape[1]))
        hidden, units = activation(hidden), jnp.arange(w.shape[1])
        d, s = (jnp.sum(hidden * load(w, j * len(units) + units), 1) + bias.ref[j] for j in (0, 1))
        triton.store(out.at[which], update_from(learned, d, s), mask=there)

    update = pallas_call(kernel, jax.ShapeDtypeStruct((tensor.g.size,), tensor.g.dtype),
                         grid=(-(-tensor.g.size // n),), interpret=interpret,
                         compiler_params=triton.CompilerParams(num_warps=4, num_stages=1))(*map(jnp.ravel, arrays))
    return _from_oab(update.reshape(whole), shape)


def _by_decays(features_of: Callable[[Statistics], list[Feature]], blocks: list[Feature],
               at_decay: Callable[[int], Statistics]) -> list[list[Array]]:
    """The features in each of the blocks that the same list makes of a whole tensor, made for one decay at a time.

    at_decay: the statistics with one decay alone, that of an index: m, r, c, rho, kappa [1, S]. A kernel needs this: it
    has no arrays of three. Features of one name are of the three decays, or there is one of them.
    """
    def rows(f):
        return [f.values.reshape(f.values.shape[1:])] if len(f.values) == 1 else list(f.values)

    def by_name(features):
        found = collections.defaultdict(list)
        for f in features:
            found[f.name] += rows(f)
        return found

    decays = [by_name(features_of(at_decay(i))) for i in range(len(MOMENTUM_BETAS))]
    count = collections.Counter(f.name for f in blocks for _ in range(len(f.values)))
    ordered = {name: iter(decays[0][name] if n == len(decays[0][name]) else
                          [x for found in decays for x in found[name]])
               for name, n in count.items()}
    return [[next(ordered[f.name]) for _ in range(len(f.values))] for f in blocks]


@functools.cache
def is_made_by_decays(features_of: Callable[[Statistics], list[Feature]]) -> bool:
    """Whether a list gives the same when it is made for one decay at a time: no feature mixes or selects decays.

    It is tried on random statistics, those of a tensor of two axes and of one with fewer.
    """
    def agrees(tensor: Statistics) -> bool:
        blocks = features_of(tensor)
        try:
            made = _by_decays(features_of, blocks, lambda i: jax.tree.map(
                lambda x: x[i:i + 1] if x.ndim == 3 else x, tensor))
        except (TypeError, ValueError, IndexError, StopIteration):
            return False
        return all(np.allclose(f.values, jnp.stack(rows), 1e-5) for f, rows in zip(blocks, made))

    with jax.ensure_compile_time_eval():
        g, p, v, *rest = jax.random.uniform(jax.random.key(0), (18, 2, 3), minval=0.5)
        m, r, c, rho, kappa = jnp.reshape(jnp.stack(rest), (5, 3, 2, 3))
        factored = Statistics(g, p, m, v, r, c, rho, kappa, jnp.float32(5.0))
        return agrees(factored) and agrees(factored._replace(c=r, rho=None, kappa=None))


def _loop(n: int, body: Callable, start: Array) -> Array:
    """lax.fori_loop(0, n, body, start), but no loop for a single pass."""
    return body(0, start) if n == 1 else lax.fori_loop(0, n, body, start)


def _as_oab(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [..., S], S of that shape or of length 1 along some axes, as [..., O, A, B]."""
    if len(shape) < 2:
        return x.reshape(*x.shape[:x.ndim - len(shape)], -1, 1)
    return jnp.moveaxis(x, sorted(largest_axes(shape)), (-2, -1))


def _from_oab(x: Array, shape: tuple[int, ...]) -> Array:
    """An array [O, A, B] as a tensor of that shape: undoes `_as_oab`."""
    return x.reshape(shape) if len(shape) < 2 else jnp.moveaxis(x, (-2, -1), sorted(largest_axes(shape)))


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
        sync_folder(path.parent)
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


def sync_folder(path: pathlib.Path) -> None:
    """Puts the names in a folder on disk, where folders can be opened: Windows opens none."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(folder)
    finally:
        os.close(folder)


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
    content = _read_bounded(path, max_bytes)
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


def _read_bounded(path: pathlib.Path, max_bytes: int) -> bytes:
    """The content of a file of at most max_bytes. Raises ValueError, naming the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ValueError(f"{path}: has {size:,} bytes, more than the {max_bytes:,} expected")
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_npy(content: bytes) -> np.ndarray:
    """The array of an .npy file. Raises ValueError for objects, and for a shape that is not that of the bytes."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of {dtype} {list(shape)} does not have {len(content) - file.tell():,} bytes")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C").copy()


MAX_THETA_BYTES = 1 << 26
CHECKS = {"small_fc_lopt": check_theta, "velo": check_velo_theta}  # of θ, by its architecture


def save(path: str | os.PathLike, learned: Learned) -> None:
    """Writes a learned optimizer as an .npz: the arrays of θ, and all else as JSON under the name `metadata`."""
    numbers = learned.parametrization._asdict() | {
        key: getattr(learned, key) for key in ("step_mult", "exp_mult", "decay", "horizon")}
    metadata = learned.made | {"architecture": learned.architecture, "parametrization": numbers.pop("name"),
                               **{key: float(x) for key, x in numbers.items()}}
    arrays = {key: np.asarray(x, np.float32) for key, x in learned.theta.items()}
    write_npz(path, {**arrays, "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})


def _load_npz(path: pathlib.Path) -> Learned:
    """The learned optimizer that `save` wrote."""
    theta = read_npz(path, MAX_THETA_BYTES)
    if "metadata" not in theta:
        raise ValueError(f"{path}: is no learned optimizer: it has no array 'metadata'")
    defaults = mup.MUP._asdict() | {"decay": 0.0, "horizon": 0}
    del defaults["name"]
    try:
        made = json.loads(theta.pop("metadata").tobytes())
        name, architecture = made.pop("parametrization"), made.pop("architecture", "small_fc_lopt")
        numbers = {key: made.pop(key, defaults.get(key)) for key in ("step_mult", "exp_mult", *defaults)}
        for key, x in numbers.items():
            lowest = {"base_width": 0, "decay": 0, "horizon": 0}.get(key, -math.inf)
            if type(x) not in (int, float) or not math.isfinite(x) or x < lowest:
                raise ValueError(f"{key} is {x!r:.40}, and must be a finite number" + ", not negative" * (lowest == 0))
            if key in ("base_width", "horizon") and x != int(x):
                raise ValueError(f"{key} is {x}, and must be a whole number")
        if name not in ("mup", "sp") or architecture not in CHECKS:
            raise ValueError(f"{name!r:.40}, {architecture!r:.40}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata do not give step_mult, exp_mult and a known parametrization "
                         f"({' '.join(str(error).split())})") from None
    _check_arrays(path, theta, architecture)
    base_width, horizon = (int(numbers.pop(key)) for key in ("base_width", "horizon"))
    scales = {key: numbers.pop(key) for key in mup.Parametrization._fields if key in numbers}
    parametrization = mup.Parametrization(name, **scales, base_width=base_width)
    return Learned({key: jnp.asarray(x) for key, x in theta.items()}, parametrization=parametrization,
                   architecture=architecture, made=made, horizon=horizon, **numbers)


def _check_arrays(path: pathlib.Path, theta: dict[str, np.ndarray], architecture: str) -> None:
    """Raises ValueError, naming the file, for arrays that are no θ of an architecture, or not finite float32."""
    try:
        for name, x in theta.items():
            if x.dtype != np.float32 or not np.isfinite(x).all():
                raise ValueError(f"{name} must be finite float32, but is {x.dtype} {list(x.shape)}"
                                 + " with entries that are not" * bool(x.dtype == np.float32))
        CHECKS[architecture](theta)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load(path: str | os.PathLike) -> Learned:
    """Reads a learned optimizer: what `save` wrote, or weights that others published.

    Published weights are VeLO's `params` or `theta.state`, a folder with PyLO's copies of it (the files of VeLO_RNN and
    VeLO_MLP, under any names that end in .safetensors, in the folder or in folders of it), and the `model.safetensors`
    of μLO. `made["published"]` then says whether it is the published file itself.

    Raises ValueError, in one line that names the file, for what is no learned optimizer.
    """
    path, paths = pathlib.Path(path), theta_files(path)
    if not 1 <= len(paths) <= 2:
        raise ValueError(f"{path}: has {len(paths)} .safetensors files, and should have VeLO_RNN's and VeLO_MLP's")
    contents = [_read_bounded(p, MAX_THETA_BYTES) for p in paths]
    if not is_published_layout(contents[0]):
        return _load_npz(paths[0])
    try:
        architecture, theta = published_theta(contents)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    _check_arrays(path, theta, architecture)
    step_mult, parametrization = (0.001, mup.SP) if architecture == "velo" else (0.01, mup.MUP)
    return Learned({name: jnp.asarray(x) for name, x in theta.items()}, step_mult, 0.001, parametrization, architecture,
                   {"published": "; ".join(map(published, contents))})


def theta_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files that `load` reads: the path itself, or what is there of a folder."""
    path = pathlib.Path(path)
    return sorted({*path.glob("*.safetensors"), *path.glob("*/*.safetensors")}) if path.is_dir() else [path]


# ---------------------------------------------------------------------------------------------------------
# Files that others published: VeLO's (flax msgpack, or safetensors) and the authors' μLO (safetensors)

# what a published file is: (its bytes, its SHA-256, the SHA-1 that git gives it; None where it is not known)
PUBLISHED = {
    "the published μLO (btherien/mulo, model.safetensors)":
        (10_096, "ad7c499d1bd389c768f20019a6e1a423c51c7d1db64774d038f4fe56bf21ccb3", None),
    "the published VeLO (params)": (9_282_564, None, "a1011ded0e4059aa01baab5a7e5b25374241ee56"),
    "the published VeLO (amoudgl/velo-4000, theta.state)":
        (9_282_507, None, "2233e53ad4974489183a9863c8e165ab50ae4b63"),
    "PyLO's copy of VeLO's LSTM (VeLO_RNN)": (9_119_908, None, None),
    "PyLO's copy of VeLO's bank (VeLO_MLP)": (164_296, None, None)}

# The authors' μLO has trained decays, which are not in its file: PyLO has them as default arguments of AdafacLO.
PUBLISHED_MULO_DECAYS = {"momentum_decays": (0.15216392, 0.14245212, 0.06812963), "rms_decays": (0.01079706,),
                         "adafactor_decays": (0.18621896, -0.10864615, -0.06185547)}

# Names of the same array: in PyLO's VeLO_RNN, and in the file of VeLO
PYLO_LAYERS = {"mix_layer1": "linear", "mix_layer2": "linear_1", "final_mix_layer": "linear_2",
               "lstm.linear": "rnn/linear", "rnn_to_controls": "rnn_to_controls", "step_size": "step_size"}
# and in its VeLO_MLP, where each has a scratch tensor beside it, named without the _, that means nothing
PYLO_BANK = {"input_bias_": "b0", "hidden_weights_.0": "w1", "hidden_bias_.0": "b1", "output_weights_": "w2",
             "output_bias_": "b2"}

MAX_OBJECTS = 1 << 12  # of a msgpack file, nested ones included; VeLO's has about 300
MAX_DEPTH = 16
MAX_HEADER = 1 << 16  # bytes of a safetensors header; the larger of VeLO's has 1,176
DTYPES = ("float32", "float64", "int32", "int64", "uint32", "uint64")


def published(content: bytes) -> str:
    """Says in words which of the published files this content is, or why it is none of them."""
    sha256 = hashlib.sha256(content).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    for name, (size, its_sha256, its_git) in PUBLISHED.items():
        if size == len(content):
            if its_sha256 == sha256 or its_git == git:
                return name
            if its_sha256 is its_git is None:
                return f"perhaps {name}: it has the same {size:,} bytes, and its hash is not known"
            return f"not the published file: it has the {size:,} bytes of {name}, but another hash"
    return f"not the published file: none of those has {len(content):,} bytes"


def checked_array(content: memoryview, shape: Any, dtype: str) -> np.ndarray:
    """The array of these bytes, in C order and little-endian. Raises ValueError for a shape that is not theirs."""
    if not (isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError("an array has a shape that is none of at most 8 positive sizes")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(content):
        raise ValueError(f"an array of {len(content):,} bytes is said to be {dtype} {str(shape):.80}")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


# What the first bytes 0xc4, 0xc5, … 0xdf of an object mean: its kind, and how `struct` reads the number that follows,
# which is the object or its length; the five of a length 1, 2, 4, 8 or 16 have none
MSGPACK = [(kind, code) for kind, codes in (("bin", "BHI"), ("ext", "BHI"), ("number", "fdBHIQbhiq"), ("ext", "-----"),
                                            ("str", "BHI"), ("array", "HI"), ("map", "HI")) for code in codes]


def read_msgpack(content: bytes | memoryview) -> Any:
    """The one object of a msgpack file as flax writes it: maps with names as keys, lists, numbers, text, arrays.

    Raises ValueError, in one line, for anything else. Every length is compared with what is left of the file before
    anything is made of it, and objects are counted: it takes no more memory than a few times the file's size.
    """
    view, position, objects = memoryview(content), 0, 0

    def take(n: int) -> memoryview:
        nonlocal position
        if n > len(view) - position:
            raise ValueError(f"{n:,} bytes are announced at byte {position:,}, where {len(view) - position:,} are left")
        position += n
        return view[position - n:position]

    def number(code: str) -> int | float:
        return struct.unpack(">" + code, take(struct.calcsize(code)))[0]

    def read_ext(length: int, depth: int) -> Any:
        kind, end = number("b"), position + length
        if kind not in (1, 3):
            raise ValueError(f"an extension of type {kind} before byte {position:,} is no array")
        if length > len(view) - position:
            take(length)
        parts = read(depth + 1)
        if position != end or not (isinstance(parts, list) and len(parts) == 3 and isinstance(parts[2], memoryview)
                                   and parts[1] in DTYPES):
            raise ValueError(f"the extension that ends at byte {end:,} is no array of shape, type and bytes")
        array = checked_array(parts[2], parts[0], parts[1])
        if kind == 3 and array.shape:
            raise ValueError(f"the extension that ends at byte {end:,} is no single number")
        return array

    def read_map(length: int, depth: int) -> dict[str, Any]:
        found = {}
        for _ in range(length):
            key = read(depth + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError(f"a map has a key before byte {position:,} that is no text, or that it has twice")
            found[key] = read(depth + 1)
        return found

    def read(depth: int) -> Any:
        nonlocal objects
        objects += 1
        if depth > MAX_DEPTH or objects > MAX_OBJECTS:
            raise ValueError(f"it has more than {MAX_DEPTH} levels or {MAX_OBJECTS:,} objects")
        first = number("B")
        if first < 0x80 or first >= 0xe0:
            return first if first < 0x80 else first - 0x100
        if first in (0xc0, 0xc2, 0xc3):
            return {0xc0: None, 0xc2: False, 0xc3: True}[first]
        if first == 0xc1:
            raise ValueError(f"byte {position - 1:,} is {first:#x}, which begins nothing")
        if first < 0xc0:
            kind, length = (("map", first & 15) if first < 0x90 else ("array", first & 15) if first < 0xa0
                            else ("str", first & 31))
        else:
            kind, code = MSGPACK[first - 0xc4]
            length = 1 << first - 0xd4 if code == "-" else number(code)
        if kind == "number":
            return length
        if kind == "ext":
            return read_ext(length, depth)
        if kind == "map":
            return read_map(length, depth)
        if kind == "array":
            return [read(depth + 1) for _ in range(length)]
        return take(length) if kind == "bin" else str(take(length), "utf-8")

    whole = read(0)
    if position != len(view):
        raise ValueError(f"{len(view) - position:,} bytes follow after its end")
    return whole


def read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of a safetensors file. Raises ValueError, in one line, for anything else."""
    if len(content) < 8:
        raise ValueError("it is shorter than a safetensors file")
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, MAX_HEADER):
        raise ValueError(f"a header of {length:,} bytes is announced, where {len(content) - 8:,} are left and "
                         f"{MAX_HEADER:,} allowed")
    try:
        header = json.loads(content[8:8 + length].decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no map of tensors")
    header.pop("__metadata__", None)
    data = memoryview(content)[8 + length:]
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int for x in offsets)
                and 0 <= offsets[0] <= offsets[1] <= len(data)):
            raise ValueError(f"tensor {name!r:.80} has no data_offsets inside the {len(data):,} bytes of data")
        if entry.get("dtype") != "F32":
            raise ValueError(f"tensor {name!r:.80} is of type {entry.get('dtype')!r:.20}, and must be F32")
    spans = sorted(entry["data_offsets"] for entry in header.values())
    if [start for start, _ in spans] + [len(data)] != [0] + [end for _, end in spans]:
        raise ValueError("its tensors do not fill its data exactly, one after the other")
    return {name: checked_array(data[slice(*entry["data_offsets"])], entry.get("shape"), "float32")
            for name, entry in header.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs of a JSON file. Raises ValueError for a name that it has twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


def velo_from_msgpack(content: bytes) -> dict[str, np.ndarray]:
    """VeLO's θ from its `params` (a map of params, gen_id and step) or `theta.state` (that map's params alone)."""
    tree = read_msgpack(content)
    if isinstance(tree, dict) and set(tree) == {"params", "gen_id", "step"}:
        tree = tree["params"]
    theta = {}

    def flatten(tree: Any, path: str) -> None:
        if isinstance(tree, np.ndarray):
            if path in theta:
                raise ValueError(f"it has {path!r:.80} twice")
            theta[path] = tree
        elif isinstance(tree, dict):
            if path == "lstm_init_state" and set(tree) == {"name", "fields", "values"}:  # flax before about 2022
                names, tree = {"0": "hidden", "1": "cell"}, tree["values"]
                tree = {names.get(k, k): x for k, x in tree.items()} if isinstance(tree, dict) else tree
            for key, x in tree.items() if isinstance(tree, dict) else [("values", tree)]:
                flatten(x, f"{path}/{key}" if path else key)
        else:
            raise ValueError(f"{path!r:.80} is neither a map nor an array")

    flatten(tree, "")
    return theta


def velo_from_pylo(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """VeLO's θ from the tensors of PyLO's VeLO_RNN and VeLO_MLP, whose matrices are transposed."""
    theta, tensors = {}, dict(tensors)

    def take(name: str, axes: int) -> np.ndarray:
        x = tensors.pop(name, None)
        if x is None:
            raise ValueError(f"it has no tensor {name!r}: VeLO needs the files of VeLO_RNN and of VeLO_MLP, so give "
                             "a folder that holds these two alone")
        if x.ndim != axes:
            raise ValueError(f"tensor {name!r} is {list(x.shape)}, and must have {axes} axes")
        return x

    for ours, theirs in (("hidden", "lstm_init_state.0"), ("cell", "lstm_init_state.1")):
        theta[f"lstm_init_state/{ours}"] = take(theirs, 2)
    for theirs, ours in PYLO_LAYERS.items():
        theta[f"rnn_params/{ours}/w"] = take(f"{theirs}.weight", 2).T
        theta[f"rnn_params/{ours}/b"] = take(f"{theirs}.bias", 1)
    w0 = take("input_weights_", 3).swapaxes(1, 2)  # [K, 30, 4]
    for i, part in enumerate(np.split(w0, np.cumsum(block_sizes(element_inputs))[:-1], 1)):
        theta[f"ff_mod_stack/~/w0__{i}"] = part
    for theirs, ours in PYLO_BANK.items():
        x = take(theirs, 2 if "bias" in theirs else 3)
        theta[f"ff_mod_stack/~/{ours}"] = x if "bias" in theirs else x.swapaxes(1, 2)
    if unknown := set(tensors) - {name.replace("_.", ".").removesuffix("_") for name in ("input_weights_", *PYLO_BANK)}:
        raise ValueError(f"it has a tensor {min(unknown)!r:.80}, which VeLO has not")
    return {name: np.ascontiguousarray(x) for name, x in theta.items()}


def mulo_from_pylo(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' μLO's θ from the tensors of its file, whose matrices are transposed, and from its known decays."""
    names = ["input", *(f"linear_{i}" for i in range(len(tensors) // 2 - 2)), "output"]
    if set(tensors) != {f"network.{name}.{kind}" for name in names for kind in ("weight", "bias")}:
        raise ValueError(f"its tensors are not those of μLO: {str(sorted(tensors)):.120}")
    theta = {name: np.asarray(x, np.float32) for name, x in PUBLISHED_MULO_DECAYS.items()}
    for i, name in enumerate(names):
        theta |= {f"w{i}": np.ascontiguousarray(tensors[f"network.{name}.weight"].T),
                  f"b{i}": tensors[f"network.{name}.bias"]}
    return theta


def is_published_layout(content: bytes) -> bool:
    """Whether a file begins as a safetensors file or as a map of msgpack."""
    return content[8:9] == b"{" or content[:1] in {*(bytes([0x80 | n]) for n in range(16)), b"\xde", b"\xdf"}


def published_theta(contents: list[bytes]) -> tuple[str, dict[str, np.ndarray]]:
    """The architecture and θ of one published file, or of the two of VeLO_RNN and VeLO_MLP.

    Raises ValueError, in one line, for anything else.
    """
    if not any(content[8:9] == b"{" for content in contents):
        return "velo", velo_from_msgpack(contents[0])
    tensors = {}
    for content in contents:
        arrays = read_safetensors(content)
        if both := set(tensors) & set(arrays):
            raise ValueError(f"two of its files have a tensor {min(both)!r:.80}")
        tensors |= arrays
    if any(name.startswith("network.") for name in tensors):
        return "small_fc_lopt", mulo_from_pylo(tensors)
    return "velo", velo_from_pylo(tensors)


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
        tensors.append(statistics(state.averages[0], g, weights, t))
        plain = -plain_update(features, learned, tensors[-1])
        lines.append(f"  {t:4}{loss:9.4f}{rms(updates):13.6f}{jnp.max(jnp.abs(updates - plain)):14.1e}")
        weights = apply_updates(weights, updates)
    print(f"The {feature_count()} features of a 6 × 8 weight matrix in least squares.")
    print(f"RMS at steps 0 and {steps - 1}; smallest and largest entry at step {steps - 1} as the MLP sees them.")
    print("Those that depend on the step t alone are not divided by their RMS.\n")
    print(f"  {'feature':20}{'shape':>12}{'RMS, 0':>11}{f'RMS, {steps - 1}':>11}{'smallest':>10}{'largest':>10}")
    for first, last in zip(features(tensors[0]), features(tensors[-1])):
        for i, (a, b, seen) in enumerate(zip(first.values, last.values, normalise(last)), start=1):
            name = f"{last.name}, {i}" if len(last.values) > 1 else last.name
            shape = " × ".join(map(str, b.shape))
            print(f"  {name:20}{shape:>12}{rms(a):11.4g}{rms(b):11.4g}{jnp.min(seen):10.3f}{jnp.max(seen):10.3f}")
    print("\nθ, fresh and not meta-trained, maps them to d and s; the update is −step_mult · d · exp(exp_mult · s).")
    print("Last column: its largest difference from the definition, `plain_update`.\n")
    print(f"  {'step':>4}{'loss':>9}{'RMS update':>13}{'difference':>14}")
    print("\n".join(lines))


def convert(source: str, target: str) -> None:
    """Makes a file of ours of published weights: `python lopt.py convert IN OUT.npz`."""
    learned = load(source)
    save(target, learned)
    print(f"{source}: {learned.architecture}, {learned.made.get('published', 'a file of ours')}\nwrote {target}")


if __name__ == "__main__":
    prepare_to_print()
    if len(sys.argv) == 4 and sys.argv[1] == "convert":
        try:
            convert(*sys.argv[2:])
        except ValueError as error:
            print(f"lopt.py: error: {error}", file=sys.stderr)
            sys.exit(2)
    elif len(sys.argv) > 1:
        print("usage: python lopt.py [convert IN OUT.npz]", file=sys.stderr)
        sys.exit(2)
    else:
        main()
