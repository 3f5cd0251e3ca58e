"""Inner tasks: networks that learned optimizers train, on data sets that stay on the device.

    python tasks.py      data sets, how networks learn one of them, a coordinate check of Adam (40 s)

A `Task` ties a network to a data set, in μP or in the standard parametrization (SP). Each weight of
a network is declared once as a `mup.Weight`, and all else (initialisation, forward multipliers,
update multipliers) follows from its declaration. A task is a record of pure functions, made to be
called inside a jitted step: batches are drawn there from a key, so that the data set travels to the
device once.

Sources: μLO (arXiv 2406.00153) for the inner tasks, TP5 = "Tensor Programs V" (arXiv 2203.03466) for
the coordinate check.

Dimensions: M examples of a split, B batch, H height and width of an image, C channels, D pixels of
an image (H·H·C), W width, V classes or vocabulary, L tokens of a sequence, A attention heads, S size
of a head (W = A·S), P side of a patch.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import io
import math
import operator
import os
import pathlib
import re
import signal
import sys
import tarfile
import types
import typing
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import lopt
import mup
from mup import Array, Parametrization, Tree, Weight

# --------------------------------------------------------------------------------------------------
# Records


class Split(NamedTuple):
    """One part of a data set, on the device: inputs uint8 [M, H, H, C] and labels int32 [M].

    Text: inputs are rows of tokens [M, L], uint8, uint16 or int32 as the vocabulary needs, and labels
    are empty [0].
    """
    inputs: Array
    labels: Array


class Dataset(NamedTuple):
    """A data set. classes: how many, or the size of the vocabulary. mean, std: the mean and standard
    deviation of each channel, of pixels scaled to [0, 1], with which images are standardised."""
    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split | None


class Network(NamedTuple):
    """weights: a tree of `mup.Weight`s. forward(params, inputs) → (logits, {layer: pre-activations})
    with the layers in their order. parametrization: the one that forward is written in."""
    weights: Tree
    forward: Callable[[Tree, Array], tuple[Array, dict[str, Array]]]
    parametrization: Parametrization


class Task(NamedTuple):
    """An inner problem as pure functions.

    init(key) → params. sample(key, split) → (inputs, labels), a batch of the task's batch size.
    forward(params, inputs) → (logits, {layer: pre-activations}).
    loss(params, batch) → mean cross-entropy in nats (scalar).
    test(params, split) → (loss, accuracy) on the first examples of a split.
    max_loss: 1.5 ln(classes), at which the meta-loss is cut. weights: the declarations.
    """
    name: str
    weights: Tree
    parametrization: Parametrization
    max_loss: float
    init: Callable[[Array], Tree]
    sample: Callable[[Array, Split], tuple[Array, Array]]
    forward: Callable[[Tree, Array], tuple[Array, dict[str, Array]]]
    loss: Callable[[Tree, tuple[Array, Array]], Array]
    test: Callable[[Tree, Split], tuple[Array, Array]]

    @property
    def update_multipliers(self) -> Tree:
        """The μP multiplier of every weight's update (all 1 in SP)."""
        return mup.update_multipliers(self.weights, self.parametrization)

    @property
    def gradient_multiplier(self) -> float:
        """The multiplier of a learned optimizer's gradients: 1 unless there is a base width."""
        return mup.gradient_multiplier(self.weights, self.parametrization)


# --------------------------------------------------------------------------------------------------
# Networks: the multi-layer perceptron


def mlp(inputs: int, classes: int, width: int, depth: int,
        parametrization: Parametrization) -> Network:
    """The multi-layer perceptron of μLO: `depth` hidden layers of `width` ReLU units and a read-out.

    It takes x [B, D], or images that have D pixels, and gives logits [B, V].
    """
    weights = {f"layer_{i}": mup.matrix("hidden", width, width) for i in range(depth)}
    weights["layer_0"] = mup.matrix("input", inputs, width)
    weights["logits"] = mup.matrix("output", width, classes)

    def forward(params: Tree, x: Array) -> tuple[Array, dict[str, Array]]:
        x, pre_activations = x.reshape(x.shape[0], -1), {}  # (B, D)
        for name in weights:
            x = mup.linear(weights[name], params[name], x, parametrization)  # (B, W), last (B, V)
            pre_activations[name] = x
            x = jax.nn.relu(x)
        return pre_activations["logits"], pre_activations

    return Network(weights, forward, parametrization)


# --------------------------------------------------------------------------------------------------
# Networks: transformers


class Transformer(NamedTuple):
    """What the blocks of a transformer have in common. width: a multiple of heads. causal: whether a
    token sees only itself and those before it. remat: keep only each block's input for the backward
    pass, and compute the rest of the block again there."""
    width: int
    depth: int
    heads: int
    parametrization: Parametrization
    causal: bool
    remat: bool


