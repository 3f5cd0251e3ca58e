"""Inner tasks: data sets that stay on the device, and the networks that learned optimizers train on them.

    python tasks.py      the data sets that are present, their statistics, a few steps of Adam (20 s)

A `Dataset` holds uint8 images with int32 labels (or token ids) in two `Split`s, train and test. A `Task` ties a
data set to a network in μP or SP: each weight is declared once as a `mup.Weight`, and all else (initialisation,
forward multipliers, update multipliers) follows from the declarations. A task is a record of pure functions,
written to be called inside a jitted step: batches are drawn there from a key and standardised there, so that
the data set travels to the device once.

Sources: μLO (arXiv 2406.00153), its inner tasks.

Dimensions: M examples of a split, B batch, H height and width of an image, C channels, D pixels of an
image (H·H·C), W width, V classes or vocabulary, L tokens of a sequence, A attention heads, S size of a head
(W = A·S), P side of a patch.
"""

import argparse
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import pathlib
import tarfile
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

# ---------------------------------------------------------------------------------------------------------
# Records


class Split(NamedTuple):
    """One part of a data set, on the device: inputs uint8 [M, H, H, C] and labels int32 [M].

    Text: inputs are rows of tokens [M, L], uint8, uint16 or int32 as the vocabulary needs, labels are empty [0].
    """
    inputs: Array
    labels: Array


class Dataset(NamedTuple):
    """A data set. mean, std: per channel, of pixels scaled to [0, 1], by which a step standardises them."""
    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split | None


class Task(NamedTuple):
    """An inner problem as pure functions.

    init(key) → params. sample(key, split) → (inputs, labels), a standardised batch of the task's batch size.
    forward(params, inputs) → (logits, pre-activations by name, in the order of the layers).
    loss(params, batch) → mean cross-entropy in nats (scalar).
    test(params, split) → (loss, accuracy) over up to the first 10,000 examples of a split.
    max_loss: 1.5 ln(classes), at which PES clips the meta-loss. weights: the declarations.
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
        """The μP update multiplier of every weight (all 1 in SP)."""
        return mup.update_multipliers(self.weights, self.parametrization)

    @property
    def gradient_multiplier(self) -> float:
        """By what a learned optimizer's gradients are multiplied (1 unless the parametrization has a base width)."""
        return mup.gradient_multiplier(self.weights, self.parametrization)


# ---------------------------------------------------------------------------------------------------------
# Data sets

