"""spsa: gradients from two losses, unbiased on a quadratic, and a citizen of optax chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import by_turns

import zoqo_jax as zq

KEY = jax.random.key(21)
A = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]], np.float32)
B = np.array([1.0, -2.0, 0.5], np.float32)
AT = np.array([0.3, -0.7, 1.1], np.float32)


def quadratic(x):
    return 0.5 * x @ A @ x + B @ x


@pytest.mark.parametrize(("noise", "num_queries"), by_turns(["rademacher", "gaussian"], [1, 4]))
def test_estimates_are_unbiased_on_a_quadratic(noise, num_queries):
    draws = 10_000
    tx = zq.spsa(0.25, key=KEY, noise=noise, num_queries=num_queries)
    params = jnp.asarray(AT)

    @jax.jit
    @jax.vmap
    def estimate(key):
        state = tx.init(params)._replace(key=key)
        return tx.update(None, state, params, value_fn=quadratic)[0]

    estimates = np.asarray(estimate(jax.random.split(KEY, draws)), np.float64)
    error = estimates.mean(axis=0) - (A @ AT + B)
    standard_error = estimates.std(axis=0) / np.sqrt(draws)
    assert (abs(error) < 4 * standard_error).all()
    assert (standard_error < 0.1).all()


def test_more_queries_have_less_variance_in_proportion():
    params = jnp.asarray(AT)

    def variance(num_queries):
        tx = zq.spsa(0.25, key=KEY, num_queries=num_queries)

        def estimate(key):
            state = tx.init(params)._replace(key=key)
            return tx.update(None, state, params, value_fn=quadratic)[0]

        return jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 4_000)).var(axis=0).sum()

    assert variance(1) / variance(8) == pytest.approx(8, rel=0.15)


def test_an_estimate_is_the_papers_formula():
    mu = 0.125
    tx = zq.spsa(mu, key=KEY)
    params = jnp.asarray(AT)
    state = tx.init(params)
    gradient, state = tx.update(None, state, params, value_fn=quadratic)
    (plus, minus), u = (
        state.info.losses[0],
        np.sign(gradient) * np.sign(state.info.loss_differences),
    )
    np.testing.assert_allclose(plus, quadratic(AT + mu * u), rtol=1e-6)
    np.testing.assert_allclose(minus, quadratic(AT - mu * u), rtol=1e-6)
    np.testing.assert_allclose(gradient, (plus - minus) / (2 * mu) * u, rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda: optax.sgd(0.02), id="sgd"),
        pytest.param(lambda: optax.adam(0.05), id="adam"),
        pytest.param(
            lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05)), id="clip"
        ),
        pytest.param(lambda: optax.chain(optax.clip(0.5), optax.adam(0.05)), id="clip, adam"),
    ],
)
def test_chained_with_any_optimizer_it_reduces_a_loss(optimizer):
    with jax.numpy_dtype_promotion("standard"):  # for optax
        tx = optax.chain(zq.spsa(1e-2, key=KEY, num_queries=2), optimizer())
        params = {"x": jnp.asarray(AT), "y": jnp.ones((2, 3))}
        loss = lambda p: quadratic(p["x"]) + jnp.sum((p["y"] - p["x"]) ** 2)  # noqa: E731

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(None, state, params, value_fn=loss)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), length=400)[0][0]

        least = -0.5 * B @ np.linalg.solve(A, B)
        assert loss(train(params)) - least < 0.05 * (loss(params) - least)


def test_radius_may_be_a_schedule():
    seen = []
    tx = zq.spsa(lambda count: jnp.where(count < 1, 0.5, 0.25), key=KEY)
    params = jnp.asarray(AT)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(None, state, params, value_fn=lambda x: x[0])
        seen.append(abs(state.info.loss_differences[0]).item() / 2)
    np.testing.assert_allclose(seen, [0.5, 0.25], rtol=1e-4)


# Leaves of every kind


@pytest.mark.parametrize(
    ("dtype", "noise"), by_turns([jnp.bfloat16, jnp.float16], ["rademacher", "gaussian"])
)
def test_gradients_have_the_dtype_of_their_leaf(dtype, noise):
    params = {"half": jnp.ones((4, 3), dtype), "full": jnp.ones(2)}
    tx = zq.spsa(0.125, key=KEY, noise=noise)
    loss = lambda p: jnp.sum(p["half"] ** 2).astype(jnp.float32) + jnp.sum(p["full"])  # noqa: E731
    gradients, state = tx.update(None, tx.init(params), params, value_fn=loss)
    assert gradients["half"].dtype == dtype and gradients["full"].dtype == jnp.float32
    assert gradients["half"].any() and gradients["full"].any()
    assert state.info.losses.dtype == jnp.float32


def test_integer_and_quantized_leaves_stay_and_get_zero_updates():
    quantized = zq.nf4(block=4)(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    )
    params = {
        "base": quantized,
        "delta": jnp.zeros((3, 8)),
        "steps": jnp.arange(2),
        "on": jnp.array(True),
    }
    seen = []

    def loss(params):
        assert params["steps"].dtype == jnp.int32 and params["on"].dtype == bool
        seen.append(params["base"].shape)
        return jnp.sum((params["base"] + params["delta"]) ** 2)

    tx = zq.spsa(0.125, key=KEY)
    updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
    assert seen and jax.tree.structure(updates) == jax.tree.structure(params)
    for name in ("base", "steps", "on"):
        for update, leaf in zip(
            jax.tree.leaves(updates[name]), jax.tree.leaves(params[name]), strict=True
        ):
            assert update.dtype == leaf.dtype and not update.any()
    u = jnp.sign(updates["delta"] * state.info.loss_differences[0])
    expected = [jnp.sum((quantized.materialise() + side * 0.125 * u) ** 2) for side in (1, -1)]
    np.testing.assert_allclose(state.info.losses[0], expected, rtol=1e-5)


def test_floats_train_beside_a_quantized_base():
    """The way of an adapter: masked, the optimizer behind spsa never sees a code."""
    quantized = zq.nf4(block=4)(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    )
    params = {"base": quantized, "delta": jnp.zeros((3, 8))}
    loss = lambda params: jnp.sum((params["base"] + params["delta"]) ** 2)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # for optax
        adam = optax.masked(optax.adam(0.05), {"base": False, "delta": True})
        tx = optax.chain(zq.spsa(1e-2, key=KEY, num_queries=4), adam)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(None, state, params, value_fn=loss)
            return optax.apply_updates(params, updates), state

        trained, state = params, tx.init(params)
        for _ in range(300):
            trained, state = step(trained, state)
    jax.tree.map(np.testing.assert_array_equal, trained["base"], params["base"])
    assert loss(zq.dequantize(trained)) < 0.1 * loss(zq.dequantize(params))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_moves_nothing(bad):
    params = {"x": jnp.asarray(AT)}
    tx = zq.spsa(0.125, key=KEY, num_queries=2)
    gradients, state = tx.update(
        None, tx.init(params), params, value_fn=lambda p: bad + p["x"].sum()
    )
    assert not gradients["x"].any() and jnp.isfinite(gradients["x"]).all()
    assert state.info.skipped == 2 and state.info.evaluations == 4


def test_a_finite_query_is_heard_beside_a_bad_one():
    params = jnp.asarray(AT)
    tx = zq.spsa(0.5, key=KEY, num_queries=8)

    def loss(x):
        same_way = (x[0] > AT[0]) == (x[1] > AT[1])
        return jnp.where(same_way, x[2], jnp.nan)

    gradient, state = tx.update(None, tx.init(params), params, value_fn=loss)
    assert 0 < state.info.skipped < 8
    # d loss / d x2 is 1 for each query that was heard, and the mean is over all of them.
    np.testing.assert_allclose(gradient[2], (8 - state.info.skipped) / 8, rtol=1e-4)
