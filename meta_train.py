"""Meta-training: the outer loop that trains θ, the learned optimizer's weights.

    python meta_train.py                                a μLO on small MLPs, in minutes on two cores
    python meta_train.py --parametrization sp           the same in standard parametrization (SP)
    python meta_train.py --preset paper-m --data-dir D  the paper's μLO_M, on ImageNet 32×32 in D/
    python meta_train.py --out runs/a --resume          goes on where runs/a was interrupted
    python meta_train.py --first-theta runs/a/theta.npz     begins a new run with the θ of another
    python meta_train.py --also "--task lm --dataset text --data-dir F"     on a text in F, as well

One meta-step perturbs θ for N antithetic pairs of inner runs on every task, moves all of them K
inner steps on, estimates the meta-gradient from their losses by Persistent Evolution Strategies
(PES, es.py), and takes a step of AdamW on θ (lopt.py). It is one jitted function. The pairs are
sharded over the local devices, and over all hosts with --distributed; a CPU is as many devices as
divide the pairs, one for each of its cores at most.

OUT/ holds theta.npz (θ, written with each checkpoint but that of step 0), metrics.csv (a row for
each meta-step), meta-loss.png (where matplotlib is there) and the last two checkpoints, from which
a run that was interrupted goes on exactly: by --resume, or by --resume-or-begin in a script that is
run again and again. What is random depends on the seed, the pair and the time alone. On a GPU, XLA chooses kernels
by timing them as it compiles, so that another process may round otherwise: where a resumed run must
be the same to the last bit, set XLA_FLAGS=--xla_gpu_autotune_level=0 for all its processes.

Sources: μLO (arXiv 2406.00153) for the settings, PES (arXiv 2112.13835). The paper's μLO_S is
meta-trained on inner networks of one width (--preset paper-s), its μLO_M on three (paper-m).

Dimensions: N pairs of one task, K inner steps of a truncation, P numbers of θ.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from lopt import Array, Tree
from tasks import setting

# --------------------------------------------------------------------------------------------------
# Settings

SQUARABLE = dict(above=1e-18, below=1e18)  # bounds of a number whose square float32 must hold
of_task = functools.partial(setting, group="inner task")
of_pes = functools.partial(setting, group="PES")
of_lopt = functools.partial(setting, group="learned optimizer")
of_meta = functools.partial(setting, group="meta-optimizer")


@dataclasses.dataclass(frozen=True)
class Settings(tasks.TaskSettings):
    """Everything that decides the result of a run, said once, here: the flags are made of it."""
    also: tuple[str, ...] = of_task(
        (), "a further inner task: its flags of this group in one argument, as in '--task lm "
        "--dataset text --data-dir shakespeare.txt', with spaces, no =; those left out have their "
        "defaults; may be given several times", metavar="FLAGS")
    parametrization: str = setting("mup", "that of the inner networks", choices=("mup", "sp"))
    input_mult: float = setting(1.0, "μP's multiplier of the first layer", metavar="c",
                                **SQUARABLE)
    output_mult: float = setting(1.0, "μP's multiplier of the logits", metavar="c", **SQUARABLE)
    hidden_lr_mult: float = setting(1.0, "μP's multiplier of the updates of hidden weights",
                                    metavar="c", **SQUARABLE)
    base_width: int = setting(
        0, "multiply gradients by width/W before the learned optimizer sees them, so that its ε "
        "weigh the same at all widths; 0 leaves them as they are, as in the paper", low=0,
        metavar="W")

    pairs: int = of_pes(8, "antithetic pairs of inner runs for each width", low=1, metavar="N")
    truncation: int = of_pes(50, "inner steps of a meta-step", low=2, metavar="K")
    sigma: float = of_pes(0.01, "standard deviation σ of the perturbations", metavar="σ",
                          **SQUARABLE)
    min_length: int = of_pes(100, "shortest inner run, in steps", low=1, metavar="T")
    max_length: int = of_pes(1000, "longest inner run, in steps", low=1, below=2**30, metavar="T")
    max_offset: int | None = of_pes(
        None, "the first runs are shorter, at random, by less than this (K if not given); give "
        "the length where all runs have the same", low=1, metavar="T")

    optimizer: str = of_lopt("small_fc_lopt", "its architecture: the paper's small MLP, or VeLO's "
                             "LSTM and bank of MLPs", choices=("small_fc_lopt", "velo"))
    hidden: int = of_lopt(32, "units of each hidden layer of the small MLP; a --first-theta brings "
                          "its own, as it does --lstm-hidden and --bank", low=1, high=2048,
                          metavar="H")
    lstm_hidden: int = of_lopt(64, "units of VeLO's LSTM (512 in the published one)", low=1,
                               high=1024, metavar="L")
    bank: int = of_lopt(16, "MLPs in VeLO's bank (256 in the published one)", low=1, high=4096,
                        metavar="K")
    step_mult: float | None = of_lopt(
        None, "scale of all updates (if neither it nor a preset says, 0.01 in μP and 0.001 in SP "
        "and for VeLO)", metavar="c", **SQUARABLE)
    exp_mult: float = of_lopt(0.001, "scale of the log-magnitudes", low=0, below=1e18, metavar="c")
    decay: float = of_lopt(0.0, "share of the weights that each update also takes away, at any "
                           "width; the paper has none", low=0, below=1, metavar="λ")
    horizon: int = of_lopt(0, "where not 0, the small MLP trains as if each run had this many "
                           "steps: in a run of L, time is multiplied by T/L, updates, decay included, "
                           "by √(T/L)", low=0, below=2**30, metavar="T")
    start: str = of_lopt("random", "the θ that meta-training begins with, without --first-theta: "
                         "random as in the paper, or adam, which is Adam beside a small random "
                         "rest (ours)", choices=("random", "adam"))
    first_theta: str | None = of_lopt(None, "begin with the θ of this file (a random one if not "
                                      "given)", metavar="FILE")

    meta_steps: int = of_meta(800, "meta-steps of the whole run", low=1, metavar="M")
    learning_rate: float = of_meta(3e-3, "learning rate after the warm-up", metavar="η",
                                   **SQUARABLE)
    final_learning_rate: float = of_meta(1e-3, "learning rate at the end of the cosine",
                                         metavar="η", **SQUARABLE)
    warmup_steps: int = of_meta(100, "meta-steps of the warm-up", low=0, metavar="M")
    weight_decay: float = of_meta(1e-4, "decoupled weight decay of θ", low=0, below=1e18,
                                  metavar="λ")


PAPER = dict(dataset="imagenet32", batch_size=4096, meta_steps=5000)
# The multipliers of the laptop's preset make μP at width 16 the same as SP, but for what is 0 or
# random at first. With the paper's 1 the updates of hidden weights are small beside those of the
# others: a loss 0.03 higher at width 32. A θ that begins as Adam needs a lower learning rate.
PRESETS = {"laptop": dict(output_mult=16.0, hidden_lr_mult=16.0, base_width=32, step_mult=0.003,
                          start="adam", learning_rate=1e-3, final_learning_rate=1e-4),
           "paper-s": PAPER | {"widths": (128,)}, "paper-m": PAPER | {"widths": (128, 512, 1024)}}
STEP_MULT = {"mup": 0.01, "sp": 0.001}  # larger in μP, which divides hidden updates by fan_in
VELO_STEP_MULT = 0.001  # in both: VeLO's update is relative to the size of the weights
MULTIPLIERS = ("input_mult", "output_mult", "hidden_lr_mult")


def preset_settings(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset and, before those, the given ones.

    In SP the preset's that belong to μP are left out, and for VeLO those of the small MLP.
    """
    is_sp, is_velo = given.get("parametrization") == "sp", given.get("optimizer") == "velo"
    others = {"step_mult", "base_width", *MULTIPLIERS} if is_sp else set()
    others |= {"step_mult"} if is_velo else set()
    return {name: value for name, value in PRESETS[preset].items() if name not in others} | given


