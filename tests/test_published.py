"""Published files: read exactly, or refused in one line, whatever their bytes."""

import json
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from conftest import GOLDEN_DIR

import evaluate
import lopt
import tasks

# ---------------------------------------------------------------------------------------------------------
# Writers in the published layouts


def pack(x):
    """flax's msgpack of maps, text, numbers and arrays."""
    def sized(small, codes, n):
        if small is not None and n < small[1]:
            return bytes([small[0] | n])
        code, form = next((c, f) for c, f, limit in codes if n < limit)
        return bytes([code]) + struct.pack(form, n)

    if isinstance(x, dict):
        head = sized((0x80, 16), [(0xde, ">H", 1 << 16), (0xdf, ">I", 1 << 32)], len(x))
        return head + b"".join(pack(k) + pack(x[k]) for k in x)
    if isinstance(x, str):
        text = x.encode()
        return sized((0xa0, 32), [(0xd9, ">B", 256), (0xda, ">H", 1 << 16)], len(text)) + text
    if isinstance(x, list):
        return bytes([0x90 | len(x)]) + b"".join(map(pack, x))
    if isinstance(x, bytes):
        return sized(None, [(0xc4, ">B", 256), (0xc5, ">H", 1 << 16), (0xc6, ">I", 1 << 32)], len(x)) + x
    if isinstance(x, int):
        return bytes([x]) if x < 128 else sized(None, [(0xcc, ">B", 256), (0xcd, ">H", 1 << 16),
                                                       (0xce, ">I", 1 << 32)], x)
    kind = 1 if isinstance(x, np.ndarray) else 3
    payload = pack([list(x.shape), x.dtype.name, x.tobytes()])
    if len(payload) in (1, 2, 4, 8, 16):
        return bytes([0xd4 + len(payload).bit_length() - 1, kind]) + payload
    return sized(None, [(0xc7, ">B", 256), (0xc8, ">H", 1 << 16), (0xc9, ">I", 1 << 32)],
                 len(payload)) + bytes([kind]) + payload


def nested(theta):
    """VeLO's θ as the maps of its published file."""
    tree = {}
    for name, x in theta.items():
        top, *middle, last = name.split("/")
        inner = tree.setdefault(top, {})
        for key in ["/".join(middle)] if middle else []:
            inner = inner.setdefault(key, {})
        inner[last] = np.asarray(x)
    return tree


def safetensors(tensors):
    """A safetensors file of float32 tensors in the order of their names."""
    header, data = {}, b""
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name], np.float32)
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def pylo_pair(theta):
    """The files of VeLO_RNN and VeLO_MLP of a θ, in PyLO's layout."""
    theta = {name: np.asarray(x) for name, x in theta.items()}
    rnn = {"lstm_init_state.0": theta["lstm_init_state/hidden"], "lstm_init_state.1": theta["lstm_init_state/cell"]}
    for theirs, ours in (("mix_layer1", "linear"), ("mix_layer2", "linear_1"), ("final_mix_layer", "linear_2"),
                         ("lstm.linear", "rnn/linear"), ("rnn_to_controls", "rnn_to_controls"),
                         ("step_size", "step_size")):
        rnn |= {f"{theirs}.weight": theta[f"rnn_params/{ours}/w"].T, f"{theirs}.bias": theta[f"rnn_params/{ours}/b"]}
    bank = {name.split("/")[-1]: x for name, x in theta.items() if name.startswith("ff_mod")}
    w0 = np.concatenate([bank[f"w0__{i}"] for i in range(14)], 1)
    mlp = {"input_weights_": w0.swapaxes(1, 2), "input_bias_": bank["b0"],
           "hidden_weights_.0": bank["w1"].swapaxes(1, 2), "hidden_bias_.0": bank["b1"],
           "output_weights_": bank["w2"].swapaxes(1, 2), "output_bias_": bank["b2"]}
    scratch = {"input_weights": mlp["input_weights_"][0], "input_bias": mlp["input_bias_"][0],
               "hidden_weights.0": mlp["hidden_weights_.0"][0], "hidden_bias.0": mlp["hidden_bias_.0"][0],
               "output_weights": mlp["output_weights_"][0]}
    return safetensors(rnn), safetensors(mlp | scratch)


