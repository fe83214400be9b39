"""Blocks of codes to `QuantizedArray`, and back, a few rows at a time.

NumPy does it: no program is compiled, and beside the array that is made there is never more than
the codes of some rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from zoqo_jax.grids import packing
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.bits import pack, unpack
from zoqo_jax.interop.ggml.block_scales import Levels, stored
from zoqo_jax.interop.ggml.blocks import Type
from zoqo_jax.interop.packed import aligned, planes, row_ranges

__all__: list[str] = []  # what ggml.py is made of


def read(form: Type, shape: tuple[int, ...], raw: Any) -> QuantizedArray:
    """The array whose blocks some bytes are.

    Args:
        form: the type of the blocks.
        shape: of the array; the last axis is whole blocks.
        raw: uint8, all blocks; or anything whose slices are.

    Raises:
        ValueError: a scale is not finite, or a code not legal.

    Examples:
        >>> from zoqo_jax.interop.ggml.types import TYPES
        >>> raw = np.float16([0.5]).tobytes() + bytes([0x98] * 16)
        >>> read(TYPES[2], (32,), np.frombuffer(raw, np.uint8)).materialise()[::16].tolist()
        [0.0, 0.5]
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    bits = packing.width(shape, form.bits)
    where, row_bytes = planes(bits, columns), columns // form.length * form.size
    packed = aligned((rows, columns * bits // 8), np.uint8)
    scale = Levels(form.scale, rows, columns // form.length)
    minimum = Levels(form.minimum, rows, columns // form.length) if form.minimum else None
    for begin, end in row_ranges(rows, columns):
        blocks = np.asarray(raw[begin * row_bytes : end * row_bytes]).reshape(-1, form.size)
        if bits == 8:
            _codes(form, blocks, packed[begin:end].reshape(-1, form.length))
        else:
            codes = np.empty((len(blocks), form.length), np.uint8)
            _codes(form, blocks, codes)
            pack(where, codes.reshape(end - begin, columns), packed[begin:end])
        scale.read(blocks, begin, end)
        if minimum:
            minimum.read(blocks, begin, end)
    return QuantizedArray.from_packed(
        jax.device_put(packed.reshape(*shape[:-1], -1)),
        scale.array(shape),
        minimum.array(shape) if minimum else None,
        form.grid,
        (-1, form.block),
        np.float32,
        bits,
    )


def written(form: Type, tensor: QuantizedArray, before: Any = None) -> Iterator[np.ndarray]:
    """The bytes of an array that `ggml.kind_of` says has this type, some rows at a time.

    Args:
        form: the type.
        tensor: the array.
        before: the bytes that it was read from, or anything whose slices are: of two numbers that
            stand for one code, it keeps that which is there.

    Raises:
        ValueError: scales that the type does not hold.

    Yields:
        uint8 (blocks, bytes of a block).
    """
    *leading, columns = tensor.shape
    rows = math.prod(leading)
    where, row_bytes = planes(tensor.bits, columns), columns // form.length * form.size
    packed = np.asarray(tensor.packed).reshape(rows, -1)
    scales = [stored(form, form.scale, tensor, tensor.scale)]
    if form.minimum and tensor.offset is not None:
        scales.append(stored(form, form.minimum, tensor, tensor.offset))
    for begin, end in row_ranges(rows, columns):
        blocks = np.zeros(((end - begin) * columns // form.length, form.size), np.uint8)
        codes = np.empty((end - begin, columns), np.uint8)
        unpack(where, packed[begin:end], codes)
        codes = codes.reshape(-1, form.length)
        if form.ranks:
            old = None if before is None else before[begin * row_bytes : end * row_bytes]
            codes = _numbers(form, codes, old)
        pack(form.codes, codes ^ np.uint8(form.flip) if form.flip else codes, blocks)
        for one in scales:
            one.write(blocks, begin, end)
        yield blocks


def _codes(form: Type, blocks: np.ndarray, codes: np.ndarray) -> None:
    """The codes of blocks, put into an array (blocks, codes of a block)."""
    unpack(form.codes, blocks, codes)
    if form.ranks:
        codes[:] = _looked_up(np.asarray(form.ranks, np.uint8), codes)
    if form.flip:
        codes ^= np.uint8(form.flip)
    if form.legal and codes.max(initial=0) >= form.legal:
        raise ValueError(f"a code must be below {form.legal} in {form.name}, got {codes.max()}.")


def _numbers(form: Type, codes: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """The stored numbers of codes; where one was there whose code is the same, that."""
    ranks = np.asarray(form.ranks, np.uint8)
    numbers = np.zeros(len(form.levels), np.uint8)
    numbers[ranks[::-1]] = np.arange(len(ranks), dtype=np.uint8)[::-1]  # of two, the lower
    now = _looked_up(numbers, codes)
    if before is None:
        return now
    old = np.empty_like(codes)
    unpack(form.codes, before.reshape(-1, form.size), old)
    return np.where(_looked_up(ranks, old) == codes, old, now)


def _looked_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`table[codes]` of bytes, in a third of the time."""
    found = codes.tobytes().translate(table.tobytes().ljust(256, b"\0"))
    return np.frombuffer(found, np.uint8).reshape(codes.shape)
