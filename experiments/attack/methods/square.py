"""Square Attack (Andriushchenko et al., ECCV 2020, arXiv 1912.00049), algorithms 1 and 2 for l_inf.

Random search over corners of the ball: vertical stripes at first, then squares of one random sign a
channel at random places, whose side falls with the queries spent. A square that would change
nothing gets another sign. A change stays where the loss is less.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["SHARE", "changed", "make", "side", "stripes"]

SHARE = 0.3
_HALVED_AT = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])  # of 10,000 queries


class _State(NamedTuple):
    signs: jax.Array  # int8 in the image's shape
    loss: jax.Array  # at them; inf before the first answer
    count: jax.Array  # int32 (), questions answered
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Square Attack with `config.density` as p, the share of the pixels in the first square."""
    share = config.density or SHARE

    def asked(state: _State) -> jax.Array:
        key = jax.random.fold_in(state.key, state.count)
        return changed(state.signs, key, side(state.count - 1, share, shape, config.budget))

    def init(key: jax.Array, image: jax.Array) -> _State:
        del image
        return _State(stripes(key, shape), jnp.float32(jnp.inf), jnp.int32(0), key)

    def ask(state: _State) -> jax.Array:
        signs = jnp.where(state.count == 0, state.signs, asked(state))
        return config.epsilon * signs[None].astype(jnp.float32)

    def tell(state: _State, losses: jax.Array) -> _State:
        stays = losses[0] < state.loss
        signs = jnp.where(stays & (state.count > 0), asked(state), state.signs)
        return _State(signs, jnp.where(stays, losses[0], state.loss), state.count + 1, state.key)

    return Method(init, ask, tell, 1)


def changed(signs: jax.Array, key: jax.Array, side: jax.Array) -> jax.Array:
    """The signs with one random square of one random sign a channel, always another image.

    Args:
      signs: int8 (height, width, channels).
      key: of what is drawn.
      side: of the square, in pixels, int32 ().

    Returns:
      int8 signs of the same shape.
    """
    height, width, channels = signs.shape
    choices = 2**channels

    def signs_of(number: jax.Array) -> jax.Array:
        """A sign for each channel, from a number below `choices`."""
        return (2 * ((number >> jnp.arange(channels)) & 1) - 1).astype(jnp.int8)

    keys = jax.random.split(key, 4)
    top, left = (
        jax.random.randint(k, (), 0, jnp.maximum(n - side, 1))
        for k, n in zip(keys[:2], (height, width), strict=True)
    )
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    drawn = jax.random.randint(keys[2], (), 0, choices)
    same = (~inside | (signs == signs_of(drawn))).all()
    another = (drawn + jax.random.randint(keys[3], (), 1, choices)) % choices
    return jnp.where(inside, signs_of(jnp.where(same, another, drawn)), signs)


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
    return jnp.clip(s, 1, min(shape[:2]) - 1)
