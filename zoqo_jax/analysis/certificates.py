r"""Certificates: evidence that little around a state is better, and when to stop looking for it.

A direction r of m codes, each to move by a = 1 in code units, succeeds at x if

.. math::
    \min f(x \pm a r) \le f(x) - \gamma a^2 m

with gamma given as a fraction of |f(x)|. Were the chance of success p, K fresh directions would all
fail with probability (1 - p)^K. So K failures in a row certify p <= 1 - delta^(1 / K) with
confidence 1 - delta: 18.1 % for K = 15 and delta = .05, 5 % for K = 59. That is a statement about
moves of m codes that ask for this decrease, and about no others. How good a state of a grid can be
is for `floors` to say, whose functions are here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc
from jaxtyping import Array, ArrayLike, Bool, Float32, Int8, Int32, Key, PRNGKeyArray, PyTree

from zoqo_jax import directions
from zoqo_jax.analysis.floors import bits_needed as bits_needed
from zoqo_jax.analysis.floors import gradient_floor as gradient_floor
from zoqo_jax.analysis.floors import loss_floor as loss_floor
from zoqo_jax.directions import Direction
from zoqo_jax.grids.arrays import QuantizedArray, trained_leaves
from zoqo_jax.implicit.arrays import PerturbedArray, sum_over_rows
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import queries
from zoqo_jax.transforms.spreading import over_queries
from zoqo_jax.xla import random_bits

__all__ = [
    "Audit",
    "Gate",
    "GateState",
    "audit",
    "bits_needed",
    "gate",
    "gradient_floor",
    "loss_floor",
    "success_bound",
]


def success_bound(
    trials: Int32[ArrayLike, ""] | int,
    delta: float = 0.05,
    successes: Int32[ArrayLike, ""] | int = 0,
) -> Float32[Array, ""]:
    """The chance of success that fresh trials leave possible, with confidence 1 - delta.

    It is 1 - delta^(1 / K) when all K trials failed, and Clopper and Pearson's upper limit (1934)
    when some did not: the p at which so few successes, or fewer, have probability delta.

    Args:
        trials: K, decided on beforehand; 0 leaves everything possible.
        delta: in (0, 1).
        successes: at most `trials`.

    Raises:
        ValueError: `delta` is outside (0, 1).

    Examples:
        >>> success_bound(15).round(3).item(), success_bound(59).round(2).item()
        (0.181, 0.05)
    """
    _check_delta(delta)
    successes = jnp.asarray(successes, jnp.float32)
    failures = jnp.asarray(trials, jnp.float32) - successes

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        # Of q = 1 - p: the chance of so few successes, increasing in q.
        chance = betainc(jnp.maximum(failures, 1.0), successes + 1.0, middle)
        return jnp.where(chance < delta, middle, low), jnp.where(chance < delta, high, middle)

    q, _ = jax.lax.fori_loop(0, 32, halve, (jnp.float32(0.0), jnp.float32(1.0)))
    return jnp.where(failures > 0, 1.0 - q, 1.0)


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        successes: directions that lowered the loss enough.
        trials: directions tried; an empty one, of no code, does not count.
        vacuous: those that could not have passed, whatever they did, f(x) being too close to f_inf.
        decrease: f(x) less the lowest loss found; negative where all were higher.
        queries: evaluations of the objective.
        bound: on the chance of success, with the confidence asked for.

    Examples:
        >>> import zoqo_jax as zq
        >>> w = zq.Quantizer(bits=4, range=1.5)(jnp.full(1, 0.8))  # s = .2: .6 is better
        >>> look = lambda w, key: audit(lambda w: w.sum() ** 2, w, key, support=1, gamma=1e-3)
        >>> found = jax.jit(look)(w, jax.random.key(0))
        >>> found.successes.item(), found.trials.item(), found.decrease.round(2).item()
        (15, 15, 0.28)
    """

    successes: Int32[Array, ""]
    trials: Int32[Array, ""]
    vacuous: Int32[Array, ""]
    decrease: Float32[Array, ""]
    queries: Int32[Array, ""]
    bound: Float32[Array, ""]


