"""Evaluation: what learned optimizers and tuned baselines reach on networks far from those of meta-training.

    python evaluate.py --theta results/mulo_s.npz --theta results/lo_s.npz --baselines adamw muadam \\
        --sweep width --widths 32 128 512 --out runs/width --plot      a table, a CSV and a figure
    python evaluate.py --reproduce --plot      every table and figure of results/ anew, into runs/reproduced
    python evaluate.py --reproduce quick       a small part of them, in minutes and without data to fetch

A *contender* is an optimizer with its parametrization: a θ, which has nothing to tune, or a baseline: AdamW in
SP, or μAdam, that is Adam in μP. All of them train from the same keys, hence on the same batches and, in one
parametrization, from the same initial weights. Baselines are tuned by their training loss under other keys; no
test data decide anything.

A run has diverged when its final training loss is not finite or above 1.5 ln(classes); guessing has ln(classes).

Sources: μLO (arXiv 2406.00153) for the experiments, TP5 (arXiv 2203.03466) for μAdam, what is tuned of it, and the
coordinate check.

Dimensions: S seeds, T steps.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import io
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
import meta_train
import mup
import tasks
from lopt import Array, Tree

Row = dict[str, str]  # of a table and of its CSV: the same cells in both
Size = tuple[int, int]  # width, depth
MakeTask = Callable[[mup.Parametrization], tasks.Task]  # makes the task of one size

# ---------------------------------------------------------------------------------------------------------
# Contenders


class Hyper(NamedTuple):
    """What is tuned of a baseline: its learning rate and μP's multipliers."""
    learning_rate: float = 1e-3
    input_mult: float = 1.0
    output_mult: float = 1.0
    hidden_lr_mult: float = 1.0


