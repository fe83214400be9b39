"""Going through an array a piece at a time, so that what it takes does not grow with the array."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree

__all__ = ["TakeRows", "in_chunks", "in_place"]

TakeRows = Callable[[Array], Array]


def in_chunks(
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
        >>> squares = in_chunks(lambda i: (i + jnp.arange(2)) ** 2, 5, 2, jnp.zeros(5, jnp.int32))
        >>> squares.tolist()
        [0, 1, 4, 9, 16]
    """

    def add_piece(i: Array, out: PyTree) -> PyTree:
        start = jnp.minimum(i * few, length - few)

        def put(whole: Array, piece: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis)

        return jax.tree.map(put, out, make(start))

    return jax.lax.fori_loop(0, -(-length // few), add_piece, out)


def in_place(
    change: Callable[[Array, Array, PyTree], tuple[PyTree, PyTree]],
    length: int,
    few: int,
    arrays: PyTree,
    tally: PyTree,
) -> tuple[PyTree, PyTree]:
    """Change the first axis of arrays, a few of its places at a time, each once.

    Where the arrays are not needed afterwards, XLA writes the new ones over them.

    Args:
        change: from (start, is_new, arrays as they are by now) to new pieces and what to add to the
            tally. `start` is where the piece starts, and `is_new` tells which of its places no
            earlier piece had.
        length: of the axis.
        few: at most `length`; it need not divide it.
        arrays: what to change.
        tally: what to add to.

    Examples:
        >>> def change(start, is_new, x):
        ...     piece = jax.lax.dynamic_slice_in_dim(x, start, 2)
        ...     return piece + 1, jnp.sum(piece * is_new)
        >>> in_place(change, 5, 2, jnp.arange(5), jnp.int32(0))
        (Array([1, 2, 3, 4, 5], dtype=int32), Array(10, dtype=int32))
    """

    def change_piece(i: Array, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        arrays, tally = state
        start = jnp.minimum(i * few, length - few)
        is_new = start + jnp.arange(few) >= i * few  # the last piece may go over places again

        def put(whole: Array, piece: Array) -> Array:
            if length % few:
                chosen = jnp.expand_dims(is_new, range(1, piece.ndim))
                old = jax.lax.dynamic_slice_in_dim(whole, start, few)
                piece = jnp.where(chosen, piece, old)
            return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, 0)

        pieces, more = change(start, is_new, arrays)
        return jax.tree.map(put, arrays, pieces), jax.tree.map(jnp.add, tally, more)

    return jax.lax.fori_loop(0, -(-length // few), change_piece, (arrays, tally))
