"""Optimizers: the small MLP learned optimizer, AdamW, and θ on disk.

    python lopt.py       the 39 features of one weight matrix over a few steps, and the update they give (10 s)

Both optimizers are a pair of pure functions, as in optax: `init(params) -> state` and
`update(grads, state, params) -> (updates, state)`, applied by `params + updates` on any pytree of arrays.

The learned optimizer is small_fc_lopt. From each weight's gradient g, its value p and three kinds of decaying
averages it builds 39 features, and an MLP of 39 → 32 → 32 → 2 with weights θ, the same for all weights of a
network, turns them into a direction d and a log-magnitude s:

    update = step_mult · d · exp(exp_mult · s),      p ← p − update_multiplier · update

Sources: small_fc_lopt (arXiv 2203.11860), Adafactor (arXiv 1804.04235) for the factored second moments,
μLO (arXiv 2406.00153) for the update multiplier.

Dimensions: 3 the decays of one kind of average, F features, H hidden units of the MLP. A weight tensor with two
or more axes is seen as [O, A, B]: A and B are its two largest axes in the order in which they stand, O all others
together. A tensor with fewer axes is seen as [n] and is not factored.
"""

import hashlib
import io
import json
import math
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Tree = Any  # a pytree of arrays

HIDDEN = 32
THETA_SHAPES = {"w0": (39, HIDDEN), "b0": (HIDDEN,), "w1": (HIDDEN, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, 2),
                "b2": (2,), "momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}

MOMENTUM_BETAS = (0.9, 0.99, 0.999)
RMS_BETAS = (0.999,)
ADAFACTOR_BETAS = (0.9, 0.99, 0.999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)

# Rows of w0 by what the features vary along (numbers as in small_fc_lopt's table of features): 16 differ for every
# weight; for factored tensors 6 come from r_i alone, 6 from c_i alone; 11 depend on the step only.
PER_WEIGHT = np.r_[0, 1, 5, 9, 2:5, 6:9, 10:13, 25:28]
FROM_R = np.r_[13:16, 19:22]
FROM_C = np.r_[16:19, 22:25]
FROM_STEP = np.r_[28:39]

# How many weights, summed over all networks that are updated side by side, go through the MLP at once. On a CPU
# their activations then stay in the L2 cache (1.5 times faster than whole tensors); on a GPU it bounds the memory.
CHUNK = {"cpu": 4096}
CHUNK_ACCELERATOR = 2**20


class Optimizer(NamedTuple):
    """init(params) → state; update(grads, state, params) → (updates, state); then params + updates."""
    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf."""
    return jax.tree.map(jnp.add, params, updates)


# ---------------------------------------------------------------------------------------------------------
# small_fc_lopt: the learned optimizer


class Averages(NamedTuple):
    """One tensor's state. Not factored: m [3, n], v [n], r = the averages a_i [3, n], c is None.

    Factored: m [3, O, A, B], v [O, A, B]; r, the mean over the largest axis, and c, the mean over the second largest,
    keep that axis with length 1, so that they broadcast against [3, O, A, B].
    """
    m: Array
    v: Array
    r: Array
    c: Array | None


class LearnedOptimizerState(NamedTuple):
    """step: int32, updates made so far. averages: one `Averages` for each leaf of the params."""
    step: Array
    averages: tuple[Averages, ...]


def init_theta(key: Array) -> dict[str, Array]:
    """Fresh θ: MLP weights N(0, 1/fan_in) truncated at 2σ, biases 0, decay offsets 0."""
    keys = dict(zip(("w0", "w1", "w2"), jax.random.split(key, 3)))
    return {name: jax.random.truncated_normal(keys[name], -2.0, 2.0, shape) / np.sqrt(shape[0])
            if name in keys else jnp.zeros(shape) for name, shape in THETA_SHAPES.items()}


def theta_from_vector(vector: Array) -> dict[str, Array]:
    """θ from the vector [P] of all its numbers, its arrays one after the other in the order of their names."""
    names = sorted(THETA_SHAPES)
    parts = jnp.split(vector, np.cumsum([math.prod(THETA_SHAPES[name]) for name in names])[:-1])
    return {name: part.reshape(THETA_SHAPES[name]) for name, part in zip(names, parts)}


def decays(betas: tuple[float, ...], offset: Array) -> Array:
    """small_fc_lopt's trainable decays: β = 1 − exp(10·(ln(1−β₀)/10 + offset)), shape of offset."""
    return 1.0 - jnp.exp(10.0 * (np.log(1.0 - np.asarray(betas, np.float32)) / 10.0 + offset))


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(d0, d1), the largest and the second largest axis (of equals the later is d0), or None below 2 axes."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape, kind="stable")
    return int(order[-1]), int(order[-2])


def _view(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """x as [O, A, B] (or [n]), and the function that undoes it."""
    axes = factored_axes(x.shape)
    if axes is None:
        return x.reshape(-1), lambda y: y.reshape(x.shape)
    order = [i for i in range(x.ndim) if i not in axes] + sorted(axes)
    moved = x.transpose(order)
    back = [int(i) for i in np.argsort(order)]
    return moved.reshape(-1, *moved.shape[-2:]), lambda y: y.reshape(moved.shape).transpose(back)


def _largest(view: Array) -> tuple[int, int]:
    """(d0, d1) of a tensor seen as [O, A, B]."""
    return (-2, -1) if view.shape[-2] > view.shape[-1] else (-1, -2)


def _init_averages(x: Array) -> Averages:
    view, _ = _view(x)
    if view.ndim == 1:
        return Averages(jnp.zeros((3, view.size)), jnp.zeros(view.size), jnp.zeros((3, view.size)), None)
    mean_over = lambda axis: jnp.zeros((3, *[1 if i == axis else n for i, n in zip((-3, -2, -1), view.shape)]))
    d0, d1 = _largest(view)
    return Averages(jnp.zeros((3, *view.shape)), jnp.zeros(view.shape), mean_over(d0), mean_over(d1))


def _along(beta: Array, x: Array) -> Array:
    """Decays [3] with as many trailing axes of length 1 as x [..., ] has, so that they broadcast to [3, ...]."""
    return beta.reshape(beta.shape + (1,) * x.ndim)


def update_averages(theta: dict[str, Array], averages: Averages, g: Array) -> Averages:
    """The decaying averages after a gradient g, seen as [O, A, B] or [n] (small_fc_lopt; no bias correction).

    m_i ← β m_i + (1−β) g;   v ← β v + (1−β) g²;   not factored: a_i ← β a_i + (1−β)(g² + 1e-30);
    factored: r_i ← β r_i + (1−β) mean_d0(g² + 1e-30),   c_i ← β c_i + (1−β) mean_d1(g² + 1e-30).
    """
    decay = lambda beta, old, new: beta * old + (1.0 - beta) * new
    momentum = _along(decays(MOMENTUM_BETAS, theta["momentum_decays"]), g)
    rms = jnp.clip(decays(RMS_BETAS, theta["rms_decays"]), 0.0, 1.0)[0]
    adafactor = _along(jnp.clip(decays(ADAFACTOR_BETAS, theta["adafactor_decays"]), 0.0, 1.0), g)
    m, v = decay(momentum, averages.m, g), decay(rms, averages.v, g * g)
    square = g * g + 1e-30
    if averages.c is None:
        return Averages(m, v, decay(adafactor, averages.r, square), None)
    d0, d1 = _largest(g)
    return Averages(m, v, decay(adafactor, averages.r, jnp.mean(square, d0, keepdims=True)),
                    decay(adafactor, averages.c, jnp.mean(square, d1, keepdims=True)))


def _rsqrt_plus(x: Array) -> Array:
    """rsqrt₊(x) = rsqrt(max(x, 1e-9))."""
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def _factors(averages: Averages, d0: int, d1: int) -> tuple[Array, Array]:
    """Adafactor's ρ_i = rsqrt₊(r_i / (mean_d1 r_i + 1e-9)) and κ_i = rsqrt₊(c_i), shaped as r and c."""
    r, c = averages.r, averages.c
    return _rsqrt_plus(r / (jnp.mean(r, d1, keepdims=True) + 1e-9)), _rsqrt_plus(c)


def _per_weight_features(g, p, m, v, g_scale, m_scale) -> Array:
    """The 16 features of PER_WEIGHT [16, ...]: of g, p, v [...], m [3, ...]; the scales [3, ...] multiply g and m.

    Concatenated from ten parts, since XLA fuses up to eight of them into one loop, eight times slower on a CPU.
    """
    rsqrt_v = lax.rsqrt(v + 1e-6)
    return jnp.concatenate([g[None], p[None], v[None], rsqrt_v[None], m, m * rsqrt_v,
                            *[(g * scale)[None] for scale in g_scale], m * m_scale])


def _normalise(x: Array) -> Array:
    """Features [F, ...], each divided by its RMS over the whole tensor: x · rsqrt(1e-5 + mean x²)."""
    return x * lax.rsqrt(1e-5 + jnp.mean(x * x, axis=tuple(range(1, x.ndim)), keepdims=True))


def step_features(step: Array) -> Array:
    """Features 28–38: tanh(t/τ − 1) for the 11 timescales τ; t = 0 at the first step."""
    return jnp.tanh(step / jnp.asarray(TIMESCALES, jnp.float32) - 1.0)


def _mlp_tail(theta: dict[str, Array], hidden: Array, step_mult, exp_mult) -> Array:
    """From the first layer's pre-activations [H, n] to step_mult · d · exp(exp_mult · s) [n]."""
    hidden = theta["w1"].T @ jax.nn.relu(hidden) + theta["b1"][:, None]  # (H, n)
    d, s = theta["w2"].T @ jax.nn.relu(hidden) + theta["b2"][:, None]  # (2, n)
    return step_mult * d * jnp.exp(exp_mult * s)


def _update_unfactored(theta, averages: Averages, g, p, from_step, step_mult, exp_mult) -> Array:
    """The update of a tensor seen as [n]: all of the features 0–27 differ for every weight."""
    m, v, a = averages.m, averages.v, averages.r
    per_weight = _per_weight_features(g, p, m, v, _rsqrt_plus(a + 1e-9), lax.rsqrt(a + 1e-6))
    x = _normalise(jnp.concatenate([per_weight, a, lax.rsqrt(a + 1e-8)]))  # (22, n): a stands for r and for c
    w0 = jnp.concatenate([theta["w0"][PER_WEIGHT], theta["w0"][FROM_R] + theta["w0"][FROM_C]])  # (22, H)
    return _mlp_tail(theta, w0.T @ x + from_step, step_mult, exp_mult)


def _update_factored(theta, averages: Averages, g, p, from_step, step_mult, exp_mult, chunk: int) -> Array:
    """The update of a tensor seen as [O, A, B].

    Two identities save most of the first layer. Features that vary along one axis only are multiplied by their rows
    of w0 once for each place on that axis, and added by broadcasting: 16 of 39 inputs remain for each weight. And
    dividing by the RMS commutes into the weights: (x·s) W = x (s[:, None] W).

    The 16 features are built twice, for the RMS and for the MLP, a few rows of the tensor at a time: building them
    again costs less than to write 64 bytes per weight to memory and to read them back.
    """
    d0, d1 = _largest(g)
    rho, kappa = _factors(averages, d0, d1)
    along_a, along_b = (rho, kappa) if d0 == -1 else (kappa, rho)  # (3, O, A, 1), (3, O, 1, B)
    others, rows, columns = g.shape
    rows_at_once = max(1, min(rows, chunk // (others * columns)))
    chunks = -(-rows // rows_at_once)

    def features(start):  # (16, O, a, B)
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, rows_at_once, -2, allow_negative_indices=False)
        scale = cut(along_a) * along_b
        return _per_weight_features(cut(g), cut(p), cut(averages.m), cut(averages.v), scale, scale), cut

    def start_of(i):  # the last chunk overlaps the one before where rows_at_once does not divide rows
        return jnp.minimum(i * rows_at_once, rows - rows_at_once)

    def add_squares(i, total):
        x, _ = features(start_of(i))
        if rows % rows_at_once:
            is_new = start_of(i) + jnp.arange(rows_at_once) >= i * rows_at_once
            x = jnp.where(is_new[:, None], x, 0.0)
        return total + jnp.sum(x * x, axis=(1, 2, 3))

    squares = lax.fori_loop(0, chunks, add_squares, jnp.zeros(len(PER_WEIGHT)))
    w0 = (theta["w0"][PER_WEIGHT] * lax.rsqrt(1e-5 + squares / g.size)[:, None]).T  # (H, 16)

    def hidden_from(rows_of_w0, x):  # (H, O, A, 1) or (H, O, 1, B)
        x = _normalise(jnp.concatenate([x, lax.rsqrt(x + 1e-8)]))
        return jnp.einsum("fh,foab->hoab", theta["w0"][rows_of_w0], x)

    from_r, from_c = hidden_from(FROM_R, averages.r), hidden_from(FROM_C, averages.c)
    from_a, from_b = (from_r, from_c) if d0 == -1 else (from_c, from_r)
    from_a = from_a + from_step[:, :, None, None]
    # The term of the columns is laid out once for a whole chunk: XLA's loop then adds it four times faster.
    from_b = jnp.broadcast_to(from_b, (HIDDEN, others, rows_at_once, columns))

    def write_update(i, update):
        x, cut = features(start_of(i))
        hidden = (w0 @ x.reshape(len(x), -1)).reshape(HIDDEN, *x.shape[1:]) + from_b + cut(from_a)  # (H, O, a, B)
        step = _mlp_tail(theta, hidden.reshape(HIDDEN, -1), step_mult, exp_mult).reshape(x.shape[1:])
        return lax.dynamic_update_slice_in_dim(update, step, start_of(i), -2, allow_negative_indices=False)

    return lax.fori_loop(0, chunks, write_update, jnp.zeros_like(g))


def learned_optimizer(theta: dict[str, Array], *, step_mult: float, exp_mult: float = 0.001,
                      update_multipliers: Tree | None = None, gradient_multiplier: float = 1.0,
                      chunk: int | None = None) -> Optimizer:
    """small_fc_lopt with weights θ, as an optax-style pair.

    theta: arrays of THETA_SHAPES. update_multipliers: a tree like the params, of numbers (μP update multipliers;
    default 1). gradient_multiplier: of all gradients, before anything else. chunk: weights that go through the MLP at
    once (default: CHUNK of the backend); when R networks are updated side by side by vmap, divide it by R. Raises
    ValueError when θ is not of THETA_SHAPES.
    """
    shapes = {name: np.shape(value) for name, value in theta.items()}
    if shapes != THETA_SHAPES:
        raise ValueError(f"theta has not the arrays of small_fc_lopt: got {shapes}, need {THETA_SHAPES}")
    chunk = default_chunk() if chunk is None else chunk

    def init(params: Tree) -> LearnedOptimizerState:
        return LearnedOptimizerState(jnp.zeros((), jnp.int32),
                                     tuple(_init_averages(p) for p in jax.tree.leaves(params)))

    def update(grads: Tree, state: LearnedOptimizerState, params: Tree) -> tuple[Tree, LearnedOptimizerState]:
        leaves, treedef = jax.tree.flatten(params)
        multipliers = [1.0] * len(leaves) if update_multipliers is None else treedef.flatten_up_to(update_multipliers)
        from_step = (step_features(state.step) @ theta["w0"][FROM_STEP] + theta["b0"])[:, None]  # (H, 1)
        updates, averages = [], []
        for g, p, old, multiplier in zip(treedef.flatten_up_to(grads), leaves, state.averages, multipliers):
            g = gradient_multiplier * jnp.where(jnp.isfinite(g), g, 0.0)
            (g, restore), (p, _) = _view(g), _view(p)
            new = update_averages(theta, old, g)
            step = (_update_unfactored(theta, new, g, p, from_step, step_mult, exp_mult) if new.c is None else
                    _update_factored(theta, new, g, p, from_step, step_mult, exp_mult, chunk))
            updates.append(restore(-multiplier * step))
            averages.append(new)
        return treedef.unflatten(updates), LearnedOptimizerState(state.step + 1, tuple(averages))

    return Optimizer(init, update)


def default_chunk(networks: int = 1) -> int:
    """Weights of each of so many networks, updated side by side, that go through the MLP at once.

    At most half of CHUNK for one network: XLA splits longer matrix products over a CPU's threads, which costs more
    than it gains.
    """
    return max(1, CHUNK.get(jax.default_backend(), CHUNK_ACCELERATOR) // max(networks, 2))


# ---------------------------------------------------------------------------------------------------------
# AdamW: the meta-optimizer, and the baseline in SP (AdamW) and in μP (μAdam)


class AdamState(NamedTuple):
    """step: int32, updates made so far; m, v: trees like the params."""
    step: Array
    m: Tree
    v: Tree


def adamw(learning_rate: float | Array | Callable[[Array], Array], *, b1: float = 0.9, b2: float = 0.999,
          eps: float = 1e-8, weight_decay: float = 0.0, update_multipliers: Tree | None = None) -> Optimizer:
    """AdamW, decoupled weight decay: u = −η · multiplier · (m̂/(√v̂ + ε) + weight_decay · p), m̂ = m/(1−β₁ᵗ).

    learning_rate: η, or a function of the number of updates made before. With μP's update_multipliers and no weight
    decay this is μAdam (TP5, Table 8).
    """
    def init(params: Tree) -> AdamState:
        return AdamState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params),
                         jax.tree.map(jnp.zeros_like, params))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        eta = learning_rate(state.step) if callable(learning_rate) else learning_rate
        step = state.step + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.v, grads)
        correct1, correct2 = 1.0 - b1 ** step.astype(jnp.float32), 1.0 - b2 ** step.astype(jnp.float32)
        multipliers = update_multipliers if update_multipliers is not None else jax.tree.map(lambda p: 1.0, params)
        updates = jax.tree.map(
            lambda m, v, p, c: -eta * c * (m / correct1 / (jnp.sqrt(v / correct2) + eps) + weight_decay * p),
            m, v, params, multipliers)
        return updates, AdamState(step, m, v)

    return Optimizer(init, update)


def warmup_cosine(initial: float, peak: float, final: float, warmup_steps: int,
                  decay_steps: int) -> Callable[[Array], Array]:
    """Linear warm-up from initial to peak over warmup_steps, then a cosine to final at step decay_steps."""
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
    """The tree scaled so that its global norm is at most limit."""
    norm = global_norm(tree)
    return jax.tree.map(lambda x: jnp.where(norm > limit, x / norm * limit, x), tree)


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
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error.strerror}); free some space or choose another "
                         "place") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
        if checksum and hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
            raise ValueError(f"{path}: is damaged (its checksum does not match)")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > max_bytes:
                raise ValueError(f"{path}: unpacks to more than the {max_bytes:,} bytes expected")
            arrays = {}
            for member in archive.infolist():
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else
                         f"{path}: holds something else than plain arrays ({message})".replace("\n", " ")) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError, MemoryError,
            SyntaxError, struct.error) as error:
        raise ValueError(f"{path}: is no .npz file, or is damaged ({error})".replace("\n", " ")) from None


