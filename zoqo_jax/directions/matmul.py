"""Products of a displaced matrix and vectors: what all matmul algorithms are made of.

`dequantize`, which serves every direction, decodes the displaced codes and multiplies, one side
after the other, so that one decoded matrix exists at a time. What a structure can do better stands
in its own file (`directions/`). All are exact but for the roundings of their floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

from zoqo_jax.directions import integers
from zoqo_jax.directions.dot import Dims as Dims
from zoqo_jax.directions.dot import Dot as Dot
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.scales import map_float
from zoqo_jax.xla import compiler

__all__ = [
    "Dims",
    "Dot",
    "Kernel",
    "Thresholds",
    "correct_slices",
    "depends_on",
    "dequantize",
    "lay_along",
    "mean_and_half_difference",
    "one_by_one",
    "product",
    "undisplaced",
]

Kernel = Callable[[QuantizedArray, Any, Array, Array], Array]

_FEW_SLICES = 4  # of a matrix that are corrected at a time


class Thresholds(NamedTuple):
    """Where one matmul algorithm begins to cost less than another.

    Attributes:
        few_vectors: up to so many vectors for each of several displacements, two products with
            shared matrices cost less than one with a matrix of its own.
        some_vectors: up to so many, one shared product and its corrections do.
        chunk: codes of a table of rows that are decoded at a time.
        corrected: slices of a matrix with codes at the edges that are corrected at most.
        integer_block: blocks along the contracted axis that are shorter are multiplied as floats,
            whatever `products` says.
    """

    few_vectors: int
    some_vectors: int
    chunk: int
    corrected: int
    integer_block: int


def product(array: QuantizedArray, codes: Array, x: Array, dot: Dot) -> Array:
    """The product with what some codes stand for under an array's scales."""
    if dot.integer:
        return integers.product(array, codes, x, dot)
    return dot(array.decode(codes), x)


def dequantize(
    array: QuantizedArray,
    direction: Any,
    x: Array,
    dot: Dot,
    kernel: Kernel | None = None,
) -> Array:
    """A product with a matrix of its own for every displacement, one after another.

    Args:
        array: the matrix.
        direction: a `Direction`, its side that of the query.
        x: what multiplies it.
        dot: how.
        kernel: multiplies both sides of a query at once, or None.
    """

    def one_side(array: QuantizedArray, direction: Any, side: Array, x: Array) -> Array:
        array = depends_on(x, array)
        u = direction.depends_on(x).draw(array)
        return product(array, direction.displaced(array, side * u), x, dot)

    def two_sides(array: QuantizedArray, direction: Any, sides: Array, x: Array) -> Array:
        """The products of two sides, whose direction is drawn once."""
        if kernel is not None:
            return kernel(array, direction, sides, x)
        # Made once, and not by the decoding of each side.
        u = compiler.materialized(
            lambda: direction.depends_on(x[0]).draw(depends_on(x[0], array)), direction.rows.key0
        )

        def codes(side: Array) -> Array:
            return direction.displaced(array, side * u)

        vectors = x[0].size + jax.eval_shape(dot, array.aval(), x[0]).size
        if vectors > array.size:  # a second matrix is little beside them
            waiting = depends_on(x[0], array)
            return jax.vmap(lambda side, x: product(waiting, codes(side), x, dot))(sides, x)
        first = product(depends_on(x[0], array), codes(sides[0]), x[0], dot)
        second = product(depends_on(first, array), codes(sides[1]), x[1], dot)
        return jnp.stack([first, second])

    one, two = custom_vmap(one_side), custom_vmap(two_sides)

    @one.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        in_array, in_direction, in_side, in_x = batched
        if size != 2 or not in_side or any(jax.tree.leaves((in_array, in_direction))):
            return one_by_one(one, size, batched, operands)
        array, direction, sides, x = operands
        return two(array, direction, sides, x if in_x else jnp.stack([x, x])), True

    @two.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        return one_by_one(two, size, batched, operands)

    upward = dataclasses.replace(direction, side=jnp.ones(direction.side.shape, jnp.int8))
    return one(array, upward, direction.query_side.astype(jnp.int16), x)


