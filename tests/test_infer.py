"""`mup.infer`: every tensor's kind and fan_in from two widths, what it refuses, and what follows from it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, side_by_side

import lopt
import mup

KEY = jax.random.key(0)
N, W = 32, 64  # the narrow and the wide width


def shapes(tree):
    """A tree of tuples as a tree of jax.ShapeDtypeStructs; other leaves stay."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, jnp.float32) if is_shape(x) else x, tree,
                        is_leaf=is_shape)


def is_shape(x):
    """True for a tuple of numbers, which stands for a tensor."""
    return type(x) is tuple and all(isinstance(n, int) for n in x)


def infer(tree_of, stacked=False, sizes=(N, W)):
    """The declaration of a network, given as a function from the width to a tree of shapes."""
    return mup.infer(*(shapes(tree_of(size)) for size in sizes), stacked)


def of(weights):
    """The (kind, fan_in) of each weight of a tree."""
    return jax.tree.map(lambda w: (w.kind, w.fan_in), weights)


# ---------------------------------------------------------------------------------------------------------
# Kinds and fan_ins


@pytest.mark.parametrize("shape_of, kind, fan_in", [
    (lambda n: (3, n), "input", 3),                   # dense layers, and embeddings [vocabulary, W]
    (lambda n: (1, n), "input", 1),
    (lambda n: (n, n), "hidden", W),
    (lambda n: (n, 4 * n), "hidden", W),
    (lambda n: (4 * n, n), "hidden", 4 * W),
    (lambda n: (n, 10), "output", W),
    (lambda n: (n, 1), "output", W),
    (lambda n: (49 * n, 10), "output", 49 * W),       # flattened images
    (lambda n: (n,), "vector", 1),
    (lambda n: (3 * n,), "vector", 1),
    (lambda n: (1, n, n), "hidden", W),               # convolutions in one, two and three dimensions
    (lambda n: (5, n, n), "hidden", 5 * W),
    (lambda n: (3, 3, 3, n), "input", 27),
    (lambda n: (3, 3, n, 2 * n), "hidden", 9 * W),
    (lambda n: (3, 3, n, 3), "output", 9 * W),
    (lambda n: (2, 3, 4, n, n), "hidden", 24 * W),
    (lambda n: (3, 3, 1, n), "input", 9),             # depthwise, and with 4 groups
    (lambda n: (3, 3, n // 4, n), "hidden", 9 * W // 4),
    (lambda n: (n, 4, n // 4), "hidden", W),          # attention: the heads' size grows, or their number
    (lambda n: (n, n // 8, 8), "hidden", W),
    (lambda n: (4, n // 4, n), "hidden", W),
    (lambda n: (n // 8, 8, n), "hidden", W),
    (lambda n: (1, n, n), "hidden", W),
    (lambda n: (1, 1, n), "input", 1),                # a class token
])
def test_a_tensor_by_itself(shape_of, kind, fan_in):
    weight = infer(lambda n: {"a": shape_of(n)})["a"]
    assert (weight.kind, weight.fan_in, weight.shape) == (kind, fan_in, shape_of(W))
    in_list = infer(lambda n: [(7, n), shape_of(n), (n,), None])
    assert in_list == [mup.Weight("input", (7, W), 7), weight, mup.Weight("vector", (W,)), None]


@pytest.mark.parametrize("heads, size", [(lambda n: 4, lambda n: n // 4), (lambda n: n // 8, lambda n: 8)])
@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b"), (0, 1)])
def test_attention_with_biases(heads, size, names):
    """A bias [heads, size] has the shape of a matrix: the kernel beside it tells that it is none."""
    def attention(n):
        inner, outer = ((n, heads(n), size(n)), (heads(n), size(n))), ((heads(n), size(n), n), (n,))
        layers = {"query": inner, "out": outer}
        return {name: list(x) if names == (0, 1) else dict(zip(names, x)) for name, x in layers.items()}

    found = of(infer(attention))
    for layer in found.values():
        assert (layer[names[0]], layer[names[1]]) == (("hidden", W), ("vector", 1))


def test_attention_in_one_node():
    found = of(infer(lambda n: {"wq": (n, n // 8, 8), "bq": (n // 8, 8), "wo": (n // 8, 8, n), "bo": (n,)}))
    assert found == {"wq": ("hidden", W), "bq": ("vector", 1), "wo": ("hidden", W), "bo": ("vector", 1)}


def test_biases_tell_the_axes_of_the_outputs():
    """Few heads for many queries, and q, k and v in one: fan_in is not fan_out, but the bias tells."""
    found = infer(lambda n: {"few": {"kernel": (n, 2, n // 8), "bias": (2, n // 8)},
                             "qkv": {"kernel": (n, 3, n // 8, 8), "bias": (3, n // 8, 8)},
                             "one": {"kernel": (n, 2, 8), "bias": (2, 8)},
                             "read_out": {"kernel": (n // 8, 8, 10), "bias": (10,)}})
    assert {name: of(layer["kernel"]) for name, layer in found.items()} == {
        "few": ("hidden", W), "qkv": ("hidden", W), "one": ("output", W), "read_out": ("output", W)}
    assert {of(found[name]["bias"]) for name in found} == {("vector", 1)}


def test_without_an_infinite_axis():
    """Such a tensor is a vector. A matrix begins as N(0, 1/fan_in), or as the number that fills it."""
    found = infer(lambda n: {"a": (n,), "scalar": (), "bias": (10,), "matrix": (2, 8, 4)})
    assert found["scalar"] == mup.Weight("vector", ()) and found["bias"] == mup.Weight("vector", (10,))
    assert found["matrix"] == mup.Weight("vector", (2, 8, 4), std=0.25)
    narrow, wide = ({"a": jnp.zeros(n), "scalar": jnp.asarray(0.5), "table": jnp.zeros((2, 3))}
                    for n in (N, W))
    found = mup.infer(narrow, wide)
    assert (found["scalar"].constant, found["table"].constant, found["a"].constant) == (0.5, 0.0, None)


class Layer(NamedTuple):
    """A layer as other libraries have them."""
    weight: Any
    bias: Any


def test_outputs_first():
    """The bias beside tells that the outputs' axis is the first, as in PyTorch."""
    found = of(infer(lambda n: [Layer((n, 3), (n,)), Layer((2 * n, n), (2 * n,)), Layer((10, n), (10,))]))
    assert [x.weight for x in found] == [("input", 3), ("hidden", W), ("output", W)]
    assert {x.bias for x in found} == {("vector", 1)}


def equinox_layer(name):
    """A class that passes for a layer of Equinox's own, which tell nothing by their names and biases."""
    def init(self, weight, bias):
        self.weight, self.bias = weight, bias

    layer = type(name, (), {"__module__": "equinox.nn._a_layer", "__init__": init})
    return jax.tree_util.register_dataclass(layer, ["weight", "bias"], [])


def test_equinox():
    """Its layers have the outputs' axis first, but for the embedding; an activation function is no tensor."""
    linear, conv, embedding, norm = map(equinox_layer, ("Linear", "Conv2d", "Embedding", "LayerNorm"))
    tree_of = lambda n: {"embedding": embedding((9, n), None), "patch": linear((n, 3), None),
                         "conv": conv((n, n, 3, 3), (n, 1, 1)), "norm": norm((n,), (n,)),
                         "read_out": linear((10, n), None), "activation": jax.nn.relu, "rate": 0.5}
    found = infer(tree_of)
    assert [of(found[name].weight) for name in ("embedding", "patch", "conv", "read_out")] == [
        ("input", 9), ("input", 3), ("hidden", 9 * W), ("output", W)]
    assert found["conv"].bias == mup.Weight("vector", (W, 1, 1))
    assert (found["norm"].weight.constant, found["norm"].bias.constant) == (1.0, 0.0)
    assert found["activation"] is None and found["rate"] is None
    params = jax.eval_shape(lambda: mup.init(found, KEY, mup.MUP))
    assert jax.tree.map(lambda x: x.shape, params)["read_out"].weight == (10, W) and params["rate"] is None


class Boxed(NamedTuple):
    value: Any


def test_flax_nnx():
    """It keeps every array in a box: those beside a tensor stand in other boxes."""
    found = infer(lambda n: {"q": {"kernel": Boxed((n, 2, n // 8)), "bias": Boxed((2, n // 8))},
                             "norm": {"scale": Boxed((n,)), "bias": Boxed((n,))}})
    assert of(found["q"]) == {"kernel": Boxed(("hidden", W)), "bias": Boxed(("vector", 1))}
    assert [found["norm"][name].value.constant for name in ("scale", "bias")] == [1.0, 0.0]


@pytest.mark.parametrize("stacked", [{"blocks": True}, {"blocks": 1, "conv": 0, "norm": False},
                                     {"blocks": {"w": 1, "b": 1, "q": 1}}])
def test_stacked(stacked):
    """Stacked axes stay in the shape and take no part in kind and fan_in; else they are a convolution's."""
    tree_of = lambda n: {"blocks": {"w": (5, n, 2 * n), "b": (5, n), "q": (5, n, n // 8, 8)},
                         "conv": (5, n, n), "norm": (n,)}
    found = infer(tree_of, stacked)
    assert of(found) == {"blocks": {"w": ("hidden", W), "b": ("vector", 1), "q": ("hidden", W)},
                         "conv": ("hidden", 5 * W), "norm": ("vector", 1)}
    assert jax.tree.map(lambda w: w.shape, found) == tree_of(W)
    assert mup.rule_of(found["blocks"]["w"], mup.MUP).std == 1 / 8


def test_stacks_in_a_module():
    """The names of its fields are as good as a dict's keys."""
    found = infer(lambda n: Boxed({"blocks": Boxed((5, n, 2 * n)), "out": (n, 10)}), {"value": {"blocks": 1}})
    assert of(found.value) == {"blocks": Boxed(("hidden", W)), "out": ("output", W)}


def test_only_tensors_of_floating_point_numbers_are_weights():
    narrow, wide = ({"w": jnp.zeros((n, n)), "key": jax.random.key(0), "count": jnp.zeros((), jnp.int32),
                     "mask": jnp.ones(n, bool)} for n in (N, W))
    found = mup.infer(narrow, wide)
    assert of(found["w"]) == ("hidden", W) and [found[name] for name in ("key", "count", "mask")] == [None] * 3


def test_biases_of_several_axes_begin_as_biases_whether_they_grow_or_not():
    found = infer(lambda n: {"kernel": (n, 2, 8), "bias": (2, 8), "beta": (n,), "fixed": (3, 5)})
    assert found["bias"] == mup.Weight("vector", (2, 8)) and found["fixed"].std == 3 ** -0.5
    assert of(infer(lambda n: {"w": (n, 10), "beta": (n,)}))["w"] == ("output", W)  # a shift is no bias of w


def test_stacks_of_stacks():
    found = infer(lambda n: [(2, 5, n, n), (2, 5, n), (2, 5, 7, n)], 2)
    assert of(found) == [("hidden", W), ("vector", 1), ("input", 7)]
    assert of(infer(lambda n: [(n // 8, n)], True)) == [("vector", 1)], "even if the number of layers grows"


# ---------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("tree_of, stacked, message", [
    (lambda n: {"a": {"w": (n, n, n)}}, 0, r"^a/w: \(32, 32, 32\) grows .*than two infinite axes; declare"),
    (lambda n: [(3, n), (n, 2, 8)], 0, r"^1: .*which axes are the outputs' .*`stacked`\); declare it as a mup\.Weight\("),
    (lambda n: {"w": (n, n), "per_head": (n // 8, n, 8)}, 0, r"^per_head: .*declare it as a mup\.Weight\("),
    (lambda n: {"torch": (n, n, 3, 3)}, 0, "^torch: .*outputs' .*; declare"),
    (lambda n: {"torch": (n, 3, 3, 3)}, 0, "^torch: .*outputs' .*; declare"),
    (lambda n: {"qkv": (n, 3, n // 8, 8)}, 0, "^qkv: .*outputs' .*; declare"),
    (lambda n: {"w": (n, n), "gain": (4, n // 4)}, 0, r"^gain: .*open whether it is a gain of several axes .*; declare"),
    (lambda n: {"up": {"w": (6, n, 4 * n), "b": (6, 4 * n)}}, 0, "^up/w: .*bias for each place .*`stacked`.*; declare"),
    (lambda n: {"wte": (50, n), "blocks": {"w": (6, n, n)}, "wpe": (16, n)}, 1,
     r'^stacked: the first 1 axes of the tensors at the root differ.*\{"blocks": 1\}$'),
    (lambda n: {"w": (n, n)}, "w", "^stacked: 'w' is no number of axes"),
    (lambda n: {"w": (5, 5), "b": (5,)}, 0, "nothing grows .* two different widths"),
    (lambda n: {"w": (n, 5)}, 1, "nothing grows"),
    (lambda n: {}, 0, "nothing grows"),
    (lambda n: {"w": (2 * W - n, n)}, 0, r"^w: shape \(96, 32\) cannot grow to \(64, 64\).* first"),
    (lambda n: {"w": (n,) * (n // N)}, 0, r"^w: shape \(32,\) cannot grow to \(64, 64\)"),
    (lambda n: {"w": (n, 0)}, 0, r"^w: shape \(32, 0\) cannot grow"),
    (lambda n: {"w": (n, n), "b": (n,)}, 2, r"^b: .* with 2 stacked axes.*`stacked` how many"),
    (lambda n: {"w": (n, n)}, {"v": 1}, "^stacked: there are no tensors at v$"),
    (lambda n: {"w": (n // W, n)}, 0, r"^w: shape \(0, 32\) cannot grow"),
    (lambda n: {"w": (n, n), "scale": (n, 1)}, 0, "^scale: .*a read-out or a gain or shift; declare it"),
    (lambda n: {"w": (n, n), f"layer_{n}": (n, n)}, 0, "^layer_32: is not in both networks"),
    (lambda n: {"w": (n, n), "b": (n,) if n == N else None}, 0, "^b: is not in both networks"),
    (lambda n: {"w": (n, n), "f": (n,) if n == N else jax.nn.relu}, 0, "^f: is not in both networks"),
    (lambda n: [(n, n)] * (n // N), 0, "^1: is not in both networks"),
])
def test_refused(tree_of, stacked, message):
    with pytest.raises(ValueError, match=message) as error:
        infer(tree_of, stacked)
    assert "\n" not in str(error.value)


def test_declared_by_hand():
    """What is refused, or meant otherwise, is declared by a Weight in its place in the wide network."""
    narrow, wide = (shapes({"w": (n, n), "qkv": {"w": (n, 3, n // 8, 8)}, "positions": (16, n)})
                    for n in (N, W))
    wide["qkv"]["w"] = mup.Weight("hidden", (W, 3, W // 8, 8), W)
    wide["positions"] = mup.Weight("input", (16, W), std=0.02)
    assert mup.infer(narrow, wide) == {**wide, "w": mup.Weight("hidden", (W, W), W)}


# ---------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("name, value, constant", [
    ("bias", 0.0, None), ("b", 0.0, None), ("a", 0.0, None), ("a", 1.0, 1.0), ("a", 1e-5, 1e-5),
    ("scale", 0.0, 0.0), ("scale", 1.0, 1.0), ("scale", None, 1.0), ("ln_gain", None, 1.0),
    ("gamma", None, 1.0), ("weight", None, 1.0), ("shift", None, 0.0), ("offset", 0.0, 0.0),
    ("beta", None, 0.0), ("bias", None, None),
])
def test_gains_and_shifts_of_norms(name, value, constant):
    """By their entries, or by their names where there are none."""
    trees = [shapes({name: (n,), "w": (n, n)}) if value is None
             else {name: jnp.full(n, value, jnp.bfloat16 if value == 1 else jnp.float32),
                   "w": jnp.zeros((n, n))} for n in (N, W)]
    found = mup.infer(*trees)
    assert found[name].kind == "vector" and found["w"] == mup.Weight("hidden", (W, W), W)
    assert found[name].constant == (constant if constant is None else pytest.approx(constant))


def test_a_shift_stands_beside_a_gain_and_no_matrix():
    ones, zeros = (lambda n: [f(n) for f in (jnp.ones, jnp.zeros)]), jnp.zeros
    found = mup.infer(*({"norm": ones(n), "layer": [zeros((n, n)), zeros(n)],
                         "batch_norm": {"scale": jnp.ones((1, 1, 1, n)), "offset": zeros((1, 1, 1, n))},
                         "group_norm": {"g": jnp.ones((1, 1, 1, n)), "b": zeros((1, 1, 1, n))}}
                        for n in (N, W)))
    assert [w.constant for w in found["norm"] + found["layer"]] == [1.0, 0.0, None, None]
    batch_norm = found["batch_norm"].values()
    assert [(w.kind, w.constant) for w in batch_norm] == [("vector", 0.0), ("vector", 1.0)]
    assert [found["group_norm"][name].constant for name in "gb"] == [1.0, 0.0]
    with pytest.raises(ValueError, match="^q_gain: .*a gain of several axes"):
        mup.infer(*({"q_gain": jnp.ones((n // 16, 16))} for n in (N, W)))


def test_random_biases_are_no_gains():
    """Not even those of one number, since they differ between the two networks."""
    narrow, wide = ({"w": jax.random.normal(KEY, (n, 1)), "b": jax.random.uniform(jax.random.key(n), (1,))}
                    for n in (N, W))
    assert mup.infer(narrow, wide)["b"].constant is None


def test_in_jit():
    """Where arrays have no values yet, names tell; here the network's initialisation itself is compiled."""
    narrow = shapes({"scale": (N,), "bias": (N,), "x": (N,)})

    @jax.jit
    def init(params):
        return mup.init(mup.infer(narrow, params), KEY, mup.MUP)

    values = init({name: jnp.ones(W) for name in narrow})
    assert np.all(values["scale"] == 1) and np.all(values["bias"] == 0) and np.all(values["x"] == 0)


# ---------------------------------------------------------------------------------------------------------
# A network that is not ours, with a convolution and an attention

HEAD_SIZE, PIXELS, CLASSES = 8, 8, 10


def initial(width):
    """The params of a small network as its author would begin them; they are only looked at."""
    rng, heads = np.random.default_rng(width), (width // HEAD_SIZE, HEAD_SIZE)
    layer = lambda inputs, outputs: {"kernel": rng.normal(0, 0.1, (*inputs, *outputs)),
                                     "bias": np.zeros(outputs)}
    norm = {"scale": np.ones(width), "bias": np.zeros(width)}
    return {"stem": layer((3, 3, 3), (width,)), "conv": layer((3, 3, width), (width,)), "norm_0": norm,
            "attention": {**{name: layer((width,), heads) for name in "qkv"}, "out": layer(heads, (width,))},
            "norm_1": norm, "read_out": layer((width,), (CLASSES,))}


def declared(width):
    """The same network's weights, declared by hand."""
    W, heads = mup.Weight, (width // HEAD_SIZE, HEAD_SIZE)
    layer = lambda kind, fan_in, inputs, outputs: {"kernel": W(kind, (*inputs, *outputs), fan_in),
                                                   "bias": W("vector", outputs)}
    norm = {"scale": W("vector", (width,), constant=1.0), "bias": W("vector", (width,), constant=0.0)}
    return {"stem": layer("input", 27, (3, 3, 3), (width,)),
            "conv": layer("hidden", 9 * width, (3, 3, width), (width,)), "norm_0": norm,
            "attention": {**{name: layer("hidden", width, (width,), heads) for name in "qkv"},
                          "out": layer("hidden", width, heads, (width,))},
            "norm_1": norm, "read_out": layer("output", width, (width,), (CLASSES,))}


def forward(params, x, multiplier, attention_scale):
    """x [B, H, H, 3] → (logits [B, CLASSES], pre-activations). multiplier: the read-out's."""
    def conv(layer, x, stride):
        return jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "SAME",
                                            dimension_numbers=("NHWC", "HWIO", "NHWC")) + layer["bias"]

    def norm(layer, x):
        return jax.nn.standardize(x, axis=-1) * layer["scale"] + layer["bias"]

    seen = {"stem": conv(params["stem"], x, 2)}
    seen["conv"] = conv(params["conv"], jax.nn.relu(seen["stem"]), 2)
    x = seen["conv"].reshape(x.shape[0], -1, seen["conv"].shape[-1])  # (B, L, W)
    attention, y = params["attention"], norm(params["norm_0"], x)
    q, k, v = (jnp.einsum("blw,whs->blhs", y, attention[name]["kernel"]) + attention[name]["bias"]
               for name in "qkv")
    attended = jax.nn.softmax(jnp.einsum("blhs,bmhs->bhlm", q, k) * attention_scale)
    mixed = jnp.einsum("bhlm,bmhs->blhs", attended, v)
    seen["q"], seen["attention"] = q, (jnp.einsum("blhs,hsw->blw", mixed, attention["out"]["kernel"])
                                       + attention["out"]["bias"])
    x = jnp.mean(norm(params["norm_1"], x + seen["attention"]), axis=1)
    seen["logits"] = multiplier * (x @ params["read_out"]["kernel"] + params["read_out"]["bias"])
    return seen["logits"], seen


def batches(count, size=32):
    """Batches of images that are noise around the image of their class: (images, labels) of each."""
    rng = np.random.default_rng(0)
    labels, classes = rng.integers(CLASSES, size=(count, size)), rng.normal(size=(CLASSES, PIXELS, PIXELS, 3))
    images = 0.5 * classes[labels] + rng.normal(size=(count, size, PIXELS, PIXELS, 3))
    return list(zip(images.astype(np.float32), labels))


def run(weights, parametrization, optimizer, steps, marks=()):
    """Trains the network → (losses [steps], {layer: RMS of its pre-activations' change} at each mark)."""
    multiplier = mup.forward_multiplier(weights["read_out"]["kernel"], parametrization)
    apply = functools.partial(forward, multiplier=multiplier,
                              attention_scale=mup.attention_scale(HEAD_SIZE, parametrization))

    @jax.jit
    def begin(key):
        params = mup.init(weights, key, parametrization)
        return params, optimizer.init(params)

    def loss(params, x, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)[0]), labels[:, None], 1))

    @jax.jit
    def step(params, state, x, labels):
        value, grads = jax.value_and_grad(loss)(params, x, labels)
        updates, state = optimizer.update(grads, state, params, value=value)
        return lopt.apply_updates(params, updates), state, value

    layers = jax.jit(lambda params: apply(params, data[0][0])[1])
    data, (params, state) = batches(steps), begin(KEY)
    first, losses, at_marks = layers(params) if marks else None, [], []
    for t, (x, labels) in enumerate(data, start=1):
        params, state, value = step(params, state, x, labels)
        losses.append(value)
        if t in marks:
            at_marks.append({name: np.sqrt(np.mean(np.square(now - first[name])))
                             for name, now in layers(params).items()})
    return np.array(losses), at_marks


def inferred(width):
    """The network's weights at a width, inferred from that one and from half of it."""
    return mup.infer(initial(width // 2), initial(width))


def test_a_network_is_inferred_as_it_would_be_declared():
    for width in (32, 256):
        assert inferred(width) == declared(width)
        assert mup.infer(*(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial(n))
                           for n in (width // 2, width))) == declared(width), "and from shapes alone"


def test_mulo_trains_it():
    learned = lopt.load(ROOT / "results" / "mulo_m_128.npz")
    weights, p = inferred(64), learned.parametrization
    multipliers = mup.update_multipliers(weights, p)
    assert multipliers["conv"] == {"kernel": p.hidden_lr_mult / (9 * 64), "bias": 1.0}
    optimizer = lopt.learned_optimizer(learned, update_multipliers=multipliers,
                                       gradient_multiplier=mup.gradient_multiplier(weights, p))
    losses, _ = run(weights, p, optimizer, 60)
    print(np.round(losses[::10], 3))
    assert losses[0] == pytest.approx(np.log(CLASSES), abs=0.2) and losses[-10:].mean() < 0.7 * losses[0]


def test_coordinate_check():
    """Adam in μP moves every layer as far at width 256 as at 32, by the multipliers that were inferred.

    Slopes after 2 and 10 steps: the read-out is 0 at first, so that step 1 moves no other layer.
    """
    widths, marks = (32, 256), (2, 10)

    def at(width):
        weights = inferred(width)
        optimizer = lopt.adamw(1e-2, update_multipliers=mup.update_multipliers(weights, mup.MUP))
        return run(weights, mup.MUP, optimizer, marks[-1], marks)[1]

    narrow, wide = side_by_side(at, widths)
    slopes = {layer: np.array([np.log(w[layer] / n[layer]) / np.log(widths[1] / widths[0])
                               for n, w in zip(narrow, wide)]) for layer in narrow[0]}
    print({layer: np.round(x, 2) for layer, x in slopes.items()})
    assert max(abs(x).max() for x in slopes.values()) < 0.15, slopes
