"""The optimizers against the numbers of the reference implementations, and their interface."""

import functools
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side

import lopt


def tree(data, prefix):
    """The arrays of a golden file whose names begin with prefix/."""
    return {name[len(prefix) + 1:]: jnp.asarray(data[name]) for name in data.files if name.startswith(prefix + "/")}


def steps(data, prefix):
    """How many numbered entries prefix0, prefix1, … a golden file has."""
    return len({name.split("/")[0] for name in data.files if name.startswith(prefix)
                and name.split("/")[0][len(prefix):].isdigit()})


@pytest.mark.parametrize("name", ["small_fc_lopt_sp", "small_fc_lopt_mup"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_learned_optimizer_meets_the_reference(name, chunk):
    """5e-6 absolute: the reference's own float32 rounding is up to 3.2e-6 (float64 meets it to 5e-7)."""
    data = np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False)
    optimizer = lopt.learned_optimizer(tree(data, "theta"), step_mult=data["step_mult"], exp_mult=data["exp_mult"],
                                       update_multipliers=tree(data, "update_scale"), chunk=chunk)
    params = tree(data, "params0")
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    total = steps(data, "grads")
    assert total > 0
    for t in range(total):
        updates, state = update(tree(data, f"grads{t}"), state, params)
        params = lopt.apply_updates(params, updates)
        for tensor, expected in tree(data, f"params{t + 1}").items():
            np.testing.assert_allclose(params[tensor], expected, rtol=0, atol=5e-6, err_msg=f"{tensor}, step {t}")


def test_gradient_multiplier_is_of_the_gradients():
    """Updates and averages are those of gradients that are as much larger; the μP multipliers are not touched."""
    tree, theta = {"w": jnp.full((3, 2), 0.5), "b": jnp.full(2, 0.1)}, lopt.init_theta(jax.random.key(0))
    grads = {"w": jnp.arange(6.0).reshape(3, 2) / 100, "b": jnp.asarray([0.02, jnp.nan])}
    make = functools.partial(lopt.learned_optimizer, theta, step_mult=0.01, update_multipliers={"w": 0.25, "b": 1.0})
    (plain, _), (same, state), (expected, averages) = [
        jax.jit(optimizer.update)(g, optimizer.init(tree), tree) for optimizer, g in (
            (make(), grads), (make(gradient_multiplier=8.0), grads),
            (make(), jax.tree.map(lambda g: 8.0 * g, grads)))]
    jax.tree.map(np.testing.assert_array_equal, (same, state), (expected, averages))  # 8 is a power of 2: no rounding
    assert np.max(np.abs(plain["w"] - same["w"])) > 1e-3 * np.max(np.abs(same["w"]))


def test_meta_adamw_meets_the_reference():
    """Schedule, decoupled decay and clipping of the update; 1e-5 of float32 weights of order 1."""
    data = np.load(GOLDEN_DIR / "meta_adamw.npz", allow_pickle=False)
    schedule = lopt.warmup_cosine(float(data["init"]), float(data["peak"]), float(data["end"]),
                                  int(data["warmup_steps"]), int(data["decay_steps"]))
    optimizer = lopt.adamw(schedule, weight_decay=float(data["weight_decay"]))
    params = tree(data, "params0")
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    total = steps(data, "grads")
    assert total > 0
    for t in range(total):
        np.testing.assert_allclose(schedule(jnp.int32(t)), data[f"lr{t}"], rtol=1e-5, atol=1e-9)
        updates, state = update(tree(data, f"grads{t}"), state, params)
        params = lopt.apply_updates(params, lopt.clip_by_global_norm(updates, float(data["clip"])))
        for name, expected in tree(data, f"params{t + 1}").items():
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=1e-5, err_msg=f"{name}, step {t}")


# ---------------------------------------------------------------------------------------------------------
# The learned optimizer against its definition

SHAPES = {"tall": (9, 5), "wide": (4, 11), "one weight": (1, 1), "conv, outputs first": (8, 4, 3, 3),
          "ties": (4, 4, 4), "vector": (7,), "scalar": ()}


