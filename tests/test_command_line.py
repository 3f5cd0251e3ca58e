"""What the command lines share: flags made from settings, their checks, errors as one line, devices, stdout."""

import argparse
import ast
import dataclasses
import io
import os
import signal
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT

import mup
import tasks
from tasks import setting

MODULES = ("tasks", "meta_train", "evaluate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A setting of each type."""
    word: str = setting("a", "one of two words", choices=("a", "b"))
    path: str | None = setting(None, "where it is", metavar="FILE")
    paths: tuple[str, ...] = setting((), "where they are", metavar="FILE")
    count: int = setting(3, "how many", low=1, group="numbers")
    sizes: tuple[int, ...] = setting((32, 64), "how large", low=1, group="numbers")
    most: tuple[int, ...] | None = setting(None, "of each", low=1, high=10_000_000, group="numbers")
    rate: float = setting(1e-3, "how fast", above=1e-18, below=1e18, group="numbers")
    decay: float | None = setting(None, "how fast down", low=0, below=1e18, group="numbers")
    start: int = setting(0, "where to begin", low=0, group="numbers")
    on: bool = setting(False, "whether at all (100%)")


def parse(*argv, defaults=None):
    parser = tasks.CommandLine(allow_abbrev=False)
    tasks.add_flags(parser, Settings, defaults)
    return tasks.given_flags(parser.parse_args([str(word) for word in argv]), Settings)


# ---------------------------------------------------------------------------------------------------------
# Flags and their checks


def test_flags_that_are_given():
    assert parse() == {}
    given = parse("--word", "b", "--path", "", "--paths", "x", "--paths", "y", "z", "--count", 0, "--sizes", 8, 16,
                  "--most", 5, "--rate", "1e-4", "--decay", 0, "--on")
    assert given == {"word": "b", "path": "", "paths": ("x", "y", "z"), "count": 0, "sizes": (8, 16), "most": (5,),
                     "rate": 1e-4, "decay": 0.0, "on": True}
    assert all(isinstance(given[name], float) for name in ("rate", "decay"))
    assert parse("--sizes", 8, "--sizes", 16) == {"sizes": (16,)}  # the last counts


@pytest.mark.parametrize("argv", [["--count", "1.5"], ["--rate", "x"], ["--sizes"], ["--coun", "3"], ["stray"],
                                  ["--word", "c"], ["--on", "1"]])
def test_what_cannot_be_parsed_is_refused_in_one_line(argv):
    with pytest.raises(ValueError, match=argv[0] if argv[0] != "--on" else "1") as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_help_is_made_from_the_fields():
    parser = tasks.CommandLine(formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 40, 200))
    tasks.add_flags(parser, Settings, {"path": "the usual", "count": "5 (large), 3"})
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    for line in ("--word {a,b} one of two words (default: a)", "--path FILE where it is (default: the usual)",
                 "--paths FILE [FILE ...] where they are", "--count COUNT how many (default: 5 (large), 3)",
                 "--sizes SIZES [SIZES ...] how large (default: 32 64)", "--rate RATE how fast (default: 0.001)",
                 "--decay DECAY how fast down", "--start START where to begin (default: 0)", "--on whether at all (100%)"):
        assert line in lines, line
    assert lines.count("numbers:") == 1 and lines.index("numbers:") > lines.index("--on whether at all (100%)")


def test_every_task_setting_has_a_flag_and_download_is_no_setting():
    parser = tasks.CommandLine()
    tasks.add_flags(parser, tasks.TaskSettings)
    args = parser.parse_args(["--download"])
    assert args.download and tasks.given_flags(args, tasks.TaskSettings) == {}
    assert set(vars(args)) == {field.name for field in dataclasses.fields(tasks.TaskSettings)} | {"download"}
    assert parser.parse_args([]).download is None
    tasks.check(tasks.TaskSettings())


@pytest.mark.parametrize("wrong, message", [
    ({"word": "c"}, "--word c: use one of a, b"), ({"count": 0}, "--count 0: must be at least 1"),
    ({"count": 2**31}, "--count 2147483648: is too large"), ({"sizes": (8, 0)}, "--sizes 8 0: must be at least 1"),
    ({"sizes": (8, 16, 8)}, "--sizes 8 16 8: one is given twice"), ({"sizes": ()}, "--sizes: must not be empty"),
    ({"sizes": (8, 2**31)}, "--sizes 8 2147483648: is too large"),
    ({"most": (3, 0)}, "--most 3 0: must be between 1 and 10,000,000"),
    ({"most": (10_000_001,)}, "--most 10000001: must be between 1 and 10,000,000"),
    *(({"rate": x}, f"--rate {x}: must be a positive number, above 1e-18 and below 1e18")
      for x in (0, -1.0, 1e-18, 1e18, float("nan"), float("inf"))),
    *(({"decay": x}, f"--decay {x}: must be at least 0 and below 1e18") for x in (-1.0, float("nan"), 1e18))])
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        tasks.check(Settings(**wrong))
    assert str(error.value) == message


