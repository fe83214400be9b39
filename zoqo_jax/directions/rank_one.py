"""Rank-one directions: one row of draws for the whole array, times a sign for every row.

Entries stay uncorrelated, and a product with a displaced matrix can share its decoded weights among
both sides of a query and all queries: `x @ (W + a b^T) = x @ W + (x . a) b`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Int16, UInt32

from zoqo_jax.directions import entries
from zoqo_jax.directions.base import (
    Contribution,
    Direction,
    both_sides_fit,
    contribute,
    displace,
)
from zoqo_jax.directions.matmul import (
    Dot,
    Thresholds,
    correct_slices,
    lay_along,
    mean_and_half_difference,
    undisplaced,
)
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.scales import multiplied_out
from zoqo_jax.xla import compiler, random_bits

__all__ = ["RankOne"]


class RankOne(Direction):
    """A direction whose rows are all the same but for a sign each.

    Attributes:
        signs: those of rows and columns, while a product is computed; elsewhere None: not stored.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array, key = Quantizer()(jnp.ones((3, 4))), jax.random.key(0)
        >>> direction = RankOne.describe(key, array, 1.0, distribution="rademacher")
        >>> a, b = direction.row_signs(), direction.column_signs(array)
        >>> bool((direction.draw(array) == jnp.outer(a, b)).all())
        True
    """

    signs: tuple[Int8[Array, "*rows"], Int8[Array, " columns"]] | None = None

    @property
    def is_signs(self) -> bool:
        """Whether an entry is its row's sign times its column's, up to radius and edges."""
        is_whole = self.rounding is None and not self.dithered
        return self.distribution == "rademacher" and is_whole

    def entries(self, array: QuantizedArray) -> Int16[Array, "*rows columns"]:
        """The entries for the + side, before the boundary, of an array with a code to a byte."""
        columns = array.shape[-1] if array.ndim else 1
        m, width = (
            array.broadcast_scales(self.radius_in_codes(array)),
            array.broadcast_scales(self.width(array)),
        )
        if self.signs is not None:
            ndim = self.rows.index.ndim
            of_row, of_columns = self.signs
            draw = lambda *_: lay_along(of_columns, [ndim], ndim + 1, jnp.int8)  # noqa: E731
        else:
            row = random_bits.shared(self.rows)
            asked = entries.asked(self.distribution, self.rounding, columns)
            words, *drawn = random_bits.at_once(
                [self._of_rows, *((row, count, stream) for stream, (_, count) in asked.items())]
            )
            of_row, ahead = _signs_of(words), dict(zip(asked, drawn, strict=True))
            draw = entries.from_rows(
                random_bits.Drawn(row.key0, row.key1, row.index, ahead=ahead), columns
            )

        u = entries.of(draw, m, width, self.distribution, self.rounding)
        u = u * of_row.astype(jnp.int16)[..., None]
        chance = self.probability(array)
        return (
            u
            if chance is None
            else jnp.where(self._support(array.broadcast_scales(chance), columns), u, 0)
        )

    def row_signs(self) -> Int8[Array, "*rows"]:
        """The sign of every row, for the + side of a query."""
        if self.signs is not None:
            return self.signs[0]
        return _signs_of(random_bits.at_once([self._of_rows])[0])

    def column_signs(self, array: QuantizedArray) -> Int8[Array, " columns"]:
        """The signs that all rows of a Rademacher direction share."""
        return self.both_signs(array)[1]

    def both_signs(
        self, array: QuantizedArray
    ) -> tuple[Int8[Array, "*rows"], Int8[Array, " columns"]]:
        """The signs of rows and of columns, drawn at once."""
        if self.signs is not None:
            return self.signs
        columns = array.part_length if array.ndim else 1
        row = random_bits.shared(self.rows)
        parts = [random_bits.part(row, i) for i in range(array.per_byte)]
        asked = [(part, -(-columns // 32), entries.ENTRY) for part in parts]
        of_rows, *of_columns = random_bits.at_once([self._of_rows, *asked])
        signs = [random_bits.signs_in(words, columns).reshape(columns) for words in of_columns]
        return _signs_of(of_rows), jnp.concatenate(signs)

    @property
    def _of_rows(self) -> tuple[random_bits.Rows, int, int]:
        return random_bits.whole(self.rows), 1, entries.SIGN

    def algorithms(
        self, array: QuantizedArray, dot: Dot, vectors: int, population: int, at: Thresholds
    ) -> tuple[str, ...]:
        """See `Direction.algorithms`.

        - "low_rank": on a uniform grid of one scale, `x @ value(n +- m a b^T)` is
          `x @ value(n) +- m s (x . a) b`: one decoded matrix and one product serve both sides and
          every query. The few slices with a code that would leave the grid are corrected; where
          they are many, the next algorithm computes the product.
        - "mean_difference": with M and D half the sum and half the difference of the values at the
          neighbours `+m` and `-m`, it is `x @ M +- ((x * a) @ D) * b`, for every grid and at its
          edges: two decoded matrices and two products serve any number of queries.
        """
        is_matrix = array.ndim >= 2 and array.size and dot.contracted
        if not self.is_signs or self.off_grid is not None or not is_matrix:
            return ()
        if array.ndim - 1 in dot.batched:
            return ()
        contracted = [axis in dot.contracted for axis in range(array.ndim - 1)]
        # Its rows' signs go before or after a product with half the difference.
        is_one_sided = not dot.batched and (all(contracted) or not any(contracted))
        is_few = population > 2 and vectors <= at.few_vectors
        of_line = array.grid.is_uniform and array.has_one_scale and vectors <= at.some_vectors
        two = ("mean_difference",) if is_one_sided and is_few else ()
        return ("low_rank", *two) if of_line else two

    def multiply(
        self, algorithms: tuple[str, ...], array: QuantizedArray, x: Array, dot: Dot, at: Thresholds
    ) -> Array:
        """See `Direction.multiply`."""
        if not algorithms:
            return super().multiply(algorithms, array, x, dot, at)
        first, *rest = algorithms
        # Drawn once, whichever algorithm computes the product.
        self = dataclasses.replace(self, signs=self.both_signs(array))
        if first == "mean_difference":
            return _by_mean_and_difference(self, array, x, dot)
        axis = max(dot.contracted, key=lambda axis: array.shape[axis])
        at_edge = _slices_at_edge(self, array, axis)
        return compiler.either(
            at_edge.sum() <= at.corrected,
            lambda: _by_low_rank(self, array, x, dot, axis, at_edge),
            lambda: self.multiply(tuple(rest), array, x, dot, at),
            jax.eval_shape(dot, array.aval(), x),
        )

    @classmethod
    def direction_sum(
        cls,
        of_query: Callable[[Any], tuple[Direction, QuantizedArray]],
        loss_differences: Float[Array, " queries"],
        contribution: Contribution,
    ) -> Array:
        """The sum over queries of what each says about every code: one product, where it can be."""
        queries = len(loss_differences)
        first, array = of_query(0)
        if queries == 1 or not first.is_signs:
            return super().direction_sum(of_query, loss_differences, contribution)
        directions = jax.vmap(lambda query: of_query(query)[0])(jnp.arange(queries))
        weights = contribute(contribution, loss_differences, jnp.ones(queries, jnp.int16))
        total = _weighted_signs(directions, weights.astype(jnp.float32), array)
        m = array.broadcast_scales(first.radius_in_codes(array))
        if first.boundary == "mask":
            total = jnp.where(both_sides_fit(array.packed, m, array.grid), total, 0.0)
        return total * contribute(contribution, jnp.float32(1.0), m).astype(jnp.float32)


def _signs_of(words: UInt32[Array, "*rows 1"]) -> Int8[Array, "*rows"]:
    return 2 * (words[..., 0] & 1).astype(jnp.int8) - 1


def _weighted_signs(
    directions: RankOne, weights: Float[Array, " queries"], array: QuantizedArray
) -> Float[Array, "..."]:
    """The sum over queries of a weight times the signs of a direction.

    Args:
        directions: of all queries, their arrays stacked.
        weights: exact in any order of summation.
        array: in whose shape, a code to a byte.
    """
    a, b = jax.vmap(lambda direction: direction.both_signs(array))(directions)
    a = a.reshape(weights.shape[0], -1)
    return jnp.einsum(
        "qr,qc->rc",
        a.astype(weights.dtype) * weights[:, None],
        b.astype(weights.dtype),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(array.shape)


def _by_low_rank(
    direction: RankOne, array: QuantizedArray, x: Array, dot: Dot, axis: int, at_edge: Array
) -> Array:
    """One product with the undisplaced values, a vector for the direction, and corrections.

    Args:
        direction: of signs.
        array: on a uniform grid of one scale.
        x: what multiplies it.
        dot: how.
        axis: a contracted axis of the array.
        at_edge: which slices along it hold codes that a displacement may take off the grid.
    """
    a, b = direction.both_signs(array)
    a = a * direction.query_side
    m = direction.radius_in_codes(array).reshape(-1)[0]
    scale = multiplied_out(array.scale).reshape(-1)[0].astype(jnp.float32)
    out = undisplaced(array, x, dot)
    wide = out.dtype if out.dtype.itemsize > x.dtype.itemsize else x.dtype
    along = _along(a.astype(wide), b.astype(wide), x.astype(wide), dot)
    out = out + along * (m.astype(jnp.float32) * scale).astype(along.dtype)

    def beyond_the_line(chosen: Array) -> Array:
        """What lies between the codes that the boundary allows and those on the straight line."""
        rows = a if axis == a.ndim else jnp.take(a, chosen, axis=axis)
        columns = jnp.take(b, chosen) if axis == a.ndim else b
        u = rows[..., None] * columns.reshape((1,) * rows.ndim + columns.shape)
        codes = jnp.take(array.codes, chosen, axis=axis).astype(jnp.int16)
        straight = codes + m * u.astype(jnp.int16)
        beyond = displace(codes, straight - codes, array.grid, direction.boundary) - straight
        return (beyond.astype(jnp.float32) * scale).astype(array.value_dtype)

    return correct_slices(out, x, dot, axis, at_edge, beyond_the_line)


def _slices_at_edge(direction: RankOne, array: QuantizedArray, axis: int) -> Bool[Array, " slices"]:
    """Which slices along an axis hold codes nearer to the grid's edges than the radius."""
    grid, codes = array.grid, array.codes
    m = direction.radius_in_codes(array).reshape(-1)[0]
    others = tuple(other for other in range(array.ndim) if other != axis)
    highest, lowest = (f(axis=others).astype(jnp.int16) for f in (codes.max, codes.min))
    return (highest > grid.high - m) | (lowest < grid.low + m)


