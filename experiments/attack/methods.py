"""Attack methods: how one image's perturbation changes from one set of queries to the next.

A method is a pair of functions on a single image; `batching.py` maps it over many. Both spend the
model's evaluations honestly: every one counts, and a point that a query has shown to be
misclassified ends the attack there, so that no further evaluation is spent on looking.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from experiments.attack.config import Config

__all__ = ["Attack", "Step", "make"]

Margin = Callable[[jax.Array], jax.Array]


class Step(NamedTuple):
    """What a step came to.

    Attributes:
      perturbation: where the attack now stands; where `found`, a misclassified point.
      state: the method's state.
      found: whether the point is misclassified, bool ().
      margin: least margin among the points of this step inside the ball, float32 ().
    """

    perturbation: Any
    state: Any
    found: jax.Array
    margin: jax.Array


class Attack(NamedTuple):
    """A method, for one image.

    Attributes:
      init: key -> (perturbation, state).
      step: (margin, perturbation, state) -> Step; `margin` maps a perturbation in pixel values,
          flat, to
        the margin of the true class, negative when the perturbed image is misclassified.
      decode: perturbation -> pixel values, flat float32.
      queries_per_step: evaluations of the model that a step spends.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    step: Callable[[Margin, Any, Any], Step]
    decode: Callable[[Any], jax.Array]
    queries_per_step: int


def make(config: Config, size: int) -> Attack:
    """The attack that a config asks for, on perturbations of `size` pixels."""
    return _zoqo(config, size) if config.method == "zoqo" else _zo_sign_sgd(config, size)


def _zoqo(config: Config, size: int) -> Attack:
    """ZOQO on the codes of [-epsilon, epsilon]; legal ones lie inside, so it stays in the ball.

    On a coarse grid a step is a long one, so its sign has to be surer: up to 5 bits the default is
    five directions a step.
    """
    quantizer = zq.Quantizer(bits=config.bits, range=config.epsilon)
    first = config.learning_rate or config.epsilon / 3
    num_queries = config.num_queries or (1 if config.bits > 5 else 5)

    def learning_rate(count: jax.Array) -> jax.Array:
        passed = count / config.decay_steps if config.decay_steps else jnp.zeros(())
        return first / jnp.sqrt(1.0 + passed)

    tx = zq.zoqo(
        learning_rate=learning_rate,
        radius=config.radius or config.epsilon / 3,
        key=jax.random.key(config.seed),
        num_queries=num_queries,
        noise=config.noise,
        step=config.step,
        query_batch=None,
    )

    def init(key: jax.Array) -> tuple[zq.QuantizedArray, zq.StepState]:
        perturbation = quantizer(jnp.zeros(size, jnp.float32))
        return perturbation, tx.init(perturbation)._replace(key=key)

    def step(margin: Margin, perturbation: zq.QuantizedArray, state: zq.StepState) -> Step:
        updates, after = tx.update(None, state, perturbation, value_fn=margin)
        moved = optax.apply_updates(perturbation, updates)
        query, side = jnp.divmod(jnp.argmin(after.losses), 2)
        probes = tx.probes(state, perturbation, query)
        best = zq.queries.endpoints(perturbation, probes, 1 - 2 * side)
        least = after.losses.min()
        found = least < 0
        here = jax.tree.map(lambda a, b: jnp.where(found, a, b), best, moved)
        return Step(here, after, found, least)

    return Attack(init, step, zq.dequantize, 2 * num_queries)


def _zo_sign_sgd(config: Config, size: int) -> Attack:
    """ZO-SignSGD (Liu et al., ICLR 2019) on floats: the sign of a one-sided estimate.

    Defaults are those of SignHunter's comparison (Al-Dujaili & O'Reilly, ICLR 2020) on MNIST at
    epsilon 0.3: difference and step 0.1, q = 10. Only the centre is a candidate: its neighbours
    leave the ball.
    """
    eta = config.learning_rate or config.epsilon / 3
    mu = config.radius or config.epsilon / 3
    num_queries = config.num_queries or 10

    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(size, jnp.float32), key

    def step(margin: Margin, perturbation: jax.Array, key: jax.Array) -> Step:
        key, subkey = jax.random.split(key)
        u = jax.random.normal(subkey, (num_queries, size))
        points = jnp.concatenate([perturbation[None], perturbation + mu * u])
        margins = jax.vmap(margin)(points)
        gradient = (margins[1:] - margins[0]) @ u
        moved = jnp.clip(perturbation - eta * jnp.sign(gradient), -config.epsilon, config.epsilon)
        found = margins[0] < 0
        return Step(jnp.where(found, perturbation, moved), key, found, margins[0])

    return Attack(init, step, lambda perturbation: perturbation, num_queries + 1)
