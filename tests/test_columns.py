"""Directions on few inputs: the update and the product see the same one, on any grid."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import companders
from zoqo_jax.transforms import queries

GRIDS = {
    "one scale": lambda: zq.Quantizer(8),
    "two codes a byte": lambda: zq.Quantizer(4, block=4),
    "nf4": lambda: zq.nf4(block=4),
    "four codes a byte, of rows": lambda: zq.Quantizer(2, axis=0, range="minmax"),
    "mu-law": lambda: zq.Quantizer(8, companders.mu_law(), axis=1),
}
CHOICES = {
    "signs": {"distribution": "rademacher"},
    "masked": {"distribution": "uniform", "boundary": "mask"},
    "reflected, few outputs": {"distribution": "gaussian", "boundary": "reflect", "outputs": 0.4},
    "rounded": {"distribution": "gaussian", "rounded": True},
    "dithered": {"distribution": "rademacher", "dithered": True},
    "off the grid": {"distribution": "rademacher", "off_grid": 0.9},
}


def weights(grid, shape=(24, 16), seed=0):
    return GRIDS[grid]()(jax.random.normal(jax.random.key(seed), shape))


def describe(array, inputs, seed=1, width=None, density=0.25, **choices):
    width = array.grid.high / 6.0 if width is None else width
    own = {"structure": "columns", "inputs": inputs, "density": density}
    return directions.describe(jax.random.key(seed), array, width, **own, **choices)


# Each choice and each grid once.
FEW = (
    ("signs", "one scale", "rows"),
    ("masked", "two codes a byte", "columns"),
    ("reflected, few outputs", "nf4", "rows"),
    ("rounded", "four codes a byte, of rows", "columns"),
    ("dithered", "mu-law", "rows"),
    ("off the grid", "two codes a byte", "columns"),
)


@pytest.mark.parametrize(
    ("choices", "grid", "inputs"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in itertools.product(CHOICES, GRIDS, ("rows", "columns"))
    ],
)
def test_a_product_is_that_of_the_end_points(grid, inputs, choices):
    """Both sides and two queries together, contracted along either axis, from either hand."""
    array = weights(grid)
    x = jax.random.normal(jax.random.key(2), (2, 5, 24))
    y = jax.random.normal(jax.random.key(3), (16, 5))

    def loss(w):
        return ((x @ w) ** 2).sum() + jnp.abs(w @ y).sum()

    width = 0.4 if choices in ("rounded", "dithered") else None

    @jax.jit
    def both(array):
        def one(seed):
            probe = describe(array, inputs, seed, width, **CHOICES[choices])

            def at(side):
                end = queries.endpoints(array, [probe], side)
                return loss(zq.dequantize(end)), end.codes != array.codes

            expected, moved = jax.lax.map(at, jnp.array([1, -1], jnp.int8))
            return queries.losses(loss, array, [probe], together=2), expected, moved

        return jax.vmap(one)(jnp.arange(2))

    asked, expected, moved_to = both(array)
    np.testing.assert_allclose(asked, expected, rtol=2e-5)
    assert (expected[:, 0] != expected[:, 1]).any()
    for moved in np.asarray(moved_to).swapaxes(0, 1):
        line = moved.any(axis=2 if inputs == "rows" else 1)
        assert (line.sum(axis=1) <= (6 if inputs == "rows" else 4)).all() and line.any()


@pytest.mark.parametrize("inputs", ["rows", "columns"])
def test_layers_of_a_scanned_stack_have_their_own(inputs):
    stack = weights("two codes a byte", (3, 16, 16))
    x = jax.random.normal(jax.random.key(2), (5, 16))

    def scanned(w):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0].sum()

    def looped(w):
        h = x
        for layer in w:
            h = jnp.tanh(h @ layer)
        return h.sum()

    @jax.jit
    def both(stack):
        probe = describe(stack, inputs)
        ends = [queries.endpoints(stack, [probe], side) for side in (1, -1)]
        losses = queries.losses(scanned, stack, [probe])
        return losses, jnp.stack([looped(zq.dequantize(end)) for end in ends])

    asked, expected = both(stack)
    np.testing.assert_allclose(asked, expected, rtol=2e-5)


@pytest.mark.parametrize("inputs", ["rows", "columns"])
def test_all_inputs_are_chosen_equally_often(inputs):
    array = weights("one scale", (10, 13))
    choices = {"structure": "columns", "density": 0.3, "distribution": "rademacher"}

    def drawn(key):
        return directions.describe(key, array, 1.0, inputs=inputs, **choices).draw(array)

    u = np.asarray(jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), 4000)))
    line = (u != 0).any(axis=2 if inputs == "rows" else 1)
    count = {"rows": 3, "columns": 4}[inputs]
    assert (line.sum(axis=1) == count).all()
    share = count / line.shape[1]
    assert abs(line.mean(axis=0) - share).max() < 5 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize("inputs", ["rows", "columns"])
def test_the_share_of_outputs_is_what_was_asked_for(inputs):
    array = weights("one scale", (64, 64))
    choices = {"structure": "columns", "density": 0.5, "distribution": "rademacher"}
    choices = {**choices, "inputs": inputs, "outputs": 0.4}

    def moved(key):
        u = directions.describe(key, array, 1.0, **choices).draw(array)
        return (u != 0).sum()

    found = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(3), 50)).sum()
    tried = 50 * 32 * 64
    assert abs(int(found) - 0.4 * tried) < 5 * (0.4 * 0.6 * tried) ** 0.5
