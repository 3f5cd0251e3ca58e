"""Speed, run by hand: meta-steps, the optimizers alone, and evaluation, against the machine's matrix-product rate.

    python tests/benchmark.py                       tiny and mid
    python tests/benchmark.py --settings tiny       one of tiny, mid, paper-s, paper-m
    python tests/benchmark.py --widths 64 --depth 6 --batch-size 128        any setting, by meta_train.py's flags
    python tests/benchmark.py --scaling             time against pairs (2 … 32) and against weights (width 32 … 512)
    python tests/benchmark.py --update              the update alone, of the learned optimizer, of VeLO
                                                    (512 and 256) and of AdamW; up to 15 M weights

All rates are of one process, one after the other, so that what else the machine does disturbs their ratio little.
The useful arithmetic of an inner step is 3,200 FLOP per weight for the learned optimizer (16 per-weight inputs, 32,
32, 2) and 6 × weights × batch for the network's forward and backward pass.
"""

import argparse
import dataclasses
import functools
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import lopt
import meta_train
import tasks

TINY = dict(widths=(32,), image_size=8, batch_size=64)
SETTINGS = {"tiny": TINY, "mid": dict(widths=(128,), image_size=32, batch_size=128),
            "paper-s": dict(widths=(128,), image_size=32, batch_size=4096),
            "paper-m": dict(widths=(128, 512, 1024), image_size=32, batch_size=4096)}
LO_FLOP = 2 * (16 * 32 + 32 * 32 + 32 * 2)  # per weight


