"""ggml's block types that are decoded to floats, by the `gguf` package, and why they are.

A method of this library moves a code to its neighbour and counts on values that move with it. Here
a number either stands for several weights together, with neighbours that have nothing in common, or
is a digit of a byte that five weights share.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from zoqo_jax.interop.ggml.block_scales import aligned
from zoqo_jax.interop.packed import row_ranges

__all__: list[str] = []  # what ggml.py is made of

_TOGETHER = (
    "a number of theirs picks {} weights together out of a table, and neighbours in the table have "
    "nothing in common"
)
_WHY = {
    16: _TOGETHER.format(8), 17: _TOGETHER.format(8), 18: _TOGETHER.format(4),
    19: _TOGETHER.format(8), 21: _TOGETHER.format(4), 22: _TOGETHER.format(8),
    29: _TOGETHER.format(8),
    34: "five ternary weights share a byte as the digits of a fraction in base 3",
}  # fmt: skip


def why(kind: int) -> str:
    """Why tensors of a type have no codes here.

    Examples:
        >>> why(34)  # TQ1_0
        'five ternary weights share a byte as the digits of a fraction in base 3'
    """
    return _WHY.get(kind, "their layout is not known here")


def name(kind: int) -> str:
    """What ggml calls a type.

    Examples:
        >>> name(16)
        'IQ2_XXS'
    """
    return _package().GGMLQuantizationType(kind).name


def layout(kind: int) -> tuple[int, int]:
    """Elements and bytes of a block.

    Raises:
        ValueError: there is no such type.

    Examples:
        >>> layout(16)
        (256, 66)
    """
    package = _package()
    try:
        return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"there is no tensor type {kind}.") from error


def decode(kind: int, shape: tuple[int, ...], raw: Any) -> jax.Array:
    """The values of a tensor, float32.

    Args:
        kind: the type's number.
        shape: of the tensor; the last axis is whole blocks.
        raw: uint8, all blocks; or anything whose slices are.

    Raises:
        ValueError: the `gguf` package does not decode the type, or a value is not finite.

    Examples:
        >>> raw = np.float16([0.5]).tobytes() + bytes(256)
        >>> decode(40, (64,), np.zeros(36, np.uint8)).shape
        (64,)
    """
    values = aligned((math.prod(shape[:-1]), shape[-1]), np.float32)
    for begin, end in row_ranges(*values.shape):
        values[begin:end] = _rows(kind, raw, begin, end, shape[-1])
    return jax.device_put(values.reshape(shape))


def is_same(kind: int, raw: Any, values: Any) -> bool:
    """Whether some bytes are decoded to these values, bit for bit.

    Args:
        kind: the type's number.
        raw: uint8, all blocks; or anything whose slices are.
        values: float32, whose last axis is whole blocks.

    Examples:
        >>> raw = np.zeros(36, np.uint8)
        >>> is_same(40, raw, decode(40, (64,), raw))
        True
    """
    values = np.asarray(values).reshape(-1, values.shape[-1])
    return all(
        np.array_equal(
            _rows(kind, raw, begin, end, values.shape[1]).view(np.uint32),
            values[begin:end].view(np.uint32),
        )
        for begin, end in row_ranges(*values.shape)
    )


def _rows(kind: int, raw: Any, begin: int, end: int, columns: int) -> np.ndarray:
    """The values of some rows."""
    package = _package()
    length, size = layout(kind)
    row_bytes = columns // length * size
    rows = np.array(raw[begin * row_bytes : end * row_bytes]).reshape(end - begin, -1)
    try:
        with np.errstate(all="ignore"):
            values = package.quants.dequantize(rows, package.GGMLQuantizationType(kind))
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"{name(kind)} cannot be decoded.") from error
    if not np.isfinite(values).all():
        raise ValueError("a scale is NaN or infinite.")
    return np.ascontiguousarray(values, np.float32)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "tensors of this type are decoded by the gguf package: pip install 'zoqo_jax[interop]'."
        ) from error
    return gguf
