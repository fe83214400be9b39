"""Rates: squared gradient norms against steps, on the way down to the grid's floor.

For smooth functions, zeroth-order gradient descent of T steps brings the mean squared gradient of
its iterates to O(sqrt(d / T)) in general and to O(d / T) where they are convex and evaluated
without noise (Nesterov and Spokoiny, "Random gradient-free minimization of convex functions",
Foundations of Computational Mathematics 17, 2017). Neither ZOQO's paper (arXiv:2501.06736) nor any
other known to us says what becomes of that on a grid with a method of signs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import zoqo_jax as zq
from experiments import drawing, markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.convex import descents, problems
from experiments.laboratory.convex.descents import FLOATS, METHODS
from experiments.laboratory.pages import grouped
from zoqo_jax.analysis.certificates import gradient_floor

__all__ = ["CLAIM", "Config", "exponent"]

_POINTS = 60  # of a curve
_NEAR = 2.0  # times the plateau: there a descent has reached it


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      bits: of the grids, 2 to 8.
      dimension: of the quadratics.
      images: of the logistic regression, digits that are told even from odd; its weights are 50.
      decay: of the logistic regression's weights, lambda in lambda |w|^2 / 2.
      steps: of a descent, two evaluations each.
      seeds: how many.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    bits: tuple[int, ...] = (4, 6, 8)
    dimension: int = 16
    images: int = 500
    decay: float = 0.01
    steps: int = 8000
    seeds: int = 3

    def __post_init__(self) -> None:
        """Check."""
        least = {"dimension": 2, "images": 10, "steps": 100, "seeds": 1}
        settings.check(self, least=least, within={"bits": (2, 8)}, positive=("decay",))


def _cells(config: Config) -> list[Cell]:
    return [
        {"problem": problem, "method": method, "bits": bits}
        for problem in ("quadratic", "logistic")
        for method in (*METHODS, FLOATS)
        for bits in (config.bits if method != FLOATS else (32,))
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(2), config.seeds)
    means, squares, floors = _curves(config, cell, keys)
    best = int(means[:, :, -1].mean(axis=1).argmin())
    points = _points(config.steps)
    plateaus = squares[best]
    return {
        "rate": descents.RATES[best],
        "steps": points,
        "curve": means[best].mean(axis=0),
        "exponents": [exponent(points, *one) for one in zip(means[best], plateaus, strict=True)],
        "plateau": plateaus,
        "floor": floors,
    }


def _curves(config: Config, cell: Cell, keys: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squared gradients of the steps so far and of the last tenth; the grid's floor.

    Returns:
      (rates, seeds, points), (rates, seeds) and (seeds,).
    """
    method, bits = cell["method"], cell["bits"]
    points = _points(config.steps) - 1

    def one(key: Array, rate: Array) -> tuple[Array, Array, Array]:
        problem_key, run_key = jax.random.split(key)
        problem, reach, trace = _problem(config, cell["problem"], problem_key)
        floats = method == FLOATS
        spacing = 2 * reach / (2 ** (8 if floats else bits) - 1)
        tx = descents.make(
            method,
            lambda count: rate * (1.0 + 100.0 * count.astype(jnp.float32) / config.steps) ** -0.5,
            key=run_key,
            spacing=spacing,
            trace=trace,
            range=reach,
        )
        params: Any = jnp.zeros(problem.optimum.shape)
        if not floats:
            params = zq.Quantizer(bits, range=reach)(params)

        def square(params: Any) -> Array:
            x = params if floats else zq.dequantize(params)
            return jnp.sum(jax.grad(problem.loss)(x) ** 2)

        squares = descents.descend(tx, problem.loss, params, config.steps, square)
        means = jnp.cumsum(squares) / jnp.arange(1, config.steps + 1, dtype=jnp.float32)
        floor = gradient_floor(spacing, problem.hessian)
        return means[points], squares[-config.steps // 10 :].mean(), floor

    means, ends, floors = descents.at_each_rate(one, keys)
    return means, ends, floors[0]


def _problem(
    config: Config, name: str, key: Array
) -> tuple[problems.Problem, float, Array | float]:
    """A problem, how far its grid reaches, and the greatest trace of its Hessian."""
    if name == "quadratic":
        problem = problems.quadratic(key, config.dimension, condition=10.0)
        return problem, 1.0, jnp.trace(problem.hessian)
    problem, trace = problems.digits(config.images, config.decay)
    return problem, 1.2 * float(np.abs(problem.optimum).max()), trace


def _points(steps: int) -> np.ndarray:
    return np.unique(np.geomspace(1, steps, _POINTS).round().astype(int))


def exponent(steps: np.ndarray, means: np.ndarray, plateau: float) -> float | None:
    """Of the steps, in the means from where they have halved to where they near the plateau.

    Returns:
      The slope of log mean over log steps, or None where these are fewer than three points.

    Example:
      >>> steps = np.geomspace(1, 1000, 20)
      >>> round(exponent(steps, 8 / steps**0.5, 0.0), 6)
      -0.5
    """
    inside = (means <= means[0] / 2) & (means >= _NEAR * plateau)
    if inside.sum() < 3:
        return None
    return float(np.polyfit(np.log(steps[inside]), np.log(means[inside]), 1)[0])


# What is shown


def _table(found: list[Measurement]) -> str:
    widths = _widths(found)
    head = [f"{kind}, {bits} bit" for kind in ("exponent", "plateau / floor") for bits in widths]
    rows = []
    for (problem, method), mine in grouped(found, "problem", "method").items():
        cells = [_exponents(one) for one in mine]
        if method != FLOATS:
            cells += [_plateau(one) for one in mine]
        blank = [""] * (len(head) - len(cells))
        rows.append([f"{problem}, {method}", *cells, *blank])
    return markdown.table(["problem, method", *head], rows)


def _widths(found: list[Measurement]) -> list[int]:
    on_grids = [one for one in found if one["method"] != FLOATS]
    return [bits for (bits,) in grouped(on_grids, "bits")]


def _exponents(one: Measurement) -> str:
    fitted = [each for each in one["exponents"] if each is not None]
    return markdown.interval(fitted, 2) if fitted else "none"


def _plateau(one: Measurement) -> str:
    ratios = np.asarray(one["plateau"]) / np.asarray(one["floor"])
    return markdown.interval(ratios.tolist(), 1)


_IN_THE_TABLE_ALONE = ("CAQ-ZO, nearest", "QES, no feedback")  # lines that others cover


def _draw(found: list[Measurement], fig: Any) -> None:
    finest = max(_widths(found))
    drawn = [
        one
        for one in found
        if one["bits"] in (finest, 32) and one["method"] not in _IN_THE_TABLE_ALONE
    ]
    by_problem = grouped(drawn, "problem")
    axes = fig.subplots(1, len(by_problem), squeeze=False)[0]
    for axis, ((problem,), mine) in zip(axes, by_problem.items(), strict=True):
        axis.axhline(np.mean(mine[0]["floor"]), color="gray", lw=0.8)
        steps, first = np.asarray(mine[0]["steps"]), mine[0]["curve"][0]
        for power in (-0.5, -1.0):
            axis.loglog(steps, first * steps**power, "--", color="gray", lw=0.8)
        for i, one in enumerate(mine):
            style = {**drawing.style(i), "markevery": (0.1 * i / len(mine), 0.25)}
            axis.loglog(steps, one["curve"], label=one["method"], **style)
        axis.set_title(
            f"{problem}, {finest} bit (gray: floor, $T^{{-1/2}}$, $T^{{-1}}$)", fontsize=9
        )
        axis.set_xlabel("steps T")
        axis.set_ylabel("mean squared gradient of T steps")
        axis.grid(alpha=0.3)
        drawing.label_ends(axis, size=7)


CLAIM = Claim("rates", Config, _cells, _measure, _table, _draw)
