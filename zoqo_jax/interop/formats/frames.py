"""A quantized tensor of a file without its codes: what decoding and encoding have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid, QuantizedArray
from zoqo_jax.grids.scales import TwoLevel
from zoqo_jax.interop.packed import packed

__all__ = ["Frame", "Numbers", "exponents", "require_finite"]

Numbers = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Scales as a file has them: floats, or an outer and an inner level."""


class Frame(NamedTuple):
    """Everything of a `QuantizedArray` but its codes, in NumPy's arrays as read from a file.

    Attributes:
        shape: of the tensor, (outputs, inputs) for a matrix.
        bits: width of a code in the file.
        grid: levels and legal codes.
        scale: as `QuantizedArray.scale` has it; a pair stands for a `TwoLevel`.
        value_dtype: of the values.
        block: codes along the last axis that share a scale; None: all of a row do, or `block_of`
            says which.
        offset: as `scale`, or None.
        divides: whether a scale of two levels is inner / outer.
        block_of: the group of every column, or None.

    Examples:
        >>> grid = Grid((-1.0, 0.0, 1.0, 2.0), 0, 3)
        >>> frame = Frame((1, 4), 2, grid, np.full((1, 1), 0.5, np.float32), np.float32)
        >>> array = frame.array(np.array([[0, 1, 2, 3]], np.uint8))
        >>> array.materialise().tolist(), frame.codes("w", array).tolist()
        ([[-0.5, 0.0, 0.5, 1.0]], [[0, 1, 2, 3]])
    """

    shape: tuple[int, ...]
    bits: int
    grid: Grid
    scale: Numbers
    value_dtype: Any
    block: int | None = None
    offset: Numbers | None = None
    divides: bool = False
    block_of: np.ndarray | None = None

    def array(self, codes: np.ndarray) -> QuantizedArray:
        """The tensor with these codes; everything is copied.

        Args:
            codes: legal codes, uint8, of the frame's shape.

        Examples:
            >>> grid = Grid((0.0, 1.0, 2.0, 3.0), 0, 3)
            >>> frame = Frame((1, 4), 2, grid, np.ones((1, 1), np.float16), np.float16)
            >>> frame.array(np.array([[3, 0, 0, 1]], np.uint8)).codes.tolist()
            [[3, 0, 0, 1]]
        """
        rows = codes.reshape(-1, codes.shape[-1])
        return self.array_of(lambda begin, end: rows[begin:end])

    def array_of(self, codes: Callable[[int, int], np.ndarray], step: int = 1) -> QuantizedArray:
        """The tensor whose codes are given some rows at a time.

        Args:
            codes: `codes(begin, end)` gives those of some rows, uint8 (end - begin, columns); axes
                but the last count as one.
            step: `begin` is a multiple of it.

        Examples:
            >>> grid = Grid((0.0, 1.0, 2.0, 3.0), 0, 3)
            >>> frame = Frame((2, 4), 2, grid, np.ones((1, 1), np.float16), np.float16)
            >>> frame.array_of(lambda begin, end: np.full((end - begin, 4), 3, np.uint8)).shape
            (2, 4)
        """
        bytes_, bits = packed(codes, self.shape, self.bits, step)
        return QuantizedArray.from_packed(
            bytes_,
            self._on_device(self.scale, self.divides),
            None if self.offset is None else self._on_device(self.offset, False),
            self.grid,
            None if self.block is None else (-1, self.block),
            self.value_dtype,
            bits,
            self.block_of,
        )

    def codes(self, name: str, array: QuantizedArray) -> np.ndarray:
        """An array's codes, uint8, after a check that it has this frame.

        Raises:
            ValueError: shape, grid, scales or blocks are not those of the file, or a code is not
                legal; `name` is named.

        Examples:
            >>> grid = Grid((0.0, 1.0, 2.0, 3.0), 0, 3)
            >>> frame = Frame((1, 4), 2, grid, np.ones((1, 1), np.float16), np.float16)
            >>> frame.codes("w", frame._replace(shape=(1, 2)).array(np.zeros((1, 2), np.uint8)))
            Traceback (most recent call last):
            ValueError: w: its shape must be that of the file, (1, 4), got (1, 2).
        """
        mine = self._replace(shape=(1, 1), block=None).array(np.zeros((1, 1), np.uint8))
        theirs, block = array, None if self.block is None else (-1, self.block)
        for what, here, there in (
            ("shape", self.shape, tuple(theirs.shape)),
            ("grid", self.grid, theirs.grid),
            ("block", block, theirs.block),
        ):
            if here != there:
                raise ValueError(
                    f"{name}: its {what} must be that of the file, {here}, got {there}."
                )
        for what in ("scale", "offset", "block_of"):
            here, there = (jax.tree.leaves(getattr(x, what)) for x in (mine, theirs))
            if len(here) != len(there) or not all(map(_same, here, there)):
                raise ValueError(f"{name}: its {what} must be that of the file, got another.")
        codes = np.asarray(array.codes)
        if codes.min() < self.grid.low or codes.max() > self.grid.high:
            raise ValueError(
                f"{name}: codes must be {self.grid.low} to {self.grid.high}, "
                f"got {codes.min()} to {codes.max()}."
            )
        return codes

    def _on_device(self, numbers: Numbers, divides: bool) -> Any:
        """Copies, made by NumPy: JAX would compile a program for every shape."""
        if isinstance(numbers, tuple):
            outer, inner = map(np.array, numbers)
            powers = inner.dtype == ml_dtypes.float8_e8m0fnu
            if inner.dtype == np.uint8:  # zero points
                return TwoLevel.packed(outer, inner, self.bits)
            inner = inner.view(np.uint8) if powers else inner
            return TwoLevel(jax.device_put(outer), jax.device_put(inner), divides, powers)
        return jax.device_put(np.array(numbers))


def require_finite(name: str, numbers: np.ndarray) -> None:
    """Refuse scales that are NaN or infinite.

    Raises:
        ValueError: one is; `name` is named.

    Examples:
        >>> require_finite("w.scales", np.array([1.0, np.nan]))
        Traceback (most recent call last):
        ValueError: w.scales: a scale is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        is_finite = np.isfinite(numbers.astype(np.float32))  # NumPy knows few 8-bit floats
    if not is_finite.all():
        raise ValueError(f"{name}: a scale is NaN or infinite.")


def exponents(name: str, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales that are bytes n for 2**(n - 127): e8m0 of the OCP Microscaling Formats.

    Args:
        name: of the stored tensor.
        scales: bytes, or e8m0 floats.

    Returns:
        A `Frame.scale`: 1, and the powers of two.

    Raises:
        ValueError: a byte is 255, which stands for NaN; `name` is named.

    Examples:
        >>> exponents("w", np.array([[126, 128]], np.uint8))[1].astype(np.float32).tolist()
        [[0.5, 2.0]]
    """
    powers = scales.view(ml_dtypes.float8_e8m0fnu)
    require_finite(name, powers)
    return np.ones((1,) * scales.ndim, np.float32), powers


def _same(here: jax.Array, there: jax.Array) -> bool:
    """Whether two arrays have the same bits."""
    one, other = np.asarray(here), np.asarray(there)
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
