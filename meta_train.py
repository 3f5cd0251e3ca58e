"""Meta-training: the outer loop that trains θ, the learned optimizer's weights.

    python meta_train.py                                   a μLO on small MLPs, in minutes on two cores
    python meta_train.py --parametrization sp              the same in the standard parametrization
    python meta_train.py --preset paper-m --dataset imagenet32 --data-dir data     the paper's μLO_M
    python meta_train.py --out runs/a --resume             goes on where runs/a was interrupted
    python meta_train.py --first-theta runs/a/theta.npz    a new run that begins with the θ of another

One meta-step perturbs θ for N antithetic pairs of inner runs on every task, moves all of them K inner steps on, makes
the PES estimate of the meta-gradient of that (es.py), and takes a step of AdamW on θ (lopt.py); it is one jitted
function.
The pairs are sharded over the local devices (one for each core of a CPU), and over all hosts with --distributed.

OUT/ holds theta.npz (θ at the end), metrics.csv (a row for each meta-step) and the last two checkpoints, from which
a run that was interrupted goes on exactly. What is random depends on the seed, the pair and the time alone.

Sources: μLO (arXiv 2406.00153) for the settings, PES (arXiv 2112.13835).

Dimensions: N pairs of one task, K inner steps of a truncation.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
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

# ---------------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run; each field is a flag of the command line."""
    task: str = "mlp"
    parametrization: str = "mup"
    input_mult: float = 1.0
    output_mult: float = 1.0
    hidden_lr_mult: float = 1.0
    base_width: int = 0
    dataset: str = "synthetic"
    data_dir: str | None = None
    image_size: int | None = None
    vocab_size: int | None = None
    sequence_length: int | None = None
    widths: tuple[int, ...] = (32,)
    depth: int = 3
    heads: int | None = None
    patch: int | None = None
    remat: bool = False
    batch_size: int = 64
    pairs: int = 8
    truncation: int = 50
    sigma: float = 0.01
    min_length: int = 100
    max_length: int = 1000
    max_offset: int | None = None
    meta_steps: int = 800
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-3
    warmup_steps: int = 100
    step_mult: float | None = None
    exp_mult: float = 0.001
    weight_decay: float = 1e-4
    matmul_precision: str = "highest"
    first_theta: str | None = None
    seed: int = 0


PAPER = dict(dataset="imagenet32", batch_size=4096, meta_steps=5000)
# The multipliers of the laptop's preset make μP at width 16 the same as SP, but for what is 0 or random at first. With
# the paper's 1 the updates of hidden weights are small beside those of the others: a loss 0.03 higher at width 32.
PRESETS = {"laptop": dict(output_mult=16.0, hidden_lr_mult=16.0, step_mult=0.003),
           "paper-s": PAPER | {"widths": (128,)}, "paper-m": PAPER | {"widths": (128, 512, 1024)}}
STEP_MULT = {"mup": 0.01, "sp": 0.001}  # μLO divides a hidden weight's update by its fan_in, hence takes larger steps
OF_PARAMETRIZATION = mup.Parametrization._fields[1:]  # the settings that it takes beside its name
MULTIPLIERS = tuple(name for name in OF_PARAMETRIZATION if name.endswith("_mult"))
MAY_CHANGE = ("meta_steps", "data_dir")  # on resuming; meta_steps upward only


def preset_settings(preset: str, parametrization: str) -> dict[str, Any]:
    """The settings of a preset, in SP without those that belong to μP."""
    only_in_mup = ("step_mult", *MULTIPLIERS) if parametrization == "sp" else ()
    return {name: value for name, value in PRESETS[preset].items() if name not in only_in_mup}


def pes_settings(settings: Settings) -> es.Settings:
    """The part of the settings that es.py needs."""
    return es.Settings(settings.sigma, settings.truncation, settings.min_length, settings.max_length,
                       settings.max_offset)


