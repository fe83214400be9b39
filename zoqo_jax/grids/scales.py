"""Scales of two levels: a float for many blocks, times a small number for each of them.

A K-quant of GGUF has a 6-bit scale and minimum for every 32 codes and two float16 for every 256;
NVFP4 an 8-bit float for every 16 and one float32. Multiplied out they would take 4 bytes a block,
so they are kept as a file has them: Q4_K takes 4.6 bits a code instead of 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

__all__ = ["Scale", "TwoLevel", "float_part", "map_float", "multiplied_out"]


class TwoLevel(eqx.Module):
    """Scales, or offsets, as products: `outer` of a block's superblock times its own `inner`.

    It stands in an array's place in `QuantizedArray.scale` and `.offset`, with the shape of
    `inner`.

    Attributes:
        outer: value units; along the last axis one for each superblock, of as many blocks as fit.
        inner: whole numbers, or 8-bit floats, one for each block.
        divides: whether a value is `inner / outer` instead of their product.

    Examples:
        >>> outer = jnp.array([[0.5, 2.0]], jnp.float16)
        >>> inner = jnp.array([[1, 2, 3, 4]], jnp.uint8)
        >>> TwoLevel(outer, inner).values().tolist()
        [[0.5, 1.0, 6.0, 8.0]]
    """

    outer: Float[Array, "..."]
    inner: Array
    divides: bool = eqx.field(static=True, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """One for each block."""
        return self.inner.shape

    @property
    def ndim(self) -> int:
        """As many axes as the codes."""
        return self.inner.ndim

    @property
    def size(self) -> int:
        """How many blocks there are."""
        return self.inner.size

    @property
    def dtype(self) -> Any:
        """Of the products."""
        return jnp.dtype(jnp.float32)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The products in a dtype."""
        return self.values().astype(dtype)

    def values(self) -> Float32[Array, "..."]:
        """The products, float32, one for each block."""
        outer, inner = self.outer.astype(jnp.float32), self.inner.astype(jnp.float32)
        blocks, superblocks = inner.shape[-1], outer.shape[-1]
        if superblocks not in (1, blocks):
            each = jnp.broadcast_to(outer[..., None], (*outer.shape, blocks // superblocks))
            outer = each.reshape(*outer.shape[:-1], blocks)
        return inner / outer if self.divides else outer * inner


Scale = Float[Array, "..."] | TwoLevel
"""What `QuantizedArray.scale` may be."""


def multiplied_out(scale: Array | TwoLevel) -> Array:
    """One number for each block: an array as it is, or the products of two levels."""
    return scale.values() if isinstance(scale, TwoLevel) else scale


def float_part(scale: Scale) -> Float[Array, "..."]:
    """The floats in it that may be trained: an array itself, or the outer level."""
    return scale.outer if isinstance(scale, TwoLevel) else scale


def map_float(fn: Callable[[Array], Array], scale: Scale) -> Scale:
    """The same scales with a function of their `float_part` in its place.

    Examples:
        >>> two = TwoLevel(jnp.ones((1, 1)), jnp.array([[3, 4]], jnp.int8))
        >>> map_float(lambda x: -x, two).values().tolist()
        [[-3.0, -4.0]]
    """
    if isinstance(scale, TwoLevel):
        return dataclasses.replace(scale, outer=fn(scale.outer))
    return fn(scale)
