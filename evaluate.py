"""Evaluation: what learned optimizers and tuned baselines reach, far from what was meta-trained on.

    python evaluate.py --theta results/mulo_m.npz results/lo_m.npz --baselines adamw muadam \\
        --sweep width --widths 32 128 512 --out runs/width --plot    a table, a CSV and a figure
    python evaluate.py --reproduce --plot    every table and figure of results/, in runs/reproduced
    python evaluate.py --reproduce width     one of them
    python evaluate.py --reproduce quick     a small part, in minutes and without data to fetch

A *contender* is an optimizer with its parametrization: a θ, which has nothing to tune but, with
--tune-theta, multipliers that μP leaves free, or a baseline: AdamW in the standard parametrization
(SP), with or without weight decay and a cosine, or μAdam, that is Adam in μP. All of them train from
the same keys, hence on the same batches and, in one parametrization, from the same initial weights.
What is tuned is tuned by the training loss under other keys; no test data decide anything here (the
decays of the θ for long runs were chosen by them: results/README.md, "Horizon").

A run has diverged when its final training loss is not finite or above 1.5 ln(classes); guessing has
ln(classes).

OUT/NAME.partial.jsonl keeps all results until the CSV is written: an evaluation that was killed
before goes on when the same command is given again. The figure comes last; if it cannot be drawn,
that is a warning, and the exit code is still 0.

Sources: μLO (arXiv 2406.00153) for the experiments; TP5 = "Tensor Programs V" (arXiv 2203.03466)
for μAdam, what is tuned of it, and the coordinate check.

Dimensions: S seeds, T steps.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, PartitionSpec

import lopt
import mup
import tasks
from mup import Array, Tree
from tasks import setting

Row = dict[str, Any]  # words and numbers by column: inf if it diverged, nan if there is none
Rows = dict[str, list[Row]]  # of each table: "table" (and "curves" of the horizon), or "check"
TaskIn = Callable[[mup.Parametrization], tasks.Task]  # the task of one size, in any parametrization
MakeOptimizer = Callable[[int], lopt.Optimizer]  # a function of the planned number of steps


class Size(NamedTuple):
    """The width and depth of a network, and the steps of its training."""
    width: int
    depth: int
    steps: int


# --------------------------------------------------------------------------------------------------
# Contenders


class Hyper(NamedTuple):
    """What is tuned of a contender: its learning rate and weight decay, and the multipliers that μP
    leaves free."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    input_mult: float = 1.0
    output_mult: float = 1.0
    hidden_lr_mult: float = 1.0


class Contender(NamedTuple):
    """An optimizer in its parametrization: a baseline, or a learned one.

    make(task, hyper, num_steps) → the optimizer of a run of so many steps. start: where tuning
    begins. factors: {field of `Hyper`: ratio of neighbours on its grid}, in tuning order; the
    multipliers among them are factors of the parametrization's own. learned: the θ, if it has one.
    """
    name: str
    parametrization: mup.Parametrization
    make: Callable[[tasks.Task, Hyper, int], lopt.Optimizer]
    start: Hyper = Hyper()
    factors: dict[str, float] = {}
    learned: lopt.Learned | None = None

    def on(self, task_in: TaskIn, hyper: Hyper) -> tuple[tasks.Task, MakeOptimizer]:
        """The task in the contender's parametrization, and the contender's optimizer there."""
        own = self.parametrization
        task = task_in(own._replace(**{field: getattr(own, field) * getattr(hyper, field)
                                       for field in self.factors if field in own._fields}))
        return task, functools.partial(self.make, task, hyper)


def adam(task: tasks.Task, hyper: Hyper, num_steps: int, cosine: bool = False) -> lopt.Optimizer:
    """AdamW, in μP μAdam. cosine: its learning rate falls to 0 by a cosine over the run."""
    rate = lopt.warmup_cosine(initial=0.0, peak=hyper.learning_rate, final=0.0, warmup_steps=0,
                              decay_steps=num_steps) if cosine else hyper.learning_rate
    return lopt.adamw(rate, weight_decay=hyper.weight_decay,
                      update_multipliers=task.update_multipliers)


def of_theta(learned: lopt.Learned, cooldown: float, task: tasks.Task, hyper: Hyper,
             num_steps: int) -> lopt.Optimizer:
    """A learned optimizer whose updates fall to 0 over the last share `cooldown` of the run."""
    optimizer = tasks.optimizer_for(task, learned, num_steps)
    return lopt.with_cooldown(optimizer, num_steps, cooldown)


# μAdam multiplies hidden updates by hidden_lr_mult/fan_in, so its hidden_lr_mult is about a width.
WITH_DECAY = dict(start=Hyper(1e-3, 0.1), factors={"learning_rate": 2.0, "weight_decay": 4.0})
BASELINES = {contender.name: contender for contender in (
    Contender("adamw", mup.SP, adam, factors={"learning_rate": 2.0}),
    Contender("adamw_decay", mup.SP, adam, **WITH_DECAY),
    Contender("adamw_cosine", mup.SP, functools.partial(adam, cosine=True), **WITH_DECAY),
    Contender("muadam", mup.MUP, adam, start=Hyper(8e-3, 0.0, 1.0, 16.0, 16.0),
              factors={"learning_rate": 2.0, "hidden_lr_mult": 4.0, "output_mult": 4.0,
                       "input_mult": 2.0}))}


def load_contenders(settings: "Settings") -> list[Contender]:
    """The θ of the settings, then the baselines.

    A θ has the name of its file, or its path where another has that name. Raises ValueError where
    the multipliers of θ in μP are to be tuned and there is none.
    """
    stems, contenders = [pathlib.Path(path).stem for path in settings.theta], []
    in_place = {name: value for name in ("step_mult", "decay")  # of θ's own
                if (value := getattr(settings, name)) is not None}
    for path, stem in zip(settings.theta, stems):
        learned = lopt.load(path)._replace(**in_place)
        if "published" in learned.made:
            print(f"{path}: {learned.made['published']}", file=sys.stderr)
        name = stem if [*stems, *settings.baselines].count(stem) == 1 else path
        is_mup = learned.parametrization.name == "mup"
        contenders.append(Contender(
            name, learned.parametrization, functools.partial(of_theta, learned, settings.cooldown),
            factors=dict.fromkeys(settings.tune_theta if is_mup else (), 2.0), learned=learned))
    if settings.tune_theta and not any(contender.factors for contender in contenders):
        raise ValueError(f"--tune-theta {' '.join(settings.tune_theta)}: there is no --theta in μP "
                         "to be tuned")
    return contenders + [BASELINES[name] for name in settings.baselines]


