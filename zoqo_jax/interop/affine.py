"""Quantized arrays of scales and integer zero points: value = scale * (code - zero point)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from zoqo_jax.grids.arrays import Grid, QuantizedArray
from zoqo_jax.grids.scales import TwoLevel

__all__ = ["affine", "check_scales"]


def affine(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    *,
    bits: int,
    length: int,
    block_of: np.ndarray | None = None,
) -> QuantizedArray:
    """An array whose groups of columns have a scale and a zero point each.

    Where all zero points are the same, the grid's levels are counted from it and there is no
    offset; else the offset is the zero point, a byte, times the negative scale. Either way the
    value is that of scale * (code - zero point), rounded once to the scales' dtype: exactly so for
    scales of 16 bits, to the last place of float32 for others.

    Args:
        codes: uint8, (outputs, inputs).
        scales: floats, (outputs, groups); the values get their dtype.
        zeros: uint8, (outputs, groups).
        bits: width of a code.
        length: how many neighbouring inputs are in a group; the last group may be shorter.
        block_of: the group of each input, int32, (inputs,), where a group is not of neighbours.

    Examples:
        >>> codes = np.array([[0, 15, 8, 8]], np.uint8)
        >>> scales, zeros = np.array([[2.0, 0.5]], np.float16), np.array([[8, 7]], np.uint8)
        >>> affine(codes, scales, zeros, bits=4, length=2).materialise().tolist()
        [[-16.0, 14.0, 0.5, 0.5]]
    """
    first = int(zeros.flat[0]) if zeros.size and (zeros == zeros.flat[0]).all() else 0
    grid = Grid(tuple(float(code - first) for code in range(2**bits)), 0, 2**bits - 1)
    own = jnp.asarray(scales)
    offset = None if first or not zeros.any() else TwoLevel(-own, jnp.asarray(zeros))
    columns = None if block_of is None else jnp.asarray(block_of[None], jnp.int32)
    return QuantizedArray.from_codes(
        jnp.asarray(codes),
        own,
        offset,
        grid,
        (-1, length) if block_of is None else None,
        scales.dtype,
        bits=bits,
        block_of=columns,
    )


def check_scales(name: str, scales: np.ndarray) -> None:
    """That all scales are finite numbers."""
    if not np.isfinite(np.asarray(scales, np.float32)).all():
        raise ValueError(f"tensor {name!r}: a scale is NaN or infinite.")