CIFAR10_EXAMPLES = 10_000  # in each of the six binary files
MAX_EXAMPLES = {"idx": 100_000, "npz": 200_000}  # in one file; more would be damage, or meant to fill the memory
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # its channels' customary means and standard deviations
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# data set: (where its files are published, {file: MD5 that is published there})
DOWNLOADS = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",
                {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(zip(
        (f"{file}.gz" for file in IDX_FILES),
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
         "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))))}
MAX_DOWNLOAD = 1 << 28  # bytes of one file


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Averages blocks of pixels, rounded to the nearest: uint8 [M, H, H, C] → uint8 [M, size, size, C]."""
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
    """60,000 images of clutter with an object in it: uint8 [60,000, size, size, 3] and their 10 classes.

    Clutter and objects are random fields with amplitudes f^−1.2 at f cycles per image, like photographs. A class
    has four objects; one of them is shifted (by N(0, 0.7²) of 8 pixels), scaled by a log-normal contrast, and
    added to the clutter. Constants are set so that models rank, and learn, as on CIFAR-10 at 8×8 pixels. A
    larger size (a multiple of 8) adds finer frequencies.
    """
    if size % 8 or not 8 <= size <= 64:
        raise ValueError(f"image size {size} of data set 'synthetic': use 8, 16, 24, 32, 40, 48, 56 or 64")
    classes, objects, examples, chunk = 10, 4, 60_000, 1_000
    rng = np.random.default_rng(0)
    fx = np.fft.fftfreq(size, 1 / size).astype(np.float32)
    fy = fx[:, None]
    amplitude = np.maximum(np.hypot(fy, fx), 1.0) ** -1.2
    amplitude /= np.sqrt(np.mean(amplitude ** 2))  # then a field's pixels have variance 1
    fx, amplitude = fx[:size // 2 + 1], amplitude[:, :size // 2 + 1].astype(np.float32)
    to_rgb = np.array([[1, 1, 1], [0.4, 0, -0.4], [0.2, -0.4, 0.2]], np.float32)  # more brightness than colour

    def spectra(count: int) -> np.ndarray:
        noise = to_rgb.T @ rng.standard_normal((count, 3, size * size), np.float32)
        return np.fft.rfft2(noise.reshape(-1, 3, size, size)).astype(np.complex64) * amplitude

    prototypes = spectra(classes * objects).reshape(classes, objects, 3, size, size // 2 + 1)
    labels = np.arange(examples) % classes
    images = np.empty((examples, size, size, 3), np.uint8)
    for start in range(0, examples, chunk):
        clutter, which = spectra(chunk), rng.integers(objects, size=chunk)
        dy, dx = rng.standard_normal((2, chunk, 1, 1, 1), np.float32) * np.float32(0.7 / 8)  # parts of the image
        contrast = 0.5 * np.exp(1.5 * rng.standard_normal((chunk, 1, 1, 1), np.float32))
        shift = np.exp(-2j * np.pi * fy * dy) * np.exp(-2j * np.pi * fx * dx)
        spectrum = clutter + contrast * shift * prototypes[labels[start:start + chunk], which]
        pixels = np.fft.irfft2(spectrum / np.sqrt(1 + contrast ** 2), (size, size))
        images[start:start + chunk] = np.clip(np.rint(120 + 50 * pixels), 0, 255).transpose(0, 2, 3, 1)
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


def find(name: str, folder: pathlib.Path, files: Sequence[str],
         endings: Sequence[str] = ("",)) -> list[pathlib.Path]:
    """The paths of a data set's files: all in a folder of its name inside folder, or else all in folder itself."""
    inside = "cifar-10-batches-bin" if name == "cifar10" else name
    for place in (folder / inside, folder):
        paths = [next((p for end in endings if (p := place / (file + end)).is_file()), None) for file in files]
        if any(paths):
            break
    if None in paths:
        fetch = "; --download fetches it" if name in DOWNLOADS else ""
        raise ValueError(f"{folder}: no file {files[paths.index(None)]!r} here or in {inside!r} inside, "
                         f"which data set {name!r} needs{fetch}")
    return paths


def checked_labels(path: pathlib.Path, labels: np.ndarray, classes: int, first: int = 0) -> np.ndarray:
    """Labels first, first+1, … → int32 labels 0 … classes−1, after a check of their range."""
    if labels.size and not first <= labels.min() <= labels.max() < first + classes:
        raise ValueError(f"{path}: has labels from {labels.min()} to {labels.max()}, but they must lie between "
                         f"{first} and {first + classes - 1}; fetch it again")
    return (labels.astype(np.int64) - first).astype(np.int32)


# A reader yields the parts of a data set: whether it is of the training split, images [M, H, H, C], labels [M].
Parts = Iterator[tuple[bool, np.ndarray, np.ndarray]]


def read_cifar10(name: str, folder: pathlib.Path) -> Parts:
    """CIFAR-10, binary version: five files data_batch_1.bin … and test_batch.bin, or the tar.gz that holds them.

    A file is 10,000 records of a label and 3 × 32 × 32 pixels. The tar is read in memory, never extracted.
    """
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    size = CIFAR10_EXAMPLES * 3073
    archive = folder / "cifar-10-binary.tar.gz"
    try:
        paths = find(name, folder, files)
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
        labels = checked_labels(path, records[:, 0], 10)
        yield file != "test_batch.bin", records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def read_tar(path: pathlib.Path, files: Sequence[str], size: int) -> list[bytes]:
    """The named files of size bytes each out of cifar-10-binary.tar.gz, all of it in memory."""
    content = read_bytes(path, len(files) * size + (1 << 20))  # a readme and the class names are in there, too
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"{path}: is no tar archive ({error}); fetch it again") from None
    wanted = {}
    for member in members:
        parts = pathlib.PurePosixPath(member.name).parts
        plain = member.isdir() and len(parts) == 1 or member.isreg() and not member.issparse() and len(parts) == 2
        if not plain or parts[0] != "cifar-10-batches-bin" or ".." in parts or parts[-1] in wanted:
            raise ValueError(f"{path}: has a stray member {member.name!r}; fetch it again")
        if parts[-1] in files:
            if member.size != size:
                raise ValueError(f"{path}: {member.name!r} has {member.size:,} bytes instead of {size:,}; "
                                 "fetch it again")
            wanted[parts[-1]] = content[member.offset_data:member.offset_data + size]
    if missing := [file for file in files if file not in wanted]:
        raise ValueError(f"{path}: has no member {missing[0]!r}; fetch it again")
    return [wanted[file] for file in files]


def read_idx(name: str, folder: pathlib.Path) -> Parts:
    """MNIST and Fashion-MNIST: IDX files, plain or .gz (magic number, sizes as big-endian uint32, bytes)."""
    paths = find(name, folder, IDX_FILES, ("", ".gz"))
    for images_path, labels_path in (paths[:2], paths[2:]):
        arrays = []
        for path, shape in ((images_path, (28, 28)), (labels_path, ())):
            header = 8 + 4 * len(shape)
            content = read_bytes(path, header + MAX_EXAMPLES["idx"] * math.prod(shape))
            magic, count, *sizes = np.frombuffer(content[:header].ljust(header, b"\0"), ">u4").tolist()
            if magic != 0x801 + len(shape) or tuple(sizes) != shape:
                raise ValueError(f"{path}: does not start as an IDX file of uint8 "
                                 f"{'images of 28 × 28' if shape else 'labels'} does; fetch it again")
            if count < 1 or len(content) != header + count * math.prod(shape):
                raise ValueError(f"{path}: has {len(content):,} bytes, which is not what {count:,} examples take; "
                                 "fetch it again")
            arrays.append(np.frombuffer(content, np.uint8, offset=header).reshape(count, *shape))
        images, labels = arrays
        if len(images) != len(labels):
            raise ValueError(f"{labels_path}: has {len(labels):,} labels for {len(images):,} images; "
                             "fetch it again")
        yield images_path == paths[0], images[..., None], checked_labels(labels_path, labels, 10)


def read_imagenet(name: str, folder: pathlib.Path) -> Parts:
    """Downsampled ImageNet (arXiv 1707.08819): .npz files, data uint8 [M, 3·S·S] and labels 1 … 1000."""
    size = int(name.removeprefix("imagenet"))
    for path in find(name, folder, [f"train_data_batch_{i}.npz" for i in range(1, 11)] + ["val_data.npz"]):
        arrays = lopt.read_npz(path, MAX_EXAMPLES["npz"] * (3 * size * size + 8) + (1 << 20))
        if not {"data", "labels"} <= set(arrays):
            raise ValueError(f"{path}: has no arrays 'data' and 'labels'; fetch it again")
        data, labels = arrays["data"], arrays["labels"]
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * size * size or not len(data):
            raise ValueError(f"{path}: data is {data.dtype} {list(data.shape)} instead of uint8 "
                             f"[M, {3 * size * size}]; is it of another image size?")
        if labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
            raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)} instead of integers "
                             f"[{len(data)}]; fetch it again")
        labels = checked_labels(path, labels, 1000, first=1)
        yield path.name != "val_data.npz", data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1), labels


