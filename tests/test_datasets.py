"""Data sets: every format read back exactly, every damaged or hostile file refused, downloads, `synthetic`."""

import gzip
import hashlib
import http.server
import io
import os
import pathlib
import tarfile
import threading
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side

import lopt
import mup
import tasks
from tasks import load_dataset

RNG = np.random.default_rng(1)
BATCHES = "cifar-10-batches-bin"
CIFAR_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
EXAMPLES = 4  # in each CIFAR-10 file of these tests, instead of 10,000


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(tasks, "CIFAR10_EXAMPLES", EXAMPLES)


# ---------------------------------------------------------------------------------------------------------
# Small valid files


def cifar_contents() -> dict[str, bytes]:
    records = RNG.integers(0, 256, (6, EXAMPLES, 3073), np.uint8)
    records[:, :, 0] %= 10
    return {name: r.tobytes() for name, r in zip(CIFAR_FILES, records)}


def write_cifar(folder, contents=None):
    (folder / BATCHES).mkdir()
    for name, content in (contents or cifar_contents()).items():
        (folder / BATCHES / name).write_bytes(content)


def tar_bytes(members) -> bytes:
    """A tar.gz of (name or TarInfo, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_members(contents=None):
    directory = tarfile.TarInfo(BATCHES)
    directory.type = tarfile.DIRTYPE
    return [(directory, b""), (f"{BATCHES}/readme.html", b"hello")] + [
        (f"{BATCHES}/{name}", content) for name, content in (contents or cifar_contents()).items()]


def write_tar(folder, members=None):
    (folder / "cifar-10-binary.tar.gz").write_bytes(tar_bytes(members or cifar_members()))


def idx(array: np.ndarray, magic: int | None = None, count: int | None = None) -> bytes:
    sizes = (len(array) if count is None else count, *array.shape[1:])
    return np.array([magic or 0x800 + array.ndim, *sizes], ">u4").tobytes() + array.astype(np.uint8).tobytes()


def idx_arrays(labels=()) -> list[np.ndarray]:
    """Images and labels of 12 training examples, which begin with these labels, and of 3 held-out ones."""
    arrays = [a for m in (12, 3) for a in (RNG.integers(0, 256, (m, 28, 28)), RNG.integers(0, 10, m))]
    arrays[1][:len(labels)] = labels
    return arrays


def write_idx(folder, arrays=None, compress=False, dotted=False):
    for name, array in zip(tasks.IDX_FILES, arrays or idx_arrays()):
        content, name = idx(array), name.replace("-idx", ".idx") if dotted else name
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


MNIST_LABELS, FASHION_LABELS = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # of training


NPZ_FILES = [f"train_data_batch_{i}.npz" for i in range(1, 11)] + ["val_data.npz"]


def npz_arrays(size=32) -> dict[str, np.ndarray]:
    return {"data": RNG.integers(0, 256, (2, 3 * size * size), np.uint8),
            "labels": RNG.integers(1, 1001, 2), "mean": np.zeros(3 * size * size)}


def write_imagenet(folder, arrays=None, size=32):
    for i, name in enumerate(NPZ_FILES):
        np.savez(folder / name, **(arrays[i] if arrays else npz_arrays(size)))


# ---------------------------------------------------------------------------------------------------------
# Each format, read back


def check_images(dataset, train, train_labels, test, test_labels):
    for split, images, labels in ((dataset.train, train, train_labels), (dataset.test, test, test_labels)):
        assert isinstance(split.inputs, jax.Array) and split.inputs.dtype == jnp.uint8
        assert split.labels.dtype == jnp.int32
        np.testing.assert_array_equal(split.inputs, images)
        np.testing.assert_array_equal(split.labels, labels)
    pixels = np.asarray(train, np.float64).reshape(-1, train.shape[-1]) / 255
    if not dataset.name.startswith("imagenet"):
        np.testing.assert_allclose(dataset.mean, pixels.mean(0), atol=1e-12)
        np.testing.assert_allclose(dataset.std, pixels.std(0), atol=1e-12)


@pytest.mark.parametrize("layout", ["folder", "folder itself", "tar"])
def test_cifar10(tmp_path, layout):
    contents = cifar_contents()
    write_tar(tmp_path, cifar_members(contents)) if layout == "tar" else write_cifar(tmp_path, contents)
    dataset = load_dataset("cifar10", tmp_path / BATCHES if layout == "folder itself" else tmp_path)
    labels, images = [], []
    for content in contents.values():
        for record in range(EXAMPLES):
            raw = content[3073 * record:3073 * (record + 1)]
            labels.append(raw[0])
            images.append([[[raw[1 + 1024 * c + 32 * y + x] for c in range(3)] for x in range(32)]
                           for y in range(32)])
    n = 5 * EXAMPLES
    check_images(dataset, np.array(images[:n]), labels[:n], np.array(images[n:]), labels[n:])
    assert dataset.classes == 10
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz" if layout == "tar" else BATCHES]  # nothing extracted


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("inside, dotted", [(False, False), (True, False), (True, True)])
def test_idx(tmp_path, name, compress, inside, dotted):
    arrays = idx_arrays(FASHION_LABELS if name == "fashion_mnist" and not inside else ())
    if inside:  # the folder's own name wins over files that lie beside it
        write_idx(tmp_path)
        (tmp_path / name).mkdir()
    write_idx(tmp_path / name if inside else tmp_path, arrays, compress, dotted)
    check_images(load_dataset(name, tmp_path), arrays[0][..., None], arrays[1], arrays[2][..., None], arrays[3])


@pytest.mark.parametrize("folder, name, labels, message", [
    (".", "fashion_mnist", MNIST_LABELS, "is of data set 'mnist', not of 'fashion_mnist'"),
    ("fashion_mnist", "fashion_mnist", MNIST_LABELS, "is of data set 'mnist', not of 'fashion_mnist'"),
    ("raw", "fashion_mnist", (), "may be MNIST's, .* put those of Fashion-MNIST into a folder 'fashion_mnist'"),
    (".", "mnist", FASHION_LABELS, "is of data set 'fashion_mnist', not of 'mnist'")])
def test_mnist_is_not_taken_for_fashion_mnist(tmp_path, folder, name, labels, message):
    """Their files have the same names."""
    (tmp_path / folder).mkdir(exist_ok=True)
    write_idx(tmp_path / folder, idx_arrays(labels))
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(name, tmp_path / folder)
    assert str(tmp_path / folder / tasks.IDX_FILES[1]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["FashionMNIST", "fashion-mnist", "fashion_mnist"])
def test_fashion_mnist_is_known_by_its_folder(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    write_idx(tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    for place in (tmp_path / folder, ".", f"../{folder}/"):
        assert load_dataset("fashion_mnist", place).train.inputs.shape == (12, 28, 28, 1)


def pickled_cifar10(folder):
    for name in CIFAR_FILES:
        (folder / name.removesuffix(".bin")).write_bytes(b"pickled")


def pickled_imagenet(folder):
    for name in NPZ_FILES:
        (folder / name.removesuffix(".npz")).write_bytes(b"pickled")


def imagenet_in_two_folders(folder):
    write_imagenet(folder)
    (folder / "val").mkdir()
    (folder / NPZ_FILES[-1]).rename(folder / "val" / NPZ_FILES[-1])


@pytest.mark.parametrize("name, write, file, words", [
    ("imagenet32", pickled_imagenet, NPZ_FILES[0], "ImageNet 32x32 as npz from image-net.org"),
    ("imagenet64", pickled_imagenet, NPZ_FILES[0], "ImageNet 64x64 as npz from image-net.org"),
    ("imagenet32", imagenet_in_two_folders, "val_data.npz", "in one folder"),
    ("cifar10", pickled_cifar10, CIFAR_FILES[0], "the binary version, cifar-10-binary.tar.gz from www.cs.toronto.edu")])
def test_other_version_of_a_data_set(tmp_path, name, write, file, words):
    """The message says which version is needed, and from where."""
    write(tmp_path)
    with pytest.raises(ValueError) as error:
        load_dataset(name, tmp_path)
    assert file in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet(tmp_path, size):
    arrays = [npz_arrays(size) for _ in NPZ_FILES]
    write_imagenet(tmp_path, arrays)
    dataset = load_dataset(f"imagenet{size}", tmp_path, image_size=size // 4)
    images = [tasks.resize(a["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1), size // 4) for a in arrays]
    labels = [a["labels"] - 1 for a in arrays]
    check_images(dataset, np.concatenate(images[:10]), np.concatenate(labels[:10]), images[10], labels[10])
    assert dataset.classes == 1000
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)


def test_text(tmp_path):
    (tmp_path / "b.txt").write_text("zweiter Teil: größer " * 20, encoding="utf-8")
    (tmp_path / "a.txt").write_text("first part " * 30)
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    everything = (tmp_path / "a.txt").read_bytes() + (tmp_path / "b.txt").read_bytes()
    dataset = load_dataset("text", tmp_path, sequence_length=16)
    cut = len(everything) - len(everything) // 10
    for split, expected in ((dataset.train, everything[:cut]), (dataset.test, everything[cut:])):
        assert split.inputs.dtype == jnp.uint8 and split.inputs.shape == (len(expected) // 16, 16)
        assert bytes(np.asarray(split.inputs).ravel()) == expected[:len(expected) // 16 * 16]
        assert split.labels.shape == (0,) and split.labels.dtype == jnp.int32
    assert dataset.classes == 256 and dataset.mean == dataset.std == ()
    one = load_dataset("text", tmp_path / "a.txt", sequence_length=8)
    assert bytes(np.asarray(one.train.inputs[0])) == b"first pa"


@pytest.mark.parametrize("vocab_size, on_disk, on_device", [
    (200, "<u2", jnp.uint8), (65_536, "<u2", jnp.uint16), (65_537, "<u4", jnp.int32)])
def test_tokens(tmp_path, vocab_size, on_disk, on_device):
    train, held_out = RNG.integers(0, vocab_size, 1003), RNG.integers(0, vocab_size, 99)
    train[5] = vocab_size - 1
    train.astype(on_disk).tofile(tmp_path / "train.bin")
    alone = load_dataset("tokens", tmp_path / "train.bin", vocab_size=vocab_size, sequence_length=10)
    np.testing.assert_array_equal(alone.train.inputs, train[:900].reshape(-1, 10))
    np.testing.assert_array_equal(alone.test.inputs, train[903:].reshape(-1, 10))
    assert alone.train.inputs.dtype == on_device and alone.classes == vocab_size
    held_out.astype(on_disk).tofile(tmp_path / "val.bin")
    both = load_dataset("tokens", tmp_path, vocab_size=vocab_size, sequence_length=10)
    np.testing.assert_array_equal(both.train.inputs, train[:1000].reshape(-1, 10))
    np.testing.assert_array_equal(both.test.inputs, held_out[:90].reshape(-1, 10))


# ---------------------------------------------------------------------------------------------------------
# Damaged and hostile files: one ValueError of one line that names the file


def change(path: pathlib.Path, edit) -> pathlib.Path:
    path.write_bytes(edit(path.read_bytes()))
    return path


def cifar_case(edit, file="data_batch_3.bin"):
    def build(folder):
        write_cifar(folder)
        return change(folder / BATCHES / file, edit)
    return "cifar10", {}, build


def tar_case(edit=lambda content: content, members=cifar_members):
    def build(folder):
        write_tar(folder, members())
        return change(folder / "cifar-10-binary.tar.gz", edit)
    return "cifar10", {}, build


def special(name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def sparse(claimed: int) -> bytes:
    """A tar.gz whose member data_batch_1.bin is an old GNU sparse file that claims that many bytes."""
    header = bytearray(special(f"{BATCHES}/data_batch_1.bin", b"S").tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % claimed, b"%011o\0" % 0  # one hole, then nothing
    header[483:495] = b"%011o\0" % claimed
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return gzip.compress(bytes(header) + bytes(1024))


def idx_case(edit, file=0, name="mnist", compress=False):
    def build(folder):
        write_idx(folder, compress=compress)
        return change(folder / (tasks.IDX_FILES[file] + ".gz" * compress), edit)
    return name, {}, build


def npz_case(edit, file="train_data_batch_4.npz", name="imagenet32"):
    """edit: a change of the file's bytes, or the arrays to save in their place."""
    def build(folder):
        write_imagenet(folder, size=int(name[-2:]))
        if callable(edit):
            return change(folder / file, edit)
        np.savez(folder / file, **edit)
        return folder / file
    return name, {}, build


