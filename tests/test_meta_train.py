"""The meta-step on one and on many devices, and whole runs of the command line, by one process and by two."""

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side
from jax.sharding import Mesh

import evaluate
import lopt
import meta_train
import mup
import tasks

SETTINGS = meta_train.Settings(widths=(8,), depth=1, batch_size=8, pairs=8, truncation=5, min_length=10, max_length=20,
                               meta_steps=20, warmup_steps=2, hidden=16)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    split = tasks.Split(jnp.asarray(rng.integers(0, 256, (200, 4, 4, 3)), jnp.uint8),
                        jnp.asarray(rng.integers(0, 10, 200), jnp.int32))
    return tasks.Dataset("noise", 10, (0.5,) * 3, (0.3,) * 3, split, split)


def meta_train_on(devices, dataset, settings=SETTINGS, steps=20):
    """θ, the metrics and the last state after some meta-steps on the first so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("pairs",))
    parametrization = mup.Parametrization(settings.parametrization)
    inner = [tasks.task_of(settings, dataset, w, settings.depth, parametrization) for w in settings.widths]
    init, meta_step = meta_train.make_meta_step(settings, inner, mesh, meta_train.first_learned(settings))
    state, splits, rows = init(), [meta_train.replicate(dataset.train, mesh)] * len(inner), []
    for _ in range(steps):
        state, metrics = meta_step(state, splits)
        rows.append(jax.device_get(metrics))
    return jax.device_get(state.theta), rows, state


def relative(a, b):
    """The largest difference between two trees over the largest entry, leaf by leaf."""
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) + 1e-12))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_many_devices_equal_one(dataset):
    """The meta-gradient and 20 meta-steps of θ, on 8 devices and on 1. 1e-5: only sums are in another order.

    From jax 0.11 on XLA rounds otherwise for a device with one pair than for one with eight, and PES divides
    differences of losses, 1e-7 there, by σ².
    """
    rounds_alike = jax.__version_info__ < (0, 11)
    theta_bound, gradient_bound = (1e-5, 1e-5) if rounds_alike else (2e-4, 2e-3)
    (one, rows_one, _), (eight, rows_eight, state) = side_by_side(lambda n: meta_train_on(n, dataset), (1, 8))
    assert len(state.pairs[0].run_step.sharding.device_set) == 8
    assert relative(eight, one) < theta_bound
    for a, b in zip(rows_eight, rows_one):
        assert abs(a.grad_norm - b.grad_norm) < gradient_bound * b.grad_norm
        assert abs(a.meta_loss - b.meta_loss) < 1e-6 * b.meta_loss


def test_several_tasks_are_averaged():
    """Beside a task that has no loss, the meta-loss and its gradient are halved, for the same pairs and data.

    They are halved once more with half the loss, whose gradients a gradient multiplier of 2 makes up for.
    """
    def quadratic(scale, gradient_multiplier=1.0):
        draw = lambda key: jax.random.normal(key, (3,))
        return types.SimpleNamespace(init=draw, sample=lambda key, split: draw(key) + split, max_loss=99.0,
                                     update_multipliers=1.0, gradient_multiplier=gradient_multiplier,
                                     loss=lambda x, batch: scale * jnp.sum((x - batch) ** 2))

    def first_metrics(inner_tasks, splits):
        mesh = Mesh(np.array(jax.devices()[:1]), ("pairs",))
        init, meta_step = meta_train.make_meta_step(SETTINGS, inner_tasks, mesh, meta_train.first_learned(SETTINGS))
        return jax.device_get(meta_step(init(), splits)[1])

    one, both = side_by_side(first_metrics, [[quadratic(1.0)], [quadratic(0.5, 2.0), quadratic(0.0)]],
                             [[1.0], [1.0, 9.0]])
    assert one.meta_loss > 1 and one.grad_norm > 0
    np.testing.assert_allclose([both.meta_loss, both.grad_norm], [one.meta_loss / 4, one.grad_norm / 4], rtol=1e-5)


@pytest.mark.parametrize("preset, parametrization, expected", [
    ("laptop", "mup", (1.0, 16.0, 16.0, 0.003)), ("laptop", "sp", (1.0, 1.0, 1.0, 0.001)),
    ("paper-s", "mup", (1.0, 1.0, 1.0, 0.01)), ("paper-m", "sp", (1.0, 1.0, 1.0, 0.001))])
def test_multipliers_of_the_presets(preset, parametrization, expected):
    """The paper's multipliers are 1 and its step_mult 0.01; SP knows neither, and has its own step_mult."""
    settings = meta_train.Settings(**meta_train.preset_settings(preset, {"parametrization": parametrization}))
    meta_train.check(settings)
    learned = meta_train.first_learned(settings)
    name, *multipliers, base_width = learned.parametrization
    assert (name, *multipliers, learned.step_mult) == (parametrization, *expected)
    is_ours = (preset, parametrization) == ("laptop", "mup")
    assert base_width == (32 if is_ours else 0)  # elsewhere gradients as they are
    assert settings.start == ("adam" if preset == "laptop" else "random")


