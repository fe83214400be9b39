"""Users' flags of JAX: float64, stops at NaN or inf, no silent promotion of ranks or dtypes.

Reported of kindred projects: jax-ml/jax 7208 and google/flax 1534 (promotion of ranks),
jax-ml/jax 7390 (debug_infs).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

FLAGS = {
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}
KEY = jax.random.key(0)
SPARSE = {"structure": "sparse", "density": 0.3}
FAST = {"zoqo, sparse": (lambda: zq.zoqo(0.1, 0.1, key=KEY, **SPARSE), zq.nf4(block=16))}
SLOW = {
    "caq_zo": (lambda: zq.caq_zo(1.0, key=KEY, num_queries=2), zq.Quantizer(bits=4, block=8)),
    "zoqo, gaussian": (
        lambda: zq.zoqo(0.1, 0.1, key=KEY, noise="gaussian", step="dithered"),
        zq.Quantizer(bits=8, range="minmax"),
    ),
    "caq_zo, rank one": (
        lambda: zq.caq_zo(1.0, key=KEY, num_queries=4, structure="rank_one"),
        zq.Quantizer(bits=2, axis=0),
    ),
    "caq_zo, off the grid": (
        lambda: zq.caq_zo(1.0, key=KEY, query="off_grid", radius=0.1, rounding="error_feedback"),
        zq.nf4(block=16),
    ),
    "quzo": (lambda: zq.quzo(1.0, key=KEY), zq.Quantizer(bits=4)),
    "qes": (lambda: zq.qes(1.0, key=KEY, window=2), zq.Quantizer(bits=4)),
    "qzo": (lambda: zq.qzo(1e-3, 1e-3, key=KEY), zq.Quantizer(bits=4, axis=0)),
    "spsa": (
        lambda: optax.chain(zq.spsa(1e-2, key=KEY), zq.on_floats(optax.scale(-0.1))),
        zq.Quantizer(bits=4),
    ),
}
CASES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
W = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
X = np.ones((4, 8), np.float32)


def loss(params):
    return jnp.mean((jnp.asarray(X) @ params["w"] + params["b"][None]) ** 2)


def run(name):
    make, quantizer = {**FAST, **SLOW}[name]
    tx = make()
    params = {"w": quantizer(jnp.asarray(W)), "b": jnp.zeros(16, jnp.float32)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_under_every_flag(name):
    with jax.numpy_dtype_promotion("standard"):
        expected = run(name)
        for flag, under in FLAGS.items():
            with under():
                found = run(name)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert x.dtype == y.dtype, flag
            if flag != "x64":  # the loss itself may round otherwise
                assert bool((found["w"].packed == expected["w"].packed).all()), flag


@pytest.mark.parametrize(
    "flag",
    [
        flag if flag in ("x64", "ranks") else pytest.param(flag, marks=pytest.mark.slow)
        for flag in FLAGS
    ],
)
def test_the_tools_work_under_every_flag(flag):
    with jax.numpy_dtype_promotion("standard"), FLAGS[flag]():
        params = {"w": zq.Quantizer(bits=4)(jnp.asarray(W)), "b": jnp.zeros(16, jnp.float32)}
        look = lambda params: jnp.sum((params["w"] - 0.3) ** 2)  # noqa: E731
        zq.certificates.audit(look, params, KEY, support=4, gamma=1e-4)
        assert "w" in str(zq.explain(loss, params))
        zq.diagnose(params, radius=0.05)
        adapted = zq.lora({"w": jnp.asarray(W)}, 2, key=KEY, where=zq.is_matrix)
        assert adapted["w"].a.dtype == jnp.float32
