"""Training small networks: by back-propagation, or by queries at the best of a few rates.

A lane is the parameters of a run that has its own start and key. Lanes follow each other in one
compiled program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.tasks import Examples, Task

__all__ = [
    "Make",
    "Schedule",
    "accuracy",
    "adam",
    "at_best_rate",
    "by_backpropagation",
    "by_queries",
    "cross_entropy",
    "scores",
]

Schedule = Callable[[Any], jax.Array]
Make = Callable[[Params, jax.Array, Schedule], tuple[optax.GradientTransformationExtraArgs, ...]]
"""(params, key, learning rate) -> transformations that take turns in every step."""


def cross_entropy(logits: Any, params: Params, batch: Examples) -> jax.Array:
    """The mean over a batch, nats."""
    answers = zq.quaxify(logits)(params, batch.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(answers, batch.labels).mean()


def accuracy(logits: Any, params: Params, batch: Examples) -> jax.Array:
    """The fraction of a batch that is answered as it is labelled."""
    answers = zq.quaxify(logits)(params, batch.inputs)
    return (answers.argmax(-1) == batch.labels).mean()


def scores(task: Task, lanes: Sequence[Params], examples: Examples) -> dict[str, list[Any]]:
    """The "loss", None where it is not finite, and "accuracy" of each lane."""
    pairs = [jax.device_get(_score(task, params, examples)) for params in lanes]
    return {
        "loss": [float(loss) if math.isfinite(loss) else None for loss, _ in pairs],
        "accuracy": [float(fraction) for _, fraction in pairs],
    }


@jax.jit
def _score(task: Task, params: Params, examples: Examples) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(task.logits, params, examples), accuracy(task.logits, params, examples)


def by_backpropagation(
    task: Task, count: int, *, steps: int, rate: float = 3e-3, batch_size: int = 64
) -> list[Params]:
    """So many lanes, trained in floats by steps of Adam from a start of their own each.

    Args:
      task: the model and what it learns from.
      count: of lanes.
      steps: of Adam; the rate falls linearly to zero.
      rate: of Adam at first.
      batch_size: examples a step.
    """
    lanes = []
    for key in map(jax.random.key, range(count)):
        batches = jax.vmap(functools.partial(jax.random.fold_in, key))(1 + jnp.arange(steps))
        start = jax.random.fold_in(key, 0)
        lanes.append(adam(task, start, batches, rate=rate, falls=True, batch_size=batch_size))
    return lanes


@functools.partial(jax.jit, static_argnames=("falls", "batch_size"))
def adam(
    task: Task,
    start: jax.Array,
    batches: jax.Array,
    *,
    rate: float | jax.Array,
    falls: bool,
    batch_size: int,
) -> Params:
    """Parameters after a step of Adam for each batch.

    Args:
      task: the model and what it learns from.
      start: key of the task's own start.
      batches: keys, one a step.
      rate: of Adam at first.
      falls: whether it falls linearly to zero, or stays.
      batch_size: examples a step, drawn with replacement.
    """
    tx = optax.adam(_falling(rate, len(batches)) if falls else rate)

    def step(now: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = now
        batch = task.train.draw(key, batch_size)
        gradient = jax.grad(lambda params: cross_entropy(task.logits, params, batch))(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    params = task.init(start)
    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


@functools.partial(jax.jit, static_argnames=("make", "steps", "batch_size"))
def by_queries(
    task: Task,
    make: Make,
    params: Params,
    key: jax.Array,
    rate: jax.Array,
    *,
    steps: int,
    batch_size: int,
) -> tuple[Params, jax.Array]:
    """Train a lane by methods that see no more than losses.

    Args:
      task: the model and what it learns from.
      make: the method; for each function a program is compiled.
      params: where the lane begins.
      key: of the lane.
      rate: at first; it falls linearly to zero.
      steps: of each of the method's transformations.
      batch_size: examples a step, drawn with replacement.

    Returns:
      The parameters, and how often the loss was evaluated.
    """
    txs = make(params, jax.random.fold_in(key, 0), _falling(rate, steps))
    data_key = jax.random.fold_in(key, 1)

    def turn(which: int, i: jax.Array, now: Any) -> Any:
        params, states = now
        batch = task.train.draw(jax.random.fold_in(data_key, i), batch_size)
        loss = functools.partial(cross_entropy, task.logits, batch=batch)
        updates, state = txs[which].update(None, states[which], params, value_fn=loss)
        states = (*states[:which], state, *states[which + 1 :])
        return optax.apply_updates(params, updates), states

    turns = [functools.partial(turn, which) for which in range(len(txs))]
    first = (params, tuple(tx.init(params) for tx in txs))
    (params, states), _ = jax.lax.scan(
        lambda now, i: (jax.lax.switch(i % len(txs), turns, i, now), None),
        first,
        jnp.arange(steps * len(txs)),
    )
    return params, sum(optax.tree.get(state, "evaluations") for state in states)


def at_best_rate(
    task: Task,
    make: Make,
    lanes: Sequence[Params],
    key: jax.Array,
    rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
) -> dict[str, Any]:
    """Train at the rate that does best on the validation split, and read the test split.

    Each rate is tried in a whole run from the last lane's start. The least loss wins; then the
    other lanes run with it.

    Args:
      task: the model and what it learns from.
      make: the method.
      lanes: where each begins; the last one is there for the choice alone.
      key: of all lanes.
      rates: to choose from, in order.
      steps: of each of the method's transformations.
      batch_size: examples a step.

    Returns:
      "rate", whether it is the first or last ("at_edge"), "queries" of one run, and the `scores` of
      the runs.
    """
    train = functools.partial(by_queries, task, make, steps=steps, batch_size=batch_size)
    *starts, trial = lanes
    *keys, trial_key = jax.random.split(key, len(lanes))
    tried = [train(trial, trial_key, jnp.float32(rate))[0] for rate in rates]
    losses = [math.inf if x is None else x for x in scores(task, tried, task.validation)["loss"]]
    best = losses.index(min(losses))
    rate = jnp.float32(rates[best])
    runs = [train(start, own, rate) for start, own in zip(starts, keys, strict=True)]
    return {
        "rate": rates[best],
        "at_edge": best in (0, len(rates) - 1),
        "queries": int(runs[0][1]),
        **scores(task, [params for params, _ in runs], task.test),
    }


def _falling(rate: Any, steps: int) -> Schedule:
    return lambda count: rate * (1.0 - jnp.asarray(count, jnp.float32) / steps)
