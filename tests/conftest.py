"""Puts the repository root on the import path, and gives the tests eight CPU devices."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
sys.path.insert(0, str(ROOT))
# Before JAX starts: the sharded code paths are tested on one machine without a GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