def check(settings: Settings) -> None:
    """Raises ValueError, in one line that names the flag, for settings that are impossible."""
    def need(good: bool, name: str, why: str) -> None:
        if not good:
            raise ValueError(f"{tasks.flag(name)} {getattr(settings, name)}: {why}")

    tasks.check(settings)  # each by its own bounds; what follows relates several
    for flags in settings.also:
        further_task(flags)
    is_mup = settings.parametrization == "mup"
    for name in MULTIPLIERS:
        need(is_mup or getattr(settings, name) == 1, name, "SP has no multipliers")
    need(is_mup or settings.base_width == 0, "base_width", "SP has none")
    is_velo = settings.optimizer == "velo"
    for name in ("hidden",) if is_velo else ("lstm_hidden", "bank"):
        need(getattr(settings, name) == getattr(Settings, name), name, f"{settings.optimizer} has none")
    need(is_velo or settings.first_theta or settings.start == "random" or settings.hidden > 1,
         "start", "needs an MLP with two hidden units at least")
    need(not is_velo or not settings.horizon, "horizon", "VeLO has none: it knows the length")
    pace = lopt.pace_of(without_theta(settings), settings.min_length)
    need(settings.decay * pace**0.5 < 1, "decay",
         f"with --horizon {settings.horizon}, one update of the shortest run, --min-length "
         f"{settings.min_length}, would take all weights away")
    need(settings.truncation <= settings.min_length, "truncation",
         f"longer than the shortest run, --min-length {settings.min_length}")
    need(settings.min_length <= settings.max_length, "min_length",
         f"longer than the longest run, --max-length {settings.max_length}")
    need((settings.max_offset or 1) <= settings.min_length, "max_offset",
         f"must be at most the shortest run, --min-length {settings.min_length}")
    need(settings.meta_steps * settings.truncation < 2**31, "meta_steps",
         "too many inner steps to be counted")


def further_task(flags: str) -> tuple[tasks.TaskSettings, bool]:
    """(the settings of a task of --also, whether its data are to be fetched first).

    Raises ValueError for flags that are wrong, or that are one for all tasks.
    """
    parser = tasks.CommandLine(prog="--also", add_help=False, allow_abbrev=False)
    tasks.add_flags(parser, tasks.TaskSettings)
    try:
        args = parser.parse_args(shlex.split(flags))
        settings = tasks.TaskSettings(**tasks.given_flags(args, tasks.TaskSettings))
        tasks.check(settings)
        for name in ("seed", "matmul_precision"):
            if getattr(args, name) is not None:
                raise ValueError(f"{tasks.flag(name)} is one for all tasks: give it outside")
        return settings, bool(args.download)
    except ValueError as error:
        raise ValueError(f"--also {flags!r}: {error}") from None


# --------------------------------------------------------------------------------------------------
# The learned optimizer that a run begins with


def first_learned(settings: Settings, first: lopt.Learned | None = None) -> lopt.Learned:
    """The learned optimizer before the first meta-step, with a random θ or that of `first`.

    Raises ValueError where the networks, parametrization or scales of the updates of `first` are
    not those of the settings: the same θ would then be another optimizer. What is ours may change:
    base_width, decay and horizon.
    """
    learned = without_theta(settings)
    if first is None:
        theta_key, _ = jax.random.split(jax.random.key(settings.seed))
        if settings.optimizer == "velo":
            theta = lopt.init_velo_theta(theta_key, settings.lstm_hidden, settings.bank)
            as_adam = velo_adam_start
        else:
            theta, as_adam = lopt.init_theta(theta_key, settings.hidden), adam_start
        return learned._replace(theta=as_adam(theta) if settings.start == "adam" else theta)

    was, now = first.parametrization, learned.parametrization
    both = {"optimizer": (first.architecture, learned.architecture),
            **{name: (size, getattr(settings, name))
               for name, size in network_sizes(first).items()},
            "parametrization": (was.name, now.name),
            **{name: (getattr(was, name), getattr(now, name)) for name in MULTIPLIERS},
            "step_mult": (first.step_mult, learned.step_mult),
            "exp_mult": (first.exp_mult, learned.exp_mult)}
    if wrong := [f"{tasks.flag(name)} {a}, not {b}" for name, (a, b) in both.items() if a != b]:
        raise ValueError(f"--first-theta {settings.first_theta}: was meta-trained with "
                         f"{'; '.join(wrong)}")
    return learned._replace(theta=first.theta, made=learned.made | {"origin": first.made})


def adam_start(theta: dict[str, Array]) -> dict[str, Array]:
    """Ours: a random θ, changed to be Adam at first; worth hundreds of meta-steps.

    Two hidden units carry ± the feature m₁ rsqrt(v+1e-6), which is Adam's direction, through all
    layers to d. What the other units add is a tenth of before.
    """
    blocks = lopt.features(lopt.of_one_weight())
    adam = [f.name for f in blocks for _ in f.values].index("m rsqrt(v+1e-6)")
    first, *middle, last = (name for name in theta if name.startswith("w"))
    changed = {first: theta[first].at[:, :2].set(0.0).at[adam, :2].set(jnp.array([1.0, -1.0])),
               last: (0.1 * theta[last]).at[:2].set(jnp.array([[1.0, 0.0], [-1.0, 0.0]]))}
    for name in middle:
        changed[name] = theta[name].at[:, :2].set(0.0).at[:2].set(0.0).at[:2, :2].set(jnp.eye(2))
    return theta | changed


