"""Transformations of optax for the float leaves of a tree that holds codes as well."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree

from zoqo_jax.arrays import is_float_array, is_quantized

__all__ = ["on_floats"]


def on_floats(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation to the float leaves alone.

    Quantized and integer leaves pass through it untouched, and it keeps no moments for them.

    Args:
        transformation: any of optax, or a chain of them.

    Returns:
        The transformation behind a mask, as `optax.masked` makes it.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.Quantizer(bits=4)(jnp.ones((2, 4))), "b": jnp.ones(3)}
        >>> adam = zq.on_floats(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)))
        >>> tx = optax.chain(zq.spsa(1e-2, key=jax.random.key(0), num_queries=4), adam)
        >>> loss = lambda params: jnp.sum(params["b"] ** 2) + jnp.sum(params["w"] ** 2)
        >>> state, trained = tx.init(params), params
        >>> for _ in range(20):
        ...     updates, state = tx.update(None, state, trained, value_fn=loss)
        ...     trained = optax.apply_updates(trained, updates)
        >>> loss(zq.dequantize(trained)) < loss(zq.dequantize(params))
        Array(True, dtype=bool)
        >>> bool((trained["w"].codes == params["w"].codes).all())
        True
    """
    return optax.masked(optax.with_extra_args_support(transformation), _are_floats)


def _are_floats(tree: PyTree) -> PyTree:
    """For each leaf, a quantized one being one leaf, whether it is a float array."""
    return jax.tree.map(is_float_array, tree, is_leaf=is_quantized)
