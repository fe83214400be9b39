"""Products of an implicit array with floats: where a model spends its time, and we save it.

Each product is computed in one of three ways:

- *shared*: for a rank-one direction of signs `a b^T` and a uniform grid, `x @ value(n +- m a b^T)`
  is `x @ value(n) +- m s (x . a) b`: one decoded matrix and one product serve both sides and every
  query, and a direction costs a vector. The few slices with a code that would leave the grid are
  corrected; where they are many, as where every block or channel has its own scale and so its own
  codes at the edges, a product is computed in one of the other ways;
- *mean and half-difference*: with M and D half the sum and half the difference of the values at the
  neighbours `+m` and `-m`, `x @ value(n +- m a b^T) = x @ M +- ((x * a) @ D) * b`, for every
  compander and at the grid's edges. Two matrices and two products serve any number of queries;
- *direct*: decode the displaced codes and multiply, one side after the other, so that one decoded
  matrix exists at a time (both together where the vectors take more memory than the matrices).

All three are exact but for the roundings of their floats. A table of very many rows, such as a
language model's head, is multiplied a few thousand rows at a time.

On a GPU the environment variable ZOQO_JAX_KERNELS=on hands the direct products of rank-one
directions to `kernels.py`. It is off unless asked for: the kernel has been interpreted and lowered,
not yet timed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

from zoqo_jax import compiler
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.implicit import Implicit, PerturbedArray, TransposedArray, on_rows, use
from zoqo_jax.pieces import in_pieces
from zoqo_jax.stencils import Stencil, column_signs, displace, draw, reach, row_signs

__all__ = ["Way", "convolution", "dot_general"]

Way = Literal["shared", "halves", "direct"]
Dims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
Dot = Callable[[Array, Array], Array]
Kernel = Callable[[QuantizedArray, Stencil, Array, Array], Array]

# With more vectors than this for a displacement, a product with a matrix of its own costs less than
# two with shared ones: decoding 16 levels takes a 2-core CPU as long as multiplying by 64 vectors.
_FEW_VECTORS = 64

# And with more than this, no more than one with a shared matrix and its corrections.
_SOME_VECTORS = 256

# Codes of a table of rows that are decoded at a time.
_LARGE = 2**21

# Slices of a matrix that are corrected at a time, and how many times at most.
_FEW_SLICES = 4
_MOST_CORRECTIONS = 8


def dot_general(w: Implicit, x: Array, side: int, dims: Dims, **params: Any) -> Array:
    """`jax.lax.dot_general` with an implicit operand.

    Args:
        w: the implicit operand.
        x: the other.
        side: the place of `w` among the operands, 0 or 1.
        dims: dimension numbers, (contracting, batch), in the order of the operands.
        params: the other parameters of `jax.lax.dot_general_p`.
    """
    if isinstance(w, TransposedArray):
        return _transposed(w, x, side, dims, **params)

    if isinstance(w, PerturbedArray):
        use(w, "dot_general", _way(w, x, side, dims), _vectors(x, dims[0][1 - side]))
    is_table = w.ndim == 2 and tuple(dims[0][side]) == (1,) and not dims[1][side]
    if is_table and w.size > _LARGE:
        return _by_rows(w, x, side, dims, **params)
    return _product(w, x, side, dims, **params)


def _product(
    w: QuantizedArray | PerturbedArray, x: Array, side: int, dims: Dims, **params: Any
) -> Array:
    def dot(values: Array, x: Array) -> Array:
        return _dot(values, x, side, dims, **params)

    kernel = _kernel(w, x, side, dims, **params) if isinstance(w, PerturbedArray) else None
    if kernel is None and _stored(w).per_byte > 1 and w.ndim - 1 not in dims[1][side]:
        return _by_parts(w, x, side, dims, **params)
    if isinstance(w, QuantizedArray):
        return dot(_after(x, w).materialise(), x)
    chosen = _way(w, x, side, dims)
    if chosen == "direct":
        return _direct(w, x, dot, kernel)
    if chosen == "halves":
        return _halves(w, x, side, dims, dot)
    axis = max(dims[0][side], key=lambda axis: w.shape[axis])
    at_edge = _slices_at_edge(w, axis)
    by_halves = _is_one_sided(w, side, dims) and _are_few(w, x, dims[0][1 - side])
    return compiler.either(
        at_edge.sum() <= _MOST_CORRECTIONS * _FEW_SLICES,
        lambda: _shared(w, x, side, dims, axis, at_edge, **params),
        lambda: _halves(w, x, side, dims, dot) if by_halves else _direct(w, x, dot, kernel),
        jax.eval_shape(dot, w.aval(), x),
    )


def _by_rows(
    w: QuantizedArray | PerturbedArray, x: Array, side: int, dims: Dims, **params: Any
) -> Array:
    """A product with a table of many rows, such as the head of a language model, in pieces."""
    rows = w.shape[0]
    few = max(_LARGE // w.shape[1], 1)
    shape = jax.eval_shape(lambda values, x: _dot(values, x, side, dims, **params), w.aval(), x)
    out = jnp.zeros(shape.shape, shape.dtype)

    def product(start: Array) -> Array:
        some = on_rows(lambda x: jax.lax.dynamic_slice_in_dim(x, start, few), w)
        return _product(some, x, side, dims, **params)

    return in_pieces(product, rows, few, out, axis=out.ndim - 1 if side else 0)


def _by_parts(
    w: QuantizedArray | PerturbedArray, x: Array, side: int, dims: Dims, **params: Any
) -> Array:
    """A product in the parts of the last axis that share bytes, so that codes are never joined."""
    last, count = w.ndim - 1, _stored(w).per_byte
    shape = jax.eval_shape(lambda values, x: _dot(values, x, side, dims, **params), w.aval(), x)
    out = jnp.zeros(shape.shape, shape.dtype)
    length = w.shape[-1] // count

    if last not in dims[0][side]:
        return in_pieces(
            lambda start: _product(_part(w, start // length), x, side, dims, **params),
            w.shape[-1],
            length,
            out,
            axis=out.ndim - 1 if side else w.ndim - len(dims[0][side]) - 1,
        )

    x_axis = dims[0][1 - side][list(dims[0][side]).index(last)]
    dtype = jnp.promote_types(out.dtype, jnp.float32)  # the sum is to be rounded once
    params["preferred_element_type"] = dtype

    def add_product(i: Array, total: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(x, i * length, length, x_axis)
        return total + _product(_part(w, i), some, side, dims, **params)

    return jax.lax.fori_loop(0, count, add_product, out.astype(dtype)).astype(out.dtype)


def _part(w: QuantizedArray | PerturbedArray, i: Array) -> QuantizedArray | PerturbedArray:
    """A part, its scales sliced off first: within a product they would be sliced lane by lane."""
    part = w.part(i)
    array = _stored(part)
    scale, offset = (
        x if x is None or x.size == 1 else compiler.kept(x) for x in (array.scale, array.offset)
    )
    array = dataclasses.replace(array, scale=scale, offset=offset)
    return dataclasses.replace(part, array=array) if isinstance(part, PerturbedArray) else array


def _stored(w: QuantizedArray | PerturbedArray) -> QuantizedArray:
    return w.array if isinstance(w, PerturbedArray) else w


def convolution(w: PerturbedArray, x: Array, **params: Any) -> Array:
    """`jax.lax.conv_general_dilated_p` with an implicit kernel.

    Kernels are small and decoding them costs little, but displaced kernels side by side would make
    a grouped convolution, which XLA's CPU backend computes slowly: so they go one by one.
    """
    use(w, "conv_general_dilated", "direct")
    return _direct(w, x, lambda values, x: jax.lax.conv_general_dilated_p.bind(x, values, **params))


def _way(w: PerturbedArray, x: Array, side: int, dims: Dims) -> Way:
    ranked = w.stencil.is_rank_one_signs and w.ndim >= 2
    if not ranked or not w.size or w.ndim - 1 in dims[1][side] or not dims[0][side]:
        return "direct"
    is_linear = w.array.grid.is_uniform and w.array.has_one_scale
    if is_linear and _vectors(x, dims[0][1 - side]) <= _SOME_VECTORS:
        return "shared"
    if _is_one_sided(w, side, dims) and _are_few(w, x, dims[0][1 - side]):
        return "halves"
    return "direct"


def _dot(values: Array, x: Array, side: int, dims: Dims, **params: Any) -> Array:
    operands = (x, values) if side else (values, x)
    return jax.lax.dot_general(*operands, dimension_numbers=dims, **params)


def _is_one_sided(w: PerturbedArray, side: int, dims: Dims) -> bool:
    """Whether all of the row axes are contracted, or none; then `a` goes before or after D."""
    contracted = [axis in dims[0][side] for axis in range(w.ndim - 1)]
    return not dims[1][side] and (all(contracted) or not any(contracted))


def _are_few(w: PerturbedArray, x: Any, contracted: Sequence[int]) -> bool:
    """Whether two products with shared matrices cost less than one with a matrix of its own."""
    return w.population > 2 and _vectors(x, contracted) <= _FEW_VECTORS


def _vectors(x: Array, contracted: Sequence[int]) -> int:
    """How many vectors a product multiplies."""
    return x.size // max(math.prod(x.shape[axis] for axis in contracted), 1)


def _transposed(w: TransposedArray, x: Array, side: int, dims: Dims, **params: Any) -> Array:
    """The product in the order that `w` is stored in, its result in the order asked for."""
    stored = _stored_dims(w, side, dims)
    out = dot_general(w.array, x, side, stored, **params)
    asked = [axis for axis in w.axes if axis not in (*stored[0][side], *stored[1][side])]
    first = out.ndim - len(asked) if side else len(stored[1][side])
    order = list(range(out.ndim))
    order[first : first + len(asked)] = [first + sorted(asked).index(axis) for axis in asked]
    return jnp.transpose(out, order)


def _stored_dims(w: TransposedArray, side: int, dims: Dims) -> Dims:
    """Dimension numbers for the array as it is stored."""

    def stored(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
        mine = tuple(w.axes[axis] for axis in axes[side])
        return (axes[0], mine) if side else (mine, axes[1])

    return stored(dims[0]), stored(dims[1])


def _shared(
    w: PerturbedArray, x: Array, side: int, dims: Dims, axis: int, at_edge: Array, **params: Any
) -> Array:
    """One product with the undisplaced values, a vector for the direction, and corrections.

    Args:
        axis: a contracted axis of `w`.
        at_edge: which slices along it hold codes that a displacement may take off the grid.
    """
    array, stencil = w.array, w.stencil
    a = row_signs(stencil) * _query_side(w)
    b = column_signs(stencil, array)
    m = reach(stencil.width(array), array.grid).reshape(-1)[0]
    scale = array.scale.reshape(-1)[0].astype(jnp.float32)
    out = _dot(_after(x, array).materialise(), x, side, dims, **params)
    along = _along_direction(a.astype(x.dtype), b.astype(x.dtype), x, side, dims, **params)
    out = out + along * (m.astype(jnp.float32) * scale).astype(along.dtype)

    # What lies between the codes that the boundary allows and those on the straight line, for the
    # slices that have any, a few at a time.
    x_axis = dims[0][1 - side][list(dims[0][side]).index(axis)]
    few = min(_FEW_SLICES, at_edge.size)

    def correct(state: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, out = state
        todo, chosen = jax.lax.top_k(remaining.astype(jnp.float32), few)
        rows = a if axis == a.ndim else jnp.take(a, chosen, axis=axis)
        u = rows[..., None] * (jnp.take(b, chosen) if axis == a.ndim else b)
        codes = jnp.take(array.codes, chosen, axis=axis).astype(jnp.int16)
        straight = codes + m * u.astype(jnp.int16)
        beyond = displace(codes, straight - codes, array.grid, stencil.boundary) - straight
        missing = (beyond.astype(jnp.float32) * scale).astype(array.value_dtype)
        some = jnp.take(x, chosen, axis=x_axis)
        some = some * _onto(todo, [x_axis], x.ndim, x.dtype)
        return remaining.at[chosen].set(False), out + _dot(missing, some, side, dims, **params)

    _, out = jax.lax.while_loop(lambda state: state[0].any(), correct, (at_edge, out))
    return out


def _slices_at_edge(w: PerturbedArray, axis: int) -> Bool[Array, " slices"]:
    """Which slices along an axis hold codes nearer to the grid's edges than the reach."""
    grid, codes = w.array.grid, w.array.codes
    m = reach(w.stencil.width(w.array), grid).reshape(-1)[0]
    others = tuple(other for other in range(w.ndim) if other != axis)
    highest, lowest = (f(axis=others).astype(jnp.int16) for f in (codes.max, codes.min))
    return (highest > grid.high - m) | (lowest < grid.low + m)