def test_velo_is_meta_trained_by_the_same_loop(dataset, tmp_path):
    """θ of another architecture is a vector, too; its file is read back, and begins another run of its own size only."""
    settings = dataclasses.replace(SETTINGS, optimizer="velo", lstm_hidden=6, bank=3, meta_steps=3, warmup_steps=1)
    theta, rows, state = meta_train_on(2, dataset, settings, 3)
    learned = meta_train.first_learned(settings)
    first = meta_train.ravel_pytree(learned.theta)[0]
    assert theta.shape == first.shape and np.all(np.isfinite(theta)) and not np.allclose(theta, first)
    assert rows[-1].nonfinite == 0 and rows[-1].grad_norm > 0
    lopt.save(tmp_path / "theta.npz", meta_train.with_theta(learned, theta))
    again = lopt.load(tmp_path / "theta.npz")
    assert (again.architecture, again.step_mult) == ("velo", 0.001)
    np.testing.assert_array_equal(meta_train.ravel_pytree(again.theta)[0], theta)
    np.testing.assert_array_equal(
        meta_train.ravel_pytree(meta_train.first_learned(settings, again).theta)[0], theta)
    for change, words in ((dict(bank=4), "--bank 3, not 4"), (dict(optimizer="small_fc_lopt"), "--optimizer velo, not")):
        with pytest.raises(ValueError, match=words):
            meta_train.first_learned(dataclasses.replace(settings, **change), again)
    small = dataclasses.replace(SETTINGS, start="adam", hidden=1)
    with pytest.raises(ValueError, match="--start adam: needs an MLP with two"):
        meta_train.check(small)
    meta_train.check(dataclasses.replace(small, first_theta="its own start"))


@pytest.mark.parametrize("losses", [[2.5], [2.5, 2.0], [2.0] * 90])
def test_the_mean_of_the_meta_loss_is_drawn_at_its_meta_steps(losses, tmp_path, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, []
    monkeypatch.setattr(axes, "plot", lambda self, x, y, **kwargs: drawn.append((np.asarray(x), np.asarray(y))))
    monkeypatch.setattr(axes, "legend", lambda self: None)
    folder = meta_train.Folder(tmp_path, meta_train.RunFlags())
    folder.metrics_path.write_text("meta_step,meta_loss\n" + "".join(f"{i + 1},{x}\n" for i, x in enumerate(losses)))
    meta_train.draw_meta_loss(folder)
    _, (steps, means) = drawn
    window = min(len(losses), 2)
    assert steps.tolist() == list(range(window, len(losses) + 1))
    np.testing.assert_allclose(means, [np.mean(losses[i - window:i]) for i in steps])


def test_the_adam_start_is_adam_beside_a_small_rest():
    """Without the rest its update is step_mult · m₁ rsqrt(v+1e-6), divided by its root mean square."""
    learned = meta_train.first_learned(dataclasses.replace(SETTINGS, start="adam"))
    theta, key = learned.theta, jax.random.key(1)
    assert np.any(theta["w2"][2:]) and np.max(np.abs(theta["w2"][2:])) < 0.1
    learned = learned._replace(theta=theta | {"w2": theta["w2"].at[2:].set(0.0)})
    optimizer, p, g = lopt.learned_optimizer(learned), jnp.ones((4, 6)), jax.random.normal(key, (4, 6))
    update, state = optimizer.update(g, optimizer.init(p), p)
    direction = state.averages[0].m[0] * jax.lax.rsqrt(state.averages[0].v + 1e-6)
    direction = direction * jax.lax.rsqrt(1e-5 + jnp.mean(direction**2))
    np.testing.assert_allclose(update, -learned.step_mult * direction, rtol=1e-5, atol=1e-8)


def test_velo_trains_from_its_adam_start():
    """Without its LSTM's part and rest the direction is Adam's; and loss falls on an MLP."""
    settings = dataclasses.replace(SETTINGS, optimizer="velo", lstm_hidden=6, bank=3, start="adam", step_mult=0.03)
    learned = meta_train.first_learned(settings)
    mixed = lopt.mix_bank(learned.theta, learned.theta["rnn_params/rnn_to_controls/b"][None])
    p, m = jax.random.normal(jax.random.key(0), (4, 6)), jax.random.normal(jax.random.key(1), (3, 4, 6))
    averages = lopt.init_averages(p)._replace(m=m, v=jnp.ones((4, 6)))
    mlp = {name: x[0] for name, x in mixed.items()}
    mlp["w2"] = mlp["w2"].at[2:].set(0.0)
    update = lopt.plain_update(lopt.element_inputs, learned._replace(theta=mlp), lopt.statistics(averages, p, p, 0))
    expected = 0.03 * m[0] * jax.lax.rsqrt(jnp.mean(m[0]**2))
    np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-5)

    data = tasks.load_dataset("synthetic")
    task = tasks.mlp_task(data, 32, 1, 64, mup.SP)
    train = jax.jit(lambda key, split: tasks.train(task, lambda num_steps: tasks.optimizer_for(task, learned, num_steps),
                                                   split, key, 150)[1])
    losses = np.asarray(train(jax.random.key(0), data.train))
    assert np.mean(losses[-20:]) < np.mean(losses[:5]) - 0.3


