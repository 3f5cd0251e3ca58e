"""Kills meta-training by SIGKILL at random moments, resumes it each time, and compares it with a run left alone.

    python tests/kill_and_resume.py 30

θ and metrics.csv (all columns but `seconds`, the wall time) must be equal bit for bit. Moments are of three
kinds in turn: between the start of the process and the first meta-step (imports, compilation), while it
meta-trains, and while a file is being written. A run that ends before its next kill is compared, and a new one
begins. Exit code 1 for any difference. --seed decides the moments, as fractions of the times measured at first.
The killed runs find their compiled programs in JAX's cache, where the one left alone has put them.
"""

import argparse
import itertools
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["--widths", "8", "--depth", "1", "--batch-size", "8", "--pairs", "4", "--truncation", "4",
         "--min-length", "8", "--max-length", "20", "--warmup-steps", "20", "--report-steps", "0",
         "--checkpoint-every", "7"]
KINDS = ("start-up", "training", "writing")


def start(out: pathlib.Path, meta_steps: int) -> subprocess.Popen:
    """meta_train.py in a process of its own, its messages in OUT.log."""
    command = [sys.executable, str(ROOT / "meta_train.py"), *FLAGS, "--meta-steps", str(meta_steps),
               "--out", str(out), "--resume-or-begin"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen, out: pathlib.Path) -> None:
    """Waits for a run that must end well."""
    if process.wait():
        sys.exit(f"exit code {process.returncode}:\n{out.with_suffix('.log').read_text()[-3000:]}")


def rows(out: pathlib.Path) -> list[str]:
    """The lines of metrics.csv that are whole, without the wall time."""
    path = out / "metrics.csv"
    return [row.rsplit(",", 1)[0] for row in path.read_text().split("\n")[:-1]] if path.exists() else []


def is_writing(out: pathlib.Path) -> bool:
    """Whether a file is half-written at this moment."""
    return out.is_dir() and any(name.endswith(".part") for name in os.listdir(out))


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """What differs between the results of two runs."""
    one, other = np.load(a / "theta.npz", allow_pickle=False), np.load(b / "theta.npz", allow_pickle=False)
    unequal = [name for name in one.files if one[name].tobytes() != other[name].tobytes()]
    return unequal + ["metrics.csv"] * (rows(a) != rows(b)) + ["names of arrays"] * (one.files != other.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments (default: 0)")
    parser.add_argument("--meta-steps", type=int, default=300, help="of the run (default: 300)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        whole, began = folder / "whole", time.monotonic()
        process = start(whole, args.meta_steps)
        while len(rows(whole)) < 2 and process.poll() is None:
            time.sleep(0.01)
        start_up = time.monotonic() - began
        finish(process, whole)
        training = time.monotonic() - began - start_up
        print(f"a run of {args.meta_steps} meta-steps: {start_up:.1f} s until the first, {training:.1f} s more",
              flush=True)

        kills, while_writing, runs, unequal = 0, 0, 0, []
        moments = itertools.cycle(KINDS)
        while runs == 0 or kills < args.kills:
            runs += 1
            out = folder / f"killed-{runs}"
            while True:
                process = start(out, args.meta_steps)
                if kills == args.kills:
                    break
                kind, fraction = next(moments), rng.random()
                began = time.monotonic()
                if kind != "start-up":  # from the first meta-step of this process on
                    before = len(rows(out))
                    while len(rows(out)) <= before and process.poll() is None:
                        time.sleep(0.01)
                    began = time.monotonic()
                deadline = began + fraction * (start_up if kind == "start-up" else 0.2 * training)
                while time.monotonic() < deadline and process.poll() is None:
                    time.sleep(0.002)
                while kind == "writing" and not is_writing(out) and process.poll() is None:
                    pass
                if process.poll() is not None:
                    break
                process.kill()
                process.wait()
                kills += 1
                halves = is_writing(out)
                while_writing += halves
                print(f"kill {kills:3} ({kind}): {max(len(rows(out)) - 1, 0)} meta-steps made"
                      f"{', a file half-written' if halves else ''}", flush=True)
            finish(process, out)
            unequal += [f"{name} of run {runs}" for name in differences(whole, out)]
    print(f"{kills} kills ({while_writing} of them while a file was written), {runs} run(s): "
          f"{'all equal to the uninterrupted run' if not unequal else 'DIFFERENT: ' + ', '.join(unequal)}")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