def velo_adam_start(theta: dict[str, Array]) -> dict[str, Array]:
    """Ours: the same for VeLO. All MLPs of the bank have that path, and are mixed almost equally."""
    bank = {name: x for name, x in theta.items() if name.startswith("ff_mod_stack")}
    blocks = [f.name for f in lopt.element_inputs(lopt.of_one_weight())]
    w0 = f"ff_mod_stack/~/w0__{blocks.index('m rsqrt(v+1e-6)')}"
    w1, w2 = "ff_mod_stack/~/w1", "ff_mod_stack/~/w2"
    bank |= {name: x.at[:, :, :2].set(0.0) for name, x in bank.items() if "/w0__" in name}
    bank[w0] = bank[w0].at[:, 0, :2].set(jnp.array([0.1, -0.1]))
    bank[w1] = bank[w1].at[:, :, :2].set(0.0).at[:, :2].set(0.0).at[:, :2, :2].set(0.1 * jnp.eye(2))
    bank[w2] = (0.1 * bank[w2]).at[:, :2].set(jnp.array([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]]))
    w, b = "rnn_params/rnn_to_controls/w", "rnn_params/rnn_to_controls/b"
    return theta | bank | {w: 0.1 * theta[w], b: jnp.full_like(theta[b], 0.1)}  # 100 · 0.1 · 0.1 = 1


def without_theta(settings: Settings) -> lopt.Learned:
    """The learned optimizer of the settings, but for its θ."""
    parametrization = mup.Parametrization(settings.parametrization, settings.input_mult,
                                          settings.output_mult, settings.hidden_lr_mult,
                                          settings.base_width)
    default = VELO_STEP_MULT if settings.optimizer == "velo" else STEP_MULT[settings.parametrization]
    return lopt.Learned({}, settings.step_mult or default, settings.exp_mult, parametrization,
                        settings.optimizer, made={"settings": dataclasses.asdict(settings)},
                        decay=settings.decay, horizon=settings.horizon)


def network_sizes(learned: lopt.Learned) -> dict[str, int]:
    """The settings that say how large a learned optimizer's networks are, read from its θ."""
    theta = learned.theta
    if learned.architecture == "velo":
        return {"lstm_hidden": theta["lstm_init_state/hidden"].shape[1],
                "bank": len(theta["ff_mod_stack/~/b0"])}
    return {"hidden": len(theta["b0"])}


def with_theta(learned: lopt.Learned, vector: Array) -> lopt.Learned:
    """The learned optimizer with another θ, given as a vector [P]: its arrays in order of name."""
    _, unravel = ravel_pytree(learned.theta)
    return learned._replace(theta=unravel(vector))


# --------------------------------------------------------------------------------------------------
# The meta-step


class MetaState(NamedTuple):
    """The state of meta-training between two meta-steps.

    theta: θ as one vector [P], as `with_theta` reads it. adam: the state of AdamW. pairs: for each
    task its N pairs, an `es.Pair` with leaves [N, …], sharded over the devices. meta_step: int32,
    how many have been made.
    """
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


def make_meta_step(settings: Settings, inner_tasks: Sequence[tasks.Task], mesh: Mesh,
                   learned: lopt.Learned) -> tuple[Callable, Callable]:
    """(init() → MetaState, meta_step(state, splits) → (MetaState, Metrics)), jitted over a mesh.

    learned: what meta-training begins with. splits: the training data of each task. Each device
    holds and unrolls its share of every task's pairs; only the pairs' gradients travel between
    them. θ is one vector here: with an operation for each of its arrays, XLA would take seconds
    longer to compile.
    """
    pes = es.Settings(*(getattr(settings, name) for name in es.Settings._fields))
    schedule = learning_rate_schedule(settings)
    adamw = lopt.adamw(schedule, weight_decay=settings.weight_decay)
    _, pairs_key = jax.random.split(jax.random.key(settings.seed))
    keys = [es.pair_keys(jax.random.fold_in(pairs_key, i), jnp.arange(settings.pairs))
            for i in range(len(inner_tasks))]  # of the N pairs of each task

    def inner(task: tasks.Task) -> es.Inner:
        """A task with the learned optimizer whose θ is perturbed."""
        def optimizer(theta: Array, num_steps: Array) -> lopt.Optimizer:
            return tasks.optimizer_for(task, with_theta(learned, theta), num_steps)

        return es.Inner(task, optimizer)

    def init() -> MetaState:
        theta, _ = ravel_pytree(learned.theta)

        def first_runs(task, keys):
            def begin(key, _, theta):
                return (), es.begin(inner(task), theta, key, pes)

            return es.over_pairs(begin, mesh)(keys, None, theta)[1]

        pairs = tuple(map(first_runs, inner_tasks, keys))
        return MetaState(theta, adamw.init(theta), pairs, jnp.zeros((), jnp.int32))

    def meta_step(state: MetaState,
                  splits: Sequence[tasks.Split]) -> tuple[MetaState, Metrics]:
        # PES, on each task: its N pairs are perturbed, unrolled K steps, and give a mean estimate
        def truncation(task, split, keys, pairs):
            of_pair = functools.partial(es.truncation, inner(task), pes)
            return es.over_pairs(of_pair, mesh)(keys, pairs, state.theta, split, state.meta_step)

        estimates, pairs = zip(*map(truncation, inner_tasks, splits, keys, state.pairs))

        # The meta-gradient: the mean over the tasks, with 0 for what is not finite
        gradient, meta_loss = (sum(of_tasks) / len(inner_tasks) for of_tasks in zip(*estimates))
        gradient, nonfinite = zero_nonfinite(gradient)

        # The meta-optimizer: AdamW, whose update is clipped
        updates, adam = adamw.update(gradient, state.adam, state.theta)
        updates = lopt.clip_by_global_norm(updates, 1.0)

        # A meta-gradient without any finite entry changes nothing
        usable = nonfinite < gradient.size
        updates, adam = jax.tree.map(functools.partial(jnp.where, usable), (updates, adam),
                                     (jnp.zeros_like(updates), state.adam))
        metrics = Metrics(meta_loss, lopt.global_norm(gradient), lopt.global_norm(updates),
                          schedule(state.adam.step), nonfinite)
        return MetaState(state.theta + updates, adam, pairs, state.meta_step + 1), metrics

    copies = NamedSharding(mesh, PartitionSpec())
    by_pair = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    shardings = MetaState(theta=copies, adam=copies, pairs=by_pair, meta_step=copies)
    return (jax.jit(init, out_shardings=shardings),
            jax.jit(meta_step, in_shardings=(shardings, copies), out_shardings=(shardings, copies),
                    donate_argnums=0))


