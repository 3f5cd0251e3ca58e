"""The meta-step, and whole runs: files, resuming, signals, bad input, one process and two."""

import concurrent.futures
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from kill_and_resume import results, rows, start

import es
import lopt
import meta_train
import mup
import tasks

KEY = jax.random.key(0)
FIRST = lopt.Learned(lopt.init_theta(KEY, (8, 8)), 0.02, 0.002,
                     mup.Parametrization("mup", 1.0, 2.0, 3.0, 8), made={"by": "hand"})
MAKE, PROGRAM = meta_train.make_meta_step, []


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No optimizations by XLA, and one program for all runs in this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_train, "make_meta_step", lambda *args: (
            PROGRAM or PROGRAM.extend(MAKE(*args)) or PROGRAM))
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_default_matmul_precision", None)


def program(flags, inner_tasks):
    flags = f"{flags} --pairs 4 --truncation 5 --min-length 10 --max-length 20 --max-offset 5"
    init, step = MAKE(meta_train.parse(flags.split())[0], inner_tasks, Mesh(jax.devices()[:1], "n"),
                      lopt.Learned(FIRST.theta, 0.1, parametrization=mup.SP))
    return jax.device_get(init()), lambda state, splits: jax.device_get(step(state, splits))


QUADRATIC = SimpleNamespace(
    weights={"w": mup.Weight("vector", (3,), 1)}, parametrization=mup.SP, max_loss=99.0,
    init=lambda key: {"w": jax.random.normal(key, (3,))}, sample=lambda key, split: split,
    loss=lambda params, batch: jnp.sum((params["w"] - batch) ** 2))


def test_meta_training_lowers_the_meta_loss():
    (state, step), losses = program("--warmup-steps 1 --learning-rate 0.03", [QUADRATIC]), []
    while len(losses) < 60:
        state, metrics = step(state, [3.0])
        losses.append(metrics.meta_loss)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_the_meta_optimizer(monkeypatch):
    """The schedule and the limit of AdamW on given gradients, some of which are not finite."""
    monkeypatch.setattr(es, "unroll_pair", lambda inner, pes, key, pair, theta, split, i: (
        (split, jnp.mean(split)), pair))
    flags = "--meta-steps 20 --warmup-steps 4 --learning-rate 0.1 --final-learning-rate 0.01"
    (state, step), rates = program(flags, [QUADRATIC] * 2), []
    good, part, mixed, bad = np.ones((4, n := state.theta.size), np.float32)
    part[:9], mixed[:9], bad[:] = 0.0, [np.nan, np.inf, -np.inf] * 3, np.nan
    assert not np.any(np.isin(*(pairs.params["w"] for pairs in state.pairs)))  # of the two tasks
    for _ in range(21):
        state, metrics = step(state, [good, 3 * good])
        rates.append(metrics.learning_rate)
        np.testing.assert_allclose(metrics[:3], [2, 2 * n**0.5, min(1, rates[-1] * n**0.5)], 0.01)
    expected = [3e-10, 0.025, 0.05, 0.075, 0.1, 0.01, 0.01]  # the cosine ends after 98% of 20
    np.testing.assert_allclose(rates[:5] + rates[19:], expected, rtol=1e-5)
    after, metrics = step(state, [bad, good])
    jax.tree.map(np.testing.assert_array_equal, state._replace(meta_step=22), after)
    assert metrics.nonfinite == n and metrics[1:3] == (0.0, 0.0)
    (one, without), (other, metrics) = (step(state, [g, part]) for g in (part, mixed))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert without.nonfinite == 0 and metrics.nonfinite == 9


