"""Sparse directions whose rows come in pairs, one the other with its sign turned.

Inputs of a layer that are positive on average, such as pixels and what rectifiers let through, make
the sum of a column of its matrix far steeper than all else that a column can do, and that sum is
what limits how far a step may go. A direction in which row i is minus row `s - i` leaves all such
sums as they are. `s` is drawn anew for each direction.

Of the digits of `experiments.laboratory` (4 bits, steps that size themselves) a perceptron reads
96.1 % so, and 93.3 along sparse directions. But what only the sums of columns can mend, stays: for
a loss such as `((w - 0.5) ** 2).sum()` take another structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int16, Key

from zoqo_jax.directions.base import Direction
from zoqo_jax.directions.sparse import Sparse
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.xla import random_bits

__all__ = ["Paired"]

_SHIFT = 12  # a stream of random words of its own; see `entries`
_FARTHEST = 2**16  # shifts that are drawn


class Paired(Sparse):
    """A sparse direction of rows in pairs.

    Rows are counted along the last axis but one, so that layers of a stack are pairs of their own.
    A row that is its own partner (two of them at most) is as in a sparse direction.

    Attributes:
        signs: of each row, 1 or -1; None for an array of one axis, which has no rows to pair.

    Examples:
        >>> import jax
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((5, 1000)))
        >>> u = Paired.describe(jax.random.key(0), array, 1.0, density=1 / 4).draw(array)
        >>> opposite = [[bool((u[i] == -u[j]).all()) for j in range(5)] for i in range(5)]
        >>> sum(map(sum, opposite))  # rows that are another's opposite: all but one
        4
    """

    signs: Int8[Array, "*rows"] | None = None

    @classmethod
    def describe(
        cls, key: Key[Array, ""], array: QuantizedArray, *args: Any, **choices: Any
    ) -> Direction:
        """Describe a direction, as `Sparse.describe` does."""
        made = super().describe(key, array, *args, **choices)
        if array.ndim < 2:
            return made
        count = array.shape[-2]
        one = random_bits.shared(random_bits.rows(key, (1,)))
        shift = random_bits.below(one, min(count, _FARTHEST), 1, _SHIFT)[0, 0]
        row = jnp.arange(count, dtype=jnp.int32)
        partner = (shift - row) % count
        index = made.rows.index - jnp.maximum(row - partner, 0).astype(jnp.uint32)
        signs = jnp.where(partner < row, -1, 1).astype(jnp.int8)
        return dataclasses.replace(
            made,
            rows=dataclasses.replace(made.rows, index=index),
            signs=jnp.broadcast_to(signs, index.shape),
        )

    def entries(self, array: QuantizedArray) -> Int16[Array, "*rows columns"]:
        """See `Direction.entries`."""
        u = super().entries(array)
        return u if self.signs is None else u * self.signs.astype(jnp.int16)[..., None]

    def take_rows(self, fn: Callable[[Array], Array]) -> Direction:
        """See `Direction.take_rows`."""
        if self.signs is None:
            return super().take_rows(fn)
        bare = dataclasses.replace(self, signs=None).take_rows(fn)
        return dataclasses.replace(bare, signs=fn(self.signs[..., None])[..., 0])
