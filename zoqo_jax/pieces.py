"""Going through an array a piece at a time, so that what it takes does not grow with the array."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree

__all__ = ["in_pieces"]


def in_pieces(
    make: Callable[[Int32[Array, ""]], PyTree], length: int, few: int, out: PyTree, axis: int = 0
) -> PyTree:
    """Fill an axis of arrays, a few of its places at a time.

    Args:
        make: from where a piece starts to the piece, `few` long.
        length: of the axis.
        few: at most `length`; where it does not divide it, the last piece goes over places again.
        out: arrays of the shape and dtype of the result.
        axis: which one.

    Examples:
        >>> squares = in_pieces(lambda i: (i + jnp.arange(2)) ** 2, 5, 2, jnp.zeros(5, jnp.int32))
        >>> squares.tolist()
        [0, 1, 4, 9, 16]
    """

    def add_piece(i: Array, out: PyTree) -> PyTree:
        start = jnp.minimum(i * few, length - few)

        def put(whole: Array, piece: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis)

        return jax.tree.map(put, out, make(start))

    return jax.lax.fori_loop(0, -(-length // few), add_piece, out)
