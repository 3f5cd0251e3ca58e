"""What all commands share: flags, errors of one line, signals, stdout, devices."""

import os
import queue
import signal
import subprocess
import sys
from unittest import mock

import jax
import pytest
from conftest import ROOT, side_by_side

import lopt
import tasks


def python(body: str, platform: str = "cpu") -> subprocess.Popen:
    """Start a process of a command with this body, on a terminal that shows ASCII."""
    script = f"import sys, jax, tasks\ndef run(_): {body}\nsys.exit(tasks.command(run, 'it.py'))"
    environment = {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": "",
                   "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_flags():
    parser = tasks.CommandLine("it.py", "Title.\n\nWhat it does.")
    parser.flag("--word", ("a", "b"), "a", "one of two")
    parser.flag("--on", bool, False, "a switch")
    parser.flag("--count", tasks.COUNT, 3, "how many")
    parser.flag("--rates", tasks.SHARE, [0.5], "several")
    assert vars(parser.parse_args([])) == {"word": "a", "on": False, "count": 3, "rates": [0.5]}
    given = parser.parse_args("--word b --on --count 7 --rates 0 1".split())
    assert vars(given) == {"word": "b", "on": True, "count": 7, "rates": [0.0, 1.0]}
    for bad in ("--word c", "--count x", "--count 0", "--rates 0 2", "--rates nan", "--co 3", "x"):
        with pytest.raises(lopt.InputError, match=bad.split()[0]):
            parser.parse_args(bad.split())


def test_what_a_user_can_mend_is_one_line(capsys):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB")
    for error, words in ((lopt.InputError("a\nb"), "a b"), (full, "memory"),
                         (MemoryError(), "memory"), (FileNotFoundError(2, "", "x.npz"), "x.npz")):
        assert tasks.command(mock.Mock(side_effect=error), "it.py") == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("it.py: error: ") and words in line
    with pytest.raises(ValueError, match="a bug"):
        tasks.command(mock.Mock(side_effect=ValueError("a bug")), "it.py")


def test_signals():
    """Ignored ones, those with another handler, and all outside the main thread are left alone."""
    received = queue.Queue()
    ours = signal.signal(signal.SIGUSR2, signal.SIG_IGN), signal.signal(signal.SIGALRM, print)
    with tasks.on_signals([signal.SIGUSR1, signal.SIGUSR2], received.put):
        for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGUSR1):
            signal.raise_signal(number)
        first = received.get(timeout=10)
    signal.signal(signal.SIGUSR2, ours[0]), signal.signal(signal.SIGALRM, ours[1])
    assert first == signal.SIGUSR1 and received.empty()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert side_by_side(lambda argv: tasks.command(len, "it.py", argv), [["a", "b"]]) == [2]


def test_ctrl_c_does_not_wait_for_xla():
    loop = "jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x + 1, x))"
    process = python(f"f = {loop}.lower(1.0).compile(); print('ready', flush=True); print(f(1.0))")
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == "\nit.py: interrupted\n"
        assert process.returncode == 130
    finally:
        process.kill()


def test_closed_stdout_ends_quietly():
    processes = [python(body) for body in ("print('x' * 10**6)", "print('help'); sys.exit(0)")]
    end = lambda process: (process.stdout.close(), process.stderr.read(), process.wait())
    assert side_by_side(end, processes) == [(None, "", 141)] * 2


def test_platform_that_is_not_there_is_one_line():
    for process in [python("print('θ'); tasks.set_up(None)", name) for name in ("cuda", "no-μ")]:
        out, error = process.communicate()
        assert (out, error[:5], error.count("\n"), process.returncode) == ("?\n", "it.py", 1, 2)


def test_devices_and_precision(monkeypatch):
    updates, args = {}, mock.Mock(matmul_precision="bfloat16")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    for platform, divides, expected in (("cpu", 6, [3, "highest"]), ("gpu", 0, [4, "bfloat16"])):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        tasks.set_up(args, divides)
        assert list(updates.values()) == expected