def audit(
    value_fn: queries.Objective,
    params: PyTree,
    key: PRNGKeyArray,
    *,
    support: int,
    gamma: float,
    trials: int = 15,
    delta: float = 0.05,
    f_inf: float = 0.0,
    query_batch: int | None = 1,
) -> Audit:
    """Try fresh directions at one state and bound the chance that one would succeed.

    A direction moves a random few of the codes by one, up or down, whatever the spacing of their
    levels; a code at the edge of its grid can only move inward. It succeeds if one of its two ends
    lowers the loss by gamma m |f(x)|, m being the number of codes that it moves.

    Args:
        value_fn: `value_fn(params) -> scalar`, made of JAX operations; the same at every call, as
            on a fixed batch.
        params: tree with quantized leaves; frozen and other leaves stay.
        key: a new one for each audit: directions that helped to choose a state say nothing about
            it.
        support: expected number of codes in a direction.
        gamma: decrease asked for each code, as a fraction of the loss. gamma * support should be
            well above 1e-6, where float32 losses end.
        trials: directions, K, two evaluations each.
        delta: one minus the confidence.
        f_inf: what the loss cannot fall below; -inf if unknown. A direction that is asked for at
            least f(x) - f_inf cannot pass, and counts as `vacuous`.
        query_batch: directions evaluated at once, None for all.

    Returns:
        The audit, 2 * trials + 1 evaluations.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value; or no quantized
            leaf that is not frozen, or fewer codes than `support`.

    Examples:
        >>> import zoqo_jax as zq
        >>> loss = lambda w: 1 + jnp.sum((w - 0.6) ** 2)
        >>> w = zq.Quantizer(bits=4, range=1.5)(jnp.full(16, 0.6))  # s = .2: the optimum
        >>> found = jax.jit(lambda w, key: audit(loss, w, key, support=4, gamma=1e-4))
        >>> found = found(w, jax.random.key(0))
        >>> found.successes.item(), found.queries.item(), found.bound.round(3).item()
        (0, 31, 0.181)
    """
    _check(support, gamma, f_inf)
    _check_delta(delta)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if query_batch is not None and query_batch < 1:
        raise ValueError(f"query_batch must be at least 1 or None, got {query_batch}.")
    found = _try(
        value_fn, params, random_bits.threefry(key), trials, support, gamma, f_inf, query_batch
    )
    successes = found.passed.sum(dtype=jnp.int32)
    tried = (found.codes > 0).sum(dtype=jnp.int32)
    return Audit(
        successes=successes,
        trials=tried,
        vacuous=found.vacuous.sum(dtype=jnp.int32),
        decrease=found.decrease.max(),
        queries=jnp.int32(2 * trials + 1),
        bound=success_bound(tried, delta, successes),
    )


class GateState(NamedTuple):
    """State of a gate.

    Attributes:
        count: directions tried, empty ones included.
        key: the gate's key, never changed.
        failures: in a row.
        vacuous: those of them that could not have passed (see `Audit`); where there are any, the
            failures are no evidence.
        successes: so far.
        queries: evaluations of the objective so far.
        side: the end at which the last direction succeeded, 1 or -1; 0 where it failed.

    Examples:
        >>> import zoqo_jax as zq
        >>> w = zq.Quantizer()(jnp.ones(8))
        >>> flat = gate(key=jax.random.key(0), support=8, gamma=1e-3)
        >>> stop, state = flat.update(flat.init(w), lambda w: 1.0, w)
        >>> state.failures.item(), state.successes.item(), state.queries.item()
        (1, 0, 3)
    """

    count: Int32[Array, ""]
    key: Key[Array, ""]
    failures: Int32[Array, ""]
    vacuous: Int32[Array, ""]
    successes: Int32[Array, ""]
    queries: Int32[Array, ""]
    side: Int8[Array, ""]


