"""ZOQO: zero-order quantized optimization.

Noga Bar and Raja Giryes, "ZOQO: Zero-Order Quantized Optimization", 2025, arXiv:2501.06736,
Algorithm 1. Weights, noise and update all live on the quantizer's grid, and only the sign of a loss
difference is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from zoqo_jax import directions
from zoqo_jax.directions import Boundary, Contribution, Direction, Distribution, Structure
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.transforms import auto
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.queries import Sides
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, value_at
from zoqo_jax.transforms.sizing import Sizing
from zoqo_jax.transforms.spreading import AxisNames, spread_over
from zoqo_jax.transforms.state import State
from zoqo_jax.transforms.stepping import Method, Steps
from zoqo_jax.xla.random_bits import Rows

__all__ = ["zoqo"]

Vote = Literal["mean", "majority"]
StepRule = Literal["floor", "dithered"]


def zoqo(
    learning_rate: Schedule | Auto = "auto",
    radius: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    num_queries: Count = ONE,
    noise: Distribution | Auto = "auto",
    structure: Structure | Auto = "auto",
    density: Schedule | Array | Auto = "auto",
    vote: Vote = "mean",
    step: StepRule = "floor",
    boundary: Boundary = "clamp",
    query_batch: Count | None = ONE,
    sides: Sides = "together",
    axis_names: AxisNames | None = None,
    axis_name: str | None = None,
    num_comparisons: Count | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Quantized sign descent along integer noise, two forward passes for each query.

    With s the step of the grid and n the codes, one step is

    .. math::
        m &= \max(\lfloor \mu / s \rfloor, 1), \quad u \in \{-m, \dots, m\}^d \\
        n_\pm &= \mathrm{clamp}(n \pm u), \quad g = \mathrm{sign}(\ell_+ - \ell_-)\,\mathrm{sign}(u)
        \\ E &= \max(\lfloor \eta / s \rfloor, 1), \quad n \leftarrow \mathrm{clamp}(n - E g)

    On a companded grid, s is the mean distance between levels.

    Args:
        learning_rate: eta, value units; a positive number or an optax schedule; or "auto" for steps
            that size themselves (see `zoqo_jax.transforms.sizing`), each along the signs of queries
            that lower the loss enough.
        radius: mu, value units; a positive number or an optax schedule; "auto" follows the loss
            where steps do, and else is eta.
        key: all of the run's randomness.
        num_queries: query pairs a step, q.
        noise: distribution of an entry of u: "uniform" or "gaussian" on {-m .. m}, "rademacher" on
            {-m, m}; "auto" is the last where steps size themselves, else the first.
        structure: of u: "dense", "rank_one", "sparse" or another (see `zoqo_jax.directions`);
            "auto" is sparse where nothing about lengths is given, else dense.
        density: expected fraction of coordinates that a sparse direction probes and moves, in (0,
            1]; or an optax schedule of it that never exceeds its first value; "auto" follows the
            loss where steps do, and else is 1. It is the step size
            of few-bit codes.
        vote: for q > 1, g is the sign of the mean of (l+ - l-) u ("mean") or of the sum of the
            single queries' signs ("majority").
        step: "floor", the paper's E, or "dithered": E = floor(eta / s + U) with U uniform in [0, 1)
            for each coordinate, so that one that was probed moves eta on average even below one
            code. Where mu < s an entry of u is then zero with probability 1 - mu / s, and zeros
            do not move: eta = mu < s moves (eta / s)^2 of the codes, eta = s moves mu / s of them.
        boundary: "clamp" (the paper's), "mask" or "reflect".
        query_batch: query pairs evaluated at once, None for all; more is faster and takes more
            memory.
        sides: evaluate the two sides of a pair "together", so that they share decoded weights, or
            "in_turn", with one side's activations in memory; better where tokens are many.
        axis_names: inside `shard_map` or `pmap`, a pair: the name of the axis over which losses are
            averaged, or comparisons added up, and of that over which queries are divided; None for
            either. See `zoqo_jax.distributed`, which does it for you.
        axis_name: the old name of the first of these.
        num_comparisons: for a noisy `compare_fn(a, b, key)`, how often to ask it about each query;
            the majority counts. None for one that is asked once, without a key.

    Returns:
        A transformation; call `tx.update(None, state, params, value_fn=f)` and
        `optax.apply_updates`. Its state is a `State`. Where no loss is to be had, give
        `compare_fn=` instead: `compare_fn(a, b)` is -1 where the parameters `a` are better than
        `b`, 1 where they are worse, 0 for a draw (see `queries.verdicts`); g is made of these
        signs. Each comparison counts as two evaluations.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.zeros((2, 2))}, zq.Quantizer(bits=8, range=1.0))
        >>> tx = zq.zoqo(learning_rate=0.05, radius=0.02, key=jax.random.key(0))
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

        Of a judge that tells no more than which is better:

        >>> judge = lambda a, b: jnp.sign(loss(a) - loss(b))
        >>> updates, state = tx.update(None, state, params, compare_fn=judge)
        >>> state.info.loss_differences.item() in (-1.0, 0.0, 1.0), state.info.evaluations.item()
        (True, 202)
    """
    sized, learning_rate, radius, density, structure = auto.choose(
        "signs", learning_rate, radius, density, structure
    )
    if noise == "auto":
        noise = "uniform" if sized is None else "rademacher"
    directions.check(noise, structure, boundary, density)
    directions.check_choice("vote", vote, get_args(Vote))
    directions.check_choice("step", step, get_args(StepRule))
    method = _Zoqo(
        learning_rate,
        radius,
        noise,
        structure,
        density,
        boundary,
        is_dithered=step == "dithered",
        contribution="signs" if vote == "majority" or num_queries == 1 else "product",
        sizing=sized,
    )
    spread = spread_over(axis_names, axis_name)
    steps = Steps(method, key, num_queries, query_batch, sides, spread, num_comparisons)
    return steps.transformation()


@dataclasses.dataclass(frozen=True)
class _Zoqo(Method):
    learning_rate: Schedule
    radius: Schedule
    noise: Distribution
    structure: Structure
    density: Schedule | Array
    boundary: Boundary
    is_dithered: bool
    contribution: Contribution
    sizing: Sizing | None = None
    takes_comparisons = True

    def direction(
        self, key: Array, array: QuantizedArray, count: Array, size: Array | None = None
    ) -> Direction:
        """See `Method`."""
        given = {"unit": "values", "dithered": self.is_dithered}
        mu = value_at(self.radius, count)
        return directions.describe(
            key,
            array,
            distribution=self.noise,
            structure=self.structure,
            boundary=self.boundary,
            **self.lengths(array, count, size, self.density, radius=mu, **given),
        )

    def code_step(
        self, rows: Rows, array: QuantizedArray, direction_sum: Array, step: State, residual: Any
    ) -> tuple[Array, Any]:
        """See `Method`."""
        if self.sizing is not None:
            return self.rounded(rows, -direction_sum), residual
        eta, s = value_at(self.learning_rate, step.count), array.step
        g = jnp.sign(direction_sum).astype(jnp.int16)
        if self.is_dithered:
            E = directions.dithered_steps(rows, eta / s, array)
        else:
            E = array.broadcast_scales(directions.radius_in_codes(eta / s, array.grid))
        return -E * g, residual