def learning_rate_schedule(settings: Settings) -> Callable[[Array], Array]:
    """μLO's: linear warm-up from 3e-10, then a cosine that ends at 98% of the meta-steps."""
    warmup = min(settings.warmup_steps, settings.meta_steps)
    end = max(settings.meta_steps * 98 // 100, warmup + 1)  # 4,900 of 5,000
    return lopt.warmup_cosine(3e-10, settings.learning_rate, settings.final_learning_rate, warmup,
                              end)


def zero_nonfinite(x: Array) -> tuple[Array, Array]:
    """(x with 0 for every entry that is not finite, how many there were)."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0.0), jnp.sum(~finite)


def meta_train(settings: Settings, inner_tasks: Sequence[tasks.Task],
               splits: Sequence[tasks.Split], mesh: Mesh, learned: lopt.Learned,
               folder: "Folder") -> tuple[lopt.Learned, int]:
    """Meta-trains on tasks, each with its split, from where the folder's run stands to its end.

    Returns (the learned optimizer then, 0), or (…, the signal) if one stopped it before.
    """
    init, meta_step = make_meta_step(settings, inner_tasks, mesh, learned)
    with Run(settings, learned, folder).under_way() as training:
        state = training.restore_or(init())
        while training.goes_on():
            state, metrics = meta_step(state, splits)
            training.record(state, metrics)
    return with_theta(learned, jax.device_get(state.theta)), training.stopped


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

# --------------------------------------------------------------------------------------------------
# The folder OUT: checkpoints and metrics

COLUMNS = ("meta_step", *Metrics._fields, "seconds")
OURS = ("checkpoint-*-of-*.npz", "metrics.csv", "theta.npz", "meta-loss.png")  # all that we write


class Checkpoint(NamedTuple):
    """A state on disk. arrays: those of the state that are this process's, by name. about (JSON):
    `made` of the learned optimizer, and the shapes of θ's arrays as "theta"."""
    step: int
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


class Folder:
    """The folder OUT of one run, held by a lock until meta-training ends there.

    flags: how the run is carried out. checkpoint: where it goes on, None where it begins. Raises
    ValueError when another process uses the folder, when it cannot be written, when it holds a run
    that is not to be resumed, and when it holds none that could be.
    """

    def __init__(self, path: str | os.PathLike, flags: "RunFlags"):
        self.path, self.flags = pathlib.Path(path), flags
        resume = flags.resume or flags.resume_or_begin
        # Only several processes ask JAX: it starts its devices, whose number may not be known yet.
        self.process, self.processes = 0, 1
        if flags.distributed:
            self.process, self.processes = jax.process_index(), jax.process_count()
        self.metrics_path = self.path / "metrics.csv"
        try:
            ours = [path.name for pattern in OURS for path in self.path.glob(pattern)]
            begun = any(name.startswith("checkpoint-") for name in ours)
            if ours and not begun:
                raise ValueError(f"--out {self.path}: is not empty (there is {ours[0]}) and holds "
                                 "no checkpoint; choose another folder")
            if begun and not resume:
                raise ValueError(f"--out {self.path}: is not empty; add --resume to go on there, "
                                 "or choose another folder")
            if flags.resume and not begun:
                raise ValueError(f"--out {self.path}: there is no checkpoint to resume from; to "
                                 "begin a run there, leave --resume out or use --resume-or-begin")
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / f".lock-{self.process}", "w")
            lopt.take_lock(self.lock)
        except BlockingIOError:
            raise ValueError(f"--out {self.path}: another process is using it") from None
        except FileExistsError:
            raise ValueError(f"--out {self.path}: is a file, not a folder") from None
        except OSError as error:
            raise ValueError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        of_this_process = [f"checkpoint-*-{self.process}-of-*", *OURS[1:] * (self.process == 0)]
        for name in of_this_process:  # what one that was killed had half written
            for part in self.path.glob(f".{name}.*.part"):
                part.unlink(missing_ok=True)
        if self.processes > 1:  # none writes before all have seen what is there
            multihost_utils.sync_global_devices("out")
        self.checkpoint = self.newest() if resume else None

    def checkpoint_path(self, step: int) -> pathlib.Path:
        """The file of this process's checkpoint at a meta-step."""
        return self.path / f"checkpoint-{step:08d}-{self.process}-of-{self.processes}.npz"

    def steps(self) -> list[int]:
        """The meta-steps at which this process has left checkpoints, the newest first."""
        names = [path.name for path in self.path.glob(f"checkpoint-*-{self.process}-of-*.npz")]
        if others := [name for name in names if not name.endswith(f"-of-{self.processes}.npz")]:
            raise ValueError(f"--out {self.path}: {others[0]} was written by another number of "
                             f"processes than the present {self.processes}; start as many as then")
        steps = [name.split("-")[1] for name in names]
        return sorted((int(step) for step in steps if step.isdecimal()), reverse=True)

    def save(self, state: MetaState, about: dict[str, Any]) -> int:
        """Writes a checkpoint and keeps the last two; returns its size in bytes."""
        step = int(state.meta_step)
        arrays = {jax.tree_util.keystr(path): local_array(x)
                  for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
        arrays["record"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        lopt.write_npz(self.checkpoint_path(step), arrays)
        steps = self.steps()
        for other in steps:  # one that is newer than this was damaged, or another process lacks it
            if other not in steps[steps.index(step):][:2]:
                self.checkpoint_path(other).unlink(missing_ok=True)
        return self.checkpoint_path(step).stat().st_size

    def load(self, step: int) -> Checkpoint:
        """The checkpoint at a meta-step. Raises ValueError if it is damaged."""
        arrays = lopt.read_npz(self.checkpoint_path(step), 1 << 40, checksum=True)
        try:
            about = json.loads(arrays.pop("record").tobytes())
            Settings(**about["settings"]), about["data"], about["theta"]
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{self.checkpoint_path(step)}: was written by another version of "
                             "this program") from None
        return Checkpoint(step, arrays, about)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that every process has undamaged; None before the first."""
        usable = {}
        for step in self.steps():
            try:
                usable[step] = self.load(step)
            except ValueError as error:
                print(f"warning: {error}; falling back to the checkpoint before it",
                      file=sys.stderr)
        common = agreed_steps(usable) if self.processes > 1 else sorted(usable)
        if not common and (self.flags.resume or self.steps()):
            raise ValueError(f"--out {self.path}: no checkpoint there is whole; start anew in "
                             "another folder")
        return usable[common[-1]] if common else None

    def open_metrics(self, step: int) -> io.TextIOBase:
        """metrics.csv, cut back to the rows of the first `step` meta-steps and opened for more."""
        rows = []
        if step:
            try:
                rows = list(csv.reader(self.metrics_path.read_text().splitlines()[1:]))[:step]
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{self.metrics_path}: cannot be read ({error})") from None
            numbers = [row[0] for row in rows if len(row) == len(COLUMNS)]
            if numbers != [str(i + 1) for i in range(step)]:
                raise ValueError(f"{self.metrics_path}: has not one row for each of the {step} "
                                 "meta-steps made so far; start anew in another folder")
        text = "".join(",".join(row) + "\n" for row in [COLUMNS, *rows])
        lopt.write_atomically(self.metrics_path, text.encode())
        return open(self.metrics_path, "a", buffering=1)


def local_array(x: Array) -> np.ndarray:
    """The part of an array that is on this process's devices: all of it, or its pairs."""
    if not x.ndim:
        return np.asarray(x.addressable_shards[0].data)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[i]) for i in sorted(shards)])


