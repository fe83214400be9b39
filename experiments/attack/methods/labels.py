"""ZOQO from coarse to fine where the network answers with a label and nothing else.

All that is ever asked is whether the image is misread at some signs and radius. The signs say for
each value whether its code rises or falls, the radius by how much. So two directions are compared
as RayS compares them (Chen and Gu, KDD 2020, arXiv 2006.12792): at a radius at which one is known
to be misread, one question tells whether the other is. The search is over once that radius is
inside the ball. What is chosen better here is

- where to begin: the patterns of `coarse_to_fine`, asked about at the edge of the ball; if none is
  misread there, at a radius half as large again, and so on;
- what to flip: squares from coarse to fine instead of ranges of the flattened image, in colour
  first in all channels, then once more in one channel after another;
- what a radius is: an integer, `_FINE` at the edge of the ball, whatever the bits. Where it lies
  between two codes of the grid, some values have the upper one and the others the lower one, by a
  threshold of each value's own, as in dithering. Else a grid of few codes would hide every flip
  that shortens the radius by less than a code. Small squares do so even with 8 bits: with radii of
  whole codes 5 of 1,000 pictures withstood 10,000 questions;
- how a radius falls. RayS looks at a flip at the radius reached, and if it is misread there
  searches the new radius by halving, a dozen questions. Here a flip is looked at a few codes nearer
  to the image. If it is misread, both the flip and the nearer radius stay, and the next step is
  longer; if not, neither stays, and it is shorter, by the rule with which evolution strategies of
  one child adapt theirs, so that one flip of three stays;
- what to do when all flips were looked at: a new search, from a coarse mosaic of random signs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.attack.config import Config
from experiments.attack.methods.coarse_to_fine import (
    blocks,
    count_of_blocks,
    following,
    starts,
)
from experiments.attack.methods.method import Method

__all__ = ["make"]

_FINE = 127 * 16  # the radius of the ball; see above
_MOST = 2**24  # a radius at most: its product with a code stays in an int32
_PARTS = 16  # of the first radius, a start's: how well it is searched, and the first step
_LONGER, _SHORTER = 1.5, 1.5**-0.5  # a step after a success, and after a failure
_LONGEST = 1 / 4  # step, of the radius
_MOSAICS = 3  # kinds of random starts


class _State(NamedTuple):
    starts: jax.Array  # int8 signs (patterns, height, width, channels)
    after: jax.Array  # int32 (patterns,), the place of the pattern that follows each
    signs: jax.Array  # int8 signs, the image's shape
    radius: jax.Array  # int32 (), at which they are misread, once a start was
    low: jax.Array  # int32 (), at which they are not
    step: jax.Array  # float32 (), of the radius; 0 before the first flip
    place: jax.Array  # int32 (), of the start, or of the flip
    search: jax.Array  # int32 (), searches finished
    is_begun: jax.Array  # bool (), whether a start was misread
    thresholds: jax.Array  # uint16 in the image's shape, below _FINE, of rounding up to a code
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Labels alone, on the grid of `config.bits` bits."""
    edge = 2 ** (config.bits - 1) - 1  # of the ball, in codes
    code = config.epsilon / edge * (1 - 1e-6)  # lest rounding leave the ball
    farthest = min(max(math.ceil(_FINE / config.epsilon), _FINE), _MOST)  # all is black or white
    count = len(starts(jnp.zeros(shape), config))
    squares, channels = count_of_blocks(shape), shape[-1]
    flips = squares * (1 + channels) if channels > 1 else squares

    def start(state: _State) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.search), state.place)
        pattern = state.starts[jnp.minimum(state.place, count - 1)]
        return jnp.where(state.place < count, pattern, _mosaic(key, shape))

    def flip(state: _State) -> jax.Array:
        """The signs with a square flipped: first in all channels, then in one after another."""
        key = jax.random.fold_in(state.key, state.search)
        number, channel = jnp.divmod(state.place - squares, channels)
        is_whole = state.place < squares
        square = blocks(jnp.where(is_whole, state.place, number), key, shape)
        is_inside = square[..., None] & (is_whole | (jnp.arange(channels) == channel))
        return jnp.where(is_inside, -state.signs, state.signs)

    def asked(state: _State) -> tuple[jax.Array, jax.Array]:
        """The signs and the radius to look at."""
        is_flip = state.step > 0
        nearer = state.radius - jnp.maximum(jnp.round(state.step), 1.0).astype(jnp.int32)
        middle = (state.low + state.radius) // 2
        radius = jnp.where(is_flip, jnp.maximum(nearer, 1), middle)
        signs = jnp.where(is_flip, flip(state), state.signs)
        signs = jnp.where(state.is_begun, signs, start(state))
        return signs, jnp.where(state.is_begun, radius, state.radius)

    def init(key: jax.Array, image: jax.Array) -> _State:
        key, other = jax.random.split(key)
        first, zero = starts(image, config), jnp.int32(0)
        return _State(
            starts=first,
            after=following(first),
            signs=first[0],
            radius=jnp.int32(_FINE),
            low=zero,
            step=jnp.float32(0),
            place=zero,
            search=zero,
            is_begun=jnp.bool(False),
            thresholds=jax.random.randint(other, shape, 0, _FINE, jnp.uint16),
            key=key,
        )

    def ask(state: _State) -> jax.Array:
        signs, radius = asked(state)
        sizes = (radius * edge + state.thresholds.astype(jnp.int32)) // _FINE
        codes = signs.astype(jnp.int32) * sizes
        return (codes.astype(jnp.float32) * code)[None]

    def tell(state: _State, misread: jax.Array) -> _State:
        signs, radius = asked(state)
        stays = misread[0]
        taken = state._replace(
            signs=jnp.where(stays, signs, state.signs),
            radius=jnp.where(stays, radius, state.radius),
            is_begun=state.is_begun | stays,
        )
        halved = taken._replace(low=jnp.where(stays, state.low, radius))
        is_start = ~state.is_begun
        begun = _either(is_start & stays, taken, _next_start(state, farthest))
        found = _searched(_either(is_start, begun, halved))
        flipped = _ended(_stepped(taken, stays), flips, count)
        return _either(state.step > 0, flipped, found)

    return Method(init, ask, tell, 1, sees_labels=True)


