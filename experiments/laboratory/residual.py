"""The residual channel: what rounding the ends of a query adds to the estimate made of it.

Yao Shu and Zilin Zhu, "Compander-Aligned Query Geometry for Quantized Zeroth-Order Optimization",
2026, arXiv:2605.10673. An optimizer asks for the loss at x +- mu u and hears that of the rounded
ends. Its estimate (l+ - l-) / (2 mu) u differs from what it asked for by a residual, of mean square
proportional to Delta^2 / mu^2, which queries of whole codes do not have.
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
from experiments.laboratory import problems
from experiments.laboratory.claim import Cell, Claim, Measurement
from zoqo_jax import companders

__all__ = ["CLAIM", "Config", "between", "end", "slope"]

_COMPANDERS = {
    "uniform": companders.identity(),
    "mu-law": companders.mu_law(),
    "power": companders.power(),
    "gaussian": companders.gaussian(),
    "nf4": companders.nf4(),
}
_LOSSES = ("quadratic", "logistic")
_RADII = np.geomspace(1 / 8, 8, 13)  # in mean grid steps
_FITTED = slice(6, 11)  # 1 to 4 steps: ends leave their cell, and seldom reach the grid's edge
_QUERIES = ("z", "weights", "signs", "aligned")
_FRACTIONS = (0.03, 0.05, 0.1, 0.15, 0.3)  # of the largest level: radii of off-grid descents
_DESCENTS = ("masked", "clamped", *(f"off grid, {fraction:g}" for fraction in _FRACTIONS))
_RATES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # each query descends at its best of these


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      grids: of uniform, mu-law, power, gaussian and nf4.
      bits: of the grids whose residual is measured, 3 to 8; nf4 has 4, and so do all in descents.
      dimension: weights of a problem.
      examples: of the logistic regression.
      draws: queries at each radius, for each seed.
      steps: of a descent, two evaluations each.
      runs: descents for each seed, each on a problem of its own.
      seeds: how many.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    grids: tuple[str, ...] = tuple(_COMPANDERS)
    bits: tuple[int, ...] = (3, 4, 6, 8)
    dimension: int = 16
    examples: int = 256
    draws: int = 4096
    steps: int = 4000
    runs: int = 8
    seeds: int = 3

    def __post_init__(self) -> None:
        """Check."""
        least = {"dimension": 2, "examples": 1, "draws": 1, "steps": 10, "runs": 1, "seeds": 1}
        settings.check(self, least=least)
        if bad := [name for name in self.grids if name not in _COMPANDERS]:
            raise ValueError(f"grids must be of {tuple(_COMPANDERS)}, got {bad[0]!r}.")
        if bad := [bits for bits in self.bits if not 3 <= bits <= 8]:
            raise ValueError(f"bits must be in [3, 8], got {bad[0]}.")


def _cells(config: Config) -> list[Cell]:
    widths = {grid: config.bits if grid != "nf4" else (4,) for grid in config.grids}
    residuals = [("residual", grid, bits) for grid in config.grids for bits in widths[grid]]
    descents = [("descent", grid, 4) for grid in config.grids]
    return [
        {"part": part, "grid": grid, "bits": bits, "loss": loss}
        for part, grid, bits in residuals + descents
        for loss in _LOSSES
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    quantizer = zq.Quantizer(cell["bits"], _COMPANDERS[cell["grid"]], range=1.0)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    if cell["part"] == "descent":
        return _descents(config, cell["loss"], quantizer, keys)
    found: dict[str, Any] = {"radii": _RADII}
    for query in _QUERIES:
        curves = np.asarray(_residuals(config, cell["loss"], quantizer, query, keys))
        found[query] = curves.mean(axis=0)
        if query != "aligned":
            found[f"{query}_slopes"] = [slope(_RADII, one) for one in curves]
    array = quantizer(jnp.zeros(1))  # of which the table is no more than its grid
    spans = [zq.diagnose(array, radius * array.step.item()).leaves[0].codes for radius in _RADII]
    return {**found, "spans": [one.shares for one in spans]}


# The residual of an estimate


def end(quantizer: zq.Quantizer, codes: Array, move: Array, query: str) -> tuple[Array, Array]:
    """The levels that one end of a query asks for, and those that an engine answers for.

    Args:
      quantizer: of the weights; what is asked for beyond its grid is asked for at the edge.
      codes: where the weights are.
      move: in mean steps of the grid.
      query: "z" moves in z, where a step is a code; "aligned" by one code each in that direction;
        any other moves the weights.

    Example:
      >>> for query in ("z", "aligned", "weights"):
      ...     print(*end(zq.nf4(), jnp.array([14]), jnp.array([-0.7]), query))
      [0.6107...] [0.562617]
      [0.562617] [0.562617]
      [0.6296...] [0.562617]
    """
    grid = quantizer.grid
    if query == "z":
        place = jnp.clip(codes.astype(jnp.float32) + move, grid.low, grid.high)
        return between(quantizer, place), grid.at(jnp.round(place).astype(jnp.int32))
    if query == "aligned":
        asked = grid.at(codes + jnp.sign(move).astype(codes.dtype))
    else:
        asked = grid.at(codes) + move * np.float32(grid.spacing)
        asked = jnp.clip(asked, grid.levels[grid.low], grid.levels[grid.high])
    return asked, grid.at(grid.nearest(asked))


def between(quantizer: zq.Quantizer, place: Array) -> Array:
    """The level at a place in z that need not be a code's.

    Example:
      >>> between(zq.nf4(), jnp.array([7.0, 7.5, 8.0])).round(3).tolist()
      [0.0, 0.04, 0.08]
    """
    grid, compander = quantizer.grid, quantizer.compander
    if grid.is_uniform:
        return place + grid.levels[0]
    if compander.levels is None:
        place = (place - 2.0 ** (quantizer.bits - 1)) * np.float32(2 / (2**quantizer.bits - 1))
    return compander.inverse(place)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _residuals(
    config: Config, loss: str, quantizer: zq.Quantizer, query: str, keys: Array
) -> Array:
    """Mean squared residual, over the mean square of what a short query asks for.

    Returns:
      For every seed and radius.
    """
    low, high, shape = quantizer.grid.low, quantizer.grid.high, (config.dimension,)
    third = (high - low) // 3
    scale = quantizer(jnp.zeros(1)).scale

    def squares(loss_fn: Any, radius: Array, key: Array) -> tuple[Array, Array]:
        code_key, direction_key, radius_key = jax.random.split(key, 3)
        codes = jax.random.randint(code_key, shape, low + third, high - third + 1)
        if query == "signs":  # from codes of a uniform grid, one radius has one rounding error
            u = jax.random.rademacher(direction_key, shape, jnp.float32)
            spread = jnp.minimum(radius, 1.0)
            radius = radius + spread * jax.random.uniform(radius_key, (), minval=-0.5, maxval=0.5)
        else:
            u = jax.random.normal(direction_key, shape)
        up, down = (end(quantizer, codes, side * radius * u, query) for side in (1.0, -1.0))
        asked, heard = (
            loss_fn(scale * plus) - loss_fn(scale * minus)
            for plus, minus in zip(up, down, strict=True)
        )
        weight = (u @ u) / (2 * radius) ** 2
        return (heard - asked) ** 2 * weight, asked**2 * weight

    def of_seed(key: Array) -> Array:
        problem_key, draw_key = jax.random.split(key)
        problem = _problem(config, loss, problem_key)
        keys = jax.random.split(draw_key, config.draws)

        def at(radius: Array) -> tuple[Array, Array]:
            residual, asked = jax.vmap(lambda key: squares(problem.loss, radius, key))(keys)
            return residual.mean(), asked.mean()

        residual, asked = jax.lax.map(at, jnp.asarray(_RADII, jnp.float32))
        return residual / asked[0]

    return jax.lax.map(of_seed, keys)


def slope(radii: np.ndarray, residuals: np.ndarray) -> float:
    """Of log residual over log radius, from one to four steps of the grid.

    Example:
      >>> radii = np.geomspace(1 / 8, 8, 13)
      >>> round(slope(radii, 3.0 / radii**2), 6)
      -2.0
    """
    return float(np.polyfit(np.log(radii[_FITTED]), np.log(residuals[_FITTED]), 1)[0])


def _problem(config: Config, loss: str, key: Array) -> problems.Problem:
    if loss == "quadratic":
        return problems.quadratic(key, config.dimension, condition=10.0)
    return problems.logistic(key, config.dimension, examples=config.examples)


# Descents


def _descents(config: Config, loss: str, quantizer: zq.Quantizer, keys: Array) -> dict[str, Any]:
    """Excess loss of a descent's last tenth over that of the rounded optimum, by seed."""

    def ratio(key: Array, rate: Array, radius: Array, **query: Any) -> Array:
        problem_key, run_key = jax.random.split(key)
        problem = _problem(config, loss, problem_key)
        start = quantizer(jnp.zeros(config.dimension))
        unit = rate / (start.step.squeeze() ** 2 * jnp.trace(problem.hessian))
        if query.get("query") == "off_grid":
            query["radius"] = lambda _: radius
        # Rounding the update at random would drown what rounding the queries costs.
        query |= {"key": run_key, "rounding": "error_feedback"}
        tx = zq.caq_zo(problems.falling(unit, config.steps), **query)
        excess = lambda params: problem.loss(zq.dequantize(params))  # noqa: E731
        _, losses = problems.descend(
            tx, problem.loss, (start, tx.init(start)), config.steps, excess
        )
        return losses[-config.steps // 10 :].mean() / excess(quantizer(problem.optimum))

    runs = jax.vmap(lambda key: jax.random.split(key, config.runs))(keys).reshape(-1)
    rates = jnp.asarray(_RATES, jnp.float32)

    def at_best_rates(radii: tuple[float, ...], **query: Any) -> list[tuple[np.ndarray, float]]:
        one = functools.partial(ratio, **query)
        each = jax.vmap(jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, None)), (None, None, 0))
        ratios = np.asarray(jax.jit(each)(runs, rates, jnp.asarray(radii, jnp.float32)))
        by_seed = ratios.reshape(len(radii), len(_RATES), config.seeds, -1).mean(axis=-1)
        best = by_seed.mean(axis=-1).argmin(axis=-1)
        return [(ratios[i], _RATES[i]) for ratios, i in zip(by_seed, best, strict=True)]

    found = [
        *at_best_rates((0.0,), boundary="mask"),
        *at_best_rates((0.0,), boundary="clamp"),
        *at_best_rates(_FRACTIONS, query="off_grid"),
    ]
    return {"excess": [ratios for ratios, _ in found], "rates": [rate for _, rate in found]}


