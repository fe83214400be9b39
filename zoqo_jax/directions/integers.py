"""Products of codes and rounded vectors as integers: what `products="integer"` asks for.

A vector `x` is rounded to `s q`, where `q` holds whole numbers from -127 to 127 and the step `s` is
`max |x| / 127`; halves go to the even number. The codes of a uniform grid are whole numbers
already, so `q` and codes are multiplied as int8 and summed in int32, which is exact, and only the
sum is scaled. An offset, or a zero of the grid between codes, is multiplied by the sum of `q`.
Where blocks along the contracted axis have scales of their own, each block has an integer sum of
its own.

The result is, but for the roundings of a few float32 operations, the exact product with `s q`. So
it differs from the product with `x` by at most half a step of the vector times the L1 norm of the
matrix's row, `max |x| / 254 * sum |w|`.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022,
arXiv:2208.07339, section 2.2, rounds vectors so.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer

from zoqo_jax.directions.dot import Dot
from zoqo_jax.grids.arrays import Grid, QuantizedArray
from zoqo_jax.grids.scales import Scale, multiplied_out

__all__ = ["product", "refusal", "rounded"]

_LARGEST = 127
_LONGEST = 2**31 // (128 * _LARGEST)  # products that int32 holds the sum of
# XLA's CPU backend hands products of matrices to YNNPACK, and those of one vector not: 3640 x 576
# codes took 1,444 us with one vector, 636 with two rows, 456 with eight.
_ROWS = 8


def refusal(array: QuantizedArray, dot: Dot, x: Array, shortest_block: int) -> str:
    """Why an array's product with vectors cannot be one of integers; "" where it can.

    Args:
        array: the matrix.
        dot: how it is multiplied.
        x: what multiplies it; its dtype counts.
        shortest_block: blocks that are shorter cost more than floats.
    """
    if not array.grid.is_uniform:
        return "no integers: the grid is not uniform"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"no integers: vectors are {x.dtype}"
    if dot.batched or not dot.contracted:
        return "no integers: no product of one matrix"
    if math.prod(array.shape[axis] for axis in dot.contracted) > _LONGEST:
        return f"no integers: sums of more than {_LONGEST} products"
    along = _along(array, dot)
    if not along:
        return ""
    axis = None if array.block is None else array.block[0] % array.ndim
    if array.block_of is not None or along != [axis] or len(dot.contracted) > 1:
        return "no integers: scales along the contracted axes"
    if array.length_in_parts < shortest_block:
        return f"no integers: blocks of {array.length_in_parts} are too short"
    return ""


def _along(array: QuantizedArray, dot: Dot) -> list[int]:
    """The contracted axes along which scales or offsets differ."""
    found = {
        axis
        for per_block in (array.scale, array.offset)
        if per_block is not None
        for axis in dot.contracted
        if per_block.shape[axis] > 1
    }
    return sorted(found)


def rounded(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Vectors rounded to whole numbers, and their steps.

    Args:
        x: vectors.
        axes: along which a vector lies.

    Returns:
        Whole numbers from -127 to 127 in the shape of `x`, and float32 steps, 1 long along `axes`.
        A vector with a NaN or inf has such a step.

    Examples:
        >>> q, step = rounded(jnp.array([[0.5, -127.0, 1.5], [0.0, 0.0, 0.0]]), (1,))
        >>> q.tolist(), step.tolist()
        ([[0, -127, 2], [0, 0, 0]], [[1.0], [0.0]])
    """
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _LARGEST
    q = jnp.round(x / jnp.where(step > 0, step, 1.0))
    return jnp.clip(q, -_LARGEST, _LARGEST).astype(jnp.int8), step


