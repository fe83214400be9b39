"""Companders: monotone, invertible on every level, and the levels that their sources define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns
from scipy import stats

from zoqo_jax import Quantizer
from zoqo_jax.grids import companders

NORMAL = np.random.default_rng(0).normal(size=20_000)
PARAMETRIC = {
    "identity": companders.identity(),
    "mu_law": companders.mu_law(),
    "mu_law almost flat": companders.mu_law(1e-3),
    "mu_law steep": companders.mu_law(1e5),
    "a_law": companders.a_law(),
    "a_law least": companders.a_law(1.0),
    "power": companders.power(),
    "power above 1": companders.power(3.0),
    "gaussian": companders.gaussian(),
    "gaussian narrowest": companders.gaussian(0.25),
    "gaussian widest": companders.gaussian(10.0),
}
CODEBOOKS = {
    "nf4": companders.nf4(),
    "fp4": companders.fp4(),
    "codebook": companders.codebook([-1.0, -0.5, 0.125, 0.25, 0.75]),
    "widest codebook": companders.codebook(np.linspace(-1.0, 1.0, 256) ** 3),
    "quantile": companders.quantile(NORMAL, 8),
    "lloyd_max": companders.lloyd_max(NORMAL, 5),
}


@pytest.mark.parametrize("compander", (PARAMETRIC | CODEBOOKS).values(), ids=PARAMETRIC | CODEBOOKS)
def test_forward_is_monotone(compander):
    x = np.linspace(-1.0, 1.0, 20_001, dtype=np.float32)
    z = np.asarray(compander.forward(jnp.asarray(x)))
    # XLA's erf dips by an ulp where it is nearly flat.
    assert (np.diff(z) >= (-1.2e-7 if "gaussian" in compander.name else 0)).all()
    levels = compander.levels or (-1.0, 1.0)
    assert (np.diff(z[(levels[0] <= x) & (x <= levels[-1])][::100]) > 0).all(), "a flat stretch"


@pytest.mark.parametrize("compander", PARAMETRIC.values(), ids=PARAMETRIC)
def test_parametric_maps_take_the_unit_interval_to_itself(compander):
    ends = jnp.asarray([-1.0, 0.0, 1.0], jnp.float32)
    np.testing.assert_allclose(compander.forward(ends), ends, rtol=3e-7)
    # The narrowest Gaussian is so flat there that its inverse magnifies an ulp three-hundredfold.
    np.testing.assert_allclose(compander.inverse(ends), ends, rtol=3e-5)


@pytest.mark.parametrize("compander", PARAMETRIC.values(), ids=PARAMETRIC)
def test_parametric_maps_undo_each_other_on_every_level_of_2_to_8_bits(compander):
    codes = [np.arange(1, 2**bits) - 2 ** (bits - 1) for bits in range(2, 9)]
    z = np.concatenate([2 * n / (2**bits - 1) for bits, n in enumerate(codes, start=2)])
    z = z.astype(np.float32)
    levels = compander.inverse(jnp.asarray(z))
    assert np.abs(levels).max() <= 1
    np.testing.assert_allclose(compander.forward(levels), z, rtol=2e-6, atol=1e-7)
    again = compander.inverse(compander.forward(levels))
    np.testing.assert_allclose(again, levels, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("compander", CODEBOOKS.values(), ids=CODEBOOKS)
def test_codebook_maps_its_levels_to_their_codes_exactly(compander):
    levels = jnp.asarray(compander.levels, jnp.float32)
    codes = jnp.arange(levels.size, dtype=jnp.float32)
    assert (compander.forward(levels) == codes).all()
    assert (compander.inverse(codes) == levels).all()


@pytest.mark.parametrize(
    ("name", "dtype"), by_turns(PARAMETRIC, [jnp.float16, jnp.bfloat16, jnp.float32])
)
def test_parametric_maps_keep_the_dtype(name, dtype):
    compander = PARAMETRIC[name]
    x = jnp.asarray([-0.5, 0.0, 0.25], dtype)
    assert compander.forward(x).dtype == compander.inverse(x).dtype == dtype


def test_mu_law_and_a_law_are_those_of_g711():
    x = np.linspace(-1, 1, 2001)
    mu, a = 255.0, 87.6
    mu_law = np.sign(x) * np.log(1 + mu * np.abs(x)) / np.log(1 + mu)
    linear = a * np.abs(x) / (1 + np.log(a))
    curved = (1 + np.log(np.maximum(a * np.abs(x), 1))) / (1 + np.log(a))
    a_law = np.sign(x) * np.where(np.abs(x) < 1 / a, linear, curved)
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(companders.mu_law(mu).forward(x), mu_law, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(companders.a_law(a).forward(x), a_law, rtol=1e-5, atol=1e-6)


def test_gaussian_cells_are_equally_probable():
    """Cells end halfway between codes in z; the outer two reach to the ends of the range."""
    sigma, bits = 0.4, 6
    codes = np.arange(1, 2**bits) - 2 ** (bits - 1)
    borders = (codes[1:] - 0.5) * 2 / (2**bits - 1)
    x = companders.gaussian(sigma).inverse(jnp.asarray(borders, jnp.float32))
    chances = np.diff(stats.norm.cdf(np.asarray(x, np.float64), scale=sigma))
    np.testing.assert_allclose(chances, chances.mean(), rtol=1e-4)


def test_nf4_levels_are_qloras_quantiles():
    """Dettmers et al., appendix E: 8 positive and 7 negative normal quantiles, and zero."""
    offset = 0.9677083
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(companders.nf4().levels, levels / levels.max(), atol=1e-6)


def test_nf4_cell_widths_differ_by_a_factor_of_almost_four():
    widths = np.diff(companders.nf4().levels)
    assert [round(width, 4) for width in (widths.min(), widths.max())] == [0.0796, 0.3038]
    assert round(widths.max() / widths.min(), 1) == 3.8


def test_fp4_levels_are_the_values_of_e2m1():
    """Sign, two exponent bits with bias 1, one bit of mantissa; exponent zero is subnormal."""
    values = set()
    for code in range(16):
        sign, exponent, mantissa = (-1) ** (code >> 3), (code >> 1) & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        values.add(sign * size)
    assert companders.fp4().levels == tuple(np.float32(sorted(values)) / np.float32(6))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantile_levels_are_the_medians_of_equal_shares(bits):
    levels = np.asarray(companders.quantile(NORMAL, bits).levels) * np.abs(NORMAL).max()
    below = (levels[:, None] > NORMAL).sum(axis=1)
    np.testing.assert_allclose(below, (np.arange(2**bits) + 0.5) * NORMAL.size / 2**bits, atol=1)


def test_quantile_cells_hold_equally_many_of_evenly_spread_samples():
    samples = (np.arange(4096) + 0.5) / 4096
    levels = np.asarray(companders.quantile(samples, 4).levels) * samples.max()
    borders = (levels[1:] + levels[:-1]) / 2
    counts = np.bincount(np.searchsorted(borders, samples), minlength=16)
    assert (np.abs(counts - 256) <= 1).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_is_a_fixed_point(bits):
    """Every level is the mean of its cell, with borders midway between levels."""
    largest = np.abs(NORMAL).max()
    compander = companders.lloyd_max(NORMAL, bits, iterations=10_000)
    levels = np.asarray(compander.levels) * largest
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, NORMAL)
    means = [NORMAL[cell == j].mean() for j in range(2**bits)]
    np.testing.assert_allclose(levels, means, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_lloyd_max_errs_no_more_than_quantiles(bits):
    errors = {}
    for fitted in (companders.quantile, companders.lloyd_max):
        levels = np.asarray(fitted(NORMAL, bits).levels) * np.abs(NORMAL).max()
        borders = (levels[1:] + levels[:-1]) / 2
        errors[fitted] = np.mean((NORMAL - levels[np.searchsorted(borders, NORMAL)]) ** 2)
    assert errors[companders.lloyd_max] <= errors[companders.quantile]


def test_lloyd_max_finds_the_known_levels_of_a_normal_law():
    """Max (1960), table I: 0.4528 and 1.510 standard deviations at 2 bits, error 0.1175."""
    sample = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)  # no sampling error
    compander = companders.lloyd_max(sample, 2, iterations=1000)
    levels = np.asarray(compander.levels) * np.abs(sample).max()
    np.testing.assert_allclose(levels, [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)
    nearest = levels[np.abs(sample[:, None] - levels).argmin(axis=1)]
    assert round(np.mean((sample - nearest) ** 2), 4) == 0.1175
    drawn = np.random.default_rng(1).normal(size=1_000_000)
    levels = np.asarray(companders.lloyd_max(drawn, 2).levels) * np.abs(drawn).max()
    np.testing.assert_allclose(levels, [-1.510, -0.4528, 0.4528, 1.510], atol=0.01)


def test_repeated_samples_are_held_exactly():
    assert companders.quantile(np.array([0.0] * 99 + [1.0]), 4).levels == (0.0, 1.0)
    few = np.repeat([-2.0, -0.5, 0.0, 2.0], 5)
    assert set(few / 2) <= set(companders.lloyd_max(few, 4).levels)


def test_fitted_codebooks_do_not_depend_on_the_unit():
    for fitted in (companders.quantile, companders.lloyd_max):
        assert fitted(NORMAL, 3).levels == fitted(1024 * NORMAL.reshape(100, -1), 3).levels


@pytest.mark.parametrize(("name", "bits"), by_turns(PARAMETRIC, [2, 4, 8]))
def test_legal_levels_of_a_quantizer_increase_and_hold_zero(name, bits):
    grid = Quantizer(bits, PARAMETRIC[name]).grid
    legal = np.asarray(grid.levels)[grid.low : grid.high + 1]
    assert (np.diff(legal) > 0).all()
    assert 0.0 in legal
    assert len(legal) == 2**bits - 1
    np.testing.assert_allclose(legal, -legal[::-1], rtol=1e-6)


def test_a_callers_own_compander_works():
    cube = companders.Compander(lambda x: x**3, jnp.cbrt, name="cube")
    grid = Quantizer(4, cube).grid
    z = (np.arange(1, 16) - 8) * 2 / 15
    np.testing.assert_allclose(grid.levels[1:], np.cbrt(z) / np.cbrt(z[-1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: companders.mu_law(0.0), r"mu must be positive and finite, got 0\.0\."),
        (lambda: companders.mu_law(np.inf), r"mu must be positive and finite, got inf\."),
        (lambda: companders.a_law(0.5), r"a must be at least 1 and finite, got 0\.5\."),
        (lambda: companders.a_law(np.nan), r"a must be at least 1 and finite, got nan\."),
        (lambda: companders.power(-1.0), r"exponent must be positive and finite, got -1\.0\."),
        (lambda: companders.gaussian(0.2), r"sigma must be in \[0\.25, 10\], got 0\.2\."),
        (lambda: companders.codebook([0.0]), r"levels must be 2 to 256 numbers, got shape \(1,\)"),
        (lambda: companders.codebook(np.arange(257.0)), r"levels .* got shape \(257,\)"),
        (lambda: companders.codebook(np.zeros((2, 2))), r"levels .* got shape \(2, 2\)"),
        (lambda: companders.codebook([0.0, np.nan, 1.0]), r"levels must be finite, got .*nan"),
        (lambda: companders.codebook([0.0, np.inf]), r"levels must be finite, got .*inf"),
        (
            lambda: companders.codebook([0.0, 1.0, 0.5]),
            r"levels must increase strictly, .*0\.5",
        ),
        (lambda: companders.codebook([0.0, 1.0, 1.0]), r"levels must increase strictly"),
        (lambda: companders.codebook([1.0, 1.0 + 1e-9]), r"levels must increase strictly"),
        (lambda: companders.quantile(NORMAL, 9), r"bits must be in \[2, 8\], got 9\."),
        (lambda: companders.lloyd_max(NORMAL, 1), r"bits must be in \[2, 8\], got 1\."),
        (lambda: companders.quantile(np.array([0.0, np.nan]), 4), r"samples must be finite"),
        (lambda: companders.lloyd_max(np.ones(5), 4), r"samples must hold two different .* got 5"),
        (lambda: companders.quantile(np.zeros(0), 4), r"samples must hold two different .* got 0"),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_grid_of_a_compander_does_not_depend_on_x64():
    for compander in (companders.mu_law(), companders.a_law(), companders.gaussian()):
        with jax.enable_x64(True):
            wide = Quantizer(8, compander).grid
        assert wide == Quantizer(8, compander).grid