class Gate(NamedTuple):
    """When to stop: a triple of pure functions.

    Attributes:
        init: params -> state.
        update: (state, value_fn, params) -> (whether to stop, state).
        accept: (state, params) -> params, moved to where the last direction succeeded; to be called
            with the params of the last `update`.

    Examples:
        >>> import zoqo_jax as zq
        >>> w = zq.Quantizer(bits=4, range=1.5)(jnp.full(1, 0.8))  # s = .2
        >>> look = gate(key=jax.random.key(0), support=1, gamma=1e-3)
        >>> update = jax.jit(lambda state: look.update(state, lambda w: w.sum() ** 2, w))
        >>> stop, state = update(look.init(w))
        >>> bool(stop), look.accept(state, w).materialise().round(2).tolist()
        (False, [0.6])
    """

    init: Callable[[PyTree], GateState]
    update: Callable[[GateState, queries.Objective, PyTree], tuple[Bool[Array, ""], GateState]]
    accept: Callable[[GateState, PyTree], PyTree]


def gate(
    *,
    key: PRNGKeyArray,
    support: int,
    gamma: float,
    failures: int = 15,
    f_inf: float = 0.0,
) -> Gate:
    """Stop when so many fresh directions have failed in a row, one a call, three evaluations each.

    For any training loop, between its steps, or as the last phase of one: `accept` moves the codes
    along a direction that succeeded and so lowers the loss each time, until the gate says stop.

    Calls at one state end in the certificate of `success_bound(failures)` for it. Between steps
    they are made at several, and what is certified is that not all of them have a chance above
    that. Either way a false stop has probability delta for each row of failures that was begun:
    (successes + 1) * delta at most for the whole run.

    Args:
        key: all of the gate's randomness; not that of the optimizer.
        support: expected number of codes in a direction.
        gamma: decrease asked for each code, as a fraction of the loss (see `audit`).
        failures: in a row, K.
        f_inf: what the loss cannot fall below; -inf if unknown.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.Quantizer(bits=4, range=1.5)(jnp.zeros(8))  # s = .2
        >>> loss = lambda w: 1 + jnp.sum((w - 0.7) ** 2)
        >>> gate = zq.certificates.gate(key=jax.random.key(0), support=2, gamma=1e-4)
        >>> @jax.jit
        ... def step(params, state):
        ...     stop, state = gate.update(state, loss, params)
        ...     return stop, gate.accept(state, params), state
        >>> stop, state = False, gate.init(params)
        >>> while not stop:
        ...     stop, params, state = step(params, state)
        >>> loss(zq.dequantize(params)).round(2).item(), state.failures.item()  # .6 or .8
        (1.08, 15)
    """
    _check(support, gamma, f_inf)
    if failures < 1:
        raise ValueError(f"failures must be at least 1, got {failures}.")

    def init(params: PyTree) -> GateState:
        _density(list(trained_leaves(params).values()), support)
        zero = jnp.zeros((), jnp.int32)
        return GateState(
            zero,
            jnp.copy(random_bits.threefry(key)),
            zero,
            zero,
            zero,
            zero,
            jnp.zeros((), jnp.int8),
        )

    def update(
        state: GateState, value_fn: queries.Objective, params: PyTree
    ) -> tuple[Bool[Array, ""], GateState]:
        own = jax.random.fold_in(random_bits.threefry(state.key), state.count)
        found = jax.tree.map(
            lambda x: x[0], _try(value_fn, params, own, 1, support, gamma, f_inf, 1)
        )
        passed = found.passed
        failed = (found.codes > 0) & ~passed
        vacuous = failed & found.vacuous
        state = GateState(
            count=state.count + 1,
            key=state.key,
            failures=jnp.where(passed, 0, state.failures + failed.astype(jnp.int32)),
            vacuous=jnp.where(passed, 0, state.vacuous + vacuous.astype(jnp.int32)),
            successes=state.successes + passed.astype(jnp.int32),
            queries=state.queries + 3,
            side=jnp.where(passed, found.side, jnp.int8(0)),
        )
        return state.failures >= failures, state

    def accept(state: GateState, params: PyTree) -> PyTree:
        own = jax.random.fold_in(random_bits.threefry(state.key), state.count - 1)
        arrays = list(trained_leaves(params).values())
        return queries.endpoints(params, _direction(own, 0, arrays, support), state.side)

    return Gate(init, update, accept)


