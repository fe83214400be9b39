"""One step of every quantized zeroth-order method: describe directions, query, weigh, move.

The methods differ in three rules (`Rules`): how a direction is described, what a query pair says
about it, and how many codes to move for what all said. This room does the rest: keys, the loop over
queries, losses that are not finite, deltas that `optax.apply_updates` can add, and steps replayed
from their differences.

Randomness: `fold_in(key, count)` makes the key of a step, folding in the query and then the leaf
makes that of a direction. Nothing is stored, so the update draws again what the forward passes
drew. It goes through large leaves, or through all but small ones where it sums over queries, in
pieces of a few rows, so that what it needs besides the codes does not grow with the model. An
update's bytes are changes modulo 256: `packed + update` wraps to the true sum, and
`optax.apply_updates` is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, PyTree

from zoqo_jax import compiler, draws, projection, queries, stencils
from zoqo_jax.arrays import (
    QuantizedArray,
    cut,
    is_quantized,
    is_trained,
    no_update,
    trained_leaves,
)
from zoqo_jax.draws import Rows
from zoqo_jax.implicit import PerturbedArray, by_row, on_rows
from zoqo_jax.pieces import Pick, in_place
from zoqo_jax.stencils import Stencil
from zoqo_jax.transforms.schedules import ONE, Count, check_count
from zoqo_jax.transforms.state import (
    StepState,
    initial_state,
    record,
    record_votes,
    replayed,
    step_key,
)

__all__ = [
    "QueryTransformation",
    "Rules",
    "by_queries",
    "check_query_count",
    "over_queries",
    "rounded_at_random",
]

# Codes of a leaf that an update treats as a whole, and, of larger leaves, in a piece. One query's
# direction is never made: beside the codes there is a random bit for each.
_WHOLE, _PIECE = 2**24, 2**21
_PIECE_OF_SUM = 2**17  # both, where it sums over queries, in floats


class Rules(NamedTuple):
    """What makes a method.

    Attributes:
        describe: (key, array, count) -> the stencil to probe `array` with.
        weigh: (l+ - l-, u) -> what one query pair says, in the shape of u, to be summed over
            queries; a product of something of the first and something of the second.
        move: (rows, array, sum over queries of `weigh`, step, residual) -> (codes to move,
            residual); `rows` are where the bits of the move come from, `step` is the state before
            it, but with its differences.
        remember: array -> its first residual, or None for a method that has none.
        window: from how many steps back a residual is made anew in every step, rather than kept, or
            None; `move` must make it without `rows`, and of the codes may use but their grid.
        heard: the stencil that was probed -> one whose direction `weigh` is given in place of its
            own: easier to draw, or rounded independently.
        compares: whether the sign of l+ - l- serves `weigh` as well.
    """

    describe: Callable[[Array, QuantizedArray, Array], Stencil]
    weigh: Callable[[Array, Array], Array]
    move: Callable[[Rows, QuantizedArray, Array, StepState, Any], tuple[Array, Any]]
    remember: Callable[[QuantizedArray], Any] | None = None
    window: int | None = None
    heard: Callable[[Stencil], Stencil] = lambda probed: probed
    compares: bool = False


class QueryTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that can also tell where its next step will look.

    Attributes:
        probes: (state, params, query=0) -> the stencils of a query, one for each trained leaf;
            give them to `queries.endpoints` to see the codes.

    Examples:
        >>> import zoqo_jax as zq
        >>> loss = lambda w: jnp.sum((w - 0.5) ** 2)
        >>> params = zq.Quantizer(bits=8, range=1.0)(jnp.zeros(4))
        >>> tx = zq.zoqo(learning_rate=0.05, radius=0.02, key=jax.random.key(0))
        >>> state = tx.init(params)
        >>> probes = tx.probes(state, params)
        >>> ends = [zq.queries.endpoints(params, probes, side) for side in (1, -1)]
        >>> _, state = tx.update(None, state, params, value_fn=loss)
        >>> [loss(zq.dequantize(end)).item() for end in ends] == state.losses[0].tolist()
        True
    """

    probes: Callable[..., list[Stencil]]


