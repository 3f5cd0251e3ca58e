"""Give the tests eight CPU devices, and XLA's older code generator, which compiles faster."""

import concurrent.futures
import gc
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
sys.path.insert(0, str(ROOT))


def is_known(flag):
    """Whether the installed XLA has this flag: an unknown one ends the process."""
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run([sys.executable, "-c", "import jax; jax.devices()"],
                              capture_output=True, env=environment).returncode


# The last of two equal flags counts: XLA_FLAGS=--xla_cpu_use_fusion_emitters=true undoes this.
os.environ["XLA_FLAGS"] = " ".join([
    *filter(is_known, ["--xla_cpu_use_fusion_emitters=false"]), os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8"])


def tree(data, prefix):
    """The arrays of a golden file whose names begin with prefix/."""
    import jax.numpy as jnp  # not before the devices are set
    return {name[len(prefix) + 1:]: jnp.asarray(data[name]) for name in data.files
            if name.startswith(prefix + "/")}


def side_by_side(function, *xs):
    """[function(*x) for x in zip(*xs)] in two threads, so that XLA compiles on two cores."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, *xs))


def pytest_collection_finish():
    """Spare Python's collector the objects that stay: 5% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


@pytest.fixture(scope="session", autouse=True)
def whole_runs(request, tmp_path_factory):
    """The future of test_meta_train's processes, which run beside all tests."""
    future = None
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        if any("runs" in item.fixturenames for item in request.session.items):
            import test_meta_train
            future = thread.submit(test_meta_train.whole_runs, tmp_path_factory.mktemp("runs"))
        yield future