def product(array: QuantizedArray, codes: Integer[Array, "..."], x: Array, dot: Dot) -> Array:
    """The product of vectors, rounded, and what some codes of an array stand for.

    Args:
        array: that `refusal` has nothing against; its scales count.
        codes: legal codes in its shape.
        x: what multiplies it, not yet rounded.
        dot: how.

    Returns:
        The product, in the dtype that `dot` gives floats.
    """
    dtype = jax.eval_shape(dot, array.aval(), x).dtype
    of_x = tuple(dot.dims[0][1 - dot.operand])
    q, step = rounded(x, of_x)
    whole, zero = _as_int8(codes, array.grid)
    per_vector = _outside(step, of_x, dot, of_matrix=False, ndim=array.ndim)
    along = _along(array, dot)
    if not along:
        total = _sum(array, array.scale, array.offset, zero, q, whole, dot)
        return (total * per_vector).astype(dtype)

    (axis,) = along
    length, x_axis = array.length_in_parts, dot.x_axis(axis)
    count = -(-array.shape[axis] // length)
    q, whole = (_filled(x, at, count * length) for x, at in ((q, x_axis), (whole, axis)))
    scale = multiplied_out(array.scale)
    offset = None if array.offset is None else multiplied_out(array.offset)

    def of_block(i: Array | int) -> Array:
        def own(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, i, 1, axis) if x.shape[axis] > 1 else x

        some_q = jax.lax.dynamic_slice_in_dim(q, i * length, length, x_axis)
        some = jax.lax.dynamic_slice_in_dim(whole, i * length, length, axis)
        own_offset = None if offset is None else own(offset)
        return _sum(array, own(scale), own_offset, zero, some_q, some, dot)

    total = jax.lax.fori_loop(1, count, lambda i, total: total + of_block(i), of_block(0))
    return (total * per_vector).astype(dtype)


def _as_int8(codes: Integer[Array, "..."], grid: Grid) -> tuple[Int8[Array, "..."], float]:
    """Codes as int8, and the level that their zero stands for."""
    level = grid.levels[0]
    for centre in (-level, 0.0, 128.0):
        low, high = grid.low - centre, grid.high - centre
        if float(centre).is_integer() and low >= -128 and high <= 127:
            return (codes.astype(jnp.int32) - int(centre)).astype(jnp.int8), level + centre
    raise ValueError(f"codes must fit 8 bits, got {grid}.")


def _sum(
    array: QuantizedArray,
    scale: Scale,
    offset: Scale | None,
    zero: float,
    q: Int8[Array, "..."],
    whole: Int8[Array, "..."],
    dot: Dot,
) -> Float[Array, "..."]:
    """The product of whole numbers, scaled: scales and offsets are shared by what is summed."""

    def outside(per_block: Scale) -> Array:
        spread = array.broadcast_scales(per_block).astype(jnp.float32)
        return _outside(spread, dot.contracted, dot, of_matrix=True, ndim=q.ndim)

    total = _integer_dot(q, whole, dot).astype(jnp.float32) * outside(scale)
    if zero == 0.0 and offset is None:
        return total
    rest = 0.0 if zero == 0.0 else zero * outside(scale)
    rest = rest if offset is None else rest + outside(offset)
    of_x = tuple(dot.dims[0][1 - dot.operand])
    sums = q.astype(jnp.int32).sum(axis=of_x, keepdims=True).astype(jnp.float32)
    return total + rest * _outside(sums, of_x, dot, of_matrix=False, ndim=whole.ndim)


def _outside(x: Array, contracted: tuple[int, ...], dot: Dot, of_matrix: bool, ndim: int) -> Array:
    """Something that is 1 long along one operand's contracted axes, as it broadcasts with results.

    Args:
        x: of as many axes as that operand.
        contracted: its contracted axes.
        dot: how operands are multiplied.
        of_matrix: whether the operand is the matrix.
        ndim: axes of the other operand.
    """
    x = x.reshape([n for axis, n in enumerate(x.shape) if axis not in contracted])
    is_last = of_matrix == (dot.operand == 1)
    others = (1,) * (ndim - len(contracted))
    return x.reshape(others + x.shape if is_last else x.shape + others)


def _integer_dot(q: Int8[Array, "..."], whole: Int8[Array, "..."], dot: Dot) -> Array:
    """The int32 product of int8 vectors and an int8 matrix."""
    of_q = tuple(dot.dims[0][1 - dot.operand])
    vectors = math.prod(n for axis, n in enumerate(q.shape) if axis not in of_q)
    is_one = vectors == 1
    if is_one:
        q = _filled(q[None], 0, _ROWS)
        of_q = tuple(axis + 1 for axis in of_q)
    pairs = (of_q, dot.contracted) if dot.operand else (dot.contracted, of_q)
    lhs, rhs = (q, whole) if dot.operand else (whole, q)
    out = jax.lax.dot_general(lhs, rhs, (pairs, ((), ())), preferred_element_type=jnp.int32)
    if not is_one:
        return out
    place = 0 if dot.operand else whole.ndim - len(dot.contracted)
    return jax.lax.index_in_dim(out, 0, place, keepdims=False)


def _filled(x: Array, axis: int, length: int) -> Array:
    """Zeros added at an axis's end until it is so long."""
    more = [(0, 0, 0)] * x.ndim
    more[axis] = (0, length - x.shape[axis], 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), more)
