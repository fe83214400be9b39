"""Projections: whole codes that add up to the real-valued steps they stand for."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoqo_jax.grids import projection

KEY = jax.random.key(0)
UNIT = 2**22  # error feedback counts in 2^-22 codes


def steps_of_all_sizes(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape) * 10 ** rng.uniform(-6, 2, size=shape))


def stochastic(step, key=KEY):
    """Each step rounded by a random word of its own."""
    return projection.stochastic(jax.random.bits(key, step.shape, jnp.uint32), step)


def test_nearest_is_numpys_rint():
    step = np.concatenate([steps_of_all_sizes(10_000), np.arange(-510, 511) / 2]).astype(np.float32)
    moved = projection.nearest(jnp.asarray(step))
    assert moved.dtype == jnp.int32
    np.testing.assert_array_equal(moved, np.rint(np.clip(step, -255, 255)))


def test_threshold_moves_one_code_where_a_step_is_long_enough():
    step = np.concatenate([steps_of_all_sizes(10_000), [0.0, -0.0, 0.25, -0.25]]).astype(np.float32)
    for least in (0.25, 0.5, 3.0):
        moved = projection.threshold(jnp.asarray(step), least)
        assert moved.dtype == jnp.int32
        np.testing.assert_array_equal(moved, np.sign(step) * (np.abs(step) >= least))


STEPS = [0.5, -0.5, 0.3, -0.01, 1e-3, 2.7, -2.7, -254.9, 100.001]


def test_stochastic_is_unbiased():
    """The mean of many moves is the step, within four standard errors."""
    draws = 400_000
    step = np.float32(STEPS)
    moved = stochastic(jnp.tile(jnp.asarray(step)[:, None], draws))
    assert moved.dtype == jnp.int32
    for row, mean in zip(np.asarray(moved), step.astype(np.float64), strict=True):
        low, part = np.floor(mean), mean - np.floor(mean)
        assert set(np.unique(row)) == {low, low + 1}
        assert abs(row.mean() - mean) <= 4 * np.sqrt(part * (1 - part) / draws)


@pytest.mark.parametrize("step", [1e-6, -3e-7])
def test_the_smallest_steps_are_not_lost(step):
    """In 2^26 draws, within four standard errors (about 67 and 20 moves are expected)."""

    @jax.jit
    def count(keys):
        steps = jnp.full(2**20, step, jnp.float32)
        return jax.lax.map(lambda key: stochastic(steps, key).sum(), keys).sum()

    moves = count(jax.random.split(KEY, 64)).item()
    expected = 2**26 * step
    assert abs(moves - expected) <= 4 * np.sqrt(abs(expected))


def test_stochastic_rounds_by_exactly_its_chance():
    """Up where a random word of 32 bits is below the fraction: E[result] = step to 2^-32 codes."""
    step = steps_of_all_sizes(100_000)
    words = jax.random.bits(KEY, step.shape, jnp.uint32)
    size = np.abs(np.clip(step.astype(np.float64), -255, 255))
    up = np.asarray(words, np.float64) < np.floor((size - np.floor(size)) * 2.0**32)
    expected = np.sign(step) * (np.floor(size) + up)
    np.testing.assert_array_equal(projection.stochastic(words, jnp.asarray(step)), expected)


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_stochastic_rounds_up_where_a_word_is_below_the_chance(word):
    step = jnp.asarray([0.0, 2.0**-32, 0.5, 1 - 2.0**-24, 3.0, -0.5, -3.0], jnp.float32)
    chance = np.array([0, 1, 2**31, 2**32 - 2**8, 0, 2**31, 0])
    moved = projection.stochastic(jnp.full(step.shape, word, jnp.uint32), step)
    up = (word < chance).astype(int)
    np.testing.assert_array_equal(moved, [0, 0, 0, 0, 3, 0, -3] + up * np.sign(step))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_whole_steps_are_taken_whole(rounding):
    whole = np.arange(-255, 256)
    step = jnp.asarray(whole, jnp.float32)
    moved = stochastic(step) if rounding == "stochastic" else projection.nearest(step)
    np.testing.assert_array_equal(moved, whole)


def test_error_feedback_loses_nothing():
    """Moves and residual add up to the steps, exactly in fixed point, after each of 1,000 steps."""
    steps = steps_of_all_sizes(1000, 300)

    def advance(residual, step):
        moved, residual = projection.error_feedback(step, residual)
        return residual, (moved, residual)

    start = jnp.zeros(300, jnp.int32)
    _, (moves, residuals) = jax.jit(functools.partial(jax.lax.scan, advance))(
        start, jnp.asarray(steps)
    )
    assert moves.dtype == residuals.dtype == jnp.int32
    wanted = np.clip(steps.astype(np.float64), -255, 255)
    fixed = np.rint(wanted * UNIT).astype(np.int64)
    applied = np.cumsum(np.asarray(moves, np.int64), axis=0)
    residuals = np.asarray(residuals, np.int64)
    np.testing.assert_array_equal(applied * UNIT + residuals, np.cumsum(fixed, axis=0))
    assert (residuals >= -UNIT / 2).all() and (residuals <= UNIT / 2).all()
    # In real numbers: never more than half a code behind, but for 2^-23 a step of fixed point.
    behind = np.abs(applied - np.cumsum(wanted, axis=0)).max(axis=1)
    assert (behind <= 0.5 + np.arange(1, 1001) * 2.0**-23).all()


def test_error_feedback_applies_the_smallest_steps_in_the_end():
    step, residual, total = jnp.float32(1e-3), jnp.zeros((), jnp.int32), 0
    advance = jax.jit(projection.error_feedback)
    for _ in range(3000):
        moved, residual = advance(step, residual)
        total += moved.item()
    assert total == 3


def test_what_is_significant_is_so_in_exact_arithmetic():
    rng = np.random.default_rng(0)
    for count, largest in itertools.product((1, 4, 37, 256, 1000), (1, 3, 300, 2**13, 2**17)):
        heard = rng.integers(-largest, largest + 1, count)
        votes = rng.choice([-1, 1], (500, count)) @ heard
        for least in (0.5, 1.0, 2.0, 3.25):
            needed = Fraction(least) ** 2 * sum(int(d) ** 2 for d in heard)
            expected = [np.sign(v) * (int(v) ** 2 >= needed) for v in votes]
            moved = projection.significant(
                jnp.asarray(votes, jnp.float32), jnp.asarray(heard, jnp.int32), least
            )
            assert moved.dtype == jnp.int32
            np.testing.assert_array_equal(moved, expected)


def test_chance_alone_is_significant_as_often_as_a_normal_variable():
    rng = np.random.default_rng(1)
    heard = rng.integers(-1000, 1001, 64)
    votes = jnp.asarray(rng.choice([-1, 1], (100_000, 64)) @ heard, jnp.float32)
    for least, share in ((1.0, 0.3173), (2.0, 0.0455), (3.0, 0.0027)):
        moved = projection.significant(votes, jnp.asarray(heard, jnp.int32), least)
        assert abs(jnp.mean(jnp.abs(moved).astype(jnp.float32)) - share) < 0.1 * share


ROUNDINGS = {
    "stochastic": stochastic,
    "nearest": projection.nearest,
    "error_feedback": lambda step: projection.error_feedback(
        step, jnp.arange(step.size, dtype=jnp.int32) * 40 - UNIT // 2
    ),
    "threshold": lambda step: projection.threshold(step, 0.5),
}


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_compiled_steps_are_the_same_bit_for_bit(rounding):
    """Even where the step is itself a product that a compiler could fuse with what follows."""
    gradient = jnp.asarray(steps_of_all_sizes(100_000))
    learning_rate = jnp.float32(0.1234567)
    whole = jnp.asarray(np.arange(100_000) % 511 - 255, jnp.float32)

    def move(gradient, learning_rate):
        return rounding(learning_rate * gradient), rounding(learning_rate * whole / 2)

    plain = move(gradient, learning_rate)
    with jax.enable_x64(True):
        wide = jax.jit(move)(gradient, learning_rate)
    for other in (jax.jit(move)(gradient, learning_rate), wide):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype == jnp.int32
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", [1e9, np.inf])
def test_no_step_is_longer_than_the_widest_grid(step):
    steps = jnp.asarray([step, -step], jnp.float32)
    zero = jnp.zeros(2, jnp.int32)
    for moved in (
        projection.nearest(steps),
        stochastic(steps),
        projection.error_feedback(steps, zero)[0],
    ):
        np.testing.assert_array_equal(moved, [255, -255])