@pytest.mark.parametrize("right", [{}, {"count": 2**31 - 1}, {"most": (1, 10_000_000)}, {"decay": 0.0},
                                   {"paths": ("x", "y")}, {"rate": 1e17}, {"path": "", "on": True}])
def test_possible_settings_pass(right):
    tasks.check(Settings(**right))


def test_load_data_and_task_of_the_settings(tmp_path):
    (tmp_path / "text").write_text("To be, or not to be. " * 99)
    settings = tasks.TaskSettings(task="lm", dataset="text", data_dir=str(tmp_path / "text"), sequence_length=8,
                                  batch_size=3, heads=2, remat=True)
    dataset = tasks.load_data(settings)
    task = tasks.task_of(settings, dataset, 12, 1, tasks.mup.SP)
    inputs, _ = task.sample(jax.random.key(0), dataset.train)
    assert inputs.shape == (3, 8) and task.name == "lm-w12-d1" and not task.parametrization.is_mup
    assert "remat" in str(jax.make_jaxpr(jax.grad(task.loss))(task.init(jax.random.key(0)), (inputs, inputs)))
    with pytest.raises(ValueError, match="'text' cannot be downloaded"):
        tasks.load_data(settings, True)
    with pytest.raises(ValueError, match="has no option 'remat'"):
        tasks.task_of(dataclasses.replace(settings, task="mlp", heads=None), dataset, 12, 1, tasks.mup.SP)


def test_precision_is_not_of_a_cpu(monkeypatch):
    """A CPU knows no TF32, and JAX refuses products of it there."""
    try:
        for platform, expected in (("cpu", "highest"), ("gpu", "TF32_TF32_F32_X3"), ("tpu", "TF32_TF32_F32_X3")):
            monkeypatch.setattr(jax, "default_backend", lambda: platform)
            tasks.set_up_precision("TF32_TF32_F32_X3")
            assert jax.config.jax_default_matmul_precision == expected
    finally:
        jax.config.update("jax_default_matmul_precision", None)


# ---------------------------------------------------------------------------------------------------------
# Errors become one line


def fail_with(error):
    def run(argv):
        raise error
    return run


@pytest.mark.parametrize("error, message", [
    (ValueError("a\nb"), "a"), (ValueError("\n\n  a\nb"), "a"), (ValueError(""), "ValueError"),
    (ValueError("\n"), "ValueError"), (FileNotFoundError(2, "No such file", "x.npz"), "x.npz: No such file"),
    (OSError("\nodd"), "input or output: odd"), (MemoryError(), "not enough memory for these sizes; use smaller ones"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB"),
     "not enough memory for these sizes (RESOURCE_EXHAUSTED: 5 GB); use smaller ones")])
def test_error_is_one_line(error, message, capsys):
    assert tasks.run_command(fail_with(error), "it.py", []) == 2
    assert capsys.readouterr().err == f"it.py: error: {message}\n"


def test_interrupt_and_success(capsys):
    assert tasks.run_command(fail_with(KeyboardInterrupt()), "it.py", []) == 130
    assert capsys.readouterr().err == "it.py: interrupted\n"
    assert tasks.run_command(lambda argv: 7, "it.py", []) == 7
    assert tasks.run_command(fail_with(SystemExit(0)), "it.py", []) == 0  # as argparse ends after --help


