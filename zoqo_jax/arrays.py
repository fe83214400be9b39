"""Codes and the values they stand for: `Grid` and `QuantizedArray`.

A code `n` is an unsigned integer; its value is `scale * levels[n] + offset` with one scale (and
offset) for a tensor, a channel or a block. Optimizers move codes and never leave
`grid.low .. grid.high`. How a scale is found is the business of `quantization.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.core import ShapedArray
from jaxtyping import Array, Float, PyTree, UInt

__all__ = ["Grid", "QuantizedArray", "dequantize", "is_quantized"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels that codes index, at scale 1, and which codes are legal.

    Attributes:
        levels: value of each code at scale 1, increasing over the legal codes. Whole numbers one
            apart make a uniform grid.
        low: least legal code.
        high: greatest legal code.

    Examples:
        >>> Grid((-2.0, -1.0, 0.0, 1.0), 1, 3).spacing
        1.0
    """

    levels: tuple[float, ...]
    low: int
    high: int

    def __repr__(self) -> str:
        spaced = "uniform" if self.is_uniform else "nonuniform"
        return f"Grid({len(self.levels)} {spaced} levels, legal {self.low}..{self.high})"

    def __hash__(self) -> int:  # every jitted call compares grids: hash 256 floats once only
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.levels, self.low, self.high))

    @functools.cached_property
    def spacing(self) -> float:
        """Mean distance between neighbouring legal levels; 1 for a uniform grid."""
        return (self.levels[self.high] - self.levels[self.low]) / (self.high - self.low)

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether a level is its code plus a whole number, so that no table need be read."""
        return all(b - a == 1.0 for a, b in zip(self.levels, self.levels[1:], strict=False))

    def at(self, codes: Array) -> Float[Array, "..."]:
        """The levels of legal codes, float32."""
        if self.is_uniform:
            return codes.astype(jnp.int32).astype(jnp.float32) + self.levels[0]
        table = jnp.asarray(np.asarray(self.levels, np.float32))
        return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


class QuantizedArray(quax.ArrayValue):
    """An array stored as integer codes; to JAX code under `quaxify` an ordinary float array.

    Invariants:

    - `codes` are uint4 where the grid has at most 16 levels, else uint8, in the logical shape, and
      every one lies in `grid.low .. grid.high`;
    - `scale`, and `offset` unless it is None, have as many axes as `codes`. Along each axis they
      are 1 long (shared), as long as `codes` (one each), or, along `block[0]` (counted from the
      end), one for each `block[1]` neighbours with the last block cut short;
    - the value is `scale * levels[codes] + offset`, computed in float32 and rounded once to
      `value_dtype`;
    - where `offset` is the zero point of a uniform grid, `scale` has at most 16 significant bits,
      so the product is exact in float32 and zero stays exactly a level, fused multiply-add or not.

    As a pytree its leaves are `codes`, `scale` and `offset`; the rest is static.

    Attributes:
        codes: unsigned integers, any shape.
        scale: value units per level unit; zero where a whole block was zero.
        offset: value units, or None for 0.
        grid: levels and legal codes.
        block: (negative axis, length) or None.
        value_dtype: dtype of the values, float16, bfloat16 or float32.

    Examples:
        >>> import zoqo_jax as zq
        >>> array = zq.Quantizer(bits=4, range=1.0)(jnp.array([-1.0, 0.0, 0.4]))
        >>> array.codes.dtype.name, array.codes.tolist()
        ('uint4', [1, 8, 11])
        >>> [round(value, 3) for value in dequantize(array).tolist()]
        [-0.933, 0.0, 0.4]
    """

    codes: UInt[Array, "..."]
    scale: Float[Array, "..."]
    offset: Float[Array, "..."] | None
    grid: Grid = eqx.field(static=True)
    block: tuple[int, int] | None = eqx.field(static=True)
    value_dtype: Any = eqx.field(static=True)

    def __repr__(self) -> str:
        def kind(x: Any) -> str:
            return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

        block = "" if self.block is None else f", block={self.block}"
        offset = "" if self.offset is None else f", offset={kind(self.offset)}"
        scale = f"scale={kind(self.scale)}{offset}{block}"
        return f"QuantizedArray({kind(self.codes)}, {self.grid}, {scale})"

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        return ShapedArray(self.codes.shape, self.value_dtype)

    def materialise(self) -> Array:
        """The values."""
        return self.decode(self.codes)

    @property
    def step(self) -> Float[Array, "..."]:
        """Mean distance between neighbouring levels: value units, float32, shape of `scale`."""
        return self.scale.astype(jnp.float32) * self.grid.spacing

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Values of other codes of the same shape, under this array's scale, in `value_dtype`."""
        values = self.spread(self.scale).astype(jnp.float32) * self.grid.at(codes)
        if self.offset is not None:
            values = values + self.spread(self.offset).astype(jnp.float32)
        return values.astype(self.value_dtype)

    def spread(self, per_block: Array) -> Array:
        """Repeat something in `scale`'s shape so that it broadcasts against `codes`."""
        if self.block is None:
            return per_block
        axis, length = self.block
        longer = jnp.repeat(per_block, length, axis=axis)
        return jax.lax.slice_in_dim(longer, 0, self.codes.shape[axis], axis=axis)

    def moved(self, codes: Array) -> QuantizedArray:
        """The same array at other codes."""
        return dataclasses.replace(self, codes=codes.astype(self.codes.dtype))


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a `QuantizedArray`; the `is_leaf` for maps over quantized trees."""
    return isinstance(leaf, QuantizedArray)


def dequantize(tree: PyTree) -> PyTree:
    """Replace every `QuantizedArray` of a tree by its values.

    Examples:
        >>> import zoqo_jax as zq
        >>> dequantize({"w": zq.Quantizer(range=1.0)(jnp.zeros(2))})["w"].tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(
        lambda leaf: leaf.materialise() if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )
