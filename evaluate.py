"""Evaluation: learned optimizers and tuned baselines, far from the sizes of meta-training.

    python evaluate.py --theta results/mulo_m.npz --baselines adamw    a table and a CSV
    bash results/reproduce.sh                                          all tables of results/

A *contender* is an optimizer with its parametrization: a θ, AdamW in the standard parametrization
(SP) or Adam in μP (μAdam). All contenders train on the same batches. Hyperparameters are tuned on
training loss, with seeds that no reported run uses.

A run has diverged if its final training loss is not finite or exceeds 1.5 ln(classes). The same
command resumes a killed evaluation: OUT/NAME.jsonl keeps each result.

Sources: μLO (arXiv 2406.00153); TP5 = "Tensor Programs V" (arXiv 2203.03466) for μAdam.
"""

import argparse
import csv
import functools
import hashlib
import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, PartitionSpec

import lopt
import mup
import tasks
from lopt import InputError, reading
from tasks import COUNT, SCALE, SHARE

Row = dict[str, Any]  # by column: a word or a number; inf if it diverged, nan if there is none


class Size(NamedTuple):
    """The width and depth of a network, and the steps of its training."""
    width: int
    depth: int
    steps: int


class Hyper(NamedTuple):
    """The hyperparameters of a contender: AdamW's, and the multipliers that μP leaves free."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    input_mult: float = 1.0
    output_mult: float = 1.0
    hidden_lr_mult: float = 1.0


class Contender(NamedTuple):
    """An optimizer in its parametrization.

    make(task, hyper, num_steps) → the optimizer of a run. start: where tuning begins. factors:
    {field of `Hyper`: ratio of neighbours on its grid}, in tuning order; a multiplier there scales
    that of the parametrization. identity: the name and a θ's checksum. widths: of meta-training.
    """
    name: str
    parametrization: mup.Parametrization
    make: Callable
    start: Hyper = Hyper()
    factors: dict[str, float] = {}
    identity: str = ""
    widths: Sequence[int] = ()

    def on(self, task_in: Callable, hyper: Hyper) -> tuple[tasks.Task, Callable]:
        """(The task with hyper's multipliers, function: num_steps → the optimizer)."""
        own = self.parametrization
        task = task_in(own._replace(**{field: getattr(own, field) * getattr(hyper, field)
                                       for field in self.factors if field in own._fields}))
        return task, partial(self.make, task, hyper)


def adam(task: tasks.Task, hyper: Hyper, num_steps: int, cosine: bool = False) -> lopt.Optimizer:
    """AdamW in SP, μAdam in μP. cosine: the learning rate falls to 0 by a cosine over the run."""
    rate = lopt.warmup_cosine(0.0, hyper.learning_rate, 0.0, 0, num_steps) if cosine else (
        hyper.learning_rate)
    multipliers = mup.update_multipliers(task.weights, task.parametrization)
    return lopt.adamw(rate, weight_decay=hyper.weight_decay, update_multipliers=multipliers)


WITH_DECAY = dict(start=Hyper(1e-3, 0.1), factors={"learning_rate": 2.0, "weight_decay": 4.0})
BASELINES = {contender.name: contender for contender in (
    Contender("adamw", mup.SP, adam, factors={"learning_rate": 2.0}),
    Contender("adamw_decay", mup.SP, adam, **WITH_DECAY),
    Contender("adamw_cosine", mup.SP, partial(adam, cosine=True), **WITH_DECAY),
    # a large hidden_lr_mult makes up for μP's 1/fan_in
    Contender("muadam", mup.MUP, adam, start=Hyper(8e-3, 0.0, 1.0, 16.0, 16.0),
              factors={"learning_rate": 2.0, "hidden_lr_mult": 4.0, "output_mult": 4.0,
                       "input_mult": 2.0}))}


def tune(loss_of: Callable, start: Hyper, factors: dict[str, float]) -> Hyper:
    """A good point of a grid without ends, by a walk along one field of `Hyper` after the other.

    The walk goes to a neighbour, one factor up or down, for as long as that is better. It makes at
    most three rounds over all fields. loss_of must return inf, not nan.
    """
    def neighbour(hyper, field, ratio):  # to six digits: the way back ends where it began
        return hyper._replace(**{field: float(f"{getattr(hyper, field) * ratio:.6g}")})

    loss_of, best = functools.cache(loss_of), start
    for _ in range(3):
        before = best
        for field, factor in factors.items():
            for ratio in (factor, 1.0 / factor):
                while loss_of(neighbour(best, field, ratio)) < loss_of(best):
                    best = neighbour(best, field, ratio)
        if best == before:
            break
    return best


def hyperparameters(contender: Contender, how: str, sizes: Sequence[Size],
                    loss_at: Callable) -> Iterator[dict[str, Hyper]]:
    """For each size in turn, {how they were tuned: the hyperparameters to compare there}.

    transfer: tuned at the first size and then kept, as μP intends. per-width: learning rate and
    weight decay are tuned again at each further size. both: both ways. none: not tuned.
    """
    first = latest = None
    again = {field: factor for field, factor in contender.factors.items()
             if field in ("learning_rate", "weight_decay")}
    if how != "none" and not again:
        how = "transfer"  # multipliers alone: nothing is tuned again
    for size in sizes:
        loss_of = partial(loss_at, size)
        if how == "none" or not contender.factors:
            yield {"none" if contender.factors else "-": contender.start}
            continue
        if first is None:
            first = latest = tune(loss_of, contender.start, contender.factors)
        elif how != "transfer":
            latest = tune(loss_of, latest, again)
        both = {"transfer": first, "per-width": latest}
        yield both if how == "both" else {how: both[how]}


def sweep(args: argparse.Namespace, dataset: tasks.Dataset, contender: Contender,
          sizes: Sequence[Size], remember: Callable) -> Iterator[list[Row]]:
    """Tune one contender and measure it: the rows of each size in turn.

    remember wraps the functions that train, so that nothing is trained twice.
    """
    measuring, tuning = (jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(seeds))
                         for key, seeds in zip(jax.random.split(jax.random.key(args.seed)),
                                               (args.seeds, args.tune_seeds or args.seeds)))
    splits = dataset.train, dataset.test

    def problem(size, hyper):
        task_in = partial(tasks.task_of, args, dataset, size.width, size.depth)
        return contender.on(task_in, hyper)

    def tested(size, hyper, key, splits):
        task, make_optimizer = problem(size, hyper)
        params, losses = tasks.train(task, make_optimizer, splits[0], key, size.steps)
        return losses, task.test(params, splits[1])

    def trained(*args):
        return tested(*args)[0]

    def checked(size, hyper, key, splits):
        layers = tasks.coordinate_check(*problem(size, hyper), splits[0], key, size.steps)
        return jax.tree.map(lambda x: x[np.array(marks(size)) - 1], layers)

    def marks(size):  # after 1, 10, … and all steps
        return sorted({size.steps, *(10**i for i in range(len(str(size.steps))))})

    @functools.lru_cache(maxsize=2)  # of one size: to tune, to measure
    def program(function, size, seeds):
        return over_seeds(partial(function, size), seeds)

    @remember
    def tuning_loss(size, hyper):
        size = size._replace(steps=args.tune_steps or size.steps)
        losses = program(trained, size, len(tuning))(hyper, tuning, splits)
        return or_inf(tasks.final_loss(np.asarray(losses)).mean())

    @remember
    def measured(size, hyper):
        what = checked if args.sweep == "coordinate-check" else tested
        found = program(what, size, len(measuring))(hyper, measuring, splits)
        if what is checked:
            return check_rows(found, marks(size))
        losses, tests = jax.tree.map(np.asarray, found)
        return [summary(losses, tests, problem(size, hyper)[0].max_loss)]

    choices_at = hyperparameters(contender, args.tune, sizes, tuning_loss)
    for size, choices in zip(sizes, choices_at):
        yield [{"optimizer": contender.name, "tuned": tuned, **size._asdict(),
                **{field: getattr(hyper, field) for field in contender.factors}, **row}
               for tuned, hyper in choices.items() for row in measured(size, hyper)]