# --------------------------------------------------------------------------------------------------
# Training many seeds at once


def seed_keys(key: Array, seeds: int) -> Array:
    """One key for each seed [S]; seed i has the same one however many there are."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(seeds))


def compiled(contender: Contender, task_in: TaskIn, steps: int,
             seeds: int) -> tuple[Callable, Callable]:
    """(train, test) of one contender on networks of one size, compiled for all hyperparameters.

    train(hyper, keys [S], split) → (params [S, …], losses [S, T]); test(hyper, params, split) →
    (losses [S], accuracies [S]).
    """
    def train(hyper: Hyper, key: Array, split: tasks.Split) -> tuple[Tree, Array]:
        task, make_optimizer = contender.on(task_in, hyper)
        return tasks.train(task, make_optimizer, split, key, steps)

    def test(hyper: Hyper, params: Tree, split: tasks.Split) -> tuple[Array, Array]:
        task, _ = contender.on(task_in, hyper)
        return task.test(params, split)

    return over_seeds(train, seeds), over_seeds(test, seeds)


# --------------------------------------------------------------------------------------------------
# Tuning


def neighbour(hyper: Hyper, field: str, ratio: float) -> Hyper:
    """The next point of the grid along a field, to six digits: the way back ends where it began."""
    return hyper._replace(**{field: float(f"{getattr(hyper, field) * ratio:.6g}")})


def tune(loss_of: Callable[[Hyper], float], start: Hyper, factors: dict[str, float],
         rounds: int = 3) -> Hyper:
    """The best point of a grid without ends, by a walk along one field of `Hyper` after the other.

    The walk goes to the neighbour, one factor up or down, for as long as that is better, so that it
    brackets an optimum, however far, unless the start and its neighbours are all without a finite
    loss. Rounds over all fields end when one changes nothing. loss_of must give inf, not nan.
    """
    loss_of, best = functools.cache(loss_of), start
    for _ in range(rounds):
        before = best
        for field, factor in factors.items():
            for ratio in (factor, 1.0 / factor):
                while loss_of(neighbour(best, field, ratio)) < loss_of(best):
                    best = neighbour(best, field, ratio)
        if best == before:
            break
    return best


def hyperparameters(contender: Contender, how: str, sizes: Sequence[Size],
                    loss_at: Callable[[Size, Hyper], float]) -> Iterator[dict[str, Hyper]]:
    """For each size in turn, the hyperparameters to be compared there, by how they were tuned.

    "transfer": all fields, at the first size, then kept, as μP intends. "per-width": the same, and
    learning rate and weight decay again at each further size, beginning with the best of the size
    before, where the contender has them. "both". "none": the start. "-": there is nothing to tune.
    """
    first = latest = None
    again = {field: factor for field, factor in contender.factors.items()
             if field in ("learning_rate", "weight_decay")}
    if how != "none" and not again:
        how = "transfer"
    for size in sizes:
        loss_of = functools.partial(loss_at, size)
        if how == "none" or not contender.factors:
            yield {"none" if contender.factors else "-": contender.start}
            continue
        if first is None:
            first = latest = tune(loss_of, contender.start, contender.factors)
        elif how != "transfer":
            latest = tune(loss_of, latest, again)
        both = {"transfer": first, "per-width": latest}
        yield both if how == "both" else {how: both[how]}


# --------------------------------------------------------------------------------------------------
# Sweeps

# sweep: the settings that it has where none are given
SWEEPS = {"width": dict(widths=(32, 128, 512), steps=1000),
          "depth": dict(widths=(32,), steps=1000, depths=(3, 6, 12, 16)),
          "horizon": dict(widths=(32,), lengths=(1000, 5000, 25000)),
          "coordinate-check": dict(widths=(32, 128, 512), steps=500)}
CURVE_POINTS = 200
ROUNDING = 1e-6  # a change below this part of the pre-activations is float32's rounding
COUNT = dict(low=1, high=10_000_000)


@dataclasses.dataclass(frozen=True)
class Settings(tasks.TaskSettings):
    """Everything that decides the results; the flag of each is made from its field."""
    theta: tuple[str, ...] = setting((), "θ as meta_train.py writes it; may be given several times",
                                     metavar="FILE")
    baselines: tuple[str, ...] = setting((), "adamw: AdamW in SP, without weight decay; "
                                         "adamw_decay: with it; adamw_cosine: also with a cosine "
                                         "to 0; muadam: Adam in μP", choices=tuple(BASELINES))
    step_mult: float | None = setting(None, "factor of all updates of a θ, in place of the θ's own",
                                      above=0, below=1e18, metavar="c")
    decay: float | None = setting(None, "share of the weights that each update of a θ takes away, "
                                  "in place of the θ's own", low=0, below=1, metavar="λ")
    cooldown: float = setting(0.0, "share of each run over whose end the updates of a θ fall to 0",
                              low=0, high=1, metavar="SHARE")
    tune_theta: tuple[str, ...] = setting((), "multipliers to be tuned of each θ in μP, too, at the "
                                          "first width, depth and length: factors of its own",
                                          choices=("input_mult", "output_mult", "hidden_lr_mult"))
    sweep: str = setting("width", "what varies; horizon: the length of the runs",
                         choices=tuple(SWEEPS))
    depths: tuple[int, ...] | None = setting(None, "for the depth sweep (3 6 12 16 if not given)",
                                             metavar="D", **COUNT)
    steps: int | None = setting(None, "inner steps, in all sweeps but horizon (1000 if not given, "
                                "coordinate-check 500)", metavar="T", **COUNT)
    lengths: tuple[int, ...] | None = setting(None, "in steps, for the horizon sweep (1000 5000 "
                                              "25000 if not given)", metavar="T", **COUNT)
    seeds: int = setting(3, "inner runs of each optimizer", metavar="S", **COUNT)
    tune: str = setting("transfer", "baselines at the first width, depth and length, for all; "
                        "per-width: their learning rate and weight decay at each; both: both ways; "
                        "none: as they are, not tuned",
                        choices=("transfer", "per-width", "both", "none"))
    tune_steps: int | None = setting(None, "inner steps of tuning (those of the run if not given)",
                                     metavar="T", **COUNT)
    tune_seeds: int | None = setting(None, "inner runs of tuning (--seeds if not given)",
                                     metavar="S", **COUNT)

    @property
    def sizes(self) -> list[Size]:
        """The sizes in the order in which networks of them are trained."""
        return [Size(width, depth, steps)
                for depth in self.depths for width in self.widths for steps in self.lengths]


class Job(NamedTuple):
    """One contender on networks of one size, in runs of so many steps.

    programs(steps, seeds) → (train, test) of `compiled`, each made once for all hyperparameters.
    """
    settings: Settings
    dataset: tasks.Dataset
    contender: Contender
    steps: int
    task_in: TaskIn
    programs: Callable[[int, int], tuple[Callable, Callable]]


def keys_of(settings: Settings) -> tuple[Array, Array]:
    """(the keys [S] under which contenders are measured, those under which they are tuned)."""
    measuring, tuning = jax.random.split(jax.random.key(settings.seed))
    return seed_keys(measuring, settings.seeds), seed_keys(tuning, settings.tune_seeds)


def or_inf(x: Any) -> float:
    """A number as a float, inf where it is not finite."""
    return float(x) if np.isfinite(x) else math.inf


def after_training(job: Job, hyper: Hyper) -> Rows:
    """The losses of all seeds at the end, in training and in a test; their curve over a horizon."""
    train, test = job.programs(job.steps, job.settings.seeds)
    params, losses = train(hyper, keys_of(job.settings)[0], job.dataset.train)
    losses, max_loss = np.asarray(losses), job.task_in(mup.SP).max_loss
    row = summary(losses, max_loss)
    if job.dataset.test is not None and not row["diverged"]:
        test_losses, accuracies = test(hyper, params, job.dataset.test)
        row |= {"test_loss": or_inf(np.mean(test_losses)),
                "test_accuracy": or_inf(np.mean(accuracies))}
    curves = {"curves": smooth(losses, max_loss)} if job.settings.sweep == "horizon" else {}
    return {"table": [row], **curves}


def summary(losses: np.ndarray, max_loss: float) -> Row:
    """The row of runs with losses [S, T]: mean and standard deviation of their final losses.

    The deviation is that of these S runs from their mean, √(mean of squares); one run has none. If
    any has diverged, the mean is inf, and there is none.
    """
    final = tasks.final_loss(losses)
    diverged = int(np.sum(~(final <= max_loss)))  # nan counts, too
    mean = math.inf if diverged else float(final.mean())
    std = math.nan if diverged or len(losses) == 1 else float(final.std())
    return {"seeds": len(losses), "diverged": diverged, "loss": mean, "std": std}


def smooth(losses: np.ndarray, max_loss: float) -> list[Row]:
    """The mean over seeds of losses [S, T], in about CURVE_POINTS equal pieces, by their last step.

    A piece whose mean is above max_loss has diverged.
    """
    width = math.ceil(losses.shape[1] / CURVE_POINTS)
    pieces = [losses[:, start:start + width] for start in range(0, losses.shape[1], width)]
    means = [float(np.mean(piece)) for piece in pieces]
    return [{"step": int(step), "loss": mean if mean <= max_loss else math.inf}
            for step, mean in zip(np.cumsum([piece.shape[1] for piece in pieces]), means)]


def pre_activations(job: Job, hyper: Hyper) -> Rows:
    """TP5's coordinate check: how large each layer's pre-activations are after 1, 10, … and all
    steps, and how far they have moved since initialisation: root mean squares (RMS) over seeds."""
    settings, steps = job.settings, job.steps
    marks = sorted({steps, *(10**i for i in range(len(str(steps))))})

    def check(hyper: Hyper, key: Array, split: tasks.Split) -> dict[str, tuple[Array, Array]]:
        task, make_optimizer = job.contender.on(job.task_in, hyper)
        return tasks.coordinate_check(task, make_optimizer, split, key, marks)

    layers = over_seeds(check, settings.seeds)(hyper, keys_of(settings)[0], job.dataset.train)
    rows = []
    for layer, squares in layers.items():
        # [S, marks] → [marks]
        rms, change = (np.sqrt(np.mean(np.asarray(x), axis=0)) for x in squares)
        rows += [{"layer": layer, "step": mark, "rms": or_inf(x),
                  "rms_change": 0.0 if moved < ROUNDING * x else or_inf(moved)}
                 for mark, x, moved in zip(marks, rms, change)]
    return {"check": rows}


OVER_WIDTHS = ("optimizer", "tuned", "layer", "step")  # a coordinate check compares widths


def sweep(settings: Settings, dataset: tasks.Dataset, contender: Contender,
          remember: Callable[[Callable], Callable]) -> Iterator[Rows]:
    """Tunes one contender and measures it: the rows of each size in turn.

    remember: wraps the two functions that train, so that nothing is trained twice.
    """
    @functools.lru_cache(maxsize=1)  # frees the memory of one size before the next
    def job_at(size: Size) -> Job:
        task_in = functools.partial(tasks.task_of, settings, dataset, size.width, size.depth)
        programs = functools.cache(functools.partial(compiled, contender, task_in))
        return Job(settings, dataset, contender, size.steps, task_in, programs)

    @remember
    def tuning(size: Size, hyper: Hyper) -> float:  # the training loss, under keys of its own
        train, _ = job_at(size).programs(settings.tune_steps or size.steps, settings.tune_seeds)
        _, losses = train(hyper, keys_of(settings)[1], dataset.train)
        return or_inf(tasks.final_loss(np.asarray(losses)).mean())

    @remember
    def measuring(size: Size, hyper: Hyper) -> Rows:
        if settings.sweep == "coordinate-check":
            return pre_activations(job_at(size), hyper)
        return after_training(job_at(size), hyper)

    choices_at = hyperparameters(contender, settings.tune, settings.sizes, tuning)
    for size, choices in zip(settings.sizes, choices_at):
        rows: Rows = {}
        for tuned, hyper in choices.items():
            known = {"optimizer": contender.name, "tuned": tuned, **size._asdict()}
            known |= {field: getattr(hyper, field) for field in contender.factors}
            for kind, measured in measuring(size, hyper).items():
                rows.setdefault(kind, []).extend(known | row for row in measured)
        yield rows


def groups(rows: list[Row], *columns: str) -> dict[tuple, list[Row]]:
    """The rows by what they have in some columns, in order of appearance."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[column] for column in columns), []).append(row)
    return grouped


