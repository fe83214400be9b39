"""QES: error feedback in code space, without keeping the error.

Yinggan Xu, Risto Miikkulainen and Xin Qiu, "Quantized Evolution Strategies: High-precision
Fine-tuning of Quantized LLMs at Low-precision Cost", 2026, arXiv:2602.03120. What rounding left of
a step is due later. Instead of a number for every code, the run remembers what it heard in its last
steps, a few numbers each, and makes what is due from their directions again. The paper weighs a
population by its normalised fitness; here, as everywhere in this library, queries come in pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from zoqo_jax.directions import Boundary, Structure
from zoqo_jax.grids import projection
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.transforms import auto
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.queries import Sides
from zoqo_jax.transforms.rounded import Noise, RoundedDescent
from zoqo_jax.transforms.schedules import ONE, Count, Schedule, check_count, is_traced
from zoqo_jax.transforms.spreading import AxisNames, spread_over
from zoqo_jax.transforms.state import State
from zoqo_jax.transforms.stepping import Steps
from zoqo_jax.xla.random_bits import Rows

__all__ = ["qes"]

_FIFTY = np.int64(50)  # as `ONE`


def qes(
    learning_rate: Schedule | Auto = "auto",
    radius: Schedule | Auto = "auto",
    *,
    key: PRNGKeyArray,
    window: Count | None = _FIFTY,
    decay: float | Array = 0.9,
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
    r"""Descent along rounded directions, with what each step's rounding left over due later.

    In code units, with Q a stochastic rounding, e the residual and gamma its decay, one step is

    .. math::
        u &\sim N(0, I), \quad n_\pm = n \pm Q(\mu u), \quad
        g = \frac{\ell_+ - \ell_-}{2 \mu^2} Q(\mu u) \\
        v &= \gamma e - \eta g, \quad n \leftarrow n + \mathrm{round}(v), \quad
        e \leftarrow v - \mathrm{round}(v)

    and with q queries g is their mean. What the grid's edge cuts off is not due later.

    Args:
        learning_rate: eta, codes for each unit of d loss / d code; a positive number or an optax
            schedule; or "auto" for steps that size themselves (see `zoqo_jax.transforms.sizing`).
        radius: mu, codes; a positive number or an optax schedule; "auto" follows the loss where
            steps do, and else is 1.
        key: all of the run's randomness.
        window: how many steps back the residual is made from, starting at zero: the state holds
            their differences, and an update draws that many steps' directions more. None keeps the
            residual, 4 bytes a code of state. Up to the window's length both are the same bit for
            bit, but for boundary="mask", where the codes as they are now stand for the past's.
        decay: gamma, in (0, 1]; what is older than a window counts little where decay^window is
            small.
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
        >>> tx = zq.qes(learning_rate=5e2, radius=2.0, key=jax.random.key(0), window=10)
        >>> loss = lambda params: jnp.sum((params["w"] - 0.5) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     updates, state = tx.update(None, state, params, value_fn=loss)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> loss(zq.dequantize(params)).item() < 0.05, state.recent[0].shape
        (True, (10, 1))
    """
    check_count("window", window, or_none=True)
    if not is_traced(decay) and not 0.0 < decay <= 1.0:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")
    sized, learning_rate, radius, density, structure = auto.choose(
        "real", learning_rate, radius, density, structure, usual_radius=1.0
    )
    method = _Qes(
        learning_rate,
        radius,
        num_queries,
        noise,
        structure,
        density,
        boundary,
        decay,
        window,
        sizing=sized,
    )
    spread = spread_over(axis_names, axis_name)
    return Steps(method, key, num_queries, query_batch, sides, spread).transformation()


@dataclasses.dataclass(frozen=True)
class _Qes(RoundedDescent):
    decay: float | Array
    window: Count | None = None

    def code_step(
        self, rows: Rows, array: QuantizedArray, direction_sum: Array, step: State, residual: Any
    ) -> tuple[Array, Any]:
        """See `Method`."""
        return projection.error_feedback(self.length(step, direction_sum), residual, self.decay)

    def init_residual(self, array: QuantizedArray) -> Array | None:
        """See `Method`."""
        return jnp.zeros(array.shape, jnp.int32)
