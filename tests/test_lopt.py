"""The optimizers against reference implementations and their equations, and what they promise."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR, side_by_side, tree
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lopt

# Most programs take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Boxed = collections.namedtuple("Boxed", "value")  # of an array, as Flax NNX has it


def close(tree, expected, rtol=1e-5, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), tree, expected)


def normal(seed):
    """A function of shape and scale that draws float32 arrays; JAX would compile each draw."""
    rng = np.random.default_rng(seed)
    return lambda shape, scale=1.0: np.asarray(scale * rng.standard_normal(shape), np.float32)


def some_theta(*hidden):
    """A θ in which every array matters, decay offsets included."""
    shapes = jax.eval_shape(lambda: lopt.init_theta(jax.random.key(0), hidden or (32, 32)))
    scale = lambda name, n: n**-0.5 if name[0] == "w" else 0.3 if name[0] == "b" else 0.03
    draw = normal(0)
    return {name: draw(x.shape, scale(name, len(x))) for name, x in shapes.items()}


def learned(**options):
    return lopt.learned_optimizer(lopt.Learned(some_theta(), step_mult=0.1), **options)


def velo(num_steps=100, **options):
    """VeLO, small, told a falling loss: of a constant one its features are rounding errors."""
    draw, shapes = normal(4), lopt.velo_shapes(8, 4)
    theta = {name: draw(x, 0.03 if name[0] == "f" else 0.3) for name, x in shapes.items()}
    optimizer = lopt.learned_optimizer(lopt.Learned(theta, 0.1, architecture="velo"),
                                       num_steps=num_steps, **options)
    return optimizer._replace(update=lambda grads, state, params, **_: optimizer.update(
        grads, state, params, value=2.0 - 0.1 * state.step))


def adamw(**options):
    return lopt.adamw(0.1, weight_decay=0.01, **options)


def all_optimizers(check):
    """A test of all optimizers, side by side, of a test of one."""
    def test():
        side_by_side(check, (velo, learned, adamw))
    return test


def some_params():
    """A nested tree of tensors, and gradients for it by step, stacked."""
    draw = normal(1)
    return {"a": {"w": draw((9, 5))}, "list": [(draw((5,)),)]}, {
        "a": {"w": draw((3, 9, 5))}, "list": [(draw((3, 5), 0.1),)]}


def scan(update, grads, state, params):
    """Update with each of the stacked gradients. Returns the params and the state."""
    def step(carry, g):
        updates, state = update(g, carry[1], carry[0])
        return (lopt.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, state), grads)[0]


# -------- Against the reference implementations, and against their equations in float64


def check_against(data, update, state, atol):
    """The params after each step of a golden file."""
    params = tree(data, "params0")
    total = len({name.split("/")[0] for name in data.files if name.startswith("grads")})
    assert total > 0
    for t in range(total):
        updates, state = update(tree(data, f"grads{t}"), state, params)
        params, expected = jax.tree.map(np.add, params, updates), tree(data, f"params{t + 1}")
        assert params.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(params[name], x, 0, atol, err_msg=f"{name}, step {t}")


@pytest.mark.parametrize("chunk", [lopt.CHUNK["cpu"], 7])
def test_learned_optimizer_meets_the_reference(chunk, monkeypatch):
    """5e-6: the reference's float32 rounds by up to 3.2e-6. In float64 it is met to 5e-7."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", chunk)
    make = lambda theta, c, *scales: lopt.learned_optimizer(lopt.Learned(theta, *scales), c)
    init = quick_jit(lambda meta, params: make(*meta).init(params))
    update = quick_jit(lambda meta, *args: make(*meta).update(*args))
    for name in "small_fc_lopt_sp", "small_fc_lopt_mup":
        data = np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False)
        meta = tree(data, "theta"), tree(data, "update_scale"), data["step_mult"], data["exp_mult"]
        state = init(meta, tree(data, "params0"))
        check_against(data, functools.partial(update, meta), state, 5e-6)


def test_meta_adamw_meets_the_reference():
    """Schedule, decoupled decay and clipping of the update; 1e-5 of float32 weights of order 1."""
    data = np.load(GOLDEN_DIR / "meta_adamw.npz", allow_pickle=False)
    schedule = lopt.warmup_cosine(*(float(data[name]) for name in (
        "init", "peak", "end", "warmup_steps", "decay_steps")))
    optimizer = lopt.adamw(schedule, weight_decay=float(data["weight_decay"]))

    @jax.jit
    def update(*args):
        updates, state = optimizer.update(*args)
        return lopt.clip_by_global_norm(updates, float(data["clip"])), state

    check_against(data, update, optimizer.init(tree(data, "params0")), 1e-5)
    rates = [data[f"lr{t}"] for t in range(sum(name.startswith("lr") for name in data.files))]
    np.testing.assert_allclose(schedule(np.arange(len(rates))), rates, rtol=1e-5, atol=1e-9)


