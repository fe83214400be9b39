"""A direction for each example: each loss is that of a model of its own; updates, replay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import by_turns

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.directions import Direction
from zoqo_jax.transforms import queries

EXAMPLES = 6
GRIDS = {
    "one scale": zq.Quantizer(8),
    "nf4": zq.nf4(block=4),
    "blocks": zq.Quantizer(4, block=4),
    "four a byte": zq.Quantizer(2, axis=0, range="minmax"),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def describe(array, seed=1, boundary="clamp", **choices):
    structure = directions.with_options("per_example", examples=EXAMPLES)
    width = array.grid.high / 6.0
    return directions.describe(
        jax.random.key(seed), array, width, structure=structure, boundary=boundary, **choices
    )


def of_each(direction, array):
    """The direction of every example, (examples, *shape), put together by hand."""
    parts = []
    for i, part in enumerate(array.parts):
        own = direction.part(i, array)
        b = own.column_signs(part.shape[-1]).astype(jnp.int16)
        a = jnp.moveaxis(own.row_signs(), -1, 0).astype(jnp.int16)
        u = Direction.draw(own, part)
        parts.append(u * a[..., None] * b.reshape(EXAMPLES, *(1,) * (array.ndim - 1), -1))
    return jnp.concatenate(parts, axis=-1)


@pytest.mark.parametrize(("grid", "boundary"), by_turns(GRIDS, ["clamp", "mask", "reflect"]))
def test_each_loss_is_that_of_a_model_of_its_own(grid, boundary):
    """Left and right of the vectors, with several vectors for each example, merged or not."""
    array = GRIDS[grid](normal(0, 12, 8))
    x, y, z = normal(2, EXAMPLES, 12), normal(3, 8, EXAMPLES), normal(4, EXAMPLES, 3, 12)

    def loss(w):
        right = (w @ y)[:, :, None]  # (12, examples, 1)
        merged = (z.reshape(-1, 12) @ w).reshape(EXAMPLES, 3, 8)
        return (
            jnp.tanh(x @ w).sum(-1)
            + (right**2).sum((0, 2))
            + jnp.cos(merged).sum((1, 2))
            + jnp.tanh(z @ w).sum((1, 2))
        )

    @jax.jit
    def both(array):
        probe = describe(array, boundary=boundary, distribution="uniform")
        asked = queries.losses(loss, array, [probe], together=1)
        each = of_each(probe, array)

        def alone(i, side):
            moved = directions.displace(array.codes, side * each[i], array.grid, boundary)
            return loss(array.decode(moved))[i]

        number = jnp.arange(EXAMPLES)
        ends = [jax.vmap(lambda i, s=s: alone(i, jnp.int16(s)))(number) for s in (1, -1)]
        return asked, jnp.stack(ends)

    asked, expected = both(array)
    np.testing.assert_allclose(asked, expected, rtol=1e-4, atol=1e-4)
    assert len(np.unique(np.abs(asked[0] - asked[1]))) == EXAMPLES


@pytest.mark.parametrize("num_queries", [1, 3])
def test_an_update_is_the_sum_over_examples_and_is_replayed(num_queries):
    x, y = normal(0, EXAMPLES, 8), normal(1, EXAMPLES)
    start = {"w": zq.Quantizer(4, block=4)(normal(2, 8, 4)), "b": zq.Quantizer(8)(normal(3, 4, 2))}

    def losses(p):
        return (jnp.tanh(x @ p["w"]) @ p["b"]).sum(-1) ** 2 + y

    structure = directions.with_options("per_example", examples=EXAMPLES)
    choices = {"structure": structure, "boundary": "clamp", "num_queries": num_queries}
    tx = zq.caq_zo(20.0, key=jax.random.key(5), rounding="nearest", **choices)
    step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=losses))
    params, state, log = start, tx.init(start), []
    for _ in range(3):
        probes = [tx.probes(state, params, query) for query in range(num_queries)]
        updates, state = step(params, state)
        d = state.info.loss_differences
        assert d.shape == (num_queries, EXAMPLES) and state.info.losses.shape == (num_queries, 2)
        new = optax.apply_updates(params, updates)
        for leaf, name in enumerate(("b", "w")):
            array = params[name]
            total = sum(
                np.tensordot(np.asarray(d[q], np.float64), of_each(probes[q][leaf], array), 1)
                for q in range(num_queries)
            )
            moved = np.round(-20.0 * 0.5 / num_queries * total).astype(int)
            expected = np.clip(
                np.asarray(array.codes, int) + moved, array.grid.low, array.grid.high
            )
            np.testing.assert_array_equal(new[name].codes, expected)
        log.append(d)
        params = new
    again = zq.replay(start, jnp.stack(log), tx)
    for name in start:
        np.testing.assert_array_equal(again[name].codes, params[name].codes)
    assert (params["w"].codes != start["w"].codes).any()


def test_what_it_cannot_serve_is_refused():
    w = zq.Quantizer(8)(normal(0, 8, 4))
    probe = describe(w)
    x = normal(1, EXAMPLES, 8)
    with pytest.raises(ValueError, match=r"examples must be along the first axis .* got vectors"):
        queries.losses(lambda w: (x[:4] @ w).sum(-1), w, [probe])
    with pytest.raises(ValueError, match="a loss for each of 6 examples, got shape"):
        queries.losses(lambda w: (x @ w).sum(), w, [probe])
    with pytest.raises(ValueError, match=r"freeze the leaf of shape \(8, 4\)"):
        queries.losses(lambda w: (x @ w).sum(-1) + jnp.sort(w).sum(), w, [probe])
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        directions.with_options("per_example", examples=0).func.describe(
            jax.random.key(0), w, 1.0, examples=0
        )
