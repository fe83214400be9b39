"""Products of an implicit array with floats: where a model spends its time, and we save it.

A product with a displaced array is computed in one of three ways, "shared", "halves" or "direct"
(see `ways.py`), chosen by the direction, the grid and the number of vectors. Shared products need
few codes at the grid's edges; where they are many, as where every block or channel has its own
scale and so its own codes at the edges, a product is computed in one of the other ways.

What is large is multiplied in pieces: a table of very many rows, such as a language model's head, a
few thousand rows at a time; codes that share bytes, those that are the first of their byte, then
the second ..., so that they are never joined.

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
from jaxtyping import Array

from zoqo_jax import compiler, ways
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.implicit import (
    DerivedArray,
    Implicit,
    PerturbedArray,
    TransposedArray,
    on_rows,
    use,
)
from zoqo_jax.pieces import in_pieces
from zoqo_jax.stencils import Stencil, column_signs, row_signs
from zoqo_jax.ways import Dims, Dot, Kernel

__all__ = ["Way", "dot_general", "in_turn"]

Way = Literal["shared", "halves", "direct"]

# With more vectors than this for a displacement, a product with a matrix of its own costs less than
# two with shared ones: decoding 16 levels takes a 2-core CPU as long as multiplying by 64 vectors.
_FEW_VECTORS = 64

# And with more than this, no more than one with a shared matrix and its corrections.
_SOME_VECTORS = 256

# Codes of a table of rows that are decoded at a time.
_LARGE = 2**21

# Slices of a matrix with codes at the edges that are corrected at most.
_MOST_CORRECTED = 32


def dot_general(w: Implicit, x: Array, side: int, dims: Dims, **params: Any) -> Array:
    """`jax.lax.dot_general` with an implicit operand.

    Args:
        w: the implicit operand.
        x: the other.
        side: the place of `w` among the operands, 0 or 1.
        dims: dimension numbers, (contracting, batch), in the order of the operands.
        params: the other parameters of `jax.lax.dot_general_p`.
    """
    dot = Dot(side, dims, params)
    if isinstance(w, TransposedArray):
        return _transposed(w, x, dot)
    if isinstance(w, DerivedArray):
        use(w, "dot_general", "direct", _vectors(x, dot))
        return ways.in_turn(dot, w, x)
    return _stored(w, x, dot)


def in_turn(name: str, fn: Callable[..., Array], *operands: Any) -> Array:
    """A product of operands of which any are implicit, one displacement at a time.

    Args:
        name: of the operation.
        fn: of the operands' values.
        operands: its operands.
    """
    for x in operands:
        use(x, name, "direct")
    return ways.in_turn(fn, *operands)


def _transposed(w: TransposedArray, x: Array, dot: Dot) -> Array:
    """The product in the order that `w` is stored in, its result in the order asked for."""

    def stored(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
        mine = tuple(w.axes[axis] for axis in axes[dot.side])
        return (axes[0], mine) if dot.side else (mine, axes[1])

    as_stored = dataclasses.replace(dot, dims=(stored(dot.dims[0]), stored(dot.dims[1])))
    out = _stored(w.array, x, as_stored)
    asked = [axis for axis in w.axes if axis not in (*as_stored.contracted, *as_stored.batched)]
    first = out.ndim - len(asked) if dot.side else len(dot.batched)
    order = list(range(out.ndim))
    order[first : first + len(asked)] = [first + sorted(asked).index(axis) for axis in asked]
    return jnp.transpose(out, order)


def _stored(w: QuantizedArray | PerturbedArray, x: Array, dot: Dot) -> Array:
    """The product with an array in the order that it is stored in."""
    if isinstance(w, PerturbedArray):
        use(w, "dot_general", _way(w, x, dot), _vectors(x, dot))
    is_table = w.ndim == 2 and dot.contracted == (1,) and not dot.batched
    return _by_rows(w, x, dot) if is_table and w.size > _LARGE else _product(w, x, dot)


def _by_rows(w: QuantizedArray | PerturbedArray, x: Array, dot: Dot) -> Array:
    """A product with a table of many rows, such as the head of a language model, in pieces."""
    rows, few = w.shape[0], max(_LARGE // w.shape[1], 1)
    out = _empty(w, x, dot)

    def product(start: Array) -> Array:
        return _product(on_rows(lambda x: jax.lax.dynamic_slice_in_dim(x, start, few), w), x, dot)

    return in_pieces(product, rows, few, out, dot.place(0, w.ndim, out.ndim))


def _product(w: QuantizedArray | PerturbedArray, x: Array, dot: Dot) -> Array:
    """The product, by the kernel or in parts where either can be."""
    array = w.array if isinstance(w, PerturbedArray) else w
    kernel = _kernel(w, x, dot) if isinstance(w, PerturbedArray) else None
    if kernel is None and array.per_byte > 1 and w.ndim - 1 not in dot.batched:
        return _by_parts(w, x, dot, array.per_byte)
    return _in_its_way(w, x, dot, kernel)


def _in_its_way(
    w: QuantizedArray | PerturbedArray, x: Array, dot: Dot, kernel: Kernel | None = None
) -> Array:
    """The product in the way that suits it."""
    if isinstance(w, QuantizedArray):
        return dot(ways.after(x, w).materialise(), x)
    chosen = _way(w, x, dot)
    if chosen == "direct":
        return ways.direct(w, x, dot, kernel)
    if chosen == "halves":
        return ways.halves(w, x, dot)
    axis = max(dot.contracted, key=lambda axis: w.shape[axis])
    at_edge = ways.slices_at_edge(w, axis)
    by_halves = _is_one_sided(w, dot) and _are_few(w, x, dot)
    return compiler.either(
        at_edge.sum() <= _MOST_CORRECTED,
        lambda: ways.shared(w, x, dot, axis, at_edge),
        lambda: ways.halves(w, x, dot) if by_halves else ways.direct(w, x, dot, kernel),
        jax.eval_shape(dot, w.aval(), x),
    )


def _by_parts(w: QuantizedArray | PerturbedArray, x: Array, dot: Dot, count: int) -> Array:
    """A product in the parts of the last axis that share bytes, so that codes are never joined."""
    last, length = w.ndim - 1, w.shape[-1] // count
    out = _empty(w, x, dot)
    if last not in dot.contracted:
        return in_pieces(
            lambda start: _in_its_way(_part(w, start // length), x, dot),
            w.shape[-1],
            length,
            out,
            dot.place(last, w.ndim, out.ndim),
        )

    dtype = jnp.promote_types(out.dtype, jnp.float32)  # the sum is to be rounded once
    wide = dataclasses.replace(dot, params={**dot.params, "preferred_element_type": dtype})

    def add_product(i: Array, total: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(x, i * length, length, dot.x_axis(last))
        return total + _in_its_way(_part(w, i), some, wide)

    return jax.lax.fori_loop(0, count, add_product, out.astype(dtype)).astype(out.dtype)


def _part(w: QuantizedArray | PerturbedArray, i: Array) -> QuantizedArray | PerturbedArray:
    """A part, its scales sliced off first: within a product they would be sliced lane by lane."""
    part = w.part(i)
    array = part.array if isinstance(part, PerturbedArray) else part
    scale, offset = (
        x if x is None or x.size == 1 else compiler.kept(x) for x in (array.scale, array.offset)
    )
    array = dataclasses.replace(array, scale=scale, offset=offset)
    return dataclasses.replace(part, array=array) if isinstance(part, PerturbedArray) else array


def _empty(w: QuantizedArray | PerturbedArray, x: Array, dot: Dot) -> Array:
    """Zeros in the shape of a product."""
    like = jax.eval_shape(dot, w.aval(), x)
    return compiler.zeros(like, w)


def _way(w: PerturbedArray, x: Array, dot: Dot) -> Way:
    ranked = _is_ranked(w) and w.ndim >= 2
    if not ranked or not w.size or w.ndim - 1 in dot.batched or not dot.contracted:
        return "direct"
    if w.array.grid.is_uniform and w.array.has_one_scale and _vectors(x, dot) <= _SOME_VECTORS:
        return "shared"
    return "halves" if _is_one_sided(w, dot) and _are_few(w, x, dot) else "direct"


def _is_ranked(w: PerturbedArray) -> bool:
    """Whether the two sides are opposite multiples of a matrix of rank one, in codes."""
    return w.stencil.is_rank_one_signs and w.stencil.off_grid is None


def _is_one_sided(w: PerturbedArray, dot: Dot) -> bool:
    """Whether all of the row axes are contracted, or none; then `a` goes before or after D."""
    contracted = [axis in dot.contracted for axis in range(w.ndim - 1)]
    return not dot.batched and (all(contracted) or not any(contracted))


def _are_few(w: PerturbedArray, x: Array, dot: Dot) -> bool:
    """Whether two products with shared matrices cost less than one with a matrix of its own."""
    return w.population > 2 and _vectors(x, dot) <= _FEW_VECTORS


def _vectors(x: Array, dot: Dot) -> int:
    """How many vectors a product multiplies."""
    return x.size // max(math.prod(x.shape[dot.x_axis(axis)] for axis in dot.contracted), 1)


def _kernel(w: PerturbedArray, x: Array, dot: Dot) -> Kernel | None:
    """The GPU kernel that decodes and multiplies both sides in one read, where it is asked for.

    It takes the two sides of a query for opposite, as `queries.losses` makes them.
    """
    mode = os.environ.get("ZOQO_JAX_KERNELS", "off")
    if mode not in ("off", "on", "interpret"):
        raise ValueError(f"ZOQO_JAX_KERNELS must be off, on or interpret, got {mode!r}.")
    if mode == "off" or (mode == "on" and jax.default_backend() != "gpu"):
        return None
    from zoqo_jax import kernels  # Pallas for GPUs is not everywhere

    is_matrix = w.ndim == 2 and len(dot.contracted) == 1 and not dot.batched
    preferred = dot.params.get("preferred_element_type")
    keeps_dtype = x.dtype == w.array.value_dtype and preferred in (None, x.dtype)
    fits = is_matrix and keeps_dtype and _is_ranked(w)
    if not fits or not kernels.supports(w.array):
        return None
    (contracted,) = dot.contracted

    def both_sides(array: QuantizedArray, stencil: Stencil, sides: Array, x: Array) -> Array:
        x = jnp.moveaxis(x, 1 + dot.x_axis(contracted), -1)
        out = kernels.rank_one_product(
            x.reshape(2, -1, x.shape[-1]),
            array,
            row_signs(stencil) * sides[0].astype(jnp.int8),
            column_signs(stencil, array),
            stencil.reach(array),
            stencil.boundary,
            transposed=contracted == 1,
            precision=dot.params.get("precision"),
            interpret=mode == "interpret",
        ).reshape(*x.shape[:-1], -1)
        return out if dot.side else jnp.moveaxis(out, -1, 1)

    return both_sides
