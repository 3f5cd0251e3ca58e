"""The networks against NumPy in float64, their batches, tests and training, coordinate checks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import side_by_side

import lopt
import mup
import tasks

MULTIPLIERS = mup.Parametrization("mup", input_mult=1.7, output_mult=5.0, hidden_lr_mult=2.0)
KINDS = {"mlp": tasks.mlp_task, "vit": tasks.vit_task, "lm": tasks.lm_task}
# Compiling takes longer than running these small networks.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, (2, 300))
PIXELS = RNG.integers(0, 128, (2, 300, 8, 8, 3)) + 12 * LABELS[..., None, None, None]
IMAGES = tasks.Dataset(
    "images", 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4),
    *map(tasks.Split, jnp.asarray(PIXELS, jnp.uint8), jnp.asarray(LABELS, jnp.int32)))
LETTERS = np.cumsum(RNG.integers(0, 3, (2, 120 * 16)), axis=1).reshape(2, 120, 16) % 64
TEXT = tasks.Dataset("text", 64, (), (), *map(
    tasks.Split, jnp.asarray(LETTERS, jnp.uint8), jnp.zeros((2, 0), jnp.int32)))
DATA = {"mlp": IMAGES, "vit": IMAGES, "lm": TEXT}


def make(kind: str, p=MULTIPLIERS, width: int = 64, depth: int = 2, batch: int = 3) -> tasks.Task:
    return KINDS[kind](DATA[kind], width, depth, batch, p)


def random_params(task: tasks.Task) -> dict:
    """Params of which none is 0 or 1, the read-out, gains, shifts and the class token too."""
    def draw(weight):
        scale = {"output": 1.0, "vector": 0.5}.get(weight.kind, weight.shape[0] ** -0.5)
        return np.float32((weight.constant or 0.0) + scale * RNG.standard_normal(weight.shape))

    return jax.tree.map(draw, task.weights)


def definition(kind: str, params: dict, p: mup.Parametrization, example: np.ndarray) -> dict:
    """The pre-activations of one example, in float64 NumPy. Width 64, depth 2, heads of size 32."""
    params, seen, in_mup = jax.tree.map(np.float64, params), {}, p.name == "mup"
    input_mult, output_mult = (p.input_mult, p.output_mult) if in_mup else (1, 1)

    def linear(x, layer, mult=1):
        return mult * (x @ layer["w"]) + layer["b"]

    def norm(x, layer):
        rows = [(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in x]
        return np.stack(rows) * layer["gain"] + layer["shift"]

    def attention(x, layer, name):
        q, k, v = (linear(x, layer[n]) for n in "qkv")
        mixed, logits = np.zeros_like(x), []
        for part in (slice(0, 32), slice(32, 64)):
            logits.append(q[:, part] @ k[:, part].T / (32 if in_mup else math.sqrt(32)))
            for i, row in enumerate(logits[-1]):
                visible = i + 1 if kind == "lm" else len(x)
                share = np.exp(row[:visible])
                mixed[i, part] = share @ v[:visible, part] / share.sum()
        seen[f"{name}/attention_logits"] = np.stack(logits)
        return linear(mixed, layer["o"])

    def blocks(x):
        x = x + input_mult * params["positions"]
        for name in ("block_0", "block_1"):
            layer = params[name]
            x = x + attention(norm(x, layer["norm_1"]), layer["attention"], name)
            y = linear(norm(x, layer["norm_2"]), layer["mlp"]["up"])
            gelu = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
            seen[name] = x = x + linear(gelu, layer["mlp"]["down"])
        return norm(x, params["norm"])

    if kind == "mlp":
        seen["layer_0"] = linear(example.reshape(-1), params["layer_0"], input_mult)
        seen["layer_1"] = linear(np.maximum(seen["layer_0"], 0), params["layer_1"])
        x = np.maximum(seen["layer_1"], 0)
    elif kind == "vit":
        patches = [example[i:i + 4, j:j + 4].reshape(-1) for i in (0, 4) for j in (0, 4)]
        x = blocks(np.stack([input_mult * params["class_token"],
                             *(linear(x, params["patch"], input_mult) for x in patches)]))[0]
    else:
        x = blocks(input_mult * params["tokens"][example])
    seen["logits"] = output_mult * linear(x, params["logits"]) / (64 if in_mup else 1)
    return seen


@pytest.mark.parametrize("p", [MULTIPLIERS, mup.SP], ids=["mup", "sp"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_definition(kind, p):
    task = make(kind, p)
    params, batch = random_params(task), quick_jit(task.sample)(jax.random.key(0), DATA[kind].train)
    inputs = np.asarray(batch[0], np.int32 if kind == "lm" else np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        logits, pre_activations = quick_jit(task.forward)(wide, jnp.asarray(inputs))
    for i, example in enumerate(inputs):
        expected = definition(kind, params, p, example)
        assert set(pre_activations) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(pre_activations[name][i], value, 1e-9, 1e-9, err_msg=name)
        np.testing.assert_array_equal(pre_activations["logits"][i], logits[i])
        assert np.std(expected["logits"]) > 0.05


def test_lm_is_causal():
    task, tokens = make("lm"), jnp.arange(16)[None]
    params, forward = random_params(task), quick_jit(task.forward)
    before = forward(params, tokens)[1]
    for t in (0, 7, 15):
        after = forward(params, tokens.at[0, t].set(40))[1]
        for name in ("block_0", "block_1", "logits"):
            changed = np.any(before[name][0] != after[name][0], axis=-1)
            assert changed.tolist() == [False] * t + [True] * (16 - t)


def test_every_weight_is_declared():
    """As (kind, fan_in, std, constant). The last two are None where μP's table decides."""
    norm = {"gain": ("vector", 1, None, 1.0), "shift": ("vector", 1, None, 0.0)}

    matrix = lambda kind, n: {"w": (kind, n, None, None), "b": ("vector", 1, None, None)}
    block = {"norm_1": norm, "attention": {name: matrix("hidden", 64) for name in "qkvo"},
             "norm_2": norm, "mlp": {"up": matrix("hidden", 64), "down": matrix("hidden", 256)}}
    network = {"positions": ("input", 1, 0.02, None), "block_0": block, "block_1": block,
               "norm": norm, "logits": matrix("output", 64)}
    assert {kind: jax.tree.map(lambda w: (w.kind, w.fan_in, w.std, w.constant), make(kind).weights)
            for kind in KINDS} == {
        "mlp": {"layer_0": matrix("input", 192), "layer_1": matrix("hidden", 64),
                "logits": matrix("output", 64)},
        "vit": {"patch": matrix("input", 48), "class_token": ("input", 1, None, 0.0), **network},
        "lm": {"tokens": ("input", 1, 64 ** -0.5, None), **network}}


