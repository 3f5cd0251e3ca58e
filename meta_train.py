"""Meta-training: the outer loop that trains θ, the learned optimizer's weights.

    python meta_train.py                          a μLO on small MLPs, in minutes on two cores
    python meta_train.py --parametrization sp     the same in standard parametrization (SP)
    python meta_train.py --preset paper-m         the paper's μLO_M, on ImageNet 32×32
    python meta_train.py --out runs/a --resume    resume the run in runs/a

A meta-step perturbs θ for N antithetic pairs of inner runs on each task, unrolls them K steps,
estimates the meta-gradient by Persistent Evolution Strategies (PES, es.py), and takes a step of
AdamW on θ.

OUT/ holds theta.npz, metrics.csv and the last two checkpoints. An interrupted run resumes to the
same bits, also on another number of processes. On a GPU set XLA_FLAGS=--xla_gpu_autotune_level=0
for this: XLA chooses kernels by timing them.

Sources: μLO (arXiv 2406.00153) for the settings, PES (arXiv 2112.13835).

Dimensions: N pairs of one task, K inner steps of a truncation, P numbers of θ.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import es
import lopt
import mup
import tasks
from lopt import Array, InputError, reading
from tasks import COUNT, COUNT_OR_0, SCALE, SHARE

PAPER = dict(dataset="imagenet32", batch_size=4096, pairs=8, min_length=100, max_offset=50,
             meta_steps=5000, output_mult=1.0, hidden_lr_mult=1.0, step_mult=0.01)
PRESETS = {"laptop": {}, "paper-s": PAPER | {"widths": [128]},
           "paper-m": PAPER | {"widths": [128, 512, 1024]}}


class MetaState(NamedTuple):
    """theta: θ as a vector [P]. pairs: for each task an `es.Pair` with leaves [N, …]."""
    theta: Array
    adam: lopt.AdamState
    pairs: tuple[es.Pair, ...]
    meta_step: Array


class Metrics(NamedTuple):
    """Scalars of one meta-step. nonfinite: how many entries of the meta-gradient counted as 0."""
    meta_loss: Array
    grad_norm: Array
    update_norm: Array
    learning_rate: Array
    nonfinite: Array


def with_theta(learned: lopt.Learned, vector: Array) -> lopt.Learned:
    """The learned optimizer with another θ, given as a vector [P]."""
    _, unravel = ravel_pytree(learned.theta)
    return learned._replace(theta=unravel(vector))


def make_meta_step(args: argparse.Namespace, inner_tasks: Sequence[tasks.Task], mesh: Mesh,
                   learned: lopt.Learned) -> tuple[Callable, Callable]:
    """(init() → MetaState, meta_step(state, splits) → (MetaState, Metrics)), jitted over a mesh.

    learned: what meta-training begins with. splits: the training data of each task.
    """
    pes = es.PES(*(getattr(args, name) for name in es.PES._fields))
    warmup = min(args.warmup_steps, args.meta_steps)
    decay_steps = max(args.meta_steps * 98 // 100, warmup + 1)  # 4,900 of the paper's 5,000
    schedule = lopt.warmup_cosine(3e-10, args.learning_rate, args.final_learning_rate, warmup,
                                  decay_steps)
    adamw = lopt.adamw(schedule, weight_decay=args.weight_decay)
    _, pairs_key = jax.random.split(jax.random.key(args.seed))
    keys = [es.pair_keys(jax.random.fold_in(pairs_key, i), jnp.arange(args.pairs))
            for i in range(len(inner_tasks))]  # of the N pairs of each task

    def inner(task):  # a task with the learned optimizer whose θ is perturbed
        return es.Inner(task, lambda theta, num_steps: tasks.optimizer_for(
            task, with_theta(learned, theta), num_steps))

    def init():
        theta, _ = ravel_pytree(learned.theta)

        def first_runs(task, keys):
            def begin(key, _, theta):
                return (), es.new_pair(inner(task), pes, key, theta)

            return es.over_pairs(begin, mesh)(keys, None, theta)[1]

        pairs = tuple(map(first_runs, inner_tasks, keys))
        return MetaState(theta, adamw.init(theta), pairs, jnp.zeros((), jnp.int32))

    def meta_step(state, splits):
        # PES on each task: perturb its N pairs, unroll them K steps, average their estimates
        def truncation(task, split, keys, pairs):
            of_pair = partial(es.unroll_pair, inner(task), pes)
            return es.over_pairs(of_pair, mesh)(keys, pairs, state.theta, split, state.meta_step)

        estimates, pairs = zip(*map(truncation, inner_tasks, splits, keys, state.pairs))

        # The meta-gradient: the mean over the tasks, with 0 for what is not finite
        gradient, meta_loss = (sum(of_tasks) / len(inner_tasks) for of_tasks in zip(*estimates))
        finite = jnp.isfinite(gradient)
        gradient = jnp.where(finite, gradient, 0.0)

        # The meta-optimizer: AdamW, whose update is clipped
        updates, adam = adamw.update(gradient, state.adam, state.theta)
        updates = lopt.clip_by_global_norm(updates, 1.0)

        # If no entry is finite, θ and Adam's state stay
        updates, adam = jax.tree.map(partial(jnp.where, jnp.any(finite)),
                                     (updates, adam), (jnp.zeros_like(updates), state.adam))
        metrics = Metrics(meta_loss, lopt.global_norm(gradient), lopt.global_norm(updates),
                          schedule(state.adam.step), jnp.sum(~finite))
        return MetaState(state.theta + updates, adam, pairs, state.meta_step + 1), metrics

    copies = NamedSharding(mesh, PartitionSpec())
    by_pair = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    layout = MetaState(theta=copies, adam=copies, pairs=by_pair, meta_step=copies)
    return (jax.jit(init, out_shardings=layout),
            jax.jit(meta_step, in_shardings=(layout, copies), out_shardings=(layout, copies),
                    donate_argnums=0))


def meta_train(args: argparse.Namespace, inner_tasks: Sequence[tasks.Task],
               splits: Sequence[tasks.Split], mesh: Mesh, learned: lopt.Learned,
               run: "Run") -> lopt.Learned:
    """Meta-train on tasks, each with its split, from where the run stands to its end."""
    init, meta_step = make_meta_step(args, inner_tasks, mesh, learned)
    state = run.restore(init())
    while run.goes_on(args.meta_steps):
        state, metrics = meta_step(state, splits)
        run.record(metrics)
        if len(run.rows) % args.checkpoint_every == 0 and len(run.rows) < args.meta_steps:
            run.save(state, learned)
    run.save(state, learned)
    return with_theta(learned, jax.device_get(state.theta))


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~


def make_parser() -> tasks.CommandLine:
    """The command line."""
    parser = tasks.CommandLine("meta_train.py", __doc__)
    flag = parser.flag
    flag("--preset", tuple(PRESETS), "laptop", "paper-s, -m: the paper's μLO_S, μLO_M")
    tasks.add_task_flags(parser)
    flag("--parametrization", ("mup", "sp"), "mup", "μP or SP, which has no multipliers")
    flag("--input-mult", SCALE, 1.0, "μP's multiplier of input weights")
    flag("--output-mult", SCALE, 16.0, "μP's multiplier of logits; in the paper 1")
    flag("--hidden-lr-mult", SCALE, 16.0, "μP's multiplier of hidden updates; in the paper 1")
    flag("--pairs", COUNT, 4, "antithetic pairs for each width; in the paper 8")
    flag("--truncation", COUNT, 50, "inner steps of a meta-step")
    flag("--sigma", SCALE, 0.01, "standard deviation of the perturbations")
    flag("--min-length", COUNT, 1000, "shortest inner run, steps; in the paper 100")
    flag("--max-length", COUNT, 1000, "longest inner run")
    flag("--max-offset", COUNT, 1000, "first runs begin below this step; in the paper 50")
    flag("--hidden", COUNT, [32, 32], "units of the hidden layers of the MLP with weights θ")
    flag("--step-mult", SCALE, 0.003, "scale of all updates; in the paper 0.01; SP: 0.001")
    flag("--exp-mult", SCALE, 0.001, "scale of the log-magnitudes")
    flag("--first-theta", str, None, "begin with the θ of this file", metavar="FILE")
    flag("--meta-steps", COUNT, 2000, "meta-steps of the run")
    flag("--learning-rate", SCALE, 3e-3, "of AdamW, after the warm-up")
    flag("--final-learning-rate", SCALE, 1e-3, "at the end of the cosine")
    flag("--warmup-steps", COUNT_OR_0, 100, "of the warm-up, in meta-steps")
    flag("--weight-decay", SHARE, 1e-4, "weight decay of θ")
    flag("--base-width", COUNT_OR_0, 0, "ours: gradients × width/base width; 0: off")
    flag("--decay", SHARE, 0.0, "ours: inner weight decay per update")
    flag("--horizon", COUNT_OR_0, 0, "ours: scale a run's time to so many steps; 0: off")
    flag("--start", ("random", "adam"), "random", "ours: adam: a θ that acts as Adam")
    flag("--out", str, None, "folder of the run (default: a new one in runs/)", metavar="DIR")
    flag("--resume", bool, False, "resume from the newest checkpoint in --out, if any")
    flag("--checkpoint-every", COUNT, 100, "meta-steps per checkpoint")
    flag("--report-steps", COUNT_OR_0, 1000, "inner steps of the report; 0: none")
    flag("--distributed", str, None, "address of process 0, number of processes, index of this "
         "one; none: JAX finds them", nargs="*", metavar="HOST:PORT")
    return parser


OF_THE_RUN = ("out", "resume", "checkpoint_every", "report_steps", "distributed", "preset",
              "download")  # all other flags are settings, which decide the result


def parse(argv: Sequence[str] | None,
          saved: dict[str, Any] | None = None) -> tuple[argparse.Namespace, lopt.Learned | None]:
    """(the flags, the learned optimizer of --first-theta). Defaults: those of the preset and of
    --first-theta, or the saved settings of a run to resume. Raises `InputError`."""
    parser, first = make_parser(), None
    args = parser.parse_args(argv)
    sp = {"step_mult": 0.001} if args.parametrization == "sp" else {}
    parser.set_defaults(**PRESETS[args.preset] | sp)
    if saved is not None:
        parser.set_defaults(**saved)
    elif args.first_theta:
        first = lopt.load(args.first_theta)
        p = first.parametrization._asdict()
        parser.set_defaults(parametrization=p.pop("name"), **p, step_mult=first.step_mult,
                            exp_mult=first.exp_mult, decay=first.decay, horizon=first.horizon)
    args = parser.parse_args(argv)

    def need(good, name, why):
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: {why}")

    for name, x in (saved or {}).items():
        same = getattr(args, name) == x or name in ("meta_steps", "data_dir")
        need(same, name, f"was {x} in the run to resume")
    need(args.truncation <= args.min_length, "truncation", "exceeds --min-length")
    need(args.min_length <= args.max_length, "min_length", "exceeds --max-length")
    need(args.max_offset <= args.min_length, "max_offset", "exceeds --min-length")
    need(args.start == "random" or min(args.hidden) > 1, "start", "needs two --hidden units")
    return args, first


def adam_start(theta: dict[str, Array]) -> dict[str, Array]:
    """Ours: in each layer units 0 and 1 pass ± feature 6, m₁ rsqrt(v+1e-6), to the output d."""
    first, *middle, last = (name for name in theta if name.startswith("w"))
    ends = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    changed = {first: theta[first].at[:, :2].set(0.0).at[6, :2].set(ends[:, 0]),
               last: (0.1 * theta[last]).at[:2].set(ends)}
    for name in middle:
        changed[name] = theta[name].at[:, :2].set(0.0).at[:2].set(0.0).at[:2, :2].set(jnp.eye(2))
    return theta | changed


# -------- The run: its folder, checkpoints, signals and progress

STOP_SIGNALS = [getattr(signal, name) for name in (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


def newest_checkpoint(path: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint in a folder, if any."""
    files = sorted(path.glob("checkpoint-*.npz"), reverse=True)
    for file in files:
        try:
            arrays = lopt.read_npz(file)
            with reading(file):
                return arrays | {"about": json.loads(arrays["about"].tobytes())}
        except InputError as error:
            print(f"warning: {error}; trying an older one", file=sys.stderr)
    if files:
        raise InputError(f"--out {path}: no checkpoint can be read; begin in another folder")
    return None