def read_text(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a UTF-8 file, or of all files of a folder in the order of their names; a tenth is held out."""
    paths = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
    contents = [file.read_bytes() for file in paths]
    for file, content in zip(paths, contents):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is no UTF-8 text at byte {error.start:,}; remove or convert it") from None
    tokens = np.frombuffer(b"".join(contents), np.uint8)
    return np.split(tokens, [len(tokens) - len(tokens) // 10])


def read_tokens(path: pathlib.Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, little-endian uint16 (uint32 for a vocabulary above 65,536): a file, of which a tenth is held
    out, or a folder's train.bin, with val.bin held out if it is there. They are mapped, not read."""
    def ids(file: pathlib.Path) -> np.ndarray:
        dtype = np.dtype("<u4" if vocab_size > 65_536 else "<u2")
        size = file.stat().st_size
        if not size or size % dtype.itemsize:
            raise ValueError(f"{file}: has {size:,} bytes, not a whole number of {dtype.name} token ids")
        tokens = np.memmap(file, dtype, "r")
        for start in range(0, len(tokens), 1 << 24):
            if (largest := tokens[start:start + (1 << 24)].max()) >= vocab_size:
                raise ValueError(f"{file}: has token id {largest}, which is not below vocab size {vocab_size}")
        return tokens

    train = ids(path / "train.bin" if path.is_dir() else path)
    if path.is_dir() and (path / "val.bin").exists():
        return train, ids(path / "val.bin")
    return np.split(train, [len(train) - len(train) // 10])


def token_rows(path: pathlib.Path, tokens: np.ndarray, vocabulary: int, length: int) -> Split:
    """Tokens [n] → a `Split` of rows [n // length, length], in the smallest dtype that holds the vocabulary."""
    if len(tokens) < 2 * length:
        raise ValueError(f"{path}: a split of {len(tokens):,} tokens is shorter than two sequences of {length}; "
                         "use more text or shorter sequences")
    dtype = np.uint8 if vocabulary <= 256 else np.uint16 if vocabulary <= 65_536 else np.int32
    rows = tokens[:len(tokens) // length * length].reshape(-1, length).astype(dtype)
    return Split(jnp.asarray(rows), jnp.zeros(0, jnp.int32))


READERS = {"cifar10": (read_cifar10, 10), "mnist": (read_idx, 10), "fashion_mnist": (read_idx, 10),
           "imagenet32": (read_imagenet, 1000), "imagenet64": (read_imagenet, 1000)}
DATASETS = ("synthetic", *READERS, "text", "tokens")


def load_dataset(name: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None, *,
                 vocab_size: int | None = None, sequence_length: int | None = None) -> Dataset:
    """Reads one of DATASETS, checks it and puts it on the device.

    data_dir: the folder that holds its files, or (text, tokens) the file itself. image_size: pixels to which
    images are shrunk. vocab_size: of tokens, required there. sequence_length: of the rows of text (64).
    Raises ValueError, in one line that names the file, for whatever is missing, damaged or does not fit.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    if data_dir is None and name != "synthetic":
        raise ValueError(f"data set {name!r} is read from files: say where they are with --data-dir")
    path = pathlib.Path(data_dir or ".")
    try:
        if name in ("text", "tokens"):
            return load_tokens(name, path, image_size, vocab_size,
                               64 if sequence_length is None else sequence_length)
        return load_images(name, path, image_size, vocab_size)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def load_images(name: str, path: pathlib.Path, image_size: int | None, vocab_size: int | None) -> Dataset:
    """The part of `load_dataset` for images."""
    if vocab_size is not None:
        raise ValueError(f"vocab size {vocab_size} given for images: it belongs to data set 'tokens'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size {image_size} is not positive")
    if name == "synthetic":
        images, labels = make_synthetic(max(8, image_size or 8))
        parts, classes = [(True, images[:50_000], labels[:50_000]), (False, images[50_000:], labels[50_000:])], 10
    else:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder, and data set {name!r} is looked for there")
        reader, classes = READERS[name]
        parts = reader(name, path)
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
            raise ValueError(f"vocab size {vocab_size} given for data set 'text', whose vocabulary is 256 bytes")
        vocab_size, splits = 256, read_text(path)
    else:
        if vocab_size is None or not 1 < vocab_size < 1 << 31:
            raise ValueError(f"vocab size {vocab_size} for data set 'tokens': say how many ids there are with "
                             "--vocab-size, from 2 to 2,147,483,647")
        splits = read_tokens(path, vocab_size)
    return Dataset(name, vocab_size, (), (), *(token_rows(path, s, vocab_size, sequence_length) for s in splits))


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]; exact, from histograms."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    share, level = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    std = np.sqrt(np.sum(share * (level - mean[:, None]) ** 2, axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())  # a channel may be constant


def download(name: str, data_dir: str | os.PathLike, *, base_url: str | None = None) -> None:
    """Fetches the files of cifar10 or fashion_mnist into data_dir, unless they are there with the right MD5.

    A file appears only once it is whole and its MD5 is right. base_url replaces the published address.
    Raises ValueError for any failure of the network, the disk or the checksum.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"data set {name!r} cannot be downloaded, only {' and '.join(DOWNLOADS)}")
    url, checksums = DOWNLOADS[name]
    folder = pathlib.Path(data_dir) / ("" if name == "cifar10" else name)  # MNIST's files have the same names
    for file, md5 in checksums.items():
        address, path, partial = (base_url or url) + file, folder / file, folder / f".{file}.{os.getpid()}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5:
                continue
            with urllib.request.urlopen(address, timeout=30) as response, open(partial, "wb") as output:
                expected, digest = response.length, hashlib.md5(usedforsecurity=False)
                with tqdm.tqdm(total=expected, unit="B", unit_scale=True, desc=file) as progress:
                    while (block := response.read(1 << 16)) and progress.n <= MAX_DOWNLOAD:
                        output.write(block)
                        digest.update(block)
                        progress.update(len(block))
                received = progress.n
                output.flush()
                os.fsync(output.fileno())
            if expected is not None and received < expected:
                raise ValueError(f"{address}: the connection broke off after {received:,} of {expected:,} bytes")
            if digest.hexdigest() != md5:
                raise ValueError(f"{address}: has the MD5 {digest.hexdigest()} instead of {md5}; nothing was kept")
            os.replace(partial, path)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{address}: could not be fetched to {path} ({error})") from None
        finally:
            if partial.exists():
                partial.unlink()


# ---------------------------------------------------------------------------------------------------------
# Networks


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−ln softmax(logits)[label], in nats: logits [..., V], labels int [...] → [...]."""
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_label


def mlp(inputs: int, classes: int, width: int, depth: int, parametrization: Parametrization):
    """The multi-layer perceptron of μLO: `depth` hidden layers of `width` ReLU units and a read-out.

    Returns (weights, forward); forward(params, x [B, D]) → (logits [B, V], pre-activations).
    """
    layers = [mup.matrix("input", inputs, width)]
    layers += [mup.matrix("hidden", width, width) for _ in range(depth - 1)]
    layers += [mup.matrix("output", width, classes)]
    names = [f"layer_{i}" for i in range(depth)] + ["logits"]
    weights = dict(zip(names, layers))

    def forward(params: Tree, x: Array) -> tuple[Array, dict[str, Array]]:
        x = x.reshape(x.shape[0], -1)  # (B, D)
        pre_activations = {}
        for name in names:
            x = pre_activations[name] = mup.linear(weights[name], params[name], x, parametrization)  # (B, W)
            if name != "logits":
                x = jax.nn.relu(x)
        return x, pre_activations  # (B, V)

    return weights, forward


def layer_norm(params: dict[str, Array], x: Array) -> Array:
    """LayerNorm: each [W] to mean 0 and variance 1, then gain and shift: x [..., W] → [..., W]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred ** 2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["gain"] + params["shift"]


def embedding(weights: Tree, params: Tree, name: str, parametrization: Parametrization) -> Array:
    """An input weight that is looked up or added rather than applied to numbers, with its forward multiplier."""
    return mup.forward_multiplier(weights[name], parametrization) * params[name]


def attention(weights: Tree, params: Tree, x: Array, heads: int, causal: bool,
              parametrization: Parametrization) -> tuple[Array, Array]:
    """Self-attention: x [B, L, W] → (output [B, L, W], attention logits [B, A, L, L]).

    softmax(q·k / S) v in μP, softmax(q·k / √S) v in SP. The logits are returned before the causal mask, finite
    everywhere, for the statistics of a coordinate check.
    """
    batch, length, width = x.shape
    size = width // heads
    q, k, v = (mup.linear(weights[name], params[name], x, parametrization).reshape(batch, length, heads, size)
               for name in ("q", "k", "v"))  # (B, L, A, S)
    logits = jnp.einsum("blas,bmas->balm", q, k) * mup.attention_scale(size, parametrization)  # (B, A, L, L)
    masked = jnp.where(jnp.tri(length, dtype=bool), logits, -jnp.inf) if causal else logits
    mixed = jnp.einsum("balm,bmas->blas", jax.nn.softmax(masked), v).reshape(x.shape)  # (B, L, W)
    return mup.linear(weights["o"], params["o"], mixed, parametrization), logits


def block_weights(width: int) -> Tree:
    """Declares a transformer block: two norms, attention, and an MLP of 4 times the width. All of it hidden."""
    return {"norm_1": mup.norm(width), "attention": {n: mup.matrix("hidden", width, width) for n in "qkvo"},
            "norm_2": mup.norm(width),
            "mlp": {"up": mup.matrix("hidden", width, 4 * width), "down": mup.matrix("hidden", 4 * width, width)}}


def block(weights: Tree, params: Tree, x: Array, heads: int, causal: bool,
          parametrization: Parametrization) -> tuple[Array, Array]:
    """A pre-LayerNorm block with GELU (its tanh form): x [B, L, W] → (x [B, L, W], attention logits)."""
    mixed, attention_logits = attention(weights["attention"], params["attention"],
                                        layer_norm(params["norm_1"], x), heads, causal, parametrization)
    x = x + mixed
    up = mup.linear(weights["mlp"]["up"], params["mlp"]["up"], layer_norm(params["norm_2"], x), parametrization)
    up = jax.nn.gelu(up, approximate=True)  # (B, L, 4W)
    return x + mup.linear(weights["mlp"]["down"], params["mlp"]["down"], up, parametrization), attention_logits


def blocks(weights: Tree, params: Tree, x: Array, depth: int, heads: int, causal: bool,
           parametrization: Parametrization, remat: bool) -> tuple[Array, dict[str, Array]]:
    """block_0 … block_{depth−1}, then the final LayerNorm: x [B, L, W] → (x [B, L, W], pre-activations).

    remat: keep only each block's input for the backward pass and compute the rest of the block again there.
    """
    pre_activations = {}
    for name in [f"block_{i}" for i in range(depth)]:
        apply = functools.partial(block, weights[name], heads=heads, causal=causal,
                                  parametrization=parametrization)
        apply = jax.checkpoint(apply) if remat else apply
        x, pre_activations[f"{name}/attention_logits"] = apply(params[name], x)
        pre_activations[name] = x
    return layer_norm(params["norm"], x), pre_activations


def vit(image_shape: tuple[int, int, int], classes: int, width: int, depth: int, heads: int, patch: int,
        parametrization: Parametrization, remat: bool = False):
    """The vision transformer: patches of P×P pixels and a class token, blocks, read-out from the class token.

    Returns (weights, forward); forward(params, x [B, H, H, C]) → (logits [B, V], pre-activations).
    input_mult multiplies every weight of the kind input: patch embedding, class token, position embeddings.
    """
    height, _, channels = image_shape
    side = height // patch  # patches along one side; L = 1 + side²
    weights = {"patch": mup.matrix("input", patch * patch * channels, width),
               "class_token": Weight("input", (width,), constant=0.0),
               "positions": Weight("input", (1 + side * side, width), std=0.02),
               **{f"block_{i}": block_weights(width) for i in range(depth)},
               "norm": mup.norm(width), "logits": mup.matrix("output", width, classes)}

    def forward(params: Tree, x: Array) -> tuple[Array, dict[str, Array]]:
        x = x.reshape(-1, side, patch, side, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, side * side, patch * patch * channels)  # (B, L−1, P·P·C)
        x = mup.linear(weights["patch"], params["patch"], x, parametrization)
        class_token = jnp.broadcast_to(embedding(weights, params, "class_token", parametrization),
                                       (x.shape[0], 1, width))
        x = jnp.concatenate([class_token, x], axis=1)  # (B, L, W)
        x = x + embedding(weights, params, "positions", parametrization)
        x, pre_activations = blocks(weights, params, x, depth, heads, False, parametrization, remat)
        logits = mup.linear(weights["logits"], params["logits"], x[:, 0], parametrization)
        return logits, {**pre_activations, "logits": logits}  # (B, V)

    return weights, forward


def transformer_lm(vocabulary: int, sequence_length: int, width: int, depth: int, heads: int,
                   parametrization: Parametrization, remat: bool = False):
    """The decoder-only language model: token and position embeddings, causal blocks, read-out at every token.

    Returns (weights, forward); forward(params, tokens int [B, L]) → (logits [B, L, V], pre-activations).
    input_mult multiplies every weight of the kind input: token embeddings and position embeddings.
    """
    weights = {"tokens": Weight("input", (vocabulary, width), vocabulary, std=vocabulary ** -0.5),
               "positions": Weight("input", (sequence_length, width), std=0.02),
               **{f"block_{i}": block_weights(width) for i in range(depth)},
               "norm": mup.norm(width), "logits": mup.matrix("output", width, vocabulary)}

    def forward(params: Tree, tokens: Array) -> tuple[Array, dict[str, Array]]:
        x = embedding(weights, params, "tokens", parametrization)[tokens]  # (B, L, W)
        x = x + embedding(weights, params, "positions", parametrization)
        x, pre_activations = blocks(weights, params, x, depth, heads, True, parametrization, remat)
        logits = mup.linear(weights["logits"], params["logits"], x, parametrization)
        return logits, {**pre_activations, "logits": logits}  # (B, L, V)

    return weights, forward


def classification(name: str, dataset: Dataset, batch_size: int, parametrization: Parametrization,
                   weights: Tree, forward: Callable) -> Task:
    """A `Task` that trains a network to classify the images of a data set."""
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)

    def standardise(images: Array) -> Array:
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    def sample(key: Array, split: Split) -> tuple[Array, Array]:
        at = jax.random.randint(key, (batch_size,), 0, split.labels.shape[0])
        return standardise(split.inputs[at]), split.labels[at]

    def loss(params: Tree, batch: tuple[Array, Array]) -> Array:
        inputs, labels = batch
        return jnp.mean(cross_entropy(forward(params, inputs)[0], labels))

    def test(params: Tree, split: Split) -> tuple[Array, Array]:
        inputs, labels = split.inputs[:10_000], split.labels[:10_000]

        def example(at):
            logits = forward(params, standardise(inputs[at])[None])[0][0]
            return cross_entropy(logits, labels[at]), jnp.argmax(logits) == labels[at]

        losses, correct = jax.lax.map(example, jnp.arange(labels.shape[0]), batch_size=250)
        return jnp.mean(losses), jnp.mean(correct)

    return Task(name, weights, parametrization, 1.5 * math.log(dataset.classes),
                lambda key: mup.init(weights, key, parametrization), sample, forward, loss, test)


def language_modelling(name: str, dataset: Dataset, batch_size: int, parametrization: Parametrization,
                       weights: Tree, forward: Callable) -> Task:
    """A `Task` that trains a network to predict the next token; a split's inputs are rows of tokens [M, L].

    A training window of L + 1 tokens may begin at any token, hence spans two rows; a test window is a row and
    the token that follows it. test covers up to the first 2,000 rows; its accuracy is that of the next token.
    """
    length = dataset.train.inputs.shape[1]

    def windows(split: Split, row: Array, offset: Array) -> tuple[Array, Array]:
        at = offset[:, None] + jnp.arange(length + 1)  # (B, L + 1), counted from the first token of the row
        tokens = split.inputs[row[:, None] + at // length, at % length].astype(jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]  # (B, L)

    def sample(key: Array, split: Split) -> tuple[Array, Array]:
        row_key, offset_key = jax.random.split(key)
        row = jax.random.randint(row_key, (batch_size,), 0, split.inputs.shape[0] - 1)
        return windows(split, row, jax.random.randint(offset_key, (batch_size,), 0, length))

    def loss(params: Tree, batch: tuple[Array, Array]) -> Array:
        inputs, labels = batch
        return jnp.mean(cross_entropy(forward(params, inputs)[0], labels))

    def test(params: Tree, split: Split) -> tuple[Array, Array]:
        rows = jnp.arange(min(split.inputs.shape[0] - 1, 2_000))

        def window(row):
            inputs, labels = windows(split, row[None], jnp.zeros(1, jnp.int32))
            logits = forward(params, inputs)[0]
            return jnp.mean(cross_entropy(logits, labels)), jnp.mean(jnp.argmax(logits, axis=-1) == labels)

        losses, correct = jax.lax.map(window, rows, batch_size=50)
        return jnp.mean(losses), jnp.mean(correct)

    return Task(name, weights, parametrization, 1.5 * math.log(dataset.classes),
                lambda key: mup.init(weights, key, parametrization), sample, forward, loss, test)


def mlp_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             parametrization: Parametrization = mup.MUP) -> Task:
    """An MLP of that width and depth on the images of a data set (μLO's first task)."""
    pixels = math.prod(dataset.train.inputs.shape[1:])
    weights, forward = mlp(pixels, dataset.classes, width, depth, parametrization)
    return classification(f"mlp-w{width}-d{depth}", dataset, batch_size, parametrization, weights, forward)


def vit_task(dataset: Dataset, width: int, depth: int, batch_size: int,
             parametrization: Parametrization = mup.MUP, *, heads: int | None = None, head_size: int = 32,
             patch: int = 4, remat: bool = False) -> Task:
    """A vision transformer on the images of a data set. heads: by default as many as head_size makes."""
    image_shape, heads = dataset.train.inputs.shape[1:], head_count(width, heads, head_size)
    if patch < 1 or image_shape[0] % patch:
        raise ValueError(f"patch {patch} does not divide the image size {image_shape[0]} of {dataset.name}")
    weights, forward = vit(image_shape, dataset.classes, width, depth, heads, patch, parametrization, remat)
    return classification(f"vit-w{width}-d{depth}", dataset, batch_size, parametrization, weights, forward)


def lm_task(dataset: Dataset, width: int, depth: int, batch_size: int,
            parametrization: Parametrization = mup.MUP, *, heads: int | None = None, head_size: int = 32,
            sequence_length: int = 64, remat: bool = False) -> Task:
    """A decoder-only language model on the tokens of a data set, in rows of sequence_length tokens."""
    heads, length = head_count(width, heads, head_size), dataset.train.inputs.shape[1]
    if sequence_length != length:
        raise ValueError(f"sequence_length {sequence_length} differs from the rows of {length} tokens in which "
                         f"{dataset.name} was loaded: load it with the same sequence length")
    weights, forward = transformer_lm(dataset.classes, length, width, depth, heads, parametrization, remat)
    return language_modelling(f"lm-w{width}-d{depth}", dataset, batch_size, parametrization, weights, forward)


def head_count(width: int, heads: int | None, head_size: int) -> int:
    """The number of attention heads: `heads`, or else as many of head_size as the width holds, 1 at least."""
    asked = f"head_size {head_size}" if heads is None else f"heads {heads}"
    if heads is None:
        heads = max(1, width // head_size) if head_size >= 1 else 0
    if heads < 1 or width % heads:
        raise ValueError(f"{asked} does not fit width {width}: the heads must divide the width")
    return heads


# kind of network: (its task, the number of axes of its inputs, its options beyond width, depth and batch size)
TASKS = {"mlp": (mlp_task, 4, ()),
         "vit": (vit_task, 4, ("heads", "head_size", "patch", "remat")),
         "lm": (lm_task, 2, ("heads", "head_size", "sequence_length", "remat"))}


def make_task(kind: str, dataset: Dataset, width: int, depth: int, batch_size: int,
              parametrization: Parametrization = mup.MUP, **options: Any) -> Task:
    """The task of one of the kinds in TASKS; an option that is None stays at its default.

    Raises ValueError, in one line, for a combination that does not fit.
    """
    if kind not in TASKS:
        raise ValueError(f"unknown task {kind!r}: use one of {', '.join(TASKS)}")
    task, axes, allowed = TASKS[kind]
    options = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"task {kind!r} has no option {unknown[0]!r}")
    if dataset.train.inputs.ndim != axes:
        raise ValueError(f"task {kind!r} needs {'images' if axes == 4 else 'text'}, "
                         f"and data set {dataset.name!r} holds {'text' if axes == 4 else 'images'}")
    for name, value in (("width", width), ("depth", depth), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    return task(dataset, width, depth, batch_size, parametrization, **options)


# ---------------------------------------------------------------------------------------------------------
# Inner training


def begin(task: Task, optimizer: lopt.Optimizer, key: Array) -> tuple[Tree, Any]:
    """(params, state of the optimizer) before the first step of the run of that key."""
    params = task.init(jax.random.fold_in(key, 0))
    return params, optimizer.init(params)


def train_step(task: Task, optimizer: lopt.Optimizer, split: Split, key: Array, carry: tuple[Tree, Any],
               t: Array) -> tuple[tuple[Tree, Any], Array]:
    """Step t of the run of that key: (params, state) → ((params, state), the batch's loss before the update)."""
    params, state = carry
    batch = task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), t), split)
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return (lopt.apply_updates(params, updates), state), loss


