"""SignHunter (Al-Dujaili and O'Reilly, ICLR 2020, arXiv 1902.06894), algorithm 2 for l_inf.

A sign for each pixel, all + at first. Ranges of the flattened image, halved from round to round,
are flipped one after another; a flip stays unless the loss is the worse for it. After the round of
single pixels the search begins anew round the point reached.
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
    place: jax.Array  # int32 (), of the range in the round


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """SignHunter has no settings but the ball."""
    size = math.prod(shape)
    last_round = math.ceil(math.log2(size))

    def asked(state: _State) -> jax.Array:
        """The signs to try: the first question is the start itself, the others are flips."""
        length = -(-size // (1 << state.round))
        index = jnp.arange(size)
        begin = state.place * length
        flipped = (index >= begin) & (index < begin + length) & jnp.isfinite(state.loss)
        return jnp.where(flipped, -state.signs, state.signs)

    def perturbation(state: _State, signs: jax.Array) -> jax.Array:
        moved = state.center + config.epsilon * signs
        in_ball = jnp.clip(moved, -config.epsilon, config.epsilon)
        return jnp.clip(in_ball, -state.image, 1.0 - state.image)

    def init(key: jax.Array, image: jax.Array) -> _State:
        del key
        flat, zero = image.reshape(-1), jnp.int32(0)
        never = jnp.float32(jnp.inf)
        return _State(flat, jnp.zeros_like(flat), jnp.ones_like(flat), never, zero, zero)

    def ask(state: _State) -> jax.Array:
        return perturbation(state, asked(state)).reshape(1, *shape)

    def tell(state: _State, losses: jax.Array) -> _State:
        started = jnp.isfinite(state.loss)
        stays = losses[0] <= state.loss
        signs = jnp.where(stays, asked(state), state.signs)
        loss = jnp.where(stays, losses[0], state.loss)
        length = -(-size // (1 << state.round))
        round_over = started & ((state.place + 1) * length >= size)
        place = jnp.where(round_over | ~started, 0, state.place + 1)
        round_ = state.round + round_over.astype(jnp.int32)
        all_over = round_ > last_round
        center = jnp.where(all_over, perturbation(state, signs), state.center)
        signs = jnp.where(all_over, jnp.ones_like(signs), signs)
        loss = jnp.where(all_over, jnp.inf, loss)
        return _State(state.image, center, signs, loss, jnp.where(all_over, 0, round_), place)

    return Method(init, ask, tell, 1)
