"""Inner tasks: the networks that learned optimizers train, and their data sets.

    python tasks.py      a coordinate check of Adam on MLPs, in SP and in μP (20 s)

A `Task` is a network with a data set, in μP or in the standard parametrization (SP).

Sources: μLO (arXiv 2406.00153); TP5 = "Tensor Programs V" (arXiv 2203.03466).

Dimensions: M examples, B batch, C channels, W width, V classes or vocabulary, L tokens, A heads.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import math
import os
import signal
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import lopt
import mup
from lopt import InputError, reading
from mup import Array, Parametrization, Tree, Weight


class Split(NamedTuple):
    """Images uint8 [M, side, side, C] and labels int32 [M], or rows of tokens [M, L] and none."""
    inputs: Array
    labels: Array


class Dataset(NamedTuple):
    """A data set. classes: their number, or the size of the vocabulary. mean, std: of channels."""
    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split


class Task(NamedTuple):
    """An inner problem.

    forward(params, inputs) → (logits [..., V], {layer: pre-activations}). sample(key, split) →
    (inputs, labels). held_out(split) → (examples, examples at once, function: index → one batch).
    """
    classes: int
    weights: Tree
    forward: Callable
    parametrization: Parametrization
    sample: Callable
    held_out: Callable

    @property
    def max_loss(self) -> float:
        """1.5 ln(classes), where the meta-loss clips losses. A run above it has diverged."""
        return 1.5 * math.log(self.classes)

    def init(self, key: Array) -> Tree:
        """Fresh params."""
        return mup.init(self.weights, key, self.parametrization)

    def loss(self, params: Tree, batch: tuple[Array, Array]) -> Array:
        """The mean cross-entropy of a batch, in nats."""
        inputs, labels = batch
        logits, _ = self.forward(params, inputs)
        return jnp.mean(cross_entropy(logits, labels))

    def test(self, params: Tree, split: Split) -> tuple[Array, Array]:
        """The mean cross-entropy and the accuracy on the first examples of a split."""
        count, at_once, example = self.held_out(split)

        def test_one(i):
            inputs, labels = example(i)
            logits, _ = self.forward(params, inputs)
            correct = jnp.argmax(logits, axis=-1) == labels
            return jnp.mean(cross_entropy(logits, labels)), jnp.mean(correct)

        losses, accuracies = jax.lax.map(test_one, jnp.arange(count), batch_size=at_once)
        return jnp.mean(losses), jnp.mean(accuracies)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−ln softmax(logits)[label]: logits [..., V], labels int [...] → [...]."""
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_label


def mlp(inputs: int, classes: int, width: int, depth: int,
        parametrization: Parametrization) -> tuple[Tree, Callable]:
    """The MLP of μLO as (weights, forward): `depth` hidden layers of ReLU units and a read-out."""
    weights = {f"layer_{i}": mup.matrix("hidden", width, width) for i in range(depth)}
    weights["layer_0"] = mup.matrix("input", inputs, width)
    weights["logits"] = mup.matrix("output", width, classes)

    def forward(params, x):
        x, pre_activations = x.reshape(x.shape[0], -1), {}  # flat
        for name in weights:
            x = mup.linear(weights[name], params[name], x, parametrization)  # (B, W), last (B, V)
            pre_activations[name] = x
            x = jax.nn.relu(x)
        return pre_activations["logits"], pre_activations

    return weights, forward


def classification(dataset: Dataset, weights: Tree, forward: Callable,
                   parametrization: Parametrization, batch_size: int) -> Task:
    """The task to classify images; at most 10,000 are tested."""
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def examples(split, at):
        images = split.inputs[at].astype(jnp.float32) / 255.0
        return (images - mean) / std, split.labels[at]

    def sample(key, split):
        return examples(split, jax.random.randint(key, (batch_size,), 0, split.labels.shape[0]))

    def held_out(split):
        return min(split.labels.shape[0], 10_000), 250, lambda i: examples(split, i[None])

    return Task(dataset.classes, weights, forward, parametrization, sample, held_out)


