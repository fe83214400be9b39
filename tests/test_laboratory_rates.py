"""Rates: curves by a plain loop, exponents of known curves, and the problem of digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from experiments.laboratory import rates
from experiments.laboratory.claim import check
from experiments.laboratory.convex import descents, problems


def test_a_curve_is_the_mean_squared_gradient_of_the_steps_so_far(monkeypatch):
    monkeypatch.setattr(descents, "RATES", (4.0, 1.0))
    config = rates.Config(bits=(4,), dimension=3, steps=100, seeds=1)
    keys = jax.random.split(jax.random.key(5), 1)
    cell = {"problem": "quadratic", "method": "ZOQO", "bits": 4}
    means, ends, floor = rates._curves(config, cell, keys)
    assert means.shape == (2, 1, len(rates._points(100))) and floor.shape == (1,)

    problem_key, run_key = jax.random.split(keys[0])
    problem = problems.quadratic(problem_key, 3, condition=10.0)
    tx = zq.zoqo(lambda t: 0.1 * (1.0 + t.astype(jnp.float32)) ** -0.5, 2 / 15, key=run_key)
    w = zq.Quantizer(4, range=1.0)(jnp.zeros(3))
    state, squares = tx.init(w), []

    @jax.jit
    def step(w, state):
        updates, state = tx.update(None, state, w, value_fn=problem.loss)
        return optax.apply_updates(w, updates), state

    for _ in range(100):
        w, state = step(w, state)
        error = np.asarray(zq.dequantize(w) - problem.optimum, np.float64)
        squares.append(np.sum((np.asarray(problem.hessian) @ error) ** 2))
    expected = [np.mean(squares[:n]) for n in rates._points(100)]
    np.testing.assert_allclose(means[1, 0], expected, rtol=1e-4)
    assert ends[1, 0] == pytest.approx(np.mean(squares[-10:]), rel=1e-4)
    hessian = np.asarray(problem.hessian, np.float64)
    assert floor[0] == pytest.approx((2 / 15) ** 2 * np.sum(hessian**2) / 12, rel=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_an_exponent_is_that_before_the_plateau(power):
    steps = rates._points(10_000)
    means = 10.0 * np.maximum(steps, 20.0) ** -power + 1e-3
    assert rates.exponent(steps, means, 0.05) == pytest.approx(-power, abs=0.02)
    assert rates.exponent(steps, means, 5.0) is None  # at once at its plateau
    assert rates.exponent(steps, np.full(steps.shape, 3.0), 0.0) is None  # never left


def test_the_optimum_of_the_digits_is_one():
    config = rates.Config(images=200, decay=0.02)
    problem, reach, trace = rates._problem(config, "logistic", jax.random.key(0))
    assert jnp.abs(problem.optimum).max() < reach
    assert abs(problem.loss(problem.optimum)) < 1e-6
    np.testing.assert_allclose(jax.grad(problem.loss)(problem.optimum), 0.0, atol=1e-6)
    hessian = jax.hessian(problem.loss)
    np.testing.assert_allclose(hessian(problem.optimum), problem.hessian, rtol=1e-3, atol=1e-6)
    assert jnp.trace(hessian(jnp.zeros(50))) == pytest.approx(trace, rel=1e-4)


def test_a_tiny_run_has_its_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "METHODS", ("CAQ-ZO, stochastic",))
    config = rates.Config(bits=(8,), dimension=2, images=20, steps=200, seeds=2)
    document = tmp_path / "page.md"
    document.write_text("<!-- table: rates -->\n<!-- end -->")
    found = check(rates.CLAIM, config, results=tmp_path, document=document, progress=False)
    assert [one["method"] for one in found] == ["CAQ-ZO, stochastic", descents.FLOATS] * 2
    assert all(one["curve"][-1] < one["curve"][0] for one in found)
    text = document.read_text()
    assert "| logistic, ZO-SGD, floats" in text and "plateau / floor, 8 bit" in text
    assert (tmp_path / "page" / "rates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": (4, 12)}, r"bits must be in \[2, 8\], got 12"),
        ({"decay": 0.0}, "decay must be positive and finite, got 0.0"),
        ({"steps": 10}, "steps must be at least 100, got 10"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        rates.Config(**setting)