def check(settings: Settings) -> None:
    """Raises ValueError, in one line that names the flag, for a setting that is impossible."""
    def need(good: bool, flag: str, why: str) -> None:
        if not good:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(settings, flag)!s}: {why}")

    for name, choices in (("task", tasks.TASKS), ("parametrization", ("mup", "sp")), ("dataset", tasks.DATASETS)):
        need(getattr(settings, name) in choices, name, f"use one of {', '.join(choices)}")
    for name in ("depth", "batch_size", "pairs", "truncation", "min_length", "meta_steps"):
        need(getattr(settings, name) >= 1, name, "must be at least 1")
    for name in ("image_size", "vocab_size", "sequence_length", "heads", "patch"):
        need((getattr(settings, name) or 1) >= 1 and getattr(settings, name) != 0, name, "must be at least 1")
    # whose squares float32 holds
    for name in ("sigma", "learning_rate", "final_learning_rate", "step_mult", *MULTIPLIERS):
        value = getattr(settings, name)
        need(value is None or 1e-18 < value < 1e18, name, "must be a positive number, above 1e-18 and below 1e18")
    for name in ("exp_mult", "weight_decay"):
        need(0 <= getattr(settings, name) < 1e18, name, "must be a number from 0 to 1e18")
    for name, value in dataclasses.asdict(settings).items():
        largest = max(value, default=0) if isinstance(value, tuple) else value
        need(name == "seed" or not isinstance(largest, int) or largest < 2**31, name, "is too large")
    for name in MULTIPLIERS:
        need(settings.parametrization == "mup" or getattr(settings, name) == 1, name, "SP has no multipliers")
    need(settings.base_width >= 0, "base_width", "must not be negative")
    need(settings.parametrization == "mup" or settings.base_width == 0, "base_width", "SP has none")
    need(len(settings.widths) > 0 and min(settings.widths) >= 1, "widths", "must be at least 1")
    need(len(set(settings.widths)) == len(settings.widths), "widths", "a width is repeated")
    need(settings.truncation <= settings.min_length, "truncation",
         f"longer than the shortest run, --min-length {settings.min_length}")
    need(settings.min_length <= settings.max_length, "min_length",
         f"longer than the longest run, --max-length {settings.max_length}")
    need(settings.max_length < 2**30, "max_length", "is too long")
    need(settings.max_offset is None or 1 <= settings.max_offset <= settings.min_length, "max_offset",
         f"must be at least 1, and at most the shortest run, --min-length {settings.min_length}")
    need(settings.warmup_steps >= 0, "warmup_steps", "must not be negative")
    need(settings.meta_steps * settings.truncation < 2**31, "meta_steps", "too many inner steps to be counted")
    need(0 <= settings.seed < 2**32, "seed", "must be between 0 and 4294967295")


def load_data(settings: Any, download: bool = False) -> tasks.Dataset:
    """The data set that dataset, data_dir, image_size … of the settings name; fetched before if asked to."""
    data_dir = settings.data_dir or (None if settings.dataset == "synthetic" else "data")
    if download:
        tasks.download(settings.dataset, data_dir or "data")
    return tasks.load_dataset(settings.dataset, data_dir, settings.image_size, vocab_size=settings.vocab_size,
                              sequence_length=settings.sequence_length)


def make_task(settings: Any, dataset: tasks.Dataset, width: int, depth: int,
              parametrization: mup.Parametrization) -> tasks.Task:
    """The inner task of the settings at one width and depth."""
    options = {name: getattr(settings, name) for name in ("heads", "patch", "remat", "sequence_length")
               if getattr(settings, name) not in (None, False)}
    return tasks.make_task(settings.task, dataset, width, depth, settings.batch_size, parametrization, **options)


# ---------------------------------------------------------------------------------------------------------
# The meta-step


class MetaState(NamedTuple):
    """theta: θ as one vector [P], as `lopt.theta_from_vector` reads it. adam: state of AdamW. pairs: one `es.Pairs`
    for each width, sharded over the devices. meta_step: int32, meta-steps made."""
    theta: Array
    adam: lopt.AdamState
    pairs: tuple[es.Pairs, ...]
    meta_step: Array


class Metrics(NamedTuple):
    """Scalars of one meta-step. nonfinite: entries of the meta-gradient that were not finite and counted as 0."""
    meta_loss: Array
    grad_norm: Array
    update_norm: Array
    learning_rate: Array
    nonfinite: Array


def parametrization(settings: Settings) -> mup.Parametrization:
    """That of the inner networks, with its multipliers."""
    return mup.Parametrization(settings.parametrization, *[getattr(settings, name) for name in OF_PARAMETRIZATION])


def step_mult(settings: Settings) -> float:
    """The scale of all updates: as given, or μLO's for the parametrization."""
    return STEP_MULT[settings.parametrization] if settings.step_mult is None else settings.step_mult


def read_first_theta(settings: Settings) -> tuple[dict[str, Array] | None, dict[str, Any] | None]:
    """(θ, metadata) of the file to begin with, or (None, None). Raises ValueError where the scales of its updates or
    its parametrization are not those of the settings: the same θ would then be another optimizer."""
    if settings.first_theta is None:
        return None, None
    theta, metadata = lopt.load_theta(settings.first_theta)
    before = dict(zip(("parametrization", *MULTIPLIERS), mup.parametrization_of(metadata)),
                  step_mult=metadata["step_mult"], exp_mult=metadata["exp_mult"])
    now = {name: getattr(settings, name) for name in before} | {"step_mult": step_mult(settings)}
    if wrong := [f"--{name.replace('_', '-')} {before[name]}, not {now[name]}"
                 for name in before if before[name] != now[name]]:
        raise ValueError(f"--first-theta {settings.first_theta}: was meta-trained with {'; '.join(wrong)}")
    return theta, metadata


