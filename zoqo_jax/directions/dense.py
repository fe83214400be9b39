"""Dense directions: every entry is drawn independently."""

from __future__ import annotations

from zoqo_jax.directions.base import Direction

__all__ = ["Dense"]


class Dense(Direction):
    """A direction of independent entries; what `Direction` does, and nothing else.

    Examples:
        >>> import jax, jax.numpy as jnp, zoqo_jax as zq
        >>> array = zq.Quantizer()(jnp.ones((2, 3)))
        >>> Dense.describe(jax.random.key(0), array, 5.0).draw(array).shape
        (2, 3)
    """
