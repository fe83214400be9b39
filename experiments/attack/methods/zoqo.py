"""ZOQO (Bar and Giryes, arXiv 2501.06736) on the codes of the ball.

The perturbation is a `QuantizedArray` whose legal codes lie in [-epsilon, epsilon], so no step and
no probe leaves the ball. Both ends of every direction are asked for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["grid", "make"]


class _State(NamedTuple):
    perturbation: zq.QuantizedArray  # (height, width * channels)
    step: zq.State


def grid(config: Config) -> zq.Quantizer:
    """The grid whose outermost codes are the faces of the ball.

    The paper's step is 2 epsilon / (2^bits - 1), and the codes of [-epsilon, epsilon] with 0 among
    them end at 0.996 epsilon with 8 bits, but at 0.67 epsilon with 2. A range a little wider has as
    many codes, and the last ones at epsilon (less a millionth, lest rounding leave the ball).

    Example:
      >>> quantizer = grid(Config(epsilon=0.3, bits=2))
      >>> [round(x, 5) for x in zq.dequantize(quantizer(jnp.array([-1.0, 0.0, 1.0]))).tolist()]
      [-0.3, 0.0, 0.3]
    """
    levels = 2**config.bits
    wider = (levels - 1) / (levels - 2) * (1 - 1e-6)
    return zq.Quantizer(bits=config.bits, range=config.epsilon * wider)


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """ZOQO with the config's noise, structure and step.

    Where it says 0, `Config.used` has the default.
    """
    config = config.used()
    quantizer = grid(config)
    first, num_queries = config.learning_rate, config.num_queries

    def learning_rate(count: jax.Array) -> jax.Array:
        passed = count / config.decay_steps if config.decay_steps else jnp.zeros(())
        return first / jnp.sqrt(1.0 + passed)

    tx = zq.zoqo(
        learning_rate=learning_rate,
        radius=config.radius,
        key=jax.random.key(0),  # `init` gives each image its own
        num_queries=num_queries,
        noise=config.noise,
        structure=config.structure,
        density=config.density if config.structure == "sparse" else 1.0,
        step=config.step,
    )

    def init(key: jax.Array, image: jax.Array) -> _State:
        height, width, channels = image.shape
        perturbation = quantizer(jnp.zeros((height, width * channels), jnp.float32))
        return _State(perturbation, tx.init(perturbation)._replace(key=key))

    def ask(state: _State) -> jax.Array:
        def ends(query: jax.Array) -> jax.Array:
            probes = tx.probes(state.step, state.perturbation, query)
            sides = (zq.queries.endpoints(state.perturbation, probes, side) for side in (1, -1))
            return jnp.stack([zq.dequantize(side) for side in sides])

        return jax.vmap(ends)(jnp.arange(num_queries)).reshape(-1, *shape)

    def tell(state: _State, losses: jax.Array) -> Any:
        heard = zq.queries.differences(losses.reshape(num_queries, 2))
        updates, step = tx.update(None, state.step, state.perturbation, differences=heard)
        return _State(optax.apply_updates(state.perturbation, updates), step)

    return Method(init, ask, tell, 2 * num_queries)