def learning_rate_schedule(settings: Settings) -> Callable[[Array], Array]:
    """μLO's: linear warm-up from 3e-10, then a cosine that ends at 98% of the meta-steps (4,900 of 5,000)."""
    warmup = min(settings.warmup_steps, settings.meta_steps)
    return lopt.warmup_cosine(3e-10, settings.learning_rate, settings.final_learning_rate, warmup,
                              max(settings.meta_steps * 98 // 100, warmup + 1))


def make_functions(settings: Settings, inner_tasks: Sequence[tasks.Task], mesh: Mesh,
                   first_theta: Tree | None = None) -> tuple[Callable, Callable]:
    """(init() → MetaState, meta_step(state, split) → (state, metrics)), both jitted over the devices of the mesh.

    first_theta: θ to begin with, None for a random one.

    Each device holds and unrolls its share of every task's pairs; only the pairs' gradients travel between them.
    θ is one vector here: with an operation for each of its nine arrays, XLA would take seconds longer to compile.
    """
    pes = pes_settings(settings)
    devices = mesh.devices.size
    share = settings.pairs // devices
    chunk = lopt.default_chunk(2 * es.pairs_at_once(share))
    schedule = learning_rate_schedule(settings)
    adam = lopt.adamw(schedule, weight_decay=settings.weight_decay)
    seed_key = jax.random.key(settings.seed)
    theta_key, pairs_key = jax.random.split(seed_key)
    everywhere, by_pair = PartitionSpec(), PartitionSpec("pairs")
    sharded = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def optimizer(task: tasks.Task) -> Callable[[Tree], lopt.Optimizer]:
        return lambda theta: lopt.learned_optimizer(
            lopt.theta_from_vector(theta), step_mult=step_mult(settings), exp_mult=settings.exp_mult,
            update_multipliers=task.update_multipliers, gradient_multiplier=task.gradient_multiplier, chunk=chunk)

    def keys_here(task_index: int) -> Array:
        pairs = jax.lax.axis_index("pairs") * share + jnp.arange(share)
        return es.pair_keys(jax.random.fold_in(pairs_key, task_index), pairs)

    @functools.partial(sharded, in_specs=everywhere, out_specs=by_pair)
    def init_pairs(theta):
        return tuple(es.init_pairs(task, optimizer(task), theta, keys_here(i), pes)
                     for i, task in enumerate(inner_tasks))

    @functools.partial(sharded, in_specs=(everywhere, by_pair, everywhere, everywhere),
                       out_specs=(everywhere, everywhere, by_pair))
    def estimate(theta, pairs, split, meta_step):
        gradients, losses, pairs = zip(*[
            es.estimate(task, optimizer(task), theta, pairs[i], keys_here(i), split, meta_step, pes, axis="pairs")
            for i, task in enumerate(inner_tasks)])
        mean = lambda *trees: sum(trees) / len(trees)
        return jax.tree.map(mean, *gradients), mean(*losses), pairs

    def init() -> MetaState:
        theta, _ = ravel_pytree(lopt.init_theta(theta_key) if first_theta is None else first_theta)
        return MetaState(theta, adam.init(theta), init_pairs(theta), jnp.zeros((), jnp.int32))

    def meta_step(state: MetaState, split: tasks.Split) -> tuple[MetaState, Metrics]:
        gradient, loss, pairs = estimate(state.theta, state.pairs, split, state.meta_step)
        gradient, nonfinite = zero_nonfinite(gradient)
        updates, new_adam = adam.update(gradient, state.adam, state.theta)
        updates = lopt.clip_by_global_norm(updates, 1.0)
        usable = nonfinite < gradient.size  # a wholly non-finite gradient changes nothing
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, old)
        theta = keep(state.theta + updates, state.theta)
        metrics = Metrics(loss, lopt.global_norm(gradient), lopt.global_norm(updates), schedule(state.adam.step),
                          nonfinite)
        return MetaState(theta, keep(new_adam, state.adam), pairs, state.meta_step + 1), metrics

    copies = NamedSharding(mesh, everywhere)
    shardings = MetaState(copies, copies, NamedSharding(mesh, by_pair), copies)
    return (jax.jit(init, out_shardings=shardings),
            jax.jit(meta_step, in_shardings=(shardings, copies), out_shardings=(shardings, copies), donate_argnums=0))


def zero_nonfinite(x: Array) -> tuple[Array, Array]:
    """(x with 0 for every entry that is not finite, how many there were)."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0.0), jnp.sum(~finite)


# ---------------------------------------------------------------------------------------------------------
# OUT: checkpoints and metrics

COLUMNS = ("meta_step", *Metrics._fields, "seconds")


def local_array(x: Array) -> np.ndarray:
    """The part of an array that is on this process's devices: all of it, or its pairs."""
    shards = {shard.index[0].start or 0 if x.ndim else 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.atleast_1d(shards[i]) for i in sorted(shards)]).reshape(-1, *x.shape[1:]) \
        if x.ndim else np.asarray(shards[0])