def normal(seed):
    """A function of shape and scale that draws float32 arrays, by NumPy: JAX would compile each shape anew."""
    rng = np.random.default_rng(seed)
    return lambda shape, scale=1.0: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def some_theta(seed=0):
    """A θ whose every array, decay offsets included, matters."""
    theta, draw = jax.jit(lopt.init_theta)(jax.random.key(seed)), normal(seed)
    spread = lambda name: 0.3 if name[0] == "b" else 0.03 if name.endswith("decays") else 0.0
    return {name: x + draw(x.shape, spread(name)) for name, x in theta.items()}


def some_params(seed=1):
    """A tree of tensors of 0 to 4 axes, nested in dicts, lists and tuples, and gradients for it by step."""
    draw = normal(seed)
    make = lambda scale: {"a": {"w": draw((9, 5), scale), "b": draw((5,), scale)},
                          "list": [draw((), scale), (draw((2, 5, 3), scale), draw((3, 3, 4, 8), scale))]}
    return make(1.0), [make(10.0 ** -i) for i in range(4)]


def by_definition(theta, shape, grads, p, step_mult, exp_mult):
    """The values of a tensor after each gradient, in float64, as a transcript of the table of features."""
    theta = {name: np.asarray(x, np.float64) for name, x in theta.items()}
    rsqrt = lambda x: 1 / np.sqrt(x)
    rsqrt_plus = lambda x: rsqrt(np.maximum(x, 1e-9))
    decays = lambda betas, name: 1 - np.exp(10 * (np.log(1 - np.asarray(betas)) / 10 + theta[name]))
    momentum = decays((0.9, 0.99, 0.999), "momentum_decays")
    rms = np.clip(decays((0.999,), "rms_decays"), 0, 1)
    adafactor = np.clip(decays((0.9, 0.99, 0.999), "adafactor_decays"), 0, 1)
    order = np.argsort(shape, kind="stable")
    m, v, r, c = [0.0] * 3, 0.0, [0.0] * 3, [0.0] * 3
    p, after = np.asarray(p, np.float64), []
    for t, g in enumerate(grads):
        g = np.asarray(g, np.float64)
        mean = lambda x, axis: np.mean(x, axis, keepdims=True) if len(shape) > 1 else x
        d0, d1 = (order[-1], order[-2]) if len(shape) > 1 else (None, None)
        m = [b * old + (1 - b) * g for b, old in zip(momentum, m)]
        v = rms[0] * v + (1 - rms[0]) * g**2
        r = [b * old + (1 - b) * mean(g**2 + 1e-30, d0) for b, old in zip(adafactor, r)]
        c = [b * old + (1 - b) * mean(g**2 + 1e-30, d1) for b, old in zip(adafactor, c)]
        if len(shape) > 1:
            g_scale = m_scale = [rsqrt_plus(x / (mean(x, d1) + 1e-9)) * rsqrt_plus(y) for x, y in zip(r, c)]
        else:
            g_scale, m_scale = [rsqrt_plus(x + 1e-9) for x in r], [rsqrt(x + 1e-6) for x in r]
        features = [g, p, *m, v, *[x * rsqrt(v + 1e-6) for x in m], rsqrt(v + 1e-6),
                    *[g * x for x in g_scale], *r, *c, *[rsqrt(x + 1e-8) for x in [*r, *c]],
                    *[x * y for x, y in zip(m, m_scale)]]
        features = [np.broadcast_to(x, shape) for x in features]
        features = [x * rsqrt(1e-5 + np.mean(x**2)) for x in features]
        timescales = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)
        features += [np.full(shape, np.tanh(t / tau - 1)) for tau in timescales]
        hidden = np.maximum(np.stack(features, axis=-1) @ theta["w0"] + theta["b0"], 0)
        out = np.maximum(hidden @ theta["w1"] + theta["b1"], 0) @ theta["w2"] + theta["b2"]
        p = p - step_mult * out[..., 0] * np.exp(exp_mult * out[..., 1])
        after.append(p)
    return after


