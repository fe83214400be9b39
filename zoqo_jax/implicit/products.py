"""Products of an implicit array with floats: where a model spends its time, and we save it.

`plan` decides once how a product is computed: by which matmul algorithm (the direction says which
serve, and what each costs is in `THRESHOLDS`), in which chunks and parts, and whether by the GPU
kernel. `explain` prints the plan, and the product executes it.

What is large is multiplied in chunks: a table of very many rows, such as a language model's head, a
few thousand rows at a time; codes that share bytes in parts, those that are the first of their
byte, then the second ..., so that they are never joined.

On a GPU the environment variable ZOQO_JAX_KERNELS=on hands products of rank-one directions that
would be dequantized to `kernels.py`. It is off unless asked for: the kernel has been interpreted
and lowered, not yet timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from zoqo_jax.directions import Direction, RankOne, integers, matmul
from zoqo_jax.directions.matmul import Dims, Dot, Kernel, Thresholds
from zoqo_jax.grids.arrays import QuantizedArray, is_quantized
from zoqo_jax.implicit.arrays import (
    DerivedArray,
    Implicit,
    PerturbedArray,
    Plan,
    TransposedArray,
    is_implicit,
    perturbed,
    take_rows,
    use,
)
from zoqo_jax.xla import compiler
from zoqo_jax.xla.chunks import in_chunks

__all__ = ["DEQUANTIZE", "THRESHOLDS", "dot_general", "in_turn", "plan"]

THRESHOLDS = {
    # Decoding 16 levels takes two cores as long as multiplying by 64 vectors. Integer sums of
    # blocks of 96 take 0.4 to 0.9 of the time of floats, those of 32 mostly more than floats.
    "cpu": Thresholds(
        few_vectors=64, some_vectors=256, chunk=2**21, corrected=32, integer_block=96
    ),
}
"""By backend; others have those of a CPU until they are measured."""

DEQUANTIZE = Plan(("dequantize",))

Stored = QuantizedArray | PerturbedArray


def plan(w: Stored, x: Array, dot: Dot) -> Plan:
    """How the product of a stored array and vectors is computed.

    Args:
        w: the array, displaced or not.
        x: what multiplies it; its shape and dtype count.
        dot: how.
    """
    array, at = _array(w), _thresholds()
    is_table = w.ndim == 2 and dot.contracted == (1,) and not dot.batched
    chunks = -(-w.shape[0] // _rows_at_once(w, at)) if is_table and w.size > at.chunk else 1
    shares_bytes = array.per_byte > 1 and w.ndim - 1 not in dot.batched
    parts = array.per_byte if shares_bytes else 1
    note = ""
    if array.products == "integer":
        note = _no_integers(w, x, dot, at)
        if not note:
            return Plan((*_integer(w, x, dot, at), "integer"), chunks, parts)
    if isinstance(w, QuantizedArray):
        return Plan(("dequantize",), chunks, parts, note=note)
    best = w.direction.algorithms(array, dot, _vectors(x, dot), w.population, at)
    if not best and _kernel(w, x, dot) is not None:
        return Plan(("dequantize",), chunks, kernel=True, note=note)
    return Plan((*best, "dequantize"), chunks, parts, note=note)


def _no_integers(w: Stored, x: Array, dot: Dot, at: Thresholds) -> str:
    """Why a product cannot be one of integers; "" where it can."""
    if isinstance(w, PerturbedArray) and not w.direction.takes_integers:
        return "no integers: not with such directions"
    return integers.refusal(_array(w), dot, x, at.integer_block)


def _integer(w: Stored, x: Array, dot: Dot, at: Thresholds) -> tuple[str, ...]:
    """The algorithms that multiply by codes as they are, and so by integers."""
    if isinstance(w, QuantizedArray):
        return ()
    best = w.direction.algorithms(w.array, dot, _vectors(x, dot), w.population, at)
    return tuple(name for name in best if name in ("low_rank", "columns"))


def _thresholds() -> Thresholds:
    return THRESHOLDS.get(jax.default_backend(), THRESHOLDS["cpu"])


def _array(w: Stored) -> QuantizedArray:
    return w.array if isinstance(w, PerturbedArray) else w


def _rows_at_once(w: Stored, at: Thresholds) -> int:
    return max(at.chunk // w.shape[1], 1)


def dot_general(w: Implicit, x: Array, operand: int, dims: Dims, **params: Any) -> Array:
    """`jax.lax.dot_general` with an implicit operand.

    Args:
        w: the implicit operand.
        x: the other.
        operand: the place of `w` among the operands, 0 or 1.
        dims: dimension numbers, (contracting, batch), in the order of the operands.
        params: the other parameters of `jax.lax.dot_general_p`.
    """
    dot = Dot(operand, dims, params)
    if isinstance(w, TransposedArray):
        return _transposed(w, x, dot)
    if isinstance(w, DerivedArray):
        use(w, "dot_general", _derived(w), _vectors(x, dot))
        return _one_displacement_at_a_time(dot, w, x)
    return _stored(w, x, dot)


def _derived(w: DerivedArray) -> Plan:
    """The plan of a product with what operations made of arrays."""
    leaves = jax.tree.leaves(w, is_leaf=is_quantized)
    asked = any(is_quantized(x) and x.products == "integer" for x in leaves)
    return DEQUANTIZE._replace(note="no integers: operations changed it") if asked else DEQUANTIZE


def in_turn(name: str, fn: Callable[..., Array], *operands: Any) -> Array:
    """A product of operands of which any are implicit, one displacement at a time.

    Args:
        name: of the operation.
        fn: of the operands' values.
        operands: its operands.
    """
    for x in operands:
        use(x, name, DEQUANTIZE)
    return _one_displacement_at_a_time(fn, *operands)


def _transposed(w: TransposedArray, x: Array, dot: Dot) -> Array:
    """The product in the order that `w` is stored in, its result in the order asked for."""

    def stored(axes: tuple[Sequence[int], Sequence[int]]) -> tuple[Any, Any]:
        mine = tuple(w.axes[axis] for axis in axes[dot.operand])
        return (axes[0], mine) if dot.operand else (mine, axes[1])

    as_stored = dataclasses.replace(dot, dims=(stored(dot.dims[0]), stored(dot.dims[1])))
    out = _stored(w.array, x, as_stored)
    asked = [axis for axis in w.axes if axis not in (*as_stored.contracted, *as_stored.batched)]
    first = out.ndim - len(asked) if dot.operand else len(dot.batched)
    order = list(range(out.ndim))
    order[first : first + len(asked)] = [first + sorted(asked).index(axis) for axis in asked]
    return jnp.transpose(out, order)


def _stored(w: Stored, x: Array, dot: Dot) -> Array:
    """The product with an array in the order that it is stored in, as planned."""
    planned = plan(w, x, dot)
    use(w, "dot_general", planned, _vectors(x, dot))
    if planned.chunks == 1:
        return _product(w, x, dot, planned)
    out = _empty(w, x, dot)
    few = _rows_at_once(w, _thresholds())

    def product(start: Array) -> Array:
        rows = take_rows(lambda x: jax.lax.dynamic_slice_in_dim(x, start, few), w)
        return _product(rows, x, dot, planned)

    return in_chunks(product, w.shape[0], few, out, dot.place(0, w.ndim, out.ndim))


def _product(w: Stored, x: Array, dot: Dot, planned: Plan) -> Array:
    """A chunk's product."""
    if planned.parts == 1:
        return _whole(w, x, dot, planned)
    last, count = w.ndim - 1, planned.parts
    length = w.shape[-1] // count
    out = _empty(w, x, dot)
    if last not in dot.contracted:
        return in_chunks(
            lambda start: _whole(w.part(jax.lax.div(start, length)), x, dot, planned),
            w.shape[-1],
            length,
            out,
            dot.place(last, w.ndim, out.ndim),
        )

    dtype = jnp.promote_types(out.dtype, jnp.float32)  # the sum is to be rounded once
    wide = dataclasses.replace(dot, params={**dot.params, "preferred_element_type": dtype})

    def add_product(i: Array, total: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(x, i * length, length, dot.x_axis(last))
        return total + _whole(w.part(i), some, wide, planned)

    return jax.lax.fori_loop(0, count, add_product, out.astype(dtype)).astype(out.dtype)


def _whole(w: Stored, x: Array, dot: Dot, planned: Plan) -> Array:
    """The product of what is neither cut into chunks nor into parts any more."""
    return _multiplied(w, x, dot, planned, _thresholds())


@functools.partial(compiler.shared, static_argnums=(2, 3, 4))
def _multiplied(w: Stored, x: Array, dot: Dot, planned: Plan, at: Thresholds) -> Array:
    dot = dataclasses.replace(dot, integer=planned.algorithms[-1] == "integer")
    if isinstance(w, QuantizedArray):
        return matmul.undisplaced(w, x, dot)
    if planned.kernel:
        return matmul.dequantize(w.array, w.direction, x, dot, _kernel(w, x, dot))
    return w.direction.multiply(planned.algorithms[:-1], w.array, x, dot, at)


def _empty(w: Stored, x: Array, dot: Dot) -> Array:
    """Zeros in the shape of a product."""
    return compiler.zeros(jax.eval_shape(dot, w.aval(), x), w)


def _vectors(x: Array, dot: Dot) -> int:
    """How many vectors a product multiplies."""
    return x.size // max(math.prod(x.shape[dot.x_axis(axis)] for axis in dot.contracted), 1)


def _one_displacement_at_a_time(fn: Callable[..., Array], *operands: Any) -> Array:
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
            stored = [matmul.depends_on(first, array) for array in stored]
        parts = iter(stored), iter(directions)
        filled = [next(parts[0 if is_quantized(leaf) else 1]) for leaf in leaves]
        arrays = iter(jax.tree.unflatten(treedef, filled))
        rest = iter(plain)
        return fn(*(next(arrays).materialise() if is_implicit(x) else next(rest) for x in operands))

    turned = custom_vmap(one)

    @turned.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        return matmul.one_by_one(turned, size, batched, operands)

    return turned(stored, directions, plain)


def _kernel(w: PerturbedArray, x: Array, dot: Dot) -> Kernel | None:
    """The GPU kernel that decodes and multiplies both sides in one read, where it is asked for.

    It takes the two sides of a query for opposite, as `queries.losses` makes them.
    """
    mode = os.environ.get("ZOQO_JAX_KERNELS", "off")
    if mode not in ("off", "on", "interpret"):
        raise ValueError(f"ZOQO_JAX_KERNELS must be off, on or interpret, got {mode!r}.")
    if mode == "off" or (mode == "on" and jax.default_backend() != "gpu"):
        return None
    from zoqo_jax.implicit import kernels  # Pallas for GPUs is not everywhere

    is_matrix = w.ndim == 2 and len(dot.contracted) == 1 and not dot.batched
    preferred = dot.params.get("preferred_element_type")
    keeps_dtype = x.dtype == w.array.value_dtype and preferred in (None, x.dtype)
    is_opposite = isinstance(w.direction, RankOne) and w.direction.is_signs
    is_opposite = is_opposite and w.direction.off_grid is None
    fits = is_matrix and keeps_dtype and is_opposite
    if not fits or not kernels.supports(w.array):
        return None
    (contracted,) = dot.contracted

    def both_sides(array: QuantizedArray, direction: Direction, sides: Array, x: Array) -> Array:
        x = jnp.moveaxis(x, 1 + dot.x_axis(contracted), -1)
        out = kernels.rank_one_product(
            x.reshape(2, -1, x.shape[-1]),
            array,
            direction.row_signs() * sides[0].astype(jnp.int8),
            direction.column_signs(array),
            direction.radius_in_codes(array),
            direction.boundary,
            transposed=contracted == 1,
            precision=dot.params.get("precision"),
            interpret=mode == "interpret",
        ).reshape(*x.shape[:-1], -1)
        return out if dot.operand else jnp.moveaxis(out, -1, 1)

    return both_sides