class Out:
    """The folder of one run, held by a lock while this process uses it.

    Raises ValueError when another process uses it, when it cannot be written, and when it is not empty, unless
    resuming from a checkpoint in it.
    """

    def __init__(self, folder: str | os.PathLike, resume: bool):
        self.folder = pathlib.Path(folder)
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.metrics_path = self.folder / "metrics.csv"
        try:
            names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
            begun = any(name.startswith("checkpoint-") for name in names)
            others = [name for name in names if not name.startswith(".lock-") and not name.endswith(".part")]
            if others and not (resume and begun):
                raise ValueError(f"--out {self.folder}: is not empty" + (
                    "; add --resume to go on there, or" if begun else " and holds no checkpoint;") +
                    " choose another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / f".lock-{self.process}", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {self.folder}: another process is using it") from None
        except FileExistsError:
            raise ValueError(f"--out {self.folder}: is a file, not a folder") from None
        except OSError as error:
            raise ValueError(f"--out {self.folder}: cannot be written ({error.strerror})") from None
        for part in self.folder.glob(f".*-{self.process}-of-*.part"):  # of a process that was killed while writing
            part.unlink(missing_ok=True)
        if self.processes > 1:  # none writes before all have seen what is there
            multihost_utils.sync_global_devices("out")

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / f"checkpoint-{step:08d}-{self.process}-of-{self.processes}.npz"

    def steps(self) -> list[int]:
        """The meta-steps at which this process has left checkpoints, the newest first."""
        if others := [p.name for p in self.folder.glob(f"checkpoint-*-{self.process}-of-*.npz")
                      if not p.name.endswith(f"-of-{self.processes}.npz")]:
            raise ValueError(f"--out {self.folder}: {others[0]} was written by another number of processes than the "
                             f"present {self.processes}; start as many as then")
        paths = self.folder.glob(f"checkpoint-*-{self.process}-of-{self.processes}.npz")
        return sorted((int(step) for path in paths if (step := path.name.split("-")[1]).isdigit()), reverse=True)

    def save(self, state: MetaState, record: dict[str, Any]) -> int:
        """Writes a checkpoint of the state and the record (JSON), keeps the last two; returns its size in bytes."""
        step = int(state.meta_step)
        arrays = {jax.tree_util.keystr(path): local_array(x)
                  for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
        lopt.write_npz(self._path(step), {**arrays, "record": np.frombuffer(json.dumps(record).encode(), np.uint8)})
        steps = self.steps()
        for other in steps:  # one that is newer than this was damaged, or another process lacks it
            if other not in steps[steps.index(step):][:2]:
                self._path(other).unlink(missing_ok=True)
        return self._path(step).stat().st_size

    def load(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays by name, record) of the checkpoint at a meta-step. Raises ValueError if it is damaged."""
        arrays = lopt.read_npz(self._path(step), 1 << 40, checksum=True)
        try:
            record = json.loads(arrays.pop("record").tobytes())
            Settings(**record["settings"])
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{self._path(step)}: was written by another version of this program") from None
        return arrays, record

    def newest(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """(step, arrays, record) of the newest checkpoint that every process has undamaged; None before the first."""
        usable = {}
        for step in self.steps():
            try:
                usable[step] = self.load(step)
            except ValueError as error:
                print(f"warning: {error}; falling back to the checkpoint before it", file=sys.stderr)
        common = agreed_steps(usable) if self.processes > 1 else sorted(usable)
        if not common and self.steps():
            raise ValueError(f"--out {self.folder}: no checkpoint there is whole; start anew in another folder")
        return (common[-1], *usable[common[-1]]) if common else None

    def open_metrics(self, step: int) -> io.TextIOBase:
        """metrics.csv, cut back to the rows of the first `step` meta-steps and opened for the rows after them."""
        rows = []
        if step:
            try:
                rows = [row for row in csv.reader(self.metrics_path.read_text().splitlines()[1:])][:step]
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{self.metrics_path}: cannot be read ({error})") from None
            if [row[0] for row in rows if len(row) == len(COLUMNS)] != [str(i + 1) for i in range(step)]:
                raise ValueError(f"{self.metrics_path}: has not one row for each of the {step} meta-steps made so far; "
                                 "start anew in another folder")
        text = "".join(",".join(row) + "\n" for row in [COLUMNS, *rows])
        lopt.write_atomically(self.metrics_path, text.encode())
        return open(self.metrics_path, "a", buffering=1)


def agreed_steps(usable: Sequence[int]) -> list[int]:
    """The meta-steps of which every process has a whole checkpoint."""
    mine = np.full(2, -1, np.int32)
    mine[:len(usable)] = sorted(usable)[-2:]
    everyone = multihost_utils.process_allgather(mine)
    return sorted(set.intersection(*[set(steps.tolist()) for steps in everyone]) - {-1})


def restore(arrays: dict[str, np.ndarray], like: MetaState) -> MetaState:
    """The arrays of a checkpoint, by name, as a state with the structure and the shardings of `like`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, x in paths:
        value = arrays.get(jax.tree_util.keystr(path))
        if value is None or value.dtype != x.dtype or value.shape[1:] != x.shape[1:]:
            raise ValueError(f"the checkpoint does not fit this version of the code: {jax.tree_util.keystr(path)}")
        leaves.append(jax.make_array_from_process_local_data(x.sharding, value, x.shape))
    return treedef.unflatten(leaves)


def settings_on_resume(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """The settings of a checkpoint, with those given now that may change. Raises ValueError for others that differ."""
    before = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    differ = {name: value for name, value in given.items() if value != getattr(before, name)}
    if wrong := [f"--{name.replace('_', '-')} is {value} but was {getattr(before, name)}"
                 for name, value in differ.items() if name not in MAY_CHANGE]:
        raise ValueError(f"cannot resume with other settings: {'; '.join(wrong)}")
    if differ.get("meta_steps", before.meta_steps) < before.meta_steps:
        raise ValueError(f"--meta-steps {differ['meta_steps']}: can only grow on resuming, from {before.meta_steps}")
    return dataclasses.replace(before, **differ)


# ---------------------------------------------------------------------------------------------------------
# The run


def set_up_devices(pairs: int, devices: int | None) -> None:
    """Gives a CPU one XLA device for each core that divides the pairs; must come before JAX is first used.

    Each core then unrolls its own pairs and waits for the others once per meta-step: nearly twice as fast on two
    cores as one device whose every operation is split over both.
    """
    if devices_are_forced():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(devices, 256) if devices else largest_divisor(pairs, cores))


def devices_are_forced() -> bool:
    """Whether the environment says into how many XLA devices a CPU is divided."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def largest_divisor(pairs: int, limit: int) -> int:
    """The largest number up to the limit that divides the pairs."""
    return max(d for d in range(1, limit + 1) if pairs % d == 0)


def make_mesh(pairs: int, devices: int | None) -> Mesh:
    """All devices of all processes (or the first few) on one axis. ValueError if they do not divide the pairs."""
    everything = jax.devices()
    count = len(everything) if devices is None else devices
    if devices is None and not devices_are_forced() and everything[0].platform == "cpu" and jax.process_count() == 1:
        count = largest_divisor(pairs, count)  # a CPU has as many devices as we like
    if count > len(everything):
        raise ValueError(f"--devices {count}: there are only {len(everything)}")
    if pairs % count:
        below, above = pairs // count * count, (pairs // count + 1) * count
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"--pairs {pairs}: does not divide over {count} devices; use {nearest}")
    return Mesh(np.array(everything[:count]), ("pairs",))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A tree of arrays that every process holds, copied to each device of the mesh."""
    copies = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(copies, np.asarray(x), x.shape), tree)


