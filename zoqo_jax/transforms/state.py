"""The state of the zeroth-order transformations, and how a step's answers come into it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray

from zoqo_jax import draws, queries

__all__ = ["StepState", "initial_state", "record", "record_votes", "replayed", "step_key"]


class StepState(NamedTuple):
    """State of the zeroth-order transformations.

    Attributes:
        count: steps taken.
        key: the run's key, a Threefry key whatever the user's is, never changed;
            `state._replace(key=...)` gives vmapped problems their own.
        queries: evaluations of the objective so far.
        losses: the last step's (l+, l-) for each query; inf before the first, and after a step by
            comparisons, which has none (under `jax_debug_infs` the largest float32).
        differences: the last step's l+ - l-, 16 significant bits of the largest, 0 where a loss
            was not finite; or the votes of its comparisons, -1, 0 or 1. These, `key` and `count`
            determine the step: keep them, and `replay` can rebuild the run.
        skipped: query pairs so far with a NaN or inf loss, or a NaN among their comparisons, or
            (spsa) whose radius was too short to displace anything; they move nothing.
        residual: what error feedback has yet to apply, in 2^-22 codes; empty for other roundings.
        recent: differences of the last steps, the latest last, where a residual is made from them
            rather than kept; else empty.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.Quantizer(bits=8, range=1.0)(jnp.zeros(4))
        >>> tx = zq.caq_zo(1.0, key=jax.random.key(0), num_queries=2)
        >>> loss = lambda w: jnp.log(w[0])  # NaN at one end of every query
        >>> _, state = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss))(
        ...     tx.init(params)
        ... )
        >>> state.count.item(), state.queries.item(), state.losses.shape
        (1, 4, (2, 2))
        >>> state.differences.tolist(), state.skipped.item()
        ([0.0, 0.0], 2)
    """

    count: Int32[Array, ""]
    key: Key[Array, ""]
    queries: Int32[Array, ""]
    losses: Float32[Array, "queries 2"]
    differences: Float32[Array, " queries"]
    skipped: Int32[Array, ""]
    residual: tuple[Int32[Array, "..."], ...] = ()
    recent: tuple[Float32[Array, "steps queries"], ...] = ()


def initial_state(key: PRNGKeyArray, num_queries: int) -> StepState:
    """The state before the first step.

    Raises:
        ValueError: `key` is not one key.
    """
    key = draws.threefry(key)
    if key.ndim:
        raise ValueError(f"key must be one key, got keys of shape {key.shape}.")
    return StepState(
        count=jnp.zeros((), jnp.int32),
        key=jnp.copy(key),  # the caller keeps his when a state is donated
        queries=jnp.zeros((), jnp.int32),
        losses=jnp.full((num_queries, 2), _no_loss(), jnp.float32),
        differences=jnp.zeros((num_queries,), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
    )


def record(
    state: StepState,
    pairs: Float32[Array, "queries 2"],
    stuck: Bool[Array, " queries"] | None = None,
) -> StepState:
    """The state after a step's losses came in; queries that displaced nothing were `stuck`."""
    bad = ~jnp.isfinite(pairs).all(axis=-1)
    bad = bad if stuck is None else bad | stuck
    return state._replace(
        count=state.count + 1,
        queries=state.queries + pairs.size,
        losses=pairs,
        differences=queries.differences(pairs),
        skipped=state.skipped + bad.sum(dtype=jnp.int32),
    )


def record_votes(
    state: StepState, votes: Float32[Array, " queries"], evaluations: int
) -> StepState:
    """The state after a step's comparisons came in, their verdicts summed for each query."""
    bad = jnp.isnan(votes)
    return state._replace(
        count=state.count + 1,
        queries=state.queries + evaluations,
        losses=jnp.full_like(state.losses, _no_loss()),
        differences=jnp.where(bad, 0.0, jnp.sign(votes)),
        skipped=state.skipped + bad.sum(dtype=jnp.int32),
    )


def replayed(state: StepState, differences: Any) -> StepState:
    """The state after a step of which nothing but its differences is known.

    Raises:
        ValueError: they are not one for each query.
    """
    shape, expected = jnp.shape(differences), state.differences.shape
    if shape != expected:
        raise ValueError(f"differences must have shape {expected}, got {shape}.")
    heard = jnp.asarray(differences, jnp.float32)
    return state._replace(count=state.count + 1, differences=heard)


def _no_loss() -> float:
    """What stands where there is no loss: inf, or the largest number where JAX looks for infs."""
    return float(np.finfo(np.float32).max) if jax.config.jax_debug_infs else float("inf")


def step_key(state: StepState) -> Key[Array, ""]:
    """The key of the step that a state is before."""
    return jax.random.fold_in(draws.threefry(state.key), state.count)
