"""CAQ-ZO: compander-aligned queries for zeroth-order optimization.

Yao Shu and Zilin Zhu, "Compander-Aligned Query Geometry for Quantized Zeroth-Order Optimization",
2026, arXiv:2605.10673. Queries are one grid step long in the coordinate z where the codebook is
uniform, so both end points are codebook points and rounding them changes nothing.
"""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from zoqo_jax import projection, stencils
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.draws import Rows
from zoqo_jax.projection import Rounding
from zoqo_jax.queries import Sides
from zoqo_jax.stencils import Boundary, Stencil, Structure
from zoqo_jax.transforms import stepping
from zoqo_jax.transforms.stepping import Rules, Schedule, value_at

__all__ = ["caq_zo"]


def caq_zo(
    learning_rate: Schedule,
    *,
    key: PRNGKeyArray,
    num_queries: int = 1,
    structure: Structure = "dense",
    density: Schedule | Array = 1.0,
    rounding: Rounding = "stochastic",
    threshold: float = 0.5,
    boundary: Boundary = "mask",
    query_batch: int | None = 1,
    sides: Sides = "together",
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
            schedule.
        key: all of the run's randomness.
        num_queries: query pairs a step, q.
        structure: "dense", "rank_one" or "sparse" (see `zoqo_jax.stencils`).
        density: expected fraction of coordinates that a sparse direction probes and moves, in (0,
            1]; or an optax schedule of it that never exceeds its first value.
        rounding: Proj. "stochastic" is unbiased; "nearest" freezes when steps are below half a
            code; "error_feedback" adds what was not applied to the next step, for 4 bytes a code of
            state; "threshold" moves one code where the step is at least `threshold` codes long.
        threshold: in codes, for rounding="threshold".
        boundary: "mask" (the paper's stencil stays on the codebook: a coordinate at an edge sits
            out, and so stays there), "clamp" or "reflect".
        query_batch: query pairs evaluated at once, None for all; more is faster and takes more
            memory.
        sides: evaluate the two sides of a pair "together", so that they share decoded weights, or
            "in_turn", with one side's activations in memory; better where tokens are many.
        axis_name: inside `shard_map` or `pmap`, average the losses over this axis.

    Returns:
        A transformation; call `tx.update(None, state, params, value_fn=f)` and
        `optax.apply_updates`. Its state is a `StepState`.

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
    stepping.check_positive("learning_rate", learning_rate)
    stepping.check_positive("threshold", threshold)
    stencils.check("rademacher", structure, boundary, density)
    stencils.check_choice("rounding", rounding, get_args(Rounding))
    mean_over_2 = float(np.float32(0.5 / num_queries)) if num_queries > 0 else 0.0

    def describe(key: Array, array: QuantizedArray, count: Array) -> Stencil:
        return stencils.describe(
            key,
            array,
            1.0,
            law="rademacher",
            structure=structure,
            boundary=boundary,
            **stencils.scheduled(density, count),
        )

    def weigh(difference: Array, r: Array) -> Float[Array, "..."]:
        return difference * r.astype(jnp.float32)

    def move(
        rows: Rows, array: QuantizedArray, total: Array, count: Array, residual: Any
    ) -> tuple[Array, Any]:
        step = -(value_at(learning_rate, count) * mean_over_2) * total
        if rounding == "stochastic":
            return stepping.rounded_at_random(rows, step), residual
        if rounding == "nearest":
            return projection.nearest(step), residual
        if rounding == "threshold":
            return projection.threshold(step, threshold), residual
        return projection.error_feedback(step, residual)

    def remember(array: QuantizedArray) -> Array:
        return jnp.zeros(array.shape, jnp.int32)

    rules = Rules(describe, weigh, move, remember if rounding == "error_feedback" else None)
    return stepping.by_queries(rules, key, num_queries, query_batch, sides, axis_name)
