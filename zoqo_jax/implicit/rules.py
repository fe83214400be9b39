"""What JAX operations make of implicit arrays.

Products go to `products.py`. Operations that rearrange or pick whole rows stay implicit: reshapes
that keep the last axis, slices, indexing, embedding look-ups (which decode the rows they pick and
no others). So do transposes, and conversions to a narrower dtype. Any other operation is put off
until a product, or sees the values, made for that operation alone: slower, and as right.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.implicit import control as control  # its rules, too
from zoqo_jax.implicit import products
from zoqo_jax.implicit.arrays import (
    DerivedArray,
    Implicit,
    PerturbedArray,
    Plan,
    TransposedArray,
    is_implicit,
    take_rows,
    use,
)
from zoqo_jax.implicit.interpreter import Flags, higher, quaxify, register

__all__ = ["quaxify"]

Stored = QuantizedArray | PerturbedArray
STORED = (QuantizedArray, PerturbedArray)
ANY = (*STORED, TransposedArray, DerivedArray)


# Products


@register("dot_general", *ANY)
def _dot(x: Any, y: Any, *, dimension_numbers: Any, **params: Any) -> Array:
    if is_implicit(x) and is_implicit(y):
        multiply = functools.partial(
            jax.lax.dot_general_p.bind, dimension_numbers=dimension_numbers, **params
        )
        return products.in_turn("dot_general", multiply, x, y)
    if is_implicit(x):
        return products.dot_general(x, jnp.asarray(y), 0, dimension_numbers, **params)
    return products.dot_general(y, jnp.asarray(x), 1, dimension_numbers, **params)


@register("conv_general_dilated", *ANY)
def _convolve(x: Any, w: Any, **params: Any) -> Array:
    """One displacement after another.

    Kernels are small and decoding them costs little, but displaced kernels side by side would make
    a grouped convolution, which XLA's CPU backend computes slowly.
    """

    def convolve(x: Array, w: Array) -> Array:
        return jax.lax.conv_general_dilated_p.bind(x, w, **params)

    return products.in_turn("conv_general_dilated", convolve, x, w)


def _multiplied(equation: Any, flags: Flags) -> Flags:
    return (True, True, *(False,) * (len(equation.invars) - 2))


@higher("ragged_dot_general", wanted=_multiplied)
def _ragged_dot(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    """One displacement after another, also of data: JAX does not batch it."""
    how = {name: value for name, value in params.items() if name != "out_sharding"}

    def multiply(*arrays: Array) -> Array:
        return jax.lax.ragged_dot_general(*arrays, **how)

    return [products.in_turn("ragged_dot_general", sequential_vmap(multiply), *inputs)]


# Axes and rows


@register("transpose", *STORED)
def _transpose(w: Stored, *, permutation: Any) -> Any:
    return TransposedArray(w, tuple(permutation))


@register("transpose", TransposedArray)
def _transpose_transposed(w: TransposedArray, *, permutation: Any) -> Any:
    axes = tuple(w.axes[axis] for axis in permutation)
    return w.array if axes == tuple(range(len(axes))) else TransposedArray(w.array, axes)


@register("reshape", *STORED)
def _reshape(w: Stored, *, new_sizes: Any, dimensions: Any = None, **params: Any) -> Any:
    if (
        dimensions is not None
        or w.ndim == 0
        or not new_sizes
        or new_sizes[-1] != w.shape[-1]
        or w.size == 0
    ):
        return NotImplemented
    return take_rows(lambda x: x.reshape(*new_sizes[:-1], x.shape[-1]), w)


@register("squeeze", *STORED)
def _squeeze(w: Stored, *, dimensions: Any) -> Any:
    if w.ndim - 1 in dimensions:
        return NotImplemented
    return take_rows(lambda x: jax.lax.squeeze(x, dimensions), w)


@register("broadcast_in_dim", *STORED)
def _broadcast(w: Stored, *, shape: Any, broadcast_dimensions: Any, **params: Any) -> Any:
    dims = tuple(broadcast_dimensions)
    keeps_last = bool(dims) and dims[-1] == len(shape) - 1 and shape[-1] == w.shape[-1]
    adds_ones = all(shape[axis] == 1 for axis in range(len(shape)) if axis not in dims)
    if not keeps_last or not adds_ones or w.size != math.prod(shape):
        return NotImplemented
    return take_rows(lambda x: x.reshape(*shape[:-1], x.shape[-1]), w)


@register("slice", *STORED)
def _slice(w: Stored, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    strides = strides or (1,) * w.ndim
    if (start_indices[-1], limit_indices[-1], strides[-1]) != (0, w.shape[-1], 1):
        return NotImplemented
    start, limit, stride = start_indices[:-1], limit_indices[:-1], strides[:-1]
    return take_rows(
        lambda x: jax.lax.slice(x, (*start, 0), (*limit, x.shape[-1]), (*stride, 1)), w
    )


@register("dynamic_slice", *STORED)
def _dynamic_slice(w: Stored, *starts: ArrayLike, slice_sizes: Any) -> Any:
    if slice_sizes[-1] != w.shape[-1] or any(map(is_implicit, starts)):
        return NotImplemented
    rows = (*starts[:-1], jnp.zeros_like(starts[-1]))
    return take_rows(lambda x: jax.lax.dynamic_slice(x, rows, (*slice_sizes[:-1], x.shape[-1])), w)


@register("gather", *STORED)
def _gather(w: Stored, indices: Any, **params: Any) -> Any:
    """Look rows up, as an embedding does: only those are decoded."""
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    fills = params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    last, made = w.ndim - 1, jnp.ndim(indices) - 1 + len(dims.offset_dims)
    if last <= 0 or sizes[last] != w.shape[-1] or is_implicit(indices):
        return NotImplemented
    if last in dims.start_index_map and not fills:  # a whole axis can only start at 0
        place = dims.start_index_map.index(last)
        starts = tuple(axis for axis in dims.start_index_map if axis != last)
        dims = dims._replace(start_index_map=starts)
        indices = jnp.delete(indices, place, axis=-1, assume_unique_indices=True)
    axes = (*dims.start_index_map, *dims.collapsed_slice_dims, *dims.operand_batching_dims)
    if last in axes:
        return NotImplemented
    # The last axis goes to the end of the result, and then where it is to be.
    place = dims.offset_dims[-1]
    others = [axis - (axis > place) for axis in dims.offset_dims[:-1]]
    at_end = dims._replace(offset_dims=(*others, made - 1))

    def look_up(x: Array, fill: Any = 0) -> Array:
        kind = {**params, "slice_sizes": (*sizes[:-1], x.shape[-1]), "fill_value": fill}
        return jax.lax.gather_p.bind(x, indices, **{**kind, "dimension_numbers": at_end})

    use(w, "gather", Plan(("take_rows",)))
    values = take_rows(look_up, w).materialise()
    if fills:
        found = look_up(jnp.ones((*w.shape[:-1], 1), bool), False)
        fill = params["fill_value"]
        values = jnp.where(found, values, jnp.nan if fill is None else fill).astype(values.dtype)
    return jnp.moveaxis(values, -1, place)


@register("gather", DerivedArray)
def _gather_derived(w: DerivedArray, indices: Any, **params: Any) -> Any:
    """Rows first, then what was to be done with each of their entries."""
    table = w.entry_by_entry()
    if not isinstance(table, Stored):
        return NotImplemented
    rows = _gather(table, indices, **params)
    return rows if rows is NotImplemented else w.of(rows).materialise()


# Dtypes


@register("convert_element_type", *STORED)
def _convert(w: Stored, *, new_dtype: Any, **params: Any) -> Any:
    """Narrow implicitly; widening must keep the rounding that the narrower dtype made."""
    array = w.array if isinstance(w, PerturbedArray) else w
    if jnp.dtype(new_dtype) not in (array.value_dtype, *_NARROWER.get(array.value_dtype.name, ())):
        return NotImplemented
    converted = dataclasses.replace(array, value_dtype=jnp.dtype(new_dtype))
    return dataclasses.replace(w, array=converted) if isinstance(w, PerturbedArray) else converted


@register("convert_element_type", TransposedArray)
def _convert_transposed(w: TransposedArray, *, new_dtype: Any, **params: Any) -> Any:
    converted = _convert(w.array, new_dtype=new_dtype, **params)
    return converted if converted is NotImplemented else TransposedArray(converted, w.axes)


_NARROWER = {"float32": (jnp.bfloat16, jnp.float16)}


# What changes nothing


@register(("copy", "name", "pvary", "sharding_constraint", "stop_gradient"), *ANY)
def _as_it_is(w: Implicit, **params: Any) -> Any:
    """Codes lie where they lie; a constraint on values would have to decode them."""
    return w


@register("optimization_barrier", *ANY)
def _barrier(*xs: Any, **params: Any) -> Any:
    return jax.lax.optimization_barrier(list(xs))