def add_slopes(rows: list[Row]) -> None:
    """Adds to a coordinate check the slope of each change over the widths; in μP it is 0."""
    for group in groups(rows, *OVER_WIDTHS).values():
        changes = np.array([row["rms_change"] for row in group])
        changes[np.isinf(changes)] = np.nan
        slope = float(tasks.slope([row["width"] for row in group], changes))
        for row in group:
            row["slope"] = slope


# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ waterline: the paper above, the machine below ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~


def over_seeds(function: Callable, seeds: int) -> Callable:
    """Jits function(hyper, tree of one seed, split) for trees of S seeds, shared among devices.

    A device takes its seeds one by one on a CPU, where the state of one stays in the cache (1.3 to
    1.6 times as fast), on an accelerator side by side. The first seeds fill up the last share.
    """
    share = math.ceil(seeds / len(jax.devices()))
    count = math.ceil(seeds / share)
    mesh = Mesh(np.array(jax.devices()[:count]), ("seeds",))
    everywhere, by_seed = PartitionSpec(), PartitionSpec("seeds")

    def on_device(hyper: Hyper, trees: Tree, split: tasks.Split) -> Tree:
        at_once = None if jax.default_backend() == "cpu" else share
        return jax.lax.map(lambda tree: function(hyper, tree, split), trees, batch_size=at_once)

    def over_all(hyper: Hyper, trees: Tree, split: tasks.Split) -> Tree:
        full = jax.tree.map(lambda x: jnp.concatenate([x, x[:count * share - seeds]]), trees)
        spread = jax.shard_map(on_device, mesh=mesh, check_vma=False, out_specs=by_seed,
                               in_specs=(everywhere, by_seed, everywhere))
        return jax.tree.map(lambda x: x[:seeds], spread(hyper, full, split))

    return jax.jit(over_all)