def layer_norm(params: dict[str, Array], x: Array) -> Array:
    """LayerNorm: each [W] to mean 0 and variance 1, then gain and shift: x [..., W] → [..., W]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred ** 2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["gain"] + params["shift"]


def attention(net: Transformer, weights: Tree, params: Tree, x: Array) -> tuple[Array, Array]:
    """Self-attention: x [B, L, W] → (output [B, L, W], attention logits [B, A, L, L]).

    softmax(q·k / S) v in μP, softmax(q·k / √S) v in SP. The logits are returned before the causal
    mask, finite everywhere, for the statistics of a coordinate check.
    """
    p, size = net.parametrization, net.width // net.heads
    q, k, v = (mup.linear(weights[name], params[name], x, p)
               .reshape(*x.shape[:2], net.heads, size) for name in "qkv")  # (B, L, A, S)
    logits = jnp.einsum("blas,bmas->balm", q, k) * mup.attention_scale(size, p)  # (B, A, L, L)
    visible = jnp.tri(x.shape[1], dtype=bool) if net.causal else True
    share = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
    mixed = jnp.einsum("balm,bmas->blas", share, v).reshape(x.shape)  # (B, L, W)
    return mup.linear(weights["o"], params["o"], mixed, p), logits


def block_weights(width: int) -> Tree:
    """Declares a transformer block: two norms, attention, and an MLP of 4 times the width."""
    return {"norm_1": mup.norm(width),
            "attention": {name: mup.matrix("hidden", width, width) for name in "qkvo"},
            "norm_2": mup.norm(width),
            "mlp": {"up": mup.matrix("hidden", width, 4 * width),
                    "down": mup.matrix("hidden", 4 * width, width)}}


def block(net: Transformer, weights: Tree, params: Tree, x: Array) -> tuple[Array, Array]:
    """A pre-LayerNorm block with GELU (its tanh form): x [B, L, W] → (x, attention logits)."""
    def linear(name: str, x: Array) -> Array:
        return mup.linear(weights["mlp"][name], params["mlp"][name], x, net.parametrization)

    mixed, attention_logits = attention(net, weights["attention"], params["attention"],
                                        layer_norm(params["norm_1"], x))
    x = x + mixed
    up = linear("up", layer_norm(params["norm_2"], x))  # (B, L, 4W)
    return x + linear("down", jax.nn.gelu(up, approximate=True)), attention_logits


def blocks(net: Transformer, weights: Tree, params: Tree,
           x: Array) -> tuple[Array, dict[str, Array]]:
    """All blocks, then the final LayerNorm: x [B, L, W] → (x [B, L, W], pre-activations)."""
    pre_activations = {}
    for name in [f"block_{i}" for i in range(net.depth)]:
        apply = functools.partial(block, net, weights[name])
        apply = jax.checkpoint(apply) if net.remat else apply
        x, pre_activations[f"{name}/attention_logits"] = apply(params[name], x)
        pre_activations[name] = x
    return layer_norm(params["norm"], x), pre_activations


def transformer(net: Transformer, classes: int, embeddings: Tree, embed: Callable[[Tree, Array], Array],
                read_from: Any = slice(None)) -> Network:
    """A network of embeddings, blocks and a read-out.

    embeddings: the weights of embed(params, inputs) → x [B, L, W]. read_from: the tokens of each
    sequence that are read out, all of them by default.
    """
    weights = {**embeddings,
               **{f"block_{i}": block_weights(net.width) for i in range(net.depth)},
               "norm": mup.norm(net.width), "logits": mup.matrix("output", net.width, classes)}

    def forward(params: Tree, inputs: Array) -> tuple[Array, dict[str, Array]]:
        x, pre_activations = blocks(net, weights, params, embed(params, inputs))
        logits = mup.linear(weights["logits"], params["logits"], x[:, read_from], net.parametrization)
        return logits, {**pre_activations, "logits": logits}

    return Network(weights, forward, net.parametrization)


def vit(net: Transformer, image_shape: tuple[int, int, int], classes: int, patch: int) -> Network:
    """The vision transformer: patches of P×P pixels and a class token, blocks, read-out from the token.

    It takes images [B, H, H, C] and gives logits [B, V]. input_mult multiplies every weight of the
    kind input: patch embedding, class token, position embeddings.
    """
    height, _, channels = image_shape
    side = height // patch  # patches along one side; L = 1 + side²
    weights = {"patch": mup.matrix("input", patch * patch * channels, net.width),
               "class_token": Weight("input", (net.width,), constant=0.0),
               "positions": Weight("input", (1 + side * side, net.width), std=0.02)}

    def embed(params: Tree, images: Array) -> Array:
        x = images.reshape(-1, side, patch, side, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, side * side, patch * patch * channels)  # (B, L−1, P·P·C)
        x = mup.linear(weights["patch"], params["patch"], x, net.parametrization)
        token = embedding(weights, params, "class_token", net.parametrization)
        token = jnp.broadcast_to(token, (x.shape[0], 1, net.width))
        x = jnp.concatenate([token, x], axis=1)  # (B, L, W)
        return x + embedding(weights, params, "positions", net.parametrization)

    return transformer(net, classes, weights, embed, read_from=0)


def transformer_lm(net: Transformer, vocabulary: int, sequence_length: int) -> Network:
    """The decoder-only language model: embeddings of tokens and positions, causal blocks, read-out.

    It takes tokens int [B, L] and gives logits [B, L, V]. input_mult multiplies both embeddings.
    """
    weights = {"tokens": Weight("input", (vocabulary, net.width), std=vocabulary ** -0.5),
               "positions": Weight("input", (sequence_length, net.width), std=0.02)}

    def embed(params: Tree, tokens: Array) -> Array:
        x = embedding(weights, params, "tokens", net.parametrization)[tokens]  # (B, L, W)
        return x + embedding(weights, params, "positions", net.parametrization)

    return transformer(net, vocabulary, weights, embed)


def embedding(weights: Tree, params: Tree, name: str, parametrization: Parametrization) -> Array:
    """An input weight whose rows are looked up or added, times its forward multiplier."""
    return mup.forward_multiplier(weights[name], parametrization) * params[name]


# --------------------------------------------------------------------------------------------------
# Tasks of networks


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−ln softmax(logits)[label], in nats: logits [..., V], labels int [...] → [...]."""
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_label


def cross_entropy_task(name: str, classes: int, network: Network, sample: Callable,
                       held_out: Callable, at_once: int) -> Task:
    """A `Task` that trains a network to give each label a high probability.

    sample: see `Task`. held_out(split) → (how many examples of it are tested, a function from the
    index of one to (inputs [1, …], labels [1, …])). at_once: examples that are tested side by side.
    """
    weights, forward, parametrization = network

    def init(key: Array) -> Tree:
        return mup.init(weights, key, parametrization)

    def loss(params: Tree, batch: tuple[Array, Array]) -> Array:
        inputs, labels = batch
        logits, _ = forward(params, inputs)
        return jnp.mean(cross_entropy(logits, labels))

    def test(params: Tree, split: Split) -> tuple[Array, Array]:
        count, example = held_out(split)

        def of_example(i):
            inputs, labels = example(i)
            logits, _ = forward(params, inputs)
            correct = jnp.argmax(logits, axis=-1) == labels
            return jnp.mean(cross_entropy(logits, labels)), jnp.mean(correct)

        losses, accuracies = jax.lax.map(of_example, jnp.arange(count), batch_size=at_once)
        return jnp.mean(losses), jnp.mean(accuracies)

    max_loss = 1.5 * math.log(classes)
    return Task(name, weights, parametrization, max_loss, init, sample, forward, loss, test)


def classification(name: str, dataset: Dataset, network: Network, batch_size: int) -> Task:
    """A `Task` that trains a network to classify the images of a data set. At most 10,000 are tested."""
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def examples(split: Split, at: Array) -> tuple[Array, Array]:
        images = split.inputs[at].astype(jnp.float32) / 255.0
        return (images - mean) / std, split.labels[at]

    def sample(key: Array, split: Split) -> tuple[Array, Array]:
        return examples(split, jax.random.randint(key, (batch_size,), 0, split.labels.shape[0]))

    def held_out(split: Split) -> tuple[int, Callable]:
        return min(split.labels.shape[0], 10_000), lambda i: examples(split, i[None])

    return cross_entropy_task(name, dataset.classes, network, sample, held_out, at_once=250)


def language_modelling(name: str, dataset: Dataset, network: Network, batch_size: int) -> Task:
    """A `Task` that trains a network to predict the next token; inputs are rows of tokens [M, L].

    A training window of L + 1 tokens may begin at any token, hence spans two rows; a test window is a
    row and the token that follows it. At most 2,000 rows are tested.
    """
    length = dataset.train.inputs.shape[1]

    def windows(split: Split, row: Array, offset: Array) -> tuple[Array, Array]:
        at = offset[:, None] + jnp.arange(length + 1)  # (B, L + 1), from the first token of the row
        tokens = split.inputs[row[:, None] + at // length, at % length].astype(jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]  # (B, L)

    def sample(key: Array, split: Split) -> tuple[Array, Array]:
        row_key, offset_key = jax.random.split(key)
        row = jax.random.randint(row_key, (batch_size,), 0, split.inputs.shape[0] - 1)
        return windows(split, row, jax.random.randint(offset_key, (batch_size,), 0, length))

    def held_out(split: Split) -> tuple[int, Callable]:
        begin = jnp.zeros(1, jnp.int32)
        return min(split.inputs.shape[0] - 1, 2_000), lambda i: windows(split, i[None], begin)

    return cross_entropy_task(name, dataset.classes, network, sample, held_out, at_once=50)


def mlp_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             parametrization: Parametrization = mup.MUP) -> Task:
    """An MLP of that width and depth on the images of a data set (μLO's first task)."""
    pixels = math.prod(dataset.train.inputs.shape[1:])
    network = mlp(pixels, dataset.classes, width, depth, parametrization)
    return classification(f"mlp-w{width}-d{depth}", dataset, network, batch_size)


