"""Steps whose losses come from elsewhere: what workers evaluate, and what everyone makes of it.

`distributed.spread` needs all of its devices from the first step to the last. Here a step is taken
apart into functions, so that whoever is there may evaluate a piece of it: some queries on one part
of the batch. Who does so decides nothing: a piece is one program of one shape, losses of parts are
averaged exactly, and all replicas make the step of the same losses. How pieces and losses travel is
for the caller to say; `python -m experiments.elastic` does it with Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from zoqo_jax.transforms import queries
from zoqo_jax.transforms.applying import apply_updates
from zoqo_jax.transforms.schedules import check_count
from zoqo_jax.transforms.spreading import Spread, loss_at, mean_of_parts, of_part, unit

__all__ = ["Remote"]


class Remote:
    """The steps of a transformation, taken apart.

    All but `pieces` is to be compiled by `jax.jit`. A worker calls `losses` for some pieces; where
    all of a step are there, `mean` makes the step's losses of them, and `step` the step. A step
    that sizes itself may want two more losses of each part (`wants_look`), which `look` finds.

    Args:
        tx: one of this library, or a chain that has one, without `axis_names`.
        value_fn: `value_fn(params, part)`, the mean loss of a part of a batch, or
            `value_fn(params)`.
        parts: of a batch, or None where `value_fn` knows its examples.

    Raises:
        ValueError: `parts` is no positive whole number.

    Examples:
        >>> import zoqo_jax as zq
        >>> x = jax.random.normal(jax.random.key(1), (2, 4, 4))  # two parts of four examples
        >>> loss = lambda params, part: jnp.mean((part @ params["w"] - 1.0) ** 2)
        >>> params = zq.quantize({"w": jnp.zeros((4, 2))}, zq.Quantizer(bits=8, range=1.0))
        >>> tx = zq.zoqo(0.1, 0.1, key=jax.random.key(0), num_queries=2)
        >>> remote = zq.distributed.Remote(tx, loss, parts=2)
        >>> state = tx.init(params)
        >>> numbers = remote.pieces(params)  # of queries that are evaluated at once
        >>> numbers.tolist()
        [[0], [1]]
        >>> found = [[remote.losses(params, state, n, part) for part in x] for n in numbers]
        >>> losses = remote.mean(jnp.array(found))
        >>> params, state = remote.step(params, state, losses)
        >>> losses.shape, bool((state.info.losses == losses).all())
        ((2, 2), True)
    """

    def __init__(
        self, tx: optax.GradientTransformation, value_fn: Callable[..., Any], parts: int | None
    ) -> None:
        check_count("parts", parts, or_none=True)
        self._update = optax.with_extra_args_support(tx).update
        self._init, self._value_fn = tx.init, value_fn
        self._objective = of_part(value_fn, parts is not None)

    def pieces(self, params: PyTree) -> Int32[np.ndarray, "groups together"]:
        """The numbers of the queries of a step, in the groups that are evaluated at once.

        All are of one size: past the last query, it is asked again.
        """
        asked: list[tuple[int, int]] = []

        def ask(ask: Any, num_queries: int, query_batch: int | None) -> Array:
            asked.append((num_queries, min(query_batch or num_queries, num_queries)))
            return jnp.zeros((num_queries, 2), jnp.float32)

        jax.eval_shape(lambda params: self._made(params, self._init(params), ask, _no_loss), params)
        ((count, together),) = asked
        groups = -(-count // together)
        numbers = np.minimum(np.arange(groups * together, dtype=np.int32), count - 1)
        return numbers.reshape(groups, together)

    def losses(
        self, params: PyTree, state: PyTree, numbers: Int32[Any, " together"], part: Any = None
    ) -> Float32[Array, "together 2"]:
        """The losses at both sides of the queries of a group, of one part.

        Args:
            params: before the step.
            state: before the step.
            numbers: a row of `pieces`.
            part: of the step's batch, given to `value_fn` as its second argument.
        """
        found: list[Array] = []

        def ask(ask: Any, num_queries: int, query_batch: int | None) -> Array:
            found.append(unit(ask, self._objective)(jnp.asarray(numbers), part))
            return jnp.zeros((num_queries, 2), jnp.float32)

        self._made(params, state, ask, _no_loss)
        return found[0]

    def mean(
        self, found: Float32[Array, "groups parts together 2"]
    ) -> Float32[Array, "queries_and_more 2"]:
        """The losses of a step's queries, averaged over the parts.

        Where there are several parts, a query with a NaN or inf among its losses has NaN for both.
        The last ones are of queries asked again, see `pieces`; `step` leaves them out.
        """
        groups, parts, together = found.shape[:3]
        rows = jnp.moveaxis(found, 1, 2).reshape(groups * together, parts, 2)
        return mean_of_parts(rows)

    def mean_look(self, found: Float32[Array, "parts 2"]) -> Float32[Array, "2"]:
        """What `look` found of each part, averaged."""
        return mean_of_parts(jnp.moveaxis(found, 0, 1)[..., None])[:, 0]

    def wants_look(
        self, params: PyTree, state: PyTree, losses: Float32[Array, "queries 2"]
    ) -> Bool[Array, ""]:
        """Whether a step wants the loss before and after it; never, where steps are given."""
        wanted: list[Array] = [jnp.zeros((), bool)]

        def loss(params: PyTree, is_wanted: Array) -> Array:
            wanted.append(is_wanted)
            return jnp.zeros((), jnp.float32)

        self._made(params, state, _given(losses), loss)
        return wanted[-1]

    def look(
        self, params: PyTree, state: PyTree, losses: Float32[Array, "queries 2"], part: Any = None
    ) -> Float32[Array, "2"]:
        """The loss of a part before and after a step.

        Args:
            params: before the step.
            state: before the step.
            losses: of the step, from `mean`.
            part: of its batch.
        """
        found: list[Array] = []

        def loss(params: PyTree, is_wanted: Array) -> Array:
            found.append(loss_at(self._objective(part), params))
            return found[-1]

        self._made(params, state, _given(losses), loss)
        return jnp.stack(found)

    def step(
        self,
        params: PyTree,
        state: PyTree,
        losses: Float32[Array, "queries 2"],
        look: Float32[Array, "2"] | None = None,
    ) -> tuple[PyTree, PyTree]:
        """The parameters and the state after a step.

        Args:
            params: before it.
            state: before it.
            losses: of its queries, from `mean`.
            look: where the step wants it, from `mean_look`.
        """
        known = iter((0.0, 0.0) if look is None else look)

        def loss(params: PyTree, is_wanted: Array) -> Array:
            return jnp.asarray(next(known), jnp.float32)

        updates, state = self._made(params, state, _given(losses), loss)
        return apply_updates(params, updates), state

    def _made(self, params: PyTree, state: PyTree, ask: _Ask, loss: _Loss) -> tuple[Any, Any]:
        """An update whose evaluations are made by two functions."""
        spread = _Elsewhere.by(ask, loss)
        return self._update(None, state, params, value_fn=self._value_fn, spread=spread)


_Ask = Callable[[Any, int, "int | None"], Array]
_Loss = Callable[[PyTree, Array], Array]


class _Calls(NamedTuple):
    ask: _Ask
    loss: _Loss


class _Elsewhere(Spread):
    """What a transformation asks for its losses, where functions have them."""

    _calls: _Calls

    @classmethod
    def by(cls, ask: _Ask, loss: _Loss) -> _Elsewhere:
        self = cls()
        self._calls = _Calls(ask, loss)
        return self

    def losses(
        self,
        ask: Callable[[queries.Objective, Any], Any],
        value_fn: Callable[..., Any],
        num_queries: int,
        query_batch: int | None,
    ) -> Float32[Array, "queries 2 ..."]:
        """See `Spread`."""
        return self._calls.ask(ask, num_queries, query_batch)

    def loss_if(
        self, value_fn: Callable[..., Any], params: PyTree, wanted: Array
    ) -> Float32[Array, ""]:
        """See `Spread`."""
        return self._calls.loss(params, wanted)


def _given(losses: Float32[Array, "queries 2"]) -> _Ask:
    """Losses that are known."""
    return lambda ask, num_queries, query_batch: jnp.asarray(losses)[:num_queries]


def _no_loss(params: PyTree, is_wanted: Array) -> Array:
    return jnp.zeros((), jnp.float32)
