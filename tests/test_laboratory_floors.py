"""Floors: swings by brute force, laws by statistics, and what each method is made of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from experiments.laboratory import floors
from experiments.laboratory.claim import check
from experiments.laboratory.convex import descents, problems
from zoqo_jax.grids import projection


def test_swings_are_those_of_brute_force():
    codes = np.random.default_rng(0).integers(0, 4, (200, 6))
    codes[:, 5] = 3
    span, turns = floors.swings(jnp.asarray(codes))
    np.testing.assert_array_equal(span, codes.max(axis=0) - codes.min(axis=0))
    expected = []
    for column in codes.T:
        moves = [np.sign(m) for m in np.diff(column) if m]
        expected.append(sum(a != b for a, b in itertools.pairwise(moves)))
    np.testing.assert_array_equal(turns, expected)
    assert turns[5] == 0


@pytest.mark.parametrize(("bits", "dimension"), [(2, 4), (8, 16)])
def test_rounded_optima_lie_at_the_floor_on_average(bits, dimension):
    found = floors._floors(floors.Config(draws=16), bits, dimension)
    for name in ("loss", "gradient"):
        assert found[name].shape == (16,)
        assert found[name].mean() == pytest.approx(1.0, abs=0.02)


def test_quadratics_and_logistic_regressions_are_least_at_their_optimum():
    for make in (
        lambda key: problems.quadratic(key, 5, condition=3.0),
        lambda key: problems.logistic(key, 5, examples=40),
    ):
        problem = make(jax.random.key(1))
        assert abs(problem.loss(problem.optimum)) < 1e-6
        np.testing.assert_allclose(jax.grad(problem.loss)(problem.optimum), 0.0, atol=1e-6)
        hessian = jax.hessian(problem.loss)(problem.optimum)
        np.testing.assert_allclose(problem.hessian, hessian, rtol=1e-4, atol=1e-5)
        assert jnp.linalg.eigvalsh(hessian).min() > 0


def test_without_feedback_a_residual_never_counts():
    random = np.random.default_rng(3)
    step = jnp.asarray(random.normal(size=1000), jnp.float32)
    residual = jnp.asarray(random.integers(-(2**21), 2**21, 1000), jnp.int32)
    moved, _ = projection.error_feedback(step, residual, descents._NO_FEEDBACK)
    np.testing.assert_array_equal(moved, projection.nearest(step))


@pytest.mark.parametrize("method", ["CAQ-ZO, nearest", descents.FLOATS])
def test_a_rate_of_one_is_a_gradient_step_of_one_over_the_trace(method):
    """On l = x . g, of which estimates along signs or Gaussians have the mean g."""
    g, spacing = jnp.array([0.3, -0.2]), 0.01
    start = jnp.zeros(2)
    params = start if method == descents.FLOATS else zq.Quantizer(8, range=1.275)(start)

    def moved(key):
        tx = descents.make(method, lambda _: 1.0, key=key, spacing=spacing, trace=2.0)
        updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda x: x @ g)
        return zq.dequantize(optax.apply_updates(params, updates))

    steps = jax.jit(jax.vmap(moved))(jax.random.split(jax.random.key(4), 2000))
    np.testing.assert_allclose(steps.mean(axis=0), -g / 2.0, atol=0.02)


TINY = floors.Config(
    dimensions=(4,), bits=(3,), draws=2, dimension=4, descent_bits=(4,), steps=400, runs=2, seeds=2
)  # fmt: skip


def test_a_tiny_run_has_its_tables_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "METHODS", ("ZOQO", "CAQ-ZO, nearest"))
    document = tmp_path / "page.md"
    document.write_text("<!-- table: floors -->\n<!-- end -->")
    claim = floors.CLAIM._replace(
        cells=lambda config: [
            cell for cell in floors.CLAIM.cells(config) if cell.get("structure") != "dense"
        ]
    )
    found = check(claim, TINY, results=tmp_path, document=document, progress=False)
    _, swinging, resting = found
    for one in (swinging, resting):
        assert all(best <= end for best, end in zip(one["best"], one["end"], strict=True))
    assert resting["period"] is None and resting["span"] == 0  # in steps too short to turn back
    assert swinging["period"] > 2 and swinging["span"] >= 1
    text = document.read_text()
    assert "gradient, d = 4" in text and "rests" in text
    assert (tmp_path / "page" / "floors.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": (1, 4)}, r"bits must be in \[2, 8\], got 1"),
        ({"descent_bits": (9,)}, r"descent_bits must be in \[2, 8\], got 9"),
        ({"dimensions": (16, 1)}, "dimensions must be at least 2, got 1"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        floors.Config(**setting)
