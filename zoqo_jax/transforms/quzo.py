"""QuZO: quantized zeroth-order fine-tuning, unbiased by rounding one direction twice.

Jiajun Zhou, Yifan Yang, Kai Zhen, Ziyue Liu, Yequan Zhao, Ershad Banijamali, Athanasios Mouchtaris,
Ngai Wong and Zheng Zhang, "QuZO: Quantized Zeroth-Order Fine-Tuning for Large Language Models",
2025, arXiv:2502.12346. A direction is rounded at random to whole codes to be probed. Were the
update to go along that same rounded direction, the rounding's variance would lengthen the estimate;
along an independent rounding of the same direction it is right on average.
"""

from __future__ import annotations

from typing import Any

import optax
from jaxtyping import Array, PRNGKeyArray

from zoqo_jax.directions import Boundary, Direction, Structure
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.transforms import auto
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.queries import Sides
from zoqo_jax.transforms.rounded import Noise, RoundedDescent
from zoqo_jax.transforms.schedules import ONE, Count, Schedule
from zoqo_jax.transforms.spreading import AxisNames, spread_over
from zoqo_jax.transforms.state import State
from zoqo_jax.transforms.stepping import Steps
from zoqo_jax.xla.random_bits import Rows

__all__ = ["quzo"]


def quzo(
    learning_rate: Schedule | Auto = "auto",
    radius: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    num_queries: Count = ONE,
    noise: Noise = "gaussian",
    structure: Structure | Auto = "auto",
    density: Schedule | Array | Auto = "auto",
    boundary: Boundary = "clamp",
    query_batch: Count | None = ONE,
    sides: Sides = "together",
    axis_names: AxisNames | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Descent along real-valued directions rounded at random, two forward passes for each query.

    In code units, with Q1 and Q2 two independent stochastic roundings, one step is

    .. math::
        u &\sim N(0, I), \quad n_\pm = n \pm Q_1(\mu u) \\
        g &= \frac{\ell_+ - \ell_-}{2 \mu^2} Q_2(\mu u), \quad n \leftarrow Q(n - \eta g)

    and with q queries g is their mean, rounded once. On a quadratic E[n] moves by exactly -eta
    times the gradient, however small mu is, as long as no end point leaves the grid.

    Args:
        learning_rate: eta, codes for each unit of d loss / d code; a positive number or an optax
            schedule; or "auto" for steps that size themselves (see `zoqo_jax.transforms.sizing`).
        radius: mu, codes; a positive number or an optax schedule; "auto" follows the loss where
            steps do, and else is 1.
        key: all of the run's randomness.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of u: standard "gaussian" or "rademacher".
        structure: "dense", "rank_one", "sparse" or another (see `zoqo_jax.directions`); "auto" is
            sparse where nothing about lengths is given, else dense.
        density: expected fraction of coordinates that a sparse direction probes and moves, in (0,
            1]; or an optax schedule of it that never exceeds its first value; "auto" follows the
            loss where steps do, and else is 1.
        boundary: "clamp", "mask" or "reflect".
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
        >>> params = zq.quantize({"w": jnp.zeros((2, 2))}, zq.Quantizer(bits=8, range=1.0))
        >>> tx = zq.quzo(learning_rate=2e3, radius=2.0, key=jax.random.key(0))
        >>> loss = lambda params: jnp.sum((params["w"] - 0.5) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> loss(zq.dequantize(params)).item() < 0.05, state.info.evaluations.item()
        (True, 200)
    """
    sized, learning_rate, radius, density, structure = auto.choose(
        "whole", learning_rate, radius, density, structure, usual_radius=1.0
    )
    method = _Quzo(
        learning_rate, radius, num_queries, noise, structure, density, boundary, sizing=sized
    )
    spread = spread_over(axis_names, axis_name)
    return Steps(method, key, num_queries, query_batch, sides, spread).transformation()


class _Quzo(RoundedDescent):
    def update_direction(self, probed: Direction) -> Direction:
        """See `Method`: the independent rounding."""
        return probed.rounded_again()

    def code_step(
        self, rows: Rows, array: QuantizedArray, direction_sum: Array, step: State, residual: Any
    ) -> tuple[Array, Any]:
        """See `Method`."""
        return self.rounded(rows, self.length(step, direction_sum)), residual
