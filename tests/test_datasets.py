"""Data sets: each format is read exactly, damaged files are refused; synthetic, download."""

import functools
import gzip
import hashlib
import http.server
import io
import shutil
import threading

import numpy as np
import pytest

import lopt
import tasks
from tasks import load_dataset

RNG, IDS, PIXELS = np.random.default_rng(1), np.arange(1, 100), np.zeros((2, 3072), np.uint8)
BATCHES, BATCH = "cifar-10-batches-bin", "cifar-10-batches-bin/data_batch_1.bin"
IDX = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1",
                                    "t10k-images-idx3", "t10k-labels-idx1")]
NPZ = [f"train_data_batch_{i}.npz" for i in range(1, 11)] + ["val_data.npz"]


def write_cifar10(folder) -> np.ndarray:
    """Write six sparse files. Returns their first and their last records [6, 2, 3073]."""
    records = RNG.integers(0, 256, (6, 2, 3073), np.uint8)
    records[..., 0] %= 10
    (folder / BATCHES).mkdir()
    for name, ends in zip(tasks.CIFAR10_FILES, records):
        np.memmap(folder / BATCHES / name, np.uint8, "w+", shape=(10_000, 3073))[[0, -1]] = ends
    return records


def idx(array: np.ndarray) -> bytes:
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + np.uint8(array).tobytes()


def write_idx(folder, dash="-", suffix="") -> list[np.ndarray]:
    """Write MNIST's four files. Returns their arrays, of 12 and of 3 examples."""
    arrays = [array for count in (12, 3)
              for array in (RNG.integers(0, 256, (count, 28, 28)), RNG.integers(0, 10, count))]
    for file, array in zip(IDX, arrays):
        content = gzip.compress(idx(array)) if suffix else idx(array)
        (folder / (file.replace("-idx", f"{dash}idx") + suffix)).write_bytes(content)
    return arrays


def write_npz(folder, size=32) -> list[dict[str, np.ndarray]]:
    """Write downsampled ImageNet's 11 files. Returns their arrays, of 2 examples each."""
    files = [{"data": RNG.integers(0, 256, (2, 3 * size * size), np.uint8),
              "labels": RNG.integers(1, 1001, 2)} for _ in NPZ]
    for name, arrays in zip(NPZ, files):
        np.savez(folder / name, **arrays, mean=np.zeros(3 * size * size))
    return files


def check(dataset, train, test, dtype="uint8"):
    for split, (inputs, labels) in ((dataset.train, train), (dataset.test, test)):
        assert (split.inputs.dtype, split.labels.dtype) == (dtype, "int32")
        np.testing.assert_array_equal(split.inputs, inputs)
        np.testing.assert_array_equal(split.labels, labels)


def test_cifar10(tmp_path):
    records, parts = write_cifar10(tmp_path), tasks.read_cifar10(tmp_path / BATCHES)
    for i, ((train, images, labels), ends) in enumerate(zip(parts, records, strict=True)):
        assert train == (i < 5) and labels[[0, -1]].tolist() == ends[:, 0].tolist()
        pixels = images[[0, -1]].transpose(0, 3, 1, 2).reshape(2, 3072)
        np.testing.assert_array_equal(pixels, ends[:, 1:])
    assert load_dataset("cifar10", tmp_path, image_size=1).train.inputs.shape == (50_000, 1, 1, 3)


@pytest.mark.parametrize("name, dash, suffix", [
    ("mnist", "-", ""), ("mnist", ".", ""), ("fashion_mnist", "-", ".gz")])
