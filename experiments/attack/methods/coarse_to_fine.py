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
  round to round, down to single pixels;
- what to do when that has not helped: an image that withstands it gets the rest of the budget in
  new searches by random squares, Square Attack's, each from stripes of its own: as many as have
  three questions for each value of the image, or one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments.attack.config import Config
from experiments.attack.methods import corners
from experiments.attack.methods.method import Method
from experiments.attack.methods.square import changed, side, stripes
from experiments.attack.methods.zoqo import grid

__all__ = ["blocks", "count_of_blocks", "following", "make", "patterns", "share", "starts"]

_STRIDE = 10_007  # between one block of a round and the next, where it visits each of them once
_PATIENCE = 3  # questions of a search by random squares, at least, for each value of the image
_SHARES = {1: 0.3, 3: 0.1}  # of the pixels, in a search's first square, by channels


class _State(NamedTuple):
    starts: jax.Array  # int8 signs (patterns, height, width, channels)
    after: jax.Array  # int32 (patterns,), the place of the question that follows each pattern's
    signs: jax.Array  # int8 signs, the image's shape: codes at the upper or the lower edge
    loss: jax.Array  # at them; inf before the first answer of a search
    count: jax.Array  # int32 (), place of the question, of those that could be asked
    tried: jax.Array  # bool (corners,), of images with few; see corners.py
    key: jax.Array


