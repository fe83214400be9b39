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
from experiments import drawing, markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.convex import descents, problems, residuals
from experiments.laboratory.pages import grouped
from zoqo_jax.grids import companders

__all__ = ["CLAIM", "Config", "slope"]

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
_SPANS = ("collapsed", "one-sided", "aligned", "over-spanning")  # of codes, by `zq.diagnose`
_FRACTIONS = (0.03, 0.05, 0.1, 0.15, 0.3)  # of the largest level: radii of off-grid descents
_DESCENTS = ("masked", "clamped", *(f"off grid, {fraction:g}" for fraction in _FRACTIONS))


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
        settings.check(self, least=least, within={"bits": (3, 8)})
        if bad := [name for name in self.grids if name not in _COMPANDERS]:
            raise ValueError(f"grids must be of {tuple(_COMPANDERS)}, got {bad[0]!r}.")


def _cells(config: Config) -> list[Cell]:
    widths = {grid: config.bits if grid != "nf4" else (4,) for grid in config.grids}
    parts = [("residual", grid, bits) for grid in config.grids for bits in widths[grid]]
    parts += [("descent", grid, 4) for grid in config.grids]
    return [
        {"part": part, "grid": grid, "bits": bits, "loss": loss}
        for part, grid, bits in parts
        for loss in _LOSSES
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    quantizer = zq.Quantizer(cell["bits"], _COMPANDERS[cell["grid"]], range=1.0)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    if cell["part"] == "descent":
        return _descents(config, cell["loss"], quantizer, keys)
    found: dict[str, Any] = {"radii": _RADII}
    by_query = _residuals(config, cell["loss"], quantizer, keys)
    for query, curves in jax.tree.map(np.asarray, by_query).items():
        found[query] = curves.mean(axis=0)
        if query != "aligned":
            found[f"{query}_slopes"] = [slope(_RADII, one) for one in curves]
    array = quantizer(jnp.zeros(1))  # of which the table is no more than its grid
    spans = [zq.diagnose(array, radius * array.step.item()).leaves[0].codes for radius in _RADII]
    return {**found, "spans": [one.shares for one in spans]}


# The residual of an estimate


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _residuals(config: Config, loss: str, quantizer: zq.Quantizer, keys: Array) -> dict[str, Array]:
    """For each query, the residuals of every seed at every radius."""

    def of_seed(query: str, key: Array) -> Array:
        problem_key, draw_key = jax.random.split(key)
        problem = _problem(config, loss, problem_key)
        draws = jax.random.split(draw_key, config.draws)
        radii = jnp.asarray(_RADII, jnp.float32)
        return residuals.relative(problem, quantizer, query, radii, draws)

    return {
        query: jax.lax.map(functools.partial(of_seed, query), keys) for query in residuals.QUERIES
    }


def slope(radii: np.ndarray, squares: np.ndarray) -> float:
    """Of log residual over log radius, from one to four steps of the grid.

    Where all ends are cut off at the edges, which are codes, there is no residual, and no point.

    Example:
      >>> radii = np.geomspace(1 / 8, 8, 13)
      >>> round(slope(radii, 3.0 / radii**2), 6)
      -2.0
    """
    radii, squares = radii[_FITTED], squares[_FITTED]
    some = squares > 0
    return float(np.polyfit(np.log(radii[some]), np.log(squares[some]), 1)[0])


def _problem(config: Config, loss: str, key: Array) -> problems.Problem:
    if loss == "quadratic":
        return problems.quadratic(key, config.dimension, condition=10.0)
    return problems.logistic(key, config.dimension, examples=config.examples)


# Descents


def _descents(config: Config, loss: str, quantizer: zq.Quantizer, keys: Array) -> dict[str, Any]:
    """Excess loss of a descent's last tenth over that of the rounded optimum, by seed."""
    runs = jax.vmap(lambda key: jax.random.split(key, config.runs))(keys).reshape(-1)

    def ratio(key: Array, rate: Array, radius: Array, **query: Any) -> Array:
        problem_key, run_key = jax.random.split(key)
        problem = _problem(config, loss, problem_key)
        start = quantizer(jnp.zeros(config.dimension))
        unit = rate / (start.step.squeeze() ** 2 * jnp.trace(problem.hessian))
        if query.get("query") == "off_grid":
            query["radius"] = lambda _: radius
        # Rounding the update at random would drown what rounding the queries costs.
        query |= {"key": run_key, "rounding": "error_feedback"}
        tx = zq.caq_zo(descents.falling(unit, config.steps), **query)
        excess = lambda params: problem.loss(zq.dequantize(params))  # noqa: E731
        losses = descents.descend(tx, problem.loss, start, config.steps, excess)
        return losses[-config.steps // 10 :].mean() / excess(quantizer(problem.optimum))

    def at_best_rates(radii: tuple[float, ...], **query: Any) -> list[tuple[np.ndarray, float]]:
        """For each radius, what each seed came to at the best rate, and that rate."""
        one = functools.partial(ratio, **query)
        ratios = descents.at_each_rate(one, runs, jnp.asarray(radii, jnp.float32))
        by_seed = ratios.reshape(len(radii), len(descents.RATES), config.seeds, -1).mean(axis=-1)
        best = by_seed.mean(axis=-1).argmin(axis=-1)
        return [(one[i], descents.RATES[i]) for one, i in zip(by_seed, best, strict=True)]

    found = [
        *at_best_rates((0.0,), boundary="mask"),
        *at_best_rates((0.0,), boundary="clamp"),
        *at_best_rates(_FRACTIONS, query="off_grid"),
    ]
    return {"excess": [ratios for ratios, _ in found], "rates": [rate for _, rate in found]}


# What is shown


def _table(found: list[Measurement]) -> str:
    by_part = grouped(found, "part")
    measured = by_part[("residual",)]
    head = ["grid", "bits", "loss", "slope, z", "slope, weights", "slope, signs", "aligned"]
    rows = [
        [one["grid"], str(one["bits"]), one["loss"]]
        + [markdown.interval(one[f"{query}_slopes"], 2) for query in ("z", "weights", "signs")]
        + [f"{max(one['aligned']):.1f}"]
        for one in measured
    ]
    slopes = markdown.table(head, rows)

    head = ["grid", "bits", "radius of most aligned codes", *_SPANS]
    rows = []
    for (grid, bits), (one, *_) in grouped(measured, "grid", "bits").items():
        best = int(np.argmax([span[2] for span in one["spans"]]))
        shares = [f"{100 * share:.0f} %" for share in one["spans"][best]]
        rows.append([grid, str(bits), f"{one['radii'][best]:.2f} steps", *shares])
    spans = markdown.table(head, rows)

    head = ["grid", "loss", *_DESCENTS]
    rows = [
        [one["grid"], one["loss"], *(markdown.interval(ratios, 2) for ratios in one["excess"])]
        for one in by_part[("descent",)]
    ]
    return "\n\n".join([slopes, spans, markdown.table(head, rows)])


def _draw(found: list[Measurement], fig: Any) -> None:
    fig.set_size_inches(9.0, 5.0)
    left, middle, right = fig.subplots(1, 3)
    by_part = grouped([one for one in found if one["loss"] == found[0]["loss"]], "part")
    measured = by_part[("residual",)]
    _draw_residuals(measured, left)
    _draw_spans(([one for one in measured if one["bits"] == 4] or measured)[-1], middle)
    for one in by_part[("descent",)]:
        ratios = [np.mean(each) for each in one["excess"]]
        number = list(grouped(measured, "grid")).index((one["grid"],))
        right.plot(_DESCENTS, ratios, label=one["grid"], **drawing.style(number))
    right.set_yscale("log")
    right.tick_params(axis="x", rotation=60, labelsize=8)
    right.set_ylabel("excess loss / that of the rounded optimum")
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    names = left.get_legend_handles_labels()
    fig.legend(*names, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _draw_residuals(measured: list[Measurement], axis: Any) -> None:
    """Of each grid at its most bits, which come last."""
    for i, ((grid,), (*_, one)) in enumerate(grouped(measured, "grid").items()):
        name = f"{grid}, {one['bits']} bit"
        style = drawing.style(i)
        axis.loglog(one["radii"], one["z"], label=name, **style)
        faint = {**style, "linestyle": ":", "markerfacecolor": "none", "lw": 0.9}
        axis.loglog(one["radii"], one["weights"], **faint)
    axis.loglog(_RADII, 1 / (12 * _RADII**2), color="black", lw=0.8, label="$1 / (12 \\mu^2)$")
    axis.set_xlabel("radius $\\mu$, grid steps (hollow: of the weights)")
    axis.set_ylabel("squared residual / squared estimate")


def _draw_spans(one: Measurement, axis: Any) -> None:
    shares = 100 * np.asarray(one["spans"]).T
    areas = axis.stackplot(
        one["radii"],
        shares,
        colors=["0.35", "0.6", "0.8", "0.95"],
        hatch=["", "//", "", ".."],
        edgecolor="black",
        linewidth=0.5,
    )
    names = dict(zip(_SPANS, areas, strict=True))
    axis.legend(
        names.values(), names, loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=2, fontsize=7
    )
    axis.set_title(f"{one['grid']}, {one['bits']} bit", fontsize=10)
    axis.set_xlabel("radius in weights, mean grid steps")
    axis.set_ylabel("share of the codes, %")


CLAIM = Claim("residual", Config, _cells, _measure, _table, _draw)
