"""ZOQO whose directions are blocks, from coarse to fine, on the codes of the ball.

A direction is a block of one sign, and m is the whole range of the codes: clamped, one of its two
ends is where the search stands, whose loss is known, and the other has the block's codes at the
other edge of the grid. So a step costs one evaluation, and the sign of the loss difference decides
whether it is taken. SignHunter's flip (Al-Dujaili and O'Reilly, ICLR 2020) is such a step; what
is chosen better here is

- where to begin: of a few patterns of the whole image, whose scale is that of a convolution's
  filters, the one of least loss. Two of them darken whatever is bright, since a bright pixel
  cannot be made much brighter;
- what to flip: squares of the image instead of ranges of its flattened pixels, halved in side from
  round to round. After the round of single pixels the squares are coarse again, and lie elsewhere.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments.attack.config import Config
from experiments.attack.methods.method import Method
from experiments.attack.methods.zoqo import grid

__all__ = ["blocks", "make", "patterns"]

_PRIME = 10_007  # more than blocks in a round, so that multiples of it visit each of them once


class _State(NamedTuple):
    starts: jax.Array  # int8 signs (patterns, height, width, channels)
    signs: jax.Array  # int8 signs, the image's shape: codes at the upper or the lower edge
    loss: jax.Array  # at them; inf before the first answer
    count: jax.Array  # int32 (), questions answered
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Blocks from coarse to fine on the grid of `config.bits` bits."""
    low, high = zq.dequantize(grid(config)(jnp.array([-config.epsilon, config.epsilon])))
    count_of_patterns = len(patterns(jnp.zeros(shape)))

    def asked(state: _State) -> jax.Array:
        """The signs to try: first the patterns, then what has one block flipped."""
        step = state.count - count_of_patterns
        flipped = blocks(step, state.key, shape)[..., None]
        begun = state.starts[jnp.minimum(state.count, count_of_patterns - 1)]
        return jnp.where(step < 0, begun, jnp.where(flipped, -state.signs, state.signs))

    def init(key: jax.Array, image: jax.Array) -> _State:
        starts = patterns(image)
        return _State(starts, starts[0], jnp.float32(jnp.inf), jnp.int32(0), key)

    def ask(state: _State) -> jax.Array:
        return jnp.where(asked(state) > 0, high, low)[None]

    def tell(state: _State, losses: jax.Array) -> _State:
        better = losses[0] < state.loss
        signs = jnp.where(better, asked(state), state.signs)
        loss = jnp.where(better, losses[0], state.loss)
        return state._replace(signs=signs, loss=loss, count=state.count + 1)

    return Method(init, ask, tell, 1)


def patterns(image: jax.Array) -> jax.Array:
    """The signs that a search begins with, int8 (patterns, height, width, channels).

    Example:
      >>> patterns(jnp.zeros((28, 28, 1))).shape
      (4, 28, 28, 1)
    """
    rows, columns = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])[None, :]

    def stripes(place: jax.Array, width: int) -> jax.Array:
        signs = 1 - 2 * ((place // width) % 2)
        return jnp.broadcast_to(signs[..., None], image.shape)

    def darkened(signs: jax.Array) -> jax.Array:
        return jnp.where(image > 0.5, -1, signs)

    return jnp.stack(
        [
            darkened(-stripes(rows, 2) * stripes(columns, 2)),
            stripes(rows, 4),
            darkened(stripes(columns, 4)),
            stripes(rows, 3),
        ]
    ).astype(jnp.int8)


def blocks(step: jax.Array, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """The block that a step flips, bool (height, width).

    A cycle of steps goes through all squares of side h/2, then h/4 and so on, down to single
    pixels, each round in a random order. From the second cycle on the squares are shifted, round
    the borders of the image, by a random number of pixels.

    Example:
      >>> key = jax.random.key(0)
      >>> [int(blocks(jnp.int32(i), key, (28, 28, 1)).sum()) for i in (0, 4, 20, 69)]
      [196, 49, 16, 4]
    """
    height, width, _ = shape
    halvings = range(1, math.ceil(math.log2(max(height, width))) + 1)
    sides = np.array([-(-max(height, width) >> k) for k in halvings])
    across = -(-width // sides)
    counts = across * -(-height // sides)
    ends = np.cumsum(counts)
    cycle, place = jnp.divmod(step, int(ends[-1]))
    level = (place >= jnp.asarray(ends)).sum()
    side, row_length, count = (jnp.asarray(x)[level] for x in (sides, across, counts))
    order_key, shift_key = jax.random.split(jax.random.fold_in(key, cycle * len(sides) + level))
    first = jax.random.randint(order_key, (), 0, count)
    number = ((place - jnp.asarray(ends - counts)[level]) * _PRIME + first) % count
    shift = jnp.where(cycle > 0, jax.random.randint(shift_key, (2,), 0, side), 0)
    top, left = jnp.divmod(number, row_length)
    rows = (jnp.arange(height) + shift[0]) % height
    columns = (jnp.arange(width) + shift[1]) % width
    return (rows // side == top)[:, None] & (columns // side == left)[None, :]
