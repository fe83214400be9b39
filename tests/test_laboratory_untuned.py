"""The claim on steps that size themselves: its problems, a tiny run, its rows."""

import jax
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.laboratory import untuned, untuned_problems, untuned_settings
from experiments.laboratory.claim import check
from experiments.laboratory.networks import models, tasks

SMALL = {"steps": 4, "num_queries": 2, "batch_size": 4, "every": 50, "seeds": 2}
CONFIG = untuned.Config(problems=("quadratic 30, noisy",), **SMALL)


@jax.numpy_dtype_promotion("standard")  # which optax.adam needs
def test_a_tiny_run_is_stopped_and_goes_on(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: untuned -->\n<!-- end -->\n")
    ways = []

    def measure(config, cell):
        if len(ways) == 3:
            raise KeyboardInterrupt
        ways.append(cell["way"])
        return untuned.CLAIM.measure(config, cell)

    where = {"results": tmp_path, "document": page, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        check(untuned.CLAIM._replace(measure=measure), CONFIG, **where)
    found = check(untuned.CLAIM, CONFIG, **where)
    assert ways == ["zoqo", "caq_zo", "searched"]
    assert [x["way"] for x in found] == [*ways, "spsa", "searched", "adam"]
    assert all(len(x["score"]) == 2 and None not in x["score"] for x in found)
    # As many evaluations: the untuned looked at the loss before and after each of four steps.
    assert 4 * 2 * 2 < found[0]["evaluations"] <= 4 * (2 * 2 + 2) and 4 < found[2]["steps"] <= 6
    assert found[2]["setting"] == "zoqo sparse 0.12"
    assert (tmp_path / "page" / "untuned.png").is_file()
    text = page.read_text()
    assert "| quadratic 30, noisy, floats, spsa" in text and "of 3 rows." in text


def test_the_settings_are_many_and_each_has_a_name_of_its_own():
    for grid, number in (("2 bits", 42), ("8 bits", 54), (untuned_problems.FLOATS, 27)):
        found = untuned_settings.searched(10.0, grid, "searched")
        assert len(found) == len(set(map(str, found))) == number


def one(problem, way, score, start=(0.5, 0.5)):
    grid = "8 bits"
    return {"problem": problem, "grid": grid, "way": way, "score": score, "start": [*start]}


@pytest.mark.parametrize(
    "problem, mine, best, is_met, is_worse",
    [
        ("digits", [0.8, 0.9], [0.9, 0.84], True, False),
        ("digits", [0.8, 0.9], [0.9, 0.85], False, False),
        ("digits", [0.4, 1.0], [0.6, 0.6], True, True),
        ("quadratic 1", [0.1, 0.12], [0.1, 0.1], True, False),
        ("quadratic 1", [0.1, 0.13], [0.1, 0.1], False, False),
        ("quadratic 1", [0.1, None], [0.1, 0.1], False, True),
    ],
)
def test_rows_are_met_within_two_points_or_a_tenth(problem, mine, best, is_met, is_worse):
    (row,) = untuned._rows([one(problem, "zoqo", mine), one(problem, "searched", best)])
    assert (row.is_met, row.is_worse) == (is_met, is_worse)


def test_the_noise_is_in_the_gradient_and_not_in_the_score():
    problem, clean = (untuned_problems.quadratic(30.0, noise) for noise in (10.0, 0.0))
    data = problem.data(0)
    x = [zq.Quantizer(8, range=1.0)(jax.random.uniform(jax.random.key(99), (200,)) - 0.5)]
    losses = [problem.loss(data, x, jax.random.key(i)) for i in range(40)]
    assert problem.score(data, x, False)[1] == clean.loss(data, x, jax.random.key(0))
    apart = np.std(np.array(losses)) / (10 * np.linalg.norm(zq.dequantize(x)[0]))
    assert 0.7 < apart < 1.4


def test_small_digits_are_split_once_and_transposed():
    task, other = tasks.small_digits(), tasks.small_digits(transposed=True)
    assert [len(x.labels) for x in (task.train, task.validation, task.test)] == [1100, 300, 397]
    assert task.test.inputs.max() == 1.0
    turned = task.test.inputs.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 64)
    np.testing.assert_array_equal(other.test.inputs, turned)


def test_convolutions_halve_a_picture_on_a_grid_as_in_floats():
    task = tasks.convolved("mnist")
    params = task.init(jax.random.key(0))
    assert [x.shape for x in params] == [(3, 3, 1, 8), (3, 3, 8, 16), (257, 10)]
    rounded, some = zq.quantize(params, zq.Quantizer(8)), task.test.inputs[:3]
    found = zq.quaxify(models.convolutional)(rounded, some)
    expected = models.convolutional(zq.dequantize(rounded), some)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"problems must be of \('digits', .*got \('chess',\)"):
        untuned.Config(problems=("chess",))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        untuned.Config(every=0)
