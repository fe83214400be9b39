"""The claim on matched budgets: its grids, and a tiny run."""

import jax
import numpy as np
import pytest

from experiments.laboratory import budgets
from experiments.laboratory.claim import check
from experiments.laboratory.networks import methods

SMALL = {"pretraining": 2, "few": 20, "num_queries": 1, "batch_size": 4, "seeds": 2}
CONFIG = budgets.Config(tasks=("digits", "sentences"), sentences="reviews", queries=4, **SMALL)


def test_scales_are_shared_down_a_channel():
    weights = jax.random.normal(jax.random.key(0), (70, 3))
    for grid, levels in (("int8", 255), ("int4", 15), ("nf4", 16)):
        array = budgets.quantizer(grid, 32)(weights)
        assert array.scale.shape == (3, 3)
        assert array.grid.high - array.grid.low + 1 == levels
        largest = np.abs(np.asarray(weights[:32])).max(0)
        reach = np.asarray(array.scale[0]) * (array.grid.largest if grid != "nf4" else 1.0)
        np.testing.assert_allclose(reach, largest, rtol=0.08)


REAL = [("digits", "qzo", "int4"), ("digits", "adam", "floats"), ("digits", "nothing", "floats")]


def made_up(config, cell):
    """Numbers for the cells that a test does not measure."""
    found = {"loss": [0.5, 0.6], "accuracy": [0.8, 0.9]}
    if cell["method"] in ("nothing", "adam"):
        return found
    if cell["method"] == "quzo":
        found["loss"] = [0.5, None]
    return {**found, "rate": 25.0, "at_edge": cell["method"] == "qes", "queries": 4}


@jax.numpy_dtype_promotion("standard")  # which optax.adam needs
def test_a_tiny_run_and_its_page(tmp_path):
    measured = {}

    def measure(config, cell):
        way = tuple(cell.values())
        if way not in REAL:
            return made_up(config, cell)
        measured[way] = budgets.CLAIM.measure(config, cell)
        return measured[way]

    page = tmp_path / "page.md"
    page.write_text("<!-- table: budgets -->\n<!-- end -->\n")
    claim = budgets.CLAIM._replace(measure=measure)
    found = check(claim, CONFIG, results=tmp_path, document=page, progress=False)
    assert len(found) == 2 * (4 + 3 * 8) and (tmp_path / "page" / "budgets.png").is_file()
    assert measured[REAL[0]]["queries"] == CONFIG.queries
    assert all(len(one["loss"]) == 2 for one in measured.values())
    assert measured[REAL[1]]["loss"] != measured[REAL[2]]["loss"]
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    rows = {line.split("|")[1].strip(): line for line in lines}
    assert rows["qes, nf4"].count("25*") == 2 and "*" not in rows["caq_zo, nf4"]
    assert rows["quzo, int8"].count("diverged") == 2
    assert rows["adam, floats"].count("±") == 4


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "sentences"])
@jax.numpy_dtype_promotion("standard")
def test_every_method_makes_the_same_number_of_queries(task, tmp_path):
    small = budgets.Config(tasks=(task,), sentences="reviews", queries=4, **SMALL)
    page = tmp_path / "page.md"
    found = check(budgets.CLAIM, small, results=tmp_path, document=page, progress=False)
    trained = [one for one in found if one["method"] in methods.METHODS]
    assert len(trained) == 2 + 3 * 7 and {one["queries"] for one in trained} == {4}


def test_all_choose_among_as_many_rates():
    assert {len(rates) for rates in methods.RATES.values()} == {7}
    assert set(methods.RATES) == set(methods.METHODS) == set(methods._MAKERS)


def test_bad_settings_are_refused():
    for setting, value, message in [
        ("tasks", ("chess",), r"tasks must be of \('digits', .*\), got \('chess',\)."),
        ("queries", 100, "queries must be a multiple of 8, got 100."),
        ("block", 0, "block must be at least 1, got 0."),
        ("seeds", 6, r"seeds must be in \[1, 5\], got 6."),
        ("radius", -1.0, "radius must be positive and finite, got -1.0."),
    ]:
        with pytest.raises(ValueError, match=message):
            budgets.Config(**{setting: value})
    missing = budgets.Config(weights="nowhere.npz")
    cell = {"task": "pictures", "method": "nothing", "grid": "floats"}
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.npz'"):
        budgets.CLAIM.measure(missing, cell)
    missing = budgets.Config(digits="nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        budgets.CLAIM.measure(missing, {**cell, "task": "digits"})
