"""Files of θ, ours and published ones: read exactly, or refused in one line that names the file."""

import json
import struct

import jax
import numpy as np
import pytest
from conftest import GOLDEN_DIR, ROOT

import lopt
import mup

SHAPES = {"w0": (39, 32), "b0": (32,), "w1": (32, 32), "b1": (32,), "w2": (32, 2), "b2": (2,),
          "momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
THETA = {name: np.random.default_rng(i).standard_normal(shape, np.float32)
         for i, (name, shape) in enumerate(SHAPES.items())}
OURS = lopt.Learned(THETA, 0.01, 0.002, mup.Parametrization("mup", 2.0, 16.0, 0.5, 128),
                    made={"meta_steps": 1000, "settings": {"widths": [32]}}, decay=0.1, horizon=7)


def assert_same(learned, expected):
    assert learned[1:] == expected[1:]
    jax.tree.map(np.testing.assert_array_equal, learned.theta, expected.theta)


def mulo_file():
    """The authors' file of a μLO: PyTorch's layout [out, in] in the safetensors format."""
    header, data = {}, b""
    for i, name in enumerate(("input", "linear_0", "output")):
        for kind in "bias", "weight":
            x, start = THETA[f"{kind[0]}{i}"].T, len(data)
            data += x.tobytes()
            header[f"network.{name}.{kind}"] = {"dtype": "F32", "shape": x.shape,
                                                "data_offsets": [start, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def refusal(path):
    """The message that refuses a file, or None if the file is read."""
    try:
        lopt.load(path)
    except lopt.InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 500
        return str(error)


def test_theta_returns_from_disk(tmp_path):
    """A file replaces an older one whole, or not at all."""
    path = tmp_path / "theta.npz"
    path.write_bytes(b"older")
    for learned in OURS, lopt.Learned(THETA, 0.01, parametrization=mup.SP):
        lopt.save(path, learned)
        with pytest.raises(ZeroDivisionError):
            lopt.write_atomically(path, lambda file: file.write(b"new") / 0)
        assert_same(lopt.load(str(path)), learned)
    assert [x.name for x in tmp_path.iterdir()] == ["theta.npz"]
    with pytest.raises(lopt.InputError, match="nowhere"):
        lopt.save(tmp_path / "nowhere" / "theta.npz", OURS)


def test_shipped_files_and_those_without_multipliers_load(tmp_path):
    metadata = b'{"parametrization": "mup", "step_mult": 1, "exp_mult": 0.001, "meta_steps": 7}'
    np.savez_compressed(tmp_path / "x.npz", **THETA, metadata=np.frombuffer(metadata, np.uint8))
    assert_same(lopt.load(tmp_path / "x.npz"), lopt.Learned(THETA, 1.0, made={"meta_steps": 7}))
    shipped = [lopt.load(path) for path in (ROOT / "results").glob("*.npz")]
    assert shipped and all(lopt.learned_optimizer(learned, num_steps=9) for learned in shipped)


def test_published_mulo(tmp_path):
    """The file lacks the decays."""
    assert (tmp_path / "model.safetensors").write_bytes(mulo_file()) == 10_096
    learned = lopt.load(tmp_path / "model.safetensors")
    for decays, expected in zip(lopt.trained_decays(learned.theta), (
            [0.5420274, 0.9584413, 0.9980236], 0.998886, [0.3562182, 0.9966259, 0.9994613])):
        np.testing.assert_allclose(decays, expected, atol=2e-6)
    decays = {name: learned.theta[name] for name in THETA if "decays" in name}
    assert_same(learned, lopt.Learned(THETA | decays, 0.01))


@pytest.mark.filterwarnings("ignore")  # NumPy's, of headers that it finds odd
@pytest.mark.parametrize("kind", ["npz", "msgpack", "safetensors"])
def test_damaged_files_are_read_exactly_or_refused(kind, tmp_path):
    """The published formats have no checksum: a changed byte may be that of one number."""
    path, rng = tmp_path / kind, np.random.default_rng(0)
    lopt.save(path, OURS)
    if kind != "npz":
        path.write_bytes(mulo_file() if kind == "safetensors"
                         else (GOLDEN_DIR / "velo_params.msgpack").read_bytes())
    whole, content = jax.device_get(lopt.load(path)), path.read_bytes()
    framing = np.ones(len(content), bool)
    for x in whole.theta.values():
        start = max(content.find(x.tobytes()), content.find(x.T.tobytes()))
        framing[start:start + x.nbytes] &= start < 0
    for place in [*rng.choice(np.flatnonzero(framing), 60), *rng.integers(0, len(content), 15)]:
        path.write_bytes(content[:place] + rng.bytes(1) + content[place + 1:])
        if refusal(path) is None:
            read = jax.device_get(lopt.load(path))
            changed = sum(np.sum(read.theta[name] != x) for name, x in whole.theta.items())
            assert changed <= (kind != "npz") and read[1:] == whole[1:], place
    for length in rng.integers(0, len(content), 20):
        path.write_bytes(content[:length])
        assert refusal(path)


@pytest.mark.parametrize("arrays, metadata, culprit", [
    ({"w2": None}, {}, "w2"), ({"w0": THETA["w0"][1:]}, {}, "w0"),
    ({"w1": np.zeros((32, 32))}, {}, "w1"), ({"b1": np.float32([np.nan] * 32)}, {}, "b1"),
    ({"b0": np.array([{}])}, {}, "pickle"), ({}, {"parametrization": "ntk"}, "metadata"),
    ({}, {"step_mult": None}, ""), ({"metadata": np.uint8([123])}, {}, "")])
def test_a_file_that_holds_no_theta_is_refused(arrays, metadata, culprit, tmp_path):
    metadata = {"parametrization": "mup", "step_mult": 0.01, "exp_mult": 0.001} | metadata
    arrays = THETA | {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)} | arrays
    np.savez(tmp_path / "x.npz", **{name: x for name, x in arrays.items() if x is not None})
    assert culprit in refusal(tmp_path / "x.npz")
    assert refusal(tmp_path) and refusal(tmp_path / "absent.npz")
