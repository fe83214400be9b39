"""Transformations of optax for the float leaves of a tree that holds codes as well."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree

from zoqo_jax.grids.arrays import is_float_array
from zoqo_jax.transforms.applying import is_one

__all__ = ["on_floats"]


def on_floats(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation to the float leaves alone.

    Quantized and integer leaves pass through it untouched, and it keeps no moments for them.

    Args:
        transformation: any of optax, or a chain of them.

    Returns:
        The transformation, which sees None in the place of what is no array of floats.

    Examples:
        >>> import jax.numpy as jnp, zoqo_jax as zq
        >>> params = {"w": zq.Quantizer(bits=4)(jnp.ones((2, 4))), "b": jnp.ones(3)}
        >>> adam = zq.on_floats(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)))
        >>> tx = optax.chain(zq.spsa(1e-2, key=jax.random.key(0), num_queries=4), adam)
        >>> loss = lambda params: jnp.sum(params["b"] ** 2) + jnp.sum(params["w"] ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state, trained = tx.init(params), params
        >>> for _ in range(20):
        ...     trained, state = step(trained, state)
        >>> loss(zq.dequantize(trained)) < loss(zq.dequantize(params))
        Array(True, dtype=bool)
        >>> bool((trained["w"].codes == params["w"].codes).all())
        True
    """
    inner = optax.with_extra_args_support(transformation)

    def init(params: PyTree) -> Any:
        return inner.init(_floats(params, params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        of = updates if params is None else params
        floats = None if params is None else _floats(params, params)
        changed, state = inner.update(_floats(of, updates), state, floats, **extra)
        pairs = (of, updates, changed)
        return jax.tree.map(_either, *pairs, is_leaf=is_one), state

    return optax.GradientTransformationExtraArgs(init, update)


def _floats(of: PyTree, tree: PyTree) -> PyTree:
    """A tree's leaves where another has arrays of floats, and None elsewhere."""
    return jax.tree.map(lambda own, x: x if is_float_array(own) else None, of, tree, is_leaf=is_one)


def _either(own: Any, update: Any, changed: Any) -> Any:
    return changed if is_float_array(own) else update