def test_updates_follow_the_definition():
    """The fast path, in chunks that do not divide, against all 39 features in float64; gradients 1 to 1e-4."""
    theta, step_mult, exp_mult = some_theta(), 0.05, 0.1
    optimizer = lopt.learned_optimizer(theta, step_mult=step_mult, exp_mult=exp_mult, chunk=20)

    def check(name):
        shape, draw = SHAPES[name], normal(len(name))
        start, *grads = [draw(shape, 10.0 ** -max(i - 1, 0)) for i in range(6)]
        update, params, state = jax.jit(optimizer.update), start, jax.jit(optimizer.init)(start)
        for t, expected in enumerate(by_definition(theta, shape, grads, start, step_mult, exp_mult)):
            updates, state = update(grads[t], state, params)
            params = lopt.apply_updates(params, updates)
            np.testing.assert_allclose(params, expected, rtol=0, atol=5e-6, err_msg=f"{name}, step {t}")

    side_by_side(check, SHAPES)


def test_the_features_that_are_shown_are_those_that_are_used():
    theta, draw = some_theta(), normal(3)
    shapes = [(1, 8, 6), (2, 5, 7), (9,)]  # as they are seen: [O, A, B] and [n]
    params = [draw(shape) for shape in shapes]
    optimizer = lopt.learned_optimizer(theta, step_mult=0.1)
    state, update, show = optimizer.init(params), jax.jit(optimizer.update), jax.jit(lopt.features)
    assert len(lopt.FEATURE_NAMES) == 39
    for t in range(3):
        grads = [draw(shape) for shape in shapes]
        updates, state = update(grads, state, params)
        for averages, g, p, ours in zip(state.averages, grads, params, updates):
            x = np.asarray(show(averages, g, p, t))
            assert x.shape == (39, *g.shape)
            hidden = np.maximum(np.moveaxis(x, 0, -1) @ theta["w0"] + theta["b0"], 0.0)
            out = np.maximum(hidden @ theta["w1"] + theta["b1"], 0.0) @ theta["w2"] + theta["b2"]
            np.testing.assert_allclose(ours, -0.1 * out[..., 0] * np.exp(0.001 * out[..., 1]), rtol=0, atol=1e-6)
        params = lopt.apply_updates(params, updates)


def test_the_chunk_does_not_matter():
    theta, draw = some_theta(), normal(4)
    params, grads = draw((37, 50)), draw((37, 50))
    results = []
    for chunk in (1, 333, 2**20):
        optimizer = lopt.learned_optimizer(theta, step_mult=0.1, chunk=chunk)
        results.append(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# The interface


OPTIMIZERS = {"learned": lambda **options: lopt.learned_optimizer(some_theta(), step_mult=0.1, **options),
              "adamw": lambda **options: lopt.adamw(0.1, weight_decay=0.01, **options)}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_tree_and_any_transformation(make):
    """optax's convention: pure functions of pytrees that jit, scan and vmap."""
    optimizer = make()
    init, update = optimizer  # a plain pair
    params, grads = some_params()

    def by_jit():
        stepped, state, jitted = params, init(params), jax.jit(update)
        for g in grads:
            updates, state = jitted(g, state, stepped)
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            assert [x.shape for x in jax.tree.leaves(updates)] == [x.shape for x in jax.tree.leaves(params)]
            assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))
            stepped = jax.tree.map(jnp.add, stepped, updates)
        assert int(state.step) == len(grads)
        return stepped

    def by_scan():
        def run(params, grads):
            def step(carry, g):
                params, state = carry
                updates, state = update(g, state, params)
                return (lopt.apply_updates(params, updates), state), None
            return jax.lax.scan(step, (params, init(params)), grads)[0][0]

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
        twice = lambda tree, scale: jax.tree.map(lambda x: jnp.stack([x, scale * x]), tree)
        return jax.jit(jax.vmap(run))(twice(params, 1.0), twice(stacked, 0.5))

    stepped, scanned = side_by_side(lambda how: how(), (by_jit, by_scan))
    jax.tree.map(lambda a, b: np.testing.assert_raises(AssertionError, np.testing.assert_allclose, a, b),
                 params, stepped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=0, atol=2e-5), scanned, stepped)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_update_multipliers_multiply_updates_only(make):
    params, grads = some_params()
    multipliers = jax.tree.unflatten(jax.tree.structure(params), [0.0, 1.0, 0.25, 2.0, 1 / 3])
    plain, scaled = make(), make(update_multipliers=multipliers)
    both = jax.jit(lambda g, p: [optimizer.update(g, optimizer.init(p), p) for optimizer in (plain, scaled)])
    (a, state_a), (b, state_b) = both(grads[0], params)
    jax.tree.map(lambda x, y, c: np.testing.assert_allclose(y, c * x, rtol=1e-5, atol=1e-8), a, b, multipliers)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


