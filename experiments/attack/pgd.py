"""Projected gradient descent: what the gradients of a network find in a ball around an image.

The attacks here see no gradients. This one does, so it tells which images have an adversarial
example that an attack could have found. It also makes the images of adversarial training
(Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018,
arXiv 1706.06083).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.attack.attack import margin_of
from experiments.attack.models import LogitsFn

__all__ = ["find", "random_start", "uphill"]

_BATCH = 64


def random_start(images: jax.Array, key: jax.Array, epsilon: jax.Array | float) -> jax.Array:
    """A random point of the ball around each image, cut off at 0 and 1.

    Args:
      images: (n, height, width, channels) in [0, 1].
      key: of the points.
      epsilon: radius of the l_inf ball, in pixel values.

    Example:
      >>> x = random_start(jnp.zeros((1, 2, 2, 1)), jax.random.key(0), 0.1)
      >>> bool((x >= 0).all() & (x <= 0.1).all())
      True
    """
    start = jax.random.uniform(key, images.shape, minval=-1.0, maxval=1.0) * epsilon
    return jnp.clip(images + start, 0.0, 1.0)


def uphill(
    loss_of: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    images: jax.Array,
    epsilon: jax.Array | float,
    size: jax.Array | float,
) -> jax.Array:
    """One step of the sign of the gradient, back into the ball and between 0 and 1.

    Args:
      loss_of: images to a loss, which is to rise.
      x: where the search stands, as `images`.
      images: (n, height, width, channels) in [0, 1], the balls' centres.
      epsilon: radius of the l_inf ball, in pixel values.
      size: of the step, in pixel values.

    Example:
      >>> uphill(jnp.sum, jnp.full((1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1), 0.5), 0.1, 0.3).item()
      0.6
    """
    x = x + size * jnp.sign(jax.grad(loss_of)(x))
    return jnp.clip(jnp.clip(x, images - epsilon, images + epsilon), 0.0, 1.0)


def find(
    logits_fn: LogitsFn,
    images: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    *,
    restarts: int = 20,
    steps: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Which images have an adversarial example in the ball that gradients of the margin find.

    From `restarts` random points of the ball `steps` steps each, the last ones ever shorter, as the
    step falls along a line from a quarter of the radius to nothing.

    Args:
      logits_fn: a differentiable JAX function, images to logits.
      images: (n, height, width, channels) in [0, 1].
      labels: integers (n,), the right classes.
      epsilon: radius of the l_inf ball, in pixel values.
      restarts: random points to begin at, for images that withstand.
      steps: gradients from each of them.
      seed: of the random points.
      progress: show a progress bar.

    Returns:
      bool (n,).

    Example:
      >>> def logits_fn(x):  # reads class 1 where the first pixel is above a half
      ...     return jnp.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], axis=-1)
      >>> images = np.array([0.2, 0.45]).reshape(2, 1, 1, 1)
      >>> find(logits_fn, images, np.array([0, 0]), 0.1, restarts=1, steps=10)
      array([False,  True])
    """

    def margins(x: jax.Array, wanted: jax.Array) -> jax.Array:
        return jax.vmap(margin_of)(logits_fn(x).astype(jnp.float32), wanted)

    @jax.jit
    def step(x: jax.Array, here: jax.Array, wanted: jax.Array, size: jax.Array) -> tuple:
        x = uphill(lambda x: -margins(x, wanted).sum(), x, here, epsilon, size)
        return x, margins(x, wanted) < 0

    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    found = np.zeros(len(images), bool)
    keys = jax.random.split(jax.random.key(seed), restarts)
    for key in tqdm(keys, desc="restarts", disable=not progress):
        left = np.flatnonzero(~found)
        for batch in np.split(left, range(_BATCH, len(left), _BATCH)) if len(left) else []:
            padded = np.resize(batch, _BATCH)  # one shape, compiled once
            here, wanted = jnp.asarray(images[padded]), jnp.asarray(labels[padded])
            x, ever = random_start(here, key, epsilon), jnp.zeros(_BATCH, bool)
            for i in range(steps):
                x, misread = step(x, here, wanted, jnp.float32(epsilon / 4 * (1 - i / steps)))
                ever |= misread
            found[batch] = np.asarray(ever)[: len(batch)]
    return found
