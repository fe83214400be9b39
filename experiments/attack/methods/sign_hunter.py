"""SignHunter (Al-Dujaili and O'Reilly, ICLR 2020, arXiv 1902.06894), algorithm 2 for l_inf.

A sign for each pixel, all + at first. Ranges of the flattened image, halved from round to round,
are flipped one after another; a flip stays unless the loss is the worse for it. After the round of
single pixels the search begins anew round the point reached. It draws nothing: round a point where
it began before it would ask what it asked before, and so it is over.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["make"]


class _State(NamedTuple):
    image: jax.Array  # flat
    center: jax.Array  # the perturbation that the signs are added to
    signs: jax.Array  # float32 (size,)
    loss: jax.Array  # at them; inf before the first answer
    round: jax.Array  # int32 ()
    place: jax.Array  # int32 (), of the range in the round; -1 for the start, of no range
    searches: jax.Array  # int32 (), finished
    former: jax.Array  # the center after 0, 1, 2, 4, 8, ... searches
    over: jax.Array  # bool ()


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """SignHunter has no settings but the ball."""
    size = math.prod(shape)
    last_round = math.ceil(math.log2(size))

    def asked(state: _State) -> jax.Array:
        """The signs to try: the first question is the start itself, the others are flips."""
        length = -(-size // (1 << state.round))
        index = jnp.arange(size)
        begin = state.place * length
        flipped = (index >= begin) & (index < begin + length)
        return jnp.where(flipped, -state.signs, state.signs)

    def perturbation(state: _State, signs: jax.Array) -> jax.Array:
        moved = state.center + config.epsilon * signs
        in_ball = jnp.clip(moved, -config.epsilon, config.epsilon)
        return jnp.clip(in_ball, -state.image, 1.0 - state.image)

    def search(image: jax.Array, center: jax.Array) -> _State:
        """The first search round a center."""
        zero, signs = jnp.int32(0), jnp.ones_like(center)
        loss, start = jnp.float32(jnp.inf), jnp.int32(-1)
        return _State(image, center, signs, loss, zero, start, zero, center, jnp.bool(False))

    def init(key: jax.Array, image: jax.Array) -> _State:
        del key
        flat = image.reshape(-1)
        return search(flat, jnp.zeros_like(flat))

    def ask(state: _State) -> jax.Array:
        return perturbation(state, asked(state)).reshape(1, *shape)

    def tell(state: _State, losses: jax.Array) -> _State:
        stays = losses[0] <= state.loss
        signs = jnp.where(stays, asked(state), state.signs)
        loss = jnp.where(stays, losses[0], state.loss)
        length = -(-size // (1 << state.round))
        round_over = (state.place + 1) * length >= size
        place = jnp.where(round_over, 0, state.place + 1)
        round_ = state.round + round_over.astype(jnp.int32)
        going = state._replace(signs=signs, loss=loss, round=round_, place=place)
        anew = begun_anew(state, perturbation(state, signs))
        return jax.tree.map(lambda a, b: jnp.where(round_ > last_round, a, b), anew, going)

    def begun_anew(state: _State, reached: jax.Array) -> _State:
        searches = state.searches + 1
        is_power_of_two = (searches & (searches - 1)) == 0  # so cycles of any length are found
        return search(state.image, reached)._replace(
            searches=searches,
            former=jnp.where(is_power_of_two, reached, state.former),
            over=(reached == state.former).all(),
        )

    return Method(init, ask, tell, 1, lambda state: state.over)