def undisplaced(array: QuantizedArray, x: Array, dot: Dot) -> Array:
    """The product with an array as it is, not decoded before `x` is known."""
    codes = array.codes
    if dot.integer:  # which are converted without a look at scales
        codes = compiler.depends_on(x, codes)
    return product(depends_on(x, array), codes, x, dot)


def mean_and_half_difference(
    array: QuantizedArray, direction: Any, u: Array
) -> tuple[Array, Array]:
    """Half the sum and half the difference of the values that an array has at `u` and at `-u`."""
    above, below = (
        array.decode(direction.displaced(array, side)).astype(jnp.float32) for side in (u, -u)
    )
    mean, half = (above + below) / 2, (above - below) / 2
    return mean.astype(array.value_dtype), half.astype(array.value_dtype)


def correct_slices(
    out: Array,
    x: Array,
    dot: Dot,
    axis: int,
    chosen: Bool[Array, " slices"],
    missing: Callable[[Array], Array],
    few: int = _FEW_SLICES,
) -> Array:
    """Add to a product what its matrix lacks in some of its slices, a few of them at a time.

    Args:
        out: the product without it.
        x: what multiplies the matrix.
        dot: how.
        axis: an axis of the matrix; one that is not contracted only of a matrix of two axes.
        chosen: which slices along it.
        missing: from the numbers of a few slices to what their values lack.
        few: how many slices at a time.
    """
    few = min(few, chosen.size)

    def correct(state: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, out = state
        todo, numbers = jax.lax.top_k(remaining.astype(jnp.float32), few)
        remaining = remaining.at[numbers].set(False)
        if axis in dot.contracted:
            x_axis = dot.x_axis(axis)
            some = jnp.take(x, numbers, axis=x_axis)
            some = some * lay_along(todo, [x_axis], x.ndim, x.dtype)
            return remaining, out + dot(missing(numbers), some)
        place = dot.place(axis, 2, out.ndim)
        more = dot(missing(numbers), x)
        more = jnp.moveaxis(more * lay_along(todo, [place], out.ndim, out.dtype), place, 0)
        added = jnp.moveaxis(out, place, 0).at[numbers].add(more)
        return remaining, jnp.moveaxis(added, 0, place)

    return jax.lax.while_loop(lambda state: state[0].any(), correct, (chosen, out))[1]


def one_by_one(fn: Any, size: int, batched: PyTree, operands: PyTree) -> tuple[Array, bool]:
    """A batching rule that has one decoded matrix at a time, or one for all where that will do."""
    batched = tuple(batched)
    operands = jax.tree.map(jnp.asarray, operands)  # constants come as a NumPy type of JAX's own
    in_array, *in_direction, _ = batched
    if any(jax.tree.leaves(in_array)) or not any(jax.tree.leaves(in_direction)):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        return jax.vmap(fn.fun, in_axes=axes, axis_size=size)(*operands), True

    def pick(i: Array) -> PyTree:
        return jax.tree.map(lambda x, is_batched: x[i] if is_batched else x, operands, batched)

    return jax.lax.map(lambda i: fn(*pick(i)), jnp.arange(size)), True


def depends_on(x: Array, array: QuantizedArray) -> QuantizedArray:
    """The same array, not to be decoded before `x` is known."""
    scale = map_float(lambda scale: compiler.depends_on(x, scale), array.scale)
    return dataclasses.replace(array, scale=scale)


def lay_along(v: Array, axes: Sequence[int], ndim: int, dtype: Any) -> Array:
    """Lay the axes of `v` along the given axes of an array of `ndim` axes."""
    order = sorted(range(v.ndim), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = v.shape[i]
    return jnp.transpose(v, order).reshape(shape).astype(dtype)
