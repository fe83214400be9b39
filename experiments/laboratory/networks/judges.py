"""Judges who compare two networks, and err: what they answer, and how often it is wrong."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

__all__ = ["Kind", "chance_of_error", "compare", "lean"]

Kind = Literal["losses", "errs", "bradley_terry"]
"""No judge but two losses, one who errs in a fixed share of all answers, Bradley and Terry's."""


def compare(
    kind: Kind, level: Any, loss: Callable[[Any], jax.Array], a: Any, b: Any, key: jax.Array
) -> jax.Array:
    """A judge's verdict: -1 where it prefers `a`, 1 where `b`, and 0 where they are the same.

    Args:
      kind: of judge.
      level: percentage of errors, or k of sigmoid(k |difference|).
      loss: what it would like to be low.
      a: parameters.
      b: others.
      key: of its error.
    """
    difference = loss(a) - loss(b)
    error = chance_of_error(kind, level, jnp.abs(difference))
    wrong = jax.random.bernoulli(key, error)
    return jnp.sign(difference) * jnp.where(wrong, -1.0, 1.0)


def chance_of_error(kind: Kind, level: Any, difference: jax.Array) -> jax.Array:
    """How often a judge is wrong about two ends whose losses differ by so much."""
    if kind == "losses":
        return jnp.float32(0)
    if kind == "errs":
        return jnp.asarray(level, jnp.float32) / 100
    return jax.nn.sigmoid(-jnp.asarray(level, jnp.float32) * difference)


def lean(error: jax.Array, votes: int) -> Any:
    """Chance that the majority of an odd number of votes is right, less that it is wrong.

    Example:
      >>> lean(jnp.float32(0.25), 1), lean(jnp.float32(0.25), 3)  # .84 - .16
      (Array(0.5, dtype=float32), Array(0.6875, dtype=float32))
    """
    half = (votes + 1) / 2
    return 2 * betainc(half, half, 1 - error) - 1  # the binomial law's tail