def agreed_steps(usable: Sequence[int]) -> list[int]:
    """The meta-steps of which every process has a whole checkpoint."""
    mine = np.full(2, -1, np.int32)
    mine[:len(usable)] = sorted(usable)[-2:]
    everyone = multihost_utils.process_allgather(mine)
    return sorted(set.intersection(*[set(steps.tolist()) for steps in everyone]) - {-1})


def restore(arrays: dict[str, np.ndarray], like: MetaState) -> MetaState:
    """The arrays of a checkpoint, by name, as a state with the structure and sharding of `like`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, x in paths:
        name = jax.tree_util.keystr(path)
        value = arrays.get(name)
        if value is None or value.dtype != x.dtype or value.shape[1:] != x.shape[1:]:
            raise ValueError(f"the checkpoint does not fit this version of the code: {name}")
        leaves.append(jax.make_array_from_process_local_data(x.sharding, value, x.shape))
    return treedef.unflatten(leaves)


def resumed_learned(settings: Settings, checkpoint: Checkpoint) -> lopt.Learned:
    """The learned optimizer of a run that goes on; its θ has the shapes, not yet the numbers."""
    learned, about = without_theta(settings), checkpoint.about
    theta = {name: jnp.zeros(shape) for name, shape in about["theta"].items()}
    origin = {"origin": about["origin"]} if "origin" in about else {}
    return learned._replace(theta=theta, made=learned.made | origin)


MAY_CHANGE = ("meta_steps", "data_dir")  # of the settings, on resuming


def settings_on_resume(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """The settings of a checkpoint, with those given now that may change.

    Raises ValueError for others that differ, and for fewer meta-steps.
    """
    before = Settings(**{name: tuple(x) if isinstance(x, list) else x
                         for name, x in saved.items()})
    differ = {name: value for name, value in given.items() if value != getattr(before, name)}
    if wrong := [f"{tasks.flag(name)} is {value} but was {getattr(before, name)}"
                 for name, value in differ.items() if name not in MAY_CHANGE]:
        raise ValueError(f"cannot resume with other settings: {'; '.join(wrong)}")
    if differ.get("meta_steps", before.meta_steps) < before.meta_steps:
        raise ValueError(f"--meta-steps {differ['meta_steps']}: can only grow on resuming, from "
                         f"{before.meta_steps}")
    return dataclasses.replace(before, **differ)


# --------------------------------------------------------------------------------------------------
# The run: what happens around each meta-step

STOP_SIGNALS = [getattr(signal, name) for name in
                ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                if hasattr(signal, name)]  # Windows has the first two


class Run:
    """The machine around the loop of `meta_train`: metrics, checkpoints, progress, signals.

    learned: what it begins with. stopped: the signal that has stopped it, or 0.
    """

    def __init__(self, settings: Settings, learned: lopt.Learned, folder: Folder):
        self.settings, self.learned, self.folder = settings, learned, folder
        self.about = learned.made | {"theta": {name: x.shape for name, x in learned.theta.items()}}
        self.every, self.unit = parse_every(folder.flags.checkpoint_every)
        self.received = 0  # the signal that this process has received
        self.stopped = 0
        self.pending: list[tuple[int, Metrics]] = []  # meta-steps whose rows are to be written
        self.metrics_file: io.TextIOBase = io.StringIO()  # of no use but in process 0
        self.progress: Progress | None = None
        self.finished_at: float | None = None  # when the last meta-step was, by time.monotonic()

    @contextlib.contextmanager
    def under_way(self) -> Iterator["Run"]:
        """Around the loop: a signal stops it after a meta-step, not in one, and its end is saved.

        A signal that is ignored stays so, as SIGHUP under nohup; but Ctrl-C always stops.
        """
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS
                  if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}
        try:
            yield self
            self._save()
            self.stopped = self.stopped or self.received
        except OSError as error:
            raise ValueError(f"{self.folder.metrics_path}: cannot be written ({error.strerror}); "
                             "the last checkpoint is whole, free some space and go on with "
                             "--resume") from None
        except jax.errors.JaxRuntimeError as error:
            if self.folder.processes == 1:
                raise
            give_up(tasks.first_line(error))
        finally:
            self.finished_at = None
            self.folder.lock.close()
            with contextlib.suppress(OSError):  # it may still hold what could not be written
                self.metrics_file.close()
            if self.progress:
                self.progress.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received:  # the second time at once
            raise KeyboardInterrupt
        self.received = number

    def restore_or(self, state: MetaState) -> MetaState:
        """The state to begin with, or that of the checkpoint; saved, to see that there is room."""
        if self.folder.checkpoint is not None:
            state = restore(self.folder.checkpoint.arrays, state)
        self.state, self.step = state, int(state.meta_step)
        need = 3 * self.folder.save(state, self.about)
        if (free := shutil.disk_usage(self.folder.path).free) < need:
            raise ValueError(f"--out {self.folder.path}: {free:,} bytes are free there, but "
                             f"checkpoints need {need:,}")
        if self.folder.process == 0:
            self.metrics_file = self.folder.open_metrics(self.step)
        if self.folder.processes > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        self.progress = Progress(self.settings.meta_steps, self.step, self.folder.process == 0)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.row_at = self.saved_at
        return state

    def goes_on(self) -> bool:
        """Whether another meta-step is to be made. All processes stop after the same one."""
        self.stopped = self.received
        if self.folder.processes > 1:  # the signal that any of them has received
            everyone = multihost_utils.process_allgather(np.int32(self.stopped))
            self.stopped = int(np.max(everyone))
        return not self.stopped and self.step < self.settings.meta_steps

    def record(self, state: MetaState, metrics: Metrics) -> None:
        """Takes what a meta-step has made: writes its metrics and, if it is due, a checkpoint."""
        self.state, self.step = state, self.step + 1
        self.pending.append((self.step, metrics))
        if len(self.pending) > 2:  # two in flight keep the devices busy while rows are written
            self._write_row()
        minutes = (time.monotonic() - self.saved_at) / 60
        elapsed = minutes if self.unit == "minutes" else self.step - self.saved_step
        if elapsed >= self.every and self.step < self.settings.meta_steps:
            self._save()

    def _write_row(self) -> None:
        step, metrics = self.pending.pop(0)
        metrics = jax.device_get(metrics)
        self.finished_at = time.monotonic()
        seconds, self.row_at = self.finished_at - self.row_at, self.finished_at
        row = [step, *(f"{x:.9g}" for x in metrics), f"{seconds:.4f}"]
        self.metrics_file.write(",".join(map(str, row)) + "\n")
        self.progress.finished(step, float(metrics.meta_loss))

    def _save(self) -> None:
        while self.pending:
            self._write_row()
        if self.folder.process == 0:  # first what must be there when the checkpoint is
            self.metrics_file.flush()
            lopt.sync(self.metrics_file.fileno())
            learned = with_theta(self.learned, jax.device_get(self.state.theta))
            made = learned.made | {"meta_steps_made": self.step}
            lopt.save(self.folder.path / "theta.npz", learned._replace(made=made))
        self.folder.save(self.state, self.about)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _watch(self) -> None:
        """Ends this process, in a thread, when no meta-step has been finished for long.

        Another process has then died: a collective operation would wait for it without end. There
        is nothing to watch before the first meta-step is finished, which includes compilation.
        """
        while True:
            time.sleep(1)
            at, seconds = self.finished_at, self.folder.flags.stall_seconds
            if at is not None and time.monotonic() - at > seconds:
                give_up(f"no meta-step for {seconds:g} seconds; --stall-seconds allows more")


def give_up(why: str) -> None:
    """Ends one of several processes at once: an orderly end would wait for those that are dead."""
    print(f"\nmeta_train.py: error: another process has died or hangs ({why}); start all of them "
          "again with --resume", file=sys.stderr, flush=True)
    os._exit(2)


class Progress:
    """How far a run is, on stderr: a bar on a terminal, elsewhere a line now and then.

    TQDM_DISABLE in the environment turns both off; a stderr that nobody reads any more is no error.
    """
    seconds = 60.0  # from one line to the next

    def __init__(self, meta_steps: int, step: int, shown: bool):
        shown = shown and os.environ.get("TQDM_DISABLE", "") in ("", "0")
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm.tqdm(total=meta_steps, initial=step, disable=not (shown and terminal),
                             unit="meta-step", smoothing=0.05, desc="compiling",
                             dynamic_ncols=True)
        self.meta_steps, self.lines = meta_steps, shown and not terminal
        self.first: tuple[int, float] | None = None  # the first meta-step to be finished, and when
        self.line_at = -float("inf")

    def finished(self, step: int, meta_loss: float) -> None:
        """Shows that a meta-step is finished."""
        now = time.monotonic()
        first, began = self.first = self.first or (step, now)
        with contextlib.suppress(OSError):
            self.bar.set_description("meta-training", refresh=False)
            self.bar.set_postfix(meta_loss=f"{meta_loss:.4f}", refresh=False)
            self.bar.update()
            if self.lines and now - self.line_at >= self.seconds:
                self.line_at = now
                minutes = (now - began) / 60 / max(step - first, 1) * (self.meta_steps - step)
                left = f", {minutes:.1f} minutes left" if step > first else ""
                print(f"meta-step {step} of {self.meta_steps}, meta-loss {meta_loss:.4f}{left}",
                      file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        with contextlib.suppress(OSError):
            self.bar.close()


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A tree of arrays that every process holds, copied to each device of the mesh."""
    copies = NamedSharding(mesh, PartitionSpec())

    def copied(x: Array) -> Array:
        return jax.make_array_from_process_local_data(copies, np.asarray(x), x.shape)

    return jax.tree.map(copied, tree)


