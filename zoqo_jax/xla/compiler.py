"""Work-arounds for XLA's CPU backend, which elsewhere do nothing.

Each is the identity, or a plain choice, in what it computes; what differs is when it is computed
and whether it is stored. The backend is JAX's default one when a function is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Bool

__all__ = [
    "blank",
    "depends_on",
    "either",
    "materialized",
    "shared",
    "unfused",
    "unknown",
    "varying",
    "zeros",
]


def materialized(make: Callable[[], Any], source: Any) -> Any:
    """`make()`, arrays stored in memory.

    XLA would fuse the making of a random word into each of its 32 uses, or that of a block's scale
    into each of its codes. A call that stays one is a border that fusion does not cross.

    Args:
        make: makes an array, or a tree of them.
        source: an array that it is made from.
    """
    return _stays(jax.jit(make)()) if isinstance(source, Tracer) else make()


def blank(source: Array, like: Any) -> Array:
    """Zeros that depend on `source`, so that XLA cannot allocate them early."""
    if not _on_cpu() or source.size == 0:
        return zeros(like, source)
    never = _never(jax.lax.stop_gradient(source))
    return jnp.full(like.shape, never.astype(like.dtype))


def either(
    condition: Bool[Array, ""], one: Callable[[], Array], other: Callable[[], Array], like: Any
) -> Array:
    """`jax.lax.cond`, but parallel: XLA gives the branches of a cond one core only.

    The bodies of loops have all of them, so each branch is a loop that runs once or not at all.

    Args:
        condition: whether to compute `one` rather than `other`.
        one: makes an array.
        other: makes another of the same shape.
        like: their shape and dtype.
    """
    if not _on_cpu():
        return jax.lax.cond(condition, one, other)
    out = zeros(like, condition)
    for branch, chosen in ((one, condition), (other, ~condition)):
        _, out = jax.lax.while_loop(
            lambda state: state[0],
            lambda state, branch=branch: (jnp.zeros_like(state[0]), branch()),
            (chosen, out),
        )
    return out


def depends_on(x: Array, later: Array) -> Array:
    """`later`, made to depend on `x`.

    XLA's scheduler would decode all of a model's layers first, and have them in memory at once. So
    a layer's scale is made to depend on what it multiplies, in a way that changes nothing.
    """
    if x.size == 0 or not _on_cpu():
        return later
    return jnp.where(_never(jax.lax.stop_gradient(x)), jnp.zeros_like(later), later)


@custom_vmap
def _never(x: Array) -> Bool[Array, ""]:
    """False, and no compiler sees it: no number is both infinite and not a number."""
    first = x.reshape(-1)[0].real
    if first.dtype == jnp.uint32:
        first = jax.lax.bitcast_convert_type(first, jnp.float32)
    elif not jnp.issubdtype(first.dtype, jnp.floating):
        first = first.astype(jnp.float32)
    return jnp.isnan(first) & jnp.isinf(first)


@_never.def_vmap
def _(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return _never(x[0]), False  # one for the whole batch: what waits is not batched


def shared(fn: Callable[..., Any], static_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`fn`, traced and compiled once for all calls of a program with arguments of like shapes.

    XLA puts the body of a function in the place of every call, and what it then fuses differs from
    call to call: a step of 57 leaves compiled 30 times as long as its forward pass. Calls that stay
    calls have the same kernels, and XLA's CPU backend compiles a kernel once.

    Args:
        fn: a function of arrays, the same object at each call.
        static_argnums: arguments that are no arrays.
    """
    jitted = jax.jit(fn, static_argnums=static_argnums)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        if not any(isinstance(x, Tracer) for x in jax.tree.leaves(args)):
            return fn(*args)  # nothing is compiled, and a schedule may look at its count
        return _stays(jitted(*args))

    return call


def unknown(number: int) -> Array:
    """A number that XLA does not know, or it would compile what is `shared` for each of them."""
    return jax.lax.optimization_barrier(jnp.int32(number))


def _stays(results: Any) -> Any:
    """Results of a call, which XLA is not to replace by the body of what is called."""
    return set_xla_metadata(results, inlineable="false") if _on_cpu() else results


def zeros(like: Any, *sources: Any) -> Array:
    """Zeros that a loop can fill: inside `shard_map` they vary over the devices as what fills them.

    Args:
        like: their shape and dtype.
        sources: trees of what they will be filled with, or what that depends on.
    """
    out = jnp.zeros(like.shape, like.dtype)
    axes = varying((like, sources))
    return jax.lax.pcast(out, tuple(sorted(axes)), to="varying") if axes else out


def varying(tree: Any) -> frozenset[str]:
    """The axes of devices, inside `shard_map`, over which the arrays of a tree vary."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        type_ = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        manual = getattr(type_, "manual_axis_type", None)
        if manual is not None:
            axes |= manual.varying
        elif not hasattr(type_, "manual_axis_type"):  # before jax 0.10.2
            axes |= getattr(type_, "vma", None) or frozenset()
    return axes


def unfused(product: Array) -> Array:
    """A product rounded as it stands: neither fused with a sum nor merged with another factor.

    XLA does both, and so gives other bits than the same operations one by one.
    """
    return jnp.clip(product, -3e38, 3e38)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