# What is shown


def _table(found: list[Measurement]) -> str:
    residuals = [one for one in found if one["part"] == "residual"]
    head = ["grid", "bits", "loss", "slope, z", "slope, weights", "slope, signs", "aligned"]
    rows = [
        [one["grid"], str(one["bits"]), one["loss"]]
        + [markdown.interval(one[f"{query}_slopes"], 2) for query in ("z", "weights", "signs")]
        + [f"{max(one['aligned']):.1f}"]
        for one in residuals
    ]
    slopes = markdown.table(head, rows)

    of_grids = [one for one in residuals if one["loss"] == residuals[0]["loss"]]
    head = ["grid", "bits", "radius of most aligned codes", "collapsed", "one-sided", "aligned"]
    rows = []
    for one in of_grids:
        best = int(np.argmax([span[2] for span in one["spans"]]))
        shares = [f"{100 * share:.0f} %" for share in one["spans"][best]]
        radius = f"{one['radii'][best]:.2f} steps"
        rows.append([one["grid"], str(one["bits"]), radius, *shares])
    spans = markdown.table([*head, "over-spanning"], rows)

    head = ["grid", "loss", *_DESCENTS]
    rows = [
        [one["grid"], one["loss"], *(markdown.interval(ratios, 2) for ratios in one["excess"])]
        for one in found
        if one["part"] == "descent"
    ]
    return "\n\n".join([slopes, spans, markdown.table(head, rows)])