class Run:
    """The folder of a run, where process 0 writes. stopped: the signal that stops it, or 0."""

    def __init__(self, path: Path, about: dict[str, Any], checkpoint: dict[str, Any] | None):
        self.path, self.about, self.checkpoint, self.stopped = path, about, checkpoint, 0
        self.rows = [] if checkpoint is None else checkpoint["rows"].tolist()
        self.writes = jax.process_index() == 0
        if self.writes:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = lopt.lock(path / ".lock")

    def stop(self, number: int) -> None:
        """Stop after the present meta-step; stop at once on a second signal."""
        if self.stopped:
            tasks.leave(128 + number, "\nmeta_train.py: interrupted")
        self.stopped = number
        print("\nstopping after this meta-step; press Ctrl-C again to stop at once",
              file=sys.stderr, flush=True)

    def restore(self, state: MetaState) -> MetaState:
        """The state to begin with, or the state of the checkpoint."""
        if self.checkpoint is not None:
            leaves, treedef = jax.tree.flatten(state)
            saved = [self.checkpoint.get(f"leaf{i}") for i in range(len(leaves))]
            if [np.shape(x) for x in saved] != [x.shape for x in leaves]:
                raise InputError(f"--out {self.path}: its checkpoint does not fit this code")
            state = treedef.unflatten([
                jax.make_array_from_callback(x.shape, like.sharding, x.__getitem__)
                for x, like in zip(saved, leaves)])
        if self.writes:
            lines = [",".join(("meta_step", *Metrics._fields, "seconds")) + "\n"]
            lines += [self.csv_line(i) for i in range(len(self.rows))]
            lopt.write_atomically(self.path / "metrics.csv",
                                  lambda file: file.write("".join(lines).encode()))
        total = self.about["made"]["settings"]["meta_steps"]
        self.bar = tqdm.tqdm(total=total, initial=len(self.rows), disable=None)
        self.at = time.monotonic()
        return state

    def csv_line(self, i: int) -> str:
        """Line i of metrics.csv."""
        *metrics, seconds = self.rows[i]
        return f"{i + 1},{','.join(f'{x:.9g}' for x in metrics)},{seconds:.4f}\n"

    def goes_on(self, meta_steps: int) -> bool:
        """Whether another meta-step is due."""
        if jax.process_count() > 1:
            everyone = multihost_utils.process_allgather(np.int32(self.stopped))
            self.stopped = int(np.max(everyone))
        return not self.stopped and len(self.rows) < meta_steps

    def record(self, metrics: Metrics) -> None:
        """Wait for a meta-step, and write its row."""
        values, before = [float(x) for x in jax.device_get(metrics)], self.at
        self.at = time.monotonic()
        self.rows.append([*values, self.at - before])
        if self.writes:
            with open(self.path / "metrics.csv", "a") as file:
                file.write(self.csv_line(len(self.rows) - 1))
        self.bar.set_postfix(meta_loss=f"{values[0]:.4f}", refresh=False)
        self.bar.update()

    def save(self, state: MetaState, learned: lopt.Learned) -> None:
        """Write a checkpoint and theta.npz, and keep the last two checkpoints."""
        if jax.process_count() > 1:
            state = multihost_utils.process_allgather(state, tiled=True)
        if not self.writes:
            return
        arrays = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        arrays |= {"rows": np.asarray(self.rows),
                   "about": np.frombuffer(json.dumps(self.about).encode(), np.uint8)}
        made = learned.made | {"meta_steps_made": len(self.rows)}
        lopt.save(self.path / "theta.npz", with_theta(learned, state.theta)._replace(made=made))
        lopt.write_atomically(self.path / f"checkpoint-{len(self.rows):08d}.npz",
                              lambda file: np.savez(file, **arrays))
        for old in sorted(self.path.glob("checkpoint-*.npz"))[:-2]:
            old.unlink()
        if self.bar.disable and self.rows:
            print(f"meta-step {len(self.rows)}: meta-loss {self.rows[-1][0]:.4f}", file=sys.stderr)


