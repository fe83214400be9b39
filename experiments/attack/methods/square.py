"""Square Attack (Andriushchenko et al., ECCV 2020, arXiv 1912.00049), algorithms 1 and 2 for l_inf.

Random search over corners of the ball: vertical stripes at first, then squares of one random sign a
channel at random places, whose side falls with the queries spent. A square that would change
nothing gets another sign. A change stays where the loss is less.

A square may lie anywhere in the image, as algorithm 2 has it; the authors' code never reaches the
last row and column. On oblong images a square is cut to what fits (the paper's are all square).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack.config import Config
from experiments.attack.methods import corners
from experiments.attack.methods.method import Method

__all__ = ["SHARE", "changed", "make", "side", "stripes"]

SHARE = 0.3
_HALVED_AT = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])  # of 10,000 queries


class _State(NamedTuple):
    signs: jax.Array  # int8 in the image's shape
    loss: jax.Array  # at them; inf before the first answer
    count: jax.Array  # int32 (), questions answered
    tried: jax.Array  # bool (corners,), of images with few; see corners.py
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Square Attack with `config.density` as p, the share of the pixels in the first square."""
    share = config.density or SHARE

    def asked(state: _State) -> jax.Array:
        """The stripes at first, then the signs with one square changed."""
        key = jax.random.fold_in(state.key, state.count)
        now = side(state.count - 1, share, shape, config.budget)
        proposed = jnp.where(state.count == 0, state.signs, changed(state.signs, key, now))
        return corners.untried(state.tried, proposed, state.signs)

    def init(key: jax.Array, image: jax.Array) -> _State:
        del image
        tried = corners.none_tried(shape, config.budget)
        return _State(stripes(key, shape), jnp.float32(jnp.inf), jnp.int32(0), tried, key)

    def ask(state: _State) -> jax.Array:
        return config.epsilon * asked(state)[None].astype(jnp.float32)

    def tell(state: _State, losses: jax.Array) -> _State:
        stays, new = losses[0] < state.loss, asked(state)
        signs, loss = jnp.where(stays, new, state.signs), jnp.where(stays, losses[0], state.loss)
        tried = corners.with_one(state.tried, new)
        return _State(signs, loss, state.count + 1, tried, state.key)

    return Method(init, ask, tell, 1, lambda state: corners.all_tried(state.tried))


def changed(signs: jax.Array, key: jax.Array, side: jax.Array) -> jax.Array:
    """The signs with one random square of one random sign a channel, always another image.

    Args:
      signs: int8 (height, width, channels).
      key: of what is drawn.
      side: of the square, in pixels, int32 (); cut to one less than the image's height and width,
        so that there is more than one place for it, but at least 1.

    Returns:
      int8 signs of the same shape.

    Example:
      >>> signs = jnp.ones((1, 5, 40), jnp.int8)
      >>> after = changed(signs, jax.random.key(0), jnp.int32(3))
      >>> int((after != signs).any((0, 2)).sum())
      3
    """
    height, width, channels = signs.shape
    keys = jax.random.split(key, 5)
    tall, wide = (jnp.clip(side, 1, max(n - 1, 1)) for n in (height, width))
    top = jax.random.randint(keys[0], (), 0, height - tall + 1)
    left = jax.random.randint(keys[1], (), 0, width - wide + 1)
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    drawn = jax.random.rademacher(keys[2], (channels,), jnp.int8)
    same = (~inside | (signs == drawn)).all()
    # Another one, each as likely: the first channel that differs is the i-th with probability
    # 2^(channels - 1 - i) / (2^channels - 1), and those after it are free.
    channel = jnp.arange(channels)
    first = jax.random.categorical(keys[3], -jnp.log(2.0) * channel.astype(jnp.float32))
    free = jax.random.rademacher(keys[4], (channels,), jnp.int8)
    other = jnp.where(channel == first, -drawn, jnp.where(channel > first, free, drawn))
    return jnp.where(inside, jnp.where(same, other, drawn), signs)


def stripes(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Vertical stripes of one pixel, of random signs a channel, int8 (height, width, channels)."""
    return jnp.broadcast_to(jax.random.rademacher(key, (1, *shape[1:]), jnp.int8), shape)


def side(
    iteration: jax.Array, share: float, shape: tuple[int, int, int], iterations: int
) -> jax.Array:
    """The side of the square that one of so many iterations tries, in pixels, int32 ().

    Args:
      iteration: int32 ().
      share: of the pixels in the first square.
      shape: of the image.
      iterations: of the search.

    Example:
      >>> [int(side(jnp.int32(i), 0.8, (28, 28, 1), 10_000)) for i in (0, 100, 9_999)]
      [25, 13, 1]
    """
    scaled = iteration.astype(jnp.float32) * (10_000 / iterations)
    halvings = (scaled > jnp.asarray(_HALVED_AT, jnp.float32)).sum()
    share_now = share * jnp.exp2(-halvings.astype(jnp.float32))
    s = jnp.round(jnp.sqrt(share_now * shape[0] * shape[1])).astype(jnp.int32)
    return jnp.maximum(s, 1)