def by_queries(
    rules: Rules,
    key: PRNGKeyArray,
    num_queries: Count = ONE,
    query_batch: Count | None = ONE,
    sides: queries.Sides = "together",
    axis_name: str | None = None,
    num_comparisons: Count | None = None,
) -> QueryTransformation:
    """Make an optax transformation of a method's rules.

    Args:
        rules: the method.
        key: the run's key.
        num_queries: query pairs a step.
        query_batch: how many of them to evaluate at once; 1 needs the least memory.
        sides: evaluate the two sides of a pair "together" or "in_turn".
        axis_name: average losses over this mapped axis, for data-parallel steps: only scalars
            travel.
        num_comparisons: how often to compare the sides of a query, each time with a new key; None
            for once, without a key.

    Returns:
        A transformation whose `update` takes `value_fn=`, or `compare_fn=` where the method
        `compares` (or `differences=`, to replay a step).
    """
    num_queries, query_batch = check_query_count(num_queries, query_batch)
    check_count("num_comparisons", num_comparisons, or_none=True)
    stencils.check_choice("sides", sides, get_args(queries.Sides))
    together = min(query_batch or num_queries, num_queries)

    def init(params: PyTree) -> StepState:
        arrays = list(trained_leaves(params).values())
        state = initial_state(key, num_queries)
        if rules.window:
            nothing = jnp.zeros((rules.window, num_queries), jnp.float32)
            return state._replace(recent=(nothing,))
        return state._replace(residual=tuple(map(rules.remember, arrays)) if rules.remember else ())

    def keys(state: StepState, leaves: Array) -> Key[Array, "queries_and_move leaves"]:
        """A key for every direction and, in the last row, for every move."""
        own_key = step_key(state)
        by_query = jax.vmap(lambda i: jax.random.fold_in(own_key, i))(jnp.arange(num_queries + 1))
        return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(leaves))(
            by_query
        )

    def probes(state: StepState, params: PyTree, query: Array | int = 0) -> list[Stencil]:
        arrays = list(trained_leaves(params).values())
        of_query = keys(state, jnp.arange(len(arrays)))[query]
        return [rules.describe(of_query[i], array, state.count) for i, array in enumerate(arrays)]

    def move(
        step: StepState, leaf: int, leaf_keys: Array, pick: Pick, array: QuantizedArray, kept: Any
    ) -> tuple[Array, Any]:
        """A leaf's new bytes, and what error feedback keeps, for the rows picked."""
        piece = on_rows(pick, array)
        rows = draws.rows(leaf_keys[num_queries], array.shape[:-1])
        rows = by_row(pick, rows)
        moves, rest = [], []
        for i, part in enumerate(piece.parts):
            total = said(step, leaf_keys, array, pick, i)
            rows_of_part = draws.part(rows, i)
            if rules.window:
                residual = left_over(step, leaf, rows_of_part, array, pick, i, part)
            else:
                residual = None if kept is None else cut(pick(kept), i, array.per_byte)
            codes, residual = rules.move(rows_of_part, part, total, step, residual)
            moves.append(codes)
            rest.append(residual)
        if kept is not None:
            kept = jnp.concatenate(rest, axis=-1) if len(rest) > 1 else rest[0]
        return piece.stepped(moves).packed, kept

    def left_over(
        step: StepState,
        leaf: int,
        rows: Rows,
        array: QuantizedArray,
        pick: Pick,
        i: int,
        part: QuantizedArray,
    ) -> Any:
        """The residual of a part of a leaf, from what the window's steps said."""
        window, (recent,) = rules.window or 0, step.recent

        def after(k: Array, residual: Any) -> Any:
            count = jnp.maximum(step.count - window + k, 0)  # before the first, nothing was said
            past = step._replace(count=count, differences=recent[k])
            total = said(past, keys(past, jnp.array([leaf]))[:, 0], array, pick, i)
            return rules.move(rows, part, total, past, residual)[1]

        first = rules.remember(part) if rules.remember else None
        return jax.lax.fori_loop(0, window, after, first)

    def said(step: StepState, keys: Array, array: QuantizedArray, pick: Pick, part: int) -> Array:
        """What the step's queries said about a part of a leaf, for the rows picked."""

        def stencil(query: Array | int) -> tuple[Stencil, QuantizedArray]:
            described = rules.heard(rules.describe(keys[query], array, step.count))
            picked = on_rows(pick, PerturbedArray(array, described))
            return stencils.part(picked.stencil, picked.array, part)

        def one(query: Array | int) -> Array:
            return rules.weigh(step.differences[query], stencils.draw(*stencil(query)))

        if num_queries == 1:
            return one(0)
        first, piece = stencil(0)
        if not first.is_rank_one_signs:
            add = lambda query, total: total + one(query)  # noqa: E731
            return jax.lax.fori_loop(1, num_queries, add, one(0))
        weights = jax.vmap(lambda d: rules.weigh(d, jnp.int16(1)))(step.differences)
        directions = jax.vmap(lambda query: stencil(query)[0])(jnp.arange(num_queries))
        total = stencils.weighted_signs(directions, weights.astype(jnp.float32), piece)
        m = piece.spread(first.reach(piece))
        return total * rules.weigh(jnp.float32(1.0), m).astype(jnp.float32)

    def compared(state: StepState, params: PyTree, compare_fn: queries.Comparator) -> StepState:
        """The state after a step's comparisons came in."""
        own_key = step_key(state)

        def votes(query: Array | int) -> Array:
            keys = None
            if num_comparisons is not None:  # rows of `keys` end at num_queries
                own = jax.random.fold_in(own_key, num_queries + 1 + query)
                if axis_name is not None:  # devices err independently
                    own = jax.random.fold_in(own, jax.lax.axis_index(axis_name))
                keys = jax.random.split(own, num_comparisons)
            stencils = probes(state, params, query)
            return queries.verdicts(compare_fn, params, stencils, keys=keys, together=together)

        total = over_queries(votes, num_queries, query_batch)
        total = total if axis_name is None else jax.lax.psum(total, axis_name)
        return record_votes(state, total, 2 * num_queries * (num_comparisons or 1))

    def update(
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        compare_fn: queries.Comparator | None = None,
        differences: Float[Array, " queries"] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, StepState]:
        del updates, extra
        arrays = list(trained_leaves(params).values())
        if compare_fn is not None and value_fn is not None:
            raise ValueError("value_fn and compare_fn must not both be given.")
        if compare_fn is not None and not rules.compares:
            raise ValueError("compare_fn serves zoqo alone: this method needs losses, by value_fn.")

        if differences is not None:
            after = replayed(state, differences)
        elif value_fn is not None:
            pairs = over_queries(
                lambda query: queries.losses(
                    value_fn, params, probes(state, params, query), together=together, sides=sides
                ),
                num_queries,
                query_batch,
            )
            after = record(state, pairs if axis_name is None else jax.lax.pmean(pairs, axis_name))
        elif compare_fn is not None:
            after = compared(state, params, compare_fn)
        else:
            raise ValueError("value_fn must be given: tx.update(None, state, params, value_fn=f).")

        # What the update needs is made when the forward passes are over, and takes their place.
        wait = functools.partial(compiler.after, after.differences)
        step = state._replace(count=wait(state.count), differences=after.differences)
        all_keys = keys(step, jnp.arange(len(arrays)))
        deltas, residual = [], []
        for leaf, array in enumerate(arrays):
            kept = state.residual[leaf] if state.residual else None
            change = functools.partial(move, step, leaf, all_keys[:, leaf])
            whole, most = (_WHOLE, _PIECE) if num_queries == 1 else (_PIECE_OF_SUM, _PIECE_OF_SUM)
            if array.ndim < 2 or array.size <= whole:
                waiting = dataclasses.replace(array, scale=wait(array.scale))
                packed, kept = change(lambda x: x, waiting, kept)
            else:
                packed, kept = _in_place(change, array, kept, most, after.differences)
            # What `optax.apply_updates` adds it to is what it was taken from, and XLA knows that
            # p + (n - p) is n: compiled together, the new bytes are written over the old.
            deltas.append(packed - array.packed)
            residual.append(kept)
        if state.residual:
            after = after._replace(residual=tuple(residual))
        if rules.window:
            (recent,) = state.recent
            latest = jnp.concatenate([recent[1:], after.differences[None]])
            after = after._replace(recent=(latest,))
        return _fill(params, deltas), after

    tx = QueryTransformation(init, update)
    tx.probes = probes
    return tx


