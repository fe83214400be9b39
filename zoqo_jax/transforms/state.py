"""`State`, what the next step needs, and `Info`, what a reader wants to know of the last one."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray

from zoqo_jax.transforms import queries
from zoqo_jax.transforms.sizes import Sizes
from zoqo_jax.xla import random_bits

__all__ = [
    "Info",
    "State",
    "as_logged",
    "initial_state",
    "query_keys",
    "record",
    "record_votes",
    "replayed",
    "step_key",
]


class Info(NamedTuple):
    """What the last step learnt and did, and a run's totals.

    Attributes:
        losses: (l+, l-) for each query; inf before the first step, and after a step by comparisons,
            which has none (under `jax_debug_infs` the largest float32). Of a direction for each
            example, their means.
        loss_differences: l+ - l-, 16 significant bits of the largest, 0 where a loss was not
            finite; or the votes of comparisons, -1, 0 or 1. These, `state.key` and `state.count`
            determine the step: keep them, and `replay` can rebuild the run.
        codes_moved: how many codes the step moved, or numbers where those are trained; a float
            (counts may pass 2^31).
        share_at_edges: of the trained codes, those at the least or greatest legal code.
        skipped: query pairs so far with a NaN or inf loss, or a NaN among their comparisons, or
            (spsa) whose radius was too short to displace anything; they move nothing.
        evaluations: of the objective so far; a comparison counts as two.
        size: of the step that was made, where steps size themselves: the root mean square of the
            entries of a direction as a share of the number of codes of its grid (see `sizing`).
            With 4 bits, (16 size)^2 of the codes are probed by one code, if that is below 1/16. 0
            where the user says how long steps are.
        true_share: then, of the squared slopes the share that is found again in other data; the
            rest is noise, which more examples or queries lessen. Else 1.
        record: what `replay` needs of such a step: for each query how often the step went along its
            direction, and the size of that, negative for one of the step before.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.Quantizer(bits=8, range=1.0)(jnp.zeros(4))
        >>> tx = zq.caq_zo(1.0, key=jax.random.key(0), num_queries=2)
        >>> loss = lambda w: jnp.log(w[0])  # NaN at one end of every query
        >>> _, state = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss))(
        ...     tx.init(params)
        ... )
        >>> state.count.item(), state.info.evaluations.item(), state.info.losses.shape
        (1, 4, (2, 2))
        >>> state.info.loss_differences.tolist(), state.info.skipped.item()
        ([0.0, 0.0], 2)
        >>> state.info.codes_moved.item(), state.info.share_at_edges.item()
        (0.0, 0.0)
    """

    losses: Float32[Array, "queries 2"]
    loss_differences: Float32[Array, " queries"] | Float32[Array, "queries examples"]
    codes_moved: Float32[Array, ""]
    share_at_edges: Float32[Array, ""]
    skipped: Int32[Array, ""]
    evaluations: Int32[Array, ""]
    size: Float32[Array, ""] | float = 0.0
    true_share: Float32[Array, ""] | float = 1.0
    record: Float32[Array, "queries 2"] | tuple[()] = ()

    @property
    def log(self) -> Float32[Array, "queries ..."]:
        """What `replay` needs of the step: its `record`, or the `loss_differences`."""
        return self.loss_differences if isinstance(self.record, tuple) else self.record

    @property
    def relative_difference(self) -> Float32[Array, ""]:
        """How far the two sides of a query are apart, as a share of the loss, on average."""
        apart, loss = jnp.abs(self.losses[:, 0] - self.losses[:, 1]), jnp.abs(self.losses)
        return jnp.nanmean(apart) / jnp.maximum(jnp.nanmean(loss), np.float32(1e-38))


class State(NamedTuple):
    """State of the zeroth-order transformations: what the next step needs.

    Attributes:
        count: steps taken.
        key: the run's key, a Threefry key whatever the user's is, never changed;
            `state._replace(key=...)` gives vmapped problems their own.
        info: what the last step learnt and did.
        residual: what error feedback has yet to apply, in 2^-22 codes; empty for other roundings.
        recent: what `info.log` was in the last steps, the latest last, where a residual is made
            from it rather than kept; else empty.
        sizes: what is known of the sizes of steps, where they size themselves; else empty.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.Quantizer(bits=8, range=1.0)(jnp.zeros(4))
        >>> state = zq.zoqo(0.1, 0.1, key=jax.random.key(0)).init(params)
        >>> state.count.item(), state.residual
        (0, ())
    """

    count: Int32[Array, ""]
    key: Key[Array, ""]
    info: Info
    residual: tuple[Int32[Array, "..."], ...] = ()
    recent: tuple[Float32[Array, "steps queries ..."], ...] = ()
    sizes: Sizes | tuple[()] = ()

    @property
    def losses(self) -> Float32[Array, "queries 2"]:
        """The old name of `info.losses`."""
        return self._renamed("losses", "losses")

    @property
    def differences(self) -> Float32[Array, " queries"]:
        """The old name of `info.loss_differences`."""
        return self._renamed("differences", "loss_differences")

    @property
    def skipped(self) -> Int32[Array, ""]:
        """The old name of `info.skipped`."""
        return self._renamed("skipped", "skipped")

    @property
    def queries(self) -> Int32[Array, ""]:
        """The old name of `info.evaluations`."""
        return self._renamed("queries", "evaluations")

    def _renamed(self, old: str, new: str) -> Any:
        message = f"state.{old} is now state.info.{new}, and will go in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        return getattr(self.info, new)


def initial_state(key: PRNGKeyArray, num_queries: int, examples: int = 0) -> State:
    """The state before the first step.

    Args:
        key: the run's.
        num_queries: query pairs a step.
        examples: how many a query has a difference for, or 0 where it has one for all.

    Raises:
        ValueError: `key` is not one key.
    """
    key = random_bits.threefry(key)
    if key.ndim:
        raise ValueError(f"key must be one key, got keys of shape {key.shape}.")
    nothing = jnp.zeros((), jnp.int32)
    return State(
        count=nothing,
        key=jnp.copy(key),  # the caller keeps his when a state is donated
        info=Info(
            losses=jnp.full((num_queries, 2), _no_loss(), jnp.float32),
            loss_differences=jnp.zeros((num_queries, examples)[: 1 + bool(examples)], jnp.float32),
            codes_moved=jnp.zeros((), jnp.float32),
            share_at_edges=jnp.zeros((), jnp.float32),
            skipped=jnp.copy(nothing),
            evaluations=jnp.copy(nothing),
            size=jnp.zeros((), jnp.float32),
            true_share=jnp.ones((), jnp.float32),
        ),
    )


def record(
    state: State,
    pairs: Float32[Array, "queries 2"] | Float32[Array, "queries 2 examples"],
    stuck: Bool[Array, " queries"] | None = None,
) -> State:
    """The state after a step's losses came in; queries that displaced nothing were `stuck`."""
    bad = ~jnp.isfinite(pairs).all(axis=tuple(range(1, pairs.ndim)))
    bad = bad if stuck is None else bad | stuck
    info = state.info._replace(
        losses=pairs if pairs.ndim == 2 else pairs.mean(axis=-1),
        loss_differences=_differences(pairs),
        skipped=state.info.skipped + bad.sum(dtype=jnp.int32),
        evaluations=state.info.evaluations + 2 * pairs.shape[0],
    )
    return state._replace(count=state.count + 1, info=info)


