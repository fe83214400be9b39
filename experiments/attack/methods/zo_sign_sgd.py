"""ZO-SignSGD (Liu et al., "signSGD via Zeroth-Order Oracle", ICLR 2019), on floats.

Settings are those of SignHunter's comparison (Al-Dujaili and O'Reilly, "Sign Bits Are All You Need
for Black-Box Attacks", ICLR 2020): a one-sided estimate from directions that are normal, of length
near one, and far shorter than a step. The point itself is asked for once a step and serves all
directions (SignHunter's code evaluates it anew for each, and counts it once).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["make"]


class _State(NamedTuple):
    perturbation: jax.Array
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """ZO-SignSGD with the config's steps; 0 takes SignHunter's for the image's kind."""
    config = config.used(coloured=shape[-1] == 3)
    eta, mu, num_queries = config.learning_rate, config.radius, config.num_queries
    size = shape[0] * shape[1] * shape[2]

    def directions(state: _State) -> jax.Array:
        return jax.random.normal(state.key, (num_queries, *shape)) / jnp.sqrt(size)

    def init(key: jax.Array, image: jax.Array) -> _State:
        return _State(jnp.zeros_like(image), key)

    def ask(state: _State) -> jax.Array:
        here = state.perturbation[None]
        return jnp.concatenate([here, here + mu * directions(state)])

    def tell(state: _State, losses: jax.Array) -> _State:
        gradient = jnp.tensordot(losses[1:] - losses[0], directions(state), axes=1)
        moved = state.perturbation - eta * jnp.sign(gradient)
        moved = jnp.clip(moved, -config.epsilon, config.epsilon)
        return _State(moved, jax.random.split(state.key)[0])

    return Method(init, ask, tell, num_queries + 1)