def make_mesh(args: argparse.Namespace) -> Mesh:
    """The devices of all processes on one axis; their number must divide the pairs."""
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[:max(n for n in range(1, len(devices) + 1) if args.pairs % n == 0)]
    if args.pairs % len(devices):
        raise InputError(f"--pairs {args.pairs}: cannot be divided over {len(devices)} devices")
    return Mesh(np.array(devices), ("pairs",))


RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of AdamW


def compare_with_adamw(args: argparse.Namespace, dataset: tasks.Dataset,
                       learned: lopt.Learned) -> dict[int, tuple[float, dict[float, float]]]:
    """{width: (loss of θ, {learning rate: loss of AdamW in SP})}, at the first width of
    meta-training and 16 times as wide. All runs share their batches."""
    def losses_at(width):
        task, plain = (tasks.task_of(args, dataset, width, args.depth, p)
                       for p in (learned.parametrization, mup.SP))

        def with_learned(split):
            optimizer = partial(tasks.optimizer_for, task, learned)
            return tasks.train(task, optimizer, split, key, args.report_steps)[1]

        def with_adamw(rate, split):
            return tasks.train(plain, lambda _: lopt.adamw(rate), split, key, args.report_steps)[1]

        mine = jax.jit(with_learned)(dataset.train)
        adamw = jax.jit(jax.vmap(with_adamw, (0, None)))(jnp.asarray(RATES), dataset.train)
        loss, *others = (float(tasks.final_loss(np.asarray(x))) for x in (mine, *adamw))
        return loss, dict(zip(RATES, others))

    key = jax.random.key(args.seed + 1)
    return {width: losses_at(width) for width in (args.widths[0], 16 * args.widths[0])}


