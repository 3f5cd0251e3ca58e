"""The networks: forward passes against NumPy in float64, causality, gradients, kinds, coordinate checks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side
from jax.test_util import check_grads

import lopt
import mup
import tasks
from tasks import Dataset, Split

MULTIPLIERS = mup.Parametrization("mup", input_mult=1.7, output_mult=5.0, hidden_lr_mult=2.0)
PARAMETRIZATIONS = pytest.mark.parametrize("parametrization", [MULTIPLIERS, mup.SP], ids=["mup", "sp"])


# Quick to compile; these networks are so small that this takes longer than to run them.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def images(size: int = 8, count: int = 200) -> Dataset:
    """Noise, brighter for higher labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    pixels = rng.integers(0, 128, (count, size, size, 3)) + 12 * labels[:, None, None, None]
    split = Split(jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.int32))
    return Dataset("images", 10, (0.5,) * 3, (0.3,) * 3, split, split)


def text(length: int = 16, rows: int = 200, vocabulary: int = 64) -> Dataset:
    """Rows of letters, each the one before plus 0, 1 or 2: what comes next can be learned in part."""
    steps = np.random.default_rng(0).integers(0, 3, rows * length)
    split = Split(jnp.asarray(np.cumsum(steps).reshape(rows, length) % vocabulary, jnp.uint8),
                  jnp.zeros(0, jnp.int32))
    return Dataset("text", vocabulary, (), (), split, split)


def small_task(kind: str, parametrization: mup.Parametrization, depth: int = 2, **options) -> tasks.Task:
    """Width 12; attention in 3 heads."""
    options |= {"mlp": {}, "vit": {"heads": 3, "patch": 4}, "lm": {"heads": 3, "sequence_length": 16}}[kind]
    return tasks.make_task(kind, text() if kind == "lm" else images(), 12, depth, 4, parametrization,
                           **options)


def random_params(task: tasks.Task, seed: int = 0) -> dict:
    """Params of which none is 0 or 1: read-out, gains, shifts and class token too; output weights of order 1."""
    rng = np.random.default_rng(seed)

    def draw(weight: mup.Weight) -> np.ndarray:
        scale = 1.0 if weight.kind == "output" else 0.5 if len(weight.shape) == 1 else weight.shape[0] ** -0.5
        return np.float32((weight.constant or 0.0) + scale * rng.standard_normal(weight.shape))

    return jax.tree.map(draw, task.weights)


# ---------------------------------------------------------------------------------------------------------
# The networks once more, in NumPy, one example at a time, from their definitions


class Definition:
    """A network in float64, from parameters, parametrization and number of heads alone."""

    def __init__(self, params: dict, parametrization: mup.Parametrization, heads: int = 1):
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.mup, self.heads = parametrization.name == "mup", heads
        self.input_mult = parametrization.input_mult if self.mup else 1.0
        self.output_mult = parametrization.output_mult if self.mup else 1.0
        self.seen = {}

    def read_out(self, x):
        layer = self.params["logits"]
        logits = x @ layer["w"] + layer["b"]
        self.seen["logits"] = self.output_mult * logits / (x.shape[-1] if self.mup else 1)
        return self.seen

    def normalised(self, x, layer):
        rows = np.stack([(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in x])
        return rows * layer["gain"] + layer["shift"]

    def attention(self, x, layer, causal, name):
        q, k, v = (x @ layer[n]["w"] + layer[n]["b"] for n in "qkv")
        size = x.shape[1] // self.heads
        scale = 1 / size if self.mup else 1 / math.sqrt(size)
        mixed, logits = np.zeros_like(x), np.zeros((self.heads, len(x), len(x)))
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(len(x)):
                logits[head, i] = [scale * sum(q[i, part] * k[j, part]) for j in range(len(x))]
                visible = i + 1 if causal else len(x)
                weight = np.exp(logits[head, i, :visible])
                mixed[i, part] = weight @ v[:visible, part] / weight.sum()
        self.seen[f"{name}/attention_logits"] = logits
        return mixed @ layer["o"]["w"] + layer["o"]["b"]

    def blocks(self, x, causal):
        for name in sorted(n for n in self.params if n.startswith("block_")):
            layer = self.params[name]
            x = x + self.attention(self.normalised(x, layer["norm_1"]), layer["attention"], causal, name)
            up = self.normalised(x, layer["norm_2"]) @ layer["mlp"]["up"]["w"] + layer["mlp"]["up"]["b"]
            gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3)))
            x = x + gelu @ layer["mlp"]["down"]["w"] + layer["mlp"]["down"]["b"]
            self.seen[name] = x
        return self.normalised(x, self.params["norm"])

    def mlp(self, image):
        x = np.asarray(image, np.float64).reshape(-1)
        for i in range(len(self.params) - 1):
            layer = self.params[f"layer_{i}"]
            self.seen[f"layer_{i}"] = x @ layer["w"] * (self.input_mult if i == 0 else 1) + layer["b"]
            x = np.maximum(self.seen[f"layer_{i}"], 0)
        return self.read_out(x)

    def vit(self, image, patch=4):
        image, layer = np.asarray(image, np.float64), self.params["patch"]
        corners = [(i, j) for i in range(0, len(image), patch) for j in range(0, len(image), patch)]
        pixels = [image[i:i + patch, j:j + patch].reshape(-1) for i, j in corners]
        x = [self.input_mult * self.params["class_token"]]
        x += [self.input_mult * (p @ layer["w"]) + layer["b"] for p in pixels]
        return self.read_out(self.blocks(np.stack(x) + self.input_mult * self.params["positions"], False)[0])

    def lm(self, tokens):
        x = self.params["tokens"][np.asarray(tokens)] + self.params["positions"]
        return self.read_out(self.blocks(self.input_mult * x, True))


