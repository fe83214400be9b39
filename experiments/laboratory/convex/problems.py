"""What is minimised: quadratics, and logistic regressions on made-up features and on digits."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.attack import data

__all__ = ["Problem", "digits", "logistic", "quadratic"]

_POOLED = 4  # pixels on a side that become one


class Problem(NamedTuple):
    """What is to be minimised.

    Attributes:
      loss: of a point, less that of the optimum.
      optimum: the point of least loss.
      hessian: the loss's there.
    """

    loss: Callable[[Array], Array]
    optimum: Float[Array | np.ndarray, " d"]
    hessian: Float[Array | np.ndarray, "d d"]


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


def digits(images: int, decay: float) -> tuple[Problem, float]:
    """Logistic regression that tells even digits from odd ones, of the bundled MNIST images.

    Args:
      images: how many; a feature is the mean of 4 x 4 pixels less its mean over images, or a 1.
      decay: lambda in lambda |w|^2 / 2.

    Returns:
      The problem, and the greatest trace that its Hessian has anywhere, that of zero weights.

    Example:
      >>> problem, trace = digits(200, 0.01)
      >>> problem.optimum.shape, bool(trace > jnp.trace(problem.hessian))
      ((50,), True)
      >>> bool(jnp.abs(jax.grad(problem.loss)(jnp.asarray(problem.optimum))).max() < 1e-6)
      True
    """
    features, signs, optimum, hessian = _regression(images, decay)
    x, y = jnp.asarray(features), jnp.asarray(signs)

    def loss(w: Array) -> Array:
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 * decay * (w @ w)

    least = loss(jnp.asarray(optimum))
    trace = (features**2).sum() / (4 * len(features)) + decay * features.shape[1]
    return Problem(lambda w: loss(w) - least, optimum, hessian), float(trace)


@functools.cache
def _regression(images: int, decay: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels of 1 and -1, the optimum, by Newton's method, and the Hessian there."""
    pictures, classes = data.load("mnist")
    side = pictures.shape[1] // _POOLED
    pooled = pictures[:images].reshape(-1, side, _POOLED, side, _POOLED).mean(axis=(2, 4))
    x = pooled.reshape(len(pooled), -1).astype(np.float64)
    x = np.append(x - x.mean(axis=0), np.ones((len(x), 1)), axis=1)
    y = np.where(classes[:images] % 2 == 0, 1.0, -1.0)
    w = np.zeros(x.shape[1])
    for _ in range(20):
        chances = 1 / (1 + np.exp(y * (x @ w)))
        gradient = decay * w - x.T @ (y * chances) / len(x)
        hessian = decay * np.eye(len(w)) + x.T @ (x * (chances * (1 - chances))[:, None]) / len(x)
        w = w - np.linalg.solve(hessian, gradient)
    features, signs, optimum, hessian = (one.astype(np.float32) for one in (x, y, w, hessian))
    return features, signs, optimum, hessian
