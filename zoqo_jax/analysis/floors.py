r"""Floors: how good a grid can be, and how many bits a target needs.

A grid of spacing Delta holds an optimum only to within rounding. With rounding errors independent
and uniform on +-Delta / 2, a quadratic of Hessian H has

.. math::
    E[f - f^*] = \Delta^2 \, \mathrm{tr}(H) / 24, \qquad
    E|\nabla f|^2 = \Delta^2 \, \mathrm{tr}(H^2) / 12
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

__all__ = ["bits_needed", "gradient_floor", "loss_floor"]

Hessian = Float[ArrayLike, ""] | Float[ArrayLike, "d d"] | int


def loss_floor(spacing: Float[ArrayLike, ""], hessian: Hessian) -> Float32[Array, ""]:
    """The mean excess of a quadratic's loss at its optimum, rounded: Delta^2 tr(H) / 24.

    Args:
        spacing: Delta, the distance between neighbouring levels, value units.
        hessian: H, or its trace.

    Raises:
        ValueError: `hessian` is neither a number nor a square matrix.

    Examples:
        >>> loss_floor(0.1, jnp.diag(jnp.array([1.0, 2.0]))).round(5).item()
        0.00125
    """
    trace = jnp.trace(_square(hessian)) if jnp.ndim(hessian) else jnp.asarray(hessian)
    return jnp.square(spacing) * trace.astype(jnp.float32) / 24


def gradient_floor(spacing: Float[ArrayLike, ""], hessian: Hessian) -> Float32[Array, ""]:
    """The mean square of a quadratic's gradient at its optimum, rounded: Delta^2 tr(H^2) / 12.

    Args:
        spacing: Delta, the distance between neighbouring levels, value units.
        hessian: H, or the trace of its square.

    Raises:
        ValueError: `hessian` is neither a number nor a square matrix.

    Examples:
        >>> gradient_floor(0.1, jnp.diag(jnp.array([1.0, 2.0]))).round(5).item()
        0.00417
    """
    trace = jnp.sum(_square(hessian) ** 2) if jnp.ndim(hessian) else jnp.asarray(hessian)
    return jnp.square(spacing) * trace.astype(jnp.float32) / 12


def bits_needed(width: float, hessian: Hessian, target: float) -> int:
    """The fewest bits of a uniform grid whose `gradient_floor` is at most `target` squared.

    That is ceil(log2(1 + D |H|_F / (sqrt(12) eps))) with D the width and eps the target.

    Args:
        width: D, of the range that the levels divide, value units.
        hessian: H, or the trace of its square.
        target: eps, of the gradient's norm.

    Raises:
        ValueError: a width or target that is not positive, or a `hessian` that is neither a number
            nor a square matrix.

    Examples:
        >>> bits_needed(2.0, 100.0, 0.1)  # gradient_floor(2 / 63, 100.0) is .0917^2
        6
    """
    for name, value in (("width", width), ("target", target)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    norm_per_spacing = math.sqrt(gradient_floor(1.0, hessian).item())
    steps = width * norm_per_spacing / target
    return max(math.ceil(math.log2(1.0 + steps) - 1e-6), 1)  # what is exact must not be one more


def _square(hessian: Hessian) -> Float[Array, "d d"]:
    matrix = jnp.asarray(hessian)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"hessian must be a number or a square matrix, got shape {matrix.shape}.")
    return matrix
