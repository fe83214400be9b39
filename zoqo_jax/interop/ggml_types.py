"""ggml's block types whose codes have an order: where codes, scales and minimums lie in a block.

A row of a tensor is a sequence of blocks of 32 to 256 codes. In the simple types a block has one
float16 scale; in the others a float16 scale is shared by 256 codes, and 32 or 16 of them share a
small whole number that multiplies it. Source of the layouts: ggml-common.h and ggml-quants.c in
github.com/ggml-org/ggml.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid
from zoqo_jax.interop.ggml_bits import Bits

__all__ = ["TYPES", "Scales", "Type"]


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
    def number(self) -> np.dtype:
        """How whole numbers are kept."""
        return np.dtype(np.int8 if self.is_signed else np.uint8)


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
        >>> form = TYPES[12]
        >>> form.name, form.block, 8 * form.size / form.length  # bits for each code, all told
        ('Q4_K', 32, 4.5)
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


def _from(first: int, count: int) -> tuple[float, ...]:
    """Whole numbers, one apart."""
    return tuple(float(n) for n in range(first, first + count))


def _nibbles(first: int, count: int, run: int) -> Bits:
    return Bits(first, count, 4, run)


# Q4_K and Q5_K: 8 scales and 8 minimums of 6 bits in the 12 bytes from the 4th on. Bytes 0 to 3 (4
# to 7) have scales (minimums) 0 to 3, and in their two highest bits the two highest of 4 to 7;
# bytes 8 to 11 have the low nibbles of those, scales below minimums.
_SCALES = (
    Bits(4, 4, 6, shifts=(0,)),
    Bits(12, 4, 4, shifts=(0,), start=4),
    Bits(4, 4, 2, shifts=(6,), start=4, above=4),
)
_MINIMUMS = (
    Bits(8, 4, 6, shifts=(0,)),
    Bits(12, 4, 4, shifts=(4,), start=4),
    Bits(8, 4, 2, shifts=(6,), start=4, above=4),
)
_K_SCALE = Scales(0, inner=_SCALES, numbers=8)
_K_MINIMUM = Scales(2, inner=_MINIMUMS, numbers=8, is_subtracted=True)

# The levels of IQ4_NL and IQ4_XS.
_IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
        1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)  # fmt: skip

# FP4 (e2m1): bit 3 is the sign, the rest picks a magnitude; 0 and 8 are plus and minus zero.
_FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_RANKS = (7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0)
# Exponents 253 and 254 make the largest level, 6, more than float32 holds, and 255 is NaN.
_E8M0 = Scales(0, np.dtype(ml_dtypes.float8_e8m0fnu), largest=252)
# A sign means nothing to ggml here, and 127 is NaN: neither is read.
_E4M3 = Scales(0, np.dtype(ml_dtypes.float8_e4m3fn), count=4, largest=126)

_TERNARY = (-1.0, 0.0, 1.0, 2.0)  # 2 has a number, but is not legal

TYPES = {
    2: Type("Q4_0", 18, 32, 4, _from(-8, 16), (_nibbles(2, 16, 16),), Scales(0)),
    3: Type("Q4_1", 20, 32, 4, _from(0, 16), (_nibbles(4, 16, 16),), Scales(0), Scales(2)),
    6: Type(
        "Q5_0", 22, 32, 5, _from(-16, 32),
        (_nibbles(6, 16, 16), Bits(2, 4, 1, run=1, above=4)), Scales(0),
    ),
    7: Type(
        "Q5_1", 24, 32, 5, _from(0, 32),
        (_nibbles(8, 16, 16), Bits(4, 4, 1, run=1, above=4)), Scales(0), Scales(2),
    ),
    8: Type("Q8_0", 34, 32, 8, _from(-128, 256), (Bits(2, 32),), Scales(0), flip=128),
    10: Type(
        "Q2_K", 84, 256, 2, _from(0, 4), (Bits(16, 64, 2, run=32),),
        Scales(80, inner=(Bits(0, 16, 4, shifts=(0,)),), numbers=16),
        Scales(82, inner=(Bits(0, 16, 4, shifts=(4,)),), numbers=16, is_subtracted=True),
    ),
    11: Type(
        "Q3_K", 110, 256, 3, _from(-4, 8), (Bits(32, 64, 2, run=32), Bits(0, 32, 1, above=2)),
        Scales(
            108, inner=(Bits(96, 8, 4), Bits(104, 4, 2, above=4)), numbers=16, zero=32,
            is_signed=True,
        ),
    ),
    12: Type("Q4_K", 144, 256, 4, _from(0, 16), (_nibbles(16, 128, 32),), _K_SCALE, _K_MINIMUM),
    13: Type(
        "Q5_K", 176, 256, 5, _from(0, 32), (_nibbles(48, 128, 32), Bits(16, 32, 1, above=4)),
        _K_SCALE, _K_MINIMUM,
    ),
    14: Type(
        "Q6_K", 210, 256, 6, _from(-32, 64),
        (_nibbles(0, 128, 64), Bits(128, 64, 2, run=32, above=4)),
        Scales(208, inner=(Bits(192, 16),), numbers=16, is_signed=True),
    ),
    20: Type("IQ4_NL", 18, 32, 4, _IQ4, (_nibbles(2, 16, 16),), Scales(0)),
    23: Type(
        "IQ4_XS", 136, 256, 4, _IQ4, (_nibbles(8, 128, 16),),
        Scales(
            0, inner=(Bits(4, 4, 4, run=1), Bits(2, 2, 2, run=1, above=4)), numbers=8, zero=32,
            is_signed=True,
        ),
    ),
    35: Type("TQ2_0", 66, 256, 2, _TERNARY, (Bits(0, 64, 2, run=32),), Scales(64), legal=3),
    39: Type("MXFP4", 17, 32, 4, _FP4, (_nibbles(1, 16, 16),), _E8M0, ranks=_FP4_RANKS),
    40: Type("NVFP4", 36, 64, 4, _FP4, (_nibbles(4, 32, 8),), _E4M3, ranks=_FP4_RANKS),
}  # fmt: skip
"""Types by ggml's number."""