@pytest.mark.parametrize("settings", [meta_train.Settings, meta_train.RunFlags])
def test_help_has_every_setting(settings, monkeypatch):
    """The flag of each field, what it is, and its default; no other flags but two."""
    monkeypatch.setenv("COLUMNS", "100000")
    lines = meta_train.make_parser().format_help().splitlines()
    flags = {line.split()[0] for line in lines if line.startswith("  --")}
    text = " ".join(" ".join(lines).split())
    for field in dataclasses.fields(settings):
        assert f"--{field.name.replace('_', '-')}" in flags
        assert field.metadata["help"] and field.metadata["help"] in text
        if field.default not in (None, False, ()):
            default = field.default[0] if isinstance(field.default, tuple) else field.default
            shown = meta_train.PRESETS["laptop"].get(field.name, default)
            assert f"{field.metadata['help']} (default: {shown}" in text
    fields = [*dataclasses.fields(meta_train.Settings), *dataclasses.fields(meta_train.RunFlags)]
    assert flags == {f"--{field.name.replace('_', '-')}" for field in fields} | {"--preset", "--download"}


LOSSES = {32: (1.52, dict(zip(meta_train.RATES, (1.9, 1.57, 1.5, 1.6)))),
          512: (1.26, dict(zip(meta_train.RATES, (1.3, 1.2, 1.32, float("inf")))))}


@pytest.mark.parametrize("losses, widths, said, not_said", [
    (LOSSES, (32,), ["has never seen a network wider than 32", "At width 512 θ ends 0.060 below AdamW as it was tuned",
                     "and θ ends 0.060 above AdamW as a sweep at 512", "At width 32 θ ends 0.020 above tuned AdamW",
                     "1.3200 (0.003)", "1.2000 (0.001)"], []),
    (LOSSES, (32, 1024), ["At width 512 θ ends 0.060 below"], ["never seen a network wider than 32"]),
    (LOSSES | {512: (float("inf"), LOSSES[512][1])}, (32,), ["At width 512 θ diverges, unlike AdamW"], []),
    (LOSSES | {512: (1.26, LOSSES[512][1] | {3e-3: float("inf")})}, (32,),
     ["At width 512 θ does not diverge, unlike AdamW as it was tuned"], []),
    (LOSSES | {512: (float("inf"), dict.fromkeys(LOSSES[512][1], float("inf")))}, (32,),
     ["At width 512 θ diverges, like AdamW as it was tuned"], ["unlike"])])
def test_the_report_says_what_was_found(losses, widths, said, not_said):
    """Below or above, whichever it is, and what diverges."""
    text = meta_train.report(losses, meta_train.Settings(widths=widths), 1000)
    assert all(words in text for words in said) and not any(words in text for words in not_said)


def test_the_report_knows_the_widths_of_all_tasks():
    """Those of --also, too; what a --first-theta has seen it does not know, and so says nothing."""
    settings = meta_train.Settings(widths=(32,), also=("--widths 64",))
    assert "never seen a network wider than 64" in meta_train.report(LOSSES, settings, 1000)
    settings = meta_train.Settings(widths=(32,), first_theta="other.npz")
    assert "never seen" not in meta_train.report(LOSSES, settings, 1000)


