"""Tests of evaluation: tuning, tables, sweeps, the journal, the figure and bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side

import evaluate
import lopt
import mup
import tasks
from evaluate import BASELINES, Hyper, Size

TINY = ("--dataset mnist --data-dir . --widths 4 --depth 1 --batch-size 8 --steps 40 --tune both "
        "--tune-steps 9 --step-mult 0.02 --decay 0.01 --cooldown 0.5 --baselines adamw_cosine")
OUT = Path("runs", "evaluate")
JOURNAL, TABLE = OUT / "width.jsonl", OUT / "width.csv"


def command(words):
    return tasks.command(evaluate.main, "evaluate.py", words.split())


def read():
    names, *lines = [line.split(",") for line in TABLE.read_text().splitlines()]
    return [dict(zip(names, line)) for line in lines]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with random images in MNIST's files, a θ, and a finished evaluation."""
    folder, rng = tmp_path_factory.mktemp("evaluated"), np.random.default_rng(0)
    for name, count in ("train", 200), ("t10k", 100):
        images = rng.integers(256, size=(count, 4, 4), dtype=np.uint8)
        for kind, x in ("images", images), ("labels", images[:, 0, 0] % 10):
            header = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes()
            (folder / f"{name}-{kind}-idx{x.ndim}").write_bytes(header + x.tobytes())
    theta = shutil.copy(ROOT / "results" / "mulo_m.npz", folder)
    jax.config.update("jax_disable_most_optimizations", True)
    assert command(f"{TINY} --theta {theta} --data-dir {folder} --out {folder / OUT}") == 0
    yield folder
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def in_a_copy(evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(evaluated, tmp_path / "copy"))


def test_tune_walks_to_an_optimum():
    def loss_of(hyper):
        tried.append((hyper.learning_rate, hyper.output_mult))
        x, y = np.log(0.9 / hyper.learning_rate) / np.log(3), np.log2(hyper.output_mult) / 2
        return (x - y) ** 2 + 2 * (y - 6) ** 2 if x > 0.5 else np.inf
    tried = []
    best = evaluate.tune(loss_of, Hyper(0.9), {"learning_rate": 3.0, "output_mult": 4.0})
    assert best == Hyper(0.0037037, output_mult=4.0**6)  # (x, y) goes to (1, 4), (4, 5), (5, 6)
    assert len(set(tried)) == len(tried) and sorted({rate for rate, _ in tried}) == [
        0.00123457, 0.0037037, 0.0111111, 0.0333333, 0.1, 0.3, 0.9, 2.7]


def test_hyperparameters_are_kept_or_tuned_again():
    """All optima fall with the width. per-width does not tune multipliers again."""
    def loss_at(size, hyper):
        x = hyper.learning_rate / 0.032, hyper.output_mult, 10 * (hyper.weight_decay or 0.1)
        return np.sum(np.log2(np.array(x) * size.width / 32) ** 2)

    def choose(how, contender, sizes=(Size(32, 3, 10), Size(128, 3, 10))):
        return list(evaluate.hyperparameters(contender, how, sizes, loss_at))
    muadam = BASELINES["muadam"]
    first, again = (muadam.start._replace(learning_rate=x, output_mult=1.0) for x in (0.032, 0.008))
    assert choose("transfer", muadam) == [{"transfer": first}] * 2
    assert choose("per-width", muadam) == [{"per-width": first}, {"per-width": again}]
    assert choose("both", muadam) == [{"transfer": first, "per-width": x} for x in (first, again)]
    assert choose("none", muadam) == [{"none": muadam.start}] * 2
    assert choose("per-width", BASELINES["adamw_decay"])[1] == {"per-width": Hyper(0.008, 0.025)}
    args = evaluate.parse("--theta mulo_m.npz --tune-theta output_mult".split())
    tuned, own = evaluate.contender_of("mulo_m.npz", args), lopt.load("mulo_m.npz").parametrization
    assert choose("per-width", tuned) == [{"transfer": Hyper()}] * 2
    p, _ = tuned.on(lambda p: p, Hyper(output_mult=0.5, hidden_lr_mult=2.0))
    assert p == own._replace(output_mult=8.0) and own.output_mult == 16.0


def test_muadam_has_the_multipliers_of_mup():
    weights, ones = {"w": mup.Weight("hidden", (2, 3), 2)}, {"w": jnp.ones((2, 3))}
    _, make = BASELINES["muadam"].on(lambda p: tasks.Task(2, weights, None, p, None, None),
                                     Hyper(0.01, hidden_lr_mult=0.5))
    updates, _ = make(9).update(ones, make(9).init(ones), ones)
    np.testing.assert_allclose(updates["w"], -0.01 * 0.5 / 2, rtol=1e-5)  # fan_in 2


