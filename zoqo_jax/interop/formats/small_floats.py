"""Floats of 4 and 8 bits as codes: the ranks of their values.

Small floats (OCP Microscaling Formats specification 1.0, 2023) are stored by sign, exponent and
mantissa, so that a greater stored code may be a smaller value. The codes that an optimizer steps
along must increase with their values, so here a code is the rank of its value. Plus and minus zero
are one value and have one rank; a file's minus zero stays minus zero where the code is still zero.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid

__all__ = ["E2M1", "E4M3", "SmallFloat"]


class SmallFloat(NamedTuple):
    """A float of few bits: its finite values as a grid, and the rank of every stored code.

    Attributes:
        name: of the float.
        grid: the finite values, increasing.
        ranks: of each stored code, uint8; for a NaN, `len(grid.levels)`, which is no rank.
        stored: the code of each rank, uint8; for zero that of plus zero.

    Examples:
        >>> E2M1.grid.levels[7:], E2M1.ranks.tolist()
        ((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
         [7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])
    """

    name: str
    grid: Grid
    ranks: np.ndarray
    stored: np.ndarray

    def decode(self, name: str, stored: np.ndarray) -> np.ndarray:
        """The ranks of stored codes, uint8.

        Args:
            name: of the tensor.
            stored: its codes, uint8.

        Raises:
            ValueError: one is NaN; `name` is named.

        Examples:
            >>> E2M1.decode("w", np.array([0, 8, 15], np.uint8)).tolist()
            [7, 7, 0]
        """
        ranks = self.ranks[stored]
        if ranks.size and ranks.max() > self.grid.high:
            raise ValueError(f"{name}: one of its {self.name} values is NaN.")
        return ranks

    def encode(self, ranks: np.ndarray, before: np.ndarray) -> np.ndarray:
        """The stored codes of ranks, each as it was before if it had that rank (minus zero).

        Args:
            ranks: of the values, uint8.
            before: the stored codes that these replace, uint8.

        Examples:
            >>> E2M1.encode(np.array([7, 7, 8]), np.array([0, 8, 8], np.uint8)).tolist()
            [0, 8, 1]
        """
        return np.where(self.ranks[before] == ranks, before, self.stored[ranks])


def _small_float(name: str, values: np.ndarray) -> SmallFloat:
    """The float whose stored code n has the value `values[n]`, plus zero before minus zero."""
    finite = np.isfinite(values)
    levels = np.unique(values[finite])  # plus and minus zero are equal: one is left
    ranks = np.where(finite, np.searchsorted(levels, values), len(levels)).astype(np.uint8)
    stored = np.zeros(len(levels), np.uint8)
    for code in np.flatnonzero(finite)[::-1]:  # plus zero comes last and stays
        stored[ranks[code]] = code
    grid = Grid(tuple(float(level) + 0.0 for level in levels), 0, len(levels) - 1)
    return SmallFloat(name, grid, ranks, stored)


_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

E2M1 = _small_float("e2m1", np.concatenate([_MAGNITUDES, -_MAGNITUDES]))
"""The 4-bit float of MXFP4 and NVFP4: 15 values from -6 to 6."""

E4M3 = _small_float(
    "e4m3", np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
)
"""The 8-bit float of MXFP8: 253 values from -448 to 448."""