def test_the_next_command_is_one_of_evaluate(tmp_path):
    settings = meta_train.Settings(task="vit", dataset="cifar10", data_dir="my data", widths=(16,), remat=True)
    words = shlex.split(meta_train.next_command(settings, tmp_path / "theta.npz"))
    assert words[:2] == ["python", "evaluate.py"] and words[words.index("--data-dir") + 1] == "my data"
    args = evaluate.make_parser().parse_args(words[2:])
    assert args.widths == [16, 64, 256] and args.theta == [str(tmp_path / "theta.npz")] and args.remat


def test_pairs_that_do_not_divide_are_refused(tmp_path):
    """Also in the environment that forces eight devices; the message names the nearest numbers that do."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(ROOT / "meta_train.py"), "--pairs", "12", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr == ("meta_train.py: error: --pairs 12: does not divide over 8 devices; use 8 or 16\n")


# ---------------------------------------------------------------------------------------------------------
# Whole runs: by one process, and by two on the loopback address of which one is killed

STEPS = 60
FLAGS = ["--widths", "16", "--depth", "1", "--batch-size", "32", "--pairs", "4", "--truncation", "20",
         "--min-length", "20", "--max-length", "60", "--meta-steps", str(STEPS), "--learning-rate", "3e-2",
         "--warmup-steps", "10", "--output-mult", "1", "--hidden-lr-mult", "2", "--step-mult", "0.01",
         "--base-width", "0", "--start", "random",
         "--report-steps", "0", "--checkpoint-every", "5", "--stall-seconds", "5"]


def start(out, processes, *args):
    """Starts meta_train.py as so many processes with four devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
                                # what one process has compiled is loaded by the next
                                "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, str(ROOT / "meta_train.py"), *FLAGS, *args, "--out", str(out)]
    if processes > 1:
        command += ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    return [subprocess.Popen(command + (["--process-id", str(i)] if processes > 1 else []), env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(processes)]


def finish(processes, timeout=200):
    """Waits for all of them: [(exit code, stderr)]."""
    try:
        return [(process.wait(timeout), process.stderr.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def whole_runs(folder):
    """(folder of a run by one process, folder of one by two of which one was killed, the survivor's end).

    That end is (exit code, stderr, seconds after the kill). The two were then started again and ran to theirs.
    """
    alone, together = folder / "alone", folder / "together"
    one, two = start(alone, 1), start(together, 2)
    deadline = time.monotonic() + 150
    while not (together / "checkpoint-00000005-1-of-2.npz").exists():
        assert time.monotonic() < deadline and two[0].poll() is None, finish(two)
        time.sleep(0.005)
    two[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    end = *finish(two)[0], time.monotonic() - killed
    results = finish(one) + finish(start(together, 2, "--resume"))
    assert [code for code, _ in results] == [0, 0, 0], results
    return alone, together, end


@pytest.fixture(scope="module")
def runs(whole_runs):
    """What `whole_runs` returned; they began before the first test."""
    return whole_runs.result()


def test_meta_training_reduces_the_meta_loss(runs):
    """θ and metrics are written, and the meta-loss falls below that of fresh networks."""
    alone, _, _ = runs
    learned = lopt.load(alone / "theta.npz")
    assert learned.step_mult == 0.01 and learned.made["settings"]["widths"] == [16]
    assert learned.parametrization == mup.Parametrization("mup", hidden_lr_mult=2.0)
    assert learned.made["meta_steps_made"] == STEPS
    header, *rows = (alone / "metrics.csv").read_text().splitlines()
    assert header.split(",") == list(meta_train.COLUMNS)
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, STEPS + 1))
    losses = [float(row.split(",")[1]) for row in rows]
    assert np.mean(losses[-10:]) < np.log(10) - 0.02  # 2.243 with two seeds, from 2.305


def test_a_killed_process_ends_the_other(runs):
    """The survivor ends soon, with a line that says why."""
    _, _, (code, errors, seconds) = runs
    assert code == 2 and "another process" in errors, errors[-2000:]
    assert seconds < 120


def test_two_processes_equal_one(runs):
    """To the last bit, although one was killed and both resumed. One writes the metrics, both write checkpoints."""
    alone, together = (lopt.load(folder / "theta.npz") for folder in runs[:2])
    jax.tree.map(np.testing.assert_array_equal, together.theta, alone.theta)
    assert len((runs[1] / "metrics.csv").read_text().splitlines()) == STEPS + 1
    for i in range(2):
        assert (runs[1] / f"checkpoint-{STEPS:08d}-{i}-of-2.npz").is_file()