def _along(a: Array, b: Array, x: Array, dot: Dot) -> Array:
    """The product with `a b^T`, a matrix that is never made."""
    last = a.ndim
    if last in dot.contracted:
        axis = dot.x_axis(last)
        return dot.without(last)(a, (x * lay_along(b, [axis], x.ndim, x.dtype)).sum(axis=axis))
    out = dot(a, x)
    axis = dot.place(last, last + 1, out.ndim + 1)
    return jnp.expand_dims(out, axis) * lay_along(b, [axis], out.ndim + 1, out.dtype)


def _by_mean_and_difference(direction: RankOne, array: QuantizedArray, x: Array, dot: Dot) -> Array:
    """Two products, with the mean and half the difference of the neighbours' values.

    Args:
        direction: of signs.
        array: what it displaces.
        x: what multiplies it.
        dot: how: all axes but the last are contracted, or none of them, and none is batched.
    """
    rows, last = list(range(array.ndim - 1)), array.ndim - 1
    m = jnp.broadcast_to(array.broadcast_scales(direction.radius_in_codes(array)), array.shape)
    mean, half = mean_and_half_difference(array, direction, m)
    signs = [
        (rows, direction.row_signs() * direction.query_side),
        ([last], direction.column_signs(array)),
    ]
    turned = x
    for axes, sign in signs:
        if axes[0] in dot.contracted:
            turned = turned * lay_along(sign, [dot.x_axis(i) for i in axes], x.ndim, x.dtype)
    out = dot(half, turned)
    for axes, sign in signs:
        if axes[0] not in dot.contracted:
            places = [dot.place(i, array.ndim, out.ndim) for i in axes]
            out = out * lay_along(sign, places, out.ndim, out.dtype)
    return dot(mean, x) + out