def test_adamw_meets_its_equations():
    """With a learning rate that is a function of the updates made before, and multipliers."""
    params, grads = some_params()
    optimizer = lopt.adamw(lambda step: 0.01 / (1.0 + step), b1=0.8, b2=0.95, eps=1e-3,
                           weight_decay=0.1, update_multipliers={"a": 1.0, "list": 0.5})
    run = quick_jit(functools.partial(scan, optimizer.update))
    found, _ = run(grads, optimizer.init(params), params)
    for p, gs, c, x in zip(*map(jax.tree.leaves, (params, grads, [1.0, 0.5], found))):
        m = v = 0.0
        for t, g in enumerate(np.float64(gs)):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            adam = m / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-3)
            p = p - 0.01 / (1 + t) * c * (adam + 0.1 * p)
        np.testing.assert_allclose(x, p, rtol=0, atol=2e-6)


def by_definition(theta, shape, p, grads, step_mult, exp_mult):
    """The values of a tensor after each gradient, in float64: a transcript of the features."""
    theta = {name: np.float64(x) for name, x in theta.items()}
    rsqrt = lambda x: 1 / np.sqrt(x)
    rsqrt_plus = lambda x: rsqrt(np.maximum(x, 1e-9))
    decays = lambda betas, name: 1 - np.exp(10 * (np.log(1 - np.array(betas)) / 10 + theta[name]))
    momentum = decays((0.9, 0.99, 0.999), "momentum_decays")
    rms = np.clip(decays((0.999,), "rms_decays"), 0, 1)[0]
    adafactor = np.clip(decays((0.9, 0.99, 0.999), "adafactor_decays"), 0, 1)
    d1, d0 = np.argsort(shape, kind="stable")[-2:] if len(shape) > 1 else (None, None)
    mean = lambda x, axis: x if axis is None else np.mean(x, axis, keepdims=True)
    m, v, r, c, after = [0.0] * 3, 0.0, [0.0] * 3, [0.0] * 3, [np.float64(p)]
    for t, g in enumerate(np.float64(grads)):
        m = [b * old + (1 - b) * g for b, old in zip(momentum, m)]
        v = rms * v + (1 - rms) * g**2
        r = [b * old + (1 - b) * mean(g**2 + 1e-30, d0) for b, old in zip(adafactor, r)]
        c = [b * old + (1 - b) * mean(g**2 + 1e-30, d1) for b, old in zip(adafactor, c)]
        g_scale = [rsqrt_plus(x / (mean(x, d1) + 1e-9)) * rsqrt_plus(y) for x, y in zip(r, c)]
        m_scale = g_scale
        if len(shape) < 2:
            g_scale, m_scale = [rsqrt_plus(x + 1e-9) for x in r], [rsqrt(x + 1e-6) for x in r]
        features = [g, after[-1], *m, v, *[x * rsqrt(v + 1e-6) for x in m], rsqrt(v + 1e-6),
                    *[g * x for x in g_scale], *r, *c, *[rsqrt(x + 1e-8) for x in [*r, *c]],
                    *[x * y for x, y in zip(m, m_scale)]]
        features = [x * rsqrt(1e-5 + np.mean(x**2)) for x in features]
        features += [np.tanh(t / τ - 1) for τ in (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)]
        x = np.stack([np.broadcast_to(x, shape) for x in features], axis=-1)
        hidden = np.maximum(x @ theta["w0"] + theta["b0"], 0)
        out = np.maximum(hidden @ theta["w1"] + theta["b1"], 0) @ theta["w2"] + theta["b2"]
        after.append(after[-1] - step_mult * out[..., 0] * np.exp(exp_mult * out[..., 1]))
    return after[1:]