# ~~~~~~~~ waterline: the paper above, the machine and what is ours below ~~~~~~~~


def contender_of(path: str, args: argparse.Namespace) -> Contender:
    """The θ of a file as a contender. Ours: --step-mult, --decay and --cooldown."""
    learned = lopt.load(path)
    learned = learned._replace(step_mult=args.step_mult or learned.step_mult,
                               decay=learned.decay if args.decay is None else args.decay)

    def make(task, hyper, num_steps):
        optimizer = tasks.optimizer_for(task, learned, num_steps)
        return lopt.with_cooldown(optimizer, num_steps, args.cooldown)

    name, p = Path(path).stem, learned.parametrization
    content = Path(path).read_bytes()
    return Contender(name, p, make, factors=dict.fromkeys(args.tune_theta if p.is_mup else (), 2.0),
                     identity=f"{name} {hashlib.sha256(content).hexdigest()}",
                     widths=learned.made.get("settings", {}).get("widths", ()))


def or_inf(x: Any) -> float:
    """A number as a float, inf if it is not finite."""
    return float(x) if np.isfinite(x) else math.inf


def summary(losses: np.ndarray, tests: Sequence[np.ndarray], max_loss: float) -> Row:
    """The row of runs with losses [seeds, steps] and tests (losses, accuracies), [seeds] each.

    std is √(mean of squared deviations) over the seeds. If one has diverged, the mean is inf.
    """
    final = tasks.final_loss(losses)
    diverged = int(np.sum(~(final <= max_loss)))  # nan counts, too
    row = {"seeds": len(final), "diverged": diverged}
    if diverged:
        return row | {"loss": math.inf}
    test_loss, accuracy = (or_inf(x.mean()) for x in tests)
    return row | {"loss": float(final.mean()), "test_loss": test_loss, "test_accuracy": accuracy,
                  "std": float(final.std()) if len(final) > 1 else math.nan}