@PARAMETRIZATIONS
@pytest.mark.parametrize("kind", tasks.TASKS)
def test_forward_is_the_definition(kind, parametrization):
    task = small_task(kind, parametrization)
    params = random_params(task)
    inputs, _ = task.sample(jax.random.key(0), task_split(kind))
    logits, pre_activations = task.forward(params, inputs)  # not jitted: jit would sort the names
    for i, example in enumerate(inputs):
        expected = getattr(Definition(params, parametrization, heads=3), kind)(example)
        assert list(pre_activations) == list(expected)  # in the order of the layers
        for name, value in expected.items():
            np.testing.assert_allclose(pre_activations[name][i], value, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(pre_activations["logits"][i], logits[i])
        assert np.std(expected["logits"]) > 0.1


def task_split(kind: str) -> Split:
    return (text() if kind == "lm" else images()).train


# ---------------------------------------------------------------------------------------------------------
# Causality, gradients, rematerialisation


@PARAMETRIZATIONS
def test_lm_is_causal(parametrization):
    task = small_task("lm", parametrization)
    params, forward = random_params(task), jax.jit(task.forward)
    tokens = np.arange(16)[None] % 64
    before = forward(params, tokens)[1]
    for t in (0, 7, 15):
        changed = tokens.copy()
        changed[0, t] = 40
        after = forward(params, changed)[1]
        for name in ("block_0", "block_1", "logits"):
            np.testing.assert_array_equal(before[name][0, :t], after[name][0, :t])
            assert np.all(np.any(before[name][0, t:] != after[name][0, t:], axis=-1))  # and each later one does


@PARAMETRIZATIONS
@pytest.mark.parametrize("kind", tasks.TASKS)
def test_gradients_are_those_of_finite_differences(kind, parametrization):
    task = small_task(kind, parametrization, depth=1 if kind != "mlp" else 2)
    inputs, labels = task.sample(jax.random.key(0), task_split(kind))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(task))
        inputs = inputs if kind == "lm" else jnp.asarray(inputs, jnp.float64)
        check_grads(jax.jit(lambda p: task.loss(p, (inputs, labels))), (params,), order=1, modes=("rev",),
                    eps=1e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["vit", "lm"])
def test_remat_changes_nothing_but_is_there(kind):
    plain, remat = (small_task(kind, MULTIPLIERS, depth=1, remat=remat) for remat in (False, True))
    params, batch = random_params(plain), plain.sample(jax.random.key(0), task_split(kind))
    (loss, grads), (remat_loss, remat_grads) = (quick_jit(jax.value_and_grad(t.loss))(params, batch)
                                                for t in (plain, remat))
    np.testing.assert_allclose(loss, remat_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, remat_grads)
    assert "remat" in str(jax.make_jaxpr(remat.loss)(params, batch))
    assert "remat" not in str(jax.make_jaxpr(plain.loss)(params, batch))


# ---------------------------------------------------------------------------------------------------------
# Declarations and initialisation

BLOCK_KINDS = {f"norm_{i}/{n}": "vector" for i in (1, 2) for n in ("gain", "shift")}
BLOCK_KINDS |= {f"{layer}/w": "hidden" for layer in ("attention/q", "attention/k", "attention/v", "attention/o",
                                                     "mlp/up", "mlp/down")}
BLOCK_KINDS |= {f"{layer}/b": "vector" for layer in ("attention/q", "attention/k", "attention/v", "attention/o",
                                                     "mlp/up", "mlp/down")}
