"""Puts the repository root on the import path, gives the tests eight CPU devices, and saves them time.

Most of that time is XLA's compiler. The tests use its older code generator for CPUs, which compiles in two thirds of
the time; programs that they start as processes use the default one. To run all on the default:
XLA_FLAGS=--xla_cpu_use_fusion_emitters=true python -m pytest.
"""

import concurrent.futures
import contextlib
import gc
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
sys.path.insert(0, str(ROOT))


@contextlib.contextmanager
def size_of_files_limited():
    """Gives a function that limits the size of files from then on, which looks like a full disk, until the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def is_known(flag):
    """Whether the installed XLA has this flag: those that it does not know end a process."""
    return subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True,
                          env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}).returncode == 0


# Before JAX starts: the sharded code paths are tested on one machine without a GPU.
os.environ["XLA_FLAGS"] = " ".join([*filter(is_known, ["--xla_cpu_use_fusion_emitters=false"]),
                                    os.environ.get("XLA_FLAGS", ""),  # of a flag that is given twice the last counts
                                    "--xla_force_host_platform_device_count=8"])


def tree(data, prefix):
    """The arrays of a golden file whose names begin with prefix/."""
    import jax.numpy as jnp  # not before the devices are set
    return {name[len(prefix) + 1:]: jnp.asarray(data[name]) for name in data.files if name.startswith(prefix + "/")}


def side_by_side(function, *xs):
    """[function(*x) for x in zip(*xs)] in threads: what each compiles is compiled on a core of its own."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, *xs))


def pytest_collection_finish():
    """Spares Python's collector what stays anyway, and most of its walks: 5% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


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
