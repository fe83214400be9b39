"""ggml's tensor types: how codes and floats lie in the bytes of a GGUF file.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 hold 32 codes a block, with a float16 scale (and minimum) each, and
become a `QuantizedArray`, bit for bit; F32, F16, BF16 and whole numbers are arrays. Everything else
is decoded by the `gguf` package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid, QuantizedArray

__all__ = ["MOST_AXES", "bytes_of", "decode", "encode", "is_exact", "kind_of", "type_name"]

MOST_AXES = 4
"""The most axes of a tensor."""

_BLOCK = 32
_PLAIN = {
    0: np.dtype("<f4"), 1: np.dtype("<f2"), 24: np.dtype("<i1"), 25: np.dtype("<i2"),
    26: np.dtype("<i4"), 30: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


class _Format(NamedTuple):
    """How a block of 32 codes lies in bytes: scale, minimum, fifth bits, the rest of the codes."""

    name: str
    bits: int
    zero: int  # the code whose level is 0
    has_minimum: bool

    @property
    def grid(self) -> Grid:
        levels = tuple(float(n - self.zero) for n in range(2**self.bits))
        return Grid(levels, 0, 2**self.bits - 1)

    @property
    def head(self) -> int:
        """Bytes of scale and minimum."""
        return 4 if self.has_minimum else 2

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return self.head + _BLOCK * self.bits // 8


_FORMATS = {
    2: _Format("Q4_0", 4, 8, False),
    3: _Format("Q4_1", 4, 0, True),
    6: _Format("Q5_0", 5, 16, False),
    7: _Format("Q5_1", 5, 0, True),
    8: _Format("Q8_0", 8, 128, False),
}


def is_exact(kind: int) -> bool:
    """Whether tensors of a type are read as what they are, and not only decoded to floats.

    Examples:
        >>> is_exact(3), is_exact(12)  # Q4_1, Q4_K
        (True, False)
    """
    return kind in _FORMATS or kind in _PLAIN


def type_name(kind: int) -> str:
    """What ggml calls a type.

    Examples:
        >>> type_name(2), type_name(8)
        ('Q4_0', 'Q8_0')
    """
    if kind in _FORMATS:
        return _FORMATS[kind].name
    return _package().GGMLQuantizationType(kind).name


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


def decode(kind: int, shape: tuple[int, ...], raw: np.ndarray) -> QuantizedArray | jax.Array:
    """A tensor of its `bytes_of` bytes.

    Raises:
        ValueError: a scale is not finite, or the `gguf` package does not decode the type.

    Examples:
        >>> raw = np.float16([0.5]).tobytes() + bytes([0x98] * 16)  # Q4_0: codes 8, then 9
        >>> array = decode(2, (1, 32), np.frombuffer(raw, np.uint8))
        >>> array.codes[0, ::16].tolist(), array.materialise()[0, ::16].tolist()
        ([8, 9], [0.0, 0.5])
    """
    if kind in _PLAIN:
        return jnp.asarray(np.array(raw).view(_PLAIN[kind]).reshape(shape))
    if kind in _FORMATS:
        return _codes(_FORMATS[kind], shape, np.asarray(raw))
    package = _package()
    rows = np.array(raw).reshape(math.prod(shape[:-1]), -1)
    try:
        values = package.quants.dequantize(rows, package.GGMLQuantizationType(kind))
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"{type_name(kind)} cannot be decoded.") from error
    return jnp.asarray(values.reshape(shape), jnp.float32)


def kind_of(tensor: Any) -> int:
    """The type that holds a tensor as it is.

    Raises:
        ValueError: there is none.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> type_name(kind_of(Quantizer(4, block=32)(jnp.ones((2, 64)))))
        'Q4_0'
    """
    if not 1 <= tensor.ndim <= MOST_AXES or not tensor.size:
        raise ValueError(f"it must have 1 to {MOST_AXES} axes, none empty, got {tensor.shape}.")
    if not isinstance(tensor, QuantizedArray):
        for kind, dtype in _PLAIN.items():
            if tensor.dtype == dtype:
                return kind
        raise ValueError(f"its dtype has no GGUF type, {tensor.dtype}.")
    for kind, form in _FORMATS.items():
        same = tensor.grid.levels == form.grid.levels
        if same and form.has_minimum == (tensor.offset is not None):
            bytes_of(kind, tuple(tensor.shape))
            return kind
    raise ValueError(
        f"its grid is that of no GGUF type, {tensor.grid} "
        f"{'without' if tensor.offset is None else 'with'} offset."
    )


def encode(tensor: Any, kind: int) -> bytes:
    """A tensor's bytes, in the type that `kind_of` gave.

    Raises:
        ValueError: scales that 32 neighbours do not share, or that float16 does not hold.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(4, block=32, scale_dtype=jnp.float16)(jnp.ones((1, 32)))
        >>> raw = encode(array, kind_of(array))
        >>> len(raw), set(raw[2:])  # a scale, then two codes of 15 in each byte
        (18, {255})
    """
    if kind in _PLAIN:
        return np.asarray(tensor).astype(_PLAIN[kind], copy=False).tobytes()
    form = _FORMATS[kind]
    blocks = (*tensor.shape[:-1], tensor.shape[-1] // _BLOCK)
    head = [_per_block(tensor, tensor.scale)]
    if form.has_minimum:
        head.append(_per_block(tensor, tensor.offset))
    parts: list[np.ndarray] = [np.stack(head, axis=-1).view(np.uint8)]
    codes = np.asarray(tensor.codes).reshape(*blocks, _BLOCK)
    if form.bits == 8:
        parts.append(codes - np.uint8(form.zero))
    else:
        if form.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low, high = np.split(codes & 15, 2, axis=-1)
        parts.append(low | high << 4)
    return np.concatenate(parts, axis=-1).tobytes()


def _codes(form: _Format, shape: tuple[int, ...], raw: np.ndarray) -> QuantizedArray:
    blocks = raw.reshape(*shape[:-1], shape[-1] // _BLOCK, form.size)
    heads = np.ascontiguousarray(blocks[..., : form.head]).view("<f2")
    if not np.isfinite(heads).all():
        raise ValueError("a scale is NaN or infinite.")
    rest = blocks[..., form.head :]
    if form.bits == 8:
        codes = rest + np.uint8(form.zero)  # signed bytes, modulo 256
    else:
        nibbles = rest[..., -_BLOCK // 2 :]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    if form.bits == 5:
        codes |= np.unpackbits(rest[..., :4], axis=-1, bitorder="little") << 4
    minimum = jnp.asarray(heads[..., 1]) if form.has_minimum else None
    codes, scale = jnp.asarray(codes.reshape(shape)), jnp.asarray(heads[..., 0])
    return QuantizedArray.from_codes(codes, scale, minimum, form.grid, block=(-1, _BLOCK))


def _per_block(tensor: QuantizedArray, numbers: Any) -> np.ndarray:
    """A scale or offset for every 32 codes, float16 (*rows, blocks)."""
    numbers = np.asarray(numbers)
    if tensor.block == (-1, _BLOCK) and numbers.shape[-1] * _BLOCK == tensor.shape[-1]:
        blocks = np.broadcast_to(numbers, (*tensor.shape[:-1], numbers.shape[-1]))
    else:
        spread = np.broadcast_to(
            np.asarray(tensor.broadcast_scales(jnp.asarray(numbers))), tensor.shape
        )
        each = spread.reshape(*tensor.shape[:-1], -1, _BLOCK)
        if (each != each[..., :1]).any():
            raise ValueError(f"{_BLOCK} neighbours must share a scale.")
        blocks = each[..., 0]
    halves = blocks.astype("<f2")
    if (halves.astype(np.float64) != blocks.astype(np.float64)).any():
        raise ValueError(
            "float16 does not hold its scales: quantize it with scale_dtype=jnp.float16."
        )
    return np.ascontiguousarray(halves)


def _layout(kind: int) -> tuple[int, int]:
    """Elements and bytes of a block."""
    if kind in _PLAIN:
        return 1, _PLAIN[kind].itemsize
    if kind in _FORMATS:
        return _BLOCK, _FORMATS[kind].size
    package = _package()
    try:
        return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"there is no tensor type {kind}.") from error


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "tensors of this type are decoded by the gguf package: pip install 'zoqo_jax[interop]'."
        ) from error
    return gguf
