"""Rates: squared gradient norms against steps, on the way down to the grid's floor.

For smooth functions, zeroth-order gradient descent of T steps brings the mean squared gradient of
its iterates to O(sqrt(d / T)) in general and to O(d / T) where they are convex and evaluated
without noise (Nesterov and Spokoiny, "Random gradient-free minimization of convex functions",
Foundations of Computational Mathematics 17, 2017). Neither ZOQO's paper (arXiv:2501.06736) nor any
other known to us says what becomes of that on a grid with a method of signs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.attack import data
from experiments.laboratory import problems
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.descents import FLOATS, METHODS, make
from zoqo_jax.certificates import gradient_floor

__all__ = ["CLAIM", "Config", "digits", "exponent"]

_RATES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # each method descends at its best of these
_POINTS = 60  # of a curve
_NEAR = 2.0  # times the plateau: there a descent has reached it
_POOLED = 4  # pixels on a side that become one


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
        settings.check(self, least=least, positive=("decay",))
        if bad := [bits for bits in self.bits if not 2 <= bits <= 8]:
            raise ValueError(f"bits must be in [2, 8], got {bad[0]}.")


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
        "rate": _RATES[best],
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
        tx = make(
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

        _, squares = problems.descend(
            tx, problem.loss, (params, tx.init(params)), config.steps, square
        )
        means = jnp.cumsum(squares) / jnp.arange(1, config.steps + 1, dtype=jnp.float32)
        floor = gradient_floor(spacing, problem.hessian)
        return means[points], squares[-config.steps // 10 :].mean(), floor

    each = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
    means, ends, floors = map(np.asarray, each(keys, jnp.asarray(_RATES, jnp.float32)))
    return means, ends, floors[0]


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


# The problems


def _problem(
    config: Config, name: str, key: Array
) -> tuple[problems.Problem, float, Array | float]:
    """A problem, how far its grid reaches, and the greatest trace of its Hessian."""
    if name == "quadratic":
        problem = problems.quadratic(key, config.dimension, condition=10.0)
        return problem, 1.0, jnp.trace(problem.hessian)
    features, labels, optimum, hessian = digits(config.images, config.decay)
    x, y = jnp.asarray(features), jnp.asarray(labels)

    def loss(w: Array) -> Array:
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 * config.decay * (w @ w)

    least = loss(jnp.asarray(optimum))
    problem = problems.Problem(
        lambda w: loss(w) - least, jnp.asarray(optimum), jnp.asarray(hessian)
    )
    trace = (features**2).sum() / (4 * len(features)) + config.decay * features.shape[1]
    return problem, 1.2 * float(np.abs(optimum).max()), float(trace)


@functools.lru_cache
def digits(images: int, decay: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logistic regression that tells even digits from odd ones, of the bundled MNIST images.

    Returns:
      Features, 49 pooled pixels of mean 0 and a 1; labels, 1 or -1; the optimum, by Newton's
      method; and the Hessian there.

    Example:
      >>> features, labels, optimum, hessian = digits(200, 0.01)
      >>> chances = 1 / (1 + np.exp(labels * (features @ optimum)))
      >>> gradient = 0.01 * optimum - features.T @ (labels * chances) / 200
      >>> features.shape, bool(np.abs(gradient).max() < 1e-6)
      ((200, 50), True)
    """
    pictures, classes = data.load("mnist")
    side = pictures.shape[1] // _POOLED
    pooled = pictures[:images].reshape(-1, side, _POOLED, side, _POOLED).mean(axis=(2, 4))
    x = pooled.reshape(len(pooled), -1).astype(np.float64)
    x = np.append(x - x.mean(axis=0), np.ones((len(x), 1)), axis=1)
    y = np.where(classes[:images] % 2 == 0, 1.0, -1.0)
    w = np.zeros(x.shape[1])
    for _ in range(20):
        chances = 1 / (1 + np.exp(y * (x @ w)))
        gradient = decay * w - x.T @ (y * chances) / len(x)
        hessian = decay * np.eye(len(w)) + x.T @ (x * (chances * (1 - chances))[:, None]) / len(x)
        w = w - np.linalg.solve(hessian, gradient)
    features, labels, optimum, hessian = (one.astype(np.float32) for one in (x, y, w, hessian))
    return features, labels, optimum, hessian


# What is shown


def _table(found: list[Measurement]) -> str:
    widths = sorted({one["bits"] for one in found if one["method"] != FLOATS})
    at = {(one["problem"], one["method"], one["bits"]): one for one in found}
    named = [*(f"exponent, {bits} bit" for bits in widths)]
    named += [f"plateau / floor, {bits} bit" for bits in widths]
    rows = []
    for problem in dict.fromkeys(one["problem"] for one in found):
        for method in dict.fromkeys(one["method"] for one in found):
            own = [at.get((problem, method, bits)) for bits in widths]
            if method == FLOATS:
                own = [at.get((problem, method, 32)), *(None for _ in widths[1:])]
            exponents = [_exponents(one) for one in own]
            plateaus = ["" if method == FLOATS else _plateau(one) for one in own]
            rows.append([f"{problem}, {method}", *exponents, *plateaus])
    return markdown.table(["problem, method", *named], rows)


def _exponents(one: Measurement | None) -> str:
    if one is None:
        return ""
    fitted = [each for each in one["exponents"] if each is not None]
    return markdown.interval(fitted, 2) if fitted else "none"


def _plateau(one: Measurement | None) -> str:
    if one is None:
        return ""
    ratios = np.asarray(one["plateau"]) / np.asarray(one["floor"])
    return markdown.interval(ratios.tolist(), 1)


def _draw(found: list[Measurement], fig: Any) -> None:
    names = list(dict.fromkeys(one["problem"] for one in found))
    finest = max(one["bits"] for one in found if one["method"] != FLOATS)
    for axis, problem in zip(np.ravel(fig.subplots(1, len(names))), names, strict=True):
        for i, method in enumerate((*METHODS, FLOATS)):
            for one in found:
                if (one["problem"], one["method"]) != (problem, method):
                    continue
                if one["bits"] not in (finest, 32):
                    continue
                style = "k:" if method == FLOATS else f"C{i}-"
                axis.loglog(one["steps"], one["curve"], style, lw=1.2, label=method)
                if i == 0:
                    axis.axhline(np.mean(one["floor"]), color="gray", lw=0.8)
                    steps, first = np.asarray(one["steps"]), one["curve"][0]
                    axis.loglog(steps, first * steps**-0.5, "--", color="gray", lw=0.8)
                    axis.loglog(steps, first * steps**-1.0, "--", color="gray", lw=0.8)
        axis.set_title(
            f"{problem}, {finest} bit (gray: floor, $T^{{-1/2}}$, $T^{{-1}}$)", fontsize=9
        )
        axis.set_xlabel("steps T")
        axis.set_ylabel("mean squared gradient of T steps")
        axis.grid(alpha=0.3)
    fig.axes[0].legend(fontsize=6)


CLAIM = Claim("rates", Config, _cells, _measure, _table, _draw)