def test_updates_follow_the_definition(monkeypatch):
    """All 39 features, in chunks that do not divide; gradients from 1 to 1e-4."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", 20)
    theta, draw = some_theta(), normal(5)
    shapes = [(9, 5), (4, 11), (1, 1), (8, 4, 3, 3), (4, 4, 4), (7,), ()]
    params = [draw(shape) for shape in shapes]
    grads = [[draw(shape, 10.0**-i) for i in range(5)] for shape in shapes]
    expected = [by_definition(theta, *tensor, 0.05, 0.1) for tensor in zip(shapes, params, grads)]
    optimizer = lopt.learned_optimizer(lopt.Learned(theta, step_mult=0.05, exp_mult=0.1))
    state, update = quick_jit(optimizer.init)(params), quick_jit(optimizer.update)
    for g, after in zip(zip(*grads), zip(*expected)):
        updates, state = update([*g], state, params)
        params = jax.tree.map(np.add, params, updates)
        close(params, [*after], rtol=0, atol=5e-6)


def test_fresh_theta():
    theta = jax.device_get(quick_jit(lambda: lopt.init_theta(jax.random.key(0), (32, 48)))())
    for i, shape in enumerate([(39, 32), (32, 48), (48, 2)]):
        w, b, σ = theta[f"w{i}"], theta[f"b{i}"], shape[0]**-0.5
        assert w.shape == shape and b.shape == shape[1:] and not np.any(b)
        assert w.std() == pytest.approx(0.88 * σ, rel=0.15) and abs(w).max() <= 2 * σ
    close(lopt.trained_decays(theta), ([0.9, 0.99, 0.999], 0.999, [0.9, 0.99, 0.999]))
    _, *clipped = lopt.trained_decays({name: x + 1.0 for name, x in theta.items()})
    close(clipped, [0.0, np.zeros(3)])


# -------- The fast paths against `plain_update`


def check_fast_paths(table, theta, *shapes):
    """The chunks and the kernel give the plain update. VeLO's are of two networks, as in PES."""
    given, draw, is_velo = lopt.Learned(theta, 0.1, 0.1), normal(3), table is lopt.velo_features
    kernel = functools.partial(lopt.in_one_kernel, interpret=True)

    def updates(p, *grads):
        mlp = given if is_velo else lopt.at_time(given, 5)
        averages, decays = lopt.init_averages(p), lopt.trained_decays(some_theta())
        for g in grads:
            averages = lopt.update_averages(averages, g, decays)
        s = lopt.statistics(averages, grads[-1], p)
        return [path(table, mlp, s) for path in (lopt.plain_update, lopt.in_chunks, kernel)]

    updates = jax.vmap(updates) if is_velo else updates
    tensors = [(draw(shape), draw(shape), draw(shape, 0.1)) for shape in shapes]
    for plain, *fast in quick_jit(lambda: [updates(*x) for x in tensors])():
        assert np.all(plain != 0.0)
        for update in fast:
            np.testing.assert_allclose(update, plain, rtol=0, atol=1e-6, err_msg=str(plain.shape))


def test_the_fast_paths_give_the_plain_update(monkeypatch):
    """On 0 to 4 axes, in chunks that do not divide, with any MLP, and with VeLO's features."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", 20)
    draw, of_velo = normal(2), {"w0": (30, 4), "w1": (4, 4), "w2": (4, 3),
                                "b0": (4,), "b1": (4,), "b2": (3,)}
    cases = [(lopt.features, some_theta(), (3, 3, 4, 8)), (lopt.features, some_theta(5), (), (9,)),
             (lopt.features, some_theta(12, 20, 7), (13, 41)),
             (lopt.velo_features, {n: draw(shape, 0.2) for n, shape in of_velo.items()}, (2, 5, 7))]
    side_by_side(lambda case: check_fast_paths(*case), cases)


def test_features_and_equations_may_be_changed(monkeypatch):
    """Features per weight, row and column are added, with decays mixed or dropped."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", 20)
    monkeypatch.setattr(lopt, "rms_scale", lambda mean_square: jax.lax.rsqrt(1.0 + mean_square))
    monkeypatch.setattr(lopt, "activation", jnp.tanh)
    table = lopt.features
    monkeypatch.setattr(lopt, "features", lambda s: {
        "tanh g": [jnp.tanh(s.g)], "log r": [jnp.log(x + 1e-8) for x in s.r], **table(s),
        "tanh c": [jnp.tanh(s.c[0])], "p m": [s.p * s.m[0], s.p * s.m[2]],
        "mixed": [s.m[0] - s.m[1], s.r[2] - s.r[0], sum(s.m)]})
    check_fast_paths(lopt.features, some_theta(16, 16), (2, 5, 3))
    jax.eval_shape(lambda p: learned().update(p, learned().init(p), p), jnp.ones((2, 3)))