def _draw(found: list[Measurement], fig: Any) -> None:
    left, middle, right = fig.subplots(1, 3)
    first = [one for one in found if one["loss"] == found[0]["loss"]]
    residuals = [one for one in first if one["part"] == "residual"]
    finest = {one["grid"]: one for one in residuals}  # the last has most bits
    for color, one in enumerate(finest.values()):
        name = f"{one['grid']}, {one['bits']} bit"
        left.loglog(one["radii"], one["z"], "o-", ms=3, color=f"C{color}", label=name)
        left.loglog(one["radii"], one["weights"], ":", color=f"C{color}")
    left.loglog(_RADII, 1 / (12 * _RADII**2), color="black", lw=0.8, label="$1 / (12 \\mu^2)$")
    left.set_xlabel("radius $\\mu$, grid steps (dotted: of the weights)")
    left.set_ylabel("squared residual / squared estimate")
    left.legend(fontsize=7)

    crookedest = [one for one in residuals if one["bits"] == 4][-1:] or residuals[-1:]
    for one in crookedest:
        shares = 100 * np.asarray(one["spans"]).T
        names = ("collapsed", "one-sided", "aligned", "over-spanning")
        middle.stackplot(one["radii"], shares, labels=names, alpha=0.8)
        middle.set_title(f"{one['grid']}, {one['bits']} bit", fontsize=10)
    middle.set_xlabel("radius in weights, mean grid steps")
    middle.set_ylabel("share of the codes, %")
    middle.legend(fontsize=7, loc="upper left")

    for color, one in enumerate(one for one in first if one["part"] == "descent"):
        ratios = [np.mean(each) for each in one["excess"]]
        right.plot(_DESCENTS, ratios, "o-", ms=4, color=f"C{color}", label=one["grid"])
    right.set_yscale("log")
    right.tick_params(axis="x", rotation=60, labelsize=8)
    right.set_ylabel("excess loss / that of the rounded optimum")
    right.legend(fontsize=7)
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)


CLAIM = Claim("residual", Config, _cells, _measure, _table, _draw)