@pytest.mark.parametrize("error", [RuntimeError("Unable to pay"), AssertionError(), TypeError("x"),
                                   jax.errors.JaxRuntimeError("INTERNAL: x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        tasks.run_command(fail_with(error), "it.py", [])


def python(*argv, **environment):
    """A finished process of Python in the root of the project, without the devices of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, timeout=300)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_platform_that_is_not_there_is_one_line(platform):
    """JAX raises an AssertionError without a message for a missing GPU, and a RuntimeError for the rest."""
    if platform == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU")
    done = python("tasks.py", JAX_PLATFORMS=platform)
    error = done.stderr.decode()
    assert done.returncode == 2 and error.count("\n") == 1, error
    assert error.startswith(f"tasks.py: error: JAX finds no device, with JAX_PLATFORMS={platform!r}")


# ---------------------------------------------------------------------------------------------------------
# stdout that cannot encode θ, and stdout that nobody reads


def test_help_in_another_encoding():
    """Of all three programs, one encoding after the other in one process: what cannot be printed is replaced."""
    script = ("import sys, tasks, meta_train, evaluate\n"
              "for encoding in sys.argv[1:]:\n"
              "    sys.stdout.reconfigure(encoding=encoding, errors='strict')\n"
              "    for run in (tasks.main, meta_train.run, evaluate.run):\n"
              "        assert tasks.run_command(run, '', ['--help']) == 0\n"
              "    print('=====')")
    encodings = ["ascii", "latin-1", "cp1252"]
    done = python("-c", script, *encodings)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    *texts, rest = done.stdout.replace(b"\r", b"").split(b"=====\n")
    assert not rest and len(texts) == 3
    for text, encoding in zip(texts, encodings):
        assert text.decode(encoding).count("--sigma ? ") == 1


@pytest.mark.parametrize("module", ["mup", "lopt", "es"])
def test_demonstrations_print_what_can_be_printed(module, monkeypatch):
    """Those that have no command line of `tasks`: their last lines, around another main. A closed pipe ends them."""
    *_, last = ast.parse((ROOT / f"{module}.py").read_text()).body
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", [f"{module}.py"])
    scope = {"sys": sys, "prepare_to_print": mup.prepare_to_print, "main": lambda: print("θ = 1")}
    before = signal.getsignal(signal.SIGPIPE)
    try:
        exec(compile(ast.Module(last.body, []), module, "exec"), scope)
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL != before
    finally:
        signal.signal(signal.SIGPIPE, before)
    stdout.flush()
    assert stdout.buffer.getvalue().strip() == b"? = 1"


def test_output_and_errors_in_ascii():
    script = "import tasks; tasks.run_command(lambda argv: [print('θ μ \\udcff'), int('θ')], 'it.py', [])"
    done = python("-c", script, PYTHONIOENCODING="ascii")
    assert done.stdout == b"? ? ?\n" and done.stderr.startswith(b"it.py: error: invalid literal")
    assert done.stderr.count(b"\n") == 1 and b"'?'" in done.stderr


@pytest.mark.parametrize("program", [
    "print('x' * 10**6)", "print('x'); time.sleep(1); print('y')", "print('x', flush=True); time.sleep(1); 1 / 0",
    "print('x'); time.sleep(1); raise SystemExit(0)"])
def test_closed_stdout_ends_quietly(program):
    script = (f"import sys, time, tasks\ndef run(argv):\n    {program.replace('1 / 0', 'print(1, flush=True)')}\n"
              "    return 0\nsys.exit(tasks.run_command(run, 'it.py', []))")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_under_stdout_is_an_error():
    script = "import sys, tasks; sys.exit(tasks.run_command(lambda argv: print('x'), 'it.py', []))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr.startswith(b"it.py: error: input or output: No space left on device\n")


def test_streams_of_a_notebook(monkeypatch):
    """They are no files, and may not be there at all."""
    for stdout in (types.SimpleNamespace(write=len, flush=lambda: None), io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert tasks.run_command(lambda argv: 0, "it.py", []) == 0


# ---------------------------------------------------------------------------------------------------------
# Devices


def test_devices_that_are_there_are_used(monkeypatch):
    """In a notebook JAX has been used before, and its devices can no longer be set up."""
    before = jax.devices()
    monkeypatch.delenv("XLA_FLAGS")
    tasks.set_up_devices(6, None)
    tasks.set_up_devices(6, 3)
    assert jax.devices() == before


def test_devices_divide_the_work():
    script = "import jax, tasks; tasks.set_up_devices({}); print(len(jax.devices()))"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(python("-c", script.format("7, 3")).stdout) == 3  # as asked
    assert int(python("-c", script.format("0")).stdout) == cores
    assert int(python("-c", script.format("1")).stdout) == 1


@pytest.mark.parametrize("number, limit, divisor", [(8, 8, 8), (8, 7, 4), (6, 4, 3), (7, 6, 1), (0, 5, 5)])
def test_largest_divisor(number, limit, divisor):
    assert tasks.largest_divisor(number, limit) == divisor
