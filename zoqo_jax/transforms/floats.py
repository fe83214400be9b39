"""Random directions for arrays of floats, which `spsa` trains, and `qzo` where they are scales.

Nothing is stored: a direction is drawn again wherever it is needed, from the step's key, the number
of the query and the place of the array in the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from zoqo_jax.transforms.state import State
from zoqo_jax.xla import compiler, random_bits

__all__ = ["Directions", "Noise", "both_sides", "count_moved", "scales_at_start"]

Noise = Literal["rademacher", "gaussian"]


class Directions(NamedTuple):
    """The directions of one step.

    Attributes:
        key: the step's key, or one for each query.
        num_queries: how many each array has.
        noise: law of an entry: "rademacher" or standard "gaussian".
    """

    key: Key[Array, ""] | Key[Array, " queries"]
    num_queries: int
    noise: Noise

    def draw(self, query: Array | int, index: int, like: Any) -> Float[Array, "..."]:
        """A direction for the array at a place in the tree, in the shape and dtype of `like`."""
        own = self.key[query] if self.key.ndim else self.key
        key = jax.random.fold_in(jax.random.fold_in(own, query), index)
        rows = random_bits.rows(key, like.shape[:-1])
        columns = like.shape[-1] if like.ndim else 1
        if self.noise == "rademacher":
            entries = random_bits.signs(rows, columns, 0)
        else:
            entries = random_bits.gaussian(random_bits.words(rows, columns, 0))
        return entries.reshape(like.shape).astype(like.dtype)

    def total(
        self, weights: Float32[Array, " queries"], index: int, like: Any
    ) -> Float32[Array, "..."]:
        """The sum over queries of a weight times the direction."""

        def add(query: Array | int, total: Array) -> Array:
            direction = self.draw(query, index, like).astype(jnp.float32)
            return total + compiler.unfused(weights[query] * direction)

        total = jnp.zeros(like.shape, jnp.float32)
        if self.num_queries == 1:
            return add(0, total)
        return jax.lax.fori_loop(0, self.num_queries, add, total)


def both_sides(loss: Callable[[Array], Array]) -> Float32[Array, "2"]:
    """The losses at the + side and at the - side, one copy of what is probed at a time."""
    return jax.lax.map(loss, jnp.array([1.0, -1.0], jnp.float32))


def count_moved(state: State, updates: Sequence[Array]) -> State:
    """The state that says how many numbers the updates change."""
    counts = [jnp.sum(x != 0, dtype=jnp.float32) for x in updates]
    return state._replace(info=state.info._replace(codes_moved=sum(counts, jnp.float32(0.0))))


def scales_at_start(leaves: Sequence[Array]) -> Float32[Array, " leaves"]:
    """The root mean square of each array; of one of zeros that of all others.

    Where all are zero, it is 1: nothing is known, and sizes may be of any magnitude. What arrays
    grow to later is no measure: an adapter's half that began at zero then made longer steps the
    more it had moved, and a loss of 1.9 went to 150.
    """
    means = jnp.stack([_mean_square(x) for x in leaves])
    of_all = means.sum() / jnp.maximum((means > 0).sum(dtype=jnp.float32), 1.0)
    of_all = jnp.where(of_all > 0, of_all, 1.0)
    return jnp.sqrt(jnp.where(means > 0, means, of_all))


def _mean_square(x: Array) -> Float32[Array, ""]:
    return jnp.mean(jnp.square(x.astype(jnp.float32)))
