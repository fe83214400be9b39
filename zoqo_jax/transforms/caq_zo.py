"""CAQ-ZO: compander-aligned queries for zeroth-order optimization.

Yao Shu and Zilin Zhu, "Compander-Aligned Query Geometry for Quantized Zeroth-Order Optimization",
2026, arXiv:2605.10673. Queries are one grid step long in the coordinate z where the codebook is
uniform, so both end points are codebook points and rounding them changes nothing. The paper's
baseline, queries that are not aligned, is here as well: its end points x +- mu r are rounded to the
codebook, and nothing but the nominal mu r is known of where they came to lie.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from zoqo_jax import directions
from zoqo_jax.directions import Boundary, Direction, Structure
from zoqo_jax.grids import projection
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.projection import Rounding
from zoqo_jax.transforms import auto, queries, stepping
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.queries import Sides
from zoqo_jax.transforms.schedules import (
    ONE,
    Count,
    Schedule,
    check_positive,
    inverse_at,
    is_traced,
    value_at,
)
from zoqo_jax.transforms.sizing import Sizing
from zoqo_jax.transforms.spreading import AxisNames, spread_over
from zoqo_jax.transforms.state import State
from zoqo_jax.transforms.stepping import Method, Steps
from zoqo_jax.xla.random_bits import Rows

__all__ = ["caq_zo"]

Query = Literal["aligned", "off_grid"]


def caq_zo(
    learning_rate: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    num_queries: Count = ONE,
    query: Query = "aligned",
    radius: Schedule | None = None,
    structure: Structure | Auto = "auto",
    density: Schedule | Array | Auto = "auto",
    rounding: Rounding = "stochastic",
    threshold: float | Array | None = None,
    boundary: Boundary | Auto = "auto",
    query_batch: Count | None = ONE,
    sides: Sides = "together",
    axis_names: AxisNames | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent along one-grid Rademacher probes, two forward passes for each query.

    In code units (Delta = 1) one step is

    .. math::
        r &\in \{-1, 1\}^d, \quad n_\pm = n \pm r \\
        g_z &= \frac{\ell_+ - \ell_-}{2 \Delta} r, \quad n \leftarrow \mathrm{Proj}(n - \eta g_z)

    and with q queries g_z is their mean.

    Args:
        learning_rate: eta, codes for each unit of d loss / d code; a positive number or an optax
            schedule; or "auto" for steps that size themselves (see `zoqo_jax.transforms.sizing`).
        key: all of the run's randomness.
        num_queries: query pairs a step, q.
        query: "aligned", one grid step long, or "off_grid": mu long in values, its end points
            rounded to the nearest code, and g_z = (l+ - l-) / (2 m) r with m what mu is in codes on
            average.
        radius: mu of off-grid queries, as a fraction of the largest magnitude that a block can hold
            (NF4's absmax); a positive number or an optax schedule.
        structure: "dense", "rank_one", "sparse" or another (see `zoqo_jax.directions`); "auto" is
            sparse where nothing about lengths is given, else dense.
        density: expected fraction of coordinates that a sparse direction probes and moves, in (0,
            1]; or an optax schedule of it that never exceeds its first value; "auto" follows the
            loss where steps do, and else is 1.
        rounding: Proj. "stochastic" is unbiased; "nearest" freezes when steps are below half a
            code; "error_feedback" adds what was not applied to the next step, for 4 bytes a code of
            state (`qes` does without); "threshold" moves one code where the step is at least
            `threshold` codes long; "significant" takes a query for a vote of weight l+ - l- and
            moves one code, however long the step, where the votes' sum is at least `threshold` of
            its standard deviations, were every vote's sign a fair coin's (not for a sparse
            structure).
        threshold: in codes for rounding="threshold", 0.5 if None; in standard deviations for
            "significant", 2 if None and at most sqrt(num_queries), which no sum exceeds.
        boundary: "mask" (the paper's stencil stays on the codebook: a coordinate at an edge sits
            out, and so stays there), "clamp" or "reflect"; "auto" is "mask" for a given learning
            rate and "clamp" for steps that size themselves, or nine codes of ten come to stay at
            an edge. Off-grid end points are always clamped.
        query_batch: query pairs evaluated at once, None for all; more is faster and takes more
            memory.
        sides: evaluate the two sides of a pair "together", so that they share decoded weights, or
            "in_turn", with one side's activations in memory; better where tokens are many.
        axis_names: inside `shard_map` or `pmap`, a pair: the name of the axis over which losses are
            averaged, and of that over which queries are divided; None for either. See
            `zoqo_jax.distributed`, which does it for you.
        axis_name: the old name of the first of these.

    Returns:
        A transformation; call `tx.update(None, state, params, value_fn=f)` and
        `optax.apply_updates`. Its state is a `State`.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.eye(4)}, zq.nf4(block=4))
        >>> decay = optax.linear_schedule(1.0, 0.0, 300)
        >>> tx = zq.caq_zo(decay, key=jax.random.key(0), num_queries=4, boundary="clamp")
        >>> loss = lambda params: jnp.sum((params["w"] - 0.5) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(300):
        ...     params, state = step(params, state)
        >>> loss(zq.dequantize(params)).item() < 1.0  # from 4
        True
    """
    sized, learning_rate, _, density, structure = auto.choose(
        "real" if rounding == "error_feedback" else "whole",
        learning_rate,
        "auto" if radius is None else radius,
        density,
        structure,
        usual_radius=1.0,
    )
    if boundary == "auto":
        boundary = "mask" if sized is None else "clamp"
    directions.check_choice("query", query, get_args(Query))
    if (radius is None) != (query == "aligned"):
        raise ValueError(
            f"radius={radius} is not for query={query!r}: give it for 'off_grid' only."
        )
    if radius is not None:
        check_positive("radius", radius)
    directions.check("rademacher", structure, boundary, density)
    directions.check_choice("rounding", rounding, get_args(Rounding))
    usual = 2.0 if rounding == "significant" else 0.5
    least = usual if threshold is None else threshold
    check_positive("threshold", least)
    if rounding == "significant":
        if sized is not None:
            raise ValueError("learning_rate must be a number for 'significant', got 'auto'.")
        if structure == "sparse":
            raise ValueError(f"rounding={rounding!r} is not for structure={structure!r}.")
        if not is_traced(least) and least**2 > num_queries:
            most = f"sqrt(num_queries={num_queries})"
            raise ValueError(f"threshold must be at most {most} for {rounding!r}, got {least}.")
    num_queries, query_batch = stepping.check_query_count(num_queries, query_batch)
    method = _CaqZo(
        learning_rate, radius, structure, density, boundary, rounding, least, num_queries, sized
    )
    spread = spread_over(axis_names, axis_name)
    return Steps(method, key, num_queries, query_batch, sides, spread).transformation()


