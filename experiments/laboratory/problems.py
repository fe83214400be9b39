"""Small convex problems whose optimum and Hessian are known, and descents on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

__all__ = ["Problem", "descend", "falling", "logistic", "quadratic"]


class Problem(NamedTuple):
    """What is to be minimised.

    Attributes:
      loss: of a point, less that of the optimum.
      optimum: the point of least loss.
      hessian: the loss's there.
    """

    loss: Callable[[Array], Array]
    optimum: Float[Array, " d"]
    hessian: Float[Array, "d d"]


def quadratic(key: Key[Array, ""], dimension: int, *, condition: float) -> Problem:
    """A quadratic of curvatures from 1 to `condition` along random axes, optimum within +-0.7.

    Example:
      >>> problem = quadratic(jax.random.key(0), 3, condition=4.0)
      >>> jnp.linalg.eigvalsh(problem.hessian).round(3).tolist()
      [1.0, 2.0, 4.0]
    """
    axes_key, optimum_key = jax.random.split(key)
    optimum = jax.random.uniform(optimum_key, (dimension,), minval=-0.7, maxval=0.7)
    axes = jnp.linalg.qr(jax.random.normal(axes_key, (dimension, dimension)))[0]
    hessian = (axes * jnp.geomspace(1.0, condition, dimension)) @ axes.T

    def loss(x: Array) -> Array:
        return 0.5 * (x - optimum) @ (hessian @ (x - optimum))

    return Problem(loss, optimum, hessian)


def logistic(key: Key[Array, ""], dimension: int, *, examples: int) -> Problem:
    """Logistic regression on Gaussian features, whose labels are a teacher's probabilities.

    With labels that are no coin flips but probabilities, the teacher's weights are the optimum.

    Example:
      >>> problem = logistic(jax.random.key(0), 3, examples=50)
      >>> problem.loss(problem.optimum).item(), problem.loss(0 * problem.optimum).item() > 0.01
      (0.0, True)
    """
    features_key, optimum_key = jax.random.split(key)
    optimum = jax.random.uniform(optimum_key, (dimension,), minval=-0.7, maxval=0.7)
    features = jax.random.normal(features_key, (examples, dimension))
    chances = jax.nn.sigmoid(features @ optimum)
    hessian = features.T @ (features * (chances * (1 - chances))[:, None]) / examples

    def cross_entropy(x: Array) -> Array:
        scores = features @ x
        return jnp.mean(jax.nn.softplus(scores) - chances * scores)

    least = cross_entropy(optimum)
    return Problem(lambda x: cross_entropy(x) - least, optimum, hessian)


def descend(
    tx: optax.GradientTransformationExtraArgs,
    loss: Callable[[Any], Array],
    start: tuple[Any, Any],
    steps: int,
    observe: Callable[[Any], Any],
) -> tuple[tuple[Any, Any], Any]:
    """Take steps from (params, state), and stack what `observe(params)` gives after each.

    Example:
      >>> import zoqo_jax as zq
      >>> tx = zq.zoqo(0.02, 0.02, key=jax.random.key(0))
      >>> w = zq.Quantizer(range=1.0)(jnp.zeros(2))
      >>> loss = lambda x: jnp.sum((x - 0.5) ** 2)
      >>> _, losses = descend(tx, loss, (w, tx.init(w)), 200, lambda w: loss(zq.dequantize(w)))
      >>> losses.shape, losses[-1].item() < 0.01
      ((200,), True)
    """

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), observe(params)

    return jax.lax.scan(step, start, None, length=steps)


def falling(first: Array | float, steps: int) -> Callable[[Array], Array]:
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
