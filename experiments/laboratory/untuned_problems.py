"""What `untuned` trains: quadratics and small networks, each with a start, a loss and a score."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments.laboratory.convex import problems as convex
from experiments.laboratory.networks import tasks, training
from experiments.laboratory.networks.tasks import Task

__all__ = ["FLOATS", "GRIDS", "Problem", "network", "quadratic"]

FLOATS = "floats"
GRIDS = {
    "4 bits": zq.Quantizer(4),
    "2 bits": zq.Quantizer(2, axis=0, block=16),
    "8 bits": zq.Quantizer(8),
    "NF4": zq.nf4(),
    "3 bits": zq.Quantizer(3, axis=0, block=16),
    "8 bits in [-1, 1]": zq.Quantizer(8, range=1.0),
}
_DIMENSION = 200
_FEW, _PRETRAINING = 100, 200  # examples that some networks have seen, and steps on them


class Problem(NamedTuple):
    """Something to train, seed by seed.

    Attributes:
      data: seed -> arrays that loss and score are told.
      start: seed -> parameters in floats.
      loss: (data, parameters, key of a batch) -> what queries are told.
      score: (data, parameters, whether on what settings are chosen by) -> the score, and the loss
        without a batch's noise.
      is_accuracy: whether the score is an accuracy; else it is an excess loss.
      rate: about which the rates of slopes lie that are worth trying, see `networks.methods`.
    """

    data: Callable[[int], Any]
    start: Callable[[int], Any]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    score: Callable[[Any, Any, bool], tuple[jax.Array, jax.Array]]
    is_accuracy: bool
    rate: float


@functools.cache
def quadratic(condition: float, noise: float = 0.0) -> Problem:
    """A quadratic of 200 dimensions for each seed, from 0; the score is the loss over that at 0.

    Args:
      condition: of curvatures from 1 to this.
      noise: deviation of an entry of what each batch adds to the gradient.
    """

    def data(seed: int) -> Any:
        made = convex.quadratic(jax.random.key(seed), _DIMENSION, condition=condition)
        return made.optimum, made.hessian

    def excess(data: Any, params: Any) -> jax.Array:
        (x,), (optimum, hessian) = params, data
        return 0.5 * (x - optimum) @ (hessian @ (x - optimum))

    def loss(data: Any, params: Any, key: jax.Array) -> jax.Array:
        clean = zq.quaxify(excess)(data, params)
        if noise == 0:
            return clean
        return clean + zq.quaxify(jnp.dot)(noise * jax.random.normal(key, (_DIMENSION,)), params[0])

    def score(data: Any, params: Any, choosing: bool) -> tuple[jax.Array, jax.Array]:
        del choosing  # by another seed's quadratic
        found = zq.quaxify(excess)(data, params)
        return found / excess(data, [jnp.zeros(_DIMENSION)]), found

    mean = float(np.geomspace(1.0, condition, _DIMENSION).mean())
    return Problem(data, lambda seed: [jnp.zeros(_DIMENSION)], loss, score, False, 1 / mean)


def network(task: Task, start: Callable[[int], Any], batch_size: int) -> Problem:
    """A network; its score is its accuracy on the test split, or on the one to choose by."""

    def loss(task: Task, params: Any, key: jax.Array) -> jax.Array:
        batch = task.train.draw(key, batch_size)
        return training.cross_entropy(task.logits, params, batch)

    def score(task: Task, params: Any, choosing: bool) -> tuple[jax.Array, jax.Array]:
        split = task.validation if choosing else task.test
        of = (task.logits, params, split)
        return training.accuracy(*of), training.cross_entropy(*of)

    return Problem(lambda seed: task, start, loss, score, True, 10.0)


def of_transposed(seed: int, *, steps: int = 100) -> Any:
    """The perceptron of digits, after a few steps of Adam on transposed ones."""
    task, key = tasks.small_digits(transposed=True), jax.random.key(seed)
    batches = jax.random.split(jax.random.fold_in(key, 1), steps)
    start = jax.random.fold_in(key, 0)
    return training.adam(task, start, batches, rate=1e-3, falls=False, batch_size=256)


def of_few(task: Task) -> Callable[[int], Any]:
    """Starts that have seen few examples by back-propagation."""
    few = dataclasses.replace(task, train=task.train.take(slice(_FEW)))
    made = functools.cache(
        lambda seed: training.by_backpropagation(few, seed + 1, steps=_PRETRAINING)
    )
    return lambda seed: made(seed)[seed]


def untrained(task: Task) -> Callable[[int], Any]:
    """Starts as they are drawn."""
    return lambda seed: task.init(jax.random.key(seed))
