"""One step of every quantized zeroth-order method: describe directions, query, sum, move codes.

The methods differ in a few rules (`Method`): how a direction is described, what a query says about
each code, and how many codes to move for what all said. `Steps` does the rest, in the order of its
methods: keys, the loop over queries, losses that are not finite, changes that
`optax.apply_updates` can add, and steps replayed from their loss differences.

Randomness: `fold_in(key, count)` makes the key of a step, folding in the query and then the leaf
makes that of a direction. Nothing is stored, so the update draws again what the forward passes
drew. It goes through large leaves, or through all but small ones where it sums over queries, in
chunks of a few rows, so that what it needs besides the codes does not grow with the model. An
update's bytes are changes modulo 256: `packed + update` wraps to the true sum, and
`optax.apply_updates` is exact.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PRNGKeyArray, PyTree

from zoqo_jax import directions
from zoqo_jax.directions import Contribution, Direction, Guide, matmul
from zoqo_jax.grids import packing, projection
from zoqo_jax.grids.arrays import (
    QuantizedArray,
    cut,
    is_quantized,
    is_trained,
    no_update,
    trained_leaves,
)
from zoqo_jax.implicit.arrays import PerturbedArray, by_row, take_rows
from zoqo_jax.transforms import queries
from zoqo_jax.transforms.applying import apply_updates
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, check_count
from zoqo_jax.transforms.sizing import Sizing
from zoqo_jax.transforms.spreading import Spread
from zoqo_jax.transforms.state import (
    State,
    as_logged,
    initial_state,
    record,
    record_votes,
    replayed,
    step_key,
)
from zoqo_jax.xla import compiler, random_bits
from zoqo_jax.xla.chunks import TakeRows, in_place
from zoqo_jax.xla.random_bits import Rows

__all__ = [
    "Method",
    "QueryTransformation",
    "Steps",
    "check_query_count",
    "rounded_at_random",
]

# Codes that an update treats at once; of larger leaves, in a chunk of rows. It takes some 4 bytes
# for each code of a chunk, and a float where it sums over queries.
_CHUNK = 2**17
_COUNTED = 2**14  # bytes of which codes that moved are counted at once


class Method:
    """What makes a quantized zeroth-order method; subclass it, and give `Steps` an instance.

    Attributes:
        contribution: what a query says about each code, summed over queries.
        window: from how many steps back a residual is made anew in every step, rather than kept, or
            None; `code_step` must make it without `rows`, and of the codes may use but their grid.
        sizing: how steps size themselves, or None where the user says how long they are.
        takes_comparisons: whether the signs of l+ - l- suffice.
    """

    contribution: Contribution = "product"
    window: int | None = None
    sizing: Sizing | None = None
    takes_comparisons: ClassVar[bool] = False

    def direction(
        self, key: Array, array: QuantizedArray, count: Array, size: Array | None = None
    ) -> Direction:
        """Where to probe an array in a step; of a size, where steps size themselves."""
        raise NotImplementedError

    def lengths(
        self,
        array: QuantizedArray,
        count: Array,
        size: Array | None,
        density: Schedule | Array,
        **given: Any,
    ) -> dict[str, Any]:
        """How long and dense an array's direction is: of a size, or as the user says."""
        if self.sizing is None or self.sizing.is_given:
            return {**given, **directions.scheduled(density, count)}
        return self.sizing.describe(size, array)

    def rounded(self, rows: Rows, length: Float[Array, "..."]) -> Int32[Array, "..."]:
        """A step in codes, rounded at random where it is not whole by itself."""
        if self.sizing is not None and self.sizing.is_whole:
            return length.astype(jnp.int32)
        return rounded_at_random(rows, length)

    def update_direction(self, probed: Direction) -> Direction:
        """The direction used in the update, if it differs from the one probed."""
        return probed

    def code_step(
        self, rows: Rows, array: QuantizedArray, direction_sum: Array, step: State, residual: Any
    ) -> tuple[Array, Any]:
        """How many codes to move.

        Args:
            rows: where the random bits of the move come from.
            array: a part of a leaf, a code to a byte.
            direction_sum: the sum over queries of the contributions, in the shape of `array`; with
                `sizing`, of directions times how often to go along them.
            step: the state before the step, but with its loss differences.
            residual: what error feedback has yet to apply.

        Returns:
            Whole codes, and the new residual.
        """
        raise NotImplementedError

    def init_residual(self, array: QuantizedArray) -> Array | None:
        """The first residual, or None for a method that has none."""
        del array
        return None


class QueryTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that can also tell where its next step will look.

    Attributes:
        probes: (state, params, query=0) -> the directions of a query, one for each trained leaf;
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
        >>> [loss(zq.dequantize(end)).item() for end in ends] == state.info.losses[0].tolist()
        True
    """

    probes: Callable[..., list[Direction]]


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a method.

    Attributes:
        method: its rules.
        key: the run's key.
        num_queries: query pairs a step.
        query_batch: how many of them to evaluate at once; 1 needs the least memory, None is all.
        sides: evaluate the two sides of a pair "together" or "in_turn".
        spread: which share of a step's evaluations a device has.
        num_comparisons: how often to compare the sides of a query, each time with a new key; None
            for once, without a key.
        guides: for each trained leaf, what is known of its inputs, or none at all.
    """

    method: Method
    key: PRNGKeyArray
    num_queries: Count = ONE
    query_batch: Count | None = ONE
    sides: queries.Sides = "together"
    spread: Spread = dataclasses.field(default_factory=Spread)
    num_comparisons: Count | None = None
    guides: tuple[Guide | None, ...] = ()

    def __post_init__(self) -> None:
        checked = check_query_count(self.num_queries, self.query_batch)
        for name, value in zip(("num_queries", "query_batch"), checked, strict=True):
            object.__setattr__(self, name, value)
        check_count("num_comparisons", self.num_comparisons, or_none=True)
        directions.check_choice("sides", self.sides, get_args(queries.Sides))

    def transformation(self) -> QueryTransformation:
        """The optax transformation.

        Its `update` takes `value_fn=`, or `compare_fn=` where the method `takes_comparisons` (or
        `differences=`, to replay a step).
        """
        tx = QueryTransformation(self.init, self.update)
        tx.probes = self.probes
        return tx

    def init(self, params: PyTree) -> State:
        """The state before the first step."""
        arrays = list(trained_leaves(params).values())
        sizing, examples = self.method.sizing, self._examples(arrays[0])
        state = initial_state(self.key, self.num_queries, examples)
        if sizing is not None:
            if examples:
                raise ValueError(
                    "learning_rate must be a number or a schedule where directions are of "
                    "examples, got 'auto'."
                )
            state = sizing.begin(state, arrays)
        if self.method.window:
            window, heard = self.method.window, state.info.log
            nothing = jnp.zeros((window, *heard.shape), jnp.float32)
            return state._replace(recent=(nothing,))
        residual = tuple(map(self.method.init_residual, arrays))
        return state._replace(residual=() if None in residual else residual)

    def keys(self, state: State, leaves: Array) -> Key[Array, "queries_and_move leaves"]:
        """A key for every direction and, in the last row, for every move."""
        own_key = step_key(state)
        fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        by_query = fold_in(own_key, jnp.arange(self.num_queries + 1))
        if state.sizes:  # some look along a direction of the last step
            last = step_key(state._replace(count=state.count - 1))
            again = jnp.append(state.sizes.again, False)
            by_query = jnp.where(again, fold_in(last, jnp.arange(self.num_queries + 1)), by_query)
        return jax.vmap(lambda key: fold_in(key, leaves))(by_query)

    def _examples(self, array: QuantizedArray) -> int:
        """Of how many examples the objective returns losses, or 0 for one loss."""
        size = None if self.method.sizing is None else jnp.float32(1.0)
        describe = functools.partial(self.direction, 0, array=array, count=jnp.int32(0), size=size)
        return jax.eval_shape(describe, random_bits.threefry(jax.random.key(0))).examples

    def probes(self, state: State, params: PyTree, query: Array | int = 0) -> list[Direction]:
        """The directions of a query, one for each trained leaf."""
        arrays = list(trained_leaves(params).values())
        of_query = self._keys(state._replace(residual=()), jnp.arange(len(arrays)))[query]
        numbered = zip(self._numbers(len(arrays)), arrays, strict=True)
        size = state.sizes.probed[query] if state.sizes else None
        return [self._probe(leaf, of_query, array, state.count, size) for leaf, array in numbered]

    def _numbers(self, leaves: int) -> list[Any]:
        """Numbers of leaves, for what is compiled once for all leaves of like shape."""
        return [leaf if self.guides else compiler.unknown(leaf) for leaf in range(leaves)]

    def probe(
        self,
        leaf: Array | int,
        keys: Array,
        array: QuantizedArray,
        count: Array,
        size: Array | None,
    ) -> Direction:
        """The direction of a leaf, by the keys of all leaves."""
        return self.direction(leaf, keys[leaf], array, count, size)

    def direction(
        self,
        leaf: Array | int,
        key: Array,
        array: QuantizedArray,
        count: Array,
        size: Array | None = None,
    ) -> Direction:
        """The direction of a leaf, guided where there is a guide for it."""
        sized = {} if size is None else {"size": size}
        direction = self.method.direction(key, array, count, **sized)
        guide = self.guides[leaf] if self.guides else None
        return direction if guide is None else direction.guided(guide, array)

    def ask(self, state: State, params: PyTree, value_fn: queries.Objective) -> State:
        """The state after a step's losses came in."""

        def losses(objective: queries.Objective, query: Array | int) -> Array:
            probes = self.probes(state, params, query)
            return queries.losses(
                objective, params, probes, together=self._together, sides=self.sides
            )

        pairs = self.spread.losses(losses, value_fn, self.num_queries, self.query_batch)
        return record(state, pairs)

    def ask_which(self, state: State, params: PyTree, compare_fn: queries.Comparator) -> State:
        """The state after a step's comparisons came in."""
        own_key = step_key(state)

        def votes(query: Array | int) -> Array:
            keys = None
            if self.num_comparisons is not None:  # rows of `keys` end at num_queries
                own = jax.random.fold_in(own_key, self.num_queries + 1 + query)
                own = self.spread.own_key(own)  # devices err independently
                keys = jax.random.split(own, self.num_comparisons)
            probes = self.probes(state, params, query)
            return queries.verdicts(compare_fn, params, probes, keys=keys, together=self._together)

        total = self.spread.votes(votes, self.num_queries, self.query_batch)
        return record_votes(state, total, 2 * self.num_queries * (self.num_comparisons or 1))

    @property
    def _together(self) -> int:
        return min(self.query_batch or self.num_queries, self.num_queries)

    def direction_sum(
        self,
        step: State,
        leaf: Array | int,
        keys: Array,
        array: QuantizedArray,
        pick: TakeRows,
        part: int,
    ) -> Array:
        """What the step's queries said about a part of a leaf, for the rows picked."""
        sized = self.method.sizing is not None
        by_signs = self.method.contribution == "signs" and not sized
        times = step.info.record[:, 0] if sized else step.info.loss_differences

        def of_query(query: Array | int) -> tuple[Direction, QuantizedArray]:
            size = jnp.abs(step.info.record[query, 1]) if sized else None
            probed = self.direction(leaf, keys[query], array, step.count, size)
            direction = self.method.update_direction(probed)
            direction = direction.signs_only() if by_signs else direction
            picked = take_rows(pick, PerturbedArray(array, direction)).part(part)
            return picked.direction, picked.array

        add_up = type(of_query(0)[0]).direction_sum
        return add_up(of_query, times, "product" if sized else self.method.contribution)

    def residual(
        self,
        step: State,
        leaf: Array | int,
        rows: Rows,
        array: QuantizedArray,
        pick: TakeRows,
        i: int,
        part: QuantizedArray,
    ) -> Any:
        """The residual of a part of a leaf, from what the window's steps said."""
        window, (recent,) = self.method.window or 0, step.recent

        def after(k: Array, residual: Any) -> Any:
            count = jnp.maximum(step.count - window + k, 0)  # before the first, nothing was said
            past = as_logged(step._replace(count=count), recent[k])
            keys = self.keys(past, jnp.array([leaf]))[:, 0]
            total = self.direction_sum(past, leaf, keys, array, pick, i)
            return self.method.code_step(rows, part, total, past, residual)[1]

        return jax.lax.fori_loop(0, window, after, self.method.init_residual(part))

    def move(
        self,
        step: State,
        leaf: Array | int,
        keys: Array,
        array: QuantizedArray,
        kept: Any,
        pick: TakeRows = lambda rows: rows,
    ) -> tuple[Array, Any]:
        """A leaf's new bytes and what error feedback keeps, for the rows picked."""
        chunk = take_rows(pick, array)
        rows = by_row(pick, random_bits.rows(keys[self.num_queries], array.shape[:-1]))
        steps, rest = [], []
        for i, part in enumerate(chunk.parts):
            total = self.direction_sum(step, leaf, keys, array, pick, i)
            rows_of_part = random_bits.part(rows, i)
            if self.method.window:
                residual = self.residual(step, leaf, rows_of_part, array, pick, i, part)
            else:
                residual = None if kept is None else cut(pick(kept), i, array.per_byte)
            codes, residual = self.method.code_step(rows_of_part, part, total, step, residual)
            steps.append(codes)
            rest.append(residual)
        if kept is not None:
            kept = jnp.concatenate(rest, axis=-1) if len(rest) > 1 else rest[0]
        return chunk.stepped(steps).packed, kept

    def changed(
        self, step: State, leaf: Array | int, keys: Array, array: QuantizedArray, kept: Any
    ) -> tuple[Array, Any, Array]:
        """A leaf's new bytes, what error feedback keeps, and the counts of `_counts`."""
        if array.ndim < 2 or array.size <= _CHUNK:
            array = matmul.depends_on(step.info.log, array)
            return self._piece(step, leaf, keys, array, kept, 0, jnp.array([True]), None)
        rows = array.shape[0]
        few = max(_CHUNK // (array.size // rows), 1)

        def piece(start: Array, is_new: Array, now: tuple[Array, Any]) -> Any:
            packed, kept = now
            whole = dataclasses.replace(array, packed=packed)
            new, kept, counts = self._piece(step, leaf, keys, whole, kept, start, is_new, few)
            return (new, kept), counts

        start = (array.packed, kept), jnp.zeros(2, jnp.float32)
        (packed, kept), counts = in_place(piece, rows, few, *start)
        return packed, kept, counts

    def piece(
        self,
        step: State,
        leaf: Array | int,
        keys: Array,
        array: QuantizedArray,
        kept: Any,
        start: Array | int,
        is_new: Array,
        few: int | None,
    ) -> tuple[Array, Any, Array]:
        """What `changed` makes of a few rows from `start` on, or of all; in place is done outside.

        Within a call XLA would copy what a loop changes.
        """

        def pick(rows: Array) -> Array:
            return rows if few is None else jax.lax.dynamic_slice_in_dim(rows, start, few)

        make = functools.partial(self.move, step, leaf, keys[:, leaf], array, kept, pick)
        packed, kept = compiler.materialized(make, array.packed)  # not made for the counts again
        return packed, kept, _counts(take_rows(pick, array), packed, is_new)

    # What is done for every leaf is compiled once for all leaves of like shape: a leaf's number is
    # an argument. Guides are of a leaf each.
    _keys = functools.cached_property(lambda self: compiler.shared(self.keys))
    _probe = functools.cached_property(
        lambda self: self.probe if self.guides else compiler.shared(self.probe)
    )
    _piece = functools.cached_property(
        lambda self: self.piece if self.guides else compiler.shared(self.piece, (7,))
    )

    def update(
        self,
        updates: Any,
        state: Any,
        params: PyTree | None = None,
        *,
        value_fn: queries.Objective | None = None,
        compare_fn: queries.Comparator | None = None,
        differences: Float[Array, "queries ..."] | None = None,
        guides: Mapping[str, Any] | None = None,
        spread: Spread | None = None,
        **extra: Any,
    ) -> tuple[PyTree, State]:
        """A step, as optax calls it; `guides` are by the leaf's path, as `observe` has them.

        `spread` takes the place of the transformation's own: see `distributed`.
        """
        leaves = trained_leaves(params)
        if spread is not None:
            self = dataclasses.replace(self, spread=spread)
        if guides is not None:
            of_leaves = tuple(
                getattr(guides.get(name), "guide", guides.get(name)) for name in leaves
            )
            self = dataclasses.replace(self, guides=of_leaves)
        del updates, extra, guides
        arrays = list(leaves.values())
        if compare_fn is not None and value_fn is not None:
            raise ValueError("value_fn and compare_fn must not both be given.")
        sizing = self.method.sizing
        if compare_fn is not None and sizing is not None:
            raise ValueError(
                "learning_rate must be a number or a schedule with compare_fn, got 'auto': "
                "comparisons do not say how far to go."
            )
        if compare_fn is not None and not self.method.takes_comparisons:
            raise ValueError("compare_fn serves zoqo alone: this method needs losses, by value_fn.")

        loss = pending = None
        if differences is not None:
            after = replayed(state, differences)
        elif value_fn is not None:
            after = self.ask(state, params, value_fn)
            if sizing is not None:
                loss = functools.partial(self.spread.loss_if, value_fn)
                after, pending = sizing.ask(step_key(state), state, after, loss, params)
        elif compare_fn is not None:
            after = self.ask_which(state, params, compare_fn)
        else:
            raise ValueError("value_fn must be given: tx.update(None, state, params, value_fn=f).")

        # What the update needs is made when the forward passes are over, and takes their place.
        heard = after.info.log
        said = heard if pending is None else heard.reshape(-1)[0] + pending.loss
        wait = functools.partial(compiler.depends_on, said)
        step = as_logged(state._replace(count=wait(state.count), residual=()), heard, after.info)
        keys = self._keys(step, jnp.arange(len(arrays)))
        changes, residual, counts = [], [], jnp.zeros(2, jnp.float32)
        residuals = state.residual or [None] * len(arrays)
        for leaf, array, kept in zip(self._numbers(len(arrays)), arrays, residuals, strict=True):
            packed, kept, more = self.changed(step, leaf, keys, array, kept)
            # What `optax.apply_updates` adds it to is what it was taken from, and XLA knows that
            # p + (n - p) is n: compiled together, the new bytes are written over the old.
            changes.append(packed - array.packed)
            residual.append(kept)
            counts = counts + more
        moved, at_edges = counts
        share = at_edges / max(sum(array.size for array in arrays), 1)
        after = after._replace(info=after.info._replace(codes_moved=moved, share_at_edges=share))
        if state.residual:
            after = after._replace(residual=tuple(residual))
        if self.method.window:
            (recent,) = state.recent
            after = after._replace(recent=(jnp.concatenate([recent[1:], heard[None]]),))
        updates = _fill(params, changes)
        if pending is not None:
            moved = apply_updates(params, updates)
            after = sizing.close(state, after, arrays, pending, loss, moved)
        return updates, after


def rounded_at_random(rows: Rows, step: Float[Array, "..."]) -> Int32[Array, "..."]:
    """A step in codes rounded up or down, unbiased, `rows` being where the bits come from."""
    columns = step.shape[-1] if step.ndim else 1
    return projection.stochastic(random_bits.words(rows, columns, 0).reshape(step.shape), step)


def check_query_count(num_queries: Any, query_batch: Any) -> tuple[int, int | None]:
    """The two as Python ints; counts below one, and what is no count, are refused."""
    check_count("num_queries", num_queries)
    check_count("query_batch", query_batch, or_none=True)
    return int(num_queries), None if query_batch is None else int(query_batch)


def _counts(
    before: QuantizedArray, packed: Array, is_new: Array
) -> Float[Array, "moved_and_at_edges"]:
    """How many codes moved, and how many are at an edge now, among rows that `is_new`.

    Some bytes at a time: XLA's CPU backend makes floats of all that a sum counts (9 bytes a code).
    """
    few = min(_COUNTED, packed.size)
    if not few:
        return jnp.zeros(2, jnp.float32)
    if len(packing.planes(before.bits)) > 1:
        return _counts_by_row(before, packed, is_new)
    old, new = before.packed.reshape(-1), packed.reshape(-1)
    first = (~is_new).sum() * (old.size // max(is_new.size, 1))  # new bytes are the last ones

    def of_bytes(start: Array, few: int) -> Array:
        a, b = (jax.lax.dynamic_slice_in_dim(x, start, few) for x in (old, new))
        counts = _moved_and_at_edges(before, a, b)
        return jnp.where(start + jnp.arange(few) >= first, counts, jnp.uint8(0))

    whole, rest = divmod(old.size, few)
    add = lambda i, counts: counts + of_bytes(i * few, few).astype(jnp.uint16)  # noqa: E731
    zero = compiler.zeros(jax.ShapeDtypeStruct((2, few), jnp.uint16), old, new)
    counts = jax.lax.fori_loop(0, whole, add, zero).sum(axis=1, dtype=jnp.float32)
    if rest:
        counts = counts + of_bytes(jnp.int32(whole * few), rest).sum(axis=1, dtype=jnp.float32)
    return counts


def _counts_by_row(
    before: QuantizedArray, packed: Array, is_new: Array
) -> Float[Array, "moved_and_at_edges"]:
    """The same where a code's bits lie in several bytes of its row."""
    old, new = (x.reshape(-1, x.shape[-1]) for x in (before.packed, packed))
    first = (~is_new).sum() * (len(old) // max(is_new.size, 1))  # new rows are the last ones
    few = min(max(_COUNTED // old.shape[1], 1), len(old))
    zero = compiler.zeros(jax.ShapeDtypeStruct((2,), jnp.float32), old, new)

    def add(i: Array, counts: Array) -> Array:
        start = jnp.minimum(i * few, len(old) - few)
        a, b = (jax.lax.dynamic_slice_in_dim(x, start, few) for x in (old, new))
        here = start + jnp.arange(few)
        is_counted = (here >= i * few) & (here >= first)  # the last rows may come a second time
        found = _moved_and_at_edges(before, a, b) * is_counted[:, None].astype(jnp.uint8)
        return counts + found.sum(axis=(1, 2), dtype=jnp.float32)

    return jax.lax.fori_loop(0, -(-len(old) // few), add, zero)


def _moved_and_at_edges(before: QuantizedArray, a: Array, b: Array) -> Array:
    """Of bytes before and after, in how many of their codes each differs, and is at an edge."""
    low, high = before.grid.low, before.grid.high
    counts = []
    for i in range(before.per_byte):
        m, n = (packing.part(x, before.bits, i) for x in (a, b))
        counts.append(jnp.stack([m != n, (n == low) | (n == high)]).astype(jnp.uint8))
    return functools.reduce(jnp.add, counts)


def _fill(params: PyTree, changes: list[Array]) -> PyTree:
    """A tree of updates: the codes' changes, and zeros for all that is frozen."""
    remaining = iter(changes)

    def one(leaf: Any) -> Any:
        zeros = no_update(leaf)
        return dataclasses.replace(zeros, packed=next(remaining)) if is_trained(leaf) else zeros

    return jax.tree.map(one, params, is_leaf=is_quantized)