def test_gradients_that_are_not_finite_count_as_zero():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    holes = {"w": jnp.ones((3, 4)).at[1, 2].set(jnp.nan).at[0, 0].set(jnp.inf),
             "b": jnp.asarray([1.0, -jnp.inf, 2.0])}
    optimizer = OPTIMIZERS["learned"]()
    update = jax.jit(optimizer.update)
    filled = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), holes)
    a, b = (update(g, optimizer.init(params), params) for g in (holes, filled))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("change", [
    lambda theta: theta.pop("w1"), lambda theta: theta.update(extra=jnp.zeros(3)),
    lambda theta: theta.update(w0=jnp.zeros((38, 32))), lambda theta: theta.update(rms_decays=jnp.zeros(()))])
def test_a_wrong_theta_is_refused(change):
    theta = some_theta()
    change(theta)
    with pytest.raises(ValueError, match="theta has not the arrays of small_fc_lopt") as error:
        lopt.learned_optimizer(theta, step_mult=0.1)
    assert "\n" not in str(error.value)


def test_init_theta():
    theta = lopt.init_theta(jax.random.key(0))
    assert {name: x.shape for name, x in theta.items()} == lopt.THETA_SHAPES
    for name, x in theta.items():
        if name[0] == "w":
            assert float(jnp.std(x)) == pytest.approx(0.88 / np.sqrt(len(x)), rel=0.15)
            assert float(jnp.max(jnp.abs(x))) <= 2 / np.sqrt(len(x))
        else:
            assert not np.any(x), name


def test_theta_is_one_vector_and_back():
    theta = some_theta()
    vector, _ = jax.flatten_util.ravel_pytree(theta)
    back = lopt.theta_from_vector(vector)
    assert {name: x.shape for name, x in back.items()} == lopt.THETA_SHAPES
    jax.tree.map(np.testing.assert_array_equal, back, theta)


def test_fresh_decays_are_the_usual_ones():
    np.testing.assert_allclose(lopt.decays((0.9, 0.99, 0.999), jnp.zeros(3)), [0.9, 0.99, 0.999], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_meets_its_equations():
    """In float64, with a learning rate that is a function of the updates made before, and multipliers."""
    params, grads = some_params()
    multipliers = jax.tree.unflatten(jax.tree.structure(params), [1.0, 0.5, 2.0, 0.0, 0.1])
    schedule = lambda step: 0.01 / (1.0 + step)
    optimizer = lopt.adamw(schedule, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, update_multipliers=multipliers)
    state = optimizer.init(params)
    p = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    m, v = [0.0] * len(p), [0.0] * len(p)
    for t, g in enumerate(grads):
        updates, state = optimizer.update(g, state, params)
        params = lopt.apply_updates(params, updates)
        for i, (g, c) in enumerate(zip(jax.tree.leaves(g), jax.tree.leaves(multipliers))):
            g = np.asarray(g, np.float64)
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.95 * v[i] + 0.05 * g * g
            adam = m[i] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[i] / (1 - 0.95 ** (t + 1))) + 1e-3)
            p[i] = p[i] - 0.01 / (1 + t) * c * (adam + 0.1 * p[i])
        for ours, expected in zip(jax.tree.leaves(params), p):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("learning_rate", [0.01, jnp.float32(0.01), lambda step: 0.01])