def over_queries(losses: Callable[[Any], Any], num_queries: int, query_batch: int | None) -> Any:
    """The losses of each query, or what else is asked, `query_batch` at a time, stacked."""
    if num_queries == 1:
        return jax.tree.map(lambda x: x[None], losses(0))
    indices = jnp.arange(num_queries)
    if query_batch is None or query_batch >= num_queries:
        return jax.vmap(losses)(indices)
    return jax.lax.map(losses, indices, batch_size=None if query_batch == 1 else query_batch)


def rounded_at_random(rows: Rows, step: Float[Array, "..."]) -> Int32[Array, "..."]:
    """A step in codes rounded up or down, unbiased, `rows` being where the bits come from."""
    columns = step.shape[-1] if step.ndim else 1
    return projection.stochastic(draws.words(rows, columns, 0).reshape(step.shape), step)


def check_query_count(num_queries: Any, query_batch: Any) -> tuple[int, int | None]:
    """The two as Python ints; counts below one, and what is no count, are refused."""
    check_count("num_queries", num_queries)
    check_count("query_batch", query_batch, or_none=True)
    return int(num_queries), None if query_batch is None else int(query_batch)


def _in_place(
    change: Callable[[Pick, QuantizedArray, Any], tuple[Array, Any]],
    array: QuantizedArray,
    kept: Any,
    most: int,
    heard: Array,
) -> tuple[Array, Any]:
    """A leaf's new bytes, a few rows of its first axis at a time, some `most` codes."""
    rows = array.shape[0]
    few = max(most // (array.size // rows), 1)

    def piece(pick: Pick, now: tuple[Array, Any]) -> tuple[Array, Any]:
        packed, kept = now
        make = functools.partial(change, pick, dataclasses.replace(array, packed=packed), kept)
        return compiler.held(make, heard, jax.eval_shape(make))

    return in_place(piece, rows, few, (array.packed, kept))


def _fill(params: PyTree, deltas: list[Array]) -> PyTree:
    """A tree of updates: the codes' deltas, and zeros for all that is frozen."""
    remaining = iter(deltas)

    def one(leaf: Any) -> Any:
        zeros = no_update(leaf)
        return dataclasses.replace(zeros, packed=next(remaining)) if is_trained(leaf) else zeros

    return jax.tree.map(one, params, is_leaf=is_quantized)