class _Found(NamedTuple):
    """What directions did, an entry for each.

    Attributes:
        passed: whether one succeeded.
        vacuous: whether none of so many codes could have.
        codes: how many it moves, m.
        decrease: f(x) less the loss at its better end.
        side: that end, 1 or -1.
    """

    passed: Bool[Array, " trials"]
    vacuous: Bool[Array, " trials"]
    codes: Int32[Array, " trials"]
    decrease: Float32[Array, " trials"]
    side: Int8[Array, " trials"]


def _try(
    value_fn: queries.Objective,
    params: PyTree,
    key: Array,
    trials: int,
    support: int,
    gamma: float,
    f_inf: float,
    query_batch: int | None,
) -> _Found:
    arrays = list(trained_leaves(params).values())
    together = min(query_batch or trials, trials)

    def one(trial: Array | int) -> tuple[Array, Array]:
        direction = _direction(key, trial, arrays, support)
        pair = queries.losses(value_fn, params, direction, together=together)
        return pair, sum(map(_codes, direction, arrays), start=jnp.int32(0))

    here = queries.scalar(quaxify(value_fn)(params))
    pairs, codes = over_queries(one, trials, query_batch)
    pairs = jnp.where(jnp.isfinite(pairs), pairs, jnp.inf)
    decrease = here - pairs.min(axis=-1)
    asked = gamma * jnp.abs(here) * codes.astype(jnp.float32)
    return _Found(
        passed=(codes > 0) & (decrease >= asked) & (decrease > 0),
        vacuous=(codes > 0) & ~(asked < here - f_inf),
        codes=codes,
        decrease=decrease,
        side=jnp.where(pairs[..., 0] <= pairs[..., 1], jnp.int8(1), jnp.int8(-1)),
    )


def _direction(
    key: Array, trial: Array | int, arrays: list[QuantizedArray], support: int
) -> list[Direction]:
    """One code up or down on a random support."""
    own = jax.random.fold_in(key, trial)
    return [
        directions.describe(
            jax.random.fold_in(own, leaf),
            array,
            1.0,
            distribution="rademacher",
            structure="sparse",
            density=_density(arrays, support),
            boundary="reflect",
        )
        for leaf, array in enumerate(arrays)
    ]


def _codes(direction: Direction, array: QuantizedArray) -> Int32[Array, ""]:
    """How many codes a direction moves."""

    def count(piece: PerturbedArray, chosen: Array) -> Array:
        u = piece.direction.draw(piece.array)
        return ((u != 0) & chosen).sum(dtype=jnp.int32)

    return sum_over_rows(count, PerturbedArray(array, direction))


def _density(arrays: list[QuantizedArray], support: int) -> float:
    total = sum(array.size for array in arrays)
    if support > total:
        raise ValueError(f"support must be at most the {total} codes of params, got {support}.")
    return support / total


def _check(support: int, gamma: float, f_inf: float) -> None:
    if support < 1:
        raise ValueError(f"support must be at least 1, got {support}.")
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}.")
    if not f_inf < math.inf:
        raise ValueError(f"f_inf must be a number or -inf, got {f_inf}.")
    if f_inf >= 0.0 and gamma * support >= 1.0:
        raise ValueError(
            f"gamma * support must be below 1, got {gamma * support}: no direction could pass."
        )


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}.")
