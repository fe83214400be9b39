"""How a step's evaluations are spread over devices, so that every device makes the same step.

Devices differ in which queries they evaluate, and on which examples; what they tell each other is
at most 12 bytes a query, whatever the size of the model. Two things would make a step depend on
how many devices there are, and neither happens here:

- A sum of floats depends on its order. Losses are averaged as whole multiples of one power of two
  for each query, which all devices agree on first: sums of whole numbers are exact in any order.
- XLA computes a product of eight rows in another way than one of four. What is evaluated at once
  has the same shape on any number of devices: `query_batch` queries on one part of the batch. It is
  compiled as a function of its own, so that what stands around it does not change it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import queries
from zoqo_jax.xla import compiler

__all__ = [
    "AxisNames",
    "Parts",
    "Spread",
    "loss_at",
    "mean_of_parts",
    "of_part",
    "over_queries",
    "spread_over",
    "unit",
]

AxisNames = tuple[str | None, str | None]
"""Names of mapped axes: that which losses are averaged over, and that which queries are divided
over; None for neither."""

_NOT_FINITE = 0x7F800000  # the bits of infinity; those of NaN are greater


class Parts(NamedTuple):
    """The parts of a batch that a device evaluates, one after another.

    Attributes:
        batch: a tree of arrays, whose first axis is that of the parts.
        is_real: which of them count; others only make up the number, which all devices share.
        count: how many count, on all devices together.
    """

    batch: PyTree
    is_real: Bool[Array, " parts"]
    count: int


class Spread(NamedTuple):
    """Which share of a step's evaluations a device has.

    Attributes:
        data: the mapped axis, or axes, over which devices have other examples.
        queries: that over which they have other queries.
        parts: of the device's examples, given to the objective as its second argument; or None
            where the objective knows its examples.
    """

    data: Any = None
    queries: Any = None
    parts: Parts | None = None

    @property
    def is_alone(self) -> bool:
        """Whether one device does all."""
        return self.data is None and self.queries is None and self.parts is None

    def losses(
        self,
        ask: Callable[[queries.Objective, Any], Any],
        value_fn: Callable[..., Any],
        num_queries: int,
        query_batch: int | None,
    ) -> Float32[Array, "queries 2 ..."]:
        """The losses at both sides of every query, averaged over all parts.

        Where there are several parts, a query with a NaN or inf among its losses has NaN for both.

        Args:
            ask: (objective, number of a query) -> float32 (2, ...).
            value_fn: the objective: of params, and of a part where there are `parts`.
            num_queries: of all devices together.
            query_batch: how many a device evaluates at once.
        """
        if self.is_alone:
            return over_queries(functools.partial(ask, value_fn), num_queries, query_batch)

        run = unit(ask, self._objective(value_fn))

        def group(numbers: Array) -> Array:
            return self._of_parts(lambda part: run(numbers, part))

        own = self._own(num_queries, query_batch)
        found = jnp.moveaxis(jax.lax.map(group, own.groups), 1, 2)
        found = found.reshape(-1, *found.shape[2:])  # (own queries, parts, 2, ...)
        return self._mean(found, own, self._all)

    def votes(
        self, ask: Callable[[Any], Any], num_queries: int, query_batch: int | None
    ) -> Float32[Array, " queries"]:
        """The verdicts of every query, whole numbers, added up over the devices with other data.

        Args:
            ask: number of a query -> float32 ().
            num_queries: of all devices together.
            query_batch: how many a device asks about at once.
        """
        if self.is_alone:
            return over_queries(ask, num_queries, query_batch)
        if self.parts is not None:
            raise ValueError("batch must not be given with compare_fn: it serves value_fn alone.")
        own = self._own(num_queries, query_batch)
        group = jax.vmap(ask) if own.groups.shape[1] > 1 else lambda numbers: ask(numbers[0])[None]
        return jax.lax.psum(own.place(jax.lax.map(group, own.groups).reshape(-1)), self._all)

    def loss_if(
        self, value_fn: Callable[..., Any], params: PyTree, wanted: Array
    ) -> Float32[Array, ""]:
        """The loss at the parameters as they are, averaged over all parts; 0 if not wanted."""

        def loss() -> Array:
            run = lambda part: loss_at(self._objective(value_fn)(part), params)  # noqa: E731
            if self.data is None and self.parts is None:
                return run(None)
            found = self._of_parts(compiler.shared(run))[None, :, None]
            own = Spread()._own(1, 1)
            return self._mean(found, own, _names(self.data))[0, 0]

        if not isinstance(wanted, jax.core.Tracer):  # eagerly a branch would be compiled every time
            return loss() if wanted else jnp.float32(0.0)
        return jax.lax.cond(wanted, loss, lambda: jnp.float32(0.0))

    def own_key(self, key: Array) -> Array:
        """A key for each device with other data."""
        return key if self.data is None else jax.random.fold_in(key, jax.lax.axis_index(self.data))

    @property
    def _all(self) -> tuple[str, ...]:
        """Every axis of devices."""
        return _names(self.data) + _names(self.queries)

    def _objective(self, value_fn: Callable[..., Any]) -> Callable[[Any], queries.Objective]:
        """The objective of a part."""
        return of_part(value_fn, self.parts is not None)

    def _of_parts(self, run: Callable[[Any], Array]) -> Array:
        """What is found of each of the device's parts, stacked."""
        if self.parts is None:
            return run(None)[None]
        return jax.lax.map(run, self.parts.batch)

    def _own(self, num_queries: int, query_batch: int | None) -> _Own:
        """The device's queries.

        Groups are of one size, and devices have as many: past the last query, it is asked again.
        """
        together = min(query_batch or num_queries, num_queries)
        devices = 1 if self.queries is None else jax.lax.axis_size(self.queries)
        groups = -(-num_queries // (together * devices))
        first = jnp.int32(0)
        if self.queries is not None:
            first = jax.lax.axis_index(self.queries).astype(jnp.int32) * (groups * together)
        numbers = first + jnp.arange(groups * together, dtype=jnp.int32)
        numbers = jnp.minimum(numbers, num_queries - 1).reshape(groups, together)
        return _Own(numbers, first, num_queries, devices, self.queries is not None)

    def _mean(
        self, found: Float32[Array, "own parts sides ..."], own: _Own, axes: tuple[str, ...]
    ) -> Float32[Array, "queries sides ..."]:
        """Losses averaged over the parts of all devices, to the same bits on any number of them."""
        if self.parts is None:
            count = 1 if self.data is None else jax.lax.axis_size(self.data)
        else:
            real = self.parts.is_real.reshape(1, -1, *[1] * (found.ndim - 2))
            found, count = jnp.where(real, found, 0.0), self.parts.count
        if count == 1:  # every other summand is zero
            return _sum(own.place(found.sum(axis=1)), axes)
        largest = own.place(
            jax.lax.bitcast_convert_type(jnp.abs(found), jnp.int32).max(axis=(1, 2))
        )
        largest = jax.lax.pmax(largest, axes) if axes else largest
        # As many bits as leave room for the sum in 32.
        shift = 30 - (count - 1).bit_length() - ((largest >> 23) - 126)
        shift = jnp.clip(shift, -126, 126)[:, None]
        scaled = found * queries.power_of_two(own.pick(shift))[:, None]
        scaled = jnp.where(jnp.abs(scaled) <= 2.0**30, scaled, 0.0)  # inf and NaN: see below
        total = _sum(own.place(jnp.round(scaled).astype(jnp.int32).sum(axis=1)), axes)
        mean = total.astype(jnp.float32) / count * queries.power_of_two(-shift)
        return jnp.where(largest[:, None] >= _NOT_FINITE, jnp.nan, mean)


class _Own(NamedTuple):
    """A device's queries.

    Attributes:
        groups: their numbers, int32 (groups, together).
        first: the first of them.
        num_queries: of all devices.
        devices: how many divide them.
        is_divided: whether they are divided by a mapped axis.
    """

    groups: Int32[Array, "groups together"]
    first: Int32[Array, ""]
    num_queries: int
    devices: int
    is_divided: bool

    def place(self, found: Array) -> Array:
        """What a device found of its queries, among zeros for all others."""
        if not self.is_divided:
            return found[: self.num_queries]
        blank = jnp.zeros((self.devices * len(found), *found.shape[1:]), found.dtype)
        placed = jax.lax.dynamic_update_slice_in_dim(blank, found, self.first, 0)
        return placed[: self.num_queries]

    def pick(self, of_all: Array) -> Array:
        """The device's queries' rows of what is known of all."""
        return of_all[self.groups.reshape(-1)]


def spread_over(axis_names: AxisNames | None, axis_name: str | None) -> Spread:
    """How evaluations are spread over named axes.

    Args:
        axis_names: as a factory was given it.
        axis_name: its old name, of the data alone.

    Raises:
        ValueError: `axis_names` is no pair of names, or both are given.

    Examples:
        >>> spread_over(("data", None), None).data
        'data'
        >>> spread_over(("data", "data"), None)
        Traceback (most recent call last):
        ValueError: axis_names must be two names, got ('data', 'data').
    """
    if axis_name is not None:
        if axis_names is not None:
            raise ValueError(f"axis_name={axis_name!r} is for old programs: give axis_names alone.")
        message = (
            f"axis_name={axis_name!r} is now axis_names=({axis_name!r}, None), and will go in the "
            "next release."
        )
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        axis_names = (axis_name, None)
    if axis_names is None:
        return Spread()
    is_pair = isinstance(axis_names, tuple | list) and len(axis_names) == 2
    if not is_pair or not all(name is None or isinstance(name, str) for name in axis_names):
        raise ValueError(
            f"axis_names must be a pair (data, queries) of names or None, got {axis_names!r}."
        )
    if axis_names[0] is not None and axis_names[0] == axis_names[1]:
        raise ValueError(f"axis_names must be two names, got {axis_names!r}.")
    return Spread(*axis_names)


def of_part(value_fn: Callable[..., Any], has_parts: bool) -> Callable[[Any], queries.Objective]:
    """The objective of a part of a batch, or of whatever the objective knows."""
    if not has_parts:
        return lambda part: value_fn
    return lambda part: lambda params: value_fn(params, part)


def unit(
    ask: Callable[[queries.Objective, Any], Any], objective: Callable[[Any], queries.Objective]
) -> Callable[[Int32[Array, " together"], Any], Float32[Array, "together 2 ..."]]:
    """What is evaluated at once, some queries on one part, as a function compiled by itself."""

    def run(numbers: Array, part: Any) -> Array:
        one = functools.partial(ask, objective(part))
        return jax.vmap(one)(numbers) if len(numbers) > 1 else one(numbers[0])[None]

    return compiler.shared(run)


def loss_at(value_fn: queries.Objective, params: PyTree) -> Float32[Array, ""]:
    """The loss at parameters as they are."""
    return queries.scalar(quaxify(value_fn)(params))


def mean_of_parts(
    found: Float32[Array, "queries parts sides ..."],
) -> Float32[Array, "queries sides ..."]:
    """Losses averaged over all parts by one device, to the bits that any number of them finds.

    Examples:
        >>> mean_of_parts(jnp.array([[[0.5, 1.0], [0.25, jnp.inf]]])).tolist()
        [[nan, nan]]
        >>> mean_of_parts(jnp.array([[[0.5, 1.0], [0.25, 2.0]]])).tolist()
        [[0.375, 1.5]]
    """
    queries, parts = found.shape[:2]
    whole = Spread(parts=Parts(None, jnp.ones(parts, bool), parts))
    return whole._mean(found, Spread()._own(queries, 1), ())


def over_queries(losses: Callable[[Any], Any], num_queries: int, query_batch: int | None) -> Any:
    """The losses of each query, or what else is asked, `query_batch` at a time, stacked."""
    if num_queries == 1:
        return jax.tree.map(lambda x: x[None], losses(0))
    indices = jnp.arange(num_queries)
    if query_batch is None or query_batch >= num_queries:
        return jax.vmap(losses)(indices)
    return jax.lax.map(losses, indices, batch_size=None if query_batch == 1 else query_batch)


def _names(axes: Any) -> tuple[str, ...]:
    """The names of an axis, or of several, or of none."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _sum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x
