"""Three things that XLA's CPU backend does not do by itself, and that others need not be told.

Each is the identity, or a plain choice, in what it computes; what differs is when and where. The
backend is JAX's default one when a function is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

__all__ = ["after", "either", "held"]


def held(make: Callable[[], Array], key: tuple[Array, Array], like: Any) -> Array:
    """`make()`, kept in memory.

    XLA would fuse the making of random words into each of their 32 uses. A loop that runs once is a
    border that fusion does not cross; that it runs once must not be plain to see, so for one key in
    2^64 it does not run, and the words are zero.

    Args:
        make: makes an array of integers.
        key: what it is made from.
        like: its shape and dtype.
    """
    if not _on_cpu():
        return make()
    first, second = (words.reshape(-1)[:1] for words in key)
    never = ((first == 0x7A6F716F) & (second == 0x2D6A6178)).any()
    start = (never.astype(jnp.int32), jnp.zeros(like.shape, like.dtype))
    return jax.lax.while_loop(
        lambda state: state[0] < 1, lambda state: (state[0] + 1, make()), start
    )[1]


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
    out = jnp.zeros(like.shape, like.dtype)
    for branch, chosen in ((one, condition), (other, ~condition)):
        _, out = jax.lax.while_loop(
            lambda state: state[0],
            lambda state, branch=branch: (jnp.zeros_like(state[0]), branch()),
            (chosen, out),
        )
    return out


def after(x: Array, scale: Array) -> Array:
    """`scale`, not to be known before `x` is.

    XLA's scheduler would decode all of a model's layers first, and have them in memory at once. So
    the scale is made to depend on `x`, in a way that changes nothing and that no compiler sees
    through: no number is both infinite and not a number.
    """
    if x.size == 0 or not _on_cpu():
        return scale
    return jnp.where(_never(jax.lax.stop_gradient(x)), jnp.zeros_like(scale), scale)


@custom_vmap
def _never(x: Array) -> Bool[Array, ""]:
    first = x.reshape(-1)[0]
    return jnp.isnan(first) & jnp.isinf(first)


@_never.def_vmap
def _(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    del size, batched
    return _never(x[0]), False  # one for the whole batch: what waits is not batched


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
