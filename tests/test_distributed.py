"""Two processes on the loopback address, with two devices each."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

TINY = ["--widths", "8", "--depth", "1", "--batch-size", "8", "--pairs", "4", "--truncation", "20", "--min-length", "20",
        "--max-length", "40", "--report-steps", "0", "--warmup-steps", "2", "--checkpoint-every", "5"]


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Lets a process load what another has compiled already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def start(out, processes, *args):
    """Starts meta_train.py as so many processes with four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"}
    command = [sys.executable, str(ROOT / "meta_train.py"), *args, "--out", str(out)]
    if processes > 1:
        command += ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    return [subprocess.Popen(command + (["--process-id", str(i)] if processes > 1 else []), env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(processes)]


def finish(processes, timeout=200):
    """Waits for all of them: [(exit code, stderr)]."""
    try:
        return [(process.wait(timeout), process.stderr.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def theta(out):
    """All arrays of a run's θ as one vector."""
    arrays = np.load(out / "theta.npz")
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays.files) if name != "metadata"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs of 20 meta-steps, one by two processes and one by one process."""
    together, alone = (tmp_path_factory.mktemp("runs") / name for name in ("together", "alone"))
    flags = [*TINY, "--meta-steps", "20"]
    results = finish(start(together, 2, *flags) + start(alone, 1, *flags))
    assert [code for code, _ in results] == [0, 0, 0], results
    return together, alone


def test_two_processes_equal_one(runs):
    """1e-5 relative: only the sum over pairs is in another order. One writes metrics, both write checkpoints."""
    together, alone = runs
    difference = np.max(np.abs(theta(alone) - theta(together)))
    assert difference < 1e-5 * np.max(np.abs(theta(together)))
    assert len((together / "metrics.csv").read_text().splitlines()) == 21
    for i in range(2):
        assert (together / f"checkpoint-00000020-{i}-of-2.npz").is_file()


def test_a_killed_process_ends_the_other_and_both_resume(runs, tmp_path):
    """The survivor ends soon with a line that says why; started again, both go on as if they had never stopped."""
    out = tmp_path / "run"
    flags = [*TINY, "--meta-steps", "20", "--stall-seconds", "5"]
    processes = start(out, 2, *flags)
    deadline = time.monotonic() + 150
    while not (out / "checkpoint-00000005-1-of-2.npz").exists():
        assert time.monotonic() < deadline and processes[0].poll() is None, finish(processes)
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, errors = finish(processes)[0]
    assert time.monotonic() - killed < 120
    assert code == 2 and "another process" in errors, errors[-2000:]
    results = finish(start(out, 2, *flags, "--resume"))
    assert [code for code, _ in results] == [0, 0], results
    np.testing.assert_array_equal(theta(out), theta(runs[0]))
    assert len((out / "metrics.csv").read_text().splitlines()) == 21
