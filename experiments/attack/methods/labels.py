"""ZOQO from coarse to fine where the network answers with a label and nothing else.

All that is ever asked is whether the image is misread at some signs and radius. The signs say for
each value whether its code rises or falls, the radius by how many codes of the ball's grid. So two
directions are compared as RayS compares them (Chen and Gu, KDD 2020, arXiv 2006.12792): at a radius
at which one is known to be misread, one question tells whether the other is. The search is over
once that radius is inside the ball. What is chosen better here than there is

- where to begin: the patterns of `coarse_to_fine`, asked about at the edge of the ball; if none is
  misread there, at a radius half as large again, and so on;
- what to flip: squares from coarse to fine instead of ranges of the flattened image;
- how a radius falls. RayS looks at a flip at the radius reached, and if it is misread there
  searches the new radius by halving, a dozen questions. Here a flip is looked at a few codes nearer
  to the image. If it is misread, both the flip and the nearer radius stay, and the next step is
  longer; if not, neither stays, and it is shorter, by the rule with which evolution strategies of
  one child adapt their step (a fixed share of successes: one of three).
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
    patterns,
)
from experiments.attack.methods.method import Method
from experiments.attack.methods.square import stripes

__all__ = ["make"]

_GROWTH = 1.5  # of the radius, from one look at all patterns to the next
_PRECISION = 1 / 16  # of the first radius, that of a pattern, and the first step
_LONGER, _SHORTER = 1.5, 1.5**-0.5  # a step after a success, and after a failure
_LONGEST = 1 / 4  # step, of the radius


class _State(NamedTuple):
    starts: jax.Array  # int8 signs (patterns, height, width, channels)
    after: jax.Array  # int32 (patterns,), the place of the pattern that follows each
    signs: jax.Array  # int8 signs, the image's shape
    radius: jax.Array  # int32 (), codes at which they are misread, once a start was
    low: jax.Array  # int32 (), codes at which they are not
    step: jax.Array  # float32 (), codes; 0 before the first flip
    place: jax.Array  # int32 (), of the start, or of the flip
    is_begun: jax.Array  # bool (), whether a start was misread
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """Labels alone, on the grid of `config.bits` bits."""
    edge = 2 ** (config.bits - 1) - 1  # the ball's radius, in codes
    code = config.epsilon / edge * (1 - 1e-6)  # lest rounding leave the ball
    farthest = max(math.ceil(1 / code), edge)  # beyond it every value is 0 or 1
    squares = count_of_blocks(shape)
    count = len(patterns(jnp.zeros(shape)))

    def start(state: _State) -> jax.Array:
        """A pattern; random stripes where none of the patterns is misread at any radius."""
        drawn = stripes(jax.random.fold_in(state.key, state.place), shape)
        pattern = state.starts[jnp.minimum(state.place, count - 1)]
        return jnp.where(state.place < count, pattern, drawn)

    def flip(state: _State) -> jax.Array:
        cycle, place = jnp.divmod(state.place, squares)
        block = blocks(place, jax.random.fold_in(state.key, cycle), shape)
        return jnp.where(block[..., None], -state.signs, state.signs)

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
        starts, zero = patterns(image), jnp.int32(0)
        radius, step, never = jnp.int32(edge), jnp.float32(0), jnp.bool(False)
        return _State(starts, following(starts), starts[0], radius, zero, step, zero, never, key)

    def ask(state: _State) -> jax.Array:
        signs, radius = asked(state)
        return (signs.astype(jnp.float32) * (radius.astype(jnp.float32) * code))[None]

    def tell(state: _State, misread: jax.Array) -> _State:
        signs, radius = asked(state)
        stays = misread[0]
        taken = state._replace(
            signs=jnp.where(stays, signs, state.signs),
            radius=jnp.where(stays, radius, state.radius),
        )
        halved = taken._replace(low=jnp.where(stays, state.low, radius))
        begun = jax.tree.map(
            lambda a, b: jnp.where(stays, a, b),
            taken._replace(is_begun=jnp.bool(True)),
            _next_start(state, farthest),
        )
        found = jax.tree.map(lambda a, b: jnp.where(state.is_begun, a, b), halved, begun)
        return jax.tree.map(
            lambda a, b: jnp.where(state.step > 0, a, b), _stepped(taken, stays), _searched(found)
        )

    return Method(init, ask, tell, 1, sees_labels=True)


def _next_start(state: _State, farthest: int) -> _State:
    """The next pattern, or the first one at a larger radius."""
    count = len(state.after)
    place = jnp.append(state.after, state.place + 1)[jnp.minimum(state.place, count)]
    grows = (place == count) & (state.radius < farthest)
    larger = jnp.maximum((state.radius * _GROWTH).astype(jnp.int32), state.radius + 1)
    return state._replace(
        place=jnp.where(grows, 0, place),
        low=jnp.where(grows, state.radius, state.low),
        radius=jnp.where(grows, jnp.minimum(larger, farthest), state.radius),
    )


def _searched(state: _State) -> _State:
    """On to the flips, if the radius of a start is known well enough."""
    wide = jnp.maximum(state.radius.astype(jnp.float32) * _PRECISION, 1.0)
    is_known = state.is_begun & (state.radius - state.low <= wide)
    return state._replace(
        step=jnp.where(is_known, wide, 0.0), place=jnp.where(is_known, 0, state.place)
    )


def _stepped(state: _State, stays: jax.Array) -> _State:
    """The next flip, and a longer or a shorter step."""
    longest = state.radius.astype(jnp.float32) * _LONGEST
    longer = jnp.minimum(state.step * _LONGER, longest)
    step = jnp.where(stays, longer, state.step * _SHORTER)
    return state._replace(step=jnp.maximum(step, 1.0), place=state.place + 1)
