"""Operations on weights that are put off until a product: the numbers are those of the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = normal(0, 2, 4)
STACK = zq.Quantizer(8)(normal(1, 3, 4, 4))
HALF = zq.Quantizer(8)(normal(2, 3, 4, 4, dtype=jnp.bfloat16))


def pairs_of_layers(stack):
    return jax.lax.map(lambda a: jax.lax.map(lambda b: jnp.abs(X @ (a - b)).sum(), stack), stack)


def layer_and_stack(stack):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ (w + stack[0])), None), X, stack)[0]


LOSSES = {
    "a stack scanned twice": lambda s: pairs_of_layers(-s).sum(),
    "a stack scanned, and closed over": lambda s: layer_and_stack(-s).sum(),
    "a stack beside itself": lambda s: jnp.sum(X @ (s[:1].reshape(1, 4, 4) - (-s))),
    "used in two places": lambda s: (lambda t: jnp.sum(X @ t[0]) + jnp.sum(jnp.tanh(X @ t[1])))(-s),
    "a thousand times": lambda s: jnp.sum(X @ _often(s[0])),
}


def _often(w):
    for _ in range(1000):
        w = w * 1.001
    return w


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_put_off_has_the_numbers_of_the_values(name):
    loss = LOSSES[name]
    expected = loss(STACK.materialise())
    np.testing.assert_allclose(jax.jit(zq.quaxify(loss))(STACK), expected, rtol=2e-5)


def test_layers_converted_before_a_scan_are_those_of_the_values():
    def loss(stack):
        return pairs_of_layers(stack.astype(jnp.float32)).sum()

    expected = loss(HALF.materialise())
    assert expected > 1
    np.testing.assert_allclose(jax.jit(zq.quaxify(loss))(HALF), expected, rtol=1e-5)


def test_rows_of_a_converted_table_are_looked_up_before_they_are_converted():
    table = zq.Quantizer(8)(normal(3, 50, 4, dtype=jnp.bfloat16))

    def loss(table):
        return jnp.sum(table.astype(jnp.float32)[jnp.array([3, 1])] ** 2)

    np.testing.assert_allclose(zq.quaxify(loss)(table), loss(table.materialise()), rtol=1e-6)
    (use,) = zq.explain(loss, table).uses
    assert use.plan.algorithms == ("take_rows",)


def test_branches_in_branches_are_traced_once_each():
    traced = []

    def nested(depth, w, x):
        if not depth:
            traced.append(depth)
            return x @ w
        again = lambda: nested(depth - 1, w, x)  # noqa: E731
        return jax.lax.cond(x.sum() > 0, again, lambda: x @ w.T)

    loss = lambda w: jnp.sum(nested(9, w, X))  # noqa: E731
    told = zq.explain(loss, zq.Quantizer(8)(normal(1, 4, 4)))
    assert told.is_fused and len(traced) < 20


def test_custom_derivatives_by_weights_in_codes_are_refused():
    @jax.custom_jvp
    def straight_through(x, w):
        return jnp.round(x) @ w

    straight_through.defjvp(lambda p, t: (straight_through(*p), t[0] @ p[1]))
    w = zq.Quantizer(8)(normal(1, 4, 4))
    loss = lambda x, w: straight_through(x, w).sum()  # noqa: E731
    np.testing.assert_allclose(
        zq.quaxify(loss)(X, w), loss(X, w.materialise()), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(NotImplementedError, match="keeps no custom derivative"):
        jax.grad(zq.quaxify(loss))(X, w)


def test_products_of_bfloat16_into_float32_keep_float32_along_the_direction():
    w = zq.Quantizer(8)(normal(1, 4, 4))
    data = X.astype(jnp.bfloat16)

    def loss(w):
        dims = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(data, w, dims, preferred_element_type=jnp.float32).sum()

    choices = {"structure": "rank_one", "distribution": "rademacher"}
    probe = zq.directions.describe(jax.random.key(0), w, 20.0, **choices)
    pair = zq.queries.losses(loss, w, [probe])
    ends = [loss(zq.dequantize(zq.queries.endpoints(w, [probe], side))) for side in (1, -1)]
    np.testing.assert_allclose(pair, jnp.stack(ends), rtol=1e-5)
