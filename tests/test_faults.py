"""What goes wrong: bad input, damaged files, full disks, signals, a second process, gradients that are not finite.

Killed processes: tests/kill_and_resume.py. Damaged data files: test_datasets.py. Diverged inner runs: test_es.py.
"""

import concurrent.futures
import csv
import errno
import os
import fcntl
import functools
import importlib.util
import io
import json
import pathlib
import shlex
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, size_of_files_limited
from jax.sharding import Mesh

import es
import evaluate
import lopt
import meta_train
import tasks

STEPS, EVERY = 6, 2
TINY = ["--widths", "4", "--depth", "1", "--batch-size", "4", "--pairs", "2", "--truncation", "2",
        "--min-length", "4", "--max-length", "8", "--warmup-steps", "2", "--report-steps", "0", "--devices", "1",
        "--checkpoint-every", str(EVERY)]
RESUME = ["--resume", "--devices", "1", "--report-steps", "0", "--checkpoint-every", str(EVERY)]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One synthetic data set, one compilation for all runs of the same settings, no optimization by XLA."""
    programs = {}

    def make_meta_step(settings, inner_tasks, mesh, learned, make=meta_train.make_meta_step):
        key = settings, mesh
        if key not in programs:
            programs[key] = make(settings, inner_tasks, mesh, learned)
        return programs[key]

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "make_synthetic", functools.cache(tasks.make_synthetic))
        patch.setattr(meta_train, "make_meta_step", make_meta_step)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_default_matmul_precision", None)


def command(*argv, program=meta_train):
    """The exit code of a command line, run in this process."""
    return tasks.run_command(program.run, f"{program.__name__}.py", [str(word) for word in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """OUT of an uninterrupted run: checkpoints after 4 and 6 meta-steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert command(*TINY, "--meta-steps", STEPS, "--out", out) == 0
    assert len(list(out.glob("checkpoint-*"))) == 2
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, to be damaged."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def folder(path):
    """The folder of a run that is to be resumed."""
    return meta_train.Folder(path, meta_train.RunFlags(resume=True))


def results(out):
    """θ, and metrics.csv without the wall time."""
    theta = {name: value.tobytes() for name, value in np.load(out / "theta.npz").items() if name != "metadata"}
    return theta, [row[:-1] for row in csv.reader((out / "metrics.csv").read_text().splitlines())]


def contents(folder):
    """Everything in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(capsys):
    """The error message, which must be one line on stderr and no traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".py: error: " in error and "Traceback" not in error, error
    return error


# ---------------------------------------------------------------------------------------------------------
# Bad input on the command lines: (flags, what the message must contain); @: the folder of `inputs`, ·: a space in a flag


def each(flags, *values):
    """All flags with all values; the message must name the flag."""
    return [(f"--{flag} {value}", f"--{flag}") for flag in flags for value in values]


POSITIVE = ("widths", "depth", "batch-size", "image-size", "vocab-size", "sequence-length", "heads", "patch")
META_POSITIVE = ("pairs", "truncation", "min-length", "meta-steps", "hidden", "devices")
META_COUNTS = ("warmup-steps", "report-steps", "process-id", "max-length", "processes")
META_NUMBERS = ("sigma", "learning-rate", "final-learning-rate", "step-mult", "input-mult", "output-mult",
                "hidden-lr-mult")
NO_CHOICE = ("no-such-thing", "", "MLP", "0")
NO_INTEGER = ("x", "1.5", "nan", "")
NO_NUMBER = ("x", "-1", "nan", "inf", "-inf", "1e39", "")
NO_THETA = ("absent.npz", "file", "full", "empty.npz", "text.txt")
HUGE = 10**25

