"""What there is to say of a type of blocks: where its codes, scales and minimums lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid
from zoqo_jax.grids.scales import TwoLevel
from zoqo_jax.interop.bits import Bits

__all__ = ["Scales", "Type"]


class Scales(NamedTuple):
    """Where the scales of a block lie, or its minimums.

    Attributes:
        first: the byte where the block's floats begin.
        dtype: of these floats.
        count: how many floats a block has.
        inner: where the whole numbers lie that multiply the float; empty for none.
        numbers: how many of them a block has.
        zero: what is stored for the whole number 0.
        is_signed: whether the whole numbers are int8; otherwise uint8.
        is_subtracted: whether values are code * scale minus this, and not plus.
        largest: the largest float, as a whole number of its bits, that is read; beyond lie NaN, or
            values that float32 does not hold. None: every finite float.

    Examples:
        >>> scales = Scales(0, inner=(Bits(4, 4, 6, shifts=(0,)),), numbers=4)
        >>> scales.size, scales.bits, scales.number.name
        (2, 6, 'uint8')
    """

    first: int
    dtype: np.dtype = np.dtype("<f2")
    count: int = 1
    inner: tuple[Bits, ...] = ()
    numbers: int = 0
    zero: int = 0
    is_signed: bool = False
    is_subtracted: bool = False
    largest: int | None = None

    @property
    def size(self) -> int:
        """Bytes of a block's floats."""
        return self.count * self.dtype.itemsize

    @property
    def bits(self) -> int:
        """Bits of a whole number."""
        return max((piece.above + piece.width for piece in self.inner), default=0)

    @property
    def has_powers(self) -> bool:
        """Whether floats are bytes that stand for powers of two, and kept as such."""
        return self.dtype == ml_dtypes.float8_e8m0fnu

    @property
    def number(self) -> np.dtype:
        """How the inner of two levels is kept: whole numbers, or floats of 8 bits."""
        if self.inner or self.has_powers:
            return np.dtype(np.int8 if self.is_signed else np.uint8)
        return self.dtype

    def fits(self, scale: Any) -> bool:
        """Whether it is of this kind: an array, or of two levels with such numbers."""
        if not isinstance(scale, TwoLevel):
            return not self.inner and self.size > self.count
        same = scale.inner.dtype == self.number and scale.powers == self.has_powers
        return same and not scale.divides


class Type(NamedTuple):
    """How a block of codes lies in bytes.

    Attributes:
        name: ggml's.
        size: bytes of a block.
        length: codes of a block.
        bits: of a code.
        levels: the level of each code.
        codes: where codes lie.
        scale: where scales lie.
        minimum: where minimums lie, or None.
        flip: bits of a stored code that are the opposite of the code's.
        ranks: the code of each stored number; empty where they are the same. Two numbers may have
            one code: plus and minus zero.
        legal: how many codes are legal; 0 for all.

    Examples:
        >>> levels = (-2.0, -1.0, 0.0, 1.0)
        >>> form = Type("Q2_0", 10, 32, 2, levels, (Bits(2, 8, 2),), Scales(0))
        >>> form.grid, form.block, 8 * form.size / form.length  # bits for each code, all told
        (Grid(4 uniform levels, legal 0..3), 32, 2.5)
    """

    name: str
    size: int
    length: int
    bits: int
    levels: tuple[float, ...]
    codes: tuple[Bits, ...]
    scale: Scales
    minimum: Scales | None = None
    flip: int = 0
    ranks: tuple[int, ...] = ()
    legal: int = 0

    @property
    def grid(self) -> Grid:
        """The grid of its codes."""
        return Grid(self.levels, 0, (self.legal or len(self.levels)) - 1)

    @property
    def block(self) -> int:
        """How many neighbours share a scale."""
        return self.length // (self.scale.numbers or self.scale.count)

    @property
    def has_aliases(self) -> bool:
        """Whether two stored numbers have the same code, so that codes alone lose which it was."""
        return len(set(self.ranks)) < len(self.ranks)
