"""The three ways in which a displaced array is multiplied; `products.py` chooses among them.

- *shared*: for a rank-one direction of signs `a b^T` and a uniform grid, `x @ value(n +- m a b^T)`
  is `x @ value(n) +- m s (x . a) b`: one decoded matrix and one product serve both sides and every
  query, and a direction costs a vector. The few slices with a code that would leave the grid are
  corrected.
- *halves*: with M and D half the sum and half the difference of the values at the neighbours `+m`
  and `-m`, `x @ value(n +- m a b^T)` is `x @ M +- ((x * a) @ D) * b`, for every compander and at
  the grid's edges. Two matrices and two products serve any number of queries.
- *direct*: decode the displaced codes and multiply, one side after the other, so that one decoded
  matrix exists at a time (both together where the vectors take more memory than the matrices).

All three are exact but for the roundings of their floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

from zoqo_jax import compiler
from zoqo_jax.arrays import QuantizedArray, is_quantized
from zoqo_jax.implicit import PerturbedArray, is_implicit, perturbed
from zoqo_jax.stencils import Stencil, column_signs, displace, draw, row_signs

__all__ = [
    "Dims",
    "Dot",
    "Kernel",
    "after",
    "direct",
    "halves",
    "in_turn",
    "shared",
    "slices_at_edge",
]

Dims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
Kernel = Callable[[QuantizedArray, Stencil, Array, Array], Array]

_FEW_SLICES = 4  # of a matrix that are corrected at a time


@dataclasses.dataclass(frozen=True)
class Dot:
    """`jax.lax.dot_general` of a matrix, as an implicit one is, and an array of vectors.

    Attributes:
        side: the place of the matrix among the operands, 0 or 1.
        dims: dimension numbers, (contracting, batch), in the order of the operands.
        params: the other parameters of `jax.lax.dot_general_p`.
    """

    side: int
    dims: Dims
    params: dict[str, Any]

    def __call__(self, values: Array, x: Array) -> Array:
        """The product."""
        operands = (x, values) if self.side else (values, x)
        return jax.lax.dot_general(*operands, dimension_numbers=self.dims, **self.params)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Axes of the matrix that are contracted."""
        return tuple(self.dims[0][self.side])

    @property
    def batched(self) -> tuple[int, ...]:
        """Axes of the matrix that both operands have."""
        return tuple(self.dims[1][self.side])

    def x_axis(self, axis: int) -> int:
        """The axis of the vectors that is contracted with an axis of the matrix."""
        return self.dims[0][1 - self.side][self.contracted.index(axis)]

    def place(self, axis: int, ndim: int, out_ndim: int) -> int:
        """Where in the result an axis of the matrix, of `ndim` axes, comes to lie."""
        free = [i for i in range(ndim) if i not in (*self.contracted, *self.batched)]
        first = out_ndim - len(free) if self.side else len(self.batched)
        return first + free.index(axis)

    def without(self, axis: int) -> Dot:
        """The product when a contracted axis is gone from both."""
        gone = (axis, self.x_axis(axis)) if self.side == 0 else (self.x_axis(axis), axis)

        def rest(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
            left, right = (
                tuple(i - (i > out) for i in of if i != out)
                for of, out in zip(axes, gone, strict=True)
            )
            return left, right

        return dataclasses.replace(self, dims=(rest(self.dims[0]), rest(self.dims[1])))


def shared(w: PerturbedArray, x: Array, dot: Dot, axis: int, at_edge: Array) -> Array:
    """One product with the undisplaced values, a vector for the direction, and corrections.

    Args:
        w: displaced along a rank-one direction of signs, on a uniform grid of one scale.
        x: what multiplies it.
        dot: how.
        axis: a contracted axis of `w`.
        at_edge: which slices along it hold codes that a displacement may take off the grid.
    """
    array, stencil = w.array, w.stencil
    a = row_signs(stencil) * _query_side(w)
    b = column_signs(stencil, array)
    m = stencil.reach(array).reshape(-1)[0]
    scale = array.scale.reshape(-1)[0].astype(jnp.float32)
    out = dot(after(x, array).materialise(), x)
    wide = out.dtype if out.dtype.itemsize > x.dtype.itemsize else x.dtype
    along = _along_direction(a.astype(wide), b.astype(wide), x.astype(wide), dot)
    out = out + along * (m.astype(jnp.float32) * scale).astype(along.dtype)

    # What lies between the codes that the boundary allows and those on the straight line, for the
    # slices that have any, a few at a time.
    x_axis = dot.x_axis(axis)
    few = min(_FEW_SLICES, at_edge.size)

    def correct(state: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, out = state
        todo, chosen = jax.lax.top_k(remaining.astype(jnp.float32), few)
        rows = a if axis == a.ndim else jnp.take(a, chosen, axis=axis)
        columns = jnp.take(b, chosen) if axis == a.ndim else b
        u = rows[..., None] * columns.reshape((1,) * rows.ndim + columns.shape)
        codes = jnp.take(array.codes, chosen, axis=axis).astype(jnp.int16)
        straight = codes + m * u.astype(jnp.int16)
        beyond = displace(codes, straight - codes, array.grid, stencil.boundary) - straight
        missing = (beyond.astype(jnp.float32) * scale).astype(array.value_dtype)
        some = jnp.take(x, chosen, axis=x_axis)
        some = some * _onto(todo, [x_axis], x.ndim, x.dtype)
        return remaining.at[chosen].set(False), out + dot(missing, some)

    _, out = jax.lax.while_loop(lambda state: state[0].any(), correct, (at_edge, out))
    return out


def slices_at_edge(w: PerturbedArray, axis: int) -> Bool[Array, " slices"]:
    """Which slices along an axis hold codes nearer to the grid's edges than the reach."""
    grid, codes = w.array.grid, w.array.codes
    m = w.stencil.reach(w.array).reshape(-1)[0]
    others = tuple(other for other in range(w.ndim) if other != axis)
    highest, lowest = (f(axis=others).astype(jnp.int16) for f in (codes.max, codes.min))
    return (highest > grid.high - m) | (lowest < grid.low + m)


def _along_direction(a: Array, b: Array, x: Array, dot: Dot) -> Array:
    """The product with `a b^T`, a matrix that is never made."""
    last = a.ndim
    if last in dot.contracted:
        axis = dot.x_axis(last)
        return dot.without(last)(a, (x * _onto(b, [axis], x.ndim, x.dtype)).sum(axis=axis))
    out = dot(a, x)
    axis = dot.place(last, last + 1, out.ndim + 1)
    return jnp.expand_dims(out, axis) * _onto(b, [axis], out.ndim + 1, out.dtype)


def halves(w: PerturbedArray, x: Array, dot: Dot) -> Array:
    """Two products with the mean and half the difference of the neighbours' values.

    Args:
        w: displaced along a rank-one direction of signs.
        x: what multiplies it.
        dot: how: all axes but the last are contracted, or none of them, and none is batched.
    """
    rows, last = list(range(w.ndim - 1)), w.ndim - 1
    mean, half = _neighbours(w)
    signs = [
        (rows, row_signs(w.stencil) * _query_side(w)),
        ([last], column_signs(w.stencil, w.array)),
    ]
    turned = x
    for axes, sign in signs:
        if axes[0] in dot.contracted:
            turned = turned * _onto(sign, [dot.x_axis(i) for i in axes], x.ndim, x.dtype)
    out = dot(half, turned)
    for axes, sign in signs:
        if axes[0] not in dot.contracted:
            places = [dot.place(i, w.ndim, out.ndim) for i in axes]
            out = out * _onto(sign, places, out.ndim, out.dtype)
    return dot(mean, x) + out


def _neighbours(w: PerturbedArray) -> tuple[Array, Array]:
    """M and D: half the sum and half the difference of the values at the neighbours +m and -m."""
    array = w.array
    m = jnp.broadcast_to(array.spread(w.stencil.reach(array)), array.shape)
    above, below = (array.decode(w.displaced(u)).astype(jnp.float32) for u in (m, -m))
    mean, half = (above + below) / 2, (above - below) / 2
    return mean.astype(array.value_dtype), half.astype(array.value_dtype)


def direct(
    w: PerturbedArray,
    x: Array,
    dot: Callable[[Array, Array], Array],
    kernel: Kernel | None = None,
) -> Array:
    """A product with a matrix of its own for every displacement, one after another.

    Args:
        w: displaced in any way.
        x: what multiplies it.
        dot: multiplies decoded values and `x`.
        kernel: multiplies both sides of a query at once, or None.
    """

    def one_side(array: QuantizedArray, stencil: Stencil, side: Array, x: Array) -> Array:
        array = after(x, array)
        u = draw(_drawn_after(x, stencil), array)
        return dot(array.decode(stencil.displaced(array, side * u)), x)

    def two_sides(array: QuantizedArray, stencil: Stencil, sides: Array, x: Array) -> Array:
        """The products of two sides, whose direction is drawn once."""
        if kernel is not None:
            return kernel(array, stencil, sides, x)
        u = draw(_drawn_after(x[0], stencil), after(x[0], array))

        def codes(side: Array) -> Array:
            return stencil.displaced(array, side * u)

        vectors = x[0].size + jax.eval_shape(dot, array.aval(), x[0]).size
        if vectors > array.size:  # a second matrix is little beside them
            waiting = after(x[0], array)
            return jax.vmap(lambda side, x: dot(waiting.decode(codes(side)), x))(sides, x)
        first = dot(after(x[0], array).decode(codes(sides[0])), x[0])
        return jnp.stack([first, dot(after(first, array).decode(codes(sides[1])), x[1])])

    one, two = custom_vmap(one_side), custom_vmap(two_sides)

    @one.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        in_array, in_stencil, in_side, in_x = batched
        if size != 2 or not in_side or any(jax.tree.leaves((in_array, in_stencil))):
            return _one_by_one(one, size, batched, operands)
        array, stencil, sides, x = operands
        return two(array, stencil, sides, x if in_x else jnp.stack([x, x])), True

    @two.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        return _one_by_one(two, size, batched, operands)

    stencil = dataclasses.replace(w.stencil, side=jnp.ones(w.stencil.side.shape, jnp.int8))
    return one(w.array, stencil, _query_side(w).astype(jnp.int16), x)


def in_turn(fn: Callable[..., Array], *operands: Any) -> Array:
    """A function of values with values of its own for every displacement, one after another.

    Args:
        fn: of the operands' values.
        operands: arrays, of which any may be implicit, in whatever form.
    """
    implicit = tuple(x for x in operands if is_implicit(x))
    if not perturbed(implicit):
        return fn(*(x.materialise() if is_implicit(x) else x for x in operands))
    plain = tuple(x for x in operands if not is_implicit(x))
    leaves, treedef = jax.tree.flatten(implicit, is_leaf=is_quantized)
    stored = [leaf for leaf in leaves if is_quantized(leaf)]
    directions = [leaf for leaf in leaves if not is_quantized(leaf)]

    def one(stored: PyTree, directions: PyTree, plain: PyTree) -> Array:
        first = next(iter(jax.tree.leaves(plain)), None)
        if first is not None:
            stored = [after(first, array) for array in stored]
        parts = iter(stored), iter(directions)
        filled = [next(parts[0 if is_quantized(leaf) else 1]) for leaf in leaves]
        arrays = iter(jax.tree.unflatten(treedef, filled))
        rest = iter(plain)
        return fn(*(next(arrays).materialise() if is_implicit(x) else next(rest) for x in operands))

    turned = custom_vmap(one)

    @turned.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        return _one_by_one(turned, size, batched, operands)

    return turned(stored, directions, plain)


def _one_by_one(fn: Any, size: int, batched: PyTree, operands: PyTree) -> tuple[Array, bool]:
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


def after(x: Array, array: QuantizedArray) -> QuantizedArray:
    """The same array, not to be decoded before `x` is known."""
    return dataclasses.replace(array, scale=compiler.after(x, array.scale))


def _drawn_after(x: Array, stencil: Stencil) -> Stencil:
    """The same stencil, its bits not to be drawn before `x` is known."""
    rows = dataclasses.replace(stencil.rows, key0=compiler.after(x, stencil.rows.key0))
    return dataclasses.replace(stencil, rows=rows)


def _query_side(w: PerturbedArray) -> Array:
    """The side of the query, 1 or -1, int8."""
    return w.stencil.side.reshape(-1)[0]


def _onto(v: Array, axes: Sequence[int], ndim: int, dtype: Any) -> Array:
    """Lay the axes of `v` along the given axes of an array of `ndim` axes."""
    order = sorted(range(v.ndim), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = v.shape[i]
    return jnp.transpose(v, order).reshape(shape).astype(dtype)