def test_a_learning_rate_is_a_number_or_a_function(learning_rate):
    params = {"w": jnp.asarray([1.0, -2.0])}
    optimizer = lopt.adamw(learning_rate)
    updates, _ = optimizer.update({"w": jnp.asarray([3.0, -0.5])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.01, 0.01], rtol=1e-5)  # Adam's first step is the sign


def test_warmup_cosine():
    schedule = lopt.warmup_cosine(0.1, 1.0, 0.2, 10, 30)
    np.testing.assert_allclose([schedule(jnp.int32(t)) for t in (0, 5, 10, 20, 30, 99)],
                               [0.1, 0.55, 1.0, 0.6, 0.2, 0.2], rtol=1e-5)
    assert np.isfinite(lopt.warmup_cosine(0.1, 1.0, 0.2, 0, 0)(jnp.int32(0)))


def test_clip_by_global_norm():
    tree = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]])}
    assert float(lopt.global_norm(tree)) == pytest.approx(5.0)
    assert float(lopt.global_norm(lopt.clip_by_global_norm(tree, 2.0))) == pytest.approx(2.0)
    jax.tree.map(np.testing.assert_array_equal, lopt.clip_by_global_norm(tree, 6.0), tree)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    jax.tree.map(np.testing.assert_array_equal, lopt.clip_by_global_norm(zeros, 1.0), zeros)


# ---------------------------------------------------------------------------------------------------------
# θ on disk

METADATA = {"step_mult": 0.01, "exp_mult": 0.001, "parametrization": "mup", "meta_steps": 1000, "widths": [32]}


def theta_arrays():
    """What a θ file holds, to be spoilt."""
    return {**{name: np.asarray(x) for name, x in some_theta().items()},
            "metadata": np.frombuffer(json.dumps(METADATA).encode(), np.uint8)}


def test_theta_returns_from_disk(tmp_path):
    theta = some_theta()
    lopt.save_theta(tmp_path / "theta.npz", theta, **METADATA)
    loaded, metadata = lopt.load_theta(str(tmp_path / "theta.npz"))
    assert metadata == METADATA and set(loaded) == set(theta)
    jax.tree.map(np.testing.assert_array_equal, loaded, theta)
    assert [path.name for path in tmp_path.iterdir()] == ["theta.npz"]
    lopt.learned_optimizer(loaded, step_mult=metadata["step_mult"])


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "theta.npz"
    path.write_bytes(b"older")
    lopt.save_theta(path, some_theta(), **METADATA)
    assert lopt.load_theta(path)[1] == METADATA
    with pytest.raises(ValueError, match="nowhere"):
        lopt.save_theta(tmp_path / "nowhere" / "theta.npz", some_theta(), **METADATA)


def with_metadata(**changes):
    """An edit of a θ file's metadata; a value of None drops the entry."""
    metadata = {name: x for name, x in {**METADATA, **changes}.items() if x is not None}
    return lambda arrays: arrays.update(metadata=np.frombuffer(json.dumps(metadata).encode(), np.uint8))


def raw_metadata(content, dtype=np.uint8):
    return lambda arrays: arrays.update(metadata=np.frombuffer(content, dtype))


