"""Replay: a trained model from the base model and a log of a few bytes a step.

A step is determined by the run's key, its count and the differences of its losses, or where steps
size themselves, by how far each query's direction was gone along; everything else is drawn again.
No forward pass is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

__all__ = ["replay"]


def replay(
    params: PyTree,
    log: Float[ArrayLike, "steps queries ..."],
    tx: optax.GradientTransformationExtraArgs,
    **extra: Any,
) -> PyTree:
    """Rebuild the codes of a run, bit for bit.

    Args:
        params: the quantized tree that the run began with.
        log: `state.info.log` of each of its steps, in order.
        tx: a transformation made with the run's arguments and key.
        extra: what else each step was given, as `guides`.

    Returns:
        The tree that the run ended with.

    Raises:
        ValueError: `log` has not the axes that `info.log` has and one for steps, or not the queries
            of `tx`.

    Examples:
        >>> import zoqo_jax as zq
        >>> start = zq.quantize({"w": jnp.zeros((2, 2))}, zq.Quantizer(range=1.0))
        >>> tx = zq.zoqo(0.1, 0.1, key=jax.random.key(0))
        >>> params, state, log = start, tx.init(start), []
        >>> for _ in range(5):
        ...     updates, state = tx.update(None, state, params, value_fn=lambda p: p["w"].sum())
        ...     params = optax.apply_updates(params, updates)
        ...     log.append(state.info.log)
        >>> again = zq.replay(start, jnp.stack(log), tx)
        >>> bool((again["w"].codes == params["w"].codes).all())
        True
    """
    info = optax.tree.get(tx.init(params), "info")
    if jnp.ndim(log) != 1 + info.log.ndim:
        is_sized = info.log is info.record
        axes = ("steps", "queries", "2" if is_sized else "examples")[: 1 + info.log.ndim]
        raise ValueError(f"log must have shape ({', '.join(axes)}), got {jnp.shape(log)}.")

    def step(
        carry: tuple[PyTree, PyTree], differences: Array
    ) -> tuple[tuple[PyTree, PyTree], None]:
        params, state = carry
        updates, state = tx.update((), state, params, differences=differences, **extra)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: PyTree, log: Array) -> PyTree:
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), log)
        return params

    return run(params, jnp.asarray(log, jnp.float32))