def make_mesh(pairs: int, devices: int | None) -> Mesh:
    """All devices of all processes, or the first few, on one axis; they must divide the pairs."""
    everything = jax.devices()
    count = len(everything) if devices is None else devices
    on_cpu = everything[0].platform == "cpu" and jax.process_count() == 1
    if devices is None and on_cpu and not tasks.devices_are_forced():
        count = tasks.largest_divisor(pairs, count)  # a CPU has as many devices as we like
    if count > len(everything):
        raise ValueError(f"--devices {count}: there are only {len(everything)}")
    if pairs % count:
        below, above = pairs // count * count, (pairs // count + 1) * count
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"--pairs {pairs}: does not divide over {count} devices; use {nearest}")
    return Mesh(np.array(everything[:count]), ("pairs",))


# --------------------------------------------------------------------------------------------------
# How good θ is: the paper's comparison, small

RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of AdamW
Losses = dict[int, tuple[float, dict[float, float]]]  # {width: (θ's, {learning rate: AdamW's})}


def compare_with_adamw(settings: Settings, dataset: tasks.Dataset, learned: lopt.Learned,
                       steps: int) -> Losses:
    """The training losses of θ and of AdamW (SP), at the first width of meta-training and 16 times.

    All train on the same batches from the same key. A loss is the mean over the last twentieth of
    the steps, and infinite where it is not finite.
    """
    def losses_at(width: int) -> tuple[float, dict[float, float]]:
        task, plain = (tasks.task_of(settings, dataset, width, settings.depth, parametrization)
                       for parametrization in (learned.parametrization, mup.SP))

        def with_learned(split):
            optimizer = functools.partial(tasks.optimizer_for, task, learned)
            return tasks.train(task, optimizer, split, key, steps)[1]

        def with_adamw(rate, split):
            return tasks.train(plain, lambda num_steps: lopt.adamw(rate), split, key, steps)[1]

        mine = jax.jit(with_learned)(dataset.train)
        adamw = jax.jit(jax.vmap(with_adamw, (0, None)))(jnp.asarray(RATES), dataset.train)
        loss, *others = (float(x) if np.isfinite(x) else np.inf
                         for x in (tasks.final_loss(np.asarray(y)) for y in (mine, *adamw)))
        return loss, dict(zip(RATES, others))

    key = jax.random.key(settings.seed + 1)
    return {width: losses_at(width) for width in (settings.widths[0], 16 * settings.widths[0])}


