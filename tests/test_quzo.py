"""quzo is its formula, and unbiased where rounding a direction once would not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_reference as runs
from statistical import assert_uncorrelated, mean_and_error

import zoqo_jax as zq
from zoqo_jax import directions

KEY = jax.random.key(31)


def roundings(radius, noise="gaussian", seeds=4_000, **structure):
    """Both roundings of many directions, (seeds, rows, columns)."""
    array = zq.Quantizer(8, range=127.5)(jnp.zeros((4, 6)))  # one code is 1.0

    def both(key):
        choices = {"distribution": noise, "rounded": True, **structure}
        probed = directions.describe(key, array, radius, **choices)
        return probed.draw(array), probed.rounded_again().draw(array)

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
    params = zq.Quantizer(8, range=127.5)(jnp.zeros(4))  # one code is 1.0
    eta = 0.1
    tx = zq.quzo(eta, radius, key=KEY, num_queries=num_queries)

    @jax.jit
    @jax.vmap
    def move(key):
        state = tx.init(params)._replace(key=key)
        updates, after = tx.update(None, state, params, value_fn=quadratic)
        (probed,) = tx.probes(state, params)
        u = probed.draw(params)
        same = after.info.loss_differences[0] / (2 * radius**2) * u.astype(jnp.float32)
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
        (runs.MODELS[0], 1, 0.5, "clamp", {}),
        (runs.PACKED, 3, 2.0, "mask", {}),
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
    words = runs.words_of_moves(model, num_queries)
    us, heard = runs.both_roundings(model, radius, **structure)

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

    runs.assert_same_run(model, tx, num_queries, us, step)
