"""VeLO from its file, against the numbers of the reference implementation."""

import jax
import numpy as np
import pytest
from conftest import GOLDEN_DIR, tree

import lopt
import mup


def test_velo_meets_the_reference():
    """All tensors after each step, to 2e-5 of a tensor's largest weight."""
    data = np.load(GOLDEN_DIR / "velo.npz", allow_pickle=False)
    learned = lopt.load(GOLDEN_DIR / "velo_params.msgpack")
    assert learned[1:5] == (0.001, 0.001, mup.SP, "velo")
    jax.tree.map(np.testing.assert_array_equal, learned.theta, tree(data, "theta"))
    optimizer = lopt.learned_optimizer(learned, num_steps=int(data["num_steps"]))
    init, update = (jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
                    for f in optimizer)
    params, steps = tree(data, "params0"), sum(name.startswith("loss") for name in data.files)
    state = init(params)
    assert steps > 0
    for t in range(steps):
        updates, state = update(tree(data, f"grads{t}"), state, params, value=data[f"loss{t}"])
        params, expected = jax.tree.map(np.add, params, updates), tree(data, f"params{t + 1}")
        for name, x in jax.device_get(expected).items():
            error = np.max(np.abs(params[name] - x)) / np.max(np.abs(x))
            assert error <= 2e-5, f"{name}, step {t}: {error:.1e}"


def test_it_needs_the_number_of_steps_and_the_loss_but_no_tensors():
    assert sum(map(np.prod, lopt.velo_shapes(512, 256).values())) == 2_320_385
    theta = {name: np.zeros(shape) for name, shape in lopt.velo_shapes(8, 4).items()}
    learned = lopt.Learned(theta, 0.001, architecture="velo")
    with pytest.raises(ValueError, match="num_steps=1000"):
        lopt.learned_optimizer(learned)
    init, update = lopt.learned_optimizer(learned, num_steps=9)
    with pytest.raises(ValueError, match="value=loss"):
        update({}, init({}), {})
    assert update({}, init({}), {}, value=1.0)[1].step == 1
