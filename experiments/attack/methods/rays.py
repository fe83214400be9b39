"""RayS (Chen and Gu, KDD 2020, arXiv 2006.12792), algorithms 2 and 3, for l_inf.

A direction is a sign for each pixel, all + at first, and its radius is the least at which the image
is misread. Ranges of the flattened image, halved from stage to stage, are flipped one after
another. A flip is first looked at where the best direction's radius ends; if the image is misread
there as well, a binary search finds the new radius, and the flip stays if it is less.

As in the authors' code the image is flattened channel by channel, the search ends at an l2 length
of 0.001, and after the stage of single pixels more such stages follow. Their code looks for the
first radius up to ten times farther than where every pixel is black or white; here one question
does. A stage of single pixels in which no flip stays would be repeated for ever, and the search is
over.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["make"]

_TOLERANCE = 1e-3  # of a radius, as an l2 length


class _State(NamedTuple):
    image: jax.Array  # (channels * height * width,)
    signs: jax.Array  # int8, of the best direction
    radius: jax.Array  # float32 (), its radius; inf before one is known
    low: jax.Array  # float32 (), a radius at which the flip under search is not misread
    high: jax.Array  # float32 (), one at which it is; 0 while none is under search
    stage: jax.Array  # int32 ()
    place: jax.Array  # int32 (), of the range in the stage
    is_idle: jax.Array  # bool (), no flip stayed in this stage
    is_over: jax.Array  # bool ()


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """RayS has no settings but the ball."""
    del config
    height, width, channels = shape
    size = math.prod(shape)
    last_stage = math.ceil(math.log2(size))
    tolerance = _TOLERANCE / math.sqrt(size)

    def length(state: _State) -> jax.Array:
        return -(-size // (1 << jnp.minimum(state.stage, last_stage)))

    def flipped(state: _State) -> jax.Array:
        """The best signs with the range at hand flipped."""
        begin, index = state.place * length(state), jnp.arange(size)
        is_inside = (index >= begin) & (index < begin + length(state))
        return jnp.where(is_inside, -state.signs, state.signs)

    def asked(state: _State) -> jax.Array:
        """The radius to look at: the best direction's, or the middle of a binary search."""
        first = jnp.minimum(state.radius, 1.0)  # beyond 1 every pixel is black or white
        return jnp.where(state.high > 0, (state.low + state.high) / 2, first)

    def init(key: jax.Array, image: jax.Array) -> _State:
        del key
        flat = jnp.moveaxis(image, -1, 0).reshape(-1)
        zero, never = jnp.float32(0), jnp.bool(False)
        signs = jnp.ones(size, jnp.int8)
        start = jnp.int32(0)
        return _State(
            flat, signs, jnp.float32(jnp.inf), zero, zero, start, start, jnp.bool(True), never
        )

    def ask(state: _State) -> jax.Array:
        moved = asked(state) * flipped(state).astype(jnp.float32)
        changes = jnp.clip(moved, -state.image, 1.0 - state.image)
        return jnp.moveaxis(changes.reshape(channels, height, width), 0, -1)[None]

    def tell(state: _State, misread: jax.Array) -> _State:
        radius = asked(state)
        is_search = state.high > 0
        low = jnp.where(is_search & ~misread[0], radius, state.low)
        high = jnp.where(misread[0], radius, state.high)
        goes_on = (high > 0) & (high - low > tolerance)
        stays = (high > 0) & ~goes_on & (high < state.radius)
        zero = jnp.float32(0)
        after = state._replace(
            signs=jnp.where(stays, flipped(state), state.signs),
            radius=jnp.where(stays, high, state.radius),
            is_idle=state.is_idle & ~stays,
            low=zero,
            high=zero,
        )
        going = state._replace(low=low, high=high)
        following = _next_range(after, length(state), size, last_stage)
        return jax.tree.map(lambda a, b: jnp.where(goes_on, a, b), going, following)

    return Method(init, ask, tell, 1, lambda state: state.is_over, sees_labels=True)


def _next_range(state: _State, length: jax.Array, size: int, last_stage: int) -> _State:
    """On to the next range, or the next stage."""
    ends = (state.place + 1) * length >= size
    return state._replace(
        stage=state.stage + ends.astype(jnp.int32),
        place=jnp.where(ends, 0, state.place + 1),
        is_over=state.is_over | (ends & state.is_idle & (state.stage >= last_stage)),
        is_idle=state.is_idle | ends,
    )
