"""Projections: from a real-valued step in the uniform coordinate z to whole codes.

CAQ-ZO (Shu & Zhu, arXiv:2605.10673) writes its update as `n <- Proj(n - eta g_z)`, where the step
is nearly always far below one code: rounding to nearest would freeze it. Everything here ends in
integer arithmetic, so that a step gives the same codes compiled or not, on every backend.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

__all__ = ["Rounding", "error_feedback", "nearest", "significant", "stochastic", "threshold"]

Rounding = Literal["stochastic", "nearest", "error_feedback", "threshold", "significant"]
"""The projections that `caq_zo` offers, by name."""

_POINT = 22  # error feedback counts in 2^-22 codes, which leaves an int32 room for +-511 codes


def nearest(step: Float[Array, "..."]) -> Int32[Array, "..."]:
    """The nearest whole number of codes, halves to even.

    Examples:
        >>> nearest(jnp.array([0.4, -1.6])).tolist()
        [0, -2]
    """
    return jnp.round(_bounded(step)).astype(jnp.int32)


def stochastic(words: UInt32[Array, "..."], step: Float[Array, "..."]) -> Int32[Array, "..."]:
    """Round up or down at random, unbiased: E[result] = step, to 2^-32 codes.

    Args:
        words: uniformly random, in the shape of `step`.
        step: in codes.

    Examples:
        >>> import jax
        >>> words = jax.random.bits(jax.random.key(0), (100_000,), jnp.uint32)
        >>> moves = stochastic(words, jnp.full(100_000, -0.25))
        >>> sorted(set(moves.tolist())), round(moves.mean().item(), 2)
        ([-1, 0], -0.25)
    """
    # The bound also keeps a product that made `step` from being fused with the difference below.
    size = jnp.abs(_bounded(step))
    whole = jnp.floor(size)
    chance = ((size - whole) * 2.0**32).astype(jnp.uint32)
    up = words < chance
    moved = whole.astype(jnp.int32) + up.astype(jnp.int32)
    return jnp.where(step < 0, -moved, moved)


def error_feedback(
    step: Float[Array, "..."], residual: Int32[Array, "..."], decay: float | Array = 1.0
) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """Round to nearest the sum of the step and all that was not applied before, and keep the rest.

    Args:
        step: in codes.
        residual: what earlier steps left over, in 2^-22 codes; zeros at first.
        decay: how much of it is still due.

    Returns:
        The whole codes to move and the new residual, between -1/2 and 1/2 code.

    Examples:
        >>> residual = jnp.zeros((), jnp.int32)
        >>> for _ in range(3):
        ...     moved, residual = error_feedback(jnp.float32(0.25), residual)
        ...     print(moved.item(), residual.item() / 2**22)
        0 0.25
        0 0.5
        1 -0.25
    """
    if isinstance(decay, Array) or decay != 1.0:
        residual = jnp.round(residual.astype(jnp.float32) * decay).astype(jnp.int32)
    total = residual + jnp.round(_bounded(step) * 2.0**_POINT).astype(jnp.int32)
    moved = (total + (2 ** (_POINT - 1) - 1)) >> _POINT  # a half stays behind
    return moved, total - (moved << _POINT)


def threshold(step: Float[Array, "..."], least: float | Array) -> Int32[Array, "..."]:
    """One code in the step's direction where the step is at least `least` codes long, else none.

    Examples:
        >>> threshold(jnp.array([0.1, -0.3, 7.0]), 0.25).tolist()
        [0, -1, 1]
    """
    return jnp.where(jnp.abs(step) >= least, jnp.sign(step), 0.0).astype(jnp.int32)


def significant(
    votes: Float[Array, "..."], heard: Int32[Array, " queries"], least: float | Array
) -> Int32[Array, "..."]:
    """One code in the direction of a sum of votes where it is significant, else none.

    Were the sign of every vote that of a fair coin, the sum would have the standard deviation
    sqrt(sum of the squares of their sizes).

    Args:
        votes: for each code the sum of `heard`, each with a sign.
        heard: sizes of the votes, at most 2^17.
        least: how many standard deviations are significant.

    Examples:
        >>> significant(jnp.array([3.0, -4.0, 6.0]), jnp.array([1, 1, 2, 2], jnp.int32), 1.25)
        Array([ 0, -1,  1], dtype=int32)
    """
    high, low = heard >> 8, heard & 0xFF  # sums of whole numbers have the same bits in any order
    squares = (high**2).sum().astype(jnp.float32) * 2.0**16
    squares = squares + (high * low).sum().astype(jnp.float32) * 2.0**9
    squares = squares + (low**2).sum().astype(jnp.float32)
    return jnp.where(votes**2 >= least**2 * squares, jnp.sign(votes), 0.0).astype(jnp.int32)


def _bounded(step: Array) -> Array:
    return jnp.clip(step, -255.0, 255.0)  # no grid is wider
