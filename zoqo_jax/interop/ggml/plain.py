"""ggml's types without blocks: floats and whole numbers, which are arrays."""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

from zoqo_jax.interop.ggml.block_scales import aligned
from zoqo_jax.interop.packed import row_ranges

__all__: list[str] = []  # what ggml.py is made of

DTYPES = {
    0: np.dtype("<f4"), 1: np.dtype("<f2"), 24: np.dtype("<i1"), 25: np.dtype("<i2"),
    26: np.dtype("<i4"), 30: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


def decode(kind: int, shape: tuple[int, ...], raw: Any) -> jax.Array:
    """The array whose bytes some bytes are, or the slices of something.

    Examples:
        >>> decode(25, (2,), np.array([1, 0, 0, 1], np.uint8)).tolist()
        [1, 256]
    """
    values = aligned((math.prod(shape[:-1]), shape[-1]), DTYPES[kind])
    row_bytes = values.shape[1] * values.itemsize
    for begin, end in row_ranges(*values.shape):
        part = np.ascontiguousarray(raw[begin * row_bytes : end * row_bytes])
        values[begin:end] = part.view(values.dtype).reshape(end - begin, -1)
    return jax.device_put(values.reshape(shape))


def encoded(tensor: Any, kind: int) -> np.ndarray:
    """The bytes of an array of this type's dtype.

    Examples:
        >>> encoded(np.array([1, 256], np.int16), 25).tolist()
        [1, 0, 0, 1]
    """
    values = np.asarray(tensor).astype(DTYPES[kind], copy=False)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