# --------------------------------------------------------------------------------------------------
# Tables and CSV: only here does a number become text

COLUMNS = {"table": ("optimizer", "tuned", "width", "depth", "steps", "seeds", "diverged", "loss",
                     "std", "test_loss", "test_accuracy", *Hyper._fields),
           "curves": ("optimizer", "tuned", "width", "depth", "steps", "step", "loss"),
           "check": ("optimizer", "tuned", "depth", "layer", "step", "width", "rms", "rms_change",
                     "slope", *Hyper._fields)}
WORDS = ("optimizer", "tuned", "layer")
FORMATS = dict.fromkeys(("rms", "rms_change", *Hyper._fields), ".4g") | {"slope": "+.3f"}


def cell(row: Row, column: str) -> str:
    """A value of a row as text: "diverged" for inf, "-" for nan and for what is absent."""
    value = row.get(column, math.nan)
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value):
        return format(value, FORMATS.get(column, ".4f"))
    return "-" if math.isnan(value) else "diverged"


def table(rows: list[Row], columns: Sequence[str] = COLUMNS["table"]) -> str:
    """The rows as text, aligned: columns of words to the left, of numbers to the right."""
    lines = [list(columns), *([cell(row, column) for column in columns] for row in rows)]
    aligns = ["<" if column in WORDS else ">" for column in columns]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{text:{a}{w}}" for text, a, w in zip(line, aligns, widths))
                     for line in lines)


def check_table(rows: list[Row]) -> str:
    """A coordinate check as text: the RMS change at each width, side by side, and the slope."""
    lines = [group[0] | {f"width {row['width']}": cell(row, "rms_change") for row in group}
             for group in groups(rows, *OVER_WIDTHS).values()]
    widths = [column for column in lines[0] if column.startswith("width ")]
    return ("RMS change of the pre-activations:\n" +
            table(lines, ("optimizer", "tuned", "layer", "step", *widths, "slope")))


