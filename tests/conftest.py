"""Puts the repository root on the import path, and gives the tests eight CPU devices."""

import concurrent.futures
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
sys.path.insert(0, str(ROOT))
# Before JAX starts: the sharded code paths are tested on one machine without a GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


def side_by_side(function, *xs):
    """[function(*x) for x in zip(*xs)] in threads: what each compiles is compiled on a core of its own."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return list(threads.map(function, *xs))