def tree_size(tree: lopt.Tree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def median_time(function, repeats: int) -> float:
    """The median wall time of a call in seconds, after one call that is not counted."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_rate() -> float:
    """FLOP/s of 2048×2048 float32 matrix products on one device that may use the whole machine."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    return 2 * 2048**3 / median_time(lambda: product(x), 7)


def noise(size: int, classes: int = 10) -> tasks.Dataset:
    """Images of noise: speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    split = tasks.Split(jnp.asarray(rng.integers(0, 256, (5000, size, size, 3)), jnp.uint8),
                        jnp.asarray(rng.integers(0, classes, 5000), jnp.int32))
    return tasks.Dataset("noise", classes, (0.5,) * 3, (0.3,) * 3, split, None)


def weights_of(task: tasks.Task) -> int:
    """How many weights a network has."""
    return tree_size(jax.eval_shape(task.init, jax.random.key(0)))


def peak_memory() -> float:
    """Largest memory so far, in bytes: of the GPU if there is one, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def meta_step_of(settings: meta_train.Settings, dataset: tasks.Dataset, mesh: Mesh) -> tuple:
    """(init, meta_step, inner tasks) of these settings, as in meta_train.py."""
    learned = meta_train.first_learned(settings)
    inner = [tasks.task_of(settings, dataset, width, settings.depth, learned.parametrization)
             for width in settings.widths]
    return *meta_train.make_meta_step(settings, inner, mesh, learned), inner


def meta_step_time(settings: meta_train.Settings, repeats: int) -> dict[str, float]:
    """Compiles and times the meta-step of one setting."""
    dataset = noise(settings.image_size or 8)
    mesh = meta_train.make_mesh(settings.pairs, None)
    init, meta_step, inner = meta_step_of(settings, dataset, mesh)
    state, splits = init(), [meta_train.replicate(dataset.train, mesh)] * len(inner)
    start = time.perf_counter()
    program = meta_step.lower(state, splits).compile()
    compiling = time.perf_counter() - start
    memory = program.memory_analysis()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = program(state, splits)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    weights = [weights_of(task) for task in inner]
    runs = 2 * settings.pairs * settings.truncation
    flop = sum(n * (LO_FLOP + 6 * settings.batch_size) for n in weights) * runs
    return dict(seconds=float(np.median(times[1:])), compiling=compiling, weights=sum(weights), flop=flop,
                inner_steps=runs * len(weights), updates=sum(weights) * runs,
                bytes_per_weight=(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
                / (sum(weights) * 2 * settings.pairs / mesh.devices.size))


def show_meta_step(name: str, settings: meta_train.Settings, repeats: int) -> None:
    """Prints one line of the table, with the matrix-product rate measured just before and after."""
    before = matmul_rate()
    result = meta_step_time(settings, repeats)
    rate = (before + matmul_rate()) / 2
    print(f"{name:>10} {result['weights']:>10,} {result['compiling']:>9.1f} {result['seconds']:>10.3f} "
          f"{result['inner_steps'] / result['seconds']:>12,.0f} {result['updates'] / result['seconds']:>11.3g} "
          f"{result['flop'] / result['seconds'] / 1e9:>8.1f} {rate / 1e9:>8.1f} "
          f"{result['flop'] / result['seconds'] / rate:>8.0%} {result['bytes_per_weight']:>10.0f} "
          f"{peak_memory() / 1e9:>8.2f}", flush=True)


def show_header() -> None:
    """Prints the head of the table of meta-steps."""
    print(f"{'setting':>10} {'weights':>10} {'compile s':>9} {'meta-step s':>10} {'inner steps/s':>12} "
          f"{'updates/s':>11} {'GFLOP/s':>8} {'matmul':>8} {'fraction':>8} {'B/w/run':>10} {'peak GB':>8}")


def show_scaling(base: meta_train.Settings, repeats: int) -> None:
    """Prints the time of a meta-step against pairs and weights, and the slopes of its log against theirs."""
    def fit(name: str, xs: list[float], variants: list[meta_train.Settings]) -> None:
        results = [meta_step_time(settings, repeats) for settings in variants]
        slope = np.polyfit(np.log(xs), np.log([result["seconds"] for result in results]), 1)[0]
        points = (f"{x:,.0f}: {result['seconds']:.3f} s, {result['bytes_per_weight']:.0f}"
                  for x, result in zip(xs, results))
        print(f"against {name} (time, bytes per weight and run): {', '.join(points)}; slope of the log-log fit of the "
              f"time {slope:.2f}", flush=True)

    counts = [2, 4, 8, 16, 32]
    fit("pairs", counts, [dataclasses.replace(base, pairs=n) for n in counts])
    widths, dataset = [32, 64, 128, 256, 512], noise(base.image_size or 8)
    fit("weights", [weights_of(tasks.mlp_task(dataset, w, base.depth, base.batch_size)) for w in widths],
        [dataclasses.replace(base, widths=(w,), truncation=10) for w in widths])


def show_update(repeats: int) -> None:
    """Prints the time of one update of the learned optimizer and of AdamW, and its memory beyond the state."""
    for width, size in ((32, 8), (128, 32), (2048, 32)):
        task = tasks.mlp_task(noise(size), width, 3, 64)
        params = task.init(jax.random.key(0))
        grads = jax.tree.map(lambda x: 0.01 * x, params)
        learned = lopt.Learned(lopt.init_theta(jax.random.key(1)), step_mult=0.01)
        velo = lopt.Learned(lopt.init_velo_theta(jax.random.key(1)), step_mult=0.001, architecture="velo")
        for name, optimizer in (("learned", tasks.optimizer_for(task, learned)),
                                ("VeLO", tasks.optimizer_for(task, velo, 1000)), ("AdamW", lopt.adamw(1e-3))):
            state = optimizer.init(params)
            update = functools.partial(optimizer.update, value=jnp.float32(1.0))
            program = jax.jit(update, donate_argnums=1).lower(grads, state, params).compile()
            memory = program.memory_analysis()
            times = []
            for _ in range(repeats + 1):  # the first is not counted
                start = time.perf_counter()
                updates, state = jax.block_until_ready(program(grads, state, params))
                times.append(time.perf_counter() - start)
            seconds = float(np.median(times[1:]))
            print(f"{name:>8} update of {tree_size(params):>12,} weights: {seconds * 1e3:9.3f} ms, "
                  f"{seconds / tree_size(params) * 1e9:6.1f} ns per weight, "
                  f"state {sum(x.nbytes for x in jax.tree.leaves(state)) / tree_size(params):4.1f} bytes per weight, "
                  f"{(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9:.3f} "
                  "GB beyond state, weights and gradients", flush=True)


def show_evaluation(base: meta_train.Settings) -> None:
    """Prints the steps per second of inner training with a θ, as in evaluate.py."""
    task = tasks.mlp_task(noise(base.image_size or 8), base.widths[0], base.depth, base.batch_size)
    data = noise(base.image_size or 8).train
    make_optimizer = functools.partial(tasks.optimizer_for, task,
                                       lopt.Learned(lopt.init_theta(jax.random.key(0)), step_mult=0.01))
    program = jax.jit(lambda key, split: tasks.train(task, make_optimizer, split, key, 200)[1])
    seconds = median_time(lambda: program(jax.random.key(0), data), 3)
    print(f"evaluation: {200 / seconds:,.0f} inner steps per second of one network of width {base.widths[0]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS))
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args, rest = parser.parse_known_args()
    given = tasks.given_flags(meta_train.make_parser().parse_args(rest), meta_train.Settings)
    base = dataclasses.replace(meta_train.Settings(**TINY), **given)
    tasks.set_up_devices(base.pairs if not args.scaling else 2, None)
    tasks.set_up_precision(base.matmul_precision)
    print(f"{len(jax.devices())} × {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if args.scaling:
        show_scaling(base, args.repeats)
    elif args.update:
        show_update(args.repeats)
    else:
        show_header()
        if given and not args.settings:
            show_meta_step("given", base, args.repeats)
        for name in args.settings or ([] if given else ["tiny", "mid"]):
            show_meta_step(name, dataclasses.replace(meta_train.Settings(), **SETTINGS[name]), args.repeats)
        show_evaluation(base)


if __name__ == "__main__":
    main()
