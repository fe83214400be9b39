"""What JAX operations make of implicit arrays, and `quaxify`, which puts the rules to work.

Products go to `products.py`. Operations that rearrange or pick whole rows stay implicit: reshapes
that keep the last axis, slices, indexing, embedding look-ups (which decode the rows they pick and
no others). So do transposes, and conversions to a narrower dtype. Any other operation sees the
values, made for that operation alone: slower, and as right.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jaxtyping import Array, ArrayLike, PyTree

from zoqo_jax import products
from zoqo_jax.arrays import QuantizedArray, ScanAlongBlocks
from zoqo_jax.implicit import Implicit, PerturbedArray, TransposedArray, on_rows, use

__all__ = ["quaxify"]

Stored = QuantizedArray | PerturbedArray


def quaxify(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of float arrays take trees with quantized leaves, implicitly.

    Args:
        fn: any function of pytrees made of JAX operations, e.g. `model.apply`.

    Returns:
        `fn`, but each `QuantizedArray` among its arguments stands for its values.

    Examples:
        >>> from zoqo_jax import Quantizer, quantize
        >>> params = quantize({"w": jnp.full((2, 2), 0.5)}, Quantizer(bits=8, range=1.0))
        >>> quaxify(lambda params, x: x @ params["w"])(params, jnp.ones(2)).round(2).tolist()
        [1.0, 1.0]
    """

    @functools.wraps(fn)
    def implicit(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(_sliceable, (args, kwargs), is_leaf=_is_implicit)
        try:
            return quax.quaxify(fn)(*args, **kwargs)
        except ScanAlongBlocks:  # rare: then a scale for every entry
            args, kwargs = jax.tree.map(_without_blocks, (args, kwargs), is_leaf=_is_implicit)
            return quax.quaxify(fn)(*args, **kwargs)

    return implicit


# Products


@quax.register(jax.lax.dot_general_p)
def _dot_right(x: ArrayLike, w: Implicit, *, dimension_numbers: Any, **params: Any) -> Array:
    return products.dot_general(w, jnp.asarray(x), 1, dimension_numbers, **params)


@quax.register(jax.lax.dot_general_p)
def _dot_left(w: Implicit, x: ArrayLike, *, dimension_numbers: Any, **params: Any) -> Array:
    return products.dot_general(w, jnp.asarray(x), 0, dimension_numbers, **params)


@quax.register(jax.lax.dot_general_p)
def _dot_both(w: Implicit, v: Implicit, *, dimension_numbers: Any, **params: Any) -> Array:
    if v.size <= w.size:  # the smaller becomes an array of floats
        values = _values(v, "dot_general")
        return products.dot_general(w, values, 0, dimension_numbers, **params)
    values = _values(w, "dot_general")
    return products.dot_general(v, values, 1, dimension_numbers, **params)


@quax.register(jax.lax.conv_general_dilated_p)
def _convolve(x: ArrayLike, w: PerturbedArray, **params: Any) -> Array:
    return products.convolution(w, jnp.asarray(x), **params)


# Axes and rows


@quax.register(jax.lax.transpose_p)
def _transpose_stored(w: Stored, *, permutation: Any) -> Any:
    return TransposedArray(w, tuple(permutation))


@quax.register(jax.lax.transpose_p)
def _transpose_transposed(w: TransposedArray, *, permutation: Any) -> Any:
    axes = tuple(w.axes[axis] for axis in permutation)
    return w.array if axes == tuple(range(len(axes))) else TransposedArray(w.array, axes)


@quax.register(jax.lax.reshape_p)
def _reshape(w: Stored, *, new_sizes: Any, **params: Any) -> Any:
    if w.ndim == 0 or not new_sizes or new_sizes[-1] != w.shape[-1] or w.size == 0:
        return jax.lax.reshape(_values(w, "reshape"), new_sizes)
    return on_rows(lambda x: x.reshape(*new_sizes[:-1], x.shape[-1]), w)


@quax.register(jax.lax.squeeze_p)
def _squeeze(w: Stored, *, dimensions: Any) -> Any:
    if w.ndim - 1 in dimensions:
        return jax.lax.squeeze(_values(w, "squeeze"), dimensions)
    return on_rows(lambda x: jax.lax.squeeze(x, dimensions), w)


@quax.register(jax.lax.broadcast_in_dim_p)
def _broadcast(w: Stored, *, shape: Any, broadcast_dimensions: Any, **params: Any) -> Any:
    dims = tuple(broadcast_dimensions)
    keeps_last = bool(dims) and dims[-1] == len(shape) - 1 and shape[-1] == w.shape[-1]
    adds_ones = all(shape[axis] == 1 for axis in range(len(shape)) if axis not in dims)
    if not keeps_last or not adds_ones or w.size != math.prod(shape):
        values = _values(w, "broadcast_in_dim")
        return jax.lax.broadcast_in_dim(values, shape, broadcast_dimensions)
    return on_rows(lambda x: x.reshape(*shape[:-1], x.shape[-1]), w)


@quax.register(jax.lax.slice_p)
def _slice(w: Stored, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    strides = strides or (1,) * w.ndim
    if (start_indices[-1], limit_indices[-1], strides[-1]) != (0, w.shape[-1], 1):
        return jax.lax.slice(_values(w, "slice"), start_indices, limit_indices, strides)
    start, limit, stride = start_indices[:-1], limit_indices[:-1], strides[:-1]
    return on_rows(lambda x: jax.lax.slice(x, (*start, 0), (*limit, x.shape[-1]), (*stride, 1)), w)


@quax.register(jax.lax.dynamic_slice_p)
def _dynamic_slice(w: Stored, *starts: ArrayLike, slice_sizes: Any) -> Any:
    if slice_sizes[-1] != w.shape[-1]:
        return jax.lax.dynamic_slice(_values(w, "dynamic_slice"), starts, slice_sizes)
    rows = (*starts[:-1], jnp.zeros_like(starts[-1]))
    return on_rows(lambda x: jax.lax.dynamic_slice(x, rows, (*slice_sizes[:-1], x.shape[-1])), w)


@quax.register(jax.lax.gather_p)
def _gather(w: Stored, indices: ArrayLike, **params: Any) -> Any:
    """Look rows up, as an embedding does: only those are decoded."""
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch = jnp.ndim(indices) - 1
    rows = w.ndim - 1
    by_rows = (
        rows > 0
        and sizes == (*(1,) * rows, w.shape[-1])
        and dims.collapsed_slice_dims == tuple(range(rows))
        and dims.offset_dims == (batch,)
        and not dims.operand_batching_dims
        and rows not in dims.start_index_map
    )
    if not by_rows:
        return jax.lax.gather_p.bind(_values(w, "gather"), indices, **params)

    def look_up(x: Array, fill: Any = 0) -> Array:
        kind = {**params, "slice_sizes": (*(1,) * rows, x.shape[-1]), "fill_value": fill}
        return jax.lax.gather_p.bind(x, indices, **kind)

    use(w, "gather", "rows")
    values = on_rows(look_up, w).materialise()
    if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return values
    found = look_up(jnp.ones((*w.shape[:-1], 1), bool), False)
    fill = params["fill_value"]
    return jnp.where(found, values, jnp.nan if fill is None else fill).astype(values.dtype)


# Dtypes


@quax.register(jax.lax.convert_element_type_p)
def _convert_stored(w: Stored, *, new_dtype: Any, **params: Any) -> Any:
    """Narrow implicitly; widening must keep the rounding that the narrower dtype made."""
    array = w.array if isinstance(w, PerturbedArray) else w
    if jnp.dtype(new_dtype) not in (array.value_dtype, *_NARROWER.get(array.value_dtype.name, ())):
        values = _values(w, "convert_element_type")
        return jax.lax.convert_element_type_p.bind(values, new_dtype=new_dtype, **params)
    converted = dataclasses.replace(array, value_dtype=jnp.dtype(new_dtype))
    return dataclasses.replace(w, array=converted) if isinstance(w, PerturbedArray) else converted


@quax.register(jax.lax.convert_element_type_p)
def _convert_transposed(w: TransposedArray, *, new_dtype: Any, **params: Any) -> Any:
    converted = _convert_stored(w.array, new_dtype=new_dtype, **params)
    if _is_implicit(converted):
        return TransposedArray(converted, w.axes)
    return jnp.transpose(converted, w.axes)


_NARROWER = {"float32": (jnp.bfloat16, jnp.float16)}


# Scans


def _values(w: Implicit, operation: str) -> Array:
    """The values, for an operation whose rule does not cover the case."""
    use(w, operation, "values")
    return w.materialise()


def _is_implicit(leaf: Any) -> bool:
    return isinstance(leaf, Implicit)


def _sliceable(leaf: PyTree) -> PyTree:
    """Give every slice of a stack a copy of what slices share, so that `lax.scan` can take it."""
    if isinstance(leaf, PerturbedArray):
        array, stencil = leaf.array, leaf.stencil
        copies = {
            name: jnp.broadcast_to(number.reshape(-1)[0], array.shape[:1])
            for name in ("radius", "share", "off_grid")
            if (number := getattr(stencil, name)) is not None
        }
        stencil = dataclasses.replace(stencil, **copies)
        return dataclasses.replace(leaf, array=_sliceable(array), stencil=stencil)
    if isinstance(leaf, QuantizedArray):
        scale, offset = (_spread_leading(x, leaf) for x in (leaf.scale, leaf.offset))
        return dataclasses.replace(leaf, scale=scale, offset=offset, has_copies=leaf.has_one_scale)
    return leaf


def _without_blocks(leaf: PyTree) -> PyTree:
    """Give every row a scale of its own where blocks lie along rows."""
    if isinstance(leaf, PerturbedArray):
        return dataclasses.replace(leaf, array=_without_blocks(leaf.array))
    if isinstance(leaf, QuantizedArray) and leaf.block is not None and leaf.block[0] != -1:
        scale, offset = _per_row(leaf.scale, leaf), _per_row(leaf.offset, leaf)
        return dataclasses.replace(leaf, scale=scale, offset=offset, block=None)
    return leaf


def _per_row(per_block: Array | None, array: QuantizedArray) -> Array | None:
    if per_block is None or array.block is None or array.block[0] == -1:
        return per_block
    return array.spread(per_block)


def _spread_leading(per_block: Array | None, array: QuantizedArray) -> Array | None:
    """Repeat along the axis that a scan may walk, a stack's first.

    Never along the last, within which draws depend on what is shared (`draws.bernoulli`).
    """
    if per_block is None or per_block.ndim < 2 or per_block.shape[0] != 1:
        return per_block
    return jnp.broadcast_to(per_block, (array.shape[0], *per_block.shape[1:]))