def train(task: Task, optimizer: lopt.Optimizer, split: Split, key: Array, steps: int) -> tuple[Tree, Array]:
    """Trains a task's network from scratch → (params, losses [steps]), to be jitted by the caller.

    Each loss is that of the step's own batch before its update. Initial weights and batches depend on the key
    alone, so that optimizers which are given the same key can be compared step by step.
    """
    step = functools.partial(train_step, task, optimizer, split, key)
    (params, _), losses = jax.lax.scan(step, begin(task, optimizer, key), jnp.arange(steps))
    return params, losses


def final_loss(losses: np.ndarray) -> np.ndarray:
    """The mean over the last twentieth of the steps: losses [..., T] → [...]."""
    return np.mean(losses[..., -max(1, losses.shape[-1] // 20):], axis=-1)


# ---------------------------------------------------------------------------------------------------------
# Demonstration


def linear_task(dataset: Dataset, batch_size: int) -> Task:
    """Softmax regression on the pixels, in SP: what a data set yields without hidden layers."""
    weights = {"logits": mup.matrix("output", math.prod(dataset.train.inputs.shape[1:]), dataset.classes)}

    def forward(params: Tree, x: Array) -> tuple[Array, dict[str, Array]]:
        logits = mup.linear(weights["logits"], params["logits"], x.reshape(x.shape[0], -1), mup.SP)  # (B, V)
        return logits, {"logits": logits}

    return classification("linear", dataset, batch_size, mup.SP, weights, forward)


def main() -> None:
    """Shows the data sets that are present, and how models of three sizes learn the synthetic one."""
    parser = argparse.ArgumentParser(description="Shows the data sets, and how models learn the synthetic one.")
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"), help="default: %(default)s")
    folder = parser.parse_args().data_dir
    print(f"Data sets in {folder}:")
    for name, (reader, classes) in READERS.items():
        try:
            _, images, _ = next(reader(name, folder))
            state = f"{classes} classes; its first file holds uint8 images {list(images.shape)}"
        except (ValueError, OSError) as error:
            state = f"not there: {error}"
        print(f"  {name:14}{state}")
    dataset = load_dataset("synthetic")
    print("\nsynthetic, made in memory:")
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        counts = np.bincount(split.labels, minlength=dataset.classes)
        print(f"  {part:5} uint8 {list(split.inputs.shape)}, {counts.min():,} to {counts.max():,} of each class")
    for channel, mean, std in zip("RGB", dataset.mean, dataset.std):
        print(f"  {channel}: mean {mean:.3f}, standard deviation {std:.3f} (pixels in [0, 1])")
    print("\nAdam (learning rate 1e-3, batch 64) on it, mean of 3 seeds: training loss in nats at")
    print(f"  {'':22}{'step 0':>8}{'10':>8}{'100':>8}{'950-999':>9}{'test accuracy':>16}")
    for label, task in (("linear", linear_task(dataset, 64)),
                        *((f"MLP, 3 layers of {w}", mlp_task(dataset, w, 3, 64, mup.SP)) for w in (32, 256))):
        def run(train_split, test_split, key, task=task):
            params, losses = train(task, lopt.adamw(1e-3), train_split, key, 1000)
            return losses, task.test(params, test_split)[1]
        seeds = jax.jit(lambda *splits: jax.lax.map(functools.partial(run, *splits),
                                                    jax.random.split(jax.random.key(0), 3)))
        losses, accuracy = seeds(dataset.train, dataset.test)
        at = [losses[:, t].mean() for t in (0, 10, 100)] + [losses[:, 950:].mean()]
        print(f"  {label:22}{at[0]:8.3f}{at[1]:8.3f}{at[2]:8.3f}{at[3]:9.3f}{accuracy.mean():16.3f}")


if __name__ == "__main__":
    main()