BOTH = [
    *each(("task", "dataset", "matmul-precision"), *NO_CHOICE),
    *each(POSITIVE, *NO_INTEGER, 0, -1, HUGE), *each(("seed",), *NO_INTEGER, -1, HUGE),
    ("--no-such-flag 3", "--no-such-flag"), ("stray", "stray"), ("--out", "--out"), ("--widths", "--widths"),
    ("--widt 8", "--widt"), ("--widths 8 16 8", "one is given twice"), ("--widths 8 0", "--widths"),
    ("--seed 4294967296", "--seed 4294967296"),
    ("--image-size 3", "image size 3"), ("--image-size 12", "image size 12"),
    ("--image-size 4096", "image size 4096"),
    ("--vocab-size 50", "vocab size 50"), ("--download", "'synthetic' cannot be downloaded"),
    ("--data-dir @/full", "made in memory"),
    ("--dataset cifar10", "data: no such folder"), ("--dataset mnist --data-dir absent", "absent"),
    ("--dataset cifar10 --data-dir @/file", "file"), ("--dataset imagenet32 --data-dir @/full", "full"),
    ("--dataset text --data-dir absent.txt", "absent.txt"), ("--dataset text --data-dir @/short.txt", "short.txt"),
    ("--dataset text --data-dir @/binary.txt", "binary.txt"),
    ("--dataset tokens --data-dir @/text.txt", "vocab size"),
    ("--dataset text --data-dir @/text.txt", "needs images"), ("--task lm", "needs text"),
    ("--task lm --dataset text --data-dir @/text.txt --image-size 8", "image size 8"),
    ("--task lm --dataset text --data-dir @/text.txt --sequence-length 100000", "100000"),
    ("--task lm --dataset text --data-dir @/text.txt --widths 32 --heads 3", "heads 3"),
    ("--task vit --widths 32 --heads 5 --patch 2", "heads 5"), ("--task vit --patch 3", "patch 3"),
    ("--heads 2", "heads"), ("--patch 2", "patch"), ("--remat", "remat"),
    ("--sequence-length 5", "sequence_length"), ("--out @/file", "file"), ("--out @/file/below", "below"),
    ("--out /proc/no-such-thing", "/proc/no-such-thing"), (f"--out {'n' * 300}", "nnn")]

META = [
    *BOTH, ("--parametrization sp --output-mult 2", "SP has no multipliers"),
    *each(("parametrization", "preset"), *NO_CHOICE),
    *each(META_POSITIVE, *NO_INTEGER, 0, -1, HUGE), *each(META_COUNTS, *NO_INTEGER, -1),
    *each(("max-length", "warmup-steps"), HUGE),
    *each(META_NUMBERS, *NO_NUMBER, 0, 1e-50), *each(("exp-mult", "weight-decay"), *NO_NUMBER),
    *each(("stall-seconds",), "x", "nan", 0, -1),
    *[(f"--checkpoint-every={value}", f"--checkpoint-every {value}")
      for value in ("0", "-3", "x", "1.5", "0m", "nanm", "infm", "m", "", "10s")],
    ("--truncation 200", "--truncation 200: longer than the shortest run"),
    ("--decay 0.4 --horizon 1000", "--decay 0.4: with --horizon 1000, one update of the shortest run"),
    ("--optimizer velo --horizon 1000", "--horizon 1000: VeLO has none"),
    ("--optimizer velo --hidden 64", "--hidden 64: velo has none"), ("--bank 4", "--bank 4: small_fc_lopt has none"),
    ("--truncation 1", "--truncation 1: must be"),
    ("--distributed --out new --devices 1", "--devices does not go with --distributed"),
    ("--min-length 3000", "--min-length 3000: longer than the longest run"),
    *each(("max-offset",), *NO_INTEGER, 0, -1, 101, HUGE), *each(("base-width",), *NO_INTEGER, -1, HUGE),
    ("--parametrization sp --base-width 8", "--base-width 8: SP has none"),
    ("--meta-steps 100000000", "--meta-steps 100000000"), ("--max-length 2000000000", "--max-length"),
    ("--devices 3", "--pairs 8: does not divide over 3 devices"),
    ("--devices 16", "--devices 16: there are only 8"),
    ("--pairs 3 --devices 2", "--pairs 3"), ("--out @/full", "full: is not empty"),
    *[(f"--first-theta @/{name}", name) for name in NO_THETA],
    ("--first-theta @/theta.npz", "was meta-trained with --output-mult 2.0, not 16.0; --step-mult 0.01, not 0.003"),
    ("--first-theta @/theta.npz --parametrization sp", "--parametrization mup, not sp"),
    ("--first-theta @/theta.npz --hidden 16", "was meta-trained with --hidden 8, not 16"),
    *[(f"--also {flags}", culprit) for flags, culprit in [
        ("--remat", "--also"), ("--task·nope", "--also '--task nope': argument --task"), ("--widths·0", "--widths"),
        ("--seed·3", "--seed is one for all tasks"), ("--pairs·4", "--pairs"), ("--task·'", "No closing quotation"),
        ("--task·lm", "needs text"), ("--dataset·text·--data-dir·absent.txt", "absent.txt"),
        ("--dataset·text·--data-dir·@/text.txt", "needs images"), ("--download·", "'synthetic' cannot be downloaded"),
        ("--depth·2 --depth·2", "one is given twice")]],
    ("--resume", "--resume needs --out"), ("--resume --out @/full", "full: is not empty"),
    ("--resume --out @/file", "file"), ("--coordinator localhost:1", "need --distributed"),
    ("--processes 2 --process-id 0", "need --distributed"), ("--distributed", "--distributed needs --out"),
    ("--distributed --out new --processes 2", "go together"),
    ("--distributed --out new --processes 2 --process-id 2 --coordinator localhost:1", "--process-id 2")]