def _either(condition: jax.Array, true: _State, false: _State) -> _State:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), true, false)


def _mosaic(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Random signs, the same in each of 2 x 2, 4 x 4 or 8 x 8 squares of a channel."""
    height, width, channels = shape
    keys = jax.random.split(key)
    across = jnp.int32(2) << jax.random.randint(keys[0], (), 0, _MOSAICS)
    drawn = jax.random.rademacher(keys[1], (2**_MOSAICS, 2**_MOSAICS, channels), jnp.int8)
    side = -(-max(height, width) // across)
    rows, columns = jnp.arange(height) // side, jnp.arange(width) // side
    return drawn[rows[:, None], columns[None, :]]


def _next_start(state: _State, farthest: int) -> _State:
    """The next pattern, or the first one, or what was drawn, at a larger radius."""
    count = len(state.after)
    is_drawn = state.place >= count
    following_one = state.after[jnp.minimum(state.place, count - 1)]
    place = jnp.where(is_drawn, state.place + 1, following_one)
    grows = (place >= count) & (state.radius < farthest)
    again = jnp.where(is_drawn, state.place, 0)
    larger = jnp.minimum(state.radius * 3 // 2, farthest)
    return state._replace(
        place=jnp.where(grows, again, place),
        low=jnp.where(grows, state.radius, state.low),
        radius=jnp.where(grows, larger, state.radius),
    )


def _searched(state: _State) -> _State:
    """On to the flips, if the radius of a start is known well enough."""
    part = state.radius // _PARTS
    is_known = state.is_begun & (state.radius - state.low <= part)
    return state._replace(
        step=jnp.where(is_known, part, 0).astype(jnp.float32),
        place=jnp.where(is_known, 0, state.place),
    )


def _stepped(state: _State, stays: jax.Array) -> _State:
    """The next flip, and a longer or a shorter step."""
    longest = state.radius.astype(jnp.float32) * _LONGEST
    longer = jnp.minimum(state.step * _LONGER, longest)
    step = jnp.where(stays, longer, state.step * _SHORTER)
    return state._replace(step=jnp.maximum(step, 1.0), place=state.place + 1)


def _ended(state: _State, flips: int, count: int) -> _State:
    """A new search from a start that is drawn, once all flips were looked at."""
    zero = jnp.int32(0)
    anew = state._replace(
        radius=jnp.int32(_FINE),
        low=zero,
        step=jnp.float32(0),
        place=jnp.int32(count),
        search=state.search + 1,
        is_begun=jnp.bool(False),
    )
    return _either(state.place >= flips, anew, state)