def vit_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             parametrization: Parametrization = mup.MUP, *, heads: int | None = None,
             head_size: int = 32, patch: int = 4, remat: bool = False) -> Task:
    """A vision transformer on the images of a data set. heads: see `head_count`."""
    image_shape = dataset.train.inputs.shape[1:]
    if patch < 1 or image_shape[0] % patch:
        raise ValueError(f"patch {patch} does not divide the image size {image_shape[0]} of "
                         f"{dataset.name}")
    heads = head_count(width, heads, head_size)
    net = Transformer(width, depth, heads, parametrization, causal=False, remat=remat)
    network = vit(net, image_shape, dataset.classes, patch)
    return classification(f"vit-w{width}-d{depth}", dataset, network, batch_size)


def lm_task(dataset: Dataset, width: int, depth: int, batch_size: int,
            parametrization: Parametrization = mup.MUP, *, heads: int | None = None,
            head_size: int = 32, sequence_length: int | None = None, remat: bool = False) -> Task:
    """A decoder-only language model on the tokens of a data set, in rows of as many as were loaded.

    sequence_length: how many are expected; raises ValueError where the rows have others.
    """
    length = dataset.train.inputs.shape[1]
    if sequence_length not in (None, length):
        raise ValueError(f"sequence_length {sequence_length} differs from the rows of {length} tokens "
                         f"in which {dataset.name} was loaded: load it with the same sequence length")
    heads = head_count(width, heads, head_size)
    net = Transformer(width, depth, heads, parametrization, causal=True, remat=remat)
    network = transformer_lm(net, dataset.classes, length)
    return language_modelling(f"lm-w{width}-d{depth}", dataset, network, batch_size)


def head_count(width: int, heads: int | None, head_size: int) -> int:
    """The number of attention heads: `heads`, or else as many of head_size as the width holds."""
    asked = f"head_size {head_size}" if heads is None else f"heads {heads}"
    if heads is None:
        heads = max(1, width // head_size) if head_size >= 1 else 0
    if heads < 1 or width % heads:
        raise ValueError(f"{asked} does not fit width {width}: the heads must divide the width, and {heads} "
                         "do not")
    return heads


# --------------------------------------------------------------------------------------------------
# Inner training
#
# make_optimizer, here and below: a function from the planned number of steps to an optimizer. For a
# learned optimizer that is functools.partial(optimizer_for, task, learned).


def optimizer_for(task: Task, learned: lopt.Learned,
                  num_steps: int | Array | None = None) -> lopt.Optimizer:
    """The learned optimizer for a task, with the task's μP multipliers, for a run of num_steps."""
    return lopt.learned_optimizer(learned, task.update_multipliers, task.gradient_multiplier, num_steps)


def begin(task: Task, optimizer: lopt.Optimizer, key: Array) -> tuple[Tree, Any]:
    """(params, state of the optimizer) before the first step of the run that belongs to a key."""
    params = task.init(jax.random.fold_in(key, 0))
    return params, optimizer.init(params)


def batch_at(task: Task, split: Split, key: Array, t: int | Array) -> tuple[Array, Array]:
    """The batch of step t of the run that belongs to a key."""
    return task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), t), split)


def train_step(task: Task, optimizer: lopt.Optimizer, split: Split, key: Array,
               carry: tuple[Tree, Any], t: Array) -> tuple[tuple[Tree, Any], Array]:
    """Step t of the run that belongs to a key: (params, state) → ((params, state), loss).

    The loss is that of the step's batch before the update.
    """
    params, state = carry
    loss, grads = jax.value_and_grad(task.loss)(params, batch_at(task, split, key, t))
    updates, state = optimizer.update(grads, state, params, value=loss)
    return (lopt.apply_updates(params, updates), state), loss


def train(task: Task, make_optimizer: Callable[[int], lopt.Optimizer], split: Split, key: Array,
          steps: int) -> tuple[Tree, Array]:
    """Trains a task's network from scratch → (params, losses [steps]), to be jitted by the caller.

    Initial weights and batches depend on the key alone, so that optimizers which are given the same
    key can be compared step by step.
    """
    optimizer = make_optimizer(steps)
    step = functools.partial(train_step, task, optimizer, split, key)
    (params, _), losses = jax.lax.scan(step, begin(task, optimizer, key), jnp.arange(steps))
    return params, losses


