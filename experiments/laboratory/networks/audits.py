"""Audits that end a run, and chords that the grid cuts short."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import zoqo_jax as zq
from experiments.laboratory.networks.models import Params
from zoqo_jax.analysis.certificates import Gate, GateState
from zoqo_jax.directions import Direction

__all__ = ["audit", "clipped"]


def audit(
    gate: Gate, params: Params, loss: Callable[[Any], jax.Array], calls: int
) -> tuple[Params, GateState]:
    """Parameters and the gate's state after audits, as many as it wants, or `calls` at most."""

    def goes_on(carry: Any) -> jax.Array:
        stop, _, state = carry
        return ~stop & (state.count < calls)

    def call(carry: Any) -> Any:
        _, params, state = carry
        stop, state = gate.update(state, loss, params)
        return stop, gate.accept(state, params), state

    start = (jnp.array(False), params, gate.init(params))
    return jax.lax.while_loop(goes_on, call, start)[1:]


def clipped(directions: Sequence[Direction], params: Params) -> jax.Array:
    """Of the codes that a direction probes, the share of those whose chord is cut short."""
    ends = [
        [layer["kernel"].codes.astype(jnp.int16) for layer in end]
        for end in (zq.queries.endpoints(params, directions, side) for side in (1, -1))
    ]
    cut = probed = jnp.int32(0)
    for direction, layer, plus, minus in zip(directions, params, *ends, strict=True):
        u = direction.draw(layer["kernel"])
        cut += jnp.sum(plus - minus != 2 * u, dtype=jnp.int32)
        probed += jnp.sum(u != 0, dtype=jnp.int32)
    return cut / jnp.maximum(probed, 1)
