"""Frames of scales and integer zero points: value = scale * (code - zero point)."""

from __future__ import annotations

import numpy as np

from zoqo_jax.grids.arrays import Grid
from zoqo_jax.interop.formats.frames import Frame, require_finite

__all__ = ["affine"]


def affine(
    name: str,
    shape: tuple[int, ...],
    scales: np.ndarray,
    zeros: np.ndarray,
    *,
    bits: int,
    length: int,
    block_of: np.ndarray | None = None,
) -> Frame:
    """All of a matrix but its codes, where groups of columns have a scale and a zero point each.

    Where all zero points are the same, the grid's levels are counted from it and there is no
    offset; else the offset is the zero point, a byte, times the negative scale. Either way the
    value is that of scale * (code - zero point), rounded once to the scales' dtype: exactly so for
    scales of 16 bits, to the last place of float32 for others.

    Args:
        name: of the tensor.
        shape: (outputs, inputs), or of a stack of matrices.
        scales: floats, (outputs, groups); the values get their dtype.
        zeros: uint8, of the scales' shape.
        bits: width of a code.
        length: how many neighbouring inputs are in a group; the last group may be shorter.
        block_of: the group of each input, int32, (inputs,), where a group is not of neighbours.

    Raises:
        ValueError: a scale is NaN or infinite; the tensor is named.

    Examples:
        >>> scales, zeros = np.array([[2.0, 0.5]], np.float16), np.array([[8, 7]], np.uint8)
        >>> frame = affine("w", (1, 4), scales, zeros, bits=4, length=2)
        >>> frame.array(np.array([[0, 15, 8, 8]], np.uint8)).materialise().tolist()
        [[-16.0, 14.0, 0.5, 0.5]]
    """
    require_finite(name, scales)
    first = int(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else 0
    grid = Grid(tuple(float(code - first) for code in range(2**bits)), 0, 2**bits - 1)
    offset = (-scales, zeros) if zeros.any() and not first else None
    if block_of is None:
        return Frame(shape, bits, grid, scales, scales.dtype, length, offset)
    return Frame(shape, bits, grid, scales, scales.dtype, None, offset, block_of=block_of[None])
