"""The meta-step on one and on many devices, and a whole run of the command line."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side
from jax.sharding import Mesh

import lopt
import meta_train
import tasks

SETTINGS = meta_train.Settings(widths=(8, 12), depth=1, batch_size=8, pairs=8, truncation=5, min_length=10,
                               max_length=20, meta_steps=20, warmup_steps=2)


def run(*args, devices=2, **options):
    """Runs meta_train.py in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run([sys.executable, str(ROOT / "meta_train.py"), *args, "--devices", str(devices)],
                          capture_output=True, text=True, env=environment, timeout=240, **options)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    split = tasks.Split(jnp.asarray(rng.integers(0, 256, (200, 4, 4, 3)), jnp.uint8),
                        jnp.asarray(rng.integers(0, 10, 200), jnp.int32))
    return tasks.Dataset("noise", 10, (0.5,) * 3, (0.3,) * 3, split, split)


def meta_train_on(devices, dataset, settings=SETTINGS, steps=20):
    """θ, the metrics and the last state after some meta-steps on the first so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("pairs",))
    parametrization = meta_train.mup.Parametrization(settings.parametrization)
    inner = [meta_train.make_task(settings, dataset, w, settings.depth, parametrization) for w in settings.widths]
    init, meta_step = meta_train.make_functions(settings, inner, mesh)
    state, split, rows = init(), meta_train.replicate(dataset.train, mesh), []
    for _ in range(steps):
        state, metrics = meta_step(state, split)
        rows.append(jax.device_get(metrics))
    return jax.device_get(state.theta), rows, state


def relative(a, b):
    """The largest difference between two trees over the largest entry, leaf by leaf."""
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) + 1e-12))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_many_devices_equal_one(dataset):
    """The meta-gradient and 20 meta-steps of θ, on 8 devices and on 1. 1e-5: only sums are in another order."""
    (one, rows_one, _), (eight, rows_eight, state) = side_by_side(lambda n: meta_train_on(n, dataset), (1, 8))
    assert len(state.pairs[0].step.sharding.device_set) == 8
    assert relative(eight, one) < 1e-5
    for a, b in zip(rows_eight, rows_one):
        assert abs(a.grad_norm - b.grad_norm) < 1e-5 * b.grad_norm
        assert abs(a.meta_loss - b.meta_loss) < 1e-5 * b.meta_loss


def test_meta_training_reduces_the_meta_loss(tmp_path):
    """A small run end to end: θ and metrics are written, and the meta-loss falls below that of fresh networks."""
    done = run("--widths", "16", "--depth", "1", "--batch-size", "32", "--truncation", "20", "--min-length", "20",
               "--max-length", "60", "--meta-steps", "60", "--learning-rate", "1e-2", "--warmup-steps", "10",
               "--report-steps", "0", "--output-mult", "1", "--hidden-lr-mult", "2", "--step-mult", "0.01",
               "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    theta, metadata = lopt.load_theta(tmp_path / "run" / "theta.npz")
    assert metadata["parametrization"] == "mup" and metadata["step_mult"] == 0.01
    assert metadata["settings"]["widths"] == [16]
    assert meta_train.mup.parametrization_of(metadata) == meta_train.mup.Parametrization("mup", hidden_lr_mult=2.0)
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert header.split(",") == list(meta_train.COLUMNS)
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 61))
    losses = [float(row.split(",")[1]) for row in rows]
    assert np.mean(losses[-10:]) < np.log(10) - 0.02  # measured: 2.255, from ln 10 = 2.303 of a fresh network


@pytest.mark.parametrize("preset, parametrization, expected", [
    ("laptop", "mup", (1.0, 16.0, 16.0, 0.003)), ("laptop", "sp", (1.0, 1.0, 1.0, 0.001)),
    ("paper-s", "mup", (1.0, 1.0, 1.0, 0.01)), ("paper-m", "sp", (1.0, 1.0, 1.0, 0.001))])
def test_multipliers_of_the_presets(preset, parametrization, expected):
    """The paper's multipliers are 1 and its step_mult 0.01; SP knows neither, and has its own step_mult."""
    settings = meta_train.Settings(**meta_train.preset_settings(preset, parametrization) |
                                   {"parametrization": parametrization})
    meta_train.check(settings)
    name, *multipliers = meta_train.parametrization(settings)
    assert (name, *multipliers, meta_train.step_mult(settings)) == (parametrization, *expected)


def test_pairs_that_do_not_divide_are_refused(tmp_path):
    """Also in the environment that forces eight devices; the message names the nearest numbers that do."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, str(ROOT / "meta_train.py"), "--pairs", "12", "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr == ("meta_train.py: error: --pairs 12: does not divide over 8 devices; use 8 or 16\n")