def _along_direction(a: Array, b: Array, x: Array, side: int, dims: Dims, **params: Any) -> Array:
    """The product with `a b^T`, a matrix that is never made."""
    last = a.ndim
    if last not in dims[0][side]:
        out = _dot(a, x, side, dims, **params)
        axis = out.ndim if side else last - len(dims[0][side])
        return jnp.expand_dims(out, axis) * _onto(b, [axis], out.ndim + 1, out.dtype)
    x_axis = dims[0][1 - side][list(dims[0][side]).index(last)]
    x = (x * _onto(b, [x_axis], x.ndim, x.dtype)).sum(axis=x_axis)

    def rest(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
        others = tuple(axis - (axis > x_axis) for axis in axes[1 - side] if axis != x_axis)
        mine = tuple(axis for axis in axes[side] if axis != last)
        return (others, mine) if side else (mine, others)

    return _dot(a, x, side, (rest(dims[0]), rest(dims[1])), **params)


def _halves(w: PerturbedArray, x: Array, side: int, dims: Dims, dot: Dot) -> Array:
    """Two products with the mean and half the difference of the neighbours' values."""
    last = w.ndim - 1
    a, b = row_signs(w.stencil) * _query_side(w), column_signs(w.stencil, w.array)
    mean, half = _neighbours(w)
    x_axis = dict(zip(dims[0][side], dims[0][1 - side], strict=True))
    turned = x
    if 0 in x_axis:
        turned = turned * _onto(a, [x_axis[axis] for axis in range(last)], x.ndim, x.dtype)
    if last in x_axis:
        turned = turned * _onto(b, [x_axis[last]], x.ndim, x.dtype)
    out = dot(half, turned)
    free = [axis for axis in range(w.ndim) if axis not in x_axis]
    first = out.ndim - len(free) if side else 0
    if 0 not in x_axis:
        out = out * _onto(
            a, [first + free.index(axis) for axis in range(last)], out.ndim, out.dtype
        )
    if last not in x_axis:
        out = out * _onto(b, [first + free.index(last)], out.ndim, out.dtype)
    return dot(mean, x) + out


def _neighbours(w: PerturbedArray) -> tuple[Array, Array]:
    """M and D: half the sum and half the difference of the values at the neighbours +m and -m."""
    array = w.array
    m = jnp.broadcast_to(reach(array.spread(w.stencil.width(array)), array.grid), array.shape)
    above, below = (array.decode(w.displaced(u)).astype(jnp.float32) for u in (m, -m))
    mean, half = (above + below) / 2, (above - below) / 2
    return mean.astype(array.value_dtype), half.astype(array.value_dtype)


def _direct(w: PerturbedArray, x: Array, dot: Dot, kernel: Kernel | None = None) -> Array:
    """A product with a matrix of its own for every displacement, one after another.

    Args:
        dot: multiplies decoded values and `x`.
        kernel: multiplies both sides of a query at once, or None.
    """

    def one_side(array: QuantizedArray, stencil: Stencil, side: Array, x: Array) -> Array:
        array = _after(x, array)
        u = draw(_drawn_after(x, stencil), array)
        return dot(array.decode(displace(array.codes, side * u, array.grid, stencil.boundary)), x)

    def two_sides(array: QuantizedArray, stencil: Stencil, sides: Array, x: Array) -> Array:
        """The products of two sides, whose direction is drawn once."""
        if kernel is not None:
            return kernel(array, stencil, sides, x)
        u = draw(_drawn_after(x[0], stencil), _after(x[0], array))

        def codes(side: Array) -> Array:
            return displace(array.codes, side * u, array.grid, stencil.boundary)

        vectors = x[0].size + jax.eval_shape(dot, array.aval(), x[0]).size
        if vectors > array.size:  # a second matrix is little beside them
            waiting = _after(x[0], array)
            return jax.vmap(lambda side, x: dot(waiting.decode(codes(side)), x))(sides, x)
        first = dot(_after(x[0], array).decode(codes(sides[0])), x[0])
        return jnp.stack([first, dot(_after(first, array).decode(codes(sides[1])), x[1])])

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


def _kernel(
    w: PerturbedArray,
    x: Array,
    side: int,
    dims: Dims,
    precision: Any = None,
    preferred_element_type: Any = None,
    **params: Any,
) -> Kernel | None:
    """The GPU kernel that decodes and multiplies both sides in one read, where it is asked for.

    It takes the two sides of a query for opposite, as `queries.losses` makes them.
    """
    del params
    mode = os.environ.get("ZOQO_JAX_KERNELS", "off")
    if mode not in ("off", "on", "interpret"):
        raise ValueError(f"ZOQO_JAX_KERNELS must be off, on or interpret, got {mode!r}.")
    if mode == "off" or (mode == "on" and jax.default_backend() != "gpu"):
        return None
    from zoqo_jax import kernels  # Pallas for GPUs is not everywhere

    is_matrix = w.ndim == 2 and len(dims[0][side]) == 1 and not dims[1][side]
    keeps_dtype = x.dtype == w.array.value_dtype and preferred_element_type in (None, x.dtype)
    fits = is_matrix and keeps_dtype and w.stencil.is_rank_one_signs
    if not fits or not kernels.supports(w.array):
        return None
    transposed, x_axis = dims[0][side][0] == 1, dims[0][1 - side][0]

    def both_sides(array: QuantizedArray, stencil: Stencil, sides: Array, x: Array) -> Array:
        x = jnp.moveaxis(x, 1 + x_axis, -1)
        out = kernels.rank_one_product(
            x.reshape(2, -1, x.shape[-1]),
            array,
            row_signs(stencil) * sides[0].astype(jnp.int8),
            column_signs(stencil, array),
            reach(stencil.width(array), array.grid),
            stencil.boundary,
            transposed=transposed,
            precision=precision,
            interpret=mode == "interpret",
        ).reshape(*x.shape[:-1], -1)
        return out if side else jnp.moveaxis(out, -1, 1)

    return both_sides


def _one_by_one(fn: Any, size: int, batched: PyTree, operands: PyTree) -> tuple[Array, bool]:
    """A batching rule that has one decoded matrix at a time, or one for all where that will do."""
    batched = tuple(batched)
    in_array, *in_direction, _ = batched
    if any(jax.tree.leaves(in_array)) or not any(jax.tree.leaves(in_direction)):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        return jax.vmap(fn.fun, in_axes=axes, axis_size=size)(*operands), True

    def pick(i: Array) -> PyTree:
        return jax.tree.map(lambda x, is_batched: x[i] if is_batched else x, operands, batched)

    return jax.lax.map(lambda i: fn(*pick(i)), jnp.arange(size)), True


def _after(x: Array, array: QuantizedArray) -> QuantizedArray:
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