def give_up(why: str) -> None:
    """Ends one of several processes at once: an orderly end would wait for the others, which cannot answer."""
    print(f"\nmeta_train.py: error: another process has died or hangs ({why}); start all of them again with --resume",
          file=sys.stderr, flush=True)
    os._exit(2)


def watch_for_stall(last_step: Callable[[], float | None], seconds: float) -> None:
    """Ends this process, in a thread, once no meta-step has been finished for that long: another process is gone.

    A collective operation would wait for a dead process without end. last_step: when the last meta-step was
    finished (time.monotonic()), or None before the first, which includes compilation.
    """
    def watch() -> None:
        while True:
            time.sleep(1)
            if (at := last_step()) is not None and time.monotonic() - at > seconds:
                give_up(f"no meta-step for {seconds:g} seconds")

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def stop_signals():
    """Collects SIGINT and SIGTERM in the list that it yields, so that a meta-step is never cut in two."""
    received: list[int] = []

    def on_signal(number, frame):
        if received:  # the second time at once
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(settings: Settings, inner_tasks: Sequence[tasks.Task], dataset: tasks.Dataset, mesh: Mesh, out: Out,
          first_theta: Tree | None, start: dict[str, np.ndarray] | None, record: dict[str, Any],
          checkpoint_every: tuple[float, str], stall_seconds: float) -> tuple[dict[str, Array], int]:
    """Meta-trains from a θ (None for a random one), or from the arrays of a checkpoint.

    record: what the checkpoints say of the run. Returns (θ, the signal that stopped it or 0).
    """
    init, meta_step = make_functions(settings, inner_tasks, mesh, first_theta)
    split = replicate(dataset.train, mesh)
    state = init()
    if start is not None:
        state = restore(start, state)
    step = int(state.meta_step)
    writes = out.process == 0
    need = 3 * out.save(state, record)
    if (free := shutil.disk_usage(out.folder).free) < need:
        raise ValueError(f"--out {out.folder}: {free:,} bytes are free there, but checkpoints need {need:,}")
    metrics_file = out.open_metrics(step) if writes else io.StringIO()
    every, unit = checkpoint_every
    saved_step, saved_time, finished, stop = step, time.monotonic(), time.monotonic(), 0
    pending: list[tuple[int, Metrics]] = []
    last_step: list[float | None] = [None]
    if out.processes > 1:
        watch_for_stall(lambda: last_step[0], stall_seconds)
    with stop_signals() as stopped, metrics_file, tqdm.tqdm(
            total=settings.meta_steps, initial=step, unit="meta-step", disable=not writes, smoothing=0.05,
            desc="compiling", dynamic_ncols=True) as bar:

        def write_row() -> None:
            nonlocal finished
            number, metrics = pending.pop(0)
            values = [float(x) for x in jax.device_get(metrics)]
            seconds, finished = time.monotonic() - finished, time.monotonic()
            last_step[0] = finished
            row = [number, *(f"{x:.9g}" for x in values[:-1]), int(values[-1]), f"{seconds:.4f}"]
            metrics_file.write(",".join(map(str, row)) + "\n")
            bar.set_description("meta-training", refresh=False)
            bar.set_postfix(meta_loss=f"{values[0]:.4f}", refresh=False)
            bar.update()

        def save() -> None:
            while pending:
                write_row()
            if writes:  # the rows first: a checkpoint's metrics must be there when it is
                metrics_file.flush()
                os.fsync(metrics_file.fileno())
            out.save(state, record)

        try:
            while step < settings.meta_steps and not (stop := signal_anywhere(stopped, out.processes)):
                state, metrics = meta_step(state, split)
                step += 1
                pending.append((step, metrics))
                if len(pending) > 2:  # two meta-steps in flight keep the devices busy while rows are written
                    write_row()
                elapsed = step - saved_step if unit == "steps" else (time.monotonic() - saved_time) / 60
                if elapsed >= every and step < settings.meta_steps:
                    save()
                    saved_step, saved_time = step, time.monotonic()
            save()
        except jax.errors.JaxRuntimeError as error:
            if out.processes == 1:
                raise
            give_up(first_line(error))
        finally:
            last_step[0] = None
    return lopt.theta_from_vector(state.theta), stop


