"""ggml's block types whose codes have an order: where codes, scales and minimums lie in a block.

A row of a tensor is a sequence of blocks of 32 to 256 codes. In the simple types a block has one
float16 scale; in the others a float16 scale is shared by 256 codes, and 32 or 16 of them share a
small whole number that multiplies it. Source of the layouts: ggml-common.h and ggml-quants.c in
github.com/ggml-org/ggml.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from zoqo_jax.interop.bits import Bits
from zoqo_jax.interop.ggml.blocks import Scales, Type

__all__ = ["TYPES"]


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