def mulo_file(theta):
    """μLO's θ in the layout of the authors' file, which has no decays."""
    tensors = {}
    for i, name in enumerate(("input", "linear_0", "output")):
        tensors |= {f"network.{name}.weight": np.asarray(theta[f"w{i}"]).T, f"network.{name}.bias": theta[f"b{i}"]}
    return safetensors(tensors)


def loaded(tmp_path, content, name="file"):
    (tmp_path / name).write_bytes(content)
    return lopt.load(tmp_path / name)


def assert_same(theta, expected):
    assert set(theta) == set(expected)
    for name, x in expected.items():
        assert np.asarray(theta[name]).tobytes() == np.asarray(x).tobytes(), name
        assert theta[name].shape == x.shape


@pytest.fixture(scope="module")
def reference():
    """The reference's θ by the names of the published file."""
    data = np.load(GOLDEN_DIR / "velo.npz", allow_pickle=False)
    return {name.removeprefix("theta/"): data[name] for name in data.files if name.startswith("theta/")}


# ---------------------------------------------------------------------------------------------------------
# Read exactly


def test_the_reference_theta_is_the_same_from_all_of_its_files(tmp_path, reference):
    content = (GOLDEN_DIR / "velo_params.msgpack").read_bytes()
    learned = loaded(tmp_path, content)
    assert_same(learned.theta, reference)
    assert (learned.architecture, learned.step_mult, learned.exp_mult) == ("velo", 0.001, 0.001)
    assert learned.made["published"].startswith("not the published file")
    inner = pack(nested(reference))
    assert inner in content  # the writer's layout is the published one
    assert_same(loaded(tmp_path, inner).theta, reference)
    old = nested(reference)
    old["lstm_init_state"] = {"name": "LSTMState", "fields": {"0": "hidden", "1": "cell"},
                              "values": {"0": old["lstm_init_state"]["hidden"], "1": old["lstm_init_state"]["cell"]}}
    assert_same(loaded(tmp_path, pack(old)).theta, reference)
    rnn, mlp = pylo_pair(reference)
    (tmp_path / "pair").mkdir()
    for name, part in (("VeLO_RNN", rnn), ("VeLO_MLP", mlp)):
        (tmp_path / "pair" / name).mkdir()
        (tmp_path / "pair" / name / "model.safetensors").write_bytes(part)
    assert_same(lopt.load(tmp_path / "pair").theta, reference)
    assert lopt.theta_files(tmp_path / "pair") == [tmp_path / "pair" / name / "model.safetensors"
                                                   for name in ("VeLO_MLP", "VeLO_RNN")]
    plan = evaluate.prepare(["--theta", str(tmp_path / "pair")])
    split = tasks.Split(np.zeros((1, 2)), np.zeros(1))
    dataset = tasks.Dataset("none", 2, (), (), split, split)
    assert len(evaluate.record(plan.settings, dataset)["checksums"][str(tmp_path / "pair")]) == 64  # a checksum of both
    lopt.write_npz(tmp_path / "x.npz", reference)
    assert_same(lopt.read_npz(tmp_path / "x.npz", 1 << 20), reference)


def test_published_sizes(tmp_path):
    theta = jax.device_get(lopt.init_velo_theta(jax.random.key(0), 512, 256))
    state = pack(nested(theta))
    whole = pack({"params": nested(theta), "gen_id": "0" * 32, "step": 60_000})
    assert (len(state), len(whole)) == (9_282_507, 9_282_564)
    learned = loaded(tmp_path, whole)
    assert_same(learned.theta, theta)
    assert "another hash" in learned.made["published"]
    rnn, mlp = pylo_pair(theta)
    assert (len(rnn), len(mlp)) == (9_119_908, 164_296)
    small = lopt.init_theta(jax.random.key(1))
    assert len(mulo_file(small)) == 10_096


