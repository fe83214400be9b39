"""A run is its base model and a few bytes a step: `replay` rebuilds its codes, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from zoqo_jax.grids import companders

STEPS = 1_000
KEY = jax.random.key(11)


def decay(start):
    """A schedule of plain JAX operations, rational at no step."""
    return lambda count: start / jnp.sqrt(1.0 + 0.01 * count.astype(jnp.float32))


RUNS = {
    "zoqo": lambda: zq.zoqo(0.02, 0.05, key=KEY),
    "zoqo, 3 queries, gaussian, scheduled": lambda: zq.zoqo(
        decay(0.1), decay(0.2), key=KEY, num_queries=3, noise="gaussian", structure="rank_one"
    ),
    "zoqo, dithered, sparse, majority": lambda: zq.zoqo(
        0.013,
        0.1,
        key=KEY,
        num_queries=3,
        vote="majority",
        step="dithered",
        structure="sparse",
        density=0.4,
        boundary="reflect",
    ),
    "caq_zo, stochastic": lambda: zq.caq_zo(decay(3.0), key=KEY),
    "caq_zo, 3 queries, stochastic, rank one": lambda: zq.caq_zo(
        5.0, key=KEY, num_queries=3, structure="rank_one", boundary="clamp"
    ),
    "caq_zo, off the grid": lambda: zq.caq_zo(
        decay(3.0), key=KEY, query="off_grid", radius=decay(0.2)
    ),
    "caq_zo, 8 queries, significant": lambda: zq.caq_zo(
        1.0, key=KEY, num_queries=8, rounding="significant"
    ),
    "quzo": lambda: zq.quzo(decay(1.0), 1.5, key=KEY),
    "quzo, 3 queries, sparse, scheduled": lambda: zq.quzo(
        1.0, decay(0.8), key=KEY, num_queries=3, structure="sparse", density=0.4, boundary="mask"
    ),
    "qes, 3 queries": lambda: zq.qes(2.0, 1.5, key=KEY, num_queries=3, window=4),
    "caq_zo, error feedback": lambda: zq.caq_zo(1.0, key=KEY, rounding="error_feedback"),
    "caq_zo, 3 queries, error feedback, scheduled": lambda: zq.caq_zo(
        decay(2.0), key=KEY, num_queries=3, rounding="error_feedback", boundary="reflect"
    ),
}
FAST = ["zoqo, 3 queries, gaussian, scheduled", "caq_zo, 3 queries, error feedback, scheduled"]


def start():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(6, 40)), jnp.float32)
    return {
        "nf4": zq.nf4(block=16)(values),
        "wide": zq.Quantizer(8, companders.mu_law(), range=2.0)(values[:, :6]),
        "bias": jnp.ones(6),
    }


X = jnp.asarray(np.random.default_rng(1).normal(size=(16, 40)), jnp.float32)


def value_fn(params):
    """An ordinary loss, rounded wherever float32 rounds."""
    hidden = jnp.tanh(X @ params["nf4"].T + params["bias"])
    return jnp.mean((hidden @ params["wide"] - jnp.sin(X[:, :6])) ** 2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in RUNS]
)
def test_replay_rebuilds_the_codes_of_a_thousand_steps(name):
    tx = RUNS[name]()
    params = start()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), state.info.loss_differences

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)

    (trained, _), log = train(params)
    assert log.shape[0] == STEPS and (log != 0).any()
    rebuilt = zq.replay(params, log, RUNS[name]())
    assert jax.tree.structure(rebuilt) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, trained)
    for leaf in ("nf4", "wide"):
        assert (trained[leaf].codes != params[leaf].codes).any()
    np.testing.assert_array_equal(rebuilt["bias"], params["bias"])


def test_another_key_rebuilds_another_model():
    base, log = {"wide": start()["wide"]}, jnp.ones((20, 1))
    rebuilt = [zq.replay(base, log, zq.caq_zo(5.0, key=jax.random.key(seed))) for seed in range(2)]
    assert (rebuilt[0]["wide"].codes != rebuilt[1]["wide"].codes).any()


def test_a_log_of_no_steps_rebuilds_the_base_model():
    base = {"wide": start()["wide"]}
    rebuilt = zq.replay(base, jnp.zeros((0, 1)), RUNS["zoqo"]())
    jax.tree.map(np.testing.assert_array_equal, rebuilt, base)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1, 1)])
def test_a_log_that_is_not_steps_by_queries_is_refused(untyped, shape):
    with pytest.raises(ValueError, match=r"log must have shape \(steps, queries\), got "):
        zq.replay(start(), jnp.zeros(shape), RUNS["zoqo"]())


def test_a_log_of_another_number_of_queries_is_refused():
    with pytest.raises(ValueError, match=r"differences must have shape \(1,\), got \(3,\)"):
        zq.replay(start(), jnp.zeros((5, 3)), RUNS["zoqo"]())
