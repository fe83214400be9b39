"""Codes that share words of 32 bits, the first in the lowest bits, as one stream of bits.

Where 32 is no multiple of the width, a code may begin in one word and end in the next: 32 codes of
3 bits fill 3 words. GPTQ (2, 3, 4, 8 bits) and MLX (2 to 8 bits) lay codes out so.
"""

from __future__ import annotations

import sys

import numpy as np

__all__ = ["pack", "unpack"]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in words.

    Args:
        words: 32-bit integers, (..., w); 32 w must be a multiple of 8 bits.
        bits: width of a code, 1 to 8.

    Returns:
        uint8, (..., 32 w / bits).

    Examples:
        >>> unpack(np.array([0x76543210], np.uint32), 4).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    eights = _bytes(words).reshape(*words.shape[:-1], words.shape[-1] * 4 // bits, bits)
    codes = np.empty((*eights.shape[:-1], 8), np.uint8)
    for i in range(8):  # eight codes fill `bits` bytes
        byte, shift = divmod(i * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code |= eights[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words that hold codes: the inverse of `unpack`.

    Args:
        codes: uint8 below 2 ** bits, (..., n); n * bits must be a multiple of 32, and n of 8.
        bits: width of a code, 1 to 8.

    Returns:
        uint32, (..., n * bits / 32).

    Examples:
        >>> hex(pack(np.arange(8, dtype=np.uint8)[None], 4)[0, 0])
        '0x76543210'
    """
    eights = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    packed = np.zeros((*eights.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    shape = (*codes.shape[:-1], codes.shape[-1] * bits // 32)
    words = packed.reshape(*codes.shape[:-1], -1).view("<u4").reshape(shape)
    return words.astype(np.uint32, copy=False)


def _bytes(words: np.ndarray) -> np.ndarray:
    """The bytes of 32-bit words, least significant first, (..., 4 w)."""
    words = np.ascontiguousarray(words)
    little = words if sys.byteorder == "little" else words.astype(words.dtype.newbyteorder("<"))
    return little.view(np.uint8)