def test_published_mulo(tmp_path):
    """Its six tensors are transposed, its decays are the known ones, and its update is that of a μLO of ours."""
    theta = jax.device_get(lopt.init_theta(jax.random.key(1)))
    learned = loaded(tmp_path, mulo_file(theta))
    decays = {name: np.float32(x) for name, x in lopt.PUBLISHED_MULO_DECAYS.items()}
    assert_same(learned.theta, theta | decays)
    assert (learned.step_mult, learned.parametrization.name) == (0.01, "mup")
    momentum, rms, adafactor = lopt.trained_decays(learned.theta)
    np.testing.assert_allclose(momentum, [0.5420274, 0.9584413, 0.9980236], atol=2e-6)
    np.testing.assert_allclose(rms, 0.998886, atol=2e-6)
    np.testing.assert_allclose(adafactor, [0.3562182, 0.9966259, 0.9994613], atol=2e-6)
    lopt.convert(tmp_path / "file", tmp_path / "ours.npz")
    again = lopt.load(tmp_path / "ours.npz")
    assert_same(again.theta, learned.theta)
    assert "another hash" in again.made["published"]


# ---------------------------------------------------------------------------------------------------------
# Refused


def refused_or_read(read, content):
    """Whether the content was read; else it was refused by a ValueError of one line."""
    try:
        return read(content) is not None
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, error
        assert len(str(error)) < 400, error
        return False


@pytest.fixture(scope="module")
def small_files(reference):
    rnn, mlp = pylo_pair(reference)
    return {"msgpack": ((GOLDEN_DIR / "velo_params.msgpack").read_bytes(), lambda x: lopt.published_theta([x])),
            "mulo": (mulo_file(jax.device_get(lopt.init_theta(jax.random.key(1)))),
                     lambda x: lopt.published_theta([x])),
            "rnn": (rnn, lambda x: lopt.published_theta([x, mlp])),
            "mlp": (mlp, lambda x: lopt.published_theta([rnn, x]))}


@pytest.mark.parametrize("kind", ["msgpack", "mulo", "rnn", "mlp"])
def test_changed_bytes_and_truncations(small_files, kind):
    """10,000 files with one changed byte each, most of them where names, shapes and lengths stand, and cut lopt."""
    content, read = small_files[kind]
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little") if kind != "msgpack" else 0
    # In msgpack all that is not an array's bytes: framing stands before the bytes of an array.
    framing = np.arange(header) if header else np.concatenate(
        [np.arange(max(0, i - 40), i + 12) for i in range(len(content)) if content[i:i + 7] == b"float32"])
    read_count = 0
    for i in range(10_000):
        damaged = bytearray(content)
        where = rng.choice(framing) if i % 4 else rng.integers(len(content))
        damaged[where] = rng.integers(256)
        read_count += refused_or_read(read, bytes(damaged))
    assert 0 < read_count < 10_000
    for n in {*range(0, 200), *rng.integers(0, len(content), 300).tolist()}:
        assert not refused_or_read(read, content[:n]), n
    for tail in (b"\0", b"\0" * 8, content):
        assert not refused_or_read(read, content + tail)


