"""spsa of float16, bfloat16 and float32 leaves: no estimate beyond the range, no probe unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

KEY = jax.random.key(0)
HALVES = [jnp.float16, jnp.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("slope", [1e6, 1e30])
def test_an_estimate_beyond_the_range_has_the_largest_magnitude(dtype, slope):
    params = jnp.zeros(8, dtype)
    tx = zq.spsa(1e-3, key=KEY, num_queries=2)
    loss = lambda x: slope * x.astype(jnp.float32).sum()  # noqa: E731
    gradient, state = jax.jit(lambda s: tx.update(None, s, params, value_fn=loss))(tx.init(params))
    assert bool(jnp.isfinite(gradient).all()) and state.info.skipped == 0
    assert gradient.dtype == dtype and bool(gradient.any())


def test_an_estimate_beyond_float32_is_finite():
    params = jnp.zeros(4)
    tx = zq.spsa(1e-6, key=KEY)
    gradient, _ = tx.update(None, tx.init(params), params, value_fn=lambda x: 1e38 * x.sum() * 1e6)
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("dtype", "radius"), [(jnp.float16, 1e-4), (jnp.bfloat16, 1e-3), (jnp.float32, 1e-9)]
)
def test_a_radius_that_moves_nothing_is_refused_by_name(dtype, radius):
    params = {"b": jnp.zeros(2), "w": jnp.full(4, 1.5, dtype)}
    tx = optax.chain(zq.spsa(radius, key=KEY), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=rf"radius must displace some entry of \['w'\].*got {radius}"
    ):
        tx.init(params)


@pytest.mark.parametrize("dtype", HALVES)
def test_queries_that_displace_nothing_are_counted(dtype):
    loss = lambda x: x.sum().astype(jnp.float32)  # noqa: E731
    params = jnp.full(4, 1.5, dtype)
    for radius, skipped in ((lambda count: 1e-5), 3), ((lambda count: 0.1), 0):
        tx = zq.spsa(radius, key=KEY, num_queries=3)
        state = jax.jit(tx.init)(params)
        _, state = jax.jit(lambda s, tx=tx: tx.update(None, s, params, value_fn=loss))(state)
        assert state.info.skipped == skipped


@pytest.mark.parametrize("dtype", HALVES)
def test_a_quadratic_of_halves_comes_down(dtype):
    params = jnp.ones(16, dtype)
    tx = optax.chain(zq.spsa(0.05, key=KEY, num_queries=4), optax.sgd(0.02))
    loss = lambda x: jnp.sum(x.astype(jnp.float32) ** 2)  # noqa: E731

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert params.dtype == dtype and loss(params) < 0.5
    np.testing.assert_array_equal(state[0].info.skipped, 0)
