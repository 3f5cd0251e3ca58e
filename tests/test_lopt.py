"""The optimizers against the numbers of the reference implementations, and their interface."""

import functools
import io
import json
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side, tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt
import mup


def steps(data, prefix):
    """How many numbered entries prefix0, prefix1, … a golden file has."""
    return len({name.split("/")[0] for name in data.files if name.startswith(prefix)
                and name.split("/")[0][len(prefix):].isdigit()})


def set_chunk(monkeypatch, chunk):
    """Makes the fast path take so many weights at once; None leaves it as it is."""
    if chunk is not None:
        monkeypatch.setitem(lopt.CHUNK, "cpu", chunk)


@pytest.mark.parametrize("name", ["small_fc_lopt_sp", "small_fc_lopt_mup"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_learned_optimizer_meets_the_reference(name, chunk, monkeypatch):
    """5e-6 absolute: the reference's own float32 rounding is up to 3.2e-6 (float64 meets it to 5e-7)."""
    set_chunk(monkeypatch, chunk)
    data = np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False)
    learned = lopt.Learned(tree(data, "theta"), data["step_mult"], data["exp_mult"])
    optimizer = lopt.learned_optimizer(learned, tree(data, "update_scale"))
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
    tree = {"w": jnp.full((3, 2), 0.5), "b": jnp.full(2, 0.1)}
    learned = lopt.Learned(lopt.init_theta(jax.random.key(0)), step_mult=0.01)
    grads = {"w": jnp.arange(6.0).reshape(3, 2) / 100, "b": jnp.asarray([0.02, jnp.nan])}
    make = lambda *multiplier: lopt.learned_optimizer(learned, {"w": 0.25, "b": 1.0}, *multiplier)
    (plain, _), (same, state), (expected, averages) = [
        jax.jit(optimizer.update)(g, optimizer.init(tree), tree) for optimizer, g in (
            (make(), grads), (make(8.0), grads), (make(), jax.tree.map(lambda g: 8.0 * g, grads)))]
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


def some_theta(seed=0, hidden=32):
    """A θ whose every array, decay offsets included, matters."""
    return spread(jax.jit(lopt.init_theta, static_argnums=1)(jax.random.key(seed), hidden), seed)


def spread(theta, seed=0):
    """θ with biases and offsets of the decays that are not 0."""
    draw, scale = normal(seed), lambda name: 0.3 if name[0] == "b" else 0.03 if name.endswith("decays") else 0.0
    return {name: x + draw(x.shape, scale(name)) for name, x in theta.items()}


def some_mlp(*sizes):
    """As `some_theta`, with an MLP of these layers."""
    theta, draw = {name: x for name, x in some_theta().items() if name.endswith("decays")}, normal(len(sizes))
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        theta |= {f"w{i}": draw((fan_in, fan_out), fan_in ** -0.5), f"b{i}": draw((fan_out,), 0.3)}
    return theta


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


def test_updates_follow_the_definition(monkeypatch):
    """The fast path, in chunks that do not divide, against all 39 features in float64; gradients 1 to 1e-4."""
    set_chunk(monkeypatch, 20)
    theta, step_mult, exp_mult = some_theta(), 0.05, 0.1
    optimizer = lopt.learned_optimizer(lopt.Learned(theta, step_mult, exp_mult))

    def check(name):
        shape, draw = SHAPES[name], normal(len(name))
        start, *grads = [draw(shape, 10.0 ** -max(i - 1, 0)) for i in range(6)]
        update, params, state = jax.jit(optimizer.update), start, jax.jit(optimizer.init)(start)
        for t, expected in enumerate(by_definition(theta, shape, grads, start, step_mult, exp_mult)):
            updates, state = update(grads[t], state, params)
            params = lopt.apply_updates(params, updates)
            np.testing.assert_allclose(params, expected, rtol=0, atol=5e-6, err_msg=f"{name}, step {t}")

    side_by_side(check, SHAPES)


AXES = [(8, 6), (2, 5, 7), (9,), (), (3, 3, 4, 8)]


def meets_the_plain_update(learned, shapes=AXES, steps=3):
    """The updates of a few steps of the optimizer are those of `plain_update`: (state, gradients, params, updates)."""
    draw = normal(3)
    params = [draw(shape) for shape in shapes]
    optimizer = lopt.learned_optimizer(learned)
    init, update = jax.jit(optimizer.init), jax.jit(optimizer.update)
    plain = jax.jit(lambda averages, grads, params, t: [
        lopt.plain_update(lopt.features, learned, lopt.statistics(*tensor, t)) for tensor in zip(averages, grads, params)])
    state = init(params)
    for t in range(steps):
        grads = [draw(shape) for shape in shapes]
        updates, state = update(grads, state, params)
        for ours, expected in zip(updates, plain(state.averages, grads, params, t)):
            np.testing.assert_allclose(ours, -expected, rtol=0, atol=1e-6, err_msg=f"{ours.shape}, step {t}")
            assert np.any(ours)
        before, params = params, lopt.apply_updates(params, updates)
    return state, grads, before, updates


def test_the_features_that_are_shown_are_those_that_are_used(monkeypatch):
    set_chunk(monkeypatch, 20)
    learned = lopt.Learned(some_theta(), step_mult=0.1)
    state, grads, params, updates = meets_the_plain_update(learned)
    t, theta = int(state.step) - 1, {name: np.asarray(x) for name, x in learned.theta.items()}
    rms_of_1 = lambda x: x / np.sqrt(1e-5 + np.mean(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
    assert lopt.feature_count() == 39
    show = lambda *tensor: lopt.features(lopt.statistics(*tensor, t))
    normalised = [f.normalised for f in show(state.averages[2], grads[2], params[2])]
    values = jax.jit(lambda *tensors: [[f.values for f in show(*tensor)] for tensor in zip(*tensors)])
    for g, shown, ours in zip(grads, values(state.averages, grads, params), updates):
        shown = [rms_of_1(x) if divided else x for x, divided in zip(map(np.asarray, shown), normalised)]
        x = np.concatenate([np.broadcast_to(x, (len(x), *g.shape)) for x in shown])
        assert x.shape == (39, *g.shape)
        hidden = np.maximum(np.moveaxis(x, 0, -1) @ theta["w0"] + theta["b0"], 0.0)
        out = np.maximum(hidden @ theta["w1"] + theta["b1"], 0.0) @ theta["w2"] + theta["b2"]
        np.testing.assert_allclose(ours, -0.1 * out[..., 0] * np.exp(0.001 * out[..., 1]), rtol=0, atol=1e-6)


MLPS = [(39, 12, 7, 6, 2), (39, 17, 17, 2)]


def test_mlps_of_any_width_and_depth(monkeypatch, tmp_path):
    """They give the plain update, and survive a file; `test_features_may_be_added` has another width on all axes."""
    set_chunk(monkeypatch, 20)

    def check(sizes, shapes):
        learned = lopt.Learned(some_mlp(*sizes), step_mult=0.1)
        meets_the_plain_update(learned, shapes)
        path = tmp_path / f"{len(sizes)}.npz"
        lopt.save(path, learned)
        loaded = lopt.load(path)
        assert loaded.theta.keys() == learned.theta.keys() and loaded[1:] == learned[1:]
        jax.tree.map(np.testing.assert_array_equal, loaded.theta, learned.theta)

    side_by_side(check, MLPS, (AXES, AXES[:1]))


@pytest.mark.parametrize("block, axes", [(lambda t: jnp.abs(t.g), 2), (lambda t: jnp.mean(t.g), 0),
                                         (lambda t: t.p[None, None], 4)])
def test_a_feature_of_a_wrong_shape_is_named(block, axes, monkeypatch):
    own = lopt.features
    monkeypatch.setattr(lopt, "features", lambda tensor: [*own(tensor), lopt.Feature("mine", block(tensor))])
    with pytest.raises(ValueError, match=f"the feature 'mine' has {axes} axes"):
        lopt.init_theta(jax.random.key(0))


def test_features_may_be_added(monkeypatch):
    """Those that vary per weight, per row or per column, normalised or not, train as the plain update says."""
    set_chunk(monkeypatch, 20)
    paper = lopt.features

    def features(tensor):
        first, *rest = paper(tensor)
        return [lopt.Feature("tanh g", jnp.tanh(tensor.g)[None], normalised=False), first,
                lopt.Feature("log r", jnp.log(tensor.r + 1e-8)), *rest,
                lopt.Feature("tanh c", jnp.tanh(tensor.c[:1]), normalised=False),
                lopt.Feature("p m", tensor.p * tensor.m[:2])]

    monkeypatch.setattr(lopt, "features", features)
    theta = spread(lopt.init_theta(jax.random.key(0), 16))
    assert theta["w0"].shape == (39 + 1 + 3 + 1 + 2, 16)
    learned = lopt.Learned(theta, step_mult=0.1)
    meets_the_plain_update(learned)
    with pytest.raises(ValueError, match="no θ of small_fc_lopt with 46 features: 'w0'"):
        lopt.learned_optimizer(lopt.Learned(some_mlp(*MLPS[1]), step_mult=0.1))


@pytest.mark.parametrize("in_kernel", [False, True])
def test_equations_may_be_changed_where_they_stand(in_kernel, monkeypatch):
    """How features are scaled, and the MLP's activation: the fast paths follow."""
    if in_kernel:
        in_one_kernel(monkeypatch)
    monkeypatch.setattr(lopt, "rms_scale", lambda mean_square: jax.lax.rsqrt(1.0 + mean_square))
    monkeypatch.setattr(lopt, "activation", jnp.tanh)
    meets_the_plain_update(lopt.Learned(some_theta(), step_mult=0.1), [(7, 5)], steps=1)


def test_a_tensor_of_more_weights_than_int32_counts():
    """Embeddings, or layers that are stacked. Nothing is computed."""
    learned = lopt.Learned(lopt.init_theta(jax.random.key(0)), step_mult=0.1)
    optimizer, p = lopt.learned_optimizer(learned), jax.ShapeDtypeStruct((50_000, 50_000), jnp.bfloat16)
    update, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), p)
    assert update.shape == p.shape and update.dtype == p.dtype


def test_the_chunk_does_not_matter(monkeypatch):
    learned, draw = lopt.Learned(some_theta(), step_mult=0.1), normal(4)
    params, grads = draw((37, 50)), draw((37, 50))
    results = []
    for chunk in (1, 333, 2**20):
        set_chunk(monkeypatch, chunk)
        optimizer = lopt.learned_optimizer(learned)
        results.append(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# The kernel of GPUs, computed without one


def in_one_kernel(monkeypatch):
    """Makes the optimizers take the GPU's kernel."""
    monkeypatch.setattr(lopt, "fast_update", functools.partial(lopt.in_one_kernel, interpret=True))


@pytest.mark.parametrize("sizes, shapes", [((39, 32, 32, 2), AXES), ((39, 12, 20, 7, 2), [(13, 41)]),
                                           ((39, 5, 2), [(13, 41)])], ids=str)
def test_the_kernel_gives_the_plain_update(sizes, shapes, monkeypatch):
    """On tensors of 0 to 4 axes, none of a size that a program's 128 weights divide, for MLPs of any width and depth."""
    in_one_kernel(monkeypatch)
    meets_the_plain_update(lopt.Learned(some_mlp(*sizes), step_mult=0.1), shapes, steps=2)


def test_the_kernel_takes_gradients_that_are_not_finite(monkeypatch):
    in_one_kernel(monkeypatch)
    optimizer, p = lopt.learned_optimizer(lopt.Learned(some_theta(), 0.1)), normal(1)((7, 5))
    g = p.at[2, 3].set(jnp.nan).at[0, 0].set(jnp.inf)
    one_update = jax.jit(lambda g: optimizer.update(g, optimizer.init(p), p)[0])
    np.testing.assert_array_equal(one_update(g), one_update(jnp.where(jnp.isfinite(g), g, 0.0)))
    assert np.all(np.isfinite(one_update(g)))


def test_the_kernel_of_velo_and_of_many_networks(monkeypatch):
    """VeLO's own list of features; and under vmap, as PES calls it."""
    params, grads = normal(5)((6, 7)), normal(7)((3, 6, 7))

    def updates():
        optimizer = velo_with_a_loss()
        return jax.jit(jax.vmap(lambda g: optimizer.update(g, optimizer.init(params), params)[0]))(grads)

    expected = updates()
    in_one_kernel(monkeypatch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates(), expected)


@pytest.mark.parametrize("shape", [(), (1, 1), (7,), (13, 41), (2, 3, 4, 5)], ids=str)
def test_a_gpu_gets_an_update_that_compiles(shape, monkeypatch):
    """Lowered for CUDA by the machine at hand: in one kernel, but for a single weight, which Triton cannot take so."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    optimizer, p = lopt.learned_optimizer(lopt.Learned(some_theta(), 0.1)), jnp.zeros(shape)
    triton_is_no_risk = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    lower = jax.export.export(jax.jit(lambda g: optimizer.update(g, optimizer.init(p), p)[0]), platforms=["cuda"],
                              disabled_checks=triton_is_no_risk)
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        assert ("triton" in lower(p).mlir_module()) == (p.size > 1)


@pytest.mark.parametrize("feature, goes", [
    (lambda s: s.m[:1], True), (lambda s: jnp.log(s.r), True), (lambda s: jnp.sign(s.g)[None], True),
    (lambda s: s.m[:2], True), (lambda s: s.m[1][None], False), (lambda s: s.m[:1] - s.m[1:2], False),
    (lambda s: s.m[::-1], False), (lambda s: jnp.sum(s.m, 0)[None], False)])
def test_only_lists_that_mix_no_decays_go_into_the_kernel(feature, goes):
    """Those that do take the path in chunks on GPUs, too."""
    assert lopt.is_made_by_decays(lopt.features) and lopt.is_made_by_decays(lopt.element_inputs)
    assert lopt.is_made_by_decays(lambda s: [*lopt.features(s), lopt.Feature("new", feature(s))]) == goes
    for_vectors = lambda s: s.g[None] if s.rho is not None else feature(s)
    assert lopt.is_made_by_decays(lambda s: [*lopt.features(s), lopt.Feature("new", for_vectors(s))]) == goes


# ---------------------------------------------------------------------------------------------------------
# The interface


OPTIMIZERS = {"learned": lambda **options: lopt.learned_optimizer(lopt.Learned(some_theta(), step_mult=0.1), **options),
              "adamw": lambda **options: lopt.adamw(0.1, weight_decay=0.01, **options)}


def velo_with_a_loss(**options):
    """VeLO, small and random, that is told a falling loss where none is given.

    Of a constant loss its features are ratios of rounding errors.
    """
    learned = lopt.Learned(lopt.init_velo_theta(jax.random.key(4), 8, 4), 0.1, architecture="velo")
    init, update = lopt.learned_optimizer(learned, **{"num_steps": 100} | options)
    return lopt.Optimizer(init, lambda grads, state, params: update(grads, state, params, value=2.0 - 0.1 * state.step))


both_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
all_optimizers = pytest.mark.parametrize("make", [*OPTIMIZERS.values(), velo_with_a_loss], ids=[*OPTIMIZERS, "velo"])


@all_optimizers
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


@all_optimizers
def test_update_multipliers_multiply_updates_only(make):
    params, grads = some_params()
    multipliers = jax.tree.unflatten(jax.tree.structure(params), [0.0, 1.0, 0.25, 2.0, 1 / 3])
    plain, scaled = make(), make(update_multipliers=multipliers)
    both = jax.jit(lambda g, p: [optimizer.update(g, optimizer.init(p), p) for optimizer in (plain, scaled)])
    (a, state_a), (b, state_b) = both(grads[0], params)
    jax.tree.map(lambda x, y, c: np.testing.assert_allclose(y, c * x, rtol=1e-5, atol=1e-8), a, b, multipliers)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


@both_optimizers
def test_the_loss_is_taken_and_the_planned_steps_too(make):
    """Every optimizer may be told the loss; ours do not use it, nor does small_fc_lopt the number of steps."""
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.full((3, 2), 0.5)}

    @jax.jit
    def updates(value, num_steps):
        optimizer = make(num_steps=num_steps) if make is OPTIMIZERS["learned"] else make()
        state = optimizer.init(params)
        return optimizer.update(grads, state, params, value=value), optimizer.update(grads, state, params)

    told, untold = updates(jnp.float32(2.5), jnp.int32(10))
    jax.tree.map(np.testing.assert_array_equal, (told, untold), updates(jnp.float32(1.5), jnp.int32(99)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), told, untold)
    assert np.any(told[0]["w"])


class Masked(NamedTuple):
    """Stands where a mask has left params out: no leaf, as optax.MaskedNode."""


@both_optimizers
def test_multipliers_may_be_one_number_a_prefix_or_more_than_the_params(make):
    params = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "list": [jnp.ones(()), jnp.ones(4)]}
    grads = jax.tree.map(lambda p: np.linspace(0.5, 1.0, p.size, dtype=np.float32).reshape(p.shape), params)

    def update(multipliers, params=params, grads=grads):
        optimizer = make(update_multipliers=multipliers)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    cases = ((jnp.float32(0.5), [0.5] * 4), ({"a": 0.25, "list": [2.0, 0.0]}, [0.25, 0.25, 2.0, 0.0]),
             ({"a": {"w": 3.0, "b": 0.5}, "list": 1 / 3}, [0.5, 3.0, 1 / 3, 1 / 3]))
    plain, scaled = jax.jit(lambda: (update(1.0), [update(multipliers) for multipliers, _ in cases]))()
    for (_, of_each), ours in zip(cases, scaled):
        jax.tree.map(lambda x, y, c: np.testing.assert_allclose(y, c * x, rtol=1e-5), plain, ours,
                     jax.tree.unflatten(jax.tree.structure(params), of_each))

    left_out = lambda tree: {"a": {"w": tree["a"]["w"], "b": Masked()}, "list": Masked()}
    masked = jax.jit(lambda: [update(multipliers, left_out(params), left_out(grads)) for multipliers in (
        {"a": {"w": 0.5, "b": 9.0}, "list": [9.0, 9.0]}, {"a": {"w": 0.5, "b": Masked()}, "list": Masked()},
        {"a": 0.5, "list": 9.0})])()
    assert len(masked) == 3
    for ours in masked:
        assert jax.tree.structure(ours) == jax.tree.structure(left_out(params))
        np.testing.assert_allclose(ours["a"]["w"], 0.5 * plain["a"]["w"], rtol=1e-5)

    for multipliers in ({"a": 1.0}, {"a": {"w": 1.0}, "list": 1.0}, {"a": 1.0, "list": Masked()}):
        with pytest.raises(ValueError, match="no number for the params at") as error:
            jax.eval_shape(lambda: update(multipliers))
        assert "\n" not in str(error.value)


@both_optimizers
def test_optax_takes_them(make):
    """optax.masked and optax.multi_transform, which leave params out, and optax.chain, which passes on what others of
    its members need, such as grad."""
    optax = pytest.importorskip("optax")
    params = {"a": {"b": jnp.ones(3)}, "c": jnp.ones((2, 2))}
    grads = jax.tree.map(lambda p: np.linspace(0.5, 1.0, p.size, dtype=np.float32).reshape(p.shape), params)
    ours = optax.GradientTransformationExtraArgs(*make(update_multipliers={"a": {"b": 0.5}, "c": 2.0}))
    masked = optax.masked(ours, {"a": {"b": True}, "c": False})
    multi = optax.multi_transform({"ours": ours, "theirs": optax.sgd(1.0)}, {"a": "theirs", "c": "ours"})

    @jax.jit
    def updates():
        return [optimizer.update(grads, optimizer.init(params), params, value=1.0, grad=grads)[0]
                for optimizer in (ours, masked, multi, optax.chain(ours, optax.scale(2.0)))]

    expected, masked, multi, chained = updates()
    close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    close(masked, {"a": expected["a"], "c": grads["c"]})
    close(multi, {"a": jax.tree.map(jnp.negative, grads["a"]), "c": expected["c"]})
    close(chained, jax.tree.map(lambda u: 2.0 * u, expected))


TYPES = [("bfloat16", "bfloat16", 0.05), ("float16", "float16", 0.01), ("float32", "bfloat16", 0.05),
         ("float64", "float64", 1e-5)]


@all_optimizers
@pytest.mark.parametrize("of_params, of_grads, tolerance", TYPES, ids=[" ".join(x[:2]) for x in TYPES])
def test_params_of_any_type(make, of_params, of_grads, tolerance):
    """Updates have the params' type and the state is float32 (float64 for float64); a scan keeps its carry's types."""
    with jax.enable_x64(of_params == "float64"):
        (params, state), updates = three_steps(make, of_params, of_grads)
    assert state.step.dtype == np.int32
    of_params_size = [x.dtype.name for x in jax.tree.leaves(state) if x.size >= params["w"].size]
    assert set(of_params_size) == {"float64" if of_params == "float64" else "float32"}
    assert {x.dtype.name for x in params.values()} == {of_params}
    assert {x.dtype.name for x in updates.values()} == {of_params}
    assert all(np.all(np.isfinite(np.asarray(x, np.float64))) and np.any(x) for x in updates.values())
    (expected, _), _ = three_steps(make, "float32", "float32")
    for name in params:
        np.testing.assert_allclose(np.asarray(params[name], np.float64), expected[name], rtol=0, atol=tolerance)


@functools.cache
def three_steps(make, of_params, of_grads):
    """((params, state), updates) of three steps in a scan, with params and gradients of those types."""
    optimizer, draw = make(), normal(2)
    params = {"w": draw((4, 3))}
    grads = {name: jnp.stack([draw(x.shape) for _ in range(3)]).astype(of_grads) for name, x in params.items()}
    params = {name: jnp.asarray(x, of_params) for name, x in params.items()}

    def step(carry, g):
        updates, state = optimizer.update(g, carry[1], carry[0])
        return (lopt.apply_updates(carry[0], updates), state), updates

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g))(params, grads)


@all_optimizers
def test_integers_among_the_params_stay_as_they_are(make):
    """Counters and masks are no weights, whatever stands for their gradients."""
    optimizer, params = make(), {"w": jnp.ones((4, 3)), "counter": jnp.array(3), "mask": jnp.array([True, False])}
    loss = lambda p: jnp.sum(p["w"] ** 2 * p["mask"][0]) + p["counter"]
    w = jax.grad(lambda w: loss(params | {"w": w}))(params["w"])
    alone, state_alone = optimizer.update({"w": w}, optimizer.init({"w": params["w"]}), {"w": params["w"]})
    for grads in (jax.grad(loss, allow_int=True)(params), {"w": w, "counter": None, "mask": None},
                  {"w": w, "counter": jnp.array(1), "mask": jnp.array([True, True])}):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        moved = lopt.apply_updates(params, updates)
        assert moved["counter"] == 3 and moved["mask"].tolist() == [True, False]
        assert jax.tree.map(jnp.result_type, moved) == jax.tree.map(jnp.result_type, params)
        np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-5)
        assert list(map(jnp.shape, jax.tree.leaves(state))) == list(map(jnp.shape, jax.tree.leaves(state_alone)))


@all_optimizers
def test_params_of_any_shape(make):
    """Empty tensors, too: they have nothing to move and spoil nothing."""
    shapes = [(0, 10), (10, 0), (0, 3, 3), (), (1,), (0,)]
    optimizer, params = make(), [jnp.ones(shape) for shape in shapes]

    @jax.jit
    def two_steps(params):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update([0.5 * p for p in params], state, params)
            params = lopt.apply_updates(params, updates)
        return params, state

    moved, state = two_steps(params)
    assert [x.shape for x in moved] == shapes and all(np.all(np.isfinite(x)) for x in moved)
    assert moved[3] != 1.0 and moved[4][0] != 1.0
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(params))


@all_optimizers
def test_params_that_are_left_out_are_asked_for(make):
    """optax passes them on as None."""
    optimizer, params = make(), {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="the params are missing"):
        optimizer.update(params, optimizer.init(params), None)


@all_optimizers
def test_complex_params_are_refused(make):
    with pytest.raises(ValueError, match="complex") as error:
        make().init({"w": jnp.ones((2, 3), jnp.complex64)})
    assert "\n" not in str(error.value) and "[2, 3]" in str(error.value)


def test_gradients_that_are_not_finite_count_as_zero():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    holes = {"w": jnp.ones((3, 4)).at[1, 2].set(jnp.nan).at[0, 0].set(jnp.inf),
             "b": jnp.asarray([1.0, -jnp.inf, 2.0])}
    optimizer = OPTIMIZERS["learned"]()
    update = jax.jit(optimizer.update)
    filled = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), holes)
    a, b = (update(g, optimizer.init(params), params) for g in (holes, filled))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("change, culprit", [
    (lambda theta: theta.pop("w1"), "w1"), (lambda theta: theta.update(extra=jnp.zeros(3)), "extra"),
    (lambda theta: theta.update(w0=jnp.zeros((38, 32))), "w0"),
    (lambda theta: theta.update(rms_decays=jnp.zeros(())), "rms_decays"),
    (lambda theta: theta.update(w1=jnp.zeros((32, 31))), "w1"), (lambda theta: theta.pop("b1"), "b1"),
    (lambda theta: theta.update(w3=jnp.zeros((2, 2)), b3=jnp.zeros(3)), "b3"),
    (lambda theta: [theta.pop(name) for name in ("w0", "b0", "w1", "b1", "w2", "b2")], "b0"),
    (lambda theta: [theta.pop(name) for name in ("w1", "b1", "w2", "b2")], "b1")])
def test_a_wrong_theta_is_refused(change, culprit):
    theta = some_theta()
    change(theta)
    with pytest.raises(ValueError, match=f"this is no θ of small_fc_lopt with 39 features: '{culprit}'") as error:
        lopt.learned_optimizer(lopt.Learned(theta, step_mult=0.1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hidden", [32, 48])
def test_init_theta(hidden):
    init = jax.jit(lopt.init_theta, static_argnums=1)
    theta = init(jax.random.key(0)) if hidden == 32 else init(jax.random.key(0), hidden)
    assert {name: x.shape for name, x in theta.items()} == {
        "momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,), "w0": (39, hidden), "b0": (hidden,),
        "w1": (hidden, hidden), "b1": (hidden,), "w2": (hidden, 2), "b2": (2,)}
    for name, x in theta.items():
        assert x.dtype == jnp.float32
        if name[0] == "w":
            assert float(jnp.std(x)) == pytest.approx(0.88 / np.sqrt(len(x)), rel=0.15)
            assert float(jnp.max(jnp.abs(x))) <= 2 / np.sqrt(len(x))
        else:
            assert not np.any(x), name


def test_fresh_decays_are_the_usual_ones():
    momentum, rms, adafactor = lopt.trained_decays(lopt.init_theta(jax.random.key(0)))
    np.testing.assert_allclose(momentum, [0.9, 0.99, 0.999], atol=1e-6)
    np.testing.assert_allclose(rms, 0.999, atol=1e-6)
    np.testing.assert_allclose(adafactor, [0.9, 0.99, 0.999], atol=1e-6)


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
# Learned optimizers on disk

METADATA = {"architecture": "small_fc_lopt", "step_mult": 0.01, "exp_mult": 0.001, "parametrization": "mup",
            "meta_steps": 1000, "widths": [32]}


def some_learned():
    """A learned optimizer whose file holds other numbers than the defaults."""
    return lopt.Learned(some_theta(), 0.01, 0.002, mup.Parametrization("mup", 2.0, 16.0, 0.5, 128),
                        made={"meta_steps": 1000, "widths": [32], "settings": {"seed": 3}})


def is_the_same(a, b):
    assert a[1:] == b[1:] and a.theta.keys() == b.theta.keys()
    jax.tree.map(np.testing.assert_array_equal, a.theta, b.theta)


def theta_arrays(hidden=32):
    """What a θ file holds, to be spoilt."""
    return {**{name: np.asarray(x) for name, x in some_theta(hidden=hidden).items()},
            "metadata": np.frombuffer(json.dumps(METADATA).encode(), np.uint8)}


def test_theta_returns_from_disk(tmp_path):
    for learned in (some_learned(), lopt.Learned(some_theta(), 0.01), some_learned()._replace(parametrization=mup.SP)):
        lopt.save(tmp_path / "theta.npz", learned)
        loaded = lopt.load(str(tmp_path / "theta.npz"))
        is_the_same(loaded, learned)
        assert [path.name for path in tmp_path.iterdir()] == ["theta.npz"]
        lopt.learned_optimizer(loaded)


def test_files_from_before_there_were_multipliers_load(tmp_path):
    """And those without an architecture, which are of small_fc_lopt; integers are numbers, too."""
    metadata = {"parametrization": "mup", "output_mult": 16.0, "step_mult": 1, "exp_mult": 0.001, "meta_steps": 7}
    arrays = theta_arrays() | {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)}
    np.savez_compressed(tmp_path / "theta.npz", **arrays)
    learned = lopt.load(tmp_path / "theta.npz")
    assert learned[1:] == (1, 0.001, mup.Parametrization("mup", 1.0, 16.0, 1.0, 0), "small_fc_lopt", {"meta_steps": 7},
                           0.0, 0)


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "theta.npz"
    path.write_bytes(b"older")
    lopt.save(path, some_learned())
    is_the_same(lopt.load(path), some_learned())
    with pytest.raises(ValueError, match="nowhere"):
        lopt.save(tmp_path / "nowhere" / "theta.npz", some_learned())


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
    "another architecture": (with_metadata(architecture="celo"), "celo"),
    "the arrays of another architecture": (with_metadata(architecture="velo"), "no θ of VeLO"),
    "a negative decay": (with_metadata(decay=-1e-4), "(decay is -0.0001, and must be a finite number, not negative"),
    "a horizon that is a word": (with_metadata(horizon="long"), "(horizon is 'long', and must be"),
    "a step_mult that is a word": (with_metadata(step_mult="big"), "metadata"),
    "a step_mult that is a number in words": (with_metadata(step_mult="0.003"), "(step_mult is '0.003', and must be"),
    "a step_mult that is true": (with_metadata(step_mult=True), "(step_mult is True, and must be"),
    "an exp_mult that is a list": (with_metadata(exp_mult=[0.001]), "(exp_mult is [0.001]"),
    "an output_mult that is a word": (with_metadata(output_mult="1.0"), "(output_mult is '1.0'"),
    "a step_mult that is not finite": (with_metadata(step_mult=float("nan")), "is nan, and must be a finite"),
    "a negative base width": (with_metadata(base_width=-1), "(base_width is -1, and must be"),
    "a base width that is infinite": (with_metadata(base_width=float("inf")), "(base_width is inf"),
    "a base width and a half": (with_metadata(base_width=0.5), "(base_width is 0.5, and must be a whole number"),
    "a step_mult that is no float": (with_metadata(step_mult=10**400), "metadata"),
}


def refuse(path, culprit):
    """lopt.load says in one line that names the file what is wrong with it."""
    with pytest.raises(ValueError) as error:
        lopt.load(path)
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
    path, learned = tmp_path / "theta.npz", some_learned()
    lopt.save(path, learned)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for length in rng.integers(0, len(content), 40):
        path.write_bytes(content[:length])
        refuse(path, "")
    for place in rng.integers(0, len(content), 300):
        path.write_bytes(content[:place] + bytes([content[place] ^ rng.integers(1, 256)]) + content[place + 1:])
        refused_or_the_same(path, learned)


def refused_or_the_same(path, learned):
    """Whether a file is refused, in one line that names it; if it is read, it holds that learned optimizer."""
    try:
        loaded = lopt.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    is_the_same(loaded, learned)
    return False


@pytest.mark.parametrize("name", ["w0", "metadata"])
@pytest.mark.filterwarnings("ignore")  # NumPy's, of headers that it finds odd
def test_every_flipped_bit_of_a_header_is_noticed(tmp_path, name):
    """The header of an array in the file, whose checksum is right."""
    arrays, members = theta_arrays(hidden=3), {}
    for key, x in arrays.items():
        np.save(file := io.BytesIO(), x)
        members[key] = file.getvalue()
    path = tmp_path / "theta.npz"

    def write(changed):
        with zipfile.ZipFile(path, "w") as archive:
            for key, content in (members | {name: changed}).items():
                archive.writestr(f"{key}.npy", content)

    content = members[name]
    write(content)
    learned, header = lopt.load(path), len(content) - arrays[name].nbytes
    assert header % 64 == 0
    refused = 0
    for bit in range(8 * header):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        write(bytes(flipped))
        refused += refused_or_the_same(path, learned)
    assert refused > 8 * 50, "the magic number, the version, the length and the dictionary"


def test_missing_files_and_folders_are_refused(tmp_path):
    refuse(tmp_path / "none.npz", "cannot be read")
    refuse(tmp_path, "")


# ---------------------------------------------------------------------------------------------------------
# Params on a mesh of devices


SPECS = {"bias": P("y"), "conv": P(None, "y", "x"), "scale": P(), "w": P("x", "y")}
SHARDED = {"bias": (12,), "conv": (3, 4, 6), "scale": (), "w": (8, 12)}
ON_A_MESH = {"small_fc_lopt": lambda: OPTIMIZERS["learned"](), "velo": velo_with_a_loss, "adamw": lambda: lopt.adamw(1e-2)}


@functools.cache
def one_device(name):
    """(params, grads, (updates, state)) of one update on one device."""
    optimizer = ON_A_MESH[name]()
    params = {key: jax.random.normal(jax.random.key(i), shape) for i, (key, shape) in enumerate(SHARDED.items())}
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
    return params, grads, jax.jit(optimizer.update)(grads, optimizer.init(params), params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name, compiled", [("small_fc_lopt", True), ("velo", True), ("adamw", True), ("adamw", False)])
def test_state_and_updates_are_sharded_like_the_params(name, compiled, axis_type):
    """On 4 devices: the numbers of one device; averages over an axis are sharded as the axes that remain."""
    optimizer, (params, grads, expected) = ON_A_MESH[name](), one_device(name)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    layout = {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    params, grads = jax.device_put(params, layout), jax.device_put(grads, layout)

    def check(state):
        of_w = [state.m["w"], state.v["w"]] if name == "adamw" else state.averages[3]
        specs = [P("x", "y")] * 2 if name == "adamw" else [P(None, "x", "y"), P("x", "y"), P(None, "x", None),
                                                          P(None, None, "y")]
        for x, spec in zip(of_w, specs, strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.shape, x.sharding)

    state = optimizer.init(params)
    check(state)
    check(jax.jit(optimizer.init)(params))
    updates, after = (jax.jit(optimizer.update) if compiled else optimizer.update)(grads, state, params)
    check(after)
    for key in SHARDED:
        assert updates[key].sharding.is_equivalent_to(layout[key], params[key].ndim), key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
                 jax.device_get((updates, after)), jax.device_get(expected))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_params_on_a_mesh_may_be_closed_over(axis_type):
    """A compiled function that takes the gradients and the state alone."""
    optimizer, w = lopt.adamw(1e-2), jnp.arange(48.0).reshape(8, 6)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    sharded = jax.device_put(w, NamedSharding(mesh, P("x")))
    update = jax.jit(lambda g, state: optimizer.update(g, state, sharded)[0])(sharded, optimizer.init(sharded))
    np.testing.assert_allclose(update, optimizer.update(w, optimizer.init(w), w)[0], rtol=1e-5)
    assert update.sharding.is_equivalent_to(sharded.sharding, 2)


def scan_of_updates(optimizer, w):
    """A weight matrix after three updates in a scan, its gradient the matrix itself."""
    def step(carry, _):
        updates, state = optimizer.update(carry[0], carry[1], carry[0])
        return (lopt.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (w, optimizer.init(w)), None, 3)[0][0]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_scan_of_updates_on_a_mesh(axis_type):
    """The carry keeps its types, explicit axes included."""
    optimizer = lopt.learned_optimizer(lopt.Learned(lopt.init_theta(jax.random.key(3)), 0.01))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    w, run = jax.random.normal(jax.random.key(0), (8, 6)), jax.jit(functools.partial(scan_of_updates, optimizer))

    sharded = run(jax.device_put(w, NamedSharding(mesh, P("x"))))
    np.testing.assert_allclose(sharded, run(w), rtol=1e-5, atol=1e-6)
    assert sharded.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)


@both_optimizers
def test_a_scan_of_updates_within_shard_map(make, monkeypatch):
    """Each device updates a network of its own, in chunks, and the carry varies over the devices as the params do."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", 8)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    w = jax.random.normal(jax.random.key(0), (2, 6, 4))
    run = functools.partial(scan_of_updates, make())
    of_one = jax.shard_map(lambda w: run(w[0])[None], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    np.testing.assert_allclose(jax.jit(of_one)(w), jax.jit(jax.vmap(run))(w), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Ours: decay, a time that is told the planned number of steps, and a cooldown


def test_decay_takes_the_same_share_of_the_params_at_any_width_and_learning_rate():
    """p ← p − update − decay · p, beside the update that is without it, in all three optimizers."""
    params, multipliers = {"w": jnp.full((4, 6), 2.0)}, {"w": 1 / 64}
    small = lopt.Learned(lopt.init_theta(jax.random.key(3)), 0.01)
    large = lopt.Learned(lopt.init_velo_theta(jax.random.key(3), 8, 4), 0.1, architecture="velo")

    def moved(optimizer):
        return jax.jit(lambda: optimizer.update(params, optimizer.init(params), params, value=1.0)[0])()

    for plain, decaying in [(lopt.adamw(1e-3, update_multipliers=multipliers),
                             lopt.adamw(1e-3, decay=0.25, update_multipliers=multipliers)),
                            *((lopt.learned_optimizer(x, multipliers, num_steps=9),
                               lopt.learned_optimizer(x._replace(decay=0.25), multipliers, num_steps=9))
                              for x in (small, large))]:
        jax.tree.map(lambda a, b, p: np.testing.assert_allclose(b, a - 0.25 * p, rtol=1e-6),
                     moved(plain), moved(decaying), params)


def test_with_a_horizon_a_longer_run_goes_at_a_slower_pace():
    """Update 40 of planned 400 is half of update 10 of 100, its decay included; θ without a horizon knows of no plan."""
    learned = lopt.Learned(lopt.init_theta(jax.random.key(3)), 0.01, horizon=100)
    params = jax.random.normal(jax.random.key(1), (4, 6))

    def update_at(t, learned, num_steps):
        optimizer = lopt.learned_optimizer(learned, num_steps=num_steps)
        return optimizer.update(params, optimizer.init(params)._replace(step=jnp.int32(t)), params)[0]

    expected = update_at(10, learned._replace(horizon=0), 100)
    np.testing.assert_array_equal(expected, update_at(10, learned._replace(horizon=0), None))
    np.testing.assert_allclose(update_at(40, learned, 400), expected / 2, rtol=1e-5)
    traced = jax.jit(lambda num_steps: update_at(40, learned, num_steps))(400)
    np.testing.assert_allclose(traced, expected / 2, rtol=1e-5)
    decaying = update_at(40, learned._replace(decay=0.2), 400)
    np.testing.assert_allclose(decaying, expected / 2 - 0.1 * params, rtol=1e-5)
    np.testing.assert_array_equal(update_at(40, learned, None), update_at(40, learned._replace(horizon=0), None))
    assert not np.allclose(update_at(40, learned, None), expected, rtol=1e-3)
    with pytest.raises(ValueError, match="num_steps is 0, but at least one"):
        lopt.learned_optimizer(learned, num_steps=0)


def test_a_planned_length_may_be_numpy_s_where_float64_is_on(monkeypatch):
    monkeypatch.setitem(lopt.CHUNK, jax.default_backend(), 20)  # several chunks
    learned = lopt.Learned(lopt.init_theta(jax.random.key(3)), 0.01, horizon=100)
    params = jax.random.normal(jax.random.key(1), (8, 6))
    expected, found = [], []
    for is_on, num_steps, updates in (False, 400, expected), (True, np.int64(400), found):
        with jax.enable_x64(is_on):
            optimizer = lopt.learned_optimizer(learned, num_steps=num_steps)
            updates.append(jax.jit(optimizer.update)(params, optimizer.init(params), params)[0])
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(*found, *expected, rtol=1e-5)


def test_with_a_cooldown_updates_fall_to_zero_in_a_line():
    """Over the last 0.4 of 10 steps: the update after 6 is whole, after 8 a half, after 10 none; the state is the same."""
    params = {"w": jnp.linspace(-1.0, 1.0, 24).reshape(4, 6), "b": jnp.ones(3, jnp.bfloat16)}
    for plain in (lopt.learned_optimizer(lopt.Learned(lopt.init_theta(jax.random.key(3)), 0.01, decay=0.2)),
                  lopt.adamw(0.1, weight_decay=0.3)):
        cooled = lopt.with_cooldown(plain, 10, 0.4)
        assert lopt.with_cooldown(plain, 10, 0.0) is plain
        for t, factor in (0, 1.0), (6, 1.0), (8, 0.5), (9, 0.25), (10, 0.0), (11, 0.0):
            state = plain.init(params)._replace(step=jnp.int32(t))
            updates, after = plain.update(params, state, params)
            fewer, same = cooled.update(params, state, params)
            jax.tree.map(np.testing.assert_array_equal, same, after)
            np.testing.assert_allclose(fewer["w"], factor * updates["w"], rtol=1e-5)
            assert fewer["b"].dtype == jnp.bfloat16 and np.any(updates["w"])
            traced = jax.jit(lambda n: lopt.with_cooldown(plain, n, 0.4).update(params, state, params)[0])(10)
            np.testing.assert_allclose(traced["w"], fewer["w"], rtol=1e-5)
    state = plain.init(params)._replace(step=jnp.int32(999_999))  # the last of a long run: the factor has all its digits
    whole, last = (x.update(params, state, params)[0]["w"] for x in (plain, lopt.with_cooldown(plain, 1_000_000, 0.4)))
    np.testing.assert_allclose(last, whole / 400_000, rtol=1e-5)
    of_others = lopt.with_cooldown(lopt.Optimizer(lambda params: (), lambda grads, state, params, value: (grads, state)),
                                   10, 0.4)
    with pytest.raises(ValueError, match="inside of optax's combinators"):
        of_others.update(params, of_others.init(params), params)
    for num_steps, cooldown in (10, 1.5), (10, -0.1), (10, float("nan")), (0, 0.3):
        with pytest.raises(ValueError, match="cooldown is|num_steps is 0"):
            lopt.with_cooldown(plain, num_steps, cooldown)