def write_csv(path: pathlib.Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Writes the rows' cells in these columns, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(row, column) for column in columns] for row in rows)
    lopt.write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def read_csv(path: pathlib.Path) -> list[Row]:
    """The rows of a CSV, as numbers again."""
    def value(column: str, text: str) -> str | int | float:
        if column in WORDS:
            return text
        if text in ("-", "diverged"):
            return math.nan if text == "-" else math.inf
        return int(text) if text.isdigit() else float(text)

    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [{column: value(column, text) for column, text in row.items()}
                for row in csv.DictReader(file)]


# --------------------------------------------------------------------------------------------------
# Figures

# sweep: (x, y, what makes a panel, what makes a line)
FIGURES = {"width": ("width", "loss", ("depth",), ("optimizer", "tuned")),
           "depth": ("depth", "loss", ("width",), ("optimizer", "tuned")),
           "horizon": ("steps", "loss", ("width",), ("optimizer", "tuned")),
           "coordinate-check": ("width", "rms_change", ("optimizer", "tuned", "layer"), ("step",))}
# how figures call the shipped θ, the baselines, and the ways of tuning
NAMES = {"mulo_m": "μLO_M", "mulo_m_128": "μLO_M, base width 128", "mulo_m_long": "μLO_M, planned",
         "mulo_m_1": "μLO_M, seed 1", "mulo_m_128_1": "μLO_M, base width 128, seed 1",
         "mulo_m_long_1": "μLO_M, planned, seed 1", "lo_m": "LO_M (SP)",
         "lo_m_long": "LO_M (SP), planned", "mulo_s": "μLO_S", "lo_s": "LO_S (SP)",
         "mulo_s_1024": "μLO_S, batches of 1,024", "lo_s_1024": "LO_S (SP), batches of 1,024",
         "velo_mup": "μVeLO", "velo_sp": "VeLO (SP)", "mulo_laptop": "μLO", "adamw": "AdamW",
         "adamw_decay": "AdamW, constant", "adamw_cosine": "AdamW, cosine", "muadam": "μAdam",
         "transfer": "tuned at the first, transferred", "per-width": "tuned at each"}


def label(words: Sequence[Any], separator: str = ", ") -> str:
    """Words for matplotlib, where $ then begins no formula."""
    words = [NAMES.get(word, word) if isinstance(word, str) else f"{word:g}" for word in words]
    text = separator.join(word for word in words if word != "-")
    return text.encode(errors="replace").decode().replace("$", r"\$")


def widths_of_meta_training(contenders: Sequence[Contender]) -> list[int]:
    """The narrowest and the widest network of meta-training, of all θ and those that they began
    with; empty if none is known, and where θ saw further tasks, which have widths of their own."""
    made, found = [one.learned.made for one in contenders if one.learned is not None], []
    for one in made:  # which grows
        settings = one.get("settings", {})
        if settings.get("also"):
            return []
        found += settings.get("widths", [])
        if "origin" in one:
            made.append(one["origin"])
    return [min(found), max(found)] if found else []


def draw_lines(axis: Any, lines: dict[tuple, list[Row]], x: str, y: str) -> None:
    """Draws the lines of one panel; what diverged is a × at its top."""
    for i, (name, rows) in enumerate(lines.items()):
        color, at = f"C{i % 10}", [row[x] for row in rows]
        values = [math.nan if math.isinf(row[y]) else row[y] for row in rows]
        axis.errorbar(at, values, [row.get("std", 0.0) for row in rows], label=label(name),
                      color=color, linewidth=1.2, marker="o", markersize=3, capsize=2)
        gone = [row[x] for row in rows if math.isinf(row[y])]
        axis.plot(gone, [0.98 - 0.03 * i] * len(gone), "x", color=color,
                  transform=axis.get_xaxis_transform())


def name_lines(axis: Any, lines: dict[tuple, list[Row]], y: str) -> None:
    """Writes the name of each line of a panel where it ends, one below the other."""
    bottom, top = axis.get_ylim()
    # at its last finite value; a line without one is named at the top
    ends = [([top, *(row[y] for row in rows if math.isfinite(row[y]))][-1], f"C{i % 10}", name)
            for i, (name, rows) in enumerate(lines.items())]
    gap, below = 0.055 * (top - bottom), math.inf
    for still, (end, color, name) in zip(range(len(ends))[::-1],
                                         sorted(ends, key=lambda end: -end[0])):
        below = max(min(end, below - gap), bottom + gap * still)  # room for those still to come
        axis.annotate(label(name), (1, below), (5, 0), ("axes fraction", "data"), "offset points",
                      color=color, va="center", fontsize=8, annotation_clip=False)


def figure(sweep: str, rows: list[Row], title: str, known: Sequence[int] = ()) -> bytes:
    """The PNG of a sweep's rows. known: widths of meta-training, the narrowest and the widest."""
    import matplotlib.figure

    x, y, by_panel, by_line = FIGURES[sweep]
    rows = sorted(rows, key=lambda row: row[x])  # lines go from left to right
    check, panels = sweep == "coordinate-check", groups(rows, *by_panel)
    across = len(groups(rows, "layer")) if check else min(3, len(panels))
    down, inches = math.ceil(len(panels) / across), 2.2 if check else 4.5
    size = max(6, inches * across) + (0 if check else 2), inches * down + 1
    drawing = matplotlib.figure.Figure(size, dpi=120, layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    ticks = sorted({int(row[x]) for row in rows})
    scale = "log" if check and any(0 < row[y] < math.inf for row in rows) else "linear"
    for axis, (name, group) in zip(axes, panels.items()):
        lines = groups(group, *by_line)
        draw_lines(axis, lines, x, y)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set_yscale(scale)
        axis.set_title(label(name, "\n") if check else label((*by_panel, *name), " "), fontsize=7)
        axis.grid(alpha=0.3)
        if sweep == "width" and known:
            axis.axvspan(known[0] / 1.1, known[1] * 1.1, color="gray", alpha=0.15, linewidth=0)
            axis.annotate("widths of meta-training", (known[0], 0), (3, 4),
                          ("data", "axes fraction"), "offset points", fontsize=7)
    for axis in axes[len(panels):]:
        axis.remove()
    for axis in axes[len(panels) - across:len(panels)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    if check:
        axes[0].legend(fontsize=7, title="step", title_fontsize=7)
    else:  # in the last panel; all have the same colours
        name_lines(axes[len(panels) - 1], lines, y)
    drawing.suptitle(f"{title} (×: diverged)", fontsize=9)
    drawing.supxlabel(x, fontsize=9)
    drawing.supylabel("RMS change of pre-activations" if check else "training loss", fontsize=9)
    png = io.BytesIO()
    drawing.savefig(png, format="png")
    return png.getvalue()


# --------------------------------------------------------------------------------------------------
# What an evaluation has measured so far


# how a journal calls what differs and is no setting
OTHER = {"data": "another data set", "checksums": "another θ in a file of the same name"}


class Journal:
    """NAME.partial.jsonl: the results of an evaluation until its CSV is written.

    The first line is its settings, each further one [what was worked out, the result]. The file is
    removed on leaving the context, unless an error leaves results in it. Raises ValueError for a
    file of other settings, and for one that another process is writing.
    """

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        self.path, self.results = path, {}
        try:
            self.file = open(path, "a+b")
            lopt.take_lock(self.file)
            self.file.seek(0)
            whole, newline, _ = self.file.read().rpartition(b"\n")  # the last line may be cut off
            self.file.truncate(len(whole + newline))
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing there; choose another --out or "
                             "--name") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
        first, *lines = whole.split(b"\n")
        if not lines:  # nothing has been measured yet
            self.file.truncate(0)
            self.append(settings)
            return
        try:
            before, now = json.loads(first), json.loads(json.dumps(settings))
            self.results = {json.dumps(key): result for key, result in map(json.loads, lines)}
            wrong = [OTHER.get(name) or f"{tasks.flag(name)} {before[name]}, not {now[name]}"
                     for name in before | now if before[name] != now[name]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: is damaged, or of another version; move it away") from None
        if wrong:
            raise ValueError(f"{path}: holds results of other settings ({'; '.join(wrong)}); give "
                             "those to go on, or move it away")
        print(f"going on with the {len(lines)} results in {path}", file=sys.stderr)

    def append(self, line: Any) -> None:
        """Adds a line, which is on disk when this returns."""
        try:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()
            lopt.sync(self.file.fileno())
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}); free some space, "
                             "and the same command goes on") from None

    def remember(self, whose: str, tell: Callable[[str], None],
                 function: Callable) -> Callable:
        """The function, whose results are kept here. tell: is told what is being worked out."""
        def recalled(size: Size, hyper: Hyper) -> Any:
            key = [whose, function.__name__, size, hyper]
            if (name := json.dumps(key)) not in self.results:
                tell(f"{function.__name__} {whose} at width {size.width}, depth {size.depth}, "
                     f"{size.steps:,} steps")
                self.results[name] = function(size, hyper)
                self.append([key, self.results[name]])
            return self.results[name]

        return recalled

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, error: type | None, *_: Any) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told already
            self.file.close()
        if error is None or not self.results:
            self.path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The experiments of results/