def pickled(folder):
    write_imagenet(folder)
    np.savez(folder / NPZ_FILES[0], data=np.array([{}, {}], object), labels=np.ones(2, int))
    return folder / NPZ_FILES[0]


def npz_bomb(folder):
    """A member of 1 GiB of zeros, which deflates to 1 MB, in place of data (written in pieces)."""
    write_imagenet(folder)
    with zipfile.ZipFile(folder / NPZ_FILES[0], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("data.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (1 << 30,)})
            for _ in range(1 << 6):
                member.write(bytes(1 << 24))
    return folder / NPZ_FILES[0]


def text_case(content, **kwargs):
    def build(folder):
        (folder / "a.txt").write_text("fine " * 100)
        (folder / "b.txt").write_bytes(content)
        return folder / "b.txt"
    return "text", {"sequence_length": 8, **kwargs}, build


def token_case(array, vocab_size=100, file="train.bin", **kwargs):
    def build(folder):
        np.arange(100, dtype="<u2" if vocab_size <= 65_536 else "<u4").tofile(folder / "train.bin")
        (folder / file).write_bytes(array if isinstance(array, bytes) else array.tobytes())
        return folder / file
    return "tokens", {"vocab_size": vocab_size, "sequence_length": 8, **kwargs}, build


def missing(name, file, write, **kwargs):
    def build(folder):
        write(folder)
        (folder / file).unlink()
        return pathlib.Path(file).name.removesuffix(".gz")
    return name, kwargs, build


good = npz_arrays()
HOSTILE = {
    "cifar truncated": cifar_case(lambda c: c[:-1]),
    "cifar one record short": cifar_case(lambda c: c[:-3073]),
    "cifar too long": cifar_case(lambda c: c + b"\0"),
    "cifar empty": cifar_case(lambda c: b"", "test_batch.bin"),
    "cifar label 10": cifar_case(lambda c: b"\x0a" + c[1:]),
    "cifar label 255": cifar_case(lambda c: c[:3073] + b"\xff" + c[3074:], "test_batch.bin"),
    "cifar file missing": missing("cifar10", f"{BATCHES}/data_batch_2.bin", write_cifar),
    "tar missing": ("cifar10", {}, lambda folder: "data_batch_1.bin"),
    "tar not gzip": tar_case(lambda c: b"hello" * 1000),
    "tar not tar": tar_case(lambda c: gzip.compress(b"hello" * 1000)),
    "tar empty": tar_case(lambda c: b""),
    "tar truncated gzip": tar_case(lambda c: c[:len(c) // 2]),
    "tar corrupted gzip": tar_case(lambda c: c[:5000] + bytes([c[5000] ^ 255]) + c[5001:]),
    "tar truncated inside": tar_case(lambda c: gzip.compress(gzip.decompress(c)[:50_000])),
    "tar bomb": tar_case(lambda c: gzip.compress(bytes(1 << 24), 1)),
    "tar wrong folder": tar_case(members=lambda: [(n, c) for n, c in [("x/data_batch_1.bin", b"1")]]),
    "tar absolute path": tar_case(members=lambda: [("/etc/passwd", b"x"), *cifar_members()]),
    "tar parent path": tar_case(members=lambda: [(f"{BATCHES}/../../x", b"x"), *cifar_members()]),
    "tar parent of the folder": tar_case(members=lambda: [(f"{BATCHES}/..", b"x"), *cifar_members()]),
    "tar symbolic link": tar_case(members=lambda: [
        (special(f"{BATCHES}/data_batch_1.bin", tarfile.SYMTYPE, "/etc/passwd"), b""), *cifar_members()[:2]]),
    "tar hard link": tar_case(members=lambda: [
        (special(f"{BATCHES}/data_batch_1.bin", tarfile.LNKTYPE, f"{BATCHES}/readme.html"), b"")]),
    "tar device": tar_case(members=lambda: [(special(f"{BATCHES}/data_batch_1.bin", tarfile.CHRTYPE), b"")]),
    "tar member twice": tar_case(members=lambda: cifar_members() + cifar_members()[-1:]),
    "tar member missing": tar_case(members=lambda: cifar_members()[:-1]),
    "tar member short": tar_case(members=lambda: [*cifar_members()[:-1], (f"{BATCHES}/test_batch.bin", b"1")]),
    "tar sparse member of 4 GiB": tar_case(lambda c: sparse(1 << 32)),
    "tar sparse member of the right size": tar_case(lambda c: gzip.compress(
        gzip.decompress(sparse(EXAMPLES * 3073))[:512] + gzip.decompress(tar_bytes(cifar_members()[3:])))),
    "tar label 77": tar_case(members=lambda: cifar_members({**cifar_contents(),
                                                            "data_batch_1.bin": bytes([77] * EXAMPLES * 3073)})),
    "idx empty": idx_case(lambda c: b""),
    "idx header cut": idx_case(lambda c: c[:10]),
    "idx wrong magic": idx_case(lambda c: b"\0\0\x08\x01" + c[4:]),
    "idx floats": idx_case(lambda c: b"\0\0\x0d\x03" + c[4:]),
    "idx 32 pixels": idx_case(lambda c: idx(np.zeros((2, 32, 32)))),
    "idx truncated": idx_case(lambda c: c[:-1]),
    "idx too long": idx_case(lambda c: c + b"\0"),
    "idx count of 4 billion": idx_case(lambda c: c[:4] + b"\xff\xff\xff\xff" + c[8:]),
    "idx count of 0": idx_case(lambda c: idx(np.zeros((0, 28, 28)))),
    "idx label 10": idx_case(lambda c: c[:-1] + b"\x0a", 1),
    "idx labels are images": idx_case(lambda c: idx(np.zeros((12, 28, 28))), 1),
    "idx more labels than images": idx_case(lambda c: idx(np.zeros(13)), 1),
    "idx test label 200": idx_case(lambda c: c[:-1] + b"\xc8", 3),
    "idx gz truncated": idx_case(lambda c: c[:-20], compress=True),
    "idx gz corrupted": idx_case(lambda c: c[:100] + bytes([c[100] ^ 255]) + c[101:], compress=True),
    "idx gz is plain": idx_case(gzip.decompress, compress=True),
    "idx gz bomb": idx_case(lambda c: gzip.compress(idx(np.zeros((1, 28, 28))) + bytes(1 << 27), 1),
                            compress=True),
    "idx missing": missing("fashion_mnist", "t10k-labels-idx1-ubyte", write_idx),
    "npz missing": missing("imagenet32", "train_data_batch_7.npz", write_imagenet),
    "npz truncated": npz_case(lambda c: c[:-100]),
    "npz not a zip": npz_case(lambda c: b"hello" * 100),
    "npz empty": npz_case(lambda c: b""),
    "npz corrupted": npz_case(lambda c: c[:3000] + bytes([c[3000] ^ 255]) + c[3001:]),
    "npz pickled objects": ("imagenet32", {}, pickled),
    "npz bomb": ("imagenet32", {}, npz_bomb),
    "npz no labels": npz_case({"data": good["data"]}),
    "npz data float": npz_case({**good, "data": good["data"].astype(np.float32)}),
    "npz data of another size": npz_case(npz_arrays(16), name="imagenet64"),
    "npz data of 4 axes": npz_case({**good, "data": good["data"].reshape(2, 3, 32, 32)}),
    "npz no examples": npz_case({"data": good["data"][:0], "labels": good["labels"][:0]}, "val_data.npz"),
    "npz labels float": npz_case({**good, "labels": good["labels"] * 1.0}),
    "npz labels too many": npz_case({**good, "labels": np.ones(3, int)}),
    "npz label 0": npz_case({**good, "labels": np.array([0, 1])}),
    "npz label 1001": npz_case({**good, "labels": np.array([1, 1001])}, "val_data.npz"),
    "npz label 2⁶³": npz_case({**good, "labels": np.array([1, 1 << 63], np.uint64)}),
    "text Latin-1": text_case("größer".encode("latin-1") * 10),
    "text cut inside a character": text_case("größe ü".encode()[:-1]),
    "text binary": text_case(bytes(range(256))),
    "tokens id too large": token_case(np.array([1, 2, 100] * 20, "<u2")),
    "tokens id too large, uint32": token_case(np.array([1, 2, 70_000] * 20, "<u4"), vocab_size=70_000),
    "tokens big-endian": token_case(np.arange(100).astype(">u2")),
    "tokens id too large in val": token_case(np.array([1, 2, 300] * 20, "<u2"), file="val.bin"),
    "tokens odd size": token_case(bytes(101)),
    "tokens size not of uint32": token_case(bytes(402), vocab_size=70_000),
    "tokens empty": token_case(b"", file="val.bin"),
    "tokens missing": ("tokens", {"vocab_size": 9}, lambda folder: "train.bin"),
    "tokens is a folder": ("tokens", {"vocab_size": 9},
                           lambda folder: (folder / "train.bin").mkdir() or folder / "train.bin"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_line_that_names_it(tmp_path, case):
    name, kwargs, build = HOSTILE[case]
    named = build(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        load_dataset(name, tmp_path, **kwargs)
    assert str(named) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_bomb_is_never_held_in_memory(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(1 << 26), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than the 1,000 bytes"):
        tasks.read_bytes(tmp_path / "bomb.gz", 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


BAD_ARGUMENTS = {
    "unknown name": (("cifar100",), {}, "cifar100"),
    "no folder given": (("cifar10",), {}, "--data-dir"),
    "folder missing": (("cifar10", "no/such/folder"), {}, "no/such/folder"),
    "text missing": (("text", "no/such/file"), {}, "no/such/file"),
    "says --download": (("fashion_mnist", "."), {}, "--download"),
    "image size 0": (("synthetic", None, 0), {}, "image size 0"),
    "image size -8": (("synthetic", None, -8), {}, "image size -8"),
    "image size 3": (("synthetic", None, 3), {}, "image size 3"),
    "image size 12": (("synthetic", None, 12), {}, "image size 12"),
    "image size 1024": (("synthetic", None, 1024), {}, "image size 1024"),
    "image size for text": (("text", ".", 8), {}, "image size 8"),
    "vocabulary for images": (("synthetic",), {"vocab_size": 50}, "vocab size 50"),
    "vocabulary for text": (("text", "."), {"vocab_size": 50}, "vocab size 50"),
    "no vocabulary": (("tokens", "."), {}, "vocab size"),
    "vocabulary of 2³²": (("tokens", "."), {"vocab_size": 1 << 32}, "vocab size"),
    "vocabulary of 0": (("tokens", "."), {"vocab_size": 0}, "vocab size 0"),
    "sequence length 0": (("text", "."), {"sequence_length": 0}, "sequence length 0"),
    "sequence longer than text": (("text", __file__), {"sequence_length": 10 ** 6}, "1000000"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused_in_one_line(case):
    args, kwargs, named = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError) as error:
        load_dataset(*args, **kwargs)
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


def test_image_size_that_does_not_divide(tmp_path):
    write_cifar(tmp_path)
    assert load_dataset("cifar10", tmp_path, image_size=16).train.inputs.shape == (5 * EXAMPLES, 16, 16, 3)
    for size in (5, 33, 64):
        with pytest.raises(ValueError, match=f"image size {size} .* 32"):
            load_dataset("cifar10", tmp_path, image_size=size)


def test_random_damage_to_a_tar_never_escapes_as_another_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "CIFAR10_EXAMPLES", 1)
    contents = {name: bytes([3]) + bytes(3072) for name in CIFAR_FILES}
    good, damaged = gzip.decompress(tar_bytes(cifar_members(contents))), tmp_path / "cifar-10-binary.tar.gz"
    headers = [at for at in range(0, len(good), 512) if good[at:at + 20] == BATCHES.encode()]
    for _ in range(300):
        content = bytearray(good)
        header = RNG.choice(headers)
        for at in RNG.integers(0, 512, 3):  # with a checksum that fits, so that the damage is looked at
            content[header + at] = RNG.integers(256)
        content[header + 148:header + 156] = b"        "
        content[header + 148:header + 156] = b"%06o\0 " % sum(content[header:header + 512])
        damaged.write_bytes(gzip.compress(bytes(content), 1))
        try:
            load_dataset("cifar10", tmp_path)
        except ValueError as error:
            assert str(damaged) in str(error) and len(str(error).splitlines()) == 1


def test_flipped_bits_in_an_npz_never_escape_as_another_error(tmp_path):
    """Those of an array's header reach the parser before the checksum of the zip file is looked at."""
    write_imagenet(tmp_path)
    damaged = tmp_path / NPZ_FILES[0]
    good = damaged.read_bytes()
    header = good.index(b"NUMPY")
    for bit in range(8 * (header - 1), 8 * (header + 80), 3):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_dataset("imagenet32", tmp_path)
        assert str(damaged) in str(error.value) and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------
# Resizing and statistics


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_resize_averages_blocks(size):
    images = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)
    k = 8 // size
    for m, y, x, c in np.ndindex(5, size, size, 3):
        mean = images[m, k * y:k * (y + 1), k * x:k * (x + 1), c].astype(float).mean()
        assert abs(tasks.resize(images, size)[m, y, x, c] - mean) <= 0.5
    assert tasks.resize(images, size).dtype == np.uint8
    assert np.all(tasks.resize(np.full((1, 8, 8, 1), 255, np.uint8), size) == 255)


def test_constant_channel_can_be_standardised():
    assert tasks.channel_statistics(np.zeros((2, 4, 4, 1), np.uint8)) == ((0.0,), (1 / 255,))


# ---------------------------------------------------------------------------------------------------------
# Download, from a server on the loopback address


@pytest.fixture
def server():
    """Serves server.files: a name → content, sent with the length server.claimed or its own."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            content = server.files.get(self.path.removeprefix("/"))
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            if server.claimed != "none":
                self.send_header("Content-Length", str(server.claimed or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.claimed, server.asked = {}, None, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(server, monkeypatch, name, files):
    server.files = files
    checksums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(tasks.DOWNLOADS, name, (server.url, checksums))


@pytest.mark.parametrize("claimed", [None, "none"])
def test_download_and_load(tmp_path, monkeypatch, server, claimed):
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tar_bytes(cifar_members())})
    server.claimed = claimed
    tasks.download("cifar10", tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == ["cifar-10-binary.tar.gz"]
    assert load_dataset("cifar10", tmp_path / "new" / "folder").train.labels.shape == (5 * EXAMPLES,)


def test_download_skips_what_is_there_and_replaces_what_is_damaged(tmp_path, monkeypatch, server):
    files = {f"{name}.gz": gzip.compress(idx(array)) for name, array in zip(tasks.IDX_FILES, idx_arrays())}
    publish(server, monkeypatch, "fashion_mnist", files)
    monkeypatch.setitem(tasks.DOWNLOADS, "fashion_mnist", ("http://127.0.0.1:1/",
                                                           tasks.DOWNLOADS["fashion_mnist"][1]))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # bytes are counted without a bar, too
    tasks.download("fashion_mnist", tmp_path, base_url=server.url)
    tasks.download("fashion_mnist", tmp_path, base_url=server.url)
    assert len(server.asked) == 4 and sorted(os.listdir(tmp_path / "fashion_mnist")) == sorted(files)
    (tmp_path / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    tasks.download("fashion_mnist", tmp_path, base_url=server.url)
    assert len(server.asked) == 5
    assert load_dataset("fashion_mnist", tmp_path).test.inputs.shape == (3, 28, 28, 1)


@pytest.mark.parametrize("fault", ["wrong checksum", "broken off", "404", "refused", "too large", "interrupted"])
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, server, fault):
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": bytes(200_000)})
    url, named, expected = server.url, "cifar-10-binary.tar.gz", ValueError
    if fault == "wrong checksum":
        server.files = {"cifar-10-binary.tar.gz": b"something else"}
    elif fault == "broken off":
        server.claimed, named = 400_000, "200,000 of 400,000 bytes"
    elif fault == "404":
        server.files, named = {}, "404"
    elif fault == "refused":
        url = "http://127.0.0.1:1/"
    elif fault == "too large":
        monkeypatch.setattr(tasks, "MAX_DOWNLOAD", 1000)
    else:
        def interrupt(*args):
            raise KeyboardInterrupt
        expected = KeyboardInterrupt
        monkeypatch.setattr(tasks.os, "fsync", interrupt)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"what was there before")
    with pytest.raises(expected) as error:
        tasks.download("cifar10", tmp_path, base_url=url)
    if expected is ValueError:
        assert named in str(error.value) and len(str(error.value).splitlines()) == 1
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]
    assert (tmp_path / "cifar-10-binary.tar.gz").read_bytes() == b"what was there before"


def test_download_of_another_data_set_or_into_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'mnist' cannot be downloaded"):
        tasks.download("mnist", tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match="cifar-10-binary.tar.gz"):
            tasks.download("cifar10", folder, base_url="http://127.0.0.1:1/")


def test_published_checksums():
    checksums = {file: md5 for _, files in tasks.DOWNLOADS.values() for file, md5 in files.items()}
    assert checksums == {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}


# ---------------------------------------------------------------------------------------------------------
# The synthetic data set, and inner training


@pytest.fixture(scope="module")
def synthetic():
    return load_dataset("synthetic")


def test_synthetic_is_deterministic_and_balanced(synthetic):
    images, labels = tasks.make_synthetic()
    np.testing.assert_array_equal(images[:50_000], synthetic.train.inputs)
    np.testing.assert_array_equal(labels[50_000:], synthetic.test.labels)
    assert synthetic.train.inputs.shape == (50_000, 8, 8, 3) and synthetic.classes == 10
    for split, count in ((synthetic.train, 5_000), (synthetic.test, 1_000)):
        assert np.bincount(split.labels).tolist() == [count] * 10
    assert all(0.4 < m < 0.55 for m in synthetic.mean) and all(0.15 < s < 0.3 for s in synthetic.std)
    assert np.mean(np.isin(images, (0, 255))) < 0.05  # few pixels are cut off


def test_synthetic_at_other_sizes(synthetic):
    larger, smaller = side_by_side(lambda make: make(), [lambda: tasks.make_synthetic(16)[0],
                                                         lambda: load_dataset("synthetic", image_size=4)])
    assert larger.shape == (60_000, 16, 16, 3)
    np.testing.assert_array_equal(smaller.test.inputs, tasks.resize(np.asarray(synthetic.test.inputs), 4))


def test_synthetic_linear_model_is_worse_than_narrow_and_that_than_wide(synthetic):
    def final_loss(task):
        adam = lambda num_steps: lopt.adamw(2e-3)
        run = jax.jit(lambda split: tasks.train(task, adam, split, jax.random.key(0), 500)[1])
        return float(np.mean(run(synthetic.train)[-100:]))

    weights = mup.matrix("output", 8 * 8 * 3, 10)
    regression = tasks.Network(weights, lambda params, x: (
        mup.linear(weights, params, x.reshape(len(x), -1), mup.SP), {}), mup.SP)
    linear = tasks.classification("linear", synthetic, regression, 64)
    mlp = lambda width: tasks.mlp_task(synthetic, width, 3, 64, mup.SP)
    wide, narrow, linear = side_by_side(final_loss, [mlp(128), mlp(32), linear])
    assert 1.0 < wide < narrow - 0.1 and narrow < linear - 0.1 and linear < 2.2


def test_training_shares_weights_and_batches_between_optimizers(synthetic):
    """It also gives the optimizer the planned number of steps, and the loss of each step's batch."""
    task = tasks.mlp_task(synthetic, 8, 2, 16, mup.SP)
    key = jax.random.key(3)

    def still(num_steps):
        """No updates; the state is the number of steps and the last loss."""
        return lopt.Optimizer(lambda params: (num_steps, 0.0), lambda grads, state, params, *, value=None: (
            jax.tree.map(lambda g: jnp.where(state[0] == 3, 0 * g, jnp.nan), grads), (state[0], value)))

    @jax.jit
    def run(split):
        initial = task.init(jax.random.fold_in(key, 0))
        batches = [task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), t), split) for t in range(3)]
        optimizer, carry = still(3), tasks.begin(task, still(3), key)
        (_, (_, value)), loss = tasks.train_step(task, optimizer, split, key, carry, 0)
        return (initial, [task.loss(initial, batch) for batch in batches], tasks.train(task, still, split, key, 3),
                tasks.train(task, lambda _: lopt.adamw(1e-2), split, key, 3)[1], value, loss)

    initial, expected, (params, losses), trained, value, loss = run(synthetic.train)
    jax.tree.map(np.testing.assert_array_equal, params, initial)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert abs(trained[0] - losses[0]) < 1e-5 and abs(trained[2] - losses[2]) > 1e-3
    assert value == loss and abs(loss - losses[0]) < 1e-5