def report(losses: Losses, settings: Settings, steps: int) -> str:
    """What `compare_with_adamw` has found, in a table and in words, whichever way it went.

    Beside θ, which has nothing to tune, stands AdamW with a learning rate tuned at the first width
    and transferred, with one tuned at each width, as a sweep there finds it, and with the usual
    1e-3.
    """
    def compared(width: int, rate: float) -> str:
        mine, other = losses[width][0], losses[width][1][rate]
        if np.isinf([mine, other]).any():
            return (f"θ {'diverges' if np.isinf(mine) else 'does not diverge'}, "
                    f"{'like' if mine == other else 'unlike'}")
        return f"θ ends {abs(mine - other):.3f} {'below' if mine < other else 'above'}"

    narrow, wide = losses
    tuned = {width: min(RATES, key=adamw.get) for width, (_, adamw) in losses.items()}
    table = [("width", "θ, not tuned", f"AdamW tuned at {narrow}", "tuned at each width",
              "at 1e-3")]
    for width, (mine, adamw) in losses.items():
        table.append((f"{width}", f"{mine:.4f}",
                      *(f"{adamw[rate]:.4f} ({rate:g})" for rate in (tuned[narrow], tuned[width])),
                      f"{adamw[1e-3]:.4f}"))
    lines = [f"training loss after {steps} steps of batch size {settings.batch_size} on "
             f"{settings.dataset}; AdamW's learning rate is tuned among "
             f"{', '.join(f'{rate:g}' for rate in RATES)}"]
    lines += ["".join(f"{cell:>{n}}" for cell, n in zip(row, (8, 15, 22, 22, 10))) for row in table]
    tasks_of_run = [settings, *(further_task(flags)[0] for flags in settings.also)]
    widest = max(width for task in tasks_of_run for width in task.widths)
    if wide > widest and not settings.first_theta:  # that one may have seen others
        lines.append(f"θ has never seen a network wider than {widest}.")
    return "\n".join([
        *lines,
        f"At width {wide} {compared(wide, tuned[narrow])} AdamW as it was tuned at {narrow},",
        f"and {compared(wide, tuned[wide])} AdamW as a sweep at {wide} itself would tune it.",
        f"At width {narrow} {compared(narrow, tuned[narrow])} tuned AdamW."])


def next_command(settings: Settings, path: pathlib.Path) -> str:
    """The command that evaluates a θ on more widths of the task of its meta-training."""
    words = ["python", "evaluate.py", "--theta", str(path), "--baselines", "adamw", "--sweep",
             "width", "--widths", *(str(factor * settings.widths[0]) for factor in (1, 4, 16))]
    for field in dataclasses.fields(tasks.TaskSettings):
        value = getattr(settings, field.name)
        if value != field.default and field.name not in ("widths", "seed"):
            words += [tasks.flag(field.name)] + [str(value)] * (value is not True)
    return shlex.join(words)