# name of the outputs: the flags that make them; {results} holds the shipped θ, {data} the data sets
PAIR = "--theta {results}/mulo_m.npz {results}/lo_m.npz"
BASE_WIDTH = "{results}/mulo_m_128.npz"  # ours
THREE = f"{PAIR} {BASE_WIDTH}"
BOTH_MULO_M = f"--theta {{results}}/mulo_m.npz {BASE_WIDTH}"
PAIR_S = "{results}/mulo_s.npz {results}/lo_s.npz"
PAIR_1024 = "--theta {results}/mulo_s_1024.npz {results}/lo_s_1024.npz"  # their batch size
VELO = "--theta {results}/velo_mup.npz {results}/velo_sp.npz"  # on the synthetic data
CIFAR = "--dataset cifar10 --data-dir {data} --image-size 8"
VIT = f"--task vit --patch 2 {CIFAR}"
LM = "--task lm --dataset text --data-dir {data}/tinyshakespeare.txt --batch-size 16"
BOTH = "--baselines adamw muadam"
OTHER_TASKS = f"--theta {BASE_WIDTH} {BOTH} --tune per-width --tune-seeds 1 --seeds 2"
TUNED = (f"--theta {BASE_WIDTH} --tune-theta input_mult output_mult hidden_lr_mult --tune-seeds 4 "
         "--seeds 2")
THREE_WIDTHS = "--widths 32 128 512"
# ours: horizon, decay, cooldown, and larger updates
COOLDOWN = "--cooldown 0.3"
COOLED = f"{COOLDOWN} --baselines adamw_cosine --tune per-width"
PLANNED = ("--sweep horizon --theta {results}/mulo_m_long.npz {results}/lo_m_long.npz --seeds 5 "
           f"--lengths 1000 3000 10000 25000 {CIFAR}")
PLANNED_COOLED = (f"{PLANNED} {COOLDOWN} --baselines adamw_decay adamw_cosine --tune per-width "
                  "--tune-seeds 2")
LARGER_WIDTH = f"--sweep width --theta {BASE_WIDTH} {COOLDOWN} --step-mult 0.004 {CIFAR}"
LARGER = "--theta {results}/mulo_m_long.npz --step-mult 0.004"
LARGER_LO = "--theta {results}/lo_m_long.npz --step-mult 0.0013333"
LONG = f"--sweep horizon {COOLDOWN} {CIFAR} --seeds 5 --widths 128 512"
EXPERIMENTS = {
    "width": f"--sweep width {THREE} --baselines adamw {CIFAR} --tune both --tune-seeds 2 "
             "--seeds 5 --widths 32 64 128 256 512 1024 2048 4096",
    "width-cooldown": f"--sweep width {THREE} {COOLED} {CIFAR} --tune-seeds 2 --seeds 5 "
                      "--widths 32 64 128 256 512 1024 2048 4096",
    "width-step-mult": f"{LARGER_WIDTH} --seeds 5 --widths 32 64 128 256 512 1024 2048",
    "width-step-mult-4096": f"{LARGER_WIDTH} --seeds 3 --widths 4096",
    "width-others": f"--sweep width --theta {PAIR_S} {{results}}/mulo_m_long.npz "
                    f"--baselines muadam {CIFAR} --tune both --tune-seeds 2 --seeds 5 {THREE_WIDTHS}",
    "width-seeds": f"--sweep width {BOTH_MULO_M} --baselines adamw {CIFAR} --tune per-width "
                   f"--tune-seeds 2 --seed 1 --seeds 8 {THREE_WIDTHS}",
    "width-meta-seeds": f"--sweep width {BOTH_MULO_M} {{results}}/mulo_m_long.npz "
                        "{results}/mulo_m_1.npz {results}/mulo_m_128_1.npz "
                        f"{{results}}/mulo_m_long_1.npz {CIFAR} --seeds 5 {THREE_WIDTHS}",
    "width-synthetic": f"--sweep width {THREE} --baselines adamw --tune both --tune-seeds 2 "
                       f"--seeds 5 {THREE_WIDTHS}",
    "depth": f"--sweep depth {THREE} {BOTH} {CIFAR} --seeds 3 --widths 32 128",
    "depth-512": f"--sweep depth {THREE} {BOTH} {CIFAR} --seeds 3 --widths 512",
    "depth-vit": f"--sweep depth {VIT} {THREE} --baselines adamw --seeds 2 --depths 3 12 "
                 "--widths 128",
    "horizon": f"--sweep horizon {PAIR} {PAIR_S} --baselines adamw {CIFAR} --seeds 3 --widths 128",
    "horizon-1024": f"--sweep horizon {PAIR_1024} --baselines adamw {CIFAR} --batch-size 1024 "
                    "--tune-seeds 1 --seeds 2 --widths 32 128",
    "horizon-1024-on-64": f"--sweep horizon {PAIR_1024} {{results}}/mulo_s.npz {CIFAR} --seeds 5 "
                          "--widths 128",
    "horizon-planned": f"{PLANNED_COOLED} --widths 128",
    "horizon-512": f"{PLANNED_COOLED} --widths 512",
    "horizon-no-cooldown": f"{PLANNED} --widths 128 512",
    "horizon-decay": f"{LONG} --theta {{results}}/mulo_m_long.npz --decay 1.5e-3 "
                     "--lengths 3000 10000 25000",
    "horizon-step-mult": f"{LONG} {LARGER} --decay 1.2e-3 --lengths 3000 10000 25000",
    "horizon-step-mult-lo": f"{LONG} {LARGER_LO} --decay 1.2e-3 --lengths 25000",
    "horizon-step-mult-short": f"{LONG} {LARGER} --decay 1.8e-3 --lengths 3000 10000",
    "horizon-step-mult-short-lo": f"{LONG} {LARGER_LO} --decay 1.8e-3 --lengths 3000 10000",
    "pre-activations": f"--sweep coordinate-check {THREE} {CIFAR} --steps 500 --seeds 2 "
                       f"{THREE_WIDTHS}",
    "coordinate-check": f"--sweep coordinate-check --theta {PAIR_S} {{results}}/mulo_m.npz "
                        f"{BASE_WIDTH} {CIFAR} --steps 100 --seeds 2 "
                        "--widths 32 64 128 256 512 1024",
    "vit": f"--sweep width {VIT} {OTHER_TASKS} {THREE_WIDTHS}",
    "lm": f"--sweep width {LM} {OTHER_TASKS} {THREE_WIDTHS}",
    "vit-tuned": f"--sweep width {VIT} {TUNED} {THREE_WIDTHS}",
    "lm-tuned": f"--sweep width {LM} {TUNED} {THREE_WIDTHS}",
    "vit-cooldown": f"--sweep width {VIT} --theta {BASE_WIDTH} {COOLED} --tune-seeds 1 --seeds 2 "
                    f"{THREE_WIDTHS}",
    "lm-cooldown": f"--sweep width {LM} --theta {BASE_WIDTH} {COOLED} --tune-seeds 1 --seeds 2 "
                   f"{THREE_WIDTHS}",
    "velo": f"--sweep width {VELO} {{results}}/mulo_laptop.npz --baselines adamw --tune per-width "
            f"--seeds 2 {THREE_WIDTHS}",
    "velo-coordinate-check": f"--sweep coordinate-check {VELO} --steps 20 --seeds 2 "
                             "--widths 128 256 512 1024"}