SPOILT = {
    "no w2": (lambda arrays: arrays.pop("w2"), "w2"),
    "no decays": (lambda arrays: arrays.pop("rms_decays"), "rms_decays"),
    "no metadata": (lambda arrays: arrays.pop("metadata"), "metadata"),
    "nothing at all": (lambda arrays: arrays.clear(), "no array"),
    "wrong shape": (lambda arrays: arrays.update(w0=np.zeros((38, 32), np.float32)), "w0"),
    "transposed": (lambda arrays: arrays.update(w2=np.zeros((2, 32), np.float32)), "w2"),
    "a scalar": (lambda arrays: arrays.update(b2=np.float32(0.0)), "b2"),
    "float64": (lambda arrays: arrays.update(w1=np.zeros((32, 32))), "w1"),
    "integers": (lambda arrays: arrays.update(b0=np.zeros(32, np.int64)), "b0"),
    "strings": (lambda arrays: arrays.update(b0=np.full(32, "x")), "b0"),
    "complex": (lambda arrays: arrays.update(b0=np.zeros(32, np.complex64)), "b0"),
    "NaN": (lambda arrays: arrays.update(b1=np.full(32, np.nan, np.float32)), "b1"),
    "infinity": (lambda arrays: arrays.update(b1=np.full(32, np.inf, np.float32)), "b1"),
    "pickled objects": (lambda arrays: arrays.update(w0=np.array([{"a": 1}], object)), ""),
    "pickled metadata": (lambda arrays: arrays.update(metadata=np.array({"step_mult": 1}, object)), ""),
    "oversized": (lambda arrays: arrays.update(more=np.zeros(lopt.MAX_THETA_BYTES, np.uint8)), "more than"),
    "metadata that are no JSON": (raw_metadata(b"{'step_mult'"), "metadata"),
    "metadata that are no UTF-8": (raw_metadata(b"\xff\xfe{}\xff"), "metadata"),
    "metadata that are a list": (raw_metadata(b"[1, 2]"), "metadata"),
    "metadata that are a number": (raw_metadata(b"3"), "metadata"),
    "metadata that are nested too deep": (raw_metadata(b"[" * 100_000), "metadata"),
    "no step_mult": (with_metadata(step_mult=None), "step_mult"),
    "no exp_mult": (with_metadata(exp_mult=None), "exp_mult"),
    "no parametrization": (with_metadata(parametrization=None), "parametrization"),
    "unknown parametrization": (with_metadata(parametrization="ntk"), "parametrization"),
    "a parametrization that is a list": (with_metadata(parametrization=["mup"]), "parametrization"),
    "a step_mult that is a word": (with_metadata(step_mult="big"), "metadata"),
    "a step_mult that is not finite": (with_metadata(step_mult=float("nan")), "finite"),
    "a negative base width": (with_metadata(base_width=-1), "base width"),
    "a base width that is infinite": (with_metadata(base_width=float("inf")), "base width"),
    "a step_mult that is no float": (with_metadata(step_mult=10**400), "metadata"),
}


def refuse(path, culprit):
    """load_theta says in one line that names the file what is wrong with it."""
    with pytest.raises(ValueError) as error:
        lopt.load_theta(path)
    message = str(error.value)
    assert str(path) in message and culprit in message and "\n" not in message, message


@pytest.mark.parametrize("spoil, culprit", SPOILT.values(), ids=SPOILT)
def test_a_file_that_holds_no_theta_is_refused(tmp_path, spoil, culprit):
    arrays = theta_arrays()
    spoil(arrays)
    np.savez(tmp_path / "theta.npz", **arrays)
    refuse(tmp_path / "theta.npz", culprit)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "theta.npz", **theta_arrays(), more=np.zeros(1 << 26, np.uint8))
    assert (tmp_path / "theta.npz").stat().st_size < lopt.MAX_THETA_BYTES
    refuse(tmp_path / "theta.npz", "unpacks to more than")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file", b"\x93NUMPY" + bytes(100), bytes(5000)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "theta.npz").write_bytes(content)
    refuse(tmp_path / "theta.npz", "")


def test_truncated_and_damaged_files_are_refused_or_read_right(tmp_path):
    """Never a traceback of another kind, and never another θ."""
    path, theta = tmp_path / "theta.npz", some_theta()
    lopt.save_theta(path, theta, **METADATA)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for length in rng.integers(0, len(content), 40):
        path.write_bytes(content[:length])
        refuse(path, "")
    for place in rng.integers(0, len(content), 300):
        path.write_bytes(content[:place] + bytes([content[place] ^ rng.integers(1, 256)]) + content[place + 1:])
        try:
            loaded, metadata = lopt.load_theta(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert metadata == METADATA
            jax.tree.map(np.testing.assert_array_equal, loaded, theta)


def test_missing_files_and_folders_are_refused(tmp_path):
    refuse(tmp_path / "none.npz", "cannot be read")
    refuse(tmp_path, "")