def draw_meta_loss(folder: Folder) -> None:
    """Draws metrics.csv as meta-loss.png, where matplotlib is there; where it fails, nothing."""
    try:
        from matplotlib.figure import Figure
        losses = np.loadtxt(folder.metrics_path, delimiter=",", skiprows=1, usecols=1, ndmin=1)
        figure, image = Figure((6, 4)), io.BytesIO()
        window = min(len(losses), max(2, len(losses) // 40))
        means = np.convolve(losses, np.full(window, 1 / window), "valid")
        axes = figure.subplots()
        axes.plot(np.arange(len(losses)) + 1, losses, alpha=0.3, label="each meta-step")
        axes.plot(np.arange(len(means)) + window, means, label=f"mean of {window}")
        axes.set(xlabel="meta-step", ylabel="meta-loss")
        axes.legend()
        figure.savefig(image, format="png", dpi=120)
        lopt.write_atomically(folder.path / "meta-loss.png", image.getvalue())
    except Exception:  # an old or broken matplotlib raises anything; a picture is worth no error
        pass


# --------------------------------------------------------------------------------------------------
# Command line


of_run = functools.partial(setting, group="the run")
of_hosts = functools.partial(setting, group="many hosts")


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """How a run is carried out; of it --devices alone touches the result, by rounding."""
    out: str | None = of_run(None, "folder for θ, metrics and checkpoints (a new one in runs/ if "
                             "not given); other files in it do not matter", metavar="DIR")
    resume: bool = of_run(False, "go on from the newest checkpoint in --out, which must hold one")
    resume_or_begin: bool = of_run(False, "go on from the newest checkpoint in --out or, if it "
                                   "holds none, begin there: for scripts that are run repeatedly")
    checkpoint_every: str = of_run("100", "meta-steps between checkpoints, or minutes as in 10m",
                                   metavar="EVERY")
    report_steps: int = of_run(1000, "inner steps of the comparison with AdamW at the end, 0 for "
                               "none", low=0, metavar="T")
    devices: int | None = of_run(None, "how many to use (if not given all; of a CPU as many as divide "
                                 "the pairs, one for each core at most)", low=1, metavar="D")

    distributed: bool = of_hosts(False, "one of several processes; the next three flags are found "
                                 "by JAX itself on SLURM, Kubernetes and TPU pods")
    coordinator: str | None = of_hosts(None, "address of process 0", metavar="HOST:PORT")
    processes: int | None = of_hosts(None, "how many there are", metavar="P")
    process_id: int | None = of_hosts(None, "which one this is", metavar="I")
    stall_seconds: float = of_hosts(90.0, "seconds without a meta-step, after which a process "
                                    "takes another for dead and ends", above=0, metavar="T")


def check_flags(flags: RunFlags) -> None:
    """Raises ValueError, in one line, for flags that are impossible or do not go together."""
    tasks.check(flags)
    _, unit = parse_every(flags.checkpoint_every)
    who = (flags.coordinator, flags.processes, flags.process_id)
    given = sum(flag is not None for flag in who)
    for wrong, why in [
            ((flags.resume or flags.resume_or_begin) and not flags.out,
             "--resume needs --out, the folder in which to go on"),
            (given and not flags.distributed,
             "--coordinator, --processes and --process-id need --distributed"),
            (0 < given < len(who), "--coordinator, --processes and --process-id go together"),
            (flags.distributed and not flags.out,
             "--distributed needs --out, so that all processes name the same run"),
            (flags.distributed and unit == "minutes",
             "--checkpoint-every in minutes does not go with --distributed: give meta-steps, at which "
             "all agree"),
            (flags.distributed and flags.devices is not None,
             "--devices does not go with --distributed, which uses all devices of all processes"),
            (given == len(who) and not 0 <= flags.process_id < flags.processes,
             f"--process-id {flags.process_id}: must be between 0 and --processes "
             f"{flags.processes} minus 1")]:
        if wrong:
            raise ValueError(why)


def parse_every(text: str) -> tuple[float, str]:
    """"100" → (100, "steps"), "10m" → (10, "minutes")."""
    try:
        every = (float(text[:-1]), "minutes") if text.endswith("m") else (int(text), "steps")
        if 0 < every[0] < float("inf"):
            return every
    except ValueError:
        pass
    raise ValueError(f"--checkpoint-every {text}: must be a number of meta-steps, or of minutes "
                     "as in 10m")


def make_parser() -> tasks.CommandLine:
    """The command line: --preset, a flag for each setting, and those of the run."""
    parser = tasks.CommandLine(prog="meta_train.py", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from: laptop "
                        "(default), or the paper's for one or three widths; flags win over it")
    in_presets = {name: default_of(name) for preset in PRESETS.values() for name in preset}
    tasks.add_flags(parser, Settings, in_presets)
    tasks.add_flags(parser, RunFlags)
    return parser


def default_of(name: str) -> str:
    """The default of a setting in the presets, such as "16.0 (laptop), 1.0 (paper-s, paper-m)"."""
    presets_of: dict[str, list[str]] = {}
    for preset, values in PRESETS.items():
        value = values.get(name, getattr(Settings, name))
        if value is not None:
            shown = " ".join(map(str, tasks.as_tuple(value)))
            presets_of.setdefault(shown, []).append(preset)
    return ", ".join(f"{shown} ({', '.join(presets)})" for shown, presets in presets_of.items())


def new_folder(name: str) -> pathlib.Path:
    """A folder runs/name-1, runs/name-2, … of this process alone: the first after those there."""
    ends = [path.name.rsplit("-", 1)[1] for path in pathlib.Path("runs").glob(f"{name}-*")]
    taken = max((int(end) for end in ends if end.isdecimal()), default=0)
    os.makedirs("runs", exist_ok=True)
    for number in itertools.count(taken + 1):
        path = pathlib.Path("runs", f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir()
            return path


def join_processes(flags: RunFlags) -> None:
    """Joins the processes of a run on many hosts. Raises ValueError where that fails."""
    try:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError("--distributed: cannot join the other processes "
                         f"({tasks.first_line(error)})") from None


def where_to_begin(settings: Settings, given: dict[str, Any], folder: Folder | None,
                   datasets: Sequence[tasks.Dataset]) -> tuple[Settings, lopt.Learned]:
    """What a run begins or goes on with, and its settings, which take θ's sizes from --first-theta.

    Raises ValueError for a run that would go on with other data, and for a --first-theta
    that cannot be read or does not fit.
    """
    data = " ".join(map(tasks.fingerprint, datasets))
    if folder and folder.checkpoint:
        if folder.checkpoint.about["data"] != data:
            names = " or ".join(dataset.name for dataset in datasets)
            raise ValueError(f"cannot resume: the data of {names} are not those of the run "
                             f"in {folder.path}")
        learned = resumed_learned(settings, folder.checkpoint)
    else:
        first = None if settings.first_theta is None else lopt.load(settings.first_theta)
        if first is not None:
            own = {name: size for name, size in network_sizes(first).items() if name not in given}
            settings = dataclasses.replace(settings, **own)
        learned = first_learned(settings, first)
    return settings, learned._replace(made=learned.made | {"data": data})


def announce(settings: Settings, on: str, mesh: Mesh, folder: Folder) -> None:
    """Prints what is meta-trained on what, where it runs and where it begins."""
    kind = "VeLO" if settings.optimizer == "velo" else "LO"
    kind = f"μ{kind}" if settings.parametrization == "mup" else f"SP {kind}"
    where = ""
    if folder.checkpoint:
        where = f"; going on after meta-step {folder.checkpoint.step}"
    elif settings.first_theta:
        where = f"; beginning with {settings.first_theta}"
    print(f"meta-training a {kind} on {on}, {settings.pairs} pairs each, on {mesh.devices.size} "
          f"{jax.devices()[0].platform} device(s); output in {folder.path}{where}", flush=True)


def run(argv: Sequence[str] | None) -> int:
    """Parses, checks, trains, reports; returns the exit code. ValueError for any bad input."""
    args = make_parser().parse_args(argv)
    flags, given = RunFlags(**tasks.given_flags(args, RunFlags)), tasks.given_flags(args, Settings)
    preset = args.preset or "laptop"
    wanted = preset_settings(preset, given)
    if args.preset:  # a run that is resumed with another preset is refused
        given = {name: x for name, x in wanted.items() if name in given or name not in MAY_CHANGE}
    settings = Settings(**wanted)
    check_flags(flags)
    if not flags.resume:  # there the settings of the checkpoint count, too
        check(settings)
    if flags.distributed:
        join_processes(flags)

    folder = None
    if flags.resume or flags.resume_or_begin:
        folder = Folder(flags.out, flags)
        if folder.checkpoint:
            settings = settings_on_resume(given, folder.checkpoint.about["settings"])
            check(settings)
    if not flags.distributed:
        tasks.set_up_devices(settings.pairs, flags.devices)
    tasks.set_up_precision(settings.matmul_precision)
    mesh = make_mesh(settings.pairs, flags.devices)

    each, downloads = zip((settings, args.download), *map(further_task, settings.also))
    datasets = tasks.load_each(each, downloads)
    distinct = {id(dataset): dataset for dataset in datasets}  # several tasks may share one
    settings, learned = where_to_begin(settings, given, folder, list(distinct.values()))
    sized = [(one, dataset, width) for one, dataset in zip(each, datasets) for width in one.widths]
    inner_tasks = [tasks.task_of(one, dataset, width, one.depth, learned.parametrization)
                   for one, dataset, width in sized]

    # A new run writes its first file here, when all else has been checked.
    if folder is None:
        folder = Folder(flags.out or new_folder(f"{preset}-{settings.parametrization}"), flags)
    began = time.monotonic()
    if folder.process == 0:
        on = " and ".join(f"{dataset.name}, widths {' '.join(map(str, one.widths))}"
                          for one, dataset in zip(each, datasets))
        announce(settings, on, mesh, folder)
    copies = {name: replicate(dataset.train, mesh) for name, dataset in distinct.items()}
    splits = [copies[id(dataset)] for _, dataset, _ in sized]
    learned, stopped = meta_train(settings, inner_tasks, splits, mesh, learned, folder)
    if flags.distributed:  # else the other processes wait for the report, for five minutes at most
        jax.distributed.shutdown()
    if stopped:
        where = shlex.join(["--out", str(folder.path), "--resume"])
        print(f"stopped; to go on, give the same command with {where}", file=sys.stderr)
        return 128 + stopped
    if folder.process != 0:
        return 0
    draw_meta_loss(folder)
    theta_path = folder.path / "theta.npz"
    print(f"wrote {theta_path} after {(time.monotonic() - began) / 60:.1f} minutes")
    if flags.report_steps:
        print(f"comparing θ with AdamW on {flags.report_steps} steps of training", flush=True)
        losses = compare_with_adamw(settings, datasets[0], learned, flags.report_steps)
        print(report(losses, settings, flags.report_steps))
        print(f"Next, more widths: {next_command(settings, theta_path)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(tasks.run_command(run, "meta_train.py", None))