def test_a_gpu_gets_updates_that_compile(monkeypatch):
    """They are lowered for CUDA here: in one kernel, but for one weight, which Triton refuses."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    optimizer, call = learned(), "__gpu$xla.gpu.triton"
    p = [jnp.zeros(shape) for shape in ((), (1, 1), (7,), (13, 41), (2, 3, 4, 5))]
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(p), p)[0])
    export = jax.export.export(update, platforms=["cuda"], disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call(call)])
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h100)):
        assert export(p).mlir_module().count(f"@{call}") == 3


# -------- optax's pair


@all_optimizers
def test_jit_scan_and_vmap(make):
    """A scan of updates, of two networks and planned lengths at once, is that of single steps."""
    def run(params, grads, num_steps):
        optimizer = make(num_steps=num_steps) if make is velo else make()
        return scan(optimizer.update, grads, optimizer.init(params), params)[0]

    optimizer, (params, grads) = make(), some_params()
    twice = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), (params, grads))
    scanned = jax.device_get(quick_jit(jax.vmap(run))(*twice, np.float32([100, 3000])))
    stepped, init, update = params, *map(quick_jit, optimizer)
    state = init(params)
    for t in range(3):
        updates, state = update(jax.tree.map(lambda g: g[t], grads), state, stepped)
        stepped = jax.tree.map(np.add, stepped, updates)
    close(jax.tree.map(lambda x: x[0], scanned), stepped, rtol=0, atol=2e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.all(a != b), stepped, params))


@pytest.mark.parametrize("make", [velo, learned, adamw])
def test_eager_updates_compile_once(make, caplog, monkeypatch):
    monkeypatch.setitem(lopt.CHUNK, "cpu", 2)
    (init, update), w = make(), jnp.ones((3, 2))
    with jax.log_compiles():
        _, state = update(w, init(w), w)
        assert "Compiling" in caplog.text
        caplog.clear()
        for _ in range(99):
            _, state = update(w, state, w)
    assert "Compiling" not in caplog.text and state.step == 100


@all_optimizers
def test_shapes_are_enough_to_trace(make):
    """Of the state, of more weights than int32 counts, and without promotion of ranks."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((50_000, 50_000), (3,))]
    state = make().init(shapes)
    assert state == jax.eval_shape(lambda *params: make().init([*params]), *shapes)
    with jax.numpy_rank_promotion("allow" if make is velo else "raise"):
        assert jax.eval_shape(make().update, shapes, state, shapes) == (shapes, state)


@pytest.mark.parametrize("multipliers, expected", [
    (0.5, [0.5] * 3), ({"a": 0.25, "list": [2.0]}, [0.25, 0.25, 2.0]),
    ({"a": {"w": 3.0, "b": 0.5, "other": 9.0}, "list": 0.0}, [0.5, 3.0, 0.0]),
    ({"a": {"w": Boxed(3.0), "b": Boxed(0.5)}, "list": [Boxed(2.0)]}, [0.5, 3.0, 2.0])])
def test_multipliers_may_be_a_number_a_prefix_more_or_boxed(multipliers, expected):
    """The params may be boxed, too, or left out by a mask."""
    params = {"a": {"w": np.ones((2, 3)), "b": np.ones(3)}, "list": [np.ones(())]}
    optimizer = lopt.adamw(1.0, update_multipliers=multipliers)
    trees = params, jax.tree.map(Boxed, params), params | {"list": ()}
    updates = quick_jit(lambda: [optimizer.update(x, optimizer.init(x), x)[0] for x in trees])()
    for some, found in zip(trees, updates):
        leaves = zip(jax.tree.leaves(some), expected)
        close(jax.tree.leaves(found), [np.full_like(p, -c) for p, c in leaves])


@pytest.mark.parametrize("make", [velo, learned])
def test_the_state_is_four_trees_like_the_params(make):
    """Flax NNX boxes each leaf of a tree, and unpacks a tuple in a box."""
    params, (init, update) = {"a": Boxed(np.ones((3, 2))), "b": [Boxed(np.ones((2, 2)))]}, make()
    state = quick_jit(lambda: update(params, init(params), params)[1])()
    for average in state.averages:
        assert jax.tree.structure(average) == jax.tree.structure(params)
    assert state.averages.m["a"].value.shape == (3, 3, 2)


