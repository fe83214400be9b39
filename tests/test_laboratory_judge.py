"""Judges who err: votes by enumeration, errors by counting, and runs that hear nothing else."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statistical import assert_binomial

from experiments.laboratory import judge
from experiments.laboratory.claim import check
from experiments.laboratory.networks import judges

TINY = {
    "data": "mnist",
    "errors": (0,),
    "sharpness": (),
    "votes": (1,),
    "seeds": 2,
    "hidden": 4,
    "batch_size": 8,
    "steps": 20,
    "every": 10,
    "test_images": 500,
    "target": 0.99,
}


@pytest.mark.parametrize("votes", [1, 3, 5, 9])
@pytest.mark.parametrize("error", [0.0, 0.15, 0.45])
def test_a_majority_leans_as_all_outcomes_say(votes, error):
    expected = 0.0
    for wrong in itertools.product((False, True), repeat=votes):
        chance = math.prod(error if one else 1 - error for one in wrong)
        expected += chance * (1 if sum(wrong) <= votes // 2 else -1)
    assert judges.lean(jnp.float32(error), votes) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "level", "chance"),
    [("errs", 30, 0.3), ("errs", 0, 0.0), ("bradley_terry", 8, 1 / (1 + math.exp(8 * 0.25)))],
)
@pytest.mark.parametrize("better", ["a", "b"])
def test_judges_are_wrong_as_often_as_they_should_be(kind, level, chance, better):
    a, b = (1.0, 1.25) if better == "a" else (1.25, 1.0)
    keys = jax.random.split(jax.random.key(0), 5000)
    asked = lambda key: judges.compare(kind, level, jnp.float32, a, b, key)  # noqa: E731
    verdicts = np.asarray(jax.vmap(asked)(keys))
    assert set(np.unique(verdicts)) <= {-1.0, 1.0}
    assert_binomial((verdicts == (1 if better == "a" else -1)).sum(), 5000, chance)


def test_ends_that_are_the_same_are_a_draw():
    asked = judges.compare("errs", 30, jnp.float32, 1.0, 1.0, jax.random.key(0))
    assert asked == 0


def test_a_judge_without_error_trains_as_two_losses_do(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("<!-- table: judge -->\n<!-- end -->\n")
    config = judge.Config(**TINY)
    found = check(judge.CLAIM, config, results=tmp_path, document=document, progress=False)
    losses, exact = found[:2], found[2:]
    for one, other in zip(losses, exact, strict=True):
        assert one["queries"] == other["queries"] == 40 and one["reached"] is None
        assert one["accuracy"] == other["accuracy"]
        assert one["predicted"] == other["predicted"] == 1 and other["error"] == 0
    assert losses[0]["accuracy"] != losses[1]["accuracy"]
    text = document.read_text()
    assert "| two losses " in text and "0 of 2 |" in text and "–" in text
    assert (tmp_path / "page" / "judge.png").stat().st_size > 1000


def test_a_run_ends_where_it_reaches_its_target():
    config = judge.Config(**TINY | {"target": 1e-3, "votes": (3,), "errors": (25,)})
    found = judge.CLAIM.measure(config, {"kind": "errs", "level": 25, "votes": 3, "seed": 0})
    assert found["reached"] == found["queries"] == 10 * 2 * 3
    assert found["predicted"] == pytest.approx(3 / 0.6875)  # .84 - .16


@pytest.mark.slow
def test_costs_are_shown_beside_predictions(tmp_path):
    votes = {"errors": (0, 20), "sharpness": (500,), "votes": (1, 3), "target": 0.15}
    document = tmp_path / "page.md"
    document.write_text("<!-- table: judge -->\n<!-- end -->\n")
    config = judge.Config(**TINY | votes | {"steps": 400})
    found = check(judge.CLAIM, config, results=tmp_path, document=document, progress=False)
    assert len(found) == 2 * (1 + 1 + 2 * 2)
    assert all(0 < one["error"] < 0.5 for one in found if one["kind"] == "bradley_terry")
    text = document.read_text()
    assert "| errs in 20 %" in text and "| Bradley-Terry, k = 500 |" in text and "| 1.00" in text


def test_an_exact_judge_is_asked_once():
    asked = {(x["kind"], x["level"], x["votes"]) for x in judge.CLAIM.cells(judge.Config())}
    assert ("errs", 0, 1) in asked and ("errs", 0, 3) not in asked
    assert len(asked) == 1 + 1 + 3 * 3 + 3 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"errors": (10, 50)}, r"errors must be in \[0, 50\), got 50"),
        ({"sharpness": (0,)}, "sharpness must be at least 1, got 0"),
        ({"votes": (1, 2)}, "votes must be odd, got 2"),
        ({"target": 1.5}, r"target must be in \(0, 1\), got 1.5"),
        ({"seeds": 0}, r"seeds must be in \[1, 5\], got 0"),
        ({"seeds": 6}, r"seeds must be in \[1, 5\], got 6"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        judge.Config(**settings)
