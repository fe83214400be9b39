"""Codes put together as `QuantizedArray` keeps them, by NumPy, some rows at a time.

No program is compiled, and beside the array that is made there is never more than the codes of some
rows: a model of 4 bits would otherwise be in memory three times.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from zoqo_jax.grids import packing
from zoqo_jax.interop.ggml.bits import pack
from zoqo_jax.interop.ggml.block_scales import aligned
from zoqo_jax.interop.ggml.code_arrays import planes, row_ranges

__all__ = ["packed"]


def packed(
    codes: Callable[[int, int], np.ndarray], shape: tuple[int, ...], bits: int, step: int = 1
) -> tuple[jax.Array, int]:
    """The bytes of a `QuantizedArray`, and the width of a code in them.

    Args:
        codes: `codes(begin, end)` gives those of some rows, uint8 (end - begin, columns); axes but
            the last count as one.
        shape: of the array.
        bits: width that codes need.
        step: `begin` is a multiple of it.

    Examples:
        >>> rows = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)
        >>> packed(lambda begin, end: rows[begin:end], (2, 4), 4)[0].tolist()
        [[49, 66], [117, 134]]
    """
    width = packing.width(shape, bits)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    where, found = planes(width, columns), aligned((rows, columns * width // 8), np.uint8)
    for begin, end in row_ranges(rows, columns, step):
        if width == 8:
            found[begin:end] = codes(begin, end)
        else:
            pack(where, np.ascontiguousarray(codes(begin, end)), found[begin:end])
    return jax.device_put(found.reshape(*shape[:-1], columns * width // 8)), width