def test_the_adam_start_is_adam_beside_a_small_rest():
    theta = meta_train.adam_start(FIRST.theta)
    assert 0 < np.max(np.abs(theta["w2"][2:])) < 0.1
    learned = lopt.Learned(theta | {"w2": theta["w2"].at[2:].set(0.0)}, 0.01)
    optimizer, g = lopt.learned_optimizer(learned), jax.random.normal(KEY, (4, 6))
    update, state = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g))(g)
    adam = state.averages.m[0] * jax.lax.rsqrt(state.averages.v + 1e-6)
    np.testing.assert_allclose(update, -0.01 * adam * jax.lax.rsqrt(1e-5 + jnp.mean(adam**2)),
                               rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("flags, expected", [
    ("", [[32], 64, 16.0, 0.003]), ("--parametrization sp", [[32], 64, 16.0, 0.001]),
    ("--preset paper-m --step-mult 3", [[128, 512, 1024], 4096, 1.0, 3.0]),
    ("--preset paper-s --parametrization sp", [[128], 4096, 1.0, 0.001]),
    ("--first-theta @ --preset paper-s", [[128], 4096, 2.0, 0.02]),
    ("--output-mult 5 --first-theta @ --step-mult 3", [[32], 64, 5.0, 3.0])])
def test_flags_win_over_a_first_theta_and_that_over_presets(flags, expected, tmp_path):
    lopt.save(tmp_path / "first.npz", FIRST._replace(decay=0.1, horizon=7))
    args, first = meta_train.parse(flags.replace("@", str(tmp_path / "first.npz")).split())
    assert [args.widths, args.batch_size, args.output_mult, args.step_mult] == expected
    assert not first or (args.hidden_lr_mult, args.exp_mult, args.base_width, args.decay,
                         args.horizon) == (3.0, 0.002, 8, 0.1, 7)


TINY = """--widths 4 --depth 1 --batch-size 4 --dataset mnist --pairs 4 --truncation 10
    --min-length 10 --max-length 30 --max-offset 10 --meta-steps 15 --warmup-steps 3
    --checkpoint-every 3 --report-steps 0 --data-dir @ --first-theta @/first.npz"""


def prepare(folder, label=1):
    """Write FIRST, 60 labels and 60 images of 4 × 4 pixels, and return the flags of a run."""
    lopt.save(folder / "first.npz", FIRST)
    sizes, pixels = [0, 0, 0, 60, 0, 0, 0, 4, 0, 0, 0, 4], [*range(240)] * 4
    for part in ("train", "t10k"):
        (folder / f"{part}-labels-idx").write_bytes(bytes([0, 0, 8, 1, *sizes[:4], *[label] * 60]))
        (folder / f"{part}-images-idx").write_bytes(bytes([0, 0, 8, 3, *sizes, *pixels]))
    return TINY.replace("@", str(folder))


def run(*words):
    return tasks.command(meta_train.main, "meta_train.py", [str(word) for word in words])


def resume(out, *words):
    return run("--resume", "--out", out, "--report-steps", 0, *words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run in a worker thread that began with FIRST, whose file is gone."""
    folder = tmp_path_factory.mktemp("runs")
    flags = f"{prepare(folder)} --out {folder}/finished".split()
    jax.config.update("jax_disable_most_optimizations", False)  # for the bits of its processes
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(meta_train.main, flags).result() == 0
    jax.config.update("jax_disable_most_optimizations", True)
    (folder / "first.npz").unlink()
    return folder / "finished"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def call_after(monkeypatch, functions):  # {meta-steps: function}
    def goes_on(run, meta_steps, goes_on=meta_train.Run.goes_on):
        functions.get(len(run.rows), lambda: None)()
        return goes_on(run, meta_steps)

    monkeypatch.setattr(meta_train.Run, "goes_on", goes_on)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_run_writes_theta_metrics_and_two_checkpoints(finished):
    learned = lopt.load(finished / "theta.npz")
    assert learned[1:5] == FIRST[1:5] and learned.made["origin"] == FIRST.made
    assert learned.made["meta_steps_made"] == 15 and learned.made["settings"]["widths"] == [4]
    moved = np.abs(ravel_pytree(learned.theta)[0] - ravel_pytree(FIRST.theta)[0])
    assert 1e-3 < np.max(moved) < 15 * 3e-3  # fifteen steps of AdamW from FIRST
    header, *lines = rows(finished)
    assert header == ",".join(("meta_step", *meta_train.Metrics._fields))
    assert [line.split(",")[0] for line in lines] == [str(i) for i in range(1, 16)]
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "theta.npz", "metrics.csv", "checkpoint-00000012.npz", "checkpoint-00000015.npz"}


def test_damaged_checkpoints_fall_back_to_a_whole_one_or_are_refused(copy, finished, capsys):
    older, newest = sorted(copy.glob("checkpoint-*"))
    whole, damaged = older.read_bytes(), bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    older.write_bytes(whole[:-1])
    newest.write_bytes(damaged)
    before = contents(copy)
    assert resume(copy) == 2 and contents(copy) == before
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and f"error: --out {copy}: no checkpoint" in error
    older.write_bytes(whole)
    assert resume(copy) == 0 and results(copy) == results(finished)
    assert f"warning: {newest}" in capsys.readouterr().err and lopt.read_npz(newest)


def test_a_longer_run_appends_each_row_with_its_own_time(copy, finished, monkeypatch):
    seen = []
    call_after(monkeypatch, {15: lambda: time.sleep(1), 16: lambda: seen.extend(rows(copy))})
    assert resume(copy, "--meta-steps", 17) == 0
    assert rows(copy)[:17] == seen and seen[:16] == rows(finished) and len(rows(copy)) == 18
    seconds = np.genfromtxt(copy / "metrics.csv", delimiter=",", names=True)["seconds"]
    assert seconds[15] >= 1 > seconds[16]


@pytest.mark.parametrize("number, made", [
    (signal.SIGTERM, 7), (signal.SIGINT, 0), (signal.SIGHUP, 7), (signal.SIGUSR1, 15)])
def test_signals_save_and_say_how_to_resume(number, made, finished, tmp_path, monkeypatch, capsys):
    flags, out, handler = prepare(tmp_path), tmp_path / "out", signal.getsignal(number)
    with monkeypatch.context() as patch:
        call_after(patch, {made: lambda: (signal.raise_signal(number), time.sleep(0.3))})
        assert run(*flags.split(), "--out", out, "--resume") == 128 + number  # there is no run yet
    error = capsys.readouterr().err
    assert "stopping after this meta-step" in error and error.endswith(f"--out {out} --resume\n")
    assert lopt.load(out / "theta.npz").made["meta_steps_made"] == made
    assert signal.getsignal(number) is handler
    assert resume(out) == 0 and results(out) == results(finished)


def test_a_folder_in_use_other_settings_and_other_data_are_refused(copy, tmp_path, capsys):
    before = contents(copy)
    with lopt.lock(copy / ".lock"):
        assert resume(copy) == 2
    assert resume(copy, "--sigma", 0.5) == 2
    prepare(tmp_path, label=2)
    assert resume(copy, "--data-dir", tmp_path) == 2 and contents(copy) == before
    in_use, setting, data = capsys.readouterr().err.splitlines()
    assert str(copy) in in_use and "another process" in in_use
    assert "--sigma" in setting and "0.01" in setting and "--dataset" in data


@pytest.mark.parametrize("flags", [
    "--no-such-flag 3", "stray", "--widt 8", "--widths", "--widths 8 0", "--depth 1.5", "--resume",
    "--sigma nan", "--sigma 0", "--seed 4294967296", "--learning-rate x", "--task rnn", "--out @",
    "--preset paper", "--truncation 1001", "--min-length 3000", "--max-offset 1001", "--task lm",
    "--distributed a b --out x", "--first-theta absent", "--first-theta @/metrics.csv",
    "--dataset cifar10 --data-dir absent", "--task vit --patch 3", "--out @/metrics.csv",
    "--start adam --hidden 8 1", "--distributed"])
def test_bad_input_is_one_line_that_names_it(flags, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before, words = contents(finished), flags.replace("@", str(finished)).split()
    assert run("--dataset", "mnist", "--data-dir", finished.parent, *words) == 2
    assert contents(finished) == before and not contents(tmp_path)
    error = capsys.readouterr().err
    assert error.startswith("meta_train.py: error: ") and error.count("\n") == 1, error
    assert any(word in error for word in words if len(word) > 3), error


def test_the_report_compares_with_adamw_in_sp(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "optimizer_for", lambda *args: lopt.adamw(1e-2))  # in μP, for θ
    args, _ = meta_train.parse(f"{prepare(tmp_path)} --report-steps 5".split())
    data, rates = tasks.load_data(args), meta_train.RATES
    losses = meta_train.compare_with_adamw(args, data, FIRST)
    assert [*losses] == [4, 64] and all([*adamw] == [*rates] for _, adamw in losses.values())
    _, expected = jax.jit(lambda split: tasks.train(
        tasks.mlp_task(data, 4, 1, 4, mup.SP), lambda steps: lopt.adamw(1e-2), split,
        jax.random.key(1), 5))(data.train)
    assert losses[4][1][1e-2] == pytest.approx(float(expected[-1]), rel=1e-5) != losses[4][0]
    losses = {4: (1.52, dict(zip(rates, (1.9, 1.57, 1.5, np.nan)))),
              64: (1.26, dict(zip(rates, (1.3, 1.2, 1.32, np.nan))))}
    *_, narrow, wide = meta_train.report(losses, args).splitlines()  # best at 4, best, 0.001
    assert narrow.split() == ["4", "1.5200", *["1.5000", "(0.003)"] * 2, "1.5700"]
    assert wide.split() == ["64", "1.2600", "1.3200", "(0.003)", "1.2000", "(0.001)", "1.2000"]


# -------- Processes of their own
def begin(out, flags, processes=1):
    flags = f"{TINY.replace('@', str(out.parent))} {flags}"
    return start(out, flags, processes)


def said(out):
    return out.with_suffix(".log").read_text()


def wait_until(condition, out, processes):
    while not condition():
        assert all(process.poll() is None for process in processes), said(out)
        time.sleep(0.002)


def interrupt(folder):
    """Interrupt a long meta-step twice: (code, log)."""
    out = folder / "long"
    one, = begin(out, "--truncation 100000000 --min-length 100000000 --max-length 100000000")
    try:
        wait_until(lambda: rows(out), out, [one])
        time.sleep(2)  # XLA compiles or computes
        one.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping after this meta-step" in said(out), out, [one])
        one.send_signal(signal.SIGINT)
        return one.wait(60), said(out)
    finally:
        one.kill()


def kill(folder):
    """Kill a run, resume it as two processes, kill one, resume it as one, interrupt its report."""
    out = folder / "killed"
    one, = begin(out, "")
    wait_until(lambda: len(rows(out)) > 4, out, [one])
    one.kill()
    one.wait()
    two = begin(out, "--resume", processes=2)
    wait_until(lambda: len(rows(out)) > 8, out, two)
    two[1].kill()
    survivor = two[0].wait(120), said(out)
    one, = begin(out, "--resume --report-steps 100000")
    wait_until(lambda: "wrote" in said(out), out, [one])
    one.send_signal(signal.SIGINT)
    return survivor, (one.wait(60), said(out)), out


def whole_runs(folder):
    prepare(folder)
    return side_by_side(lambda function: function(folder), (interrupt, kill))


@pytest.fixture
def runs(whole_runs):
    return whole_runs.result()


def test_a_killed_process_ends_the_other(runs):
    _, ((code, log), _, _) = runs
    assert code == 2 and "Traceback" not in log and "--resume" in log.splitlines()[-1], log


def test_a_killed_run_resumes_to_the_same_bits_as_any_number_of_processes(runs, finished):
    _, (_, _, out) = runs
    assert results(out) == results(finished)  # by one process on four devices


def test_ctrl_c_ends_a_comparison_and_the_second_one_a_long_meta_step(runs):
    end, (_, other_end, out) = runs
    for code, log in (end, other_end):
        assert code == 130 and log.endswith("\n\nmeta_train.py: interrupted\n"), log
    assert lopt.load(out / "theta.npz").made["meta_steps_made"] == 15
