"""Speed, run by hand: meta-steps, single updates and evaluation, beside the machine's matmul rate.

    python tests/benchmark.py                       tiny and mid
    python tests/benchmark.py --settings paper-s    some of tiny, mid, paper-s, paper-m
    python tests/benchmark.py --depth 6             other flags go to meta_train.py
    python tests/benchmark.py --update              one update of a μLO, of VeLO and of AdamW
"""

import argparse
import functools
import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lopt
import meta_train
import tasks

SETTINGS = {"tiny": "--pairs 8 --image-size 8",
            "mid": "--pairs 8 --widths 128 --image-size 32 --batch-size 128",
            "paper-s": "--pairs 8 --widths 128 --image-size 32 --batch-size 4096",
            "paper-m": "--pairs 8 --widths 128 512 1024 --image-size 32 --batch-size 4096"}


def median_time(step, state, repeats):
    """The median seconds of state = step(state), after one step that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def matmul_rate():
    return 2 * 2048**3 / median_time(jax.jit(lambda x: x @ x), jnp.full((2048, 2048), 2**-11), 7)


def noise(size):
    rng = np.random.default_rng(0)
    split = tasks.Split(jnp.asarray(rng.integers(0, 256, (5000, size, size, 3)), jnp.uint8),
                        jnp.asarray(rng.integers(0, 10, 5000), jnp.int32))
    return tasks.Dataset("noise", 10, (0.5,) * 3, (0.3,) * 3, split, split)


def show_meta_step(name, args, learned, repeats):
    """Compile and time a meta-step. The matmul rate is measured before and after it."""
    dataset, mesh, before = noise(args.image_size), meta_train.make_mesh(args), matmul_rate()
    inner = [tasks.task_of(args, dataset, width, args.depth, learned.parametrization)
             for width in args.widths]
    init, meta_step = meta_train.make_meta_step(args, inner, mesh, learned)
    splits = [jax.device_put(dataset.train, NamedSharding(mesh, PartitionSpec()))] * len(inner)
    state, start = init(), time.perf_counter()
    program = meta_step.lower(state, splits).compile()
    compiling, memory = time.perf_counter() - start, program.memory_analysis()
    seconds = median_time(lambda state: program(state, splits)[0], state, repeats)
    rate = (before + matmul_rate()) / 2
    params = [jax.eval_shape(task.init, jax.random.key(0)) for task in inner]
    weights = sum(x.size for x in jax.tree.leaves(params))
    runs, steps = 2 * args.pairs, 2 * args.pairs * args.truncation / seconds
    # per weight: the learned optimizer's MLP (16 inputs are a weight's own), then the network
    flop = weights * steps * (2 * (16 * 32 + 32 * 32 + 32 * 2) + 6 * args.batch_size)
    bytes_of_run = ((memory.argument_size_in_bytes + memory.temp_size_in_bytes)
                    * mesh.devices.size / (weights * runs))
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", host)
    print(f"{name:>10} {weights:>10,} {compiling:>9.1f} {seconds:>10.3f} "
          f"{steps * len(inner):>12,.0f} {weights * steps:>11.3g} {flop / 1e9:>8.1f} "
          f"{rate / 1e9:>8.1f} {flop / rate:>8.0%} {bytes_of_run:>10.0f} {peak / 1e9:>8.2f}",
          flush=True)


def show_update(name, optimizer, params, repeats):
    """Time one update, and show the bytes of its state and of its temporary arrays."""
    grads, state = jax.tree.map(lambda x: 0.01 * x, params), optimizer.init(params)
    n, of_state = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, state))
    update = functools.partial(optimizer.update, value=jnp.float32(1.0))
    program = jax.jit(update, donate_argnums=1).lower(grads, state, params).compile()
    seconds = median_time(lambda state: program(grads, state, params)[1], state, repeats)
    memory, n = program.memory_analysis(), n // 4
    beyond = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{name:>8} update of {n:>12,} weights: {seconds * 1e3:9.3f} ms, "
          f"{seconds / n * 1e9:6.1f} ns per weight, state {of_state / n:4.1f} bytes per weight, "
          f"{beyond / 1e9:.3f} GB beyond state, weights and gradients", flush=True)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=["tiny", "mid"])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options, flags = parser.parse_known_args()
    args = {name: meta_train.parse(SETTINGS[name].split() + flags)[0] for name in SETTINGS}
    tasks.set_up(args["tiny"], args["tiny"].pairs)
    print(f"{len(jax.devices())} × {jax.devices()[0].device_kind}, jax {jax.__version__}")
    mulo = lopt.Learned(lopt.init_theta(jax.random.key(1)), 0.01)
    if options.update:
        velo = lopt.Learned({name: 0.1 * jnp.ones(shape) for name, shape in
                             lopt.velo_shapes(512, 256).items()}, 0.001, architecture="velo")
        for width, size in ((32, 8), (128, 32), (2048, 32)):
            task = tasks.mlp_task(noise(size), width, 3, 64)
            for name, optimizer in (("learned", tasks.optimizer_for(task, mulo)),
                                    ("VeLO", tasks.optimizer_for(task, velo, 1000)),
                                    ("AdamW", lopt.adamw(1e-3))):
                show_update(name, optimizer, task.init(jax.random.key(0)), options.repeats)
        return
    print("   setting    weights compile s meta-step s inner steps/s   updates/s  GFLOP/s   matmul "
          "fraction    B/w/run  peak GB")
    for name in options.settings:
        show_meta_step(name, args[name], mulo, options.repeats)
    task, data = tasks.mlp_task(noise(8), 32, 3, 64), noise(8).train
    make_optimizer = functools.partial(tasks.optimizer_for, task, mulo)
    program = jax.jit(lambda key, data: tasks.train(task, make_optimizer, data, key, 200)[1])
    seconds = median_time(lambda _: program(jax.random.key(0), data), None, 3)
    print(f"evaluation: {200 / seconds:,.0f} inner steps per second of one network of width 32")


if __name__ == "__main__":
    main()