QUICK = {"quick": f"--sweep width {THREE} --baselines adamw {THREE_WIDTHS} --steps 300 --seeds 2"}

# --------------------------------------------------------------------------------------------------
# Command line


class Plan(NamedTuple):
    """A checked command line. outputs: {what it holds: file to be written}, NAME.csv the first."""
    settings: Settings
    contenders: list[Contender]
    outputs: dict[str, pathlib.Path]
    journal: pathlib.Path
    download: bool


def make_parser() -> tasks.CommandLine:
    """The command line of evaluation."""
    parser = tasks.CommandLine(prog="evaluate.py", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks.add_flags(parser, Settings, {"widths": "32 128 512; depth and horizon 32"})
    parser.add_argument("--out", metavar="DIR", help="folder for the results (runs/evaluate if not "
                        "given, runs/reproduced with --reproduce)")
    parser.add_argument("--name", help="of the files in --out (that of the sweep if not given)")
    parser.add_argument("--plot", action="store_true", help="also draw a PNG; needs matplotlib")
    parser.add_argument("--reproduce", nargs="?", const="all",
                        choices=("all", "quick", *EXPERIMENTS), help="the experiments of results/, or "
                        "one of them, except what --out already holds")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that were given, and for others those of the sweep, checked."""
    given = tasks.given_flags(args, Settings)
    settings = Settings(**SWEEPS[given.get("sweep", "width")] | given)
    for one, several, sweep in ("depth", "depths", "depth"), ("steps", "lengths", "horizon"):
        if (one if settings.sweep == sweep else several) in given:
            raise ValueError(f"--{several} belongs to --sweep {sweep}, --{one} to the other sweeps")
    missing = {"depths": (settings.depth,), "lengths": (settings.steps,),
               "tune_seeds": settings.seeds}
    settings = dataclasses.replace(settings, **{name: value for name, value in missing.items()
                                                if getattr(settings, name) is None})
    tasks.check(settings)
    tuned = settings.tune != "none" and (settings.baselines or settings.tune_theta)
    for name in ("tune_theta", "tune_steps", "tune_seeds"):
        if name in given and not tuned:
            raise ValueError(f"{tasks.flag(name)}: nothing is tuned here, by --tune none or for want "
                             "of --baselines and --tune-theta")
    for name in ("step_mult", "decay", "cooldown"):
        if name in given and not settings.theta:
            raise ValueError(f"{tasks.flag(name)} {given[name]:g}: there is no --theta that it would "
                             "be for")
    if not settings.theta and not settings.baselines:
        raise ValueError("nothing to evaluate: give a --theta, or --baselines, or --reproduce")
    if settings.sweep == "coordinate-check" and len(settings.widths) < 2:
        raise ValueError(f"--widths {settings.widths[0]}: a coordinate check needs two or more")
    return settings


def prepare(argv: Sequence[str] | None) -> Plan:
    """Parses and checks everything but the data and the folder of the results."""
    args = make_parser().parse_args(argv)
    settings = settings_of(args)
    name = settings.sweep if args.name is None else args.name
    if not name or name != pathlib.PurePath(name).name:
        raise ValueError(f"--name {name!r}: must be the beginning of a file name")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is missing: pip install matplotlib, or "
                         "leave --plot out")
    endings = {"check" if settings.sweep == "coordinate-check" else "table": ".csv"}
    endings |= {"curves": "-curves.csv"} if settings.sweep == "horizon" else {}
    endings |= {"figure": ".png"} if args.plot else {}
    folder = pathlib.Path(args.out or "runs/evaluate")
    return Plan(settings, load_contenders(settings),
                {kind: folder / (name + ending) for kind, ending in endings.items()},
                folder / f"{name}.partial.jsonl", bool(args.download))


def check_outputs(plan: Plan) -> None:
    """Raises ValueError where a file to be written is there, but for one of a killed evaluation."""
    first, *others = plan.outputs.values()
    for path in [first] if plan.journal.exists() else [first, *others]:
        if path.exists():
            raise ValueError(f"{path}: is already there; move it away, or choose another --out or "
                             "--name")


def reproductions(args: argparse.Namespace) -> list[Plan]:
    """The plans of experiments whose CSV is not in --out. Draws figures of those whose CSV is."""
    for name in [*tasks.given_flags(args, Settings), *["name"] * (args.name is not None)]:
        if name != "data_dir":
            raise ValueError(f"{tasks.flag(name)} does not go with --reproduce, which decides it")
    results = pathlib.Path(__file__).resolve().parent / "results"
    places, plans = {"results": results, "data": args.data_dir or "data"}, []
    experiments = QUICK if args.reproduce == "quick" else EXPERIMENTS
    if args.reproduce in EXPERIMENTS:
        experiments = {args.reproduce: EXPERIMENTS[args.reproduce]}
    for name, flags in experiments.items():
        argv = [flag.format(**places) for flag in flags.split()] + ["--plot"] * args.plot
        argv += ["--download"] * bool(args.download and "cifar10" in argv)
        plan = prepare([*argv, "--out", args.out or "runs/reproduced", "--name", name])
        path, *_ = plan.outputs.values()
        if not path.exists():
            check_outputs(plan)
            plans.append(plan)
            continue
        print(f"{path} is already there")
        if args.plot and not plan.outputs["figure"].exists():
            draw(plan)
    return plans


# --------------------------------------------------------------------------------------------------
# The run

def load(plans: Sequence[Plan]) -> list[tasks.Dataset]:
    """The data set of each plan, if it fits the networks."""
    datasets = tasks.load_each([plan.settings for plan in plans], [plan.download for plan in plans])
    for plan, dataset in zip(plans, datasets):
        for size in plan.settings.sizes:
            tasks.task_of(plan.settings, dataset, size.width, size.depth, mup.SP)
    return datasets


def record(settings: Settings, dataset: tasks.Dataset) -> dict[str, Any]:
    """What a journal holds of an evaluation: its settings, and checksums of θ and of the data."""
    checksums = {path: hashlib.sha256(b"".join(map(pathlib.Path.read_bytes, lopt.theta_files(path))))
                 .hexdigest() for path in settings.theta}
    return dataclasses.asdict(settings) | {"checksums": checksums, "data": tasks.fingerprint(dataset)}


def measure(plan: Plan, dataset: tasks.Dataset, journal: Journal) -> Rows:
    """Sweeps all contenders, with their progress on stderr."""
    settings, rows = plan.settings, {}
    terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = {} if terminal else {"disable": True}  # a log gets the lines alone
    with tqdm.tqdm(total=len(plan.contenders) * len(settings.sizes), desc=settings.sweep,
                   unit="job", **bar) as progress:
        for contender in plan.contenders:
            remember = functools.partial(journal.remember, contender.name, progress.set_postfix_str)
            for new in sweep(settings, dataset, contender, remember):
                for kind in new:
                    rows.setdefault(kind, []).extend(new[kind])
                for row in {row["tuned"]: row for row in list(new.values())[0]}.values():
                    loss = cell(row, "loss") if "loss" in row else "checked"
                    progress.write(f"{contender.name} ({row['tuned']}), width {row['width']}, depth "
                                   f"{row['depth']}, {row['steps']:,} steps: {loss}", sys.stderr)
                progress.update()
    if "check" in rows:
        add_slopes(rows["check"])
    return rows


def draw(plan: Plan, rows: Rows | None = None) -> bool:
    """Writes the figure of these rows, or else of the CSV; what fails is a warning, and False."""
    settings, path = plan.settings, plan.outputs["figure"]
    kind, *_ = plan.outputs
    length = "" if settings.sweep == "horizon" else f", {settings.lengths[0]:,} steps"
    title = f"{settings.task} on {settings.dataset}{length}, seeds: {settings.seeds}"
    try:
        shown = read_csv(plan.outputs[kind]) if rows is None else rows[kind]
        content = figure(settings.sweep, shown, title, widths_of_meta_training(plan.contenders))
        lopt.write_atomically(path, content)
    except Exception as error:  # matplotlib may be of any version, or broken
        print(f"evaluate.py: warning: {path}: could not be drawn ({type(error).__name__}: "
              f"{tasks.first_line(error)})", file=sys.stderr)
        return False
    return True


def carry_out(plan: Plan, dataset: tasks.Dataset) -> None:
    """Trains, writes the CSV, draws the figure, prints the table: in this order."""
    settings, outputs = plan.settings, plan.outputs
    tasks.set_up_precision(settings.matmul_precision)
    folder = plan.journal.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be made a folder ({error.strerror})") from None
    with Journal(plan.journal, record(settings, dataset)) as journal:
        check_outputs(plan)  # another evaluation may have ended since the data were loaded
        with np.errstate(all="ignore"):  # NumPy would warn of runs that diverge
            rows = measure(plan, dataset, journal)
        for kind in ("curves", "table", "check"):  # NAME.csv is the last: where it is, all are
            if kind in rows:
                write_csv(outputs[kind], rows[kind], COLUMNS[kind])
    wrote = [path for kind, path in outputs.items() if kind != "figure" or draw(plan, rows)]
    shown = check_table(rows["check"]) if "check" in rows else (
        "losses in nats, the mean over the last twentieth of the steps\n\n" + table(rows["table"]))
    print(f"\n{settings.task} on {dataset.name}, batch size {settings.batch_size}, seed "
          f"{settings.seed}\n\n{shown}\n\nwrote {', '.join(map(str, wrote))}", flush=True)


def run(argv: Sequence[str] | None) -> int:
    """The command line; returns the exit code. Raises ValueError for any bad input."""
    args = make_parser().parse_args(argv)
    tasks.set_up_devices(0)  # one for each core: `over_seeds` takes as many of them as it can
    if args.reproduce:
        plans = reproductions(args)
    else:
        plans = [prepare(argv)]
        check_outputs(plans[0])
    for plan, dataset in zip(plans, load(plans)):  # all data are there before the first run
        carry_out(plan, dataset)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would wait for a compiled run to end
    sys.exit(tasks.run_command(run, "evaluate.py", None))
