"""The kin of ZOQO and CAQ-ZO: each is its formula, and has the property that it was made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_reference as runs
from statistical import assert_uncorrelated

import zoqo_jax as zq
from zoqo_jax import stencils

KEY = jax.random.key(31)


def in_the_middle(shape):
    """An array of 8-bit codes far from the grid's edges, one code being 1.0."""
    return zq.Quantizer(8, range=127.5)(jnp.zeros(shape))


def mean_and_error(samples):
    """The mean of samples and its standard error."""
    samples = np.asarray(samples, np.float64)
    return samples.mean(axis=0), samples.std(axis=0) / np.sqrt(len(samples))


# QuZO


def roundings(radius, noise="gaussian", seeds=4_000, **structure):
    """Both roundings of many directions, (seeds, rows, columns)."""
    array = in_the_middle((4, 6))

    def both(key):
        probed = stencils.describe(key, array, radius, law=noise, rounded=True, **structure)
        return stencils.draw(probed, array), stencils.draw(probed.rounded_again(), array)

    drawn = jax.jit(jax.vmap(both))(jax.random.split(KEY, seeds))
    return [np.asarray(u, np.float64) for u in drawn]


def rounding_variance(radius):
    """E[f (1 - f)] of the fraction f of a Gaussian of standard deviation `radius`."""
    x = np.linspace(-9 * radius, 9 * radius, 2_000_001)
    density = np.exp(-0.5 * (x / radius) ** 2)
    fraction = x - np.floor(x)
    return (density * fraction * (1 - fraction)).sum() / density.sum()


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.6])
def test_roundings_are_two_of_one_gaussian_direction(radius):
    first, second = roundings(radius)
    assert np.abs(first - second).max() == 1  # either side of the same real number
    count = first.size
    noise = rounding_variance(radius)
    for product, expected in (
        (first, 0.0),
        (first * second, radius**2),
        (first**2, radius**2 + noise),
        (second**2, radius**2 + noise),
    ):
        mean, error = mean_and_error(product.reshape(count))
        assert abs(mean - expected) < 4 * error
    assert_uncorrelated(first.reshape(len(first), -1))


def test_roundings_of_signs_are_the_whole_numbers_about_the_radius():
    first, second = roundings(1.25, "rademacher")
    assert set(np.unique(first)) == {-2.0, -1.0, 1.0, 2.0}
    np.testing.assert_array_equal(np.sign(first), np.sign(second))
    mean, error = mean_and_error(np.abs(first).reshape(-1))
    assert abs(mean - 1.25) < 4 * error
    mean, error = mean_and_error((first * second).reshape(-1))
    assert abs(mean - 1.25**2) < 4 * error


@pytest.mark.parametrize("structure", ["rank_one", "sparse"])
def test_roundings_of_any_structure_agree_on_the_direction(structure):
    density = {"density": 0.4} if structure == "sparse" else {}
    first, second = roundings(2.6, structure=structure, **density)
    assert np.abs(first - second).max() == 1
    mean, error = mean_and_error((first * second).reshape(-1))
    assert abs(mean - density.get("density", 1.0) * 2.6**2) < 4 * error


SLOPES = np.array([3.0, -2.0, 0.5, 1.0])
CURVATURE = np.array(
    [[2.0, 0.5, 0.0, -0.5], [0.5, 1.0, 0.3, 0.0], [0.0, 0.3, 0.5, 0.0], [-0.5, 0, 0, 1]]
)


def quadratic(x):
    """Its slopes at 0 are SLOPES, its Hessian CURVATURE."""
    x = x.astype(jnp.float32)
    H, g = jnp.asarray(CURVATURE, jnp.float32), jnp.asarray(SLOPES, jnp.float32)
    return 0.5 * x @ H @ x + g @ x


@pytest.mark.parametrize(("radius", "num_queries"), [(0.4, 1), (0.4, 3), (1.5, 1)])
def test_quzo_moves_against_the_gradient_of_a_quadratic_on_average(radius, num_queries):
    """Within four standard errors, where going along the probed rounding would be far off."""
    params, eta = in_the_middle((4,)), 0.1
    tx = zq.quzo(eta, radius, key=KEY, num_queries=num_queries)

    @jax.jit
    @jax.vmap
    def move(key):
        state = tx.init(params)._replace(key=key)
        updates, after = tx.update(None, state, params, value_fn=quadratic)
        (probed,) = tx.probes(state, params)
        u = stencils.draw(probed, params)
        same = after.differences[0] / (2 * radius**2) * u.astype(jnp.float32)
        return updates.packed.astype(jnp.int8), -eta * same

    moves, along_the_same = move(jax.random.split(KEY, 60_000))
    mean, error = mean_and_error(moves)
    assert (abs(mean + eta * SLOPES) < 4 * error).all()
    mean, error = mean_and_error(along_the_same)
    longer = 1 + rounding_variance(radius) / radius**2
    assert (abs(mean + eta * longer * SLOPES) < 4 * error).all()
    if num_queries == 1:
        assert (abs(mean + eta * SLOPES) > 4 * error)[:2].all()


@pytest.mark.parametrize(
    ("model", "num_queries", "radius", "boundary", "structure"),
    [
        (runs.MODELS[0], 1, 0.75, "clamp", {}),
        (runs.PACKED, 3, 1.5, "mask", {}),
        pytest.param(
            *(runs.MODELS[1], 3, 2.0, "reflect", {"structure": "sparse", "density": 0.25}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quzo_is_its_formula(model, num_queries, radius, boundary, structure):
    eta = runs.caq_schedule
    options = {"num_queries": num_queries, "boundary": boundary, **structure}
    tx = zq.quzo(eta, radius, key=runs.KEY, **options)
    arrays, words = runs.problem(model).arrays, runs.words_of_moves(model, num_queries)

    def draw(count):
        def one(query, leaf):
            key = runs.leaf_key(count, query, leaf)
            law = {"law": "gaussian", "rounded": True, **structure}
            probed = stencils.describe(key, arrays[leaf], radius, **law)
            both = (probed, probed.rounded_again())
            return [stencils.draw(stencil, arrays[leaf]) for stencil in both]

        of_query = lambda query: [one(query, leaf) for leaf in range(len(arrays))]  # noqa: E731
        return jax.lax.map(of_query, jnp.arange(3))

    heard = [second for _, second in runs.every_step(draw)]

    def step(count, leaves, probed):
        drawn = [[u[count, query].astype(np.int64) for u in heard] for query in range(num_queries)]
        return reference.quzo_step(
            leaves,
            probed,
            drawn,
            runs.problem(model).loss,
            lambda leaf, step: reference.stochastic(step, words[leaf][count]),
            learning_rate=runs.at(eta, count),
            radius=radius,
            boundary=boundary,
        )

    us = [first for first, _ in runs.every_step(draw)]
    runs.assert_same_run(model, tx, num_queries, us, step)