def test_batches_are_drawn_from_the_whole_split():
    number = {image.tobytes(): i for i, image in enumerate(np.uint8(PIXELS[0]))}
    inputs, labels = quick_jit(make("mlp", batch=600).sample)(jax.random.key(0), IMAGES.train)
    pixels = np.rint((np.asarray(inputs) * IMAGES.std + IMAGES.mean) * 255).astype(np.uint8)
    drawn = [number[image.tobytes()] for image in pixels]
    np.testing.assert_array_equal(labels, LABELS[0, drawn])
    assert len(set(drawn)) > 230  # of 300; 259 are expected
    windows = {tuple(LETTERS[0].ravel()[i:i + 17].tolist()): i for i in range(119 * 16)}
    inputs, labels = quick_jit(make("lm", batch=400).sample)(jax.random.key(0), TEXT.train)
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    starts = [windows[(*x, y[-1])] for x, y in zip(inputs.tolist(), labels.tolist())]
    assert {s % 16 for s in starts} == set(range(16)) and len({s // 16 for s in starts}) > 100


@pytest.mark.parametrize("kind", ["mlp", "lm"])
def test_test_is_the_mean_over_the_held_out_split(kind):
    if kind == "mlp":
        inputs, labels = (PIXELS[1] / 255 - IMAGES.mean) / IMAGES.std, LABELS[1]
    else:
        stream = LETTERS[1].ravel()
        inputs, labels = stream[:-16].reshape(-1, 16), stream[1:-15].reshape(-1, 16)
    task = make(kind)
    params = random_params(task)
    logits = np.stack([definition(kind, params, MULTIPLIERS, x)["logits"] for x in inputs])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss, accuracy = quick_jit(task.test)(params, DATA[kind].test)
    np.testing.assert_allclose(
        loss, -np.take_along_axis(log_p, labels[..., None], -1).mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(logits.argmax(-1) == labels), atol=1e-6)
    assert task.max_loss == pytest.approx(1.5 * math.log(DATA[kind].classes))


def test_runs_with_one_key_compare():
    """They share the initial params and the batches. An optimizer learns the planned steps."""
    task, split = make("mlp", mup.SP, width=16), IMAGES.train

    def still(steps):
        """No updates, but NaNs unless 3 steps are planned and the loss is passed on."""
        return lopt.Optimizer(lambda params: (), lambda grads, state, params, *, value: (
            jax.tree.map(lambda g: jnp.where((steps == 3) & (value > 0), 0, jnp.nan), grads), ()))

    @quick_jit
    def run(key):
        initial = task.init(jax.random.fold_in(key, 0))
        batches = [tasks.batch_at(task, split, key, t) for t in range(3)]
        return (initial, jnp.stack([task.loss(initial, batch) for batch in batches]),
                tasks.train(task, still, split, key, 3),
                tasks.train(task, lambda _: lopt.adamw(1e-2), split, key, 3)[1])

    initial, expected, (params, losses), trained = run(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, params, initial)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(losses.tolist())) == 3  # each step has its own batch
    assert abs(trained[0] - losses[0]) < 1e-5 and abs(trained[2] - losses[2]) > 1e-3


def test_impossible_networks_are_refused():
    for width, patch, line in ((100, 4, "^--widths 100: "), (64, 3, "^--patch 3: does not divide")):
        with pytest.raises(lopt.InputError, match=line):
            tasks.vit_task(IMAGES, width, 1, 4, patch=patch)


def test_coordinate_check():
    """Adam moves pre-activations alike at widths 64 and 256 in μP, and further at 256 in SP."""
    def movement(p, seeds, width):
        task = make("lm", p, width, depth=1, batch=8)
        adam = lopt.adamw(3e-3, update_multipliers=mup.update_multipliers(task.weights, p))
        run = quick_jit(functools.partial(tasks.coordinate_check, task, lambda _: adam, steps=5))
        runs = [run(TEXT.train, key) for key in jax.random.split(jax.random.key(0), seeds)]
        return {layer: math.sqrt(np.mean([x[layer][1][-1] for x in runs])) for layer in runs[0]}

    up = mup.Parametrization("mup", hidden_lr_mult=16.0)  # else the embeddings hide hidden weights
    found = side_by_side(movement, [up, up, mup.SP, mup.SP], [4, 4, 1, 1], [64, 256] * 2)
    in_mup, in_sp = ([tasks.slope((64, 256), [narrow[layer], wide[layer]]) for layer in narrow]
                     for narrow, wide in (found[:2], found[2:]))
    assert len(in_mup) == 3 and np.max(np.abs(in_mup)) <= 0.15, in_mup
    assert min(in_sp) > 0.3, in_sp