def mlp_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             parametrization: Parametrization = mup.MUP) -> Task:
    """The task to classify images by an MLP: μLO's first task."""
    pixels = math.prod(dataset.train.inputs.shape[1:])
    network = mlp(pixels, dataset.classes, width, depth, parametrization)
    return classification(dataset, *network, parametrization, batch_size)


# -------- Inner training; make_optimizer(planned number of steps) → an optimizer


def optimizer_for(task: Task, learned: lopt.Learned,
                  num_steps: int | Array | None = None) -> lopt.Optimizer:
    """The learned optimizer for a task, with the task's μP multipliers, for a run of num_steps."""
    p = task.parametrization
    return lopt.learned_optimizer(learned, mup.update_multipliers(task.weights, p),
                                  mup.gradient_multiplier(task.weights, p), num_steps)


def inner_step(task: Task, optimizer: lopt.Optimizer, params: Tree, state: Any,
               batch: tuple[Array, Array]) -> tuple[Tree, Any, Array]:
    """One step of inner training: (params, state, the loss of the batch before the update)."""
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    updates, state = optimizer.update(grads, state, params, value=loss)
    return lopt.apply_updates(params, updates), state, loss


def batch_at(task: Task, split: Split, key: Array, t: int | Array) -> tuple[Array, Array]:
    """The batch of step t of the run with this key."""
    return task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), t), split)


def train(task: Task, make_optimizer: Callable, split: Split, key: Array, steps: int,
          record: Callable = lambda params, loss: loss) -> tuple[Tree, Any]:
    """Train a network: (params, record(params, loss) of each step). Jit it."""
    optimizer = make_optimizer(steps)

    def train_step(carry, t):
        *carry, loss = inner_step(task, optimizer, *carry, batch_at(task, split, key, t))
        return tuple(carry), record(carry[0], loss)

    params = task.init(jax.random.fold_in(key, 0))
    carry = params, optimizer.init(params)
    (params, _), records = jax.lax.scan(train_step, carry, jnp.arange(steps))
    return params, records