BLOCKS_KINDS = {f"block_{i}/{name}": kind for i in range(2) for name, kind in BLOCK_KINDS.items()}
ENDS = {"norm/gain": "vector", "norm/shift": "vector", "logits/w": "output", "logits/b": "vector"}
KINDS = {
    "mlp": {"layer_0/w": "input", "layer_0/b": "vector", "layer_1/w": "hidden", "layer_1/b": "vector",
            "logits/w": "output", "logits/b": "vector"},
    "vit": {"patch/w": "input", "patch/b": "vector", "class_token": "input", "positions": "input",
            **BLOCKS_KINDS, **ENDS},
    "lm": {"tokens": "input", "positions": "input", **BLOCKS_KINDS, **ENDS},
}


def by_path(tree: dict) -> dict:
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_every_weight_has_its_declared_kind(kind):
    task = small_task(kind, MULTIPLIERS)
    declared = by_path(task.weights)
    assert {name: weight.kind for name, weight in declared.items()} == KINDS[kind]
    for name, multiplier in by_path(task.update_multipliers).items():  # width 12, hidden_lr_mult 2
        fan_in = 48 if name.endswith("mlp/down/w") else 12
        assert multiplier == pytest.approx(2.0 / fan_in if KINDS[kind][name] == "hidden" else 1.0)
    assert set(by_path(small_task(kind, mup.SP).update_multipliers).values()) == {1.0}


@pytest.mark.parametrize("kind", ["vit", "lm"])
@PARAMETRIZATIONS
def test_initial_statistics(kind, parametrization):
    dataset = text(length=64, vocabulary=200) if kind == "lm" else images()
    task = tasks.make_task(kind, dataset, 256, 1, 4, parametrization)
    std_of = {"tokens": 200 ** -0.5, "positions": 0.02, "patch/w": 0.88 / math.sqrt(4 * 4 * 3), "class_token": 0.0,
              "block_0/mlp/down/w": 0.88 / math.sqrt(4 * 256),
              "logits/w": 0.0 if parametrization.is_mup else 0.88 / math.sqrt(256)}
    for name, x in by_path(quick_jit(task.init)(jax.random.key(0))).items():
        weight = by_path(task.weights)[name]
        expected_mean, expected_std = 0.0, 0.88 / math.sqrt(256)
        if name in std_of:
            expected_std = std_of[name]
        elif name.endswith("gain"):
            expected_mean, expected_std = 1.0, 0.0
        elif name.endswith("shift"):
            expected_std = 0.0
        elif weight.kind == "vector":
            expected_std = 1.0 if parametrization.is_mup else 0.0
        error = 5 * expected_std / math.sqrt(x.size)  # of the mean: 5 standard errors
        assert abs(float(jnp.mean(x)) - expected_mean) <= error, name
        assert abs(float(jnp.std(x)) - expected_std) <= error + 0.002 * expected_std, name
        if expected_std == 0.88 / math.sqrt(weight.fan_in):  # cut at two standard deviations
            assert float(jnp.max(jnp.abs(x))) <= 2.0 / math.sqrt(weight.fan_in) * 1.0001


# ---------------------------------------------------------------------------------------------------------
# Batches, the held-out loss, and errors


def test_language_model_batches_are_windows_of_the_text():
    dataset, task = text(), small_task("lm", mup.SP)
    stream = np.asarray(dataset.train.inputs).reshape(-1)
    windows = {tuple(stream[i:i + 17]): i for i in range(len(stream) - 16)}
    starts = set()
    for seed in range(50):
        inputs, labels = task.sample(jax.random.key(seed), dataset.train)
        assert inputs.shape == labels.shape == (4, 16) and inputs.dtype == jnp.int32
        np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
        starts |= {windows[tuple(map(int, (*x, y[-1])))] for x, y in zip(inputs, labels)}
    assert len({s % 16 for s in starts}) == 16 and max(starts) > 0.9 * len(stream)


def test_held_out_loss_of_the_language_model():
    dataset, task = text(rows=60), small_task("lm", MULTIPLIERS)
    params = random_params(task)
    stream = np.asarray(dataset.test.inputs, np.int32).reshape(-1)
    inputs, labels = stream[:59 * 16].reshape(59, 16), stream[1:59 * 16 + 1].reshape(59, 16)
    logits = np.asarray(task.forward(params, inputs)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, accuracy = jax.jit(task.test)(params, dataset.test)
    assert float(loss) == pytest.approx(-np.take_along_axis(log_p, labels[..., None], -1).mean(), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(-1) == labels), abs=1e-6)
    assert task.max_loss == pytest.approx(1.5 * math.log(64))


@pytest.mark.parametrize("width, options, heads", [(128, {}, 4), (16, {}, 1), (96, {"head_size": 16}, 6),
                                                   (96, {"heads": 2}, 2)])