def final_loss(losses: np.ndarray) -> np.ndarray:
    """The mean over the last twentieth of the steps: losses [..., T] → [...]."""
    return np.mean(losses[..., -max(1, losses.shape[-1] // 20):], axis=-1)


# --------------------------------------------------------------------------------------------------
# Coordinate check


def coordinate_check(task: Task, make_optimizer: Callable[[int], lopt.Optimizer], split: Split,
                     key: Array, marks: Sequence[int]) -> dict[str, tuple[Array, Array]]:
    """TP5's coordinate check of one run: how large pre-activations are, and how far they have moved.

    Returns {layer: (mean square of its pre-activations [marks], mean square of their change since
    initialisation [marks])} after each of `marks` (ascending numbers of steps) of the run that `train`
    makes with this key, on its first batch. In μP the change does not depend on the width: its `slope`
    is 0.
    """
    optimizer = make_optimizer(marks[-1])
    start = begin(task, optimizer, key)
    inputs, _ = batch_at(task, split, key, 0)

    def mean_square(x: Array) -> Array:
        return jnp.mean(jnp.square(x))

    def step(t: Array, carry: tuple[Tree, Any]) -> tuple[Tree, Any]:
        return train_step(task, optimizer, split, key, carry, t)[0]

    def to_mark(carry: tuple[Tree, Any], steps: Array):
        carry = jax.lax.fori_loop(steps[0], steps[1], step, carry)
        (_, first), (_, now) = (task.forward(params, inputs) for params in (start[0], carry[0]))
        return carry, {layer: (mean_square(now[layer]), mean_square(now[layer] - first[layer]))
                       for layer in now}

    from_to = jnp.array([(0, *marks[:-1]), marks]).T
    return jax.lax.scan(to_mark, start, from_to)[1]


def slope(widths: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The least-squares slope of ln values [widths, …] against ln width → […].

    It is nan where a value is not above 0.
    """
    x = np.log(widths) - np.mean(np.log(widths))
    values = np.asarray(values, np.float64)
    return np.tensordot(x, np.log(np.where(values > 0, values, np.nan)), 1) / np.sum(x * x)


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

# Data sets of images

CIFAR10_EXAMPLES = 10_000  # in each of the six binary files
MAX_EXAMPLES = {"idx": 100_000, "npz": 200_000}  # in one file; more would be damage, or a trap
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # its customary means and deviations
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# The first training labels of the two data sets whose files have the same names.
FIRST_LABELS = {"mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4),
                "fashion_mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)}


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Averages blocks of pixels, rounded to the nearest: uint8 [M, H, H, C] → [M, size, size, C]."""
    height = images.shape[1]
    if size < 1 or height % size:
        raise ValueError(f"image size {size} does not divide the {height} pixels of these images")
    if size == height:
        return images
    k = height // size
    total = np.zeros((len(images), size, size, images.shape[3]), np.uint32)
    for i in range(k):
        for j in range(k):
            total += images[:, i::k, j::k]
    return np.rint(total / (k * k)).astype(np.uint8)


def make_synthetic(size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """60,000 images of an object in clutter: uint8 [60,000, size, size, 3], and their 10 classes.

    Clutter and objects are random fields with amplitudes f^−1.2 at f cycles per image, as in
    photographs. A class has four objects; one of them is shifted (by N(0, 0.7²) of 8 pixels), scaled
    by a log-normal contrast, and added to the clutter. Constants are set so that models rank, and
    learn, as on CIFAR-10 at 8×8 pixels. A larger size (a multiple of 8) adds finer frequencies.
    """
    if size % 8 or not 8 <= size <= 64:
        raise ValueError(f"image size {size} of data set 'synthetic': use 8, 16, 24, 32, 40, 48, 56 "
                         "or 64")
    classes, objects, examples, chunk = 10, 4, 60_000, 1_000
    rng = np.random.default_rng(0)
    fx = np.fft.fftfreq(size, 1 / size).astype(np.float32)
    fy = fx[:, None]
    amplitude = np.maximum(np.hypot(fy, fx), 1.0) ** -1.2
    amplitude /= np.sqrt(np.mean(amplitude ** 2))  # then a field's pixels have variance 1
    fx, amplitude = fx[:size // 2 + 1], amplitude[:, :size // 2 + 1].astype(np.float32)
    # more brightness than colour
    to_rgb = np.array([[1, 1, 1], [0.4, 0, -0.4], [0.2, -0.4, 0.2]], np.float32)

    def spectra(count: int) -> np.ndarray:
        noise = to_rgb.T @ rng.standard_normal((count, 3, size * size), np.float32)
        noise = np.fft.rfft2(noise.reshape(-1, 3, size, size))
        return noise.astype(np.complex64) * amplitude

    prototypes = spectra(classes * objects).reshape(classes, objects, 3, size, size // 2 + 1)
    labels = np.arange(examples) % classes
    images = np.empty((examples, size, size, 3), np.uint8)
    for start in range(0, examples, chunk):
        clutter, which = spectra(chunk), rng.integers(objects, size=chunk)
        dy, dx = rng.standard_normal((2, chunk, 1, 1, 1), np.float32) * np.float32(0.7 / 8)
        contrast = 0.5 * np.exp(1.5 * rng.standard_normal((chunk, 1, 1, 1), np.float32))
        shift = np.exp(-2j * np.pi * fy * dy) * np.exp(-2j * np.pi * fx * dx)
        spectrum = clutter + contrast * shift * prototypes[labels[start:start + chunk], which]
        pixels = np.fft.irfft2(spectrum / np.sqrt(1 + contrast ** 2), (size, size))
        pixels = np.clip(np.rint(120 + 50 * pixels), 0, 255)
        images[start:start + chunk] = pixels.transpose(0, 2, 3, 1)
    return images, labels


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """A file's content, decompressed if it ends in .gz; no more than limit bytes are ever held."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from None
    if len(content) > limit:
        raise ValueError(f"{path}: holds more than the {limit:,} bytes that it should; fetch it again")
    return content


def find(name: str, folder: pathlib.Path, wanted: Sequence[Sequence[str]]) -> list[pathlib.Path]:
    """The paths of a data set's files: in a folder of its name inside folder, or else in folder.

    wanted: for each file the names that it may have.
    """
    inside = "cifar-10-batches-bin" if name == "cifar10" else name
    for place in (folder / inside, folder):
        paths = [next((path for path in map(place.joinpath, names) if path.is_file()), None)
                 for names in wanted]
        if any(paths):
            break
    if None in paths:
        missing = wanted[paths.index(None)][0]
        raise ValueError(f"{folder}: no file {missing!r} here or in {inside!r} inside; data set "
                         f"{name!r} needs {FORMATS[name].needs}")
    return paths


def checked_labels(path: pathlib.Path, labels: np.ndarray, classes: int,
                   first: int = 0) -> np.ndarray:
    """Labels first, first+1, … → int32 labels 0 … classes−1, after a check of their range."""
    if labels.size and not first <= labels.min() <= labels.max() < first + classes:
        raise ValueError(f"{path}: has labels from {labels.min()} to {labels.max()}, but they must lie "
                         f"between {first} and {first + classes - 1}; fetch it again")
    return (labels.astype(np.int64) - first).astype(np.int32)


# A reader yields the parts of a data set: whether a part is of the training split, images
# [M, H, H, C], labels [M].
Parts = Iterator[tuple[bool, np.ndarray, np.ndarray]]


def read_cifar10(name: str, folder: pathlib.Path) -> Parts:
    """CIFAR-10, binary version: data_batch_1.bin … and test_batch.bin, or the tar.gz with them.

    A file is 10,000 records of a label and 3 × 32 × 32 pixels. The tar is read in memory, never
    extracted.
    """
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    size = CIFAR10_EXAMPLES * 3073
    archive = folder / "cifar-10-binary.tar.gz"
    try:
        paths = find(name, folder, [[file] for file in files])
    except ValueError:
        if not archive.is_file():
            raise
        paths, contents = [archive] * len(files), read_tar(archive, files, size)
    else:
        contents = [read_bytes(path, size) for path in paths]
    for path, file, content in zip(paths, files, contents):
        if len(content) != size:
            raise ValueError(f"{path}: has {len(content):,} bytes instead of {size:,}; fetch it again")
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield file != "test_batch.bin", images, checked_labels(path, records[:, 0], 10)


def read_tar(path: pathlib.Path, files: Sequence[str], size: int) -> list[bytes]:
    """The named files of size bytes each out of cifar-10-binary.tar.gz, all of it in memory."""
    content = read_bytes(path, len(files) * size + (1 << 20))  # 1 MB for a readme and class names
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"{path}: is no tar archive ({error}); fetch it again") from None
    wanted = {}
    for member in members:
        parts = pathlib.PurePosixPath(member.name).parts
        is_folder = member.isdir() and len(parts) == 1
        is_file = member.isreg() and not member.issparse() and len(parts) == 2
        if (not (is_folder or is_file) or parts[0] != "cifar-10-batches-bin" or ".." in parts
                or parts[-1] in wanted):
            raise ValueError(f"{path}: has a stray member {member.name!r}; fetch it again")
        if parts[-1] in files:
            if member.size != size:
                raise ValueError(f"{path}: {member.name!r} has {member.size:,} bytes instead of "
                                 f"{size:,}; fetch it again")
            wanted[parts[-1]] = content[member.offset_data:member.offset_data + size]
    if missing := [file for file in files if file not in wanted]:
        raise ValueError(f"{path}: has no member {missing[0]!r}; fetch it again")
    return [wanted[file] for file in files]


def read_idx(name: str, folder: pathlib.Path) -> Parts:
    """MNIST and Fashion-MNIST: IDX files, plain or .gz, named …-idx3-ubyte or ….idx3-ubyte."""
    spellings = [(file, file.replace("-idx", ".idx")) for file in IDX_FILES]
    paths = find(name, folder, [[*names, *(f"{n}.gz" for n in names)] for names in spellings])
    for train, (images_path, labels_path) in ((True, paths[:2]), (False, paths[2:])):
        images = read_idx_array(images_path, (28, 28))
        labels = checked_labels(labels_path, read_idx_array(labels_path, ()), 10)
        if len(images) != len(labels):
            raise ValueError(f"{labels_path}: has {len(labels):,} labels for {len(images):,} images; "
                             "fetch it again")
        if train:
            check_which_mnist(name, labels_path, labels)
        yield train, images[..., None], labels


def read_idx_array(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array uint8 [count, *shape] of an IDX file: magic number, sizes (big-endian uint32), bytes."""
    header = 8 + 4 * len(shape)
    content = read_bytes(path, header + MAX_EXAMPLES["idx"] * math.prod(shape))
    magic, count, *sizes = np.frombuffer(content[:header].ljust(header, b"\0"), ">u4").tolist()
    if magic != 0x801 + len(shape) or tuple(sizes) != shape:
        raise ValueError(f"{path}: does not start as an IDX file of uint8 "
                         f"{'images of 28 × 28' if shape else 'labels'} does; fetch it again")
    if count < 1 or len(content) != header + count * math.prod(shape):
        raise ValueError(f"{path}: has {len(content):,} bytes, which is not what {count:,} examples "
                         "take; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(count, *shape)


def check_which_mnist(name: str, path: pathlib.Path, labels: np.ndarray) -> None:
    """Raises ValueError where MNIST's files would be taken for Fashion-MNIST, or the reverse.

    Their files have the same names. Which they are is told by the first labels of the training split;
    where these are of neither, only a folder of its name makes files Fashion-MNIST.
    """
    first = tuple(labels[:10].tolist())
    actual = [other for other in FIRST_LABELS if FIRST_LABELS[other] == first]
    if actual and actual != [name]:
        raise ValueError(f"{path}: is of data set {actual[0]!r}, not of {name!r}")
    folder = os.path.basename(os.path.dirname(os.path.abspath(path))).lower()
    if not actual and name == "fashion_mnist" and re.sub("[^a-z]", "", folder) != "fashionmnist":
        raise ValueError(f"{path}: may be MNIST's, whose files have the same names; put those of "
                         f"Fashion-MNIST into a folder {name!r}")


def read_imagenet(name: str, folder: pathlib.Path) -> Parts:
    """Downsampled ImageNet (arXiv 1707.08819): .npz files, data uint8 [M, 3·H·H], labels 1 … 1000."""
    size = int(name.removeprefix("imagenet"))
    files = [f"train_data_batch_{i}.npz" for i in range(1, 11)] + ["val_data.npz"]
    for path in find(name, folder, [[file] for file in files]):
        arrays = lopt.read_npz(path, MAX_EXAMPLES["npz"] * (3 * size * size + 8) + (1 << 20))
        if not {"data", "labels"} <= set(arrays):
            raise ValueError(f"{path}: has no arrays 'data' and 'labels'; fetch it again")
        data, labels = arrays["data"], arrays["labels"]
        if (data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * size * size
                or not len(data)):
            raise ValueError(f"{path}: data is {data.dtype} {list(data.shape)} instead of uint8 "
                             f"[M, {3 * size * size}]; is it of another image size?")
        if labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
            raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)} instead of "
                             f"integers [{len(data)}]; fetch it again")
        images = data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
        yield path.name != "val_data.npz", images, checked_labels(path, labels, 1000, first=1)


class Format(NamedTuple):
    """How a data set of images lies on disk. read(name, folder) → its parts. classes: how many it has.
    needs: which files are needed, and where they are from, as messages say it."""
    read: Callable[[str, pathlib.Path], Parts]
    classes: int
    needs: str


FORMATS = {
    "cifar10": Format(read_cifar10, 10, "the binary version, cifar-10-binary.tar.gz from "
                      "www.cs.toronto.edu/~kriz; `--download` fetches it"),
    "mnist": Format(read_idx, 10, "MNIST's four IDX files, plain or .gz"),
    "fashion_mnist": Format(read_idx, 10, "its four IDX files, plain or .gz; `--download` fetches them"),
    **{f"imagenet{size}": Format(
        read_imagenet, 1000, f"train_data_batch_1.npz … 10.npz and val_data.npz in one folder: ImageNet "
        f"{size}x{size} as npz from image-net.org/download-images.php, not its pickled version, whose "
        "files have no ending") for size in (32, 64)}}
DATASETS = ("synthetic", *FORMATS, "text", "tokens")


# --------------------------------------------------------------------------------------------------
# Data sets of text


def read_text(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a UTF-8 file, or of a folder's files in the order of their names.

    Returns (training tokens, held-out tokens): the last tenth is held out.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")
    contents = [file.read_bytes() for file in paths]
    for file, content in zip(paths, contents):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is no UTF-8 text at byte {error.start:,}; remove or convert "
                             "it") from None
    return hold_out(np.frombuffer(b"".join(contents), np.uint8))


def read_tokens(path: pathlib.Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, little-endian uint16 (uint32 for a vocabulary above 65,536), mapped and not read.

    From a file, of which a tenth is held out, or from a folder's train.bin, with val.bin held out if it
    is there.
    """
    def ids(file: pathlib.Path) -> np.ndarray:
        dtype = np.dtype("<u4" if vocab_size > 65_536 else "<u2")
        size = file.stat().st_size
        if not size or size % dtype.itemsize:
            raise ValueError(f"{file}: has {size:,} bytes, not a whole number of {dtype.name} token "
                             "ids")
        tokens = np.memmap(file, dtype, "r")
        for start in range(0, len(tokens), 1 << 24):
            if (largest := tokens[start:start + (1 << 24)].max()) >= vocab_size:
                raise ValueError(f"{file}: has token id {largest}, which is not below vocab size "
                                 f"{vocab_size}")
        return tokens

    if not path.is_dir():
        return hold_out(ids(path))
    train = ids(path / "train.bin")
    return (train, ids(path / "val.bin")) if (path / "val.bin").exists() else hold_out(train)


def hold_out(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(all but the last tenth of the tokens, that tenth)."""
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def token_rows(path: pathlib.Path, tokens: np.ndarray, vocabulary: int, length: int) -> Split:
    """Tokens [n] → a `Split` of rows [n // length, length], in the smallest type for the vocabulary."""
    if len(tokens) < 2 * length:
        raise ValueError(f"{path}: a split of {len(tokens):,} tokens is shorter than two sequences of "
                         f"{length}; use more text or shorter sequences")
    dtype = np.uint8 if vocabulary <= 256 else np.uint16 if vocabulary <= 65_536 else np.int32
    rows = tokens[:len(tokens) // length * length].reshape(-1, length).astype(dtype)
    return Split(jnp.asarray(rows), jnp.zeros(0, jnp.int32))


# --------------------------------------------------------------------------------------------------
# Loading and downloading


def load_dataset(name: str, data_dir: str | os.PathLike | None = None,
                 image_size: int | None = None, *, vocab_size: int | None = None,
                 sequence_length: int | None = None) -> Dataset:
    """Reads one of DATASETS, checks it and puts it on the device.

    data_dir: the folder that holds its files, or (text, tokens) the file itself. image_size: pixels to
    which images are shrunk; those of synthetic, which has no files, are made of that size. vocab_size: of
    tokens, required there. sequence_length: of the rows of text (64). Raises ValueError, in one line that
    names the file, for whatever is missing, damaged or does not fit.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    if data_dir is not None and name == "synthetic":
        raise ValueError(f"--data-dir {data_dir}: data set 'synthetic' is made in memory, of no files; name another "
                         "with --dataset")
    if data_dir is None and name != "synthetic":
        raise ValueError(f"data set {name!r} is read from files: say where they are with --data-dir")
    path = pathlib.Path(data_dir or ".")
    try:
        if name in ("text", "tokens"):
            length = 64 if sequence_length is None else sequence_length
            return load_tokens(name, path, image_size, vocab_size, length)
        return load_images(name, path, image_size, vocab_size)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def load_images(name: str, path: pathlib.Path, image_size: int | None,
                vocab_size: int | None) -> Dataset:
    """The part of `load_dataset` for images."""
    if vocab_size is not None:
        raise ValueError(f"vocab size {vocab_size} given for images: it belongs to data set 'tokens'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size {image_size} is not positive")
    if name == "synthetic":
        images, labels = make_synthetic(max(8, image_size or 8))
        cut, classes = 50_000, 10
        parts = [(True, images[:cut], labels[:cut]), (False, images[cut:], labels[cut:])]
    else:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder, and data set {name!r} is looked for there")
        parts, classes = FORMATS[name].read(name, path), FORMATS[name].classes
    splits: dict[bool, list] = {True: [], False: []}
    for train, images, labels in parts:
        splits[train].append((resize(images, image_size or images.shape[1]), labels))
    (train_images, train_labels), (test_images, test_labels) = (
        map(np.concatenate, zip(*splits[train])) for train in (True, False))
    mean, std = IMAGENET if name.startswith("imagenet") else channel_statistics(train_images)
    return Dataset(name, classes, mean, std,
                   Split(jnp.asarray(train_images), jnp.asarray(train_labels, jnp.int32)),
                   Split(jnp.asarray(test_images), jnp.asarray(test_labels, jnp.int32)))


def load_tokens(name: str, path: pathlib.Path, image_size: int | None, vocab_size: int | None,
                sequence_length: int) -> Dataset:
    """The part of `load_dataset` for text and tokens."""
    if image_size is not None:
        raise ValueError(f"image size {image_size} given for data set {name!r}, which has no images")
    if sequence_length < 1:
        raise ValueError(f"sequence length {sequence_length} is not positive")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder, and data set {name!r} is looked for there")
    if name == "text":
        if vocab_size not in (None, 256):
            raise ValueError(f"vocab size {vocab_size} given for data set 'text', whose vocabulary is "
                             "256 bytes")
        vocab_size, splits = 256, read_text(path)
    else:
        if vocab_size is None or not 1 < vocab_size < 1 << 31:
            raise ValueError(f"vocab size {vocab_size} for data set 'tokens': say how many ids there "
                             "are with --vocab-size, from 2 to 2,147,483,647")
        splits = read_tokens(path, vocab_size)
    train, test = (token_rows(path, tokens, vocab_size, sequence_length) for tokens in splits)
    return Dataset(name, vocab_size, (), (), train, test)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]; from histograms."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256)
                       for c in range(images.shape[-1])])
    share, level = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    std = np.sqrt(np.sum(share * (level - mean[:, None]) ** 2, axis=1))
    std = np.maximum(std, 1 / 255)  # a channel may be constant
    return tuple(mean.tolist()), tuple(std.tolist())


# data set: (where its files are published, {file: MD5 that is published there})
DOWNLOADS = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",
                {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(zip(
        (f"{file}.gz" for file in IDX_FILES),
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
         "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))))}
MAX_DOWNLOAD = 1 << 28  # bytes of one file
md5_of = functools.partial(hashlib.md5, usedforsecurity=False)  # against damage, trusted no further


def download(name: str, data_dir: str | os.PathLike, *, base_url: str | None = None) -> None:
    """Fetches the files of cifar10 or fashion_mnist into data_dir, unless they are there and whole.

    A file appears only once it is whole and its MD5 is right. base_url replaces the published address.
    Raises ValueError for any failure of the network, the disk or the checksum.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"data set {name!r} cannot be downloaded, only {' and '.join(DOWNLOADS)}")
    url, checksums = DOWNLOADS[name]
    # MNIST's files have the names of Fashion-MNIST's, which therefore have a folder of their own.
    folder = pathlib.Path(data_dir) / ("" if name == "cifar10" else name)
    for file, md5 in checksums.items():
        address, path = (base_url or url) + file, folder / file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_file() and md5_of(path.read_bytes()).hexdigest() == md5:
                continue
            content = fetch(address)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{address}: could not be fetched to {path} ({error})") from None
        if (actual := md5_of(content).hexdigest()) != md5:
            raise ValueError(f"{address}: has the MD5 {actual} instead of {md5}; nothing was kept")
        lopt.write_atomically(path, content)


def fetch(address: str) -> bytearray:
    """What is at an address, at most a little more than MAX_DOWNLOAD. Raises ValueError if it is cut off."""
    content = bytearray()
    with urllib.request.urlopen(address, timeout=30) as response:
        expected = response.length
        with tqdm.tqdm(total=expected, unit="B", unit_scale=True, desc=address.rpartition("/")[2]) as progress:
            while (block := response.read(1 << 16)) and len(content) <= MAX_DOWNLOAD:
                content += block
                progress.update(len(block))
    if expected is not None and len(content) < expected:
        raise ValueError(f"{address}: the connection broke off after {len(content):,} of {expected:,} bytes")
    return content


# --------------------------------------------------------------------------------------------------
# Tasks by name

# name: (a function like `mlp_task`; the number of axes of its inputs; its options beyond the common
# ones, of which `task_of` gives those that are fields of TaskSettings)
TASKS = {"mlp": (mlp_task, 4, ()),
         "vit": (vit_task, 4, ("heads", "head_size", "patch", "remat")),
         "lm": (lm_task, 2, ("heads", "head_size", "sequence_length", "remat"))}


def make_task(name: str, dataset: Dataset, width: int, depth: int, batch_size: int,
              parametrization: Parametrization = mup.MUP, **options: Any) -> Task:
    """The task of one of the names in TASKS; an option that is None stays at its default.

    Raises ValueError, in one line, for a combination that does not fit.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: use one of {', '.join(TASKS)}")
    task, axes, allowed = TASKS[name]
    options = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"task {name!r} has no option {unknown[0]!r}")
    if dataset.train.inputs.ndim != axes:
        needs, holds = ("images", "text") if axes == 4 else ("text", "images")
        raise ValueError(f"task {name!r} needs {needs}, and data set {dataset.name!r} holds {holds}")
    for size, value in (("width", width), ("depth", depth), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{size} must be 1 or more, got {value}")
    return task(dataset, width, depth, batch_size, parametrization, **options)


# --------------------------------------------------------------------------------------------------
# Settings: each is said once, in the field of a dataclass, from which its flag and its check are made


def setting(default: Any, help: str, *, low: Any = None, high: Any = None, above: Any = None,
            below: Any = None, choices: Sequence[str] | None = None,
            metavar: str | None = None, group: str | None = None) -> Any:
    """A field of a dataclass that is a setting and a flag of a command line.

    The flag takes its name and type from the field: str, int, float, bool (a switch that is off by
    default), one of these or None, or a tuple of them, each once. help: what the setting is, in words.
    low ≤ value ≤ high and above < value < below: bounds, of each entry of a tuple. choices: the values
    that there are. metavar and group: as the help names its value, and the heading under which it
    stands there.
    """
    metadata = dict(help=help, low=low, high=high, above=above, below=below, choices=choices,
                    metavar=metavar, group=group)
    return dataclasses.field(default=default, metadata=metadata)


inner = functools.partial(setting, group="inner task")


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Which inner networks are trained, and on what data: the settings that all commands share."""
    task: str = inner("mlp", "the inner networks", choices=tuple(TASKS))
    dataset: str = inner("synthetic", "what they are trained on; synthetic needs no files",
                         choices=DATASETS)
    data_dir: str | None = inner(None, "where the data set's files are: a folder, for text and tokens "
                                 "also a file (data if not given)", metavar="DIR")
    image_size: int | None = inner(None, "shrink images to S×S by averaging blocks; synthetic: make them "
                                   "of that size", low=1, metavar="S")
    vocab_size: int | None = inner(None, "token ids of data set tokens", low=1, metavar="V")
    sequence_length: int | None = inner(None, "tokens of a sequence (64 if not given)", low=1,
                                        metavar="L")
    widths: tuple[int, ...] = inner((32,), "widths of the inner networks", low=1, metavar="W")
    depth: int = inner(3, "hidden layers, or transformer blocks", low=1, metavar="D")
    heads: int | None = inner(None, "attention heads (as many of size 32 as fit, if not given)", low=1,
                              metavar="A")
    patch: int | None = inner(None, "side of a ViT's patches (4 if not given)", low=1, metavar="P")
    remat: bool = inner(False, "keep each transformer block's input only, and compute the rest again "
                        "for the gradient")
    batch_size: int = inner(64, "inner batch size", low=1, metavar="B")
    matmul_precision: str = inner("highest", "of matrix products on a GPU; highest is float32, "
                                  "TF32_TF32_F32_X3 adds three products in TF32",
                                  choices=("highest", "TF32_TF32_F32_X3", "tensorfloat32", "bfloat16"))
    seed: int = setting(0, "decides everything that is random", low=0, high=2**32 - 1, metavar="S")


def load_data(settings: TaskSettings, download_first: bool = False) -> Dataset:
    """The data set that the settings name."""
    data_dir = settings.data_dir or (None if settings.dataset == "synthetic" else "data")
    if download_first:
        download(settings.dataset, data_dir or "data")
    return load_dataset(settings.dataset, data_dir, settings.image_size,
                        vocab_size=settings.vocab_size, sequence_length=settings.sequence_length)


# the settings of a data set
DATA = ("dataset", "data_dir", "image_size", "vocab_size", "sequence_length")


def load_each(settings: Sequence[TaskSettings], downloads: Sequence[bool]) -> list[Dataset]:
    """The data set of each of several settings, loaded once for all that share it.

    downloads: for each, whether its files are to be fetched first.
    """
    loaded: dict[tuple, Dataset] = {}
    names = [tuple(getattr(each, name) for name in DATA) for each in settings]
    for name, each in zip(names, settings):
        if name not in loaded:
            loaded[name] = load_data(each, (name, True) in zip(names, downloads))
    return [loaded[name] for name in names]


def fingerprint(dataset: Dataset) -> str:
    """A checksum of a data set: of the shape, first 2²⁶ numbers and labels of each split. A run knows it again."""
    digest = hashlib.sha256()
    for inputs, labels in filter(None, (dataset.train, dataset.test)):
        head = np.asarray(inputs[:max(1, (1 << 26) // max(1, inputs[0].size))])
        digest.update(f"{inputs.shape} {inputs.dtype}".encode() + head.tobytes() + np.asarray(labels).tobytes())
    return digest.hexdigest()


def task_of(settings: TaskSettings, dataset: Dataset, width: int, depth: int,
            parametrization: Parametrization) -> Task:
    """The inner task of the settings at one width and depth, in one parametrization."""
    options = {name: getattr(settings, name, None) or None for *_, names in TASKS.values() for name in names}
    return make_task(settings.task, dataset, width, depth, settings.batch_size, parametrization, **options)


def flag(name: str) -> str:
    """The flag of a setting: "batch_size" → "--batch-size"."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, settings: type,
              defaults: dict[str, str] | None = None) -> None:
    """Adds a flag for each field of a dataclass of settings; flags that are not given are None.

    The help of a flag ends in the field's default, if there is one, or in the words that `defaults` has
    for it. Those of `TaskSettings` come with --download, which is no setting: args.download.
    """
    groups = {None: parser}
    for field in dataclasses.fields(settings):
        meta, (kind, is_tuple) = field.metadata, type_of(field.type)
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        says_nothing = field.default is None or kind is bool
        default = "" if says_nothing else " ".join(map(str, as_tuple(field.default)))
        default = (defaults or {}).get(field.name, default)
        help = meta["help"] + f" (default: {default})" * bool(default)
        options = {"default": None, "help": help.replace("%", "%%")}
        if kind is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": kind, "metavar": meta["metavar"], "choices": meta["choices"]}
        if is_tuple:
            options |= {"nargs": "+", "action": "extend" if kind is str else "store"}
        groups[meta["group"]].add_argument(flag(field.name), **options)
        if field.name == "data_dir":
            groups[meta["group"]].add_argument(
                "--download", action="store_true", default=None,
                help="fetch cifar10 or fashion_mnist into --data-dir first")


def type_of(annotation: Any) -> tuple[type, bool]:
    """The type of a setting's values, or of their entries, and whether they are tuples."""
    if isinstance(annotation, types.UnionType):  # X | None
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is tuple:  # tuple[X, ...]
        return typing.get_args(annotation)[0], True
    return annotation, False


def as_tuple(value: Any) -> tuple:
    """A value of a setting as a tuple of its entries."""
    return value if isinstance(value, tuple) else (value,)


def given_flags(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """{name: value} of the settings whose flags were given."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(settings)}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if value is not None}


def check(settings: Any) -> None:
    """Raises ValueError "--flag value: why" for a setting that its field does not allow."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None and field.default is None or value == field.default == ():
            continue
        if why := what_is_wrong(field.metadata, as_tuple(value)):
            raise ValueError(f"{' '.join(map(str, (flag(field.name), *as_tuple(value))))}: {why}")


def what_is_wrong(meta: typing.Mapping[str, Any], values: tuple) -> str:
    """Why a setting (see `setting`) cannot have these entries, or "" where it can."""
    low, high, above, below = (meta[name] for name in ("low", "high", "above", "below"))
    bounds = {"at least": (low, operator.ge), "at most": (high, operator.le),
              "a positive number, above": (above, operator.gt), "below": (below, operator.lt)}
    bounds = {words: bound for words, bound in bounds.items() if bound[0] is not None}
    if meta["choices"] and not set(values) <= set(meta["choices"]):
        return f"use one of {', '.join(meta['choices'])}"
    if not all(holds(x, bound) for x in values for bound, holds in bounds.values()):  # nor does nan
        if low is not None and high is not None:
            return f"must be between {number(low)} and {number(high)}"
        return "must be " + " and ".join(f"{words} {number(x)}" for words, (x, _) in bounds.items())
    if high is None and any(isinstance(x, int) and x >= 2**31 for x in values):
        return "is too large"
    if not values:
        return "must not be empty"
    return "one is given twice" if len(set(values)) < len(values) else ""


def number(x: float) -> str:
    """A bound as messages show it: 10,000,000 or 1e18."""
    return f"{x:,}" if isinstance(x, int) else f"{x:g}".replace("e+", "e")


# --------------------------------------------------------------------------------------------------
# Command lines and devices


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: they raise ValueError."""

    def error(self, message: str):
        raise ValueError(message)


def run_command(run: Callable[[Sequence[str] | None], int], name: str,
                argv: Sequence[str] | None) -> int:
    """Runs a command line and returns its exit code; what goes wrong is one line on stderr.

    Where nobody reads stdout any more, as after `| head -1`, it ends quietly.
    """
    mup.replace_unprintable()
    try:
        return explain_errors(run, name, argv)
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # nor may Python complain when it flushes at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + 13  # as a shell reports SIGPIPE


def explain_errors(run: Callable[[Sequence[str] | None], int], name: str,
                   argv: Sequence[str] | None) -> int:
    """The part of `run_command` for errors: bad input, lack of memory or of devices, and Ctrl-C."""
    try:
        try:
            code = run(argv)
        except SystemExit as end:  # after --help
            code = end.code or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except ValueError as error:
        why = first_line(error)
    except OSError as error:
        why = f"{error.filename or 'input or output'}: {error.strerror or first_line(error)}"
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError, AssertionError) as error:
        details = f" ({first_line(error)})" if str(error) else ""
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            why = f"not enough memory for these sizes{details}; use smaller ones"
        elif not has_devices():
            platforms = os.environ.get("JAX_PLATFORMS", "")
            why = f"JAX finds no device, with JAX_PLATFORMS={platforms!r}{details}"
        else:
            raise
    print(f"{name}: error: {why}", file=sys.stderr)
    return 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or else the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def has_devices() -> bool:
    """Whether JAX has any device at all: it has none where JAX_PLATFORMS names what is not there."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def set_up_devices(divides: int, devices: int | None = None) -> None:
    """Makes of a CPU `devices` XLA devices, at most 256, or else as many as the largest divisor of
    `divides` that is not above the number of cores.

    Each core then unrolls its own runs and waits for the others once per meta-step: nearly twice as
    fast on two cores as one device whose every operation is split over both. Once JAX has been used, as
    in a notebook, its devices stay as they are.
    """
    if devices_are_forced():
        return
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(RuntimeError):  # JAX has been used
        jax.config.update("jax_num_cpu_devices",
                          min(devices, 256) if devices else largest_divisor(divides, cores))


def set_up_precision(precision: str) -> None:
    """Makes matrix products of this precision; on a CPU, which has no other, they are float32."""
    jax.config.update("jax_default_matmul_precision",
                      "highest" if jax.default_backend() == "cpu" else precision)


def devices_are_forced() -> bool:
    """Whether the environment says into how many XLA devices a CPU is divided."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number up to a limit; of 0 the limit, since all divide it."""
    return max(d for d in range(1, limit + 1) if number % d == 0)


# --------------------------------------------------------------------------------------------------
# Demonstration


def main(argv: Sequence[str] | None = None) -> int:
    """Shows the data sets, how networks learn the synthetic one, and a coordinate check of Adam."""
    parser = CommandLine(prog="tasks.py", description=main.__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"), metavar="DIR",
                        help="where the files of data sets are (default: %(default)s)")
    data_dir = parser.parse_args(argv).data_dir
    dataset, keys = load_dataset("synthetic"), jax.random.split(jax.random.key(0), 3)
    show_datasets(data_dir, dataset)
    show_training(dataset, keys)
    show_coordinate_check(dataset, keys)
    return 0


def show_datasets(folder: pathlib.Path, synthetic: Dataset) -> None:
    """Prints which data sets of images are in a folder, and what the synthetic one is like."""
    print(f"Data sets in {folder}:")
    for name, (read, classes, _) in FORMATS.items():
        try:
            _, images, _ = next(read(name, folder))
            state = f"{classes} classes; its first file holds uint8 images {list(images.shape)}"
        except (ValueError, OSError) as error:
            state = f"not there: {error}"
        print(f"  {name:14}{state}")
    print("\nsynthetic, made in memory:")
    for part, split in (("train", synthetic.train), ("test", synthetic.test)):
        counts = np.bincount(split.labels, minlength=synthetic.classes)
        print(f"  {part:5} uint8 {list(split.inputs.shape)}, {counts.min():,} to {counts.max():,} of "
              "each class")
    for channel, mean, std in zip("RGB", synthetic.mean, synthetic.std):
        print(f"  {channel}: mean {mean:.3f}, standard deviation {std:.3f} (pixels in [0, 1])")


def show_training(dataset: Dataset, keys: Array) -> None:
    """Prints how MLPs of three widths learn a data set under Adam."""
    print(f"\nAdam (learning rate 1e-3, batch 64) on MLPs of 3 layers, mean of {len(keys)} seeds: "
          "training loss in nats at")
    print(f"  {'width':>5}{'step 0':>10}{'10':>8}{'100':>8}{'950-999':>9}{'test accuracy':>16}")
    for width in (8, 32, 256):
        task = mlp_task(dataset, width, 3, 64, mup.SP)

        def run(key: Array) -> tuple[Array, Array]:
            params, losses = train(task, lambda _: lopt.adamw(1e-3), dataset.train, key, 1000)
            return losses, task.test(params, dataset.test)[1]

        losses, accuracy = jax.jit(functools.partial(jax.lax.map, run))(keys)
        means = [losses[:, at].mean() for at in (0, 10, 100, slice(950, None))]
        print("  {:5}{:10.3f}{:8.3f}{:8.3f}{:9.3f}{:16.3f}".format(width, *means, accuracy.mean()))


def show_coordinate_check(dataset: Dataset, keys: Array) -> None:
    """Prints a coordinate check of Adam on MLPs of three widths, in SP and in μP."""
    widths, steps = (32, 128, 512), 10
    print(f"\nCoordinate check: RMS change of the pre-activations in {steps} steps of Adam, at widths "
          f"{widths}, and its slope")
    for parametrization, rate in ((mup.SP, 1e-3), (mup.MUP, 1e-2)):
        def changes(width: int) -> dict[str, Array]:
            task = mlp_task(dataset, width, 3, 64, parametrization)
            adam = lopt.adamw(rate, update_multipliers=task.update_multipliers)
            squares = jax.jit(functools.partial(jax.lax.map, lambda key: coordinate_check(
                task, lambda _: adam, dataset.train, key, [steps])))(keys)
            return {layer: jnp.sqrt(jnp.mean(change)) for layer, (_, change) in squares.items()}

        at_width = [changes(width) for width in widths]
        for layer in at_width[0]:
            row = [float(change[layer]) for change in at_width]
            print("  {:4}{:9}{:8.3f}{:8.3f}{:8.3f}{:+8.2f}".format(
                "μP" if parametrization.is_mup else "SP", layer, *row, slope(widths, row)))
    print("In μP no layer moves more in a wider network; in SP those behind a hidden layer do.")


if __name__ == "__main__":
    sys.exit(run_command(main, "tasks.py", None))
