"""What a step hears from its queries: differences whose sums are exact in any order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from zoqo_jax.transforms import queries

COUNTS = [1, 2, 3, 8, 100, 256, 257, 1000]


def pairs_of_all_sizes(count, seed=0, spread=6.0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(count, 2)) * 10 ** rng.uniform(-spread, 0, (count, 1)))


def differences(pairs):
    """Compiled or not, in 64-bit mode or not: the same bits."""
    pairs = jnp.asarray(pairs, jnp.float32)
    plain = queries.differences(pairs)
    compiled = jax.jit(queries.differences)
    np.testing.assert_array_equal(compiled(pairs), plain)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(compiled(pairs), plain)
    assert plain.dtype == jnp.float32
    return np.asarray(plain)


@pytest.mark.parametrize("count", COUNTS)
def test_differences_are_the_references(count):
    for seed, size in itertools.product(range(5), (1.0, 1e4, 3e37, 1e-20)):
        pairs = pairs_of_all_sizes(count, seed) * np.float32(size)
        np.testing.assert_array_equal(differences(pairs), reference.differences(pairs))


@pytest.mark.parametrize("count", COUNTS)
def test_differences_keep_16_significant_bits_of_the_largest(count):
    """Fewer from 257 queries on, by as many as a sum of so many may grow."""
    pairs = pairs_of_all_sizes(count).astype(np.float64)
    exact = (pairs[:, 0] - pairs[:, 1]).astype(np.float32).astype(np.float64)
    heard = differences(pairs).astype(np.float64)
    bits = 16 if count <= 256 else 24 - int(np.ceil(np.log2(count)))
    largest = np.abs(exact).max()
    assert np.abs(heard - exact).max() <= largest * 2.0**-bits
    unit = 2.0 ** (np.floor(np.log2(largest)) + 1 - bits)
    np.testing.assert_array_equal(heard / unit, np.rint(heard / unit))
    assert np.abs(heard / unit).max() <= 2**bits


@pytest.mark.parametrize("count", COUNTS)
def test_sums_of_differences_and_of_their_products_with_signs_are_exact_in_any_order(count):
    rng = np.random.default_rng(1)
    heard = differences(pairs_of_all_sizes(count, spread=3.0))
    worst = np.full((count, 2), np.nextafter(np.float32(1), np.float32(0)))
    worst[:, 1] = 0.0  # all of them round up to the largest that there is
    for values in (heard, differences(worst)):
        for signs in (np.ones(count), rng.choice([-1, 1], count), np.sign(values)):
            signed = np.float32(signs) * values
            total = signed.astype(np.float64).sum()
            for _ in range(10):
                rng.shuffle(signed)
                assert np.cumsum(signed, dtype=np.float32)[-1] == total
                assert signed.sum(dtype=np.float32) == total
            assert jnp.asarray(signed).sum() == total
            one = jnp.ones((count, 1), jnp.float32)
            product = jnp.einsum("q,qc->c", signed, one, precision=jax.lax.Precision.HIGHEST)
            assert product[0] == total


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_counts_for_nothing(bad, side):
    pairs = pairs_of_all_sizes(5)
    spoilt, silent = pairs.copy(), pairs.copy()
    spoilt[2, side] = bad
    silent[2] = 0.0
    np.testing.assert_array_equal(differences(spoilt), differences(silent))
    assert not differences(np.full((3, 2), bad)).any()
    assert not differences(np.array([[bad, -bad], [-bad, bad], [bad, 1.0]])).any()


def test_huge_differences_are_cut_off_so_that_no_sum_overflows():
    assert differences([[1e33, 0.0]]) == pytest.approx(1e33, rel=2.0**-16)
    heard = differences([[1e38, -1e38], [1e38, 0.0], [-1e38, 0.0], [1.0, 0.0]])
    assert heard.tolist() == [2.0**112, 2.0**112, -(2.0**112), 0.0]
    assert differences([[3e38, -3e38], [1.0, 0.5]]).tolist() == [0.0, 0.5]
    largest = float(np.finfo(np.float32).max)
    assert differences([[largest, 0.0]] * 256).astype(np.float32).sum() == 2.0**120


@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-30, 1e-33])
def test_tiny_differences(size):
    heard = differences(np.array([[1.0, 0.0], [0.0, 0.75], [0.001, 0.0], [0.0, 0.0]]) * size)
    np.testing.assert_allclose(heard, np.array([1.0, -0.75, 0.001, 0.0]) * size, atol=size * 2e-5)


def test_the_tiniest_differences_keep_their_sign_or_become_zero():
    for size in (1e-36, 1.2e-38, 1e-40, 1e-45):
        heard = differences(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]) * size)
        assert np.isfinite(heard).all()
        assert heard[0] >= 0 and heard[1] == -heard[0] and heard[2] == 0
        assert heard[0] <= 1.5 * size or size < 1e-37


def test_no_difference_is_zero():
    for count in (1, 4):
        assert differences(np.full((count, 2), 0.3)).tolist() == [0.0] * count
    assert differences([[0.75, 0.5], [np.nan, 0.5]]).tolist() == [0.25, 0.0]