def test_optax_takes_them():
    """`masked` and `multi_transform` leave params out. Arguments of others are passed on."""
    optax = pytest.importorskip("optax")
    params = {"a": {"b": np.ones(3)}, "c": np.linspace(0.5, 1.0, 4).reshape(2, 2)}
    ours = optax.GradientTransformationExtraArgs(
        *learned(update_multipliers={"a": {"b": 0.5}, "c": 2.0}))
    masked = optax.masked(ours, {"a": {"b": True}, "c": False})
    multi = optax.multi_transform({"ours": ours, "theirs": optax.sgd(1.0)},
                                  {"a": "theirs", "c": "ours"})
    expected, masked, multi = quick_jit(lambda: [
        optimizer.update(params, optimizer.init(params), params, value=1.0, grad=params)[0]
        for optimizer in (ours, masked, multi)])()
    close(masked, {"a": expected["a"], "c": params["c"]})
    close(multi, {"a": {"b": -params["a"]["b"]}, "c": expected["c"]})


@all_optimizers
def test_optax_maps_over_the_params_in_a_state(make):
    optax = pytest.importorskip("optax")
    optimizer, params = make(), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = jax.tree.map(np.ones_like, optimizer.init(params))
    mapped = optax.tree_map_params(optimizer, np.zeros_like, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state) and mapped.step == 1
    assert not any(np.any(x) for x in jax.tree.leaves(mapped) if x.shape[-2:] == (2, 3))