def test_heads(width, options, heads):
    task = tasks.make_task("lm", text(), width, 1, 2, sequence_length=16, **options)
    inputs = jnp.zeros((2, 16), jnp.int32)
    shapes = jax.eval_shape(lambda: task.forward(task.init(jax.random.key(0)), inputs)[1])
    assert shapes["block_0/attention_logits"].shape == (2, heads, 16, 16)


@pytest.mark.parametrize("kind, dataset, width, options, message", [
    ("cnn", images(), 32, {}, "unknown task 'cnn'"),
    ("mlp", text(), 32, {}, "'mlp' needs images"),
    ("vit", text(), 32, {}, "'vit' needs images"),
    ("lm", images(), 32, {}, "'lm' needs text"),
    ("mlp", images(), 32, {"heads": 2}, "'mlp' has no option 'heads'"),
    ("lm", text(), 32, {"sequence_length": 16, "patch": 4}, "'lm' has no option 'patch'"),
    ("lm", text(), 32, {"sequence_length": 64}, "sequence_length 64 differs from the rows of 16"),
    ("lm", text(), 30, {"sequence_length": 16, "heads": 4}, "heads 4 does not fit width 30"),
    ("vit", images(), 100, {}, "head_size 32 does not fit width 100"),
    ("vit", images(), 32, {"heads": 0}, "heads 0 does not fit width 32"),
    ("vit", images(), 32, {"head_size": 0}, "head_size 0 does not fit width 32"),
    ("vit", images(), 32, {"patch": 3}, "patch 3 does not divide the image size 8"),
    ("vit", images(), 32, {"patch": 0}, "patch 0 does not divide the image size 8"),
    ("mlp", images(), 0, {}, "width must be 1 or more, got 0"),
])
def test_impossible_tasks_are_refused(kind, dataset, width, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.make_task(kind, dataset, width, 1, 4, mup.MUP, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth, batch_size, message", [(0, 4, "depth must be 1 or more"),
                                                        (1, 0, "batch_size must be 1 or more")])
def test_sizes_are_positive(depth, batch_size, message):
    with pytest.raises(ValueError, match=message):
        tasks.make_task("mlp", images(), 32, depth, batch_size)


def test_options_that_are_none_stay_at_their_defaults():
    task = tasks.make_task("mlp", images(), 32, 2, 4, mup.MUP, heads=None, patch=None, remat=None)
    assert task.name == "mlp-w32-d2"


# ---------------------------------------------------------------------------------------------------------
# Coordinate check with μAdam

WIDTHS = (64, 256)


def slopes(kind: str, heads: int | None, parametrization: mup.Parametrization, seeds: int) -> dict[str, float]:
    """The slope against the width of each layer's RMS change in 10 steps of Adam, over seeds, at depth 1."""
    dataset = text() if kind == "lm" else images()
    options = {"heads": heads, **({"patch": 2} if kind == "vit" else {"sequence_length": 16})}

    def changes(width):
        task = tasks.make_task(kind, dataset, width, 1, 8, parametrization, **options)
        adam = lopt.adamw(3e-3, update_multipliers=task.update_multipliers)
        jit = jax.jit if seeds > 4 else quick_jit
        check = jit(lambda key: tasks.coordinate_check(task, lambda _: adam, dataset.train, key, [10]))
        squares = [check(key) for key in jax.random.split(jax.random.key(0), seeds)]
        return {layer: np.sqrt(np.mean([square[layer][1] for square in squares])) for layer in squares[0]}

    narrow, wide = side_by_side(changes, WIDTHS)
    found = {layer: tasks.slope(WIDTHS, [narrow[layer], wide[layer]]) for layer in narrow}
    print(kind, parametrization.name, {layer: round(float(x), 3) for layer, x in found.items()})
    return found


def test_coordinate_check_with_more_heads():
    """ViT in μP: no pre-activation moves more, or less, in a wider network. SP: those of the block move far more."""
    in_mup = slopes("vit", None, mup.MUP, seeds=16)
    assert all(abs(slope) <= 0.15 for slope in in_mup.values()), in_mup
    in_sp = slopes("vit", None, mup.SP, seeds=1)
    assert min(in_sp[name] for name in ("block_0", "block_0/attention_logits")) > 0.3, in_sp


def test_coordinate_check_with_larger_heads():
    """The language model in μP: the same, but attention logits may move less in larger heads.

    Training aligns q with k, which moves q·k/S by Θ(1); but the product of the update of one and the random
    initial value of the other is there too, falls as 1/√S, and is the larger at these widths and steps.
    """
    for name, slope in slopes("lm", 2, mup.MUP, seeds=8).items():
        assert slope <= 0.15 and (slope >= -0.15 or name.endswith("attention_logits")), (name, slope)
