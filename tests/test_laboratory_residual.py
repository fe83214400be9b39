"""The residual channel: what queries ask for and hear, by brute force and by the library's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.laboratory import residual
from experiments.laboratory.claim import check
from experiments.laboratory.convex import problems, residuals
from zoqo_jax.transforms import queries

QUANTIZERS = {
    "uniform": zq.Quantizer(4, range=1.0),
    "mu-law": zq.Quantizer(6, zq.companders.mu_law(), range=1.0),
    "power": zq.Quantizer(3, zq.companders.power(), range=1.0),
    "gaussian": zq.Quantizer(8, zq.companders.gaussian(), range=1.0),
    "nf4": zq.nf4(block=None),
}
TINY = residual.Config(
    grids=("nf4",), bits=(8,), dimension=4, examples=8, draws=16, steps=400, runs=1, seeds=2
)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels_between_codes_are_the_compander_s(name):
    quantizer = QUANTIZERS[name]
    grid = quantizer.grid
    codes = np.arange(grid.low, grid.high + 1)
    levels = np.asarray(grid.levels, np.float32)[codes]
    at_codes = residuals.between(quantizer, jnp.asarray(codes, jnp.float32))
    np.testing.assert_allclose(at_codes, levels, rtol=1e-5, atol=1e-6)
    halfway = residuals.between(quantizer, jnp.asarray(codes[:-1] + 0.5, jnp.float32))
    assert (levels[:-1] < halfway).all() and (halfway < levels[1:]).all()
    if name in ("uniform", "nf4"):  # linear from code to code
        np.testing.assert_allclose(halfway, (levels[:-1] + levels[1:]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ends_of_weights_are_rounded_to_the_nearest_level(name):
    quantizer = QUANTIZERS[name]
    grid, random = quantizer.grid, np.random.default_rng(0)
    codes = random.integers(grid.low, grid.high + 1, 500)
    move = random.normal(size=500).astype(np.float32) * 2
    asked, heard = residuals.end(quantizer, jnp.asarray(codes), jnp.asarray(move), "weights")
    legal = np.asarray(grid.levels, np.float64)[grid.low : grid.high + 1]
    step = (legal[-1] - legal[0]) / (len(legal) - 1)
    expected = np.clip(legal[codes - grid.low] + move * step, legal[0], legal[-1])
    np.testing.assert_allclose(asked, expected, rtol=1e-5, atol=1e-6)
    nearest = legal[np.abs(expected[:, None] - legal).argmin(axis=1)]
    np.testing.assert_allclose(heard, nearest, rtol=1e-6)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ends_in_z_are_rounded_to_the_nearest_code(name):
    quantizer = QUANTIZERS[name]
    grid, random = quantizer.grid, np.random.default_rng(1)
    codes = random.integers(grid.low, grid.high + 1, 500)
    move = random.normal(size=500).astype(np.float32) * 2
    _, heard = residuals.end(quantizer, jnp.asarray(codes), jnp.asarray(move), "z")
    nearest = np.clip(np.round(codes + move), grid.low, grid.high).astype(int)
    np.testing.assert_array_equal(heard, np.asarray(grid.levels, np.float32)[nearest])


@pytest.mark.parametrize("query", ["weights", "aligned"])
def test_ends_are_those_that_caq_zo_probes(query):
    quantizer = zq.nf4(block=None)
    grid = quantizer.grid
    codes = jnp.asarray(np.random.default_rng(2).integers(1, 15, 64))
    array = zq.QuantizedArray.from_codes(codes, jnp.ones(1), None, grid)
    options = {"query": "off_grid", "radius": 0.13} if query == "weights" else {}
    tx = zq.caq_zo(1.0, key=jax.random.key(3), **options)
    probes = tx.probes(tx.init(array), array)
    r = probes[0].draw(array).astype(jnp.float32)
    move = r * np.float32(0.13 * grid.largest / grid.spacing)
    for side in (1, -1):
        _, heard = residuals.end(quantizer, codes, side * move, query)
        probed = queries.endpoints(array, probes, side)
        np.testing.assert_array_equal(heard, grid.at(probed.codes))


@functools.cache
def curve(name, bits, query):
    quantizer = zq.Quantizer(bits, residual._COMPANDERS[name], range=1.0)
    problem_key, draw_key = jax.random.split(jax.random.key(0))
    problem = problems.quadratic(problem_key, 16, condition=10.0)
    radii = jnp.asarray(residual._RADII, jnp.float32)
    measure = jax.jit(lambda keys: residuals.relative(problem, quantizer, query, radii, keys))
    return np.asarray(measure(jax.random.split(draw_key, 4096)))


def test_on_a_uniform_grid_the_residual_is_a_uniform_rounding_error_s():
    """E[(e . g)^2 |u|^2] / E[(mu u . g)^2 |u|^2] = (1/12) d / ((d + 2) mu^2), u Gaussian."""
    found, radii = curve("uniform", 8, "z"), residual._RADII
    inside = radii >= 0.9
    np.testing.assert_allclose(found[inside] * 12 * radii[inside] ** 2, 16 / 18, rtol=0.12)
    np.testing.assert_allclose(found[0], 1.0, atol=0.02)  # nothing leaves its cell
    assert residual.slope(radii, found) == pytest.approx(-2.0, abs=0.1)


def test_signs_from_codes_of_a_uniform_grid_have_one_rounding_error():
    """Of a radius uniform within half a step, E[((round(m) - m) / m)^2]; by summation."""
    found = curve("uniform", 8, "signs")
    for place in (6, 8, 10):  # 1, 2 and 4 steps
        m = residual._RADII[place] + (np.arange(20_000) + 0.5) / 20_000 - 0.5
        expected = np.mean(((np.round(m) - m) / m) ** 2)
        assert found[place] == pytest.approx(expected, rel=0.12)


def test_a_tiny_run_has_its_tables_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(residual, "_LOSSES", ("logistic",))
    ratios = {"excess": [[2.0, 4.0]] * 7, "rates": [1.0] * 7}
    monkeypatch.setattr(residual, "_descents", lambda *_: ratios)  # see below
    document = tmp_path / "page.md"
    document.write_text("<!-- table: residual -->\n<!-- end -->")
    found = check(residual.CLAIM, TINY, results=tmp_path, document=document, progress=False)
    assert [one["part"] for one in found] == ["residual", "descent"]  # NF4 has no other width
    assert set(found[0]["aligned"]) == {0.0} and min(found[0]["z"]) > 0
    text = document.read_text()
    assert "| nf4  |    4 | logistic |" in text and "off grid, 0.15" in text
    assert "3.00 ± 12.71" in text
    assert (tmp_path / "page" / "residual.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_radius_that_collapses_does_not_descend():
    seeds = jax.random.split(jax.random.key(0), 2)
    quantizer = zq.Quantizer(4, zq.companders.nf4(), range=1.0)
    masked, clamped, collapsed, *_ = residual._descents(TINY, "logistic", quantizer, seeds)[
        "excess"
    ]
    for seed, ratio in zip(seeds, collapsed, strict=True):
        (key,) = jax.random.split(seed, 1)
        problem = problems.logistic(jax.random.split(key)[0], 4, examples=8)
        start = problem.loss(jnp.zeros(4)) / problem.loss(zq.dequantize(quantizer(problem.optimum)))
        assert ratio == pytest.approx(start.item(), rel=1e-3)  # a radius of .03 hears nothing
    assert np.mean(masked) < 0.3 * np.mean(collapsed) > np.mean(clamped)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grids": ("nf4", "fp3")}, "grids must be of .*, got 'fp3'"),
        ({"bits": (2, 4)}, r"bits must be in \[3, 8\], got 2"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        residual.Config(**setting)