def lying_msgpack():
    big = 2**31
    array = lambda shape, data=b"\0" * 16: pack([shape, "float32", data])  # noqa: E731
    ext = lambda payload, kind=1: b"\xc7" + bytes([len(payload), kind]) + payload  # noqa: E731
    yield from (b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
                b"\xdd\xff\xff\xff\xff" + b"\x90" * 1_000_000, b"\xdc\xff\xff" + b"\x90" * 65_535,
                b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xc1", b"",
                b"\x82\xa1a\x01\xa1a\x01", b"\x81\x01\x01", b"\xa1\xff", b"\xc7\x02\x02\x90\x90")
    for shape in ([big, big], [2**62, 4], [2**32, 2**32], [-4], [0, 2**62], [4] * 9, ["4"], "4", [4.0], [True] * 2):
        if all(isinstance(n, int) and 0 <= n < 2**32 for n in shape):
            yield ext(array(shape))
        elif all(isinstance(n, int) for n in shape):
            dims = b"".join(b"\xd3" + struct.pack(">q", n) for n in shape)
            yield ext(b"\x93" + bytes([0x90 | len(shape)]) + dims + pack("float32") + pack(b"\0" * 16))
        else:
            yield ext(b"\x93" + (b"\x91\xa1\x34" if shape == ["4"] else b"\xa14" if shape == "4" else
                                 b"\x91\xcb" + struct.pack(">d", 4.0)) + pack("float32") + pack(b"\0" * 16))
    for dtype in ("object", "O", "float16", "V16", "S16", "complex64", "<f4"):
        yield ext(pack([[4], dtype, b"\0" * 16]))
    yield ext(array([4]), kind=3)
    yield ext(array([4]), kind=2)
    yield ext(array([4]) + b"\0")
    yield ext(ext(array([4])))


def lying_safetensors():
    def make(header, data=b"\0" * 64):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    good = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    yield from (b"", b"\0" * 7, struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 2**40) + b"{}",
                make(b"[" * 60_000), make(b'{"a":' * 10_000), make(b"{"), make(b"[]"), make(b"\xff\xfe"),
                make(b'{"a":1,"a":2}'), make(b"9" * 10_000), make({"a": good}, b"\0" * 65), make({}, b"\0"))
    for change in ({"dtype": "F16"}, {"dtype": None}, {"dtype": [1]}, {"shape": [2**40, 2**40]}, {"shape": [15]},
                   {"shape": [-4, -4]}, {"shape": [0, 16]}, {"shape": [16.0]}, {"shape": [True] * 4}, {"shape": "16"},
                   {"shape": [1] * 9 + [16]}, {"shape": None}, {"data_offsets": [0, 2**63]}, {"data_offsets": [64, 0]},
                   {"data_offsets": [-64, 0]}, {"data_offsets": [0]}, {"data_offsets": [0.0, 64.0]},
                   {"data_offsets": None}, {"data_offsets": [4, 64], "shape": [15]}):
        yield make({"a": good | change})
    yield make({"a": good, "b": good})
    yield make({"a": good | {"shape": [8], "data_offsets": [0, 32]}, "b": good | {"shape": [9], "data_offsets": [28, 64]}})
    yield make({"a": 1})


@pytest.mark.parametrize("make, read", [(lying_msgpack, lopt.velo_from_msgpack),
                                        (lying_safetensors, lopt.read_safetensors)])
def test_lies_are_refused_with_little_memory(make, read):
    """At most 10 times the file's size, and a megabyte for what Python itself needs."""
    for i, content in enumerate(make()):
        tracemalloc.start()
        assert not refused_or_read(read, content), (i, content[:80])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 10 * len(content) + (1 << 20), (i, peak, len(content))


def test_refusals_name_the_file(tmp_path, reference):
    rnn, mlp = pylo_pair(reference)
    for content, culprit in ((rnn, "VeLO_MLP"), (mlp, "VeLO_RNN"), (b"", "npz"), (b"\x80", "missing"),
                             (b"\x93" * 20, "npz"), (safetensors({"x": np.ones(2)}), "VeLO_RNN"),
                             (safetensors({"network.x": np.ones(2)}), "not those of μLO"),
                             (pack(nested(reference | {"lstm_init_state/cell": np.ones((1, 3), np.float32)})),
                              "lstm_init_state/cell"),
                             (pack(nested(reference | {"lstm_init_state/cell": np.full((1, 12), np.nan,
                                                                                       np.float32)})), "finite")):
        with pytest.raises(ValueError, match=culprit) as error:
            loaded(tmp_path, content)
        assert str(error.value).startswith(str(tmp_path / "file")) and "\n" not in str(error.value)
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=str(place)):
            lopt.load(place)
    (tmp_path / "x.safetensors").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match="x.safetensors: is no .npz"):  # the file, not its folder
        lopt.load(tmp_path)