def signal_anywhere(received: Sequence[int], processes: int) -> int:
    """The signal to stop that any process has received, or 0: all must stop after the same meta-step."""
    mine = received[0] if received else 0
    if processes == 1:
        return mine
    return int(np.max(multihost_utils.process_allgather(np.int32(mine))))


def fingerprint(dataset: tasks.Dataset) -> str:
    """A checksum of the shapes and of up to 64 MB of a training split, by which a resumed run knows its data."""
    inputs, labels = dataset.train
    head = np.asarray(inputs[:max(1, (1 << 26) // max(1, inputs[0].size))])
    digest = hashlib.sha256(f"{inputs.shape} {inputs.dtype}".encode())
    digest.update(head.tobytes())
    digest.update(np.asarray(labels).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# How good θ is


def report(settings: Settings, dataset: tasks.Dataset, theta: dict[str, Array], metadata: dict[str, Any],
           steps: int) -> str:
    """One table: the training loss after `steps` steps at the meta-training width and 16 times wider.

    Beside AdamW (SP) at its customary learning rate of 1e-3 and at the best of a grid, on the same batches from
    the same key. The loss is the mean over the last twentieth of the steps.
    """
    theta = jax.device_get(theta)
    rates = np.array([3e-4, 1e-3, 3e-3, 1e-2], np.float32)
    key = jax.random.key(settings.seed + 1)
    lines = [f"training loss after {steps} steps of batch size {settings.batch_size} on {dataset.name}:",
             f"{'width':>8}{'θ':>10}{'AdamW 1e-3':>14}{'AdamW tuned':>14}"]
    for width in (settings.widths[0], 16 * settings.widths[0]):
        task = make_task(settings, dataset, width, settings.depth, parametrization(settings))
        learned = lopt.learned_optimizer(theta, step_mult=metadata["step_mult"], exp_mult=metadata["exp_mult"],
                                         update_multipliers=task.update_multipliers,
                                         gradient_multiplier=task.gradient_multiplier)
        mine = jax.jit(lambda split: tasks.train(task, learned, split, key, steps)[1])(dataset.train)
        plain = make_task(settings, dataset, width, settings.depth, mup.SP)
        adam = jax.jit(jax.vmap(lambda rate, split: tasks.train(plain, lopt.adamw(rate), split, key, steps)[1],
                                (0, None)))(rates, dataset.train)
        tuned = [tasks.final_loss(losses) for losses in np.asarray(adam)]
        lines.append(f"{width:>8}{tasks.final_loss(np.asarray(mine)):>10.4f}{tuned[1]:>14.4f}{min(tuned):>14.4f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Command line


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: they raise ValueError."""

    def error(self, message: str):
        raise ValueError(message)


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which inner networks are trained, on what data: shared by both command lines."""
    flags = parser.add_argument_group("inner task")
    flags.add_argument("--task", choices=tasks.TASKS, help="the inner networks (default: mlp)")
    flags.add_argument("--dataset", choices=tasks.DATASETS, help="default: synthetic, which needs no files")
    flags.add_argument("--data-dir", metavar="DIR", help="where the data set's files are (default: data)")
    flags.add_argument("--download", action="store_true", default=None,
                       help="fetch cifar10 or fashion_mnist into --data-dir first")
    flags.add_argument("--image-size", type=int, metavar="S", help="shrink the images to S×S by averaging blocks")
    flags.add_argument("--vocab-size", type=int, metavar="V", help="token ids of data set tokens")
    flags.add_argument("--sequence-length", type=int, metavar="L", help="tokens of a sequence (default: 64)")
    flags.add_argument("--widths", type=int, nargs="+", metavar="W", help="widths of the inner networks")
    flags.add_argument("--depth", type=int, metavar="D", help="hidden layers, or transformer blocks (default: 3)")
    flags.add_argument("--heads", type=int, metavar="A", help="attention heads (default: head size 32)")
    flags.add_argument("--patch", type=int, metavar="P", help="side of a ViT's patches")
    flags.add_argument("--remat", action="store_true", default=None,
                       help="keep each transformer block's input only, and compute the rest again for the gradient")
    flags.add_argument("--batch-size", type=int, metavar="B", help="inner batch size (default: 64)")
    flags.add_argument("--matmul-precision", choices=("highest", "tensorfloat32", "bfloat16"),
                       help="of matrix products on a GPU (default: highest, that is float32)")


def make_parser() -> CommandLine:
    """The command line of meta-training. Flags without a value here take that of the preset."""
    parser = CommandLine(prog="meta_train.py", description=__doc__, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None,
                        help="settings to start from: laptop (default), or the paper's for one or three widths; flags "
                        "win over it")
    parser.add_argument("--parametrization", choices=("mup", "sp"), help="of the inner networks (default: mup)")
    parser.add_argument("--input-mult", type=float, metavar="c",
                        help="μP's multipliers, of the first layer (default: 1),")
    parser.add_argument("--output-mult", type=float, metavar="c",
                        help="of the logits (default: 16 (laptop), 1 (paper)),")
    parser.add_argument("--hidden-lr-mult", type=float, metavar="c",
                        help="and of the updates of hidden weights (default: 16 (laptop), 1 (paper))")
    parser.add_argument("--base-width", type=int, metavar="W",
                        help="multiply gradients by width/W before the learned optimizer sees them, so that its ε weigh "
                        "the same at all widths (default: 0, not at all, as in the paper)")
    add_task_flags(parser)
    flags = parser.add_argument_group("PES")
    flags.add_argument("--pairs", type=int, metavar="N", help="antithetic pairs of runs for each width (default: 8)")
    flags.add_argument("--truncation", type=int, metavar="K", help="inner steps of one meta-step (default: 50)")
    flags.add_argument("--sigma", type=float, metavar="σ", help="of the perturbations (default: 0.01)")
    flags.add_argument("--min-length", type=int, metavar="T", help="shortest inner run, in steps (default: 100)")
    flags.add_argument("--max-length", type=int, metavar="T", help="longest inner run, in steps (default: 1000)")
    flags.add_argument("--max-offset", type=int, metavar="T",
                       help="by which the first runs are shorter, at random (default: K); give the length where all "
                       "have the same")
    flags = parser.add_argument_group("meta-optimizer and learned optimizer")
    flags.add_argument("--meta-steps", type=int, metavar="M", help="default: 800 (laptop), 5000 (paper)")
    flags.add_argument("--learning-rate", type=float, metavar="η", help="after the warm-up (default: 3e-3)")
    flags.add_argument("--final-learning-rate", type=float, metavar="η",
                       help="at the end of the cosine (default: 1e-3)")
    flags.add_argument("--warmup-steps", type=int, metavar="M", help="default: 100")
    flags.add_argument("--weight-decay", type=float, metavar="λ", help="of θ (default: 1e-4)")
    flags.add_argument("--step-mult", type=float, metavar="c",
                       help="scale of all updates (default: 0.003 (laptop), 0.01 (paper), 0.001 in SP)")
    flags.add_argument("--exp-mult", type=float, metavar="c", help="scale of the log-magnitudes (default: 0.001)")
    flags.add_argument("--first-theta", metavar="FILE", help="begin with this θ (default: a random one)")
    flags.add_argument("--seed", type=int, metavar="S", help="decides everything that is random (default: 0)")
    flags = parser.add_argument_group("the run")
    flags.add_argument("--out", metavar="DIR",
                       help="folder for θ, metrics and checkpoints (default: a new one in runs/)")
    flags.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    flags.add_argument("--checkpoint-every", default="100", metavar="EVERY",
                       help="meta-steps, or minutes as in 10m (default: 100)")
    flags.add_argument("--report-steps", type=int, default=1000, metavar="T",
                       help="inner steps of the comparison with AdamW at the end, 0 for none (default: 1000)")
    flags.add_argument("--devices", type=int, metavar="D",
                       help="how many to use (default: all; on a CPU one for each core)")
    flags = parser.add_argument_group("many hosts")
    flags.add_argument("--distributed", action="store_true", help="one of several processes; the next three flags are "
                       "found by JAX itself on SLURM, Kubernetes and TPU pods")
    flags.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    flags.add_argument("--processes", type=int, metavar="P", help="how many there are")
    flags.add_argument("--process-id", type=int, metavar="I", help="which one this is")
    flags.add_argument("--stall-seconds", type=float, default=90, metavar="T",
                       help="without a meta-step, after which a process takes another for dead and ends (default: 90)")
    return parser


def parse_every(text: str) -> tuple[float, str]:
    """"100" → (100, "steps"), "10m" → (10, "minutes")."""
    try:
        every = (float(text[:-1]), "minutes") if text.endswith("m") else (int(text), "steps")
        if 0 < every[0] < float("inf"):
            return every
    except ValueError:
        pass
    raise ValueError(f"--checkpoint-every {text}: must be a number of meta-steps, or of minutes as in 10m")


def new_folder(name: str) -> pathlib.Path:
    """The first of runs/name-1, runs/name-2, … that is free."""
    numbers = (int(path.name.rsplit("-", 1)[1]) for path in pathlib.Path("runs").glob(f"{name}-*")
               if path.name.rsplit("-", 1)[1].isdigit())
    return pathlib.Path("runs", f"{name}-{max(numbers, default=0) + 1}")


def run(argv: Sequence[str] | None) -> int:
    """Parses, checks, trains, reports; returns the exit code. Raises ValueError for any bad input."""
    args = make_parser().parse_args(argv)
    fields = [field.name for field in dataclasses.fields(Settings)]
    preset = args.preset or "laptop"
    defaults = preset_settings(preset, args.parametrization or "mup")
    given = defaults if args.preset else {}
    given = given | {name: value for name in fields if (value := getattr(args, name)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = dataclasses.replace(Settings(), **defaults | given)
    check(settings)
    checkpoint_every = parse_every(args.checkpoint_every)
    if args.report_steps < 0:
        raise ValueError(f"--report-steps {args.report_steps}: must not be negative")
    if not args.stall_seconds > 0:
        raise ValueError(f"--stall-seconds {args.stall_seconds:g}: must be positive")
    if args.devices is not None and args.devices < 1:
        raise ValueError(f"--devices {args.devices}: must be at least 1")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the folder in which to go on")
    start_distributed(args, checkpoint_every)
    if not args.distributed:
        set_up_devices(settings.pairs, args.devices)
    jax.config.update("jax_default_matmul_precision", settings.matmul_precision)

    folder = args.out or new_folder(f"{preset}-{settings.parametrization}")
    resumable = args.resume and os.path.isdir(folder)
    out = start = None
    if resumable:
        out = Out(folder, resume=True)
        if newest := out.newest():
            step, start, record = newest
            settings = settings_on_resume(given, record["settings"])
            check(settings)
            jax.config.update("jax_default_matmul_precision", settings.matmul_precision)
    mesh = make_mesh(settings.pairs, args.devices)
    dataset = load_data(settings, args.download)
    first_theta = None
    if start is None:
        first_theta, origin = read_first_theta(settings)
        record = {"data": fingerprint(dataset), "origin": origin}
    elif record["data"] != fingerprint(dataset):
        raise ValueError(f"cannot resume: the training data of {dataset.name} are not those of the run in {folder}")
    record = record | {"settings": dataclasses.asdict(settings)}
    inner_tasks = [make_task(settings, dataset, width, settings.depth, parametrization(settings))
                   for width in settings.widths]
    out = out or Out(folder, args.resume)  # everything else has been checked before the first file is written
    began = time.monotonic()
    if out.process == 0:
        print(f"meta-training a {'μLO' if settings.parametrization == 'mup' else 'SP LO'} on {dataset.name}, widths "
              f"{' '.join(map(str, settings.widths))}, {settings.pairs} pairs each, on {mesh.devices.size} "
              f"{jax.devices()[0].platform} device(s); output in {folder}" +
              (f"; beginning with {settings.first_theta}" if first_theta is not None else "") +
              (f"; going on after meta-step {step}" if start is not None else ""))
    try:
        theta, stopped = train(settings, inner_tasks, dataset, mesh, out, first_theta, start, record,
                               checkpoint_every, args.stall_seconds)
    except OSError as error:
        raise ValueError(f"{out.metrics_path}: cannot be written ({error.strerror}); the last checkpoint is whole, "
                         "free some space and go on with --resume") from None
    if stopped:
        print(f"stopped; go on with: python meta_train.py --out {folder} --resume", file=sys.stderr)
        return 128 + stopped
    if out.process == 0:
        metadata = {"step_mult": step_mult(settings), "exp_mult": settings.exp_mult,
                    "parametrization": settings.parametrization,
                    **{name: getattr(settings, name) for name in OF_PARAMETRIZATION},
                    "settings": dataclasses.asdict(settings), "origin": record.get("origin")}
        lopt.save_theta(out.folder / "theta.npz", jax.device_get(theta), **metadata)
        print(f"wrote {out.folder / 'theta.npz'} after {(time.monotonic() - began) / 60:.1f} minutes")
        if args.report_steps:
            print(f"comparing θ with AdamW on {args.report_steps} steps of training", flush=True)
            print(report(settings, dataset, theta, metadata, args.report_steps), flush=True)
    return 0


def start_distributed(args: argparse.Namespace, checkpoint_every: tuple[float, str]) -> None:
    """Joins the processes of a run on many hosts, if asked to. Raises ValueError for flags that do not go together."""
    flags = (args.coordinator, args.processes, args.process_id)
    if not args.distributed:
        if any(flag is not None for flag in flags):
            raise ValueError("--coordinator, --processes and --process-id need --distributed")
        return
    if any(flag is None for flag in flags) and any(flag is not None for flag in flags):
        raise ValueError("--coordinator, --processes and --process-id go together")
    if not args.out:
        raise ValueError("--distributed needs --out, so that all processes name the same run")
    if checkpoint_every[1] == "minutes":
        raise ValueError("--checkpoint-every in minutes does not go with --distributed: give meta-steps, at which all "
                         "agree")
    if args.processes is not None and not 0 <= args.process_id < args.processes:
        raise ValueError(f"--process-id {args.process_id}: must be between 0 and --processes {args.processes} minus 1")
    try:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed: cannot join the other processes ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def run_command(run: Callable[[Sequence[str] | None], int], name: str, argv: Sequence[str] | None) -> int:
    """Runs a command line: bad input, lack of memory and Ctrl-C become one line on stderr, and exit code 2 (130)."""
    try:
        return run(argv)
    except ValueError as error:
        print(f"{name}: error: {first_line(error)}", file=sys.stderr)
    except OSError as error:
        print(f"{name}: error: {error.filename or 'input or output'}: {error.strerror or first_line(error)}",
              file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{name}: error: not enough memory for these sizes ({first_line(error)}); use smaller ones",
              file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run_command(run, "meta_train.py", None))
