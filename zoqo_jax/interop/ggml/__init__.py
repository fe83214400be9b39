"""ggml's tensor types: how codes and floats lie in the bytes of a GGUF file.

Types whose codes have an order become a `QuantizedArray`, bit for bit: Q4_0, Q4_1, Q5_0, Q5_1 and
Q8_0, the K-quants Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4 and TQ2_0 (`types.py` says how
each lies in bytes). F32, F16, BF16 and whole numbers are arrays. Everything else is decoded by the
`gguf` package, with one of the reasons in `as_floats.py`.

Values are those of the `gguf` package bit for bit: scale, minimum and level have so few bits that
their products are exact in float32, and only the last sum rounds. One exception: an MXFP4 value
below 2^-126, which float32 holds as a subnormal number, and which XLA may take for 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.ggml import as_floats, code_arrays, plain
from zoqo_jax.interop.ggml.types import TYPES

__all__ = [
    "MOST_AXES",
    "bytes_of",
    "decode",
    "encode",
    "encoded",
    "is_exact",
    "kind_of",
    "type_name",
]

MOST_AXES = 4
"""The most axes of a tensor."""


def is_exact(kind: int) -> bool:
    """Whether tensors of a type are read as what they are, and not only decoded to floats.

    Examples:
        >>> is_exact(3), is_exact(12), is_exact(16)  # Q4_1, Q4_K, IQ2_XXS
        (True, True, False)
    """
    return kind in TYPES or kind in plain.DTYPES


def type_name(kind: int) -> str:
    """What ggml calls a type.

    Examples:
        >>> type_name(2), type_name(12)
        ('Q4_0', 'Q4_K')
    """
    return TYPES[kind].name if kind in TYPES else as_floats.name(kind)


def bytes_of(kind: int, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes.

    Raises:
        ValueError: there is no such type, or none of this shape.

    Examples:
        >>> bytes_of(3, (2, 64))  # Q4_1: a block of 32 takes 20 bytes
        80
    """
    block, size = _layout(kind)
    if shape[-1] % block:
        raise ValueError(
            f"the last axis must be a multiple of {block} in {type_name(kind)}, got {shape}."
        )
    return math.prod(shape) // block * size


def decode(kind: int, shape: tuple[int, ...], raw: Any) -> QuantizedArray | jax.Array:
    """A tensor of its `bytes_of` bytes.

    Args:
        kind: the type's number.
        shape: of the tensor.
        raw: its bytes, uint8; or anything whose slices are such arrays, so that a large tensor need
            not be in memory in both forms.

    Raises:
        ValueError: a scale is not finite, a code is not legal, or the `gguf` package does not
            decode the type.

    Examples:
        >>> raw = np.float16([0.5]).tobytes() + bytes([0x98] * 16)  # Q4_0: codes 8, then 9
        >>> array = decode(2, (1, 32), np.frombuffer(raw, np.uint8))
        >>> array.codes[0, ::16].tolist(), array.materialise()[0, ::16].tolist()
        ([8, 9], [0.0, 0.5])
    """
    if kind in TYPES:
        return code_arrays.read(TYPES[kind], shape, raw)
    if kind not in plain.DTYPES:
        return as_floats.decode(kind, shape, raw)
    return plain.decode(kind, shape, raw)


def kind_of(tensor: Any) -> int:
    """The type that holds a tensor as it is.

    Raises:
        ValueError: there is none.

    Examples:
        >>> import jax.numpy as jnp
        >>> from zoqo_jax import Quantizer
        >>> type_name(kind_of(Quantizer(4, block=32)(jnp.ones((2, 64)))))
        'Q4_0'
    """
    if not 1 <= tensor.ndim <= MOST_AXES or not tensor.size:
        raise ValueError(f"it must have 1 to {MOST_AXES} axes, none empty, got {tensor.shape}.")
    if not isinstance(tensor, QuantizedArray):
        for kind, dtype in plain.DTYPES.items():
            if tensor.dtype == dtype:
                return kind
        raise ValueError(f"its dtype has no GGUF type, {tensor.dtype}.")
    for kind, form in TYPES.items():
        if tensor.grid.levels != form.grid.levels or tensor.grid.high > form.grid.high:
            continue
        pairs = [(form.scale, tensor.scale), (form.minimum, tensor.offset)]
        if all(here is None if at is None else at.fits(here) for at, here in pairs):
            bytes_of(kind, tuple(tensor.shape))
            return kind
    raise ValueError(
        f"its grid is that of no GGUF type, {tensor.grid} "
        f"{'without' if tensor.offset is None else 'with'} offset."
    )


def encode(tensor: Any, kind: int) -> bytes:
    """A tensor's bytes, in the type that `kind_of` gave.

    Raises:
        ValueError: scales that a block's codes do not share, or that float16 does not hold.

    Examples:
        >>> import jax.numpy as jnp
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(4, block=32, scale_dtype=jnp.float16)(jnp.ones((1, 32)))
        >>> raw = encode(array, kind_of(array))
        >>> len(raw), set(raw[2:])  # a scale, then two codes of 15 in each byte
        (18, {255})
    """
    return b"".join(part.tobytes() for part in encoded(tensor, kind))


def encoded(tensor: Any, kind: int, before: Any = None) -> Iterator[np.ndarray]:
    """A tensor's bytes, some rows at a time.

    Args:
        tensor: the tensor.
        kind: the type that `kind_of` gave; or, of floats, that which `before` has, whose values
            they must still be.
        before: the bytes that it was read from, or anything whose slices are. Of two numbers that
            stand for one code, plus and minus zero, the one that is there is kept.

    Raises:
        ValueError: scales that a block's codes do not share, or that float16 does not hold.

    Yields:
        uint8 arrays.

    Examples:
        >>> before = np.array([127] + [0x08] * 16, np.uint8)  # MXFP4: zeros, every second -0
        >>> array = decode(39, (1, 32), before)
        >>> [next(encoded(array, 39, raw))[0, 1].item() for raw in (None, before)]
        [0, 8]
    """
    if kind in TYPES:
        yield from code_arrays.written(TYPES[kind], tensor, before)
    elif kind not in plain.DTYPES:
        size = bytes_of(kind, tuple(tensor.shape))
        for begin in range(0, size, 2**20):
            yield before[begin : min(begin + 2**20, size)]
    else:
        yield plain.encoded(tensor, kind)


def _layout(kind: int) -> tuple[int, int]:
    """Elements and bytes of a block."""
    if kind in plain.DTYPES:
        return 1, plain.DTYPES[kind].itemsize
    if kind in TYPES:
        return TYPES[kind].length, TYPES[kind].size
    return as_floats.layout(kind)
