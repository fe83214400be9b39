"""The corners of the ball that a search has asked about, so that none is asked about twice.

An image of a few values has fewer corners than a budget has questions: a single grey pixel has two.
There a search that proposes a corner again asks about another one instead, and is over once it has
asked about all. Of larger images nothing is kept, and random searches propose as their papers say.
"""

import math

import jax
import jax.numpy as jnp

__all__ = ["all_tried", "none_tried", "untried", "with_one"]

_MOST_VALUES = 12  # 4,096 corners


def none_tried(shape: tuple[int, int, int], budget: int) -> jax.Array:
    """For each corner whether it was asked about, bool; empty where they are too many to keep.

    Example:
      >>> none_tried((1, 3, 1), 100).shape, none_tried((28, 28, 1), 100).shape
      ((8,), (0,))
    """
    values = math.prod(shape)
    are_few = values <= _MOST_VALUES and 2**values <= budget
    return jnp.zeros(2**values if are_few else 0, bool)


def untried(tried: jax.Array, proposed: jax.Array, signs: jax.Array) -> jax.Array:
    """What was proposed or, if that was asked about, of all others the corner nearest to `signs`.

    Args:
      tried: of `none_tried` and `with_one`.
      proposed: int8 signs, of any shape.
      signs: int8 signs of the same shape.

    Returns:
      int8 signs of the same shape; those that were proposed where all corners were asked about.
    """
    if not tried.size:
        return proposed
    numbers = jnp.arange(tried.size)
    distance = jax.lax.population_count(numbers ^ _number(signs))
    nearest = jnp.argmin(jnp.where(tried, tried.size, distance))
    bits = (nearest >> jnp.arange(signs.size)) & 1
    other = (2 * bits - 1).astype(jnp.int8).reshape(signs.shape)
    return jnp.where(tried[_number(proposed)] & ~tried.all(), other, proposed)


def with_one(tried: jax.Array, asked: jax.Array) -> jax.Array:
    """The corners asked about, and one more."""
    return tried.at[_number(asked)].set(True) if tried.size else tried


def all_tried(tried: jax.Array) -> jax.Array:
    """Whether there is no other corner to ask about, bool ()."""
    return tried.all() if tried.size else jnp.bool(False)


def _number(signs: jax.Array) -> jax.Array:
    flat = signs.reshape(-1)
    return ((flat > 0).astype(jnp.int32) << jnp.arange(flat.size)).sum()
