"""Puts the repository root on the import path, and gives the tests eight CPU devices."""

import concurrent.futures
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
sys.path.insert(0, str(ROOT))
# Before JAX starts: the sharded code paths are tested on one machine without a GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


def tree(data, prefix):
    """The arrays of a golden file whose names begin with prefix/."""
    import jax.numpy as jnp  # not before the devices are set
    return {name[len(prefix) + 1:]: jnp.asarray(data[name]) for name in data.files if name.startswith(prefix + "/")}


def side_by_side(function, *xs):
    """[function(*x) for x in zip(*xs)] in threads: what each compiles is compiled on a core of its own."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, *xs))


@pytest.fixture(scope="session", autouse=True)
def whole_runs(request, tmp_path_factory):
    """The future of test_meta_train's whole runs, begun before the first test when any test asks for them.

    Their processes then use what the tests before them leave idle of the cores: 40 s that nobody waits for.
    """
    if not any("runs" in item.fixturenames for item in request.session.items):
        yield None
        return
    from test_meta_train import whole_runs
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        yield thread.submit(whole_runs, tmp_path_factory.mktemp("runs"))
