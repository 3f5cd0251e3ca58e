"""results/: the tables agree with the CSVs; reproduce.sh agrees with the θ and the command lines.

In results/README.md a comment after each table names its CSVs and the column that it shows; the row
and the header of a cell choose the row. A comment after a text: "CSV column words" of each number.
"""

import csv
import pathlib
import re
import shlex

import pytest
from conftest import ROOT

import evaluate
import lopt
import meta_train
import mup

RESULTS = ROOT / "results"
PAGE, FRONT = ((folder / "README.md").read_text() for folder in (RESULTS, ROOT))
MEASURED = PAGE.split("## The claims")[1].split("## Cost")[0]
COMMANDS = re.findall(r"(?m)^python (\w+)\.py (.*)", (RESULTS / "reproduce.sh").read_text())
META_TRAIN = {re.search(r"--out runs/(\w+)", flags)[1]: shlex.split(flags)
              for program, flags in COMMANDS if program == "meta_train"}
EVALUATE = [shlex.split(flags) for program, flags in COMMANDS if program == "evaluate"]
CSVS = {path.stem: list(csv.DictReader(path.open())) for path in RESULTS.glob("*.csv")}
LAPTOP = CSVS.pop("mulo_laptop")  # the losses that the first command prints
THETA = {path.stem: lopt.load(path) for path in sorted(RESULTS.glob("*.npz"))}
NAMES = {"AdamW": "adamw", "AdamW, cosine": "adamw_cosine", "μAdam": "muadam"}
for name, file, seed_1 in re.findall(r"\n\| (.+?) \| `(\w+).npz`(?:, seed 1: `(\w+))?", PAGE):
    NAMES |= {name: file, f"{name}, seed 1": seed_1}

# Each number in the tables of README.md that has two or more decimals, in their order
CLAIMS = """width loss mulo_m 1024; width loss mulo_m 4096; width loss lo_m 4096; width loss
mulo_m 512; width loss adamw per-width 512; width loss mulo_m 4096; width loss adamw per-width 4096;
depth-512 loss mulo_m 16; depth loss mulo_m 32 16; depth loss lo_m 32 16; horizon loss mulo_s 25000;
horizon loss lo_s 25000; pre-activations slope mulo_m layer_2 500; pre-activations slope lo_m
layer_1 500; width loss mulo_m_128 4096; width loss adamw per-width 4096; width-step-mult-4096 loss;
width-cooldown loss adamw_cosine 4096; horizon-step-mult loss 128 25000; horizon-planned loss
adamw_cosine 25000; lm-tuned loss 512; lm loss adamw 512"""


def exact(names, column, *words):
    """The value of a column in the rows that hold all words."""
    keys = ("optimizer", "tuned", "width", "depth", "steps", "layer", "step")
    found = {row[column] for name in names for row in CSVS[name]
             if set(words) <= {row.get(key) for key in keys}}
    assert len(found) == 1, (names, column, words, found)
    return found.pop()


def of_text(text, source):
    """(shown, value, CSVs) of the numbers in a text."""
    items = [item.split() for item in source.split(";")]
    for shown, (name, *words) in zip(re.findall(r"\d\.\d\d+", text), items, strict=True):
        yield shown, exact([name], *words), [name]


def of_table(lines, source):
    """(shown, value, CSVs) of the cells of a table."""
    *names, default = source.split()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for row in rows:
        at = dict(zip(header, row))
        own = [path.stem for path in RESULTS.glob(at.pop("CSV", "") + ".csv")] or names
        optimizer, _, tuned = at.pop("optimizer").partition(", tuned at ")
        words = [NAMES[optimizer], *(at.pop(key) for key in ("width", "step") if key in at)]
        words += {"": [], "32": ["transfer"], "each width": ["per-width"]}[tuned]
        for head, shown in at.items():
            column = "test_accuracy" if "test accuracy" in head else default
            place = re.findall(r"layer_\d|logits|\d+", head.replace(",", ""))
            if shown:
                yield shown, exact(own, column, *words, *place), own