MAX_THETA_BYTES = 1 << 20


def save_theta(path: str | os.PathLike, theta: dict[str, Array], **metadata: Any) -> None:
    """Writes θ as an .npz: its arrays, and the metadata (whatever JSON can hold) under the name `metadata`.

    metadata should say step_mult, exp_mult, the parametrization with its multipliers (`mup.Parametrization`; 1 if not
    said), and how θ was meta-trained.
    """
    arrays = {name: np.asarray(theta[name], np.float32) for name in THETA_SHAPES}
    write_npz(path, {**arrays, "metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})


def load_theta(path: str | os.PathLike) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reads what `save_theta` wrote: (θ, metadata). Raises ValueError, in one line, for a file that is no such θ."""
    arrays = read_npz(path, MAX_THETA_BYTES)
    if missing := [name for name in (*THETA_SHAPES, "metadata") if name not in arrays]:
        raise ValueError(f"{path}: is no θ of small_fc_lopt: it has no array {missing[0]!r}")
    try:
        metadata = json.loads(arrays.pop("metadata").tobytes())
        multipliers = [float(metadata["step_mult"]), float(metadata["exp_mult"]),
                       *[float(metadata.get(name, 1.0)) for name in ("input_mult", "output_mult", "hidden_lr_mult")]]
        known = metadata["parametrization"] in ("mup", "sp") and 0 <= float(metadata.get("base_width", 0)) < np.inf
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its metadata do not give step_mult, exp_mult and parametrization "
                         f"({error})") from None
    if not known or not np.isfinite(multipliers).all():
        raise ValueError(f"{path}: its metadata have an unknown parametrization or base width, or a multiplier that is "
                         "not finite")
    for name, shape in THETA_SHAPES.items():
        value = arrays[name]
        if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} must be finite float32 {list(shape)}, but is {value.dtype} "
                             f"{list(value.shape)}" + ("" if np.issubdtype(value.dtype, np.floating) and
                                                       np.isfinite(value).all() else " with entries that are not"))
    return {name: jnp.asarray(arrays[name]) for name in THETA_SHAPES}, metadata


# ---------------------------------------------------------------------------------------------------------
# Demonstration

FEATURE_NAMES = ("g", "p", *(f"m{i}" for i in "123"), "v", *(f"m{i} rsqrt(v+1e-6)" for i in "123"),
                 "rsqrt(v+1e-6)", *(f"g ρ{i} κ{i}" for i in "123"),
                 *(f"r{i}" for i in "123"), *(f"c{i}" for i in "123"),
                 *(f"rsqrt(r{i}+1e-8)" for i in "123"), *(f"rsqrt(c{i}+1e-8)" for i in "123"),
                 *(f"m{i} ρ{i} κ{i}" for i in "123"), *(f"tanh(t/{int(tau)}−1)" for tau in TIMESCALES))


def raw_features(averages: Averages, g: Array, p: Array) -> Array:
    """Features 0–27 before their division by the RMS, from their definitions: g, p [O, A, B] or [n] → [28, ...].

    averages: those that already contain g. `learned_optimizer` computes the same and never builds this array.
    """
    m, v = averages.m, averages.v
    rsqrt_plus = lambda x: 1.0 / jnp.sqrt(jnp.maximum(x, 1e-9))
    if averages.c is None:
        r = c = averages.r
        g_scale, m_scale = rsqrt_plus(r + 1e-9), 1.0 / jnp.sqrt(r + 1e-6)
    else:
        r, c = averages.r, averages.c
        d1 = -2 if g.shape[-2] <= g.shape[-1] else -1  # r's mean was over the largest axis d0, the later of equals
        g_scale = m_scale = rsqrt_plus(r / (jnp.mean(r, d1, keepdims=True) + 1e-9)) * rsqrt_plus(c)
    rsqrt_v = 1.0 / jnp.sqrt(v + 1e-6)
    blocks = [g[None], p[None], m, v[None], m * rsqrt_v, rsqrt_v[None], g * g_scale, r, c,
              1.0 / jnp.sqrt(r + 1e-8), 1.0 / jnp.sqrt(c + 1e-8), m * m_scale]
    return jnp.concatenate([jnp.broadcast_to(x, (len(x), *g.shape)) for x in blocks])


def features(averages: Averages, g: Array, p: Array, step: Array) -> Array:
    """The 39 inputs of small_fc_lopt's MLP, from their definitions: g, p [O, A, B] or [n] → [39, ...]."""
    raw = raw_features(averages, g, p)
    mean_square = jnp.mean(raw**2, axis=tuple(range(1, raw.ndim)), keepdims=True)
    of_step = jnp.tanh(step / jnp.asarray(TIMESCALES, jnp.float32) - 1.0)
    of_step = jnp.broadcast_to(of_step.reshape(-1, *(1,) * g.ndim), (len(TIMESCALES), *g.shape))
    return jnp.concatenate([raw / jnp.sqrt(1e-5 + mean_square), of_step])


def main() -> None:
    """Prints the features of a weight matrix during five steps of least squares, and what f_θ makes of them."""
    keys = jax.random.split(jax.random.key(0), 4)
    theta, step_mult, exp_mult = init_theta(keys[0]), 0.01, 0.001
    weights = 0.5 * jax.random.normal(keys[1], (6, 8))
    x, target = jax.random.normal(keys[2], (32, 6)), jax.random.normal(keys[3], (32, 8))
    loss = lambda w: jnp.mean((x @ w - target) ** 2)
    optimizer = learned_optimizer(theta, step_mult=step_mult, exp_mult=exp_mult)
    state, update, value_and_grad = optimizer.init(weights), jax.jit(optimizer.update), jax.value_and_grad(loss)
    steps, seen, raws, lines = 5, [], [], []
    for t in range(steps):
        before, g = value_and_grad(weights)
        updates, state = update(g, state, weights)
        seen.append(features(state.averages[0], g[None], weights[None], t)[:, 0])  # (39, A, B)
        raws.append(raw_features(state.averages[0], g[None], weights[None])[:, 0])  # (28, A, B)
        hidden = jax.nn.relu(jnp.einsum("fab,fh->abh", seen[-1], theta["w0"]) + theta["b0"])
        d, s = jnp.moveaxis(jax.nn.relu(hidden @ theta["w1"] + theta["b1"]) @ theta["w2"] + theta["b2"], -1, 0)
        naive = -step_mult * d * jnp.exp(exp_mult * s)
        rms = lambda y: float(jnp.sqrt(jnp.mean(y**2)))
        lines.append(f"  {t:4}{before:9.4f}{rms(d):9.4f}{rms(s):9.4f}{rms(updates):13.6f}"
                     f"{jnp.max(jnp.abs(updates - naive)):14.1e}")
        weights = apply_updates(weights, updates)
    print("The 39 features of a 6 × 8 weight matrix in least squares (r: a number for each row, c: for each column).")
    print(f"RMS at steps 0 and {steps - 1}; smallest and largest entry at step {steps - 1} after division by the RMS.")
    print("Features 28–38 are not divided: they depend on the step t alone, and their values are shown.\n")
    print(f"  {'#':>2} {'feature':22}{'RMS, 0':>11}{f'RMS, {steps - 1}':>11}{'smallest':>10}{'largest':>10}")
    for i, name in enumerate(FEATURE_NAMES):
        first, last = (rms(raws[t][i]) if i < 28 else seen[t][i, 0, 0] for t in (0, -1))
        print(f"  {i:2} {name:22}{first:11.4g}{last:11.4g}{jnp.min(seen[-1][i]):10.3f}"
              f"{jnp.max(seen[-1][i]):10.3f}")
    print("\nθ, fresh and not meta-trained, maps them to d and s; the update is −step_mult · d · exp(exp_mult · s).")
    print("Last column: its largest difference from the MLP applied to all 39 features of each weight.\n")
    print(f"  {'step':>4}{'loss':>9}{'RMS d':>9}{'RMS s':>9}{'RMS update':>13}{'difference':>14}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