def test_mnist(tmp_path, name, dash, suffix):
    write_idx(tmp_path)
    (tmp_path / name).mkdir()  # this folder has precedence
    images, labels, *test = write_idx(tmp_path / name, dash, suffix)
    dataset = load_dataset(name, tmp_path)
    check(dataset, (images[..., None], labels), (test[0][..., None], test[1]))
    np.testing.assert_allclose((*dataset.mean, *dataset.std),
                               (np.mean(images / 255), np.std(images / 255)), rtol=1e-12)


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet(tmp_path, size):
    *train, test = [(x["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1), x["labels"] - 1)
                    for x in write_npz(tmp_path, size)]
    dataset = load_dataset(f"imagenet{size}", tmp_path)
    check(dataset, map(np.concatenate, zip(*train)), test)
    assert (dataset.classes, dataset.mean) == (1000, (0.485, 0.456, 0.406))


def test_shrinking_averages_blocks(tmp_path):
    images = write_idx(tmp_path)[0]
    small = load_dataset("mnist", tmp_path, image_size=7).train.inputs[..., 0]
    means = images.reshape(12, 7, 4, 7, 4).mean((2, 4))
    assert small.shape == (12, 7, 7) and np.max(np.abs(small - means)) <= 0.5
    for name, size in (("mnist", 5), ("mnist", 56), ("synthetic", 12)):
        with pytest.raises(lopt.InputError, match=f"^--image-size {size}: "):
            load_dataset(name, tmp_path, image_size=size)


def rows(tokens: np.ndarray) -> tuple[np.ndarray, tuple]:
    return tokens[:len(tokens) // 10 * 10].reshape(-1, 10), ()


def test_text(tmp_path):
    a, b = "first part " * 30, "zweiter Teil: größer " * 20
    (tmp_path / "b.txt").write_text(b, encoding="utf-8")
    (tmp_path / "a.txt").write_text(a)
    for path, text in ((tmp_path, a + b), (tmp_path / "b.txt", b)):
        text = np.frombuffer(text.encode(), np.uint8)
        dataset = load_dataset("text", path, sequence_length=10)
        check(dataset, *map(rows, np.split(text, [len(text) - len(text) // 10])))
        assert dataset.classes == 256


@pytest.mark.parametrize("file, vocab_size, stored, on_device", [
    ("train.bin", 200, "<u2", "uint8"), ("train.bin", 65_536, "<u2", "uint16"),
    ("train.bin", 65_537, "<u4", "int32"), ("x.npy", 200, "int64", "uint8"),
    ("x.npy", 128, "uint8", "uint8")])
def test_tokens(tmp_path, file, vocab_size, stored, on_device):
    tokens = RNG.integers(1, vocab_size, 1003).astype(stored)
    tokens[5] = vocab_size - 1
    np.save(tmp_path / file, tokens) if file == "x.npy" else tokens.tofile(tmp_path / file)
    load = functools.partial(load_dataset, "tokens", vocab_size=vocab_size, sequence_length=10)
    check(load(tmp_path / file), rows(tokens[:903]), rows(tokens[903:]), on_device)
    assert load(tmp_path / file).classes == vocab_size
    if file == "train.bin":
        tokens[:99].tofile(tmp_path / "val.bin")
        check(load(tmp_path), rows(tokens), rows(tokens[:99]), on_device)


def npz(data, labels=np.ones(2, int)) -> bytes:
    np.savez(file := io.BytesIO(), data=data, labels=labels)
    return file.getvalue()


# {data set: (writer, [(a file, its content or a function of the right one, words of the error)])}
DAMAGED = {
    "cifar10": (write_cifar10, [(BATCH, None, "--download"), (BATCH, lambda c: c[:-1], BATCH),
                                (BATCH, lambda c: b"\x0a" + c[1:], "label")]),
    "mnist": (write_idx, [
        (IDX[3], None, "No such file"), (IDX[2], lambda c: c[:-1], IDX[2]), (IDX[0], b"", IDX[0]),
        (IDX[0], idx(np.zeros(12)), "damaged"), (IDX[1], idx(np.zeros(13)), "label")]),
    "imagenet32": (write_npz, [
        (NPZ[0], lambda c: c[:-9], NPZ[0]), (NPZ[1], npz(np.array([{}, {}])), NPZ[1]),
        (NPZ[2], npz(PIXELS[:, 1:]), NPZ[2]), (NPZ[4], npz(PIXELS[:0], IDS[:0]), "damaged"),
        (NPZ[10], npz(PIXELS, [1, 1001]), "label"), (NPZ[10], npz(PIXELS, [0, 1]), "label")]),
    "text": (lambda folder: (folder / "a.txt").write_text("fine " * 100), [
        ("b.txt", "größer".encode("latin-1"), "utf-8"), ("a.txt", b"x", "too short")]),
    "tokens": (lambda folder: IDS.astype("<u2").tofile(folder / "train.bin"), [
        ("train.bin", bytes(101), "multiple"), ("val.bin", IDS.astype(">u2"), "--vocab-size 100"),
        ("train.bin", IDS.astype("<i4"), "int32"), ("train.bin", IDS.astype("<i8"), "int64"),
        ("train.bin", b"To be, or not to be." * 9, "--dataset text")])}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
    write, cases = DAMAGED[name]
    for i, (file, content, words) in enumerate(cases):
        (folder := tmp_path / str(i)).mkdir()
        write(folder)
        content = content((folder / file).read_bytes()) if callable(content) else content
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(lopt.InputError, match=words) as error:
            load_dataset(name, folder, vocab_size=100, sequence_length=8)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_synthetic_is_balanced_and_deterministic():
    dataset, (_, images, _) = load_dataset("synthetic"), next(tasks.make_synthetic(8))
    for split, count in ((dataset.train, 5_000), (dataset.test, 1_000)):
        assert split.inputs.shape == (10 * count, 8, 8, 3)
        assert np.bincount(split.labels).tolist() == [count] * 10
    np.testing.assert_array_equal(images, dataset.train.inputs[:1000])
    assert np.ptp(dataset.mean) < 0.01 and all(0.15 < s < 0.3 for s in dataset.std)


def test_download(tmp_path, monkeypatch):
    (tmp_path / BATCHES).mkdir()
    for name in tasks.CIFAR10_FILES:
        (tmp_path / BATCHES / name).write_text(name)
    shutil.make_archive(tmp_path / "cifar", "gztar", tmp_path, BATCHES)
    archive, data = tmp_path / "cifar.tar.gz", tmp_path / "new" / "data"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{archive.name}"
        monkeypatch.setattr(tasks, "CIFAR10_URL", url)
        with pytest.raises(lopt.InputError, match=f"{url}: .*MD5"):
            tasks.download(data)
        assert not data.exists()
        monkeypatch.setattr(tasks, "CIFAR10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        tasks.download(data)
        server.shutdown()
    tasks.download(data)  # needs no server: the files are there
    assert all((data / BATCHES / name).read_text() == name for name in tasks.CIFAR10_FILES)