def test_numbers_are_those_of_the_csvs():
    parts = re.split(r"\s*<!-- (.*?) -->\n", MEASURED)
    blocks = [text.rpartition("\n\n")[2].splitlines() for text in parts[:-1:2]]
    cells = [cell for lines, source in zip(blocks, parts[1::2]) for cell in (
        of_table(lines, source) if lines[0][0] == "|" else of_text(" ".join(lines), source))]
    tables = " ".join(re.findall(r"(?m)^\|.*", FRONT))
    for shown, value, _ in [*cells, *of_text(tables, CLAIMS)]:
        digits = len(shown.partition(".")[2])
        value = f"{float(value):+.{digits}f}" if digits else value
        assert shown.replace("−", "-") in (value, value.lstrip("+"))
    assert MEASURED.count("\n|-") == sum(lines[0][0] == "|" for lines in blocks)
    prose = " ".join(re.findall(r"(?m)^[^|\n].*", MEASURED))
    assert set(re.findall(r"\d\.\d{3}", prose)) <= {shown for shown, *_ in cells}
    assert {name for *_, names in cells for name in names} == set(CSVS)


def test_the_readme_shows_what_the_first_command_printed():
    columns = ["width", "theta", "tuned_at_32", "tuned_here", "at_0.001"]
    now, before = ([row for row in LAPTOP if (row["commit"] == "68d7a60") == old] for old in (0, 1))
    shown = re.search(r"\n    width .*\n(.*)\n(.*)\n", FRONT).groups()
    assert [[x for x in line.split() if x[0] != "("] for line in shown] == [
        [row[column] for column in columns] for row in now if row["seed"] == "0"]
    spread = [f(float(row[column]) for row in now if row["width"] == width)
              for column in columns[1:3] for width in ("32", "512") for f in (min, max)]
    sentence = re.search(r"over three seeds[^`]*", FRONT)[0]
    assert [f"{x:.2f}" for x in spread] == re.findall(r"\d\.\d+", sentence)
    assert [row["theta"] for row in before] == re.findall(
        r"\d\.\d+", re.search(r"`--base-width 32`.*", FRONT)[0])


@pytest.mark.parametrize("name", THETA)
def test_theta_have_the_flags_of_reproduce_and_the_numbers_of_the_table(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    theta, was = THETA[name], THETA[name].made["settings"]
    was["max_offset"] = was["max_offset"] or was["truncation"]
    p, lengths = theta.parametrization, sorted({was["min_length"], was["max_length"]})
    mults = "SP" if p == mup.SP else f"{p.output_mult:g}, {p.hidden_lr_mult:g}"
    row = (rf"\| {was['meta_steps']:,}, {was['pairs']} \| {'–'.join(f'{n:,}' for n in lengths)} "
           rf"\| {mults}; {theta.step_mult:g} \|")
    assert re.search(rf"`{name}\.npz`.* {row}", PAGE) or "laptop" in name
    assert was["widths"] == [32, 64, 128][:3 if re.match("(mu)?lo_m", name) else 1]
    if "velo" not in name:
        args, first = meta_train.parse(META_TRAIN[name])
        default, _ = meta_train.parse(["--parametrization", p.name])
        apart = {"data_dir", "hidden", first and "start", *(p._fields if p == mup.SP else ())}
        for key in (vars(args).keys() & was.keys()) - apart:
            assert getattr(args, key) in (was[key], was[key] or getattr(default, key)), key
        assert theta.made.get("origin") == (first and first.made)


@pytest.mark.parametrize("flags", EVALUATE, ids=lambda flags: flags[flags.index("--name") + 1])
def test_tables_have_the_flags_of_reproduce(flags):
    args = evaluate.parse([flag for flag in flags if flag != "--plot"])  # it needs matplotlib
    stems = [pathlib.Path(path).stem for path in args.theta]
    wanted = {"optimizer": stems + args.baselines, "width": args.widths, "seeds": [args.seeds],
              "depth": args.depths or [args.depth], "steps": args.lengths or [args.steps]}
    for key in wanted.keys() & CSVS[args.name][0].keys():
        assert {row[key] for row in CSVS[args.name]} == set(map(str, wanted[key]))
    assert set(stems) <= set(THETA) and len(EVALUATE) == len(CSVS)


def test_the_folder_is_small_and_all_of_it_is_used():
    assert len(files := list(RESULTS.iterdir())) <= 45 and len(PAGE.encode()) <= 15_000
    assert all(path.stem in CSVS or path.name in PAGE + "README.md" for path in files)
