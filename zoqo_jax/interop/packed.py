"""Codes put together as `QuantizedArray` keeps them, by NumPy, some rows at a time.

No program is compiled, and beside the array that is made there is never more than the codes of some
rows: a model of 4 bits would otherwise be in memory three times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from zoqo_jax.grids import packing
from zoqo_jax.interop.bits import Bits, pack

__all__ = ["aligned", "packed", "planes", "row_ranges"]

_CODES_AT_ONCE = 2**18


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


def row_ranges(rows: int, columns: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """All rows, some at a time: some hundred thousand codes, and a multiple of `step` rows.

    Examples:
        >>> list(row_ranges(5, 2**17))
        [(0, 2), (2, 4), (4, 5)]
    """
    count = -(-max(_CODES_AT_ONCE // columns, 1) // step) * step
    for begin in range(0, rows, count):
        yield begin, min(begin + count, rows)


def planes(bits: int, columns: int) -> tuple[Bits, ...]:
    """Where the codes of a row lie in `QuantizedArray.packed`, whose layout is `packing.py`'s.

    Examples:
        >>> [(piece.first, piece.width) for piece in planes(5, 64)]
        [(0, 4), (32, 1)]
    """
    found, begin, low = [], 0, 0
    for width in packing.planes(bits):
        length = columns * width // 8
        found.append(Bits(begin, length, width, above=low))
        begin, low = begin + length, low + width
    return tuple(found)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros which begin where JAX's arrays do, so that `jax.device_put` takes them without a copy.

    Examples:
        >>> aligned((2, 3), np.int8).ctypes.data % 64
        0
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)
