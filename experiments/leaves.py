"""The arrays of a tree, as files and wires have them, and the tree of such arrays again."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_arrays", "like"]


def as_arrays(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as NumPy's arrays, keys as their words."""
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in leaves]


def like(tree: Any, arrays: Sequence[Any]) -> Any:
    """The tree whose arrays these are; it has the form of the one that is given.

    Raises:
      ValueError: a leaf of that has another shape or dtype.

    Example:
      >>> tree = {"key": jax.random.key(3), "w": jnp.ones(2)}
      >>> again = like(tree, as_arrays(tree))
      >>> bool(again["key"] == tree["key"]), again["w"].tolist()
      (True, [1.0, 1.0])
    """

    def one(leaf: Any, array: Any) -> Any:
        wanted = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        if (wanted.shape, wanted.dtype) != (array.shape, array.dtype):
            raise ValueError(
                f"an array of shape {array.shape} and dtype {array.dtype} is not one of "
                f"{wanted.shape} and {wanted.dtype}."
            )
        fresh = jnp.array(array)
        return (
            jax.random.wrap_key_data(fresh, impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else fresh
        )

    leaves, form = jax.tree.flatten(tree)
    return jax.tree.unflatten(form, [one(*x) for x in zip(leaves, arrays, strict=True)])


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