def _differences(pairs: Array) -> Array:
    """The differences of a step, of queries or of each of their examples."""
    flat = jnp.moveaxis(pairs, 1, -1).reshape(-1, 2)
    return queries.differences(flat).reshape(pairs.shape[:1] + pairs.shape[2:])


def record_votes(state: State, votes: Float32[Array, " queries"], evaluations: int) -> State:
    """The state after a step's comparisons came in, their verdicts summed for each query."""
    bad = jnp.isnan(votes)
    info = state.info._replace(
        losses=jnp.full_like(state.info.losses, _no_loss()),
        loss_differences=jnp.where(bad, 0.0, jnp.sign(votes)),
        skipped=state.info.skipped + bad.sum(dtype=jnp.int32),
        evaluations=state.info.evaluations + evaluations,
    )
    return state._replace(count=state.count + 1, info=info)


def replayed(state: State, loss_differences: Any) -> State:
    """The state after a step of which nothing but its differences is known.

    Raises:
        ValueError: they are not one for each query.
    """
    shape, expected = jnp.shape(loss_differences), state.info.log.shape
    if shape != expected:
        raise ValueError(f"differences must have shape {expected}, got {shape}.")
    known = jnp.asarray(loss_differences, jnp.float32)
    return as_logged(state._replace(count=state.count + 1), known)


def as_logged(state: State, log: Float32[Array, "queries ..."], info: Info | None = None) -> State:
    """A state before a step, with what the step's log says of its queries."""
    info = state.info if info is None else info
    if not state.sizes:
        return state._replace(info=info._replace(loss_differences=log))
    sizes = state.sizes._replace(again=log[:, 1] < 0)
    return state._replace(info=info._replace(record=log), sizes=sizes)


def _no_loss() -> float:
    """What stands where there is no loss: inf, or the largest number where JAX looks for infs."""
    return float(np.finfo(np.float32).max) if jax.config.jax_debug_infs else float("inf")


def step_key(state: State) -> Key[Array, ""]:
    """The key of the step that a state is before."""
    return jax.random.fold_in(random_bits.threefry(state.key), state.count)


def query_keys(state: State) -> Key[Array, ""] | Key[Array, " queries"]:
    """What directions of floats are made from: the step's key, or of each query the one it needs.

    A query that looks along a direction of the last step has the key of that.
    """
    own = step_key(state)
    if not state.sizes:
        return own
    return jnp.where(state.sizes.again, step_key(state._replace(count=state.count - 1)), own)