def check_rows(layers: dict[str, tuple[np.ndarray, np.ndarray]], marks: Sequence[int]) -> list[Row]:
    """Rows of a coordinate check. layers: {layer: mean squares (of values, of changes)}."""
    rows = []
    for layer, squares in layers.items():
        rms, change = (np.sqrt(np.mean(np.asarray(x), axis=0)) for x in squares)  # [marks]
        rows += [{"layer": layer, "step": mark, "rms": or_inf(x),
                  "rms_change": 0.0 if moved < 1e-6 * x else or_inf(moved)}  # rounding
                 for mark, x, moved in zip(marks, rms, change)]
    return rows


def groups(rows: list[Row], *columns: str) -> dict[tuple, list[Row]]:
    """The rows by their values in some columns, in order of appearance."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[column] for column in columns), []).append(row)
    return grouped


def add_slopes(rows: list[Row]) -> None:
    """Add to a coordinate check the slope of ln change against ln width."""
    for group in groups(rows, "optimizer", "tuned", "depth", "steps", "layer", "step").values():
        changes = np.array([row["rms_change"] for row in group])
        changes[np.isinf(changes)] = np.nan
        slope = float(tasks.slope([row["width"] for row in group], changes))
        for row in group:
            row["slope"] = slope


def over_seeds(function: Callable, seeds: int) -> Callable:
    """Jit function(hyper, key, splits) for keys [seeds], shared among the devices."""
    share = math.ceil(seeds / len(jax.devices()))
    count = math.ceil(seeds / share)
    mesh = Mesh(np.array(jax.devices()[:count]), ("seeds",))
    copies, by_seed = PartitionSpec(), PartitionSpec("seeds")

    def on_device(hyper, keys, splits):
        at_once = None if jax.default_backend() == "cpu" else share
        return jax.lax.map(lambda key: function(hyper, key, splits), keys, batch_size=at_once)

    def on_all(hyper, keys, splits):
        sharded = jax.shard_map(on_device, mesh=mesh, check_vma=False, out_specs=by_seed,
                                in_specs=(copies, by_seed, copies))
        padded = jnp.concatenate([keys, keys[:count * share - seeds]])  # to full shares
        return jax.tree.map(lambda x: x[:seeds], sharded(hyper, padded, splits))

    return jax.jit(on_all)


# -------- Files: the results so far, the CSV and the figure


class Journal:
    """NAME.jsonl: the settings, then a line [key, result] for each result."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.file = lopt.lock(path)
        self.file.seek(0)
        whole, newline, _ = self.file.read().rpartition(b"\n")  # the last line may be torn
        self.file.truncate(len(whole + newline))
        first, *lines = whole.split(b"\n")
        with reading(path):
            self.results = {json.dumps(key): result for key, result in map(json.loads, lines)}
            before, now = json.loads(first or "{}"), json.loads(json.dumps(about))
            wrong = [name for name in now if before and before.get(name) != now[name]]
        if not before:
            self.append(about)
        if wrong:
            raise InputError(f"{path}: has another {', '.join(wrong)}; give another --name")

    def append(self, line: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()

    def remember(self, identity: str, function: Callable) -> Callable:
        """The function, whose results are kept here."""
        def remembered(size, hyper):
            key = json.dumps([identity, function.__name__, size, hyper])
            if key not in self.results:
                self.results[key] = function(size, hyper)
                self.append([json.loads(key), self.results[key]])
            return self.results[key]

        return remembered


COLUMNS = ("optimizer", "tuned", "width", "depth", "steps", "seeds", "diverged", "loss", "std",
           "test_loss", "test_accuracy", *Hyper._fields)
CHECK_COLUMNS = (*COLUMNS[:2], "depth", "layer", "step", "width", "rms", "rms_change", "slope",
                 *Hyper._fields)
FORMATS = dict.fromkeys(("rms", "rms_change", *Hyper._fields), ".4g") | {"slope": "+.3f"}


def write_csv(path: Path, rows: list[Row], columns: Sequence[str]) -> list[Sequence[str]]:
    """Write the rows, inf as "diverged", nan as "-". Return the cells."""
    def cell(column, x):
        if not isinstance(x, float):
            return str(x)
        if not math.isfinite(x):
            return "-" if math.isnan(x) else "diverged"
        return format(x, FORMATS.get(column, ".4f"))

    cells = [columns, *([cell(c, row.get(c, math.nan)) for c in columns] for row in rows)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(cells)
    lopt.write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return cells


NAMES = {"mulo_m": "μLO_M", "lo_m": "LO_M", "mulo_s": "μLO_S", "lo_s": "LO_S", "adamw": "AdamW",
         "mulo_m_128": "μLO_M, base width 128 (ours)", "muadam": "μAdam"}


def draw(path: Path, args: argparse.Namespace, rows: list[Row], known: list[int]) -> None:
    """Draw the rows as a PNG. known: the widths of meta-training, to be shaded."""
    from matplotlib.figure import Figure

    x, panel_by = {"width": ("width", ["depth"]), "depth": ("depth", ["width"]),
                   "horizon": ("steps", ["width"]),
                   "coordinate-check": ("width", ["optimizer", "layer"])}[args.sweep]
    is_check = args.sweep == "coordinate-check"
    y, line_by = ("rms_change", ["step"]) if is_check else ("loss", ["optimizer", "tuned"])
    panels = groups(rows, *panel_by)
    across = len(groups(rows, "layer")) if is_check else len(panels)
    down = math.ceil(len(panels) / across)
    figure = Figure((max(6, 3.5 * across), 1 + 3 * down), dpi=120, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    ticks = sorted({row[x] for row in rows})
    names = NAMES | {"transfer": f"tuned at {x} {ticks[0]}", "per-width": f"tuned at each {x}"}
    for axis, (name, group) in zip(axes, panels.items()):
        for i, (line, points) in enumerate(groups(group, *line_by).items()):
            at, values = [row[x] for row in points], np.array([row[y] for row in points])
            label = ", ".join(names.get(word, str(word)) for word in line if word != "-")
            axis.errorbar(at, np.where(np.isinf(values), np.nan, values),
                          [row.get("std", 0.0) for row in points], label=label, color=f"C{i}",
                          marker="o", markersize=3, capsize=2)
            gone = [row[x] for row in points if math.isinf(row[y])]
            axis.plot(gone, [0.97 - 0.04 * i] * len(gone), "x", color=f"C{i}",
                      transform=axis.get_xaxis_transform())
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set_yscale("log" if is_check else "linear")
        axis.set_title(", ".join(f"{by} {word}" if isinstance(word, int) else names.get(word, word)
                                 for by, word in zip(panel_by, name)), fontsize=8)
        if x == "width" and known:
            axis.axvspan(min(known) / 1.1, max(known) * 1.1, color="gray", alpha=0.15, linewidth=0)
    axes[0].legend(fontsize=7, title="step" if is_check else None)
    figure.suptitle(f"{args.task} on {args.dataset}, batches of {args.batch_size}")
    figure.supxlabel(f"{x} (×: diverged; gray, if any: meta-training)")
    figure.supylabel("RMS change of pre-activations" if is_check else "training loss")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    lopt.write_atomically(path, lambda file: file.write(png.getvalue()))


SWEEPS = {"width": dict(widths=[32, 128, 512]), "depth": dict(depths=[3, 6, 12, 16]),
          "horizon": dict(lengths=[1000, 5000, 25000]),
          "coordinate-check": dict(widths=[32, 128, 512], steps=500)}  # their defaults


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the sweep. Raises `InputError`."""
    parser = tasks.CommandLine("evaluate.py", __doc__)
    flag = parser.flag
    flag("--sweep", tuple(SWEEPS), "width", "what varies; sets further defaults")
    flag("--theta", str, [], "files of θ", metavar="FILE")
    flag("--baselines", tuple(BASELINES), [], "AdamW; + decay; + decay, cosine; μAdam")
    tasks.add_task_flags(parser)
    flag("--depths", COUNT, [], "depths (default: --depth; depth sweep: 3 6 12 16)")
    flag("--steps", COUNT, 1000, "inner steps")
    flag("--lengths", COUNT, [], "several --steps (horizon sweep: 1000 5000 25000)")
    flag("--seeds", COUNT, 3, "inner runs of each optimizer")
    flag("--tune", ("transfer", "per-width", "both", "none"), "transfer", "tune at the first size, "
         "at each, both ways, or not")
    flag("--tune-steps", COUNT, None, "inner steps of tuning (default: those of the run)")
    flag("--tune-seeds", COUNT, None, "inner runs of tuning (default: --seeds)")
    flag("--tune-theta", ("input_mult", "output_mult", "hidden_lr_mult"), [],
         "ours: tune these multipliers of θ, at the first size")
    flag("--step-mult", SCALE, None, "ours: replace θ's own scale of updates")
    flag("--decay", SHARE, None, "ours: replace θ's own decay")
    flag("--cooldown", SHARE, 0.0, "ours: last share of a run, where θ's updates fall to 0")
    flag("--out", str, "runs/evaluate", "folder of the results", metavar="DIR")
    flag("--name", str, None, "name of the files in --out (default: the sweep)")
    flag("--plot", bool, False, "draw NAME.png, too; needs matplotlib")
    parser.set_defaults(**SWEEPS[parser.parse_args(argv).sweep])
    args = parser.parse_args(argv)
    if not args.theta + args.baselines:
        raise InputError("nothing to evaluate: give --theta or --baselines")
    if args.sweep == "coordinate-check" and len(args.widths) < 2:
        raise InputError("--widths: a coordinate check needs two or more")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    return args


DECIDE = ("sweep", "task", "patch", "batch_size", "vocab_size", "matmul_precision", "seed", "seeds",
          "tune_steps", "tune_seeds", "step_mult", "decay", "cooldown")  # they decide each result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it. Raises `InputError` for bad input."""
    args = parse(argv)
    tasks.set_up(args)
    contenders = [*(contender_of(path, args) for path in args.theta),
                  *(BASELINES[name]._replace(identity=name) for name in args.baselines)]
    if len({contender.name for contender in contenders}) < len(contenders):
        raise InputError("two contenders have the same name")
    dataset = tasks.load_data(args)
    sizes = [Size(width, depth, steps) for depth in args.depths or [args.depth]
             for width in args.widths for steps in args.lengths or [args.steps]]
    for size in sizes:  # is each possible?
        tasks.task_of(args, dataset, size.width, size.depth, mup.SP)
    path = Path(args.out) / f"{args.name or args.sweep}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.with_suffix(".jsonl").exists():
        raise InputError(f"{path}: is already there; choose another --out or --name")
    about = {name: getattr(args, name) for name in DECIDE} | {"data": tasks.fingerprint(dataset)}
    journal, rows = Journal(path.with_suffix(".jsonl"), about), []
    jobs = len(contenders) * len(sizes)
    with np.errstate(all="ignore"), tqdm.tqdm(total=jobs, disable=None) as bar:
        for contender in contenders:
            remember = partial(journal.remember, contender.identity)
            for new in sweep(args, dataset, contender, sizes, remember):
                rows += new
                bar.update()
                row = new[-1]
                bar.write(f"{row['optimizer']}, width {row['width']}, depth {row['depth']}, "
                          f"{row['steps']} steps: loss {row.get('loss', math.nan):.4f}", sys.stderr)
    is_check = args.sweep == "coordinate-check"
    if is_check:
        add_slopes(rows)
    cells = write_csv(path, rows, CHECK_COLUMNS if is_check else COLUMNS)
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(f"{text:>{n}}" for text, n in zip(line, widths)))
    print(f"\nwrote {path}", flush=True)
    if args.plot:
        draw(path.with_suffix(".png"), args, rows,
             [width for contender in contenders for width in contender.widths])
    return 0


if __name__ == "__main__":
    sys.exit(tasks.command(main, "evaluate.py"))
