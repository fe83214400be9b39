"""Small whole numbers that lie in pieces in the bytes of a block, described once, read and written.

A block of ggml is a few dozen bytes that hold, say, 256 codes of 5 bits and 8 scales of 6: some
bytes have the low bits of several numbers, others the high ones. `Bits` says where a piece of all
of them lies; `unpack` and `pack` are two readings of the same description.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["Bits", "pack", "unpack"]


class Bits(NamedTuple):
    """Where `width` bits of each of some numbers lie in a block.

    The bytes fall into runs. The numbers that a run holds come one after another: first those in
    the bits at the first shift of each of its bytes, then those at the second, and so on; then
    come the numbers of the next run.

    Attributes:
        first: the first byte.
        count: how many bytes.
        width: bits of a number that a byte holds.
        run: bytes of a run; 0 for all of them.
        shifts: places of the bits in a byte, lowest first; empty for every multiple of `width`.
        start: the first number that lies here.
        above: how many lower bits of the same numbers lie elsewhere, in a piece listed before.

    Examples:
        >>> Bits(2, 16, 4).numbers  # two numbers of 4 bits in each of 16 bytes
        32
    """

    first: int
    count: int
    width: int = 8
    run: int = 0
    shifts: tuple[int, ...] = ()
    start: int = 0
    above: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers have bits here."""
        return self.count * len(self._shifts)

    @property
    def _shifts(self) -> tuple[int, ...]:
        return self.shifts or tuple(range(0, 8, self.width))

    def pairs(
        self, blocks: np.ndarray, numbers: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Views of the bytes and of the numbers whose bits they hold, for every shift."""
        run = self.run or self.count
        count = len(blocks)
        held = blocks[:, self.first : self.first + self.count].reshape(count, -1, run)
        here = numbers[:, self.start : self.start + self.numbers]
        here = here.reshape(count, held.shape[1], len(self._shifts), run)
        for i, shift in enumerate(self._shifts):
            yield held, here[:, :, i], shift


def unpack(pieces: tuple[Bits, ...], blocks: np.ndarray, numbers: np.ndarray) -> None:
    """Read the numbers of blocks.

    Args:
        pieces: where their bits lie.
        blocks: uint8 (n, bytes of a block).
        numbers: uint8 (n, numbers of a block), changed in place, whatever was in it.

    Examples:
        >>> low, high = Bits(0, 2, 4), Bits(2, 1, 1, shifts=(0, 1, 2, 3), run=1, above=4)
        >>> numbers = np.empty((1, 4), np.uint8)
        >>> unpack((low, high), np.array([[0x21, 0x43, 0b0101]], np.uint8), numbers)
        >>> numbers
        array([[17,  3, 18,  4]], dtype=uint8)
    """
    for piece in pieces:
        for held, here, shift in piece.pairs(blocks, numbers):
            bits = _moved(held, piece.width, shift, piece.above)
            if piece.above:
                here |= bits
            else:
                here[:] = bits


def pack(pieces: tuple[Bits, ...], numbers: np.ndarray, blocks: np.ndarray) -> None:
    """Write numbers into blocks whose bits are still 0: `unpack` gives them again.

    Args:
        pieces: where their bits lie.
        numbers: uint8 (n, count). Bits that no piece has room for are lost.
        blocks: uint8 (n, bytes of a block), changed in place.

    Examples:
        >>> low, high = Bits(0, 2, 4), Bits(2, 1, 1, shifts=(0, 1, 2, 3), run=1, above=4)
        >>> blocks = np.zeros((1, 3), np.uint8)
        >>> pack((low, high), np.array([[17, 3, 18, 4]], np.uint8), blocks)
        >>> blocks.tolist() == [[0x21, 0x43, 0b0101]]
        True
    """
    for piece in pieces:
        for held, here, shift in piece.pairs(blocks, numbers):
            held |= _moved(here, piece.width, piece.above, shift)


def _moved(x: np.ndarray, width: int, place: int, to: int) -> np.ndarray:
    """Some bits of each byte, from one place in it to another, and zeros for all others."""
    if width < 8:
        x = x & np.uint8((2**width - 1) << place)
    if place > to:
        return x >> np.uint8(place - to)
    return x << np.uint8(to - place) if to > place else x
