"""How codes of 2 to 8 bits share bytes in memory.

A code is cut into *planes*, of 8, 4, 2 or 1 bits: one of 5 bits into its low 4 and its high 1. A
plane of p bits has 8 / p codes in each byte, so codes take the bytes that their bits need. JAX has
a uint4 of its own, but XLA's CPU backend writes it element by element, a hundred times slower than
bytes.

The last axis is cut into as many equal *parts* as a byte of the first plane, the widest, has codes:
byte j holds the j-th code of each part, the first part's lowest. A byte of a narrower plane of p
bits holds more, r = 8 / p / parts codes of each part; of part i, they are those numbered j,
j + B, ... for the j-th of its B bytes, at the places i r, i r + 1, ... So a part is read by a few
shifts of whole rows of bytes. Planes lie one after another, the first plane first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

__all__ = [
    "WIDTHS",
    "cut",
    "pack",
    "pack_parts",
    "part",
    "parts",
    "planes",
    "take",
    "unpack",
    "width",
]

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a code in memory: one of 7 bits would save an eighth, and is kept in 8."""


def parts(bits: int) -> int:
    """Into how many parts the last axis is cut.

    Examples:
        >>> [parts(bits) for bits in WIDTHS]
        [4, 4, 2, 2, 2, 1]
    """
    return 8 // planes(bits)[0]


def width(shape: tuple[int, ...], least: int, widths: Sequence[int] = WIDTHS) -> int:
    """The fewest bits, of `widths` from `least` on, in which codes of this shape can be packed.

    Only the last axis of two or more is packed, and all planes must have whole bytes of it.

    Examples:
        >>> width((4, 64), 5), width((4, 12), 5), width((64,), 5)
        (5, 6, 8)
    """
    fits = (
        n for n in widths if n >= least and shape[-1:] and shape[-1] % (8 // planes(n)[-1]) == 0
    )
    return next(fits, 8) if len(shape) > 1 else 8


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack(codes: Integer[Array, "..."], bits: int) -> UInt8[Array, "..."]:
    """The bytes of codes of whatever integer dtype.

    Examples:
        >>> pack(jnp.array([[1, 2, 3, 4, 31, 0, 0, 16]]), 5).tolist()
        [[241, 2, 3, 4, 144]]
    """
    return pack_parts([cut(codes, i, parts(bits)) for i in range(parts(bits))], bits)


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack_parts(codes: Sequence[Integer[Array, "..."]], bits: int) -> UInt8[Array, "..."]:
    """The bytes of codes that are given by part."""
    of_part = [part.astype(jnp.uint8) for part in codes]
    if bits == 8:
        return of_part[0]
    planes = []
    for low, p, shifts in _shifts(bits):
        pieces = []
        for part, of_plane in zip(of_part, shifts, strict=True):
            digits = (part >> low) & (2**p - 1)
            for q, shift in enumerate(of_plane):
                pieces.append(cut(digits, q, len(of_plane)) << shift)
        planes.append(functools.reduce(jnp.bitwise_or, pieces))
    return jnp.concatenate(planes, axis=-1) if len(planes) > 1 else planes[0]


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def unpack(packed: UInt8[Array, "..."], bits: int) -> UInt8[Array, "..."]:
    """The codes, one a byte.

    Examples:
        >>> unpack(jnp.array([[241, 2, 3, 4, 144]], jnp.uint8), 5).tolist()
        [[1, 2, 3, 4, 31, 0, 0, 16]]
    """
    if bits == 8:
        return packed
    return jnp.concatenate([part(packed, bits, i) for i in range(parts(bits))], axis=-1)


def part(packed: UInt8[Array, "..."], bits: int, i: Array | int) -> UInt8[Array, "..."]:
    """The codes of the i-th part, one a byte; `i` may be traced."""
    if bits == 8:
        return packed
    found, begin = [], 0
    for low, p, shifts in _shifts(bits):
        count = len(shifts[0])
        length = packed.shape[-1] * p // bits
        bytes_ = packed[..., begin : begin + length]
        begin += length
        places = [jnp.asarray((i * count + q) * p, jnp.uint8) for q in range(count)]
        # Side by side: as a new axis that is then merged, decoding takes a third longer.
        digits = [(bytes_ >> place) & (2**p - 1) for place in places]
        digits = jnp.concatenate(digits, axis=-1) if count > 1 else digits[0]
        found.append(digits << low if low else digits)
    return functools.reduce(jnp.bitwise_or, found)


def take(packed: UInt8[Array, "..."], bits: int, places: Integer[Array, " k"]) -> Array:
    """The codes of picked columns, one a byte."""
    columns = packed.shape[-1] * 8 // bits
    length = columns // parts(bits)
    number, place = places // length, places % length
    found, begin = [], 0
    for low, p, shifts in _shifts(bits):
        count = len(shifts[0])
        bytes_ = packed.shape[-1] * p // bits
        q, at = place // bytes_, place % bytes_
        shift = ((number * count + q) * p).astype(jnp.uint8)
        digits = (jnp.take(packed, begin + at, axis=-1) >> shift) & (2**p - 1)
        found.append(digits << low if low else digits)
        begin += bytes_
    return functools.reduce(jnp.bitwise_or, found)


def cut(x: Array, i: Array | int, count: int) -> Array:
    """The i-th of `count` equal parts of the last axis."""
    if count == 1:
        return x
    length = x.shape[-1] // count
    return jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=-1)


def planes(bits: int) -> list[int]:
    """Bits of each plane, the widest first.

    Examples:
        >>> planes(4), planes(5), planes(6)
        ([4], [4, 1], [4, 2])
    """
    return [p for p in (8, 4, 2, 1) if bits & p]


def _shifts(bits: int) -> Iterator[tuple[int, int, list[list[int]]]]:
    """Of each plane its lowest bit in a code, its bits, and where in a byte each part has codes."""
    low, count = 0, parts(bits)
    for p in planes(bits):
        each = 8 // p // count
        yield low, p, [[(i * each + q) * p for q in range(each)] for i in range(count)]
        low += p
