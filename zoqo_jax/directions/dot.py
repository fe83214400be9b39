"""`Dot`: `jax.lax.dot_general` of a matrix and vectors, and where their axes come to lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

__all__ = ["Dims", "Dot"]

Dims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Dot:
    """`jax.lax.dot_general` of a matrix, as an implicit one is, and an array of vectors.

    Attributes:
        operand: the place of the matrix among the operands, 0 (lhs) or 1 (rhs).
        dims: dimension numbers, (contracting, batch), in the order of the operands.
        params: the other parameters of `jax.lax.dot_general_p`.
        integer: whether products with codes are those of integers (`integers.py`).
    """

    operand: int
    dims: Dims
    params: dict[str, Any] = dataclasses.field(hash=False)
    integer: bool = False

    def __call__(self, values: Array, x: Array) -> Array:
        """The product."""
        lhs, rhs = (x, values) if self.operand else (values, x)
        return jax.lax.dot_general(lhs, rhs, dimension_numbers=self.dims, **self.params)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the matrix that are contracted."""
        return tuple(self.dims[0][self.operand])

    @property
    def batched(self) -> tuple[int, ...]:
        """Axes of the matrix that both operands have."""
        return tuple(self.dims[1][self.operand])

    def x_axis(self, axis: int) -> int:
        """The axis of the vectors that is contracted with an axis of the matrix."""
        return self.dims[0][1 - self.operand][self.contracted.index(axis)]

    def place(self, axis: int, ndim: int, out_ndim: int) -> int:
        """Where in the result an axis of the matrix, of `ndim` axes, comes to lie."""
        free = [i for i in range(ndim) if i not in (*self.contracted, *self.batched)]
        first = out_ndim - len(free) if self.operand else len(self.batched)
        return first + free.index(axis)

    def without(self, axis: int) -> Dot:
        """The product when a contracted axis is gone from both."""
        gone = (axis, self.x_axis(axis)) if self.operand == 0 else (self.x_axis(axis), axis)

        def rest(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
            lhs, rhs = (
                tuple(i - (i > out) for i in of if i != out)
                for of, out in zip(axes, gone, strict=True)
            )
            return lhs, rhs

        return dataclasses.replace(self, dims=(rest(self.dims[0]), rest(self.dims[1])))
