"""Kill meta-training at random moments by SIGKILL, resume it, and compare it with a whole run.

    python tests/kill_and_resume.py 30 [--processes 2]

θ and metrics.csv, but for its seconds, must be equal bit for bit. The moments are before the first
meta-step, while it meta-trains, and while it writes, in turn. Where one of two processes is killed,
the other must end in 6 minutes: with code 2, or by SIGABRT of JAX if they had not yet joined. Every
third time the run resumes as one process.
"""

import argparse
import itertools
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = """--widths 8 --depth 1 --batch-size 8 --image-size 8 --pairs 4 --truncation 4 --resume
  --min-length 8 --max-length 20 --max-offset 4 --report-steps 0 --checkpoint-every 7
  --meta-steps 300"""


def start(out, flags, processes=1, cpus=1, **environment):
    """Start a run as so many processes with so many CPU devices each. They append to OUT.log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | environment | {
        "XLA_FLAGS": f"{os.getenv('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpus}",
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "meta_train.py", *flags.split(), "--out", out]
    with open(out.with_suffix(".log"), "a") as log:
        return [subprocess.Popen(
            command + ["--distributed", address, "2", str(i)] * (processes > 1),
            stdout=log, stderr=log, cwd=ROOT, env=environment) for i in range(processes)]


def check_ends(processes, out, *codes, seconds=600):
    """Wait for processes that must end with one of these codes."""
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    ended = [process.wait() for process in processes]
    if not {*ended} <= {*codes}:
        sys.exit(f"exit codes {ended}, not {codes}:\n{out.with_suffix('.log').read_text()}")


def rows(out):
    """The whole lines of metrics.csv without the seconds."""
    lines = (out / "metrics.csv").read_text().split("\n") if (out / "metrics.csv").exists() else []
    return [line.rsplit(",", 1)[0] for line in lines[:-1]]


def results(out):
    theta = np.load(out / "theta.npz", allow_pickle=False)
    return {name: x.tobytes() for name, x in theta.items() if name != "metadata"}, rows(out)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    args = parser.parse_args()
    rng, folder = random.Random(0), tempfile.TemporaryDirectory()
    whole, began = pathlib.Path(folder.name, "whole"), time.monotonic()
    victim, = start(whole, FLAGS, cpus=2)

    def wait_while(condition):
        while condition() and victim.poll() is None:
            time.sleep(0.001)

    wait_while(lambda: len(rows(whole)) < 2)
    start_up = time.monotonic() - began
    check_ends([victim], whole, 0)
    training = time.monotonic() - began - start_up
    print(f"a whole run: {start_up:.1f} s to the first row, {training:.1f} s more", flush=True)

    kills, runs, kinds = 0, 0, itertools.cycle(("start-up", "training", "writing"))
    counts = itertools.cycle((2, 2, 1) if args.processes == 2 else (1,))
    while not runs or kills < args.kills:
        runs, out = runs + 1, whole.with_name(f"killed-{runs + 1}")
        while processes := start(out, FLAGS, n := next(counts), cpus=2 // n):
            if kills == args.kills:
                break
            kind, victim, before = next(kinds), rng.choice(processes), len(rows(out))
            wait_while(lambda: kind != "start-up" and len(rows(out)) <= before)
            at = time.monotonic() + rng.random() * {"start-up": start_up / 3}.get(kind, training / 5)
            wait_while(lambda: time.monotonic() < at)
            wait_while(lambda: kind == "writing" and not any(out.glob(".*.part")))
            if victim.poll() is not None:
                break
            victim.kill()
            victim.wait()
            kills += 1
            others = [process for process in processes if process != victim]
            codes = (2, -6) if kind == "start-up" else (2,)
            check_ends(others, out, *codes, seconds=360)
            print(f"kill {kills}: {kind}, {n} process(es), {len(rows(out))} rows", flush=True)
        check_ends(processes, out, 0)
        if results(out) != results(whole):
            sys.exit(f"{out} differs from {whole}")
    print(f"{kills} kills of {runs} runs, which equal the whole run")


if __name__ == "__main__":
    main()