def test_a_table_counts_what_diverged():
    losses, tests = np.full((3, 40), 2.0), (np.array([1.0, 2.0, 6.0]), np.array([0.1, 0.2, 0.3]))
    losses[0, -1], losses[1, -2:] = np.nan, 4.0  # the last two steps count
    rows = [evaluate.summary(losses, tests, 3.4)]
    losses[0], losses[1] = 2.5, 3.0
    rows += [evaluate.summary(losses, tests, 3.4) | {"optimizer": "a,b", "rms": 1 / 128},
             evaluate.summary(losses[:1], (np.array([np.nan]), tests[1]), 3.4)]
    evaluate.write_csv(TABLE, rows, ["optimizer", *evaluate.COLUMNS[5:11], "rms"])
    assert TABLE.read_text().splitlines()[1:] == [
        "-,3,2,diverged,-,-,-,-", '"a,b",3,0,2.5000,0.4082,3.0000,0.2000,0.007812',
        "-,1,0,2.5000,-,diverged,0.2000,-"]


def test_coordinate_check_has_root_mean_squares_and_slopes(monkeypatch):
    def check(task, make_optimizer, split, key, steps):
        x = task.weights["logits"]["w"].shape[0] * jnp.arange(1.0, steps + 1)  # width · step
        return {"a": (x, x), "b": (x, 1e-15 * x)}  # float32 cannot tell b's change from 0
    squares = np.array([[4.0, np.nan], [16.0, 1.0]])  # [seeds, marks]
    assert evaluate.check_rows({"a": (squares, squares / 10)}, [1, 10]) == [
        {"layer": "a", "step": 1, "rms": pytest.approx(10**0.5), "rms_change": 1.0},
        {"layer": "a", "step": 10, "rms": np.inf, "rms_change": np.inf}]
    monkeypatch.setattr(tasks, "coordinate_check", check)
    assert command(f"{TINY} --sweep coordinate-check --tune none --widths 4 16 --steps 12") == 0
    assert (OUT / "coordinate-check.csv").read_text().splitlines()[1:] == [
        f"adamw_cosine,none,1,{layer},{step},{width},{(width * step)**0.5:.4g},"
        f"{change * (width * step)**0.5:.4g},{slope},0.001,0.1,-,-,-" for width in (4, 16)
        for layer, change, slope in (("a", 1, "+0.500"), ("b", 0, "-")) for step in (1, 10, 12)]


def test_rows_are_those_of_direct_training():
    """All contenders train from the same keys: on the same batches."""
    def direct(p, optimizer_of):
        @jax.jit
        def run(seed):
            key = jax.random.fold_in(jax.random.split(jax.random.key(0))[0], seed)
            params, losses = tasks.train(task, lambda _: optimizer_of(task), dataset.train, key, 40)
            return jnp.array([jnp.mean(losses[-2:]), *task.test(params, dataset.test)])
        task = tasks.mlp_task(dataset, 4, 1, 8, p)
        return np.array([run(seed) for seed in range(3)])
    rows, dataset = read(), tasks.load_dataset("mnist", ".")
    rate, decay = (float(rows[1][name]) for name in ("learning_rate", "weight_decay"))
    learned = lopt.load("mulo_m.npz")._replace(step_mult=0.02, decay=0.01)
    found = side_by_side(direct, (learned.parametrization, mup.SP), (
        lambda task: lopt.with_cooldown(tasks.optimizer_for(task, learned), 40, 0.5),
        lambda task: lopt.adamw(lambda t: rate * jnp.cos(np.pi * t / 80) ** 2, weight_decay=decay)))
    for row, x in zip(rows, found):
        columns = [float(row[name]) for name in ("loss", "test_loss", "test_accuracy", "std")]
        assert columns == pytest.approx([*x.mean(axis=0), x[:, 0].std()], abs=2e-4)


@pytest.mark.parametrize("seeds, devices", [(1, 8), (5, 8), (8, 8), (11, 8), (5, 3), (5, 1)])
def test_the_number_of_devices_changes_no_seed(seeds, devices, monkeypatch):
    keys, some = jax.random.split(jax.random.key(0), seeds), jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    draw = evaluate.over_seeds(lambda hyper, key, x: [hyper * jax.random.uniform(key) + x], seeds)
    np.testing.assert_array_equal(draw(2.0, keys, 0.0)[0], 2 * jax.vmap(jax.random.uniform)(keys))