class Contender(NamedTuple):
    """An optimizer in its parametrization; Adam if theta is None.

    start: where tuning begins. factors: {field of `Hyper`: ratio of neighbours on its grid}, in tuning order.
    """
    name: str
    parametrization: str
    theta: dict[str, Array] | None = None
    step_mult: float = 0.0
    exp_mult: float = 0.0
    base_width: int = 0
    start: Hyper = Hyper()
    factors: dict[str, float] = {}

    def task(self, make_task: MakeTask, hyper: Hyper) -> tasks.Task:
        """The task in the contender's parametrization."""
        return make_task(mup.Parametrization(self.parametrization, *hyper[1:], self.base_width))

    def optimizer(self, task: tasks.Task, hyper: Hyper, seeds: int) -> lopt.Optimizer:
        """The optimizer for a task that is trained with so many seeds side by side."""
        if self.theta is None:
            return lopt.adamw(hyper.learning_rate, update_multipliers=task.update_multipliers)
        chunk = lopt.default_chunk(seeds // len(devices_for(seeds)))
        return lopt.learned_optimizer(self.theta, step_mult=self.step_mult, exp_mult=self.exp_mult,
                                      update_multipliers=task.update_multipliers,
                                      gradient_multiplier=task.gradient_multiplier, chunk=chunk)


# μAdam's multiplier of hidden updates is 1/fan_in, with no base width: hidden_lr_mult is of the order of a width.
BASELINES = {
    "adamw": Contender("adamw", "sp", factors={"learning_rate": 2.0}),
    "muadam": Contender("muadam", "mup", start=Hyper(8e-3, 1.0, 16.0, 16.0),
                        factors={"learning_rate": 2.0, "hidden_lr_mult": 4.0, "output_mult": 4.0,
                                 "input_mult": 2.0})}


def load_contenders(paths: Sequence[str], baselines: Sequence[str]) -> list[Contender]:
    """The θ of these files, named by file (by the whole path where file names repeat), then the baselines."""
    stems = [pathlib.Path(path).stem for path in paths]
    contenders = []
    for path, stem in zip(paths, stems):
        theta, metadata = lopt.load_theta(path)
        name = stem if stems.count(stem) == 1 else path.removesuffix(".npz")
        parametrization, *multipliers, base_width = mup.parametrization_of(metadata)
        contenders.append(Contender(name, parametrization, theta, metadata["step_mult"], metadata["exp_mult"],
                                    base_width, Hyper(0.0, *multipliers)))
    return contenders + [BASELINES[name] for name in baselines]


# ---------------------------------------------------------------------------------------------------------
# Training many seeds at once


def seed_keys(key: Array, seeds: int) -> Array:
    """One key for each seed [S]; seed i has the same one however many there are."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(seeds))


def devices_for(seeds: int) -> list[jax.Device]:
    """As many devices as the seeds divide over."""
    devices = jax.devices()
    return devices[:max(d for d in range(1, len(devices) + 1) if seeds % d == 0)]


def over_seeds(function: Callable, seeds: int) -> Callable:
    """Jits function(hyper, tree of one seed, split) for trees of S seeds, of which each device takes its share."""
    mesh = Mesh(np.array(devices_for(seeds)), ("seeds",))
    everywhere, by_seed = PartitionSpec(), PartitionSpec("seeds")
    return jax.jit(jax.shard_map(jax.vmap(function, (None, 0, None)), mesh=mesh, check_vma=False,
                                 in_specs=(everywhere, by_seed, everywhere), out_specs=by_seed))


def compiled(contender: Contender, make_task: MakeTask, steps: int, seeds: int) -> tuple[Callable, Callable]:
    """train(hyper, keys [S], split) → (params [S, …], losses [S, T]); test(hyper, params, split) → (losses [S],
    accuracies [S]). The hyperparameters are traced, so that each is compiled once."""
    def train(hyper: Hyper, key: Array, split: tasks.Split) -> tuple[Tree, Array]:
        task = contender.task(make_task, hyper)
        return tasks.train(task, contender.optimizer(task, hyper, seeds), split, key, steps)

    def test(hyper: Hyper, params: Tree, split: tasks.Split) -> tuple[Array, Array]:
        return contender.task(make_task, hyper).test(params, split)

    return over_seeds(train, seeds), over_seeds(test, seeds)


def tune(loss_of: Callable[[Hyper], float], start: Hyper, factors: dict[str, float], rounds: int = 3) -> Hyper:
    """The best point of a grid without ends, by a walk along one field of `Hyper` after the other.

    The walk goes to the neighbour, one factor up or down, for as long as that is better: an optimum is bracketed
    wherever it lies. Rounds over all fields end when one changes nothing. loss_of must give inf, not nan, for a
    run that diverged.
    """
    loss_of, best = functools.cache(loss_of), start
    for _ in range(rounds):
        before = best
        for field, factor in factors.items():
            for ratio in (factor, 1.0 / factor):
                step = lambda at: at._replace(**{field: float(f"{getattr(at, field) * ratio:.6g}")})
                while loss_of(step(best)) < loss_of(best):
                    best = step(best)
        if best == before:
            break
    return best


def hyperparameters(contender: Contender, how: str, sizes: Sequence[Size],
                    loss_at: Callable[[Size, Hyper], float]) -> Iterator[dict[str, Hyper]]:
    """For each size in turn, the hyperparameters to be compared there, by how they were tuned.

    "transfer": all fields, at the first size, then kept, as μP intends. "per-width": the same, and the learning
    rate again at each further size, beginning with the best of the size before. "both". "none": the start.
    """
    first = latest = None
    for size in sizes:
        loss_of = functools.partial(loss_at, size)
        if how == "none" or not contender.factors:
            yield {"none" if contender.factors else "-": contender.start}
            continue
        if first is None:
            first = latest = tune(loss_of, contender.start, contender.factors)
        elif how != "transfer":
            latest = tune(loss_of, latest, {"learning_rate": contender.factors["learning_rate"]})
        both = {"transfer": first, "per-width": latest}
        yield both if how == "both" else {how: both[how]}


# ---------------------------------------------------------------------------------------------------------
# Coordinate check


def pre_activation_squares(task: tasks.Task, optimizer: lopt.Optimizer, split: tasks.Split, key: Array,
                           marks: Sequence[int]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Mean squares of each layer's pre-activations after `marks` steps, and of their change: {layer: [marks]}.

    The change is that since initialisation; both are on the run's first batch. The run is that of `tasks.train`.
    """
    start = tasks.begin(task, optimizer, key)
    probe, _ = task.sample(jax.random.fold_in(jax.random.fold_in(key, 1), 0), split)
    mean_square = lambda x: jnp.mean(jnp.square(x))

    def to_mark(carry, bounds):
        step = lambda t, carry: tasks.train_step(task, optimizer, split, key, carry, t)[0]
        carry = jax.lax.fori_loop(bounds[0], bounds[1], step, carry)
        first, now = (task.forward(params, probe)[1] for params in (start[0], carry[0]))
        return carry, (jax.tree.map(mean_square, now), jax.tree.map(lambda n, f: mean_square(n - f), now, first))

    return jax.lax.scan(to_mark, start, jnp.array([(0, *marks[:-1]), marks]).T)[1]


def coordinate_check(task_at_width: Callable[[int], tasks.Task],
                     optimizer_of: Callable[[tasks.Task], lopt.Optimizer], split: tasks.Split,
                     widths: Sequence[int], marks: Sequence[int],
                     keys: Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """TP5's coordinate check: {layer: (RMS of its pre-activations, RMS of their change)}, each [widths, marks].

    marks: increasing numbers of steps. The mean squares are averaged over the keys [S]. In μP the change does not
    depend on the width: its `slope` is 0.
    """
    def at_width(width: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        task = task_at_width(width)
        optimizer = optimizer_of(task)
        one_seed = lambda _, key, split: pre_activation_squares(task, optimizer, split, key, marks)
        squares = over_seeds(one_seed, len(keys))(None, keys, split)
        return jax.tree.map(lambda x: np.sqrt(np.mean(np.asarray(x), axis=0)), squares)

    values, changes = zip(*map(at_width, widths))
    return {layer: (np.stack([v[layer] for v in values]), np.stack([c[layer] for c in changes]))
            for layer in values[0]}


def slope(widths: Sequence[int], values: np.ndarray) -> np.ndarray:
    """The least-squares slope of ln values [widths, …] against ln width → […]; nan where a value is not > 0."""
    x = np.log(widths) - np.mean(np.log(widths))
    values = np.asarray(values, np.float64)
    return np.tensordot(x, np.log(np.where(values > 0, values, np.nan)), 1) / np.sum(x * x)


# ---------------------------------------------------------------------------------------------------------
# Sweeps

COLUMNS = {"table": ("optimizer", "tuned", "width", "depth", "steps", "seeds", "diverged", "loss", "std",
                     "test_loss", "test_accuracy", *Hyper._fields),
           "curves": ("optimizer", "tuned", "width", "depth", "step", "loss"),
           "check": ("optimizer", "tuned", "depth", "layer", "step", "width", "rms", "rms_change", "slope",
                     *Hyper._fields)}
HORIZON = (1, 5, 25)  # times --steps
CURVE_POINTS = 200
ROUNDING = 1e-6  # a change below this part of the pre-activations is float32's rounding


class Plan(NamedTuple):
    """A checked command line: its flags, the task's settings, the contenders, and the files to be written."""
    args: argparse.Namespace
    settings: meta_train.Settings
    contenders: list[Contender]
    outputs: dict[str, pathlib.Path]


def cell(x: float, digits: str = ".4f") -> str:
    """A number as text; what is not finite has diverged."""
    return format(float(x), digits) if np.isfinite(x) else "diverged"


def summary(losses: np.ndarray, max_loss: float) -> Row:
    """The cells for runs with losses [S, T]: how many diverged and, if none, their final losses' mean and std."""
    final = tasks.final_loss(losses)
    diverged = np.sum(~(final <= max_loss))  # nan counts, too
    mean, std = ("diverged", "-") if diverged else (cell(final.mean()), cell(final.std()))
    return {"steps": str(losses.shape[1]), "seeds": str(len(losses)), "diverged": str(diverged), "loss": mean,
            "std": std, "test_loss": "-", "test_accuracy": "-"}


def smooth(losses: np.ndarray, max_loss: float) -> list[Row]:
    """The mean over seeds of losses [S, T], in about CURVE_POINTS equal pieces, each with its last step.

    A piece whose mean is above max_loss has diverged.
    """
    width = math.ceil(losses.shape[1] / CURVE_POINTS)
    pieces = [losses[:, start:start + width] for start in range(0, losses.shape[1], width)]
    means = [np.mean(piece) for piece in pieces]
    return [{"step": str(step), "loss": cell(mean if mean <= max_loss else math.nan)}
            for step, mean in zip(np.cumsum([piece.shape[1] for piece in pieces]), means)]


def measure(plan: Plan, dataset: tasks.Dataset) -> dict[str, list[Row]]:
    """Trains everything. Returns the rows of each CSV: "table" and "curves", or "check"."""
    args, settings = plan.args, plan.settings
    sizes = [(width, depth) for depth in args.depths for width in settings.widths]
    make = {size: functools.partial(meta_train.make_task, settings, dataset, *size) for size in sizes}
    for size in sizes:
        make[size](mup.SP)  # only to see now, not in an hour, that the width and the heads fit
    keys, tuning_keys = (seed_keys(key, seeds) for key, seeds in
                         zip(jax.random.split(jax.random.key(settings.seed)), (args.seeds, args.tune_seeds)))
    rows: dict[str, list[Row]] = {}

    with tqdm.tqdm(total=len(plan.contenders) * len(sizes), desc=args.sweep, unit="job") as progress:
        for contender in plan.contenders:
            programs = functools.cache(lambda size, *lengths, c=contender: compiled(c, make[size], *lengths))

            def loss_at(size: Size, hyper: Hyper) -> float:
                progress.set_postfix_str(f"tuning {contender.name} at width {size[0]}, depth {size[1]}")
                train, _ = programs(size, args.tune_steps, args.tune_seeds)
                loss = tasks.final_loss(np.asarray(train(hyper, tuning_keys, dataset.train)[1])).mean()
                return float(loss) if np.isfinite(loss) else math.inf

            for size, choices in zip(sizes, hyperparameters(contender, args.tune, sizes, loss_at)):
                progress.set_postfix_str(f"{contender.name} at width {size[0]}, depth {size[1]}")
                program = functools.partial(programs, size)
                measured = {hyper: check_rows(contender, hyper, make[size], dataset, args, keys)
                            if args.sweep == "coordinate-check" else
                            train_rows(contender, hyper, make[size], program, dataset, args, keys)
                            for hyper in set(choices.values())}
                for label, hyper in choices.items():
                    common = {"optimizer": contender.name, "tuned": label, "width": str(size[0]),
                              "depth": str(size[1])}
                    common |= {name: f"{value:.4g}" if name in contender.factors else "-"
                               for name, value in hyper._asdict().items()}
                    for kind, new in measured[hyper].items():
                        rows.setdefault(kind, []).extend(common | row for row in new)
                    if "table" in rows:
                        progress.write(f"{contender.name} ({label}), width {size[0]}, depth {size[1]}: "
                                       f"{rows['table'][-1]['loss']}", sys.stderr)
                programs.cache_clear()  # frees the memory of this size
                progress.update()
    return rows


def train_rows(contender: Contender, hyper: Hyper, make_task: MakeTask, program: Callable, dataset: tasks.Dataset,
               args: argparse.Namespace, keys: Array) -> dict[str, list[Row]]:
    """Trains all seeds of one contender, size and choice of hyperparameters."""
    marks = [k * args.steps for k in (HORIZON if args.sweep == "horizon" else (1,))]
    train, test = program(marks[-1], args.seeds)
    params, losses = train(hyper, keys, dataset.train)
    losses = np.asarray(losses)
    max_loss = make_task(mup.SP).max_loss
    table = [summary(losses[:, :mark], max_loss) for mark in marks]
    if dataset.test is not None and table[-1]["diverged"] == "0":
        loss, accuracy = (cell(np.mean(x)) for x in test(hyper, params, dataset.test))
        table[-1] |= {"test_loss": loss, "test_accuracy": accuracy}
    return {"table": table, "curves": smooth(losses, max_loss)} if args.sweep == "horizon" else {"table": table}


def check_rows(contender: Contender, hyper: Hyper, make_task: MakeTask, dataset: tasks.Dataset,
               args: argparse.Namespace, keys: Array) -> dict[str, list[Row]]:
    """The coordinate check at one width after 1, 10, … and all steps; `add_slopes` completes the rows."""
    marks = sorted({args.steps, *(10 ** i for i in range(len(str(args.steps))))})
    task = contender.task(make_task, hyper)
    layers = coordinate_check(lambda _: task, lambda task: contender.optimizer(task, hyper, args.seeds),
                              dataset.train, [task.name], marks, keys)
    return {"check": [{"layer": layer, "step": str(mark), "rms": cell(value, ".4g"),
                       "rms_change": "0" if change < ROUNDING * value else cell(change, ".4g")}
                      for layer, (values, changes) in layers.items()
                      for mark, value, change in zip(marks, values[0], changes[0])]}


def number(text: str) -> float:
    """The number in a cell, nan for a word."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def groups(rows: list[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by their cells in some columns, in order of appearance."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[column] for column in columns), []).append(row)
    return grouped


def add_slopes(rows: list[Row]) -> None:
    """Adds to each row of a coordinate check the slope of its layer's change over the widths, "-" if none."""
    for group in groups(rows, "optimizer", "tuned", "depth", "layer", "step").values():
        value = slope([int(row["width"]) for row in group], [number(row["rms_change"]) for row in group])
        for row in group:
            row["slope"] = f"{value:+.3f}" if np.isfinite(value) else "-"


# ---------------------------------------------------------------------------------------------------------
# Tables, CSV, figures


def table(rows: list[Row], columns: Sequence[str]) -> str:
    """The rows as text, aligned: columns of words to the left, of numbers to the right."""
    lines = [list(columns), *([row[column] for column in columns] for row in rows)]
    aligns = ["<" if column[0] in ("optimizer", "tuned", "layer") else ">" for column in zip(*lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{text:{a}{w}}" for text, a, w in zip(line, aligns, widths)) for line in lines)


def check_table(rows: list[Row]) -> str:
    """A coordinate check as text: the RMS change at each width, side by side, and the slope."""
    lines = [dict(zip(("optimizer", "tuned", "layer", "step"), name)) |
             {f"width {row['width']}": row["rms_change"] for row in group} | {"slope": group[0]["slope"]}
             for name, group in groups(rows, "optimizer", "tuned", "layer", "step").items()]
    return "RMS change of the pre-activations:\n" + table(lines, tuple(lines[0]))


def write_csv(path: pathlib.Path, rows: list[Row], columns: Sequence[str]) -> None:
    """Writes the rows' cells in these columns, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lopt.write_atomically(path, text.getvalue().encode())


# sweep: (x, y, what makes a panel, what makes a line)
FIGURES = {"width": ("width", "loss", ("depth",), ("optimizer", "tuned")),
           "depth": ("depth", "loss", ("width",), ("optimizer", "tuned")),
           "horizon": ("step", "loss", ("width",), ("optimizer", "tuned")),
           "coordinate-check": ("width", "rms_change", ("optimizer", "tuned", "layer"), ("step",))}


def figure(sweep: str, rows: list[Row], title: str) -> bytes:
    """The PNG of a sweep's rows (of its curves for the horizon); what diverged is a × at the top."""
    import matplotlib.figure

    x, y, by_panel, by_line = FIGURES[sweep]
    check, panels = sweep == "coordinate-check", groups(rows, *by_panel)
    across = len(groups(rows, "layer")) if check else min(3, len(panels))
    down, inches = math.ceil(len(panels) / across), 2.2 if check else 4.5
    drawing = matplotlib.figure.Figure((max(6, inches * across), inches * down + 1), dpi=120, layout="constrained")
    ticks = sorted({int(row[x]) for row in rows})
    axes = drawing.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, (name, group) in zip(axes, panels.items()):
        for i, (line, points) in enumerate(groups(group, *by_line).items()):
            at, values, spread = ([number(p.get(column, "0")) for p in points] for column in (x, y, "std"))
            axis.errorbar(at, values, spread, label=" ".join(word for word in line if word != "-"),
                          color=f"C{i % 10}", marker="" if x == "step" else "o", markersize=3, linewidth=1.2,
                          capsize=0 if x == "step" else 2)
            gone = [a for a, p in zip(at, points) if p[y] == "diverged"]
            axis.plot(gone, [0.98 - 0.03 * i] * len(gone), "x", color=f"C{i % 10}",
                      transform=axis.get_xaxis_transform())
        axis.set_xscale("log", base=10 if x == "step" else 2)
        if x != "step":
            axis.set_xticks(ticks, ticks, fontsize=7)
            axis.minorticks_off()
        axis.set_yscale("log" if check else "linear")
        axis.set_title("\n".join(word for word in name if word != "-") if check else f"{by_panel[0]} {name[0]}",
                       fontsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    axes[0].legend(fontsize=7, title="step" if check else None, title_fontsize=7)
    drawing.suptitle(f"{title} (×: diverged)", fontsize=9)
    drawing.supxlabel(x, fontsize=9)
    drawing.supylabel("RMS change of pre-activations" if check else "training loss", fontsize=9)
    png = io.BytesIO()
    drawing.savefig(png, format="png")
    return png.getvalue()


# ---------------------------------------------------------------------------------------------------------
# Command line

# sweep: (its widths, steps and depths by default; a depth of 0 means --depth)
SWEEPS = {"width": ((32, 128, 512), 1000, [0]), "depth": ((32,), 1000, [3, 6, 12, 16]),
          "horizon": ((32,), 1000, [0]), "coordinate-check": ((32, 128, 512), 500, [0])}

# name of the outputs: the flags that make them; {results} holds the shipped θ, {data} the data sets
PAIR = "--theta {results}/mulo_m.npz {results}/lo_m.npz"
BASE_WIDTH = "{results}/mulo_m_128.npz"
BOTH_MULO_M = f"--theta {{results}}/mulo_m.npz {BASE_WIDTH}"
FIVE = f"{PAIR} {{results}}/mulo_s_16.npz {{results}}/lo_s.npz {BASE_WIDTH}"
SIX = f"{FIVE} {{results}}/mulo_s.npz"
ONE_WIDTH = "--theta {results}/mulo_s.npz {results}/mulo_s_16.npz {results}/lo_s.npz"
CIFAR = "--dataset cifar10 --data-dir {data} --image-size 8"
TEXT = "--dataset text --data-dir {data}/tinyshakespeare.txt"
BOTH = "--baselines adamw muadam"
EXPERIMENTS = {
    "width": f"--sweep width {SIX} {BOTH} {CIFAR} --tune both --tune-seeds 2 --seeds 4 --widths 32 128 512",
    "width-seeds": f"--sweep width {BOTH_MULO_M} --baselines adamw {CIFAR} --tune per-width --tune-seeds 2 --seed 1 "
                   "--seeds 8 --widths 32 128 512",
    "width-between": f"--sweep width {BOTH_MULO_M} --baselines adamw {CIFAR} --tune both --tune-seeds 2 --seeds 4 "
                     "--widths 32 64 256",
    "width-2048": f"--sweep width {PAIR} {BASE_WIDTH} --baselines adamw {CIFAR} --tune both --tune-seeds 1 --seeds 3 "
                  "--widths 32 1024 2048",
    "width-2048-short": f"--sweep width --theta {{results}}/mulo_s.npz {{results}}/lo_s.npz --baselines adamw {CIFAR} "
                        "--tune both --tune-seeds 1 --steps 300 --seeds 2 --widths 32 2048",
    "depth": f"--sweep depth {FIVE} {BOTH} {CIFAR} --seeds 3 --widths 32 128",
    "horizon": f"--sweep horizon {FIVE} {BOTH} {CIFAR} --seeds 3 --widths 128",
    "pre-activations": f"--sweep coordinate-check {PAIR} {BASE_WIDTH} {CIFAR} --steps 500 --seeds 2 "
                       "--widths 32 128 512",
    "coordinate-check": f"--sweep coordinate-check {ONE_WIDTH} {{results}}/mulo_m.npz {BASE_WIDTH} {CIFAR} "
                        "--steps 100 --seeds 2 --widths 32 64 128 256 512 1024",
    "vit": f"--sweep width --task vit --patch 2 {SIX} {BOTH} {CIFAR} --steps 300 --seeds 2 --widths 32 64 128",
    "lm": f"--sweep width --task lm {SIX} {BOTH} {TEXT} --batch-size 16 --steps 300 --seeds 2 --tune-seeds 1 "
          "--widths 32 64 128"}
QUICK = {"quick": f"--sweep width {FIVE} --baselines adamw --widths 32 128 512 --steps 300 --seeds 2"}


def make_parser() -> meta_train.CommandLine:
    """The command line of evaluation."""
    parser = meta_train.CommandLine(prog="evaluate.py", description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theta", action="extend", nargs="+", default=[], metavar="FILE",
                        help="θ as meta_train.py writes it; may be given several times")
    parser.add_argument("--baselines", nargs="+", default=[], choices=tuple(BASELINES),
                        help="AdamW in SP, Adam in μP")
    parser.add_argument("--sweep", choices=tuple(SWEEPS), default="width",
                        help=f"default: width; horizon goes on to {HORIZON[-1]} times --steps")
    parser.add_argument("--depths", type=int, nargs="+", metavar="D",
                        help="for the depth sweep (default: 3 6 12 16)")
    parser.add_argument("--steps", type=int, metavar="T", help="inner steps (default: 1000, coordinate-check 500)")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="inner runs, side by side (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is random (default: 0)")
    parser.add_argument("--tune", choices=("transfer", "per-width", "both", "none"), default="transfer",
                        help="baselines at the first width and depth, for all (default), or at each, or both ways")
    parser.add_argument("--tune-steps", type=int, metavar="T", help="inner steps of tuning (default: --steps)")
    parser.add_argument("--tune-seeds", type=int, metavar="S", help="inner runs of tuning (default: --seeds)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: runs/evaluate)")
    parser.add_argument("--name", help="of the files in --out (default: the sweep's)")
    parser.add_argument("--plot", action="store_true", help="also draw a PNG; needs matplotlib")
    parser.add_argument("--reproduce", nargs="?", const="all", choices=("all", "quick"),
                        help="the experiments of results/, except what --out (runs/reproduced) already holds")
    meta_train.add_task_flags(parser)
    return parser


def prepare(argv: Sequence[str] | None) -> Plan:
    """Parses and checks everything that can be checked without data. Raises ValueError for what is wrong."""
    args = make_parser().parse_args(argv)
    default = lambda value, otherwise: otherwise if value is None else value
    widths, steps, depths = SWEEPS[args.sweep]
    args.steps, args.out = default(args.steps, steps), default(args.out, "runs/evaluate")
    args.name, args.tune_seeds = default(args.name, args.sweep), default(args.tune_seeds, args.seeds)
    args.tune_steps, args.widths = default(args.tune_steps, args.steps), tuple(default(args.widths, widths))
    fields = [field.name for field in dataclasses.fields(meta_train.Settings)]
    settings = meta_train.Settings(**{name: value for name in fields
                                      if (value := getattr(args, name, None)) is not None})
    meta_train.check(settings)
    if (args.depth if args.sweep == "depth" else args.depths) is not None:
        raise ValueError("--depths belongs to --sweep depth, --depth to the other sweeps")
    args.depths = [depth or settings.depth for depth in depths] if args.depths is None else args.depths
    for flag in ("steps", "seeds", "tune_steps", "tune_seeds", "depths"):
        value = getattr(args, flag)
        if not 1 <= np.min(value) <= np.max(value) <= 10_000_000:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be between 1 and 10,000,000")
    for flag in ("theta", "baselines", "depths"):
        if len(set(values := getattr(args, flag))) < len(values):
            raise ValueError(f"--{flag} {' '.join(map(str, values))}: one is given twice")
    if not args.theta and not args.baselines:
        raise ValueError("nothing to evaluate: give a --theta, or --baselines, or --reproduce")
    if args.sweep == "coordinate-check" and len(args.widths) < 2:
        raise ValueError(f"--widths {args.widths[0]}: a coordinate check needs two or more")
    if args.name != pathlib.PurePath(args.name).name:
        raise ValueError(f"--name {args.name!r}: must be the beginning of a file name")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is missing: pip install matplotlib, or leave --plot out")
    kinds = {"horizon": {"table": ".csv", "curves": "-curves.csv"}, "coordinate-check": {"check": ".csv"}}
    endings = kinds.get(args.sweep, {"table": ".csv"}) | ({"figure": ".png"} if args.plot else {})
    outputs = {kind: pathlib.Path(args.out, args.name + ending) for kind, ending in endings.items()}
    for path in outputs.values():
        if path.exists():
            raise ValueError(f"{path}: is already there; move it away, or choose another --out or --name")
    return Plan(args, settings, load_contenders(args.theta, args.baselines), outputs)


def carry_out(plan: Plan) -> None:
    """Loads the data, trains, prints the table and writes the files."""
    args, settings, outputs = plan.args, plan.settings, dict(plan.outputs)
    jax.config.update("jax_default_matmul_precision", settings.matmul_precision)
    dataset = meta_train.load_data(settings, args.download)
    try:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out}: cannot be made a folder ({error.strerror})") from None
    with np.errstate(all="ignore"):  # NumPy would warn of runs that diverge
        rows = measure(plan, dataset)
        if "check" in rows:
            add_slopes(rows["check"])
    print(f"\n{settings.task} on {dataset.name}, batch size {settings.batch_size}, seed {settings.seed}; losses "
          "in nats, the mean over the last twentieth of the steps\n",
          check_table(rows["check"]) if "check" in rows else table(rows["table"], COLUMNS["table"]), "", sep="\n")
    if path := outputs.pop("figure", None):
        steps = args.steps * (HORIZON[-1] if args.sweep == "horizon" else 1)
        title = f"{settings.task} on {dataset.name}, {steps:,} steps, seeds: {args.seeds}"
        lopt.write_atomically(path, figure(args.sweep, list(rows.values())[-1], title))
    for kind, path in reversed(outputs.items()):  # NAME.csv is the last: where it is, all of them are
        write_csv(path, rows[kind], COLUMNS[kind])
    print("wrote " + ", ".join(map(str, plan.outputs.values())), flush=True)


def reproduce(args: argparse.Namespace) -> None:
    """Runs the experiments whose CSV is not in --out yet, after a check of them all."""
    for name, value in vars(args).items():
        free = name in ("reproduce", "out", "data_dir", "download", "plot")
        if not free and value != make_parser().get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --reproduce, which decides it")
    out = args.out or "runs/reproduced"
    places = {"results": pathlib.Path(__file__).resolve().parent / "results", "data": args.data_dir or "data"}
    plans = []
    for name, flags in (QUICK if args.reproduce == "quick" else EXPERIMENTS).items():
        argv = [flag.format(**places) for flag in flags.split()] + ["--out", out, "--name", name]
        argv += ["--plot"] * args.plot + ["--download"] * bool(args.download and "cifar10" in argv)
        if pathlib.Path(out, f"{name}.csv").exists():
            print(f"{out}/{name}.csv is already there")
        else:
            plans.append(prepare(argv))
    for plan in plans:
        carry_out(plan)


def run(argv: Sequence[str] | None) -> int:
    """The command line; returns the exit code. Raises ValueError for any bad input."""
    args = make_parser().parse_args(argv)
    meta_train.set_up_devices(0, None)  # one for each core, whatever the number of seeds: see devices_for
    if args.reproduce:
        reproduce(args)
    else:
        carry_out(prepare(argv))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would wait for a compiled run to end, for many minutes
    sys.exit(meta_train.run_command(run, "evaluate.py", None))
