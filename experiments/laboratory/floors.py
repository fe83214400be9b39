"""Floors: how good a state of a grid can be, and how close each method gets.

Rounding the optimum of a quadratic of Hessian H to a grid of spacing Delta leaves a mean excess
loss of Delta^2 tr(H) / 24 and a mean squared gradient of Delta^2 tr(H^2) / 12 (see
`zoqo_jax.analysis.certificates`). A method that learns from queries does not stay at the best code
either: it swings about it, which costs some times the floor.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.convex import descents, problems
from experiments.laboratory.convex.descents import METHODS
from experiments.laboratory.pages import grouped
from zoqo_jax.analysis.certificates import gradient_floor, loss_floor

__all__ = ["CLAIM", "Config", "swings"]

_CONDITION = 10.0
_KINDS = ("loss", "gradient")  # of floors


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      dimensions: of the quadratics whose floors are measured.
      bits: of the grids whose floors are measured, 2 to 8.
      draws: optima rounded for each of them, in thousands, each thousand of another Hessian.
      dimension: of the quadratics that methods descend on.
      descent_bits: of the grids that they descend on, 2 to 8.
      steps: of a descent, two evaluations each; it is judged by the last quarter.
      runs: descents for each seed, each on a quadratic of its own.
      seeds: how many.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    dimensions: tuple[int, ...] = (16, 64, 256)
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    draws: int = 16
    dimension: int = 16
    descent_bits: tuple[int, ...] = (4, 8)
    steps: int = 16_000
    runs: int = 8
    seeds: int = 3

    def __post_init__(self) -> None:
        """Check."""
        least = {"draws": 1, "dimension": 2, "dimensions": 2, "steps": 8, "runs": 1, "seeds": 1}
        settings.check(self, least=least, within={"bits": (2, 8), "descent_bits": (2, 8)})


def _cells(config: Config) -> list[Cell]:
    cells: list[Cell] = [
        {"part": "floor", "bits": bits, "dimension": d}
        for bits in config.bits
        for d in config.dimensions
    ]
    cells += [
        {"part": "descent", "method": method, "bits": bits, "structure": structure}
        for bits in config.descent_bits
        for structure in ("sparse", "dense")
        for method in METHODS
    ]
    return cells


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    if cell["part"] == "floor":
        return _floors(config, cell["bits"], cell["dimension"])
    return _descents(config, cell["method"], cell["bits"], cell["structure"])


# The floor of a grid


def _floors(config: Config, bits: int, dimension: int) -> dict[str, Any]:
    """What rounding a uniformly placed optimum leaves, over what the law says it does."""
    quantizer, spacing = zq.Quantizer(bits, range=1.0), 2 / (2**bits - 1)

    def ratios(key: Array) -> tuple[Array, Array]:
        hessian_key, optimum_key = jax.random.split(key)
        hessian = problems.quadratic(hessian_key, dimension, condition=_CONDITION).hessian
        optima = jax.random.uniform(optimum_key, (1000, dimension), minval=-1.0, maxval=1.0)
        errors = zq.dequantize(quantizer(optima)) - optima
        gradients = errors @ hessian
        excess, squares = 0.5 * (gradients * errors).sum(axis=-1), (gradients**2).sum(axis=-1)
        floors = loss_floor(spacing, hessian), gradient_floor(spacing, hessian)
        return excess.mean() / floors[0], squares.mean() / floors[1]

    keys = jax.random.split(jax.random.key(0), config.draws)
    found = map(np.asarray, jax.jit(lambda keys: jax.lax.map(ratios, keys))(keys))
    return dict(zip(_KINDS, found, strict=True))


# Descents


def _descents(config: Config, method: str, bits: int, structure: str) -> dict[str, Any]:
    """The loss of the last quarter of a descent over the floor, and how its codes swing then."""
    d, spacing = config.dimension, 2 / (2**bits - 1)
    quantizer, last = zq.Quantizer(bits, range=1.0), config.steps // 4

    def descend(key: Array, rate: Array) -> tuple[Array, ...]:
        problem_key, run_key = jax.random.split(key)
        problem = problems.quadratic(problem_key, d, condition=_CONDITION)
        tx = descents.make(
            method,
            descents.falling(rate, config.steps),
            key=run_key,
            spacing=spacing,
            trace=jnp.trace(problem.hessian),
            density=1 / d if structure == "sparse" else 1.0,
        )

        def excess_and_codes(params: Any) -> tuple[Array, Array]:
            return problem.loss(zq.dequantize(params)), params.codes

        start = quantizer(jnp.zeros(d))
        losses, codes = descents.descend(tx, problem.loss, start, config.steps, excess_and_codes)
        floor = loss_floor(spacing, problem.hessian)
        span, turns = swings(codes[-last:])
        least = losses[-last:].min()  # no mean of what lies above it rounds to less
        end = least + (losses[-last:] - least).mean()
        return end / floor, losses.min() / floor, span.mean(), turns.sum()

    keys = jax.random.split(jax.random.key(1), config.seeds * config.runs)
    shape = (len(descents.RATES), config.seeds, config.runs)
    end, best, span, turns = (
        np.asarray(one, np.float64).reshape(shape) for one in descents.at_each_rate(descend, keys)
    )
    i = int(end.mean(axis=(1, 2)).argmin())
    return {
        "rate": descents.RATES[i],
        "end": end[i].mean(axis=-1),
        "best": best[i].mean(axis=-1),
        "span": span[i].mean(),
        "period": 2 * last * d * turns[i].size / turns[i].sum() if turns[i].any() else None,
    }


def swings(codes: Array) -> tuple[Array, Array]:
    """How far each of some codes ranges along the steps, and how often it turns back.

    There and back is two turns, so that a code's period is twice the steps over its turns.

    Example:
      >>> codes = jnp.array([[1, 5], [2, 5], [2, 5], [1, 6], [2, 7]])
      >>> [x.tolist() for x in swings(codes)]
      [[1, 2], [2, 0]]
    """
    codes = codes.astype(jnp.int32)
    moves = jnp.sign(jnp.diff(codes, axis=0))

    def turn(last: Array, move: Array) -> tuple[Array, Array]:
        return jnp.where(move != 0, move, last), last * move < 0

    _, turned = jax.lax.scan(turn, jnp.zeros_like(codes[0]), moves)
    return codes.max(axis=0) - codes.min(axis=0), turned.sum(axis=0, dtype=jnp.int32)


# What is shown


def _table(found: list[Measurement]) -> str:
    by_part = grouped(found, "part")
    floors, descended = by_part[("floor",)], by_part[("descent",)]
    dimensions = [d for (d,) in grouped(floors, "dimension")]
    head = ["bits", *(f"{kind}, d = {d}" for kind in _KINDS for d in dimensions)]
    rows = [
        [str(bits), *(markdown.interval(one[kind], 3) for kind in _KINDS for one in mine)]
        for (bits,), mine in grouped(floors, "bits").items()
    ]
    law = markdown.table(head, rows)
    head = "method|directions|bits|loss / floor|best visited|span|period|rate"
    rows = [
        [
            one["method"],
            one["structure"],
            str(one["bits"]),
            markdown.interval(one["end"], 2),
            markdown.interval(one["best"], 2),
            f"{one['span']:.1f}",
            "rests" if one["period"] is None else f"{one['period']:.0f}",
            f"{one['rate']:g}",
        ]
        for one in descended
    ]
    return f"{law}\n\n{markdown.table(head.split('|'), rows)}"


def _draw(found: list[Measurement], fig: Any) -> None:
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.6))
    by_part = grouped(found, "part")
    for i, ((d,), mine) in enumerate(grouped(by_part[("floor",)], "dimension").items()):
        for kind, style in zip(_KINDS, ("o-", "s:"), strict=True):
            ratios = [np.mean(one[kind]) for one in mine]
            label = f"{kind}, d = {d}"
            left.plot([one["bits"] for one in mine], ratios, style, color=f"C{i}", label=label)
    left.axhspan(0.98, 1.02, color="gray", alpha=0.2)
    left.set_ylim(0.95, 1.05)
    left.set_xlabel("bits")
    left.set_ylabel("rounded optimum / law")
    left.legend(fontsize=7)
    ways = grouped(by_part[("descent",)], "structure", "bits")
    for i, (structure, bits) in enumerate(sorted(ways, reverse=True)):
        mine = ways[structure, bits]
        places = [METHODS.index(one["method"]) + 0.2 * (i - 1.5) for one in mine]
        ends = [np.mean(one["end"]) for one in mine]
        right.bar(places, ends, 0.18, label=f"{structure}, {bits} bit")
    right.axhline(1.0, color="black", lw=0.8)
    right.set_yscale("log")
    right.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right", fontsize=7)
    right.set_ylabel("excess loss / the grid's floor")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)


CLAIM = Claim("floors", Config, _cells, _measure, _table, _draw)
