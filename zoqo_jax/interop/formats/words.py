"""Codes that share bytes or words, the first in the lowest bits, as one stream of bits.

Bytes of two nibbles and little-endian words of 32 bits are the same stream. Where the width of a
code does not divide 32, a code may begin in one word and end in the next: 32 codes of 3 bits fill 3
words. GPTQ, compressed-tensors, gpt-oss and MLX lay codes out so.
"""

from __future__ import annotations

import sys

import numpy as np

__all__ = ["pack", "unpack"]


def unpack(words: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The codes in words.

    Args:
        words: integers of any width, (..., w).
        bits: width of a code, 1 to 8.
        count: how many codes of each row to unpack; by default all that the words hold. What lies
            behind them is padding.

    Returns:
        uint8, (..., count).

    Examples:
        >>> unpack(np.array([0x76543210], np.uint32), 4).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> unpack(np.array([0b10_110_001], np.uint8), 3, 2).tolist()
        [1, 6]
    """
    raw = _bytes(words)
    rows = raw.shape[:-1]
    held = raw.shape[-1] * 8 // bits
    wanted = held if count is None else count
    if wanted > held:
        raise ValueError(f"count must be at most {held}, got {wanted}.")
    eights = _in_eights(raw, wanted, bits)
    codes = np.empty((*rows, eights.shape[-2], 8), np.uint8)
    for i in range(8):  # eight codes fill `bits` bytes
        byte, shift = divmod(i * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code |= eights[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.reshape(*rows, eights.shape[-2] * 8)[..., :wanted]


def pack(codes: np.ndarray, bits: int, words: np.ndarray | None = None) -> np.ndarray:
    """The words that hold codes: the inverse of `unpack`.

    Args:
        codes: uint8 below 2 ** bits, (..., n).
        bits: width of a code, 1 to 8.
        words: words that held n codes, in the dtype to return; the bits behind the codes stay as
            they are there. By default 32-bit words of zeros, as many as are needed.

    Returns:
        Of the dtype and shape of `words`, or uint32, (..., ceil(n * bits / 32)).

    Examples:
        >>> hex(pack(np.arange(8, dtype=np.uint8)[None], 4)[0, 0])
        '0x76543210'
        >>> bin(pack(np.array([2, 6], np.uint8), 3, np.array([0b10_110_001], np.uint8))[0])
        '0b10110010'
    """
    *rows, count = codes.shape
    if words is None:
        words = np.zeros((*rows, -(-count * bits // 32)), np.uint32)
    eights = np.zeros((*rows, -(-count // 8) * 8), np.uint8)
    eights[..., :count] = codes
    eights = eights.reshape(*rows, -(-count // 8), 8)
    stream = np.zeros((*eights.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= eights[..., i] >> (8 - shift)
    stream = stream.reshape(*rows, -(-count // 8) * bits)
    raw = np.array(_bytes(words))
    whole, rest = divmod(count * bits, 8)
    raw[..., :whole] = stream[..., :whole]
    if rest:
        ours = 2**rest - 1
        raw[..., whole] = (raw[..., whole] & (255 - ours)) | stream[..., whole]
    return raw.view(words.dtype.newbyteorder("<")).astype(words.dtype, copy=False)


def _in_eights(raw: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The bytes of the first codes, `bits` bytes for each eight, padded with zeros."""
    *rows, length = raw.shape
    needed = -(-count // 8) * bits
    if needed > length:
        raw = np.concatenate([raw, np.zeros((*rows, needed - length), np.uint8)], axis=-1)
    return raw[..., :needed].reshape(*rows, needed // bits, bits)


def _bytes(words: np.ndarray) -> np.ndarray:
    """The bytes of words, least significant first, (..., bytes)."""
    words = np.ascontiguousarray(words)
    little = words if sys.byteorder == "little" else words.astype(words.dtype.newbyteorder("<"))
    return little.view(np.uint8)
