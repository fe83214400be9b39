"""Adding updates to parameters that hold more than arrays of numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from zoqo_jax.grids.arrays import is_quantized

__all__ = ["apply_updates"]


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, for trees with leaves that cannot be added to.

    An Equinox module has functions and flags among its leaves, a state of Flax keys. They stay what
    they are, also Python numbers, which `optax.apply_updates` would make arrays.

    Args:
        params: any pytree.
        updates: as transformations return them, None where there is nothing to add.

    Returns:
        The tree of sums, each in its parameter's dtype.

    Examples:
        >>> import optax, zoqo_jax as zq
        >>> params = {"w": zq.Quantizer(range=1.0)(jnp.zeros(2)), "act": jnp.tanh, "p": 0.5}
        >>> tx = zq.caq_zo(1.0, key=jax.random.key(0))
        >>> loss = lambda params: jnp.sum(params["act"](params["w"]) - params["p"])
        >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
        >>> params = zq.apply_updates(params, updates)
        >>> params["act"] is jnp.tanh, params["p"]
        (True, 0.5)
    """

    def added(leaf: Any, update: Any) -> Any:
        if update is None or not (is_quantized(leaf) or isinstance(leaf, _ARRAYS)):
            return leaf
        return jax.tree.map(lambda p, u: jnp.asarray(p + u).astype(p.dtype), leaf, update)

    return jax.tree.map(added, params, updates, is_leaf=is_one)


def is_one(leaf: Any) -> bool:
    """What counts as one leaf: a quantized array, or nothing."""
    return leaf is None or is_quantized(leaf)


_ARRAYS = jax.Array | np.ndarray | np.generic