@dataclasses.dataclass(frozen=True)
class _CaqZo(Method):
    learning_rate: Schedule
    radius: Schedule | None
    structure: Structure
    density: Schedule | Array
    boundary: Boundary
    rounding: Rounding
    threshold: float | Array
    num_queries: int
    sizing: Sizing | None = None

    def direction(
        self, key: Array, array: QuantizedArray, count: Array, size: Array | None = None
    ) -> Direction:
        """See `Method`."""
        radius = self.radius
        return directions.describe(
            key,
            array,
            distribution="rademacher",
            structure=self.structure,
            boundary=self.boundary if radius is None else "clamp",
            **self.lengths(array, count, size, self.density, radius=1.0),
            off_grid=None if radius is None else value_at(radius, count) * array.grid.largest,
        )

    def code_step(
        self, rows: Rows, array: QuantizedArray, direction_sum: Array, step: State, residual: Any
    ) -> tuple[Array, Any]:
        """See `Method`."""
        if self.rounding == "significant":
            sizes, per_unit = queries.whole(step.info.loss_differences)
            votes = -direction_sum * per_unit
            return projection.significant(votes, sizes, self.threshold), residual
        length = self._length(step, array, direction_sum)
        if self.rounding == "stochastic":
            return self.rounded(rows, length), residual
        if self.rounding == "nearest":
            return projection.nearest(length), residual
        if self.rounding == "threshold":
            return projection.threshold(length, self.threshold), residual
        return projection.error_feedback(length, residual)

    def _length(
        self, step: State, array: QuantizedArray, direction_sum: Array
    ) -> Float[Array, "..."]:
        """-eta g_z in codes."""
        if self.sizing is not None:
            return -direction_sum
        mean_slope = np.float32(0.5 / self.num_queries)
        if self.radius is not None:
            codes = np.float32(array.grid.largest / array.grid.spacing)  # of a radius of one
            mean_slope = mean_slope / codes * inverse_at(self.radius, step.count)
        return -(value_at(self.learning_rate, step.count) * mean_slope) * direction_sum

    def init_residual(self, array: QuantizedArray) -> Array | None:
        """See `Method`."""
        needs_one = self.rounding == "error_feedback"
        return jnp.zeros(array.shape, jnp.int32) if needs_one else None