EVALUATE = [
    *[(f"--baselines adamw {flags}", culprit) for flags, culprit in [
        *BOTH, *each(("steps", "seeds", "tune-steps", "tune-seeds"), *NO_INTEGER, 0, -1, HUGE),
        *each(("sweep", "tune"), *NO_CHOICE)]],
    *[(f"--baselines adamw --sweep depth --depths {value}", "--depths")
      for value in (*NO_INTEGER, 0, -1, HUGE, "3 3")],
    *each(("baselines", "reproduce"), *NO_CHOICE),
    *[(f"--theta @/{name}", name) for name in NO_THETA]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Some good and bad files, outside of the working folder."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "full").mkdir()
    for name in ("file", "full/mine", "full/metrics.csv"):
        (folder / name).write_text("mine")
    (folder / "empty.npz").touch()
    (folder / "short.txt").write_text("too short")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 99)
    (folder / "text.txt").write_text("To be, or not to be. " * 2000)
    parametrization = lopt.mup.Parametrization("mup", output_mult=2.0, hidden_lr_mult=16.0)
    lopt.save(folder / "theta.npz", lopt.Learned(lopt.init_theta(jax.random.key(0), 8), 0.01, 0.001, parametrization))
    return folder


@pytest.mark.parametrize("program, cases", [(meta_train, META), (evaluate, EVALUATE)])
def test_bad_input_is_one_line_and_nothing_is_written(program, cases, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meta_train, "meta_train", None)  # no case may come as far
    monkeypatch.setattr(evaluate, "compiled", None)
    before, failed = contents(inputs), []
    for flags, culprit in cases:
        words = [word.replace("·", " ") for word in flags.replace("@", str(inputs)).split(" ")]
        try:
            code = command(*words, program=program)
            error = capsys.readouterr().err
        except Exception as problem:  # all cases in one go: name those that fail
            code, error = None, f"{type(problem).__name__}: {problem}"
        written = [path for path, content in contents(tmp_path).items()
                   if content is not None or program is meta_train]
        good = code == 2 and error.count("\n") == 1 and error.startswith(f"{program.__name__}.py: error: ")
        if not good or culprit not in error or written:
            failed.append(f"{flags}: {code} {error.strip()} {written}")
        for name in ("runs", "new"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert not failed, "\n".join(failed)
    assert contents(inputs) == before
    assert len(cases) > 80


# ---------------------------------------------------------------------------------------------------------
# Damaged files


def flips(content, count, rng):
    """The content with one byte changed, count times."""
    for place, change in zip(rng.integers(len(content), size=count), rng.integers(1, 256, size=count)):
        damaged = bytearray(content)
        damaged[place] ^= change
        yield bytes(damaged)


def test_damaged_checkpoint_falls_back_to_the_one_before(copy, capsys):
    """1,000 single bytes and 100 lengths."""
    out = folder(copy)
    step, arrays, record = out.newest()
    assert step == STEPS and not capsys.readouterr().err
    older = out.load(STEPS - EVERY)
    expected = {name: value.tobytes() for name, value in older.arrays.items()}
    assert any(arrays[name].tobytes() != value for name, value in expected.items())
    newest, rng = out.checkpoint_path(STEPS), np.random.default_rng(0)
    content = newest.read_bytes()
    truncated = (content[:length] for length in [0, 1, 63, 64, 65, *rng.integers(len(content), size=95)])
    for damaged in (*flips(content, 1000, rng), *truncated):
        newest.write_bytes(damaged)
        step, arrays, record = out.newest()
        assert step == STEPS - EVERY and record == older.about
        assert {name: value.tobytes() for name, value in arrays.items()} == expected
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and newest.name in warning and "checksum" in warning


def test_no_whole_checkpoint_is_one_line(copy, capsys):
    for path in copy.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(copy)
    assert command(*RESUME, "--out", copy) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "no checkpoint there is whole" in error and str(copy) in error
    assert contents(copy) == before


@pytest.mark.parametrize("record", [None, b"{", b"[]", b"{}", b'{"settings": {"unknown": 1}}', b"\xff"])
def test_checkpoint_of_another_version_is_not_used(copy, record, capsys):
    out = folder(copy)
    arrays = lopt.read_npz(out.checkpoint_path(STEPS), 1 << 30)
    arrays.pop("record")
    if record is not None:
        arrays["record"] = np.frombuffer(record, np.uint8)
    lopt.write_npz(out.checkpoint_path(STEPS), arrays)
    assert out.newest().step == STEPS - EVERY and "another version" in capsys.readouterr().err


def test_arrays_that_do_not_fit_are_refused(finished):
    mesh = Mesh(np.array(jax.devices()[:1]), ("pairs",))
    like = meta_train.replicate({"a": np.zeros((2, 3), np.float32)}, mesh)
    for value in (None, np.zeros((2, 3), np.int32), np.zeros((2, 4), np.float32)):
        with pytest.raises(ValueError, match="does not fit this version"):
            meta_train.restore({} if value is None else {"['a']": value}, like)


def test_run_after_a_fallback_equals_the_uninterrupted_one(finished, copy, capsys):
    newest = copy / f"checkpoint-{STEPS:08d}-0-of-1.npz"
    newest.write_bytes(b"")
    assert command(*RESUME, "--out", copy) == 0
    assert "falling back" in capsys.readouterr().err
    assert results(copy) == results(finished)


def test_damaged_theta_is_refused_or_read_exactly(finished, tmp_path):
    """300 single bytes: some lie in fields of the zip format that have no meaning for the content."""
    content = (finished / "theta.npz").read_bytes()
    learned = lopt.load(finished / "theta.npz")
    path, refused = tmp_path / "theta.npz", 0
    for damaged in flips(content, 300, np.random.default_rng(0)):
        path.write_bytes(damaged)
        try:
            other = lopt.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert other._replace(theta=None) == learned._replace(theta=None)
            assert all(np.array_equal(other.theta[name], x) for name, x in learned.theta.items())
    assert refused > 200


THETA = {name: np.zeros(x.shape, np.float32) for name, x in lopt.init_theta(jax.random.key(0)).items()}
METADATA = {"step_mult": 0.01, "exp_mult": 0.001, "parametrization": "mup"}
BAD_THETA = {
    "an array is missing": ({name: THETA[name] for name in list(THETA)[1:]}, METADATA),
    "no arrays": ({}, METADATA),
    "float64": (THETA | {"b0": THETA["b0"].astype(np.float64)}, METADATA),
    "wrong shape": (THETA | {"b0": np.zeros(33, np.float32)}, METADATA),
    "NaN": (THETA | {"b0": THETA["b0"] * np.nan}, METADATA),
    "infinity": (THETA | {"b0": THETA["b0"] + np.inf}, METADATA),
    "pickled objects": (THETA | {"b0": np.array([{}], object)}, METADATA),
    "too large": (THETA | {"more": np.zeros(1 << 20, np.uint8)}, METADATA),
    "metadata is a list": (THETA, [1, 2]),
    "metadata is a number": (THETA, 3),
    "no step_mult": (THETA, METADATA | {"step_mult": None}),
    "step_mult is no number": (THETA, METADATA | {"step_mult": "much"}),
    "step_mult is NaN": (THETA, METADATA | {"step_mult": float("nan")}),
    "output_mult is infinite": (THETA, METADATA | {"output_mult": float("inf")}),
    "hidden_lr_mult is a list": (THETA, METADATA | {"hidden_lr_mult": [1]}),
    "unknown parametrization": (THETA, METADATA | {"parametrization": "ntk"}),
    "parametrization is a list": (THETA, METADATA | {"parametrization": ["mup"]})}


@pytest.mark.parametrize("case", BAD_THETA)
def test_bad_theta_is_one_line(case, tmp_path, monkeypatch, capsys):
    arrays, metadata = BAD_THETA[case]
    monkeypatch.chdir(tmp_path)
    np.savez("bad.npz", **arrays, metadata=np.frombuffer(json.dumps(metadata).encode(), np.uint8))
    assert command("--theta", "bad.npz", program=evaluate) == 2
    assert "bad.npz: " in one_line(capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.npz"]


# ---------------------------------------------------------------------------------------------------------
# Interruptions


def at_checkpoint(monkeypatch, step, action):
    """Does something, once, when the checkpoint at a meta-step has been written."""
    actions = [action]

    def save(self, state, about, save=meta_train.Folder.save):
        size = save(self, state, about)
        if int(state.meta_step) == step and actions:
            actions.pop()(self)
        return size

    monkeypatch.setattr(meta_train.Folder, "save", save)


@pytest.mark.parametrize("full", ["checkpoint", "metrics.csv"])
def test_full_disk(full, finished, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stops the run as a full disk does; what was saved before is whole."""
    size = lambda out: 20_000 if full == "checkpoint" else out.metrics_path.stat().st_size + 3
    with monkeypatch.context() as patch, size_of_files_limited() as limit:
        at_checkpoint(patch, EVERY, lambda out: limit(size(out)))
        code = command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out")
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "cannot be written (File too large)" in error and "free some space" in error
    assert f"{tmp_path}/out/{full}" in error
    assert not list((tmp_path / "out").glob(".*.part"))
    assert lopt.load(tmp_path / "out" / "theta.npz").made["meta_steps_made"] < STEPS
    assert command(*RESUME, "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert f"going on after meta-step {EVERY}" in captured.out and "warning" not in captured.err
    assert results(tmp_path / "out") == results(finished)


def test_too_little_space_is_seen_at_the_start(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(meta_train.shutil, "disk_usage", lambda path: usage)
    assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 2
    assert "1,000 bytes are free there" in one_line(capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_leaves_a_checkpoint(number, finished, tmp_path, monkeypatch, capsys):
    """And a θ; the command that it names goes on from there."""
    out = tmp_path / "my runs"
    with monkeypatch.context() as patch:
        at_checkpoint(patch, EVERY, lambda _: signal.raise_signal(number))
        handler = signal.getsignal(number)
        assert command(*TINY, "--meta-steps", STEPS, "--out", out) == 128 + number
        assert signal.getsignal(number) is handler
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == f"stopped; to go on, give the same command with --out '{out}' --resume"
    assert shlex.split(hint)[-3:] == ["--out", str(out), "--resume"]
    assert lopt.load(out / "theta.npz").made["meta_steps_made"] == EVERY
    assert command(*RESUME, "--out", out) == 0
    assert f"going on after meta-step {EVERY}" in capsys.readouterr().out
    assert results(out) == results(finished)


def test_second_process_is_refused(copy, tmp_path, capsys):
    first = folder(copy)
    before = contents(copy)
    assert command(*RESUME, "--out", copy) == 2
    assert f"{copy}: another process is using it" in one_line(capsys)
    assert contents(copy) == before
    first.lock.close()
    fresh = meta_train.Folder(tmp_path / "fresh", meta_train.RunFlags())
    assert command(*TINY, "--out", fresh.path) == 2
    assert "another process is using it" in one_line(capsys)


def test_an_ignored_hangup_stays_ignored(finished, tmp_path, monkeypatch):
    """As nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            at_checkpoint(patch, EVERY, lambda _: signal.raise_signal(signal.SIGHUP))
            assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert results(tmp_path / "out") == results(finished)


# ---------------------------------------------------------------------------------------------------------
# Other systems: no locks, a stderr that is a file, folders that others write in, many runs at once


@pytest.mark.parametrize("lack", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, "fcntl"])
def test_a_system_without_locks_is_warned_of_once(lack, finished, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(lack, "no locks here")

    if lack == "fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("warning") == 1
    assert results(tmp_path / "out") == results(finished)


def test_meta_train_is_imported_without_fcntl(monkeypatch):
    """As on Windows, which has fewer signals, too."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
        monkeypatch.delattr(signal, name)
    spec = importlib.util.spec_from_file_location("meta_train_elsewhere", ROOT / "meta_train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.STOP_SIGNALS == [signal.SIGINT, signal.SIGTERM]


def test_a_file_system_without_fsync_is_no_full_disk(finished, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(meta_train.os, "fsync", fsync)
    assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 0
    assert results(tmp_path / "out") == results(finished)


@pytest.mark.parametrize("seconds, disable, lines", [(60, "", 1), (0, "", STEPS), (0, "0", STEPS), (0, "1", 0)])
def test_progress_in_a_log_is_plain_lines(seconds, disable, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meta_train.Progress, "seconds", seconds)
    monkeypatch.setenv("TQDM_DISABLE", disable)
    assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == lines and "\r" not in error
    assert all(line.startswith(f"meta-step {i} of {STEPS}, meta-loss ")
               for i, line in enumerate(error.splitlines(), start=1))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stderr_that_is_gone_ends_no_run(terminal, finished, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        assert command(*TINY, "--meta-steps", STEPS, "--out", tmp_path / "out") == 0
    assert results(tmp_path / "out") == results(finished)


def test_files_of_others_do_not_matter(finished, tmp_path, monkeypatch, capsys):
    """A SLURM log, lost+found, .gitkeep, .nfs…: the run begins beside them, and goes on beside them."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    for name in ("slurm-1.out", ".gitkeep", ".nfs0000001", "checkpoint-notes.txt"):
        (out / name).write_text(name)
    before = contents(out)
    with monkeypatch.context() as patch:
        at_checkpoint(patch, EVERY, lambda _: signal.raise_signal(signal.SIGTERM))
        assert command(*TINY, "--meta-steps", STEPS, "--out", out) == 128 + signal.SIGTERM
    assert command(*RESUME, "--out", out) == 0
    assert contents(out).items() >= before.items()
    assert results(out) == results(finished)


@pytest.mark.parametrize("at", [(meta_train.Run, "record"), (meta_train.Folder, "save")])
def test_a_signal_at_the_end_is_heard(at, finished, tmp_path, monkeypatch, capsys):
    """In the last meta-step, and when that is saved: there is no report, which --resume then makes."""
    out, plain = tmp_path / "out", getattr(*at)

    def with_signal(self, state, *others):
        if int(state.meta_step) == STEPS:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, state, *others)

    with monkeypatch.context() as patch:
        patch.setattr(*at, with_signal)
        assert command(*TINY, "--meta-steps", STEPS, "--out", out) == 128 + signal.SIGTERM
    assert "stopped; to go on" in capsys.readouterr().err
    assert command(*RESUME, "--out", out) == 0 and results(out) == results(finished)


def test_what_a_killed_process_had_half_written_goes(copy):
    names = [".theta.npz.7.part", ".metrics.csv.7.part", ".meta-loss.png.7.part", ".checkpoint-00000001-0-of-1.npz.7.part"]
    others = [".checkpoint-00000001-1-of-2.npz.7.part", ".notes.part"]
    for name in names + others:
        (copy / name).write_text("half")
    assert command(*RESUME, "--out", copy) == 0
    left = [path.name for path in copy.iterdir()]
    assert set(left) >= set(others) and not set(left) & set(names)


def test_runs_that_is_no_folder_is_one_line(tmp_path, monkeypatch, capsys):
    """Such as a link to a disk that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "absent")
    assert command(*TINY, "--meta-steps", 1) == 2
    assert "runs" in one_line(capsys)


def test_runs_that_begin_at_once_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "laptop-mup-4").mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(meta_train.new_folder, ["laptop-mup"] * 16))
    assert sorted(int(path.name.rsplit("-", 1)[1]) for path in folders) == list(range(5, 21))
    assert all(path.is_dir() for path in folders)


# ---------------------------------------------------------------------------------------------------------
# Resuming: where there is nothing to resume, and what may change


def test_nothing_to_resume_is_one_line(finished, tmp_path, capsys):
    """A folder that is not there, or holds no checkpoint: --resume ends, --resume-or-begin begins and then goes on."""
    out = tmp_path / "out"
    for name in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        before = contents(tmp_path)
        assert command(*RESUME, "--out", tmp_path / name) == 2
        error = one_line(capsys)
        assert f"{tmp_path / name}: there is no checkpoint to resume from" in error and "--resume-or-begin" in error
        assert contents(tmp_path) == before
    another_host_s = tmp_path / "other" / "checkpoint-00000010-1-of-2.npz"
    another_host_s.parent.mkdir()
    another_host_s.touch()
    assert command(*RESUME, "--out", another_host_s.parent) == 2 and "no checkpoint there is whole" in one_line(capsys)
    assert {path.name for path in another_host_s.parent.iterdir()} == {another_host_s.name, ".lock-0"}
    for said in (f"output in {out}\n", f"going on after meta-step {STEPS}\n"):
        assert command(*TINY, "--meta-steps", STEPS, "--resume-or-begin", "--out", out) == 0
        assert said in capsys.readouterr().out
        assert results(out) == results(finished)


def test_devices_follow_the_settings_of_the_checkpoint(copy, monkeypatch):
    """The number of pairs is the checkpoint's before the devices are counted: 3 pairs on 3 cores take 3 devices."""
    asked = []
    monkeypatch.setattr(tasks, "set_up_devices", lambda *numbers: asked.append(numbers))
    assert command(*RESUME, "--out", copy) == 0
    assert asked == [(2, 1)]


def test_more_meta_steps_go_on_and_fewer_are_refused(finished, copy, capsys):
    assert command(*RESUME, "--out", copy, "--min-length", 4) == 0  # as it was, though shorter than the preset's K
    before = contents(copy)
    assert command(*RESUME, "--out", copy, "--meta-steps", STEPS - 1) == 2
    assert f"--meta-steps {STEPS - 1}: can only grow" in one_line(capsys)
    assert command(*TINY, "--out", copy, "--meta-steps", STEPS) == 2
    assert "is not empty; add --resume" in one_line(capsys)
    assert command(*RESUME, "--out", copy, "--sigma", 0.5, "--widths", 8) == 2
    error = one_line(capsys)
    assert "--sigma is 0.5 but was 0.01" in error and "--widths" in error
    assert contents(copy) == before
    assert command(*TINY, "--preset", "paper-s", "--resume", "--out", copy) == 2
    assert "cannot resume with other settings" in one_line(capsys)
    assert command(*TINY, "--preset", "laptop", "--resume", "--out", copy) == 0  # whose number of meta-steps is another
    assert results(copy) == results(finished)
    assert command(*RESUME, "--out", copy, "--meta-steps", STEPS + 2) == 0
    rows = results(copy)[1]
    assert rows[:STEPS + 1] == results(finished)[1]
    assert [row[0] for row in rows[1:]] == [str(i + 1) for i in range(STEPS + 2)]


def test_begins_with_a_given_theta(finished, tmp_path, monkeypatch, capsys):
    """Other widths, the θ of the file to the last bit; resumed without that file; the new θ names the old settings."""
    before, out = pathlib.Path(shutil.copy(finished / "theta.npz", tmp_path)), tmp_path / "out"
    learned = lopt.load(before)
    with monkeypatch.context() as patch:
        at_checkpoint(patch, EVERY, lambda _: signal.raise_signal(signal.SIGTERM))
        stopped = command(*TINY, "--meta-steps", EVERY + 1, "--widths", 5, "--first-theta", before, "--out", out)
    assert stopped == 128 + signal.SIGTERM and f"beginning with {before}" in capsys.readouterr().out
    start = np.load(out / "checkpoint-00000000-0-of-1.npz")[".theta"]
    jax.tree.map(np.testing.assert_array_equal, meta_train.with_theta(learned, start).theta, learned.theta)
    before.unlink()
    assert command(*RESUME, "--out", out) == 0
    assert f"after meta-step {EVERY}\n" in capsys.readouterr().out
    after = lopt.load(out / "theta.npz")
    assert after.made["origin"] == learned.made and after.made["origin"]["settings"]["widths"] == [4]
    assert any(np.any(after.theta[name] != x) for name, x in learned.theta.items())


def test_the_mlp_of_a_given_theta_wins(inputs, tmp_path, monkeypatch):
    """--first-theta with a θ of 8 hidden units, and no --hidden: the run has 8."""
    begun = []
    monkeypatch.setattr(meta_train, "meta_train", lambda settings, *rest: begun.append((settings, rest)) or (None, 1))
    flags = ["--output-mult", 2, "--step-mult", 0.01, "--first-theta", inputs / "theta.npz"]
    assert command(*TINY, *flags, "--out", tmp_path / "out") == 128 + 1
    (settings, (_, _, _, learned, _)), = begun
    assert settings.hidden == 8 and learned.theta["w1"].shape == (8, 8)


def test_number_of_devices_may_be_left_out_on_resuming(monkeypatch):
    """Pairs come from the checkpoint: the devices must divide those, not the default."""
    monkeypatch.delenv("XLA_FLAGS")  # which says that there are eight
    assert meta_train.make_mesh(3, None).devices.size == 3
    assert meta_train.make_mesh(8, None).devices.size == 8


def test_other_data_are_refused(copy, monkeypatch, capsys):
    images, labels = tasks.make_synthetic(8)
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    monkeypatch.setattr(tasks, "make_synthetic", lambda size: (changed, labels))
    before = contents(copy)
    assert command(*RESUME, "--out", copy) == 2
    assert "the data of synthetic are not those of the run" in one_line(capsys)
    assert contents(copy) == before


def test_further_tasks_have_their_own_data(inputs, tmp_path, monkeypatch, capsys):
    """An MLP on images, then language models of two widths on a text; one checksum for each data set."""
    begun = []
    monkeypatch.setattr(meta_train, "meta_train", lambda *args: begun.append(args) or (None, 1))
    also = f"--task lm --dataset text --data-dir {inputs}/text.txt --widths 4 6 --depth 1 --sequence-length 5"
    assert command(*TINY, "--also", also, "--out", tmp_path / "out") == 128 + 1
    assert "on synthetic, widths 4 and text, widths 4 6, 2 pairs each" in capsys.readouterr().out
    (settings, inner_tasks, splits, _, learned, _), = begun
    batches = [jax.eval_shape(task.sample, jax.random.key(0), split) for task, split in zip(inner_tasks, splits)]
    assert [labels.shape for _, labels in batches] == [(4,), (64, 5), (64, 5)]
    assert splits[1] is splits[2] and settings.also == (also,) and len(learned.made["data"].split()) == 2


@pytest.mark.parametrize("damage", [
    lambda rows: rows[:3], lambda rows: rows[:2] + rows[3:], lambda rows: rows[:2] * 9, lambda rows: ["\0" * 50],
    lambda rows: ["1,2"] * 9, lambda rows: None])
def test_damaged_metrics_are_refused(damage, copy, capsys):
    path = copy / "metrics.csv"
    if rows := damage(path.read_text().splitlines()):
        path.write_text("\n".join(rows))
    else:
        path.unlink()
    assert command(*RESUME, "--out", copy) == 2
    assert "metrics.csv" in one_line(capsys)


# ---------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def test_entries_that_are_not_finite_count_as_zero():
    zeroed, count = meta_train.zero_nonfinite(jnp.array([1.0, jnp.nan, -2.0, jnp.inf, 3.0, -jnp.inf, 0.0]))
    assert int(count) == 3
    np.testing.assert_array_equal(zeroed, [1.0, 0.0, -2.0, 0.0, 3.0, 0.0, 0.0])


@pytest.mark.parametrize("seed, bad", [(1, None), (2, 500)])
def test_meta_step_without_a_finite_gradient_changes_nothing(seed, bad, monkeypatch):
    def truncation(inner, settings, key, pair, theta, *rest):
        return (jnp.ones_like(theta).at[:bad].set(jnp.nan), jnp.float32(1.0)), pair  # the first `bad`, or all

    monkeypatch.setattr(es, "truncation", truncation)
    split = tasks.Split(jnp.zeros((9, 4, 4, 1), jnp.uint8), jnp.zeros(9, jnp.int32))
    dataset = tasks.Dataset("zeros", 2, (0.5,), (0.3,), split, split)
    settings = meta_train.Settings(widths=(4,), depth=1, batch_size=4, pairs=2, meta_steps=10, warmup_steps=2,
                                   seed=seed)
    mesh = Mesh(np.array(jax.devices()[:1]), ("pairs",))
    inner = tasks.task_of(settings, dataset, 4, 1, meta_train.mup.Parametrization("mup"))
    init, meta_step = meta_train.make_meta_step(settings, [inner], mesh, meta_train.first_learned(settings))
    state = init()
    before = jax.device_get(state)
    state, metrics = jax.device_get(meta_step(state, [meta_train.replicate(split, mesh)]))
    assert int(metrics.nonfinite) == (bad or before.theta.size)
    assert np.isfinite(metrics.grad_norm) and np.isfinite(metrics.update_norm)
    assert int(state.meta_step) == 1
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves((before.theta, before.adam)),
                                                 jax.tree.leaves((state.theta, state.adam)))]
    assert all(same) if bad is None else not all(same) and int(state.adam.step) == 1
    assert np.isfinite(state.theta).all()


def test_a_folder_that_cannot_be_opened_is_no_full_disk(tmp_path, monkeypatch):
    """Windows opens no folder, so that there the names in it cannot be put on disk."""
    def no_folders(path, *args, opened=os.open):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args)

    monkeypatch.setattr(lopt.os, "open", no_folders)
    lopt.write_atomically(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