@pytest.mark.parametrize("number, code, more, wait", [
    (signal.SIGKILL, -9, "", 0.0), (signal.SIGINT, 130, "--lengths 40 10000000", 1.5)])
def test_a_stopped_evaluation_resumes(number, code, more, wait):
    """A kill stops it after its first result; Ctrl-C, while XLA computes."""
    expected = [line for line in TABLE.read_text().splitlines() if not line.startswith("mulo_m,")]
    JOURNAL.write_bytes(b"")
    argv = [sys.executable, ROOT / "evaluate.py", *f"{TINY} {more}".split()]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(argv, env=quick, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and JOURNAL.read_bytes().count(b"\n") < 2:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
    assert process.returncode == code and "Traceback" not in error
    assert ("evaluate.py: interrupted" in error) == (code == 130)
    whole, newline, _ = JOURNAL.read_bytes().rpartition(b"\n")
    JOURNAL.write_bytes(whole + newline + b'[["adamw_cosine", "measur')  # torn
    assert command(TINY) == command(TINY) == 0 and JOURNAL.read_bytes().startswith(whole)
    assert TABLE.read_text().splitlines() == expected


def test_only_new_results_are_trained(monkeypatch):
    monkeypatch.setattr(tasks, "train", lambda task, make_optimizer, split, key, steps: (
        trained.append(steps), (task.init(key), jnp.full(steps, 2.0)))[1])
    trained, rows, before = [], read(), JOURNAL.read_bytes()
    os.renames("mulo_m.npz", "moved/mulo_m.npz")
    moved = f"{TINY} --theta moved/mulo_m.npz"
    assert command(moved) == 0 and read() == rows and JOURNAL.read_bytes() == before
    assert not trained and command(f"{moved} --baselines adamw_cosine adamw") == 0
    assert trained == [9, 40] and read()[:3] == rows and read()[3]["loss"] == "2.0000"
    shutil.copy(ROOT / "results" / "mulo_s.npz", "moved/mulo_m.npz")
    assert command(moved) == 0 and trained == [9, 40, 40]
    assert read()[0]["loss"] == "2.0000" and read()[1:] == rows[1:]


def test_results_of_others_are_refused(capsys):
    def refusal(words=""):
        before = JOURNAL.read_bytes()
        assert command(f"{TINY} {words}") == 2 and JOURNAL.read_bytes() == before
        [error] = capsys.readouterr().err.splitlines()
        return error.split(f"evaluate.py: error: {JOURNAL}: ")[1]
    assert "another batch_size, seed;" in refusal("--seed 1 --batch-size 4")
    with lopt.lock(JOURNAL):
        assert "another process is using it" in refusal()
    assert "another sweep;" in refusal("--sweep coordinate-check --name width --widths 4 8")
    Path("t10k-labels-idx1").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 100, *[7] * 100]))
    assert "another data;" in refusal()
    JOURNAL.write_bytes(b"[1]\n")
    assert "cannot be read, or is damaged" in refusal()


def test_figure(monkeypatch):
    figures, drawn = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figures, "Figure", lambda *args, make=figures.Figure, **more: (
        drawn.append(make(*args, **more)), drawn[-1])[1])
    JOURNAL.write_text(JOURNAL.read_text().replace('"loss": ', '"loss": Infinity, "was": ', 1))
    assert command(f"{TINY} --theta mulo_m.npz --plot") == 0
    assert TABLE.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    [axis] = drawn[0].axes
    assert axis.get_legend().get_texts()[0].get_text() == "μLO_M"
    crosses = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "x"]
    band = axis.transData.inverted().transform(axis.patches[0].get_extents())
    assert crosses == [[4], [], []] and 28 < band[0, 0] < 32 and 128 < band[1, 0] < 142


@pytest.mark.parametrize("words, message", [
    ("", "nothing to evaluate"), ("--theta absent.npz", "absent.npz: cannot be read"),
    ("--theta mulo_m.npz ./mulo_m.npz", "same name"),
    ("--baselines sgd", "invalid choice: 'sgd'"), ("--baselines adamw --steps 0", "--steps: 0 is"),
    ("--baselines adamw --sweep coordinate-check --widths 8", "--widths: a coordinate check needs"),
    ("--baselines adamw --task vit --patch 3", "--patch 3: does not divide the image size 4"),
    ("--baselines adamw --out . --name old", "old.csv: is already there"),
    ("--baselines adamw --plot", "pip install matplotlib")])
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Path("old.csv").touch()
    before = sorted(tmp_path.rglob("*"))
    assert command(f"--dataset mnist --data-dir . --out new {words}") == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("evaluate.py: error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before