def report(losses: dict[int, tuple[float, dict[float, float]]], args: argparse.Namespace) -> str:
    """The comparison as a table."""
    def best(adamw):
        return min(RATES, key=lambda rate: np.nan_to_num(adamw[rate], nan=np.inf))

    narrow = best(losses[args.widths[0]][1])
    lines = [f"training loss after {args.report_steps} steps on {args.dataset}, batches of "
             f"{args.batch_size}; in brackets AdamW's learning rate", f"{'width':>8}{'θ':>9}"
             f"{f'AdamW tuned at {args.widths[0]}':>23}{'tuned at this width':>23}{'at 0.001':>11}"]
    for width, (mine, adamw) in losses.items():
        cells = [f"{adamw[rate]:.4f} ({rate:g})" for rate in (narrow, best(adamw))]
        lines.append(f"{width:8}{mine:9.4f}{cells[0]:>23}{cells[1]:>23}{adamw[1e-3]:11.4f}")
    return "\n".join(lines)


def carry_out(argv: Sequence[str] | None, args: argparse.Namespace) -> int:
    """Load the data, meta-train, report. Returns the exit code."""
    checkpoint = newest_checkpoint(Path(args.out)) if args.resume else None
    before = checkpoint and checkpoint["about"]
    args, first = parse(argv, before and before["made"]["settings"])
    tasks.set_up(args, args.pairs)
    mesh, dataset = make_mesh(args), tasks.load_data(args)
    settings = {name: x for name, x in vars(args).items() if name not in OF_THE_RUN}
    made = {"settings": settings, "data": tasks.fingerprint(dataset)}
    architecture = "small_fc_lopt"
    if before:
        if before["made"]["data"] != made["data"]:
            raise InputError(f"--dataset {args.dataset}: not the data of the run to resume")
        theta = {name: jnp.zeros(shape) for name, shape in before["theta"].items()}
        made, architecture = before["made"] | made, before["architecture"]
    elif first:
        theta, architecture, made["origin"] = first.theta, first.architecture, first.made
    else:
        theta = lopt.init_theta(jax.random.split(jax.random.key(args.seed))[0], tuple(args.hidden))
        theta = adam_start(theta) if args.start == "adam" else theta
    p = mup.SP if args.parametrization == "sp" else mup.Parametrization(
        "mup", args.input_mult, args.output_mult, args.hidden_lr_mult, args.base_width)
    learned = lopt.Learned(theta, args.step_mult, args.exp_mult, p, architecture, made, args.decay,
                           args.horizon)
    about = {"made": made, "theta": {name: x.shape for name, x in theta.items()},
             "architecture": architecture}
    inner_tasks = [tasks.task_of(args, dataset, width, args.depth, p) for width in args.widths]
    splits = [jax.tree.map(lambda x: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, PartitionSpec()), np.asarray(x).__getitem__), dataset.train)]
    run = Run(Path(args.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"),
              about, checkpoint)
    if run.writes:
        print(f"meta-training in {args.parametrization} on {args.dataset}, widths {args.widths}, "
              f"{mesh.size} device(s), {len(run.rows)} meta-steps made, in {run.path}", flush=True)
    with tasks.on_signals(STOP_SIGNALS, run.stop):
        learned = meta_train(args, inner_tasks, splits * len(inner_tasks), mesh, learned, run)
    if run.stopped:
        print(f"stopped; to resume, add --out {run.path} --resume", file=sys.stderr)
        return 128 + run.stopped
    if run.writes:
        print(f"wrote {run.path / 'theta.npz'}")
        if args.report_steps:
            print(report(compare_with_adamw(args, dataset, learned), args), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it. Raises `InputError` for bad input."""
    args = make_parser().parse_args(argv)
    if not args.out and (args.resume or args.distributed is not None):
        raise InputError("--resume and --distributed need --out, the folder of the run")
    if args.distributed is None:
        if args.out and not args.resume and Path(args.out, "metrics.csv").exists():
            raise InputError(f"--out {args.out}: holds a run; add --resume or choose another")
        return carry_out(argv, args)
    if len(args.distributed) not in (0, 3):
        raise InputError("--distributed: takes HOST:PORT, the number of processes and this one's")
    try:
        host, number, index = args.distributed or (None, None, None)
        jax.distributed.initialize(host, number and int(number), index and int(index))
        code = carry_out(argv, args)
        jax.distributed.shutdown()
        return code
    except Exception as error:  # an orderly end would wait for processes that are dead
        known = isinstance(error, (InputError, OSError, jax.errors.JaxRuntimeError))
        why = " ".join(str(error).split()) if known or "Gloo" in str(error) else (
            traceback.format_exc())
        tasks.leave(2, "meta_train.py: error: this process or another has failed; start all again "
                       f"with --resume ({why})")


if __name__ == "__main__":
    sys.exit(tasks.command(main, "meta_train.py"))
