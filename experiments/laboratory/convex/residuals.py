"""What rounding the ends of a query adds to the estimate made of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

import zoqo_jax as zq
from experiments.laboratory.convex.problems import Problem

__all__ = ["QUERIES", "between", "end", "relative"]

QUERIES = ("z", "weights", "signs", "aligned")
"""Along Gaussian directions in z, in weights, along random signs in weights, and of whole codes."""


def relative(
    problem: Problem,
    quantizer: zq.Quantizer,
    query: str,
    radii: Float[Array, " radii"],
    keys: Key[Array, " draws"],
) -> Float[Array, " radii"]:
    """Mean squared residual, over the mean square of what a query of the first radius asks for.

    Args:
      problem: whose loss is asked for.
      quantizer: of the weights; a query starts in the middle third of its grid.
      query: one of `QUERIES`.
      radii: in mean steps of the grid.
      keys: of what is drawn, the same at all radii.
    """
    shape = problem.optimum.shape
    low, high = quantizer.grid.low, quantizer.grid.high
    third = (high - low) // 3
    scale = quantizer(jnp.zeros(1)).scale

    def squares(radius: Array, key: Array) -> tuple[Array, Array]:
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
            problem.loss(scale * plus) - problem.loss(scale * minus)
            for plus, minus in zip(up, down, strict=True)
        )
        weight = (u @ u) / (2 * radius) ** 2
        return (heard - asked) ** 2 * weight, asked**2 * weight

    def at(radius: Array) -> tuple[Any, Any]:
        residual, asked = jax.vmap(functools.partial(squares, radius))(keys)
        return residual.mean(), asked.mean()

    residual, asked = jax.lax.map(at, radii)
    return residual / asked[0]


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
    if compander.levels is not None:
        return compander.inverse(place)
    top = 2**quantizer.bits - 1
    z = (place - 2.0 ** (quantizer.bits - 1)) * np.float32(2 / top)
    return compander.inverse(z) / compander.inverse(jnp.float32((top - 1) / top))