def share(config: Config, channels: int) -> float:
    """Of the pixels in a search's first square."""
    return config.density or _SHARES.get(channels, 0.3)


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Blocks from coarse to fine on the grid of `config.bits` bits."""
    low, high = zq.dequantize(grid(config)(jnp.array([-config.epsilon, config.epsilon])))
    first_block = len(starts(jnp.zeros(shape), config))
    first_search = first_block + count_of_blocks(shape)
    left = max(config.budget - first_search, 1)
    length = left // max(left // (_PATIENCE * math.prod(shape)), 1)  # of a search
    first_share = share(config, shape[-1])

    def asked(state: _State) -> jax.Array:
        """The signs to try: the patterns, then what has one block flipped, then random squares."""
        key = jax.random.fold_in(state.key, state.count)
        begun = state.starts[jnp.minimum(state.count, first_block - 1)]
        flipped = blocks(state.count - first_block, state.key, shape)[..., None]
        place = (state.count - first_search) % length
        square = changed(state.signs, key, side(place - 1, first_share, shape, length))
        random = jnp.where(place == 0, stripes(key, shape), square)
        in_order = jnp.where(flipped, -state.signs, state.signs)
        later = jnp.where(state.count < first_search, in_order, random)
        proposed = jnp.where(state.count < first_block, begun, later)
        return corners.untried(state.tried, proposed, state.signs)

    def init(key: jax.Array, image: jax.Array) -> _State:
        signs = starts(image, config)
        tried = corners.none_tried(shape, config.budget)
        never, zero = jnp.float32(jnp.inf), jnp.int32(0)
        return _State(signs, following(signs), signs[0], never, zero, tried, key)

    def ask(state: _State) -> jax.Array:
        return jnp.where(asked(state) > 0, high, low)[None]

    def tell(state: _State, losses: jax.Array) -> _State:
        since = state.count - first_search
        is_new = (since >= 0) & (since % length == 0)
        better, new = (losses[0] < state.loss) | is_new, asked(state)
        after = jnp.append(state.after, state.count + 1)[jnp.minimum(state.count, first_block)]
        return state._replace(
            signs=jnp.where(better, new, state.signs),
            loss=jnp.where(better, losses[0], state.loss),
            count=after,
            tried=corners.with_one(state.tried, new),
        )

    return Method(init, ask, tell, 1, lambda state: corners.all_tried(state.tried))


def starts(image: jax.Array, config: Config) -> jax.Array:
    """The signs that a search begins with, int8 (starts, height, width, channels).

    The four of `patterns` or, where the configuration wants none, all 1.

    Example:
      >>> starts(jnp.zeros((28, 28, 1)), Config(patterns=False)).shape
      (1, 28, 28, 1)
    """
    return patterns(image) if config.patterns else jnp.ones((1, *image.shape), jnp.int8)


def patterns(image: jax.Array) -> jax.Array:
    """Four patterns of the whole image, int8 signs (patterns, height, width, channels).

    Example:
      >>> patterns(jnp.zeros((28, 28, 1))).shape
      (4, 28, 28, 1)
    """
    rows, columns = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])[None, :]

    def striped(place: jax.Array, width: int) -> jax.Array:
        signs = 1 - 2 * ((place // width) % 2)
        return jnp.broadcast_to(signs[..., None], image.shape)

    def darkened(signs: jax.Array) -> jax.Array:
        return jnp.where(image > 0.5, -1, signs)

    return jnp.stack(
        [
            darkened(-striped(rows, 2) * striped(columns, 2)),
            striped(rows, 4),
            darkened(striped(columns, 4)),
            striped(rows, 3),
        ]
    ).astype(jnp.int8)


def following(starts: jax.Array) -> jax.Array:
    """The place after each pattern's: the next pattern that is no earlier one's like, or the end.

    On an image of three rows, or on a white one, some patterns are the same.

    Args:
      starts: of `patterns`.

    Returns:
      int32 (patterns,).

    Example:
      >>> following(patterns(jnp.zeros((28, 28, 1)))).tolist()
      [1, 2, 3, 4]
    """
    count = len(starts)
    alike = (starts[:, None] == starts[None]).all(axis=(2, 3, 4))
    is_new = jnp.append(~jnp.tril(alike, -1).any(axis=1), True)
    place = jnp.arange(count + 1)
    return jnp.argmax(is_new & (place > place[:count, None]), axis=1).astype(jnp.int32)


def blocks(step: jax.Array, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """The block that a step flips, bool (height, width).

    All squares of side h/2, then h/4 and so on, down to single pixels, each round in order from a
    random one on, so far apart that it visits each of them once.

    Example:
      >>> key = jax.random.key(0)
      >>> [int(blocks(jnp.int32(i), key, (28, 28, 1)).sum()) for i in (0, 4, 20, 69)]
      [196, 49, 16, 4]
    """
    height, width, _ = shape
    sides, across, counts = _rounds(shape)
    ends = np.cumsum(counts)
    level = jnp.minimum((step >= jnp.asarray(ends)).sum(), len(sides) - 1)
    strides = np.array([_stride(count) for count in counts.tolist()])
    size, row_length, count, stride, start = (
        jnp.asarray(x, jnp.int32)[level] for x in (sides, across, counts, strides, ends - counts)
    )
    first = jax.random.randint(jax.random.fold_in(key, level), (), 0, count)
    number = ((step - start) * stride + first) % count
    top, left = jnp.divmod(number, row_length)
    is_row, is_column = jnp.arange(height) // size == top, jnp.arange(width) // size == left
    return is_row[:, None] & is_column[None, :]


def _stride(count: int) -> int:
    """`_STRIDE`, or less: prime to the count, and what is multiplied by it stays in an int32."""
    stride = min(_STRIDE, (2**31 - 1) // count - 1)
    while math.gcd(stride, count) > 1:
        stride -= 1
    return stride


def count_of_blocks(shape: tuple[int, int, int]) -> int:
    """How many steps go through all blocks once.

    Example:
      >>> count_of_blocks((28, 28, 1))
      1049
    """
    return int(_rounds(shape)[2].sum())


def _rounds(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each round the side of its squares, how many lie beside each other, and their count."""
    height, width, _ = shape
    halvings = range(1, max(math.ceil(math.log2(max(height, width))), 1) + 1)
    sides = np.array([-(-max(height, width) >> k) for k in halvings])
    across = -(-width // sides)
    return sides, across, across * -(-height // sides)