def test_what_does_not_fit_is_refused():
    theta, p = some_theta(), np.ones((2, 3), np.float32)
    for change, name in ({"extra": p}, "extra"), ({"w1": p}, "w1"), ({"w0": theta["w0"][1:]}, "w0"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            lopt.learned_optimizer(lopt.Learned(theta | change, step_mult=0.1))
    optimizer = learned(update_multipliers={"a": 1.0})
    for params, of_state, message in (
            ({"b": p}, {"a": p}, "(?i)key"), ({"b": p}, {"b": p}, "no number for b"),
            ({"a": p.astype(complex)}, {"a": p}, "complex")):
        with pytest.raises(ValueError, match=message):
            optimizer.update(params, optimizer.init(of_state), params)


# -------- Any params and gradients, on any mesh


@all_optimizers
def test_params_of_any_type_and_shape(make):
    """In one tree, in a scan. Integer and empty tensors stay as they are and spoil nothing."""
    others = {"int": np.array(3), "mask": np.array([True, False]), "empty": np.ones((0, 3))}
    of_others = {"int": np.ones(3, int), "mask": None, "empty": np.ones((3, 0, 3))}
    tolerances = {"float64": 0, "float32": 0.02, "float16": 0.01, "bfloat16": 0.05}
    params, grads = ({name: normal(2)(shape).astype(name) for name in tolerances}
                     for shape in ((4, 3), (3, 4, 3)))
    params, grads = params | others, grads | of_others | {"float32": grads["bfloat16"]}
    with jax.enable_x64(True):
        optimizer = make() if make is adamw else make(num_steps=np.int64(100))
        run = quick_jit(functools.partial(scan, optimizer.update))
        after, state = jax.device_get(run(grads, quick_jit(optimizer.init)(params), params))
    for name, x in params.items():
        assert after[name].dtype == x.dtype
        assert np.all(after[name] == x) if name in others else np.all(after[name] != x)
    for name, tolerance in tolerances.items():
        np.testing.assert_allclose(np.float64(after[name]), after["float64"], 0, tolerance)
    types = [x.dtype for x in jax.tree.leaves(state) if x.shape[-2:] == (4, 3)]
    assert 3 * types.count("float64") == types.count("float32") > 0


@pytest.mark.parametrize("make", [velo, learned])
def test_multipliers_of_updates_and_of_gradients(make):
    """Powers of 2 do not round. Update multipliers change no state."""
    p, g, holes = normal(1)((3, 4)), normal(2)((3, 4)), np.zeros((3, 4))

    @quick_jit
    def update(g, of_gradients, of_updates):
        optimizer = make(gradient_multiplier=of_gradients, update_multipliers=of_updates)
        return optimizer.update(g, optimizer.init(p), p)

    plain, state = update(g, 1.0, 1.0)
    close(update(g, 1.0, 0.25), (0.25 * plain, state), rtol=0)
    close(update(g, 8.0, 1.0), update(8.0 * g, 1.0, 1.0), rtol=0)
    assert np.any(update(g, 8.0, 1.0)[0] != plain)
    if make is learned:  # an entry whose square is not finite counts as 0
        holes[:2, :2] = (np.nan, np.inf), (-np.inf, 1e20)
        close(update(g + holes, 1.0, 1.0), update(np.where(holes != 0, 0, g), 1.0, 1.0), rtol=0)


SPECS = {(12,): P("y"), (3, 12): P(None, "y"), (3, 8, 12): P(None, "x", "y"),
         (3, 3, 8, 12): P(None, None, "x", "y"),  # averages over an axis keep the other's sharding
         (3, 3, 8, 1): P(None, None, "x", None), (3, 3, 1, 12): P(None, None, None, "y")}


@pytest.mark.parametrize("make, how", [
    (velo, quick_jit), (adamw, lambda update: update),
    (adamw, lambda update: lambda g, s, params: quick_jit(lambda g, s: update(g, s, params))(g, s)),
    (learned, lambda update: quick_jit(lambda g, s, params: scan(
        update, jax.tree.map(lambda x: jnp.stack([x] * 3), g), s, params)))],
    ids=["jit", "eager", "params closed over", "scan"])
def test_state_and_updates_are_sharded_like_the_params(make, how):
    """On 4 devices, with the numbers of one."""
    optimizer, draw = make(), normal(6)
    update, on_one = how(optimizer.update), {"b": draw((12,)), "w": draw((3, 8, 12))}
    expected = jax.device_get(update(on_one, quick_jit(optimizer.init)(on_one), on_one))

    def on_mesh(axis_type):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
        layout = lambda x: NamedSharding(mesh, SPECS[x.shape])
        params = jax.device_put(on_one, jax.tree.map(layout, on_one))
        state = (optimizer.init if make is adamw else quick_jit(optimizer.init))(params)
        found = update(params, state, params)
        for x in jax.tree.leaves((state, found)):
            assert x.shape not in SPECS or x.sharding.is_equivalent_to(layout(x), x.ndim), x.shape
        close(jax.device_get(found), expected, rtol=2e-5, atol=1e-6)

    side_by_side(on_mesh, (AxisType.Auto, AxisType.Explicit))


def test_a_scan_of_updates_within_shard_map(monkeypatch):
    """Each device updates a network of its own, in chunks. The carry varies over the devices."""
    monkeypatch.setitem(lopt.CHUNK, "cpu", 8)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    optimizer, w = learned(), normal(0)((4, 6, 4))
    run = lambda w: scan(optimizer.update, jnp.stack([w] * 3), optimizer.init(w), w)[0]
    of_one = jax.shard_map(lambda w: run(w[0])[None], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    close(*side_by_side(lambda f: quick_jit(f)(w), (of_one, jax.vmap(run))), atol=1e-6)


# -------- Ours: decay, pace and cooldown


def test_a_longer_run_goes_at_a_slower_pace():
    """Update 40 of 400 is half of update 10 of 100. A decay is a share of the params."""
    p, plain = normal(1)((4, 6)), lopt.Learned(some_theta(), 0.01)

    def update(t, num_steps, **ours):
        optimizer = lopt.learned_optimizer(plain._replace(**ours), 1 / 64, num_steps=num_steps)
        return optimizer.update(p, optimizer.init(p)._replace(step=t), p)[0]

    expected, unplanned, paced, decaying = quick_jit(lambda t, num_steps: (
        update(10, 100), update(10, None, horizon=100), update(t, num_steps, horizon=100),
        update(t, num_steps, horizon=100, decay=0.2)))(40, 400)
    close([unplanned, paced, decaying], [expected, expected / 2, expected / 2 - 0.1 * p])


def test_with_a_cooldown_updates_fall_to_zero_in_a_line():
    """Over the last 0.4 of 10 steps: update 6 is whole, 8 a half, 10 none. A share may vary."""
    params, plain = {"w": normal(1)((4, 6)), "b": jnp.ones(3, jnp.bfloat16)}, adamw()

    def update(t, share, num_steps):
        optimizer = lopt.with_cooldown(plain, num_steps, share)
        state = plain.init(params)._replace(step=t)
        return optimizer.update(params, state, params), plain.update(params, state, params)

    t, share, n, factor = np.array([
        (6, 0.4, 10, 1), (8, 0.4, 10, 0.5), (9, 0.4, 10, 0.25), (10, 0.4, 10, 0), (11, 0.4, 10, 0),
        (11, 0, 10, 1), (999_999, 0.4, 1_000_000, 1 / 400_000)]).T
    update = quick_jit(jax.vmap(update))
    (cooled, after), (whole, expected) = update(np.int32(t), share, np.int32(n))
    close(after, expected, rtol=0)
    close(cooled["w"], factor[:, None, None] * whole["w"])
    assert cooled["b"].dtype == jnp.bfloat16 and np.any(whole["w"])