def final_loss(losses: np.ndarray) -> np.ndarray:
    """The mean over the last twentieth of the steps: losses [..., steps] → [...]."""
    return np.mean(losses[..., -max(1, losses.shape[-1] // 20):], axis=-1)


def coordinate_check(task: Task, make_optimizer: Callable, split: Split, key: Array,
                     steps: int) -> dict[str, tuple[Array, Array]]:
    """TP5's coordinate check: pre-activations of the first batch, while `train` runs.

    Returns {layer: (mean square of its pre-activations, mean square of their change since
    initialisation)} after each step, each [steps]. In μP the change does not depend on the width.
    """
    inputs, _ = batch_at(task, split, key, 0)
    _, first = task.forward(task.init(jax.random.fold_in(key, 0)), inputs)

    def squares(params, loss):
        _, now = task.forward(params, inputs)
        return {layer: (jnp.mean(x ** 2), jnp.mean((x - first[layer]) ** 2))
                for layer, x in now.items()}

    return train(task, make_optimizer, split, key, steps, squares)[1]


def slope(widths: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The least-squares slope of ln values [widths, …] against ln width; NaN for values ≤ 0."""
    x = np.log(widths) - np.mean(np.log(widths))
    values = np.asarray(values, np.float64)
    return np.tensordot(x, np.log(np.where(values > 0, values, np.nan)), 1) / np.sum(x * x)


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~


def layer_norm(params: dict[str, Array], x: Array) -> Array:
    """LayerNorm with gain and shift: x [..., W] → [..., W]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred ** 2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["gain"] + params["shift"]


def transformer(embeddings: Tree, embed: Callable, classes: int, width: int, depth: int,
                p: Parametrization, causal: bool, read_from: Any) -> tuple[Tree, Callable]:
    """A pre-LayerNorm transformer with width//32 heads, or one, as (weights, forward).
    embed(params, inputs) → x [B, L, W]; embeddings: its weights. read_from: the tokens read out."""
    heads = max(1, width // 32)
    if width % heads:
        raise InputError(f"--widths {width}: no multiple of its {heads} heads (width//32)")
    size = width // heads
    block_weights = {"norm_1": mup.norm(width),
                     "attention": {name: mup.matrix("hidden", width, width) for name in "qkvo"},
                     "norm_2": mup.norm(width),
                     "mlp": {"up": mup.matrix("hidden", width, 4 * width),
                             "down": mup.matrix("hidden", 4 * width, width)}}
    blocks = {f"block_{i}": block_weights for i in range(depth)}
    weights = {**embeddings, **blocks, "norm": mup.norm(width),
               "logits": mup.matrix("output", width, classes)}

    def block(params, x):
        def linear(part, name, x):
            return mup.linear(block_weights[part][name], params[part][name], x, p)

        y = layer_norm(params["norm_1"], x)
        q, k, v = (linear("attention", name, y).reshape(*x.shape[:2], heads, size)
                   for name in "qkv")  # (B, L, A, size)
        logits = jnp.einsum("blas,bmas->balm", q, k) * mup.attention_scale(size, p)  # (B, A, L, L)
        visible = jnp.tri(x.shape[1], dtype=bool) if causal else True
        share = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
        mixed = jnp.einsum("balm,bmas->blas", share, v).reshape(x.shape)  # (B, L, W)
        x = x + linear("attention", "o", mixed)
        up = linear("mlp", "up", layer_norm(params["norm_2"], x))  # (B, L, 4W)
        return x + linear("mlp", "down", jax.nn.gelu(up, approximate=True)), logits

    def forward(params, inputs):
        x, pre_activations = embed(params, inputs), {}
        for name in blocks:
            x, pre_activations[f"{name}/attention_logits"] = block(params[name], x)
            pre_activations[name] = x
        x = layer_norm(params["norm"], x)[:, read_from]
        logits = mup.linear(weights["logits"], params["logits"], x, p)
        return logits, {**pre_activations, "logits": logits}

    return weights, forward


def vit_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             p: Parametrization = mup.MUP, patch: int = 4) -> Task:
    """The task to classify images by a vision transformer that reads out a class token."""
    _, image_size, _, channels = dataset.train.inputs.shape
    if image_size % patch:
        raise InputError(f"--patch {patch}: does not divide the image size {image_size}")
    side, c = image_size // patch, mup.rules(p, 1)["input"].forward
    weights = {"patch": mup.matrix("input", patch * patch * channels, width),
               "class_token": Weight("input", (width,), 1, constant=0.0),
               "positions": Weight("input", (1 + side * side, width), 1, std=0.02)}  # L = 1 + side²

    def embed(params, images):
        x = images.reshape(-1, side, patch, side, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, side * side, patch * patch * channels)  # (B, L − 1, patch² C)
        x = mup.linear(weights["patch"], params["patch"], x, p)
        token = jnp.broadcast_to(c * params["class_token"], (x.shape[0], 1, width))
        return jnp.concatenate([token, x], axis=1) + c * params["positions"]  # (B, L, W)

    network = transformer(weights, embed, dataset.classes, width, depth, p, False, 0)
    return classification(dataset, *network, p, batch_size)


def lm_task(dataset: Dataset, width: int, depth: int, batch_size: int,
            p: Parametrization = mup.MUP) -> Task:
    """The task to predict the next token by a decoder-only transformer; tests up to 2,000 rows."""
    length, vocabulary = dataset.train.inputs.shape[1], dataset.classes
    weights = {"tokens": Weight("input", (vocabulary, width), 1, std=vocabulary ** -0.5),
               "positions": Weight("input", (length, width), 1, std=0.02)}

    def embed(params, tokens):
        c = mup.rules(p, 1)["input"].forward
        return (c * params["tokens"])[tokens] + c * params["positions"]  # (B, L, W)

    def windows(split, row, offset):
        at = offset[:, None] + jnp.arange(length + 1)  # (B, L + 1), counted from the row's start
        tokens = split.inputs[row[:, None] + at // length, at % length].astype(jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    def sample(key, split):
        row_key, offset_key = jax.random.split(key)
        row = jax.random.randint(row_key, (batch_size,), 0, split.inputs.shape[0] - 1)
        return windows(split, row, jax.random.randint(offset_key, (batch_size,), 0, length))

    def held_out(split):
        first = jnp.zeros(1, jnp.int32)
        return min(split.inputs.shape[0] - 1, 2_000), 50, lambda i: windows(split, i[None], first)

    network = transformer(weights, embed, vocabulary, width, depth, p, True, slice(None))
    return Task(vocabulary, *network, p, sample, held_out)


# -------- Data sets; a reader of images yields (for training?, images, labels)

Parts = Iterator[tuple[bool, np.ndarray, np.ndarray]]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # customary means, deviations
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def make_synthetic(size: int) -> Parts:
    """60,000 images in 10 classes, each of an object in clutter.

    Both are random fields with amplitude f^−1.2 at f cycles an image. A class has four objects. An
    image is one of them, shifted by N(0, 0.7²) eighths of a side, in clutter of random contrast.
    """
    if size % 8 or size > 64:
        raise InputError(f"--image-size {size}: the synthetic data take a multiple of 8 up to 64")
    classes, objects, examples, chunk = 10, 4, 60_000, 1_000
    rng = np.random.default_rng(0)
    fx = np.fft.fftfreq(size, 1 / size).astype(np.float32)
    fy = fx[:, None]
    amplitude = np.maximum(np.hypot(fy, fx), 1.0) ** -1.2
    amplitude /= np.sqrt(np.mean(amplitude ** 2))  # this keeps the variance
    fx, amplitude = fx[:size // 2 + 1], amplitude[:, :size // 2 + 1].astype(np.float32)
    to_rgb = np.array([[1, 1, 1], [0.4, 0, -0.4], [0.2, -0.4, 0.2]], np.float32)

    def spectra(count):
        noise = to_rgb.T @ rng.standard_normal((count, 3, size * size), np.float32)
        noise = np.fft.rfft2(noise.reshape(-1, 3, size, size))
        return noise.astype(np.complex64) * amplitude

    prototypes = spectra(classes * objects).reshape(classes, objects, 3, size, size // 2 + 1)
    labels = np.arange(examples) % classes
    for first in range(0, examples, chunk):
        clutter, which = spectra(chunk), rng.integers(objects, size=chunk)
        dy, dx = rng.standard_normal((2, chunk, 1, 1, 1), np.float32) * np.float32(0.7 / 8)
        contrast = 0.5 * np.exp(1.5 * rng.standard_normal((chunk, 1, 1, 1), np.float32))
        shift = np.exp(-2j * np.pi * fy * dy) * np.exp(-2j * np.pi * fx * dx)
        spectrum = clutter + contrast * shift * prototypes[labels[first:first + chunk], which]
        pixels = np.fft.irfft2(spectrum / np.sqrt(1 + contrast ** 2), (size, size))
        pixels = np.clip(np.rint(120 + 50 * pixels), 0, 255).astype(np.uint8)
        yield first < 50_000, pixels.transpose(0, 2, 3, 1), labels[first:first + chunk]


def read_cifar10(folder: Path) -> Parts:
    """CIFAR-10, binary version: files of 10,000 records of a label and 3 × 32 × 32 pixels."""
    for file in CIFAR10_FILES:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: is not there; --download fetches it")
        with reading(folder / file):
            records = np.frombuffer((folder / file).read_bytes(), np.uint8).reshape(10_000, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield file != "test_batch.bin", images, records[:, 0]


def read_idx(folder: Path) -> Parts:
    """MNIST and Fashion-MNIST: four IDX files, plain or .gz."""
    def array(name):
        path = next(iter(sorted(folder.glob(f"{name}?idx*"))), folder / f"{name}-idx*-ubyte")
        with reading(path):
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            axes = content[3]
            sizes = np.frombuffer(content, ">u4", axes, 4)
            return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)

    for train, name in ((True, "train"), (False, "t10k")):
        yield train, array(f"{name}-images")[..., None], array(f"{name}-labels")


def read_imagenet(size: int, folder: Path) -> Parts:
    """Downsampled ImageNet (arXiv 1707.08819) as .npz: data [M, 3·size·size], labels 1 … 1000."""
    for file in (*(f"train_data_batch_{i}.npz" for i in range(1, 11)), "val_data.npz"):
        arrays = lopt.read_npz(folder / file)
        with reading(folder / file):
            images = arrays["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
            yield file != "val_data.npz", images, arrays["labels"].astype(np.int64) - 1


# name: (reader of a folder, number of classes)
IMAGES = {"cifar10": (read_cifar10, 10), "mnist": (read_idx, 10), "fashion_mnist": (read_idx, 10),
          **{f"imagenet{n}": (partial(read_imagenet, n), 1000) for n in (32, 64)}}
DATASETS = ("synthetic", *IMAGES, "text", "tokens")


def load_images(name: str, path: Path, image_size: int | None) -> Dataset:
    """Read, check and shrink images to image_size, and put them on the device."""
    read, classes = IMAGES.get(name, (None, 10))
    inside = path / ("cifar-10-batches-bin" if name == "cifar10" else name)
    folder = inside if inside.is_dir() else path
    splits: dict[bool, list] = {True: [], False: []}
    for train, images, labels in read(folder) if read else make_synthetic(image_size or 8):
        side, size = images.shape[1], image_size or images.shape[1]
        if side % size:
            raise InputError(f"--image-size {size}: does not divide the {side} pixels of {name}")
        good = labels.size and set(labels) <= {*range(classes)}
        if images.ndim != 4 or labels.shape != images.shape[:1] or not good:
            raise InputError(f"{folder}: damaged: an image without a label below {classes}")
        if side != size:
            blocks = images.reshape(len(images), size, side // size, size, side // size, -1)
            images = np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
        splits[train].append((images, labels.astype(np.int32)))
    train, test = (Split(*map(np.concatenate, zip(*splits[part]))) for part in (True, False))
    mean, std = IMAGENET
    if not name.startswith("imagenet"):
        level, size = np.arange(256) / 255, train.inputs[..., 0].size
        share = np.stack([np.bincount(x.ravel(), minlength=256) / size
                          for x in np.moveaxis(train.inputs, -1, 0)])
        mean = share @ level
        std = np.sqrt(np.sum(share * (level - mean[:, None]) ** 2, axis=1))
        mean, std = tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())
    return Dataset(name, classes, mean, std, *jax.tree.map(jnp.asarray, (train, test)))


def download(data_dir: str | os.PathLike) -> None:
    """Fetch CIFAR-10 into data_dir/cifar-10-batches-bin, unless it is there."""
    folder, content = Path(data_dir) / "cifar-10-batches-bin", bytearray()
    if all((folder / file).is_file() for file in CIFAR10_FILES):
        return
    with reading(CIFAR10_URL), urllib.request.urlopen(CIFAR10_URL, timeout=30) as response:
        with tqdm.tqdm(total=response.length, unit="B", unit_scale=True, desc="CIFAR-10") as bar:
            while block := response.read(1 << 16):
                content += block
                bar.update(len(block))
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != CIFAR10_MD5:
        raise InputError(f"{CIFAR10_URL}: its MD5 is not the published one")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for file in CIFAR10_FILES:
            records = archive.extractfile(f"cifar-10-batches-bin/{file}").read()
            lopt.write_atomically(folder / file, lambda part: part.write(records))


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The token ids of a .npy file, or of a raw file of uint16 (uint32 above 65,536 ids)."""
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r")
    else:
        tokens = np.memmap(path, "<u4" if vocab_size > 65_536 else "<u2", "r")
        head = tokens[:1 << 16]
        if head.any() and not head[1::2].any():
            bits = 16 * tokens.itemsize * (1 if head[2::4].any() else 2)
            raise ValueError(f"it looks like int{bits}, not {tokens.dtype}: save it as .npy")
        if set(head.tobytes()[:-4].decode(errors="replace")).isdisjoint("\0\ufffd"):
            raise ValueError("it looks like text: use --dataset text")
    for i in range(0, len(tokens), 1 << 24):
        low, high = (f(tokens[i:i + (1 << 24)]) for f in (np.min, np.max))
        if low < 0 or high >= vocab_size or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{low} to {high}: no list of ids below --vocab-size {vocab_size}")
    return tokens


def load_tokens(name: str, path: Path, vocab_size: int, length: int) -> Dataset:
    """Text or tokens in rows of this length; without val.bin the last tenth is held out."""
    with reading(path):
        if name == "text":
            files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
            text = b"".join(file.read_bytes() for file in files)
            text.decode()
            vocab_size, parts = 256, [np.frombuffer(text, np.uint8)]
        else:
            files = [path / "train.bin", *path.glob("val.bin")] if path.is_dir() else [path]
            parts = [read_tokens(file, vocab_size) for file in files]
    if len(parts) == 1:
        parts = np.split(parts[0], [len(parts[0]) - len(parts[0]) // 10])
    if min(map(len, parts)) < 2 * length:
        raise InputError(f"{path}: too short: a split has less than two sequences of {length}")
    dtype = np.uint8 if vocab_size <= 256 else np.uint16 if vocab_size <= 65_536 else np.int32
    rows = (x[:len(x) // length * length].reshape(-1, length).astype(dtype) for x in parts)
    splits = (Split(jnp.asarray(x), jnp.zeros(0, jnp.int32)) for x in rows)
    return Dataset(name, vocab_size, (), (), *splits)


def load_dataset(name: str, data_dir: str | os.PathLike = "data", image_size: int | None = None,
                 vocab_size: int = 0, sequence_length: int = 64) -> Dataset:
    """Read one of DATASETS and put it on the device. Raises `InputError`."""
    if name in ("text", "tokens"):
        return load_tokens(name, Path(data_dir), vocab_size, sequence_length)
    return load_images(name, Path(data_dir), image_size)


def fingerprint(dataset: Dataset) -> str:
    """A checksum of a data set's head, so that resuming on other data fails."""
    digest = hashlib.sha256()
    for x in jax.tree.leaves((dataset.train, dataset.test)):
        head = x[:(1 << 26) // max(1, math.prod(x.shape[1:]))]
        digest.update(f"{x.shape} {x.dtype}".encode() + np.asarray(head).tobytes())
    return digest.hexdigest()


def task_of(args: argparse.Namespace, dataset: Dataset, width: int, depth: int,
            p: Parametrization) -> Task:
    """The inner task of the flags at one size."""
    if (args.task == "lm") != (dataset.train.inputs.ndim == 2):
        raise InputError(f"--task {args.task}: does not take --dataset {dataset.name}; lm takes "
                         "text and tokens, the others take images")
    make = {"mlp": mlp_task, "vit": partial(vit_task, patch=args.patch), "lm": lm_task}
    return make[args.task](dataset, width, depth, args.batch_size, p)


def numbers(kind: type, low: float, high: float) -> Callable:
    """An argparse type: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return kind(text)

    return number


COUNT, COUNT_OR_0, SEED = numbers(int, 1, 10**9), numbers(int, 0, 10**9), numbers(int, 0, 2**32 - 1)
SHARE, SCALE = numbers(float, 0, 1), numbers(float, 1e-18, 1e18)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, name: str, doc: str):
        layout = partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=30)
        super().__init__(name, f"python {name} [flags]", doc.split("\n\n")[1],
                         formatter_class=layout, allow_abbrev=False)

    def error(self, message: str):
        """Raise `InputError`."""
        raise InputError(message)

    def flag(self, name: str, kind: Any, default: Any, help: str, **more: Any) -> None:
        """Add a flag. kind: a type, bool (a switch) or a tuple of choices."""
        if kind is bool:
            more["action"] = "store_true"
        elif isinstance(kind, tuple):
            more["choices"] = kind
        else:
            more = {"type": kind, "metavar": "N"} | more
        more |= {"nargs": "+"} if isinstance(default, list) else {}
        help += "" if default in (None, []) or kind is bool else " (default: %(default)s)"
        self.add_argument(name, default=default, help=help, **more)


def add_task_flags(parser: CommandLine) -> None:
    """Add the flags of the inner task, which all commands share."""
    flag = parser.flag
    flag("--task", ("mlp", "vit", "lm"), "mlp", "the inner networks")
    flag("--dataset", DATASETS, "synthetic", "their data; synthetic needs no files")
    flag("--data-dir", str, "data", "folder of data, or file of text or tokens", metavar="DIR")
    flag("--download", bool, False, "fetch CIFAR-10 into --data-dir first")
    flag("--image-size", COUNT, None, "shrink images, or make synthetic ones, N×N")
    flag("--vocab-size", COUNT_OR_0, 0, "number of token ids")
    flag("--sequence-length", COUNT, 64, "tokens of a sequence")
    flag("--widths", COUNT, [32], "widths of the inner networks")
    flag("--depth", COUNT, 3, "hidden layers, or transformer blocks")
    flag("--patch", COUNT, 4, "side of a ViT's patches")
    flag("--batch-size", COUNT, 64, "inner batch size")
    flag("--matmul-precision", ("highest", "TF32_TF32_F32_X3", "tensorfloat32", "bfloat16"),
         "highest", "of products on a GPU; highest is float32")
    flag("--seed", SEED, 0, "of all draws but synthetic data")


def load_data(args: argparse.Namespace) -> Dataset:
    """The data set of the flags."""
    if args.download:
        download(args.data_dir)
    return load_dataset(args.dataset, args.data_dir, args.image_size, args.vocab_size,
                        args.sequence_length)


@contextlib.contextmanager
def on_signals(numbers: Sequence[int], react: Callable) -> Iterator[None]:
    """Call react(number) as soon as a signal arrives, in a thread: XLA may keep the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}
    before = signal.set_wakeup_fd(writer)

    def watch():
        with open(reader, "rb", 0) as pipe:
            while number := pipe.read(1):
                if number[0] in handlers:
                    react(number[0])

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)


def leave(code: int, message: str) -> None:
    """End this process at once, while XLA may still compute."""
    with contextlib.suppress(OSError):  # they may be closed
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def command(run: Callable, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line: its exit code. What the user can mend is one line on stderr."""
    with contextlib.suppress(AttributeError):  # a notebook's streams lack it
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # shows ? for θ in ASCII
    try:
        with on_signals([signal.SIGINT], lambda _: leave(130, f"\n{name}: interrupted")):
            try:
                return run(argv)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # nobody reads stdout any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        why = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in why:
            why = f"not enough memory; use smaller sizes ({why})"
        elif not isinstance(error, (InputError, OSError)):
            raise
    print(f"{name}: error: {why}", file=sys.stderr)
    return 2


def set_up(args: argparse.Namespace, divides: int = 0) -> None:
    """Set the precision of products. Make CPU devices: at most one a core, dividing `divides`."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        count = max(d for d in range(1, cores + 1) if divides % d == 0)
        with contextlib.suppress(RuntimeError):  # JAX has been used: its devices stay
            jax.config.update("jax_num_cpu_devices", count)
    try:
        is_cpu = jax.default_backend() == "cpu"  # it has float32 products alone
    except (AssertionError, RuntimeError):
        raise InputError("JAX finds no device: see JAX_PLATFORMS") from None
    jax.config.update("jax_default_matmul_precision",
                      "highest" if is_cpu else args.matmul_precision)


def main() -> None:
    """Print a coordinate check of Adam on MLPs, in SP and in μP."""
    dataset, widths, key = load_dataset("synthetic"), (32, 128, 512), jax.random.key(0)
    for p, rate in ((mup.SP, 1e-3), (mup.MUP, 1e-2)):
        moved = []
        for width in widths:
            task = mlp_task(dataset, width, 3, 64, p)
            adam = lopt.adamw(rate, update_multipliers=mup.update_multipliers(task.weights, p))
            run = partial(coordinate_check, task, lambda _: adam, steps=10)
            moved.append(math.sqrt(jax.jit(run)(dataset.train, key)["logits"][1][-1]))
            print(f"{p.name}, width {width}: RMS change of the logits in 10 steps {moved[-1]:.3f}")
        print(f"{p.name}: it grows as width^{slope(widths, moved):.2f}")


if __name__ == "__main__":
    main()
