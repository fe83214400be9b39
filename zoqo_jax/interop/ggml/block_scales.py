"""Scales and minimums of ggml's blocks: read, kept in two levels, and written as they were."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.scales import Scale, TwoLevel
from zoqo_jax.interop.bits import pack, unpack
from zoqo_jax.interop.ggml.blocks import Scales, Type
from zoqo_jax.interop.packed import aligned

__all__: list[str] = []  # what ggml.py is made of


class Levels:
    """The scales (or minimums) of an array, while its blocks are read.

    Args:
        at: where they lie in a block.
        rows: of the array, all axes but the last as one.
        blocks: of a row.
    """

    def __init__(self, at: Scales, rows: int, blocks: int) -> None:
        self._at = at
        self._outer = aligned((rows, blocks * at.count), at.dtype)
        self._inner = aligned((rows, blocks * at.numbers), at.number)

    def read(self, blocks: np.ndarray, begin: int, end: int) -> None:
        """Take those of the blocks of some rows.

        Raises:
            ValueError: one of them is not finite.
        """
        at = self._at
        raw = np.ascontiguousarray(blocks[:, at.first : at.first + at.size])
        if at.largest is not None:
            if raw.max(initial=0) > at.largest:
                raise ValueError(f"a scale's byte must be at most {at.largest}, got {raw.max()}.")
        elif not np.isfinite(raw.view(at.dtype)).all():
            raise ValueError("a scale is NaN or infinite.")
        floats = raw.view(at.dtype).reshape(end - begin, -1)
        self._outer[begin:end] = -floats if at.is_subtracted else floats
        if at.inner:
            numbers = self._inner[begin:end].view(np.uint8).reshape(-1, at.numbers)
            unpack(at.inner, blocks, numbers)
            if at.zero:
                numbers -= np.uint8(at.zero)  # modulo 256, as int8 counts

    def array(self, shape: tuple[int, ...]) -> Scale:
        """All of them, for an array of this shape."""
        if self._at.size == self._at.count:  # floats of 8 bits, in the place of whole numbers
            one = np.ones((1,) * len(shape), np.float32)
            inner = jax.device_put(self._outer.view(self._at.number).reshape(*shape[:-1], -1))
            return TwoLevel(jax.device_put(one), inner, powers=self._at.has_powers)
        outer = self._outer.reshape(*shape[:-1], -1)
        if not self._at.inner:
            return jax.device_put(outer)
        return TwoLevel.packed(outer, self._inner.reshape(*shape[:-1], -1), self._at.bits)


class Stored(NamedTuple):
    """The scales (or minimums) of an array as its blocks store them.

    Attributes:
        at: where they lie in a block.
        outer: floats, (rows, of a row).
        inner: whole numbers, uint8 (rows, of a row), or None.
    """

    at: Scales
    outer: np.ndarray
    inner: np.ndarray | None = None

    def write(self, blocks: np.ndarray, begin: int, end: int) -> None:
        """Put them into the blocks of some rows."""
        first, size = self.at.first, self.at.size
        floats = np.ascontiguousarray(self.outer[begin:end]).view(np.uint8)
        blocks[:, first : first + size] = floats.reshape(-1, size)
        if self.inner is not None:
            pack(self.at.inner, self.inner[begin:end].reshape(-1, self.at.numbers), blocks)


def stored(form: Type, at: Scales, tensor: QuantizedArray, scale: Scale) -> Stored:
    """What blocks store of an array's scales (or of its offset).

    Raises:
        ValueError: they do not fit the type.
    """
    *leading, columns = tensor.shape
    rows = math.prod(leading)
    if not isinstance(scale, TwoLevel):
        return Stored(at, _halves(_per_block(tensor, scale, form.block)).reshape(rows, -1))
    if tensor.block != (-1, form.block) or scale.shape[-1] * form.block != columns:
        raise ValueError(f"{form.block} neighbours must share a scale in {form.name}.")

    def of_rows(x: np.ndarray, count: int) -> np.ndarray:
        return np.broadcast_to(x, (*leading, count)).reshape(rows, count)

    outer, inner = np.asarray(scale.outer), of_rows(np.asarray(scale.numbers()), scale.shape[-1])
    if not at.inner:
        if (outer != 1).any():
            raise ValueError(f"the outer scale must be 1 in {form.name}, got {outer.ravel()[0]}.")
        return Stored(at, inner)
    blocks = columns // form.length
    if outer.shape[-1] not in (1, blocks):
        raise ValueError(f"{form.length} neighbours must share an outer scale in {form.name}.")
    numbers = inner.view(np.uint8) + np.uint8(at.zero)
    if numbers.max(initial=0) >= 2**at.bits:
        raise ValueError(
            f"inner scales must have {at.bits} bits in {form.name}, got {inner.max()}."
        )
    outer = of_rows(_halves(outer), blocks)
    return Stored(at, -outer if at.is_subtracted else outer, numbers)


def _per_block(tensor: QuantizedArray, numbers: Any, length: int) -> np.ndarray:
    """A scale or offset for every `length` codes, (*rows, blocks)."""
    numbers = np.asarray(numbers)
    if tensor.block == (-1, length) and numbers.shape[-1] * length == tensor.shape[-1]:
        return np.broadcast_to(numbers, (*tensor.shape[:-1], numbers.shape[-1]))
    spread = np.asarray(tensor.broadcast_scales(jax.device_put(numbers)))
    each = np.broadcast_to(spread, tensor.shape).reshape(*tensor.shape[:-1], -1, length)
    if (each != each[..., :1]).any():
        raise ValueError(f"{length} neighbours must share a scale.")
    return each[..., 0]


def _halves(numbers: np.ndarray) -> np.ndarray:
    """Numbers as float16, if it holds them."""
    if numbers.dtype == np.float16:
        return numbers
    with np.errstate(over="ignore"):
        halves = numbers.astype("<f2")
    if (halves.astype(np.float64) != numbers.astype(np.float64)).any():
        raise ValueError(
            "float16 does not hold its scales: quantize it with scale_dtype=jnp.float16."
        )
    return halves
