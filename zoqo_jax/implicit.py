"""Implicit arrays: quantized and perturbed weights that an unmodified model computes with.

`quaxify(fn)` runs `fn` with `QuantizedArray` and `PerturbedArray` leaves in place of float arrays
(quax does the interpreting). Operations with a rule here keep the array implicit; any other sees
the values, made for that operation alone. No perturbed copy of a model ever exists.

The rule that pays: for a rank-one direction with rows `a` and columns `b`, and legal neighbours at
`+m` and `-m`, `value(n +- m a b^T) = M +- D * (a b^T)` with M and D half the sum and difference of
the neighbours' values, so `x @ value(n +- m a b^T) = x @ M +- ((x * a) @ D) * b`, exact for every
compander and at the grid's
edges: both sides of a query, and every query, share the two weight matrices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.core import ShapedArray
from jaxtyping import Array, ArrayLike, PyTree

from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.stencils import Stencil, displace, draw, reach, signs

__all__ = ["PerturbedArray", "quaxify"]


class PerturbedArray(quax.ArrayValue):
    """A quantized array displaced by a stencil, an implicit float array: `value(boundary(n + u))`.

    Attributes:
        array: where the codes are.
        stencil: where they would go; its row signs carry the side of the query.
    """

    array: QuantizedArray
    stencil: Stencil

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        return self.array.aval()

    def materialise(self) -> Array:
        """The values; what an operation without a rule gets."""
        return self.array.decode(self.displaced(draw(self.stencil, self.array)))

    def endpoint(self) -> QuantizedArray:
        """The same values as a quantized array."""
        return self.array.moved(self.displaced(draw(self.stencil, self.array)))

    def displaced(self, u: Array) -> Array:
        """The legal codes at `n + u`, int32."""
        return displace(self.array.codes, u, self.array.grid, self.stencil.boundary)


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
        return quax.quaxify(fn)(*args, **kwargs)

    return implicit


@quax.register(jax.lax.dot_general_p)
def _dot_right(x: ArrayLike, w: PerturbedArray, *, dimension_numbers: Any, **params: Any) -> Array:
    return _dot(w, x, 1, dimension_numbers=dimension_numbers, **params)


@quax.register(jax.lax.dot_general_p)
def _dot_left(w: PerturbedArray, x: ArrayLike, *, dimension_numbers: Any, **params: Any) -> Array:
    return _dot(w, x, 0, dimension_numbers=dimension_numbers, **params)


@quax.register(jax.lax.convert_element_type_p)
def _convert_quantized(w: QuantizedArray, *, new_dtype: Any, **params: Any) -> Any:
    return _convert(w, new_dtype, params)


@quax.register(jax.lax.convert_element_type_p)
def _convert_perturbed(w: PerturbedArray, *, new_dtype: Any, **params: Any) -> Any:
    return _convert(w, new_dtype, params)


def _dot(
    w: PerturbedArray, x: ArrayLike, side: int, *, dimension_numbers: Any, **params: Any
) -> Array:
    """A product with a perturbed matrix; `side` is its place among the operands."""

    def dot(values: Array, x: ArrayLike) -> Array:
        operands = (x, values) if side else (values, x)
        return jax.lax.dot_general(*operands, dimension_numbers=dimension_numbers, **params)

    contracted, batched = dimension_numbers
    if not _is_separable(w) or len(contracted[side]) != 1 or batched[side]:
        return dot(w.materialise(), x)
    row_signs, column_signs = w.stencil.rows, signs(w.stencil.key[0], w.array.codes.shape[1])
    across_rows = contracted[side][0] == 0
    inner, outer = (row_signs, column_signs) if across_rows else (column_signs, row_signs)
    mean, half = _neighbours(w)
    turned = x * _along(inner, contracted[1 - side][0], jnp.ndim(x), jnp.result_type(x))
    product = dot(half, turned)
    return dot(mean, x) + product * _along(outer, -side, product.ndim, product.dtype)


def _is_separable(w: PerturbedArray) -> bool:
    """Whether the direction is, up to reach and the grid's edges, a matrix of signs of rank one."""
    stencil = w.stencil
    one_sign_each = stencil.law == "rademacher" and stencil.probability is None
    return stencil.structure == "rank_one" and one_sign_each and w.ndim == 2


def _neighbours(w: PerturbedArray) -> tuple[Array, Array]:
    """M and D: half the sum and half the difference of the values at the neighbours +m and -m."""
    array = w.array
    m = jnp.broadcast_to(reach(array.spread(w.stencil.width), array.grid), array.codes.shape)
    above, below = (array.decode(w.displaced(u)).astype(jnp.float32) for u in (m, -m))
    mean, half = (above + below) / 2, (above - below) / 2
    return mean.astype(array.value_dtype), half.astype(array.value_dtype)


def _along(vector: Array, axis: int, ndim: int, dtype: Any) -> Array:
    """A vector shaped to lie along one axis of an array."""
    shape = [1] * ndim
    shape[axis] = vector.shape[0]
    return vector.reshape(shape).astype(dtype)


def _convert(w: QuantizedArray | PerturbedArray, dtype: Any, params: dict[str, Any]) -> Any:
    """Narrow implicitly; widening must keep the rounding that the narrower dtype made."""
    array = w.array if isinstance(w, PerturbedArray) else w
    narrows = jnp.dtype(dtype) in (array.value_dtype, *_NARROWER.get(array.value_dtype.name, ()))
    if not narrows:
        return jax.lax.convert_element_type_p.bind(w.materialise(), new_dtype=dtype, **params)
    converted = dataclasses.replace(array, value_dtype=jnp.dtype(dtype))
    return PerturbedArray(converted, w.stencil) if isinstance(w, PerturbedArray) else converted


def _is_implicit(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray | PerturbedArray)


def _sliceable(leaf: PyTree) -> PyTree:
    """Give every slice of a stack a copy of what slices share, so that `lax.scan` can take it."""
    if isinstance(leaf, PerturbedArray):
        array, stencil = leaf.array, leaf.stencil
        width, probability = (
            _spread_leading(x, array) for x in (stencil.width, stencil.probability)
        )
        stencil = dataclasses.replace(stencil, width=width, probability=probability)
        return PerturbedArray(_sliceable(array), stencil)
    if isinstance(leaf, QuantizedArray):
        scale, offset = (_spread_leading(x, leaf) for x in (leaf.scale, leaf.offset))
        return dataclasses.replace(leaf, scale=scale, offset=offset)
    return leaf


def _spread_leading(per_block: Array | None, array: QuantizedArray) -> Array | None:
    """Repeat along the axes that a scan may walk: all but a matrix's two, of a matrix its first.

    Never along the last, within which draws depend on what is shared (`stencils.bernoulli`).
    """
    if per_block is None:
        return None
    leading = max(per_block.ndim - 2, min(per_block.ndim - 1, 1))
    axes = enumerate(zip(array.codes.shape, per_block.shape, strict=True))
    target = [n if axis < leading and blocks == 1 else blocks for axis, (n, blocks) in axes]
    return jnp.broadcast_to(per_block, target)


_NARROWER = {"float32": (jnp.bfloat16, jnp.float16)}
