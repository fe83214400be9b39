"""The claim on grids and bit widths: its grids, and a tiny run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.laboratory import bits
from experiments.laboratory.claim import check


def test_samples_are_fractions_of_their_channels_largest():
    lanes = [[jnp.array([[1.0, -4.0], [0.5, 2.0]])], [jnp.array([[3.0], [-1.5]])]]
    found = np.sort(bits.codebook_samples(lanes))
    assert found.tolist() == [-1.0, -0.5, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("width", [2, 4])
def test_lloyd_max_rounds_best_and_each_grid_has_its_levels(width):
    weights = jax.random.normal(jax.random.key(0), (400, 16))
    samples = bits.codebook_samples([[weights]])
    errors = {}
    for grid in ("uniform", "mu_law", "quantile", "lloyd_max"):
        array = bits.quantizer(grid, width, "absmax", samples)(weights)
        assert array.scale.shape == (1, 16)
        assert array.grid.high - array.grid.low < 2**width
        errors[grid] = float(jnp.mean((zq.dequantize(array) - weights) ** 2))
    assert min(errors, key=lambda grid: errors[grid]) == "lloyd_max"
    fitted = bits.quantizer("uniform", width, "mse", samples)(weights)
    assert jnp.mean((zq.dequantize(fitted) - weights) ** 2) < errors["uniform"]
    assert bits.quantizer("nf4", 4, "mse", samples).grid == zq.nf4().grid


SMALL = {"pretraining": 2, "queries": 8, "num_queries": 1, "batch_size": 4}
CONFIG = bits.Config(bits=(2, 4), seeds=2, **SMALL)
REAL = [
    {"model": "digits", "bits": 2, "grid": "lloyd_max", "trained": trained}
    for trained in ("as rounded", "caq_zo, scales by qzo in turn")
]


def made_up(config, cell):
    """Numbers for the cells that a test does not measure: fewer bits are worse."""
    good = 0.5 + cell["bits"] / 10 + 0.01 * (cell["grid"] == "quantile")
    found = {"loss": [0.5, None], "accuracy": [good, good], "floats": [0.95, 0.95]}
    if cell["trained"] == "as rounded":
        return found
    return {**found, "rate": 1.0, "at_edge": cell["bits"] == 4, "queries": 8}


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # which optax.adam needs
def test_a_tiny_run_and_its_page(tmp_path):
    measured = {}

    def measure(config, cell):
        if cell not in REAL:
            return made_up(config, cell)
        measured[cell["trained"]] = bits.CLAIM.measure(config, cell)
        return measured[cell["trained"]]

    page = tmp_path / "page.md"
    page.write_text("<!-- table: bits -->\n<!-- end -->\n")
    claim = bits.CLAIM._replace(measure=measure)
    found = check(claim, CONFIG, results=tmp_path, document=page, progress=False)
    assert len(found) == 2 * (4 + 5) * 4 and (tmp_path / "page" / "bits.png").is_file()
    first, second = measured.values()
    assert len(first["accuracy"]) == len(first["floats"]) == 2 and "rate" not in first
    assert second["queries"] == 8 and len(second["loss"]) == 2
    lines = page.read_text().splitlines()
    (row,) = [line for line in lines if "transformer, film reviews, 4 bits, quantile" in line]
    assert row.count("**91.0 ± 0.0**") == 4 and row.count("*") == 4 * 4 + 3 and "95.0" in row
    assert sum("nf4" in line for line in lines) == 2


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_every_way_to_train(tmp_path):
    small, page = bits.Config(bits=(4,), seeds=1, **SMALL), tmp_path / "page.md"
    found = check(bits.CLAIM, small, results=tmp_path, document=page, progress=False)
    assert len(found) == 2 * 5 * 4
    assert all(one["queries"] == 8 for one in found if one["trained"] != "as rounded")


def test_bad_settings_are_refused():
    for setting, value, message in [
        ("bits", (4, 9), r"bits must be in \[2, 8\], got 9."),
        ("range", "minmax", "range must be 'absmax' or 'mse', got 'minmax'."),
        ("queries", 10, "queries must be a multiple of 16, got 10."),
        ("seeds", 0, r"seeds must be in \[1, 5\], got 0."),
        ("radius", 0.0, "radius must be positive and finite, got 0.0."),
    ]:
        with pytest.raises(ValueError, match=message):
            bits.Config(**{setting: value})
