"""Scales of two levels: a float for many blocks, times a small number for each of them.

A K-quant of GGUF has a 6-bit scale and minimum for every 32 codes and two float16 for every 256;
NVFP4 an 8-bit float for every 16 and one float32. Multiplied out they would take 4 bytes a block,
so they are kept as a file has them: Q4_K takes 4.6 bits a code instead of 6.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from zoqo_jax.grids import packing

__all__ = ["Scale", "TwoLevel", "float_part", "map_float", "multiplied_out"]


class TwoLevel(eqx.Module):
    """Scales, or offsets, as products: `outer` of a block's superblock times its own `inner`.

    It stands in an array's place in `QuantizedArray.scale` and `.offset`, with the shape of
    `inner`.

    Attributes:
        outer: value units; along the last axis one for each superblock, of as many blocks as fit.
        inner: whole numbers, or 8-bit floats, one for each block; or bytes that such numbers share.
        divides: whether a value is `inner / outer` instead of their product.
        powers: whether `inner` holds bytes n that stand for 2^(n - 127), as MXFP4's. JAX has a
            dtype for them, float8_e8m0fnu, but it has no zero: an update that adds zeros to all
            that is frozen would make it NaN. (XLA may take 2^-127 for zero, as other numbers below
            float32's normal ones.)
        bits: width of a number in `inner`, whose bytes are those of `packing.py`; 8 for bytes.

    Examples:
        >>> outer = jnp.array([[0.5, 2.0]], jnp.float16)
        >>> inner = jnp.array([[1, 2, 3, 4]], jnp.uint8)
        >>> TwoLevel(outer, inner).values().tolist()
        [[0.5, 1.0, 6.0, 8.0]]
    """

    outer: Float[Array, "..."]
    inner: Array
    divides: bool = eqx.field(static=True, default=False)
    powers: bool = eqx.field(static=True, default=False)
    bits: int = eqx.field(static=True, default=8)

    @classmethod
    def packed(cls, outer: Array | np.ndarray, inner: np.ndarray, bits: int) -> TwoLevel:
        """Two levels of what was read from a file, numbers of 2 or 4 bits sharing bytes.

        Others, those that have a sign, and those whose last axis fills no whole bytes, have a byte
        each.

        Args:
            outer: as the attribute.
            inner: uint8 or int8 numbers.
            bits: that a number has in the file.

        Examples:
            >>> outer, inner = np.ones((1, 1), np.float16), np.array([[1, 2, 3, 4]], np.uint8)
            >>> two = TwoLevel.packed(outer, inner, 4)
            >>> two.inner.tolist(), two.shape, two.numbers().tolist()
            ([[49, 66]], (1, 4), [[1, 2, 3, 4]])
        """
        count = 8 // bits
        is_narrow = inner.dtype == np.uint8 and bits in (2, 4) and inner.max(initial=0) < 2**bits
        if not is_narrow or inner.shape[-1] % count:
            return cls(jax.device_put(outer), jax.device_put(inner))
        parts = np.split(inner, count, axis=-1)  # by NumPy: XLA would compile for each shape
        shared = [part << np.uint8(i * bits) for i, part in enumerate(parts)]
        bytes_ = functools.reduce(np.bitwise_or, shared)
        return cls(jax.device_put(outer), jax.device_put(bytes_), bits=bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """One for each block."""
        *rows, last = self.inner.shape
        return (*rows, last * 8 // self.bits)

    @property
    def ndim(self) -> int:
        """As many axes as the codes."""
        return self.inner.ndim

    @property
    def size(self) -> int:
        """How many blocks there are."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the products."""
        return jnp.dtype(jnp.float32)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The products in a dtype."""
        return self.values().astype(dtype)

    def values(self) -> Float32[Array, "..."]:
        """The products, float32, one for each block."""
        outer, inner = self.outer.astype(jnp.float32), self._floats()
        blocks, superblocks = inner.shape[-1], outer.shape[-1]
        if superblocks not in (1, blocks):
            each = jnp.broadcast_to(outer[..., None], (*outer.shape, blocks // superblocks))
            outer = each.reshape(*outer.shape[:-1], blocks)
        return inner / outer if self.divides else outer * inner

    def numbers(self) -> Array:
        """The inner numbers, each by itself, in the dtype of `inner`."""
        return packing.unpack(self.inner, self.bits) if self.bits < 8 else self.inner

    def _floats(self) -> Float32[Array, "..."]:
        """What `inner` stands for."""
        if not self.powers:
            return self.numbers().astype(jnp.float32)
        bits = self.inner.astype(jnp.uint32) << 23  # the exponent of a float32
        powers = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(self.inner == 0, jnp.float32(2.0**-127), powers)


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
