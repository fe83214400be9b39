"""`observe` sees what multiplies each leaf, in layers of a scan too; its guides steer columns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_scanned_stack_is_seen_layer_by_layer():
    """In bytes of two codes, both layouts, and as if the layers were computed one by one."""
    x = normal(0, 2, 5, 8) + 0.3
    params = {
        "in_out": zq.Quantizer(4, block=4)(0.3 * normal(1, 3, 8, 8)),
        "out_in": zq.Quantizer(4, block=4)(0.3 * normal(2, 3, 8, 8)),
        "kernel": zq.Quantizer(8)(normal(3, 8, 2, 4)),
        "frozen": zq.freeze(zq.Quantizer(8)(normal(4, 8, 8))),
    }

    def hidden():
        def layer(h, w):
            h = jnp.tanh(h @ w[0])
            return jnp.tanh(h @ w[1].T), None

        return layer

    def loss(params):
        layers = (params["in_out"], params["out_in"])
        h, _ = jax.lax.scan(hidden(), x @ params["frozen"], layers)
        return jnp.einsum("bti,ihk->bthk", h, params["kernel"]).sum()

    seen = zq.observe(loss, params)
    assert set(seen) == {"['in_out']", "['out_in']", "['kernel']"}
    plain = zq.dequantize(params)
    h, inputs = x @ plain["frozen"], {"in_out": [], "out_in": []}
    for first, second in zip(plain["in_out"], plain["out_in"], strict=True):
        inputs["in_out"].append(h)
        h = jnp.tanh(h @ first)
        inputs["out_in"].append(h)
        h = jnp.tanh(h @ second.T)
    for name, place in (("in_out", "rows"), ("out_in", "columns")):
        one = seen[f"['{name}']"]
        vectors = np.stack([np.asarray(v).reshape(10, 8) for v in inputs[name]])
        assert (one.inputs, one.vectors, one.sketches.shape) == (place, 10, (4, 3, 8))
        np.testing.assert_allclose(one.mean, vectors.mean(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.energy, (vectors**2).mean(1), rtol=1e-4)
        assert one.guide.weights.shape == (3, 8)
    kernel = seen["['kernel']"]
    assert kernel.inputs == "rows" and kernel.mean.shape == (16,)
    np.testing.assert_allclose(
        kernel.energy.reshape(8, 2),
        np.tile((np.asarray(h).reshape(10, 8) ** 2).mean(0), (2, 1)).T,
        rtol=1e-4,
    )


@pytest.mark.parametrize("inputs", ["rows", "columns"])
def test_guided_columns_are_where_the_weights_are_with_their_signs(inputs):
    shape, counts = (16, 8), {"rows": 4, "columns": 2}
    params = {"w": zq.Quantizer(4, block=4)(normal(0, *shape))}
    size = shape[inputs == "columns"]
    weights = jnp.where(jnp.arange(size) % 4 == 1, 1.0, 0.0)
    signs = jnp.where(jnp.arange(size) % 8 == 1, 1, -1).astype(jnp.int8)
    guides = {"['w']": zq.directions.Guide(weights, signs)}
    structure = zq.directions.with_options("columns", inputs=inputs, density=0.25)
    choices = {"structure": structure, "noise": "rademacher"}
    tx = zq.zoqo(1e-3, 1e-3, key=jax.random.key(1), **choices)
    x = normal(2, 3, shape[0])
    loss = lambda p: jnp.tanh(x @ p["w"]).sum()  # noqa: E731

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss, guides=guides)
        return optax.apply_updates(params, updates), state

    state, log, start = tx.init(params), [], params
    for _ in range(4):
        new, state = step(params, state)
        moved = np.asarray(new["w"].codes, int) - np.asarray(params["w"].codes, int)
        moved = moved if inputs == "rows" else moved.T
        line = moved.any(axis=1)
        assert set(np.flatnonzero(line)) <= set(np.flatnonzero(weights)) and line.any()
        assert line.sum() <= counts[inputs]
        by_output = np.sign(moved * np.asarray(signs)[:, None])[line]
        free = by_output != 0  # codes at an edge sit out
        assert all(
            len(set(column[ok])) <= 1 for column, ok in zip(by_output.T, free.T, strict=True)
        )
        log.append(state.info.loss_differences)
        params = new
    again = zq.replay(start, jnp.stack(log), tx, guides=guides)
    np.testing.assert_array_equal(again["w"].codes, params["w"].codes)


def test_what_is_no_guide_is_refused():
    params = {"w": zq.Quantizer(8)(normal(0, 16, 8))}
    guide = {"['w']": zq.directions.Guide(jnp.ones(5))}
    loss = lambda p: (jnp.ones((2, 16)) @ p["w"]).sum()  # noqa: E731
    tx = zq.caq_zo(1.0, key=jax.random.key(1), structure="columns", density=0.25)
    with pytest.raises(ValueError, match=r"guide must have weights for the rows .* \(5,\)"):
        tx.update(None, tx.init(params), params, value_fn=loss, guides=guide)
    dense = zq.caq_zo(1.0, key=jax.random.key(1))
    with pytest.raises(ValueError, match="guides serve structure='columns', got Dense"):
        dense.update(None, dense.init(params), params, value_fn=loss, guides=guide)
    with pytest.raises(ValueError, match="sketches must be at least 1, got 0"):
        zq.observe(loss, params, sketches=0)
