"""Descents by queries: methods, at rates that mean the same to all of them on every grid.

A *rate*, a schedule near 1, is the part of 1 / (share of coordinates moved x trace of the Hessian)
that gradient descent would have for its learning rate. Methods of signs know no gradient's length;
for them it is the part of a tenth of the range that a coordinate moves. Networks, whose Hessian
nobody knows, have rates of their own: `experiments.laboratory.networks.methods`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PRNGKeyArray

import zoqo_jax as zq

__all__ = ["FLOATS", "METHODS", "RATES", "at_each_rate", "descend", "falling", "make"]

Rate = Callable[[Array], Array]
Maker = Callable[..., optax.GradientTransformationExtraArgs]

_SIGNS: dict[str, Maker] = {
    "ZOQO": zq.zoqo,
    "ZOQO, dithered": lambda *args, **options: zq.zoqo(*args, step="dithered", **options),
}
_NO_FEEDBACK = 1e-9  # of the residual, nothing is left that would round to a step
_SLOPES: dict[str, Maker] = {
    "CAQ-ZO, stochastic": lambda rate, **options: zq.caq_zo(rate, boundary="clamp", **options),
    "CAQ-ZO, error feedback": lambda rate, **options: zq.caq_zo(
        rate, boundary="clamp", rounding="error_feedback", **options
    ),
    "CAQ-ZO, nearest": lambda rate, **options: zq.caq_zo(
        rate, boundary="clamp", rounding="nearest", **options
    ),
    "QuZO": zq.quzo,
    "QES": lambda rate, **options: zq.qes(rate, window=None, **options),
    "QES, no feedback": lambda rate, **options: zq.qes(
        rate, window=None, decay=_NO_FEEDBACK, **options
    ),
}
METHODS = (*_SIGNS, *_SLOPES)
FLOATS = "ZO-SGD, floats"
RATES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Each method descends at its best of these."""


def make(
    method: str,
    rate: Rate,
    *,
    key: PRNGKeyArray,
    spacing: float,
    trace: Array | float,
    range: float = 1.0,
    density: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """A method that probes one code away, or in floats by so much.

    Args:
      method: one of `METHODS`, or `FLOATS`.
      rate: steps taken -> rate.
      key: of the run.
      spacing: of the uniform grid, value units.
      trace: of the Hessian.
      range: how far the grid reaches on either side.
      density: share of the coordinates in a direction; below 1 it is sparse. Floats have all.

    Example:
      >>> tx = make("QuZO", lambda t: 1.0, key=jax.random.key(0), spacing=0.1, trace=2.0)
    """
    if method == FLOATS:
        learning_rate = lambda count: rate(count) / trace  # noqa: E731
        probe = zq.spsa(spacing, key=key, noise="gaussian")
        return optax.chain(probe, optax.scale_by_schedule(lambda count: -learning_rate(count)))
    options = {"key": key}
    if density < 1:
        options |= {"structure": "sparse", "density": density}
    if method in _SIGNS:
        return _SIGNS[method](lambda count: 0.1 * range * rate(count), spacing, **options)
    unit = 1 / (density * trace * spacing**2)  # codes for a unit of d loss / d code
    return _SLOPES[method](lambda count: unit * rate(count), **options)


def falling(first: Array | float, steps: int) -> Rate:
    """A schedule that falls to 1/32 of its first value in half of the steps, and stays there.

    Example:
      >>> schedule = falling(32.0, 100)
      >>> [schedule(jnp.int32(step)).round(3).item() for step in (0, 25, 50, 99)]
      [32.0, 5.657, 1.0, 1.0]
    """

    def schedule(count: Array) -> Array:
        done = jnp.minimum(count.astype(jnp.float32) / (0.5 * steps), 1.0)
        return first * 32.0**-done

    return schedule


def descend(
    tx: optax.GradientTransformationExtraArgs,
    loss: Callable[[Any], Array],
    params: Any,
    steps: int,
    observe: Callable[[Any], Any],
) -> Any:
    """Take so many steps, and stack what `observe(params)` gives after each.

    Example:
      >>> tx = zq.zoqo(0.02, 0.02, key=jax.random.key(0))
      >>> w = zq.Quantizer(range=1.0)(jnp.zeros(2))
      >>> loss = lambda x: jnp.sum((x - 0.5) ** 2)
      >>> losses = descend(tx, loss, w, 200, lambda w: loss(zq.dequantize(w)))
      >>> losses.shape, losses[-1].item() < 0.01
      ((200,), True)
    """

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), observe(params)

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1]


def at_each_rate(run: Callable[..., Any], keys: Key[Array, " runs"], over: Any = None) -> Any:
    """What a descent gives, for each key and rate, in one compiled program.

    Args:
      run: (key, rate) -> arrays; with `over`, (key, rate, one of them).
      keys: of the runs.
      over: an array of whatever else differs.

    Returns:
      Arrays of (rates, runs, ...) or (over, rates, runs, ...).

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> at_each_rate(lambda key, rate: 2 * rate, keys)[:, 1]
      array([ 0.125,  0.5  ,  2.   ,  8.   , 32.   ], dtype=float32)
      >>> at_each_rate(lambda key, rate, x: x * rate, keys, jnp.arange(3.0)).shape
      (3, 5, 2)
    """
    more = () if over is None else (over,)
    rest = (None,) * len(more)
    each = jax.vmap(jax.vmap(run, (0, None, *rest)), (None, 0, *rest))
    if more:
        each = jax.vmap(each, (None, None, 0))
    rates = jnp.asarray(RATES, jnp.float32)
    return jax.tree.map(np.asarray, jax.jit(each)(keys, rates, *more))
