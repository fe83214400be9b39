"""LoRA on the grid: a frozen weight plus the product of two small ones, never added together.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685. A
`LoraArray` stands in a weight's place like any implicit array: the model computes `x W^T` as
`x W0^T + (x A^T) B^T alpha / rank`. W0 may be codes or floats; A and B are codes of a grid of
their own, which transformations move, or floats.

With `core=r`, A and B are frozen floats, the first r principal directions of W0, and what trains is
a core of r x r numbers between them: `x W0^T + ((x A^T) C^T) B^T`, as in Bałazy, Banaei, Aberer and
Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024,
arXiv:2405.17604. Zeroth-order methods pay for each number that trains: here they are few.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.core import ShapedArray
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from zoqo_jax.grids.arrays import freeze, is_quantized
from zoqo_jax.grids.quantization import Quantizer
from zoqo_jax.implicit.arrays import is_implicit
from zoqo_jax.implicit.control import slices
from zoqo_jax.implicit.interpreter import register, values_of
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.xla import random_bits

__all__ = ["LoraArray", "is_factor", "is_lora", "lora", "merge"]


class LoraArray(quax.ArrayValue):
    """`base + scaling * b @ a`, or with a core `base + scaling * b @ core @ a`, as floats.

    Attributes:
        base: (..., outputs, inputs), a frozen `QuantizedArray` or floats.
        a: (..., rank, inputs), codes or floats.
        b: (..., outputs, rank), codes or floats.
        scaling: alpha / rank.
        core: (..., rank, rank), codes or floats, of which a and b are frozen bases; or None.

    Examples:
        >>> w = LoraArray(jnp.zeros((2, 3)), jnp.ones((1, 3)), jnp.ones((2, 1)), scaling=0.5)
        >>> quaxify(lambda w, x: w @ x)(w, jnp.ones(3)).tolist()
        [1.5, 1.5]
    """

    base: Any
    a: Any
    b: Any
    scaling: float = eqx.field(static=True)
    core: Any = None

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        return ShapedArray(tuple(self.base.shape), self.base.dtype)

    @property
    def arrays(self) -> list[Any]:
        """The base, a, b and the core, if there is one."""
        return [self.base, self.a, self.b, *([] if self.core is None else [self.core])]

    def materialise(self) -> Float[Array, "..."]:
        """The sum."""

        def total(base: Array, a: Array, b: Array, core: Array | None) -> Array:
            b = b if core is None else jnp.matmul(b, core)
            return base + self.scaling * jnp.matmul(b, a).astype(base.dtype)

        return quaxify(total)(self.base, self.a, self.b, self.core)


def lora(
    params: PyTree,
    rank: int | None = None,
    alpha: float | None = None,
    *,
    core: int | None = None,
    key: PRNGKeyArray,
    where: Callable[[tuple[Any, ...], Any], bool],
    quantizer: Quantizer | None = Quantizer(8, range=0.3),  # noqa: B008
) -> PyTree:
    """Give weights low-rank adapters, and freeze everything else.

    A begins uniform in [-1, 1] / sqrt(inputs), as in PEFT, B at zero: the model is what it was. A
    is rounded to its grid with dither, half a step either way: rounded to nearest, it would be zero
    on a grid coarser than it is wide, and the first steps would find no slope in A or in B.

    With `core=r` a weight gets r x r numbers instead, which begin at zero, between frozen bases: of
    its values, B has the first r left singular vectors times their singular values, A the right
    ones. Bases are float32, r (inputs + outputs) numbers beside each weight. An entry of the core
    is a change as a share of a singular value, whatever the weight's scale.

    Args:
        params: any pytree; its quantized leaves are frozen.
        rank: of the adapters, at least 1; or give `core`.
        alpha: adapters are multiplied by alpha / rank; by default 2 rank. Not with `core`.
        core: of how many numbers squared an adapter is, at least 1; at most the smaller side of
            every chosen weight.
        key: of A; with `core` nothing is random.
        where: `where(path, leaf) -> bool`, which leaves get one: (..., outputs, inputs), layers
            stacked on leading axes.
        quantizer: of A and B, or of the core. Its range is a number: what entries can reach. None
            leaves them floats.

    Returns:
        The tree, with a `LoraArray` for each chosen leaf.

    Raises:
        ValueError: `rank` below 1, both it and `core` or neither, a core larger than a weight,
            `where` that chooses nothing or what is no matrix, or a fitted range, which zeros do not
            have.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.nf4()(jnp.ones((3, 64))), "b": jnp.ones(3)}
        >>> params = lora(params, 2, key=jax.random.key(0), where=lambda path, w: w.ndim == 2)
        >>> zq.quaxify(lambda params, x: params["w"] @ x + params["b"])(params, jnp.ones(64))
        Array([65., 65., 65.], dtype=float32)

        Nine numbers for a weight:

        >>> params = {"w": jnp.eye(8)}
        >>> params = lora(params, core=3, key=jax.random.key(0), where=lambda path, w: True)
        >>> params["w"].core.shape, params["w"].a.shape
        ((3, 3), (3, 8))
    """
    if (rank is None) == (core is None):
        raise ValueError(f"either rank or core must be given, got {rank} and {core}.")
    if core is not None and alpha is not None:
        raise ValueError(f"alpha={alpha} is not for core={core}: its bases have a scale.")
    rank = core if rank is None else rank
    if rank < 1:
        raise ValueError(f"{'rank' if core is None else 'core'} must be at least 1, got {rank}.")
    if quantizer is not None and isinstance(quantizer.range, str):
        raise ValueError(f"quantizer must have a range in numbers, got {quantizer.range!r}.")
    scaling = (2 * rank if alpha is None else alpha) / rank
    count = 0

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        nonlocal count
        if not where(path, leaf):
            return leaf
        if leaf.ndim < 2:
            raise ValueError(
                f"where must choose matrices, but {jax.tree_util.keystr(path)} has the shape "
                f"{leaf.shape}."
            )
        *stack, outputs, inputs = leaf.shape
        if core is not None:
            count += 1
            if core > min(outputs, inputs):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"core={core} is more than {name} of shape {leaf.shape} bears.")
            a, b = _bases(leaf, core)
            middle = jnp.zeros((*stack, core, core), jnp.float32)
            return LoraArray(leaf, a, b, 1.0, middle if quantizer is None else quantizer(middle))
        reach = 1.0 / math.sqrt(inputs)
        of_leaf = jax.random.fold_in(random_bits.threefry(key), count)
        shape = (*stack, rank, inputs)
        a = jax.random.uniform(of_leaf, shape, jnp.float32, minval=-reach, maxval=reach)
        b = jnp.zeros((*stack, outputs, rank), jnp.float32)
        count += 1
        if quantizer is not None:
            b, grid = quantizer(b), quantizer(a)
            dither = jax.random.uniform(
                jax.random.fold_in(of_leaf, 1), a.shape, jnp.float32, minval=-0.5, maxval=0.5
            )
            a = quantizer(a + grid.broadcast_scales(grid.step) * dither)
        return LoraArray(leaf, a, b, scaling)

    adapted = jax.tree_util.tree_map_with_path(one, freeze(params), is_leaf=is_quantized)
    if not count:
        raise ValueError("where must choose a leaf, but chose none.")
    return adapted


def is_lora(leaf: Any) -> bool:
    """Whether a leaf is a `LoraArray`; the `is_leaf` for maps over adapted trees.

    Examples:
        >>> params = lora({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, 1, key=jax.random.key(0),
        ...               where=lambda path, w: w.ndim == 2)
        >>> jax.tree.map(is_lora, params, is_leaf=is_lora)
        {'b': False, 'w': True}
    """
    return isinstance(leaf, LoraArray)


def is_factor(tree: PyTree) -> PyTree:
    """Which leaves of an adapted tree are factors, as a tree of bools for `equinox.partition`.

    Examples:
        >>> params = lora({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, 1, key=jax.random.key(0),
        ...               where=lambda path, w: w.ndim == 2, quantizer=None)
        >>> trained, rest = eqx.partition(params, is_factor(params))
        >>> trained["b"] is None, trained["w"].a.shape
        (True, (1, 2))
    """

    def one(leaf: Any) -> Any:
        false = jax.tree.map(lambda _: False, leaf)
        if not is_lora(leaf):
            return false
        names = ("a", "b") if leaf.core is None else ("core",)
        true = {name: jax.tree.map(lambda _: True, getattr(leaf, name)) for name in names}
        return dataclasses.replace(false, **true)

    return jax.tree.map(one, tree, is_leaf=is_lora)


def merge(tree: PyTree) -> PyTree:
    """Replace every `LoraArray` of a tree by its values.

    Examples:
        >>> params = lora({"w": jnp.ones((2, 2))}, 1, key=jax.random.key(0),
        ...               where=lambda path, w: True)
        >>> merge(params)["w"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    return jax.tree.map(
        lambda leaf: leaf.materialise() if is_lora(leaf) else leaf, tree, is_leaf=is_lora
    )


def _bases(leaf: Any, count: int) -> tuple[Array, Array]:
    """The first right singular vectors of a weight's values, and the left ones times singular ones.

    One matrix of a stack is decoded at a time. Each left vector's largest entry is positive, so
    that they are the same wherever they are computed, up to rounding.
    """

    def of_matrix(w: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        u, s, v = u[:, :count], s[:count], v[:count]
        most = jnp.take_along_axis(u, jnp.abs(u).argmax(axis=0, keepdims=True), axis=0)[0]
        sign = jnp.where(most < 0, -1.0, 1.0)
        return v * sign[:, None], u * s * sign

    def of_all(w: Array) -> tuple[Array, Array]:
        fn = of_matrix
        for _ in w.shape[:-2]:
            fn = functools.partial(jax.lax.map, fn)
        return fn(w)

    return jax.jit(quaxify(of_all))(leaf)


@register("transpose", LoraArray)
def _transpose(w: LoraArray, *, permutation: Any) -> Any:
    *stack, last, first = range(w.ndim)
    if tuple(permutation) != (*stack, first, last):
        return NotImplemented
    turned = quaxify(lambda arrays: [jnp.transpose(x, permutation) for x in arrays])
    base, b, a, *core = turned(w.arrays)
    return LoraArray(base, a, b, w.scaling, *core)


def _of_layers(w: LoraArray, fn: Callable[[Array], Array]) -> LoraArray:
    """Apply what picks layers of a stack, (*layers, m, n) to (*fewer, m, n) for all m and n."""
    base, a, b, *core = quaxify(lambda arrays: list(map(fn, arrays)))(w.arrays)
    return LoraArray(base, a, b, w.scaling, *core)


@register("slice", LoraArray)
def _slice(w: LoraArray, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    given = (start_indices[-2:], limit_indices[-2:], (strides or (1,) * w.ndim)[-2:])
    if given != ((0, 0), w.shape[-2:], (1, 1)):
        return NotImplemented
    return _of_layers(
        w,
        lambda x: jax.lax.slice(x, start_indices, (*limit_indices[:-2], *x.shape[-2:]), strides),
    )


@register("dynamic_slice", LoraArray)
def _dynamic_slice(w: LoraArray, *starts: Any, slice_sizes: Any) -> Any:
    if slice_sizes[-2:] != w.shape[-2:] or any(map(is_implicit, starts)):
        return NotImplemented  # of what is taken whole, the start counts for nothing
    return _of_layers(
        w, lambda x: jax.lax.dynamic_slice(x, starts, (*slice_sizes[:-2], *x.shape[-2:]))
    )


@register("squeeze", LoraArray)
def _squeeze(w: LoraArray, *, dimensions: Any) -> Any:
    if {w.ndim - 2, w.ndim - 1} & set(dimensions):
        return NotImplemented
    return _of_layers(w, lambda x: jax.lax.squeeze(x, dimensions))


@register("gather", LoraArray)
def _gather(w: LoraArray, indices: Any, **params: Any) -> Any:
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    made = jnp.ndim(indices) - 1 + len(dims.offset_dims)
    moved = {*dims.start_index_map, *dims.collapsed_slice_dims, *dims.operand_batching_dims}
    if sizes[-2:] != w.shape[-2:] or {w.ndim - 2, w.ndim - 1} & moved or is_implicit(indices):
        return NotImplemented
    if tuple(dims.offset_dims[-2:]) != (made - 2, made - 1):
        return NotImplemented
    return _of_layers(
        w,
        lambda x: jax.lax.gather_p.bind(
            x, indices, **{**params, "slice_sizes": (*sizes[:-2], *x.shape[-2:])}
        ),
    )


@register("dot_general", LoraArray)
def _dot(x: Any, y: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    if is_implicit(x) and is_implicit(y):
        return NotImplemented
    if is_lora(x):
        return _product(x, jnp.asarray(y), 0, dimension_numbers, params)
    return _product(y, jnp.asarray(x), 1, dimension_numbers, params)


@slices.register
def _(w: LoraArray) -> Any:
    parts = [slices(x) if is_implicit(x) else (x, lambda part: part) for x in w.arrays]

    def layer(slice_: Any) -> LoraArray:
        base, a, b, *core = (of(x) for (_, of), x in zip(parts, slice_, strict=True))
        return LoraArray(base, a, b, w.scaling, *core)

    return [stack for stack, _ in parts], layer


def _product(w: LoraArray, x: Array, side: int, dims: Any, params: dict[str, Any]) -> Array:
    """A product with `w` as operand number `side`: one with each array, none with sums of them."""

    def dot(w: Any, x: Array, dims: Any) -> Array:
        operands = (x, w) if side else (w, x)
        return quaxify(
            lambda *both: jax.lax.dot_general_p.bind(*both, dimension_numbers=dims, **params)
        )(*operands)

    contracted, batched = dims
    if w.ndim != 2 or batched[0] or len(contracted[0]) != 1:
        return dot(values_of(w, "dot_general"), x, dims)
    (axis,) = contracted[side]
    near, far = (w.a, w.b) if axis == 1 else (w.b, w.a)  # the factor that x meets first, and last
    inner = dot(near, x, dims)  # rank is its last axis, or its first where w is on the left
    rank_axis = inner.ndim - 1 if side else 0
    both = ((rank_axis,), (axis,)) if side else ((axis,), (rank_axis,))
    for factor in (far,) if w.core is None else (w.core, far):
        inner = dot(factor, inner.astype(x.dtype), (both, ((), ())))
    return dot(w.base, x, dims) + w.scaling * inner
